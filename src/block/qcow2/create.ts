import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import {
  AUTOCLEAR_DATA_FILE_RAW,
  COMPATIBLE_LAZY_REFCOUNTS,
  EXTENSION_BACKING_FORMAT,
  EXTENSION_DATA_FILE,
  EXTENSION_FEATURE_TABLE,
  FIELD,
  featureTable,
  HEADER_LENGTH_V2,
  INCOMPATIBLE_COMPRESSION,
  INCOMPATIBLE_DATA_FILE,
  INCOMPATIBLE_EXTENDED_L2,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MAX_REFCOUNT_TABLE_BYTES,
  MIN_CLUSTER_BITS,
  QCOW2_MAGIC,
  SUBCLUSTERS,
  WRITTEN_HEADER_LENGTH,
} from './header.js';
import { type Layout, planLayout } from './layout.js';
import { fillRefcounts } from './refcount-entry.js';

/** Bytes of tables that are written at once. */
const STEP_BYTES = 1024 * 1024;

/**
 * What of a new image is there before anything is written to it: nothing, the tables (so that writes need no
 * allocation), also the space of the data, or all of it written as zeroes. As `qemu-img create -o preallocation=`.
 */
export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full';

export interface CreateQcow2Options {
  /** Virtual size in bytes, a multiple of 512. */
  readonly length: number;
  /** 9 to 21; default 16 (64 KiB). */
  readonly clusterBits?: number | undefined;
  readonly version?: 2 | 3 | undefined;
  /** 1, 2, 4 … 64; default 16. Version 2 knows 16 only. */
  readonly refcountBits?: number | undefined;
  /** Written into the header as it is; not opened. */
  readonly backingFile?: string | undefined;
  readonly backingFormat?: string | undefined;
  readonly lazyRefcounts?: boolean | undefined;
  /** 0 deflate (default), 1 zstd. */
  readonly compressionType?: number | undefined;
  /** Subclusters. Needs clusters of 16 KiB or more. */
  readonly extendedL2?: boolean | undefined;
  /** Name of the external data file, written into the header as it is. */
  readonly dataFile?: string | undefined;
  /** The data file alone is to be a valid raw image; implies preallocated metadata. */
  readonly dataFileRaw?: boolean | undefined;
  /** Default `off`. */
  readonly preallocation?: Preallocation | undefined;
}

/** The options with all defaults in place. */
type Complete = {
  readonly [Key in Exclude<
    keyof CreateQcow2Options,
    'backingFile' | 'backingFormat' | 'dataFile'
  >]-?: NonNullable<CreateQcow2Options[Key]>;
} & Pick<CreateQcow2Options, 'backingFile' | 'backingFormat' | 'dataFile'>;

function withDefaults(options: CreateQcow2Options): Complete {
  const raw = options.dataFileRaw ?? false;
  const preallocation = options.preallocation ?? 'off';
  return {
    length: options.length,
    clusterBits: options.clusterBits ?? 16,
    version: options.version ?? 3,
    refcountBits: options.refcountBits ?? 16,
    backingFile: options.backingFile,
    backingFormat: options.backingFormat,
    lazyRefcounts: options.lazyRefcounts ?? false,
    compressionType: options.compressionType ?? 0,
    extendedL2: options.extendedL2 ?? false,
    dataFile: options.dataFile,
    dataFileRaw: raw,
    preallocation: raw && preallocation === 'off' ? 'metadata' : preallocation,
  };
}

/** What is wrong with the options, in a sentence; undefined where they make an image. */
function problemOf(options: Complete): string | undefined {
  const { length, clusterBits, version, refcountBits, preallocation, compressionType } = options;
  const clusterSize = 2 ** clusterBits;
  if (!Number.isInteger(clusterBits) || clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    return `the cluster size must be a power of two from 512 bytes to 2 MiB, not ${clusterSize}`;
  }
  if (!Number.isSafeInteger(length) || length < 0 || length % 512 !== 0) {
    return `the virtual size must be a multiple of 512 bytes, not ${length}`;
  }
  const refcountOrder = Math.log2(refcountBits);
  if (!Number.isInteger(refcountOrder) || refcountOrder < 0 || refcountOrder > 6) {
    return `the refcount width must be a power of two from 1 to 64 bits, not ${refcountBits}`;
  }
  if (compressionType !== 0 && compressionType !== 1) {
    return `the compression type must be 0 (zlib) or 1 (zstd), not ${compressionType}`;
  }
  if (version === 2) {
    const missing = [
      refcountBits !== 16 && 'refcount widths other than 16',
      options.lazyRefcounts && 'lazy refcounts',
      compressionType !== 0 && 'zstd',
      options.extendedL2 && 'subclusters (extended_l2)',
      options.dataFile !== undefined && 'external data files',
    ].find((feature) => feature !== false);
    if (missing !== undefined) return `version 2 knows no ${missing}; use version 3 (compat=1.1)`;
  }
  if (options.extendedL2 && clusterSize / SUBCLUSTERS < 512) {
    return `subclusters (extended_l2) need clusters of at least 16 KiB, not ${clusterSize} bytes`;
  }
  if (options.dataFileRaw && options.dataFile === undefined) return 'data_file_raw needs a data_file';
  if (options.backingFile !== undefined) {
    if (options.dataFileRaw) return 'a raw data file (data_file_raw) and a backing file exclude each other';
    if (preallocation !== 'off' && !options.extendedL2) {
      return 'a backing file and preallocation exclude each other unless there are subclusters (extended_l2)';
    }
  }
  return undefined;
}

