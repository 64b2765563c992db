import { readFileSync } from 'node:fs';
import { constants as osConstants } from 'node:os';
import { type BlkdebugLimits, wrongLimit } from '../block/filters/blkdebug.js';
import { type BlkdebugEvent, isBlkdebugEvent } from '../block/filters/blkdebug-events.js';
import type { BlkdebugRule, IoType } from '../block/filters/blkdebug-state.js';
import { openErrorText, QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';

const SECTOR = 512;
/** A configuration file is not larger. */
const MAX_CONFIG_BYTES = 1024 * 1024;

const IOTYPES: readonly IoType[] = ['read', 'write', 'write-zeroes', 'discard', 'flush', 'block-status'];
const RULE_KEYS = {
  'inject-error': ['event', 'state', 'iotype', 'errno', 'sector', 'once', 'immediately'],
  'set-state': ['event', 'state', 'new_state'],
} as const;
type Group = keyof typeof RULE_KEYS;
const NUMBERS: readonly string[] = ['state', 'errno', 'sector', 'new_state'];
const FLAGS: readonly string[] = ['once', 'immediately'];
const TRUE: readonly string[] = ['on', 'yes', 'true', 'y'];
const FALSE: readonly string[] = ['off', 'no', 'false', 'n'];

/** What a `blkdebug` node is to do: the rules of its configuration file, then those of its options; and its limits. */
export function blkdebugOptions(options: JsonObject): {
  readonly rules: readonly BlkdebugRule[];
  readonly limits: BlkdebugLimits;
} {
  const number = (key: string): number => Number(options[key] ?? 0);
  if (number('align') < 0) {
    throw new QmpError("Parameter 'align' expects a non-negative number below 2^64");
  }
  const limits: BlkdebugLimits = {
    align: number('align'),
    maxTransfer: number('max-transfer'),
    optWriteZero: number('opt-write-zero'),
    maxWriteZero: number('max-write-zero'),
    optDiscard: number('opt-discard'),
    maxDiscard: number('max-discard'),
  };
  const { config } = options;
  const given = (group: Group): JsonObject[] => {
    const value = options[group];
    return Array.isArray(value) ? value.filter(isObject) : [];
  };
  const read = typeof config === 'string' ? readConfig(config) : { 'inject-error': [], 'set-state': [] };
  const rules = [
    ...[...read['inject-error'], ...given('inject-error')].map(injection),
    ...[...read['set-state'], ...given('set-state')].map(change),
  ];
  const wrong = wrongLimit(limits);
  if (wrong !== undefined) throw new QmpError(wrong);
  return { rules, limits };
}

function injection(rule: JsonObject): BlkdebugRule {
  const sector = Number(rule['sector'] ?? -1);
  return {
    kind: 'inject-error',
    event: eventOf(rule),
    state: Number(rule['state'] ?? 0),
    iotype: iotypeOf(rule),
    errno: Number(rule['errno'] ?? osConstants.errno.EIO),
    offset: sector === -1 ? undefined : sector * SECTOR,
    once: rule['once'] === true,
  };
}

function change(rule: JsonObject): BlkdebugRule {
  const newState = Number(rule['new_state'] ?? 0);
  return { kind: 'set-state', event: eventOf(rule), state: Number(rule['state'] ?? 0), newState };
}

function eventOf({ event }: JsonObject): BlkdebugEvent {
  if (event === undefined) throw new QmpError('Missing event name for rule');
  const name = String(event);
  if (!isBlkdebugEvent(name)) throw new QmpError(`invalid parameter value: ${name}`);
  return name;
}

function iotypeOf({ iotype }: JsonObject): IoType | undefined {
  if (iotype === undefined) return undefined;
  const found = IOTYPES.find((type) => type === iotype);
  if (found === undefined) throw new QmpError(`invalid parameter value: ${String(iotype)}`);
  return found;
}

/** Reads a file of sections `[inject-error]` and `[set-state]` with lines `key = "value"`, as QEMU's `-readconfig` has it. */
function readConfig(path: string): Record<Group, JsonObject[]> {
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (error) {
    const why = openErrorText(error, path).replace(/^.*: /, '');
    throw new QmpError(`Could not read blkdebug config file: ${why}`);
  }
  if (text.length > MAX_CONFIG_BYTES) throw new QmpError('blkdebug config file is too large');
  const groups: Record<Group, JsonObject[]> = { 'inject-error': [], 'set-state': [] };
  let group: Group | undefined;
  let words: Record<string, string> = {};
  const close = (): void => {
    if (group !== undefined) groups[group].push(typed(words));
    words = {};
  };
  for (const line of text.split('\n')) {
    if (/^\s*$/.test(line) || line.startsWith('#')) continue;
    const [, header] = /^\[([^\]]+)/.exec(line) ?? [];
    if (header !== undefined) {
      close();
      const name = header.replace(/ ".*$/, '');
      if (name !== 'inject-error' && name !== 'set-state') {
        throw new QmpError(`There is no option group '${name}'`);
      }
      group = name;
      continue;
    }
    if (group === undefined) throw new QmpError('no group defined');
    const [, key = ''] = /^\s*(\S+)/.exec(line) ?? [];
    const [, value = ''] = /^\s*\S+\s+=\s*"([^"]*)"/.exec(line) ?? [];
    if (!RULE_KEYS[group].some((known) => known === key)) throw new QmpError(`Invalid parameter '${key}'`);
    words[key] = value;
  }
  close();
  return groups;
}

/** The words of a section as what they are. */
function typed(words: Readonly<Record<string, string>>): JsonObject {
  return Object.fromEntries(
    Object.entries(words).map(([key, value]): [string, unknown] => {
      if (NUMBERS.includes(key)) {
        if (!/^[-+]?(?:0x[0-9a-f]+|\d+)$/i.test(value)) {
          throw new QmpError(`Parameter '${key}' expects a number`);
        }
        return [key, Number(value)];
      }
      if (!FLAGS.includes(key)) return [key, value];
      if (!TRUE.includes(value) && !FALSE.includes(value)) {
        throw new QmpError(`Parameter '${key}' expects 'on' or 'off'`);
      }
      return [key, TRUE.includes(value)];
    }),
  );
}
