import { dirname, isAbsolute, resolve } from 'node:path';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { filesOf, isStorage } from './files.js';
import { attachNode, closeNode, fileIdentity, type ImageFormat, imagePath, openImage } from './graph.js';
import {
  type BlockNode,
  type NodeDescriptor,
  type Qcow2Descriptor,
  STATUS_ALLOCATED,
  STATUS_ZERO,
} from './node.js';
import { changeBacking } from './qcow2/index.js';
import { chainStatus } from './status.js';

export interface RebaseOptions {
  /** Format of the image; looked for in its first bytes when absent. */
  readonly format?: ImageFormat | undefined;
  /** The new backing file as the header is to name it; undefined: none. */
  readonly backing: string | undefined;
  /** Needed with `backing`. */
  readonly backingFormat: ImageFormat | undefined;
  /** Only the header is changed: the caller says that the new backing file reads as the old one does. */
  readonly unsafe: boolean;
  /** Folders from which headers may open backing files; default: the image's own. */
  readonly allowBacking?: readonly string[] | undefined;
}

/** Of the largest cluster. */
const BUFFER_BYTES = 2 * 1024 * 1024;

/**
 * Gives an image another backing file; it reads as before. What it has not itself is copied into it where the old
 * and the new backing file differ. Semantics: `qemu-img rebase`.
 *
 * @param onProgress called with bytes done and bytes in all
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT (no format, or a name that does not fit), …_BACKING_CYCLE,
 *   …_UNSUPPORTED_FEATURE (the image's format has no backing files, or its data file is a raw image) and what opening, reading and writing throw
 */
export function rebaseImage(
  runtime: Runtime,
  path: string,
  options: RebaseOptions,
  onProgress: (done: number, total: number) => void,
): void {
  const { backing, backingFormat, unsafe, allowBacking } = options;
  if (backing !== undefined && backingFormat === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `Could not change the backing file to '${backing}': backing format must be specified`,
    );
  }
  const fresh = unsafe ? undefined : openNew(runtime, path, options);
  try {
    const image = openImage(runtime, path, {
      format: options.format,
      readOnly: false,
      backing: unsafe ? false : allowBacking,
    });
    try {
      if (image.driver !== 'qcow2') {
        throw new StillframeError(
          'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
          `'${path}' has the format ${image.driver}, which has no backing files`,
        );
      }
      if (image.dataFileRaw && backing !== undefined) {
        throw new StillframeError(
          'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
          `'${path}' has a raw data file (data_file_raw), which excludes a backing file: who reads the data file alone would not see it`,
        );
      }
      if (!unsafe) keepContent(runtime, image, fresh, onProgress);
      changeBacking(
        runtime,
        image,
        backing === undefined ? undefined : { name: backing, format: backingFormat },
      );
    } finally {
      closeNode(runtime, image);
    }
  } finally {
    if (fresh !== undefined) closeNode(runtime, fresh);
  }
}

/** Opens the new backing file; a relative name is relative to the folder of the image. */
function openNew(runtime: Runtime, path: string, options: RebaseOptions): NodeDescriptor | undefined {
  const { backing, backingFormat, allowBacking } = options;
  if (backing === undefined) return undefined;
  const newPath = isAbsolute(backing) ? backing : resolve(dirname(resolve(path)), backing);
  const identity = fileIdentity(imagePath(path));
  const cycle = (): StillframeError =>
    new StillframeError(
      'ERR_STILLFRAME_BACKING_CYCLE',
      `'${path}' would be its own backing file through '${newPath}'; name another backing file`,
    );
  if (fileIdentity(newPath) === identity) throw cycle();
  const opened = openImage(runtime, newPath, {
    format: backingFormat,
    readOnly: true,
    backing: allowBacking,
  });
  if (filesOf(opened).every((file) => file.identity !== identity)) return opened;
  closeNode(runtime, opened);
  throw cycle();
}

