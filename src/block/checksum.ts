import type { Team } from '../job/team.js';
import type { Runtime } from '../kernels/runtime.js';
import { COPY_BUFFER_BYTES, type CopyBuffer } from './filters/copy-before-write.js';
import { attachNode } from './graph.js';
import { type NodeDescriptor, STATUS_ZERO } from './node.js';
import { chainStatus } from './status.js';

/** Bytes that a thread claims at once: whole clusters of any size. */
const CLAIM = 8 * 1024 * 1024;
/** Zeroes in one step: others can be told of it in between. */
const MOST_ZEROES = 2 ** 40;

/** An image whose checksum is wanted, as plain data: any thread may help. */
export interface Checksummed {
  readonly image: NodeDescriptor;
  /** Bytes, a power of two from 512 to {@link COPY_BUFFER_BYTES}. */
  readonly clusterSize: number;
}

/** What a checksum is of. */
export interface ImageChecksum {
  readonly algorithm: 'xxh3-64';
  /**
   * The sum modulo 2^64, as 16 hexadecimal digits, of one leaf per cluster: the XXH3-64 of (XXH3-64 of the cluster's bytes,
   * its index), both as little-endian 64-bit words. The last cluster may be short.
   */
  readonly root: string;
  /** Bytes. */
  readonly clusterSize: number;
  readonly virtualSize: number;
}

/**
 * Adds up the leaves of an image's clusters along with the other threads of the team. What is zero by its block status is
 * not read. It is the checksum of a backup with `sync: full` that has clusters of that size.
 *
 * @param onProgress called with bytes done and bytes in all
 * @returns the sum of those that this thread claimed
 */
export function checksumPart(
  runtime: Runtime,
  { image, clusterSize }: Checksummed,
  team: Team,
  { data, mask }: CopyBuffer,
  onProgress: (done: number, total: number) => void,
): bigint {
  const { kernels } = runtime;
  const node = attachNode(runtime, image);
  const total = node.length;
  let sum = 0n;
  /** Whole clusters of zeroes from `offset` on, in bytes. */
  const zeroes = (offset: number): number => {
    let length = 0;
    while (length < MOST_ZEROES && offset + length < total) {
      const extent = chainStatus(node, offset + length, total - offset - length);
      if ((extent.flags & STATUS_ZERO) === 0) break;
      length += extent.length;
    }
    return offset + length === total ? length : length - (length % clusterSize);
  };
  for (;;) {
    const start = team.claim(CLAIM, total);
    if (start === undefined) return BigInt.asUintN(64, sum);
    let end = Math.min(start + CLAIM, total);
    for (let offset = start; offset < end && !team.stopped; ) {
      const first = offset / clusterSize;
      const hole = zeroes(offset);
      // A hole that goes on is counted as a whole, unless somebody else has what follows: nothing may be counted twice.
      if (offset + hole > end && team.claimOn(end, offset + hole)) end = offset + hole;
      const bytes = Math.min(hole > 0 ? hole : COPY_BUFFER_BYTES, end - offset);
      if (hole > 0) {
        const count = Math.ceil(bytes / clusterSize);
        sum += kernels.zeroLeaves(clusterSize, bytes - (count - 1) * clusterSize, first, count);
      } else {
        node.read(offset, data, bytes);
        sum += kernels.digestUnits(data, bytes, clusterSize, first, mask);
      }
      team.addDone(bytes);
      onProgress(team.done, total);
      offset += bytes;
    }
  }
}
