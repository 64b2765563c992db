/** The parts of the threads where the first job is a mirror. */
import type { MessagePort } from 'node:worker_threads';
import { beginMirror, finishMirror, helpMirroring, MirrorJob } from '#src/backup/mirror-job.js';
import type { Disk } from '#src/block/disk.js';
import type { MirrorDescriptor } from '#src/block/filters/mirror.js';
import { liveDisk } from '#src/block/graph.js';
import { swapBitmaps } from '#src/block/live-changes.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { relinkNode } from '#src/block/relink.js';
import { TrackedRequests } from '#src/block/tracked-requests.js';
import { type PlainError, toStillframeError } from '#src/errors.js';
import { JobControl } from '#src/job/control.js';
import type { JobMessage } from '#src/job/job.js';
import { load, store } from '#src/kernels/futex.js';
import { growBase, shorten } from './chain.js';
import { arena, buffer, controlOf, files, oracle, runtime, type Setup, world } from './context.js';
import {
  announceStart,
  attachDisk,
  COMMITS,
  COMMITTED,
  exclusively,
  hasStarted,
  portOf,
  READY,
  recordOf,
  STAGE,
  tell,
  watchDrains,
} from './drive.js';
import { type Guest, INVARIANTS } from './oracle.js';
import { type Mirroring, mayFail, type Scenario } from './scenario.js';
import { targetFormat, targetPath } from './stage.js';
import { WorldEnded } from './world.js';

let isChecked = false;
/** The request that this thread is at as a guest. */
let current: Guest | undefined;
let depth = 0;

const { run } = TrackedRequests.prototype;
TrackedRequests.prototype.run = function <T>(start: number, end: number, body: () => T): T {
  return run.call(this, start, end, () => {
    depth++;
    try {
      const result = body();
      // Nobody else changes this part of the drive until the guest's request is over. Without a result it has only begun:
      // the drive lies on something else by now, and it begins anew.
      if (depth === 1 && result !== undefined) checkBlocking();
      return result;
    } finally {
      depth--;
    }
  }) as T;
};

/** Whether what a guest has changed is in the mirror by now. */
function checkBlocking(): void {
  const op = current?.op;
  const [record] = oracle.jobs;
  if (!isChecked || op === undefined || op.kind === 'read' || record?.blocks !== true) return;
  const { offset, length } = op;
  const { target }: MirrorDescriptor = JSON.parse(record.frameText);
  liveDisk(runtime, target).read(offset, buffer, length);
  const flaw = oracle.differenceAt(arena.u8.subarray(buffer, buffer + length), offset);
  if (flaw !== undefined) world.violate(INVARIANTS.blocking, flaw);
}

/** A run begins. */
export function beginMirroring(scenario: Scenario): void {
  isChecked = scenario.mirror !== undefined && !mayFail(scenario);
  current = undefined;
  depth = 0;
}

/** This thread is a guest. */
export function watchBlocking(guest: Guest): void {
  current = guest;
}

function targetOf({ target }: Setup): Disk {
  if (target === undefined) throw new Error('the mirror has no target');
  return liveDisk(runtime, target);
}

/** Runs the job of a scenario. @throws what refuses it */
export function runMirror(scenario: Scenario, mirroring: Mirroring, setup: Setup): void {
  const { job, chain } = scenario;
  const record = recordOf(0);
  const { disk } = attachDisk(setup);
  const target = targetOf(setup);
  let isBlocking = false;
  const setMirror = disk.setMirror.bind(disk);
  disk.setMirror = (mirror) => {
    isBlocking = mirror !== undefined;
    setMirror(mirror);
  };
  // It completes at the end of the last time that it keeps guests out.
  watchDrains(disk, () => {
    oracle.snapshot(record);
    record.blocks = isBlocking;
  });
  const control = new JobControl(arena, controlOf(setup));
  const port = portOf<MessagePort>(record, (message: JobMessage) => {
    if (message.type === 'ready') tell(setup, READY);
    else if (message.type === 'commit') tell(setup, COMMITS);
    else if (message.type === 'ended' && message.outcome === 'completed' && record.movedAt === 0)
      checkDurable(scenario);
  });
  const failure = growBase(scenario, setup, disk);
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
      layers: chain?.base,
      failure,
    },
    1,
  );
  record.begunAt = oracle.stamp();
  record.frameText = JSON.stringify(begun.mirror);
  announceStart(setup, 1);
  MirrorJob.run(runtime, disk, target, control, port, begun);
}

/** Of an image it may not be that space was given back which is not in use any more; cuts show whether all the rest is. */
function checkDurable(scenario: Scenario): void {
  if (targetFormat(scenario) === 'raw' && !files.isDurable(targetPath(scenario))) {
    world.violate(INVARIANTS.durable, 'the mirror completes before all of it is on the disk');
  }
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
    if (scenario.mirror === undefined) shorten(scenario, setup);
    else pivot(scenario, setup);
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
  exclusively([disk, target], () => {
    finishMirror(runtime, disk, mirror);
    oracle.snapshot(record);
    checkDurable(scenario);
    const [own, other] = [disk.descriptor, target.descriptor];
    swapBitmaps(runtime, own, other);
    if (scenario.chain !== undefined) {
      // What was the drive's own image lies on this one, and nobody uses it any more.
      disk.changeRoot({ ...own, node: other.node });
      record.movedAt = oracle.stamp();
      return;
    }
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
