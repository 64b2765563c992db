import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import {
  type BackupJob,
  type BackupOptions,
  createEngine,
  type Disk,
  type Engine,
  type JobStatus,
} from '#src/index.js';
import { Random } from '../support/data.js';

const MiB = 1 << 20;
let engine: Engine;
let folder: string;
let disk: Disk;
beforeAll(async () => {
  engine = await createEngine();
});
afterAll(() => engine.close());
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-job-'));
  writeFileSync(at('disk.raw'), new Random(99).bytes(8 * MiB).fill(1, 0, 8 * MiB));
  disk = await engine.openDisk(at('disk.raw'), { format: 'raw' });
});
afterEach(async () => {
  await disk.close();
  rmSync(folder, { recursive: true, force: true });
});

const at = (name: string): string => join(folder, name);
const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));
const until = async (condition: () => boolean): Promise<void> => {
  for (let tries = 0; !condition(); tries++) {
    if (tries > 2000) throw new Error('the condition never came true');
    await sleep(5);
  }
};

function start(options: Partial<BackupOptions> = {}): Promise<BackupJob> {
  return disk.backup({ target: at('target.raw'), sync: 'full', ...options });
}

function watch(job: BackupJob): JobStatus[] {
  const seen: JobStatus[] = [];
  job.on('status', (status) => seen.push(status));
  return seen;
}

describe('statuses', () => {
  it('go the way of QEMU on success', async () => {
    const job = await start();
    const seen = watch(job);
    await job.result();
    expect(seen).toEqual(['running', 'waiting', 'pending', 'concluded', 'null']);
    expect(job.status).toBe('null');
  });

  it('go through aborting when cancelled', async () => {
    const job = await start({ speed: MiB });
    const seen = watch(job);
    job.cancel();
    await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(seen).toEqual(['running', 'aborting', 'concluded', 'null']);
  });

  it('wait in pending without auto-finalize and in concluded without auto-dismiss', async () => {
    const job = await start({ autoFinalize: false, autoDismiss: false });
    const seen = watch(job);
    await until(() => job.status === 'pending');
    expect(() => job.setSpeed(1)).toThrowError(
      `Job '${job.id}' in state 'pending' cannot accept command verb 'set-speed'`,
    );
    expect(existsSync(at('target.raw'))).toBe(false);
    await disk.write(0, new Uint8Array(MiB).fill(2));
    job.finalize();
    await job.result();
    expect(existsSync(at('target.raw'))).toBe(true);
    expect(job.status).toBe('concluded');
    expect(() => job.cancel()).toThrowError(/cannot accept command verb 'cancel'/);
    job.dismiss();
    expect(seen.at(-1)).toBe('null');
    const copy = await engine.openDisk(at('target.raw'), { format: 'raw', readOnly: true });
    expect((await copy.read(0, MiB)).every((byte) => byte === 1)).toBe(true);
    await copy.close();
  });
});

