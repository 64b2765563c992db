import {
  closeSync,
  fsyncSync,
  linkSync,
  openSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  unlinkSync,
} from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';
import { checkCompression } from '../block/compression.js';
import { filesOf, isStorage } from '../block/files.js';
import {
  attachNode,
  closeNode,
  fileIdentity,
  imagePath,
  openImage,
  type TargetFormat,
} from '../block/graph.js';
import { isNbdName } from '../block/nbd/uri.js';
import type { BlockNode, NodeDescriptor } from '../block/node.js';
import { createQcow2, openQcow2 } from '../block/qcow2/index.js';
import { attachFile, closeFile, openFile } from '../block/raw/file.js';
import { openRaw } from '../block/raw/raw.js';
import { StillframeError, systemError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import type { SyncMode } from './modes.js';

export type CompressionType = 'zlib' | 'zstd';

/** What a backup's target is to be. */
export interface TargetOptions {
  /**
   * Path of the image to make (or, with `existing`, to write into), or name of an NBD export, which is always written
   * into.
   */
  readonly target: string;
  readonly sync: SyncMode;
  /** The open node that it is, which is written into and stays open; `target` is what people call it. */
  readonly targetNode?: NodeDescriptor | undefined;
  /** Format of the target; default: the source's, the existing target's own when that is qcow2, raw for an export. */
  readonly format?: TargetFormat | undefined;
  /** Write into the image that is there (QMP `mode: existing`) instead of making a new one. Default false. */
  readonly existing?: boolean | undefined;
  /** Replace a file of that name once the backup is complete. Default false. */
  readonly force?: boolean | undefined;
  /**
   * Path of the image that a new qcow2 target lies on, which a relative name gives from the target's folder: for sync
   * modes `incremental` and `bitmap` the backup before. Default: none for those two, else as the sync mode has it.
   */
  readonly backing?: string | undefined;
  /** Cluster size in bytes of a new qcow2 target; default 65536. */
  readonly targetClusterSize?: number | undefined;
  /**
   * Compress clusters where that makes them smaller; only qcow2. A type is that of a new target (`true`: zlib), or has
   * to be that of an existing one. Default false.
   */
  readonly compress?: boolean | CompressionType | undefined;
}

/** A target that is ready to be written, until {@link commitTarget} or {@link abandonTarget}. */
export interface Target {
  readonly descriptor: NodeDescriptor;
  /** Reads as zeroes wherever nothing was written. */
  readonly readsZero: boolean;
  /** Where the finished image will be. */
  readonly finalPath: string;
  /** Where a new image is while it is unfinished; undefined for an existing one, written in place. */
  readonly partialPath: string | undefined;
  readonly force: boolean;
  /** Somebody else's node, which stays open. */
  readonly borrowed?: boolean | undefined;
}

/** Smallest granularity of copying in bytes (QEMU's default backup cluster). */
export const BACKUP_CLUSTER_SIZE = 65536;

/** Sync mode `top` of a source without a backing file is `full`. */
export function effectiveSync(sync: SyncMode, source: NodeDescriptor): SyncMode {
  const hasBacking = 'backingFile' in source && source.backingFile !== undefined;
  return sync === 'top' && !hasBacking ? 'full' : sync;
}

/** A dirty bitmap says what is copied. */
export function isBitmapSync(sync: SyncMode): boolean {
  return sync === 'incremental' || sync === 'bitmap';
}

/**
 * Granularity of copying in bytes: at least 64 KiB and a whole cluster of the target, so that no copy makes
 * the target read its backing file (QEMU: `max(64 KiB, target cluster size)`).
 */
export function copyClusterSize(target: BlockNode): number {
  return Math.max(BACKUP_CLUSTER_SIZE, target.clusterSize ?? 0);
}

/**
 * Makes or opens the target of a backup of `source`. Nothing is left behind when it throws.
 *
 * @throws StillframeError ERR_STILLFRAME_SAME_NODE, …_TARGET_EXISTS, …_SIZE_MISMATCH,
 *   …_BACKING_UNSUPPORTED, …_LOCKED and what opening and creating a file throws
 */
export function openTarget(runtime: Runtime, source: NodeDescriptor, options: TargetOptions): Target {
  if (options.sync === 'none' && source.driver === 'qcow2' && source.ofSnapshot) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_UNSUPPORTED',
      `sync mode 'none' makes the source the target's backing file, and a backing file is read as it is now, not as it is in a snapshot; use sync mode 'full' or 'top'`,
    );
  }
  if (options.targetNode !== undefined) return borrowTarget(source, options.targetNode, options);
  const path = imagePath(options.target);
  const sources = filesOf(source);
  const identity = fileIdentity(path);
  const same = sources.find((file) => file.identity === identity);
  if (same !== undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_SAME_NODE',
      `Source and target cannot be the same: '${options.target}' is '${same.path}'${
        same === sources[0] ? '' : ', a backing file of the source'
      }; choose another target`,
    );
  }
  // An export cannot be made: it is there, and it is written in place.
  if (isNbdName(path))
    return openExisting(runtime, source, path, { ...options, format: options.format ?? 'raw' });
  return options.existing === true
    ? openExisting(runtime, source, path, options)
    : createTarget(runtime, source, path, identity !== undefined, options);
}

