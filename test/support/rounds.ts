import { closeSync, existsSync, mkdirSync, openSync, rmSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import type { BackupJob, Disk, Engine, SyncMode, TargetFormat } from '#src/index.js';
import { firstDifference, Random } from './data.js';
import { hasPeer, run } from './peers.js';

/**
 * One randomised backup of a drive under concurrent writers, checked byte by byte.
 *
 * Every byte of the drive belongs to one writer, so its history is a list of requests in a known order, while
 * the clusters are shared by all of them. The writers are not held at the instant: for each writer the backup
 * must equal its bytes after some prefix of the requests it made while the backup was being started.
 */

interface Effect {
  readonly offset: number;
  readonly data: Uint8Array;
}

interface Segment {
  readonly start: number;
  readonly end: number;
}

/** A guest that owns some segments of the drive and knows what they must hold. */
class Writer {
  /** What the requests of this writer did, in order, since the list was last emptied. */
  effects: Effect[] = [];
  requests = 0;
  readonly #disk: Disk;
  readonly #model: Uint8Array;
  readonly #random: Random;
  readonly segments: Segment[] = [];
  #stopped = false;
  #running: Promise<void> = Promise.resolve();

  constructor(disk: Disk, model: Uint8Array, random: Random) {
    this.#disk = disk;
    this.#model = model;
    this.#random = random;
  }

  start(): void {
    this.#stopped = false;
    this.#running = this.#run();
    this.#running.catch(() => undefined);
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    await this.#running;
  }

  async #run(): Promise<void> {
    while (!this.#stopped && this.segments.length > 0) {
      await this.#request();
      this.requests++;
    }
  }

  async #request(): Promise<void> {
    const random = this.#random;
    const segment = this.segments[random.between(0, this.segments.length - 1)];
    if (segment === undefined) return;
    const offset = random.between(segment.start, segment.end - 1);
    const length = random.between(1, segment.end - offset);
    const kind = random.next();
    if (kind < 0.55) {
      const data = random.bytes(length);
      await this.#disk.write(offset, data);
      this.#apply({ offset, data });
    } else if (kind < 0.75) {
      await this.#disk.writeZeroes(offset, length, { unmap: random.chance(0.5) });
      this.#apply({ offset, data: new Uint8Array(length) });
    } else if (kind < 0.9) {
      await this.#disk.discard(offset, length);
      // Old or zero, as the driver likes; what it became is the truth from here on.
      const data = await this.#disk.read(offset, length);
      const old = this.#model.subarray(offset, offset + length);
      for (let at = 0; at < length; at++) {
        if (data[at] !== 0 && data[at] !== old[at])
          throw new Error(`discard invented data at ${offset + at}`);
      }
      this.#apply({ offset, data });
    } else if (kind < 0.98) {
      const data = await this.#disk.read(offset, length);
      const at = firstDifference(data, this.#model.subarray(offset, offset + length));
      if (at >= 0) throw new Error(`the guest read wrong data at ${offset + at}`);
    } else {
      await this.#disk.flush();
    }
  }

  #apply(effect: Effect): void {
    this.#model.set(effect.data, effect.offset);
    this.effects.push(effect);
  }
}

export interface RoundReport {
  readonly mode: SyncMode;
  readonly requests: number;
  readonly cbw: number;
  readonly cancelled: boolean;
}

const SIZES = [777, 4097, 65536, 1 << 20, (1 << 20) + 512, (5 << 20) + 512, 9_000_000, 16 << 20] as const;

async function readAll(disk: Disk): Promise<Uint8Array> {
  return disk.read(0, disk.length);
}

function writeFileAt(path: string, data: Uint8Array): void {
  const fd = openSync(path, 'w');
  writeSync(fd, data);
  closeSync(fd);
}

