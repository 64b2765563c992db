import {
  existsSync,
  linkSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import {
  type BackupOptions,
  type BackupResult,
  createEngine,
  type Disk,
  type Engine,
  type SyncMode,
} from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

let engine: Engine;
let folder: string;
beforeAll(async () => {
  engine = await createEngine();
});
afterAll(() => engine.close());
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-modes-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

const at = (name: string): string => join(folder, name);
const random = new Random(4711);

async function backup(disk: Disk, options: BackupOptions): Promise<BackupResult> {
  return (await disk.backup(options)).result();
}

async function contentOf(path: string, format: 'raw' | 'qcow2'): Promise<Uint8Array> {
  const disk = await engine.openDisk(path, { format, readOnly: true, forceShare: true });
  try {
    return await disk.read(0, disk.length);
  } finally {
    await disk.close();
  }
}

/** A base with data everywhere in its first half and an overlay with data, zeroes and discards on top. */
async function makeChain(length = 4 << 20): Promise<{ overlay: string; disk: Disk }> {
  writeFileSync(at('base.raw'), random.bytes(length / 2));
  await engine.createImage(at('overlay.qcow2'), {
    format: 'qcow2',
    length,
    backingFile: 'base.raw',
    backingFormat: 'raw',
  });
  const disk = await engine.openDisk(at('overlay.qcow2'));
  await disk.write(100_000, random.bytes(300_000).fill(1, 0, 1000));
  await disk.write(length - 70_000, new Uint8Array(70_000).fill(5));
  await disk.writeZeroes(1 << 20, 200_000);
  return { overlay: at('overlay.qcow2'), disk };
}

function qemuAgrees(target: string, format: string, truth: Uint8Array): void {
  if (!hasPeer('qemu-img')) return;
  writeFileSync(at('truth.raw'), truth);
  run('qemu-img', ['compare', '-U', '-f', format, '-F', 'raw', target, at('truth.raw')]);
  if (format === 'qcow2') run('qemu-img', ['check', '-q', '-U', target]);
}

describe('sync mode full', () => {
  it.each(['raw', 'qcow2'] as const)('copies the whole chain to %s', async (format) => {
    const { disk } = await makeChain();
    const truth = await disk.read(0, disk.length);
    const result = await backup(disk, { target: at('target'), format, sync: 'full' });
    await disk.close();
    expect(result.clusters.total).toBe(64);
    expect(result.clusters.planned).toBe(64);
    expect(result.clusters.copied + result.clusters.zero).toBe(64);
    expect(result.clusters.zero).toBeGreaterThan(10);
    expect(firstDifference(await contentOf(at('target'), format), truth)).toBe(-1);
    qemuAgrees(at('target'), format, truth);
    expect(existsSync(at('target.partial'))).toBe(false);
    const info = await engine.imageInfo(at('target'));
    expect(info['backing-filename']).toBeUndefined();
  });

  it.each([777, 4097, 512, 65536 + 1, 3_000_000])(
    'copies an image of %d bytes to its last byte',
    async (size) => {
      const data = random.bytes(size).fill(0x5a, size - 1);
      writeFileSync(at('odd.raw'), data);
      const disk = await engine.openDisk(at('odd.raw'), { format: 'raw', readOnly: true });
      for (const format of ['raw', 'qcow2'] as const) {
        const result = await backup(disk, { target: at(`odd.${format}.copy`), format, sync: 'full' });
        expect(result.virtualSize).toBe(Math.ceil(size / 512) * 512);
        const copy = await contentOf(at(`odd.${format}.copy`), format);
        expect(firstDifference(copy.subarray(0, size), data)).toBe(-1);
        expect(copy.subarray(size).every((byte) => byte === 0)).toBe(true);
        if (hasPeer('qemu-img')) {
          run('qemu-img', ['compare', '-f', 'raw', '-F', format, at('odd.raw'), at(`odd.${format}.copy`)]);
        }
      }
      await disk.close();
    },
  );

  it.each(['raw', 'qcow2'] as const)('completes on an empty image (%s)', async (format) => {
    writeFileSync(at('empty.raw'), '');
    const disk = await engine.openDisk(at('empty.raw'), { format: 'raw', readOnly: true });
    const result = await backup(disk, { target: at('copy'), format, sync: 'full' });
    await disk.close();
    expect(result.clusters).toEqual({ total: 0, planned: 0, copied: 0, zero: 0, cbw: 0 });
    expect(result.virtualSize).toBe(0);
    if (hasPeer('qemu-img'))
      run('qemu-img', ['compare', '-f', 'raw', '-F', format, at('empty.raw'), at('copy')]);
  });

  it('keeps holes and zeroes out of the target', async () => {
    writeFileSync(at('sparse.raw'), new Uint8Array(1 << 20));
    truncateSync(at('sparse.raw'), 64 << 20);
    const disk = await engine.openDisk(at('sparse.raw'), { format: 'raw', readOnly: true });
    const result = await backup(disk, { target: at('copy.raw'), sync: 'full' });
    await disk.close();
    expect(result.clusters.copied).toBe(0);
    expect(result.clusters.zero).toBe(1024);
    expect(statSync(at('copy.raw')).size).toBe(64 << 20);
    expect(statSync(at('copy.raw')).blocks * 512).toBeLessThan(65536);
  });

  it.skipIf(!hasPeer('qemu-img'))('does not read what was preallocated and never written', async () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', at('pre.qcow2'), '1G']);
    const disk = await engine.openDisk(at('pre.qcow2'));
    const data = random.noise(300_000);
    await disk.write(500 << 20, data);
    const result = await backup(disk, { target: at('copy.qcow2'), sync: 'full' });
    expect(result.bytes.read).toBeLessThan(1 << 20);
    await disk.close();
    run('qemu-img', ['compare', at('pre.qcow2'), at('copy.qcow2')]);
  });

  it('copies in clusters of at least 64 KiB and at least a cluster of the target', async () => {
    writeFileSync(at('disk.raw'), random.bytes(4 << 20));
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    for (const [targetClusterSize, clusterSize] of [
      [512, 65536],
      [65536, 65536],
      [1 << 19, 1 << 19],
      [2 << 20, 2 << 20],
    ] as const) {
      const options = {
        target: at('copy.qcow2'),
        format: 'qcow2' as const,
        sync: 'full' as const,
        force: true,
      };
      const result = await backup(disk, { ...options, targetClusterSize });
      expect(result.clusterSize).toBe(clusterSize);
      qemuAgrees(at('copy.qcow2'), 'qcow2', readFileSync(at('disk.raw')));
    }
    await disk.close();
  });

  it('has one checksum for one content, whatever the format, the threads and the holes', async () => {
    const data = random.bytes(3 << 20).fill(0, 1 << 20, 2 << 20);
    writeFileSync(at('disk.raw'), data);
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    const roots = new Set<string>();
    for (const format of ['raw', 'qcow2'] as const) {
      for (const workers of [1, 3]) {
        roots.add(
          (await backup(disk, { target: at('copy'), format, sync: 'full', workers, force: true })).checksum
            .root,
        );
      }
    }
    await disk.close();
    const copy = await engine.openDisk(at('copy'), { format: 'qcow2', readOnly: true });
    roots.add((await backup(copy, { target: at('again.raw'), format: 'raw', sync: 'full' })).checksum.root);
    await copy.close();
    expect(roots.size).toBe(1);
    data[12345] = (data[12345] ?? 0) ^ 1;
    writeFileSync(at('other.raw'), data);
    const other = await engine.openDisk(at('other.raw'), { format: 'raw', readOnly: true });
    roots.add((await backup(other, { target: at('other.copy'), sync: 'full' })).checksum.root);
    await other.close();
    expect(roots.size).toBe(2);
  });
});

