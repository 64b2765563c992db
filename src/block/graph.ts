import { realpathSync } from 'node:fs';
import { dirname, isAbsolute, resolve, sep } from 'node:path';
import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import type { LockMode } from '../os/image-lock.js';
import { Disk, type DiskDescriptor } from './disk.js';
import { fileBelow } from './file-below.js';
import { backingOf, isOverlaid, isStorage, ownFilesOf } from './files.js';
import { BlkdebugNode } from './filters/blkdebug.js';
import { CompressNode } from './filters/compress.js';
import { CopyBuffer } from './filters/copy-before-write.js';
import { CopyOnReadNode } from './filters/copy-on-read.js';
import { LiveNode, OverLiveNode } from './filters/live.js';
import { PreallocateNode } from './filters/preallocate.js';
import { SnapshotAccess } from './filters/snapshot-access.js';
import { ThrottleNode } from './filters/throttle.js';
import {
  attachForeign,
  checkParent,
  FOREIGN_NAMES,
  foreignDescriptor,
  openForeign,
  PROBE_BYTES,
  probeForeign,
  probeUnsupported,
} from './foreign/index.js';
import { openNbd } from './nbd/index.js';
import { isNbdName, nbdIdentity, parseNbdName } from './nbd/uri.js';
import type {
  BlockNode,
  FileDescriptor,
  ForeignDescriptor,
  ForeignName,
  ImageDescriptor,
  NodeDescriptor,
  PreallocateDescriptor,
  Qcow2Descriptor,
  StorageDescriptor,
} from './node.js';
import { NullNode } from './null.js';
import {
  attachQcow2,
  closeQcow2,
  openQcow2,
  probeQcow2,
  readHeader,
  type SnapshotSelector,
} from './qcow2/index.js';
import {
  attachBelowWith,
  attachFile,
  closeFile,
  type FileNode,
  identityOf,
  type OpenFileOptions,
  openFile,
  statFile,
} from './raw/file.js';
import { attachRaw, openRaw, type RawPart } from './raw/raw.js';
import { withTraits } from './traits.js';

/** Formats that are written, as `-O` names them. */
export type TargetFormat = 'raw' | 'qcow2';
/** Formats of images, as `-f` names them. */
export type ImageFormat = TargetFormat | ForeignName;
/** All of them. */
export const IMAGE_FORMATS: readonly ImageFormat[] = ['raw', 'qcow2', ...FOREIGN_NAMES];

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
   * For an image that is opened for writing: dirty bitmaps that record get their memory now, so that a write needs
   * none. Default true. Without it a change of the drive makes them inconsistent.
   */
  readonly recordDirty?: boolean | undefined;
  /**
   * Folders from which image headers may open backing files, external data files and extents; devices only from
   * folders that are given here. Default: the folder of the image itself. `false`: no backing and data file is
   * opened; unallocated ranges read as zeroes, and data in a data file cannot be read (for `info`).
   */
  readonly backing?: readonly string[] | false | undefined;
  /** Whether backing files are opened; without them what the image has not itself reads as zeroes. Default true. */
  readonly chain?: boolean | undefined;
  /** Read a qcow2 image as it is in an internal snapshot; only read-only. */
  readonly snapshot?: SnapshotSelector | undefined;
  /** What the image lies on where that is not what its name and its header say. */
  readonly layers?: ImageLayers | undefined;
}

/** What an image lies on, as its user has it instead of its name and its header (QEMU: options of a node). */
export interface ImageLayers {
  /** Which part of its file a raw image is. */
  readonly part?: RawPart | undefined;
  /** The backing file of a qcow2 image; null: none, what it has not itself reads as zeroes. */
  readonly backing?: NamedImage | null | undefined;
  /** Path of the external data file of a qcow2 image that has one. */
  readonly dataFile?: string | undefined;
  /** What the key of the certificate is encrypted with by which a server is told who we are. */
  readonly passphrase?: string | undefined;
}

