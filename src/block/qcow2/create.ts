import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import {
  EXTENSION_BACKING_FORMAT,
  EXTENSION_FEATURE_TABLE,
  FEATURES,
  FIELD,
  HEADER_LENGTH_V2,
  MAX_CLUSTER_BITS,
  MAX_L1_BYTES,
  MAX_REFCOUNT_TABLE_BYTES,
  MIN_CLUSTER_BITS,
  QCOW2_MAGIC,
} from './header.js';
import { storeRefcount } from './refcount-entry.js';

/** What QEMU writes, too: up to and with the compression type, padded to 8. */
const HEADER_LENGTH = 112;

export interface CreateQcow2Options {
  /** Virtual size in bytes, a multiple of 512. */
  readonly length: number;
  /** 9 to 21; default 16 (64 KiB). */
  readonly clusterBits?: number;
  readonly version?: 2 | 3;
  /** 1, 2, 4 … 64; default 16. Version 2 knows 16 only. */
  readonly refcountBits?: number;
  /** Written into the header as it is; not opened. */
  readonly backingFile?: string;
  readonly backingFormat?: string;
  readonly lazyRefcounts?: boolean;
  /** 0 deflate, 1 zstd. */
  readonly compressionType?: number;
}

interface Layout {
  readonly refcountTableClusters: number;
  readonly refcountBlocks: number;
  readonly l1Entries: number;
  readonly l1Clusters: number;
  /** Header, refcount table, refcount blocks, L1 table: all clusters in use, in this order. */
  readonly clusters: number;
}

/**
 * Writes an empty image into an empty file. The first sector, which makes the file an image, is written last and
 * after a flush: a half-made file is not an image.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT and what writing throws
 */
export function createQcow2(runtime: Runtime, file: FileNode, options: CreateQcow2Options): void {
  const { arena } = runtime;
  const path = file.descriptor.path;
  const { clusterBits = 16, version = 3, refcountBits = 16, length, compressionType = 0 } = options;
  const bad = (what: string) =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `cannot create '${path}': ${what}`);
  if (!Number.isInteger(clusterBits) || clusterBits < MIN_CLUSTER_BITS || clusterBits > MAX_CLUSTER_BITS) {
    throw bad(`the cluster size must be a power of two from 512 bytes to 2 MiB, not ${2 ** clusterBits}`);
  }
  if (!Number.isSafeInteger(length) || length < 0 || length % 512 !== 0) {
    throw bad(`the virtual size must be a multiple of 512 bytes, not ${length}`);
  }
  const refcountOrder = Math.log2(refcountBits);
  if (!Number.isInteger(refcountOrder) || refcountOrder < 0 || refcountOrder > 6) {
    throw bad(`the refcount width must be a power of two from 1 to 64 bits, not ${refcountBits}`);
  }
  if (compressionType !== 0 && compressionType !== 1) {
    throw bad(`the compression type must be 0 (zlib) or 1 (zstd), not ${compressionType}`);
  }
  if (version === 2 && (refcountBits !== 16 || options.lazyRefcounts === true || compressionType !== 0)) {
    throw bad('refcount widths other than 16, lazy refcounts and zstd need version 3 (compat=1.1)');
  }
  const clusterSize = 2 ** clusterBits;
  const layout = planLayout(length, clusterSize, refcountBits);
  if (
    layout.l1Entries * 8 > MAX_L1_BYTES ||
    layout.refcountTableClusters * clusterSize > MAX_REFCOUNT_TABLE_BYTES
  ) {
    throw bad(
      `a virtual size of ${length} bytes is too large for clusters of ${clusterSize} bytes; use larger clusters`,
    );
  }
  const header = encodeHeader(options, { clusterBits, version, refcountOrder, compressionType }, layout, bad);

  const buffer = arena.alloc(clusterSize, `creating '${path}'`);
  try {
    const bytes = arena.u8;
    // The whole area reads as zeroes, the L1 table included.
    file.writeZeroes(0, layout.clusters * clusterSize, false);

    for (let cluster = 0; cluster < layout.refcountTableClusters; cluster++) {
      bytes.fill(0, buffer, buffer + clusterSize);
      const first = (cluster * clusterSize) / 8;
      const entries = Math.min(clusterSize / 8, layout.refcountBlocks - first);
      for (let entry = 0; entry < entries; entry++) {
        const host = (1 + layout.refcountTableClusters + first + entry) * clusterSize;
        arena.view.setBigUint64(buffer + entry * 8, BigInt(host));
      }
      if (entries > 0) file.write((1 + cluster) * clusterSize, buffer, clusterSize);
    }

    const perBlock = (clusterSize * 8) / refcountBits;
    for (let block = 0; block < layout.refcountBlocks; block++) {
      bytes.fill(0, buffer, buffer + clusterSize);
      const count = Math.min(perBlock, layout.clusters - block * perBlock);
      for (let entry = 0; entry < count; entry++) storeRefcount(arena, buffer, entry, refcountOrder, 1);
      file.write((1 + layout.refcountTableClusters + block) * clusterSize, buffer, clusterSize);
    }

    bytes.fill(0, buffer, buffer + clusterSize);
    bytes.set(header, buffer);
    if (clusterSize > 512) file.write(512, buffer + 512, clusterSize - 512);
    file.flush();
    file.write(0, buffer, 512);
  } finally {
    arena.free(buffer);
  }
}

