import { STATUS_ALLOCATED, STATUS_COMPRESSED, STATUS_DATA, STATUS_ZERO } from './node.js';

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

/** Which part of an image to map, in bytes; all of it by default. */
export interface MapRange {
  readonly start?: number | undefined;
  readonly length?: number | undefined;
}

/** Extents as threads hand them to each other, see {@link MapBatch}. */
export type PackedMap = Float64Array<ArrayBuffer>;

/** Numbers of an extent in a {@link PackedMap}. */
export const FIELDS = 4;

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