/** An image that a user names. */
export interface NamedImage {
  /** Path, or the name of an NBD export. */
  readonly path: string;
  /** Probed from the first bytes when absent. */
  readonly format?: ImageFormat | undefined;
  readonly layers?: ImageLayers | undefined;
}

/**
 * Opens an image and its backing chain.
 *
 * @param name a path, or the name of an NBD export (see `parseNbdName`)
 * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_LOCKED, …_FORMAT (a writable image of
 *   unknown format: probing what a guest can write is unsafe), …_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE and
 *   for the chain …_BACKING_FORBIDDEN, …_BACKING_MISSING, …_BACKING_CYCLE, …_BACKING_DEPTH
 */
export function openImage(runtime: Runtime, name: string, options: OpenImageOptions): ImageDescriptor {
  const path = imagePath(name);
  const folders = allowedFolders(path, options.backing === false ? undefined : options.backing);
  const chain: Chain = { folders, devices: Array.isArray(options.backing), files: [], depth: 0 };
  return openLayer(runtime, path, options, chain);
}

/** Opens an image that nobody else uses and nothing below it, to change what it keeps beside its data. @throws as {@link openImage} */
export function openForEditing(
  runtime: Runtime,
  path: string,
  { format }: Pick<OpenImageOptions, 'format'>,
): ImageDescriptor {
  return openImage(runtime, path, { format, readOnly: false, backing: false, recordDirty: false });
}

/**
 * Opens what an image lies on, by its name.
 *
 * @throws StillframeError what {@link openFile} and `openNbd` throw
 */
export function openStorage(
  runtime: Runtime,
  name: string,
  options: Pick<OpenFileOptions, 'readOnly' | 'lock' | 'writeBehind'> & Pick<ImageLayers, 'passphrase'>,
): StorageDescriptor {
  return isNbdName(name) ? openNbd(runtime, name, options) : openFile(runtime, name, options);
}

/** An image name as descriptors have it: an absolute path, or the name of an NBD export as it is. */
export function imagePath(name: string): string {
  return isNbdName(name) ? name : resolve(name);
}

/** What the layers of one chain have in common while they are opened. */
interface Chain {
  /** Folders from which headers may open files. */
  readonly folders: readonly string[];
  /** Headers may open devices there. */
  readonly devices: boolean;
  /** Files that are open. */
  readonly files: StorageDescriptor[];
  /** Images that are open, or are being opened. */
  depth: number;
}

function openLayer(runtime: Runtime, path: string, options: OpenImageOptions, chain: Chain): ImageDescriptor {
  const identity = fileIdentity(path);
  // Before it is opened: our own lock on the file would hide the cycle behind a lock conflict.
  if (chain.files.some((other) => other.identity === identity)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_CYCLE',
      `'${path}' is its own backing file through '${chain.files.at(-1)?.path}'; repair the chain with 'qemu-img rebase -u'`,
    );
  }
  const lock = options.lock ?? (options.readOnly ? 'read' : 'write');
  const { readOnly, writeBehind, layers = {} } = options;
  const file = openStorage(runtime, path, { readOnly, lock, writeBehind, passphrase: layers.passphrase });
  let backing: NodeDescriptor | undefined;
  let dataFile: FileDescriptor | undefined;
  try {
    chain.files.push(file);
    chain.depth++;
    const node = attachFile(runtime, file);
    const format = options.format ?? probe(node);
    if (options.snapshot !== undefined && (format !== 'qcow2' || !readOnly)) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        format === 'qcow2'
          ? `'${path}': a snapshot can only be read; open it read-only`
          : `'${path}' has the format ${format}, which has no internal snapshots`,
      );
    }
    if (format === 'raw') {
      if (!options.readOnly && options.format === undefined) {
        throw new StillframeError(
          'ERR_STILLFRAME_FORMAT',
          `'${path}' has no header of a known format; say format 'raw' to open it for writing`,
        );
      }
      return openRaw(runtime, file, layers.part);
    }
    if (format !== 'qcow2') return openForeignLayer(runtime, file, format, options, chain);
    const header = readHeader(runtime, node);
    if (header.hasDataFile && options.backing !== false) {
      const how = { readOnly, lock, writeBehind };
      dataFile =
        layers.dataFile === undefined
          ? openDataFile(runtime, path, header.dataFile, chain, how)
          : openOwnFile(runtime, path, 'external data file', resolve(layers.dataFile), chain, how);
    }
    if (options.backing !== false && options.chain !== false) {
      if (layers.backing !== undefined) {
        backing = layers.backing === null ? undefined : openNamed(runtime, layers.backing, lock, chain);
      } else if (header.backingFile !== undefined) {
        const format = formatOfBacking(path, header.backingFormat);
        backing = openBacking(runtime, path, header.backingFile, format, lock, chain);
      }
    }
    const { snapshot, recordDirty } = options;
    return openQcow2(runtime, file, backing, { readOnly, dataFile, snapshot, recordDirty });
  } catch (error) {
    if (backing !== undefined) closeNode(runtime, backing);
    if (dataFile !== undefined) closeFile(runtime, dataFile);
    closeFile(runtime, file);
    throw error;
  }
}

