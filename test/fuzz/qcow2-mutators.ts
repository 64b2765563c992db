import { deflateRawSync } from 'node:zlib';
import type { Random } from '../support/data.js';
import {
  bitmapEntry,
  bitmapsExtension,
  COMPRESSED,
  COPIED,
  EXTENSION,
  HEADER,
  Qcow2Bytes,
  snapshotEntry,
} from '../support/qcow2-bytes.js';
import {
  anyOf,
  anyPlace,
  anyValue,
  type Base,
  type Edit,
  GENERAL,
  type Mutator,
  put,
  type Weighted,
} from './mutation.js';

function long(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt.asUintN(64, value));
  return bytes;
}

function word(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value >>> 0);
  return bytes;
}

/** Where bytes that belong to nothing can be put. */
function end(base: Base): number {
  return Math.ceil(base.file.length / base.layout.unit) * base.layout.unit;
}

function anyField(dice: Random, base: Base, ...kinds: string[]) {
  const fields = kinds.flatMap((kind) => base.fields.get(kind) ?? []);
  return fields.length === 0 ? undefined : anyOf(dice, fields);
}

/** A table entry that leads somewhere else, with the flags there are. */
const redirect: Mutator = (dice, base) => {
  const field = anyField(
    dice,
    base,
    'l1',
    'l2',
    'refcount table',
    'snapshot l1',
    'snapshot l2',
    'bitmap table',
  );
  if (field === undefined) return [];
  const flags = anyOf(dice, [0n, COPIED, COPIED, 1n, COPIED | 1n, COMPRESSED]);
  return [put(field.at, long(BigInt(anyPlace(dice, base)) | flags))];
};

/** Two clusters of the guest in one place. */
const share: Mutator = (dice, base) => {
  const kind = anyOf(dice, ['l1', 'l2', 'snapshot l2', 'refcount table']);
  const [from, to] = [anyField(dice, base, kind), anyField(dice, base, kind)];
  return from === undefined || to === undefined
    ? []
    : [put(to.at, base.file.bytes.subarray(from.at, from.at + 8))];
};

function compressedEntry(base: Base, place: number, sectors: number): bigint {
  const clusterBits = Math.log2(base.layout.unit);
  return COMPRESSED | (BigInt(sectors - 1) << BigInt(62 - (clusterBits - 8))) | BigInt(place);
}

/** An entry of a compressed cluster that may be anywhere. */
const compressedAnywhere: Mutator = (dice, base) => {
  const field = anyField(dice, base, 'l2');
  if (field === undefined) return [];
  const place = anyPlace(dice, base) + dice.between(0, base.layout.unit);
  const sectors = dice.between(1, Math.max(1, base.layout.unit / 256));
  return [put(field.at, long(compressedEntry(base, place, sectors)))];
};

/** A Zstandard frame of blocks that repeat one byte: 128 KiB out of four bytes. */
function zstdBomb(dice: Random, blocks: number): Buffer {
  const head = Buffer.from([0x28, 0xb5, 0x2f, 0xfd, 0, dice.chance(0.7) ? 0x38 : dice.between(0, 255)]);
  const size = dice.between(0, 128 * 1024);
  const one = Buffer.from([((size << 3) | 2) & 255, (size >> 5) & 255, size >> 13, dice.between(0, 255)]);
  return Buffer.concat([head, ...Array.from({ length: blocks }, () => one)]);
}

const bomb = deflateRawSync(Buffer.alloc(1 << 20, 0x5a));

/** Compressed data behind the end of the file, and an entry that leads there. */
const newStream: Mutator = (dice, base) => {
  const field = anyField(dice, base, 'l2');
  if (field === undefined) return [];
  const { unit } = base.layout;
  const content = dice.noise(dice.between(1, unit * 2)).map((byte) => byte & 3);
  const stream = anyOf<() => Uint8Array>(dice, [
    () => bomb,
    () => zstdBomb(dice, dice.between(0, 500)),
    () => deflateRawSync(content),
    () => deflateRawSync(content.subarray(0, unit)),
    () => dice.noise(dice.between(1, unit)),
    () => new Uint8Array(),
  ])();
  const cut = stream.subarray(
    0,
    Math.min(dice.chance(0.2) ? dice.between(0, stream.length) : stream.length, unit * 2 - 512),
  );
  const place = end(base) + (dice.chance(0.5) ? 0 : dice.between(0, 511));
  const sectors = Math.max(
    1,
    Math.min(unit / 256, Math.ceil(((place % 512) + cut.length) / 512) + dice.between(-1, 1)),
  );
  const edits: Edit[] = [put(place, cut), put(field.at, long(compressedEntry(base, place, sectors)))];
  return dice.chance(0.3) ? edits : [...edits, { length: end(base) + unit * 2 }];
};

