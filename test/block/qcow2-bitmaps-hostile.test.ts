import { copyFileSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { type BitmapAction, editBitmap } from '#src/block/edit-bitmap.js';
import { readBitmap, readBitmaps, readHeader } from '#src/block/qcow2/index.js';
import { dirtyInQemu } from '../support/bitmaps.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';

const folder = temporaryFolder();
const bench = new Workbench();
const { runtime } = bench;
const base = join(folder, 'base.qcow2');
const path = join(folder, 'poked.qcow2');

const CLUSTER = 65536;
const LENGTH = 1 << 20;

/** Places in the image, all found in {@link base}. */
interface Places {
  /** Data of the header extension. */
  extension: number;
  directory: number;
  directoryBytes: number;
  /** The directory's second entry. */
  second: number;
  /** The first bitmap's table, and its only cluster of bits. */
  table: number;
  bits: number;
  fileBytes: number;
}
const places: Places = {
  extension: 0,
  directory: 0,
  directoryBytes: 0,
  second: 0,
  table: 0,
  bits: 0,
  fileBytes: 0,
};

type Poke = (bytes: Buffer, at: Places) => unknown;

function poke(change: Poke): void {
  const bytes = readFileSync(base);
  change(bytes, places);
  writeFileSync(path, bytes);
}

function edit(name: string, ...actions: BitmapAction[]): void {
  editBitmap(runtime, path, name, actions, {});
}

function list(): unknown {
  const image = bench.open(path, true);
  try {
    return readBitmaps(image.file, readHeader(runtime, image.file));
  } finally {
    image.close();
  }
}

function load(name: string): number {
  const image = bench.open(path, true);
  try {
    const bitmap = readBitmap(runtime, image.file, name);
    const { count } = bitmap;
    bitmap.free();
    return count;
  } finally {
    image.close();
  }
}

beforeAll(() => {
  bench.create(base, { length: LENGTH });
  editBitmap(runtime, base, 'b0', [{ action: 'add' }], {});
  editBitmap(runtime, base, 'b1', [{ action: 'add', granularity: 512 }, { action: 'disable' }], {});
  const image = bench.open(base, false);
  bench.write(image.node, 0, Buffer.alloc(200_000, 1));
  image.close();
  const bytes = readFileSync(base);
  const opened = bench.open(base, true);
  const extension = readHeader(runtime, opened.file).extensions.find(({ type }) => type === 0x23852875);
  opened.close();
  places.extension = extension?.offset ?? 0;
  places.directoryBytes = Number(bytes.readBigUInt64BE(places.extension + 8));
  places.directory = Number(bytes.readBigUInt64BE(places.extension + 16));
  places.second = places.directory + 32;
  places.table = Number(bytes.readBigUInt64BE(places.directory));
  places.bits = Number(bytes.readBigUInt64BE(places.table));
  places.fileBytes = bytes.length;
  expect(places.bits).toBeGreaterThan(0);
});

const CORRUPT = 'ERR_STILLFRAME_CORRUPT_IMAGE';
const UNSUPPORTED = 'ERR_STILLFRAME_UNSUPPORTED_FEATURE';

/** What is wrong with the extension or the directory: nobody can say what belongs to which bitmap. */
const directories: readonly [what: string, change: Poke, code: string, message: string | RegExp][] = [
  [
    'an extension of 16 bytes',
    (b, p) => b.writeUInt32BE(16, p.extension - 4),
    CORRUPT,
    'has 16 bytes instead of 24',
  ],
  [
    'an extension of 32 bytes',
    (b, p) => b.writeUInt32BE(32, p.extension - 4),
    CORRUPT,
    'has 32 bytes instead of 24',
  ],
  [
    'two extensions',
    (b, p) => b.copy(b, p.extension + 24, p.extension - 8, p.extension + 24),
    CORRUPT,
    'is not the only one',
  ],
  ['no bitmaps', (b, p) => b.writeUInt32BE(0, p.extension), CORRUPT, 'says that there are 0 bitmaps'],
  ['65536 bitmaps', (b, p) => b.writeUInt32BE(65536, p.extension), CORRUPT, '65536 bitmaps, more than 65535'],
  ['2^32 - 1 bitmaps', (b, p) => b.writeUInt32BE(0xffffffff, p.extension), CORRUPT, 'more than 65535'],
  ['65535 bitmaps', (b, p) => b.writeUInt32BE(65535, p.extension), CORRUPT, 'ends before entry 2 of 65535'],
  [
    'a bitmap less',
    (b, p) => b.writeUInt32BE(1, p.extension),
    CORRUPT,
    'has 64 bytes, but its 1 entries have 32',
  ],
  [
    'a reserved field',
    (b, p) => b.writeUInt32BE(1, p.extension + 4),
    CORRUPT,
    'reserved field that is not zero',
  ],
  [
    'a directory of 0 bytes',
    (b, p) => b.writeBigUInt64BE(0n, p.extension + 8),
    CORRUPT,
    'ends before entry 0',
  ],
  [
    'a directory that is too short',
    (b, p) => b.writeBigUInt64BE(56n, p.extension + 8),
    CORRUPT,
    'ends beyond the end',
  ],
  [
    'a directory that is too long',
    (b, p) => b.writeBigUInt64BE(72n, p.extension + 8),
    CORRUPT,
    'has 72 bytes, but its',
  ],
  [
    'a directory of more than 65535 KiB',
    (b, p) => b.writeBigUInt64BE(67107841n, p.extension + 8),
    CORRUPT,
    '67107841 bytes, more than 67107840',
  ],
  [
    'a directory of 2^64 - 1 bytes',
    (b, p) => b.fill(255, p.extension + 8, p.extension + 16),
    CORRUPT,
    'more than 67107840',
  ],
  [
    'a directory at 0',
    (b, p) => b.writeBigUInt64BE(0n, p.extension + 16),
    CORRUPT,
    'not the start of a cluster',
  ],
  [
    'a directory within a cluster',
    (b, p) => b.writeBigUInt64BE(BigInt(p.directory + 512), p.extension + 16),
    CORRUPT,
    'not the start of a cluster',
  ],
  [
    'a directory behind the end',
    (b, p) => b.writeBigUInt64BE(1n << 40n, p.extension + 16),
    CORRUPT,
    /beyond the end of the file at/,
  ],
  [
    'a directory at 2^63',
    (b, p) => b.writeBigUInt64BE(1n << 63n, p.extension + 16),
    CORRUPT,
    /beyond the end of the file at/,
  ],
  [
    'a table within a cluster',
    (b, p) => b.writeBigUInt64BE(BigInt(p.table + 512), p.directory),
    CORRUPT,
    'start of a cluster',
  ],
  ['a table at 0', (b, p) => b.writeBigUInt64BE(0n, p.directory), CORRUPT, 'start of a cluster'],
  [
    'a table behind the end',
    (b, p) => b.writeBigUInt64BE(1n << 40n, p.directory),
    CORRUPT,
    'beyond the end of the file',
  ],
  [
    'a table at 2^64 - 2^16',
    (b, p) => b.writeBigUInt64BE(2n ** 64n - 65536n, p.directory),
    CORRUPT,
    'beyond the end',
  ],
  ['a table of 0 entries', (b, p) => b.writeUInt32BE(0, p.directory + 8), CORRUPT, 'a table of 0 entries'],
  [
    'a table of 2 entries',
    (b, p) => b.writeUInt32BE(2, p.directory + 8),
    CORRUPT,
    'of 1048576 bytes needs 1',
  ],
  [
    'a table of 2^27 entries',
    (b, p) => b.writeUInt32BE(0x8000000, p.directory + 8),
    CORRUPT,
    'beyond the end of the file',
  ],
  [
    'a table of 2^27 + 1 entries',
    (b, p) => b.writeUInt32BE(0x8000001, p.directory + 8),
    CORRUPT,
    'not 1 to 134217728',
  ],
  ['a flag for extra data', (b, p) => b.writeUInt32BE(6, p.directory + 12), UNSUPPORTED, 'has flags 0x6'],
  [
    'the highest flag',
    (b, p) => b.writeUInt32BE(0x80000000, p.directory + 12),
    UNSUPPORTED,
    'has flags 0x80000000',
  ],
  ['type 0', (b, p) => b.writeUInt8(0, p.directory + 16), UNSUPPORTED, 'has type 0'],
  ['type 2', (b, p) => b.writeUInt8(2, p.directory + 16), UNSUPPORTED, 'has type 2'],
  ['8 granularity bits', (b, p) => b.writeUInt8(8, p.directory + 17), CORRUPT, 'has 8 granularity bits'],
  ['32 granularity bits', (b, p) => b.writeUInt8(32, p.directory + 17), CORRUPT, 'has 32 granularity bits'],
  [
    '255 granularity bits',
    (b, p) => b.writeUInt8(255, p.directory + 17),
    CORRUPT,
    'has 255 granularity bits',
  ],
  ['no name', (b, p) => b.writeUInt16BE(0, p.second + 18), CORRUPT, /has no name|has 64 bytes/],
  [
    'a name of 1024 bytes',
    (b, p) => b.writeUInt16BE(1024, p.second + 18),
    CORRUPT,
    'ends beyond the end of the directory',
  ],
  ['the other name', (b, p) => b.write('b0', p.second + 24), CORRUPT, 'has a name that another bitmap has'],
  ['a zero byte in a name', (b, p) => b.writeUInt8(0, p.second + 25), CORRUPT, 'has a name with a zero byte'],
  ['extra data', (b, p) => b.writeUInt32BE(4, p.second + 20), UNSUPPORTED, 'has 4 bytes of extra data'],
  [
    'extra data of 2^32 - 1 bytes',
    (b, p) => b.writeUInt32BE(0xffffffff, p.second + 20),
    CORRUPT,
    'ends beyond the end',
  ],
];

describe('a bitmap directory', () => {
  it.each(directories)(
    'with %s is refused where bitmaps matter, not where they do not',
    (_, change, code, message) => {
      const used = runtime.arena.usedBytes;
      poke(change);
      const refused = (body: () => unknown) => {
        expect(body).toThrow(message);
        expect(body).toThrow(expect.objectContaining({ code }));
      };
      refused(list);
      refused(() => bench.open(path, false));
      refused(() => edit('new', { action: 'add' }));
      refused(() => edit('b0', { action: 'remove' }));
      const image = bench.open(path, true);
      expect(bench.read(image.node, 0, 4096)).toEqual(Buffer.alloc(4096, 1));
      image.close();
      expect(runtime.arena.usedBytes).toBe(used);
    },
  );

  it('with names of 1023 bytes is good, with one of 1024 it is not', () => {
    copyFileSync(base, path);
    const name = 'n'.repeat(1023);
    edit(name, { action: 'add' });
    expect(list()).toHaveLength(3);
    expect(() => edit(`${name}n`, { action: 'add' })).toThrow('Bitmap name too long');
    const bytes = readFileSync(path);
    const directory = Number(bytes.readBigUInt64BE(places.extension + 16));
    bytes.writeUInt16BE(1024, directory + 64 + 18);
    writeFileSync(path, bytes);
    expect(list).toThrow('has a name of 1024 bytes, more than 1023');
  });

  it('cut off by the end of the file is refused', () => {
    copyFileSync(base, path);
    const bytes = readFileSync(path);
    // To the end of the file.
    bytes.writeBigUInt64BE(BigInt(bytes.length), places.extension + 16);
    const entries = bytes.subarray(places.directory, places.directory + places.directoryBytes);
    writeFileSync(path, Buffer.concat([bytes, entries]));
    expect(list()).toHaveLength(2);
    truncateSync(path, bytes.length + 63);
    expect(list).toThrow('beyond the end of the file');
  });

  it.each<[string, number]>([
    ['the header', 0],
    ['the L1 table', 3 * CLUSTER],
  ])('in the place of %s is refused before a flag is changed there', (_, offset) => {
    poke((bytes, at) => {
      bytes.writeBigUInt64BE(BigInt(offset), at.extension + 16);
      bytes.copy(bytes, offset, at.directory, at.directory + 64);
    });
    const before = readFileSync(path);
    expect(() => bench.open(path, false)).toThrow(expect.objectContaining({ code: expect.any(String) }));
    expect(readFileSync(path).equals(before)).toBe(true);
  });

  it('keeps entries in use whatever their tables say, and gives up what they say of clusters', () => {
    const changes: Poke[] = [
      (b, p) => b.writeUInt32BE(2, p.directory + 8),
      (b, p) => b.writeBigUInt64BE(2n, p.table),
      (b, p) => b.writeBigUInt64BE(1n << 40n, p.table),
    ];
    for (const change of changes) {
      poke((bytes, at) => {
        bytes.writeUInt32BE(3, at.directory + 12);
        change(bytes, at);
      });
      const image = bench.open(path, false);
      bench.write(image.node, 0, Buffer.alloc(10, 2));
      image.close();
      expect(list()).toEqual([
        { name: 'b0', granularity: 65536, flags: ['in-use', 'auto'] },
        { name: 'b1', granularity: 512, flags: [] },
      ]);
      edit('b0', { action: 'remove' });
      expect(list()).toEqual([{ name: 'b1', granularity: 512, flags: [] }]);
      if (hasPeer('qemu-img')) run('qemu-img', ['check', '-q', path], [0, 3]);
    }
  });
});

describe('a bitmap table', () => {
  it.each<[string, (at: Places) => bigint, string]>([
    ['bit 0 beside an offset', (at) => BigInt(at.bits) | 1n, 'has reserved bits set'],
    ['bit 1', () => 2n, 'has reserved bits set'],
    ['bit 8', () => 0x100n, 'has reserved bits set'],
    ['bit 56', () => 1n << 56n, 'has reserved bits set'],
    ['bit 63', (at) => BigInt(at.bits) | (1n << 63n), 'has reserved bits set'],
    ['an offset within a cluster', (at) => BigInt(at.bits + 512), 'is not the start of a cluster'],
    ['an offset behind the end', () => 1n << 40n, 'is beyond the end of the file'],
    ['the highest offset', () => 0x00ffffffffff0000n, 'is beyond the end of the file'],
  ])('with %s is refused where the bits are needed', (_, entry, message) => {
    const used = runtime.arena.usedBytes;
    poke((bytes, at) => bytes.writeBigUInt64BE(entry(at), at.table));
    const refused = (body: () => unknown) => {
      expect(body).toThrow(message);
      expect(body).toThrow(expect.objectContaining({ code: CORRUPT }));
    };
    refused(() => load('b0'));
    // It records.
    refused(() => bench.open(path, false));
    expect(list()).toHaveLength(2);
    expect(load('b1')).toBe(0);
    edit('b0', { action: 'remove' });
    expect(list()).toHaveLength(1);

    // One that does not record is refused when somebody wants its bits.
    poke((bytes, at) => {
      bytes.writeBigUInt64BE(entry(at), at.table);
      bytes.writeUInt32BE(0, at.directory + 12);
    });
    bench.open(path, false).close();
    refused(() => edit('b0', { action: 'enable' }));
    refused(() => edit('b1', { action: 'merge', source: 'b0' }));
    edit('b0', { action: 'remove' });
    expect(list()).toHaveLength(1);
    if (hasPeer('qemu-img')) run('qemu-img', ['check', '-q', path], [0, 3]);
    expect(runtime.arena.usedBytes).toBe(used);
  });

  it('may say that a cluster is all ones', () => {
    poke((bytes, at) => bytes.writeBigUInt64BE(1n, at.table));
    expect(load('b0')).toBe(LENGTH);
    const image = bench.open(path, false);
    bench.write(image.node, 0, Buffer.alloc(10, 2));
    image.close();
    expect(load('b0')).toBe(LENGTH);
    if (hasPeer('qemu-nbd') && hasPeer('nbdinfo')) {
      expect(dirtyInQemu(path, 'b0')).toEqual([{ offset: 0, length: LENGTH }]);
    }
  });

  it('may lead to bits behind the end of the drive, which do not count', () => {
    poke((bytes, at) => bytes.fill(0xff, at.bits, at.bits + CLUSTER));
    expect(load('b0')).toBe(LENGTH);
    edit('b0', { action: 'disable' });
    const bytes = readFileSync(path);
    const directory = Number(bytes.readBigUInt64BE(places.extension + 16));
    const bits = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(directory))));
    expect(bytes.subarray(bits, bits + 3)).toEqual(Buffer.from([0xff, 0xff, 0]));
  });

  it('that shares a cluster with the header or a table of the drive gives none of it up', () => {
    for (const shared of [CLUSTER, 2 * CLUSTER, 3 * CLUSTER]) {
      poke((bytes, at) => bytes.writeBigUInt64BE(BigInt(shared), at.table));
      const before = readFileSync(path).subarray(shared, shared + CLUSTER);
      expect(() => edit('b0', { action: 'remove' })).toThrow(expect.objectContaining({ code: CORRUPT }));
      const after = readFileSync(path).subarray(shared, shared + CLUSTER);
      // Refcounts of the clusters that were freed are in the second of them.
      if (shared !== 2 * CLUSTER) expect(after.equals(before)).toBe(true);
      expect(list()).toHaveLength(1);
      const image = bench.open(path, true);
      expect(bench.read(image.node, 0, 4096)).toEqual(Buffer.alloc(4096, 1));
      image.close();
    }
  });
});