/** Copies what the image gets from its old backing file and would not get from the new one. */
function keepContent(
  runtime: Runtime,
  image: Qcow2Descriptor,
  fresh: NodeDescriptor | undefined,
  onProgress: (done: number, total: number) => void,
): void {
  const node = attachNode(runtime, image);
  const other = fresh && attachNode(runtime, fresh);
  const { arena } = runtime;
  const buffers = arena.alloc(BUFFER_BYTES * 2, 'rebase');
  // Whole units of the image, so that nothing has to be filled up from the old backing file.
  const unit = (node.clusterSize ?? 65536) / (image.extendedL2 ? 32 : 1);
  try {
    for (let at = 0; at < node.length; ) {
      onProgress(at, node.length);
      const own = node.status(at, node.length - at);
      if ((own.flags & STATUS_ALLOCATED) !== 0 || sharedBelow(node, other, at, own.length)) {
        at += own.length;
        continue;
      }
      const length = Math.min(own.length, BUFFER_BYTES - (at % unit));
      if (!(readsZero(node.backing, at, length) && readsZero(other, at, length))) {
        copyDifferences(runtime, image, other, at, length, unit, buffers);
      }
      at += length;
    }
    node.flush();
    onProgress(node.length, node.length);
  } finally {
    arena.free(buffers);
  }
}

/** Whether the range comes, through both chains, from an image that they have in common. */
function sharedBelow(node: BlockNode, other: BlockNode | undefined, at: number, length: number): boolean {
  if (other === undefined || isStorage(other.descriptor)) return false;
  const [file] = filesOf(other.descriptor);
  const { driver } = other.descriptor;
  for (let layer = node.backing; layer !== undefined; layer = layer.backing) {
    // The same file in another format is another image.
    const same = layer.descriptor.driver === driver;
    if (same && filesOf(layer.descriptor)[0]?.identity === file?.identity) return true;
    // What a shorter image cuts off reads as zeroes, whatever is below.
    if (at + length > layer.length) return false;
    const { flags, length: bytes } = layer.status(at, length);
    if ((flags & STATUS_ALLOCATED) !== 0 || bytes < length) return false;
  }
  return false;
}

function readsZero(chain: BlockNode | undefined, at: number, length: number): boolean {
  const inside = Math.min(length, (chain?.length ?? 0) - at);
  if (chain === undefined || inside <= 0) return true;
  const { flags, length: bytes } = chainStatus(chain, at, inside);
  return (flags & STATUS_ZERO) !== 0 && bytes === inside;
}

function readChain(
  runtime: Runtime,
  chain: BlockNode | undefined,
  at: number,
  pointer: number,
  length: number,
): void {
  const inside = Math.max(0, Math.min(length, (chain?.length ?? 0) - at));
  if (inside > 0) chain?.read(at, pointer, inside);
  runtime.arena.u8.fill(0, pointer + inside, pointer + length);
}

/** Writes the units of the range in which the backing files differ. */
function copyDifferences(
  runtime: Runtime,
  image: Qcow2Descriptor,
  other: BlockNode | undefined,
  at: number,
  length: number,
  unit: number,
  buffers: number,
): void {
  const { kernels } = runtime;
  const node = attachNode(runtime, image);
  const [before, after] = [buffers, buffers + BUFFER_BYTES];
  readChain(runtime, node.backing, at, before, length);
  readChain(runtime, other, at, after, length);
  const end = at + length;
  const nextUnit = (offset: number): number => Math.min(end, offset - (offset % unit) + unit);
  for (let from = at; from < end; ) {
    const difference = kernels.firstDifference(before + (from - at), after + (from - at), end - from);
    if (difference < 0) return;
    // From the start of the unit that differs to the end of the last one in a row that does.
    const place = from + difference;
    const start = Math.max(from, place - (place % unit));
    let stop = nextUnit(place);
    while (stop < end) {
      const next = nextUnit(stop);
      if (kernels.firstDifference(before + (stop - at), after + (stop - at), next - stop) < 0) break;
      stop = next;
    }
    const pointer = before + (start - at);
    // Version 2 has no flag for zeroes, and without a backing file sees no need for them yet.
    const canFlag = image.version >= 3;
    if (canFlag && kernels.isZero(pointer, stop - start)) node.writeZeroes(start, stop - start, true);
    else node.write(start, pointer, stop - start);
    from = stop;
  }
}
