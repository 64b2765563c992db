import type { CreateImageOptions } from '#src/block/create.js';
import { pairwise, product } from '../pairwise.js';

/** The features a qcow2 image is made with. */
export interface Shape {
  readonly version: 2 | 3;
  /** Bytes. */
  readonly clusterSize: number;
  readonly refcountBits: number;
  /** Extended L2 entries: clusters of 32 subclusters. */
  readonly subclusters: boolean;
  /** What compressed clusters there are, if any. */
  readonly compression: 'none' | 'zlib' | 'zstd';
  /** External data file; `raw`: it is a raw image by itself. */
  readonly dataFile: 'none' | 'yes' | 'raw';
  /** Images below it in its chain. */
  readonly depth: 0 | 1 | 2 | 3;
}

const VALUES = {
  version: [3, 2],
  clusterSize: [65536, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072, 262144, 524288, 1048576, 2097152],
  refcountBits: [16, 1, 2, 4, 8, 32, 64],
  subclusters: [false, true],
  compression: ['none', 'zlib', 'zstd'],
  dataFile: ['none', 'yes', 'raw'],
  depth: [1, 0, 2, 3],
} as const;

const SIZES = Object.values(VALUES).map((values) => values.length);

function shapeOf(row: readonly number[]): Shape {
  const [version = 0, cluster = 0, refcount = 0, subclusters = 0, compression = 0, dataFile = 0, depth = 0] =
    row;
  return {
    version: VALUES.version[version] ?? 3,
    clusterSize: VALUES.clusterSize[cluster] ?? 65536,
    refcountBits: VALUES.refcountBits[refcount] ?? 16,
    subclusters: VALUES.subclusters[subclusters] ?? false,
    compression: VALUES.compression[compression] ?? 'none',
    dataFile: VALUES.dataFile[dataFile] ?? 'none',
    depth: VALUES.depth[depth] ?? 0,
  };
}

/** Whether the format allows it. */
export function isValid(shape: Shape): boolean {
  const { version, clusterSize, refcountBits, subclusters, compression, dataFile, depth } = shape;
  if (
    version === 2 &&
    (refcountBits !== 16 || subclusters || compression === 'zstd' || dataFile !== 'none')
  ) {
    return false;
  }
  // A subcluster has at least one sector.
  if (subclusters && clusterSize < 16384) return false;
  if (dataFile !== 'none' && compression !== 'none') return false;
  // The raw data file could not show what is in the backing file.
  return dataFile !== 'raw' || depth === 0;
}

/** Every two features that go together at all do so in one of these. */
export function pairwiseShapes(): Shape[] {
  return pairwise(SIZES, (row) => isValid(shapeOf(row))).map(shapeOf);
}

/** All of them: thousands. */
export function allShapes(): Shape[] {
  return product(SIZES).map(shapeOf).filter(isValid);
}

export function describeShape(shape: Shape): string {
  const { version, clusterSize, refcountBits, subclusters, compression, dataFile, depth } = shape;
  return [
    `v${version}`,
    clusterSize < 1024 ? `${clusterSize} B` : `${clusterSize / 1024} KiB`,
    `refcounts of ${refcountBits}`,
    ...(subclusters ? ['subclusters'] : []),
    ...(compression === 'none' ? [] : [compression]),
    ...(dataFile === 'none' ? [] : [dataFile === 'raw' ? 'raw data file' : 'data file']),
    `depth ${depth}`,
  ].join(', ');
}

/** What `qemu-img create -o` takes to make it; `dataFile` is the path of its data file. */
export function creationOptions(shape: Shape, dataFile: string): string {
  return [
    `compat=${shape.version === 2 ? '0.10' : '1.1'}`,
    `cluster_size=${shape.clusterSize}`,
    ...(shape.version === 2 ? [] : [`refcount_bits=${shape.refcountBits}`]),
    ...(shape.subclusters ? ['extended_l2=on'] : []),
    ...(shape.compression === 'zstd' ? ['compression_type=zstd'] : []),
    ...(shape.dataFile === 'none' ? [] : [`data_file=${dataFile}`]),
    ...(shape.dataFile === 'raw' ? ['data_file_raw=on'] : []),
  ].join(',');
}

/** The same for us. */
export function imageOptions(shape: Shape, dataFile: string): CreateImageOptions {
  const { version, clusterSize, refcountBits, subclusters, compression } = shape;
  return {
    format: 'qcow2',
    version,
    clusterSize,
    refcountBits,
    extendedL2: subclusters,
    ...(compression === 'none' ? {} : { compressionType: compression }),
    ...(shape.dataFile === 'none' ? {} : { dataFile, dataFileRaw: shape.dataFile === 'raw' }),
  };
}

/** Bytes of the smallest part that is allocated by itself. */
export function subclusterSize(shape: Shape): number {
  return shape.subclusters ? shape.clusterSize / 32 : shape.clusterSize;
}
