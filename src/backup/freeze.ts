import { randomBytes } from 'node:crypto';
import { rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { DirtyBitmap } from '../bitmap/dirty-bitmap.js';
import type { Disk } from '../block/disk.js';
import { findBitmap, makeSuccessor } from '../block/disk-bitmaps.js';
import {
  endCopies,
  FRAME_CONTROL_BYTES,
  type FrameDescriptor,
  frameStateBytes,
  freeFrame,
  type OnCbwError,
} from '../block/filters/copy-before-write.js';
import { CopyDesk } from '../block/filters/copy-desk.js';
import { attachNode, closeNode } from '../block/graph.js';
import { isNbdName } from '../block/nbd/uri.js';
import type { NodeDescriptor } from '../block/node.js';
import { attachFile, closeFile, openFile } from '../block/raw/file.js';
import { openRaw } from '../block/raw/raw.js';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { copyClusterSize } from './target.js';

/** How an instant of a disk is held. */
export interface FreezeOptions {
  /**
   * Folder for the file that old data is saved to before guests write; it has no name there, and is gone with the
   * process. Default: the folder of the image.
   */
  readonly scratch?: string | undefined;
  /** What becomes of a guest's write whose old data cannot be saved. Default `break-guest-write`. */
  readonly onCbwError?: OnCbwError | undefined;
  /** How long a guest's write may wait for that, in milliseconds; 0 (default): as long as it takes. */
  readonly cbwTimeoutMs?: number | undefined;
}

/** How an instant is held that somebody else has a place for. */
export interface HoldOptions extends FreezeOptions {
  /** Open node for old data, in place of a scratch file; it stays open. */
  readonly targetNode?: NodeDescriptor | undefined;
  /** Least bytes that are saved at once, a power of two up to 2 MiB. */
  readonly minClusterSize?: number | undefined;
  /** Dirty bitmap of the disk: only what it has dirty is held, the rest cannot be read. */
  readonly bitmap?: string | undefined;
}

/** An instant that is held; plain data. */
export interface FrozenDescriptor {
  readonly frame: FrameDescriptor;
  /** The place for old data is somebody else's node. */
  readonly borrowed?: boolean | undefined;
}

/** Granularity of what is saved, in bytes. */
const CLUSTER_BYTES = 65536;
/** The kernels count clusters in 31 bits. */
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
export function freeze(runtime: Runtime, disk: Disk, options: HoldOptions, id: number): FrozenDescriptor {
  const { targetNode, bitmap } = options;
  const clusterSize = Math.max(
    targetNode === undefined ? CLUSTER_BYTES : copyClusterSize(attachNode(runtime, targetNode)),
    options.minClusterSize ?? 0,
  );
  if (targetNode !== undefined) checkHolder(runtime, disk, targetNode);
  const plan = bitmap === undefined ? undefined : copyOfBitmap(runtime, disk, bitmap);
  let memory: FrameMemory | undefined;
  let frame: FrameDescriptor | undefined;
  try {
    memory = allocateFrame(runtime, disk, clusterSize, options.cbwTimeoutMs);
    frame = makeHolder(runtime, disk, {
      ...memory,
      id,
      clusterSize,
      plan: plan?.pointer,
      targetNode,
      skipUnallocated: false,
      onCbwError: options.onCbwError ?? 'break-guest-write',
      cbwTimeoutMs: options.cbwTimeoutMs,
      owner: memory.control + OWNER_WORD,
      scratch: options.scratch,
    });
    disk.addFrame(frame);
  } catch (error) {
    if (frame !== undefined && targetNode === undefined) closeScratch(runtime, frame);
    if (memory !== undefined) freeFrame(runtime, memory);
    plan?.free();
    throw error;
  }
  const frozen = { frame, borrowed: targetNode !== undefined };
  try {
    const held = disk.attachFrame(frame);
    if (plan !== undefined) for (let at: number | undefined = 0; at !== undefined; ) at = held.scanNext(at);
    return frozen;
  } catch (error) {
    thaw(runtime, disk, frozen);
    throw error;
  }
}

/** @throws StillframeError ERR_STILLFRAME_SIZE_MISMATCH, …_READ_ONLY */
function checkHolder(runtime: Runtime, { descriptor }: Disk, target: NodeDescriptor): void {
  const { length } = attachNode(runtime, target);
  if (target.readOnly) {
    throw new StillframeError('ERR_STILLFRAME_READ_ONLY', `the target '${target.path}' is read-only`);
  }
  if (length === descriptor.length) return;
  throw new StillframeError(
    'ERR_STILLFRAME_SIZE_MISMATCH',
    `the target '${target.path}' has ${length} bytes and '${descriptor.node.path}' ${descriptor.length}; make them equal`,
  );
}

/** The bitmap as it is now. @throws StillframeError what finding it throws */
function copyOfBitmap(runtime: Runtime, { descriptor }: Disk, name: string): DirtyBitmap {
  const bitmap = findBitmap(runtime, descriptor, name, ['busy', 'inconsistent']);
  const copy = makeSuccessor(runtime, bitmap);
  copy.merge(bitmap);
  return copy;
}

/** Ends an instant: nothing is saved any more, and the threads that copy for guests end. */
export function endFrozen(runtime: Runtime, disk: Disk, { frame }: FrozenDescriptor): void {
  disk.removeFrame(frame.id);
  endCopies(runtime, frame);
}

/** Lets an instant go. Nobody may read it any more, and no thread copies for its guests, or is to begin with that. */
export function thaw(runtime: Runtime, disk: Disk, { frame, borrowed }: FrozenDescriptor): void {
  endCopies(runtime, frame);
  disk.removeFrame(frame.id);
  freeFrame(runtime, frame);
  if (frame.plan !== undefined) new DirtyBitmap(runtime, frame.plan).free();
  if (borrowed !== true) closeScratch(runtime, frame);
}

/** Memory of a frame. */
export type FrameMemory = Pick<FrameDescriptor, 'control' | 'states' | 'clusters' | 'desk'>;

/**
 * @param cbwTimeoutMs of the guests that know the frame
 * @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED, …_INVALID_ARGUMENT (clusters are counted in 31 bits)
 */
export function allocateFrame(
  runtime: Runtime,
  disk: Disk,
  clusterSize: number,
  cbwTimeoutMs = 0,
): FrameMemory {
  const { arena } = runtime;
  const { length, node } = disk.descriptor;
  const clusters = Math.ceil(length / clusterSize);
  if (clusters > MAX_CLUSTERS) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${node.path}' has ${clusters} clusters of ${clusterSize} bytes, more than ${MAX_CLUSTERS}; use a target with larger clusters`,
    );
  }
  const control = arena.alloc(FRAME_CONTROL_BYTES, 'frame control block');
  let desk: number | undefined;
  try {
    if (cbwTimeoutMs > 0) desk = CopyDesk.allocate(arena);
    const states = arena.alloc(frameStateBytes(clusters), `cluster states (${clusters} clusters)`);
    return { control, states, clusters, desk };
  } catch (error) {
    if (desk !== undefined) arena.free(desk);
    arena.free(control);
    throw error;
  }
}

