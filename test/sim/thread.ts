/**
 * A thread of the simulated world. It runs the production code of its part (the job, a thread that copies along, a
 * guest, the host) on top of the simulated atomics and files. Thread 0, the job's, also sets the world up and judges
 * it at the end.
 */
// Before all others: production modules take hold of what they find when they are loaded.
import './atomics.js';

import { type MessagePort, parentPort } from 'node:worker_threads';
import { BackupJob, beginBackup, helpCopying } from '#src/backup/backup-job.js';
import { DISK_CONTROL_BYTES, type Disk } from '#src/block/disk.js';
import { Frame, type FrameDescriptor } from '#src/block/filters/copy-before-write.js';
import { MIRROR_CONTROL_BYTES, type MirrorDescriptor } from '#src/block/filters/mirror.js';
import { forgetDisk } from '#src/block/graph.js';
import { StillframeError, toStillframeError } from '#src/errors.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import { checkVerb, type JobVerb } from '#src/job/status.js';
import { ARENA_BASE } from '#src/kernels/arena.js';
import { advance, load, waitWhile } from '#src/kernels/futex.js';
import { runChainJob } from './chain.js';
import {
  arena,
  buffer,
  controlOf,
  files,
  oracle,
  runtime,
  type Setup,
  TARGETS,
  thread,
  world,
} from './context.js';
import {
  announceStart,
  attachDisk,
  CHANGED,
  ENDED,
  GUESTS_DONE,
  hasStarted,
  isReady,
  portOf,
  recordOf,
  watchDrains,
} from './drive.js';
import type { JobRecord } from './job-record.js';
import { judge, outcomeOf } from './judge.js';
import { beginMirroring, commitWhereAsked, runMirror, runMirrorHelper, watchBlocking } from './mirror.js';
import { dataOf, INVARIANTS } from './oracle.js';
import {
  type GuestOp,
  isHopeless,
  isLive,
  type Job,
  jobsOf,
  type Mirroring,
  mayFail,
  type Scenario,
  type Verb,
} from './scenario.js';
import { BITMAP, isOnPrevious, LAST_DISK, PREVIOUS, setUp, TARGET_DISK } from './stage.js';
import { beginExploring } from './visible.js';
import { VIOLATED, WorldEnded } from './world.js';

/** What thread 0 says of a run. */
export interface Verdict {
  /** The broken invariant and how; undefined where all is well. */
  readonly violation: string | undefined;
  readonly outcome: string;
  /** Addresses of the arena by name, for traces. */
  readonly places: readonly { readonly name: string; readonly from: number; readonly bytes: number }[];
}

const arm = Frame.arm;
Frame.arm = (of, frame) => {
  // Frames are numbered as the jobs are, from 1 on.
  const record = oracle.jobs[frame.id - 1];
  // Where one frame copies what another one holds, that one makes the instant.
  if (record !== undefined && world.running && frame.holder === undefined) oracle.freeze(record, frame);
  arm.call(Frame, of, frame);
};

files.onRename = (from, to) => {
  if (!world.running || !TARGETS.some((target) => from === `${target}.partial` && to === target)) return;
  if (!files.isDurable(from))
    world.violate(INVARIANTS.durable, 'the target gets its name before all of it is on the disk');
};

// ---- The parts ------------------------------------------------------------------------------------------------

function runGuest(scenario: Scenario, ops: readonly GuestOp[], setup: Setup): void {
  const { disk, guest } = attachDisk(setup);
  watchBlocking(guest);
  const all = scenario.writers.flat();
  const changes = all.filter(({ kind }) => kind !== 'read' && kind !== 'flush');
  const { control } = setup.disk;
  world.onSleep = (address) => oracle.checkWait(address, arena, guest.op, control, changes);
  try {
    for (const op of ops) {
      guest.op = op;
      oracle.call(op);
      let failed = true;
      try {
        runRequest(disk, op, changes);
        failed = false;
      } catch (error) {
        if (error instanceof WorldEnded) throw error;
        expectCause(scenario, `${op.kind} ${op.id} of a guest`, error);
      } finally {
        oracle.ended(op, failed);
        guest.op = undefined;
        world.forgetSeen();
      }
    }
  } finally {
    world.onSleep = () => undefined;
  }
  if (scenario.host !== 'keeper' && scenario.job.sync !== 'none') return;
  Atomics.add(arena.i32, (setup.words + GUESTS_DONE) >> 2, 1);
  if (scenario.host === 'keeper') {
    advance(arena, setup.words + CHANGED);
    return;
  }
  // Sync mode none ends when somebody ends it.
  if (load(arena, setup.words + GUESTS_DONE) < scenario.writers.length) return;
  if (hasStarted(setup)) new JobControl(arena, controlOf(setup)).cancel();
}

