import { mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type BackupOptions, createEngine, type Engine } from '#src/index.js';
import { stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

let engine: Engine;
let folder: string;
beforeAll(async () => {
  engine = await createEngine({ workers: 2 });
});
afterAll(() => engine.close());
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-compress-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const at = (name: string): string => join(folder, name);
const random = new Random(815);
const CLUSTER = 65536;

async function contentOf(path: string): Promise<Uint8Array> {
  const disk = await engine.openDisk(path, { format: 'qcow2', readOnly: true });
  try {
    return await disk.read(0, disk.length);
  } finally {
    await disk.close();
  }
}

/** Checks the image and what it holds. @returns how many of its clusters are compressed */
async function expectImage(path: string, truth: Uint8Array): Promise<number> {
  expect(firstDifference(await contentOf(path), truth)).toBe(-1);
  const check = await engine.checkImage(path);
  expect(check).toMatchObject({ 'check-errors': 0 });
  expect([check.corruptions, check.leaks]).toEqual([undefined, undefined]);
  if (hasPeer('qemu-img')) {
    writeFileSync(at('truth.raw'), truth);
    run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', at('truth.raw'), path]);
    run('qemu-img', ['check', '-q', path]);
  }
  return check['compressed-clusters'] ?? 0;
}

async function backUp(source: string, options: BackupOptions): Promise<void> {
  const disk = await engine.openDisk(source, { readOnly: true });
  try {
    await (await disk.backup(options)).result();
  } finally {
    await disk.close();
  }
}

describe('a compressed backup', () => {
  it.each([
    { compress: true, size: 2 << 20, type: 'zlib' },
    { compress: 'zlib', size: 3_000_320, type: 'zlib' },
    { compress: 'zstd', size: 3_000_320, type: 'zstd' },
    { compress: 'zlib', size: 1_000_448, targetClusterSize: 512, type: 'zlib' },
    { compress: 'zstd', size: 9_000_448, targetClusterSize: 2 << 20, type: 'zstd' },
    { compress: 'zlib', size: 512, type: 'zlib' },
  ] as const)('holds the drive: $compress, $size bytes', async ({ size, type, ...options }) => {
    const data = random.mixture(size, 50_000);
    data[0] = 1;
    if (size > 1 << 20) data.fill(0, 5 * CLUSTER, 9 * CLUSTER);
    writeFileSync(at('disk.raw'), data);
    await backUp(at('disk.raw'), { target: at('copy.qcow2'), format: 'qcow2', sync: 'full', ...options });
    expect(await expectImage(at('copy.qcow2'), data)).toBeGreaterThan(0);
    const info = await engine.imageInfo(at('copy.qcow2'));
    expect(info['format-specific']).toMatchObject({ data: { 'compression-type': type } });
    if (size > 1 << 20 && size < 9_000_000) {
      // Nothing is stored of zeroes.
      const range = ['--start-offset', `${5 * CLUSTER}`, '--max-length', `${4 * CLUSTER}`];
      const { stdout } = stillframe(['map', '--output', 'json', ...range, at('copy.qcow2')]);
      expect(JSON.parse(stdout)).toMatchObject([{ length: 4 * CLUSTER, zero: true, data: false }]);
    }
  });

  it('is smaller', async () => {
    writeFileSync(at('disk.raw'), Buffer.alloc(4 << 20, 'text that repeats. '));
    for (const compress of [false, 'zlib', 'zstd'] as const) {
      const target = at(`${compress}.qcow2`);
      await backUp(at('disk.raw'), { target, format: 'qcow2', sync: 'full', compress });
    }
    expect(statSync(at('zlib.qcow2')).size * 5).toBeLessThan(statSync(at('false.qcow2')).size);
    expect(statSync(at('zstd.qcow2')).size * 5).toBeLessThan(statSync(at('false.qcow2')).size);
  });

  it.each(['full', 'none'] as const)('holds the instant, whatever the guest writes (%s)', async (sync) => {
    const size = 8 << 20;
    const data = random.mixture(size, 50_000);
    await engine.createImage(at('disk.qcow2'), { format: 'qcow2', length: size });
    const disk = await engine.openDisk(at('disk.qcow2'));
    await disk.write(0, data);
    const target = at('copy.qcow2');
    // So slow that the guest is first nearly everywhere.
    const job = await disk.backup({ target, sync, compress: 'zstd', speed: 1 << 20 });
    const writes: Promise<void>[] = [];
    for (let index = 0; index < 40; index++) {
      const offset = random.between(0, size - 100_000);
      writes.push(disk.write(offset, random.noise(random.between(1, 100_000))));
    }
    await Promise.all(writes);
    if (sync === 'none') job.cancel();
    else job.setSpeed(0);
    const result = await job.result();
    await disk.close();
    expect(result.clusters.cbw).toBeGreaterThan(10);
    expect(await expectImage(target, data)).toBeGreaterThan(5);
  });

  it('holds the top layer alone', async () => {
    const base = random.mixture(2 << 20, 50_000);
    writeFileSync(at('base.raw'), base);
    const backing = { backingFile: 'base.raw', backingFormat: 'raw' } as const;
    await engine.createImage(at('top.qcow2'), { format: 'qcow2', ...backing });
    const disk = await engine.openDisk(at('top.qcow2'));
    const bytes = Buffer.alloc(3 * CLUSTER, 'abc');
    await disk.write(7 * CLUSTER, bytes);
    await disk.close();
    base.set(bytes, 7 * CLUSTER);
    await backUp(at('top.qcow2'), { target: at('copy.qcow2'), sync: 'top', compress: true });
    expect(await expectImage(at('copy.qcow2'), base)).toBe(3);
  });

  it('replaces what is in an existing image, in its type of compression', async () => {
    const size = 2 << 20;
    await engine.createImage(at('copy.qcow2'), { format: 'qcow2', length: size, compressionType: 'zstd' });
    const old = await engine.openDisk(at('copy.qcow2'));
    await old.write(0, random.noise(size));
    await old.close();
    for (const unit of [70_000, 40_000, 9_000]) {
      const data = random.mixture(size, unit);
      writeFileSync(at('disk.raw'), data);
      const target = { target: at('copy.qcow2'), existing: true, sync: 'full' } as const;
      await backUp(at('disk.raw'), { ...target, compress: true });
      expect(await expectImage(at('copy.qcow2'), data)).toBeGreaterThan(5);
    }
  });

  it('is refused where nothing can be compressed', async () => {
    writeFileSync(at('disk.raw'), Buffer.alloc(CLUSTER, 1));
    const refused = async (options: Partial<BackupOptions>, code: string, message: string) => {
      const before = readdirSync(folder).sort();
      await expect(
        backUp(at('disk.raw'), { target: at('copy'), sync: 'full', compress: true, ...options }),
      ).rejects.toMatchObject({
        code: `ERR_STILLFRAME_${code}`,
        message: expect.stringContaining(message),
      });
      expect(readdirSync(folder).sort()).toEqual(before);
    };
    const unsupported = 'Compression not supported for this file format';
    await refused({ format: 'raw' }, 'UNSUPPORTED_FEATURE', unsupported);
    await refused({}, 'UNSUPPORTED_FEATURE', unsupported);
    writeFileSync(at('old.raw'), Buffer.alloc(CLUSTER));
    await refused(
      { target: at('old.raw'), format: 'raw', existing: true },
      'UNSUPPORTED_FEATURE',
      unsupported,
    );
    await engine.createImage(at('zstd'), { format: 'qcow2', length: CLUSTER, compressionType: 'zstd' });
    await refused({ target: at('zstd'), existing: true, compress: 'zlib' }, 'INVALID_ARGUMENT', 'type zstd');
    // @ts-expect-error not one of the types
    await refused({ compress: 'lzma' }, 'INVALID_ARGUMENT', "not 'lzma'");
  });
});

describe('stillframe backup --compress', () => {
  it.each([
    [['--compress'], 'zlib'],
    [['--compress', 'zstd'], 'zstd'],
    [['--compress=zlib'], 'zlib'],
  ])('%s', (words, type) => {
    writeFileSync(at('disk.raw'), Buffer.alloc(300_032, 'data'));
    const args = ['backup', '--sync', 'full', '--format', 'qcow2', '-q', ...words, 'disk.raw', 'copy.qcow2'];
    expect(stillframe(args, { cwd: folder })).toEqual({ status: 0, stdout: '', stderr: '' });
    const info = stillframe(['info', 'copy.qcow2'], { cwd: folder }).stdout;
    expect(info).toContain(`compression type: ${type}`);
    expect(stillframe(['check', 'copy.qcow2'], { cwd: folder }).stdout).toContain('100.00% compressed');
    expect(stillframe(['compare', 'disk.raw', 'copy.qcow2'], { cwd: folder }).status).toBe(0);
  });

  it('takes no other word, and no raw target', () => {
    writeFileSync(at('disk.raw'), Buffer.alloc(CLUSTER, 'data'));
    const args = ['backup', 'disk.raw', 'copy', '--sync', 'full'];
    expect(stillframe([...args, '--compress=lzma'], { cwd: folder })).toMatchObject({
      status: 1,
      stderr: "stillframe: --compress takes zlib, zstd, not 'lzma' [ERR_STILLFRAME_INVALID_ARGUMENT]\n",
    });
    expect(stillframe([...args, '--compress'], { cwd: folder })).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('[ERR_STILLFRAME_UNSUPPORTED_FEATURE]'),
    });
    expect(readdirSync(folder)).toEqual(['disk.raw']);
  });
});
