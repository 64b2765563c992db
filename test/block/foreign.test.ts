/**
 * VMDK, VHDX, VPC and VDI images beside QEMU's tools: content, block status and description.
 */
import { copyFileSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { deflateSync } from 'node:zlib';
import { beforeAll, describe, expect, it } from 'vitest';
import { COMPARE_BUFFER_BYTES, comparePart } from '#src/block/compare.js';
import { filesOf, isImage } from '#src/block/files.js';
import { type OpenImageOptions, openImage } from '#src/block/graph.js';
import { imageInfo } from '#src/block/info.js';
import { type BlockNode, type ImageDescriptor, STATUS_DATA, STATUS_ZERO } from '#src/block/node.js';
import { Team } from '#src/job/team.js';
import { firstDifference, Random } from '../support/data.js';
import { cowd, streamOptimized } from './foreign-images.js';
import {
  at,
  buffer,
  expectContent,
  folder,
  io,
  mapOf,
  peers,
  qemuImg,
  read,
  runtime,
  sample,
  shownMap,
  withImage,
} from './foreign-support.js';

function imageOf({ descriptor }: BlockNode): ImageDescriptor {
  if (!isImage(descriptor)) throw new Error('not an image');
  return descriptor;
}

/** What each file of qemu-img's making is, and which `-f` it needs where its first bytes do not tell. */
interface Made {
  readonly name: string;
  readonly format: 'vmdk' | 'vhdx' | 'vpc' | 'vdi';
  readonly options: string;
  readonly size: string;
  readonly commands: readonly string[];
  readonly explicit?: boolean;
}

/** Within 10 MiB: across blocks and grains, at both ends, zeroes. */
const SMALL = [
  'write -P 1 0 512',
  'write -P 2 1000k 100k',
  'write -P 3 3M 64k',
  'write -P 4 3264k 192k',
  'write -P 5 5000000 7000',
  'write -z 7M 256k',
  'write -P 6 10485248 512',
];
const TAIL = 'write -P 7 10486272 512';
/** Within 9 GiB: behind 4 GiB, and at the end. */
const LARGE = [
  'write -P 1 1M 70k',
  'write -P 2 2147418112 131072',
  'write -P 3 4294901760 131072',
  'write -P 4 4297064448 1M',
  'write -P 5 8592M 3M',
  'write -P 6 9663610880 64k',
];

const made: readonly Made[] = [
  ...['monolithicSparse', 'monolithicFlat', 'twoGbMaxExtentSparse', 'twoGbMaxExtentFlat'].flatMap(
    (subformat): Made[] => {
      const common = { format: 'vmdk', options: `subformat=${subformat}` } as const;
      return [
        { ...common, name: `${subformat}.vmdk`, size: '10M', commands: SMALL },
        { ...common, name: `${subformat}-odd.vmdk`, size: '10486784', commands: [...SMALL, TAIL] },
        { ...common, name: `${subformat}-large.vmdk`, size: '9G', commands: LARGE },
      ];
    },
  ),
  {
    name: 'zeroed-grains.vmdk',
    format: 'vmdk',
    options: 'zeroed_grain=on',
    size: '10M',
    commands: [...SMALL, 'write -z 1M 2M'],
  },
  { name: 'compat6.vmdk', format: 'vmdk', options: 'compat6=on', size: '10M', commands: SMALL },
  { name: 'unwritten.vmdk', format: 'vmdk', options: 'subformat=streamOptimized', size: '10M', commands: [] },
  { name: 'dynamic.vhdx', format: 'vhdx', options: 'subformat=dynamic', size: '10M', commands: SMALL },
  { name: 'fixed.vhdx', format: 'vhdx', options: 'subformat=fixed', size: '10M', commands: SMALL },
  {
    name: 'odd.vhdx',
    format: 'vhdx',
    options: 'block_size=1M',
    size: '10486784',
    commands: [...SMALL, TAIL],
  },
  { name: 'chunks.vhdx', format: 'vhdx', options: 'block_size=1M', size: '9G', commands: LARGE },
  { name: 'large-blocks.vhdx', format: 'vhdx', options: 'block_size=16M', size: '9G', commands: LARGE },
  {
    name: 'not-present.vhdx',
    format: 'vhdx',
    options: 'block_state_zero=off',
    size: '100M',
    commands: SMALL,
  },
  { name: 'empty.vhdx', format: 'vhdx', options: 'subformat=dynamic', size: '0', commands: [] },
  { name: 'dynamic.vpc', format: 'vpc', options: 'subformat=dynamic', size: '10M', commands: SMALL },
  {
    name: 'forced.vpc',
    format: 'vpc',
    options: 'force_size=on',
    size: '10486784',
    commands: [...SMALL, TAIL],
  },
  { name: 'large.vpc', format: 'vpc', options: 'subformat=dynamic', size: '9G', commands: LARGE },
  { name: 'beyond-geometry.vpc', format: 'vpc', options: 'subformat=dynamic', size: '200G', commands: LARGE },
  {
    name: 'fixed.vpc',
    format: 'vpc',
    options: 'subformat=fixed',
    size: '10M',
    commands: SMALL,
    explicit: true,
  },
  {
    name: 'fixed-forced.vpc',
    format: 'vpc',
    options: 'subformat=fixed,force_size=on',
    size: '10486784',
    commands: [...SMALL, TAIL],
    explicit: true,
  },
  { name: 'empty.vpc', format: 'vpc', options: 'subformat=dynamic', size: '0', commands: [] },
  { name: 'dynamic.vdi', format: 'vdi', options: 'static=off', size: '10M', commands: SMALL },
  { name: 'static.vdi', format: 'vdi', options: 'static=on', size: '10M', commands: SMALL },
  { name: 'odd.vdi', format: 'vdi', options: 'static=off', size: '10486784', commands: [...SMALL, TAIL] },
  {
    name: 'static-odd.vdi',
    format: 'vdi',
    options: 'static=on',
    size: '10486784',
    commands: [...SMALL, TAIL],
  },
  { name: 'large.vdi', format: 'vdi', options: 'static=off', size: '9G', commands: LARGE },
  { name: 'empty.vdi', format: 'vdi', options: 'static=off', size: '0', commands: [] },
];

describe.skipIf(!peers)('images of qemu-img', () => {
  describe.each(made)('$name', ({ name, format, options, size, commands, explicit }) => {
    const how = explicit === true ? { format } : {};
    const howTheirs = explicit === true ? ['-f', format] : [];
    beforeAll(() => {
      qemuImg('create', '-q', '-f', format, '-o', options, name, size);
      if (commands.length > 0) io(name, format, ...commands);
    });

    it('reads alike', () => {
      qemuImg('convert', ...howTheirs, '-O', 'raw', name, 'converted.raw');
      withImage(
        name,
        (node) =>
          withImage(
            'converted.raw',
            (raw) => {
              expect(node.length).toBe(raw.length);
              const both = { first: node.descriptor, second: raw.descriptor, strict: false };
              const buffer = runtime.arena.alloc(COMPARE_BUFFER_BYTES, 'comparison');
              const team = new Team(Team.memory());
              expect(comparePart(runtime, both, team, buffer, () => undefined)).toBeUndefined();
              expect(team.done).toBe(raw.length);
              runtime.arena.free(buffer);
            },
            { format: 'raw' },
          ),
        how,
      );
      if (!size.endsWith('G')) expectContent(name, readFileSync(at('converted.raw')), how);
    });

    it('is mapped alike', () => {
      expect(shownMap(name, how)).toEqual(
        JSON.parse(qemuImg('map', '--output=json', ...howTheirs, at(name))),
      );
    });

    it('is described alike', () => {
      const own = withImage(name, (node) => imageInfo(runtime, imageOf(node), at(name)), how);
      expect(own).toEqual(JSON.parse(qemuImg('info', '--output=json', ...howTheirs, at(name))));
    });

    it('says the truth of every range', () => {
      withImage(
        name,
        (node) => {
          const files = filesOf(node.descriptor);
          const model = new Map(files.map(({ path }) => [path, size.endsWith('G') ? undefined : path]));
          for (let offset = 0; offset < node.length; ) {
            const wanted = Math.min(node.length - offset, Math.ceil(node.length / 17));
            const extent = node.status(offset, wanted);
            expect(extent.length).toBeGreaterThan(0);
            expect(extent.length).toBeLessThanOrEqual(wanted);
            const looked = Math.min(extent.length, 1 << 20);
            const bytes = read(node, offset, looked);
            if (extent.flags & STATUS_ZERO || extent.flags === 0) {
              expect(bytes.every((byte) => byte === 0)).toBe(true);
            }
            const path = files[extent.file ?? 0]?.path ?? '';
            if (extent.flags & STATUS_DATA && extent.hostOffset >= 0 && model.get(path) !== undefined) {
              const place = readFileSync(path).subarray(extent.hostOffset, extent.hostOffset + looked);
              expect(firstDifference(place, bytes)).toBe(-1);
            }
            offset += extent.length;
          }
        },
        how,
      );
    });

    it('is not written', () => {
      const refused = expect.objectContaining({ code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE' });
      expect(() => openImage(runtime, at(name), { format, readOnly: false })).toThrow(refused);
      withImage(
        name,
        (node) => {
          const readOnly = expect.objectContaining({ code: 'ERR_STILLFRAME_READ_ONLY' });
          expect(node.readOnly).toBe(true);
          expect(() => node.write(0, buffer, 512)).toThrow(readOnly);
          expect(() => node.writeZeroes(0, 512, true)).toThrow(readOnly);
          expect(() => node.discard(0, 512)).toThrow(readOnly);
          expect(() => node.writeUnits(0, buffer, 512, 512, buffer)).toThrow(readOnly);
          node.flush();
          const outside = expect.objectContaining({ code: 'ERR_STILLFRAME_OUT_OF_RANGE' });
          expect(() => node.read(node.length, buffer, 1)).toThrow(outside);
          expect(() => node.status(-1, 2)).toThrow(outside);
          expect(node.status(0, 0).length).toBe(0);
        },
        how,
      );
    });
  });
});

function expectAsQemu(name: string, model: Uint8Array): void {
  expectContent(name, model);
  if (!peers) return;
  writeFileSync(at('model.raw'), model);
  qemuImg('compare', '-q', '-F', 'raw', name, 'model.raw');
  expect(shownMap(name)).toEqual(JSON.parse(qemuImg('map', '--output=json', at(name))));
}

describe('a streamOptimized image', () => {
  const data = sample(1);

  it('with its grain directory at its end reads as what it was made of', () => {
    writeFileSync(at('stream.vmdk'), streamOptimized(data));
    expectAsQemu('stream.vmdk', data);
    expect(mapOf('stream.vmdk').filter(({ compressed }) => compressed).length).toBeGreaterThan(0);
  });

  it('of more than one grain table', () => {
    const large = new Uint8Array(70 << 20);
    large.set(data, 40 << 20);
    large.set(data.subarray(0, 5000), 69 << 20);
    writeFileSync(at('stream2.vmdk'), streamOptimized(large));
    expectAsQemu('stream2.vmdk', large);
  });

  it.skipIf(!peers)('of qemu-img, random and repeating data', () => {
    const mixed = Buffer.concat([new Random(2).noise(1_000_000), data]).subarray(0, 4_000_256);
    writeFileSync(at('mixed.raw'), mixed);
    qemuImg('convert', '-f', 'raw', '-O', 'vmdk', '-o', 'subformat=streamOptimized', 'mixed.raw', 'q.vmdk');
    const model = new Uint8Array(Math.ceil(mixed.length / 512) * 512);
    model.set(mixed);
    expectAsQemu('q.vmdk', model);
  });

  it.each<[string, (image: Buffer, grain: number) => void, RegExp]>([
    [
      'cut off in a byte of its data',
      (image, grain) => image.fill(0x55, grain + 20, grain + 40),
      /does not decompress/,
    ],
    ['of no length', (image, grain) => image.writeUInt32LE(0, grain + 8), /has 0 bytes/],
    [
      'of a length that cannot be',
      (image, grain) => image.writeUInt32LE(0x7fffffff, grain + 8),
      /has 2147483647 bytes/,
    ],
    [
      'that is a stream with too much',
      (image, grain) => {
        const bomb = deflateSync(Buffer.alloc(20 << 20));
        bomb.copy(image, grain + 12);
        image.writeUInt32LE(bomb.length, grain + 8);
      },
      /does not decompress/,
    ],
    [
      'that is a stream with too little',
      (image, grain) => {
        const short = deflateSync(Buffer.alloc(512));
        short.copy(image, grain + 12);
        image.writeUInt32LE(short.length, grain + 8);
      },
      /does not decompress/,
    ],
  ])('with a grain %s is refused where it is read, and only there', (_, damage, message) => {
    const image = streamOptimized(data);
    damage(image, 128 * 512);
    writeFileSync(at('damaged.vmdk'), image);
    withImage('damaged.vmdk', (node) => {
      const corrupt = expect.objectContaining({ code: 'ERR_STILLFRAME_CORRUPT_IMAGE' });
      expect(() => read(node, 100, 10)).toThrow(corrupt);
      expect(() => read(node, 100, 10)).toThrow(message);
      const offset = 2 << 20;
      expect(firstDifference(read(node, offset, 5000), data.subarray(offset, offset + 5000))).toBe(-1);
    });
  });
});

describe('a COWD extent', () => {
  const data = sample(3);

  it.each([1, 8])('of grains of %d sectors', (grainSectors) => {
    writeFileSync(at('cowd-delta.vmdk'), cowd(data, grainSectors));
    const text = 'version=1\nCID=1\nparentCID=ffffffff\ncreateType="vmfsSparse"\n#\n';
    writeFileSync(at('cowd.vmdk'), `${text}RW ${data.length / 512} VMFSSPARSE "cowd-delta.vmdk"\n`);
    expectAsQemu('cowd.vmdk', data);
  });

  it('alone is refused: what it is to be read on top of is not known', () => {
    writeFileSync(at('cowd-delta.vmdk'), cowd(data));
    const refused = expect.objectContaining({ code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE' });
    expect(() => openImage(runtime, at('cowd-delta.vmdk'), { readOnly: true })).toThrow(refused);
  });

  it('listed by a descriptor, behind a flat one', () => {
    writeFileSync(at('snapshot-delta.vmdk'), cowd(data));
    writeFileSync(at('first-flat.vmdk'), Buffer.concat([Buffer.alloc(1024), data.subarray(0, 700 * 512)]));
    writeFileSync(
      at('snapshot.vmdk'),
      '# Disk DescriptorFile\r\nversion=1\r\nCID=0badcafe\r\nparentCID=ffffffff\r\ncreateType="vmfsSparse"\r\n' +
        `# Extent description\r\nRW 700 FLAT "first-flat.vmdk" 2\r\nRW ${data.length / 512} VMFSSPARSE "snapshot-delta.vmdk"\r\n`,
    );
    const model = Buffer.concat([data.subarray(0, 700 * 512), data]);
    expectAsQemu('snapshot.vmdk', model);
    const own = withImage('snapshot.vmdk', (node) => imageInfo(runtime, imageOf(node), at('snapshot.vmdk')));
    if (peers) expect(own).toEqual(JSON.parse(qemuImg('info', '--output=json', at('snapshot.vmdk'))));
    expect(own['format-specific']).toMatchObject({ data: { cid: 0x0badcafe, 'create-type': 'vmfsSparse' } });
  });
});

describe('a flat image of ESXi', () => {
  it('reads its extents, one file in many of them', () => {
    const data = sample(4, 2 << 20);
    writeFileSync(at('vm-flat.vmdk'), data);
    const lines = ['RW 1024 VMFS "vm-flat.vmdk"', ...[7, 9, 7].map((n) => `RW 100 FLAT "vm-flat.vmdk" ${n}`)];
    writeFileSync(
      at('vm.vmdk'),
      `# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="vmfs"\n# Extent description\n${lines.join('\n')}\n`,
    );
    const part = (sector: number): Uint8Array => data.subarray(sector * 512, (sector + 100) * 512);
    expectAsQemu('vm.vmdk', Buffer.concat([data.subarray(0, 1024 * 512), part(7), part(9), part(7)]));
    withImage('vm.vmdk', (node) => expect(filesOf(node.descriptor).length).toBe(2));
  });

  it('of no extents is empty', () => {
    writeFileSync(at('none.vmdk'), 'version=1\ncreateType="monolithicFlat"\n');
    withImage('none.vmdk', (node) => expect(node.length).toBe(0));
  });
});

describe.skipIf(!peers)('chains', () => {
  beforeAll(() => {
    qemuImg('create', '-q', '-f', 'vmdk', 'base.vmdk', '10M');
    io('base.vmdk', 'vmdk', ...SMALL);
    qemuImg('create', '-q', '-f', 'vmdk', '-b', 'base.vmdk', '-F', 'vmdk', 'middle.vmdk');
    io('middle.vmdk', 'vmdk', 'write -P 9 2M 64k', 'write -P 8 3M 100k');
    const options = 'subformat=monolithicSparse,zeroed_grain=on';
    qemuImg('create', '-q', '-f', 'vmdk', '-o', options, '-b', 'middle.vmdk', '-F', 'vmdk', 'top.vmdk');
    io('top.vmdk', 'vmdk', 'write -P 10 5M 64k', 'write -z 0 64k');
  });

  it('of VMDKs', () => {
    qemuImg('convert', '-O', 'raw', 'top.vmdk', 'converted.raw');
    expectAsQemu('top.vmdk', readFileSync(at('converted.raw')));
    const own = withImage('top.vmdk', (node) => imageInfo(runtime, imageOf(node), at('top.vmdk')));
    expect(own).toEqual(JSON.parse(qemuImg('info', '--output=json', at('top.vmdk'))));
  });

  it.each(['vmdk', 'vhdx', 'vpc', 'vdi'] as const)('of a qcow2 over %s', (format) => {
    const base = `under.${format}`;
    qemuImg('create', '-q', '-f', format, base, '10M');
    io(base, format, ...SMALL);
    qemuImg('create', '-q', '-f', 'qcow2', '-b', base, '-F', format, 'over.qcow2');
    io('over.qcow2', 'qcow2', 'write -P 9 2M 64k', 'write -z 3M 100k');
    qemuImg('convert', '-O', 'raw', 'over.qcow2', 'converted.raw');
    expectAsQemu('over.qcow2', readFileSync(at('converted.raw')));
  });

  it('whose parent was written since are refused', () => {
    copyFileSync(at('base.vmdk'), at('kept.vmdk'));
    const text = readFileSync(at('base.vmdk'), 'latin1');
    const [, old = ''] = /\nCID=([0-9a-f]+)/.exec(text) ?? [];
    const cid = old.replaceAll(/./g, (digit) => (digit === 'a' ? 'b' : 'a'));
    writeFileSync(at('base.vmdk'), text.replace(`\nCID=${old}`, `\nCID=${cid}`), 'latin1');
    const changed = expect.objectContaining({
      code: 'ERR_STILLFRAME_CORRUPT_IMAGE',
      message: expect.stringContaining(`its CID is ${cid}`),
    });
    expect(() => openImage(runtime, at('top.vmdk'), { readOnly: true })).toThrow(changed);
    copyFileSync(at('kept.vmdk'), at('base.vmdk'));
  });
});

describe('files that headers name', () => {
  const descriptor = (name: string, ...lines: string[]): void =>
    writeFileSync(at(name), `version=1\nCID=1\ncreateType="monolithicFlat"\n${lines.join('\n')}\n`);
  const opening =
    (name: string, options: Partial<OpenImageOptions> = {}) =>
    (): void =>
      withImage(name, () => undefined, options);

  beforeAll(() => {
    mkdirSync(at('inside'));
    writeFileSync(at('secret'), Buffer.alloc(4096, 7));
    writeFileSync(at('inside/flat'), Buffer.alloc(4096, 8));
    symlinkSync(at('secret'), at('inside/link'));
  });

  it.each([
    ['a relative name', '../secret'],
    ['a link', 'link'],
    ['an absolute name', at('secret')],
  ])('are not opened outside of the folder by %s, unless it is allowed', (_, name) => {
    descriptor('inside/out.vmdk', `RW 8 FLAT "${name}" 0`);
    const forbidden = expect.objectContaining({ code: 'ERR_STILLFRAME_BACKING_FORBIDDEN' });
    expect(opening('inside/out.vmdk')).toThrow(forbidden);
    expect(opening('inside/out.vmdk', { backing: false })).toThrow(forbidden);
    expect(opening('inside/out.vmdk', { backing: [at('inside')] })).toThrow(forbidden);
    withImage('inside/out.vmdk', (node) => expect(read(node, 0, 4096)[0]).toBe(7), { backing: [folder] });
  });

  it.each([
    ['nbd://localhost/x', 'FORBIDDEN'],
    ['json:{"driver":"file"}', 'FORBIDDEN'],
    ['gone', 'MISSING'],
    ['out2.vmdk', 'CYCLE'],
  ])('%s is refused', (name, code) => {
    descriptor('inside/out2.vmdk', `RW 8 FLAT "${name.replaceAll('"', '')}" 0`);
    const refused = expect.objectContaining({ code: `ERR_STILLFRAME_BACKING_${code}` });
    expect(opening('inside/out2.vmdk')).toThrow(refused);
  });

  it('are followed to parents by the same rules', () => {
    writeFileSync(
      at('inside/child.vmdk'),
      'version=1\nCID=1\nparentCID=2\ncreateType="monolithicFlat"\nparentFileNameHint="../parent.vmdk"\nRW 8 FLAT "flat" 0\n',
    );
    descriptor('parent.vmdk', 'RW 8 FLAT "secret" 0');
    const forbidden = expect.objectContaining({ code: 'ERR_STILLFRAME_BACKING_FORBIDDEN' });
    expect(opening('inside/child.vmdk')).toThrow(forbidden);
    const changed = expect.objectContaining({ code: 'ERR_STILLFRAME_CORRUPT_IMAGE' });
    expect(opening('inside/child.vmdk', { backing: [folder] })).toThrow(changed);
    expect(opening('inside/child.vmdk', { backing: false })).not.toThrow();
  });

  it('of a parent that is not named are missed', () => {
    const text = 'version=1\nCID=1\nparentCID=2\ncreateType="monolithicFlat"\nRW 8 FLAT "flat" 0\n';
    writeFileSync(at('inside/orphan.vmdk'), text);
    const missing = expect.objectContaining({ code: 'ERR_STILLFRAME_BACKING_MISSING' });
    expect(opening('inside/orphan.vmdk')).toThrow(missing);
    expect(opening('inside/orphan.vmdk', { backing: false })).not.toThrow();
  });

  it('are too many', () => {
    descriptor('many.vmdk', ...Array.from({ length: 4097 }, () => 'RW 1 FLAT "secret" 0'));
    expect(opening('many.vmdk')).toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE' }),
    );
    descriptor('fewer.vmdk', ...Array.from({ length: 4096 }, () => 'RW 1 FLAT "secret" 0'));
    withImage('fewer.vmdk', (node) => {
      expect(node.length).toBe(4096 * 512);
      expect(read(node, 0, node.length).every((byte) => byte === 7)).toBe(true);
    });
  });
});

describe.skipIf(!peers)('formats without support', () => {
  it.each(['qcow', 'qed', 'parallels', 'luks'])('%s is never taken for raw unasked', (format) => {
    const name = `unsupported.${format}`;
    // Making one of LUKS takes seconds, for its key.
    if (format === 'luks') writeFileSync(at(name), Buffer.from('LUKS\u{ba}\u{be}\0\u{1}', 'latin1'));
    else qemuImg('create', '-q', '-f', format, name, '1M');
    expect(() => withImage(name, () => undefined)).toThrow(
      `has the format ${format}, which is not supported`,
    );
    withImage(name, (node) => expect(imageOf(node).driver).toBe('raw'), { format: 'raw' });
  });
});
