import { copyFileSync, existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type ConvertImageOptions, createEngine } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { dirtyInQemu } from '../support/bitmaps.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const peers = hasPeer('qemu-img') && hasPeer('qemu-io');
const nbd = hasPeer('qemu-nbd') && hasPeer('nbdinfo');
const engine = await createEngine({ workers: 3 });
afterAll(() => engine.close());

const MIB = 1 << 20;
const LENGTH = 21 * MIB + 512;
const at = (file: string): string => join(folder, file);
const leftOver = (): string[] => readdirSync(folder).filter((file) => file.endsWith('.partial'));

function byQemu(image: string, format: string): Buffer {
  run('qemu-img', ['convert', '-f', format, '-O', 'raw', at(image), at('by-qemu')]);
  return readFileSync(at('by-qemu'));
}

/** Text-like data that compresses, noise and holes. */
function content(seed: number, length: number): Buffer {
  const random = new Random(seed);
  const bytes = Buffer.alloc(length);
  for (let offset = 0; offset < length; ) {
    const size = Math.min(length - offset, random.pick([512, 4096, 60_000, 300_000, 2_000_000]));
    const kind = random.pick(['hole', 'hole', 'noise', 'text']);
    if (kind === 'noise') bytes.set(random.noise(size), offset);
    if (kind === 'text') bytes.fill(`line ${random.between(0, 99)} of a file\n`, offset, offset + size);
    offset += size;
  }
  return bytes;
}

const model = content(1, LENGTH);
const base = content(2, 13 * MIB);

beforeAll(() => {
  writeFileSync(at('source.raw'), model);
  writeFileSync(at('base.raw'), base);
  if (!peers) return;
  const sparse = ['convert', '-f', 'raw', '-O', 'qcow2', '-o'];
  run('qemu-img', [...sparse, 'cluster_size=4k', at('source.raw'), at('source.qcow2')]);
  run('qemu-img', ['convert', '-c', '-f', 'raw', '-O', 'qcow2', at('source.raw'), at('packed.qcow2')]);
  run('qemu-img', ['convert', '-f', 'raw', '-O', 'vmdk', at('source.raw'), at('source.vmdk')]);
  run('qemu-img', [
    ...['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', '-F', 'raw', '-b', 'base.raw'],
    ...[at('top.qcow2'), '20M'],
  ]);
  const random = new Random(3);
  const requests: string[] = [];
  for (let index = 0; index < 60; index++) {
    const offset = random.between(0, 39_000) * 512;
    const how = random.pick(['write -P 7', 'write -P 9', 'write -z', 'discard', 'write -z -u']);
    requests.push('-c', `${how} ${offset} ${random.pick([512, 4096, 65536, 200 * 1024])}`);
  }
  run('qemu-io', ['-f', 'qcow2', ...requests, at('top.qcow2')]);
});

const TARGETS: readonly [name: string, options: ConvertImageOptions][] = [
  ['raw', {}],
  ['raw, nothing left out', { sparseSize: 0 }],
  ['raw, large holes only', { sparseSize: 3 * 65536 }],
  ['raw, its space taken', { creation: { preallocation: 'falloc' } }],
  ['qcow2', { format: 'qcow2' }],
  ['qcow2, one thread', { format: 'qcow2', workers: 1 }],
  ['qcow2, nothing left out', { format: 'qcow2', sparseSize: 0 }],
  ['qcow2, large holes only', { format: 'qcow2', sparseSize: MIB }],
  ['qcow2 of 512-byte clusters', { format: 'qcow2', creation: { clusterSize: 512 } }],
  ['qcow2 of 2 MiB clusters', { format: 'qcow2', creation: { clusterSize: 2 * MIB } }],
  ['qcow2 version 2', { format: 'qcow2', creation: { version: 2 } }],
  ['qcow2 with subclusters', { format: 'qcow2', creation: { extendedL2: true } }],
  ['qcow2 with 1-bit refcounts', { format: 'qcow2', creation: { refcountBits: 1 } }],
  ['qcow2, preallocated', { format: 'qcow2', creation: { preallocation: 'metadata' } }],
  ['qcow2, compressed', { format: 'qcow2', compress: true }],
  ['qcow2, compressed by zstd', { format: 'qcow2', compress: true, creation: { compressionType: 'zstd' } }],
  [
    'qcow2, compressed, small clusters',
    { format: 'qcow2', compress: true, creation: { clusterSize: 4096, version: 2 } },
  ],
  [
    'qcow2, compressed, large clusters',
    { format: 'qcow2', compress: true, creation: { clusterSize: 2 * MIB, extendedL2: true } },
  ],
  ['qcow2, compressed, nothing left out', { format: 'qcow2', compress: true, sparseSize: 0 }],
];