function planLayout(length: number, clusterSize: number, refcountBits: number): Layout {
  const l1Entries = Math.ceil(length / clusterSize / (clusterSize / 8));
  const l1Clusters = Math.max(1, Math.ceil((l1Entries * 8) / clusterSize));
  const perBlock = (clusterSize * 8) / refcountBits;
  let refcountBlocks = 1;
  let refcountTableClusters = 1;
  for (;;) {
    const clusters = 1 + refcountTableClusters + refcountBlocks + l1Clusters;
    const blocks = Math.ceil(clusters / perBlock);
    const table = Math.ceil((blocks * 8) / clusterSize);
    if (blocks <= refcountBlocks && table <= refcountTableClusters) {
      return { refcountTableClusters, refcountBlocks, l1Entries, l1Clusters, clusters };
    }
    refcountBlocks = Math.max(blocks, refcountBlocks);
    refcountTableClusters = Math.max(table, refcountTableClusters);
  }
}

function encodeHeader(
  options: CreateQcow2Options,
  fields: { clusterBits: number; version: 2 | 3; refcountOrder: number; compressionType: number },
  layout: Layout,
  bad: (what: string) => StillframeError,
): Uint8Array {
  const { clusterBits, version, refcountOrder, compressionType } = fields;
  const clusterSize = 2 ** clusterBits;
  const bytes = Buffer.alloc(clusterSize);
  bytes.writeUInt32BE(QCOW2_MAGIC, 0);
  bytes.writeUInt32BE(version, 4);
  bytes.writeUInt32BE(clusterBits, FIELD.clusterBits);
  bytes.writeBigUInt64BE(BigInt(options.length), FIELD.size);
  bytes.writeUInt32BE(layout.l1Entries, FIELD.l1Size);
  const l1Offset = (1 + layout.refcountTableClusters + layout.refcountBlocks) * clusterSize;
  bytes.writeBigUInt64BE(BigInt(l1Offset), FIELD.l1TableOffset);
  bytes.writeBigUInt64BE(BigInt(clusterSize), FIELD.refcountTableOffset);
  bytes.writeUInt32BE(layout.refcountTableClusters, FIELD.refcountTableClusters);
  let at = HEADER_LENGTH_V2;
  if (version === 3) {
    bytes.writeBigUInt64BE(compressionType === 0 ? 0n : 1n << 3n, FIELD.incompatibleFeatures);
    bytes.writeBigUInt64BE(options.lazyRefcounts === true ? 1n : 0n, FIELD.compatibleFeatures);
    bytes.writeUInt32BE(refcountOrder, FIELD.refcountOrder);
    bytes.writeUInt32BE(HEADER_LENGTH, FIELD.headerLength);
    bytes[FIELD.compressionType] = compressionType;
    at = HEADER_LENGTH;
  }

  const name = Buffer.from(options.backingFile ?? '', 'utf8');
  if (name.length > 1023) throw bad(`the name of the backing file has ${name.length} bytes, more than 1023`);
  if (name.includes(0)) throw bad('the name of the backing file contains a zero byte');
  const format = Buffer.from(options.backingFormat ?? '', 'utf8');
  if (format.length > 15) throw bad(`the backing format '${options.backingFormat}' is longer than 15 bytes`);
  const featureBytes = FEATURES.length * 48;
  const formatBytes = name.length > 0 && format.length > 0 ? 8 + Math.ceil(format.length / 8) * 8 : 0;
  // The names are a courtesy; a cluster of 512 bytes holds them only where nothing else is there.
  const withFeatures = version === 3 && at + formatBytes + 8 + featureBytes + 8 + name.length <= clusterSize;
  if (at + formatBytes + 8 + name.length > clusterSize) {
    throw bad(
      `the name of the backing file does not fit into a cluster of ${clusterSize} bytes; use larger clusters`,
    );
  }
  if (formatBytes > 0) {
    bytes.writeUInt32BE(EXTENSION_BACKING_FORMAT, at);
    bytes.writeUInt32BE(format.length, at + 4);
    bytes.set(format, at + 8);
    at += formatBytes;
  }
  if (withFeatures) {
    bytes.writeUInt32BE(EXTENSION_FEATURE_TABLE, at);
    bytes.writeUInt32BE(featureBytes, at + 4);
    at += 8;
    for (const feature of FEATURES) {
      bytes[at] = feature.type;
      bytes[at + 1] = feature.bit;
      bytes.write(feature.name, at + 2, 'latin1');
      at += 48;
    }
  }
  // The end extension is eight zero bytes.
  at += 8;
  if (name.length > 0) {
    bytes.writeBigUInt64BE(BigInt(at), FIELD.backingFileOffset);
    bytes.writeUInt32BE(name.length, FIELD.backingFileSize);
    bytes.set(name, at);
  }
  return bytes;
}
