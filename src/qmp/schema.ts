/**
 * The commands of a monitor with their arguments: what validation, types and `query-commands` rest on. Source: QEMU's
 * QAPI schema (qapi/job.json, qapi/block-core.json, qapi/control.json); commands and arguments that begin with `x-` are
 * ours.
 */

type Kind = 'str' | 'int' | 'bool' | readonly string[];

interface Argument {
  readonly kind: Kind;
  readonly optional?: true;
}

const ON_ERROR = ['report', 'ignore', 'enospc', 'stop', 'auto'] as const;
const id = { id: { kind: 'str' } } as const;
const device = { device: { kind: 'str' } } as const;

export const COMMANDS = {
  qmp_capabilities: {},
  'query-version': {},
  'query-commands': {},
  'query-status': {},
  'query-jobs': {},
  'query-block-jobs': {},
  'query-block-exports': {},
  'drive-backup': {
    ...device,
    target: { kind: 'str' },
    sync: { kind: ['top', 'full', 'none', 'incremental', 'bitmap'] },
    'job-id': { kind: 'str', optional: true },
    format: { kind: 'str', optional: true },
    mode: { kind: ['existing', 'absolute-paths'], optional: true },
    speed: { kind: 'int', optional: true },
    compress: { kind: 'bool', optional: true },
    'on-source-error': { kind: ON_ERROR, optional: true },
    'on-target-error': { kind: ON_ERROR, optional: true },
    'on-cbw-error': { kind: ['break-guest-write', 'break-snapshot'], optional: true },
    'auto-finalize': { kind: 'bool', optional: true },
    'auto-dismiss': { kind: 'bool', optional: true },
    'x-cbw-timeout': { kind: 'int', optional: true },
    'x-fleece': { kind: 'bool', optional: true },
    'x-scratch': { kind: 'str', optional: true },
  },
  'job-pause': id,
  'job-resume': id,
  'job-cancel': id,
  'job-finalize': id,
  'job-dismiss': id,
  'block-job-pause': device,
  'block-job-resume': device,
  'block-job-cancel': { ...device, force: { kind: 'bool', optional: true } },
  'block-job-set-speed': { ...device, speed: { kind: 'int' } },
  'block-job-finalize': id,
  'block-job-dismiss': id,
  'x-freeze': {
    ...device,
    export: { kind: 'str' },
    scratch: { kind: 'str', optional: true },
    'on-cbw-error': { kind: ['break-guest-write', 'break-snapshot'], optional: true },
    'cbw-timeout': { kind: 'int', optional: true },
  },
  'x-thaw': { export: { kind: 'str' } },
  quit: {},
} as const satisfies Readonly<Record<string, Readonly<Record<string, Argument>>>>;

type TypeOf<K extends Kind> = K extends 'str'
  ? string
  : K extends 'int'
    ? number
    : K extends 'bool'
      ? boolean
      : K extends readonly (infer Word)[]
        ? Word
        : never;

export type CommandName = keyof typeof COMMANDS;

type Defined<C extends CommandName> = (typeof COMMANDS)[C];
type OptionalOf<A> = { [N in keyof A]: A[N] extends { readonly optional: true } ? N : never }[keyof A];

/** The arguments of a command, as the schema has them. */
export type ArgumentsOf<C extends CommandName> = {
  readonly [N in Exclude<keyof Defined<C>, OptionalOf<Defined<C>>>]: Defined<C>[N] extends Argument
    ? TypeOf<Defined<C>[N]['kind']>
    : never;
} & {
  readonly [N in OptionalOf<Defined<C>>]?: Defined<C>[N] extends Argument
    ? TypeOf<Defined<C>[N]['kind']> | undefined
    : never;
};

export function isCommand(name: string): name is CommandName {
  return Object.hasOwn(COMMANDS, name);
}

/** What is wrong with the arguments of a command; undefined where nothing is. */
export function wrongArguments(
  name: CommandName,
  given: Readonly<Record<string, unknown>>,
): string | undefined {
  const wanted: Readonly<Record<string, Argument>> = COMMANDS[name];
  for (const [argument, { kind, optional }] of Object.entries(wanted)) {
    const value = given[argument];
    if (value === undefined) {
      if (optional !== true) return `Parameter '${argument}' is missing`;
      continue;
    }
    const wrong = wrongValue(argument, kind, value);
    if (wrong !== undefined) return wrong;
  }
  const unknown = Object.keys(given).find((argument) => !Object.hasOwn(wanted, argument));
  return unknown === undefined ? undefined : `Parameter '${unknown}' is unexpected`;
}

function wrongValue(argument: string, kind: Kind, value: unknown): string | undefined {
  const expected = (type: string): string => `Invalid parameter type for '${argument}', expected: ${type}`;
  if (kind === 'bool') return typeof value === 'boolean' ? undefined : expected('boolean');
  if (kind === 'int') return Number.isSafeInteger(value) ? undefined : expected('integer');
  if (typeof value !== 'string') return expected('string');
  if (kind === 'str' || kind.includes(value)) return undefined;
  return `Parameter '${argument}' does not accept value '${value}'`;
}
