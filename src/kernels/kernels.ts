import type { Arena } from './arena.js';
import { Instance, type WasmModule } from './webassembly.js';

/** The exports of the module as they are: pointers are unsigned 32 bits, hashes 64. */
interface Exports {
  isZero(pointer: number, length: number): number;
  zeroMask(pointer: number, length: number, unit: number, mask: number): number;
  xxh3(pointer: number, length: number): bigint;
  digestUnits(pointer: number, length: number, unit: number, first: bigint, mask: number): bigint;
  zeroLeaves(unit: number, last: number, first: bigint, count: bigint): bigint;
  zeroUnits(): number;
  inflate(from: number, length: number, to: number, capacity: number, work: number): number;
  readonly INFLATE_WORKSPACE: { readonly value: number };
  bitmapSet(bitmap: number, start: number, count: number): void;
  bitmapClear(bitmap: number, start: number, count: number): void;
  bitmapTest(bitmap: number, index: number): number;
  bitmapTestAndClear(bitmap: number, start: number, count: number): number;
  bitmapNextSet(bitmap: number, from: number, end: number): number;
  bitmapNextClear(bitmap: number, from: number, end: number): number;
  bitmapCount(bitmap: number, start: number, count: number): number;
  bitmapMerge(target: number, source: number, bits: number): void;
  bitmapCoarsen(target: number, source: number, bits: number, shift: number): void;
  clustersFill(states: number, start: number, count: number, state: number): void;
  clusterState(states: number, index: number): number;
  clustersClaimNext(states: number, from: number, end: number, most: number): number;
  clustersClaimAt(states: number, index: number, end: number): number;
  claimedCount(): number;
  clustersTransition(states: number, start: number, count: number, before: number, after: number): number;
  offendingCluster(): number;
  clustersNext(states: number, from: number, end: number, state: number): number;
  clustersNextPending(states: number, from: number, end: number): number;
  clustersCount(states: number, start: number, count: number, state: number): number;
  compactUnits(pointer: number, length: number, unit: number, skip: number): number;
  firstDifference(a: number, b: number, length: number): number;
  l2Extent(slice: number, index: number, count: number, clusterBits: number, features: number): number;
  l2Kind(): number;
  l2HostOffset(): number;
  l2CompressedLength(): number;
  l2Copied(): number;
  refcountFindFree(block: number, from: number, entries: number, order: number): number;
  refcountFreeRun(block: number, from: number, entries: number, order: number, most: number): number;
  checkSetup(
    directory: number,
    clusters: number,
    clusterBits: number,
    extendedL2: number,
    hasDataFile: number,
    most: number,
    fileBytes: number,
  ): void;
  checkResetTotals(): void;
  checkAllocated(): number;
  checkFragmented(): number;
  checkCompressed(): number;
  checkShared(): number;
  checkUncopied(): number;
  checkBeginTable(): void;
  checkNoteData(offset: bigint): void;
  checkNoteCompressed(): void;
  checkCountEntries(table: number, from: number, end: number, weight: number, note: number): number;
  checkCopiedFlags(table: number, from: number, end: number): number;
  checkRefcounts(
    block: number,
    index: number,
    order: number,
    counters: number,
    wide: number,
    entries: number,
  ): number;
  countersNextUsed(counters: number, wide: number, from: number, entries: number): number;
  countersNextFree(counters: number, wide: number, from: number, entries: number): number;
  countersLastUsed(counters: number, wide: number, entries: number): number;
}

/** Kinds of {@link Kernels.l2Extent}. */
export const L2_UNALLOCATED = 0;
export const L2_ZERO_PLAIN = 1;
export const L2_ZERO_ALLOCATED = 2;
export const L2_DATA = 3;
export const L2_COMPRESSED = 4;
export const L2_INVALID = 5;
/** A subcluster without data in a cluster that has a place in the file. */
export const L2_UNALLOCATED_PLACE = 6;

/** What entries may say, for {@link Kernels.l2Extent}: the zero flag (version 3). */
export const L2_FEATURE_ZERO_FLAG = 1;
/** Entries are extended: 128 bits, 32 subclusters. */
export const L2_FEATURE_SUBCLUSTERS = 2;
/** The data is in an external file, at the guest's offsets. */
export const L2_FEATURE_DATA_FILE = 4;