/** Opens the backing file that a header names. */
function openBacking(
  runtime: Runtime,
  imagePath: string,
  name: string,
  format: ImageFormat | undefined,
  lock: LockMode,
  chain: Chain,
): NodeDescriptor {
  const path = pathFromHeader(imagePath, 'backing file', name, chain.folders);
  if (chain.depth >= MAX_CHAIN_DEPTH) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_DEPTH',
      `the backing chain at '${imagePath}' is deeper than ${MAX_CHAIN_DEPTH} images; commit or rebase some of them`,
    );
  }
  return openLayer(runtime, path, { format, readOnly: true, lock: lock === 'none' ? 'none' : 'read' }, chain);
}

/** Opens the backing file that a user names; its header may open what that of an image of its own might. */
function openNamed(runtime: Runtime, named: NamedImage, lock: LockMode, chain: Chain): NodeDescriptor {
  const path = imagePath(named.path);
  const options = { ...named, readOnly: true, lock: lock === 'none' ? 'none' : 'read' } as const;
  const folders = [...chain.folders, ...allowedFolders(path, undefined)];
  return openLayer(runtime, path, options, { ...chain, folders });
}

/** Opens an image of a format that is only read: its header, its extents and its parent. */
function openForeignLayer(
  runtime: Runtime,
  file: StorageDescriptor,
  format: ForeignName,
  options: OpenImageOptions,
  chain: Chain,
): ForeignDescriptor {
  const { path } = file;
  if (!options.readOnly) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${path}' has the format ${format}, which is read and not written; convert it first: stillframe convert -O qcow2 '${path}' NEW.qcow2`,
    );
  }
  const lock = options.lock ?? 'read';
  const extents: FileDescriptor[] = [];
  let backing: NodeDescriptor | undefined;
  try {
    const opened = openForeign(runtime, format, file, (name) => {
      const extentPath = pathFromHeader(path, 'extent', name, chain.folders);
      const identity = fileIdentity(extentPath);
      const known = [file, ...extents].findIndex((other) => other.identity === identity);
      const extent = extents[known - 1];
      if (extent !== undefined) return { index: known, file: extent };
      const opening = openNamedFile(runtime, path, 'extent', extentPath, chain, { readOnly: true, lock });
      return { index: extents.push(opening), file: opening };
    });
    if (options.backing !== false && options.chain !== false) {
      const { backingFile } = opened;
      if (backingFile !== undefined) {
        backing = openBacking(runtime, path, backingFile, format, lock, chain);
      }
      checkParent(path, opened, backing);
    }
    return foreignDescriptor(opened, file, extents, backing);
  } catch (error) {
    closeAll([
      ...(backing === undefined ? [] : [closeNode.bind(undefined, runtime, backing)]),
      ...extents.map((extent) => () => closeFile(runtime, extent)),
    ]);
    throw error;
  }
}