/**
 * The layout of a new image.
 *
 * @param path names the image in errors
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT where the options make no image
 */
function checkedLayout(path: string, options: Complete): Layout {
  const { length, refcountBits, extendedL2 } = options;
  const clusterSize = 2 ** options.clusterBits;
  const bad = (what: string) =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `cannot create '${path}': ${what}`);
  const problem = problemOf(options);
  if (problem !== undefined) throw bad(problem);
  const tables = options.preallocation !== 'off';
  const data = tables && options.dataFile === undefined;
  const layout = planLayout({ length, clusterSize, refcountBits, extendedL2, tables, data });
  if (
    layout.l1Entries * 8 > MAX_L1_BYTES ||
    layout.refcountTableClusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES ||
    !Number.isSafeInteger(layout.clusters * clusterSize)
  ) {
    throw bad(
      `a virtual size of ${length} bytes is too large for clusters of ${clusterSize} bytes; use larger clusters`,
    );
  }
  return layout;
}

/**
 * Checks what {@link createQcow2} checks, before anything is touched.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function checkQcow2Options(path: string, options: CreateQcow2Options): void {
  const complete = withDefaults(options);
  encodeHeader(path, complete, checkedLayout(path, complete));
}

/**
 * Writes a new image into an empty file. The first sector, which makes the file an image, is written last and
 * after a flush: a half-made file is not an image.
 *
 * @param dataFile the empty external data file, where the options name one
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT and what writing throws
 */
export function createQcow2(
  runtime: Runtime,
  file: FileNode,
  given: CreateQcow2Options,
  dataFile?: FileNode,
): void {
  const { arena } = runtime;
  const path = file.descriptor.path;
  const options = withDefaults(given);
  const { length } = options;
  const clusterSize = 2 ** options.clusterBits;
  const layout = checkedLayout(path, options);
  const header = encodeHeader(path, options, layout);
  const refcountTable = clusterSize;
  const refcountBlocks = refcountTable + layout.refcountTableClusters * clusterSize;
  const l1 = refcountBlocks + layout.refcountBlocks * clusterSize;
  const l2 = l1 + layout.l1Clusters * clusterSize;
  const data = l2 + layout.l2Tables * clusterSize;

  const stepBytes = Math.max(clusterSize, STEP_BYTES);
  const buffer = arena.alloc(stepBytes, `creating '${path}'`);
  /** Writes a table of `count` entries in steps; `encode` fills a zeroed buffer with entries [from, to). */
  const writeTable = (
    offset: number,
    count: number,
    entryBits: number,
    unit: number,
    encode: (from: number, to: number) => void,
  ): void => {
    const perStep = (stepBytes * 8) / entryBits;
    for (let from = 0; from < count; from += perStep) {
      const to = Math.min(count, from + perStep);
      const bytes = Math.ceil(((to - from) * entryBits) / 8 / unit) * unit;
      arena.u8.fill(0, buffer, buffer + bytes);
      encode(from, to);
      file.write(offset + (from * entryBits) / 8, buffer, bytes);
    }
  };
  /** Entries that point at clusters in a row, from `first` on. */
  const pointers = (entryBytes: number, first: number, flag: number) => (from: number, to: number) => {
    for (let index = from; index < to; index++) {
      const at = buffer + (index - from) * entryBytes;
      const place = first + index * clusterSize;
      arena.view.setUint32(at, flag + Math.floor(place / 0x100000000));
      arena.view.setUint32(at + 4, place % 0x100000000);
    }
  };
  try {
    // Everything reads as zeroes that is not written below.
    file.writeZeroes(0, layout.clusters * clusterSize, false);
    if (dataFile === undefined) preallocate(file, data, layout.dataClusters * clusterSize, options);
    else {
      dataFile.truncate(length);
      preallocate(dataFile, 0, length, options);
      dataFile.flush();
    }
    // Whole clusters but for the L1 table, as qemu-img does: an image with more clusters than its file has space is
    // taken for a preallocated one.
    writeTable(refcountTable, layout.refcountBlocks, 64, clusterSize, pointers(8, refcountBlocks, 0));
    const order = Math.log2(options.refcountBits);
    writeTable(refcountBlocks, layout.clusters, options.refcountBits, clusterSize, (from, to) =>
      fillRefcounts(arena, buffer, 0, to - from, order),
    );
    if (layout.l2Tables > 0) {
      writeTable(l1, layout.l2Tables, 64, 512, pointers(8, l2, COPIED));
      const entryBytes = options.extendedL2 ? 16 : 8;
      const first = dataFile === undefined ? data : 0;
      const entries = Math.ceil(length / clusterSize);
      writeTable(l2, entries, entryBytes * 8, clusterSize, pointers(entryBytes, first, COPIED));
    }
    arena.u8.fill(0, buffer, buffer + clusterSize);
    arena.u8.set(header, buffer);
    if (clusterSize > 512) file.write(512, buffer + 512, clusterSize - 512);
    file.flush();
    file.write(0, buffer, 512);
  } finally {
    arena.free(buffer);
  }
}

