/** What the parts of the threads have in common: the drive, and how they tell each other what they are at. */
import { Disk } from '#src/block/disk.js';
import { drainOrder } from '#src/block/drain-order.js';
import { attachNode } from '#src/block/graph.js';
import type { JobMessage } from '#src/job/job.js';
import { advance, load, store, waitWhile } from '#src/kernels/futex.js';
import { arena, buffer, copyBuffer, oracle, runtime, type Setup, thread } from './context.js';
import type { JobRecord } from './job-record.js';
import { type Guest, GuestNode } from './oracle.js';

// Words that threads of the simulator tell each other by, in an arena block of their own.
export const STARTED = 0;
export const GUESTS_DONE = 4;
export const ENDED = 8;
export const CHANGED = 12;
/** How far the first job is, as the host knows it. */
export const STAGE = 16;
export const READY = 1;
/** It has the host do its part of the commit point. */
export const COMMITS = 2;
export const COMMITTED = 3;

export function attachDisk(setup: Setup): { readonly disk: Disk; readonly guest: Guest } {
  const guest: Guest = { op: undefined };
  const disk = new Disk(
    runtime,
    setup.disk,
    () => copyBuffer,
    (of, descriptor) => new GuestNode(attachNode(of, descriptor), guest, oracle, arena, buffer),
  );
  const undisturbed = disk.undisturbed.bind(disk);
  disk.undisturbed = (offset, length, body) => {
    oracle.hold(thread, offset, offset + length);
    try {
      return undisturbed(offset, length, body);
    } finally {
      oracle.hold(thread, 0, 0);
    }
  };
  return { disk, guest };
}

/** Lets the oracle know while guests are kept out. @param last runs at the end of each time */
export function watchDrains(disk: Disk, last: () => void = () => undefined): void {
  const drained = disk.drained.bind(disk);
  let drains = 0;
  disk.drained = (body) => {
    if (drains++ === 0) oracle.drain(true);
    try {
      return drained(() => {
        const result = body();
        last();
        return result;
      });
    } finally {
      if (--drains === 0) oracle.drain(false);
    }
  };
}

export function recordOf(which: number): JobRecord {
  const record = oracle.jobs[which];
  if (record === undefined) throw new Error(`there is no job ${which + 1}`);
  return record;
}

/** The first job has started (1) or was refused (2): helpers and the host wait for it. */
export function announceStart(setup: Setup, how: 1 | 2): void {
  store(arena, setup.words + STARTED, how);
  Atomics.notify(arena.i32, (setup.words + STARTED) >> 2);
}

/** Blocks until the job has taken its instant or was refused. */
export function hasStarted(setup: Setup): boolean {
  waitWhile(arena, setup.words + STARTED, 0);
  return load(arena, setup.words + STARTED) === 1;
}

/** What a job takes for its port: keeps what it says at its end. */
export function portOf<T>(record: JobRecord, onMessage: (message: JobMessage) => void = () => undefined): T {
  const port = {
    postMessage(message: JobMessage): void {
      onMessage(message);
      if (message.type !== 'ended') return;
      record.endedText = JSON.stringify(message, (_, value) =>
        typeof value === 'bigint' ? String(value) : value,
      );
    },
  };
  return port as unknown as T;
}

export function tell(setup: Setup, stage: number): void {
  store(arena, setup.words + STAGE, stage);
  advance(arena, setup.words + CHANGED);
}

/** Whether the job has told the host that it is ready. */
export function isReady(setup: Setup): boolean {
  return load(arena, setup.words + STAGE) >= READY;
}

/** Runs `body` while nobody uses the disks. */
export function exclusively(disks: readonly Disk[], body: () => void): void {
  const enter = ([first, ...rest]: readonly Disk[]): void => {
    if (first === undefined) body();
    else first.exclusive(() => enter(rest));
  };
  enter(drainOrder(runtime, disks));
}
