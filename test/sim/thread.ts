/**
 * A thread of the simulated world. It runs the production code of its part (the job, a thread that copies along, a
 * guest, the host) on top of the simulated atomics and files. Thread 0, the job's, also sets the world up and judges
 * it at the end.
 */
// Before all others: production modules take hold of what they find when they are loaded.
import './atomics.js';

import { workerData } from 'node:worker_threads';
import { BackupJob, helpCopying, type JobMessage } from '#src/backup/backup-job.js';
import { createImage } from '#src/block/create.js';
import { DISK_CONTROL_BYTES, Disk, type DiskDescriptor } from '#src/block/disk.js';
import {
  type CopyBuffer,
  Frame,
  type FrameDescriptor,
  freeFrame,
} from '#src/block/filters/copy-before-write.js';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { State } from '#src/block/qcow2/state.js';
import { StillframeError, toStillframeError } from '#src/errors.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import { checkVerb, type JobVerb } from '#src/job/status.js';
import { ARENA_BASE } from '#src/kernels/arena.js';
import { advance, load, store, waitWhile } from '#src/kernels/futex.js';
import { attachRuntime, type Runtime, type SharedRuntime } from '#src/kernels/runtime.js';
import { connectAtomics } from './atomics.js';
import { Digest, type Region } from './digest.js';
import { connectFiles, Files, FOLDER } from './files.js';
import { dataOf, GuestNode, INVARIANTS, Oracle } from './oracle.js';
import { checkQcow2 } from './qcow2-check.js';
import type { GuestOp, Scenario, Verb } from './scenario.js';
import { ARENA, CHANGE, POWER_CUT, READ, STATES, VIOLATED, World, WorldEnded, WRITE } from './world.js';

export interface ThreadData {
  readonly thread: number;
  readonly world: SharedArrayBuffer;
  readonly files: SharedArrayBuffer;
  readonly oracle: SharedArrayBuffer;
  readonly runtime: SharedRuntime;
  /** Arena pointers to a buffer of 1 MiB and a copy buffer for each thread. */
  readonly buffers: readonly number[];
  readonly copyBuffers: readonly CopyBuffer[];
  /** Arena pointer to 4 KiB for digests of states. */
  readonly shared: number;
}

/** What thread 0 says of a run. */
export interface Verdict {
  /** The broken invariant and how; undefined where all is well. */
  readonly violation: string | undefined;
  readonly outcome: string;
  /** Addresses of the arena by name, for traces. */
  readonly places: readonly { readonly name: string; readonly from: number; readonly bytes: number }[];
}

export const BUFFER_BYTES = 1 << 20;

// Words that threads of the simulator tell each other by, in an arena block of their own.
const STARTED = 0;
const GUESTS_DONE = 4;
const ENDED = 8;
const CHANGED = 12;

const data: ThreadData = workerData;
const { thread } = data;
const world = new World(data.world, thread);
const oracle = new Oracle(data.oracle, world);
const files = new Files(data.files, world);
connectAtomics(world, data.runtime.memory.buffer);
connectFiles(files);
const runtime: Runtime = attachRuntime(data.runtime);
const { arena } = runtime;
const copyBuffer = data.copyBuffers[thread];
const buffer = data.buffers[thread] ?? 0;
if (copyBuffer === undefined) throw new Error(`no buffer for thread ${thread}`);

const digest = new Digest(world, runtime, files, buffer, data.shared);
world.digest = () => {
  const { regions, left, ticks } = regionsOf();
  const kept = ticks.map((state) => state.get('tick'));
  for (const state of ticks) state.set('tick', 0);
  const whole = digest.whole(regions, left);
  ticks.forEach((state, index) => {
    state.set('tick', kept[index] ?? 0);
  });
  return whole;
};
world.forgetSeen = (...but) => digest.clear(...but);
world.localDigest = () => digest.local();
world.observe = (key, value) => digest.observe(key, value);
files.onRead = (inode, into, offset, length) => digest.observeRead(inode, into, offset, length);

/** What thread 0 hands to the others when the world is set up. */
interface Setup {
  readonly disk: DiskDescriptor;
  readonly control: number;
  readonly words: number;
}

const TARGET = `${FOLDER}/target`;
const OLD_TARGET = new Uint8Array(1536).fill(0x6f);

// ---- The parts ------------------------------------------------------------------------------------------------