function runRequest(disk: Disk, op: GuestOp, changes: readonly GuestOp[]): void {
  const { kind, offset, length } = op;
  switch (kind) {
    case 'write':
      arena.u8.set(dataOf(op.id, offset, length), buffer);
      disk.write(offset, buffer, length);
      break;
    case 'zeroes':
      disk.writeZeroes(offset, length, false);
      break;
    case 'unmap':
      disk.writeZeroes(offset, length, true);
      break;
    case 'discard':
      disk.discard(offset, length);
      break;
    case 'flush':
      disk.flush();
      break;
    case 'read': {
      const before = oracle.drive.slice(offset, offset + length);
      const begun = oracle.stamp();
      disk.read(offset, buffer, length);
      oracle.checkRead(op, begun, before, arena.copyOut(buffer, length), changes);
    }
  }
}

/** Errors need a reason: a fault of the scenario, or the one the explorer put in. */
function expectCause(scenario: Scenario, what: string, error: unknown): void {
  const wrapped = toStillframeError(error);
  const caused = mayFail(scenario) || world.faulty;
  const known = wrapped.code === 'ERR_STILLFRAME_IO' || wrapped.code === 'ERR_STILLFRAME_NO_SPACE';
  if (caused && (known || wrapped.code === 'ERR_STILLFRAME_BROKEN_FRAME')) return;
  world.violate(INVARIANTS.errors, `${what} failed: ${wrapped.code}: ${wrapped.message} ${wrapped.stack}`);
}

function runJob(scenario: Scenario, setup: Setup, job: Job, which: number): void {
  const record = recordOf(which);
  const { disk } = attachDisk(setup);
  const add = disk.addFrame.bind(disk);
  const remove = disk.removeFrame.bind(disk);
  // Only the first job has helpers and a host that wait for it.
  const started = (how: 1 | 2): void => {
    if (which === 0) announceStart(setup, how);
  };
  watchDrains(disk);
  disk.addFrame = (frame) => {
    // Where this one only holds the instant for another, what was begun says which.
    record.frameText = JSON.stringify(frame);
    add(frame);
  };
  disk.removeFrame = (id) => {
    record.thaw(oracle.stamp());
    remove(id);
  };
  try {
    const control = new JobControl(arena, controlOf(setup, which));
    const begun = beginBackup(
      runtime,
      disk,
      control,
      {
        target: TARGETS[which] ?? '',
        sync: job.sync,
        bitmap: job.bitmapMode && BITMAP,
        bitmapMode: job.bitmapMode,
        backing: isOnPrevious(job) ? PREVIOUS : undefined,
        format: job.format,
        existing: job.target === 'existing',
        force: job.target === 'replace',
        targetClusterSize: job.targetClusterSize,
        compress: job.compress,
        fleece: job.fleece,
        onSourceError: job.onSourceError,
        onTargetError: job.onTargetError,
        onCbwError: job.onCbwError,
        autoFinalize: job.autoFinalize,
      },
      which + 1,
    );
    record.frameText = JSON.stringify(begun.frame);
    started(1);
    BackupJob.run(runtime, disk, control, portOf<MessagePort>(record), begun);
  } catch (error) {
    wasRefused(scenario, record, error);
    started(2);
  }
  countEnd(scenario, setup);
}

function runFirstJob(scenario: Scenario, setup: Setup): void {
  const { mirror, chain, job } = scenario;
  if (!isLive(scenario)) {
    runJob(scenario, setup, job, 0);
    return;
  }
  try {
    if (mirror !== undefined) runMirror(scenario, mirror, setup);
    else if (chain !== undefined) runChainJob(scenario, chain, setup);
  } catch (error) {
    wasRefused(scenario, recordOf(0), error);
    announceStart(setup, 2);
  }
  countEnd(scenario, setup);
}

