/** What a thread of the simulated world has at hand. */
// Before all others: production modules take hold of what they find when they are loaded.
import './atomics.js';

import { workerData } from 'node:worker_threads';
import type { DiskDescriptor } from '#src/block/disk.js';
import type { CopyBuffer } from '#src/block/filters/copy-before-write.js';
import { attachRuntime, type Runtime, type SharedRuntime } from '#src/kernels/runtime.js';
import { connectAtomics } from './atomics.js';
import { connectFiles, Files, FOLDER } from './files.js';
import { Oracle } from './oracle.js';
import { World } from './world.js';

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

export const data: ThreadData = workerData;
export const { thread } = data;
export const world = new World(data.world, thread);
export const oracle = new Oracle(data.oracle, world);
export const files = new Files(data.files, world);
connectAtomics(world, data.runtime.memory.buffer);
connectFiles(files);
export const runtime: Runtime = attachRuntime(data.runtime);
export const { arena } = runtime;
const found = data.copyBuffers[thread];
export const buffer = data.buffers[thread] ?? 0;
if (found === undefined) throw new Error(`no buffer for thread ${thread}`);
export const copyBuffer: CopyBuffer = found;

/** What thread 0 hands to the others when the world is set up. */
export interface Setup {
  readonly disk: DiskDescriptor;
  /** What the first job writes to, where that is a mirror. */
  readonly target?: DiskDescriptor | undefined;
  /** The images of the chain from the drive's own down, where the first job makes it shorter. */
  readonly chain?: readonly DiskDescriptor[] | undefined;
  /** Pointers to the control blocks of the jobs. */
  readonly controls: readonly number[];
  readonly words: number;
}

/** Where the jobs write to. */
export const TARGETS = [`${FOLDER}/target`, `${FOLDER}/target2`] as const;

/** Pointer to the control block of the first job, or of the second. */
export function controlOf({ controls }: Setup, which = 0): number {
  const found = controls[which];
  if (found === undefined) throw new Error(`there is no job ${which + 1}`);
  return found;
}