/** Bytes of a compressed stream. */
export const damageStream: Mutator = (dice, base) => {
  const streams = base.regions.get('stream');
  if (streams === undefined) return [];
  const region = anyOf(dice, streams);
  const other = anyOf(dice, streams);
  if (dice.chance(0.2)) {
    const bytes = base.file.bytes.subarray(other.at, other.at + Math.min(other.length, region.length));
    return [put(region.at, bytes)];
  }
  const at = region.at + Math.floor(region.length * dice.next() ** 3);
  return [put(at, dice.noise(Math.min(dice.between(1, 8), region.at + region.length - at)))];
};

const FEATURE_FIELDS = [HEADER.incompatibleFeatures, HEADER.compatibleFeatures, HEADER.autoclearFeatures];

/** A feature more or less. */
const feature: Mutator = (dice, base) => {
  const at = anyOf(dice, FEATURE_FIELDS);
  if (at + 8 > base.file.length) return [];
  const bit = dice.chance(0.9) ? dice.between(0, 5) : dice.between(0, 63);
  const edits = [put(at, long(base.file.bytes.readBigUInt64BE(at) ^ (1n << BigInt(bit))))];
  const compression = at === HEADER.incompatibleFeatures && bit === 3;
  const type = base.file.bytes[HEADER.compressionType] ?? 0;
  return compression ? [...edits, put(HEADER.compressionType, Buffer.from([type ^ 1]))] : edits;
};

/** Names for backing and data files. What is not in the image's folder must never be opened, see guard.ts. */
export const NAMES = [
  'base.raw',
  'base.qcow2',
  'middle.qcow2',
  'data.raw',
  'image.qcow2',
  './inner/../base.raw',
  'alias.raw',
  'hard.qcow2',
  'way-out.raw',
  'folder-out/secret.raw',
  '../secret.raw',
  'fifo',
  'ring.raw',
  'inner',
  '.',
  '/',
  '/dev/zero',
  '/dev/stdin',
  '/proc/self/mem',
  '/etc/passwd',
  'json:{"driver":"file","filename":"../secret.raw"}',
  'json:{}',
  'nbd://127.0.0.1:1/',
  'file:base.raw',
  'a:b',
  'gone.raw',
  'base.raw\0',
  '\u001b[2J',
  '',
] as const;
const FORMATS = ['raw', 'qcow2', 'vmdk', 'RAW', '', 'qcow2\0', '\u001b[31m'] as const;

function anyName(dice: Random): Buffer {
  if (dice.chance(0.1)) return Buffer.from(dice.noise(dice.between(1, 40)));
  if (dice.chance(0.03)) return Buffer.alloc(dice.between(1000, 1030), 'x');
  return Buffer.from(anyOf(dice, NAMES));
}

/** All extensions and the name of the backing file anew. */
const head: Mutator = (dice, base) => {
  const image = new Qcow2Bytes(Buffer.from(base.file.bytes.subarray(0, base.layout.unit)));
  const known = Object.values(EXTENSION);
  const extensions = Array.from({ length: dice.between(0, 4) }, () => {
    const type = dice.chance(0.8) ? anyOf(dice, known) : dice.between(0, 2 ** 32 - 1);
    const data =
      type === EXTENSION.backingFormat
        ? Buffer.from(anyOf(dice, FORMATS))
        : type === EXTENSION.dataFile
          ? anyName(dice)
          : Buffer.from(dice.noise(dice.between(0, 60)));
    return [type, data] as const;
  });
  try {
    image.setHead(extensions, dice.chance(0.8) ? anyName(dice) : undefined);
  } catch {
    // It does not fit.
    return [];
  }
  const { headerLength } = image;
  return [
    put(HEADER.backingFileOffset, image.bytes.subarray(HEADER.backingFileOffset, HEADER.clusterBits)),
    put(headerLength, image.bytes.subarray(headerLength, Math.min(headerLength + 1200, base.layout.unit))),
  ];
};

