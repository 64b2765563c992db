import { copyFileSync, existsSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { dirtyInQemu } from '../support/bitmaps.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder } from './qcow2-support.js';

const folder = temporaryFolder();
const peers = hasPeer('qemu-img') && hasPeer('qemu-io');
const nbd = hasPeer('qemu-nbd') && hasPeer('nbdinfo');
const engine = await createEngine({ workers: 1 });
afterAll(() => engine.close());

const MIB = 1 << 20;
const at = (file: string): string => join(folder, file);
const io = (file: string, ...commands: string[]): void => {
  run('qemu-io', [
    '-f',
    file.endsWith('.raw') ? 'raw' : 'qcow2',
    ...commands.flatMap((c) => ['-c', c]),
    at(file),
  ]);
};

/** What an image reads as, by QEMU. */
function contentOf(file: string): Buffer {
  const format = file.endsWith('.raw') ? 'raw' : 'qcow2';
  run('qemu-img', ['convert', '-f', format, '-O', 'raw', at(file), at('content')]);
  return readFileSync(at('content'));
}

/** A drive of 1 MiB with data at its start and at its end. */
function make(file: string, options: string, length = MIB): void {
  const data = options.replaceAll('DATA', at(`${file}.data`));
  run('qemu-img', [
    'create',
    '-q',
    '-f',
    'qcow2',
    ...(data === '' ? [] : ['-o', data]),
    at(file),
    String(length),
  ]);
  io(file, 'write -P 7 0 70k', `write -P 9 ${length - 131584} 131584`);
}

const expected = (before: Uint8Array, length: number): Buffer => {
  const model = Buffer.alloc(length);
  model.set(before);
  return model;
};

const FORMATS = [
  ['64 KiB clusters', ''],
  ['512-byte clusters', 'cluster_size=512'],
  ['2 MiB clusters', 'cluster_size=2M'],
  ['version 2', 'compat=0.10'],
  ['subclusters', 'extended_l2=on'],
  ['refcounts of one bit', 'refcount_bits=1'],
  ['64-bit refcounts, 4 KiB clusters', 'refcount_bits=64,cluster_size=4k'],
  ['a data file', 'data_file=DATA'],
  ['a raw data file', 'data_file=DATA,data_file_raw=on'],
] as const;

describe.skipIf(!peers)('resize of a qcow2 image', () => {
  it.each(FORMATS)('grows and shrinks one with %s', async (name, options) => {
    const file = `${name}.qcow2`;
    make(file, options);
    let model = contentOf(file);
    // 64 GiB needs a larger L1 table wherever clusters are not huge.
    for (const length of [MIB + 512, 3 * MIB, 700 * 1024 + 512, 512, 2 * MIB]) {
      const shrink = length < model.length;
      expect(await engine.resizeImage(at(file), { size: length, shrink })).toBe(length);
      model = expected(model.subarray(0, length), length);
      run('qemu-img', ['check', '-q', at(file)]);
      expect(firstDifference(contentOf(file), model)).toBe(-1);
    }
    expect(contentOf(file).length).toBe(2 * MIB);
    io(file, 'write -P 3 1M 1M');
    expect(
      contentOf(file)
        .subarray(MIB)
        .every((byte) => byte === 3),
    ).toBe(true);
    if (options.includes('raw=on')) {
      expect(firstDifference(readFileSync(at(`${file}.data`)), contentOf(file))).toBe(-1);
    }
  });

  it.each(FORMATS.slice(0, 7))('moves an L1 table that is too small, with %s', async (name, options) => {
    const file = `L1 ${name}.qcow2`;
    make(file, options);
    const length = options.includes('512') ? 2 ** 31 : options.includes('2M') ? 2 ** 43 : 2 ** 37;
    await engine.resizeImage(at(file), { size: length });
    run('qemu-img', ['check', '-q', at(file)]);
    io(file, 'read -P 7 0 70k', `read -P 9 917k 107k`, 'read -P 0 1M 1M', `read -P 0 ${length - 512} 512`);
    io(file, `write -P 5 ${length - 4096} 4k`);
    run('qemu-img', ['check', '-q', at(file)]);
    await engine.resizeImage(at(file), { size: MIB, shrink: true });
    run('qemu-img', ['check', '-q', at(file)]);
    io(file, 'read -P 7 0 70k', `read -P 9 917k 107k`);
  });

  it('gives the space of what is cut off back', async () => {
    make('cut.qcow2', '', 64 * MIB);
    io('cut.qcow2', 'write -P 1 0 64M');
    await engine.resizeImage(at('cut.qcow2'), { size: MIB, shrink: true });
    expect(statSync(at('cut.qcow2')).size).toBeLessThanOrEqual(2 * MIB);
    run('qemu-img', ['check', '-q', at('cut.qcow2')]);
    const { leaks } = JSON.parse(run('qemu-img', ['check', '--output=json', at('cut.qcow2')]));
    expect(leaks).toBeUndefined();
  });

  it('does not let a longer backing file show through in what is new', async () => {
    writeFileSync(at('base.raw'), new Random(1).noise(3 * MIB));
    const backing = ['-F', 'raw', '-b', 'base.raw'];
    run('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, at('over.qcow2'), String(MIB)]);
    const before = contentOf('over.qcow2');
    await engine.resizeImage(at('over.qcow2'), { size: 4 * MIB });
    expect(firstDifference(contentOf('over.qcow2'), expected(before, 4 * MIB))).toBe(-1);
    run('qemu-img', ['check', '-q', at('over.qcow2')]);
  });

  it.each([
    ['off', 'compat=1.1', false],
    ['metadata', 'compat=1.1', false],
    ['metadata', 'extended_l2=on', false],
    ['metadata', 'data_file=DATA', false],
    ['falloc', 'compat=1.1', true],
    ['full', 'cluster_size=4k', true],
    ['full', 'data_file=DATA', true],
  ] as const)('preallocates what is new: %s, %s', async (preallocation, options, space) => {
    const file = `${preallocation} ${options}.qcow2`;
    make(file, options);
    const before = contentOf(file);
    await engine.resizeImage(at(file), { size: 3 * MIB, preallocation });
    run('qemu-img', ['check', '-q', at(file)]);
    expect(firstDifference(contentOf(file), expected(before, 3 * MIB))).toBe(-1);
    const { 'allocated-clusters': allocated = 0, 'total-clusters': total } = JSON.parse(
      run('qemu-img', ['check', '--output=json', at(file)]),
    );
    // The clusters between the two areas of data stay unallocated.
    if (preallocation === 'off') expect(allocated).toBeLessThan(total / 3);
    else if (!options.includes('DATA')) expect(allocated).toBeGreaterThan((total * 2) / 3);
    const place = options.includes('DATA') ? `${file}.data` : file;
    expect(statSync(at(place)).blocks * 512 > 2 * MIB).toBe(space);
  });

  it('keeps internal snapshots of the size they had', async () => {
    for (const [size, shrink] of [
      [2 ** 36, false],
      [MIB / 2, true],
    ] as const) {
      make('snap.qcow2', '');
      const before = contentOf('snap.qcow2');
      run('qemu-img', ['snapshot', '-c', 's', at('snap.qcow2')]);
      io('snap.qcow2', 'write -P 3 0 4k');
      await engine.resizeImage(at('snap.qcow2'), { size, shrink });
      run('qemu-img', ['check', '-q', at('snap.qcow2')]);
      run('qemu-img', ['snapshot', '-a', 's', at('snap.qcow2')]);
      expect(firstDifference(contentOf('snap.qcow2'), before)).toBe(-1);
      run('qemu-img', ['check', '-q', at('snap.qcow2')]);
    }
  });

  it.skipIf(!nbd)('keeps dirty bitmaps, clean in what is new', async () => {
    make('bits.qcow2', '');
    run('qemu-img', ['bitmap', '--add', '-g', '4k', at('bits.qcow2'), 'b']);
    run('qemu-img', ['bitmap', '--add', at('bits.qcow2'), 'off']);
    run('qemu-img', ['bitmap', '--disable', at('bits.qcow2'), 'off']);
    io('bits.qcow2', 'write 8k 4k', 'write 1020k 4k', 'write 700k 4k');
    await engine.resizeImage(at('bits.qcow2'), { size: 2 ** 37 });
    run('qemu-img', ['check', '-q', at('bits.qcow2')]);
    const dirty = [8, 700, 1020].map((kib) => ({ offset: kib * 1024, length: 4096 }));
    expect(dirtyInQemu(at('bits.qcow2'), 'b')).toEqual(dirty);
    expect(dirtyInQemu(at('bits.qcow2'), 'off')).toEqual([]);
    await engine.resizeImage(at('bits.qcow2'), { size: 702 * 1024, shrink: true });
    await engine.resizeImage(at('bits.qcow2'), { size: MIB });
    run('qemu-img', ['check', '-q', at('bits.qcow2')]);
    expect(dirtyInQemu(at('bits.qcow2'), 'b')).toEqual([
      { offset: 8192, length: 4096 },
      { offset: 700 * 1024, length: 4096 },
    ]);
  });

  it('leaves an image it refuses as it was', async () => {
    make('v2.qcow2', 'compat=0.10');
    run('qemu-img', ['snapshot', '-c', 's', at('v2.qcow2')]);
    make('v3.qcow2', 'cluster_size=512');
    run('qemu-img', ['convert', '-O', 'vmdk', at('v3.qcow2'), at('x.vmdk')]);
    writeFileSync(at('x.raw'), Buffer.alloc(1000, 1));
    for (const [file, options, code, message] of [
      ['v2.qcow2', { size: 2 * MIB }, 'UNSUPPORTED_FEATURE', "Can't resize a v2 image which has snapshots"],
      ['v3.qcow2', { size: MIB + 1 }, 'INVALID_ARGUMENT', 'must be a multiple of 512'],
      ['v3.qcow2', { size: 2 ** 44 }, 'INVALID_ARGUMENT', 'too many for clusters of 512 bytes'],
      ['v3.qcow2', { size: 512 }, 'INVALID_ARGUMENT', 'Use the --shrink option'],
      ['v3.qcow2', { size: -512, relative: true }, 'INVALID_ARGUMENT', 'Use the --shrink option'],
      ['v3.qcow2', { size: -2 * MIB, relative: true, shrink: true }, 'INVALID_ARGUMENT', 'must be positive'],
      ['v3.qcow2', { size: 0, shrink: true }, 'INVALID_ARGUMENT', 'must be positive'],
      [
        'v3.qcow2',
        { size: 512, shrink: true, preallocation: 'full' },
        'INVALID_ARGUMENT',
        'only be used for growing',
      ],
      ['x.vmdk', { size: 2 * MIB }, 'UNSUPPORTED_FEATURE', ''],
      [
        'x.raw',
        { size: 2 * MIB, preallocation: 'metadata', format: 'raw' },
        'UNSUPPORTED_FEATURE',
        'metadata',
      ],
    ] as const) {
      copyFileSync(at(file), at('before'));
      await expect(engine.resizeImage(at(file), options)).rejects.toMatchObject({
        code: `ERR_STILLFRAME_${code}`,
        message: expect.stringContaining(message),
      });
      expect(readFileSync(at(file)).equals(readFileSync(at('before')))).toBe(true);
    }
    expect(existsSync(at('x.raw.partial'))).toBe(false);
  });
});

describe('resize of a raw image', () => {
  it.each(['off', 'falloc', 'full'] as const)(
    'grows one, preallocation %s, and shrinks it',
    async (preallocation) => {
      const data = new Random(2).noise(5000);
      writeFileSync(at('grow.raw'), data);
      expect(await engine.resizeImage(at('grow.raw'), { format: 'raw', size: 2 * MIB, preallocation })).toBe(
        2 * MIB,
      );
      expect(firstDifference(readFileSync(at('grow.raw')), expected(data, 2 * MIB))).toBe(-1);
      expect(statSync(at('grow.raw')).blocks * 512 >= 2 * MIB).toBe(preallocation !== 'off');
      const size = await engine.resizeImage(at('grow.raw'), {
        format: 'raw',
        size: -MIB,
        relative: true,
        shrink: true,
      });
      expect(size).toBe(MIB);
      expect(statSync(at('grow.raw')).size).toBe(MIB);
    },
  );
});
