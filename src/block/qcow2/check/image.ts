import { StillframeError } from '../../../errors.js';
import type { Runtime } from '../../../kernels/runtime.js';
import { STATUS_ZERO } from '../../node.js';
import type { FileNode } from '../../raw/file.js';
import type { Qcow2Header } from '../header.js';
import { References } from './references.js';

export const L1_RESERVED_MASK = 0x7f000000000001ffn;
export const L2_RESERVED_MASK = 0x3f000000000001fen;
export const REFCOUNT_TABLE_RESERVED_MASK = 0x1ffn;
export const REFCOUNT_TABLE_OFFSET_MASK = 0xfffffffffffffe00n;
export const ZERO_FLAG = 1n;
/** The lower half of an entry's second word. */
export const ALLOCATED_SUBCLUSTERS = 0xffffffffn;

/** Clusters of a file that can be counted, as in QEMU. */
const MOST_CLUSTERS = 2 ** 31 - 1;
/**
 * Tables of a sound image lie beside each other, so reading all of them is never more than the file takes on its disk.
 * What is read beyond that, tables that a hostile file names again and again, is bounded by this.
 */
const READ_ALLOWANCE = 2 * 1024 ** 3;
const READ_FACTOR = 8;
/** Up to here nobody looks for holes, which a sound image has few of where its tables are. */
const FREE_BYTES = 64 * 1024 * 1024;
const BUFFER_BYTES = 1024 * 1024;

/**
 * An image under the eyes of the check: its file, the tables the header names, counters, and a buffer. Nothing in it
 * has been checked but the header.
 */
export class CheckedImage {
  readonly runtime: Runtime;
  readonly file: FileNode;
  readonly header: Qcow2Header;
  readonly path: string;
  readonly clusterSize: number;
  /** Bytes of an L2 entry. */
  readonly entryBytes: number;
  /** Entries of an L2 table. */
  readonly l2Entries: number;
  /** Refcounts of a refcount block. */
  readonly perBlock: number;
  /** What a refcount can hold, without more than 2^53. */
  readonly mostReferences: number;
  /** The L1 table, as it is in the file. */
  readonly l1: number;
  /** At least one cluster, at least 1 MiB. */
  readonly buffer: number;
  readonly bufferBytes: number;
  readonly references: References;
  refcountTable: number;
  refcountTableOffset: number;
  /** Entries. */
  refcountTableEntries: number;
  /** Snapshots as the repaired table has them, and what the table takes in the file. */
  snapshotsOffset = 0;
  snapshotsBytes = 0;
  readonly #owned: number[] = [];
  readonly #allowance: number;
  readonly #allocated: number;
  #spent = 0;
  #changed = false;

