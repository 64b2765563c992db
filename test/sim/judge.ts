/** What is wrong with a run that is over. */
import { Disk } from '#src/block/disk.js';
import { type FrameDescriptor, freeFrame } from '#src/block/filters/copy-before-write.js';
import { closeNode } from '#src/block/graph.js';
import { arena, buffer, copyBuffer, files, oracle, runtime, type Setup, TARGET, world } from './context.js';
import { INVARIANTS } from './oracle.js';
import { checkQcow2 } from './qcow2-check.js';
import type { Scenario } from './scenario.js';
import { EMPTY_USED, emptyArena, layerPath, OLD_TARGET, readImage } from './stage.js';
import { POWER_CUT, REDUNDANT, VIOLATED } from './world.js';

export interface Ended {
  readonly outcome: 'completed' | 'cancelled' | 'failed';
  readonly error: { readonly code: string; readonly message: string } | undefined;
}

/** The world has come to its end: what is wrong with it? */
export function judge(scenario: Scenario, setup: Setup): string | undefined {
  if (world.aborted === VIOLATED) return world.note;
  if (world.aborted === REDUNDANT) return undefined;
  if (world.aborted === POWER_CUT) return judgeAfterCut(scenario);
  const path = layerPath(scenario, scenario.source.backing.length);
  const faulty = world.faulty || scenario.faults.some(({ code }) => code === 'EIO' || code === 'ENOSPC');
  const ended = endedJob();
  const disk = new Disk(runtime, setup.disk, () => copyBuffer);
  if (ended !== undefined) {
    const frame: FrameDescriptor = JSON.parse(oracle.frameText);
    const broken = arena.i32[frame.control >> 2] !== 0;
    freeFrame(runtime, frame);
    if (broken && ended.outcome !== 'failed') {
      return `${INVARIANTS.brokenNeverCompletes}: the job's outcome is '${ended.outcome}'`;
    }
  }
  arena.free(setup.control);
  arena.free(setup.words);
  const live = readNode(disk);
  const wrong = live === undefined ? undefined : oracle.difference(live, true);
  if (wrong !== undefined) return `${INVARIANTS.source}: ${wrong}`;
  arena.free(setup.disk.control);
  let closed = true;
  try {
    disk.node.flush();
  } catch {
    closed = false;
  }
  try {
    closeNode(runtime, setup.disk.node);
  } catch {
    closed = false;
  }
  if (!closed && !faulty) return `${INVARIANTS.errors}: the drive cannot be closed`;
  if (files.openFiles !== 0) return `${INVARIANTS.memory}: ${files.openFiles} files are left open`;
  if (arena.usedBytes !== EMPTY_USED)
    return `${INVARIANTS.memory}: ${arena.usedBytes - EMPTY_USED} bytes are not given back`;
  if (closed) {
    const stored = oracle.difference(readImage(path, scenario.source.format), true);
    if (stored !== undefined) return `${INVARIANTS.source}: once closed, ${stored}`;
  }
  const image = scenario.source.format === 'qcow2' ? checkQcow2(files.content(path)) : undefined;
  if (image !== undefined && image.errors.length > 0)
    return `${INVARIANTS.format}: source: ${image.errors[0]}`;
  if (image !== undefined && image.leaks > 0 && !faulty)
    return `${INVARIANTS.format}: source: ${image.leaks} clusters leak`;
  return judgeTarget(scenario, ended, faulty);
}

function readNode(disk: Disk): Uint8Array | undefined {
  try {
    disk.node.read(0, buffer, disk.descriptor.length);
  } catch {
    return undefined;
  }
  return arena.copyOut(buffer, disk.descriptor.length);
}

