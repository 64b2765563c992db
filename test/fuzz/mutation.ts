import type { Random } from '../support/data.js';
import type { SparseFile } from './corpus.js';
import type { Field, Layout, Region } from './layout.js';

/** One change of a file: bytes (hexadecimal) put at an offset, or a new length. */
export type Edit = { readonly at: number; readonly hex: string } | { readonly length: number };

/** An image with its layout, as mutations start from it. */
export interface Base {
  readonly file: SparseFile;
  readonly layout: Layout;
  /** The kinds of fields and regions there are. */
  readonly fields: ReadonlyMap<string, readonly Field[]>;
  readonly regions: ReadonlyMap<string, readonly Region[]>;
}

/** Makes edits; the edits of one mutation belong together. */
export type Mutator = (dice: Random, base: Base) => readonly Edit[];

function byKind<T extends { readonly kind: string }>(all: readonly T[]): Map<string, T[]> {
  const kinds = new Map<string, T[]>();
  for (const one of all) kinds.set(one.kind, [...(kinds.get(one.kind) ?? []), one]);
  return kinds;
}

export function makeBase(file: SparseFile, layout: Layout): Base {
  return { file, layout, fields: byKind(layout.fields), regions: byKind(layout.regions) };
}

/** Any element. */
export function anyOf<T>(dice: Random, list: readonly T[]): T {
  const chosen = list[dice.between(0, list.length - 1)];
  if (chosen === undefined) throw new Error('nothing to choose from');
  return chosen;
}

/** A field or region, each kind as likely as any other. */
function anyKind<T>(dice: Random, kinds: ReadonlyMap<string, readonly T[]>): T {
  return anyOf(dice, anyOf(dice, [...kinds.values()]));
}

export function put(at: number, bytes: Uint8Array): Edit {
  return { at, hex: Buffer.from(bytes).toString('hex') };
}

function encode(value: bigint, width: number, little: boolean): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt.asUintN(64, value));
  const part = bytes.subarray(8 - width);
  return little ? part.reverse() : part;
}

export function decode(file: Buffer, at: number, width: number, little: boolean): bigint {
  const bytes = Buffer.alloc(8);
  const part = Buffer.from(file.subarray(at, at + width));
  bytes.set(little ? part.reverse() : part, 8 - part.length);
  return bytes.readBigUInt64BE();
}

/** The place of something in the file, or near it. */
export function anyPlace(dice: Random, { layout, file }: Base): number {
  const place = dice.chance(0.7)
    ? anyOf(dice, layout.places)
    : Math.ceil(file.length / layout.unit + dice.between(-2, 2)) * layout.unit;
  const shift = dice.chance(0.8) ? 0 : anyOf(dice, [1, 8, 512, layout.unit, layout.unit / 2]);
  return Math.max(0, place + (dice.chance(0.5) ? shift : -shift));
}

/** What leads to a place in the file. */
function reference(dice: Random, base: Base): bigint {
  return BigInt(Math.floor(anyPlace(dice, base) / base.layout.scale));
}

function random64(dice: Random): bigint {
  return (BigInt(dice.between(0, 2 ** 32 - 1)) << 32n) | BigInt(dice.between(0, 2 ** 32 - 1));
}

/** A number at which things may go wrong. */
export function anyValue(dice: Random, base: Base, original: bigint, width: number): bigint {
  const bits = width * 8;
  switch (dice.between(0, 8)) {
    case 0:
      return BigInt(dice.between(0, 5));
    case 1:
      return -1n - BigInt(dice.between(0, 5));
    case 2:
      return (1n << BigInt(dice.between(0, bits - 1))) + BigInt(dice.between(-1, 1));
    case 3:
      return original + BigInt(anyOf(dice, [1, -1, 8, -8, 512, -512, base.layout.unit, -base.layout.unit]));
    case 4:
      return original ^ (1n << BigInt(dice.between(0, bits - 1)));
    case 5:
      return random64(dice);
    case 6:
      return original * BigInt(dice.between(2, 100));
    default:
      // With the flags of what was there, or with any.
      return reference(dice, base) | (dice.chance(0.5) ? original & base.layout.flags : 0n);
  }
}

export const setField: Mutator = (dice, base) => {
  if (base.fields.size === 0) return [];
  const { at, width } = anyKind(dice, base.fields);
  const { little } = base.layout;
  const original = decode(base.file.bytes, at, width, little);
  return [put(at, encode(anyValue(dice, base, original, width), width, little))];
};

/** Two fields of a kind get the same value. */
export const copyField: Mutator = (dice, base) => {
  if (base.fields.size === 0) return [];
  const kind = anyOf(dice, [...base.fields.values()]);
  const [from, to] = [anyOf(dice, kind), anyOf(dice, kind)];
  if (from.width !== to.width) return [];
  return [put(to.at, base.file.bytes.subarray(from.at, from.at + from.width))];
};

export const flipBits: Mutator = (dice, base) => {
  const region = anyKind(dice, base.regions);
  return Array.from({ length: dice.between(1, 4) }, () => {
    const at = region.at + dice.between(0, region.length - 1);
    const byte = base.file.bytes[at] ?? 0;
    return put(at, Buffer.from([dice.chance(0.5) ? byte ^ (1 << dice.between(0, 7)) : dice.between(0, 255)]));
  });
};

export const fillRegion: Mutator = (dice, base) => {
  const region = anyKind(dice, base.regions);
  const from = dice.between(0, region.length - 1);
  const length = Math.min(dice.between(1, region.length - from), 4096);
  const bytes = dice.chance(0.5) ? dice.noise(length) : Buffer.alloc(length, anyOf(dice, [0, 0xff, 1, 0x80]));
  return [put(region.at + from, bytes)];
};

/** One thing in the place of another. */
export const copyUnit: Mutator = (dice, base) => {
  const { places, unit } = base.layout;
  const [from, to] = [anyOf(dice, places), anyOf(dice, places)];
  const bytes = base.file.bytes.subarray(from, from + Math.min(unit, 4096));
  return bytes.length === 0 ? [] : [put(to, bytes)];
};

export const setLength: Mutator = (dice, base) => {
  const { file } = base;
  const length = dice.chance(0.5) ? anyPlace(dice, base) : dice.between(0, file.length + base.layout.unit);
  return [{ length: dice.chance(0.05) ? 2 ** dice.between(20, 46) : length }];
};

/** A mutator with how often it is chosen. */
export type Weighted = readonly [weight: number, mutator: Mutator];

export const GENERAL: readonly Weighted[] = [
  [10, setField],
  [3, copyField],
  [3, flipBits],
  [1, fillRegion],
  [1, copyUnit],
  [1, setLength],
];

/** One to some mutations. */
export function mutate(dice: Random, base: Base, mutators: readonly Weighted[]): Edit[][] {
  const sum = mutators.reduce((total, [weight]) => total + weight, 0);
  const mutations: Edit[][] = [];
  do {
    let left = dice.between(1, sum);
    for (const [weight, mutator] of mutators) {
      left -= weight;
      if (left > 0) continue;
      const edits = mutator(dice, base);
      if (edits.length > 0) mutations.push([...edits]);
      break;
    }
  } while (mutations.length < 8 && dice.chance(0.5));
  return mutations;
}
