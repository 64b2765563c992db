/** The parts of the threads where the first job makes the backing chain of the drive shorter. */
import type { MessagePort } from 'node:worker_threads';
import { CommitJob } from '#src/backup/commit-job.js';
import { StreamJob } from '#src/backup/stream-job.js';
import type { Disk } from '#src/block/disk.js';
import { attachNode, liveDisk } from '#src/block/graph.js';
import { resizeNode } from '#src/block/live-changes.js';
import { changeBacking } from '#src/block/qcow2/index.js';
import { relinkNode } from '#src/block/relink.js';
import type { PlainError } from '#src/errors.js';
import { JobControl } from '#src/job/control.js';
import { arena, controlOf, oracle, runtime, type Setup } from './context.js';
import {
  announceStart,
  attachDisk,
  COMMITS,
  exclusively,
  portOf,
  recordOf,
  tell,
  watchDrains,
} from './drive.js';
import type { Chaining, Scenario } from './scenario.js';
import { asBacking } from './stage.js';

/** Runs the job of a scenario. */
export function runChainJob(scenario: Scenario, { type, top, base }: Chaining, setup: Setup): void {
  const { job } = scenario;
  const record = recordOf(0);
  const { disk } = attachDisk(setup);
  watchDrains(disk);
  const control = new JobControl(arena, controlOf(setup));
  const port = portOf<MessagePort>(record, (message) => {
    if (message.type === 'commit') tell(setup, COMMITS);
  });
  const options = { onError: job.onTargetError, autoFinalize: job.autoFinalize };
  // Its own image is none of those that a stream counts.
  const layers = type === 'stream' ? base - 1 : base - top;
  record.begunAt = oracle.stamp();
  if (type === 'stream') {
    announceStart(setup, 1);
    StreamJob.run(runtime, disk, control, port, { ...options, layers });
    return;
  }
  const shown = disk.descriptor.length;
  const failure = growBase(scenario, setup, disk);
  announceStart(setup, 1);
  CommitJob.run(runtime, diskOf(setup, top), diskOf(setup, base), control, port, {
    ...options,
    layers,
    shown,
    failure,
  });
}

function diskOf({ chain }: Setup, index: number): Disk {
  const descriptor = chain?.[index];
  if (descriptor === undefined) throw new Error(`there is no image ${index} in the chain`);
  return liveDisk(runtime, descriptor);
}

/**
 * Makes the image that others are committed into as long as what it takes, before the job, as the daemon does.
 *
 * @returns why it cannot
 */
export function growBase({ chain }: Scenario, setup: Setup, drive: Disk): PlainError | undefined {
  if (chain?.type !== 'commit') return undefined;
  const disks = Array.from({ length: chain.base + 1 }, (_, index) =>
    index === 0 ? drive : diskOf(setup, index),
  );
  const [top, base] = [disks[chain.top], disks.pop()];
  if (top === undefined || base === undefined) throw new Error('nothing is committed');
  const { length } = top.descriptor;
  if (base.descriptor.length >= length) return undefined;
  let failure: PlainError | undefined;
  exclusively([...disks, base], () => {
    const { descriptor } = base;
    const changed = resizeNode(runtime, descriptor, descriptor.node, length, 'off');
    failure = changed.failure;
    const { node } = changed;
    let below = base.changeRoot({ ...descriptor, node, length: attachNode(runtime, node).length });
    for (const disk of disks.toReversed()) {
      const over = disk.descriptor;
      below = disk.changeRoot({
        ...over,
        node: relinkNode(runtime, over.node, { backing: asBacking(below) }),
      });
    }
  });
  return failure;
}

/** The image above what was worked on comes to lie on the base, as in the daemon: nobody uses any of them meanwhile. */
export function shorten({ chain }: Scenario, setup: Setup): void {
  if (chain === undefined) throw new Error('the job has nothing to commit');
  const { type, top, base } = chain;
  const record = recordOf(0);
  const drive = attachDisk(setup).disk;
  watchDrains(drive);
  const below = setup.chain?.[base] && diskOf(setup, base).descriptor;
  const others = type === 'stream' ? [] : [diskOf(setup, top), diskOf(setup, base)];
  exclusively([drive, ...others], () => {
    const { descriptor } = drive;
    const { node } = descriptor;
    if (node.driver !== 'qcow2') throw new Error('the drive has no chain');
    // What the other backing file does not show is in the image before its header says so.
    drive.flush();
    changeBacking(runtime, node, below && { name: below.node.path, format: below.node.driver });
    drive.changeRoot({
      ...descriptor,
      node: relinkNode(runtime, node, { backing: below && asBacking(below) }),
    });
    record.movedAt = oracle.stamp();
  });
}
