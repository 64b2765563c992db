import { realpathSync } from 'node:fs';
import { dirname, isAbsolute, resolve, sep } from 'node:path';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import type { LockMode } from '../os/image-lock.js';
import type { BlockNode, FileDescriptor, NodeDescriptor } from './node.js';
import { attachQcow2, closeQcow2, openQcow2, probeQcow2, readHeader } from './qcow2/index.js';
import { attachFile, closeFile, identityOf, type OpenFileOptions, openFile, statFile } from './raw/file.js';
import { attachRaw, openRaw } from './raw/raw.js';

/** Formats of images, as `-f` names them. */
export type ImageFormat = 'raw' | 'qcow2';

/** Deepest backing chain that is followed; a longer one is refused. */
export const MAX_CHAIN_DEPTH = 200;

export interface OpenImageOptions {
  /** Format of the image; probed from its first bytes when absent. */
  readonly format?: ImageFormat | undefined;
  readonly readOnly: boolean;
  /** The image itself, not its backing files, is written with write-behind: see FileDescriptor. Default false. */
  readonly writeBehind?: boolean | undefined;
  /** Image lock to take; default `read` or `write` as `readOnly` says. Backing files take `read` or none. */
  readonly lock?: LockMode | undefined;
  /**
   * Folders from which image headers may open backing files and external data files. Default: the folder of the
   * image itself. `false`: neither is opened; unallocated ranges read as zeroes, and data in a data file cannot be
   * read (for `info`).
   */
  readonly backing?: readonly string[] | false | undefined;
}

/**
 * Opens an image and its backing chain.
 *
 * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_LOCKED, …_FORMAT (a writable image of
 *   unknown format: probing what a guest can write is unsafe), …_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE and
 *   for the chain …_BACKING_FORBIDDEN, …_BACKING_MISSING, …_BACKING_CYCLE, …_BACKING_DEPTH
 */
export function openImage(runtime: Runtime, path: string, options: OpenImageOptions): NodeDescriptor {
  const chain: FileDescriptor[] = [];
  return openLayer(runtime, resolve(path), options, undefined, chain);
}

function openLayer(
  runtime: Runtime,
  path: string,
  options: OpenImageOptions,
  allowed: readonly string[] | undefined,
  chain: FileDescriptor[],
): NodeDescriptor {
  const identity = fileIdentity(path);
  // Before it is opened: our own lock on the file would hide the cycle behind a lock conflict.
  if (chain.some((other) => other.identity === identity)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_CYCLE',
      `'${path}' is its own backing file through '${chain.at(-1)?.path}'; repair the chain with 'qemu-img rebase -u'`,
    );
  }
  const lock = options.lock ?? (options.readOnly ? 'read' : 'write');
  const { readOnly, writeBehind } = options;
  const file = openFile(runtime, path, { readOnly, lock, writeBehind });
  let backing: NodeDescriptor | undefined;
  let dataFile: FileDescriptor | undefined;
  try {
    chain.push(file);
    const node = attachFile(runtime, file);
    const format = options.format ?? probe(runtime, file);
    if (format === 'raw') {
      if (!options.readOnly && options.format === undefined) {
        throw new StillframeError(
          'ERR_STILLFRAME_FORMAT',
          `'${path}' has no header of a known format; say format 'raw' to open it for writing`,
        );
      }
      return openRaw(runtime, file);
    }
    const header = readHeader(runtime, node);
    const folders = options.backing === false ? [] : (allowed ?? allowedFolders(path, options.backing));
    if (header.hasDataFile && options.backing !== false) {
      dataFile = openDataFile(runtime, path, header.dataFile, folders, chain, {
        readOnly,
        lock,
        writeBehind,
      });
    }
    if (header.backingFile !== undefined && options.backing !== false) {
      const backingPath = pathFromHeader(path, 'backing file', header.backingFile, folders);
      if (chain.length >= MAX_CHAIN_DEPTH) {
        throw new StillframeError(
          'ERR_STILLFRAME_BACKING_DEPTH',
          `the backing chain at '${path}' is deeper than ${MAX_CHAIN_DEPTH} images; commit or rebase some of them`,
        );
      }
      backing = openLayer(
        runtime,
        backingPath,
        {
          format: formatOfBacking(path, header.backingFormat),
          readOnly: true,
          lock: lock === 'none' ? 'none' : 'read',
        },
        folders,
        chain,
      );
    }
    return openQcow2(runtime, file, backing, { readOnly, dataFile });
  } catch (error) {
    if (backing !== undefined) closeNode(runtime, backing);
    if (dataFile !== undefined) closeFile(runtime, dataFile);
    closeFile(runtime, file);
    throw error;
  }
}

/** Opens the external data file that a header names, under the rules for backing files. */
function openDataFile(
  runtime: Runtime,
  imagePath: string,
  name: string | undefined,
  folders: readonly string[],
  chain: FileDescriptor[],
  options: OpenFileOptions,
): FileDescriptor {
  if (name === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `'${imagePath}' keeps its data in an external data file, but its header does not say in which; make an image that names it with 'qemu-img amend -o data_file=NAME'`,
    );
  }
  const path = pathFromHeader(imagePath, 'data file', name, folders);
  const identity = fileIdentity(path);
  if (chain.some((other) => other.identity === identity)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_CYCLE',
      `'${imagePath}' names '${path}', an image of its own chain, as its external data file`,
    );
  }
  const file = openFile(runtime, path, options);
  chain.push(file);
  return file;
}

