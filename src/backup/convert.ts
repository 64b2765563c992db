import { realpathSync, rmSync, statSync } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { checkCompression } from '../block/compression.js';
import { type CreationOptions, createImage } from '../block/create.js';
import { editBitmap } from '../block/edit-bitmap.js';
import { filesOf } from '../block/files.js';
import type { CopyBuffer } from '../block/filters/copy-before-write.js';
import {
  attachNode,
  closeNode,
  fileIdentity,
  type ImageFormat,
  imagePath,
  type OpenImageOptions,
  openImage,
  type TargetFormat,
} from '../block/graph.js';
import { isNbdName } from '../block/nbd/uri.js';
import type { NodeDescriptor } from '../block/node.js';
import { readBitmaps, readHeader } from '../block/qcow2/index.js';
import { attachFile } from '../block/raw/file.js';
import { StillframeError } from '../errors.js';
import { Team, type TeamMemory } from '../job/team.js';
import type { Runtime } from '../kernels/runtime.js';
import { type Conversion, type ConversionListener, copyPart, type Part } from './conversion.js';
import { abandonTarget, commitTarget, type Target } from './target.js';

/** How an image is converted. Semantics: `qemu-img convert`. */
export interface ConvertOptions {
  /** Format of the target. Default `raw`, as in qemu-img. */
  readonly format?: TargetFormat | undefined;
  /** What the target is to be like. */
  readonly creation?: CreationOptions | undefined;
  /** Write compressed clusters, of the type that `creation.compressionType` says. Default false. */
  readonly compress?: boolean | undefined;
  /**
   * The target gets this backing file, whose content is that of the source's own backing file: only what the topmost
   * source image holds is copied.
   */
  readonly backingFile?: string | undefined;
  readonly backingFormat?: ImageFormat | undefined;
  /** Write into the image that is there (`-n`) instead of making a new one. Default false. */
  readonly existing?: boolean | undefined;
  /** With `existing`: all of the target reads as zeroes. Default false. */
  readonly targetIsZero?: boolean | undefined;
  /**
   * Smallest run of zeroes in bytes, a multiple of 512 up to 16 MiB, that becomes a hole; 0: everything is written out.
   * Default 4096.
   */
  readonly sparseSize?: number | undefined;
  /** What cannot be read becomes zeroes; each such place is told to `onMessage`. Default false. */
  readonly salvage?: boolean | undefined;
  /** The persistent dirty bitmaps of the source are copied. Default false. */
  readonly bitmaps?: boolean | undefined;
  /** Inconsistent bitmaps are left out instead of an error. Default false. */
  readonly skipBrokenBitmaps?: boolean | undefined;
  /** At most this many bytes are read in a second. Default: as many as can be. */
  readonly bytesPerSecond?: number | undefined;
  /**
   * What is copied of a single source: from the byte `skip` of it on, up to the byte `end` at most. A beginning behind
   * the end is told to `onMessage`, and the target is empty. Default: all of it.
   */
  readonly range?: { readonly skip: number; readonly end: number } | undefined;
  /** Folders from which the target's header may open a backing file. Default: the target's own. */
  readonly allowTargetBacking?: readonly string[] | undefined;
}

/** A source of a conversion. */
export interface ConvertSource {
  readonly path: string;
  readonly options: Omit<OpenImageOptions, 'readOnly'>;
}

const MAX_SPARSE_BYTES = 16 << 20;
const DEFAULT_SPARSE_BYTES = 4096;
/** Bytes that a thread claims at once, at least. */
const CLAIM_BYTES = 8 << 20;
const SECTOR = 512;

/** What the thread that leads a conversion tells its host. */
export interface ConvertHost extends ConversionListener {
  /** Others may help from now on. */
  started(conversion: Conversion): void;
}

/**
 * Converts images into one: several sources follow one another. The target is `TARGET.partial` until it is complete and
 * durable; then it takes the place of what has its name.
 *
 * Semantics: `qemu-img convert`.
 *
 * @returns false where a thread that helps has failed, which tells why itself
 * @throws StillframeError ERR_STILLFRAME_SAME_NODE, …_INVALID_ARGUMENT, …_SIZE_MISMATCH, …_UNSUPPORTED_FEATURE (nothing
 *   to compress, no bitmaps), …_BITMAP_INCONSISTENT, …_JOB_CANCELLED and what opening, creating, reading and writing throw
 */