/** High half of an entry: its cluster has refcount 1. */
const COPIED = 0x80000000;

function preallocate(file: FileNode, offset: number, length: number, { preallocation }: Complete): void {
  if (preallocation === 'falloc' || preallocation === 'full') {
    file.preallocate(offset, length, preallocation);
  }
}

/** The first cluster. */
function encodeHeader(path: string, options: Complete, layout: Layout): Uint8Array {
  const { clusterBits, version } = options;
  const clusterSize = 2 ** clusterBits;
  const bad = (what: string) =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `cannot create '${path}': ${what}`);
  const bytes = Buffer.alloc(clusterSize);
  bytes.writeUInt32BE(QCOW2_MAGIC, 0);
  bytes.writeUInt32BE(version, 4);
  bytes.writeUInt32BE(clusterBits, FIELD.clusterBits);
  bytes.writeBigUInt64BE(BigInt(options.length), FIELD.size);
  bytes.writeUInt32BE(layout.l1Entries, FIELD.l1Size);
  const l1Offset = (1 + layout.refcountTableClusters + layout.refcountBlocks) * clusterSize;
  if (layout.l1Entries > 0) bytes.writeBigUInt64BE(BigInt(l1Offset), FIELD.l1TableOffset);
  bytes.writeBigUInt64BE(BigInt(clusterSize), FIELD.refcountTableOffset);
  bytes.writeUInt32BE(layout.refcountTableClusters, FIELD.refcountTableClusters);
  let at = HEADER_LENGTH_V2;
  if (version === 3) {
    const incompatible =
      (options.dataFile === undefined ? 0n : INCOMPATIBLE_DATA_FILE) |
      (options.compressionType === 0 ? 0n : INCOMPATIBLE_COMPRESSION) |
      (options.extendedL2 ? INCOMPATIBLE_EXTENDED_L2 : 0n);
    bytes.writeBigUInt64BE(incompatible, FIELD.incompatibleFeatures);
    bytes.writeBigUInt64BE(options.lazyRefcounts ? COMPATIBLE_LAZY_REFCOUNTS : 0n, FIELD.compatibleFeatures);
    bytes.writeBigUInt64BE(options.dataFileRaw ? AUTOCLEAR_DATA_FILE_RAW : 0n, FIELD.autoclearFeatures);
    bytes.writeUInt32BE(Math.log2(options.refcountBits), FIELD.refcountOrder);
    bytes.writeUInt32BE(WRITTEN_HEADER_LENGTH, FIELD.headerLength);
    bytes[FIELD.compressionType] = options.compressionType;
    at = WRITTEN_HEADER_LENGTH;
  }

  const name = Buffer.from(options.backingFile ?? '', 'utf8');
  if (name.length > 1023) throw bad(`the name of the backing file has ${name.length} bytes, more than 1023`);
  if (name.includes(0)) throw bad('the name of the backing file contains a zero byte');
  const format = Buffer.from(options.backingFormat ?? '', 'utf8');
  if (format.length > 15) throw bad(`the backing format '${options.backingFormat}' is longer than 15 bytes`);
  const dataFile = Buffer.from(options.dataFile ?? '', 'utf8');
  if (dataFile.includes(0)) throw bad('the name of the data file contains a zero byte');
  const features = featureTable();
  const extensions = [
    ...(name.length > 0 && format.length > 0 ? [{ type: EXTENSION_BACKING_FORMAT, data: format }] : []),
    ...(dataFile.length > 0 ? [{ type: EXTENSION_DATA_FILE, data: dataFile }] : []),
  ];
  const bytesOf = (data: Uint8Array) => 8 + Math.ceil(data.length / 8) * 8;
  // The end of the extensions is eight zero bytes.
  const needed = extensions.reduce((sum, { data }) => sum + bytesOf(data), at + 8 + name.length);
  if (needed > clusterSize) {
    throw bad(
      `the names of the backing and the data file do not fit into a cluster of ${clusterSize} bytes; use larger clusters`,
    );
  }
  // The names of features are a courtesy; a cluster of 512 bytes holds them only where nothing else is there.
  if (version === 3 && needed + bytesOf(features) <= clusterSize) {
    extensions.push({ type: EXTENSION_FEATURE_TABLE, data: features });
  }
  for (const { type, data } of extensions) {
    bytes.writeUInt32BE(type, at);
    bytes.writeUInt32BE(data.length, at + 4);
    bytes.set(data, at + 8);
    at += bytesOf(data);
  }
  at += 8;
  if (name.length > 0) {
    bytes.writeBigUInt64BE(BigInt(at), FIELD.backingFileOffset);
    bytes.writeUInt32BE(name.length, FIELD.backingFileSize);
    bytes.set(name, at);
  }
  return bytes;
}
