/** Damaged and hostile VMDK, VHDX, VPC and VDI images: refused in one line, or read; never more. */
import { readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { FOREIGN_NAMES } from '#src/block/foreign/index.js';
import { openImage } from '#src/block/graph.js';
import type { ForeignName } from '#src/block/node.js';
import { StillframeError } from '#src/errors.js';
import { Random } from '../support/data.js';
import { cowd, seal, sealVhd, streamOptimized, vhdxHeader } from './foreign-images.js';
import { at, io, peers, qemuImg, read, runtime, sample, withImage } from './foreign-support.js';

type Change = (image: Buffer) => void;
/** What is changed, which code refuses it, with which words, and how. */
type Case = readonly [what: string, code: string, words: RegExp, change: Change];

const CORRUPT = 'ERR_STILLFRAME_CORRUPT_IMAGE';
const UNSUPPORTED = 'ERR_STILLFRAME_UNSUPPORTED_FEATURE';
const FORMAT = 'ERR_STILLFRAME_FORMAT';
const u16 =
  (offset: number, value: number): Change =>
  (image) =>
    image.writeUInt16LE(value, offset);
const u32 =
  (offset: number, value: number): Change =>
  (image) =>
    image.writeUInt32LE(value, offset);
const u64 =
  (offset: number, value: bigint): Change =>
  (image) =>
    image.writeBigUInt64LE(value, offset);

function refused(code: string, words: RegExp): unknown {
  return expect.objectContaining({ code, message: expect.stringMatching(words) });
}

/** Opens it and reads all of it. */
function readAll(name: string, format: ForeignName): void {
  withImage(name, (node) => read(node, 0, Math.min(node.length, 32 << 20)), { format });
}

function expectRefused(name: string, format: ForeignName, code: string, words: RegExp): void {
  expect(() => readAll(name, format)).toThrow(refused(code, words));
  expect(() => readAll(name, format)).toThrow(/^'[^\n]+; [^\n]+$/);
}

describe.skipIf(!peers)('headers and tables', () => {
  let images: Record<ForeignName | 'fixed' | 'flat', Buffer>;

  beforeAll(() => {
    const make = (name: string, format: string, options: string): Buffer => {
      qemuImg('create', '-q', '-f', format, '-o', options, name, '4M');
      io(name, format, 'write -P 1 0 4M');
      return readFileSync(at(name));
    };
    images = {
      vmdk: make('base.vmdk', 'vmdk', 'subformat=monolithicSparse'),
      vhdx: make('base.vhdx', 'vhdx', 'block_size=1M'),
      vpc: make('base.vpc', 'vpc', 'force_size=on'),
      vdi: make('base.vdi', 'vdi', 'static=off'),
      fixed: make('fixed.vpc', 'vpc', 'subformat=fixed,force_size=on'),
      flat: make('flat.vmdk', 'vmdk', 'subformat=monolithicFlat'),
    };
  });

  const check =
    (name: string, format: ForeignName, base: keyof typeof images, finish: Change = () => undefined) =>
    (_: string, code: string, words: RegExp, change: Change): void => {
      const image = Buffer.from(images[base]);
      change(image);
      finish(image);
      writeFileSync(at(name), image);
      expectRefused(name, format, code, words);
    };

  it.each<Case>([
    ['the magic', FORMAT, /neither a sparse extent nor a descriptor/, u32(0, 0)],
    ['the version', UNSUPPORTED, /VMDK version 4 not supported/, u32(4, 4)],
    ['capacity: all there is', CORRUPT, /L1 size too big/, u64(12, 2n ** 64n - 1n)],
    ['capacity: beyond the directory', CORRUPT, /grain directory of 2097152 entries/, u64(12, 2n ** 37n)],
    ['capacity: too large a directory', CORRUPT, /L1 size too big/, u64(12, 2n ** 43n)],
    ['grains of nothing', CORRUPT, /Invalid granularity/, u64(20, 0n)],
    ['grains of more than 1 GiB', CORRUPT, /Invalid granularity/, u64(20, 0x200001n)],
    ['grains of all there is', CORRUPT, /Invalid granularity/, u64(20, 2n ** 64n - 1n)],
    ['grain tables of nothing', CORRUPT, /L2 table size too big, or zero/, u32(44, 0)],
    ['large grain tables', CORRUPT, /L2 table size too big/, u32(44, 513)],
    ['no descriptor', UNSUPPORTED, /one extent of a drive/, u64(28, 0n)],
    ['no grain directory', CORRUPT, /names no grain directory/, u64(56, 0n)],
    ['the grain directory beyond the end', CORRUPT, /ends beyond the end/, u64(56, 2n ** 40n)],
    ['the grain directory at the very end', CORRUPT, /ends beyond the end/, u64(56, 2n ** 64n - 2n)],
    ['a footer that is not there', CORRUPT, /footer/, u64(56, 2n ** 64n - 1n)],
    ['data beyond the end', CORRUPT, /File truncated, expecting at least/, u64(64, 2n ** 30n)],
    ['an unknown compression', UNSUPPORTED, /method 2/, u16(77, 2)],
    ['compression of data that is not', CORRUPT, /does not decompress/, u16(77, 1)],
    [
      'large compressed grains',
      UNSUPPORTED,
      /compressed grains have/,
      (image) => {
        u16(77, 1)(image);
        u64(20, 0x10000n)(image);
      },
    ],
    [
      'a grain table beyond the end',
      CORRUPT,
      /leads to a grain table/,
      (image) => u32(Number(image.readBigUInt64LE(56)) * 512, 0xffffffff)(image),
    ],
    [
      'a grain beyond the end',
      CORRUPT,
      /the grains from offset 65536 of the drive/,
      (image) => {
        const table = image.readUInt32LE(Number(image.readBigUInt64LE(56)) * 512) * 512;
        u32(table + 4, 0xffffffff)(image);
      },
    ],
  ])('of VMDK, %s', check('bad.vmdk', 'vmdk', 'vmdk'));

  it.each<[string, string, RegExp, string]>([
    ['a type nobody lists', UNSUPPORTED, /Unsupported image type 'custom'/, 'createType="custom"'],
    ['no type', FORMAT, /nor a descriptor/, ''],
    [
      'an offset of VMFS',
      CORRUPT,
      /Invalid extent line: RW 8 VMFS/,
      'createType="vmfs"\nRW 8 VMFS "flat-flat.vmdk" 1',
    ],
    ['no offset of FLAT', CORRUPT, /Invalid extent line/, 'createType="vmfs"\nRW 8 FLAT "flat-flat.vmdk"'],
    [
      'an offset of SPARSE',
      CORRUPT,
      /Invalid extent line/,
      'createType="vmfs"\nRW 8 SPARSE "flat-flat.vmdk" 0',
    ],
    ['a negative offset', CORRUPT, /Invalid extent line/, 'createType="vmfs"\nRW 8 FLAT "flat-flat.vmdk" -1'],
    ['no sectors', CORRUPT, /Invalid extent line/, 'createType="vmfs"\nRW 0 FLAT "flat-flat.vmdk" 0'],
    [
      'fewer than no sectors',
      CORRUPT,
      /Invalid extent line/,
      'createType="vmfs"\nRW -8 FLAT "flat-flat.vmdk" 0',
    ],
    ['no name', CORRUPT, /Invalid extent line/, 'createType="vmfs"\nRW 8 FLAT "" 0'],
    ['more than the file', CORRUPT, /is cut off/, 'createType="vmfs"\nRW 8193 FLAT "flat-flat.vmdk" 0'],
    ['behind the file', CORRUPT, /is cut off/, 'createType="vmfs"\nRW 8 FLAT "flat-flat.vmdk" 8185'],
    [
      'a place that no number has',
      CORRUPT,
      /is cut off/,
      `createType="vmfs"\nRW 8 FLAT "flat-flat.vmdk" ${'9'.repeat(40)}`,
    ],
    [
      'a size that no number has',
      CORRUPT,
      /is cut off/,
      `createType="vmfs"\nRW ${'9'.repeat(400)} FLAT "flat-flat.vmdk" 0`,
    ],
    [
      'a sparse extent that is none',
      CORRUPT,
      /does not start with 'KDMV'/,
      'createType="vmfsSparse"\nRW 8 SPARSE "flat-flat.vmdk"',
    ],
    [
      'a type of extents that is unknown',
      UNSUPPORTED,
      /of the type 'SESPARSE'/,
      'createType="vmfs"\nRW 8 SESPARSE "flat-flat.vmdk"',
    ],
    ['an extent without a file', UNSUPPORTED, /of the type 'ZERO'/, 'createType="vmfs"\nRW 8 ZERO'],
    [
      'an extent that is not written',
      UNSUPPORTED,
      /not 'RW'/,
      'createType="vmfs"\nRDONLY 8 FLAT "flat-flat.vmdk" 0',
    ],
  ])('of a VMDK descriptor, %s', (_, code, words, lines) => {
    writeFileSync(at('bad-text.vmdk'), `# Disk DescriptorFile\nversion=1\n${lines}\n`);
    expectRefused('bad-text.vmdk', 'vmdk', code, words);
  });

  it('of a COWD extent', () => {
    const text =
      '# Disk DescriptorFile\nversion=1\ncreateType="vmfsSparse"\nRW 8 VMFSSPARSE "bad-delta.vmdk"\n';
    writeFileSync(at('bad-cowd.vmdk'), text);
    const cases: readonly Case[] = [
      ['grains of nothing', CORRUPT, /Invalid granularity/, u32(16, 0)],
      ['a short grain directory', CORRUPT, /are needed for/, u32(24, 0)],
      ['a directory beyond the end', CORRUPT, /ends beyond the end/, u32(20, 0xffffffff)],
      ['a large drive', CORRUPT, /beyond the end|are needed/, u32(12, 0xffffffff)],
    ];
    for (const [, code, words, change] of cases) {
      const image = cowd(sample(1));
      change(image);
      writeFileSync(at('bad-delta.vmdk'), image);
      expectRefused('bad-cowd.vmdk', 'vmdk', code, words);
    }
  });

  const footer = (image: Buffer): Buffer => image.subarray(0, 512);
  const dynamic = (image: Buffer): Buffer => image.subarray(512, 1536);
  const sealAll: Change = (image) => {
    sealVhd(footer(image), 64);
    sealVhd(dynamic(image), 36);
  };
  it.each<Case>([
    ['the cookie', FORMAT, /no footer of a fixed image/, (image) => image.write('connectx')],
    ['the version', UNSUPPORTED, /VHD of version 2.0/, (image) => image.writeUInt32BE(0x20000, 12)],
    ['the type', UNSUPPORTED, /VHD of type 7/, (image) => image.writeUInt32BE(7, 60)],
    ['a parent', UNSUPPORTED, /differencing VHD/, (image) => image.writeUInt32BE(4, 60)],
    [
      'a size of all there is',
      CORRUPT,
      /sectors; a VHD has/,
      (image) => image.writeBigUInt64BE(2n ** 64n - 1n, 48),
    ],
    [
      'a size above 2040 GiB',
      CORRUPT,
      /4278190081 sectors/,
      (image) => image.writeBigUInt64BE(0xff000001n * 512n, 48),
    ],
    ['a size beyond the table', CORRUPT, /are needed/, (image) => image.writeBigUInt64BE(2n ** 33n, 48)],
    [
      'the dynamic header beyond the end',
      CORRUPT,
      /dynamic disk header, at offset/,
      (image) => image.writeBigUInt64BE(2n ** 63n, 16),
    ],
    ['the dynamic header elsewhere', CORRUPT, /no 'cxsparse'/, (image) => image.writeBigUInt64BE(0n, 16)],
    ['blocks of nothing', CORRUPT, /block size is 0/, (image) => image.writeUInt32BE(0, 512 + 32)],
    [
      'blocks of an odd size',
      CORRUPT,
      /block size is 2097153/,
      (image) => image.writeUInt32BE(2097153, 512 + 32),
    ],
    [
      'blocks of less than a sector',
      CORRUPT,
      /block size is 256/,
      (image) => image.writeUInt32BE(256, 512 + 32),
    ],
    [
      'a table beyond the end',
      CORRUPT,
      /block table of/,
      (image) => image.writeBigUInt64BE(2n ** 62n, 512 + 16),
    ],
    [
      'a table between sectors',
      CORRUPT,
      /block table of/,
      (image) => image.writeBigUInt64BE(1537n, 512 + 16),
    ],
    [
      'a table of all there is',
      CORRUPT,
      /block table of 4294967295/,
      (image) => image.writeUInt32BE(0xffffffff, 512 + 28),
    ],
    [
      'a block beyond the end',
      CORRUPT,
      /entry 1 of its block table/,
      (image) => image.writeUInt32BE(0xfffffffe, Number(image.readBigUInt64BE(512 + 16)) + 4),
    ],
  ])('of VPC, %s', check('bad.vpc', 'vpc', 'vpc', sealAll));

  it.each<Case>([
    ['footer', CORRUPT, /the checksum of its footer/, (image) => image.writeUInt32BE(1, 24)],
    [
      'header',
      CORRUPT,
      /the checksum of its dynamic disk header/,
      (image) => image.writeUInt32BE(1, 512 + 40),
    ],
  ])('of VPC, the checksum of the %s', check('bad.vpc', 'vpc', 'vpc'));

  it('of a fixed VPC that is cut off, or of which the end alone is left', () => {
    const { fixed } = images;
    writeFileSync(at('bad.vpc'), fixed.subarray(512));
    expectRefused('bad.vpc', 'vpc', CORRUPT, /is cut off/);
    writeFileSync(at('bad.vpc'), fixed.subarray(0, fixed.length - 512));
    expectRefused('bad.vpc', 'vpc', FORMAT, /no footer of a fixed image/);
    writeFileSync(at('bad.vpc'), 'conectix');
    expectRefused('bad.vpc', 'vpc', CORRUPT, /checksum/);
    writeFileSync(at('bad.vpc'), '');
    expectRefused('bad.vpc', 'vpc', FORMAT, /too short/);
  });

  it.each([
    ['vpc ', 10, 17, 17, 10 * 17 * 17 * 512],
    ['qemu', 10, 17, 17, 10 * 17 * 17 * 512],
    ['vbox', 10, 17, 17, 10 * 17 * 17 * 512],
    ['qem2', 10, 17, 17, 4 << 20],
    ['win ', 10, 17, 17, 4 << 20],
    ['d2v ', 10, 17, 17, 4 << 20],
    ['CTXS', 10, 17, 17, 4 << 20],
    ['tap\0', 10, 17, 17, 4 << 20],
    ['qemu', 65535, 16, 255, 4 << 20],
  ])(
    'of a VPC by %j, %d/%d/%d: the size is the geometry, or not',
    (creator, cylinders, heads, sectors, length) => {
      const image = Buffer.from(images.fixed);
      const end = image.subarray(image.length - 512);
      end.write(creator, 28, 'latin1');
      end.writeUInt16BE(cylinders, 56);
      end.writeUInt8(heads, 58);
      end.writeUInt8(sectors, 59);
      sealVhd(end, 64);
      writeFileSync(at('by.vpc'), image);
      withImage('by.vpc', (node) => expect(node.length).toBe(length), { format: 'vpc' });
      const described: { 'virtual-size': number } = JSON.parse(
        qemuImg('info', '-f', 'vpc', '--output=json', 'by.vpc'),
      );
      expect(described['virtual-size']).toBe(length);
    },
  );

  it.each<Case>([
    ['the signature', FORMAT, /no signature/, u32(0x40, 0)],
    ['the version', UNSUPPORTED, /VDI of version 0.1/, u32(0x44, 1)],
    ['the type', UNSUPPORTED, /VDI of type 4/, u32(0x4c, 4)],
    ['a parent', UNSUPPORTED, /differencing VDI/, u32(0x1b8 + 12, 1)],
    ['a link', UNSUPPORTED, /differencing VDI/, u32(0x1a8, 1)],
    ['the map between sectors', CORRUPT, /does not begin at a multiple/, u32(0x154, 513)],
    ['the data between sectors', CORRUPT, /does not begin at a multiple/, u32(0x158, 1025)],
    ['large sectors', UNSUPPORTED, /sectors have 4096 bytes/, u32(0x168, 4096)],
    ['blocks of nothing', CORRUPT, /block size is 0/, u32(0x178, 0)],
    ['blocks of an odd size', CORRUPT, /block size is 1048577/, u32(0x178, 1048577)],
    ['blocks of 2 GiB', CORRUPT, /block size is 2147483648/, u32(0x178, 2 ** 31)],
    ['extra data', UNSUPPORTED, /extra data/, u32(0x17c, 512)],
    ['a size beyond the map', CORRUPT, /has room for/, u64(0x170, 2n ** 40n)],
    ['a size of all there is', CORRUPT, /has room for/, u64(0x170, 2n ** 64n - 1n)],
    ['a map of all there is', CORRUPT, /block map of 4294967295 entries/, u32(0x180, 0xffffffff)],
    ['a map beyond the end', CORRUPT, /block map of 4 entries/, u32(0x154, 0xfffffe00)],
    [
      'a block beyond the end',
      CORRUPT,
      /from number 2 on/,
      (image) => u32(image.readUInt32LE(0x154) + 8, 0xfffffffd)(image),
    ],
    ['data beyond the end', CORRUPT, /leads beyond the end/, u32(0x158, 0xfffffe00)],
  ])('of VDI, %s', check('bad.vdi', 'vdi', 'vdi'));

  const regions = (image: Buffer): Buffer => image.subarray(0x30000, 0x40000);
  const regionOf = (image: Buffer, guid: string): Buffer => {
    for (let at = 16; ; at += 32) {
      const entry = regions(image).subarray(at, at + 32);
      if (entry.toString('hex', 0, 16) === guid) return entry;
    }
  };
  const BAT = '6677c22d23f600429d64115e9bfd4a08';
  const METADATA = '06a27c8b90479a4bb8fe575f050f886e';
  const bat = (image: Buffer): number => Number(regionOf(image, BAT).readBigUInt64LE(16));
  const metadata = (image: Buffer): Buffer => {
    const start = Number(regionOf(image, METADATA).readBigUInt64LE(16));
    return image.subarray(start, start + 0x100000);
  };
  const itemOf = (image: Buffer, guid: string): { readonly entry: Buffer; readonly value: Buffer } => {
    const table = metadata(image);
    for (let at = 32; ; at += 32) {
      const entry = table.subarray(at, at + 32);
      if (entry.toString('hex', 0, 16) === guid)
        return { entry, value: table.subarray(entry.readUInt32LE(16)) };
    }
  };
  const PARAMETERS = '3767a1ca36fa434db3b633f0aa44e76b';
  const SIZE = '2442a52f1bcd7648b2115dbed83bf4b8';
  const SECTORS = '1dbf41816fa90947ba47f233a8faab5f';
  const resealVhdx: Change = (image) => {
    for (const [offset, length] of [
      [0x10000, 4096],
      [0x20000, 4096],
      [0x30000, 65536],
    ] as const) {
      const part = image.subarray(offset, offset + length);
      if (part.readUInt32LE(0) !== 0) seal(part);
    }
    // The first region table alone counts where it is whole.
    image.fill(0, 0x40000, 0x50000);
  };
  it.each<Case>([
    ['the identifier', FORMAT, /does not start with 'vhdxfile'/, (image) => image.write('vhdxfilf')],
    ['no header', CORRUPT, /neither of its headers/, (image) => image.fill(0, 0x10000, 0x30000)],
    [
      'headers that differ',
      CORRUPT,
      /same sequence number/,
      (image) => {
        image.copy(image, 0x20000, 0x10000, 0x11000);
        image.writeUInt8(image.readUInt8(0x20000 + 20) ^ 1, 0x20000 + 20);
      },
    ],
    ['the version', UNSUPPORTED, /VHDX of version 2/, (image) => vhdxHeader(image).writeUInt16LE(2, 66)],
    ['too many regions', CORRUPT, /names 2048 regions/, (image) => regions(image).writeUInt32LE(2048, 8)],
    [
      'an unknown region',
      UNSUPPORTED,
      /needs the region/,
      (image) => {
        regions(image).writeUInt32LE(3, 8);
        regions(image).writeUInt32LE(1, 16 + 64 + 28);
      },
    ],
    [
      'a region twice',
      CORRUPT,
      /twice/,
      (image) => {
        regionOf(image, BAT).copy(regionOf(image, METADATA));
      },
    ],
    [
      'no metadata',
      CORRUPT,
      /names no block allocation table, or no metadata/,
      (image) => regions(image).writeUInt32LE(0, 8),
    ],
    [
      'a table beyond the end',
      CORRUPT,
      /does not lie in the file/,
      (image) => regionOf(image, BAT).writeBigUInt64LE(2n ** 63n, 16),
    ],
    [
      'a table over the headers',
      CORRUPT,
      /does not lie in the file/,
      (image) => regionOf(image, BAT).writeBigUInt64LE(0n, 16),
    ],
    [
      'a short table',
      CORRUPT,
      /block allocation table has 8 bytes/,
      (image) => regionOf(image, BAT).writeUInt32LE(8, 24),
    ],
    [
      'short metadata',
      CORRUPT,
      /metadata has only/,
      (image) => regionOf(image, METADATA).writeUInt32LE(4096, 24),
    ],
    ['metadata elsewhere', CORRUPT, /no 'metadata'/, (image) => metadata(image).write('metadatu')],
    ['too many items', CORRUPT, /names 2048 items/, (image) => metadata(image).writeUInt16LE(2048, 10)],
    [
      'an unknown item',
      UNSUPPORTED,
      /needs the metadata/,
      (image) => {
        const count = metadata(image).readUInt16LE(10);
        metadata(image).writeUInt16LE(count + 1, 10);
        metadata(image).writeUInt32LE(4, 32 + count * 32 + 24);
      },
    ],
    [
      'an item beyond the metadata',
      CORRUPT,
      /is not in the metadata/,
      (image) => itemOf(image, SIZE).entry.writeUInt32LE(0xffffffff, 16),
    ],
    [
      'a short item',
      CORRUPT,
      /is not in the metadata/,
      (image) => itemOf(image, SIZE).entry.writeUInt32LE(4, 20),
    ],
    ['no size', CORRUPT, /lack the block size/, (image) => metadata(image).writeUInt16LE(0, 10)],
    [
      'a parent',
      UNSUPPORTED,
      /differencing VHDX/,
      (image) => itemOf(image, PARAMETERS).value.writeUInt32LE(2, 4),
    ],
    [
      'blocks of nothing',
      CORRUPT,
      /block size is 0/,
      (image) => itemOf(image, PARAMETERS).value.writeUInt32LE(0),
    ],
    [
      'blocks of 512 MiB',
      CORRUPT,
      /block size is/,
      (image) => itemOf(image, PARAMETERS).value.writeUInt32LE(2 ** 29),
    ],
    [
      'odd sectors',
      CORRUPT,
      /sectors have 1024/,
      (image) => itemOf(image, SECTORS).value.writeUInt32LE(1024),
    ],
    [
      'a size of all there is',
      CORRUPT,
      /more than 4503599627370496/,
      (image) => itemOf(image, SIZE).value.writeBigUInt64LE(2n ** 64n - 512n),
    ],
    [
      'a size between sectors',
      CORRUPT,
      /not a multiple of its sectors/,
      (image) => itemOf(image, SIZE).value.writeBigUInt64LE(1000n),
    ],
    [
      'a size beyond the table',
      CORRUPT,
      /are needed for/,
      (image) => itemOf(image, SIZE).value.writeBigUInt64LE(2n ** 50n),
    ],
    [
      'a block beyond the end',
      CORRUPT,
      /entry 1 of its block allocation table leads to/,
      (image) => image.writeBigUInt64LE((2n ** 63n) | 6n, bat(image) + 8),
    ],
    [
      'a block over the headers',
      CORRUPT,
      /leads to offset 0/,
      (image) => image.writeBigUInt64LE(6n, bat(image) + 8),
    ],
    [
      'a block of a differencing image',
      CORRUPT,
      /has the state 7/,
      (image) => image.writeUInt8(7, bat(image) + 8),
    ],
  ])('of VHDX, %s', check('bad.vhdx', 'vhdx', 'vhdx', resealVhdx));

  it('of VHDX: whichever header and region table is whole is used', () => {
    for (const [first, second] of [
      [0x10000, 0x30000],
      [0x20000, 0x40000],
      [0x10000, 0x40000],
    ] as const) {
      const image = Buffer.from(images.vhdx);
      image.writeUInt8(image.readUInt8(first + 100) ^ 1, first + 100);
      image.writeUInt8(image.readUInt8(second + 100) ^ 1, second + 100);
      writeFileSync(at('half.vhdx'), image);
      withImage('half.vhdx', (node) => expect(read(node, 0, 4096).every((byte) => byte === 1)).toBe(true));
    }
  });

  it('an extent that is cut off meanwhile reads as far as it goes', () => {
    writeFileSync(at('short.vmdk'), images.flat);
    withImage('short.vmdk', (node) => {
      const flat = node.descriptor.driver === 'vmdk' ? node.descriptor.extents[0]?.path : undefined;
      truncateSync(flat ?? '', 4096);
      expect(read(node, 4096, 512).every((byte) => byte === 0)).toBe(true);
      truncateSync(flat ?? '', 4 << 20);
    });
  });

  describe('any change', () => {
    const INTERESTING = [0, 1, 2, 7, 0x7f, 0x80, 0xff, 0x200, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff];
    const sources: readonly (readonly [
      string,
      ForeignName,
      () => Buffer,
      readonly (readonly [number, number])[],
    ])[] = [
      [
        'vmdk',
        'vmdk',
        () => images.vmdk,
        [
          [0, 512],
          [512, 1024],
          [0x2600, 0x3600],
        ],
      ],
      [
        'stream',
        'vmdk',
        () => streamOptimized(sample(9, 1 << 20)),
        [
          [0, 512],
          [0x10000, 0x10100],
          [-4096, 0],
        ],
      ],
      ['descriptor', 'vmdk', () => images.flat, [[0, 400]]],
      [
        'vhdx',
        'vhdx',
        () => images.vhdx,
        [
          [0x10000, 0x10060],
          [0x20000, 0x20060],
          [0x30000, 0x30060],
          [-1, 0],
        ],
      ],
      [
        'vpc',
        'vpc',
        () => images.vpc,
        [
          [0, 512],
          [512, 1536],
          [1536, 1600],
        ],
      ],
      [
        'vdi',
        'vdi',
        () => images.vdi,
        [
          [0, 512],
          [512, 600],
        ],
      ],
    ];

    it.each(sources)('of %s is refused in one line, or the image is read', (name, format, source, places) => {
      const pristine = source();
      for (let seed = 1; seed <= 150; seed++) {
        const random = new Random(seed);
        const image = Buffer.from(pristine);
        for (let change = random.between(1, 4); change > 0; change--) {
          const [from, to] = random.pick([places[0] ?? [0, 1], ...places]);
          const offset = (from < 0 ? image.length : 0) + random.between(from, to - 1);
          const value = random.chance(0.5)
            ? (INTERESTING[random.between(0, INTERESTING.length - 1)] ?? 0)
            : random.between(0, 2 ** 32 - 1);
          const write = random.pick<(image: Buffer) => void>([
            (bytes) => bytes.writeUInt8(value & 255, Math.min(offset, bytes.length - 1)),
            (bytes) => bytes.writeUInt32LE(value, Math.min(offset, bytes.length - 4)),
            (bytes) => bytes.writeUInt32BE(value, Math.min(offset, bytes.length - 4)),
          ]);
          write(image);
        }
        // Sums that are right let the change through to the checks behind them.
        if (format === 'vpc' && random.chance(0.8)) sealAll(image);
        if (format === 'vhdx' && random.chance(0.8)) resealVhdx(image);
        const cut = random.chance(0.1) ? image.subarray(0, random.between(0, image.length)) : image;
        writeFileSync(at(`mutant.${name}`), cut);
        try {
          withImage(
            `mutant.${name}`,
            (node) => {
              for (let part = 0; part < 8 && node.length > 0; part++) {
                const offset = part === 0 ? 0 : Math.floor(random.next() * node.length);
                const length = Math.min(node.length - offset, 100_000);
                read(node, offset, length);
                expect(node.status(offset, length).length).toBeGreaterThan(0);
              }
            },
            { format },
          );
        } catch (error) {
          if (!(error instanceof StillframeError)) throw error;
          expect(error.code, `seed ${seed}`).toMatch(
            /CORRUPT_IMAGE|UNSUPPORTED_FEATURE|FORMAT|BACKING_|OUT_OF_RANGE/,
          );
          expect(error.message).not.toContain('\n');
        }
      }
    });
  });
});

describe('a file that is short', () => {
  it.each([...FOREIGN_NAMES])('is no %s image', (format) => {
    for (const length of [0, 1, 4, 511, 512, 2000]) {
      writeFileSync(at('short.img'), Buffer.alloc(length));
      expect(() => openImage(runtime, at('short.img'), { format, readOnly: true })).toThrow(
        expect.objectContaining({ code: FORMAT }),
      );
      withImage('short.img', (node) => expect(node.descriptor.driver).toBe('raw'));
    }
  });
});
