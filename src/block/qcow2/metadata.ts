import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { Qcow2Descriptor } from '../node.js';
import type { FileNode } from '../raw/file.js';
import { beginRecording } from './bitmaps.js';
import { COMPRESSED, COPIED, OFFSET_MASK } from './entries.js';
import { FIELD, INCOMPATIBLE_CORRUPT, SUBCLUSTERS } from './header.js';
import { checkApart, checkNoneShared, overlapsPlace, type Places } from './places.js';
import {
  decrementRefcount,
  fillRefcounts,
  incrementRefcount,
  loadRefcount,
  storeRefcount,
} from './refcount-entry.js';
import { SliceCache } from './slice-cache.js';
import { FREE_ENTRY, MUTATED, READERS, State } from './state.js';

const REFCOUNT_TABLE_RESERVED_MASK = 0x1ffn;
/** The bitmap of an extended entry whose subclusters all read as zeroes. */
const ALL_ZERO = 0xffffffff00000000n;

const L2_EVENTS = { load: 'l2_load', update: 'l2_update' } as const;
/** Refcounts are looked up at many places, which have the event themselves. */
const REFCOUNT_EVENTS = { load: undefined, update: 'refblock_update_part' } as const;

/** Rows that are looked for among the free clusters before a row is made behind all others. */
const ROW_ATTEMPTS = 64;

/** Clusters in a row in the file. */
export interface HostRun {
  /** Bytes. */
  readonly offset: number;
  readonly clusters: number;
}

/**
 * The metadata of a writable or read-only image: L1 and L2 tables, refcounts, allocation and the order in which all of
 * it reaches the disk. One per thread; everything behind it is shared. All methods but {@link flush} and the
 * reader counts are called under the state's lock.
 *
 * What holds in the file at any instant, whatever of the unsynced writes a power cut lets through:
 *
 * 1. An L2 entry or L1 entry in the file refers to clusters with a refcount in the file, and to data or a table
 *    that is durable. Every such change gets a sequence number; a slice with changes up to n is written only after
 *    a sync that began when all refcounts of changes up to n were written (`durable` ≥ n).
 * 2. The refcount table refers to refcount blocks that are durable. Its changes are written after a sync of
 *    their own.
 * 3. A refcount is lowered only when the entries that referred to the cluster are gone from the disk: such *frees*
 *    wait in a list until their change is durable.
 *
 * And in memory: a freed cluster becomes allocatable only when every read that began before is over. Reads count
 * themselves in one of two epochs. A batch of frees starts a new epoch and waits for the old one to run empty.
 *
 *     free list   | in grace        | durable          | waiting for a sync |
 *                 0            freeGrace          freeDurable          freeCount
 */
export class Metadata {
  readonly state: State;
  readonly l2: SliceCache;
  readonly clusterSize: number;
  /** Entries of an L2 table. */
  readonly l2Entries: number;
  /** Entries of a slice of an L2 table. */
  readonly sliceEntries: number;
  /** Subclusters of a cluster, 1 where entries are not extended. */
  readonly subclusters: number;
  readonly #entryBytes: number;
  readonly #dataFile: FileNode | undefined;
  readonly #writable: boolean;
  readonly #version: number;
  readonly #runtime: Runtime;
  readonly #file: FileNode;
  readonly #path: string;
  readonly #refcounts: SliceCache;
  readonly #order: number;
  readonly #perBlock: number;
  readonly #perSlice: number;
  readonly #l1: number;
  readonly #table: number;
  readonly #places: Places;

