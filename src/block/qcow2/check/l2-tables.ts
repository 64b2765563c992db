import { OFFSET_MASK } from '../entries.js';
import type { CheckedImage } from './image.js';

/**
 * Reads L2 tables into the buffer of an image. Tables that lie one behind the other in the file and in the L1 table, as
 * they do where an image was filled from its start to its end, are read together.
 */
export class L2Tables {
  readonly #image: CheckedImage;
  #start = 0;
  #end = 0;

  constructor(image: CheckedImage) {
    this.#image = image;
  }

  /**
   * Pointer to the table at `offset`, -1 where it is empty. Good until the next call.
   *
   * @param l1 pointer to the L1 entry that refers to it, and how many entries follow from there, itself included
   */
  load(offset: number, l1: number, entries: number): number {
    const image = this.#image;
    const { clusterSize } = image;
    if (offset < this.#start || offset + clusterSize > this.#end) {
      const bytes = offset % clusterSize === 0 ? this.#adjacent(l1, entries) * clusterSize : clusterSize;
      this.forget();
      if (!image.read(offset, image.buffer, bytes)) return -1;
      this.#start = offset;
      this.#end = offset + bytes;
    }
    return image.buffer + (offset - this.#start);
  }

  /** The buffer holds something else from now on, or the file has changed. */
  forget(): void {
    this.#end = 0;
  }

  /** How many L2 tables, that of the L1 entry included, lie one behind the other and fit into the buffer. */
  #adjacent(l1: number, entries: number): number {
    const { view } = this.#image.runtime.arena;
    const { clusterSize, bufferBytes } = this.#image;
    const most = Math.min(entries, bufferBytes / clusterSize);
    if (most < 2) return 1;
    const first = view.getBigUint64(l1) & OFFSET_MASK;
    let count = 1;
    while (count < most) {
      const entry = view.getBigUint64(l1 + count * 8);
      if ((entry & OFFSET_MASK) !== first + BigInt(count * clusterSize)) break;
      count++;
    }
    return count;
  }
}
