/** Image fleecing: guests save old data to a scratch file, and never wait for the target. */
import { spawn } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine } from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const LENGTH = 16 << 20;
let engine: Engine;
let folder: string;
const at = (name: string): string => join(folder, name);
const random = new Random(99);

beforeAll(async () => {
  engine = await createEngine({ workers: 2 });
});
afterAll(() => engine.close());
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-fleece-'));
});
afterEach(() => rmSync(folder, { recursive: true, force: true }));

async function openRaw(): Promise<{ readonly disk: Disk; readonly content: Uint8Array }> {
  const content = random.bytes(LENGTH).fill(0, 4 << 20, 5 << 20);
  writeFileSync(at('disk'), content);
  return { disk: await engine.openDisk(at('disk'), { format: 'raw' }), content };
}

async function contentOf(path: string, format: 'raw' | 'qcow2'): Promise<Uint8Array> {
  const disk = await engine.openDisk(path, { format, readOnly: true });
  try {
    return await disk.read(0, disk.length);
  } finally {
    await disk.close();
  }
}

/** Bytes on the disk of the scratch files that this process has open. They have no names. */
function scratchBytes(): number[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    const link = `/proc/self/fd/${fd}`;
    try {
      const isScratch = readlinkSync(link).startsWith(at('')) && readlinkSync(link).includes('.frozen-');
      return isScratch ? [statSync(link).blocks * 512] : [];
    } catch {
      return [];
    }
  });
}

/** Writes, zeroes and discards at random, on a drive that does as it is told. */
async function scribble(disk: Disk, requests: number): Promise<void> {
  for (let request = 0; request < requests; request++) {
    const length = random.between(1, 200_000);
    const offset = random.between(0, disk.length - length);
    const kind = random.between(0, 9);
    if (kind === 0) await disk.discard(offset, length);
    else if (kind === 1) await disk.writeZeroes(offset, length, { unmap: true });
    else await disk.write(offset, random.bytes(length));
  }
}

