import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { isStorage } from './files.js';
import { attachNode, closeFiles, closeNode, type ImageFormat, openImage } from './graph.js';
import type { NodeDescriptor, RawDescriptor } from './node.js';
import { type Preallocation, resizeQcow2 } from './qcow2/index.js';
import { attachFile } from './raw/file.js';

export interface ResizeOptions {
  /** Format of the image; a raw one must say it. */
  readonly format?: ImageFormat | undefined;
  /** Virtual size in bytes; with `relative` what is added to it, below 0 what is taken away. */
  readonly size: number;
  readonly relative?: boolean | undefined;
  /** The image may become smaller: what is behind its new end is lost. Default false. */
  readonly shrink?: boolean | undefined;
  /** Of what is new, where the image grows. Default `off`. */
  readonly preallocation?: Preallocation | undefined;
  /** Folders from which headers may open backing files; default: the image's own. */
  readonly allowBacking?: readonly string[] | undefined;
}

/**
 * Resizes an image that nobody else uses. What is new reads as zeroes. Semantics: `qemu-img resize`.
 *
 * @returns the new virtual size in bytes
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_UNSUPPORTED_FEATURE and what opening and writing throw
 */
export function resizeImage(runtime: Runtime, path: string, options: ResizeOptions): number {
  const { format, size, relative, allowBacking, preallocation = 'off' } = options;
  const image = openImage(runtime, path, {
    format,
    readOnly: false,
    backing: allowBacking,
    recordDirty: false,
  });
  const bad = (what: string): StillframeError => new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', what);
  const checked = (before: number): number => {
    const length = relative === true ? before + size : size;
    if (!(length > 0) || !Number.isSafeInteger(length)) throw bad('New image size must be positive');
    if (length <= before && preallocation !== 'off') {
      throw bad('Preallocation can only be used for growing images');
    }
    if (length < before && options.shrink !== true) {
      throw bad(
        "Use the --shrink option to perform a shrink operation: it deletes all data beyond the shrunken image's end, so make sure that there is no important data there",
      );
    }
    return length;
  };
  let length: number;
  try {
    length = checked(isStorage(image) ? 0 : image.length);
  } catch (error) {
    closeNode(runtime, image);
    throw error;
  }
  resizeOpen(runtime, image, length, preallocation);
  return length;
}

/** Resizes an image that is open for writing and that nobody else uses, and closes it, whatever happens. */
export function resizeOpen(
  runtime: Runtime,
  image: NodeDescriptor,
  length: number,
  preallocation: Preallocation = 'off',
): void {
  if (image.driver === 'qcow2') {
    try {
      const backing = image.backing && attachNode(runtime, image.backing);
      resizeQcow2(runtime, image, backing, { length, preallocation });
    } finally {
      closeFiles(runtime, image);
    }
    return;
  }
  try {
    if (image.driver !== 'raw') {
      throw new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        `'${image.path}': Image format driver does not support resize`,
      );
    }
    resizeRaw(runtime, image, length, preallocation);
  } finally {
    closeNode(runtime, image);
  }
}

/** Resizes an open raw image. @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE and what the file throws */
export function resizeRaw(
  runtime: Runtime,
  image: RawDescriptor,
  length: number,
  preallocation: Preallocation,
): void {
  const file = attachFile(runtime, image.file);
  const { path } = image.file;
  const fixed =
    image.file.driver === 'nbd' ? 'an NBD export' : file.fixedLength ? 'a block device' : undefined;
  if (fixed !== undefined || preallocation === 'metadata') {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      fixed !== undefined
        ? `'${path}' is ${fixed}, whose size is not ours to change`
        : "a raw image has no metadata to preallocate; use 'falloc' or 'full'",
    );
  }
  const before = file.length;
  file.truncate(length);
  if (preallocation !== 'off') file.preallocate(before, length - before, preallocation);
  file.flush();
}
