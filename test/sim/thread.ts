/**
 * A thread of the simulated world. It runs the production code of its part (the job, a thread that copies along, a
 * guest, the host) on top of the simulated atomics and files. Thread 0, the job's, also sets the world up and judges
 * it at the end.
 */
// Before all others: production modules take hold of what they find when they are loaded.
import './atomics.js';

import { BackupJob, helpCopying, type JobMessage } from '#src/backup/backup-job.js';
import { DISK_CONTROL_BYTES, Disk } from '#src/block/disk.js';
import { Frame, type FrameDescriptor } from '#src/block/filters/copy-before-write.js';
import { StillframeError, toStillframeError } from '#src/errors.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import { checkVerb, type JobVerb } from '#src/job/status.js';
import { ARENA_BASE } from '#src/kernels/arena.js';
import { advance, load, store, waitWhile } from '#src/kernels/futex.js';
import {
  arena,
  buffer,
  copyBuffer,
  files,
  oracle,
  runtime,
  type Setup,
  TARGET,
  thread,
  world,
} from './context.js';
import { endedJob, judge } from './judge.js';
import { dataOf, GuestNode, INVARIANTS } from './oracle.js';
import type { GuestOp, Scenario, Verb } from './scenario.js';
import { setUp } from './stage.js';
import { beginExploring } from './visible.js';
import { POWER_CUT, VIOLATED, WorldEnded } from './world.js';

/** What thread 0 says of a run. */
export interface Verdict {
  /** The broken invariant and how; undefined where all is well. */
  readonly violation: string | undefined;
  readonly outcome: string;
  /** Addresses of the arena by name, for traces. */
  readonly places: readonly { readonly name: string; readonly from: number; readonly bytes: number }[];
}

// Words that threads of the simulator tell each other by, in an arena block of their own.
const STARTED = 0;
const GUESTS_DONE = 4;
const ENDED = 8;
const CHANGED = 12;

const arm = Frame.arm;
Frame.arm = (of, frame) => {
  oracle.freeze(frame.states, frame.clusterSize, frame.control);
  arm.call(Frame, of, frame);
};

files.onRename = (from, to) => {
  if (from !== `${TARGET}.partial` || to !== TARGET || !world.running) return;
  if (!files.isDurable(from))
    world.violate(INVARIANTS.durable, 'the target gets its name before all of it is on the disk');
};

// ---- The parts ------------------------------------------------------------------------------------------------

function attachDisk(setup: Setup): { readonly disk: Disk; readonly node: GuestNode } {
  const disk = new Disk(runtime, setup.disk, () => copyBuffer);
  const node = new GuestNode(disk.node, oracle, arena, buffer);
  Reflect.set(disk, 'node', node);
  return { disk, node };
}