describe('verbs', () => {
  it('pause stops the copy, copy-before-write goes on, resume ends it', async () => {
    const job = await start({ speed: 4 * MiB, workers: 2 });
    job.pause();
    expect(() => job.pause()).toThrowError('Job is already paused');
    await until(() => job.status === 'paused');
    const before = job.snapshot();
    await sleep(100);
    expect(job.snapshot().offset).toBe(before.offset);
    await disk.write(7 * MiB, new Uint8Array(65536).fill(9));
    expect(job.snapshot().clusters.cbw).toBe(1);
    job.setSpeed(0);
    job.resume();
    expect(() => job.resume()).toThrowError("Can't resume a job that was not paused");
    const result = await job.result();
    expect(result.clusters.copied).toBe(128);
    expect(result.clusters.cbw).toBe(1);
  });

  it('a paused job can be cancelled', async () => {
    const job = await start({ speed: MiB });
    job.pause();
    await until(() => job.status === 'paused');
    job.cancel();
    await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(existsSync(at('target.raw.partial'))).toBe(false);
  });

  it('speed limits the copy and a new speed wakes it', async () => {
    const started = performance.now();
    const job = await start({ speed: 4 * MiB, workers: 1 });
    await until(() => job.snapshot().offset >= 2 * MiB);
    const { offset } = job.snapshot();
    // The first run passes at once, then 4 MiB a second.
    expect(offset).toBeLessThanOrEqual(MiB + ((performance.now() - started) / 1000) * 4 * MiB + MiB);
    // The rest would take weeks.
    job.setSpeed(1);
    await sleep(20);
    job.setSpeed(0);
    await job.result();
    expect(() => job.setSpeed(-1)).toThrowError("Parameter 'speed' expects a non-negative value");
  });

  it('an AbortSignal cancels and its reason is the error', async () => {
    const controller = new AbortController();
    const job = await start({ speed: MiB, signal: controller.signal });
    const reason = new Error('enough');
    controller.abort(reason);
    await expect(job.result()).rejects.toBe(reason);
    expect(existsSync(at('target.raw.partial'))).toBe(false);
    await expect(start({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });
});

describe('progress', () => {
  it('never goes back and ends at the whole length', async () => {
    const job = await start({ speed: 20 * MiB });
    let last = -1;
    let states = 0;
    for await (const { offset, length } of job.progress(10)) {
      expect(offset).toBeGreaterThanOrEqual(last);
      expect(length).toBe(8 * MiB);
      last = offset;
      states++;
    }
    expect(last).toBe(8 * MiB);
    expect(states).toBeGreaterThan(3);
  });

  it('need not be consumed for the job to end', async () => {
    const job = await start();
    const iterator = job.progress();
    await iterator.next();
    await job.result();
  });
});

describe('several jobs at once', () => {
  it('hold several instants of one disk', async () => {
    const jobs: BackupJob[] = [];
    for (let index = 0; index < 3; index++) {
      await disk.write(index * MiB, new Uint8Array(MiB).fill(10 + index));
      jobs.push(await start({ target: at(`t${index}.raw`), speed: 2 * MiB }));
    }
    await disk.write(0, new Uint8Array(8 * MiB).fill(99));
    for (const job of jobs) {
      try {
        job.setSpeed(0);
      } catch (error) {
        // What guests wrote to was copied for them: nothing may be left to do.
        expect(error).toMatchObject({ code: 'ERR_STILLFRAME_JOB_VERB' });
      }
    }
    for (const [index, job] of jobs.entries()) {
      await job.result();
      const copy = await engine.openDisk(at(`t${index}.raw`), { format: 'raw', readOnly: true });
      const data = await copy.read(0, 8 * MiB);
      await copy.close();
      for (let chunk = 0; chunk < 8; chunk++) {
        const expected = chunk <= index ? 10 + chunk : 1;
        expect(data.subarray(chunk * MiB, (chunk + 1) * MiB).every((byte) => byte === expected)).toBe(true);
      }
    }
  });

  it('leave no memory behind', async () => {
    await (await start()).result();
    const before = engine.arena.usedBytes;
    for (let index = 0; index < 5; index++) {
      const job = await start({ force: true, speed: index % 2 ? MiB : 0 });
      if (index % 2) job.cancel();
      await job.result().catch(() => undefined);
    }
    expect(engine.arena.usedBytes).toBe(before);
  });
});

describe('closing', () => {
  it('a disk cancels its jobs and refuses requests afterwards', async () => {
    const job = await start({ speed: MiB });
    await disk.close();
    await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(existsSync(at('target.raw.partial'))).toBe(false);
    await expect(disk.read(0, 1)).rejects.toMatchObject({ code: 'ERR_STILLFRAME_CLOSED' });
    await expect(start()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_CLOSED' });
  });
});

describe('requests', () => {
  it('out of range are refused and change nothing', async () => {
    for (const [offset, length] of [
      [8 * MiB, 1],
      [-1, 1],
      [8 * MiB - 1, 2],
      [0.5, 1],
      [2 ** 53, 1],
    ] as const) {
      const error = { code: 'ERR_STILLFRAME_OUT_OF_RANGE' };
      await expect(disk.read(offset, length)).rejects.toMatchObject(error);
      await expect(disk.write(offset, new Uint8Array(length))).rejects.toMatchObject(error);
      await expect(disk.writeZeroes(offset, length)).rejects.toMatchObject(error);
      await expect(disk.discard(offset, length)).rejects.toMatchObject(error);
    }
  });

  it('that change a read-only disk are refused', async () => {
    await disk.close();
    const frozen = await engine.openDisk(at('disk.raw'), { format: 'raw', readOnly: true });
    await expect(frozen.write(0, new Uint8Array(1))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_READ_ONLY',
    });
    await expect(frozen.discard(0, 1)).rejects.toMatchObject({ code: 'ERR_STILLFRAME_READ_ONLY' });
    await frozen.flush();
    await frozen.close();
  });

  it('of many MiB are carried out whole', async () => {
    const data = new Random(5).bytes(5 * MiB + 777);
    await disk.write(123, data);
    expect(Buffer.compare(await disk.read(123, data.length), data)).toBe(0);
  });
});

describe('an engine', () => {
  it('ends at any moment, its threads still starting or not, and only once', async () => {
    for (let round = 0; round < 12; round++) {
      const short = await createEngine({ workers: 2 });
      if (round % 3 === 1)
        await short.openDisk(at('disk.raw'), { format: 'raw', forceShare: true, readOnly: true });
      if (round % 3 === 2) await new Promise((resolve) => setTimeout(resolve, round * 5));
      await Promise.all([short.close(), short.close()]);
      await expect(short.openDisk(at('disk.raw'))).rejects.toMatchObject({ code: 'ERR_STILLFRAME_CLOSED' });
    }
  });
});

describe('a disk that is too large', () => {
  it.each([
    [2 ** 48, 'ERR_STILLFRAME_INVALID_ARGUMENT', '2147483647'],
    [2 ** 47 - 2 ** 21, 'ERR_STILLFRAME_ARENA_EXHAUSTED', 'larger clusters'],
  ])('for its memory (%d bytes) is refused at the start', async (length, code, text) => {
    await engine.createImage(at('huge.qcow2'), { format: 'qcow2', length, clusterSize: 2 << 20 });
    const huge = await engine.openDisk(at('huge.qcow2'));
    const before = engine.arena.usedBytes;
    await expect(huge.backup({ target: at('copy.qcow2'), sync: 'full' })).rejects.toMatchObject({
      code,
      message: expect.stringContaining(text),
    });
    expect(engine.arena.usedBytes).toBe(before);
    expect(existsSync(at('copy.qcow2.partial'))).toBe(false);
    await huge.close();
  });
});
