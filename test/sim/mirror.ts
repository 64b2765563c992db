/** The parts of the threads where the first job is a mirror. */
import type { MessagePort } from 'node:worker_threads';
import { beginMirror, finishMirror, helpMirroring, MirrorJob } from '#src/backup/mirror-job.js';
import type { Disk } from '#src/block/disk.js';
import { drainOrder } from '#src/block/drain-order.js';
import { Mirror, type MirrorDescriptor } from '#src/block/filters/mirror.js';
import { liveDisk } from '#src/block/graph.js';
import { swapBitmaps } from '#src/block/live-changes.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { relinkNode } from '#src/block/relink.js';
import { type PlainError, toStillframeError } from '#src/errors.js';
import { JobControl } from '#src/job/control.js';
import type { JobMessage } from '#src/job/job.js';
import { advance, load, store } from '#src/kernels/futex.js';
import { arena, buffer, controlOf, files, oracle, runtime, type Setup, TARGETS, world } from './context.js';
import {
  announceStart,
  attachDisk,
  CHANGED,
  hasStarted,
  portOf,
  recordOf,
  STAGE,
  watchDrains,
} from './drive.js';
import { INVARIANTS } from './oracle.js';
import { type Mirroring, mayFail, type Scenario } from './scenario.js';
import { WorldEnded } from './world.js';

const READY = 1;
const COMMITS = 2;
const COMMITTED = 3;

let isChecked = false;

const { afterWrite } = Mirror.prototype;
Mirror.prototype.afterWrite = function (offset, length): void {
  afterWrite.call(this, offset, length);
  // Nobody else changes this part of the drive until the guest's request is over.
  if (!isChecked || !world.running) return;
  liveDisk(runtime, this.descriptor.target).read(offset, buffer, length);
  const flaw = oracle.differenceAt(arena.u8.subarray(buffer, buffer + length), offset);
  if (flaw !== undefined) world.violate(INVARIANTS.blocking, flaw);
};

/** A run begins. */
export function beginMirroring(scenario: Scenario): void {
  isChecked = scenario.mirror !== undefined && !mayFail(scenario);
}

function targetOf({ target }: Setup): Disk {
  if (target === undefined) throw new Error('the mirror has no target');
  return liveDisk(runtime, target);
}

/** Runs the job of a scenario. @throws what refuses it */
export function runMirror(scenario: Scenario, mirroring: Mirroring, setup: Setup): void {
  const { job } = scenario;
  const record = recordOf(0);
  const { disk } = attachDisk(setup);
  const target = targetOf(setup);
  // It completes at the end of the last time that it keeps guests out.
  watchDrains(disk, () => oracle.snapshot(record));
  const control = new JobControl(arena, controlOf(setup));
  const port = portOf<MessagePort>(record, (message: JobMessage) => {
    if (message.type === 'ready') tell(setup, READY);
    else if (message.type === 'commit') tell(setup, COMMITS);
    else if (message.type === 'ended' && message.outcome === 'completed' && record.movedAt === 0)
      checkDurable(scenario);
  });
  const begun = beginMirror(
    runtime,
    disk,
    target,
    {
      sync: job.sync === 'top' || job.sync === 'none' ? job.sync : 'full',
      copyMode: mirroring.copyMode,
      granularity: mirroring.granularity,
      unmap: mirroring.unmap,
      targetReadsZero: mirroring.targetReadsZero,
      pivots: mirroring.end === 'pivot',
      onSourceError: job.onSourceError,
      onTargetError: job.onTargetError,
      autoFinalize: job.autoFinalize,
    },
    1,
  );
  record.begunAt = oracle.stamp();
  record.frameText = JSON.stringify(begun.mirror);
  announceStart(setup, 1);
  MirrorJob.run(runtime, disk, target, control, port, begun);
}

/** Of an image it may not be that space was given back which is not in use any more; cuts show whether all the rest is. */
function checkDurable({ job }: Scenario): void {
  if (job.format === 'raw' && !files.isDurable(TARGETS[0])) {
    world.violate(INVARIANTS.durable, 'the mirror completes before all of it is on the disk');
  }
}

function tell(setup: Setup, stage: number): void {
  store(arena, setup.words + STAGE, stage);
  advance(arena, setup.words + CHANGED);
}

/** Whether the job has told the host that it is ready. */
export function isReady(setup: Setup): boolean {
  return load(arena, setup.words + STAGE) >= READY;
}

export function runMirrorHelper(setup: Setup): void {
  if (!hasStarted(setup)) return;
  const mirror: MirrorDescriptor = JSON.parse(recordOf(0).frameText);
  helpMirroring(attachDisk(setup).disk, mirror, new JobControl(arena, controlOf(setup)));
}

/** The host does its part of the commit point, if it is asked to. */
export function commitWhereAsked(scenario: Scenario, setup: Setup): void {
  if (load(arena, setup.words + STAGE) !== COMMITS) return;
  store(arena, setup.words + STAGE, COMMITTED);
  let failure: PlainError | undefined;
  try {
    pivot(scenario, setup);
  } catch (error) {
    if (error instanceof WorldEnded) throw error;
    failure = toStillframeError(error).toPlain();
  }
  new JobControl(arena, controlOf(setup)).answer(failure);
}

/** The target takes the place of the drive, as in the daemon: nobody uses either of them meanwhile. */
function pivot(scenario: Scenario, setup: Setup): void {
  const record = recordOf(0);
  const mirror: MirrorDescriptor = JSON.parse(record.frameText);
  const { disk } = attachDisk(setup);
  const target = targetOf(setup);
  watchDrains(disk);
  const enter = ([first, ...rest]: readonly Disk[], body: () => void): void => {
    if (first === undefined) body();
    else first.exclusive(() => enter(rest, body));
  };
  enter(drainOrder(runtime, [disk, target]), () => {
    finishMirror(runtime, disk, mirror);
    oracle.snapshot(record);
    checkDurable(scenario);
    const [own, other] = [disk.descriptor, target.descriptor];
    swapBitmaps(runtime, own, other);
    disk.changeRoot({ ...own, node: onBacking(scenario.job.sync, other.node, own.node), discard: 'unmap' });
    target.changeRoot({ ...other, node: own.node });
    record.movedAt = oracle.stamp();
  });
}

/** The target on what it comes to lie on. */
function onBacking(sync: string, target: NodeDescriptor, source: NodeDescriptor): NodeDescriptor {
  const below = sync === 'none' ? source : 'backing' in source ? source.backing : undefined;
  return sync === 'full' || target.driver !== 'qcow2'
    ? target
    : relinkNode(runtime, target, { backing: below });
}