/** Opens the external data file that a header names, under the rules for backing files. */
function openDataFile(
  runtime: Runtime,
  imagePath: string,
  name: string | undefined,
  chain: Chain,
  options: OpenFileOptions,
): FileDescriptor {
  if (name === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `'${imagePath}' keeps its data in an external data file, but its header does not say in which; make an image that names it with 'qemu-img amend -o data_file=NAME'`,
    );
  }
  const path = pathFromHeader(imagePath, 'external data file', name, chain.folders);
  return openNamedFile(runtime, imagePath, 'external data file', path, chain, options);
}

/** @param what the kind of file, for errors */
function openNamedFile(
  runtime: Runtime,
  imagePath: string,
  what: string,
  path: string,
  chain: Chain,
  options: OpenFileOptions,
): FileDescriptor {
  if (!chain.devices && statFile(path)?.isBlockDevice() === true) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_FORBIDDEN',
      `the header of '${imagePath}' names the device '${path}' as its ${what}; if you trust the image, allow its folder with --allow-backing ${dirname(path)}`,
    );
  }
  return openOwnFile(runtime, imagePath, what, path, chain, options);
}

/** @param what the kind of file, for errors */
function openOwnFile(
  runtime: Runtime,
  imagePath: string,
  what: string,
  path: string,
  chain: Chain,
  options: OpenFileOptions,
): FileDescriptor {
  const identity = fileIdentity(path);
  if (chain.files.some((other) => other.identity === identity)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_CYCLE',
      `'${imagePath}' has '${path}', an image of its own chain, as its ${what}`,
    );
  }
  const file = openFile(runtime, path, options);
  chain.files.push(file);
  return file;
}

/** Identity of the file a path leads to, links followed; undefined where there is none. That of an NBD export is its name. */
export function fileIdentity(path: string): string | undefined {
  if (isNbdName(path)) return nbdIdentity(parseNbdName(path));
  const stat = statFile(path);
  return stat && identityOf(stat);
}

/**
 * The format whose header the file starts with, else `raw`.
 *
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE (a format that is known and not supported)
 */
export function probe(file: FileNode): ImageFormat {
  const head = new Uint8Array(PROBE_BYTES);
  file.readBytes(0, head);
  const format = probeQcow2(head) ? 'qcow2' : probeForeign(head);
  if (format !== undefined) return format;
  const unsupported = probeUnsupported(head);
  if (unsupported === undefined) return 'raw';
  throw new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `'${file.descriptor.path}' has the format ${unsupported}, which is not supported; say format 'raw' to take it as it is`,
  );
}

/** The format that a header says its backing file has. @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE */
export function formatOfBacking(path: string, name: string | undefined): ImageFormat | undefined {
  const known = IMAGE_FORMATS.find((format) => format === name);
  if (known !== undefined || name === undefined) return known;
  throw new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `'${path}': its backing file has the format '${name}', which is not supported; supported are ${IMAGE_FORMATS.join(', ')}`,
  );
}

function realpathOrSelf(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return path;
  }
}

/** The folders from which the headers of an image's chain may open files; default: the image's own. */
export function allowedFolders(path: string, folders: readonly string[] | undefined): readonly string[] {
  const list = folders ?? (isNbdName(path) ? [] : [dirname(path), dirname(realpathOrSelf(path))]);
  return list.map((folder) => realpathOrSelf(resolve(folder)));
}

/**
 * The backing file that an image's header names, under the rules for headers.
 *
 * @param folders see {@link allowedFolders}
 * @throws StillframeError ERR_STILLFRAME_BACKING_FORBIDDEN, …_BACKING_MISSING, …_UNSUPPORTED_FEATURE (its format)
 */