/** @throws StillframeError ERR_STILLFRAME_SAME_NODE, …_READ_ONLY, …_SIZE_MISMATCH, …_UNSUPPORTED_FEATURE (compression) */
function borrowTarget(source: NodeDescriptor, node: NodeDescriptor, options: TargetOptions): Target {
  const { target, compress } = options;
  const [own, theirs] = [filesOf(source)[0], filesOf(node)[0]];
  if (node === source || (own !== undefined && own.control === theirs?.control)) {
    throw new StillframeError(
      'ERR_STILLFRAME_SAME_NODE',
      'Source and target cannot be the same; choose another target',
    );
  }
  if (node.readOnly) {
    throw new StillframeError('ERR_STILLFRAME_READ_ONLY', `the target '${target}' is read-only`);
  }
  checkTargetCompression(node, compress);
  checkLengths(source, node, target);
  return {
    descriptor: node,
    readsZero: false,
    finalPath: target,
    partialPath: undefined,
    force: true,
    borrowed: true,
  };
}

function checkLengths(source: NodeDescriptor, target: NodeDescriptor, name: string): void {
  if (lengthOf(target) === lengthOf(source)) return;
  throw new StillframeError(
    'ERR_STILLFRAME_SIZE_MISMATCH',
    `Source and target image have different sizes: '${source.path}' has ${lengthOf(source)} bytes, ` +
      `'${name}' has ${lengthOf(target)}; resize the target or let the backup create it`,
  );
}

function lengthOf(descriptor: NodeDescriptor): number {
  if (isStorage(descriptor)) throw new TypeError('a file is not an image');
  return descriptor.length;
}

function openExisting(
  runtime: Runtime,
  source: NodeDescriptor,
  path: string,
  options: TargetOptions,
): Target {
  const descriptor = openImage(runtime, path, {
    format: options.format,
    readOnly: false,
    chain: false,
    writeBehind: true,
  });
  try {
    checkTargetCompression(descriptor, options.compress);
    checkLengths(source, descriptor, path);
    // What a server does with what it is given is its own affair.
    if (options.sync === 'none' && descriptor.driver !== 'qcow2' && !isNbdName(path)) {
      throw new StillframeError(
        'ERR_STILLFRAME_BACKING_UNSUPPORTED',
        `Driver '${descriptor.driver}' of node '${path}' does not support backing files: sync mode 'none' needs one; use a target of the format qcow2`,
      );
    }
  } catch (error) {
    closeNode(runtime, descriptor);
    throw error;
  }
  return { descriptor, readsZero: false, finalPath: path, partialPath: undefined, force: true };
}