function attachDisk(setup: Setup): { readonly disk: Disk; readonly node: GuestNode } {
  const disk = new Disk(runtime, setup.disk, () => copyBuffer as CopyBuffer);
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

// ---- Before and after -----------------------------------------------------------------------------------------

// The arena as it is when only the threads' buffers are taken from it.
const HEADER = 64;
const highWaterWord = (ARENA_BASE + 8) >> 2;
const emptyHighWater = arena.u32[highWaterWord] ?? 0;
const emptyBase = arena.u8.slice(ARENA_BASE, ARENA_BASE + HEADER);
const emptyRest = arena.u8.slice(emptyHighWater - HEADER, emptyHighWater);

function emptyArena(): void {
  arena.u8.fill(0, emptyHighWater - HEADER, arena.u32[highWaterWord] ?? 0);
  arena.u8.set(emptyBase, ARENA_BASE);
  arena.u8.set(emptyRest, emptyHighWater - HEADER);
}

function layerPath(scenario: Scenario, layer: number): string {
  const top = scenario.source.backing.length;
  if (layer === top) return `${FOLDER}/source`;
  return `${FOLDER}/layer${layer}`;
}

function writeFile(path: string, bytes: Uint8Array): void {
  const fd = files.openSync(path, 0o102);
  files.writeSync(fd, bytes, 0, bytes.length, 0);
  files.closeSync(fd);
}

function makeSource(scenario: Scenario): void {
  const { source } = scenario;
  const top = source.backing.length;
  for (let layer = 0; layer <= top; layer++) {
    const path = layerPath(scenario, layer);
    const format = layer === top ? source.format : layer === 0 ? 'raw' : 'qcow2';
    const length = layer === top ? source.length : (source.backing[top - 1 - layer] ?? 0);
    createImage(runtime, path, {
      format,
      length,
      ...(format === 'raw'
        ? {}
        : {
            clusterSize: source.clusterSize,
            version: source.version,
            refcountBits: source.version === 2 ? 16 : source.refcountBits,
            ...(layer === 0
              ? {}
              : {
                  backingFile: layerPath(scenario, layer - 1),
                  backingFormat: layer === 1 ? 'raw' : 'qcow2',
                }),
          }),
    });
    const ranges = scenario.fill.filter((range) => range.layer === layer);
    if (ranges.length === 0) continue;
    const descriptor = openImage(runtime, path, { format, readOnly: false });
    const node = attachNode(runtime, descriptor);
    ranges.forEach(({ offset, length: bytes }, index) => {
      arena.u8.set(dataOf(1000 + layer * 20 + index, offset, bytes), buffer);
      if (index % 5 === 4) node.writeZeroes(offset, bytes, true);
      else node.write(offset, buffer, bytes);
    });
    closeNode(runtime, descriptor);
  }
}

function readImage(path: string, format: 'raw' | 'qcow2'): Uint8Array {
  const descriptor = openImage(runtime, path, { format, readOnly: true, lock: 'none' });
  try {
    const node = attachNode(runtime, descriptor);
    node.read(0, buffer, node.length);
    return arena.copyOut(buffer, node.length);
  } finally {
    closeNode(runtime, descriptor);
  }
}

function setUp(scenario: Scenario): Setup {
  emptyArena();
  files.clear();
  makeSource(scenario);
  const { format, length } = scenario.source;
  const path = layerPath(scenario, scenario.source.backing.length);
  oracle.drive.set(readImage(path, format));
  if (scenario.job.target === 'existing') {
    createImage(runtime, TARGET, {
      format: scenario.job.format,
      length,
      ...(scenario.job.format === 'qcow2' ? { clusterSize: scenario.job.targetClusterSize } : {}),
    });
    const descriptor = openImage(runtime, TARGET, { format: scenario.job.format, readOnly: false });
    const node = attachNode(runtime, descriptor);
    arena.u8.fill(0x65, buffer, buffer + length);
    node.write(0, buffer, length);
    closeNode(runtime, descriptor);
  } else if (scenario.job.target === 'replace') {
    writeFile(TARGET, OLD_TARGET);
  }
  const node = openImage(runtime, path, { format, readOnly: false });
  if (node.driver === 'file') throw new Error('a file is no image');
  oracle.begin(length, node.driver === 'qcow2' ? 2 ** node.clusterBits : 1);
  const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
  const jobControl = arena.alloc(JOB_CONTROL_BYTES, 'job');
  const job = new JobControl(arena, jobControl);
  job.transition('created');
  job.speed = scenario.job.speed;
  files.settle();
  const disk: DiskDescriptor = { id: 1, control, node, length, readOnly: false, discard: 'unmap' };
  const setup: Setup = { disk, control: jobControl, words: arena.alloc(64, 'simulator') };
  oracle.diskText = JSON.stringify(setup);
  return setup;
}

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

interface Ended {
  readonly outcome: 'completed' | 'cancelled' | 'failed';
  readonly error: { readonly code: string; readonly message: string } | undefined;
}

/** The world has come to its end: what is wrong with it? */
function judge(scenario: Scenario, setup: Setup): string | undefined {
  if (world.aborted === VIOLATED) return world.note;
  if (world.aborted === POWER_CUT) return judgeAfterCut(scenario);
  const path = layerPath(scenario, scenario.source.backing.length);
  const faulty = world.faulty || scenario.faults.some(({ code }) => code === 'EIO' || code === 'ENOSPC');
  const ended: Ended | undefined = oracle.endedText === '' ? undefined : JSON.parse(oracle.endedText);
  const disk = new Disk(runtime, setup.disk, () => copyBuffer as CopyBuffer);
  if (ended !== undefined) freeFrame(runtime, JSON.parse(oracle.frameText));
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
  if (arena.usedBytes !== emptyUsed)
    return `${INVARIANTS.memory}: ${arena.usedBytes - emptyUsed} bytes are not given back`;
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
  const ended: Ended | undefined = oracle.endedText === '' ? undefined : JSON.parse(oracle.endedText);
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

const emptyUsed = arena.usedBytes;

let current: Setup | undefined;
let target: { readonly text: string; readonly frame: FrameDescriptor } | undefined;

/** The frame, once it is part of the disk. */
function frameOf(): FrameDescriptor | undefined {
  if (!oracle.hasInstant) return undefined;
  const text = oracle.frameText;
  if (target?.text !== text) target = { text, frame: JSON.parse(text) };
  return target.frame;
}

function isSequence(address: number): boolean {
  if (current === undefined || address < 0) return false;
  if (address === current.disk.control + 4 || address === current.control + 24) return true;
  return oracle.hasInstant && address === oracle.frameControl + 8;
}

interface Regions {
  readonly regions: Region[];
  readonly left: Region[];
  /** Images whose caches count their uses. */
  readonly ticks: State[];
}

/** What counts of the arena when two states are compared, and what does not. */
function regionsOf(): Regions {
  const found: Regions = { regions: [], left: [], ticks: [] };
  if (current === undefined) return found;
  const { disk, control, words } = current;
  const { regions, left } = found;
  regions.push(
    { from: disk.control, bytes: DISK_CONTROL_BYTES },
    { from: control, bytes: JOB_CONTROL_BYTES },
  );
  regions.push({ from: words, bytes: 64 });
  left.push(
    { from: disk.control + 4, bytes: 4 },
    { from: control + 24, bytes: 4 },
    { from: control + 56, bytes: 8 },
  );
  addImage(disk.node, found);
  const frame = frameOf();
  if (frame === undefined) return found;
  regions.push({ from: frame.control, bytes: 64 });
  regions.push({ from: frame.states, bytes: Math.ceil(frame.clusters / 32) * 8 });
  left.push({ from: frame.control + 8, bytes: 4 });
  // Once the job is over its target is closed, and the memory somebody else's.
  if (oracle.endedText === '') addImage(frame.target, found);
  return found;
}

function addImage(node: NodeDescriptor, { regions, left, ticks }: Regions): void {
  if (node.driver === 'file') return;
  regions.push({ from: node.file.control, bytes: 16 });
  if (node.driver !== 'qcow2') return;
  const state = new State(arena, node.control, node.path);
  regions.push({ from: node.control, bytes: state.get('metaBuffer') - node.control });
  for (const [cache, slots] of [
    [state.get('l2Cache'), state.get('l2Slots')],
    [state.get('refcountCache'), state.get('refcountSlots')],
  ] as const) {
    left.push({ from: cache + slots * 8, bytes: slots * 8 });
  }
  ticks.push(state);
}

/**
 * Where the explorer lets others in between: before cluster states are claimed or change hands, at the critical sections of
 * the tracked requests, where a guest's change reaches the drive, and at words of the job's control block that another
 * thread may be at: a word that only one thread writes needs no look at its own reads.
 */
function visibleTo(scenario: Scenario, { disk, control }: Setup): World['isVisible'] {
  const [pause, cancel, finalize, pass, active, error] = [4, 8, 12, 16, 20, 28].map(
    (offset) => control + offset,
  );
  const commands = scenario.host !== 'none' || scenario.job.sync === 'none';
  return (kind, place, low) => {
    if (place === CHANGE) return true;
    if (place === STATES) return kind === WRITE;
    if (place !== ARENA) return false;
    if (low === disk.control) return true;
    if (low === pause || low === cancel || low === finalize) return commands;
    // Heads of loops: what a thread saw before is of no use to it any more, but for the sequence it will sleep on.
    if (low === pass && kind === WRITE) world.forgetSeen();
    else if (low === pass && thread > 0) world.forgetSeen(pass, control + 24);
    else if (low === active && kind === READ) world.forgetSeen(control + 24);
    if (scenario.job.helpers === 0) return false;
    if (low === pass) return kind === WRITE || thread > 0;
    if (low === active) return kind !== READ || thread === 0;
    return low === error && world.faulty;
  };
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
    world.isVisible = visibleTo(scenario, setup);
    current = setup;
    digest.begin(isSequence);
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
  const ended: Ended | undefined = oracle.endedText === '' ? undefined : JSON.parse(oracle.endedText);
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
