import { StillframeError } from '../../../errors.js';
import { OFFSET_MASK } from '../entries.js';
import { AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, findExtension } from '../header.js';
import type { CheckedImage } from './image.js';
import { hex, type Report } from './report.js';

const EXTENSION_BYTES = 24;
const MOST_BITMAPS = 65535;
const MOST_DIRECTORY_BYTES = 64 * 1024 * 1024;
/** Entries of a bitmap table, and bytes of the bitmap behind it. */
const MOST_TABLE_ENTRIES = 2 ** 27;
const MOST_BITMAP_BYTES = 512 * 1024 * 1024;
const MOST_NAME_BYTES = 1023;
/** Offsets in a directory entry. */
const ENTRY = {
  table: 0,
  tableEntries: 8,
  flags: 12,
  type: 16,
  granularityBits: 17,
  nameSize: 18,
  extraSize: 20,
};
const ENTRY_BYTES = 24;
const FLAG_IN_USE = 1;
const FLAGS_KNOWN = 7;
const TYPE_DIRTY_TRACKING = 1;
/** Bits of a bitmap table entry that must be 0; bit 0 says what an entry without offset reads as. */
const TABLE_ENTRY_RESERVED = 0xff000000000001fen;
const PIECE_BYTES = 256 * 1024;
/** Work of looking at one wrong entry, in bytes read. */
const WRONG_COST = 512;

/** Counts a reference to a range of the file. */
export type Refer = (offset: bigint, length: number) => void;

/**
 * Counts what the persistent bitmaps of an image refer to. Where a program without bitmap support has changed the image
 * since, as the autoclear bit shows, the bitmaps are void and refer to nothing.
 *
 * Source: the qcow2 specification, section "Bitmaps".
 */
export class BitmapReferences {
  readonly #image: CheckedImage;
  readonly #report: Report;
  readonly #repairing: boolean;
  readonly #refer: Refer;

  /** @param repairing clusters without references will be freed: what cannot be read must not look like none */
  constructor(image: CheckedImage, report: Report, repairing: boolean, refer: Refer) {
    this.#image = image;
    this.#report = report;
    this.#repairing = repairing;
    this.#refer = refer;
  }

  /** @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE where the directory is damaged, as QEMU fails to open it */
  run(): void {
    const { header, runtime, file, path } = this.#image;
    const extension = findExtension(header.extensions, EXTENSION_BITMAPS);
    if (extension === undefined || (header.autoclearFeatures & AUTOCLEAR_BITMAPS) === 0n) return;
    if (extension.length !== EXTENSION_BYTES) throw this.#failure('the header extension', extension.offset);
    const { arena } = runtime;
    const pointer = arena.alloc(EXTENSION_BYTES, `bitmaps extension of '${path}'`);
    file.read(extension.offset, pointer, EXTENSION_BYTES);
    const count = arena.view.getUint32(pointer);
    const bytes = arena.view.getBigUint64(pointer + 8);
    const offset = arena.view.getBigUint64(pointer + 16);
    arena.free(pointer);
    if (
      count > MOST_BITMAPS ||
      bytes > BigInt(MOST_DIRECTORY_BYTES) ||
      offset % BigInt(header.clusterSize) !== 0n ||
      offset > BigInt(Number.MAX_SAFE_INTEGER - MOST_DIRECTORY_BYTES)
    ) {
      throw this.#failure('the header extension', extension.offset);
    }
    if (count === 0) return;
    this.#refer(offset, Number(bytes));
    this.#directory(count, Number(offset), Number(bytes));
  }

  #directory(count: number, offset: number, bytes: number): void {
    const { runtime, path } = this.#image;
    const { view } = runtime.arena;
    const directory = runtime.arena.alloc(bytes, `bitmap directory of '${path}'`);
    try {
      // What is not read stays zero.
      this.#image.read(offset, directory, bytes);
      let at = 0;
      for (let index = 0; index < count; index++) {
        const entry = directory + at;
        const size = at + ENTRY_BYTES > bytes ? 0 : this.#entrySize(entry);
        if (size === 0 || at + size > bytes) {
          throw this.#failure(`bitmap directory entry ${index}`, offset + at);
        }
        this.#table(view.getBigUint64(entry + ENTRY.table), view.getUint32(entry + ENTRY.tableEntries));
        at += size;
      }
    } finally {
      runtime.arena.free(directory);
    }
  }

  /** Bytes of a directory entry, 0 where it is not valid. */
  #entrySize(entry: number): number {
    const { header, clusterSize, runtime } = this.#image;
    const { view } = runtime.arena;
    const table = view.getBigUint64(entry + ENTRY.table);
    const entries = view.getUint32(entry + ENTRY.tableEntries);
    const flags = view.getUint32(entry + ENTRY.flags);
    const granularityBits = view.getUint8(entry + ENTRY.granularityBits);
    const nameBytes = view.getUint16(entry + ENTRY.nameSize);
    const bitmapBytes = entries * clusterSize;
    const valid =
      table !== 0n &&
      table % BigInt(clusterSize) === 0n &&
      entries > 0 &&
      entries <= MOST_TABLE_ENTRIES &&
      bitmapBytes <= MOST_BITMAP_BYTES &&
      (flags & ~FLAGS_KNOWN) === 0 &&
      view.getUint8(entry + ENTRY.type) === TYPE_DIRTY_TRACKING &&
      granularityBits >= 9 &&
      granularityBits <= 31 &&
      nameBytes > 0 &&
      nameBytes <= MOST_NAME_BYTES &&
      ((flags & FLAG_IN_USE) !== 0 || header.length <= bitmapBytes * 8 * 2 ** granularityBits);
    if (!valid) return 0;
    return Math.ceil((ENTRY_BYTES + view.getUint32(entry + ENTRY.extraSize) + nameBytes) / 8) * 8;
  }

  #table(offset: bigint, entries: number): void {
    this.#refer(offset, entries * 8);
    const { runtime, path } = this.#image;
    const bytes = entries * 8;
    const pointer = runtime.arena.alloc(Math.min(bytes, PIECE_BYTES), `bitmap table of '${path}'`);
    try {
      for (let done = 0; done < bytes; done += PIECE_BYTES) {
        const piece = Math.min(PIECE_BYTES, bytes - done);
        if (!this.#image.read(Number(offset) + done, pointer, piece)) continue;
        for (let at = 0; at < piece; at += 8) {
          this.#tableEntry(runtime.arena.view.getBigUint64(pointer + at), Number(offset) + done + at);
        }
      }
    } finally {
      runtime.arena.free(pointer);
    }
  }

  /** @param place where the entry is in the file */
  #tableEntry(entry: bigint, place: number): void {
    if (entry === 0n) return;
    const { clusterSize } = this.#image;
    const offset = entry & OFFSET_MASK;
    const valid =
      (entry & TABLE_ENTRY_RESERVED) === 0n &&
      offset % BigInt(clusterSize) === 0n &&
      (offset === 0n || (entry & 1n) === 0n);
    if (valid) {
      if (offset !== 0n) this.#refer(offset, clusterSize);
      return;
    }
    if (this.#repairing) throw this.#failure('a bitmap table entry', place);
    this.#image.spend(WRONG_COST);
    this.#report.corrupt(`ERROR bitmap table entry at 0x${hex(place)} is not valid: ${hex(entry)}`);
  }

  #failure(what: string, offset: number): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${this.#image.path}': ${what} at offset ${offset} of its persistent bitmaps is damaged, so what they refer to cannot be counted; remove the bitmaps first`,
    );
  }
}
