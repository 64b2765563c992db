import { createHash } from 'node:crypto';
import { BitmapSet } from '../bitmap/bitmap-set.js';
import { checkBitmap, DirtyBitmap, defaultGranularity, smallestGranularity } from '../bitmap/dirty-bitmap.js';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { DISK_BITMAPS, type DiskDescriptor } from './disk.js';
import { attachNode } from './graph.js';
import { attachNbd } from './nbd/index.js';
import { bitmapsOf, claimBitmap, listBitmaps, loadBitmap, noBitmapsInVersion2 } from './qcow2/index.js';
import { attachFile } from './raw/file.js';

/** A dirty bitmap of a live disk as people see it (QAPI `BlockDirtyInfo`). */
export interface BitmapStatus {
  /** Empty: one that a job has made for itself. */
  readonly name: string;
  /** Bytes that are dirty, in whole granules. */
  readonly count: number;
  /** Bytes. */
  readonly granularity: number;
  /** What is written from now on becomes dirty. */
  readonly recording: boolean;
  /** A job or an export relies on it. */
  readonly busy: boolean;
  /** The image keeps it. */
  readonly persistent: boolean;
  /** Whoever recorded into it did not come to store it: it can be removed and nothing else. */
  readonly inconsistent: boolean;
}

/** One action on the dirty bitmap `name` of a live disk (QMP `block-dirty-bitmap-*`). */
export type DiskBitmapAction =
  | {
      readonly action: 'add';
      readonly name: string;
      /** Bytes, a power of two from 512 on. Default: the cluster size, but from 4 KiB to 64 KiB. */
      readonly granularity?: number | undefined;
      /** The image keeps it. Default false. */
      readonly persistent?: boolean | undefined;
      /** It records nothing yet. Default false. */
      readonly disabled?: boolean | undefined;
    }
  | { readonly action: 'remove' | 'clear' | 'enable' | 'disable'; readonly name: string }
  | {
      readonly action: 'merge';
      readonly name: string;
      /** Bitmaps of the same disk, or of another one of the same length. */
      readonly sources: readonly (string | { readonly disk: DiskDescriptor; readonly name: string })[];
    };

/** What to look for before a bitmap is used (QEMU's `BDRV_BITMAP_*`). */
const CHECKS = {
  busy: 'is currently in use by another operation and cannot be used',
  'read-only': 'is readonly and cannot be modified',
  inconsistent: 'is inconsistent and cannot be used',
} as const;
type Check = keyof typeof CHECKS;

/** A job or an export relies on the bitmap of that name. */
export function busyBitmap(name: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_BITMAP_BUSY', `Bitmap '${name}' ${CHECKS.busy}`);
}

/** The dirty bitmaps of a disk: those of its image where that is open for writing and keeps some, else its own. */
export function bitmapsOfDisk(runtime: Runtime, { control, node }: DiskDescriptor): BitmapSet {
  return node.driver === 'qcow2' && !node.readOnly
    ? bitmapsOf(runtime, node)
    : new BitmapSet(runtime, control + DISK_BITMAPS);
}

/** Metadata contexts of an export that are dirty bitmaps, and the flag of what is dirty in them. */
const BITMAP_CONTEXT = 'qemu:dirty-bitmap:';
const CONTEXT_DIRTY = 1;

/**
 * Puts the bitmaps of a read-only image into the disk's own set, and no wrong ones of a damaged image; and those of an
 * NBD export that were asked for (`x-dirty-bitmap`), as they are now.
 */
export function openDiskBitmaps(runtime: Runtime, disk: DiskDescriptor): void {
  const { node } = disk;
  // QEMU's nodes do not have those of a server.
  if (disk.borrowed !== true) openExportBitmaps(runtime, disk);
  if (node.driver !== 'qcow2' || !node.readOnly || node.ofSnapshot) return;
  try {
    listBitmaps(runtime, attachFile(runtime, node.file), bitmapsOfDisk(runtime, disk));
  } catch (error) {
    // The drive itself can be read all the same.
    if (!(error instanceof StillframeError) || error.code === 'ERR_STILLFRAME_ARENA_EXHAUSTED') throw error;
  }
}