function checkTargetCompression(target: NodeDescriptor, compress: TargetOptions['compress']): void {
  if (!isCompressed(compress)) return;
  checkCompression(target);
  if (target.driver !== 'qcow2' || compress === true) return;
  const type = target.compressionType === 1 ? 'zstd' : 'zlib';
  if (compress === type) return;
  throw new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `'${target.path}' has the compression type ${type}, which cannot be changed to ${compress}; compress with ${type} or let the backup make a new target`,
  );
}

/** Whether what is asked for is to be compressed. */
export function isCompressed(compress: TargetOptions['compress']): compress is true | CompressionType {
  return compress !== undefined && compress !== false;
}

function createTarget(
  runtime: Runtime,
  source: NodeDescriptor,
  path: string,
  exists: boolean,
  options: TargetOptions,
): Target {
  const format = options.format ?? (source.driver === 'qcow2' ? 'qcow2' : 'raw');
  const sync = effectiveSync(options.sync, source);
  if (format === 'raw' && needsBacking(sync)) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_UNSUPPORTED',
      `Backing file not supported for file format 'raw': sync mode '${sync}' needs one; use format 'qcow2'`,
    );
  }
  const { compress } = options;
  checkBackingOption(options, format, path);
  if (isCompressed(compress)) checkCompression({ driver: format, path });
  const finalPath = exists ? realpathSync(path) : path;
  if (exists) checkReplaceable(finalPath, options.force === true);
  const partialPath = `${finalPath}.partial`;
  const identity = fileIdentity(partialPath);
  if (filesOf(source).some((file) => file.identity === identity)) {
    throw new StillframeError(
      'ERR_STILLFRAME_SAME_NODE',
      `Source and target cannot be the same: the backup would be written to '${partialPath}' first; choose another target`,
    );
  }
  const file = openFile(runtime, partialPath, {
    readOnly: false,
    lock: 'write',
    create: 'truncate',
    writeBehind: true,
  });
  try {
    const node = attachFile(runtime, file);
    let descriptor: NodeDescriptor;
    if (format === 'raw') {
      node.truncate(lengthOf(source));
      descriptor = openRaw(runtime, file);
    } else {
      createQcow2(runtime, node, {
        length: lengthOf(source),
        clusterBits: Math.log2(options.targetClusterSize ?? 65536),
        compressionType: compress === 'zstd' ? 1 : 0,
        ...(options.backing === undefined
          ? backingOf(source, sync, finalPath)
          : namedBackingOf(runtime, options.backing, finalPath)),
      });
      descriptor = openQcow2(runtime, file, undefined, { readOnly: false });
    }
    return { descriptor, readsZero: sync === 'full', finalPath, partialPath, force: options.force === true };
  } catch (error) {
    closeFile(runtime, file);
    rmSync(partialPath, { force: true });
    throw error;
  }
}

function checkReplaceable(path: string, force: boolean): void {
  const stat = statSync(path);
  if (!stat.isFile()) {
    throw new StillframeError(
      'ERR_STILLFRAME_TARGET_EXISTS',
      `'${path}' is not a regular file and cannot be replaced; to write into a block device use --existing`,
    );
  }
  if (!force) {
    throw new StillframeError(
      'ERR_STILLFRAME_TARGET_EXISTS',
      `'${path}' exists; use --force to replace it or --existing to write into it`,
    );
  }
}

function checkBackingOption(
  { backing, sync, existing }: TargetOptions,
  format: TargetFormat,
  path: string,
): void {
  if (backing === undefined) return;
  const invalid = (why: string): StillframeError =>
    new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${path}' cannot be made on top of '${backing}': ${why}`,
    );
  if (existing === true) throw invalid('it is there already');
  if (format !== 'qcow2') throw invalid(`the format ${format} has no backing files; use format qcow2`);
  if (!isBitmapSync(sync)) {
    throw invalid(`sync mode '${sync}' says itself what the target lies on`);
  }
}