  constructor(runtime: Runtime, file: FileNode, header: Qcow2Header) {
    this.runtime = runtime;
    this.file = file;
    this.header = header;
    this.path = file.descriptor.path;
    this.clusterSize = header.clusterSize;
    this.entryBytes = header.extendedL2 ? 16 : 8;
    this.l2Entries = this.clusterSize / this.entryBytes;
    this.perBlock = (this.clusterSize * 8) / header.refcountBits;
    this.mostReferences = 2 ** header.refcountBits - 1;
    const space = file.fixedLength ? undefined : file.allocatedBytes();
    this.#allocated = Math.min(file.length, space ?? file.length);
    this.#allowance = READ_ALLOWANCE + READ_FACTOR * this.#allocated;
    const clusters = this.#clustersOf(file.length);
    try {
      this.refcountTableOffset = header.refcountTableOffset;
      this.refcountTableEntries = (header.refcountTableClusters * this.clusterSize) / 8;
      this.refcountTable = this.#own(this.refcountTableEntries * 8, 'refcount table');
      this.l1 = this.#own(header.l1Size * 8, 'L1 table');
      this.bufferBytes = Math.max(BUFFER_BYTES, this.clusterSize);
      this.buffer = this.#own(this.bufferBytes, 'buffer for tables');
      // One cluster more: the last one may be cut off by the end of the file, and what refers to it may reach further.
      this.references = new References(runtime, this.path, clusters + 1, this.mostReferences);
      file.read(header.l1TableOffset, this.l1, header.l1Size * 8);
      file.read(this.refcountTableOffset, this.refcountTable, this.refcountTableEntries * 8);
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  /** Whole or begun clusters of the file. */
  get clusters(): number {
    return this.#clustersOf(this.file.length);
  }

  /** Something was written. */
  get changed(): boolean {
    return this.#changed;
  }

  dispose(): void {
    const { arena } = this.runtime;
    for (const pointer of this.#owned) arena.free(pointer);
    this.#owned.length = 0;
    this.references?.free();
  }

  /**
   * Reads a part of a table into the arena.
   *
   * @returns false where the range lies in a hole of the file or behind its end: it reads as zeroes and the memory at
   *   `pointer` is left alone
   * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE where the tables of the image are more than its file can hold
   */
  read(offset: number, pointer: number, length: number): boolean {
    if (offset >= this.file.length) return false;
    if (this.#spent > this.#allocated + FREE_BYTES) {
      const { flags, length: extent } = this.file.status(offset, length);
      if ((flags & STATUS_ZERO) !== 0 && extent >= Math.min(length, this.file.length - offset)) {
        this.spend(512);
        return false;
      }
    }
    this.spend(length);
    this.file.read(offset, pointer, length);
    return true;
  }

  /** Takes work that is worth reading so many bytes from what may be done for this file. */
  spend(bytes: number): void {
    this.#spent += bytes;
    if (this.#spent <= this.#allowance) return;
    throw new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${this.path}': the same places of the file are named as tables again and again, more than ${this.#allowance} bytes in all for a file of ${this.#allocated}; the image is too damaged to be checked, or made to keep the check busy`,
    );
  }

  write(offset: number, pointer: number, length: number): void {
    this.#changed = true;
    this.file.write(offset, pointer, length);
  }

  flush(): void {
    this.file.flush();
  }

  /** Makes the file longer and the counters with it. @returns false where it would have too many clusters */
  grow(length: number): boolean {
    if (Math.ceil(length / this.clusterSize) > MOST_CLUSTERS) return false;
    this.#changed = true;
    this.file.truncate(length);
    this.references.grow(this.clusters + 1);
    return true;
  }

  /** An entry of the refcount table, 0 behind its end. */
  refcountTableEntry(index: number): bigint {
    if (index >= this.refcountTableEntries) return 0n;
    return this.runtime.arena.view.getBigUint64(this.refcountTable + index * 8);
  }

  /** Replaces the refcount table in memory by `entries` empty entries. */
  replaceRefcountTable(offset: number, entries: number): void {
    const table = this.#own(entries * 8, 'refcount table');
    const old = this.#owned.indexOf(this.refcountTable);
    this.#owned.splice(old, 1);
    this.runtime.arena.free(this.refcountTable);
    this.refcountTable = table;
    this.refcountTableOffset = offset;
    this.refcountTableEntries = entries;
  }

  /** Clusters whose refcount matters: those of the file, and one behind its end where something refers to it. */
  get countedClusters(): number {
    const { clusters } = this;
    return this.references.get(clusters) > 0 ? clusters + 1 : clusters;
  }

  /**
   * Says to the kernels that this image is the one they look at.
   *
   * @param clusters how many of its counters they may use
   */
  setUpKernels(clusters: number): void {
    const { references, header } = this;
    this.runtime.kernels.checkSetup(
      references.directory,
      clusters,
      header.clusterBits,
      header.extendedL2,
      header.hasDataFile,
      references.most,
      this.file.length,
    );
  }

  /** Names the metadata, other than L2 tables, that [offset, offset + length) overlaps. */
  overlap(offset: number, length: number, ...except: 'L1 table'[]): string | undefined {
    const overlaps = (start: number, bytes: number): boolean =>
      offset < start + bytes && start < offset + length;
    const { header, clusterSize } = this;
    if (overlaps(0, clusterSize)) return 'header';
    if (!except.includes('L1 table') && overlaps(header.l1TableOffset, header.l1Size * 8)) return 'L1 table';
    if (overlaps(this.refcountTableOffset, this.refcountTableEntries * 8)) return 'refcount table';
    if (overlaps(this.snapshotsOffset, this.snapshotsBytes)) return 'snapshot table';
    const blocks = this.#refcountBlocks();
    const first = lowerBound(blocks, offset - clusterSize + 1);
    return first < blocks.length && (blocks[first] ?? 0) < offset + length ? 'refcount block' : undefined;
  }

  /** Offsets of the refcount blocks in order, made anew when the table has changed. */
  #blocks: { readonly table: number; readonly offsets: Float64Array } | undefined;

  #refcountBlocks(): Float64Array {
    if (this.#blocks?.table === this.refcountTable) return this.#blocks.offsets;
    const offsets = new Float64Array(this.refcountTableEntries);
    let count = 0;
    for (let index = 0; index < this.refcountTableEntries; index++) {
      const offset = Number(this.refcountTableEntry(index) & REFCOUNT_TABLE_OFFSET_MASK);
      if (offset !== 0) offsets[count++] = offset;
    }
    this.#blocks = { table: this.refcountTable, offsets: offsets.slice(0, count).sort() };
    return this.#blocks.offsets;
  }

  #clustersOf(length: number): number {
    const clusters = Math.ceil(length / this.clusterSize);
    if (clusters <= MOST_CLUSTERS) return clusters;
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${this.path}' has ${length} bytes, more than ${MOST_CLUSTERS} clusters of ${this.clusterSize} bytes, which cannot be checked`,
    );
  }

  #own(bytes: number, what: string): number {
    const pointer = this.runtime.arena.alloc(bytes, `${what} of '${this.path}'`);
    this.#owned.push(pointer);
    return pointer;
  }
}

/** Index of the first number that is at least `value`. */
function lowerBound(sorted: Float64Array, value: number): number {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((sorted[middle] ?? 0) < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