function openExportBitmaps(runtime: Runtime, disk: DiskDescriptor): void {
  const { node, length } = disk;
  if (node.driver !== 'raw' || node.file.driver !== 'nbd' || node.offset) return;
  const { file } = node;
  const bitmaps = bitmapsOfDisk(runtime, disk);
  try {
    for (const [index, context] of file.target.contexts.entries()) {
      // The first one that the server tells of is the status of allocation.
      if (!context.startsWith(BITMAP_CONTEXT) || file.contexts[index + 1] !== true) continue;
      const bitmap = bitmaps.add({
        name: context.slice(BITMAP_CONTEXT.length),
        granularity: smallestGranularity(length),
        length,
        enabled: false,
        persistent: false,
      });
      bitmap.makeBits();
      let offset = 0;
      attachNbd(runtime, file).contextExtents(context, 0, Math.min(length, file.length), (extent) => {
        if ((extent.flags & CONTEXT_DIRTY) !== 0) bitmap.set(offset, extent.length);
        offset += extent.length;
      });
    }
  } catch (error) {
    bitmaps.free();
    throw error;
  }
}

/** Gives the memory of the disk's own bitmaps back. */
export function closeDiskBitmaps(runtime: Runtime, { control }: DiskDescriptor): void {
  new BitmapSet(runtime, control + DISK_BITMAPS).free();
}

/** @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED, …_CORRUPT_IMAGE, …_IO (its bits are read for their count) */
export function bitmapStatuses(runtime: Runtime, disk: DiskDescriptor): BitmapStatus[] {
  return bitmapsOfDisk(runtime, disk)
    .all()
    .map((bitmap) => {
      const { inconsistent } = bitmap;
      if (!inconsistent) load(runtime, disk, bitmap);
      return {
        name: bitmap.name,
        count: inconsistent ? 0 : bitmap.count,
        granularity: bitmap.granularity,
        recording: bitmap.recording,
        busy: bitmap.busy,
        persistent: bitmap.persistent,
        inconsistent,
      };
    });
}

/**
 * A bitmap of the disk, its bits in memory.
 *
 * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_BUSY, …_READ_ONLY, …_BITMAP_INCONSISTENT
 */
export function findBitmap(
  runtime: Runtime,
  disk: DiskDescriptor,
  name: string,
  checks: readonly Check[],
): DirtyBitmap {
  const bitmap = bitmapsOfDisk(runtime, disk).get(name);
  const refuse = (check: Check, code: StillframeError['code']): void => {
    if (checks.includes(check)) throw new StillframeError(code, `Bitmap '${name}' ${CHECKS[check]}`);
  };
  if (bitmap.busy) refuse('busy', 'ERR_STILLFRAME_BITMAP_BUSY');
  if (isReadOnly(disk, bitmap)) refuse('read-only', 'ERR_STILLFRAME_READ_ONLY');
  if (bitmap.inconsistent) refuse('inconsistent', 'ERR_STILLFRAME_BITMAP_INCONSISTENT');
  else load(runtime, disk, bitmap);
  return bitmap;
}

/** What the image has of the bitmap does not count from now on: it is about to be changed. */
export function claimDiskBitmap(runtime: Runtime, { node }: DiskDescriptor, bitmap: DirtyBitmap): void {
  if (node.driver === 'qcow2' && bitmap.persistent && !node.readOnly) claimBitmap(runtime, node, bitmap);
}

function isReadOnly({ node }: DiskDescriptor, bitmap: DirtyBitmap): boolean {
  return bitmap.persistent && node.driver === 'qcow2' && node.readOnly;
}

function load(runtime: Runtime, { node }: DiskDescriptor, bitmap: DirtyBitmap): void {
  if (!bitmap.loaded && node.driver === 'qcow2') {
    loadBitmap(runtime, attachFile(runtime, node.file), bitmap);
  }
}

/** An action that was carried out, until it is kept or taken back. */
export interface DoneAction {
  /** Nobody will take it back. */
  readonly keep: () => void;
  /** Makes everything as it was before. */
  readonly undo: () => void;
}

/**
 * Carries an action out on a live disk. Semantics and texts of errors: QMP `block-dirty-bitmap-*` and their place in a
 * `transaction`.
 *
 * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_EXISTS, …_BITMAP_BUSY, …_BITMAP_INCONSISTENT,
 *   …_READ_ONLY, …_INVALID_ARGUMENT, …_SIZE_MISMATCH, …_UNSUPPORTED_FEATURE, …_ARENA_EXHAUSTED
 */
