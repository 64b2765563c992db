import { BitmapSet } from '../bitmap/bitmap-set.js';
import { type PlainError, StillframeError, toStillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { DISK_BITMAPS, type DiskDescriptor } from './disk.js';
import { bitmapsOfDisk, busyBitmap, closeDiskBitmaps, openDiskBitmaps } from './disk-bitmaps.js';
import { NO_LIMITS } from './filters/blkdebug.js';
import { type BlkdebugRule, BlkdebugState, blkdebugBytes } from './filters/blkdebug-state.js';
import { attachNode, closeLayer } from './graph.js';
import type { NodeDescriptor, Qcow2Descriptor, RawDescriptor } from './node.js';
import {
  createSnapshot,
  deleteSnapshot,
  type NewSnapshot,
  openQcow2,
  type Preallocation,
  readHeader,
  readSnapshots,
  resizeQcow2,
  type SnapshotInfo,
} from './qcow2/index.js';
import { attachFile } from './raw/file.js';
import { openRaw } from './raw/raw.js';
import { type Links, relinkNode } from './relink.js';
import { resizeRaw } from './resize.js';

/*
 * Changes of nodes below live disks. Each is made while nobody uses any disk above the node, and uses up what was its
 * state; dirty bitmaps that no image keeps stay with the disk on the node.
 */

/** What became of a node. */
export interface Changed {
  /** As it is now, also where something failed. */
  readonly node: NodeDescriptor;
  readonly failure: PlainError | undefined;
}

/**
 * Closes a qcow2 image and opens it for reading or for writing, on other nodes where `links` says so.
 *
 * @param disk the one on the node
 */
export function reopenImage(
  runtime: Runtime,
  disk: DiskDescriptor,
  node: Qcow2Descriptor,
  options: Links & { readonly readOnly: boolean },
): Changed {
  const linked = relinkNode(runtime, node, options);
  if (linked.driver !== 'qcow2') throw new TypeError('an image stays one');
  // The same file may be open with another descriptor by now; another file is none of the image as it was.
  const file = linked.file.identity === node.file.identity ? linked.file : node.file;
  return anew(runtime, disk, { ...node, file }, { ...linked, readOnly: options.readOnly }, () =>
    closeLayer(runtime, { ...node, file }),
  );
}

/**
 * Makes an image larger or smaller; what is new reads as zeroes. Semantics: QMP `block_resize`.
 *
 * @param disk the one on the node
 * @param length bytes, a multiple of 512
 * @param preallocation of what is new
 */
export function resizeNode(
  runtime: Runtime,
  disk: DiskDescriptor,
  node: NodeDescriptor,
  length: number,
  preallocation: Preallocation,
): Changed {
  if (node.driver === 'raw') return resizeRawNode(runtime, disk, node, length, preallocation);
  if (node.driver === 'qcow2') {
    const kept = bitmapsOfDisk(runtime, disk)
      .all()
      .filter(({ persistent }) => persistent);
    if (length === 0 && kept.length > 0) {
      return {
        node,
        failure: new StillframeError(
          'ERR_STILLFRAME_INVALID_ARGUMENT',
          `'${node.path}' keeps dirty bitmaps, which an image of 0 bytes cannot; remove them first`,
        ).toPlain(),
      };
    }
    return anew(runtime, disk, node, node, () => {
      const backing = node.backing && attachNode(runtime, node.backing);
      resizeQcow2(runtime, node, backing, { length, preallocation });
    });
  }
  const error = new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `'${node.path}': Image format driver does not support resize`,
  );
  return { node, failure: error.toPlain() };
}

/** A new internal snapshot, or the id of one that goes. */
export type SnapshotChange = { readonly create: NewSnapshot } | { readonly delete: string };

/** Changes the internal snapshots of an image, whose node stays what it is. @throws StillframeError …_UNSUPPORTED_FEATURE */
export function changeSnapshots(runtime: Runtime, node: NodeDescriptor, change: SnapshotChange): void {
  if (node.driver !== 'qcow2') {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${node.path}' has the format ${node.driver}, which has no internal snapshots`,
    );
  }
  if ('create' in change) createSnapshot(runtime, node, change.create);
  else deleteSnapshot(runtime, node, change.delete);
}