function wasRefused(scenario: Scenario, { endedText }: JobRecord, error: unknown): void {
  if (error instanceof WorldEnded) throw error;
  expectCause(scenario, 'the start of the job', error);
  if (endedText !== '') world.violate(INVARIANTS.errors, 'the job threw after it had ended');
}

function countEnd(scenario: Scenario, setup: Setup): void {
  if (scenario.host !== 'keeper') return;
  Atomics.add(arena.i32, (setup.words + ENDED) >> 2, 1);
  advance(arena, setup.words + CHANGED);
}

function runHelper(setup: Setup): void {
  if (!hasStarted(setup)) return;
  const frame: FrameDescriptor = JSON.parse(recordOf(0).frameText);
  helpCopying(attachDisk(setup).disk, frame, new JobControl(arena, controlOf(setup)));
}

/** The host waits, and does what jobs ask it for. @returns whether the condition holds */
function waitUntil(
  scenario: Scenario,
  setup: Setup,
  condition: () => boolean,
  timeoutMs = Infinity,
): boolean {
  const deadline = world.now + timeoutMs;
  for (;;) {
    const sequence = load(arena, setup.words + CHANGED);
    commitWhereAsked(scenario, setup);
    if (condition()) return true;
    if (world.now >= deadline) return false;
    waitWhile(arena, setup.words + CHANGED, sequence, deadline - world.now);
  }
}

/** The host: gives the verbs of the scenario, then sees to it that the job comes to an end. */
function runHost(scenario: Scenario, setup: Setup): void {
  const jobs = jobsOf(scenario);
  const controls = setup.controls.map((pointer) => new JobControl(arena, pointer));
  const [first] = controls;
  const over = (): boolean => load(arena, setup.words + ENDED) === jobs.length;
  if (hasStarted(setup) && first !== undefined) {
    for (const verb of scenario.verbs) {
      if (verb.afterMs > 0 && waitUntil(scenario, setup, over, verb.afterMs)) return;
      if (isForReady(verb) && waitUntil(scenario, setup, () => over() || isReady(setup), READY_MS) && over())
        return;
      give(first, verb);
    }
  }
  if (scenario.host === 'verbs') return;
  const hopeless = isHopeless(scenario);
  for (let round = 0; !over(); round++) {
    const done = load(arena, setup.words + GUESTS_DONE) === scenario.writers.length;
    jobs.forEach((job, which) => {
      const control = controls[which];
      const mirror = which === 0 ? scenario.mirror : undefined;
      if (control !== undefined)
        keepGoing(control, job, mirror, { round, cancel: hopeless && round > 40, done });
    });
    if (round > 10_000) world.violate('progress', 'the jobs do not end');
    waitUntil(scenario, setup, over, 100);
  }
}

/** Takes away whatever keeps a job from its end. */
function keepGoing(
  control: JobControl,
  job: Job,
  mirror: Mirroring | undefined,
  { round, cancel, done }: { readonly round: number; readonly cancel: boolean; readonly done: boolean },
): void {
  const command = (verb: Verb['verb']): void => give(control, { verb, afterMs: 0, speed: 0 });
  // Sync mode none ends when somebody ends it.
  if (cancel || (job.sync === 'none' && mirror === undefined && done)) command('cancel');
  if (mirror !== undefined && isAtEnd(control) && (done || round > PATIENCE))
    command(mirror.end === 'cancel' ? 'cancel-soft' : 'complete');
  if (control.speed > 0 && round > 2) command('set-speed');
  if (control.paused) command('resume');
  if (control.status === 'pending' && !job.autoFinalize) command('finalize');
}

/** It goes on until it is told to end. */
function isAtEnd({ status }: JobControl): boolean {
  return status === 'ready' || status === 'standby';
}

function isForReady({ verb, atReady }: Verb): boolean {
  return verb === 'complete' || verb === 'cancel-soft' || atReady === true;
}

function give(control: JobControl, { verb, speed }: Verb): void {
  const name: JobVerb = verb === 'cancel-soft' ? 'cancel' : verb;
  try {
    checkVerb('backup1', control.status, name);
  } catch (error) {
    if (error instanceof StillframeError) return;
    throw error;
  }
  if (verb === 'pause') control.paused = true;
  else if (verb === 'resume') control.paused = false;
  else if (verb === 'cancel' || (verb === 'cancel-soft' && !isAtEnd(control))) control.cancel();
  else if (verb === 'cancel-soft') control.cancelSoftly();
  else if (verb === 'complete') {
    if (!control.cancelRequested) control.complete();
  } else if (verb === 'finalize') control.finalize();
  else control.speed = speed;
}