describe('sync mode top', () => {
  it('copies what the top image holds and keeps its backing file', async () => {
    const { disk, overlay } = await makeChain();
    const truth = await disk.read(0, disk.length);
    const result = await backup(disk, { target: at('target.qcow2'), sync: 'top' });
    await disk.close();
    // 100000..400000 touches clusters 1 to 6, the zeroes 16 to 19, the tail two more.
    expect(result.clusters.planned).toBe(6 + 4 + 2);
    expect(result.clusters.copied + result.clusters.zero).toBe(result.clusters.planned);
    const [source, target] = [await engine.imageInfo(overlay), await engine.imageInfo(at('target.qcow2'))];
    expect(target['backing-filename']).toBe(source['backing-filename']);
    expect(target['backing-filename-format']).toBe('raw');
    expect(firstDifference(await contentOf(at('target.qcow2'), 'qcow2'), truth)).toBe(-1);
    qemuAgrees(at('target.qcow2'), 'qcow2', truth);
    if (hasPeer('qemu-img')) {
      const map = run('qemu-img', ['map', '-U', '--output=json', at('target.qcow2')]);
      const depths: { start: number; depth: number }[] = JSON.parse(map);
      expect(depths.find(({ start }) => start === 0)?.depth).toBe(1);
    }
  });

  it('names the backing file by its full path from another folder', async () => {
    const { disk } = await makeChain();
    const other = mkdtempSync(join(tmpdir(), 'stillframe-other-'));
    try {
      await backup(disk, { target: join(other, 'target.qcow2'), sync: 'top' });
      const info = await engine.imageInfo(join(other, 'target.qcow2'));
      expect(info['backing-filename']).toBe(at('base.raw'));
    } finally {
      await disk.close();
      rmSync(other, { recursive: true });
    }
  });

  it('is refused for a raw target', async () => {
    const { disk } = await makeChain();
    await expect(disk.backup({ target: at('t.raw'), format: 'raw', sync: 'top' })).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_BACKING_UNSUPPORTED',
      message: expect.stringContaining("Backing file not supported for file format 'raw'"),
    });
    expect(existsSync(at('t.raw'))).toBe(false);
    expect(existsSync(at('t.raw.partial'))).toBe(false);
    await disk.close();
  });

  it.each(['raw', 'qcow2'] as const)('is full where there is no backing file (%s)', async (format) => {
    const data = random.bytes(1 << 20);
    writeFileSync(at('alone.raw'), data);
    const disk = await engine.openDisk(at('alone.raw'), { format: 'raw', readOnly: true });
    const result = await backup(disk, { target: at('copy'), format, sync: 'top' });
    await disk.close();
    expect(result.clusters.planned).toBe(16);
    expect(firstDifference(await contentOf(at('copy'), format), data)).toBe(-1);
  });

  it('takes the truth of the instant: what is allocated later is not copied', async () => {
    const { disk } = await makeChain(32 << 20);
    const truth = await disk.read(0, disk.length);
    const job = await disk.backup({ target: at('target.qcow2'), sync: 'top', speed: 1 });
    for (let offset = 8 << 20; offset < 24 << 20; offset += 1 << 20)
      await disk.write(offset + 777, random.bytes(5000));
    job.setSpeed(0);
    const result = await job.result();
    await disk.close();
    expect(result.clusters.planned).toBe(12);
    expect(firstDifference(await contentOf(at('target.qcow2'), 'qcow2'), truth)).toBe(-1);
  });
});

