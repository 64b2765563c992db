import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { isStorage } from './files.js';
import {
  allowedFolders,
  attachNode,
  closeNode,
  fileIdentity,
  type ImageFormat,
  imagePath,
  namedBacking,
  openImage,
} from './graph.js';
import { findAbove } from './layered-status.js';
import { type BlockNode, type NodeDescriptor, STATUS_ZERO } from './node.js';
import { emptyQcow2 } from './qcow2/index.js';
import { resizeOpen } from './resize.js';
import { chainStatus } from './status.js';

export interface CommitOptions {
  /** Format of the image; looked for in its first bytes when absent. */
  readonly format?: ImageFormat | undefined;
  /** An image of the chain to commit into; default: the image's backing file. */
  readonly base?: string | undefined;
  /** The image keeps its data; it does as well where `base` is given. */
  readonly keep: boolean;
  /** Folders from which headers may open backing files; default: the image's own. */
  readonly allowBacking?: readonly string[] | undefined;
  /** At most this many bytes are copied in a second; undefined: as many as can be. */
  readonly bytesPerSecond?: number | undefined;
}

const BUFFER_BYTES = 2 * 1024 * 1024;

/**
 * Writes what an image (with `base`: every image above it) holds into its backing file. Once that is durable the
 * image is emptied, unless it is to keep its data. Semantics: `qemu-img commit`.
 *
 * @param onProgress called with bytes done and bytes in all
 * @throws StillframeError ERR_STILLFRAME_BACKING_MISSING (no backing file, or `base` is not in the chain),
 *   and what opening, resizing (a smaller base), reading and writing throw
 */
export function commitImage(
  runtime: Runtime,
  path: string,
  options: CommitOptions,
  onProgress: (done: number, total: number) => void,
): void {
  const keep = options.keep || options.base !== undefined;
  const layers: NodeDescriptor[] = [];
  try {
    const { format, allowBacking } = options;
    layers.push(openImage(runtime, path, { format, readOnly: keep, backing: allowBacking, chain: false }));
    const base = openBase(runtime, path, layers, options);
    try {
      const nodes = layers.map((layer) => attachNode(runtime, layer));
      const target = attachNode(runtime, base);
      copyLayers(runtime, nodes, target, options.bytesPerSecond, onProgress);
      target.flush();
    } finally {
      closeNode(runtime, base);
    }
    const [top] = layers;
    if (!keep && top?.driver === 'qcow2') {
      emptyQcow2(runtime, top);
      attachNode(runtime, top).flush();
    }
  } finally {
    for (const layer of layers) closeNode(runtime, layer);
  }
}

/** Opens the layers between the image and the base, each on its own, and the base for writing. */
function openBase(
  runtime: Runtime,
  path: string,
  layers: NodeDescriptor[],
  options: CommitOptions,
): NodeDescriptor {
  const { base } = options;
  const folders = allowedFolders(imagePath(path), options.allowBacking);
  const wanted = base === undefined ? undefined : fileIdentity(imagePath(base));
  for (;;) {
    const lowest = layers.at(-1);
    const named = lowest?.driver === 'qcow2' ? namedBacking(lowest, folders) : undefined;
    if (named === undefined) {
      throw new StillframeError(
        'ERR_STILLFRAME_BACKING_MISSING',
        base === undefined || layers.length === 1
          ? 'Image does not have a backing file'
          : `Did not find '${base}' in the backing chain of '${path}'`,
      );
    }
    if (base === undefined || (wanted !== undefined && fileIdentity(named.path) === wanted)) {
      return openTarget(runtime, named.path, named.format, layers, folders);
    }
    const { path: next, format } = named;
    layers.push(openImage(runtime, next, { format, readOnly: true, backing: folders, chain: false }));
  }
}

/** The base, made as long as the image. */
function openTarget(
  runtime: Runtime,
  path: string,
  format: ImageFormat | undefined,
  layers: readonly NodeDescriptor[],
  folders: readonly string[],
): NodeDescriptor {
  const open = (): NodeDescriptor => openImage(runtime, path, { format, readOnly: false, backing: folders });
  const base = open();
  const length = lengthOf(layers[0]);
  if (lengthOf(base) >= length) return base;
  resizeOpen(runtime, base, length);
  return open();
}

function lengthOf(descriptor: NodeDescriptor | undefined): number {
  return descriptor === undefined || isStorage(descriptor) ? 0 : descriptor.length;
}

function copyLayers(
  runtime: Runtime,
  layers: readonly BlockNode[],
  target: BlockNode,
  bytesPerSecond: number | undefined,
  onProgress: (done: number, total: number) => void,
): void {
  const total = layers[0]?.length ?? 0;
  const pointer = runtime.arena.alloc(BUFFER_BYTES, 'commit');
  const started = performance.now();
  let copied = 0;
  try {
    for (let at = 0; at < total; ) {
      onProgress(at, total);
      const { length: known, from } = findAbove(layers, at, total - at);
      if (from === undefined) {
        at += known;
        continue;
      }
      let length = known;
      if (from === 'zero') {
        const below = chainStatus(target, at, length);
        length = below.length;
        if ((below.flags & STATUS_ZERO) === 0) target.writeZeroes(at, length, true);
      } else {
        length = Math.min(known, BUFFER_BYTES);
        from.read(at, pointer, length);
        target.write(at, pointer, length);
        copied += length;
      }
      at += length;
      if (bytesPerSecond !== undefined) sleepUntil(started + (copied / bytesPerSecond) * 1000);
    }
    onProgress(total, total);
  } finally {
    runtime.arena.free(pointer);
  }
}

function sleepUntil(time: number): void {
  const timeoutMs = time - performance.now();
  if (timeoutMs > 0) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, timeoutMs);
}
