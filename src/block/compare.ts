import type { Runtime } from '../kernels/runtime.js';
import { type BlockNode, STATUS_COMPRESSED, STATUS_ZERO } from './node.js';
import { type ChainExtent, chainStatus, shownStatus } from './status.js';

/** How a comparison of two images ended. */
export interface CompareResult {
  readonly identical: boolean;
  /** The images have different sizes; no difference where the longer one is zero beyond, unless strict. */
  readonly sizesDiffer: boolean;
  /** Why they differ: content, allocation (strict only) or size (strict only). */
  readonly reason?: 'content' | 'allocation' | 'size';
  /** First byte that differs; for allocation the start of the range. */
  readonly offset?: number;
}

/** Bytes compared in one step. */
const STEP = 1024 * 1024;

/** Whether two extents are held in the same way, as strict mode sees it: flags, and whether there is a place. */
function sameStatus(one: ChainExtent, other: ChainExtent): boolean {
  const different = (one.flags ^ other.flags) & ~STATUS_COMPRESSED;
  return different === 0 && one.hostOffset >= 0 === other.hostOffset >= 0;
}

/**
 * Compares what two images read as, like `qemu-img compare`. Ranges that are zero on both sides by their block
 * status are not read.
 *
 * @param onProgress called with bytes done and bytes in all
 */
export function compareNodes(
  runtime: Runtime,
  first: BlockNode,
  second: BlockNode,
  options: { readonly strict: boolean },
  onProgress?: (done: number, total: number) => void,
): CompareResult {
  const { arena, kernels } = runtime;
  const sizesDiffer = first.length !== second.length;
  if (sizesDiffer && options.strict) return { identical: false, sizesDiffer, reason: 'size' };
  const common = Math.min(first.length, second.length);
  const longer = first.length > second.length ? first : second;
  const total = longer.length;
  const a = arena.alloc(2 * STEP, 'buffers of a comparison');
  const b = a + STEP;
  let reported = 0;
  const report = (done: number): void => {
    if (onProgress === undefined || done - reported < total / 1000) return;
    reported = done;
    onProgress(done, total);
  };
  const differ = (reason: 'content' | 'allocation', offset: number): CompareResult => ({
    identical: false,
    sizesDiffer,
    reason,
    offset,
  });
  try {
    for (let offset = 0; offset < common; ) {
      const one = chainStatus(first, offset, common - offset);
      const other = chainStatus(second, offset, one.length);
      if (options.strict && !sameStatus(shownStatus(one), shownStatus(other)))
        return differ('allocation', offset);
      let bytes = other.length;
      if (!(one.flags & other.flags & STATUS_ZERO)) {
        bytes = Math.min(bytes, STEP);
        first.read(offset, a, bytes);
        second.read(offset, b, bytes);
        const index = kernels.firstDifference(a, b, bytes);
        if (index >= 0) return differ('content', offset + index);
      }
      offset += bytes;
      report(offset);
    }
    for (let offset = common; offset < longer.length; ) {
      const extent = chainStatus(longer, offset, longer.length - offset);
      let bytes = extent.length;
      if (!(extent.flags & STATUS_ZERO)) {
        bytes = Math.min(bytes, STEP);
        longer.read(offset, a, bytes);
        if (!kernels.isZero(a, bytes)) {
          const index = arena.u8.subarray(a, a + bytes).findIndex((byte) => byte !== 0);
          return differ('content', offset + index);
        }
      }
      offset += bytes;
      report(offset);
    }
    return { identical: true, sizesDiffer };
  } finally {
    arena.free(a);
  }
}
