import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import {
  type BlockNode,
  type Extent,
  type ForeignDescriptor,
  STATUS_ALLOCATED,
  STATUS_COMPRESSED,
  STATUS_DATA,
  STATUS_ZERO,
} from '../node.js';
import type { FileNode } from '../raw/file.js';
import type { Locator, Place, Source } from './contract.js';

/** Look-ups that one status call makes, at most. */
const STATUS_LOOKUPS = 64;
/** Bytes of unpacked blocks a thread remembers; one in any case. */
const UNPACKED_CACHE_BYTES = 4 * 1024 * 1024;

/** The node of every format that is only read: one thread's facade. */
export class ForeignNode implements BlockNode {
  readonly descriptor: ForeignDescriptor;
  readonly length: number;
  readonly readOnly = true;
  readonly clusterSize: number | undefined;
  readonly backing: BlockNode | undefined;
  readonly #runtime: Runtime;
  readonly #files: readonly FileNode[];
  readonly #sources: readonly Source[];
  readonly #locator: Locator;
  /** Unpacked blocks by their key, least recently used first. */
  readonly #unpacked = new Map<number, Uint8Array>();
  #unpackedBytes = 0;

  /**
   * @param files of the image, for the holes in them
   * @param sources the same files, for what is in them
   */
  constructor(
    runtime: Runtime,
    descriptor: ForeignDescriptor,
    files: readonly FileNode[],
    sources: readonly Source[],
    locator: Locator,
    backing: BlockNode | undefined,
  ) {
    this.descriptor = descriptor;
    this.length = descriptor.length;
    this.clusterSize = descriptor.clusterSize;
    this.backing = backing;
    this.#runtime = runtime;
    this.#files = files;
    this.#sources = sources;
    this.#locator = locator;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#check('read', offset, length);
    const { u8 } = this.#runtime.arena;
    while (length > 0) {
      const place = this.#locator.locate(offset, length);
      const bytes = place.length;
      switch (place.kind) {
        case 'data':
          this.#sources[place.file]?.read(place.hostOffset, pointer, bytes);
          break;
        case 'compressed': {
          const block = this.#unpack(place.key, place.unpack);
          u8.set(block.subarray(place.within, place.within + bytes), pointer);
          break;
        }
        case 'unallocated':
          this.#readBacking(offset, pointer, bytes);
          break;
        case 'zero':
          u8.fill(0, pointer, pointer + bytes);
          break;
      }
      offset += bytes;
      pointer += bytes;
      length -= bytes;
    }
  }

  #readBacking(offset: number, pointer: number, length: number): void {
    const { backing } = this;
    const inside = backing === undefined ? 0 : Math.max(0, Math.min(length, backing.length - offset));
    if (inside > 0) backing?.read(offset, pointer, inside);
    if (inside < length) this.#runtime.arena.u8.fill(0, pointer + inside, pointer + length);
  }

  #unpack(key: number, unpack: () => Uint8Array): Uint8Array {
    let block = this.#unpacked.get(key);
    if (block === undefined) {
      block = unpack();
      this.#unpackedBytes += block.length;
      for (const [oldest, { length }] of this.#unpacked) {
        if (this.#unpackedBytes <= UNPACKED_CACHE_BYTES) break;
        this.#unpacked.delete(oldest);
        this.#unpackedBytes -= length;
      }
    } else {
      this.#unpacked.delete(key);
    }
    this.#unpacked.set(key, block);
    return block;
  }

  status(offset: number, length: number): Extent {
    this.#check('look at', offset, length);
    if (length === 0) return { length: 0, flags: 0, hostOffset: -1 };
    const place = this.#locator.locate(offset, length);
    const first = extentOf(place);
    if (place.kind === 'data' && place.preallocated) {
      const inFile = this.#files[place.file]?.status(place.hostOffset, place.length);
      if (inFile === undefined) return first;
      return { ...first, length: inFile.length, flags: first.flags | (inFile.flags & STATUS_ZERO) };
    }
    let total = first.length;
    for (let lookups = 1; total < length && lookups < STATUS_LOOKUPS; lookups++) {
      const next = extentOf(this.#locator.locate(offset + total, length - total));
      const adjacent = first.hostOffset < 0 || next.hostOffset === first.hostOffset + total;
      if (next.flags !== first.flags || next.file !== first.file || !adjacent) break;
      total += next.length;
    }
    return { ...first, length: total };
  }

  write(offset: number, _pointer: number, length: number): void {
    this.#refuse('write', offset, length);
  }

  writeUnits(offset: number, _pointer: number, length: number): void {
    this.#refuse('write', offset, length);
  }

  writeZeroes(offset: number, length: number): void {
    this.#refuse('write zeroes', offset, length);
  }

  discard(offset: number, length: number): void {
    this.#refuse('discard', offset, length);
  }

  flush(): void {}

  #refuse(what: string, offset: number, length: number): never {
    throw new StillframeError(
      'ERR_STILLFRAME_READ_ONLY',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' is open read-only`,
    );
  }

  #check(what: string, offset: number, length: number): void {
    if (offset >= 0 && length >= 0 && offset + length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' has ${this.length} bytes`,
    );
  }
}

function extentOf(place: Place): Extent {
  const { length } = place;
  switch (place.kind) {
    case 'data':
      return {
        length,
        flags: STATUS_DATA | STATUS_ALLOCATED,
        hostOffset: place.hostOffset,
        file: place.file,
      };
    case 'compressed':
      return { length, flags: STATUS_DATA | STATUS_ALLOCATED | STATUS_COMPRESSED, hostOffset: -1 };
    case 'unallocated':
      return { length, flags: 0, hostOffset: -1 };
    case 'zero':
      return { length, flags: STATUS_ZERO | STATUS_ALLOCATED, hostOffset: -1 };
  }
}