/** A snapshot table behind the end of the file. */
const snapshotTable: Mutator = (dice, base) => {
  const value = (original: number) =>
    dice.chance(0.7) ? original : Number(BigInt.asUintN(32, anyValue(dice, base, BigInt(original), 4)));
  const entries = Array.from({ length: dice.between(0, 3) }, (_, index) =>
    snapshotEntry({
      id: `${index}`,
      name: dice.chance(0.8) ? `s${index}` : anyName(dice).toString('latin1'),
      l1Offset: BigInt(anyPlace(dice, base)),
      l1Size: value(1),
      extra: Buffer.alloc(dice.between(0, 32), 7),
      ...(dice.chance(0.1) ? { extraLength: value(24) } : {}),
      ...(dice.chance(0.1) ? { nameLength: value(5) & 0xffff } : {}),
    }),
  );
  const place = end(base);
  return [
    put(place, Buffer.concat(entries)),
    put(HEADER.snapshotCount, Buffer.concat([word(value(entries.length)), long(BigInt(place))])),
  ];
};

/** A bitmap directory behind the end of the file. */
const bitmapDirectory: Mutator = (dice, base) => {
  const value = (original: number) =>
    dice.chance(0.8) ? original : Number(BigInt.asUintN(32, anyValue(dice, base, BigInt(original), 4)));
  const place = end(base);
  const entries = Array.from({ length: dice.between(1, 3) }, (_, index) =>
    bitmapEntry({
      name: dice.chance(0.8) ? `b${index}` : anyName(dice).toString('latin1'),
      tableOffset: BigInt(anyPlace(dice, base)),
      tableSize: value(1),
      flags: value(dice.between(0, 3)),
      type: value(1) & 255,
      granularityBits: dice.chance(0.8) ? dice.between(9, 20) : dice.between(0, 255),
      ...(dice.chance(0.1) ? { nameLength: value(5) & 0xffff } : {}),
      ...(dice.chance(0.1) ? { extraLength: value(0) } : {}),
    }),
  );
  const directory = Buffer.concat(entries);
  const image = new Qcow2Bytes(Buffer.from(base.file.bytes.subarray(0, base.layout.unit)));
  if (image.version < 3) return [];
  image.setHead([
    [EXTENSION.bitmaps, bitmapsExtension(value(entries.length), value(directory.length), place)],
  ]);
  const { headerLength } = image;
  return [
    put(place, directory),
    put(HEADER.backingFileOffset, Buffer.alloc(8)),
    put(headerLength, image.bytes.subarray(headerLength, headerLength + 48)),
    put(HEADER.autoclearFeatures, long(1n)),
  ];
};

/** A drive of any size, with an L1 table that is large enough for it, at the end of the file. */
const giant: Mutator = (dice, base) => {
  const { unit } = base.layout;
  const extended = (base.file.bytes.readBigUInt64BE(HEADER.incompatibleFeatures) & 16n) !== 0n;
  const perEntry = unit * (unit / (extended ? 16 : 8));
  // As far as an L1 table of 32 MiB reaches; mostly much less, for speed.
  const most = Math.min(2 ** 53 - 512, perEntry * (dice.chance(0.02) ? 4 << 20 : 4096));
  const size = Math.floor((most * dice.next() ** 4) / 512) * 512;
  const entries = Math.ceil(size / perEntry);
  const place = end(base);
  const l1Bytes = Math.ceil((entries * 8) / unit) * unit;
  const old = base.file.bytes.readBigUInt64BE(HEADER.l1TableOffset);
  return [
    put(HEADER.size, long(BigInt(size))),
    put(HEADER.l1Size, Buffer.concat([word(entries), long(BigInt(place))])),
    put(place, base.file.bytes.subarray(Number(old), Number(old) + 8)),
    { length: place + Math.max(l1Bytes, unit) },
  ];
};

export const QCOW2_MUTATORS: readonly Weighted[] = [
  ...GENERAL,
  [5, redirect],
  [2, share],
  [2, compressedAnywhere],
  [2, newStream],
  [3, damageStream],
  [2, feature],
  [3, head],
  [1, snapshotTable],
  [1, bitmapDirectory],
  [1, giant],
];
