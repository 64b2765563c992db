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

/** Extents as threads hand them to each other, see {@link MapBatch}. */
export type PackedMap = Float64Array<ArrayBuffer>;

const FIELDS = 4;
const BATCH_EXTENTS = 4096;

/**
 * Walks the whole chain and hands out its extents in order, neighbours of one kind merged. For each depth: the names of
 * the files that places are in, see {@link mapFiles}.
 */
export function mapNode(node: BlockNode, range: MapRange, onBatch: (batch: PackedMap) => void): void {
  const first = range.start ?? 0;
  const end = Math.min(node.length, first + (range.length ?? node.length));
  let batch: PackedMap = new Float64Array(BATCH_EXTENTS * FIELDS);
  let used = 0;
  const add = (start: number, length: number, place: number, code: number): void => {
    batch[used] = start;
    batch[used + 1] = length;
    batch[used + 2] = place;
    batch[used + 3] = code;
    used += FIELDS;
    if (used < batch.length) return;
    onBatch(batch);
    batch = new Float64Array(BATCH_EXTENTS * FIELDS);
    used = 0;
  };
  // qemu-img has a line for nothing, too.
  if (first >= end) add(first, 0, -1, 0);
  let start = first;
  let [length, place, code] = [0, -1, 0];
  for (let at = first; at < end; ) {
    const extent = shownStatus(chainStatus(node, at, Math.min(end - at, LOOK_UP_BYTES)));
    const found = extent.flags + extent.depth * 2 ** 8 + (extent.file ?? 0) * 2 ** 24;
    if (length > 0 && found === code && extent.hostOffset === (place < 0 ? -1 : place + length)) {
      length += extent.length;
    } else {
      if (length > 0) add(start, length, place, code);
      [start, length, place, code] = [at, extent.length, extent.hostOffset, found];
    }
    at += extent.length;
  }
  if (length > 0) add(start, length, place, code);
  if (used > 0) onBatch(batch.slice(0, used));
}

/**
 * Some extents of a map, in order: an iterable of {@link MapEntry}. Where there are millions of them their fields can
 * be looked at one by one, which makes no object for each.
 *
 *     start | length | place in the file, -1: none | flags + 2^8 * depth + 2^24 * file
 */
export class MapBatch implements Iterable<MapEntry> {
  readonly #packed: PackedMap;
  readonly #files: readonly (readonly string[])[];

  /** @param files what {@link mapFiles} says of the image */
  constructor(packed: PackedMap, files: readonly (readonly string[])[]) {
    this.#packed = packed;
    this.#files = files;
  }

  /** Extents. */
  get size(): number {
    return this.#packed.length / FIELDS;
  }

  /** Bytes from the start of the drive. */
  startOf(index: number): number {
    return this.#packed[index * FIELDS] ?? 0;
  }

  /** Bytes. */
  lengthOf(index: number): number {
    return this.#packed[index * FIELDS + 1] ?? 0;
  }

  /** Bytes from the start of the file that holds the extent, -1 where it has no place of its own. */
  offsetOf(index: number): number {
    return this.#packed[index * FIELDS + 2] ?? -1;
  }

  /** A number for depth, flags and file: extents with the same one differ in their numbers of bytes only. */
  kindOf(index: number): number {
    return this.#packed[index * FIELDS + 3] ?? 0;
  }

  entry(index: number): MapEntry {
    const code = this.kindOf(index);
    const offset = this.offsetOf(index);
    const depth = Math.floor(code / 2 ** 8) % 2 ** 16;
    const filename = this.#files[depth]?.[Math.floor(code / 2 ** 24)];
    const extent = {
      start: this.startOf(index),
      length: this.lengthOf(index),
      depth,
      present: (code & STATUS_ALLOCATED) !== 0,
      zero: (code & STATUS_ZERO) !== 0,
      data: (code & STATUS_DATA) !== 0,
      compressed: (code & STATUS_COMPRESSED) !== 0,
    };
    if (offset < 0) return extent;
    return filename === undefined ? { ...extent, offset } : { ...extent, offset, filename };
  }

  *[Symbol.iterator](): Iterator<MapEntry> {
    for (let index = 0; index < this.size; index++) yield this.entry(index);
  }
}

/**
 * Names of the files that data is in, for each image of the chain, top first.
 *
 * @param filename the name the caller gave
 */
export function mapFiles(node: BlockNode, filename: string): string[][] {
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
