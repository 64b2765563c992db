import type { DirtyBitmap } from '../../bitmap/dirty-bitmap.js';
import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import { RecordDirty } from '../filters/record-dirty.js';
import type {
  BlockNode,
  FileDescriptor,
  NodeDescriptor,
  Qcow2Descriptor,
  StorageDescriptor,
} from '../node.js';
import { attachFile, type FileNode } from '../raw/file.js';
import { bitmapsOf, claimBitmap as claim, openBitmaps, storeBitmaps } from './bitmaps.js';
import { repairDirty } from './check/check.js';
import { type Qcow2Header, readHeader } from './header.js';
import { type BackingReference, type Layout, rewriteBacking } from './header-write.js';
import { headerOfSnapshot, readSnapshotTable, type SnapshotSelector } from './listings.js';
import { Metadata } from './metadata.js';
import { Qcow2Node } from './node.js';
import { placesOfSnapshots } from './places.js';
import { allocateState, freeState } from './state.js';

/**
 * Opens the image in an open file.
 *
 * Memory taken from the arena: the L1 table (at most 32 MiB), 1 MiB of L2 slices and scratch buffers of 6 (read-only)
 * or 12 clusters; for writing also the refcount table with room to grow (at most 8 MiB), 256 KiB of refcount slices
 * and about 0.5 MiB of working memory, and for dirty bitmaps that record their bits (at most 256 MiB).
 *
 * An image that was not closed cleanly (dirty bit) gets its refcounts put right when it is opened for writing.
 *
 * @param options.dataFile the open external data file; undefined although the image has one: only the tables can be
 *   looked at
 * @param options.recordDirty default true; without it a change of the drive makes dirty bitmaps that record inconsistent
 * @param backing the open backing node; undefined although the header names one: unallocated ranges read as zeroes,
 *   but are still told apart from zeroes, and writes of parts of unallocated clusters are refused
 * @throws StillframeError what {@link readHeader} throws; ERR_STILLFRAME_CORRUPT_IMAGE where an image that is marked
 *   corrupt, that has more than wrong refcounts after it was not closed cleanly, or whose tables refer to one cluster
 *   twice, is opened for writing
 */
export function openQcow2(
  runtime: Runtime,
  file: StorageDescriptor,
  backing: NodeDescriptor | undefined,
  options: {
    readonly readOnly: boolean;
    readonly dataFile?: FileDescriptor | undefined;
    /** Read the drive as it is in an internal snapshot; only read-only. */
    readonly snapshot?: SnapshotSelector | undefined;
    /** Size and L1 table to use instead of the header's, while the image is resized. */
    readonly layout?: Layout | undefined;
    readonly recordDirty?: boolean | undefined;
  },
): Qcow2Descriptor {
  const { readOnly, dataFile } = options;
  const node = attachFile(runtime, file);
  let current = readHeader(runtime, node);
  if (!readOnly) {
    checkWritable(file.path, current);
    if (current.dirty) current = repairDirty(runtime, node);
  }
  const seen =
    options.snapshot === undefined ? current : headerOfSnapshot(runtime, node, current, options.snapshot);
  const header = { ...seen, ...options.layout };
  const places =
    readOnly || header.snapshotCount === 0
      ? new Float64Array()
      : placesOfSnapshots(readSnapshotTable(runtime, node, header));
  const control = allocateState(runtime, file.path, header, node.length, readOnly, places);
  const descriptor: Qcow2Descriptor = {
    driver: 'qcow2',
    path: file.path,
    readOnly,
    file,
    backing,
    length: header.length,
    clusterBits: header.clusterBits,
    version: header.version,
    refcountBits: header.refcountBits,
    compressionType: header.compressionType,
    backingFile: header.backingFile,
    backingFormat: header.backingFormat,
    dataFile,
    hasDataFile: header.hasDataFile,
    dataFileName: header.dataFile,
    dataFileRaw: header.dataFileRaw,
    extendedL2: header.extendedL2,
    ofSnapshot: options.snapshot !== undefined,
    lazyRefcounts: header.lazyRefcounts,
    dirty: header.dirty,
    corrupt: header.corrupt,
    control,
  };
  try {
    const metadata = new Metadata(runtime, descriptor, node, dataFileOf(runtime, descriptor));
    metadata.initialise(readOnly);
    if (!readOnly) openBitmaps(runtime, descriptor, node, current, metadata, options.recordDirty ?? true);
    return descriptor;
  } catch (error) {
    bitmapsOf(runtime, descriptor).free();
    freeState(runtime, control);
    throw error;
  }
}

function checkWritable(path: string, header: Qcow2Header): void {
  if (header.corrupt) {
    throw new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${path}' is marked corrupt and can only be opened read-only; repair it with 'stillframe check --repair all'`,
    );
  }
}

/** This thread's facade of an open image. */
export function attachQcow2(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  file: FileNode,
  backing: BlockNode | undefined,
): BlockNode {
  const node = new Qcow2Node(runtime, descriptor, file, dataFileOf(runtime, descriptor), backing);
  return descriptor.readOnly ? node : new RecordDirty(runtime, node, bitmapsOf(runtime, descriptor));
}

function dataFileOf(runtime: Runtime, descriptor: Qcow2Descriptor): FileNode | undefined {
  return descriptor.dataFile && attachFile(runtime, descriptor.dataFile);
}

/**
 * Writes everything to the disk where the image is writable, its dirty bitmaps included, and gives the memory back,
 * whatever happens. No thread may use a facade of it any more. The files stay open.
 */
export function closeQcow2(runtime: Runtime, descriptor: Qcow2Descriptor, file: FileNode): void {
  try {
    if (descriptor.readOnly) return;
    const metadata = new Metadata(runtime, descriptor, file, dataFileOf(runtime, descriptor));
    try {
      storeBitmaps(runtime, descriptor, file, metadata);
    } finally {
      metadata.finish();
    }
  } finally {
    bitmapsOf(runtime, descriptor).free();
    freeState(runtime, descriptor.control);
  }
}

/**
 * Makes the header of a writable image name another backing file, or none.
 *
 * @throws StillframeError what {@link rewriteBacking} throws
 */
export function changeBacking(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  backing: BackingReference | undefined,
): void {
  const file = attachFile(runtime, descriptor.file);
  const metadata = new Metadata(runtime, descriptor, file, dataFileOf(runtime, descriptor));
  metadata.state.withLock(() => metadata.clearAutoclear());
  rewriteBacking(runtime, file, backing);
}

/** See `claimBitmap` of the bitmaps. */
export function claimBitmap(runtime: Runtime, descriptor: Qcow2Descriptor, bitmap: DirtyBitmap): void {
  const file = attachFile(runtime, descriptor.file);
  const metadata = new Metadata(runtime, descriptor, file, dataFileOf(runtime, descriptor));
  claim(runtime, descriptor, file, metadata, bitmap);
}

/** Makes every cluster of a writable image unallocated: its backing file shows through everywhere. */
export function emptyQcow2(runtime: Runtime, descriptor: Qcow2Descriptor): void {
  bareNode(runtime, descriptor, undefined).makeEmpty();
}

/** The driver itself, without what a guest's requests pass. */
export function bareNode(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  backing: BlockNode | undefined,
): Qcow2Node {
  const file = attachFile(runtime, descriptor.file);
  return new Qcow2Node(runtime, descriptor, file, dataFileOf(runtime, descriptor), backing);
}
