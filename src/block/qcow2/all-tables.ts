import type { Runtime } from '../../kernels/runtime.js';
import type { Qcow2Descriptor } from '../node.js';
import { attachFile, type FileNode } from '../raw/file.js';
import { OFFSET_MASK } from './entries.js';
import { MAX_L1_BYTES, readHeader } from './header.js';
import { readSnapshots, type Snapshot } from './listings.js';
import { Metadata } from './metadata.js';
import { correctCopiedFlags } from './snapshots.js';

/** Most that a refcount of version 2 counts to. */
const MOST_REFERENCES = 65535;
/** Flags in the halves of an entry. */
const COMPRESSED_HIGH = 0x40000000;
const ZERO_FLAG_LOW = 1;

/** Whether the drive or a snapshot of an open, writable image that nobody uses has a compressed cluster. */
export function hasCompressedClusters(runtime: Runtime, image: Qcow2Descriptor, file: FileNode): boolean {
  const tables = new AllTables(runtime, image, file);
  try {
    return tables.hasCompressed();
  } finally {
    tables.free();
  }
}

/**
 * Takes the flag of clusters that read as zeroes, which version 2 does not know, from the drive and the snapshots of an
 * image without subclusters: without a backing file such a cluster becomes unallocated, else it refers to one cluster of
 * zeroes that all of them share, as far as it can be counted. The image reads the same at any moment; an interruption
 * leaves leaked clusters at worst, and flags that say less than they could.
 *
 * The image is open for writing, its refcounts have 16 bits, and nobody uses it meanwhile.
 *
 * @throws StillframeError ERR_STILLFRAME_NO_SPACE, …_CORRUPT_IMAGE, …_IO
 */
export function expandZeroClusters(runtime: Runtime, image: Qcow2Descriptor, file: FileNode): void {
  const tables = new AllTables(runtime, image, file);
  try {
    tables.expand();
  } finally {
    tables.free();
  }
  correctCopiedFlags(runtime, image, file);
}

/** The L2 tables of the drive and of all snapshots, one after the other in memory. */
class AllTables {
  readonly #runtime: Runtime;
  readonly #file: FileNode;
  readonly #metadata: Metadata;
  readonly #snapshots: readonly Snapshot[];
  readonly #hasBacking: boolean;
  /** One L2 table. */
  readonly #table: number;
  /** Offset of a cluster of zeroes, 0: there is none yet. */
  #zeroes = 0;

  constructor(runtime: Runtime, image: Qcow2Descriptor, file: FileNode) {
    this.#runtime = runtime;
    this.#file = file;
    const dataFile = image.dataFile && attachFile(runtime, image.dataFile);
    this.#metadata = new Metadata(runtime, image, file, dataFile);
    this.#metadata.finish();
    const header = readHeader(runtime, file);
    this.#snapshots = readSnapshots(runtime, file, header);
    this.#hasBacking = header.backingFile !== undefined;
    this.#table = runtime.arena.alloc(this.#metadata.clusterSize, 'an L2 table');
  }

  free(): void {
    this.#runtime.arena.free(this.#table);
  }

  hasCompressed(): boolean {
    return this.#forEach(() => this.#places((high) => (high & COMPRESSED_HIGH) !== 0).length > 0);
  }

