import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';

/** `QFI\xfb` */
export const QCOW2_MAGIC = 0x514649fb;

/** Header length in bytes of version 2, and the smallest one of version 3. */
export const HEADER_LENGTH_V2 = 72;
export const HEADER_LENGTH_V3 = 104;
/** What QEMU writes, too: up to and with the compression type, padded to 8. */
export const WRITTEN_HEADER_LENGTH = 112;

/** Limits on what an image may ask for, in bytes unless named otherwise. */
export const MAX_L1_BYTES = 32 * 1024 * 1024;
export const MAX_REFCOUNT_TABLE_BYTES = 8 * 1024 * 1024;
export const MAX_SNAPSHOTS = 65536;
export const MIN_CLUSTER_BITS = 9;
export const MAX_CLUSTER_BITS = 21;

/** What a disk writes whole or not at all. */
export const SECTOR_BYTES = 512;
/** Type and length of an extension, and the whole of the one that ends the list. */
export const EXTENSION_HEAD_BYTES = 8;
export const EXTENSION_END = 0;
export const EXTENSION_BACKING_FORMAT = 0xe2792aca;
export const EXTENSION_FEATURE_TABLE = 0x6803f857;
export const EXTENSION_BITMAPS = 0x23852875;
/** `DATA` */
export const EXTENSION_DATA_FILE = 0x44415441;

/** Offsets of the header's fields in bytes. All are big-endian. */
export const FIELD = {
  backingFileOffset: 8,
  backingFileSize: 16,
  clusterBits: 20,
  size: 24,
  cryptMethod: 32,
  l1Size: 36,
  l1TableOffset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  snapshotCount: 60,
  snapshotsOffset: 64,
  incompatibleFeatures: 72,
  compatibleFeatures: 80,
  autoclearFeatures: 88,
  refcountOrder: 96,
  headerLength: 100,
  compressionType: 104,
} as const;

/** Names of feature bits as the feature name table of an image has them. `type`: 0, 1, 2 as in the table. */
export const FEATURES: readonly { readonly type: 0 | 1 | 2; readonly bit: number; readonly name: string }[] =
  [
    { type: 0, bit: 0, name: 'dirty bit' },
    { type: 0, bit: 1, name: 'corrupt bit' },
    { type: 0, bit: 2, name: 'external data file' },
    { type: 0, bit: 3, name: 'compression type' },
    { type: 0, bit: 4, name: 'extended L2 entries' },
    { type: 1, bit: 0, name: 'lazy refcounts' },
    { type: 2, bit: 0, name: 'bitmaps' },
    { type: 2, bit: 1, name: 'raw external data' },
  ];

/** The extension with the names of all feature bits, 48 bytes each. */
export function featureTable() {
  const table = Buffer.alloc(FEATURES.length * 48);
  for (const [index, feature] of FEATURES.entries()) {
    table[index * 48] = feature.type;
    table[index * 48 + 1] = feature.bit;
    table.write(feature.name, index * 48 + 2, 'latin1');
  }
  return table;
}

export const INCOMPATIBLE_DIRTY = 1n << 0n;
export const INCOMPATIBLE_CORRUPT = 1n << 1n;
export const INCOMPATIBLE_DATA_FILE = 1n << 2n;
export const INCOMPATIBLE_COMPRESSION = 1n << 3n;
export const INCOMPATIBLE_EXTENDED_L2 = 1n << 4n;
const INCOMPATIBLE_KNOWN = 0x1fn;
export const COMPATIBLE_LAZY_REFCOUNTS = 1n << 0n;
export const AUTOCLEAR_BITMAPS = 1n << 0n;
export const AUTOCLEAR_DATA_FILE_RAW = 1n << 1n;
/** Subclusters in a cluster of an image with extended L2 entries. */
export const SUBCLUSTERS = 32;

/** A header extension as it is in the file. */
export interface HeaderExtension {
  readonly type: number;
  /** Offset of its data in the file, bytes. */
  readonly offset: number;
  /** Bytes, padding not included. */
  readonly length: number;
}