export interface CheckTotals {
  /** Clusters noted. */
  readonly allocated: number;
  /** Of them, those that are not behind their neighbour in the file. */
  readonly fragmented: number;
  readonly compressed: number;
  /** References to clusters that had one before. */
  readonly shared: number;
  /** Clusters noted, compressed ones apart, without the flag COPIED. */
  readonly uncopied: number;
}

/**
 * The WebAssembly kernels on the memory of an arena. Pointers are byte offsets into it, lengths are bytes, cluster
 * and bit indices are counts up to 2^31 - 1. An instance belongs to one thread: second results are kept in it.
 */
export class Kernels {
  readonly #exports: Exports;

  constructor(arena: Arena, module: WasmModule) {
    const instance = new Instance(module, { env: { memory: arena.memory } });
    // The module is compiled from our own assembly/index.ts; its types are the interface above.
    this.#exports = instance.exports as unknown as Exports;
  }

  isZero(pointer: number, length: number): boolean {
    return this.#exports.isZero(pointer, length) !== 0;
  }

  /** Marks the zero units of a buffer in the bitmap `mask`, as {@link digestUnits} does. @returns how many there are */
  zeroMask(pointer: number, length: number, unit: number, mask: number): number {
    return this.#exports.zeroMask(pointer, length, unit, mask);
  }

  /** Bytes of the workspace of {@link inflate}. */
  get inflateWorkspace(): number {
    return this.#exports.INFLATE_WORKSPACE.value;
  }

  /**
   * Decompresses a raw deflate stream (RFC 1951) until it ends or `capacity` bytes are there, whatever follows.
   *
   * @param to has room for 8 bytes more than `capacity`
   * @param work {@link inflateWorkspace} bytes
   * @returns the bytes, or -1 where the stream is damaged or cut off before
   */
  inflate(from: number, length: number, to: number, capacity: number, work: number): number {
    return this.#exports.inflate(from, length, to, capacity, work);
  }