/** The internal snapshots of a node; it has none where its format has none. */
export function listSnapshots(runtime: Runtime, node: NodeDescriptor): SnapshotInfo[] {
  if (node.driver !== 'qcow2') return [];
  const file = attachFile(runtime, node.file);
  return readSnapshots(runtime, file, readHeader(runtime, file)).map(({ info }) => info);
}

function resizeRawNode(
  runtime: Runtime,
  disk: DiskDescriptor,
  node: RawDescriptor,
  length: number,
  preallocation: Preallocation,
): Changed {
  const failure = failureOf(() => resizeRaw(runtime, node, length, preallocation));
  const resized = openRaw(runtime, node.file, { ...node, size: undefined });
  for (const bitmap of bitmapsOfDisk(runtime, disk).all()) {
    if (bitmap.length !== resized.length) bitmap.resize(resized.length);
  }
  return { node: resized, failure };
}

/** Runs `close`, which uses the state of an image up, and opens the image as `wanted`, or else as it was. */
function anew(
  runtime: Runtime,
  disk: DiskDescriptor,
  node: Qcow2Descriptor,
  wanted: Qcow2Descriptor,
  close: () => void,
): Changed {
  const set = bitmapsOfDisk(runtime, { ...disk, node });
  // The image keeps those: they are others once it is open again.
  const relied = set.all().find(({ persistent, busy, pins }) => persistent && (busy || pins > 0));
  if (relied !== undefined) return { node, failure: busyBitmap(relied.name).toPlain() };
  const bitmaps = set.takeTransient();
  closeDiskBitmaps(runtime, disk);
  let failure = failureOf(close);
  let opened: NodeDescriptor | undefined;
  for (const { file, backing, dataFile, readOnly } of failure === undefined ? [wanted, node] : [node]) {
    const problem = failureOf(() => {
      opened = openQcow2(runtime, file, backing, { readOnly, dataFile });
    });
    if (opened !== undefined) break;
    failure ??= problem;
  }
  opened ??= failedNode(runtime, node);
  const after = { ...disk, node: opened, length: attachNode(runtime, opened).length };
  openDiskBitmaps(runtime, after);
  for (const bitmap of bitmaps) if (bitmap.length !== after.length) bitmap.resize(after.length);
  bitmapsOfDisk(runtime, after).adopt(bitmaps);
  return { node: opened, failure };
}

function failureOf(body: () => void): PlainError | undefined {
  try {
    body();
    return undefined;
  } catch (error) {
    return toStillframeError(error).toPlain();
  }
}

/**
 * What stands in for an image that could not be opened again: every request fails. What it holds nobody can know, so it must
 * not say that there are zeroes: whoever lies on it would take them for its content.
 */
function failedNode(runtime: Runtime, { path, length }: Qcow2Descriptor): NodeDescriptor {
  const common = { kind: 'inject-error', event: 'none', state: 0, errno: EIO } as const;
  const rules: readonly BlkdebugRule[] = [{ ...common, iotype: undefined, offset: undefined, once: false }];
  const state = runtime.arena.alloc(blkdebugBytes(rules.length), 'state of a node that failed');
  new BlkdebugState(runtime.arena, state, rules).initialise();
  return {
    driver: 'blkdebug',
    path,
    readOnly: true,
    length,
    child: { driver: 'null-co', path, readOnly: true, length, readsZero: false, latencyMs: 0 },
    rules,
    limits: NO_LIMITS,
    state,
  };
}

const EIO = 5;

/** Two disks exchange the dirty bitmaps that no image keeps, as they exchange what they lie on. */
export function swapBitmaps(runtime: Runtime, one: DiskDescriptor, other: DiskDescriptor): void {
  const [ofOne, ofOther] = [one, other].map(({ control }) => new BitmapSet(runtime, control + DISK_BITMAPS));
  const [taken, given] = [ofOne?.takeTransient() ?? [], ofOther?.takeTransient() ?? []];
  ofOne?.adopt(given);
  ofOther?.adopt(taken);
}
