import { type PlainError, StillframeError } from '../errors.js';
import type { NodeDescriptor } from './node.js';

/** How a comparison of two images ended. */
export interface CompareResult {
  readonly identical: boolean;
  /** The images have different sizes; no difference where the longer one is zero beyond, unless strict. */
  readonly sizesDiffer: boolean;
  /** Why they differ: content, allocation (strict only) or size (strict only). */
  readonly reason?: 'content' | 'allocation' | 'size';
  /** First byte that differs; for allocation the start of the range. */
  readonly offset?: number;
  /** What differs is behind the end of the shorter image. */
  readonly beyondEnd?: boolean;
}

/** Two images that are being compared, as plain data: any thread may help. */
export interface Comparison {
  readonly first: NodeDescriptor;
  readonly second: NodeDescriptor;
  readonly strict: boolean;
}

/** What one thread found: the first difference, or what could not be read, of the parts it claimed. */
export interface Finding {
  /** Bytes. */
  readonly offset: number;
  readonly found: 'content' | 'allocation' | { readonly error: PlainError };
}

export function lengthOf(descriptor: NodeDescriptor): number {
  return descriptor.driver === 'file' ? 0 : descriptor.length;
}

/** The result of all threads: the difference that comes first. */
export function compareResult(
  { first, second, strict }: Comparison,
  findings: readonly (Finding | undefined)[],
): CompareResult {
  const sizesDiffer = lengthOf(first) !== lengthOf(second);
  if (sizesDiffer && strict) return { identical: false, sizesDiffer, reason: 'size' };
  let least: Finding | undefined;
  for (const finding of findings) {
    if (finding !== undefined && (least === undefined || finding.offset < least.offset)) least = finding;
  }
  if (least === undefined) return { identical: true, sizesDiffer };
  const { offset, found } = least;
  if (typeof found === 'object') {
    // One code for everything that goes wrong once both images are open.
    const { message, errno } = StillframeError.fromPlain(found.error);
    throw new StillframeError('ERR_STILLFRAME_IO', message, { errno });
  }
  const beyondEnd = offset >= Math.min(lengthOf(first), lengthOf(second));
  return { identical: false, sizesDiffer, reason: found, offset, ...(beyondEnd ? { beyondEnd } : {}) };
}