/** The validated header of a qcow2 image. Offsets and lengths are bytes. */
export interface Qcow2Header {
  readonly version: 2 | 3;
  readonly backingFile: string | undefined;
  readonly backingFormat: string | undefined;
  readonly clusterBits: number;
  readonly clusterSize: number;
  /** Virtual size. */
  readonly length: number;
  /** Entries. */
  readonly l1Size: number;
  readonly l1TableOffset: number;
  readonly refcountTableOffset: number;
  readonly refcountTableClusters: number;
  readonly snapshotCount: number;
  readonly snapshotsOffset: number;
  readonly incompatibleFeatures: bigint;
  readonly compatibleFeatures: bigint;
  readonly autoclearFeatures: bigint;
  readonly refcountOrder: number;
  readonly refcountBits: number;
  readonly headerLength: number;
  /** 0 deflate, 1 zstd. */
  readonly compressionType: 0 | 1;
  readonly dirty: boolean;
  readonly corrupt: boolean;
  readonly lazyRefcounts: boolean;
  readonly hasBitmaps: boolean;
  /** L2 entries have 128 bits and tell {@link SUBCLUSTERS} subclusters apart. */
  readonly extendedL2: boolean;
  /** The guest's data is in an external data file, at the guest's own offsets. */
  readonly hasDataFile: boolean;
  /** Name of the external data file as the header has it; undefined where it does not say one. */
  readonly dataFile: string | undefined;
  /** The external data file alone is a valid raw image of the drive. */
  readonly dataFileRaw: boolean;
  readonly extensions: readonly HeaderExtension[];
}

/** The extension of a type; of several the last one counts, as in QEMU. */
export function findExtension(
  extensions: readonly HeaderExtension[],
  type: number,
): HeaderExtension | undefined {
  return extensions.findLast((extension) => extension.type === type);
}

/** Whether a file that starts with these bytes (at least 8) is a qcow2 image. */
export function probeQcow2(firstBytes: Uint8Array): boolean {
  if (firstBytes.length < 8) return false;
  const view = new DataView(firstBytes.buffer, firstBytes.byteOffset, firstBytes.byteLength);
  return view.getUint32(0) === QCOW2_MAGIC && view.getUint32(4) >= 2;
}

class HeaderReader {
  readonly #path: string;
  readonly bytes: Uint8Array;
  readonly #view: DataView;
  /** What tables are like is for somebody else to judge. */
  readonly lenient: boolean;

  constructor(path: string, bytes: Uint8Array, lenient: boolean) {
    this.#path = path;
    this.lenient = lenient;
    this.bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  u32(offset: number): number {
    return this.#view.getUint32(offset);
  }

  u64(offset: number): bigint {
    return this.#view.getBigUint64(offset);
  }

  /** A 64-bit field that must be a number of bytes a file can have. */
  bytesAt(field: string, offset: number): number {
    const value = this.u64(offset);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw this.corrupt(field, offset, `is ${value}, which is beyond 2^53 bytes`);
    }
    return Number(value);
  }

  text(offset: number, length: number): string {
    return Buffer.from(this.bytes.subarray(offset, offset + length)).toString('utf8');
  }

  corrupt(field: string, offset: number, what: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${this.#path}': header field '${field}' at offset ${offset} ${what}; the image is damaged or not a qcow2 image`,
    );
  }

  unsupported(field: string, offset: number, what: string, advice: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${this.#path}': header field '${field}' at offset ${offset} ${what}, which is not supported; ${advice}`,
    );
  }
}

/**
 * Reads and validates the header of an image: every field is inside the limits above and inside the file, so
 * whatever is computed from it stays small. Opens nothing else.
 *
 * Source: the qcow2 specification, sections "Header" and "Header extensions".
 *
 * @param purpose with `check`, tables may be missing, outside of the file or in each other's place, and there may be
 *   any number of snapshots: those are what a check is for
 * @throws StillframeError ERR_STILLFRAME_FORMAT (not qcow2), …_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE
 */
export function readHeader(runtime: Runtime, file: FileNode, purpose: 'use' | 'check' = 'use'): Qcow2Header {
  const path = file.descriptor.path;
  const start = new HeaderReader(path, readStart(runtime, file, 512), false);
  if (file.length < HEADER_LENGTH_V2 || start.u32(0) !== QCOW2_MAGIC) {
    throw new StillframeError(
      'ERR_STILLFRAME_FORMAT',
      `'${path}' is not a qcow2 image: it does not start with the magic 'QFI\\xfb'; say another format`,
    );
  }
  const clusterBits = checkClusterBits(start);
  // Everything the header may hold is in the first cluster.
  const first = new HeaderReader(path, readStart(runtime, file, 2 ** clusterBits), purpose === 'check');
  return parseHeader(first, clusterBits, file.length);
}

/** The first bytes of a file; zeroes where it is shorter. */
function readStart(runtime: Runtime, file: FileNode, bytes: number): Uint8Array {
  const { arena } = runtime;
  const pointer = arena.alloc(bytes, 'qcow2 header');
  try {
    file.read(0, pointer, bytes);
    return arena.copyOut(pointer, bytes);
  } finally {
    arena.free(pointer);
  }
}