function runGuest(scenario: Scenario, ops: readonly GuestOp[], setup: Setup): void {
  const { disk, node } = attachDisk(setup);
  const all = scenario.writers.flat();
  const changes = all.filter(({ kind }) => kind !== 'read' && kind !== 'flush');
  const { control } = setup.disk;
  world.onSleep = (address) => oracle.checkWait(address, arena, node.op, control, changes);
  try {
    for (const op of ops) {
      node.op = op;
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
        node.op = undefined;
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
  if (hasStarted(setup)) new JobControl(arena, setup.control).cancel();
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
  const caused = scenario.faults.some(({ code }) => code === 'EIO' || code === 'ENOSPC') || world.faulty;
  const known = wrapped.code === 'ERR_STILLFRAME_IO' || wrapped.code === 'ERR_STILLFRAME_NO_SPACE';
  if (caused && (known || wrapped.code === 'ERR_STILLFRAME_BROKEN_FRAME')) return;
  world.violate(INVARIANTS.errors, `${what} failed: ${wrapped.code}: ${wrapped.message} ${wrapped.stack}`);
}

function runJob(scenario: Scenario, setup: Setup): void {
  const { disk } = attachDisk(setup);
  const add = disk.addFrame.bind(disk);
  const remove = disk.removeFrame.bind(disk);
  disk.addFrame = (frame) => {
    oracle.frameText = JSON.stringify(frame);
    oracle.draining = true;
    add(frame);
    oracle.draining = false;
  };
  disk.removeFrame = (id) => {
    oracle.thaw();
    oracle.draining = true;
    remove(id);
    oracle.draining = false;
  };
  const { job } = scenario;
  const announceStart = (how: 1 | 2): void => {
    store(arena, setup.words + STARTED, how);
    Atomics.notify(arena.i32, (setup.words + STARTED) >> 2);
  };
  const port = {
    postMessage(message: JobMessage): void {
      if (message.type === 'started') {
        announceStart(1);
      } else if (message.type === 'ended') {
        oracle.endedText = JSON.stringify(message, (_, value) =>
          typeof value === 'bigint' ? String(value) : value,
        );
      }
    },
  };
  try {
    BackupJob.run(
      runtime,
      disk,
      new JobControl(arena, setup.control),
      port as unknown as Parameters<typeof BackupJob.run>[3],
      {
        target: TARGET,
        sync: job.sync,
        format: job.format,
        existing: job.target === 'existing',
        force: job.target === 'replace',
        targetClusterSize: job.targetClusterSize,
        onSourceError: job.onSourceError,
        onTargetError: job.onTargetError,
        onCbwError: job.onCbwError,
        autoFinalize: job.autoFinalize,
      },
      1,
    );
  } catch (error) {
    if (error instanceof WorldEnded) throw error;
    expectCause(scenario, 'the start of the job', error);
    if (oracle.endedText !== '') world.violate(INVARIANTS.errors, 'the job threw after it had ended');
    announceStart(2);
  }
  if (scenario.host !== 'keeper') return;
  store(arena, setup.words + ENDED, 1);
  advance(arena, setup.words + CHANGED);
}

function runHelper(setup: Setup): void {
  if (!hasStarted(setup)) return;
  const frame: FrameDescriptor = JSON.parse(oracle.frameText);
  helpCopying(attachDisk(setup).disk, frame, new JobControl(arena, setup.control));
}

/** Blocks until the job has taken its instant or was refused. */
function hasStarted(setup: Setup): boolean {
  waitWhile(arena, setup.words + STARTED, 0);
  return load(arena, setup.words + STARTED) === 1;
}

function waitUntil(setup: Setup, condition: () => boolean, timeoutMs = Infinity): boolean {
  const deadline = world.now + timeoutMs;
  for (;;) {
    const sequence = load(arena, setup.words + CHANGED);
    if (condition()) return true;
    if (world.now >= deadline) return false;
    waitWhile(arena, setup.words + CHANGED, sequence, deadline - world.now);
  }
}

/** The host: gives the verbs of the scenario, then sees to it that the job comes to an end. */
function runHost(scenario: Scenario, setup: Setup): void {
  const control = new JobControl(arena, setup.control);
  const over = (): boolean => load(arena, setup.words + ENDED) === 1;
  if (!hasStarted(setup)) return;
  for (const verb of scenario.verbs) {
    if (verb.afterMs > 0 && waitUntil(setup, over, verb.afterMs)) return;
    give(control, verb);
  }
  if (scenario.host === 'verbs') return;
  const writers = scenario.writers.length;
  // An error that never ends, under a policy that never gives up.
  const hopeless = scenario.faults.some(({ count }) => count > 100);
  for (let round = 0; !over(); round++) {
    if (round > 40 && hopeless) give(control, { verb: 'cancel', afterMs: 0, speed: 0 });
    if (control.speed > 0 && round > 2) give(control, { verb: 'set-speed', afterMs: 0, speed: 0 });
    if (control.paused) give(control, { verb: 'resume', afterMs: 0, speed: 0 });
    if (control.status === 'pending' && !scenario.job.autoFinalize)
      give(control, { verb: 'finalize', afterMs: 0, speed: 0 });
    // Sync mode none ends when somebody ends it.
    const done = load(arena, setup.words + GUESTS_DONE) === writers;
    if (scenario.job.sync === 'none' && done) give(control, { verb: 'cancel', afterMs: 0, speed: 0 });
    if (round > 10_000) world.violate('progress', `the job does not end, it is '${control.status}'`);
    waitUntil(setup, over, 100);
  }
}

function give(control: JobControl, { verb, speed }: Verb): void {
  const name: JobVerb = verb;
  try {
    checkVerb('backup1', control.status, name);
  } catch (error) {
    if (error instanceof StillframeError) return;
    throw error;
  }
  if (verb === 'pause') control.paused = true;
  else if (verb === 'resume') control.paused = false;
  else if (verb === 'cancel') control.cancel();
  else if (verb === 'finalize') control.finalize();
  else control.speed = speed;
}

function partOf(scenario: Scenario, setup: Setup): () => void {
  const writers = scenario.writers.length;
  if (thread === 0) return () => runJob(scenario, setup);
  const ops = scenario.writers[thread - 1];
  if (ops !== undefined) return () => runGuest(scenario, ops, setup);
  if (thread <= writers + scenario.job.helpers) return () => runHelper(setup);
  return () => runHost(scenario, setup);
}

for (;;) {
  const scenario: Scenario = JSON.parse(world.awaitTurn());
  files.faults = scenario.faults;
  let setup: Setup | undefined;
  try {
    setup = thread === 0 ? setUp(scenario) : (JSON.parse(oracle.diskText) as Setup);
    beginExploring(scenario, setup);
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
  const ended = endedJob();
  const verdict: Verdict = {
    violation,
    outcome: world.aborted === POWER_CUT ? 'cut' : (ended?.outcome ?? 'refused'),
    places: placesOf(setup),
  };
  world.report(JSON.stringify(verdict));
}

function placesOf(setup: Setup | undefined): Verdict['places'] {
  if (setup === undefined) return [];
  const places = [
    { name: 'disk', from: setup.disk.control, bytes: DISK_CONTROL_BYTES },
    { name: 'job', from: setup.control, bytes: JOB_CONTROL_BYTES },
    { name: 'simulator', from: setup.words, bytes: 64 },
    { name: 'arena', from: ARENA_BASE, bytes: 64 },
  ];
  if (setup.disk.node.driver === 'qcow2')
    places.push({ name: 'source', from: setup.disk.node.control, bytes: 1024 });
  if (oracle.frameText !== '') {
    const frame: FrameDescriptor = JSON.parse(oracle.frameText);
    places.push({ name: 'frame', from: frame.control, bytes: 128 });
    places.push({ name: 'states', from: frame.states, bytes: Math.ceil(frame.clusters / 32) * 8 });
    if (frame.target.driver === 'qcow2')
      places.push({ name: 'target', from: frame.target.control, bytes: 1024 });
  }
  return places;
}
