/**
 * The types of QAPI that arguments of commands are made of, as data: what validation, TypeScript types,
 * `query-qmp-schema` and the reference rest on.
 */

/** A type. A list of words is an enumeration. */
export type Kind =
  | 'str'
  /** A whole number; `uint`: from 0 on; `uint32`: that fits 32 bits. */
  | 'int'
  | 'uint'
  | 'uint32'
  | 'bool'
  | 'null'
  | 'any'
  | readonly string[]
  | ListKind
  | StructKind
  | UnionKind
  | AlternateKind
  | LazyKind;

export interface ListKind {
  readonly list: Kind;
}

export interface StructKind {
  readonly struct: Members;
}

/** A structure with more members as one of them says. */
export interface UnionKind {
  readonly union: string;
  readonly members: Members;
  readonly variants: Readonly<Record<string, Members>>;
}

/** One of several types, told apart by their JSON. */
export interface AlternateKind {
  readonly alternate: readonly Kind[];
  /** QAPI's name of it, which errors tell. */
  readonly name: string;
}

/** A type that contains itself. */
export interface LazyKind {
  readonly lazy: () => Kind;
}

export interface Member {
  readonly kind: Kind;
  readonly optional?: true;
}

export type Members = Readonly<Record<string, Member>>;

export type JsonObject = Readonly<Record<string, unknown>>;

/** What a value of a type is in TypeScript. */
export type TypeOf<K> = K extends 'str'
  ? string
  : K extends 'int' | 'uint' | 'uint32'
    ? number
    : K extends 'bool'
      ? boolean
      : K extends 'null'
        ? null
        : K extends readonly (infer Word)[]
          ? Word
          : K extends { readonly list: infer Item }
            ? readonly TypeOf<Item>[]
            : K extends { readonly struct: infer Of }
              ? ObjectOf<Of>
              : K extends { readonly alternate: readonly (infer One)[] }
                ? TypeOf<One>
                : K extends { readonly union: string }
                  ? JsonObject
                  : unknown;

type OptionalOf<A> = { [N in keyof A]: A[N] extends { readonly optional: true } ? N : never }[keyof A];

export type ObjectOf<A> = {
  readonly [N in Exclude<keyof A, OptionalOf<A>>]: A[N] extends Member ? TypeOf<A[N]['kind']> : never;
} & {
  readonly [N in OptionalOf<A>]?: A[N] extends Member ? TypeOf<A[N]['kind']> | undefined : never;
};

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** A number that has been left out where it is undefined. */
export function numberIn(options: JsonObject, name: string): number | undefined {
  const value = options[name];
  return value === undefined ? undefined : Number(value);
}

export function isEnumeration(kind: Kind): kind is readonly string[] {
  return Array.isArray(kind);
}

/** Longest path of a value within its object, in characters. */
const MAX_PATH = 2048;

/** What is wrong with a value; undefined where nothing is. Texts: QEMU's. @param path of the value, for the text */
export function wrongValue(kind: Kind, value: unknown, path: string): string | undefined {
  const expected = (type: string): string => `Invalid parameter type for '${path}', expected: ${type}`;
  switch (kind) {
    case 'any':
      return undefined;
    case 'str':
      return typeof value === 'string' ? undefined : expected('string');
    case 'bool':
      return typeof value === 'boolean' ? undefined : expected('boolean');
    case 'null':
      return value === null ? undefined : expected('null');
    case 'int':
      return Number.isSafeInteger(value) ? undefined : expected('integer');
    case 'uint':
      return Number.isSafeInteger(value) && Number(value) >= 0
        ? undefined
        : `Parameter '${path}' expects uint64`;
    case 'uint32':
      if (!Number.isSafeInteger(value)) return `Parameter '${path}' expects uint64`;
      return Number(value) >= 0 && Number(value) < 2 ** 32
        ? undefined
        : `Parameter '${leafOf(path)}' expects uint32_t`;
  }
  if (isEnumeration(kind)) {
    if (typeof value !== 'string') return expected('string');
    return kind.includes(value) ? undefined : `Parameter '${leafOf(path)}' does not accept value '${value}'`;
  }
  if (path.length > MAX_PATH) return `Parameter '${path.slice(0, 64)}…' is nested too deeply`;
  if ('lazy' in kind) return wrongValue(kind.lazy(), value, path);
  if ('list' in kind) {
    if (!Array.isArray(value)) return expected('array');
    for (const [index, item] of value.entries()) {
      const wrong = wrongValue(kind.list, item, `${path}[${index}]`);
      if (wrong !== undefined) return wrong;
    }
    return undefined;
  }
  if ('alternate' in kind) {
    const fitting = kind.alternate.find((one) => sameJson(one, value));
    if (fitting !== undefined) return wrongValue(fitting, value, path);
    return `Invalid parameter type for '${leafOf(path)}', expected: ${kind.name}`;
  }
  if (!isObject(value)) return expected('object');
  // An object without a name has its members without one.
  if ('struct' in kind) return wrongMembers(kind.struct, value, path);
  const tag = wrongMembers({ [kind.union]: kind.members[kind.union] ?? { kind: 'str' } }, value, path, false);
  if (tag !== undefined) return tag;
  return wrongMembers({ ...kind.members, ...kind.variants[String(value[kind.union])] }, value, path);
}