export function convertImages(
  runtime: Runtime,
  sources: readonly ConvertSource[],
  targetName: string,
  options: ConvertOptions,
  memory: TeamMemory,
  buffer: CopyBuffer,
  host: ConvertHost,
): boolean {
  checkOptions(sources, targetName, options);
  const team = new Team(memory);
  const opened: NodeDescriptor[] = [];
  try {
    for (const { path, options: how } of sources) {
      opened.push(openImage(runtime, path, { ...how, readOnly: true }));
    }
    const bitmaps = options.bitmaps === true ? bitmapsToCopy(runtime, opened, options, host) : [];
    const parts = opened.map((source) => partOf(source, options.range, host));
    const length = bytesOf(parts);
    const target = openTarget(runtime, opened, targetName, length, options);
    try {
      if (options.compress === true) checkCompression(target.descriptor);
      if (options.bitmaps === true && target.descriptor.driver === 'qcow2' && target.descriptor.version < 3) {
        throw noBitmaps('qcow2, version 2');
      }
      const conversion = conversionOf(runtime, opened, parts, target, options);
      try {
        host.started(conversion);
        copyPart(runtime, conversion, team, buffer, host);
      } catch (error) {
        team.stop();
        throw error;
      } finally {
        team.close();
      }
      if (team.stopped) {
        abandonTarget(runtime, target);
        return false;
      }
    } catch (error) {
      abandonTarget(runtime, target);
      throw error;
    }
    const [source] = sources;
    commitTarget(runtime, target, () => {
      const path = target.partialPath ?? target.finalPath;
      for (const { name, granularity, enabled } of bitmaps) {
        const from = { path: source?.path ?? '', format: 'qcow2' } as const;
        const actions = [
          { action: 'add', granularity },
          { action: 'disable' },
          { action: 'merge', source: name, from },
          ...(enabled ? [{ action: 'enable' } as const] : []),
        ] as const;
        editBitmap(runtime, path, name, actions, { format: 'qcow2' });
      }
    });
    host.progress(length, length);
    return true;
  } finally {
    for (const source of opened) closeNode(runtime, source);
  }
}

const invalid = (what: string): StillframeError =>
  new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', what);

function checkOptions(sources: readonly ConvertSource[], target: string, options: ConvertOptions): void {
  const { sparseSize = DEFAULT_SPARSE_BYTES, creation = {} } = options;
  if (sources.length === 0 || target === '') throw invalid('Must specify image file name');
  if (
    !Number.isInteger(sparseSize) ||
    sparseSize % SECTOR !== 0 ||
    sparseSize < 0 ||
    sparseSize > MAX_SPARSE_BYTES
  ) {
    throw invalid(
      `Invalid buffer size for sparse output specified. Valid sizes are multiples of ${SECTOR} up to ${MAX_SPARSE_BYTES}. Select 0 to disable sparse detection (fully allocates output).`,
    );
  }
  if (options.targetIsZero === true && options.existing !== true) {
    throw invalid('--target-is-zero requires use of -n flag');
  }
  if (options.skipBrokenBitmaps === true && options.bitmaps !== true) {
    throw invalid('Use of --skip-broken-bitmaps requires --bitmaps');
  }
  const { range } = options;
  if (range !== undefined) {
    if (sources.length > 1) throw invalid('a part can be copied of a single image only');
    if (!Number.isInteger(range.skip) || range.skip < 0 || !(range.end >= 0)) {
      throw invalid(`no part of an image is from byte ${range.skip} to ${range.end}`);
    }
  }
  if (options.bitmaps === true && sources.length > 1) {
    throw invalid('Copying bitmaps only possible with single source');
  }
  if (options.backingFile !== undefined && sources.length > 1) {
    throw invalid(
      'Having a backing file for the target makes no sense when concatenating multiple input images',
    );
  }
  if (options.targetIsZero === true && options.backingFile !== undefined) {
    throw invalid('Cannot use --target-is-zero when the destination image has a backing file');
  }
  if (options.compress !== true) return;
  const { preallocation = 'off' } = creation;
  if (preallocation !== 'off') throw invalid('Compression and preallocation not supported at the same time');
  if (options.existing === true) return;
  checkCompression({
    driver: options.format ?? 'raw',
    path: target,
    hasDataFile: creation.dataFile !== undefined,
  });
}

function lengthOf(descriptor: NodeDescriptor): number {
  return descriptor.driver === 'file' ? 0 : descriptor.length;
}

function partOf(source: NodeDescriptor, range: ConvertOptions['range'], host: ConvertHost): Part {
  const length = lengthOf(source);
  if (range === undefined) return { offset: 0, length };
  const end = Math.min(length, range.end);
  if (range.skip > end) {
    host.message(`'${source.path}': cannot skip ${range.skip} bytes: what is to be copied ends at ${end}`);
  }
  return { offset: Math.min(range.skip, end), length: Math.max(0, end - range.skip) };
}

/** Of the parts one after the other, each filled up to whole sectors. */
function bytesOf(parts: readonly Part[]): number {
  return parts.reduce((sum, { length }) => sum + roundUp(length, SECTOR), 0);
}

function roundUp(bytes: number, unit: number): number {
  return Math.ceil(bytes / unit) * unit;
}

interface CopiedBitmap {
  readonly name: string;
  /** Bytes. */
  readonly granularity: number;
  readonly enabled: boolean;
}