describe('sync mode none', () => {
  it('saves only what is overwritten; target and source are the instant', async () => {
    const { disk, overlay } = await makeChain();
    const truth = await disk.read(0, disk.length);
    const job = await disk.backup({ target: at('target.qcow2'), sync: 'none' });
    await disk.write(5, random.bytes(10));
    await disk.write(1 << 20, random.bytes(200_000));
    await disk.discard(131072, 131072);
    await disk.writeZeroes(disk.length - 512, 512);
    await disk.flush();
    expect(job.snapshot().clusters.cbw).toBeGreaterThan(0);
    job.cancel();
    const result = await job.result();
    expect(result.outcome).toBe('cancelled');
    expect(result.clusters.planned).toBe(0);
    expect(result.clusters.copied + result.clusters.zero).toBe(1 + 4 + 2 + 1);
    const info = await engine.imageInfo(at('target.qcow2'));
    expect(info['full-backing-filename'] ?? info['backing-filename']).toBe(overlay);
    expect(firstDifference(await contentOf(at('target.qcow2'), 'qcow2'), truth)).toBe(-1);
    await disk.close();
    qemuAgrees(at('target.qcow2'), 'qcow2', truth);
  });

  it.each([false, true])('is refused for a raw target (existing: %s)', async (existing) => {
    const { disk } = await makeChain();
    if (existing) await engine.createImage(at('t.raw'), { format: 'raw', length: disk.length });
    const wanted = { target: at('t.raw'), format: 'raw', sync: 'none', existing } as const;
    await expect(disk.backup(wanted)).rejects.toMatchObject({ code: 'ERR_STILLFRAME_BACKING_UNSUPPORTED' });
    await disk.close();
  });
});