/** Identity of the file a path leads to, links followed; undefined where there is none. */
export function fileIdentity(path: string): string | undefined {
  const stat = statFile(path);
  return stat && identityOf(stat);
}

/** `qcow2` where the file starts with its magic, else `raw`. */
function probe(runtime: Runtime, file: FileDescriptor): ImageFormat {
  const pointer = runtime.arena.alloc(512, 'format probe');
  try {
    const node = attachFile(runtime, file);
    node.read(0, pointer, Math.min(512, node.length));
    return probeQcow2(runtime.arena.copyOut(pointer, 512)) ? 'qcow2' : 'raw';
  } finally {
    runtime.arena.free(pointer);
  }
}

function formatOfBacking(path: string, name: string | undefined): ImageFormat | undefined {
  if (name === undefined || name === 'raw' || name === 'qcow2') return name;
  throw new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `'${path}': its backing file has the format '${name}', which is not supported; supported are raw and qcow2`,
  );
}

function realpathOrSelf(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

function allowedFolders(path: string, folders: readonly string[] | undefined): readonly string[] {
  const list = folders ?? [dirname(path), dirname(realpathOrSelf(path))];
  return list.map((folder) => realpathOrSelf(resolve(folder)));
}

/** The name of a header made into a path: relative names are relative to the folder of the overlay. */
export function resolveBackingName(overlayPath: string, name: string): string {
  return isAbsolute(name) ? name : resolve(dirname(overlayPath), name);
}

/** A backing file's name as people see it: relative to the name by which they called the overlay. */
export function combineNames(overlay: string, name: string): string {
  return isAbsolute(name) ? name : overlay.slice(0, overlay.lastIndexOf('/') + 1) + name;
}

/** @param what the kind of file, for errors */
function pathFromHeader(imagePath: string, what: string, name: string, folders: readonly string[]): string {
  // A colon before any slash is QEMU's syntax for a protocol or `json:` name.
  if (/^[^/]*:/.test(name)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_FORBIDDEN',
      `'${imagePath}' names the ${what} '${name}'; protocol and json: names in image headers are never opened`,
    );
  }
  // What stands for bytes that are no UTF-8: the name would lead to another file.
  if (name.includes('\ufffd')) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `'${imagePath}' names a ${what} '${name}' that is not valid UTF-8; rename the file and correct the name with 'qemu-img rebase -u'`,
    );
  }
  const path = resolveBackingName(imagePath, name);
  let real: string;
  try {
    real = realpathSync(path);
  } catch (error) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `the ${what} '${path}' of '${imagePath}' cannot be reached; bring it back or correct the name with 'qemu-img rebase -u'`,
      { cause: error },
    );
  }
  const inside = folders.some(
    (folder) => real === folder || real.startsWith(folder === sep ? sep : folder + sep),
  );
  if (!inside) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_FORBIDDEN',
      `the header of '${imagePath}' names the ${what} '${path}' outside of the allowed folders ` +
        `(${folders.join(', ')}); if you trust the image, allow the folder with --allow-backing ${dirname(real)}`,
    );
  }
  return path;
}

/** This thread's facade of an open node, its children included. */
export function attachNode(runtime: Runtime, descriptor: NodeDescriptor): BlockNode {
  switch (descriptor.driver) {
    case 'file':
      return attachFile(runtime, descriptor);
    case 'raw':
      return attachRaw(runtime, descriptor, attachFile(runtime, descriptor.file));
    case 'qcow2': {
      const backing = descriptor.backing && attachNode(runtime, descriptor.backing);
      return attachQcow2(runtime, descriptor, attachFile(runtime, descriptor.file), backing);
    }
  }
}

/**
 * Flushes and closes a node and its chain. No thread may use a facade of it afterwards. Resources are given
 * back even when the flush fails; the first error is thrown then.
 */
export function closeNode(runtime: Runtime, descriptor: NodeDescriptor): void {
  if (descriptor.driver === 'file') {
    closeFile(runtime, descriptor);
    return;
  }
  try {
    if (descriptor.driver === 'qcow2') closeQcow2(runtime, descriptor, attachFile(runtime, descriptor.file));
  } finally {
    closeAll([
      ...ownFilesOf(descriptor).map((file) => () => closeFile(runtime, file)),
      ...(descriptor.driver === 'qcow2' && descriptor.backing !== undefined
        ? [closeNode.bind(undefined, runtime, descriptor.backing)]
        : []),
    ]);
  }
}

/** Runs all of them; the first error is thrown then. */
function closeAll(closings: readonly (() => void)[]): void {
  const [first, ...rest] = closings;
  try {
    first?.();
  } finally {
    if (rest.length > 0) closeAll(rest);
  }
}

/** The files of one layer: the image's own one first. */
function ownFilesOf(descriptor: Exclude<NodeDescriptor, FileDescriptor>): FileDescriptor[] {
  const dataFile = descriptor.driver === 'qcow2' ? descriptor.dataFile : undefined;
  return dataFile === undefined ? [descriptor.file] : [descriptor.file, dataFile];
}

/** The files of a node's chain, top first. */
export function filesOf(descriptor: NodeDescriptor): FileDescriptor[] {
  if (descriptor.driver === 'file') return [descriptor];
  const rest = descriptor.driver === 'qcow2' && descriptor.backing ? filesOf(descriptor.backing) : [];
  return [...ownFilesOf(descriptor), ...rest];
}
