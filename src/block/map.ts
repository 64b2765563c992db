import { combineNames } from './graph.js';
import {
  type BlockNode,
  type NodeDescriptor,
  STATUS_ALLOCATED,
  STATUS_COMPRESSED,
  STATUS_DATA,
  STATUS_ZERO,
} from './node.js';
import { chainStatus, shownStatus } from './status.js';

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
  /** That file, by its name relative to the name the caller gave. */
  readonly filename?: string;
}

/** How much of an image one look-up covers, in bytes: bounds the time without progress. */
const LOOK_UP_BYTES = 2 ** 40;

/** Which part of an image to map, in bytes; all of it by default. */
export interface MapRange {
  readonly start?: number | undefined;
  readonly length?: number | undefined;
}

/**
 * Walks the whole chain and hands out its extents in order, neighbours of one kind merged.
 *
 * @param filename the name the caller gave
 */
export function mapNode(
  node: BlockNode,
  filename: string,
  range: MapRange,
  onEntry: (entry: MapEntry) => void,
): void {
  const names = namesOf(node, filename);
  const first = range.start ?? 0;
  const end = Math.min(node.length, first + (range.length ?? node.length));
  if (first >= end) {
    // qemu-img has a line for nothing, too.
    const nothing = { present: false, zero: false, data: false, compressed: false };
    onEntry({ start: first, length: 0, depth: 0, ...nothing });
  }
  let pending: MapEntry | undefined;
  for (let start = first; start < end; ) {
    const next = entryAt(node, start, end, names);
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

/** Names of the files that data is in, for each image of the chain, top first. */
function namesOf(node: BlockNode, filename: string): string[][] {
  const names: string[][] = [];
  let name = filename;
  for (let layer: BlockNode | undefined = node; layer !== undefined; layer = layer.backing) {
    const { descriptor } = layer;
    names.push(filesOfLayer(descriptor, name));
    if ('backingFile' in descriptor) name = combineNames(name, descriptor.backingFile ?? '');
  }
  return names;
}

/** By the number that extents have for them. */
function filesOfLayer(descriptor: NodeDescriptor, name: string): string[] {
  if (!('layout' in descriptor)) return [name];
  const names = [name];
  if (descriptor.layout.format !== 'vmdk') return names;
  for (const extent of descriptor.layout.extents) {
    if (extent.name !== undefined) names[extent.file] = combineNames(name, extent.name);
  }
  return names;
}

function entryAt(
  node: BlockNode,
  start: number,
  end: number,
  names: readonly (readonly string[])[],
): MapEntry {
  const extent = shownStatus(chainStatus(node, start, Math.min(end - start, LOOK_UP_BYTES)));
  const filename = names[extent.depth]?.[extent.file ?? 0];
  return {
    start,
    length: extent.length,
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