describe.skipIf(!peers)('convert', () => {
  it.each(TARGETS)('to %s: QEMU reads what it was', async (name, options) => {
    const target = at(`to ${name}`);
    const format = options.format ?? 'raw';
    for (const source of ['source.raw', 'source.qcow2', 'packed.qcow2', 'source.vmdk']) {
      await engine.convertImage(at(source), target, {
        ...options,
        source: { format: source.endsWith('.raw') ? 'raw' : undefined },
      });
      if (format === 'qcow2') run('qemu-img', ['check', '-q', target]);
      expect(firstDifference(byQemu(`to ${name}`, format), model)).toBe(-1);
    }
    expect(leftOver()).toEqual([]);
  });

  it.each([
    [['-O', 'raw'], {}],
    [['-O', 'raw', '-S', '0'], { sparseSize: 0 }],
    [['-O', 'qcow2'], { format: 'qcow2' }],
    [['-O', 'qcow2', '-S', '0'], { format: 'qcow2', sparseSize: 0 }],
    [['-O', 'qcow2', '-o', 'extended_l2=on'], { format: 'qcow2', creation: { extendedL2: true } }],
    [['-O', 'qcow2', '-o', 'cluster_size=4k'], { format: 'qcow2', creation: { clusterSize: 4096 } }],
    [['-O', 'qcow2', '-c'], { format: 'qcow2', compress: true }],
    [
      ['-O', 'qcow2', '-c', '-o', 'compression_type=zstd'],
      { format: 'qcow2', compress: true, creation: { compressionType: 'zstd' } },
    ],
  ] as const)('takes no more space than qemu-img convert %j', async (args, options) => {
    run('qemu-img', ['convert', '-f', 'raw', ...args, at('source.raw'), at('theirs')]);
    await engine.convertImage(at('source.raw'), at('ours'), { ...options, source: { format: 'raw' } });
    const [ours, theirs] = [statSync(at('ours')), statSync(at('theirs'))];
    // QEMU's file may end within its last cluster; each of three threads may leave one that is not full.
    expect(ours.size).toBeLessThanOrEqual((Math.ceil(theirs.size / 65536) + 3) * 65536);
    // The file system's own tables count too.
    expect(ours.blocks).toBeLessThanOrEqual(theirs.blocks + 64);
  });

  it.each([
    ['', {}],
    ['compressed', { compress: true }],
    ['with larger clusters', { creation: { clusterSize: 131072 } }],
    ['with subclusters', { creation: { extendedL2: true } }],
  ] as const)('keeps a backing file: %s', async (name, options) => {
    const target = `over ${name}`;
    await engine.convertImage(at('top.qcow2'), at(target), {
      ...options,
      format: 'qcow2',
      backingFile: 'base.raw',
      backingFormat: 'raw',
    });
    run('qemu-img', ['check', '-q', at(target)]);
    expect(firstDifference(byQemu(target, 'qcow2'), byQemu('top.qcow2', 'qcow2'))).toBe(-1);
    const info = JSON.parse(run('qemu-img', ['info', '--output=json', at(target)]));
    expect([info['backing-filename'], info['backing-filename-format']]).toEqual(['base.raw', 'raw']);
    const map = JSON.parse(run('qemu-img', ['map', '--output=json', at(target)]));
    expect(map.some(({ depth }: { depth: number }) => depth === 1)).toBe(true);
  });

  it('puts several sources one behind the other, each filled up to whole sectors', async () => {
    writeFileSync(at('odd.raw'), model.subarray(0, 777));
    await engine.convertImage([at('odd.raw'), at('source.raw'), at('odd.raw')], at('joined'), {
      source: { format: 'raw' },
    });
    const whole = Buffer.alloc(1024 + LENGTH + 1024);
    whole.set(model.subarray(0, 777));
    whole.set(model, 1024);
    whole.set(model.subarray(0, 777), 1024 + LENGTH);
    expect(firstDifference(readFileSync(at('joined')), whole)).toBe(-1);
    expect(readFileSync(at('joined')).length).toBe(whole.length);
  });

  it.each([
    ['raw', []],
    ['qcow2', ['-o', 'cluster_size=64k']],
    ['qcow2', ['-o', 'extended_l2=on']],
  ] as const)('writes into an image that is there: %s %j', async (format, more) => {
    const target = 'there';
    run('qemu-img', ['create', '-q', '-f', format, ...more, at(target), '24M']);
    run('qemu-io', ['-f', format, '-c', 'write -P 99 0 24M', at(target)]);
    const inode = statSync(at(target)).ino;
    await engine.convertImage(at('source.qcow2'), at(target), { format, existing: true });
    expect(statSync(at(target)).ino).toBe(inode);
    const found = byQemu(target, format);
    expect(firstDifference(found.subarray(0, LENGTH), model)).toBe(-1);
    expect(found.subarray(LENGTH).every((byte) => byte === 99)).toBe(true);
    if (format === 'qcow2') run('qemu-img', ['check', '-q', at(target)]);
  });

  it('believes that a target is zero where it is told so', async () => {
    writeFileSync(at('zero'), Buffer.alloc(LENGTH));
    writeFileSync(at('mostly'), Buffer.alloc(2 * MIB));
    await engine.convertImage(at('mostly'), at('zero'), {
      existing: true,
      targetIsZero: true,
      source: { format: 'raw' },
    });
    expect(readFileSync(at('zero')).equals(Buffer.alloc(LENGTH))).toBe(true);
    expect(statSync(at('zero')).blocks).toBeGreaterThan(0);
  });

  it('salvages what can be read', async () => {
    run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', at('source.raw'), at('damaged.qcow2')]);
    const bytes = readFileSync(at('damaged.qcow2'));
    const l1 = Number(bytes.readBigUInt64BE(40));
    const l2 = Number(bytes.readBigUInt64BE(l1) & 0x00fffffffffffe00n);
    const lost: number[] = [];
    for (let index = 0; index < 300 && lost.length < 2; index++) {
      if (bytes.readBigUInt64BE(l2 + index * 8) === 0n) continue;
      // A place that is no start of a cluster.
      bytes.writeBigUInt64BE(bytes.readBigUInt64BE(l2 + index * 8) | 0x200n, l2 + index * 8);
      lost.push(index * 65536);
    }
    writeFileSync(at('damaged.qcow2'), bytes);
    await expect(engine.convertImage(at('damaged.qcow2'), at('salvaged'))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_CORRUPT_IMAGE',
    });
    expect(existsSync(at('salvaged'))).toBe(false);
    expect(leftOver()).toEqual([]);
    const lines: string[] = [];
    const onMessage = (line: string): void => void lines.push(line);
    await engine.convertImage(at('damaged.qcow2'), at('salvaged'), { salvage: true, onMessage });
    const expected = Buffer.from(model);
    for (const offset of lost) expected.fill(0, offset, Math.min(LENGTH, offset + 65536));
    expect(firstDifference(readFileSync(at('salvaged')), expected)).toBe(-1);
    for (const offset of lost) {
      expect(lines.some((line) => line.startsWith(`warning: error while reading offset ${offset}: `))).toBe(
        true,
      );
    }
  });

  it.skipIf(!nbd)('takes dirty bitmaps along', async () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('bits.qcow2'), '8M']);
    run('qemu-img', ['bitmap', '--add', '-g', '4k', at('bits.qcow2'), 'on']);
    run('qemu-img', ['bitmap', '--add', at('bits.qcow2'), 'off']);
    run('qemu-img', ['bitmap', '--add', at('bits.qcow2'), 'broken']);
    run('qemu-io', ['-f', 'qcow2', '-c', 'write 1M 70k', '-c', 'write 5M 4k', at('bits.qcow2')]);
    run('qemu-img', ['bitmap', '--disable', at('bits.qcow2'), 'off']);
    run('qemu-io', ['-f', 'qcow2', '-c', 'write 7M 4k', at('bits.qcow2')]);
    const options = { format: 'qcow2', bitmaps: true } as const;
    await engine.convertImage(at('bits.qcow2'), at('with-bits.qcow2'), options);
    run('qemu-img', ['check', '-q', at('with-bits.qcow2')]);
    for (const name of ['on', 'off']) {
      expect(dirtyInQemu(at('with-bits.qcow2'), name)).toEqual(dirtyInQemu(at('bits.qcow2'), name));
    }
    const flags = (file: string): unknown =>
      JSON.parse(run('qemu-img', ['info', '--output=json', at(file)]))['format-specific'].data.bitmaps;
    expect(flags('with-bits.qcow2')).toEqual(flags('bits.qcow2'));
    const bytes = readFileSync(at('bits.qcow2'));
    const extension = bytes.indexOf(Buffer.from('2385287500000018', 'hex')) + 8;
    const entry = bytes.indexOf('broken', Number(bytes.readBigUInt64BE(extension + 16))) - 24;
    bytes.writeUInt32BE(3, entry + 12);
    writeFileSync(at('bits.qcow2'), bytes);
    await expect(engine.convertImage(at('bits.qcow2'), at('no'), options)).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_BITMAP_INCONSISTENT',
    });
    const lines: string[] = [];
    await engine.convertImage(at('bits.qcow2'), at('with-bits.qcow2'), {
      ...options,
      skipBrokenBitmaps: true,
      onMessage: (line) => lines.push(line),
    });
    expect(lines).toEqual(["warning: Skipping inconsistent bitmap 'broken'"]);
    expect(existsSync(at('no'))).toBe(false);
  });

  it('converts a huge sparse image at once', async () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=2M', at('huge.qcow2'), '1P']);
    run('qemu-io', ['-f', 'qcow2', '-c', 'write -P 5 600T 64k', at('huge.qcow2')]);
    await engine.convertImage(at('huge.qcow2'), at('huge2.qcow2'), {
      format: 'qcow2',
      creation: { clusterSize: 2 * MIB },
    });
    run('qemu-img', ['check', '-q', at('huge2.qcow2')]);
    run('qemu-io', ['-f', 'qcow2', '-c', 'read -P 5 600T 64k', '-c', 'read -P 0 599T 1M', at('huge2.qcow2')]);
  });
});

