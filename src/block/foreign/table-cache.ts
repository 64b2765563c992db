import type { Source } from './contract.js';

const PAGE = 4096;
/** 256 KiB. */
const PAGES = 64;
/** Pages of one file: offsets are below 2^52. */
const FILE_PAGES = 2 ** 40;

/**
 * Entries of the tables of an image, read in pages as they are asked for. Every thread has its own, since nothing
 * changes and nothing has to be agreed on; its memory is bounded whatever size a header says its tables have.
 *
 * Entries may not cross a page: callers keep tables aligned to their entries.
 */
export class TableCache {
  readonly #sources: readonly Source[];
  readonly #littleEndian: boolean;
  /** Least recently used first. */
  readonly #pages = new Map<number, DataView<ArrayBuffer>>();
  #lastNumber = -1;
  #last = new DataView(new ArrayBuffer(0));

  /** @param sources the files of the image */
  constructor(sources: readonly Source[], littleEndian: boolean) {
    this.#sources = sources;
    this.#littleEndian = littleEndian;
  }

  /** The 32-bit entry at `offset`, a multiple of 4, of a file. */
  u32(file: number, offset: number): number {
    return this.#page(file, Math.floor(offset / PAGE)).getUint32(offset % PAGE, this.#littleEndian);
  }

  #page(file: number, index: number): DataView<ArrayBuffer> {
    const number = file * FILE_PAGES + index;
    if (number === this.#lastNumber) return this.#last;
    let page = this.#pages.get(number);
    if (page === undefined) {
      page = this.#load(file, index);
    } else {
      this.#pages.delete(number);
    }
    this.#pages.set(number, page);
    this.#lastNumber = number;
    this.#last = page;
    return page;
  }

  #load(file: number, index: number): DataView<ArrayBuffer> {
    let page: DataView<ArrayBuffer> | undefined;
    if (this.#pages.size >= PAGES) {
      for (const [oldest, view] of this.#pages) {
        this.#pages.delete(oldest);
        page = view;
        break;
      }
    }
    // The last page of all would be overwritten under its own name if the read failed.
    this.#lastNumber = -1;
    page ??= new DataView(new ArrayBuffer(PAGE));
    this.#sources[file]?.readBytes(index * PAGE, new Uint8Array(page.buffer));
    return page;
  }
}