function checkClusterBits(header: HeaderReader): number {
  const version = header.u32(4);
  if (version !== 2 && version !== 3) {
    throw header.unsupported(
      'version',
      4,
      `says qcow version ${version}`,
      "convert it with 'qemu-img convert -O qcow2'",
    );
  }
  const clusterBits = header.u32(FIELD.clusterBits);
  if (clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw header.corrupt(
      'cluster_bits',
      FIELD.clusterBits,
      `is ${clusterBits}, outside of ${MIN_CLUSTER_BITS} to ${MAX_CLUSTER_BITS}`,
    );
  }
  return clusterBits;
}

function parseHeader(header: HeaderReader, clusterBits: number, fileLength: number): Qcow2Header {
  const clusterSize = 2 ** clusterBits;
  const version = header.u32(4) === 2 ? 2 : 3;
  const v3 = version === 3;

  const crypt = header.u32(FIELD.cryptMethod);
  if (crypt !== 0) {
    const name = crypt === 1 ? 'AES encryption' : crypt === 2 ? 'LUKS encryption' : `encryption ${crypt}`;
    throw header.unsupported(
      'crypt_method',
      FIELD.cryptMethod,
      `says ${name}`,
      "decrypt it with 'qemu-img convert' first",
    );
  }

  const headerLength = v3 ? header.u32(FIELD.headerLength) : HEADER_LENGTH_V2;
  if (headerLength < (v3 ? HEADER_LENGTH_V3 : HEADER_LENGTH_V2)) {
    throw header.corrupt(
      'header_length',
      FIELD.headerLength,
      `is ${headerLength}, less than ${HEADER_LENGTH_V3}`,
    );
  }
  if (headerLength > clusterSize) {
    throw header.corrupt(
      'header_length',
      FIELD.headerLength,
      `is ${headerLength}, larger than a cluster of ${clusterSize} bytes`,
    );
  }
  if (headerLength % 8 !== 0) {
    throw header.corrupt('header_length', FIELD.headerLength, `is ${headerLength}, not a multiple of 8`);
  }

  const backing = backingName(header, headerLength, clusterSize);
  const extensions = readExtensions(header, headerLength, backing?.offset ?? clusterSize);

  const incompatibleFeatures = v3 ? header.u64(FIELD.incompatibleFeatures) : 0n;
  checkIncompatible(header, incompatibleFeatures, extensions);

  const refcountOrder = v3 ? header.u32(FIELD.refcountOrder) : 4;
  if (refcountOrder > 6) {
    throw header.corrupt('refcount_order', FIELD.refcountOrder, `is ${refcountOrder}, more than 6 (64 bits)`);
  }

  const compressionType = readCompressionType(header, headerLength, incompatibleFeatures);
  const length = header.bytesAt('size', FIELD.size);
  const extendedL2 = (incompatibleFeatures & INCOMPATIBLE_EXTENDED_L2) !== 0n;
  if (extendedL2 && clusterSize / SUBCLUSTERS < 512) {
    throw header.corrupt(
      'cluster_bits',
      FIELD.clusterBits,
      `is ${clusterBits}; subclusters (extended L2 entries) need at least 14, clusters of 16384 bytes`,
    );
  }
  const tables = readTables(header, clusterBits, extendedL2, length, fileLength);
  const snapshots = readSnapshots(header, clusterSize, fileLength);
  const compatibleFeatures = v3 ? header.u64(FIELD.compatibleFeatures) : 0n;
  const autoclearFeatures = v3 ? header.u64(FIELD.autoclearFeatures) : 0n;
  const hasDataFile = (incompatibleFeatures & INCOMPATIBLE_DATA_FILE) !== 0n;
  const format = findExtension(extensions, EXTENSION_BACKING_FORMAT);
  const dataFile = findExtension(extensions, EXTENSION_DATA_FILE);
  return {
    version,
    backingFile: backing?.name === '' ? undefined : backing?.name,
    backingFormat: format && header.text(format.offset, format.length),
    clusterBits,
    clusterSize,
    length,
    ...tables,
    ...snapshots,
    incompatibleFeatures,
    compatibleFeatures,
    autoclearFeatures,
    refcountOrder,
    refcountBits: 2 ** refcountOrder,
    headerLength,
    compressionType,
    dirty: (incompatibleFeatures & INCOMPATIBLE_DIRTY) !== 0n,
    corrupt: (incompatibleFeatures & INCOMPATIBLE_CORRUPT) !== 0n,
    lazyRefcounts: (compatibleFeatures & COMPATIBLE_LAZY_REFCOUNTS) !== 0n,
    hasBitmaps: findExtension(extensions, EXTENSION_BITMAPS) !== undefined,
    extendedL2,
    hasDataFile,
    dataFile: dataFile && dataFileName(header, dataFile),
    dataFileRaw: hasDataFile && (autoclearFeatures & AUTOCLEAR_DATA_FILE_RAW) !== 0n,
    extensions,
  };
}

