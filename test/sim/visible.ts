/** For the explorer, whose scenarios have one job: where others may come in between, and what makes two states the same. */
import { DISK_CONTROL_BYTES } from '#src/block/disk.js';
import { isImage } from '#src/block/files.js';
import type { FrameDescriptor } from '#src/block/filters/copy-before-write.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { State } from '#src/block/qcow2/state.js';
import { JOB_CONTROL_BYTES } from '#src/job/control.js';
import {
  arena,
  buffer,
  controlOf,
  data,
  files,
  oracle,
  runtime,
  type Setup,
  thread,
  world,
} from './context.js';
import { Digest, type Region } from './digest.js';
import type { Scenario } from './scenario.js';
import { ARENA, CHANGE, READ, STATES, type World, WRITE } from './world.js';

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

let current: Setup | undefined;
let target: { readonly text: string; readonly frame: FrameDescriptor } | undefined;

/** The frame, once it is part of the disk. */
function frameOf(): FrameDescriptor | undefined {
  const [job] = oracle.jobs;
  if (job?.hasInstant !== true) return undefined;
  const text = job.frameText;
  if (target?.text !== text) target = { text, frame: JSON.parse(text) };
  return target.frame;
}

function isSequence(address: number): boolean {
  if (current === undefined || address < 0) return false;
  if (address === current.disk.control + 4 || address === controlOf(current) + 24) return true;
  const [job] = oracle.jobs;
  return job?.hasInstant === true && address === job.control + 8;
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
  const { disk, words } = current;
  const control = controlOf(current);
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
  if (oracle.jobs[0]?.endedText === '') addImage(frame.target, found);
  return found;
}

function addImage(node: NodeDescriptor, { regions, left, ticks }: Regions): void {
  if (!isImage(node)) return;
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
function visibleTo(scenario: Scenario, setup: Setup): World['isVisible'] {
  const { disk } = setup;
  const control = controlOf(setup);
  const [pause, cancel, finalize, pass = 0, active, error] = [4, 8, 12, 16, 20, 28].map(
    (offset) => control + offset,
  );
  const commands = scenario.host !== 'none' || scenario.job.sync === 'none';
  return (kind, place, low) => {
    if (place === CHANGE) return true;
    if (place === STATES) return kind === WRITE;
    if (place !== ARENA) return false;
    if (low === disk.control) {
      world.forgetSeen(disk.control + 4);
      return true;
    }
    if (low === pause || low === cancel || low === finalize) return commands;
    // Heads of loops: what a thread saw before is of no use to it any more, but for the sequence it will sleep on.
    if (low === pass && kind === WRITE) world.forgetSeen();
    else if (low === pass && thread > 0) world.forgetSeen(pass, control + 24);
    else if (low === active && kind === READ) world.forgetSeen(control + 24);
    else if (low === active) world.forgetSeen(pass);
    if (scenario.job.helpers === 0) return false;
    if (low === pass) return kind === WRITE || thread > 0;
    if (low === active) return kind !== READ || thread === 0;
    return low === error && world.faulty;
  };
}

/** A run begins: connects this thread's part of it to the explorer. */
export function beginExploring(scenario: Scenario, setup: Setup): void {
  current = setup;
  world.isVisible = visibleTo(scenario, setup);
  digest.begin(isSequence);
}