describe('an existing target', () => {
  it.each(['raw', 'qcow2'] as const)('is overwritten in place (%s)', async (format) => {
    const data = random.bytes(2 << 20).fill(0, 1 << 20, (1 << 20) + 300_000);
    writeFileSync(at('disk.raw'), data);
    if (format === 'raw') {
      writeFileSync(at('target'), new Uint8Array(2 << 20).fill(0xee));
    } else {
      await engine.createImage(at('target'), { format, length: 2 << 20 });
      const old = await engine.openDisk(at('target'));
      await old.write(0, new Uint8Array(2 << 20).fill(0xee));
      await old.close();
    }
    const inode = statSync(at('target')).ino;
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    await backup(disk, { target: at('target'), format, sync: 'full', existing: true });
    await disk.close();
    expect(statSync(at('target')).ino).toBe(inode);
    expect(firstDifference(await contentOf(at('target'), format), data)).toBe(-1);
    qemuAgrees(at('target'), format, data);
  });

  it('of another size is refused', async () => {
    writeFileSync(at('disk.raw'), new Uint8Array(1 << 20));
    writeFileSync(at('target'), new Uint8Array(2 << 20));
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    await expect(
      disk.backup({ target: at('target'), format: 'raw', sync: 'full', existing: true }),
    ).rejects.toMatchObject({ code: 'ERR_STILLFRAME_SIZE_MISMATCH' });
    await disk.close();
  });
});

describe('a target that must not be', () => {
  it.each<[string, (path: string) => void]>([
    ['the source itself', () => undefined],
    ['a symbolic link to the source', (path) => symlinkSync(at('overlay.qcow2'), path)],
    ['a hard link to the source', (path) => linkSync(at('overlay.qcow2'), path)],
    ['a link to the backing file', (path) => symlinkSync(at('base.raw'), path)],
  ])('is refused: %s', async (what, make) => {
    const { disk, overlay } = await makeChain();
    const before = await disk.read(0, disk.length);
    const target = what === 'the source itself' ? overlay : at('link');
    make(target);
    for (const flags of [{}, { force: true }, { existing: true }]) {
      await expect(disk.backup({ target, format: 'qcow2', sync: 'full', ...flags })).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_SAME_NODE',
      });
    }
    await disk.close();
    expect(firstDifference(await contentOf(overlay, 'qcow2'), before)).toBe(-1);
  });

  it('is not replaced unasked, and with force only at the commit point', async () => {
    writeFileSync(at('disk.raw'), random.bytes(1 << 20));
    writeFileSync(at('target'), 'precious');
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    await expect(disk.backup({ target: at('target'), sync: 'full' })).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_TARGET_EXISTS',
    });
    const job = await disk.backup({ target: at('target'), sync: 'full', force: true, autoFinalize: false });
    await new Promise((resolve) => job.once('pending', () => resolve(undefined)));
    expect(readFileSync(at('target'), 'utf8')).toBe('precious');
    job.cancel();
    await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(readFileSync(at('target'), 'utf8')).toBe('precious');
    expect(existsSync(at('target.partial'))).toBe(false);
    await backup(disk, { target: at('target'), sync: 'full', force: true });
    expect(readFileSync(at('target')).equals(readFileSync(at('disk.raw')))).toBe(true);
    await disk.close();
  });

  it.each<[string, BackupOptions & { sync: SyncMode }]>([
    ['a missing folder', { target: '/nonexistent/folder/t', sync: 'full' }],
    ['a negative speed', { target: 't', sync: 'full', speed: -1 }],
    ['no workers', { target: 't', sync: 'full', workers: 0 }],
    ['a bad job id', { target: 't', sync: 'full', jobId: '1bad!' }],
    ['a bad cluster size', { target: 't', sync: 'full', targetClusterSize: 65535 }],
  ])('%s is refused with a code', async (_what, options) => {
    writeFileSync(at('disk.raw'), new Uint8Array(512));
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    await expect(disk.backup(options)).rejects.toMatchObject({
      code: expect.stringMatching(/^ERR_STILLFRAME_(NOT_FOUND|INVALID_ARGUMENT)$/),
    });
    await disk.close();
  });
});