/** QEMU says of words only the last part of where they are, which items of lists have none of. */
function leafOf(path: string): string {
  if (path.endsWith(']')) return 'null';
  return path.slice(path.lastIndexOf('.') + 1);
}

function sameJson(kind: Kind, value: unknown): boolean {
  if (kind === 'str' || isEnumeration(kind)) return typeof value === 'string';
  if (kind === 'null') return value === null;
  if (kind === 'bool') return typeof value === 'boolean';
  if (kind === 'int' || kind === 'uint' || kind === 'uint32') return typeof value === 'number';
  if (typeof kind === 'object' && 'lazy' in kind) return sameJson(kind.lazy(), value);
  if (typeof kind === 'object' && 'list' in kind) return Array.isArray(value);
  return isObject(value);
}

/** What is wrong with the members of an object. @param path of the object, empty for arguments */
export function wrongMembers(
  members: Members,
  given: JsonObject,
  path: string,
  closed = true,
): string | undefined {
  const pathOf = (name: string): string => (path === '' ? name : `${path}.${name}`);
  for (const [name, { kind, optional }] of Object.entries(members)) {
    const value = given[name];
    if (value === undefined) {
      if (optional !== true) return `Parameter '${pathOf(name)}' is missing`;
      continue;
    }
    const wrong = wrongValue(kind, value, pathOf(name));
    if (wrong !== undefined) return wrong;
  }
  if (!closed) return undefined;
  const unknown = Object.keys(given).find((name) => !Object.hasOwn(members, name));
  return unknown === undefined ? undefined : `Parameter '${pathOf(unknown)}' is unexpected`;
}

/** Words that a command line has for values made into what their types are; what is wrong stays as it is. */
export function coerce(kind: Kind, value: unknown): unknown {
  if (typeof kind === 'object' && 'lazy' in kind) return coerce(kind.lazy(), value);
  if (typeof value === 'string') return coerceWord(kind, value);
  if (Array.isArray(value) && typeof kind === 'object' && 'list' in kind) {
    return value.map((item) => coerce(kind.list, item));
  }
  if (!isObject(value) || typeof kind !== 'object' || isEnumeration(kind)) return value;
  if ('alternate' in kind) {
    const fitting = kind.alternate.find((one) => sameJson(one, value));
    return fitting === undefined ? value : coerce(fitting, value);
  }
  if ('list' in kind) return value;
  const members =
    'struct' in kind ? kind.struct : { ...kind.members, ...kind.variants[String(value[kind.union])] };
  return Object.fromEntries(
    Object.entries(value).map(([name, one]) => [name, coerce(members[name]?.kind ?? 'any', one)]),
  );
}

const SUFFIXES = 'BKMGTPE';

function coerceWord(kind: Kind, word: string): unknown {
  switch (kind) {
    case 'bool':
      return word === 'on' ? true : word === 'off' ? false : word;
    case 'int':
    case 'uint':
    case 'uint32': {
      const [, digits, suffix = ''] = /^(-?(?:0x[0-9a-f]+|\d+))([bkmgtpe]?)$/i.exec(word) ?? [];
      if (digits === undefined) return word;
      const power = suffix === '' ? 0 : SUFFIXES.indexOf(suffix.toUpperCase());
      return Number(digits) * 1024 ** power;
    }
  }
  if (typeof kind === 'object' && 'alternate' in kind) {
    const fitting = kind.alternate.find((one) => sameJson(one, word));
    if (fitting !== undefined) return word;
    for (const one of kind.alternate) {
      const coerced = coerce(one, word);
      if (coerced !== word) return coerced;
    }
  }
  return word;
}