  /** @param dataFile where the guest's data is, undefined: in `file` */
  constructor(runtime: Runtime, descriptor: Qcow2Descriptor, file: FileNode, dataFile: FileNode | undefined) {
    const state = new State(runtime.arena, descriptor.control, descriptor.path);
    this.state = state;
    this.#runtime = runtime;
    this.#file = file;
    this.#path = descriptor.path;
    this.clusterSize = 2 ** descriptor.clusterBits;
    this.subclusters = descriptor.extendedL2 ? SUBCLUSTERS : 1;
    this.#entryBytes = descriptor.extendedL2 ? 16 : 8;
    this.#dataFile = dataFile;
    this.#writable = !descriptor.readOnly;
    this.#version = descriptor.version;
    this.l2Entries = this.clusterSize / this.#entryBytes;
    this.sliceEntries = state.get('sliceBytes') / this.#entryBytes;
    this.#order = Math.log2(descriptor.refcountBits);
    this.#perBlock = (this.clusterSize * 8) / descriptor.refcountBits;
    this.#perSlice = (state.get('sliceBytes') * 8) / descriptor.refcountBits;
    this.#l1 = state.get('l1');
    this.#table = state.get('refcountTable');
    const places = state.get('places') / 8;
    this.#places = runtime.arena.f64.subarray(places, places + state.get('placesCount'));
    this.l2 = new SliceCache(state, file, state.get('l2Cache'), state.get('l2Slots'), L2_EVENTS, () =>
      this.#makeDurable(true),
    );
    this.#refcounts = new SliceCache(
      state,
      file,
      state.get('refcountCache'),
      state.get('refcountSlots'),
      REFCOUNT_EVENTS,
      // Refcount slices may always be written.
      () => undefined,
    );
  }

  /** Entries of the L1 table. */
  get l1Entries(): number {
    return this.state.get('l1Entries');
  }

  /** Reads the tables, once at open. */
  initialise(readOnly: boolean): void {
    const { state } = this;
    this.l2.initialise();
    this.#file.read(state.get('l1Offset'), this.#l1, state.get('l1Entries') * 8);
    if (readOnly) return;
    this.#refcounts.initialise();
    const [offset, entries] = [state.get('refcountTableOffset'), state.get('refcountTableEntries')];
    this.#file.event?.('reftable_load');
    this.#file.read(offset, this.#table, entries * 8);
    const l1 = { pointer: this.#l1, entries: state.get('l1Entries'), offset: state.get('l1Offset') };
    checkApart(this.#path, this.#places, 'L1 table', l1.offset, l1.entries * 8);
    checkApart(this.#path, this.#places, 'refcount table', offset, entries * 8);
    const tables = [
      { what: 'L1 entry', ...l1 },
      { what: 'refcount table entry', pointer: this.#table, entries, offset },
    ];
    checkNoneShared(this.#runtime.arena, this.#path, tables, (place) =>
      // What is no place for a table at all is told where it is used.
      place % this.clusterSize === 0 ? this.#fixedOverlap(place, this.clusterSize) : undefined,
    );
  }

  // ---- L1 and L2 ----------------------------------------------------------------------------------------------

  /** Offset in the file of the L2 table of an L1 entry, 0 where there is none. Validates it. */
  l2TableOffset(l1Index: number): number {
    const at = this.#l1 + l1Index * 8;
    const high = this.#runtime.arena.view.getUint32(at);
    const low = this.#runtime.arena.view.getUint32(at + 4);
    if (high === 0 && low === 0) return 0;
    if ((high & 0x7f000000) !== 0 || (low & 0x1ff) !== 0) {
      throw this.corrupt(
        `${this.#l1Name(l1Index)} has reserved bits set (0x${this.#l1Entry(l1Index).toString(16)})`,
      );
    }
    return (high & 0x00ffffff) * 0x100000000 + low;
  }

  /**
   * The slice of the L2 table of `l1Index` that has entry `l2Index`, or -1 where there is no table.
   *
   * @returns a slot of {@link l2}
   */
  l2Slice(l1Index: number, l2Index: number): number {
    const table = this.l2TableOffset(l1Index);
    if (table === 0) return -1;
    return this.#loadL2(l1Index, table, l2Index);
  }

  /**
   * The L2 table of `l1Index` made ready for changes: allocated where missing, copied where a snapshot shares it.
   */
  prepareL2(l1Index: number): void {
    const entry = this.#l1Entry(l1Index);
    const old = this.l2TableOffset(l1Index);
    if (old !== 0 && (entry & COPIED) !== 0n) return;
    if (old !== 0) this.#checkL2Table(l1Index, old);
    const { state, clusterSize } = this;
    const fresh = this.allocate(1).offset;
    try {
      const buffer = state.get('metaBuffer');
      const step = Math.min(clusterSize, state.get('metaBytes'));
      if (old === 0) this.#runtime.arena.u8.fill(0, buffer, buffer + step);
      for (let done = 0; done < clusterSize; done += step) {
        if (old !== 0) {
          this.#file.event?.('l2_alloc_cow_read');
          this.#file.read(old + done, buffer, step);
        }
        this.#file.event?.('l2_alloc_write');
        this.#file.write(fresh + done, buffer, step);
      }
    } catch (error) {
      this.release({ offset: fresh, clusters: 1 });
      throw error;
    }
    this.l2.forget(fresh, fresh + clusterSize);
    const sequence = state.nextSequence();
    this.#setL1Entry(l1Index, BigInt(fresh) | COPIED, sequence, sequence);
    if (old !== 0) this.#deferFree({ offset: old, clusters: 1 }, sequence);
  }

  /** Forgets an L2 table whose clusters are all unallocated. */
  dropL2(l1Index: number): void {
    const table = this.l2TableOffset(l1Index);
    if (table === 0) return;
    const sequence = this.state.nextSequence();
    this.#setL1Entry(l1Index, 0n, sequence, 0);
    this.l2.forget(table, table + this.clusterSize);
    this.#deferFree({ offset: table, clusters: 1 }, sequence);
  }

  /** @param needed see {@link SliceCache.markDirty} */
  #setL1Entry(l1Index: number, entry: bigint, sequence: number, needed: number): void {
    const { state } = this;
    this.#runtime.arena.view.setBigUint64(this.#l1 + l1Index * 8, entry);
    const dirty = state.get('l1DirtyTo') > 0;
    state.set('l1DirtyFrom', dirty ? Math.min(state.get('l1DirtyFrom'), l1Index) : l1Index);
    state.set('l1DirtyTo', Math.max(state.get('l1DirtyTo'), l1Index + 1));
    if (!dirty) state.set('l1Since', sequence);
    state.set('l1Needed', Math.max(state.get('l1Needed'), needed));
  }

  /** One raw L2 entry (an extended one: without its bitmap); 0 where there is no table. */
  entry(cluster: number): bigint {
    const at = this.#entryPointer(cluster);
    return at < 0 ? 0n : this.#runtime.arena.view.getBigUint64(at);
  }

  /** The subclusters of a cluster that have data, bit i for subcluster i; of an extended entry, not compressed. */
  allocatedSubclusters(cluster: number): number {
    const at = this.#entryPointer(cluster);
    return at < 0 ? 0 : this.#runtime.arena.view.getUint32(at + 12);
  }

  /** -1 where there is no table. */
  #entryPointer(cluster: number): number {
    const l2Index = cluster % this.l2Entries;
    const slot = this.l2Slice(Math.floor(cluster / this.l2Entries), l2Index);
    return slot < 0 ? -1 : this.l2.pointer(slot) + (l2Index % this.sliceEntries) * this.#entryBytes;
  }

  /**
   * Makes `count` clusters from `cluster` on (of one slice; the table is {@link prepareL2}d) data of the host clusters
   * from `host` on, which have refcount 1 and hold the data already. What they were before is freed.
   *
   * @param from first subcluster of the first cluster that has data now
   * @param to subcluster of the last cluster before which the data ends
   */
  mapData(cluster: number, count: number, host: number, from = 0, to = this.subclusters): void {
    const { view } = this.#runtime.arena;
    const bytes = this.#entryBytes;
    const slot = this.#preparedSlice(cluster);
    const sequence = this.state.nextSequence();
    const first = this.l2.pointer(slot) + (cluster % this.sliceEntries) * bytes;
    for (let index = 0; index < count; index++) {
      const at = first + index * bytes;
      const old = view.getBigUint64(at);
      const place = host + index * this.clusterSize;
      view.setUint32(at, 0x80000000 + Math.floor(place / 0x100000000));
      view.setUint32(at + 4, place % 0x100000000);
      if (bytes === 16) {
        if ((old & COMPRESSED) !== 0n) view.setBigUint64(at + 8, 0n);
        const mask = subclusterMask(index === 0 ? from : 0, index === count - 1 ? to : SUBCLUSTERS);
        view.setUint32(at + 8, view.getUint32(at + 8) & ~mask);
        view.setUint32(at + 12, view.getUint32(at + 12) | mask);
      }
      this.l2.markDirty(slot, sequence, sequence);
      if (old !== 0n) this.#freeEntry(old, sequence, place);
    }
  }

  /**
   * Makes a cluster (the table is {@link prepareL2}d) the compressed data at `host`, which is written already and has
   * its place from {@link allocateBytes}. What it was before is freed.
   *
   * @param bytes of the compressed data
   */
  mapCompressed(cluster: number, host: number, bytes: number): void {
    const { view } = this.#runtime.arena;
    const slot = this.#preparedSlice(cluster);
    const sequence = this.state.nextSequence();
    const at = this.l2.pointer(slot) + (cluster % this.sliceEntries) * this.#entryBytes;
    const old = view.getBigUint64(at);
    const further = Math.floor((host + bytes - 1) / 512) - Math.floor(host / 512);
    view.setBigUint64(at, COMPRESSED | (BigInt(further) << BigInt(this.#compressedBits)) | BigInt(host));
    if (this.#entryBytes === 16) view.setBigUint64(at + 8, 0n);
    this.l2.markDirty(slot, sequence, sequence);
    if (old !== 0n) this.#freeEntry(old, sequence, -1);
  }

  /** Makes a cluster unallocated, or `zero`: one that reads as zeroes; what it referred to is freed. */
  clearEntry(cluster: number, zero: boolean): void {
    const { view } = this.#runtime.arena;
    const at = this.#changeEntry(cluster);
    const old = view.getBigUint64(at);
    if (this.#entryBytes === 16) {
      view.setBigUint64(at, 0n);
      view.setBigUint64(at + 8, zero ? ALL_ZERO : 0n);
    } else {
      view.setBigUint64(at, zero ? 1n : 0n);
    }
    if (old !== 0n) this.#freeEntry(old, this.state.get('sequence'), -1);
  }

  /** Makes subclusters [from, to) of a cluster that is not compressed read as zeroes; it keeps its host cluster. */
  zeroInPlace(cluster: number, from = 0, to = this.subclusters): void {
    const { view } = this.#runtime.arena;
    const at = this.#changeEntry(cluster);
    if (this.#entryBytes === 16) {
      const mask = subclusterMask(from, to);
      view.setUint32(at + 8, view.getUint32(at + 8) | mask);
      view.setUint32(at + 12, view.getUint32(at + 12) & ~mask);
    } else {
      view.setBigUint64(at, view.getBigUint64(at) | 1n);
    }
  }

  /** The pointer to an entry that is about to be changed so that it refers to nothing new. */
  #changeEntry(cluster: number): number {
    const slot = this.#preparedSlice(cluster);
    this.l2.markDirty(slot, this.state.nextSequence(), 0);
    return this.l2.pointer(slot) + (cluster % this.sliceEntries) * this.#entryBytes;
  }

  #preparedSlice(cluster: number): number {
    const l1Index = Math.floor(cluster / this.l2Entries);
    if ((this.#l1Entry(l1Index) & COPIED) === 0n) {
      throw new Error(`qcow2 invariant: the L2 table of cluster ${cluster} is not prepared`);
    }
    return this.l2Slice(l1Index, cluster % this.l2Entries);
  }

  #l1Entry(l1Index: number): bigint {
    return this.#runtime.arena.view.getBigUint64(this.#l1 + l1Index * 8);
  }

  /** An L1 entry in an error. */
  #l1Name(l1Index: number): string {
    return `L1 entry ${l1Index} (at offset ${this.state.get('l1Offset') + l1Index * 8})`;
  }

  #loadL2(l1Index: number, table: number, l2Index: number): number {
    const { sliceBytes } = this.l2;
    const offset = table + Math.floor(l2Index / this.sliceEntries) * sliceBytes;
    const cached = this.l2.find(offset);
    if (cached >= 0) return cached;
    this.#checkL2Table(l1Index, table);
    return this.l2.load(offset);
  }

  #checkL2Table(l1Index: number, table: number): void {
    const problem = this.#tableProblem(table);
    if (problem !== undefined) {
      throw this.corrupt(
        `${this.#l1Name(l1Index)} says that its L2 table is at offset ${table}, which ${problem}`,
      );
    }
  }

  /** What is wrong with a place in the file for a cluster of metadata that was read from the image. */
  #tableProblem(offset: number): string | undefined {
    if (offset % this.clusterSize !== 0) return 'is not the start of a cluster';
    if (offset >= this.#file.length) return `is beyond the end of the file at ${this.#file.length}`;
    return this.#fixedOverlap(offset, this.clusterSize);
  }

  /** Names the header or table of fixed place that [offset, offset + length) overlaps. */
  #fixedOverlap(offset: number, length: number): string | undefined {
    const { state } = this;
    const overlaps = (start: number, bytes: number) => offset < start + bytes && start < offset + length;
    if (overlaps(0, this.clusterSize)) return 'is the place of the header';
    if (overlaps(state.get('l1Offset'), state.get('l1Entries') * 8)) return 'is in the L1 table';
    const tableBytes = state.get('refcountTableEntries') * 8;
    if (overlaps(state.get('refcountTableOffset'), tableBytes)) return 'is in the refcount table';
    if (overlapsPlace(this.#places, offset, offset + length)) return 'is in a table of the snapshots';
    const bitmaps = state.get('bitmapsBytes');
    if (bitmaps !== 0 && overlaps(state.get('bitmapsOffset'), bitmaps)) return 'is in the bitmap directory';
    return undefined;
  }

  /**
   * Checks that writing data to these clusters of the file destroys no metadata, whatever the image's refcounts say.
   * What lies behind the end that the file had at open was allocated by us and needs no look.
   */
  checkOverlap(offset: number, length: number, what: string): void {
    const problem = this.overlap(offset, length);
    if (problem === undefined) return;
    throw this.corrupt(`${what} at offset ${offset} ${problem}; nothing was written there`);
  }

  /** Names the metadata that these bytes of the file are. */
  overlap(offset: number, length: number): string | undefined {
    return (
      this.#fixedOverlap(offset, length) ??
      (offset < this.state.get('openLength') ? this.#referredOverlap(offset, length) : undefined)
    );
  }

  #referredOverlap(offset: number, length: number): string | undefined {
    const { state } = this;
    const find = (table: number, entries: number): number => {
      const words = this.#runtime.arena.u8;
      for (let index = 0; index < entries; index++) {
        const at = table + index * 8;
        // The common case first: an empty entry.
        if (this.#runtime.arena.u32[(at >> 2) + 1] === 0 && this.#runtime.arena.u32[at >> 2] === 0) continue;
        const place =
          (words[at + 1] ?? 0) * 2 ** 48 +
          (words[at + 2] ?? 0) * 2 ** 40 +
          this.#runtime.arena.view.getUint32(at + 3) * 256 +
          (words[at + 7] ?? 0);
        const start = place - (place % 512);
        if (offset < start + this.clusterSize && start < offset + length) return index;
      }
      return -1;
    };
    const l2 = find(this.#l1, state.get('l1Entries'));
    if (l2 >= 0) return `is the L2 table of L1 entry ${l2}`;
    const block = find(this.#table, state.get('refcountTableEntries'));
    return block >= 0 ? `is refcount block ${block}` : undefined;
  }

  // ---- Refcounts and allocation -------------------------------------------------------------------------------

  /**
   * Takes up to `count` clusters in a row: the first free ones, as many of them as are contiguous.
   * Their refcount is 1 from now on; whoever does not come to use them gives them back by {@link release}.
   *
   * @throws StillframeError ERR_STILLFRAME_NO_SPACE, …_CORRUPT_IMAGE
   */
  allocate(count: number): HostRun {
    this.#file.event?.('cluster_alloc');
    return this.#allocate(count);
  }

  #allocate(count: number): HostRun {
    const { state } = this;
    if (state.get('freeCount') > 0) this.reap();
    let index = Math.max(1, state.get('firstFree'));
    for (;;) {
      this.#ensureBlock(index);
      // A refcount table that moved has left its old place free.
      index = Math.min(index, Math.max(1, state.get('firstFree')));
      const within = index % this.#perSlice;
      const block = this.#refcounts.pointer(this.#refcountSlice(index));
      const found = this.#runtime.kernels.refcountFindFree(block, within, this.#perSlice, this.#order);
      if (found >= 0) {
        index += found - within;
        break;
      }
      index += this.#perSlice - within;
      state.set('firstFree', index);
    }
    const run = this.#freeRun(index, count);
    const offset = index * this.clusterSize;
    this.checkOverlap(
      offset,
      run * this.clusterSize,
      'an allocation (the refcounts say that the cluster is free)',
    );
    this.#setOnes(index, run);
    state.set('firstFree', index + run);
    return { offset, clusters: run };
  }

  /** Takes `count` clusters in a row, which {@link allocate} need not come to. @returns the offset of the first */
  allocateRow(count: number): number {
    const short: HostRun[] = [];
    try {
      while (short.length < ROW_ATTEMPTS) {
        const run = this.allocate(count);
        if (run.clusters === count) return run.offset;
        short.push(run);
      }
    } finally {
      for (const run of short) this.release(run);
    }
    return this.#allocateBehind(count);
  }

  /**
   * Clusters in a row behind everything that refcount blocks count so far. The new blocks come first, since one at the
   * start of its own clusters would part the row:
   *
   *     | clusters counted so far | new refcount blocks | the row | free …
   */
  #allocateBehind(count: number): number {
    const { state, clusterSize } = this;
    let blocks = 1;
    while (blocks * this.#perBlock < blocks + count) blocks++;
    let first = this.#blocksInUse();
    while (first + blocks > state.get('refcountTableEntries')) {
      this.#growTable(first + blocks - 1);
      first = this.#blocksInUse();
    }
    const start = first * this.#perBlock;
    if (!Number.isSafeInteger((start + blocks + count) * clusterSize)) {
      throw this.#noSpace('the file would be larger than 2^53 bytes');
    }
    this.checkOverlap(start * clusterSize, (blocks + count) * clusterSize, 'a row of clusters');
    try {
      for (let index = 0; index < blocks; index++) {
        this.#makeBlock(first + index, (start + index) * clusterSize);
      }
      this.#setOnes(start, blocks + count);
    } catch (error) {
      // Blocks that do not count themselves would be handed out.
      const table = this.#table + first * 8;
      this.#runtime.arena.u8.fill(0, table, table + blocks * 8);
      throw error;
    }
    return (start + blocks) * clusterSize;
  }

  /** The number of the last refcount block there is, and one more. */
  #blocksInUse(): number {
    let blocks = this.state.get('refcountTableEntries');
    while (blocks > 0 && this.#blockOffset(blocks - 1) === 0) blocks--;
    return blocks;
  }

  /** Bytes from the start of the file to the end of the last cluster in use. */
  usedEnd(): number {
    // Nothing is counted behind the end of the table, however long the file is.
    const counted = this.state.get('refcountTableEntries') * this.#perBlock;
    let index = Math.min(Math.ceil(this.#file.length / this.clusterSize), counted);
    while (index > 0) {
      const last = index - 1;
      const block = Math.floor(last / this.#perBlock);
      if (this.#blockOffset(block) === 0) {
        index = block * this.#perBlock;
        continue;
      }
      const slice = this.#refcounts.pointer(this.#refcountSlice(last));
      if (loadRefcount(this.#runtime.arena, slice, last % this.#perSlice, this.#order) !== 0) break;
      index = last;
    }
    return index * this.clusterSize;
  }

  /**
   * Takes space for `bytes` bytes of compressed data, less than a cluster: behind other compressed data where there is
   * room. Each cluster it touches counts it once.
   *
   *     | data | room |  …  | data | data | room |      the next cluster is taken along only where it lies right behind
   *            spareAt                    packAt
   *
   * @returns the offset in the file; whoever does not come to use it gives it back by {@link releaseBytes}
   * @throws StillframeError ERR_STILLFRAME_NO_SPACE, …_CORRUPT_IMAGE
   */
  allocateBytes(bytes: number): number {
    const { state } = this;
    this.#file.event?.('cluster_alloc_bytes');
    let at = this.#packInto('spareAt', bytes) || this.#packInto('packAt', bytes);
    if (at === 0) {
      const fresh = this.#allocate(1);
      const open = state.get('packAt');
      const room = this.#roomAt(open);
      const short = bytes > room;
      try {
        at = short && fresh.offset === open + room && this.#countOnce(open) ? open : fresh.offset;
      } catch (error) {
        this.release(fresh);
        throw error;
      }
      if (at !== open && short && room > this.#roomAt(state.get('spareAt'))) state.set('spareAt', open);
      state.set('packAt', this.#packEnd(at + bytes));
    }
    if (at + bytes > 2 ** this.#compressedBits) {
      this.releaseBytes(at, bytes);
      throw this.#noSpace(`compressed data beyond ${2 ** this.#compressedBits} bytes has no address`);
    }
    return at;
  }

  /** Takes space in a cluster that has compressed data already; 0 where it has no room or counts no more. */
  #packInto(place: 'packAt' | 'spareAt', bytes: number): number {
    const at = this.state.get(place);
    if (bytes > this.#roomAt(at) || !this.#countOnce(at)) return 0;
    this.state.set(place, this.#packEnd(at + bytes));
    return at;
  }

  /** Bytes from an offset to the end of its cluster; none at 0. */
  #roomAt(offset: number): number {
    return offset === 0 ? 0 : this.clusterSize - (offset % this.clusterSize);
  }

  /** Where more compressed data can go behind this; 0 at the end of a cluster. */
  #packEnd(end: number): number {
    return end % this.clusterSize === 0 ? 0 : end;
  }

  /** Gives space from {@link allocateBytes} back that no entry ever referred to. */
  releaseBytes(offset: number, bytes: number): void {
    const first = offset - (offset % this.clusterSize);
    this.lower({ offset: first, clusters: Math.ceil((offset + bytes - first) / this.clusterSize) });
  }

  /** Counts the cluster of an offset once more. False where its refcount takes no more. */
  #countOnce(offset: number): boolean {
    const index = Math.floor(offset / this.clusterSize);
    const slot = this.#refcountSlice(index);
    const block = this.#refcounts.pointer(slot);
    if (!incrementRefcount(this.#runtime.arena, block, index % this.#perSlice, this.#order)) return false;
    this.#refcounts.markDirty(slot, this.state.get('sequence'), 0);
    return true;
  }

  /** Counts every cluster of a run that is in use once more. Where it throws none of them. */
  raise(run: HostRun): void {
    const first = run.offset / this.clusterSize;
    for (let index = first; index < first + run.clusters; index++) {
      const offset = index * this.clusterSize;
      if (this.#countOnce(offset)) continue;
      const isFree = this.refcountAt(offset) === 0;
      if (index > first) this.lower({ offset: run.offset, clusters: index - first });
      if (isFree) throw this.corrupt(`the cluster at offset ${offset} was in use although its refcount is 0`);
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `'${this.#path}': the cluster at offset ${offset} cannot be counted once more`,
        { errno: 'EINVAL' },
      );
    }
  }

  /** How often a cluster is counted. */
  refcountAt(offset: number): number {
    const index = Math.floor(offset / this.clusterSize);
    const block = this.#refcounts.pointer(this.#refcountSlice(index));
    return loadRefcount(this.#runtime.arena, block, index % this.#perSlice, this.#order);
  }

  /** Bits of a compressed entry that say where its data is. */
  get #compressedBits(): number {
    return 62 - (Math.log2(this.clusterSize) - 8);
  }

  /** Gives clusters back that no entry ever referred to. */
  release(run: HostRun): void {
    const first = run.offset / this.clusterSize;
    for (let index = first; index < first + run.clusters; index++) {
      const slot = this.#refcountSlice(index);
      storeRefcount(
        this.#runtime.arena,
        this.#refcounts.pointer(slot),
        index % this.#perSlice,
        this.#order,
        0,
      );
      this.#refcounts.markDirty(slot, this.state.get('sequence'), 0);
    }
    this.state.set('firstFree', Math.min(this.state.get('firstFree'), first));
  }

  /** Free clusters in a row from `index` (which is free) on, at most `count`, where refcount blocks exist. */
  #freeRun(index: number, count: number): number {
    let run = 0;
    while (run < count) {
      const at = index + run;
      if (run > 0 && at % this.#perBlock === 0 && this.#blockOffset(Math.floor(at / this.#perBlock)) === 0)
        break;
      const within = at % this.#perSlice;
      const block = this.#refcounts.pointer(this.#refcountSlice(at));
      const most = Math.min(count - run, this.#perSlice - within);
      const free = this.#runtime.kernels.refcountFreeRun(block, within, this.#perSlice, this.#order, most);
      run += free;
      if (free < most) break;
    }
    return run;
  }

  #setOnes(index: number, count: number): void {
    for (let done = 0; done < count; ) {
      const at = index + done;
      const within = at % this.#perSlice;
      const n = Math.min(count - done, this.#perSlice - within);
      const slot = this.#refcountSlice(at);
      fillRefcounts(this.#runtime.arena, this.#refcounts.pointer(slot), within, n, this.#order);
      this.#refcounts.markDirty(slot, this.state.get('sequence'), 0);
      done += n;
    }
  }

  /** Offset of a refcount block, 0 where there is none. Validates it. */
  #blockOffset(block: number): number {
    if (block >= this.state.get('refcountTableEntries')) return 0;
    const entry = this.#runtime.arena.view.getBigUint64(this.#table + block * 8);
    if (entry === 0n) return 0;
    if ((entry & REFCOUNT_TABLE_RESERVED_MASK) !== 0n || entry > BigInt(Number.MAX_SAFE_INTEGER)) {
      throw this.corrupt(`${this.#blockName(block)} has reserved bits set (0x${entry.toString(16)})`);
    }
    return Number(entry);
  }

  /** A refcount table entry in an error. */
  #blockName(block: number): string {
    return `refcount table entry ${block} (at offset ${this.state.get('refcountTableOffset') + block * 8})`;
  }

  /** The slot with the refcount of a cluster, whose block must exist. */
  #refcountSlice(index: number): number {
    this.#file.event?.('refblock_load');
    const block = Math.floor(index / this.#perBlock);
    const table = this.#blockOffset(block);
    const within = index % this.#perBlock;
    const offset = table + Math.floor(within / this.#perSlice) * this.#refcounts.sliceBytes;
    if (table !== 0) {
      const cached = this.#refcounts.find(offset);
      if (cached >= 0) return cached;
    }
    const problem = table === 0 ? 'has no refcount block' : this.#tableProblem(table);
    if (problem !== undefined) {
      throw this.corrupt(
        `${this.#blockName(block)}, for the cluster at offset ${index * this.clusterSize}, says offset ${table}, which ${problem}`,
      );
    }
    return this.#refcounts.load(offset);
  }

  /** Makes the refcount block of a cluster where it is missing; the block is the first cluster it counts. */
  #ensureBlock(index: number): void {
    if (!Number.isSafeInteger((index + this.#perBlock) * this.clusterSize)) {
      throw this.#noSpace('the file would be larger than 2^53 bytes');
    }
    this.#file.event?.('refblock_alloc');
    const block = Math.floor(index / this.#perBlock);
    if (block >= this.state.get('refcountTableEntries')) this.#growTable(block);
    if (this.#blockOffset(block) !== 0) return;
    const cluster = block * this.#perBlock;
    this.#makeBlock(block, cluster * this.clusterSize);
    try {
      this.#setOnes(cluster, 1);
    } catch (error) {
      // A block that does not count itself would be handed out.
      this.#runtime.arena.view.setBigUint64(this.#table + block * 8, 0n);
      throw error;
    }
  }

  /** An empty refcount block at `offset`, which the caller counts. */
  #makeBlock(block: number, offset: number): void {
    const { state } = this;
    this.checkOverlap(offset, this.clusterSize, 'a new refcount block');
    this.#file.event?.('refblock_alloc_write');
    this.#writeZeroCluster(offset);
    this.#refcounts.forget(offset, offset + this.clusterSize);
    this.#runtime.arena.view.setBigUint64(this.#table + block * 8, BigInt(offset));
    const dirty = state.get('refcountTableDirtyTo') > 0;
    state.set('refcountTableDirtyFrom', dirty ? Math.min(state.get('refcountTableDirtyFrom'), block) : block);
    state.set('refcountTableDirtyTo', Math.max(state.get('refcountTableDirtyTo'), block + 1));
  }

  #writeZeroCluster(offset: number): void {
    const buffer = this.state.get('metaBuffer');
    const step = Math.min(this.clusterSize, this.state.get('metaBytes'));
    this.#runtime.arena.u8.fill(0, buffer, buffer + step);
    for (let done = 0; done < this.clusterSize; done += step) this.#file.write(offset + done, buffer, step);
  }

  /**
   * Moves the refcount table to a larger place behind everything it counts, so that it has an entry for `block`:
   *
   *     | clusters counted so far | new refcount blocks | new refcount table | free …
   *
   * The header, the commit point, is written when all of this is durable; then the old table is free.
   */
  #growTable(block: number): void {
    const { state, clusterSize } = this;
    const entries = state.get('refcountTableEntries');
    const firstCluster = entries * this.#perBlock;
    const perCluster = clusterSize / 8;
    let blocks = 1;
    let tableClusters = 0;
    for (;;) {
      const wanted = Math.max(Math.ceil(entries * 1.5), entries + blocks, block + 1);
      const clusters = Math.ceil(wanted / perCluster);
      const needed = Math.ceil((blocks + clusters) / this.#perBlock);
      if (clusters === tableClusters && needed <= blocks) break;
      tableClusters = clusters;
      blocks = Math.max(blocks, needed);
    }
    const newEntries = tableClusters * perCluster;
    if (newEntries > state.get('refcountTableCapacity')) {
      throw this.#noSpace(`its refcount table cannot grow to ${newEntries * 8} bytes`);
    }
    const start = firstCluster * clusterSize;
    this.checkOverlap(start, (blocks + tableClusters) * clusterSize, 'a larger refcount table');
    const { view, u8 } = this.#runtime.arena;
    const oldOffset = state.get('refcountTableOffset');
    this.#file.event?.('reftable_grow');
    try {
      this.#file.event?.('refblock_alloc_write_blocks');
      for (let index = 0; index < blocks; index++) {
        const offset = start + index * clusterSize;
        this.#writeZeroCluster(offset);
        this.#refcounts.forget(offset, offset + clusterSize);
        view.setBigUint64(this.#table + (entries + index) * 8, BigInt(offset));
      }
      // From here on the entries count for look-ups, ours only: the lock is held.
      state.set('refcountTableEntries', newEntries);
      this.#setOnes(firstCluster, blocks + tableClusters);
      this.#refcounts.writeDirty();
      const place = start + blocks * clusterSize;
      this.#file.event?.('refblock_alloc_write_table');
      this.#file.write(place, this.#table, newEntries * 8);
      this.#sync(true);
      const buffer = state.get('metaBuffer');
      view.setBigUint64(buffer, BigInt(place));
      view.setUint32(buffer + 8, tableClusters);
      this.#file.event?.('refblock_alloc_switch_table');
      // Twelve bytes of one sector: both fields or none.
      this.#file.write(FIELD.refcountTableOffset, buffer, 12);
      this.#sync(true);
      state.set('refcountTableOffset', place);
      state.set('refcountTableDirtyFrom', 0);
      state.set('refcountTableDirtyTo', 0);
    } catch (error) {
      if (state.get('refcountTableOffset') === oldOffset) {
        state.set('refcountTableEntries', entries);
        this.#refcounts.forget(start, start + blocks * clusterSize);
        u8.fill(0, this.#table + entries * 8, this.#table + newEntries * 8);
      }
      throw error;
    }
    this.lower({ offset: oldOffset, clusters: entries / perCluster });
  }

  #noSpace(why: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_NO_SPACE',
      `'${this.#path}' cannot take more data: ${why}; copy it to an image with larger clusters`,
    );
  }

  // ---- Frees --------------------------------------------------------------------------------------------------

  /** Defers the free of what an L2 entry refers to, unless that is the cluster at `keep`. */
  #freeEntry(entry: bigint, sequence: number, keep: number): void {
    // Clusters of an external data file belong to their guest clusters for ever.
    if (this.#dataFile !== undefined) return;
    if ((entry & COMPRESSED) !== 0n) {
      this.#deferFree(this.compressedClusters(entry), sequence);
      return;
    }
    const offset = Number(entry & OFFSET_MASK);
    if (offset !== 0 && offset !== keep) this.#deferFree({ offset, clusters: 1 }, sequence);
  }

  /** The host clusters that a compressed cluster touches, each of which counts it once. */
  compressedClusters(entry: bigint): HostRun {
    const x = BigInt(this.#compressedBits);
    const offset = Number(entry & ((1n << x) - 1n));
    const sectors = Number((entry & ((1n << 62n) - 1n)) >> x) + 1;
    const first = Math.floor(offset / this.clusterSize);
    const last = Math.floor((offset - (offset % 512) + sectors * 512 - 1) / this.clusterSize);
    return { offset: first * this.clusterSize, clusters: last - first + 1 };
  }

  /** Whether `count` more frees surely fit into the list. */
  hasRoomForFrees(count: number): boolean {
    return this.state.get('freeCount') + count <= this.state.get('freeCapacity') / 2;
  }

  #deferFree(run: HostRun, sequence: number): void {
    const { state } = this;
    const { f64 } = this.#runtime.arena;
    const at = (index: number) => (state.get('frees') + index * FREE_ENTRY) / 8;
    let count = state.get('freeCount');
    if (count > state.get('freeDurable')) {
      const last = at(count - 1);
      const [offset = 0, clusters = 0] = f64.subarray(last, last + 2);
      if (offset + clusters * this.clusterSize === run.offset) {
        f64[last + 1] = clusters + run.clusters;
        f64[last + 2] = sequence;
        return;
      }
    }
    // Mutations see to it that there is room. Where many threads fill it at once the space leaks, which
    // 'qemu-img check -r leaks' gives back: never worse.
    if (count >= state.get('freeCapacity')) return;
    f64.set([run.offset, run.clusters, sequence], at(count));
    state.set('freeCount', ++count);
  }

  /**
   * Applies the frees that are durable and out of every reader's sight.
   *
   * @param closing nobody reads any more
   */
  reap(closing = false): void {
    const { state } = this;
    const { i32, f64 } = this.#runtime.arena;
    for (;;) {
      const grace = state.get('freeGrace');
      const epoch = state.get('epoch');
      if (grace > 0) {
        const old = (state.control + READERS + (1 - epoch) * 4) >> 2;
        if (!closing && Atomics.load(i32, old) !== 0) return;
        const first = state.get('frees') / 8;
        const count = state.get('freeCount');
        const batch = f64.slice(first, first + (grace * FREE_ENTRY) / 8);
        f64.copyWithin(first, first + (grace * FREE_ENTRY) / 8, first + (count * FREE_ENTRY) / 8);
        state.set('freeCount', count - grace);
        state.set('freeDurable', state.get('freeDurable') - grace);
        state.set('freeGrace', 0);
        state.set('generation', state.get('generation') + 1);
        let failure: unknown;
        for (let index = 0; index < batch.length; index += FREE_ENTRY / 8) {
          try {
            this.giveUp({ offset: batch[index] ?? 0, clusters: batch[index + 1] ?? 0 });
          } catch (error) {
            failure ??= error;
          }
        }
        if (failure !== undefined) throw failure;
      } else if (state.get('freeDurable') > 0) {
        state.set('epoch', 1 - epoch);
        state.set('freeGrace', state.get('freeDurable'));
      } else {
        return;
      }
    }
  }

  /** Lowers what L1 and L2 entries of the image referred to, which may be anything. */
  giveUp(run: HostRun): void {
    const problem = this.overlap(run.offset, run.clusters * this.clusterSize);
    if (problem !== undefined) {
      throw this.corrupt(`what was in use at offset ${run.offset} ${problem}; it was not given up`);
    }
    this.lower(run);
  }

  /** Takes one off the refcount of every cluster of the run; those that become free lose their space in the file. */
  lower(run: HostRun): void {
    this.#file.event?.('cluster_free');
    const { arena } = this.#runtime;
    const first = run.offset / this.clusterSize;
    let freeFrom = -1;
    const punch = (end: number): void => {
      if (freeFrom < 0) return;
      this.state.set('firstFree', Math.min(this.state.get('firstFree'), freeFrom));
      try {
        this.#file.discard(freeFrom * this.clusterSize, (end - freeFrom) * this.clusterSize);
      } catch {
        // The space stays taken in the file system; the image is none the worse.
      }
      freeFrom = -1;
    };
    for (let index = first; index < first + run.clusters; index++) {
      const slot = this.#refcountSlice(index);
      const block = this.#refcounts.pointer(slot);
      const within = index % this.#perSlice;
      if (loadRefcount(arena, block, within, this.#order) === 0) {
        punch(index);
        throw this.corrupt(
          `the cluster at offset ${index * this.clusterSize} was in use although its refcount is 0`,
        );
      }
      this.#refcounts.markDirty(slot, this.state.get('sequence'), 0);
      if (decrementRefcount(arena, block, within, this.#order)) {
        for (const place of ['packAt', 'spareAt'] as const) {
          if (Math.floor(this.state.get(place) / this.clusterSize) === index) this.state.set(place, 0);
        }
        if (freeFrom < 0) freeFrom = index;
      } else {
        punch(index);
      }
    }
    punch(first + run.clusters);
  }

  /** Counts the caller among the readers. Returns its epoch for {@link leaveReader}. */
  enterReader(): number {
    const epoch = this.state.get('epoch');
    Atomics.add(this.#runtime.arena.i32, (this.state.control + READERS + epoch * 4) >> 2, 1);
    return epoch;
  }

  /** Needs no lock. */
  leaveReader(epoch: number): void {
    Atomics.sub(this.#runtime.arena.i32, (this.state.control + READERS + epoch * 4) >> 2, 1);
  }

  // ---- The way to the disk ------------------------------------------------------------------------------------

  /**
   * Makes everything durable that was written before: data, then metadata in order. Takes the lock itself and does
   * not hold it while the disk works, unless other writers keep changing what has to be written.
   */
  flush(): void {
    const { state } = this;
    state.checkHealth();
    state.withLock(() => {
      const begin = state.get('sequence');
      this.#round(false, true);
      if (this.#oldestChange() <= begin) this.#round(true);
    });
    state.checkHealth();
  }

  /** Frees space in the caches and in the free list by a sync. Takes the lock itself. */
  relieve(): void {
    this.state.checkHealth();
    this.state.withLock(() => this.#round(false));
  }

  /** Writes everything and applies every free; nobody else uses the image any more. Takes the lock itself. */
  finish(): void {
    const { state } = this;
    state.checkHealth();
    state.withLock(() => {
      this.#round(true);
      this.reap(true);
      this.#refcounts.writeDirty();
      this.#sync(true);
    });
  }

  /**
   * Once before the first change of what the guest sees: the file says from then on that the bitmaps which record are
   * not up to date in it.
   */
  firstMutation(): void {
    const { state } = this;
    const { i32 } = this.#runtime.arena;
    const flag = (state.control + MUTATED) >> 2;
    if (Atomics.load(i32, flag) !== 0) return;
    state.withLock(() => {
      if (Atomics.load(i32, flag) !== 0) return;
      this.clearAutoclear();
      beginRecording(this.#runtime, this.#file, state);
      Atomics.store(i32, flag, 1);
    });
  }

  /** Clears the bits of features we do not keep up, before the image is changed, as the specification asks. */
  clearAutoclear(): void {
    const { state } = this;
    if (state.get('autoclear') === 0) return;
    const buffer = state.get('metaBuffer');
    this.#runtime.arena.view.setBigUint64(buffer, BigInt(state.get('autoclearKept')));
    this.#file.write(FIELD.autoclearFeatures, buffer, 8);
    this.#sync(true);
    state.set('autoclear', 0);
  }

  /** Data first: what is durable afterwards may be referred to. */
  #sync(hold: boolean): void {
    this.state.sync(() => {
      this.#dataFile?.flush();
      this.#file.flush();
    }, hold);
  }

  /** @param flushing it is what a flush of the drive comes to */
  #round(hold: boolean, flushing = false): void {
    const { state } = this;
    this.#makeDurable(hold);
    const oldestSlice = this.l2.writeDirty();
    if (state.get('l1DirtyTo') > 0 && state.get('l1Needed') <= state.get('durable')) this.#writeL1();
    // Every change before `written` is in the file now.
    const oldestL1 = state.get('l1DirtyTo') > 0 ? state.get('l1Since') : Infinity;
    const written = Math.min(oldestSlice, oldestL1, state.get('sequence') + 1);
    if (flushing) this.#file.event?.('flush_to_disk');
    this.#sync(hold);
    const { f64 } = this.#runtime.arena;
    const first = state.get('frees') / 8;
    let durable = state.get('freeDurable');
    const count = state.get('freeCount');
    while (durable < count && (f64[first + durable * 3 + 2] ?? Infinity) < written) durable++;
    state.set('freeDurable', durable);
    this.reap();
  }

  /** Writes the refcounts and syncs: all changes so far may be written after this. */
  #makeDurable(hold: boolean): void {
    const { state } = this;
    if (state.get('refcountTableDirtyTo') > 0) {
      // New refcount blocks have to be durable before the table says where they are. Most of the work is done
      // with the lock let go.
      if (!hold) this.#sync(false);
      this.#refcounts.writeDirty();
      this.#sync(true);
      const from = state.get('refcountTableDirtyFrom');
      const to = state.get('refcountTableDirtyTo');
      if (to > 0) {
        const offset = state.get('refcountTableOffset') + from * 8;
        this.#file.event?.('refblock_alloc_hookup');
        this.#file.write(offset, this.#table + from * 8, (to - from) * 8);
        state.set('refcountTableDirtyFrom', 0);
        state.set('refcountTableDirtyTo', 0);
      }
    }
    this.#refcounts.writeDirty();
    const reached = state.get('sequence');
    this.#sync(hold);
    state.set('durable', Math.max(state.get('durable'), reached));
  }

  #writeL1(): void {
    const { state } = this;
    const from = state.get('l1DirtyFrom');
    const to = state.get('l1DirtyTo');
    this.#file.event?.('l1_update');
    this.#file.write(state.get('l1Offset') + from * 8, this.#l1 + from * 8, (to - from) * 8);
    state.set('l1DirtyFrom', 0);
    state.set('l1DirtyTo', 0);
  }

  #oldestChange(): number {
    const l1 = this.state.get('l1DirtyTo') > 0 ? this.state.get('l1Since') : Infinity;
    return Math.min(l1, this.l2.oldestChange());
  }

  /**
   * The error for damage in the tables. A writable image takes no more changes from then on and is marked corrupt,
   * so that nobody else writes to it before it is repaired. Under the lock.
   */
  corrupt(what: string): StillframeError {
    if (this.#writable && this.state.latchDamage() && this.#version >= 3) {
      try {
        const buffer = this.state.get('metaBuffer');
        const { view } = this.#runtime.arena;
        this.#file.read(FIELD.incompatibleFeatures, buffer, 8);
        view.setBigUint64(buffer, view.getBigUint64(buffer) | INCOMPATIBLE_CORRUPT);
        this.#file.write(FIELD.incompatibleFeatures, buffer, 8);
        this.#file.flush();
      } catch {
        // The damage is the error to tell of.
      }
    }
    return this.damaged(what);
  }

  /** The error for data that cannot be made sense of; the image stays as it is. */
  damaged(what: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${this.#path}' is damaged: ${what}; check it with 'stillframe check'`,
    );
  }
}

/** Bits [from, to) of 32. */
function subclusterMask(from: number, to: number): number {
  return ((2 ** to - 1) >>> 0) & ~(2 ** from - 1);
}