function backingName(
  header: HeaderReader,
  headerLength: number,
  clusterSize: number,
): { name: string; offset: number } | undefined {
  const offset = header.bytesAt('backing_file_offset', FIELD.backingFileOffset);
  if (offset === 0) return undefined;
  if (offset < headerLength || offset > clusterSize) {
    throw header.corrupt(
      'backing_file_offset',
      FIELD.backingFileOffset,
      `is ${offset}, outside of the header cluster's ${headerLength} to ${clusterSize}`,
    );
  }
  const size = header.u32(FIELD.backingFileSize);
  if (size > Math.min(1023, clusterSize - offset)) {
    throw header.corrupt(
      'backing_file_size',
      FIELD.backingFileSize,
      `is ${size}; the name must be at most 1023 bytes and end inside of the first cluster`,
    );
  }
  const name = header.text(offset, size);
  if (name.includes('\0')) {
    throw header.corrupt('backing file name', offset, 'contains a zero byte');
  }
  return { name, offset };
}

function readExtensions(header: HeaderReader, start: number, end: number): HeaderExtension[] {
  const extensions: HeaderExtension[] = [];
  let at = start;
  while (at + 8 <= end) {
    const type = header.u32(at);
    if (type === EXTENSION_END) break;
    const length = header.u32(at + 4);
    if (length > end - at - 8) {
      throw header.corrupt(
        `header extension 0x${type.toString(16)}`,
        at,
        `has ${length} bytes, more than the ${end - at - 8} up to the end of the header area`,
      );
    }
    if (type === EXTENSION_BACKING_FORMAT && length > 15) {
      throw header.corrupt('backing file format', at, `has ${length} bytes, more than 15`);
    }
    extensions.push({ type, offset: at + 8, length });
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return extensions;
}

function checkIncompatible(header: HeaderReader, bits: bigint, extensions: readonly HeaderExtension[]): void {
  const unknown = bits & ~INCOMPATIBLE_KNOWN;
  if (unknown !== 0n) {
    const names: string[] = [];
    for (let bit = 0; bit < 64; bit++) {
      if ((unknown & (1n << BigInt(bit))) !== 0n) {
        names.push(featureName(header, extensions, bit) ?? `unknown incompatible feature bit ${bit}`);
      }
    }
    throw header.unsupported(
      'incompatible_features',
      FIELD.incompatibleFeatures,
      `needs: ${names.join(', ')}`,
      'a newer program may open it',
    );
  }
}

function dataFileName(header: HeaderReader, extension: HeaderExtension): string | undefined {
  const name = header.text(extension.offset, extension.length);
  if (name.includes('\0')) throw header.corrupt('data file name', extension.offset, 'contains a zero byte');
  return name === '' ? undefined : name;
}

/** The image's own name for an incompatible feature bit. Table entries: type, bit, 46 bytes of name. */
function featureName(
  header: HeaderReader,
  extensions: readonly HeaderExtension[],
  bit: number,
): string | undefined {
  for (const extension of extensions) {
    if (extension.type !== EXTENSION_FEATURE_TABLE) continue;
    for (let at = extension.offset; at + 48 <= extension.offset + extension.length; at += 48) {
      if (header.bytes[at] !== 0 || header.bytes[at + 1] !== bit) continue;
      const name = header.text(at + 2, 46).split('\0', 1)[0];
      // What an image says is shown to people: printable characters only.
      if (name) return `'${name.replace(/[^\x20-\x7e]/g, '?')}' (incompatible feature bit ${bit})`;
    }
  }
  return undefined;
}

function readCompressionType(header: HeaderReader, headerLength: number, incompatible: bigint): 0 | 1 {
  const type = headerLength > FIELD.compressionType ? (header.bytes[FIELD.compressionType] ?? 0) : 0;
  const flagged = (incompatible & INCOMPATIBLE_COMPRESSION) !== 0n;
  if (type !== 0 && type !== 1) {
    throw header.unsupported(
      'compression_type',
      FIELD.compressionType,
      `says compression type ${type}`,
      'supported are 0 (zlib) and 1 (zstd)',
    );
  }
  if (flagged !== (type !== 0)) {
    throw header.corrupt(
      'compression_type',
      FIELD.compressionType,
      `is ${type}, but the incompatible feature bit 'compression type' is ${flagged ? 'set' : 'clear'}`,
    );
  }
  return type;
}

function readTables(
  header: HeaderReader,
  clusterBits: number,
  extendedL2: boolean,
  length: number,
  fileLength: number,
) {
  const clusterSize = 2 ** clusterBits;
  const l1Size = header.u32(FIELD.l1Size);
  if (l1Size * 8 > MAX_L1_BYTES) {
    throw header.corrupt(
      'l1_size',
      FIELD.l1Size,
      `is ${l1Size} entries, a table larger than ${MAX_L1_BYTES} bytes`,
    );
  }
  const needed = Math.ceil(length / clusterSize / (clusterSize / (extendedL2 ? 16 : 8)));
  if (l1Size < needed) {
    throw header.corrupt(
      'l1_size',
      FIELD.l1Size,
      `is ${l1Size} entries, too small for a virtual size of ${length} bytes, which needs ${needed}`,
    );
  }
  const l1TableOffset = tableOffset(header, 'l1_table_offset', FIELD.l1TableOffset, clusterSize, l1Size > 0);
  checkInFile(header, 'l1_table_offset', FIELD.l1TableOffset, l1TableOffset, l1Size * 8, fileLength);

  const refcountTableClusters = header.u32(FIELD.refcountTableClusters);
  if (refcountTableClusters === 0 && !header.lenient) {
    throw header.corrupt('refcount_table_clusters', FIELD.refcountTableClusters, 'is 0');
  }
  if (refcountTableClusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES) {
    throw header.corrupt(
      'refcount_table_clusters',
      FIELD.refcountTableClusters,
      `is ${refcountTableClusters}, a table larger than ${MAX_REFCOUNT_TABLE_BYTES} bytes`,
    );
  }
  const field = FIELD.refcountTableOffset;
  const refcountTableOffset = tableOffset(header, 'refcount_table_offset', field, clusterSize, true);
  // The last cluster of the table may be cut off by the end of the file: it reads as zeroes then.
  const least = (refcountTableClusters - 1) * clusterSize + 8;
  checkInFile(header, 'refcount_table_offset', field, refcountTableOffset, least, fileLength);
  if (
    !header.lenient &&
    l1Size > 0 &&
    l1TableOffset < refcountTableOffset + refcountTableClusters * clusterSize &&
    refcountTableOffset < l1TableOffset + l1Size * 8
  ) {
    throw header.corrupt(
      'l1_table_offset',
      FIELD.l1TableOffset,
      'makes the L1 table and the refcount table overlap',
    );
  }
  return { l1Size, l1TableOffset, refcountTableOffset, refcountTableClusters };
}

function tableOffset(
  header: HeaderReader,
  field: string,
  at: number,
  clusterSize: number,
  required: boolean,
): number {
  const offset = header.bytesAt(field, at);
  if (offset % clusterSize !== 0) {
    throw header.corrupt(field, at, `is ${offset}, not a multiple of the cluster size ${clusterSize}`);
  }
  if (offset === 0 && required && !header.lenient)
    throw header.corrupt(field, at, 'is 0, the place of the header itself');
  return offset;
}

function checkInFile(
  header: HeaderReader,
  field: string,
  at: number,
  offset: number,
  bytes: number,
  fileLength: number,
): void {
  if (bytes > 0 && offset + bytes > fileLength && !header.lenient) {
    throw header.corrupt(
      field,
      at,
      `is ${offset}: the table of ${bytes} bytes ends beyond the end of the file at ${fileLength}`,
    );
  }
}

function readSnapshots(header: HeaderReader, clusterSize: number, fileLength: number) {
  // The check reads the table by itself.
  if (header.lenient) return { snapshotCount: 0, snapshotsOffset: 0 };
  const snapshotCount = header.u32(FIELD.snapshotCount);
  if (snapshotCount > MAX_SNAPSHOTS) {
    throw header.corrupt(
      'nb_snapshots',
      FIELD.snapshotCount,
      `is ${snapshotCount}, more than ${MAX_SNAPSHOTS}`,
    );
  }
  const used = snapshotCount > 0;
  const snapshotsOffset = used
    ? tableOffset(header, 'snapshots_offset', FIELD.snapshotsOffset, clusterSize, true)
    : 0;
  // A snapshot's entry has at least 40 bytes.
  checkInFile(
    header,
    'snapshots_offset',
    FIELD.snapshotsOffset,
    snapshotsOffset,
    snapshotCount * 40,
    fileLength,
  );
  return { snapshotCount, snapshotsOffset };
}
