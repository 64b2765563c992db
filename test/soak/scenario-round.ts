/**
 * A scenario of the simulator with real threads on real files. Nothing fails here but by itself; what is left to chance is
 * the order of things, which nobody can choose: so it is not known what the drive was at the instant, only what it
 * can have been.
 */
import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { BackupJob, Disk, Engine } from '#src/index.js';
import { dataOf } from '../sim/oracle.js';
import { type GuestOp, type Job, jobsOf, makeScenario, type Scenario, type Verb } from '../sim/scenario.js';
import { hasPeer, run } from '../support/peers.js';

const SECTOR = 512;

/** When a request was made and when it was answered, in the order of the host thread. */
interface Span {
  readonly op: GuestOp;
  readonly called: number;
  returned: number;
}

/** Throws where the backup cannot be the drive at its instant; says the seed in every message. */
export async function runScenarioRound(engine: Engine, folder: string, seed: number): Promise<string> {
  const work = join(folder, `scenario-${seed}`);
  mkdirSync(work);
  try {
    return await round(engine, work, makeScenario(seed));
  } catch (error) {
    throw new Error(`scenario of seed ${seed}: ${error instanceof Error ? error.message : String(error)}`, {
      cause: error,
    });
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
}

async function makeSource(engine: Engine, work: string, { source, fill }: Scenario): Promise<string> {
  const top = source.backing.length;
  let path = '';
  for (let layer = 0; layer <= top; layer++) {
    const format = layer === top ? source.format : layer === 0 ? 'raw' : 'qcow2';
    const length = layer === top ? source.length : (source.backing[top - 1 - layer] ?? 0);
    path = join(work, `layer${layer}.${format}`);
    if (format === 'raw') writeFileSync(path, new Uint8Array(length));
    else {
      await engine.createImage(path, {
        format,
        length,
        clusterSize: source.clusterSize,
        version: source.version,
        refcountBits: source.version === 2 ? 16 : source.refcountBits,
        ...(layer === 0
          ? {}
          : {
              backingFile: `layer${layer - 1}.${layer === 1 ? 'raw' : 'qcow2'}`,
              backingFormat: layer === 1 ? ('raw' as const) : ('qcow2' as const),
            }),
      });
    }
    const disk = await engine.openDisk(path, { format });
    for (const [index, range] of fill.filter((one) => one.layer === layer).entries()) {
      await disk.write(range.offset, dataOf(1000 + layer * 20 + index, range.offset, range.length));
    }
    await disk.close();
  }
  return path;
}

async function request(disk: Disk, op: GuestOp): Promise<void> {
  const { kind, id, offset, length } = op;
  if (kind === 'write') await disk.write(offset, dataOf(id, offset, length));
  else if (kind === 'zeroes' || kind === 'unmap')
    await disk.writeZeroes(offset, length, { unmap: kind === 'unmap' });
  else if (kind === 'discard') await disk.discard(offset, length);
  else if (kind === 'read') await disk.read(offset, length);
  else await disk.flush();
}

/** A job under way, and when its instant can have been. */
interface Taken {
  readonly job: Job;
  readonly target: string;
  readonly backup: BackupJob;
  readonly asked: number;
  readonly started: number;
}

async function round(engine: Engine, work: string, scenario: Scenario): Promise<string> {
  const { source } = scenario;
  const path = await makeSource(engine, work, scenario);
  const disk = await engine.openDisk(path, { format: source.format });
  const initial = await disk.read(0, source.length);
  let clock = 0;
  const spans: Span[] = [];
  const writers = scenario.writers.map(async (ops) => {
    for (const op of ops) {
      const span: Span = { op, called: ++clock, returned: Infinity };
      spans.push(span);
      await request(disk, op);
      span.returned = ++clock;
    }
  });
  const taken: Taken[] = [];
  for (const [which, job] of jobsOf(scenario).entries()) {
    const target = join(work, `target${which}`);
    await makeTarget(engine, target, job, source.length);
    const asked = ++clock;
    const backup = await disk.backup({
      target,
      sync: job.sync,
      format: job.format,
      existing: job.target === 'existing',
      force: job.target === 'replace',
      targetClusterSize: job.targetClusterSize,
      workers: job.helpers + 1,
      onCbwError: job.onCbwError,
      speed: job.speed,
    });
    taken.push({ job, target, backup, asked, started: ++clock });
  }
  const cancelled = await giveVerbs(scenario, taken[0]);
  await Promise.all(writers);
  for (const { job, backup } of taken) if (job.sync === 'none') backup.cancel();
  const finished: Taken[] = [];
  for (const one of taken) {
    const result = await one.backup.result().catch((error: unknown) => {
      if (!cancelled || one !== taken[0]) throw error;
      return undefined;
    });
    if (existsSync(`${one.target}.partial`)) throw new Error('the partial file is left');
    if (result !== undefined) finished.push(one);
    else if (one.job.target === 'new' && existsSync(one.target))
      throw new Error('a cancelled job left its target');
  }
  check(await disk.read(0, source.length), initial, spans, Infinity, Infinity, 'the source');
  // A target of sync mode `none` is read through the file of the drive, past what the drive has not written yet.
  await disk.flush();
  for (const { job, target, asked, started } of finished) {
    const copy = await engine.openDisk(target, { format: job.format, readOnly: true, forceShare: true });
    check(await copy.read(0, source.length), initial, spans, asked, started, `the backup '${target}'`);
    await copy.close();
    if (job.format === 'qcow2' && hasPeer('qemu-img')) run('qemu-img', ['check', '-q', '-U', target]);
  }
  await disk.close();
  if (source.format === 'qcow2' && hasPeer('qemu-img')) run('qemu-img', ['check', '-q', path]);
  return scenario.job.sync;
}

async function makeTarget(engine: Engine, target: string, job: Job, length: number): Promise<void> {
  if (job.target === 'replace') writeFileSync(target, 'old');
  if (job.target !== 'existing') return;
  const { format, targetClusterSize: clusterSize } = job;
  await engine.createImage(target, { format, length, ...(format === 'qcow2' ? { clusterSize } : {}) });
}

/** @returns whether the job was cancelled */
async function giveVerbs(scenario: Scenario, taken: Taken | undefined): Promise<boolean> {
  if (taken === undefined) return false;
  const { job, backup } = taken;
  let cancelled = false;
  const verbs: readonly Verb[] = [...scenario.verbs, { verb: 'set-speed', afterMs: 0, speed: 0 }];
  for (const { verb, afterMs, speed } of verbs) {
    await new Promise((resolve) => setTimeout(resolve, afterMs / 20));
    try {
      if (verb === 'pause') backup.pause();
      else if (verb === 'resume') backup.resume();
      else if (verb === 'set-speed') backup.setSpeed(speed);
      else if (verb === 'cancel' && job.sync !== 'none') {
        backup.cancel();
        cancelled = true;
      }
    } catch {
      // The job is over, or not in a state for it.
    }
  }
  return cancelled;
}

/**
 * Every sector holds what some request put there that can have been the last one at the moment: made before the
 * moment had passed (`until`), and not overtaken by one that came after its answer and was answered before the moment
 * could begin (`from`).
 */
function check(
  data: Uint8Array,
  initial: Uint8Array,
  spans: readonly Span[],
  from: number,
  until: number,
  what: string,
): void {
  const changes = spans.filter(
    ({ op, called }) => op.kind !== 'read' && op.kind !== 'flush' && called < until,
  );
  for (let low = 0; low < data.length; low += SECTOR) {
    const found = data.subarray(low, low + SECTOR);
    const covering = changes.filter(({ op }) => op.offset < low + SECTOR && low < op.offset + op.length);
    // A discard may leave the old data, so it overtakes nothing.
    const overtaken = (returned: number): boolean =>
      covering.some(
        (later) => later.op.kind !== 'discard' && later.called > returned && later.returned < from,
      );
    const possible = (bytes: Uint8Array, returned: number): boolean =>
      Buffer.compare(found, bytes) === 0 && !overtaken(returned);
    if (possible(initial.subarray(low, low + SECTOR), 0)) continue;
    const explained = covering.some(({ op, returned }) =>
      possible(op.kind === 'write' ? dataOf(op.id, low, SECTOR) : new Uint8Array(SECTOR), returned),
    );
    if (!explained) throw new Error(`${what} holds something at ${low} that cannot have been there`);
  }
}