  /** XXH3-64 with seed 0. */
  xxh3(pointer: number, length: number): bigint {
    return BigInt.asUintN(64, this.#exports.xxh3(pointer, length));
  }

  /**
   * Zero scan and checksum of a buffer of units (`unit` bytes each, the last one may be short) in one pass. Bit i
   * of the uint32 words at `mask` becomes 1 where unit i is zero, 0 where it has data.
   *
   * @param firstIndex index of the first unit on the drive
   * @returns the sum modulo 2^64 of one leaf per unit: XXH3-64 of LE64(XXH3-64 of the unit), LE64(its index)
   */
  digestUnits(pointer: number, length: number, unit: number, firstIndex: number, mask: number): bigint {
    return BigInt.asUintN(64, this.#exports.digestUnits(pointer, length, unit, BigInt(firstIndex), mask));
  }

  /** Zero units of the last {@link digestUnits}. */
  get zeroUnits(): number {
    return this.#exports.zeroUnits();
  }

  /** As {@link digestUnits} for `count` zero units, the very last of them `last` bytes long. */
  zeroLeaves(unit: number, last: number, firstIndex: number, count: number): bigint {
    return BigInt.asUintN(64, this.#exports.zeroLeaves(unit, last, BigInt(firstIndex), BigInt(count)));
  }

  /** Bitmaps: bit i is bit i & 31 of the uint32 word i >> 5. Changes are atomic. */
  bitmapSet(bitmap: number, start: number, count: number): void {
    this.#exports.bitmapSet(bitmap, start, count);
  }

  bitmapClear(bitmap: number, start: number, count: number): void {
    this.#exports.bitmapClear(bitmap, start, count);
  }

  bitmapTest(bitmap: number, index: number): boolean {
    return this.#exports.bitmapTest(bitmap, index) !== 0;
  }

  /** @returns how many bits this call cleared */
  bitmapTestAndClear(bitmap: number, start: number, count: number): number {
    return this.#exports.bitmapTestAndClear(bitmap, start, count);
  }

  /** @returns the first set bit in [from, end), or -1 */
  bitmapNextSet(bitmap: number, from: number, end: number): number {
    return this.#exports.bitmapNextSet(bitmap, from, end);
  }

  /** @returns the first clear bit in [from, end), or -1 */
  bitmapNextClear(bitmap: number, from: number, end: number): number {
    return this.#exports.bitmapNextClear(bitmap, from, end);
  }

  bitmapCount(bitmap: number, start: number, count: number): number {
    return this.#exports.bitmapCount(bitmap, start, count);
  }

  /** target |= source over `bits` bits. */
  bitmapMerge(target: number, source: number, bits: number): void {
    this.#exports.bitmapMerge(target, source, bits);
  }

  /** Sets every bit of `target` that stands for 2^shift bits of `source` of which one is set. */
  bitmapCoarsen(target: number, source: number, bits: number, shift: number): void {
    this.#exports.bitmapCoarsen(target, source, bits, shift);
  }

  /** Cluster states: two bits each, 32 to a uint64 word: 0 none, 1 todo, 2 busy, 3 done. */
  clustersFill(states: number, start: number, count: number, state: number): void {
    this.#exports.clustersFill(states, start, count, state);
  }

  clusterState(states: number, index: number): number {
    return this.#exports.clusterState(states, index);
  }

  /**
   * Makes the first run of todo clusters in [from, end) busy, at most `max` of them.
   *
   * @returns its first cluster, or -1; {@link claimedCount} says how many
   */
  clustersClaimNext(states: number, from: number, end: number, max: number): number {
    return this.#exports.clustersClaimNext(states, from, end, max);
  }

  /** Makes the todo clusters that begin exactly at `index` busy, up to `end`. @returns how many */
  clustersClaimAt(states: number, index: number, end: number): number {
    return this.#exports.clustersClaimAt(states, index, end);
  }

  /** Clusters of the last claim. */
  get claimedCount(): number {
    return this.#exports.claimedCount();
  }

  /** Takes every cluster of the range from one state to another. @throws Error where one is in another state */
  clustersTransition(states: number, start: number, count: number, from: number, to: number): void {
    if (this.#exports.clustersTransition(states, start, count, from, to) !== 0) return;
    const cluster = this.#exports.offendingCluster();
    throw new Error(
      `cluster invariant: cluster ${cluster} is in state ${this.clusterState(states, cluster)}, not ${from}`,
    );
  }

  /** @returns the first cluster in [from, end) that is in `state`, or -1 */
  clustersNext(states: number, from: number, end: number, state: number): number {
    return this.#exports.clustersNext(states, from, end, state);
  }

  /** @returns the first cluster in [from, end) that is todo or busy, or -1 */
  clustersNextPending(states: number, from: number, end: number): number {
    return this.#exports.clustersNextPending(states, from, end);
  }

  clustersCount(states: number, start: number, count: number, state: number): number {
    return this.#exports.clustersCount(states, start, count, state);
  }

  /** Moves the units whose bit in `skip` is clear to the front. @returns the bytes they take */
  compactUnits(pointer: number, length: number, unit: number, skip: number): number {
    return this.#exports.compactUnits(pointer, length, unit, skip) >>> 0;
  }

  /** @returns the index of the first byte that differs, or -1 */
  firstDifference(a: number, b: number, length: number): number {
    return this.#exports.firstDifference(a, b, length);
  }

  /**
   * The extent that starts at subcluster `index` of a slice of qcow2 L2 entries (big-endian; standard entries are
   * one subcluster each), at most `count` subclusters long. Its kind is in {@link l2Kind}, the place of its first
   * cluster in {@link l2HostOffset}.
   *
   * @param features `L2_FEATURE_*` bits
   * @returns how many subclusters it has
   */
  l2Extent(slice: number, index: number, count: number, clusterBits: number, features: number): number {
    return this.#exports.l2Extent(slice, index, count, clusterBits, features);
  }

  /** One of the `L2_*` kinds. */
  get l2Kind(): number {
    return this.#exports.l2Kind();
  }

  /** Place in the file of the extent's first cluster (compressed: of its data), bytes. */
  get l2HostOffset(): number {
    return this.#exports.l2HostOffset();
  }

  /** Bytes of the file that belong to a compressed cluster at most. */
  get l2CompressedLength(): number {
    return this.#exports.l2CompressedLength();
  }

  /** Whether the extent's clusters have refcount 1 (flag COPIED). */
  get l2Copied(): boolean {
    return this.#exports.l2Copied() !== 0;
  }

  /** First entry from `from` on with refcount 0 in a block of entries of 2^order bits, or -1. */
  refcountFindFree(block: number, from: number, entries: number, order: number): number {
    return this.#exports.refcountFindFree(block, from, entries, order);
  }

  /** How many entries from `from` on have refcount 0, without a gap, at most `max`. */
  refcountFreeRun(block: number, from: number, entries: number, order: number, max: number): number {
    return this.#exports.refcountFreeRun(block, from, entries, order, max);
  }

  /**
   * Says which image the `check…` kernels look at from now on.
   *
   * @param directory of the counters: see assembly/check.ts
   * @param clusters host clusters that have a counter
   * @param most references a cluster may have
   * @param fileBytes length of the file; a reference may end less than a cluster behind it
   */
  checkSetup(
    directory: number,
    clusters: number,
    clusterBits: number,
    extendedL2: boolean,
    hasDataFile: boolean,
    most: number,
    fileBytes: number,
  ): void {
    const flags = [extendedL2 ? 1 : 0, hasDataFile ? 1 : 0] as const;
    this.#exports.checkSetup(directory, clusters, clusterBits, ...flags, most, fileBytes);
  }

  checkResetTotals(): void {
    this.#exports.checkResetTotals();
  }

  /** What {@link checkCountEntries} and the notes have come to since {@link checkResetTotals}. */
  get checkTotals(): CheckTotals {
    return {
      allocated: this.#exports.checkAllocated() >>> 0,
      fragmented: this.#exports.checkFragmented() >>> 0,
      compressed: this.#exports.checkCompressed() >>> 0,
      shared: this.#exports.checkShared() >>> 0,
      uncopied: this.#exports.checkUncopied() >>> 0,
    };
  }

  /** The entries that follow are of another L2 table. */
  checkBeginTable(): void {
    this.#exports.checkBeginTable();
  }

  /** Takes a cluster of data at this place in the file into the totals. */
  checkNoteData(offset: bigint): void {
    this.#exports.checkNoteData(offset);
  }

  checkNoteCompressed(): void {
    this.#exports.checkNoteCompressed();
  }

  /**
   * Counts what the entries [from, end) of an L2 table refer to, each `weight` times.
   *
   * @param note take the clusters into the totals
   * @returns the first entry that was not counted, since something about it is wrong or its counter cannot be used as
   *   it is; `end` where there is none
   */
  checkCountEntries(table: number, from: number, end: number, weight: number, note: boolean): number {
    return this.#exports.checkCountEntries(table, from, end, weight, note ? 1 : 0) >>> 0;
  }

  /**
   * Compares the flags COPIED with the counters, which hold refcounts.
   *
   * @returns the first entry that disagrees or has no counter; `end` where there is none
   */
  checkCopiedFlags(table: number, from: number, end: number): number {
    return this.#exports.checkCopiedFlags(table, from, end) >>> 0;
  }

  /**
   * Compares refcounts, from entry `index` of a block on, with counters.
   *
   * @param block 0: all refcounts are 0
   * @param counters 0: all counters are 0
   * @returns how many agree
   */
  checkRefcounts(
    block: number,
    index: number,
    order: number,
    counters: number,
    wide: boolean,
    entries: number,
  ): number {
    return this.#exports.checkRefcounts(block, index, order, counters, wide ? 1 : 0, entries) >>> 0;
  }

  /** @returns the first counter in [from, entries) that is not 0, or `entries` */
  countersNextUsed(counters: number, wide: boolean, from: number, entries: number): number {
    return this.#exports.countersNextUsed(counters, wide ? 1 : 0, from, entries) >>> 0;
  }

  /** @returns the first counter in [from, entries) that is 0, or `entries` */
  countersNextFree(counters: number, wide: boolean, from: number, entries: number): number {
    return this.#exports.countersNextFree(counters, wide ? 1 : 0, from, entries) >>> 0;
  }

  /** @returns the last counter of `entries` that is not 0, or -1 */
  countersLastUsed(counters: number, wide: boolean, entries: number): number {
    return this.#exports.countersLastUsed(counters, wide ? 1 : 0, entries);
  }
}