export function editDiskBitmap(runtime: Runtime, disk: DiskDescriptor, action: DiskBitmapAction): DoneAction {
  const set = bitmapsOfDisk(runtime, disk);
  const { name } = action;
  switch (action.action) {
    case 'add': {
      const added = addBitmap(runtime, disk, action);
      return { keep: () => undefined, undo: () => set.remove(added) };
    }
    case 'remove': {
      const bitmap = findBitmap(runtime, disk, name, ['busy', 'read-only']);
      if (bitmap.pins > 0) {
        throw busyBitmap(name);
      }
      // Guests go on: in the file it is until the image is closed, where nobody may take it for what it was.
      if (!bitmap.inconsistent) claimDiskBitmap(runtime, disk, bitmap);
      const { busy } = bitmap;
      // Until nobody can want it back.
      bitmap.busy = true;
      return {
        keep: () => set.remove(bitmap),
        undo: () => {
          bitmap.busy = busy;
        },
      };
    }
    case 'enable':
    case 'disable': {
      const bitmap = findBitmap(runtime, disk, name, ['busy', 'inconsistent']);
      const { enabled } = bitmap;
      claimDiskBitmap(runtime, disk, bitmap);
      bitmap.enabled = action.action === 'enable';
      return {
        keep: () => undefined,
        undo: () => {
          bitmap.enabled = enabled;
        },
      };
    }
    case 'clear':
      return changeBits(runtime, disk, name, (bitmap) => bitmap.clear(0, bitmap.length));
    case 'merge':
      return changeBits(runtime, disk, name, (bitmap) => {
        for (const source of action.sources) {
          const [owner, from] = typeof source === 'string' ? [disk, source] : [source.disk, source.name];
          bitmap.merge(findBitmap(runtime, owner, from, ['busy', 'inconsistent']));
        }
      });
  }
}

function addBitmap(
  runtime: Runtime,
  disk: DiskDescriptor,
  { name, granularity, persistent = false, disabled = false }: Extract<DiskBitmapAction, { action: 'add' }>,
): DirtyBitmap {
  const { node, length, readOnly } = disk;
  const options = {
    name,
    granularity: granularity ?? defaultGranularity(attachNode(runtime, node).clusterSize),
    length,
    enabled: !disabled,
    persistent,
  };
  checkBitmap(options);
  const set = bitmapsOfDisk(runtime, disk);
  if (persistent) {
    const unsupported = (why: string): StillframeError =>
      new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        `Can't make bitmap '${name}' persistent in '${node.path}': ${why}`,
      );
    if (node.driver !== 'qcow2') throw unsupported('only images of format qcow2 keep bitmaps');
    if (node.version === 2) throw noBitmapsInVersion2(node.path);
    if (readOnly) throw unsupported('the image is read-only');
  }
  // What it has no memory for it does not record: nobody may see it before.
  const added = set.add({ ...options, enabled: false });
  try {
    added.makeBits();
    added.enabled = !disabled;
    return added;
  } catch (error) {
    set.remove(added);
    throw error;
  }
}

/** Changes the bits of a bitmap so that they can be had back. */
function changeBits(
  runtime: Runtime,
  disk: DiskDescriptor,
  name: string,
  body: (bitmap: DirtyBitmap) => void,
): DoneAction {
  const bitmap = findBitmap(runtime, disk, name, ['busy', 'read-only', 'inconsistent']);
  const { granularity, length } = bitmap;
  const before = DirtyBitmap.create(runtime, {
    name: '',
    granularity,
    length,
    enabled: false,
    persistent: false,
  });
  try {
    before.makeBits();
    before.merge(bitmap);
    claimDiskBitmap(runtime, disk, bitmap);
    body(bitmap);
  } catch (error) {
    if (before.loaded) bitmap.merge(before);
    before.free();
    throw error;
  }
  return {
    keep: () => before.free(),
    undo: () => {
      bitmap.swapBits(before);
      before.free();
    },
  };
}

/** The bitmap that takes over while a job relies on `bitmap`; in no set yet. @throws …_ARENA_EXHAUSTED */
export function makeSuccessor(runtime: Runtime, { granularity, length }: DirtyBitmap): DirtyBitmap {
  const successor = DirtyBitmap.create(runtime, {
    name: '',
    granularity,
    length,
    enabled: false,
    persistent: false,
  });
  try {
    successor.makeBits();
    return successor;
  } catch (error) {
    successor.free();
    throw error;
  }
}

/** SHA-256 of the bits as 64-bit words, as QMP `x-debug-block-dirty-bitmap-sha256` has it. */
export function bitmapSha256(runtime: Runtime, disk: DiskDescriptor, name: string): string {
  const bitmap = findBitmap(runtime, disk, name, []);
  const bytes = Math.ceil(bitmap.bitBytes / 8) * 8;
  const hash = createHash('sha256');
  // Nothing was read of what does not count.
  if (bitmap.inconsistent) return hash.update(Buffer.alloc(bytes)).digest('hex');
  return hash.update(runtime.arena.copyOut(bitmap.bitsPointer, bytes)).digest('hex');
}