describe('a backup with fleecing', () => {
  it.each(['raw', 'qcow2'] as const)('is the drive at its instant (to %s)', async (format) => {
    const { disk, content } = await openRaw();
    for (let round = 0; round < 3; round++) {
      const instant = round === 0 ? content : await disk.read(0, disk.length);
      const target = at(`target${round}`);
      const job = await disk.backup({ target, sync: 'full', format, fleece: true, speed: 65536 });
      await Promise.all([scribble(disk, 40), scribble(disk, 40), scribble(disk, 40)]);
      job.setSpeed(0);
      const result = await job.result();
      expect(result.clusters.cbw).toBeGreaterThan(0);
      expect(firstDifference(await contentOf(target, format), instant)).toBe(-1);
    }
    await disk.close();
    expect(scratchBytes()).toEqual([]);
    expect(readdirSync(folder).sort()).toEqual(['disk', 'target0', 'target1', 'target2']);
  });

  it.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io')).each(['64k', '4k'])(
    'copies in sync mode top what the overlay held at the instant, and nothing that guests write later (clusters of %s)',
    async (clusterSize) => {
      writeFileSync(at('base'), random.bytes(LENGTH));
      const how = ['-o', `cluster_size=${clusterSize}`, '-b', at('base'), '-F', 'raw'];
      run('qemu-img', ['create', '-q', '-f', 'qcow2', ...how, at('disk')]);
      run('qemu-io', [
        '-c',
        'write -P 1 1M 1M',
        '-c',
        'write -z 3M 1M',
        '-c',
        'write -P 2 9M 4k',
        at('disk'),
      ]);
      const disk = await engine.openDisk(at('disk'), { format: 'qcow2' });
      const instant = await disk.read(0, LENGTH);
      const job = await disk.backup({ target: at('target'), sync: 'top', fleece: true, speed: 1 << 20 });
      // Beside what the overlay holds of a cluster that is copied.
      await disk.write((9 << 20) + 16384, random.bytes(4096));
      await scribble(disk, 60);
      job.setSpeed(0);
      const result = await job.result();
      await disk.close();
      expect(firstDifference(await contentOf(at('target'), 'qcow2'), instant)).toBe(-1);
      run('qemu-img', ['check', '-q', at('target')]);
      // 16 clusters written, 16 of zeroes, one more.
      expect(result.clusters.planned).toBe(33);
    },
  );

  it.skipIf(!hasPeer('qemu-nbd'))('lets guests write while the target takes nothing', async () => {
    const { disk, content } = await openRaw();
    writeFileSync(at('far'), Buffer.alloc(LENGTH));
    const server = spawn('qemu-nbd', ['-t', '-f', 'raw', '-k', at('socket'), at('far')], { stdio: 'ignore' });
    try {
      while (!existsSync(at('socket'))) await new Promise((resolve) => setTimeout(resolve, 10));
      const target = `nbd+unix:///?socket=${at('socket')}`;
      const job = await disk.backup({ target, sync: 'full', fleece: true, speed: 65536 });
      server.kill('SIGSTOP');
      job.setSpeed(0);
      await scribble(disk, 50);
      expect(job.status).toBe('running');
      server.kill('SIGCONT');
      await job.result();
      await disk.close();
      expect(firstDifference(readFileSync(at('far')), content)).toBe(-1);
    } finally {
      server.kill('SIGKILL');
    }
  });

  it('gives the scratch file back as it copies', async () => {
    const { disk, content } = await openRaw();
    const job = await disk.backup({
      ...{ target: at('target'), sync: 'full', format: 'raw', fleece: at('') },
      autoFinalize: false,
    });
    job.pause();
    await disk.write(0, random.bytes(8 << 20));
    await disk.writeZeroes(12 << 20, 1 << 20);
    job.resume();
    await new Promise<void>((resolve) => {
      if (job.status === 'pending') resolve();
      job.on('pending', resolve);
    });
    // All of it is in the target by now: nothing is left in the scratch file.
    expect(scratchBytes()).toEqual([0]);
    await disk.write(0, random.bytes(1 << 20));
    expect(scratchBytes()).toEqual([0]);
    job.finalize();
    await job.result();
    expect(scratchBytes()).toEqual([]);
    await disk.close();
    expect(firstDifference(readFileSync(at('target')), content)).toBe(-1);
  });

  it('holds the old data in the scratch file until it is copied', async () => {
    const { disk, content } = await openRaw();
    mkdirSync(at('scratch'));
    const job = await disk.backup({
      ...{ target: at('target'), sync: 'full', format: 'raw', speed: 65536, fleece: at('scratch') },
    });
    await disk.write(8 << 20, random.bytes(8 << 20));
    const [held = 0] = scratchBytes();
    expect(held).toBeGreaterThan(6 << 20);
    expect(readdirSync(at('scratch'))).toEqual([]);
    job.setSpeed(0);
    await job.result();
    await disk.close();
    expect(firstDifference(readFileSync(at('target')), content)).toBe(-1);
  });

  it('leaves nothing behind when it is cancelled', async () => {
    const { disk } = await openRaw();
    const used = engine.arena.usedBytes;
    const job = await disk.backup({ target: at('target'), sync: 'full', fleece: true, speed: 65536 });
    await disk.write(8 << 20, random.bytes(1 << 20));
    job.cancel();
    await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(scratchBytes()).toEqual([]);
    expect(existsSync(at('target'))).toBe(false);
    await disk.write(0, random.bytes(65536));
    await disk.close();
    expect(engine.arena.usedBytes).toBeLessThanOrEqual(used);
  });

  it('is refused where it makes no sense, or the scratch file cannot be made', async () => {
    const { disk } = await openRaw();
    const used = engine.arena.usedBytes;
    await expect(
      disk.backup({ target: at('target'), sync: 'none', format: 'qcow2', fleece: true }),
    ).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_INVALID_ARGUMENT',
    });
    await expect(
      disk.backup({ target: at('target'), sync: 'full', fleece: at('nowhere') }),
    ).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NOT_FOUND' });
    expect(readdirSync(folder)).toEqual(['disk']);
    expect(engine.arena.usedBytes).toBe(used);
    await disk.close();
  });
});