/** @throws StillframeError what opening that image throws */
function namedBackingOf(
  runtime: Runtime,
  name: string,
  targetPath: string,
): { backingFile: string; backingFormat: string } {
  const path = isNbdName(name) ? name : resolve(dirname(targetPath), name);
  // Others may be reading it, or writing it: only its format is of interest.
  const node = openImage(runtime, path, { readOnly: true, backing: false, lock: 'none' });
  try {
    return { backingFile: name, backingFormat: node.driver };
  } finally {
    closeNode(runtime, node);
  }
}

function needsBacking(sync: SyncMode): boolean {
  return sync === 'top' || sync === 'none';
}

/** Backing file of a new target: for `top` the source's own, for `none` the source itself. */
function backingOf(
  source: NodeDescriptor,
  sync: SyncMode,
  targetPath: string,
): { backingFile?: string; backingFormat?: string } {
  if (sync === 'none') return { backingFile: source.path, backingFormat: source.driver };
  if (sync !== 'top' || !('backingFile' in source) || source.backingFile === undefined) return {};
  const format = source.backingFormat ?? source.backing?.driver;
  // A relative name means the same file only from the same folder.
  const name =
    dirname(targetPath) === dirname(source.path)
      ? source.backingFile
      : resolve(dirname(source.path), source.backingFile);
  return { backingFile: name, ...(format === undefined ? {} : { backingFormat: format }) };
}

/**
 * Flushes and closes the target and gives it its name: the commit point of a backup. Where it cannot be made
 * durable it is given up.
 */
export function commitTarget(runtime: Runtime, target: Target, beforeRename?: () => void): void {
  try {
    attachNode(runtime, target.descriptor).flush();
  } catch (error) {
    abandonTarget(runtime, target);
    throw error;
  }
  if (target.borrowed === true) return;
  try {
    closeNode(runtime, target.descriptor);
    beforeRename?.();
  } catch (error) {
    // Closed it is, but nobody knows what of it is on the disk.
    if (target.partialPath !== undefined) rmSync(target.partialPath, { force: true });
    throw error;
  }
  if (target.partialPath === undefined) return;
  try {
    if (target.force) renameSync(target.partialPath, target.finalPath);
    else publishNew(target.partialPath, target.finalPath);
    syncFolder(dirname(target.finalPath));
  } catch (error) {
    throw systemError(`cannot rename '${target.partialPath}' to '${basename(target.finalPath)}'`, error);
  }
}

/** Renames without ever replacing a file that came up in the meantime. */
function publishNew(partialPath: string, finalPath: string): void {
  try {
    linkSync(partialPath, finalPath);
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'EEXIST') {
      throw new StillframeError(
        'ERR_STILLFRAME_TARGET_EXISTS',
        `'${finalPath}' came into being during the backup; the finished backup is '${partialPath}'`,
      );
    }
    // A file system without hard links.
    renameSync(partialPath, finalPath);
    return;
  }
  unlinkSync(partialPath);
}

function syncFolder(path: string): void {
  const fd = openSync(join(path, '.'), 'r');
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/**
 * Gives up on a target: closes it, and removes it where we made it. Never throws: what cannot be removed or closed
 * properly keeps its name of an unfinished one, and the resources are back all the same.
 *
 * @returns whether what was written to it is still there, and durable unless somebody else has it open
 */
export function abandonTarget(runtime: Runtime, target: Target): boolean {
  if (target.borrowed === true) return true;
  if (target.partialPath !== undefined) {
    try {
      rmSync(target.partialPath, { force: true });
      // Nobody wants the data any more: spare the disk from writing it.
      const [file] = filesOf(target.descriptor);
      if (file !== undefined) attachFile(runtime, file).truncate(0);
    } catch {
      // Closed below.
    }
  }
  try {
    closeNode(runtime, target.descriptor);
    return target.partialPath === undefined;
  } catch {
    // Whatever could not be flushed was given up on just now.
    return false;
  }
}
