import { COMPRESSED, COPIED, OFFSET_MASK } from '../entries.js';
import { MAX_L1_BYTES } from '../header.js';
import { BitmapReferences } from './bitmap-references.js';
import type { Repair } from './compare.js';
import {
  ALLOCATED_SUBCLUSTERS,
  type CheckedImage,
  L1_RESERVED_MASK,
  L2_RESERVED_MASK,
  REFCOUNT_TABLE_OFFSET_MASK,
  REFCOUNT_TABLE_RESERVED_MASK,
  ZERO_FLAG,
} from './image.js';
import { L2Tables } from './l2-tables.js';
import { Recurrences } from './references.js';
import { hex, prefixedHex, type Report } from './report.js';
import type { SnapshotTable } from './snapshot-table.js';

/** Clusters the active image has, and how they lie in the file. */
export interface Totals {
  allocated: number;
  fragmented: number;
  compressed: number;
}

/** Bytes of the L1 table of a snapshot that are read at a time. */
const PIECE_BYTES = 256 * 1024;
/** Work of counting one cluster of a table that the header names, in bytes read. */
const COUNT_COST = 64;
/** Work of looking at one wrong entry, in bytes read. */
const WRONG_COST = 512;

/**
 * Counts every reference an image makes to the clusters of its file, in the order in which QEMU does it, and reports
 * what is wrong with a reference in itself.
 *
 * An L2 table that several L1 entries share, as snapshots do, is walked once and then counted as often as it was met,
 * where nothing is wrong with it. A table with something wrong is walked and reported every time.
 */
export class ReferenceCount {
  /** A refcount block is not where one can be: the refcount structure has to be made anew. */
  rebuild = false;
  /** Every cluster that is referred to has one reference, and every entry says so. */
  allUnique = false;
  readonly totals: Totals = { allocated: 0, fragmented: 0, compressed: 0 };
  readonly #image: CheckedImage;
  readonly #report: Report;
  readonly #repair: Repair;
  readonly #tables: L2Tables;
  /** Active entries without the flag COPIED that the kernel does not count. */
  #uncopied = 0;
  readonly #again = new Recurrences();

  /** @param repair entries and blocks that can be put right at once are; the rest is for the comparison that follows */
  constructor(image: CheckedImage, report: Report, repair: Repair) {
    this.#image = image;
    this.#report = report;
    this.#repair = repair;
    this.#tables = new L2Tables(image);
  }

  run(snapshots: SnapshotTable): void {
    const image = this.#image;
    const { header } = image;
    const { kernels } = image.runtime;
    image.setUpKernels(image.references.clusters);
    kernels.checkResetTotals();
    this.#refer(0, image.clusterSize);
    this.#refer(header.l1TableOffset, header.l1Size * 8);
    this.#walkL1(image.l1, header.l1Size, true);
    this.#snapshots(snapshots);
    this.#refer(snapshots.offset, snapshots.bytes);
    this.#refer(image.refcountTableOffset, image.refcountTableEntries * 8);
    new BitmapReferences(image, this.#report, this.#repair.leaks, (offset, length) =>
      this.#referTo(offset, length, 1),
    ).run();
    this.#countAgain();
    this.#refcountBlocks();
    const noted = kernels.checkTotals;
    this.totals.allocated += noted.allocated;
    this.totals.fragmented += noted.fragmented;
    this.totals.compressed += noted.compressed;
    this.allUnique = noted.shared + noted.uncopied + image.references.shared + this.#uncopied === 0;
  }