describe('a conversion that does not end well', () => {
  const options = { source: { format: 'raw' } } as const;

  it('leaves the file that had the name of the target', async () => {
    writeFileSync(at('kept'), 'precious');
    const ending = new AbortController();
    const stopped = engine.convertImage(at('source.raw'), at('kept'), {
      ...options,
      bytesPerSecond: MIB,
      signal: ending.signal,
      onProgress: ({ done }) => {
        if (done > 0) ending.abort(new Error('enough'));
      },
    });
    await expect(stopped).rejects.toThrow('enough');
    expect(readFileSync(at('kept'), 'utf8')).toBe('precious');
    expect(leftOver()).toEqual([]);
    await engine.convertImage(at('source.raw'), at('kept'), options);
    expect(firstDifference(readFileSync(at('kept')), model)).toBe(-1);
  });

  it.each([
    ['the source as the target', 'source.raw', 'source.raw', {}, 'SAME_NODE'],
    ['the partial target as the source', 'x.partial', 'x', {}, 'SAME_NODE'],
    ['a target that is too small', 'source.raw', 'small.raw', { existing: true }, 'SIZE_MISMATCH'],
    ['no target to write into', 'source.raw', 'nothing.raw', { existing: true }, 'NOT_FOUND'],
    ['no source', 'nothing.raw', 'out', {}, 'NOT_FOUND'],
    ['raw to be compressed', 'source.raw', 'out', { compress: true }, 'UNSUPPORTED_FEATURE'],
    ['an odd size of holes', 'source.raw', 'out', { sparseSize: 1000 }, 'INVALID_ARGUMENT'],
    ['a zero target that is not there', 'source.raw', 'out', { targetIsZero: true }, 'INVALID_ARGUMENT'],
    [
      'bitmaps of a raw image',
      'source.raw',
      'out',
      { format: 'qcow2', bitmaps: true },
      'UNSUPPORTED_FEATURE',
    ],
    [
      'preallocation to be compressed',
      'source.raw',
      'out',
      { format: 'qcow2', compress: true, creation: { preallocation: 'full' } },
      'INVALID_ARGUMENT',
    ],
    [
      'a raw target with a backing file',
      'source.raw',
      'out',
      { backingFile: 'base.raw', backingFormat: 'raw' },
      'BACKING_UNSUPPORTED',
    ],
    [
      'a backing file that is not there',
      'source.raw',
      'out',
      { format: 'qcow2', backingFile: 'none', backingFormat: 'raw' },
      'NOT_FOUND',
    ],
  ] as const)('refuses %s', async (_, source, target, more, code) => {
    writeFileSync(at('small.raw'), Buffer.alloc(MIB));
    copyFileSync(at('base.raw'), at('x.partial'));
    const before = readFileSync(at('source.raw'));
    await expect(engine.convertImage(at(source), at(target), { ...options, ...more })).rejects.toMatchObject({
      code: `ERR_STILLFRAME_${code}`,
    });
    expect(existsSync(at('out'))).toBe(false);
    expect(leftOver()).toEqual(['x.partial']);
    expect(readFileSync(at('source.raw')).equals(before)).toBe(true);
  });
});