function judgeTarget(scenario: Scenario, ended: Ended | undefined, faulty: boolean): string | undefined {
  const { job } = scenario;
  const names = files.names();
  const kept = ended?.outcome === 'completed' || (ended?.outcome === 'cancelled' && job.sync === 'none');
  const cancelled =
    scenario.verbs.some(({ verb }) => verb === 'cancel') || scenario.faults.some(({ count }) => count > 100);
  if (ended === undefined && oracle.hasInstant)
    return `${INVARIANTS.errors}: the job took its instant and never ended`;
  if (ended?.outcome === 'failed') {
    if (!faulty) return `${INVARIANTS.errors}: the job failed: ${ended.error?.code}: ${ended.error?.message}`;
    if (ended.error === undefined) return `${INVARIANTS.errors}: the job failed without an error`;
  }
  if (ended?.outcome === 'cancelled' && job.sync !== 'none' && !cancelled && !faulty) {
    return `${INVARIANTS.errors}: the job says it was cancelled, but nobody did`;
  }
  const namesFail = faulty && (world.faulty || scenario.faults.some(({ on }) => on === 'names'));
  if (names.includes(`${TARGET}.partial`) && !namesFail)
    return `${INVARIANTS.unfinished}: the partial file is left`;
  if (!kept) {
    if (job.target === 'new' && names.includes(TARGET) && !namesFail)
      return `${INVARIANTS.unfinished}: there is a target of a job that ${ended?.outcome ?? 'was refused'}`;
    if (job.target === 'replace' && Buffer.compare(files.content(TARGET), OLD_TARGET) !== 0 && !namesFail) {
      return `${INVARIANTS.unfinished}: the old target was replaced by one that ${ended?.outcome ?? 'was refused'}`;
    }
    return undefined;
  }
  if (!files.isDurable(TARGET)) return `${INVARIANTS.durable}: the target is not on the disk`;
  return judgeBackup(scenario);
}

/** The finished backup: the drive at its instant, in an image without a flaw. */
function judgeBackup(scenario: Scenario): string | undefined {
  const { job } = scenario;
  const copy = readImage(TARGET, job.format);
  if (copy.length !== scenario.source.length) return `${INVARIANTS.instant}: it has ${copy.length} bytes`;
  // A target of sync mode none is the instant for as long as it is on its source.
  const stale = job.sync === 'none' && oracle.changedSinceThaw(scenario);
  const wrong = stale ? undefined : oracle.difference(copy, false);
  if (wrong !== undefined) return `${INVARIANTS.instant}: ${wrong}`;
  if (job.format !== 'qcow2') return undefined;
  const { errors, leaks } = checkQcow2(files.content(TARGET));
  if (errors.length > 0) return `${INVARIANTS.format}: target: ${errors[0]}`;
  if (leaks > 0 && scenario.faults.length === 0 && !world.faulty)
    return `${INVARIANTS.format}: target: ${leaks} clusters leak`;
  return undefined;
}

function judgeAfterCut(scenario: Scenario): string | undefined {
  emptyArena();
  files.closeAll();
  if (scenario.end?.by !== 'kill') files.cutPower(() => world.random());
  const path = layerPath(scenario, scenario.source.backing.length);
  const { format } = scenario.source;
  if (format === 'qcow2') {
    const { errors } = checkQcow2(files.content(path));
    if (errors.length > 0) return `${INVARIANTS.format}: source after the cut: ${errors[0]}`;
  }
  const drive = readImage(path, format);
  const wrong = oracle.differenceAfterCut(drive, scenario);
  if (wrong !== undefined) return `${INVARIANTS.source}: after the cut ${wrong}`;
  const ended = endedJob();
  const finished =
    ended?.outcome === 'completed' || (ended?.outcome === 'cancelled' && scenario.job.sync === 'none');
  const there = files.names().includes(TARGET);
  if (finished && !there) return `${INVARIANTS.durable}: the finished target is gone after the cut`;
  if (!there || scenario.job.target === 'existing') {
    return finished && scenario.job.sync !== 'none' ? judgeBackup(scenario) : undefined;
  }
  const old = scenario.job.target === 'replace' && Buffer.compare(files.content(TARGET), OLD_TARGET) === 0;
  if (old) return finished ? `${INVARIANTS.durable}: the old target is back after the cut` : undefined;
  // What a target of sync mode none does not hold itself is in the source, which guests went on to change.
  if (scenario.job.sync === 'none') {
    const { errors } = checkQcow2(files.content(TARGET));
    return errors.length > 0 ? `${INVARIANTS.unfinished}: after the cut: ${errors[0]}` : undefined;
  }
  const flaw = judgeBackup(scenario);
  return flaw === undefined
    ? undefined
    : `${INVARIANTS.unfinished}: after the cut the target is there, but ${flaw}`;
}

/** What the job said at its end; undefined where it has not come to it. */
export function endedJob(): Ended | undefined {
  return oracle.endedText === '' ? undefined : JSON.parse(oracle.endedText);
}