describe('bitmaps that are too large', () => {
  it('for memory are refused when their bits are needed', () => {
    // 2^45 bytes at 512 bytes a bit are 2^36 bits: a table of 4096 entries, all of them ones.
    const length = 2 ** 45;
    bench.create(path, { length, clusterBits: 21 });
    edit('b0', { action: 'add', granularity: 2 ** 20 });
    edit('b0', { action: 'disable' });
    const bytes = readFileSync(path);
    const cluster = 2 ** 21;
    const extension = bytes.indexOf(Buffer.from('2385287500000018', 'hex')) + 8;
    const directory = Number(bytes.readBigUInt64BE(extension + 16));
    bytes.writeUInt8(9, directory + 17);
    bytes.writeUInt32BE(4096, directory + 8);
    const table = Number(bytes.readBigUInt64BE(directory));
    const grown = Buffer.alloc(Math.max(bytes.length, table + cluster));
    bytes.copy(grown);
    for (let entry = 0; entry < 4096; entry++) grown.writeBigUInt64BE(1n, table + entry * 8);
    writeFileSync(path, grown);
    expect(list()).toHaveLength(1);
    bench.open(path, false).close();
    const refused = (body: () => unknown) => {
      expect(body).toThrow(expect.objectContaining({ code: UNSUPPORTED }));
      expect(body).toThrow(/68719476736 bits/);
    };
    refused(() => load('b0'));
    refused(() => edit('b0', { action: 'enable' }));
    edit('b0', { action: 'remove' });
    expect(() => edit('b1', { action: 'add', granularity: 512 })).toThrow('Use larger granularity');
  });
});