/** Throws where the backup is not the drive at its instant; says the seed in every message. */
export async function runRound(engine: Engine, folder: string, seed: number): Promise<RoundReport> {
  const random = new Random(seed);
  const work = join(folder, `round-${seed}`);
  mkdirSync(work);
  try {
    return await round(engine, work, random);
  } catch (error) {
    throw new Error(`seed ${seed}: ${error instanceof Error ? error.message : String(error)}`, {
      cause: error,
    });
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

async function makeSource(engine: Engine, work: string, random: Random, size: number): Promise<Disk> {
  const format = random.pick<TargetFormat>(['raw', 'qcow2', 'qcow2', 'qcow2']);
  const clusterSize = 2 ** random.between(9, 21);
  const path = join(work, `source.${format}`);
  const raw = join(work, 'content.raw');
  writeFileAt(raw, random.bytes(size));
  if (format === 'raw') {
    return engine.openDisk(raw, { format: 'raw' });
  }
  const depth = random.between(0, 2);
  let backing: { backingFile: string; backingFormat: TargetFormat } | undefined;
  if (depth > 0) {
    // Half of the chains have a base that is shorter than the overlay.
    if (random.chance(0.5)) writeFileAt(raw, random.bytes(Math.max(512, size >> 1)));
    backing = { backingFile: 'content.raw', backingFormat: 'raw' };
  }
  const make = async (name: string): Promise<void> => {
    const version = random.pick<2 | 3>([2, 3, 3]);
    await engine.createImage(join(work, name), {
      format: 'qcow2',
      length: size,
      clusterSize,
      version,
      ...backing,
    });
  };
  if (depth === 2) {
    await make('middle.qcow2');
    const middle = await engine.openDisk(join(work, 'middle.qcow2'));
    for (let index = random.between(1, 10); index > 0; index--) {
      const offset = random.between(0, middle.length - 1);
      await middle.write(offset, random.bytes(random.between(1, Math.min(300_000, middle.length - offset))));
    }
    await middle.close();
    backing = { backingFile: 'middle.qcow2', backingFormat: 'qcow2' };
  }
  await make('source.qcow2');
  const disk = await engine.openDisk(path, { format: 'qcow2' });
  for (let index = random.between(0, 10); index > 0; index--) {
    const offset = random.between(0, disk.length - 1);
    await disk.write(offset, random.bytes(random.between(1, Math.min(300_000, disk.length - offset))));
  }
  return disk;
}

function makeWriters(disk: Disk, model: Uint8Array, random: Random): Writer[] {
  const writers: Writer[] = [];
  const count = random.between(1, 4);
  for (let index = 0; index < count; index++) {
    writers.push(new Writer(disk, model, new Random(random.between(0, 2 ** 31))));
  }
  for (let start = 0; start < disk.length; ) {
    const end = Math.min(disk.length, start + random.between(1, random.pick([700, 40_000, 400_000])));
    writers[random.between(0, count - 1)]?.segments.push({ start, end });
    start = end;
  }
  return writers;
}

/** Throws unless the backup holds, for every writer, the state after some prefix of its window's requests. */
function checkInstant(
  backup: Uint8Array,
  before: Uint8Array,
  writers: readonly Writer[],
  windows: Effect[][],
): void {
  const state = before.slice();
  writers.forEach((writer, index) => {
    const owned = (data: Uint8Array): string | undefined => {
      for (const { start, end } of writer.segments) {
        const at = firstDifference(backup.subarray(start, end), data.subarray(start, end));
        if (at >= 0) return `byte ${start + at} is ${backup[start + at]}, not ${data[start + at]}`;
      }
      return undefined;
    };
    let problem = owned(state);
    for (const { offset, data } of windows[index] ?? []) {
      if (problem === undefined) break;
      state.set(data, offset);
      const next = owned(state);
      if (next === undefined) problem = undefined;
    }
    if (problem !== undefined) throw new Error(`the backup is not the drive at its instant: ${problem}`);
  });
}

async function meddle(job: BackupJob, random: Random): Promise<boolean> {
  for (let index = random.between(0, 3); index > 0; index--) {
    await new Promise((resolve) => setTimeout(resolve, random.between(0, 8)));
    const kind = random.next();
    try {
      if (kind < 0.35) {
        job.pause();
        await new Promise((resolve) => setTimeout(resolve, random.between(0, 8)));
        job.resume();
      } else if (kind < 0.7) {
        job.setSpeed(random.pick([0, 1 << 20, 50 << 20, 200 << 20]));
      } else if (kind < 0.75 && job.sync !== 'none') {
        job.cancel();
        return true;
      }
    } catch {
      // The job is over already.
    }
  }
  try {
    job.setSpeed(0);
  } catch {
    // Likewise.
  }
  return false;
}

async function round(engine: Engine, work: string, random: Random): Promise<RoundReport> {
  const size = random.chance(0.3) ? random.between(1, 12 << 20) : random.pick(SIZES);
  const disk = await makeSource(engine, work, random, size);
  const model = await readAll(disk);
  const writers = makeWriters(disk, model, random);
  const sync = random.pick<SyncMode>(['full', 'full', 'top', 'none']);
  const needsBacking = sync === 'none' || (sync === 'top' && disk.path.endsWith('source.qcow2'));
  const format = needsBacking ? 'qcow2' : random.pick<TargetFormat>(['raw', 'qcow2']);
  const target = join(work, `target.${format}`);

  for (const writer of writers) writer.start();
  await new Promise((resolve) => setTimeout(resolve, random.between(0, 10)));
  const before = model.slice();
  for (const writer of writers) writer.effects = [];
  const job = await disk.backup({
    target,
    format,
    sync,
    workers: random.between(1, 3),
    speed: random.pick([0, 0, 20 << 20, 100 << 20]),
    targetClusterSize: 2 ** random.between(9, 21),
  });
  const windows = writers.map((writer) => writer.effects.slice());
  const inFlight = writers.map((writer) => writer.effects.length);

  let cancelled = await meddle(job, random);
  if (sync === 'none') await new Promise((resolve) => setTimeout(resolve, random.between(0, 30)));
  // The request that was in flight when the job had started is the last one that can be before the instant.
  if (sync === 'none') {
    for (const writer of writers) await writer.stop();
    await disk.flush();
    job.cancel();
  }
  const result = await job.result().catch((error: unknown) => {
    if (!cancelled) throw error;
    return undefined;
  });
  cancelled = result === undefined;
  if (sync !== 'none') for (const writer of writers) await writer.stop();
  writers.forEach((writer, index) => {
    const last = writer.effects[inFlight[index] ?? 0];
    if (last !== undefined) windows[index]?.push(last);
  });

  const at = firstDifference(await readAll(disk), model);
  if (at >= 0) throw new Error(`the source has wrong data at ${at}`);
  if (cancelled) {
    if (existsSync(target) || existsSync(`${target}.partial`))
      throw new Error('a cancelled job left its target');
  } else {
    if (existsSync(`${target}.partial`)) throw new Error('a finished job left its partial file');
    const copy = await engine.openDisk(target, { format, readOnly: true, forceShare: true });
    checkInstant(await readAll(copy), before, writers, windows);
    await copy.close();
    if (format === 'qcow2' && hasPeer('qemu-img')) run('qemu-img', ['check', '-q', '-U', target]);
  }
  await disk.close();
  if (disk.path.endsWith('.qcow2') && hasPeer('qemu-img')) run('qemu-img', ['check', '-q', disk.path]);
  return {
    mode: sync,
    requests: writers.reduce((sum, writer) => sum + writer.requests, 0),
    cbw: result?.clusters.cbw ?? 0,
    cancelled,
  };
}
