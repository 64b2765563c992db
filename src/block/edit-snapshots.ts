import { StillframeError, toStillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { closeFiles, closeNode, type OpenImageOptions, openForEditing } from './graph.js';
import { listSnapshots } from './live-changes.js';
import type { NodeDescriptor } from './node.js';
import { applySnapshot, createSnapshot, deleteSnapshot } from './qcow2/index.js';

/** One action of `qemu-img snapshot` on an internal snapshot. */
export type SnapshotAction =
  /** A new snapshot of what the drive is now; others may have the same name. Bytes of it behind the 255th are cut off. */
  | { readonly action: 'create'; readonly name: string }
  /** The drive becomes what a snapshot has, its size included; an id goes before a name. */
  | { readonly action: 'apply'; readonly name: string }
  /** The first snapshot of that name goes. */
  | { readonly action: 'delete'; readonly name: string };

/** What `qemu-img` says where a snapshot cannot be applied. */
const WORDS: ReadonlyMap<string, string> = new Map([
  ['ERR_STILLFRAME_NOT_FOUND', 'No such file or directory'],
  ['ERR_STILLFRAME_UNSUPPORTED_FEATURE', 'Operation not supported'],
]);

/** Most bytes of a name. */
const MOST_NAME_BYTES = 255;

/**
 * Makes, applies or deletes an internal snapshot of an image that nobody else uses. An interruption leaves the image as
 * it was or as it is to be, with leaked clusters at worst. Its backing file is not opened.
 *
 * Semantics and errors: `qemu-img snapshot`.
 *
 * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_UNSUPPORTED_FEATURE, …_BITMAP_BUSY (a snapshot is applied to an
 *   image with dirty bitmaps), …_INVALID_ARGUMENT, …_NO_SPACE and what opening an image throws
 */
export function editSnapshots(
  runtime: Runtime,
  path: string,
  { action, name }: SnapshotAction,
  options: Pick<OpenImageOptions, 'format'>,
): void {
  const image = openForEditing(runtime, path, options);
  try {
    if (action === 'apply') apply(runtime, image, name);
    else closing(runtime, image, () => (action === 'create' ? create : remove)(runtime, image, name));
  } catch (error) {
    const { code, message, errno } = toStillframeError(error);
    throw new StillframeError(code, `Could not ${action} snapshot '${name}': ${message}`, {
      cause: error,
      errno,
    });
  }
}

function closing(runtime: Runtime, image: NodeDescriptor, body: () => void): void {
  try {
    body();
  } finally {
    closeNode(runtime, image);
  }
}

function create(runtime: Runtime, image: NodeDescriptor, name: string): void {
  if (image.driver !== 'qcow2' || image.hasDataFile) {
    throw new StillframeError('ERR_STILLFRAME_UNSUPPORTED_FEATURE', '-95 (Operation not supported)');
  }
  const nowMs = Date.now();
  createSnapshot(runtime, image, {
    name: shortened(name),
    'date-sec': Math.floor(nowMs / 1000),
    'date-nsec': (nowMs % 1000) * 1_000_000,
    'vm-clock-nsec': 0n,
    icount: 0n,
  });
}

/** As much of a name as fits, in whole characters. */
function shortened(name: string): string {
  const bytes = Buffer.from(name);
  if (bytes.length <= MOST_NAME_BYTES) return name;
  let end = MOST_NAME_BYTES;
  while (((bytes[end] ?? 0) & 0xc0) === 0x80) end--;
  return bytes.toString('utf8', 0, end);
}

function remove(runtime: Runtime, image: NodeDescriptor, name: string): void {
  const found = listSnapshots(runtime, image).find((snapshot) => snapshot.name === name);
  if (image.driver !== 'qcow2' || found === undefined) {
    throw new StillframeError('ERR_STILLFRAME_NOT_FOUND', 'snapshot not found');
  }
  deleteSnapshot(runtime, image, found.id);
}

/** Closes the image, whatever happens. */
function apply(runtime: Runtime, image: NodeDescriptor, name: string): void {
  if (image.driver !== 'qcow2') {
    closeNode(runtime, image);
    const words = 'Block driver does not support snapshots';
    throw new StillframeError('ERR_STILLFRAME_UNSUPPORTED_FEATURE', words);
  }
  try {
    applySnapshot(runtime, image, name);
  } catch (error) {
    const { code, message } = toStillframeError(error);
    if (code === 'ERR_STILLFRAME_BITMAP_BUSY') throw error;
    throw new StillframeError(code, `Failed to load snapshot: ${WORDS.get(code) ?? message}`, {
      cause: error,
    });
  } finally {
    closeFiles(runtime, image);
  }
}
