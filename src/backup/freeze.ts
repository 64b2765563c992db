import { randomBytes } from 'node:crypto';
import { rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import type { Disk } from '../block/disk.js';
import {
  FRAME_CONTROL_BYTES,
  type FrameDescriptor,
  freeFrame,
  type OnCbwError,
} from '../block/filters/copy-before-write.js';
import { closeNode, openImage } from '../block/graph.js';
import { isNbdName } from '../block/nbd/index.js';
import type { NodeDescriptor } from '../block/node.js';
import { StillframeError, systemError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';

/** How an instant of a disk is held. */
export interface FreezeOptions {
  /**
   * Folder for the file that old data is saved to before guests write; it has no name there, and is gone with the
   * process. Default: the folder of the image.
   */
  readonly scratch?: string | undefined;
  /** What becomes of a guest's write whose old data cannot be saved. Default `break-guest-write`. */
  readonly onCbwError?: OnCbwError | undefined;
}

/** An instant that is held; plain data. */
export interface FrozenDescriptor {
  readonly frame: FrameDescriptor;
}

/** Granularity of what is saved, in bytes. */
const CLUSTER_BYTES = 65536;
/** The kernels count clusters up to here. */
const MAX_CLUSTERS = 2 ** 31 - 1;
/** A free word in the control block of a frame: nobody waits for this one to break. */
const OWNER_WORD = 32;

/**
 * Takes the instant now and holds it by copy-before-write to a scratch file (QEMU: image fleecing).
 *
 * @param id of the frame, never used before in this engine
 * @throws StillframeError ERR_STILLFRAME_NO_SPACE, …_PERMISSION, …_NOT_FOUND (the scratch), …_ARENA_EXHAUSTED,
 *   …_INVALID_ARGUMENT (8 frames of the disk already)
 */
export function freeze(runtime: Runtime, disk: Disk, options: FreezeOptions, id: number): FrozenDescriptor {
  const { arena } = runtime;
  const { length, node } = disk.descriptor;
  const clusters = Math.ceil(length / CLUSTER_BYTES);
  if (clusters > MAX_CLUSTERS) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${node.path}' has ${length} bytes; an instant of at most ${MAX_CLUSTERS * CLUSTER_BYTES} can be held`,
    );
  }
  const undo: (() => void)[] = [];
  try {
    const target = openScratch(runtime, node.path, options.scratch, length);
    undo.push(() => closeNode(runtime, target));
    const control = arena.alloc(FRAME_CONTROL_BYTES, 'frame control block');
    undo.push(() => arena.free(control));
    const states = arena.alloc(Math.ceil(clusters / 32) * 8, `cluster states (${clusters} clusters)`);
    undo.push(() => arena.free(states));
    const frame: FrameDescriptor = {
      id,
      control,
      states,
      target,
      length,
      clusterSize: CLUSTER_BYTES,
      clusters,
      targetReadsZero: true,
      skipUnallocated: false,
      compress: false,
      onCbwError: options.onCbwError ?? 'break-guest-write',
      owner: control + OWNER_WORD,
    };
    disk.addFrame(frame);
    return { frame };
  } catch (error) {
    for (const step of undo.reverse()) step();
    throw error;
  }
}

/** Lets an instant go. Nobody may read it any more. */
export function thaw(runtime: Runtime, disk: Disk, { frame }: FrozenDescriptor): void {
  disk.removeFrame(frame.id);
  freeFrame(runtime, frame);
  closeNode(runtime, frame.target);
}

/** Makes the scratch file: it has its name only until it is open. */
function openScratch(
  runtime: Runtime,
  image: string,
  folder: string | undefined,
  length: number,
): NodeDescriptor {
  const remote = isNbdName(image);
  const name = `.${remote ? 'nbd' : basename(image)}.frozen-${randomBytes(8).toString('hex')}`;
  const path = join(folder ?? (remote ? tmpdir() : dirname(image)), name);
  try {
    // It holds what guests have written: nobody else is to read it.
    writeFileSync(path, '', { flag: 'wx', mode: 0o600 });
    truncateSync(path, length);
    return openImage(runtime, path, { format: 'raw', readOnly: false });
  } catch (error) {
    throw systemError(`cannot make the scratch file '${path}'`, error);
  } finally {
    rmSync(path, { force: true });
  }
}