export function namedBacking(
  image: Qcow2Descriptor,
  folders: readonly string[],
): { readonly path: string; readonly format: ImageFormat | undefined } | undefined {
  const { path, backingFile, backingFormat } = image;
  if (backingFile === undefined) return undefined;
  const format = formatOfBacking(path, backingFormat);
  return { path: pathFromHeader(path, 'backing file', backingFile, folders), format };
}

/** The name of a header made into a path: relative names are relative to the folder of the overlay. */
export function resolveBackingName(overlayPath: string, name: string): string {
  return isAbsolute(name) ? name : resolve(dirname(overlayPath), name);
}

/** A backing file's name as people see it: relative to the name by which they called the overlay. */
export function combineNames(overlay: string, name: string): string {
  return isAbsolute(name) ? name : overlay.slice(0, overlay.lastIndexOf('/') + 1) + name;
}

/**
 * @param what the kind of file, for errors
 * @throws StillframeError ERR_STILLFRAME_BACKING_FORBIDDEN, …_BACKING_MISSING
 */
export function pathFromHeader(
  imagePath: string,
  what: string,
  name: string,
  folders: readonly string[],
): string {
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
  if (isNbdName(imagePath) && !isAbsolute(name)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_FORBIDDEN',
      `'${imagePath}' names the ${what} '${name}' relative to its own folder, and an NBD export is in none; serve the drive with its backing file instead`,
    );
  }
  const path = resolveBackingName(imagePath, name);
  let real: string;
  try {
    real = realpathSync(path);
  } catch (error) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `the ${what} '${path}' of '${imagePath}' cannot be reached; bring it back${what === 'backing file' ? " or correct the name with 'qemu-img rebase -u'" : ''}`,
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

/** This thread's facade of an open node, its children included. @param isRoot nobody comes to it through another node */
export function attachNode(runtime: Runtime, descriptor: NodeDescriptor, isRoot = false): BlockNode {
  return isStorage(descriptor)
    ? attachFile(runtime, descriptor)
    : withTraits(runtime, descriptor, attachDriver(runtime, descriptor), isRoot);
}

function attachDriver(runtime: Runtime, descriptor: Exclude<NodeDescriptor, StorageDescriptor>): BlockNode {
  switch (descriptor.driver) {
    case 'live':
      return new LiveNode(runtime, descriptor, liveDisk(runtime, descriptor.disk));
    case 'copy-on-read':
      return new CopyOnReadNode(runtime, descriptor, liveDisk(runtime, descriptor.disk));
    case 'null-co':
      return new NullNode(runtime, descriptor);
    case 'snapshot-access': {
      const disk = liveDisk(runtime, descriptor.disk);
      return new SnapshotAccess(runtime, disk, disk.attachFrame(descriptor.frame), descriptor.readOnly);
    }
    case 'throttle':
      return new ThrottleNode(runtime, descriptor, attachNode(runtime, descriptor.child));
    case 'blkdebug':
      return new BlkdebugNode(runtime, descriptor, attachNode(runtime, descriptor.child));
    case 'compress':
      return new CompressNode(runtime, descriptor, attachNode(runtime, descriptor.child));
    case 'preallocate':
      return attachPreallocate(runtime, descriptor);
    case 'raw':
      return attachRaw(runtime, descriptor, attachFile(runtime, descriptor.file));
    case 'qcow2': {
      const backing = descriptor.backing && attachNode(runtime, descriptor.backing);
      const node = attachQcow2(runtime, descriptor, attachFile(runtime, descriptor.file), backing);
      return descriptor.backing?.driver === 'live'
        ? new OverLiveNode(node, liveDisk(runtime, descriptor.backing.disk))
        : node;
    }
    default:
      return attachForeign(
        runtime,
        descriptor,
        descriptor.backing && attachNode(runtime, descriptor.backing),
      );
  }
}

attachBelowWith(attachNode);