  expand(): void {
    this.#forEach((offset, isActive) => {
      this.#expandTable(offset, isActive);
      return false;
    });
    this.#metadata.finish();
  }

  /** Where in memory the entries of the table are that `test` picks by their halves. */
  #places(test: (high: number, low: number) => boolean): number[] {
    const { view } = this.#runtime.arena;
    const found: number[] = [];
    for (let at = this.#table; at < this.#table + this.#metadata.clusterSize; at += 8) {
      if (test(view.getUint32(at), view.getUint32(at + 4))) found.push(at);
    }
    return found;
  }

  #expandTable(offset: number, isActive: boolean): void {
    const { view } = this.#runtime.arena;
    const { clusterSize } = this.#metadata;
    const flagged = this.#places(
      (high, low) => (high & COMPRESSED_HIGH) === 0 && (low & ZERO_FLAG_LOW) !== 0,
    );
    if (flagged.length === 0) return;
    const before = flagged.map((at) => Number(view.getBigUint64(at) & OFFSET_MASK));
    // Each entry of a table that several L1 entries refer to counts as often.
    const times = this.#locked(() => this.#timesReferred(offset, isActive));
    for (const at of flagged) {
      const zeroes = this.#hasBacking ? this.#locked(() => this.#countZeroes(times)) : 0;
      view.setBigUint64(at, BigInt(zeroes));
    }
    this.#metadata.flush();
    this.#file.write(offset, this.#table, clusterSize);
    this.#file.flush();
    this.#locked(() => {
      this.#metadata.l2.forget(offset, offset + clusterSize);
      for (const place of before) {
        if (place === 0) continue;
        for (let time = 0; time < times; time++) this.#metadata.giveUp({ offset: place, clusters: 1 });
      }
    });
  }

  /** Under the lock. */
  #timesReferred(offset: number, isActive: boolean): number {
    const { clusterSize } = this.#metadata;
    const times = this.#metadata.refcountAt(offset);
    // The drive has no table with such a flag any more when the snapshots' turn comes.
    const problem = isActive ? undefined : this.#metadata.overlap(offset, clusterSize);
    if (times > 0 && problem === undefined) return times;
    throw this.#metadata.corrupt(
      `the L2 table at offset ${offset} ${problem ?? 'is in use although its refcount is 0'}`,
    );
  }

  /** A cluster of zeroes, counted so many times more. Under the lock. @returns its offset */
  #countZeroes(times: number): number {
    let left = times;
    if (this.#zeroes === 0 || this.#metadata.refcountAt(this.#zeroes) + times > MOST_REFERENCES) {
      const { offset, clusters } = this.#metadata.allocate(1);
      this.#file.writeZeroes(offset, this.#metadata.clusterSize, false);
      this.#zeroes = offset;
      left -= clusters;
    }
    for (; left > 0; left--) this.#metadata.raise({ offset: this.#zeroes, clusters: 1 });
    return this.#zeroes;
  }

  /** Calls `visit` once with the place of each table, which is in memory, until one call returns true. */
  #forEach(visit: (offset: number, isActive: boolean) => boolean): boolean {
    const { clusterSize, l1Entries } = this.#metadata;
    const isNew = this.#onlyOnce();
    for (let index = 0; index < l1Entries; index++) {
      const offset = this.#locked(() => {
        // What is wrong with its place is found when it is loaded.
        this.#metadata.l2Slice(index, 0);
        return this.#metadata.l2TableOffset(index);
      });
      if (offset === 0 || !isNew(offset)) continue;
      this.#file.read(offset, this.#table, clusterSize);
      if (visit(offset, true)) return true;
    }
    return this.#snapshots.some((snapshot) =>
      this.#forEachOf(snapshot, isNew, (offset) => visit(offset, false)),
    );
  }

  /** @returns whether a cluster of the file is asked for the first time: snapshots have most tables in common */
  #onlyOnce(): (offset: number) => boolean {
    const { clusterSize } = this.#metadata;
    const seen = new Uint8Array(Math.ceil(this.#file.length / clusterSize / 8));
    return (offset) => {
      const cluster = offset / clusterSize;
      const [byte, bit] = [Math.floor(cluster / 8), 1 << (cluster % 8)];
      const before = seen[byte] ?? 0;
      seen[byte] = before | bit;
      return (before & bit) === 0;
    };
  }

  #forEachOf(
    { info, l1TableOffset, l1Size }: Snapshot,
    isNew: (offset: number) => boolean,
    visit: (offset: number) => boolean,
  ): boolean {
    const { arena } = this.#runtime;
    const { clusterSize } = this.#metadata;
    const bytes = l1Size * 8;
    if (bytes === 0) return false;
    const isPlace = l1TableOffset > 0 && l1TableOffset % clusterSize === 0;
    if (!isPlace || bytes > MAX_L1_BYTES || l1TableOffset + bytes > this.#file.length) {
      throw this.#metadata.damaged(`the L1 table of snapshot '${info.name}' is at no place for one`);
    }
    const l1 = arena.alloc(bytes, 'L1 table of a snapshot');
    try {
      this.#file.read(l1TableOffset, l1, bytes);
      for (let index = 0; index < l1Size; index++) {
        const offset = Number(arena.view.getBigUint64(l1 + index * 8) & OFFSET_MASK);
        if (offset === 0) continue;
        if (offset % clusterSize !== 0 || offset >= this.#file.length) {
          throw this.#metadata.damaged(
            `snapshot '${info.name}' has an L2 table at offset ${offset}, which is no place for one`,
          );
        }
        if (!isNew(offset)) continue;
        this.#file.read(offset, this.#table, clusterSize);
        if (visit(offset)) return true;
      }
      return false;
    } finally {
      arena.free(l1);
    }
  }

  #locked<T>(body: () => T): T {
    return this.#metadata.state.withLock(body);
  }
}
