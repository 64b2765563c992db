import { spawnSync } from 'node:child_process';
import { copyFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { checkImage, type ImageCheck } from '#src/block/check.js';
import type { RepairMode } from '#src/block/qcow2/index.js';
import { StillframeError } from '#src/errors.js';
import { createRuntime } from '#src/kernels/runtime.js';
import { hasPeer, run } from '../support/peers.js';
import { COMPRESSED, COPIED, EXTENSION, HEADER, Qcow2Bytes } from '../support/qcow2-bytes.js';
import { temporaryFolder } from './qcow2-support.js';

const folder = temporaryFolder();
const runtime = createRuntime(128 * 1024 * 1024);
const path = (name: string): string => join(folder, name);

interface Outcome {
  readonly status: number;
  readonly result: Omit<ImageCheck, 'filename'> | undefined;
  /** What is wrong or repaired, a line each. */
  readonly lines: readonly string[];
}

function exitStatus(check: ImageCheck): number {
  if (check['check-errors'] > 0) return 1;
  return check.corruptions === undefined ? (check.leaks === undefined ? 0 : 3) : 2;
}

/** Our check of an image, as the command line would tell of it. */
function ours(name: string, repair: RepairMode | undefined): Outcome {
  const lines: string[] = [];
  const onMessage = (line: string): void => {
    if (!line.startsWith('warning: ')) lines.push(line);
  };
  try {
    const check = checkImage(runtime, path(name), { repair, onMessage, onRepaired: () => undefined });
    const { filename: _, ...result } = check;
    return { status: exitStatus(check), result, lines };
  } catch (error) {
    if (!(error instanceof StillframeError)) throw error;
    expect(error.code).not.toBe('ERR_STILLFRAME_INTERNAL');
    return { status: 1, result: undefined, lines };
  }
}

function qemuImg(...args: string[]) {
  return spawnSync('qemu-img', args, { cwd: folder, encoding: 'utf8', maxBuffer: 1 << 28 });
}

function theirs(name: string, repair: RepairMode | undefined): Outcome {
  const args = repair === undefined ? [] : ['-r', repair];
  const { status, stdout, stderr } = qemuImg('check', '--output=json', ...args, name);
  const lines = stderr
    .split('\n')
    .map((line) => line.replace(/^qemu-img: ERROR /, 'ERROR ').replace(/^Some clusters .* to fix\./, ''))
    .filter((line) => line !== '' && !/^qemu-img: |^You can |^qcow2_free_clusters /.test(line));
  if (stdout === '') return { status: status ?? -1, result: undefined, lines };
  const { filename: _, ...result }: ImageCheck = JSON.parse(stdout);
  return { status: status ?? -1, result, lines };
}

function make(...args: string[]): void {
  run(
    'qemu-img',
    args.map((word) => (word.startsWith('@') ? path(word.slice(1)) : word)),
  );
}

function io(name: string, ...commands: string[]): void {
  run('qemu-io', [...commands.flatMap((command) => ['-c', command]), path(name)]);
}

/** An image filled by QEMU. */
function fill(name: string, options: string, size: string, ...commands: string[]): void {
  make('create', '-q', '-f', 'qcow2', '-o', options, `@${name}`, size);
  if (commands.length > 0) io(name, ...commands);
}

const WRITES = ['write 0 256k', 'write 1M 128k', 'write 600M 64k'];
const WIDTHS = [1, 2, 4, 8, 16, 32, 64];

/** What the cases below start from. */
function fillAll(): void {
  fill('plain', 'cluster_size=64k', '1G', ...WRITES);
  fill('v2', 'compat=0.10', '1G', ...WRITES);
  for (const bits of WIDTHS)
    fill(`width-${bits}`, `refcount_bits=${bits}`, '8M', 'write 0 640k', 'write -z 1M 1M');
  for (const size of ['512', '4k', '2M']) {
    fill(`clusters-${size}`, `cluster_size=${size}`, '8M', 'write 0 300k', 'write 3M 100k', 'discard 0 64k');
  }
  fill('empty', 'cluster_size=64k', '0');
  fill('unwritten', 'cluster_size=64k', '1G');
  fill('preallocated', 'preallocation=metadata', '8M', 'write -z 0 1M', 'write 2M 1M');
  fill(
    'subclusters',
    'extended_l2=on',
    '8M',
    'write 0 256k',
    'write 1M 2k',
    'write -z 1M 70k',
    'write -c 2M 64k',
  );
  fill('data-file', `data_file=${path('data.raw')}`, '8M', 'write 0 256k', 'write 1M 2k');
  fill(
    'compressed',
    'cluster_size=64k',
    '8M',
    'write -c 0 64k',
    'write -c 64k 64k',
    'write 128k 64k',
    'write -c 1M 64k',
  );
  fill(
    'zstd',
    'compression_type=zstd,cluster_size=4k',
    '8M',
    'write -c 0 4k',
    'write -c 4k 4k',
    'write -c 1M 4k',
  );
  for (const [name, options] of [
    ['snapshots', 'compat=1.1'],
    ['snapshots-v2', 'compat=0.10'],
  ] as const) {
    fill(name, options, '64M', 'write 0 1M');
    make('snapshot', '-c', 'one', `@${name}`);
    io(name, 'write 0 128k');
    make('snapshot', '-c', 'two', `@${name}`);
    io(name, 'write 64k 128k', 'write 10M 64k');
  }
  fill('bitmaps', 'cluster_size=64k', '64M', 'write 0 1M');
  make('bitmap', '--add', '@bitmaps', 'b0');
  make('bitmap', '--add', '-g', '64k', '@bitmaps', 'b1');
  io('bitmaps', 'write 0 128k');
  fill('lazy', 'lazy_refcounts=on', '1G', ...WRITES);
}

const sound = [
  'plain',
  'v2',
  ...WIDTHS.map((bits) => `width-${bits}`),
  'clusters-512',
  'clusters-4k',
  'clusters-2M',
  'empty',
  'unwritten',
  'preallocated',
  'subclusters',
  'data-file',
  'compressed',
  'zstd',
  'snapshots',
  'snapshots-v2',
  'bitmaps',
];

/** Sets the refcount of a cluster, 16 bits wide. */
function refcount(image: Qcow2Bytes, cluster: number, value: number): Qcow2Bytes {
  image.bytes.writeUInt16BE(value, image.refcountBlock() + cluster * 2);
  return image;
}

/** Where the first snapshot's L1 table is. */
function snapshotTable(image: Qcow2Bytes): number {
  return image.place(HEADER.snapshotsOffset);
}

function l2Entry(image: Qcow2Bytes, index: number, table = 0): number {
  const wide = image.version > 2 && (image.u64(HEADER.incompatibleFeatures) & 16n) !== 0n;
  return image.l2(table) + index * (wide ? 16 : 8);
}

/** Changes an entry of the first L2 table. */
function l2(image: Qcow2Bytes, index: number, change: (entry: bigint) => bigint): Qcow2Bytes {
  const at = l2Entry(image, index);
  return image.put64(at, BigInt.asUintN(64, change(image.u64(at))));
}

function l1(image: Qcow2Bytes, index: number, change: (entry: bigint) => bigint): Qcow2Bytes {
  return image.put64(image.l1 + index * 8, change(image.u64(image.l1 + index * 8)));
}

/** The bitmap directory. */
function directory(image: Qcow2Bytes): number {
  const extension = image.extensions().find(({ type }) => type === EXTENSION.bitmaps);
  if (extension === undefined) throw new Error('no bitmaps');
  return image.place(extension.at + 8 + 16);
}

type Damage = readonly [name: string, base: string, damage: (image: Qcow2Bytes) => unknown];

const damages: readonly Damage[] = [
  ['a refcount that is too high', 'plain', (i) => refcount(i, 10, 2)],
  ['a refcount of 0', 'plain', (i) => refcount(i, 10, 0)],
  ['no refcounts', 'plain', (i) => i.bytes.fill(0, i.refcountBlock(), i.refcountBlock() + 1000)],
  [
    'refcounts too high, too low and behind the end',
    'plain',
    (i) => refcount(refcount(refcount(i, 10, 0), 9, 3), 200, 1),
  ],
  ['a refcount too low for a snapshot', 'snapshots', (i) => refcount(refcount(i, 9, 1), 10, 9)],
  ['a cluster used twice', 'plain', (i) => l2(i, 4, () => i.u64(l2Entry(i, 0)))],
  [
    'a cluster used 301 times',
    'plain',
    (i) => {
      for (let index = 4; index < 304; index++) l2(i, index, () => i.u64(l2Entry(i, 0)));
    },
  ],
  [
    'more references than one bit holds',
    'width-1',
    (i) =>
      l2(
        l2(i, 20, () => i.u64(l2Entry(i, 0))),
        21,
        () => i.u64(l2Entry(i, 0)),
      ),
  ],
  [
    'more references than two bits hold',
    'width-2',
    (i) => {
      for (let index = 10; index < 16; index++) l2(i, index, () => i.u64(l2Entry(i, 0)));
    },
  ],
  [
    'more references than eight bits hold',
    'width-8',
    (i) => {
      for (let index = 10; index < 310; index++) l2(i, index, () => i.u64(l2Entry(i, 0)));
    },
  ],
  [
    'refcounts of 4 bits too high',
    'width-4',
    (i) => i.bytes.fill(0xff, i.refcountBlock() + 3, i.refcountBlock() + 5),
  ],
  ['a refcount of 32 bits too high', 'width-32', (i) => i.put32(i.refcountBlock() + 4 * 12, 0x80000000)],
  [
    'a refcount of 64 bits too high',
    'width-64',
    (i) => i.put64(i.refcountBlock() + 8 * 12, 0xfffffffffffffffen),
  ],
  ['no refcount block', 'plain', (i) => i.put64(i.refcountTable, 0)],
  ['a second refcount block beyond the end', 'plain', (i) => i.put64(i.refcountTable + 8, 0x100000)],
  ['the refcount block beyond the end', 'plain', (i) => i.put64(i.refcountTable, 0x10000000)],
  ['a refcount block no file can have', 'plain', (i) => i.put64(i.refcountTable + 8, 2n ** 55n)],
  ['one refcount block twice', 'plain', (i) => i.put64(i.refcountTable + 8, i.refcountBlock())],
  ['the refcount table as its own block', 'plain', (i) => i.put64(i.refcountTable + 8, i.refcountTable)],
  ['the L1 table as a refcount block', 'plain', (i) => i.put64(i.refcountTable + 8, i.l1)],
  [
    'no refcount table',
    'plain',
    (i) => i.put64(HEADER.refcountTableOffset, 0).put32(HEADER.refcountTableClusters, 0),
  ],
  ['a refcount table beyond the end', 'plain', (i) => i.put64(HEADER.refcountTableOffset, 0x10000000)],
  [
    'flags COPIED missing',
    'plain',
    (i) =>
      l2(
        l1(i, 0, (e) => e & ~COPIED),
        1,
        (e) => e & ~COPIED,
      ),
  ],
  ['flags COPIED too many', 'snapshots', (i) => l2(i, 12, (e) => e | COPIED)],
  ['flags COPIED too many in version 2', 'snapshots-v2', (i) => l2(i, 12, (e) => e | COPIED)],
  ['an L2 table beyond the end', 'plain', (i) => l1(i, 1, () => 0x8000000010000000n)],
  ['an L2 table no file can have', 'plain', (i) => l1(i, 1, () => 0x80ffffffffff0000n)],
  ['one L2 table twice', 'plain', (i) => l1(i, 1, () => i.u64(i.l1))],
  ['reserved bits in an L1 entry', 'plain', (i) => l1(i, 0, (e) => e | 1n | (1n << 60n))],
  [
    'reserved bits in L2 entries',
    'plain',
    (i) =>
      l2(
        l2(i, 0, (e) => e | 2n | (1n << 57n)),
        100,
        () => 4n,
      ),
  ],
  ['data inside of a cluster', 'plain', (i) => l2(i, 0, (e) => e + 512n)],
  ['a preallocated cluster inside of a cluster', 'plain', (i) => l2(i, 0, (e) => (e + 512n) | 1n)],
  ['zeroes in place of data', 'plain', (i) => l2(i, 0, () => 1n | COPIED)],
  ['nothing but the flag COPIED', 'plain', (i) => l2(i, 0, () => COPIED)],
  ['data beyond the end', 'plain', (i) => l2(i, 0, () => 0x8000000040000000n)],
  ['data no file can have', 'plain', (i) => l2(i, 0, () => 0x80ffffffffff0000n)],
  ["another table's data", 'plain', (i) => l2(i, 100, () => i.u64(l2Entry(i, 1408, 1)))],
  ['the flag COPIED at compressed data', 'plain', (i) => l2(i, 0, (e) => e | COMPRESSED)],
  [
    'compressed data beyond the end',
    'compressed',
    (i) =>
      l2(
        l2(i, 0, () => COMPRESSED | 0x10000000n),
        1,
        () => COMPRESSED | 0x2000000000000n | (255n << 54n),
      ),
  ],
  [
    'compressed data over the end',
    'compressed',
    (i) => l2(i, 3, () => COMPRESSED | BigInt(i.bytes.length - 512) | (200n << 54n)),
  ],
  [
    'compressed data up to the last cluster that may be cut off',
    'compressed',
    (i) => l2(i, 3, () => COMPRESSED | BigInt(i.bytes.length - 512) | (100n << 54n)),
  ],
  ['a subcluster that is both', 'subclusters', (i) => i.put64(l2Entry(i, 0) + 8, 0x1ffffffffn)],
  ['subclusters without a cluster', 'subclusters', (i) => i.put64(l2Entry(i, 100) + 8, 0xffn)],
  [
    'subclusters inside of a cluster',
    'subclusters',
    (i) =>
      l2(
        l2(i, 1, (e) => e + 512n),
        0,
        (e) => e + 512n,
      ).put64(l2Entry(i, 1) + 8, 0xffffffff00000000n),
  ],
  ['a zero flag with subclusters', 'subclusters', (i) => l2(i, 0, (e) => e | 1n)],
  ['compressed data with a data file', 'data-file', (i) => l2(i, 0, (e) => e | COMPRESSED)],
  [
    'offsets in a data file',
    'data-file',
    (i) => {
      l2(i, 0, () => 0x8000000000070000n);
      l2(i, 1, () => 0n);
      l2(i, 2, () => 0x20000n);
      l2(i, 3, () => 0x8000000000030200n);
    },
  ],
  [
    'a snapshot with a data file',
    'data-file',
    (i) => i.put32(HEADER.snapshotCount, 1).put64(HEADER.snapshotsOffset, i.l1),
  ],
  ['the dirty bit', 'lazy', (i) => i.put64(HEADER.incompatibleFeatures, 1)],
  [
    'the dirty bit and a refcount of 0',
    'lazy',
    (i) => refcount(i.put64(HEADER.incompatibleFeatures, 1), 10, 0),
  ],
  ['the dirty bit and a leak', 'lazy', (i) => refcount(i.put64(HEADER.incompatibleFeatures, 1), 10, 3)],
  ['the corrupt bit', 'plain', (i) => i.put64(HEADER.incompatibleFeatures, 2)],
  ['the corrupt bit and damage', 'plain', (i) => refcount(i.put64(HEADER.incompatibleFeatures, 2), 10, 0)],
  [
    'the last cluster cut off',
    'plain',
    (i) => {
      i.bytes = i.bytes.subarray(0, i.bytes.length - 100000);
    },
  ],
  [
    'the last cluster cut short',
    'plain',
    (i) => {
      i.bytes = i.bytes.subarray(0, i.bytes.length - 1000);
    },
  ],
  [
    'nothing at the end',
    'plain',
    (i) => {
      i.bytes = Buffer.concat([i.bytes, Buffer.alloc(1000000)]);
    },
  ],
  ['an L1 table beyond the end', 'plain', (i) => i.put64(HEADER.l1TableOffset, 0x10000000)],
  ['one place for L1 and refcount table', 'plain', (i) => i.put64(HEADER.l1TableOffset, i.refcountTable)],
  [
    "a snapshot's L1 table inside of a cluster",
    'snapshots',
    (i) => i.put64(snapshotTable(i), i.u64(snapshotTable(i)) + 512n),
  ],
  ["a snapshot's L1 table that is too large", 'snapshots', (i) => i.put32(snapshotTable(i) + 8, 0x1000000)],
  ["a snapshot's L1 table that is larger", 'snapshots', (i) => i.put32(snapshotTable(i) + 8, 20)],
  ["a snapshot's L1 table beyond the end", 'snapshots', (i) => i.put64(snapshotTable(i), 0x100000000)],
  [
    "reserved bits in a snapshot's L2 entry",
    'snapshots',
    (i) => {
      const table = i.place(i.place(snapshotTable(i)));
      i.put64(table + 16, i.u64(table + 16) | 2n);
    },
  ],
  [
    'too few bytes in a snapshot table entry',
    'snapshots',
    (i) => {
      const table = snapshotTable(i);
      i.putBytes(table + 48, Buffer.from(i.bytes.subarray(table + 64, table + 68)));
      i.put32(table + 36, 8).put32(HEADER.snapshotCount, 1);
    },
  ],
  ['snapshot table entries of zeroes', 'snapshots', (i) => i.put32(HEADER.snapshotCount, 100)],
  [
    'a snapshot table entry with much unknown data',
    'snapshots',
    (i) => i.put32(snapshotTable(i) + 36, 1024).put32(HEADER.snapshotCount, 1),
  ],
  [
    'a snapshot table entry with too much unknown data',
    'snapshots',
    (i) => i.put32(snapshotTable(i) + 36, 2000).put32(HEADER.snapshotCount, 1),
  ],
  [
    'too many snapshots',
    'snapshots',
    (i) => {
      // The third entry runs over the end of the table's largest size.
      i.put32(HEADER.snapshotCount, 65537).put32(snapshotTable(i) + 2 * 72 + 36, 0x7fffffff);
    },
  ],
  ['a snapshot table beyond the end', 'snapshots', (i) => i.put64(HEADER.snapshotsOffset, 0x1000000000)],
  ['a snapshot table inside of a cluster', 'snapshots', (i) => i.put64(HEADER.snapshotsOffset, 1000)],
  ['a bitmap table beyond the end', 'bitmaps', (i) => i.put64(directory(i), 0x1000000000)],
  ['a leak beside bitmaps', 'bitmaps', (i) => refcount(i, 16, 2)],
  ['a bitmap in use', 'bitmaps', (i) => i.put32(directory(i) + 12, 3)],
  [
    'a bitmap whose granularity is wrong',
    'bitmaps',
    (i) => i.bytes.fill(70, directory(i) + 17, directory(i) + 18),
  ],
  ['a bitmap table inside of a cluster', 'bitmaps', (i) => i.put64(directory(i), i.u64(directory(i)) + 512n)],
  ['a bitmap table with too many entries', 'bitmaps', (i) => i.put32(directory(i) + 8, 0x10000)],
  ['bitmaps that were changed without', 'bitmaps', (i) => i.put64(HEADER.autoclearFeatures, 0)],
];

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('the check, beside qemu-img', () => {
  beforeAll(fillAll);

  it.each(sound)('finds nothing wrong with %s', (name) => {
    const own = ours(name, undefined);
    expect(own).toEqual({ ...theirs(name, undefined), status: 0, lines: [] });
  });

  it.each(damages)('finds %s', (_, base, damage) => {
    const image = Qcow2Bytes.read(path(base));
    damage(image);
    image.save(path('damaged'));
    expect(ours('damaged', undefined)).toEqual(theirs('damaged', undefined));
  });

  it.each(damages)('repairs %s', (_, base, damage) => {
    const image = Qcow2Bytes.read(path(base));
    damage(image);
    for (const mode of ['leaks', 'all'] as const) {
      image.save(path('own'));
      image.save(path('their'));
      const own = ours('own', mode);
      expect(own).toEqual(theirs('their', mode));
      if (own.result === undefined) continue;
      // What is left is what a check of ours finds, and theirs.
      const again = ours('own', undefined);
      expect(again.status).toBe(own.status);
      expect(theirs('own', undefined)).toEqual(again);
      // 4: neither can be read to its end.
      if (own.status === 0) expect([0, 4]).toContain(qemuImg('compare', 'own', 'their').status);
    }
  });

  /** Damage at which qemu-img 7.2 gives up, or does more. */
  const beyond: readonly Damage[] = [
    [
      'a refcount table entry with reserved bits',
      'plain',
      (i) => i.put64(i.refcountTable, i.refcountBlock() + 1),
    ],
    [
      'a refcount block inside of a cluster',
      'plain',
      (i) => i.put64(i.refcountTable, i.refcountBlock() + 512),
    ],
    ['the active L1 table as that of a snapshot', 'snapshots', (i) => i.put64(snapshotTable(i), i.l1)],
  ];

  it.each(beyond)('repairs %s, which qemu-img does not', (_, base, damage) => {
    const image = Qcow2Bytes.read(path(base));
    damage(image);
    image.save(path('own'));
    image.save(path('their'));
    expect(theirs('their', 'all').status).toBe(1);
    expect(ours('own', 'all').status).toBe(0);
    expect(theirs('own', undefined)).toEqual(ours('own', undefined));
    run('qemu-img', ['compare', path('own'), path(base)]);
  });

  it('cannot read refcounts inside of a cluster, and says so', () => {
    const image = Qcow2Bytes.read(path('plain'));
    image.put64(image.refcountTable, image.refcountBlock() + 512).save(path('damaged'));
    const own = ours('damaged', undefined);
    expect(own).toEqual(theirs('damaged', undefined));
    expect(own.result?.['check-errors']).toBe(13);
    image.save(path('own'));
    expect(ours('own', 'leaks')).toMatchObject({ status: 1, result: undefined });
    expect(Qcow2Bytes.read(path('own')).bytes.equals(image.bytes)).toBe(true);
  });

  it('keeps snapshots beside bitmaps and unknown autoclear bits', () => {
    // qemu-img 7.2 drops all snapshots here before it begins.
    copyFileSync(path('snapshots'), path('own'));
    make('bitmap', '--add', '@own', 'b0');
    const image = refcount(Qcow2Bytes.read(path('own')), 20, 9);
    image.put64(HEADER.autoclearFeatures, 0x81n).save(path('own'));
    expect(ours('own', 'leaks')).toMatchObject({ status: 0, result: { 'leaks-fixed': 1 } });
    const { snapshots } = JSON.parse(run('qemu-img', ['info', '--output=json', path('own')]));
    expect(snapshots).toMatchObject([{ name: 'one' }, { name: 'two' }]);
    // What it does not know may not be true any more.
    expect(Qcow2Bytes.read(path('own')).u64(HEADER.autoclearFeatures)).toBe(1n);
  });

  it('does not free what a damaged bitmap may refer to', () => {
    const image = Qcow2Bytes.read(path('bitmaps'));
    const table = image.place(directory(image));
    image.put64(table, image.u64(table) | 2n).save(path('own'));
    expect(ours('own', undefined)).toMatchObject({ status: 2, result: { corruptions: 1, leaks: 1 } });
    expect(ours('own', 'all')).toMatchObject({ status: 1, result: undefined });
    expect(Qcow2Bytes.read(path('own')).bytes.equals(image.bytes)).toBe(true);
  });

  it('does not free what a damaged compressed entry refers to', () => {
    const image = Qcow2Bytes.read(path('subclusters'));
    const bitmap = l2Entry(image, 32) + 8;
    image.put64(bitmap, 1n).save(path('own'));
    const own = ours('own', undefined);
    const { lines } = theirs('own', undefined);
    expect(lines).toEqual([
      expect.stringContaining('non-zero subcluster'),
      expect.stringContaining('Leaked'),
    ]);
    expect(own).toMatchObject({ status: 2, result: { corruptions: 1 }, lines: [lines[0]] });
    expect(own.result?.leaks).toBeUndefined();
    // A leak beside it is repaired, the entry is not.
    refcount(image, 5, 2).save(path('own'));
    expect(ours('own', 'all')).toMatchObject({ status: 2, result: { corruptions: 1, 'leaks-fixed': 1 } });
    io('own', 'read -P 0xcd 2M 64k');
    expect(Qcow2Bytes.read(path('own')).u64(bitmap)).toBe(1n);
  });

  it('counts the L2 tables of many snapshots once, and right', () => {
    fill('many', 'cluster_size=1k,refcount_bits=8', '1M', 'write 0 300k');
    for (let index = 0; index < 12; index++) {
      make('snapshot', '-c', `s${index}`, '@many');
      io('many', `write ${index * 40}k 10k`);
    }
    expect(ours('many', undefined)).toEqual(theirs('many', undefined));
    const image = Qcow2Bytes.read(path('many'));
    // A flag in a table that most of the snapshots share, and a table the active one has twice.
    l2(image, 127, (entry) => entry | 4n);
    l1(image, 5, () => image.u64(image.l1 + 8 * 4));
    image.save(path('own'));
    image.save(path('their'));
    expect(ours('own', undefined)).toEqual(theirs('their', undefined));
    expect(ours('own', 'all')).toEqual(theirs('their', 'all'));
  });

  it('refuses encrypted images by name', () => {
    Qcow2Bytes.read(path('plain')).put32(HEADER.cryptMethod, 1).save(path('own'));
    expect(() => ours('own', undefined)).not.toThrow();
    expect(() => check('own')).toThrow('AES encryption');
    Qcow2Bytes.read(path('plain')).put32(HEADER.cryptMethod, 2).save(path('own'));
    expect(() => check('own')).toThrow('LUKS encryption');
  });
});

function check(name: string): ImageCheck {
  const nothing = (): undefined => undefined;
  return checkImage(runtime, path(name), { onMessage: nothing, onRepaired: nothing });
}
