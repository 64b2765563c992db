import { rmSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { closeNode, fileIdentity, type ImageFormat, openImage, type TargetFormat } from './graph.js';
import { createQcow2 } from './qcow2/index.js';
import { attachFile, closeFile, openFile } from './raw/file.js';

export interface CreateImageOptions {
  readonly format: TargetFormat;
  /** Virtual size in bytes; rounded up to 512 for qcow2. Default: the size of the backing file. */
  readonly length?: number | undefined;
  /** Name as it is written into the header; relative names are relative to the folder of the image. */
  readonly backingFile?: string | undefined;
  /** Format of the backing file; required with one, since probing it later is unsafe. */
  readonly backingFormat?: ImageFormat | undefined;
  /** qcow2, in bytes: power of two from 512 to 2 MiB; default 65536. */
  readonly clusterSize?: number | undefined;
  /** qcow2: 2 (`compat=0.10`) or 3 (`compat=1.1`, default). */
  readonly version?: 2 | 3 | undefined;
  /** qcow2: power of two from 1 to 64; default 16. */
  readonly refcountBits?: number | undefined;
  readonly lazyRefcounts?: boolean | undefined;
  /** qcow2: `zlib` (default) or `zstd`. */
  readonly compressionType?: 'zlib' | 'zstd' | undefined;
  /** Replace a file that is there. */
  readonly force?: boolean | undefined;
}

/**
 * Makes a new image, like `qemu-img create`.
 *
 * @returns the virtual size in bytes
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_TARGET_EXISTS, …_BACKING_MISSING, …_LOCKED and
 *   what making a file throws; nothing is left behind
 */
export function createImage(runtime: Runtime, name: string, options: CreateImageOptions): number {
  const path = resolve(name);
  if (options.force !== true && fileIdentity(path) !== undefined) {
    throw new StillframeError('ERR_STILLFRAME_TARGET_EXISTS', `'${name}' exists; use --force to replace it`);
  }
  const length = roundUp(options.length ?? backingLength(runtime, path, options), options.format);
  const file = openFile(runtime, path, { readOnly: false, lock: 'write', create: 'truncate' });
  let done = false;
  try {
    const node = attachFile(runtime, file);
    if (options.format === 'raw') {
      rejectQcow2Options(name, options);
      node.truncate(length);
    } else {
      createQcow2(runtime, node, {
        length,
        clusterBits: Math.log2(options.clusterSize ?? 65536),
        version: options.version ?? 3,
        refcountBits: options.refcountBits ?? 16,
        lazyRefcounts: options.lazyRefcounts ?? false,
        compressionType: options.compressionType === 'zstd' ? 1 : 0,
        ...(options.backingFile === undefined ? {} : { backingFile: options.backingFile }),
        ...(options.backingFormat === undefined ? {} : { backingFormat: options.backingFormat }),
      });
    }
    node.flush();
    done = true;
    return length;
  } finally {
    if (!done) rmSync(path, { force: true });
    closeFile(runtime, file);
  }
}

function roundUp(length: number, format: TargetFormat): number {
  if (!Number.isSafeInteger(length) || length < 0) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `the size must be a whole number of bytes from 0 to 2^53-1, not ${length}`,
    );
  }
  return format === 'qcow2' ? Math.ceil(length / 512) * 512 : length;
}

function rejectQcow2Options(name: string, options: CreateImageOptions): void {
  const given = (['backingFile', 'clusterSize', 'version', 'refcountBits', 'compressionType'] as const).find(
    (key) => options[key] !== undefined,
  );
  if (given === undefined) return;
  throw new StillframeError(
    given === 'backingFile' ? 'ERR_STILLFRAME_BACKING_UNSUPPORTED' : 'ERR_STILLFRAME_INVALID_ARGUMENT',
    given === 'backingFile'
      ? `Backing file not supported for file format 'raw': '${name}'; use format 'qcow2'`
      : `'${given}' is not an option of format 'raw'; leave it out or use format 'qcow2'`,
  );
}

function backingLength(runtime: Runtime, path: string, options: CreateImageOptions): number {
  if (options.backingFile === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      'a new image needs a size, or a backing file to take it from',
    );
  }
  const backing = openImage(runtime, resolve(dirname(path), options.backingFile), {
    format: options.backingFormat,
    readOnly: true,
    backing: false,
  });
  try {
    if (backing.driver === 'file') throw new TypeError('a file is not an image');
    return backing.length;
  } finally {
    closeNode(runtime, backing);
  }
}
