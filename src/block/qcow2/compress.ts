import * as zlib from 'node:zlib';
import { zstd } from './zstd.js';

/**
 * Compresses one cluster as QEMU reads it: raw deflate with a window of 4 KiB, or one Zstandard frame.
 *
 * @param compressionType of the image's header: 0 deflate, 1 Zstandard
 * @returns the compressed data, good until the next call, or undefined where it would not be smaller than the cluster
 */
export function compressCluster(cluster: Uint8Array, compressionType: number): Uint8Array | undefined {
  const output = compressionType === 1 ? zstd().compress(cluster) : deflate(cluster);
  return output.length < cluster.length ? output : undefined;
}

/** One level above zlib's default, which QEMU takes: Node's zlib makes a little more of the default than others do. */
const DEFLATE_LEVEL = 7;

function deflate(cluster: Uint8Array): Uint8Array {
  return zlib.deflateRawSync(cluster, {
    level: DEFLATE_LEVEL,
    windowBits: 12,
    memLevel: 9,
    // What does not compress is a little larger: it comes in two parts then.
    chunkSize: Math.max(1024, cluster.length),
  });
}