export function attachPreallocate(runtime: Runtime, descriptor: PreallocateDescriptor): PreallocateNode {
  const { child } = descriptor;
  const file = fileBelow(child);
  return new PreallocateNode(
    runtime,
    descriptor,
    attachNode(runtime, child),
    file && attachFile(runtime, file),
  );
}

/** Copy buffers of this thread, made when a guest's write first has to save something. */
const buffers = new WeakMap<Runtime, CopyBuffer>();

export function copyBufferOf(runtime: Runtime): CopyBuffer {
  let buffer = buffers.get(runtime);
  if (buffer === undefined) {
    buffer = new CopyBuffer(runtime);
    buffers.set(runtime, buffer);
  }
  return buffer;
}

/** Disks of this thread by their numbers. */
const disks = new WeakMap<Runtime, Map<number, Disk>>();
/** Facades that are kept although nobody uses them. */
const MAX_IDLE_DISKS = 256;

/**
 * This thread's view of a live disk. There is one, however many nodes lie on it, so that a thread which keeps others from
 * the disk does not keep itself from it.
 */
export function liveDisk(runtime: Runtime, descriptor: DiskDescriptor): Disk {
  const known = disks.get(runtime) ?? new Map<number, Disk>();
  disks.set(runtime, known);
  let disk = known.get(descriptor.id);
  if (disk === undefined) {
    disk = new Disk(runtime, descriptor, () => copyBufferOf(runtime));
    known.set(descriptor.id, disk);
    for (const [id, other] of known) {
      if (known.size <= MAX_IDLE_DISKS) break;
      if (!other.busy) known.delete(id);
    }
  }
  return disk;
}

/** The thread forgets its view of a disk. */
export function forgetDisk(runtime: Runtime, id: number): void {
  disks.get(runtime)?.delete(id);
}

/**
 * Flushes and closes a node and its chain. No thread may use a facade of it afterwards. Resources are given
 * back even when the flush fails; the first error is thrown then.
 */
export function closeNode(runtime: Runtime, descriptor: NodeDescriptor): void {
  if (isStorage(descriptor)) {
    closeFile(runtime, descriptor);
    return;
  }
  if (isOverlaid(descriptor)) return;
  try {
    if (descriptor.driver === 'qcow2') closeQcow2(runtime, descriptor, attachFile(runtime, descriptor.file));
  } finally {
    closeFiles(runtime, descriptor);
  }
}

/** Closes a node itself, and nothing that it lies on. */
export function closeLayer(runtime: Runtime, descriptor: NodeDescriptor): void {
  switch (descriptor.driver) {
    case 'file':
    case 'nbd':
    case 'nested':
      closeFile(runtime, descriptor);
      return;
    case 'qcow2': {
      const file = attachFile(runtime, descriptor.file);
      try {
        closeQcow2(runtime, descriptor, file);
      } finally {
        file.giveBack?.();
      }
      return;
    }
    case 'raw':
      attachFile(runtime, descriptor.file).giveBack?.();
      return;
    case 'blkdebug':
      runtime.arena.free(descriptor.state);
      return;
    case 'preallocate':
      try {
        attachPreallocate(runtime, descriptor).giveBack();
      } finally {
        runtime.arena.free(descriptor.state);
      }
      return;
    default:
  }
}

/** Closes the files of a node and its chain, where its state is gone already. */
export function closeFiles(runtime: Runtime, descriptor: ImageDescriptor): void {
  const backing = backingOf(descriptor);
  closeAll([
    ...ownFilesOf(descriptor).map((file) => () => closeFile(runtime, file)),
    ...(backing === undefined ? [] : [closeNode.bind(undefined, runtime, backing)]),
  ]);
}

/** Runs all of them; the first error is thrown then. */
function closeAll(closings: readonly (() => void)[]): void {
  let failure: { readonly error: unknown } | undefined;
  for (const close of closings) {
    try {
      close();
    } catch (error) {
      failure ??= { error };
    }
  }
  if (failure !== undefined) throw failure.error;
}
