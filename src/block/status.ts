import { type BlockNode, STATUS_ALLOCATED, STATUS_DATA, STATUS_ZERO } from './node.js';

/** What a whole backing chain says of a range. */
export interface ChainExtent {
  /** Bytes from the offset asked for. */
  readonly length: number;
  /** `STATUS_*` bits of the layer that answers; STATUS_ZERO alone where no layer has the range. */
  readonly flags: number;
  /** How far down the chain the answer comes from; 0 is the top image. Of what no layer has: the last one asked. */
  readonly depth: number;
  /** The range's place in the file of the layer at `depth`, with or without data there, in bytes; -1 where it has none. */
  readonly hostOffset: number;
  /** Which of the files of that layer the place is in; default the first. */
  readonly file?: number;
  /** The layer that answers, undefined where none has the range. */
  readonly node: BlockNode | undefined;
}

/**
 * The extent that starts at `offset`, seen through the backing chain: the first layer with an allocation answers; a
 * range beyond the end of a backing file, or allocated nowhere, reads as zeroes (QEMU's
 * `bdrv_block_status_above`).
 */
export function chainStatus(top: BlockNode, offset: number, length: number): ChainExtent {
  let node: BlockNode = top;
  let depth = 0;
  let stop = length;
  for (;;) {
    const { length: bytes, flags, hostOffset, file = 0 } = node.status(offset, stop);
    if (flags & STATUS_ALLOCATED) return { length: bytes, flags, depth, hostOffset, file, node };
    stop = bytes;
    const { backing } = node;
    if (backing === undefined || offset >= backing.length) {
      return { length: stop, flags: STATUS_ZERO, depth, hostOffset, node: undefined };
    }
    stop = Math.min(stop, backing.length - offset);
    node = backing;
    depth++;
  }
}

/**
 * An extent as QEMU's tools show it: they do not look into the tables of vhdx and take everything there for data
 * without a place.
 */
export function shownStatus(extent: ChainExtent): ChainExtent {
  if (extent.node?.descriptor.driver !== 'vhdx') return extent;
  return { ...extent, flags: STATUS_DATA | STATUS_ALLOCATED, hostOffset: -1 };
}
