import { closeSync, ftruncateSync, openSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import { imageInfo } from '#src/block/info.js';
import { StillframeError } from '#src/errors.js';
import { firstDifference, Random } from '../support/data.js';
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
import { type OpenImage, temporaryFolder, Workbench } from './qcow2-support.js';

const folder = temporaryFolder();
const bench = new Workbench();
const at = (name: string): string => join(folder, name);
const CORRUPT = 'ERR_STILLFRAME_CORRUPT_IMAGE';
const UNSUPPORTED = 'ERR_STILLFRAME_UNSUPPORTED_FEATURE';
const bad = at('bad.qcow2');

/** An error of this code whose message has all of the words. */
function refusal(code: string, ...words: (string | RegExp)[]): unknown {
  const patterns = words.map((word) =>
    typeof word === 'string' ? expect.stringContaining(word) : expect.stringMatching(word),
  );
  return expect.toSatisfy((error: unknown) => {
    expect(error).toMatchObject({ code });
    for (const message of patterns) expect(error).toMatchObject({ message });
    return true;
  });
}

/** What an action throws; the memory it took must be back. */
function errorOf(action: () => void): unknown {
  const used = bench.runtime.arena.usedBytes;
  let thrown: unknown;
  try {
    action();
  } catch (error) {
    thrown = error;
  }
  expect(bench.runtime.arena.usedBytes).toBe(used);
  return thrown;
}

/** Opens the damaged image for `body` and closes it, whatever that does. The first error counts. */
function use(readOnly: boolean, body: (image: OpenImage) => void): void {
  const open = bench.open(bad, readOnly);
  try {
    body(open);
  } catch (error) {
    try {
      open.close();
    } catch (closing) {
      expect(closing).toBeInstanceOf(StillframeError);
    }
    throw error;
  }
  open.close();
}

function made(name: string, options: Parameters<Workbench['create']>[1]): Qcow2Bytes {
  bench.create(at(name), options);
  return Qcow2Bytes.read(at(name));
}

/** A name, a change of the image, and what the refusal names: code, field, offset of the field and words besides. */
type HeaderCase = [
  name: string,
  change: (image: Qcow2Bytes) => void,
  code: string,
  field: string,
  offset: number,
  words?: string,
];

function poke32(field: keyof typeof HEADER, value: number): (image: Qcow2Bytes) => void {
  return (image) => void image.put32(HEADER[field], value);
}

function poke64(field: keyof typeof HEADER, value: bigint): (image: Qcow2Bytes) => void {
  return (image) => void image.put64(HEADER[field], value);
}

describe('a hostile header', () => {
  const plain = made('plain.qcow2', { length: 1 << 20, backingFile: 'base.raw', backingFormat: 'raw' });
  const cluster = 65536;
  const nameAt = Number(plain.u64(HEADER.backingFileOffset));

  const fields: HeaderCase[] = [
    ['version 1', poke32('version', 1), UNSUPPORTED, 'version', 4, 'version 1'],
    ['version 4', poke32('version', 4), UNSUPPORTED, 'version', 4, 'version 4'],
    [
      'a backing file name beyond the cluster',
      poke64('backingFileOffset', 65532n),
      CORRUPT,
      'backing_file_size',
      16,
    ],
    [
      'a backing file name outside',
      poke64('backingFileOffset', 2n ** 30n),
      CORRUPT,
      'backing_file_offset',
      8,
    ],
    [
      'a backing file name behind 2^63',
      poke64('backingFileOffset', 2n ** 63n + 200n),
      CORRUPT,
      'backing_file_offset',
      8,
    ],
    [
      'a backing file name in the header',
      poke64('backingFileOffset', 104n),
      CORRUPT,
      'backing_file_offset',
      8,
    ],
    ['a backing file name of 1024 bytes', poke32('backingFileSize', 1024), CORRUPT, 'backing_file_size', 16],
    ['a backing file name of 4 GiB', poke32('backingFileSize', 0xffffffff), CORRUPT, 'backing_file_size', 16],
    ['clusters of 256 bytes', poke32('clusterBits', 8), CORRUPT, 'cluster_bits', 20],
    ['clusters of 4 MiB', poke32('clusterBits', 22), CORRUPT, 'cluster_bits', 20],
    ['clusters of 2^64 bytes', poke32('clusterBits', 64), CORRUPT, 'cluster_bits', 20],
    ['cluster bits of 2^32 - 1', poke32('clusterBits', 0xffffffff), CORRUPT, 'cluster_bits', 20],
    ['a size of 2^64 - 1', poke64('size', 2n ** 64n - 1n), CORRUPT, "'size'", 24],
    ['a size its L1 table does not reach', poke64('size', 2n ** 50n), CORRUPT, 'l1_size', 36],
    ['AES', poke32('cryptMethod', 1), UNSUPPORTED, 'crypt_method', 32, 'AES encryption'],
    ['LUKS', poke32('cryptMethod', 2), UNSUPPORTED, 'crypt_method', 32, 'LUKS encryption'],
    ['an unknown encryption', poke32('cryptMethod', 3), UNSUPPORTED, 'crypt_method', 32, 'encryption 3'],
    ['an L1 table just over 32 MiB', poke32('l1Size', (32 << 17) + 1), CORRUPT, 'l1_size', 36],
    ['a huge L1 table', poke32('l1Size', 0xffffffff), CORRUPT, 'l1_size', 36],
    [
      'an L1 table of 32 MiB that the file does not have',
      poke32('l1Size', 32 << 17),
      CORRUPT,
      'l1_table_offset',
      40,
    ],
    ['no L1 table', poke32('l1Size', 0), CORRUPT, 'l1_size', 36],
    ['an L1 table in the header', poke64('l1TableOffset', 0n), CORRUPT, 'l1_table_offset', 40],
    ['an unaligned L1 table', poke64('l1TableOffset', 0x30200n), CORRUPT, 'l1_table_offset', 40],
    ['an L1 table beyond the end', poke64('l1TableOffset', 2n ** 40n), CORRUPT, 'l1_table_offset', 40],
    ['an L1 table beyond 2^53', poke64('l1TableOffset', 2n ** 60n), CORRUPT, 'l1_table_offset', 40],
    [
      'an L1 table that ends beyond 2^63',
      poke64('l1TableOffset', 2n ** 63n - 65536n),
      CORRUPT,
      'l1_table_offset',
      40,
    ],
    [
      'an L1 table in the refcount table',
      poke64('l1TableOffset', 0x10000n),
      CORRUPT,
      'l1_table_offset',
      40,
      'overlap',
    ],
    [
      'a refcount table in the header',
      poke64('refcountTableOffset', 0n),
      CORRUPT,
      'refcount_table_offset',
      48,
    ],
    [
      'an unaligned refcount table',
      poke64('refcountTableOffset', 0x10200n),
      CORRUPT,
      'refcount_table_offset',
      48,
    ],
    [
      'a refcount table beyond the end',
      poke64('refcountTableOffset', 2n ** 40n),
      CORRUPT,
      'refcount_table_offset',
      48,
    ],
    [
      'a refcount table near 2^63',
      poke64('refcountTableOffset', 2n ** 63n - 65536n),
      CORRUPT,
      'refcount_table_offset',
      48,
    ],
    ['no refcount table', poke32('refcountTableClusters', 0), CORRUPT, 'refcount_table_clusters', 56],
    [
      'a refcount table just over 8 MiB',
      poke32('refcountTableClusters', 129),
      CORRUPT,
      'refcount_table_clusters',
      56,
    ],
    [
      'a huge refcount table',
      poke32('refcountTableClusters', 0x7fffffff),
      CORRUPT,
      'refcount_table_clusters',
      56,
    ],
    ['65537 snapshots', poke32('snapshotCount', 65537), CORRUPT, 'nb_snapshots', 60],
    ['2^32 - 1 snapshots', poke32('snapshotCount', 0xffffffff), CORRUPT, 'nb_snapshots', 60],
    ['snapshots in the header', poke32('snapshotCount', 1), CORRUPT, 'snapshots_offset', 64],
    [
      'an unaligned snapshot table',
      (image) => void image.put32(60, 1).put64(64, 0x10008n),
      CORRUPT,
      'snapshots_offset',
      64,
    ],
    [
      'a snapshot table beyond the end',
      (image) => void image.put32(60, 1).put64(64, 2n ** 40n),
      CORRUPT,
      'snapshots_offset',
      64,
    ],
    [
      'a snapshot table near 2^63',
      (image) => void image.put32(60, 1).put64(64, 2n ** 63n - 65536n),
      CORRUPT,
      'snapshots_offset',
      64,
    ],
    [
      'an unknown incompatible feature',
      poke64('incompatibleFeatures', 1n << 40n),
      UNSUPPORTED,
      'incompatible_features',
      72,
      'bit 40',
    ],
    [
      'unknown incompatible features',
      poke64('incompatibleFeatures', (1n << 63n) | (1n << 5n)),
      UNSUPPORTED,
      'incompatible_features',
      72,
      'unknown incompatible feature bit 5, unknown incompatible feature bit 63',
    ],
    ['zstd by its feature bit alone', poke64('incompatibleFeatures', 8n), CORRUPT, 'compression_type', 104],
    ['refcounts of 128 bits', poke32('refcountOrder', 7), CORRUPT, 'refcount_order', 96],
    ['refcounts of 2^(2^32 - 1) bits', poke32('refcountOrder', 0xffffffff), CORRUPT, 'refcount_order', 96],
    ['a header of 100 bytes', poke32('headerLength', 100), CORRUPT, 'header_length', 100],
    ['a header of 108 bytes', poke32('headerLength', 108), CORRUPT, 'header_length', 100],
    ['a header longer than a cluster', poke32('headerLength', cluster + 8), CORRUPT, 'header_length', 100],
    ['a header of 4 GiB', poke32('headerLength', 0xfffffff8), CORRUPT, 'header_length', 100],
    [
      'an unknown compression',
      poke32('compressionType', 0x05000000),
      UNSUPPORTED,
      'compression_type',
      104,
      'type 5',
    ],
    ['zstd without its feature bit', poke32('compressionType', 0x01000000), CORRUPT, 'compression_type', 104],
    [
      'subclusters of 256 bytes',
      (image) => void image.put32(HEADER.clusterBits, 13).put64(HEADER.incompatibleFeatures, 16),
      CORRUPT,
      'cluster_bits',
      20,
      'subclusters',
    ],
    [
      'an endless header extension',
      (image) => void image.put32(116, 0x7fffffff),
      CORRUPT,
      'header extension',
      112,
    ],
    [
      'a header extension that reaches into the name of the backing file',
      (image) => void image.put32(116, nameAt - 112 - 8 + 1),
      CORRUPT,
      'header extension',
      112,
    ],
    [
      'a backing format of 16 bytes',
      (image) =>
        void image.setHead([[EXTENSION.backingFormat, Buffer.alloc(16, 0x61)]], Buffer.from('base.raw')),
      CORRUPT,
      'backing file format',
      112,
    ],
    [
      'a zero byte in the name of the backing file',
      (image) => void image.putBytes(nameAt + 2, Buffer.from([0])),
      CORRUPT,
      'backing file name',
      nameAt,
      'zero byte',
    ],
  ];

  it.each(fields)('%s', (_, change, code, field, offset, words = '') => {
    const image = plain.copy();
    change(image);
    image.save(bad);
    for (const readOnly of [true, false]) {
      const thrown = errorOf(() => bench.open(bad, readOnly).close());
      expect(thrown).toEqual(refusal(code, `'${bad}'`, field, new RegExp(`offset ${offset}\\b`), words));
    }
  });

  it('of another format', () => {
    for (const bytes of [Buffer.alloc(0), plain.bytes.subarray(0, 71), Buffer.alloc(1 << 20, 'QFJ')]) {
      new Qcow2Bytes(bytes).save(bad);
      expect(errorOf(() => bench.open(bad, true))).toEqual(
        refusal('ERR_STILLFRAME_FORMAT', `'${bad}'`, 'magic'),
      );
    }
  });

  it('names features in the words of the image, without what would play with a terminal', () => {
    const table = Buffer.alloc(96);
    table.set([0, 40]);
    table.write('\u001b]0;title\u0007 \r\n\u009b2J warp drive', 2, 'latin1');
    table.set([0, 41], 48);
    table.fill(0x41, 50, 96);
    plain
      .copy()
      .setHead([[EXTENSION.features, table]])
      .put64(HEADER.incompatibleFeatures, (1n << 40n) | (1n << 41n) | (1n << 42n))
      .save(bad);
    const thrown = errorOf(() => bench.open(bad, true));
    expect(thrown).toEqual(
      refusal(
        UNSUPPORTED,
        'warp drive',
        `'${'A'.repeat(46)}' (incompatible feature bit 41)`,
        'unknown incompatible feature bit 42',
      ),
    );
    expect(thrown).toMatchObject({ message: expect.not.stringMatching(/\p{Cc}/u) });
  });

  it('marked corrupt: read, but not written', () => {
    for (const bits of [2n, 3n]) {
      plain.copy().setHead([]).put64(HEADER.incompatibleFeatures, bits).save(bad);
      expect(errorOf(() => bench.open(bad, true).close())).toBe(undefined);
      expect(errorOf(() => bench.open(bad, false))).toEqual(refusal(CORRUPT, `'${bad}'`, 'marked corrupt'));
    }
  });

  it('whose last extension ends with its cluster, or is cut off by it, is none', () => {
    const image = made('small.qcow2', { length: 1 << 20, clusterBits: 9 });
    const room = 512 - 112;
    image.setHead([[0x12345678, Buffer.alloc(room - 8, 1)]]).save(bad);
    expect(errorOf(() => bench.open(bad, true).close())).toBe(undefined);
    image.setHead([[0x12345678, Buffer.alloc(room - 12, 1)]]).save(bad);
    expect(errorOf(() => bench.open(bad, true).close())).toBe(undefined);
  });

  it('with 100000 extensions takes no time', () => {
    const image = made('large.qcow2', { length: 1 << 20, clusterBits: 21 });
    for (let place = 112; place < 112 + 100_000 * 8; place += 8) image.put32(place, 0x12345678);
    image.save(bad);
    expect(errorOf(() => bench.open(bad, true).close())).toBe(undefined);
  });
});

describe('a hostile snapshot table', () => {
  const plain = made('listings.qcow2', { length: 1 << 20, clusterBits: 16 });

  const entries: [name: string, count: number, table: Buffer, words: string[]][] = [
    ['with fewer entries than there are snapshots', 1600, snapshotEntry({ nameLength: 3000 }), ['end']],
    [
      'with 1025 bytes of extra data',
      1,
      snapshotEntry({ extra: Buffer.alloc(1025) }),
      ['1025 bytes of extra data'],
    ],
    [
      'with endless extra data',
      1,
      snapshotEntry({ extraLength: 0xffffffff }),
      ['4294967295 bytes of extra data'],
    ],
    ['with a name beyond the end', 1, snapshotEntry({ idLength: 65535, nameLength: 65535 }), ['end']],
  ];

  it.each(entries)('%s', (_, count, table, words) => {
    const image = plain.copy();
    const place = image.append(Buffer.concat([table, Buffer.alloc(40)]));
    image.put32(HEADER.snapshotCount, count).put64(HEADER.snapshotsOffset, place).save(bad);
    const thrown = errorOf(() => use(true, (open) => void imageInfo(bench.runtime, open.descriptor, bad)));
    expect(thrown).toEqual(refusal(CORRUPT, `'${bad}'`, `snapshot table at offset ${place}`, ...words));
  });
});

it('a snapshot table of more than 64 MiB', () => {
  const image = made('listings.qcow2', { length: 1 << 20, clusterBits: 16 });
  const entry = snapshotEntry({ idLength: 65535, nameLength: 65535 });
  const step = Math.ceil((64 + 2 * 65535) / 8) * 8;
  const place = image.append(Buffer.alloc(8));
  image.put32(HEADER.snapshotCount, 520).put64(HEADER.snapshotsOffset, place).save(bad);
  const fd = openSync(bad, 'r+');
  for (let index = 0; index < 520; index++) writeSync(fd, entry, 0, 64, place + index * step);
  ftruncateSync(fd, place + 520 * step);
  closeSync(fd);
  for (const readOnly of [true, false]) {
    const thrown = errorOf(() =>
      use(readOnly, (open) => void imageInfo(bench.runtime, open.descriptor, bad)),
    );
    expect(thrown).toEqual(refusal(CORRUPT, `'${bad}'`, `snapshot table at offset ${place}`));
  }
});

describe('a hostile snapshot that is to be read', () => {
  const plain = made('taken.qcow2', { length: 1 << 20, clusterBits: 16 });

  function readSnapshot(): unknown {
    return errorOf(() => {
      const options = { readOnly: true, format: 'qcow2', snapshot: '1' } as const;
      const descriptor = openImage(bench.runtime, bad, options);
      try {
        bench.read(attachNode(bench.runtime, descriptor), 0, 512);
      } finally {
        closeNode(bench.runtime, descriptor);
      }
    });
  }

  const extra = (size: bigint): Buffer => {
    const bytes = Buffer.alloc(24);
    bytes.writeBigUInt64BE(size, 8);
    return bytes;
  };

  it.each<[string, Parameters<typeof snapshotEntry>[0], RegExp]>([
    ['with its L1 table in the header', { l1Offset: 0, l1Size: 1 }, /L1 table is at offset 0,/],
    ['with an unaligned L1 table', { l1Offset: 0x30200, l1Size: 1 }, /L1 table is at offset 197120,/],
    [
      'with an L1 table beyond the end',
      { l1Offset: 2 ** 40, l1Size: 1 },
      /L1 table is at offset 1099511627776,/,
    ],
    [
      'with an L1 table near 2^63',
      { l1Offset: 2n ** 63n - 65536n, l1Size: 1 },
      /L1 table is at offset 9223372036854710000,/,
    ],
    [
      'with an L1 table just over 32 MiB',
      { l1Offset: 0x30000, l1Size: (32 << 17) + 1 },
      /L1 table of 4194305 entries, more than/,
    ],
    ['with a huge L1 table', { l1Offset: 0x30000, l1Size: 0xffffffff }, /L1 table of 4294967295 entries/],
    ['without an L1 table', { l1Offset: 0x30000, l1Size: 0 }, /L1 table of 0 entries, too few/],
    [
      'larger than its L1 table reaches',
      { l1Offset: 0x30000, l1Size: 1, extra: extra(2n ** 40n) },
      /L1 table of 1 entries, too few for its disk of 1099511627776 bytes/,
    ],
    [
      'of 2^64 - 1 bytes',
      { l1Offset: 0x30000, l1Size: 1, extra: extra(2n ** 64n - 1n) },
      /disk of 18446744073709552000 bytes/,
    ],
  ])('%s', (_, fields, words) => {
    const image = plain.copy();
    const place = image.append(snapshotEntry({ extra: extra(1n << 20n), ...fields }));
    image.put32(HEADER.snapshotCount, 1).put64(HEADER.snapshotsOffset, place).save(bad);
    expect(readSnapshot()).toEqual(refusal(CORRUPT, `'${bad}'`, `snapshot 'snapshot'`, words));
    // The drive itself is as good as ever.
    expect(errorOf(() => bench.open(bad, true).close())).toBe(undefined);
  });

  it('with an L1 entry that has reserved bits', () => {
    const image = plain.copy();
    const l1 = Buffer.alloc(8);
    l1.writeBigUInt64BE(COPIED | 1n);
    const table = image.append(l1);
    const entry = snapshotEntry({ extra: extra(1n << 20n), l1Offset: table, l1Size: 1 });
    const place = image.append(entry);
    image.put32(HEADER.snapshotCount, 1).put64(HEADER.snapshotsOffset, place).save(bad);
    expect(readSnapshot()).toEqual(
      refusal(CORRUPT, `'${bad}'`, `L1 entry 0 (at offset ${table}) has reserved bits set`),
    );
  });
});

describe('a hostile bitmap directory', () => {
  const plain = made('directory.qcow2', { length: 1 << 20, clusterBits: 16 });

  const directories: [name: string, extension: (place: number) => Buffer, table: Buffer, words: string[]][] =
    [
      ['of 65536 bitmaps', (place) => bitmapsExtension(65536, 64, place), Buffer.alloc(64), ['65536']],
      [
        'of 64 MiB and a byte',
        (place) => bitmapsExtension(1, (64 << 20) + 1, place),
        Buffer.alloc(64),
        ['67108865'],
      ],
      [
        'of 2^64 - 1 bytes',
        (place) => bitmapsExtension(1, 2n ** 64n - 1n, place),
        Buffer.alloc(64),
        ['bytes'],
      ],
      ['beyond the end', () => bitmapsExtension(1, 64, 2n ** 40n), Buffer.alloc(64), ['1099511627776']],
      ['beyond 2^63', () => bitmapsExtension(1, 64, 2n ** 63n), Buffer.alloc(64), ['9223372036854775808']],
      [
        'that ends in the middle of an entry',
        (place) => bitmapsExtension(1, 16, place),
        bitmapEntry({}),
        ['bitmap directory'],
      ],
      [
        'with fewer entries than there are bitmaps',
        (place) => bitmapsExtension(3, 32, place),
        bitmapEntry({}),
        ['bitmap directory'],
      ],
      [
        'with a name beyond its end',
        (place) => bitmapsExtension(1, 32, place),
        bitmapEntry({ nameLength: 1023 }),
        ['bitmap directory'],
      ],
      [
        'with 4 GiB of extra data',
        (place) => bitmapsExtension(1, 32, place),
        bitmapEntry({ extraLength: 0xffffffff }),
        ['bitmap directory'],
      ],
      [
        'with a granularity of 256 bytes',
        (place) => bitmapsExtension(1, 32, place),
        bitmapEntry({ granularityBits: 8 }),
        ['granularity'],
      ],
      [
        'with a granularity of 2^200 bytes',
        (place) => bitmapsExtension(1, 32, place),
        bitmapEntry({ granularityBits: 200 }),
        ['granularity'],
      ],
    ];

  it.each(directories)('%s', (_, extension, table, words) => {
    const image = plain.copy();
    const place = image.append(table);
    image
      .setHead([[EXTENSION.bitmaps, extension(place)]])
      .put64(HEADER.autoclearFeatures, 1)
      .save(bad);
    const thrown = errorOf(() => use(true, (open) => void imageInfo(bench.runtime, open.descriptor, bad)));
    expect(thrown).toEqual(refusal(CORRUPT, `'${bad}'`, 'offset', ...words));
  });
});

describe('hostile tables', () => {
  const content = new Random(8).noise(2 << 20);
  const cluster = 4096;

  function filled(options: { version?: 2 | 3; length?: number } = {}): Qcow2Bytes {
    bench.create(bad, { length: 2 << 20, clusterBits: 12, ...options });
    const open = bench.open(bad, false);
    for (let offset = 0; offset < open.node.length; offset += content.length) {
      bench.write(open.node, offset, content);
    }
    open.close();
    return Qcow2Bytes.read(bad);
  }
  const plain = filled();
  const version2 = filled({ version: 2 });
  const twoTables = filled({ length: 4 << 20 });

  function expectRestReadable(): void {
    const open = bench.open(bad, true);
    const rest = bench.read(open.node, cluster, (2 << 20) - cluster);
    expect(firstDifference(rest, content.subarray(cluster))).toBe(-1);
    open.close();
  }

  /** What reading the first cluster throws. */
  function readError(): unknown {
    return errorOf(() => use(true, (open) => void bench.read(open.node, 0, 512)));
  }

  it.each<[string, (image: Qcow2Bytes) => bigint, RegExp]>([
    ['with reserved bits', (image) => BigInt(image.l2()) | (1n << 56n), /reserved bits/],
    ['with all bits', () => 2n ** 64n - 1n, /reserved bits/],
    [
      'in the middle of a cluster',
      (image) => COPIED | BigInt(image.l2() + 512),
      /not the start of a cluster/,
    ],
    ['beyond the end of the file', () => COPIED | (2n ** 40n), /beyond the end of the file/],
    ['at the last place there is', () => COPIED | 0x00fffffffffff000n, /beyond the end of the file/],
    ['in the L1 table itself', (image) => COPIED | BigInt(image.l1), /L1 table/],
    ['in the refcount table', (image) => COPIED | BigInt(image.refcountTable), /refcount table/],
  ])('an L1 entry %s', (_, entry, words) => {
    const image = plain.copy();
    image.put64(image.l1, entry(image)).save(bad);
    expect(readError()).toEqual(refusal(CORRUPT, `'${bad}'`, /L1 entry 0\b/, words));
  });

  it('an L1 entry that says the header is no table: it is unallocated', () => {
    // Offset 0 with COPIED is what QEMU reads as no table at all.
    const image = plain.copy();
    image.put64(image.l1, COPIED).save(bad);
    const open = bench.open(bad, true);
    expect(bench.read(open.node, 0, cluster).every((byte) => byte === 0)).toBe(true);
    open.close();
  });

  it.each<[string, (image: Qcow2Bytes) => bigint]>([
    ['with reserved bits', (image) => image.u64(image.l2()) | (1n << 56n)],
    ['with reserved low bits', (image) => image.u64(image.l2()) | (1n << 8n)],
    ['with all bits', () => 2n ** 64n - 1n],
    ['in the middle of a cluster', (image) => image.u64(image.l2()) + 512n],
    ['at the header', () => COPIED],
    ['compressed and COPIED', (image) => image.u64(image.l2()) | COMPRESSED],
    ['compressed, beyond the end', () => COMPRESSED | (2n ** 40n)],
    ['beyond 2^53', () => COPIED | 0x00fffffffffff000n],
  ])('an L2 entry %s is an error where it is read, and only there', (_, entry) => {
    const image = plain.copy();
    const value = entry(image);
    image.put64(image.l2(), value).save(bad);
    const place = `entry 0 of the L2 table at offset ${image.l2()} (guest offset 0)`;
    expect(readError()).toEqual(refusal(CORRUPT, `'${bad}'`, place, `0x${value.toString(16)}`));
    expectRestReadable();
  });

  it('the zero flag in version 2', () => {
    const image = version2.copy();
    image.put64(image.l2(), image.u64(image.l2()) | 1n).save(bad);
    expect(readError()).toEqual(refusal(CORRUPT, `'${bad}'`, 'entry 0 of the L2 table'));
    expectRestReadable();
  });

  it('a subcluster that is both data and zeroes', () => {
    bench.create(bad, { length: 2 << 20, clusterBits: 16, extendedL2: true });
    const open = bench.open(bad, false);
    bench.write(open.node, 0, content.subarray(0, 131072));
    open.close();
    const image = Qcow2Bytes.read(bad);
    image.put64(image.l2() + 8, (1n << 32n) | 1n).save(bad);
    expect(readError()).toEqual(
      refusal(CORRUPT, `'${bad}'`, `entry 0 of the L2 table at offset ${image.l2()}`),
    );
    use(true, ({ node }) => {
      expect(bench.read(node, 65536, 65536).equals(Buffer.from(content.subarray(65536, 131072)))).toBe(true);
    });
  });

  it('compressed data in an image whose data is in another file', () => {
    const data = at('data.raw');
    writeFileSync(data, content);
    bench.create(bad, { length: 2 << 20, clusterBits: 12, dataFile: 'data.raw' });
    const image = Qcow2Bytes.read(bad);
    const table = Buffer.alloc(cluster);
    table.writeBigUInt64BE(COMPRESSED | 4096n);
    const place = image.append(table);
    image.put64(image.l1, COPIED | BigInt(place)).save(bad);
    const thrown = errorOf(() => {
      const descriptor = openImage(bench.runtime, bad, { readOnly: true, format: 'qcow2' });
      try {
        bench.read(attachNode(bench.runtime, descriptor), 0, 512);
      } finally {
        closeNode(bench.runtime, descriptor);
      }
    });
    expect(thrown).toEqual(refusal(CORRUPT, `'${bad}'`, `entry 0 of the L2 table at offset ${place}`));
  });

  it('data that lies on the bitmap directory is never written', () => {
    const image = plain.copy();
    const bitmapTable = image.append(Buffer.alloc(8));
    const directory = image.append(bitmapEntry({ tableOffset: bitmapTable, tableSize: 1 }));
    image
      .setHead([[EXTENSION.bitmaps, bitmapsExtension(1, 32, directory)]])
      .put64(HEADER.autoclearFeatures, 1)
      .put64(image.l2(), COPIED | BigInt(directory))
      .save(bad);
    expect(errorOf(() => use(false, ({ node }) => bench.write(node, 0, Buffer.alloc(512, 1))))).toEqual(
      refusal(CORRUPT, `'${bad}'`, `offset ${directory} is in the bitmap directory`),
    );
  });

  it('data beyond the end of the file reads as zeroes', () => {
    const image = plain.copy();
    image.put64(image.l2(), COPIED | BigInt(2 ** 30)).save(bad);
    const open = bench.open(bad, true);
    expect(bench.read(open.node, 0, cluster).every((byte) => byte === 0)).toBe(true);
    open.close();
    expectRestReadable();
  });

  it.each<[string, (image: Qcow2Bytes) => void, RegExp]>([
    [
      'two L1 entries',
      (image) => image.put64(image.l1 + 8, image.u64(image.l1)),
      /L1 entry 0 \(at offset \d+\) and L1 entry 1 \(at offset \d+\) both refer to the cluster at offset \d+/,
    ],
    [
      'an L1 entry and a refcount table entry',
      (image) => image.put64(image.l1 + 8, COPIED | BigInt(image.refcountBlock())),
      /L1 entry 1 .* and refcount table entry 0 .* both refer to the cluster/,
    ],
    [
      'two refcount table entries',
      (image) => image.put64(image.refcountTable + 8, image.u64(image.refcountTable)),
      /refcount table entry 0 .* and refcount table entry 1 .* both refer to the cluster/,
    ],
    [
      'an L1 entry and the L1 table',
      (image) => image.put64(image.l1 + 8, COPIED | BigInt(image.l1)),
      /L1 entry 1 \(at offset \d+\) refers to the cluster at offset \d+, which is in the L1 table/,
    ],
    [
      'a refcount table entry and the L1 table',
      (image) => image.put64(image.refcountTable + 8, BigInt(image.l1)),
      /refcount table entry 1 \(at offset \d+\) refers to .*, which is in the L1 table/,
    ],
  ])('%s for one cluster: it is not opened for writing', (_, change, words) => {
    const image = twoTables.copy();
    change(image);
    image.save(bad);
    expect(errorOf(() => use(false, () => undefined))).toEqual(refusal(CORRUPT, `'${bad}'`, words));
    bench.open(bad, true).close();
  });

  it.each<[string, (image: Qcow2Bytes) => number]>([
    ['L1 table', (image) => image.l1],
    ['refcount table', (image) => image.refcountTable],
  ])('the %s in a table of a snapshot: it is not opened for writing', (what, placeOf) => {
    const image = plain.copy();
    const place = placeOf(image);
    const table = image.append(snapshotEntry({ l1Offset: place, l1Size: 1 }));
    image.put32(HEADER.snapshotCount, 1).put64(HEADER.snapshotsOffset, table).save(bad);
    expect(errorOf(() => use(false, () => undefined))).toEqual(
      refusal(CORRUPT, `'${bad}'`, `its ${what} at offset ${place} is in a table of the snapshots`),
    );
    bench.open(bad, true).close();
  });

  it('data that lies on tables of snapshots is neither written nor given up', () => {
    const image = plain.copy();
    const l1 = image.append(Buffer.alloc(cluster));
    const entry = snapshotEntry({ l1Offset: l1, l1Size: 2 });
    const table = image.append(entry);
    image.put32(HEADER.snapshotCount, 1).put64(HEADER.snapshotsOffset, table);
    for (const place of [l1, table]) {
      const damaged = image.copy();
      damaged.put64(image.l2(), COPIED | BigInt(place));
      const before = damaged.bytes.subarray(place, place + cluster);
      for (const change of [
        (open: OpenImage) => bench.write(open.node, 0, content.subarray(0, 512)),
        (open: OpenImage) => {
          open.node.discard(0, cluster);
          open.node.flush();
          open.node.flush();
        },
      ]) {
        damaged.save(bad);
        expect(errorOf(() => use(false, change))).toEqual(
          refusal(CORRUPT, `offset ${place} is in a table of the snapshots`),
        );
        expect(
          Qcow2Bytes.read(bad)
            .bytes.subarray(place, place + cluster)
            .equals(before),
        ).toBe(true);
      }
    }
  });

  it('data that lies on metadata is never written', () => {
    const places: [string, (image: Qcow2Bytes) => number, RegExp][] = [
      ['L1 table', (image) => image.l1, /L1 table/],
      ['L2 table', (image) => image.l2(), /L2 table of L1 entry 0/],
      ['refcount table', (image) => image.refcountTable, /refcount table/],
      ['refcount block', (image) => image.refcountBlock(), /refcount block 0/],
    ];
    for (const [, of, words] of places) {
      const image = plain.copy();
      const place = of(image);
      image.put64(image.l2() + 8, COPIED | BigInt(place)).save(bad);
      const open = bench.open(bad, false);
      expect(() => bench.write(open.node, cluster, Buffer.alloc(cluster, 1))).toThrow(
        expect.objectContaining({ code: CORRUPT, message: expect.stringMatching(words) }),
      );
      open.close();
      const after = Qcow2Bytes.read(bad).bytes;
      expect(
        after.subarray(place, place + cluster).equals(image.bytes.subarray(place, place + cluster)),
      ).toBe(true);
    }
  });

  it('two guest clusters that share a host cluster: what is written to one is in the other', () => {
    const image = plain.copy();
    image.put64(image.l2() + 8, image.u64(image.l2())).save(bad);
    const open = bench.open(bad, false);
    bench.write(open.node, 100, Buffer.alloc(50, 7));
    const expected = Buffer.from(content.subarray(0, cluster)).fill(7, 100, 150);
    expect(bench.read(open.node, cluster, cluster).equals(expected)).toBe(true);
    open.close();
  });

  /** What the first write of a new cluster throws. */
  function allocationError(): unknown {
    return errorOf(() =>
      use(false, ({ node }) => {
        node.writeZeroes(0, cluster, true);
        bench.write(node, 0, Buffer.alloc(cluster, 1));
      }),
    );
  }

  it.each<[string, (image: Qcow2Bytes) => bigint, RegExp]>([
    ['with reserved bits', (image) => image.u64(image.refcountTable) | 1n, /reserved bits/],
    ['with all bits', () => 2n ** 64n - 1n, /reserved bits/],
    [
      'in the middle of a cluster',
      (image) => image.u64(image.refcountTable) + 512n,
      /not the start of a cluster/,
    ],
    ['beyond the end of the file', () => 2n ** 40n, /beyond the end of the file/],
    ['in the refcount table itself', (image) => BigInt(image.refcountTable), /refcount table/],
    ['in the L1 table', (image) => BigInt(image.l1), /L1 table/],
  ])('a refcount table entry %s stops what allocates', (_, entry, words) => {
    const image = plain.copy();
    image.put64(image.refcountTable, entry(image)).save(bad);
    expect(allocationError()).toEqual(refusal(CORRUPT, `'${bad}'`, /refcount table entry 0\b/, words));
    expectRestReadable();
  });

  it('no refcount block for what is in use', () => {
    const image = plain.copy();
    image.put64(image.refcountTable, 0).save(bad);
    expect(allocationError()).toEqual(refusal(CORRUPT, `'${bad}'`, /offset 0 is the place of the header/));
    expectRestReadable();
  });

  it.each([1, 2, 4, 8, 16, 32, 64])(
    'refcounts of %i bits, all of them 0 or all of them as large as can be',
    (refcountBits) => {
      bench.create(bad, { length: 2 << 20, clusterBits: 12, refcountBits });
      const open = bench.open(bad, false);
      bench.write(open.node, 0, content.subarray(0, 16 * cluster));
      open.close();
      const image = Qcow2Bytes.read(bad);
      for (const byte of [0, 0xff]) {
        const copy = image.copy();
        copy.bytes.fill(byte, copy.refcountBlock(), copy.refcountBlock() + cluster);
        copy.save(bad);
        const thrown = errorOf(() =>
          use(false, ({ node }) => {
            for (let round = 0; round < 3; round++) {
              node.writeZeroes(0, 8 * cluster, true);
              node.flush();
              bench.write(node, 0, content.subarray(0, 8 * cluster));
              node.flush();
            }
          }),
        );
        if (byte === 0) expect(thrown).toEqual(refusal(CORRUPT, `'${bad}'`, /at offset \d+/));
        else expect(thrown).toBe(undefined);
        expect(Qcow2Bytes.read(bad).bytes.subarray(0, 64).equals(image.bytes.subarray(0, 64))).toBe(true);
      }
    },
  );

  it('an allocation never takes what metadata is in, whatever the refcounts say', () => {
    const image = plain.copy();
    image.bytes.fill(0, image.refcountBlock(), image.refcountBlock() + 64);
    image.save(bad);
    expect(allocationError()).toEqual(refusal(CORRUPT, `'${bad}'`, /an allocation .* at offset \d+/));
    expect(Qcow2Bytes.read(bad).bytes.subarray(0, 64).equals(image.bytes.subarray(0, 64))).toBe(true);
  });
});