function partOf(scenario: Scenario, setup: Setup): () => void {
  const { job, second } = scenario;
  const writers = scenario.writers.length;
  if (thread === 0) return () => runFirstJob(scenario, setup);
  const ops = scenario.writers[thread - 1];
  if (ops !== undefined) return () => runGuest(scenario, ops, setup);
  if (thread <= writers + job.helpers)
    return () => (scenario.mirror === undefined ? runHelper(setup) : runMirrorHelper(setup));
  const isHost = scenario.host !== 'none' && thread === writers + job.helpers + 1;
  if (isHost || second === undefined) return () => runHost(scenario, setup);
  return () => runJob(scenario, setup, second, 1);
}

/** How long the host waits for a job to be ready before it tells it to end all the same, in virtual milliseconds. */
const READY_MS = 2000;
/** Rounds of the host in which a job that is ready goes on although guests are not done. */
const PATIENCE = 5;

parentPort?.postMessage('ready');
for (;;) {
  const scenario: Scenario = JSON.parse(world.awaitTurn());
  files.faults = scenario.faults;
  files.endAtSync = scenario.end?.sync ?? 0;
  let setup: Setup | undefined;
  try {
    setup = thread === 0 ? setUp(scenario) : (JSON.parse(oracle.diskText) as Setup);
    beginExploring(scenario, setup);
    for (let id = TARGET_DISK; id <= LAST_DISK; id++) forgetDisk(runtime, id);
    beginMirroring(scenario);
    world.running = true;
    partOf(scenario, setup)();
  } catch (error) {
    if (!(error instanceof WorldEnded)) {
      world.abort(
        VIOLATED,
        `${INVARIANTS.errors}: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`,
      );
    }
  }
  world.end();
  if (thread > 0) continue;
  let violation: string | undefined;
  try {
    violation = setup === undefined ? world.note : judge(scenario, setup);
  } catch (error) {
    violation = `judging: ${error instanceof Error ? (error.stack ?? error.message) : String(error)}`;
  }
  const verdict: Verdict = {
    violation,
    outcome: setup === undefined ? 'broken' : outcomeOf(scenario),
    places: placesOf(scenario, setup),
  };
  world.report(JSON.stringify(verdict));
}

function placesOf(scenario: Scenario, setup: Setup | undefined): Verdict['places'] {
  if (setup === undefined) return [];
  const places = [
    { name: 'disk', from: setup.disk.control, bytes: DISK_CONTROL_BYTES },
    ...setup.controls.map((from, which) => ({
      name: which === 0 ? 'job' : 'job2',
      from,
      bytes: JOB_CONTROL_BYTES,
    })),
    { name: 'simulator', from: setup.words, bytes: 64 },
    { name: 'arena', from: ARENA_BASE, bytes: 64 },
  ];
  if (setup.disk.node.driver === 'qcow2')
    places.push({ name: 'source', from: setup.disk.node.control, bytes: 1024 });
  oracle.jobs.forEach(({ frameText }, which) => {
    if (frameText === '') return;
    if (which === 0 && isLive(scenario)) {
      const { control, target }: MirrorDescriptor = JSON.parse(frameText);
      places.push({ name: 'mirror', from: control, bytes: MIRROR_CONTROL_BYTES });
      if (target.node.driver === 'qcow2')
        places.push({ name: 'target', from: target.node.control, bytes: 1024 });
      return;
    }
    const number = which === 0 ? '' : '2';
    const frame: FrameDescriptor = JSON.parse(frameText);
    places.push({ name: `frame${number}`, from: frame.control, bytes: 128 });
    places.push({ name: `states${number}`, from: frame.states, bytes: Math.ceil(frame.clusters / 32) * 8 });
    const { holder } = frame;
    if (holder !== undefined) {
      places.push({ name: `holder${number}`, from: holder.control, bytes: 128 });
      places.push({ name: `held${number}`, from: holder.states, bytes: Math.ceil(holder.clusters / 32) * 8 });
    }
    if (frame.target.driver === 'qcow2')
      places.push({ name: `target${number}`, from: frame.target.control, bytes: 1024 });
  });
  return places;
}