function noBitmaps(format: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `Format driver '${format}' does not support bitmaps`,
  );
}

function bitmapsToCopy(
  runtime: Runtime,
  [source]: readonly NodeDescriptor[],
  options: ConvertOptions,
  host: ConvertHost,
): CopiedBitmap[] {
  if (source?.driver !== 'qcow2' || source.version < 3) {
    throw new StillframeError('ERR_STILLFRAME_UNSUPPORTED_FEATURE', 'Source lacks bitmap support');
  }
  if (options.format !== 'qcow2') throw noBitmaps(options.format ?? 'raw');
  const file = attachFile(runtime, source.file);
  const copied: CopiedBitmap[] = [];
  for (const { name, granularity, flags } of readBitmaps(file, readHeader(runtime, file))) {
    if (!flags.includes('in-use')) {
      copied.push({ name, granularity, enabled: flags.includes('auto') });
    } else if (options.skipBrokenBitmaps === true) {
      host.message(`warning: Skipping inconsistent bitmap '${name}'`);
    } else {
      throw new StillframeError(
        'ERR_STILLFRAME_BITMAP_INCONSISTENT',
        `Cannot copy inconsistent bitmap '${name}'; try --skip-broken-bitmaps, or remove it with 'stillframe bitmap --remove'`,
      );
    }
  }
  return copied;
}

function openTarget(
  runtime: Runtime,
  sources: readonly NodeDescriptor[],
  name: string,
  length: number,
  options: ConvertOptions,
): Target {
  const path = imagePath(name);
  const identity = fileIdentity(path);
  for (const file of sources.flatMap(filesOf)) {
    const same =
      file.identity === identity || (!isNbdName(path) && file.identity === fileIdentity(`${path}.partial`));
    if (!same) continue;
    throw new StillframeError(
      'ERR_STILLFRAME_SAME_NODE',
      `Source and target cannot be the same: '${name}' or '${name}.partial' is '${file.path}'; choose another target`,
    );
  }
  const { format = 'raw', allowTargetBacking } = options;
  const device = isNbdName(path) || (identity !== undefined && !statSync(path).isFile());
  if (options.existing === true || (device && format === 'raw')) {
    const descriptor = openImage(runtime, path, {
      format,
      readOnly: false,
      backing: allowTargetBacking,
      writeBehind: true,
    });
    if (lengthOf(descriptor) < length) {
      closeNode(runtime, descriptor);
      throw new StillframeError(
        'ERR_STILLFRAME_SIZE_MISMATCH',
        `output file is smaller than input file: '${path}' has ${lengthOf(descriptor)} bytes, less than ${length}; resize it first`,
      );
    }
    const readsZero = options.targetIsZero === true;
    return { descriptor, readsZero, finalPath: path, partialPath: undefined, force: true };
  }
  if (device) {
    throw invalid(`'${path}' is not a regular file, and an image of format ${format} cannot be made in it`);
  }
  const finalPath = identity === undefined ? path : realpathSync(path);
  const partialPath = `${finalPath}.partial`;
  const { creation, backingFile, backingFormat } = options;
  createImage(runtime, partialPath, { ...creation, format, length, backingFile, backingFormat, force: true });
  try {
    const descriptor = openImage(runtime, partialPath, {
      format,
      readOnly: false,
      backing:
        backingFile === undefined
          ? undefined
          : [...(allowTargetBacking ?? []), ...foldersOf(finalPath, backingFile)],
      writeBehind: true,
    });
    return { descriptor, readsZero: backingFile === undefined, finalPath, partialPath, force: true };
  } catch (error) {
    rmSync(partialPath, { force: true });
    throw error;
  }
}

/** The caller named the backing file: that is leave enough to open it. */
function foldersOf(image: string, backingFile: string): string[] {
  return [dirname(image), dirname(resolve(dirname(image), backingFile))];
}

function conversionOf(
  runtime: Runtime,
  sources: readonly NodeDescriptor[],
  parts: readonly Part[],
  target: Target,
  options: ConvertOptions,
): Conversion {
  const node = attachNode(runtime, target.descriptor);
  const clusterSize = node.clusterSize ?? 0;
  const { sparseSize = DEFAULT_SPARSE_BYTES } = options;
  return {
    sources,
    parts,
    target: target.descriptor,
    length: bytesOf(parts),
    // A target's cluster is written by one thread, at once.
    align: Math.max(DEFAULT_SPARSE_BYTES, clusterSize),
    claimBytes: roundUp(CLAIM_BYTES, Math.max(DEFAULT_SPARSE_BYTES, clusterSize)),
    sparseSize,
    targetReadsZero: target.readsZero && sparseSize > 0,
    onlyTop: options.backingFile === undefined ? undefined : (node.backing?.length ?? 0),
    compress: options.compress === true,
    salvage: options.salvage === true,
    bytesPerSecond: options.bytesPerSecond,
  };
}