/** What a frame that holds an instant in a scratch file is to be. */
export type HolderOptions = FrameMemory &
  Pick<
    FrameDescriptor,
    'id' | 'clusterSize' | 'skipUnallocated' | 'onCbwError' | 'cbwTimeoutMs' | 'owner'
  > & {
    readonly scratch: string | undefined;
    readonly plan?: number | undefined;
    /** Where old data goes in place of a scratch file. */
    readonly targetNode?: NodeDescriptor | undefined;
  };

/** A frame that saves to a scratch file, not yet on the disk. @throws StillframeError as {@link freeze} */
export function makeHolder(
  runtime: Runtime,
  disk: Disk,
  { scratch, targetNode, ...frame }: HolderOptions,
): FrameDescriptor {
  const { length, node } = disk.descriptor;
  const target = targetNode ?? openScratch(runtime, node.path, scratch, length);
  return { ...frame, target, length, targetReadsZero: targetNode === undefined, compress: false };
}

/** Closes the scratch file of a frame; whatever happens, it is of no use any more. */
export function closeScratch(runtime: Runtime, frame: FrameDescriptor): void {
  try {
    closeNode(runtime, frame.target);
  } catch (error) {
    if (!(error instanceof StillframeError)) throw error;
  }
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
  const file = openFile(runtime, path, { readOnly: false, lock: 'none', create: 'private' });
  try {
    rmSync(path, { force: true });
    attachFile(runtime, file).truncate(length);
    return openRaw(runtime, file);
  } catch (error) {
    closeFile(runtime, file);
    throw error;
  }
}
