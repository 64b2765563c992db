import { type BlockNode, STATUS_ALLOCATED, STATUS_ZERO } from './node.js';

/** What a whole backing chain says of a range. */
export interface ChainExtent {
  /** Bytes from the offset asked for. */
  readonly length: number;
  /** `STATUS_*` bits of the layer that answers; STATUS_ZERO alone where no layer has the range. */
  readonly flags: number;
  /** How far down the chain the answer comes from; 0 is the top image. Of what no layer has: the last one asked. */
  readonly depth: number;
  /** Where the data starts in the file of the answering layer, in bytes; -1 when there is no such place. */
  readonly hostOffset: number;
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
    const { length: bytes, flags, hostOffset } = node.status(offset, stop);
    if (flags & STATUS_ALLOCATED) return { length: bytes, flags, depth, hostOffset, node };
    stop = bytes;
    const { backing } = node;
    if (backing === undefined || offset >= backing.length) return zero(stop, depth);
    stop = Math.min(stop, backing.length - offset);
    node = backing;
    depth++;
  }
}

function zero(length: number, depth: number): ChainExtent {
  return { length, flags: STATUS_ZERO, depth, hostOffset: -1, node: undefined };
}
