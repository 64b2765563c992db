import { rmSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { isStorage } from './files.js';
import {
  closeNode,
  fileIdentity,
  type ImageFormat,
  imagePath,
  openImage,
  resolveBackingName,
  type TargetFormat,
} from './graph.js';
import { storageOf } from './layers.js';
import { openNbd } from './nbd/index.js';
import { isNbdName } from './nbd/uri.js';
import type { FileDescriptor, NodeDescriptor, StorageDescriptor } from './node.js';
import {
  type CreateQcow2Options,
  checkQcow2Options,
  createQcow2,
  type Preallocation,
} from './qcow2/index.js';
import { attachFile, closeFile, openFile } from './raw/file.js';

/** What a new image is to be like, beyond its size and backing file (`-o` of qemu-img). */
export interface CreationOptions {
  /** qcow2, in bytes: power of two from 512 to 2 MiB; default 65536. */
  readonly clusterSize?: number | undefined;
  /** qcow2: 2 (`compat=0.10`) or 3 (`compat=1.1`, default). */
  readonly version?: 2 | 3 | undefined;
  /** qcow2: power of two from 1 to 64; default 16. */
  readonly refcountBits?: number | undefined;
  readonly lazyRefcounts?: boolean | undefined;
  /** qcow2: `zlib` (default) or `zstd`. */
  readonly compressionType?: 'zlib' | 'zstd' | undefined;
  /** qcow2: clusters have 32 subclusters; they need to be of 16 KiB at least. Default false. */
  readonly extendedL2?: boolean | undefined;
  /**
   * qcow2: the file that is to hold the data. Written into the header as it is; a relative name is relative to the
   * folder of the image. It is made with the image.
   */
  readonly dataFile?: string | undefined;
  /** qcow2: the data file alone is to be a valid raw image. Default false. */
  readonly dataFileRaw?: boolean | undefined;
  /**
   * Space to take at once: `metadata` (qcow2) makes the tables of the whole drive, `falloc` takes the space of the
   * data from the file system as well, `full` writes it as zeroes. Default `off`.
   */
  readonly preallocation?: Preallocation | undefined;
}

export interface CreateImageOptions extends CreationOptions {
  readonly format: TargetFormat;
  /** Virtual size in bytes; rounded up to 512. Default: the size of the backing file. */
  readonly length?: number | undefined;
  /** Name as it is written into the header; relative names are relative to the folder of the image. */
  readonly backingFile?: string | undefined;
  /** Format of the backing file; required with one, since probing it later is unsafe. */
  readonly backingFormat?: ImageFormat | undefined;
  /** Do not look whether there is a backing file of that name; the size must be given then. Default false. */
  readonly unsafeBacking?: boolean | undefined;
  /** raw: do not round the size up. Default false. */
  readonly exact?: boolean | undefined;
  /** Replace files that are there. */
  readonly force?: boolean | undefined;
}

/**
 * Makes a new image, like `qemu-img create`. In an NBD export it is made with `force` only: something is there always.
 *
 * @returns the virtual size in bytes
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_TARGET_EXISTS, …_BACKING_MISSING, …_LOCKED and
 *   what making a file throws; nothing is left behind
 */
export function createImage(runtime: Runtime, name: string, options: CreateImageOptions): number {
  const path = imagePath(name);
  if (options.force !== true && fileIdentity(path) !== undefined) {
    throw new StillframeError('ERR_STILLFRAME_TARGET_EXISTS', `'${name}' exists; use --force to replace it`);
  }
  const backing = options.unsafeBacking === true ? undefined : lookAtBacking(runtime, path, options);
  const length = options.exact === true ? (options.length ?? 0) : roundUp(options.length ?? backing);
  checkCreation(path, length, options);
  checkFiles(path, options);
  const isFile = !isNbdName(path);
  const file = isFile
    ? openFile(runtime, path, { readOnly: false, lock: 'write', create: 'truncate' })
    : openNbd(runtime, path, { readOnly: false });
  let dataFile: FileDescriptor | undefined;
  let done = false;
  try {
    dataFile = makeDataFile(runtime, path, options.dataFile);
    formatFile(runtime, file, dataFile, length, options);
    done = true;
    return length;
  } finally {
    if (!done && isFile) rmSync(path, { force: true });
    closeFile(runtime, file);
    if (dataFile !== undefined) {
      if (!done) rmSync(dataFile.path, { force: true });
      closeFile(runtime, dataFile);
    }
  }
}

type FormatOptions = CreationOptions & Pick<CreateImageOptions, 'format' | 'backingFile' | 'backingFormat'>;

/**
 * Checks the options of a new image before anything is touched.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_BACKING_UNSUPPORTED
 */
export function checkCreation(path: string, length: number, options: FormatOptions): void {
  if (options.format === 'raw') rejectQcow2Options(path, options);
  else checkQcow2Options(path, qcow2Options(length, options));
}

function qcow2Options(length: number, options: FormatOptions): CreateQcow2Options {
  const { clusterSize = 65536, compressionType, ...rest } = options;
  return {
    ...rest,
    length,
    clusterBits: Math.log2(clusterSize),
    compressionType: compressionType === 'zstd' ? 1 : 0,
  };
}

/**
 * Makes an empty file an image and flushes it.
 *
 * @param dataFile what {@link makeDataFile} made
 * @param length virtual size in bytes, a multiple of 512
 */
export function formatFile(
  runtime: Runtime,
  file: StorageDescriptor,
  dataFile: StorageDescriptor | undefined,
  length: number,
  options: FormatOptions,
): void {
  const node = attachFile(runtime, file);
  if (options.format === 'raw') {
    node.truncate(length);
    if (options.preallocation === 'falloc' || options.preallocation === 'full') {
      node.preallocate(0, length, options.preallocation);
    }
  } else {
    createQcow2(runtime, node, qcow2Options(length, options), dataFile && attachFile(runtime, dataFile));
  }
  node.flush();
}

/**
 * Makes an open node an empty image, whatever was in it (QMP `blockdev-create`).
 *
 * @param dataNode where the options name an external data file; what is in there stays
 * @param length virtual size in bytes
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_NO_SPACE and what writing throws
 */
export function formatNode(
  runtime: Runtime,
  node: NodeDescriptor,
  dataNode: NodeDescriptor | undefined,
  length: number,
  options: CreateImageOptions,
): void {
  const size = roundUp(length);
  checkCreation(node.path, size, options);
  const file = storageOf(runtime, node);
  const old = attachFile(runtime, file);
  if (!old.fixedLength) old.truncate(0);
  formatFile(runtime, file, dataNode && storageOf(runtime, dataNode), size, options);
}

/** Refuses what would empty a file that the new image needs, before anything is touched. */
function checkFiles(path: string, options: CreateImageOptions): void {
  const { backingFile, dataFile } = options;
  const image = fileIdentity(path);
  const backing = backingFile === undefined ? undefined : fileIdentity(resolveBackingName(path, backingFile));
  if (image !== undefined && image === backing) {
    throw new StillframeError(
      'ERR_STILLFRAME_SAME_NODE',
      `'${path}' would be its own backing file; name another backing file`,
    );
  }
  if (dataFile === undefined) return;
  if (/^[^/]*:/.test(dataFile)) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${dataFile}' cannot be a data file: a name with a colon is a protocol's; put './' before it if it is a file`,
    );
  }
  const place = resolveBackingName(path, dataFile);
  const identity = fileIdentity(place);
  if (place === resolve(path) || (identity !== undefined && [image, backing].includes(identity))) {
    throw new StillframeError(
      'ERR_STILLFRAME_SAME_NODE',
      `the data file '${place}' is the image itself or its backing file; give it a name of its own`,
    );
  }
  if (identity !== undefined && options.force !== true) {
    throw new StillframeError(
      'ERR_STILLFRAME_TARGET_EXISTS',
      `the data file '${place}' exists; use --force to replace it`,
    );
  }
}

/**
 * Makes the external data file that the options name, empty and locked.
 *
 * @param path of the image
 */
function makeDataFile(runtime: Runtime, path: string, name: string | undefined): FileDescriptor | undefined {
  if (name === undefined) return undefined;
  return openFile(runtime, resolveBackingName(path, name), {
    readOnly: false,
    lock: 'write',
    create: 'truncate',
  });
}

function roundUp(length: number | undefined): number {
  if (length === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      'a new image needs a size, or a backing file to take it from',
    );
  }
  const rounded = Math.ceil(length / 512) * 512;
  if (Number.isSafeInteger(length) && length >= 0 && Number.isSafeInteger(rounded)) return rounded;
  throw new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `the size must be a whole number of bytes from 0 to 2^53 - 512, not ${length}`,
  );
}

const QCOW2_ONLY = [
  'backingFile',
  'clusterSize',
  'version',
  'refcountBits',
  'lazyRefcounts',
  'compressionType',
  'extendedL2',
  'dataFile',
  'dataFileRaw',
] as const;

function rejectQcow2Options(name: string, options: FormatOptions): void {
  if (options.preallocation === 'metadata') {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      "a raw image has no metadata to preallocate; use 'falloc', 'full' or format 'qcow2'",
    );
  }
  const given = QCOW2_ONLY.find((key) => options[key] !== undefined);
  if (given === undefined) return;
  throw new StillframeError(
    given === 'backingFile' ? 'ERR_STILLFRAME_BACKING_UNSUPPORTED' : 'ERR_STILLFRAME_INVALID_ARGUMENT',
    given === 'backingFile'
      ? `Backing file not supported for file format 'raw': '${name}'; use format 'qcow2'`
      : `'${given}' is not an option of format 'raw'; leave it out or use format 'qcow2'`,
  );
}

/** Virtual size of the backing file, which must be there. */
function lookAtBacking(runtime: Runtime, path: string, options: CreateImageOptions): number | undefined {
  if (options.backingFile === undefined) return undefined;
  const backing = openImage(runtime, resolve(dirname(path), options.backingFile), {
    format: options.backingFormat,
    readOnly: true,
    backing: false,
  });
  try {
    if (isStorage(backing)) throw new TypeError('a file is not an image');
    return backing.length;
  } finally {
    closeNode(runtime, backing);
  }
}
