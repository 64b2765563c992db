import { StillframeError } from '../errors.js';
import { coerce, isObject, type JsonObject, type Kind, wrongValue } from './types.js';

function invalid(message: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
}

/** What an option of a command line can hold at most, in characters. */
const MAX_LENGTH = 1 << 20;
const MAX_DEPTH = 64;

interface Tree {
  [key: string]: string | Tree;
}

/**
 * Parses `key=value,key.key=value,…` as QEMU's `--blockdev` and `--object` have it: dots make objects and (with numbers)
 * lists, `,,` is a comma, and the first part may be a value alone.
 *
 * @param implied key of a first value without one
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function parseKeyval(text: string, implied?: string): JsonObject {
  if (text.length > MAX_LENGTH) throw invalid(`an option of ${text.length} characters is too long`);
  const tree: Tree = {};
  for (const [index, part] of splitAtCommas(text).entries()) {
    const equals = part.indexOf('=');
    if (equals < 0 && index === 0 && implied !== undefined) tree[implied] = part;
    else if (equals <= 0) throw invalid(`Expected '=' after parameter '${part}'`);
    else enter(tree, part.slice(0, equals), part.slice(equals + 1));
  }
  const lists = withLists(tree);
  if (!isObject(lists)) throw invalid(`'${text}' has no names`);
  return lists;
}

/** At single commas; a doubled one stands for itself. */
function splitAtCommas(text: string): string[] {
  const parts: string[] = [];
  let part = '';
  for (let index = 0; index < text.length; index++) {
    const character = text.charAt(index);
    if (character !== ',') part += character;
    else if (text.charAt(index + 1) === ',') {
      part += ',';
      index++;
    } else {
      parts.push(part);
      part = '';
    }
  }
  if (part !== '') parts.push(part);
  return parts;
}

function enter(tree: Tree, key: string, value: string): void {
  const path = key.split('.');
  const last = path.pop() ?? '';
  if (path.length > MAX_DEPTH) throw invalid(`Parameter '${key.slice(0, 64)}…' has too many parts`);
  let at = tree;
  for (const name of path) {
    checkName(key, name);
    const next = Object.hasOwn(at, name) ? at[name] : undefined;
    if (typeof next === 'string') throw invalid(`Parameters '${name}.*' used inconsistently`);
    const child = next ?? {};
    at[name] = child;
    at = child;
  }
  checkName(key, last);
  if (typeof at[last] === 'object') throw invalid(`Parameters '${key}.*' used inconsistently`);
  at[last] = value;
}

function checkName(key: string, name: string): void {
  if (/^[A-Za-z0-9][A-Za-z0-9_-]*$/.test(name) && name !== '__proto__') return;
  throw invalid(`Invalid parameter '${key}'`);
}

/** Objects whose names are 0, 1, … are lists. */
function withLists(value: string | Tree): unknown {
  if (typeof value === 'string') return value;
  const names = Object.keys(value);
  const inner = Object.fromEntries(Object.entries(value).map(([name, one]) => [name, withLists(one)]));
  if (names.length === 0 || !names.every((name) => /^\d+$/.test(name))) return inner;
  return names.map((_, index) => {
    const item = inner[String(index)];
    if (item === undefined) throw invalid(`Parameter '${index}' missing`);
    return item;
  });
}

/**
 * An option that is either JSON or keys with values, checked.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function parseOption(text: string, kind: Kind, implied?: string): JsonObject {
  if (text.startsWith('{')) return checked(parseJson(text), kind);
  return checked(coerce(kind, parseKeyval(text, implied)), kind);
}

/** @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT where the text is no JSON, or no object */
export function parseJson(text: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw invalid(`JSON parse error: ${error instanceof Error ? error.message : String(error)}`);
  }
  if (!isObject(value)) throw invalid(`'${text}' is no object`);
  return value;
}

/** Options as they are, where they are what they should be. @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
export function checked(options: unknown, kind: Kind): JsonObject {
  const wrong = wrongValue(kind, options, '');
  if (wrong !== undefined || !isObject(options)) throw invalid(wrong ?? 'it is no object');
  return options;
}
