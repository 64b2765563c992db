import { setTimeout as sleep } from 'node:timers/promises';
import type { DiskDescriptor } from '../block/disk.js';
import type { FrameDescriptor } from '../block/filters/copy-before-write.js';
import { CopyDesk, PLACES } from '../block/filters/copy-desk.js';
import type { Arena } from '../kernels/arena.js';
import type { Task } from './tasks.js';

const POLL_MS = 2;

/**
 * Threads that copy for guests whose writes have a time-out; none where they have not.
 *
 * @param frame that the guests know
 * @param control of the job, where cancelling it ends what they wait for
 */
export function guestCopies(disk: DiskDescriptor, frame: FrameDescriptor, control?: number): Task[] {
  if (frame.desk === undefined) return [];
  return Array.from({ length: PLACES }, (_, index) => ({
    kind: 'copy-for-guests',
    disk,
    frame,
    index,
    control,
  }));
}

/** Resolves when those threads are there. @param over says that they have ended, however that came */
export async function untilAttended(
  arena: Arena,
  { desk }: FrameDescriptor,
  over: () => boolean,
): Promise<void> {
  if (desk === undefined) return;
  const threads = new CopyDesk(arena, desk);
  while (!over() && !threads.ready) await sleep(POLL_MS);
}
