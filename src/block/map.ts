import type { Runtime } from '../kernels/runtime.js';
import { type BlockNode, STATUS_ALLOCATED, STATUS_COMPRESSED, STATUS_DATA, STATUS_ZERO } from './node.js';
import { chainStatus } from './status.js';

/** One extent as `qemu-img map --output=json` lists it. Offsets and lengths are bytes. */
export interface MapEntry {
  readonly start: number;
  readonly length: number;
  /** How far down the backing chain the range comes from; 0 is the image itself. */
  readonly depth: number;
  /** Some image of the chain holds the range. */
  readonly present: boolean;
  readonly zero: boolean;
  readonly data: boolean;
  readonly compressed: boolean;
  /** Where the range is in the file that holds it. */
  readonly offset?: number;
  /** That file. */
  readonly filename?: string;
}

/** How much of an image one look-up covers, in bytes: bounds the time without progress. */
const LOOK_UP_BYTES = 2 ** 40;

/** Walks the whole chain and hands out its extents in order, neighbours of one kind merged. */
export function mapNode(_runtime: Runtime, node: BlockNode, onEntry: (entry: MapEntry) => void): void {
  let pending: MapEntry | undefined;
  for (let start = 0; start < node.length; ) {
    const next = entryAt(node, start);
    start += next.length;
    if (pending !== undefined && continues(pending, next)) {
      pending = { ...pending, length: pending.length + next.length };
      continue;
    }
    if (pending !== undefined) onEntry(pending);
    pending = next;
  }
  if (pending !== undefined) onEntry(pending);
}

function entryAt(node: BlockNode, start: number): MapEntry {
  const extent = chainStatus(node, start, Math.min(node.length - start, LOOK_UP_BYTES));
  const filename = extent.node?.descriptor.path;
  return {
    start,
    length: extent.length,
    // qemu-img says 0 of what is nowhere in a chain of one image, and of zeroes beyond a short backing file.
    depth: extent.depth,
    present: (extent.flags & STATUS_ALLOCATED) !== 0,
    zero: (extent.flags & STATUS_ZERO) !== 0,
    data: (extent.flags & STATUS_DATA) !== 0,
    compressed: (extent.flags & STATUS_COMPRESSED) !== 0,
    ...(extent.hostOffset >= 0 ? { offset: extent.hostOffset } : {}),
    ...(extent.hostOffset >= 0 && filename !== undefined ? { filename } : {}),
  };
}

function continues(last: MapEntry, next: MapEntry): boolean {
  return (
    last.depth === next.depth &&
    last.present === next.present &&
    last.zero === next.zero &&
    last.data === next.data &&
    last.compressed === next.compressed &&
    last.filename === next.filename &&
    (last.offset === undefined ? next.offset === undefined : last.offset + last.length === next.offset)
  );
}
