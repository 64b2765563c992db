/** The parts of the threads where the first job makes the backing chain of the drive shorter. */
import type { MessagePort } from 'node:worker_threads';
import { CommitJob } from '#src/backup/commit-job.js';
import { StreamJob } from '#src/backup/stream-job.js';
import type { Disk } from '#src/block/disk.js';
import { liveDisk } from '#src/block/graph.js';
import { changeBacking } from '#src/block/qcow2/index.js';
import { relinkNode } from '#src/block/relink.js';
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
export function runChainJob({ job }: Scenario, { type, top, base }: Chaining, setup: Setup): void {
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
  announceStart(setup, 1);
  if (type === 'stream') {
    StreamJob.run(runtime, disk, control, port, { ...options, layers });
    return;
  }
  const shown = disk.descriptor.length;
  CommitJob.run(runtime, diskOf(setup, top), diskOf(setup, base), control, port, {
    ...options,
    layers,
    shown,
  });
}

function diskOf({ chain }: Setup, index: number): Disk {
  const descriptor = chain?.[index];
  if (descriptor === undefined) throw new Error(`there is no image ${index} in the chain`);
  return liveDisk(runtime, descriptor);
}

/** The image above what was worked on comes to lie on the base, as in the daemon: nobody uses any of them meanwhile. */
export function shorten({ chain }: Scenario, setup: Setup): void {
  if (chain === undefined) throw new Error('the job has nothing to commit');
  const { type, top, base } = chain;
  const record = recordOf(0);
  const drive = attachDisk(setup).disk;
  watchDrains(drive);
  const below = setup.chain?.[base];
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