  /**
   * Counts a reference to a range of the file.
   *
   * @returns false where something is wrong with it, which has been reported
   */
  #refer(offset: number, length: number): boolean {
    return length === 0 || this.#referTo(BigInt(offset), length, 1);
  }

  #referTo(offset: bigint, length: number, weight: number): boolean {
    const image = this.#image;
    const { clusterSize } = image;
    if (offset + BigInt(length) >= BigInt(image.file.length) + BigInt(clusterSize)) {
      this.#report.corruptions += weight;
      this.#report.say(
        `ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x${hex(offset)} size 0x${hex(length)}`,
      );
      return false;
    }
    const first = Math.floor(Number(offset) / clusterSize);
    const last = Math.floor((Number(offset) + length - 1) / clusterSize);
    let sound = true;
    image.spend((last - first) * COUNT_COST);
    for (let cluster = first; cluster <= last; cluster++) {
      const over = image.references.add(cluster, weight);
      if (over === 0) continue;
      sound = false;
      this.#report.corruptions += over;
      this.#report.say(`ERROR: overflow cluster offset=0x${hex(cluster * clusterSize)}`);
      this.#report.say(
        'Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing',
      );
    }
    return sound;
  }

  // ---- L1 and L2 tables ---------------------------------------------------------------------------------------

  /** @param table in the arena, `entries` entries long */
  #walkL1(table: number, entries: number, active: boolean): void {
    const { u32, view } = this.#image.runtime.arena;
    for (let index = 0; index < entries; index++) {
      const at = table + index * 8;
      if (u32[at >> 2] === 0 && u32[(at >> 2) + 1] === 0) continue;
      const high = view.getUint32(at);
      const low = view.getUint32(at + 4);
      if ((high & 0x7f000000) !== 0 || (low & 0x1ff) !== 0) {
        const entry = view.getBigUint64(at);
        if ((entry & L1_RESERVED_MASK) !== 0n) {
          this.#report.corrupt(`ERROR found L1 entry with reserved bits set: ${hex(entry)}`);
        }
      }
      if (active && (high & 0x80000000) === 0) this.#uncopied++;
      const offset = (high & 0x00ffffff) * 0x100000000 + ((low & 0xfffffe00) >>> 0);
      this.#l2Table(offset, active, at, entries - index);
    }
  }

  #l2Table(offset: number, active: boolean, l1: number, entries: number): void {
    const image = this.#image;
    const { clusterSize, references } = image;
    const counted = this.#refer(offset, clusterSize);
    const aligned = offset % clusterSize === 0;
    if (!aligned) {
      this.#report.corrupt(
        `ERROR l2_offset=${hex(offset)}: Table is not cluster aligned; L1 entry corrupted`,
      );
    }
    const known = counted && aligned ? offset / clusterSize : -1;
    if (known >= 0 && references.isMarked(known)) {
      this.#again.add(known, active);
      return;
    }
    const table = this.#tables.load(offset, l1, entries);
    const sound = table < 0 || this.#walkL2(table, offset, 1, active);
    if (sound && known >= 0) references.mark(known);
  }

  /** @returns false where something was wrong with an entry */
  #walkL2(table: number, offset: number, weight: number, note: boolean): boolean {
    const { runtime, l2Entries } = this.#image;
    const { kernels } = runtime;
    let sound = true;
    kernels.checkBeginTable();
    for (let index = 0; index < l2Entries; index++) {
      index = kernels.checkCountEntries(table, index, l2Entries, weight, note);
      if (index >= l2Entries) break;
      if (!this.#entry(table, offset, index, weight, note)) {
        sound = false;
        this.#image.spend(WRONG_COST);
      }
    }
    return sound;
  }

  /** Looks closely at an entry that the kernel did not count. @returns whether it is sound all the same */
  #entry(table: number, tableOffset: number, index: number, weight: number, note: boolean): boolean {
    const { arena } = this.#image.runtime;
    const at = table + index * this.#image.entryBytes;
    const entry = arena.view.getBigUint64(at);
    const bitmap = this.#image.header.extendedL2 ? arena.view.getBigUint64(at + 8) : 0n;
    if ((entry & COMPRESSED) !== 0n) return this.#compressedEntry(entry, bitmap, index, weight, note);
    let sound = true;
    if ((entry & L2_RESERVED_MASK) !== 0n) {
      sound = false;
      this.#report.corrupt(`ERROR found l2 entry with reserved bits set: ${hex(entry)}`);
    }
    const { extendedL2, hasDataFile } = this.#image.header;
    const offset = entry & OFFSET_MASK;
    if (offset === 0n && !extendedL2 && (entry & ZERO_FLAG) !== 0n) return sound;
    if (offset === 0n && !(hasDataFile && (entry & COPIED) !== 0n)) {
      if ((bitmap & ALLOCATED_SUBCLUSTERS) === 0n) return sound;
      this.#report.corrupt('ERROR: Unallocated cluster has non-zero subcluster allocation map');
      return false;
    }
    if (((bitmap >> 32n) & bitmap) !== 0n) {
      sound = false;
      this.#report.corrupt(
        `ERROR offset=${hex(offset)}: Allocated cluster has corrupted subcluster allocation bitmap`,
      );
    }
    if (offset % BigInt(this.#image.clusterSize) !== 0n) {
      sound = false;
      const hasData = extendedL2 ? (bitmap & ALLOCATED_SUBCLUSTERS) !== 0n : (entry & ZERO_FLAG) === 0n;
      if (this.#unaligned(offset, hasData, tableOffset, index, at)) return false;
    }
    if (note) {
      this.#image.runtime.kernels.checkNoteData(offset);
      if ((entry & COPIED) === 0n) this.#uncopied++;
    }
    if (hasDataFile) return sound;
    return this.#referTo(offset, this.#image.clusterSize, weight) && sound;
  }

  #compressedEntry(entry: bigint, bitmap: bigint, index: number, weight: number, note: boolean): boolean {
    const { header, runtime } = this.#image;
    const x = BigInt(62 - (header.clusterBits - 8));
    const offset = entry & ((1n << x) - 1n);
    let sound = true;
    if ((entry & COPIED) !== 0n) {
      sound = false;
      this.#report.corrupt(
        `ERROR: coffset=0x${hex(offset)}: copied flag must never be set for compressed clusters`,
      );
    }
    const rest = hex(entry & ~COPIED);
    if (header.hasDataFile) {
      this.#report.corrupt(`ERROR compressed cluster ${index} with data file, entry=0x${rest}`);
      return false;
    }
    if (bitmap !== 0n) {
      this.#report.corrupt(
        `ERROR compressed cluster ${index} with non-zero subcluster allocation bitmap, entry=0x${rest}`,
      );
      // The data is still what the guest reads: a repair must not free it. QEMU's does.
      sound = false;
    }
    const sectors = Number((entry & (COMPRESSED - 1n)) >> x) + 1;
    const counted = this.#referTo(offset, sectors * 512 - Number(offset & 511n), weight);
    if (note) runtime.kernels.checkNoteCompressed();
    return counted && sound;
  }

  /**
   * Reports an entry with an offset inside of a cluster.
   *
   * @returns whether the entry could be emptied, since nothing but zeroes was there to lose
   */
  #unaligned(offset: bigint, hasData: boolean, tableOffset: number, index: number, at: number): boolean {
    const what = hasData ? 'Data' : 'Preallocated';
    const text = `offset=${hex(offset)}: ${what} cluster is not properly aligned; L2 entry corrupted.`;
    if (hasData || !this.#repair.errors) {
      this.#report.corrupt(`ERROR ${text}`);
      return false;
    }
    const { entryBytes, header, runtime } = this.#image;
    const place = tableOffset + index * entryBytes;
    const overlap = this.#image.overlap(place, entryBytes);
    if (overlap !== undefined) {
      this.#report.corrupt(`ERROR ${text}`);
      this.#report.say(
        `ERROR: the L2 table at ${tableOffset} overlaps the ${overlap}, nothing is written there`,
      );
      return false;
    }
    this.#report.fixed(`Repairing ${text}`);
    const { view } = runtime.arena;
    view.setBigUint64(at, header.extendedL2 ? 0n : ZERO_FLAG);
    if (header.extendedL2) view.setBigUint64(at + 8, 0xffffffff00000000n);
    this.#image.write(place, at, entryBytes);
    return true;
  }

  /** Walks the tables that were met again as often as they were. */
  #countAgain(): void {
    const { clusterSize, runtime } = this.#image;
    this.#again.forEach((cluster, count, active) => {
      const offset = cluster * clusterSize;
      const table = this.#tables.load(offset, 0, 1);
      if (table < 0) return;
      const before = runtime.kernels.checkTotals;
      this.#walkL2(table, offset, count, active > 0);
      const after = runtime.kernels.checkTotals;
      // The totals have taken it in once.
      const times = Math.max(0, active - 1);
      this.totals.allocated += (after.allocated - before.allocated) * times;
      this.totals.fragmented += (after.fragmented - before.fragmented) * times;
      this.totals.compressed += (after.compressed - before.compressed) * times;
    });
  }

  // ---- Snapshots ----------------------------------------------------------------------------------------------

  #snapshots(snapshots: SnapshotTable): void {
    const { header, clusterSize } = this.#image;
    if (header.hasDataFile && snapshots.count > 0) {
      this.#report.corrupt(`ERROR ${snapshots.count} snapshots in image with data file`);
    }
    for (let index = 0; index < snapshots.count; index++) {
      const offset = snapshots.l1Offset(index);
      const size = snapshots.l1Size(index);
      const problem =
        offset % BigInt(clusterSize) !== 0n
          ? `l1_offset=${prefixedHex(offset)}: L1 table is not cluster aligned`
          : size * 8 > MAX_L1_BYTES
            ? `l1_size=${prefixedHex(size)}: L1 table is too large`
            : undefined;
      if (problem === undefined) {
        this.#snapshotL1(offset, size);
      } else {
        const name = `${snapshots.id(index)} (${snapshots.name(index)})`;
        this.#report.corrupt(`ERROR snapshot ${name} ${problem}; snapshot table entry corrupted`);
      }
    }
  }

  #snapshotL1(offset: bigint, size: number): void {
    if (size === 0) return;
    this.#referTo(offset, size * 8, 1);
    const { runtime, path } = this.#image;
    const bytes = size * 8;
    const pointer = runtime.arena.alloc(Math.min(bytes, PIECE_BYTES), `L1 table of a snapshot of '${path}'`);
    try {
      for (let done = 0; done < bytes; done += PIECE_BYTES) {
        const piece = Math.min(PIECE_BYTES, bytes - done);
        if (this.#image.read(Number(offset) + done, pointer, piece)) this.#walkL1(pointer, piece / 8, false);
      }
    } finally {
      runtime.arena.free(pointer);
    }
  }

  // ---- Refcount blocks ----------------------------------------------------------------------------------------

  #refcountBlocks(): void {
    const image = this.#image;
    const { clusterSize } = image;
    const { u32 } = image.runtime.arena;
    for (let index = 0; index < image.refcountTableEntries; index++) {
      const word = (image.refcountTable + index * 8) >> 2;
      if (u32[word] === 0 && u32[word + 1] === 0) continue;
      const entry = image.refcountTableEntry(index);
      const offset = entry & REFCOUNT_TABLE_OFFSET_MASK;
      if ((entry & REFCOUNT_TABLE_RESERVED_MASK) !== 0n) {
        this.#report.corrupt(`ERROR refcount table entry ${index} has reserved bits set`);
        this.rebuild = true;
      } else if (offset % BigInt(clusterSize) !== 0n) {
        this.#report.corrupt(
          `ERROR refcount block ${index} is not cluster aligned; refcount table entry corrupted`,
        );
        this.rebuild = true;
      } else if (offset >= BigInt(image.clusters * clusterSize)) {
        this.#blockOutside(index, offset);
      } else {
        this.#refer(Number(offset), clusterSize);
        const references = image.references.get(Number(offset) / clusterSize);
        if (references === 1) continue;
        this.#report.corrupt(`ERROR refcount block ${index} refcount=${references}`);
        this.rebuild = true;
      }
    }
  }

  #blockOutside(index: number, offset: bigint): void {
    const image = this.#image;
    const text = `refcount block ${index} is outside image`;
    if (!this.#repair.errors) {
      this.#report.corrupt(`ERROR ${text}`);
      return;
    }
    const end = offset + BigInt(image.clusterSize);
    if (end <= BigInt(Number.MAX_SAFE_INTEGER) && image.grow(Number(end))) {
      this.#report.fixed(`Repairing ${text}`);
      this.#refer(Number(offset), image.clusterSize);
      return;
    }
    this.#report.corrupt(`Repairing ${text}`);
    const reason = end > 2n ** 63n - 1n ? 'Invalid argument' : 'File too large';
    this.#report.say(`ERROR could not resize image: ${reason}`);
    this.rebuild = true;
  }
}
