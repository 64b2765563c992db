import { storeRefcount } from '../refcount-entry.js';
import { type CheckedImage, REFCOUNT_TABLE_OFFSET_MASK } from './image.js';
import type { Counters } from './references.js';
import { hex, prefixedHex, type Report } from './report.js';

/** What a comparison may put right. */
export interface Repair {
  /** Refcounts that are too high. */
  readonly leaks: boolean;
  /** Refcounts that are too low, flags, entries. */
  readonly errors: boolean;
}

/** Bytes of a refcount block that are looked at at a time. */
const PIECE_BYTES = 1024 * 1024;
/** Work of looking at one wrong refcount, in bytes read. */
const WRONG_COST = 64;

/** Compares the refcounts in the file with the references that were counted. */
export class RefcountComparison {
  /** A cluster in use has refcount 0: the refcount structure has to be made anew. */
  rebuild = false;
  /** The last cluster with a refcount or a reference. */
  highest = 0;
  /** Clusters that have lost their last refcount, as runs of { first, count }. */
  readonly freed: number[] = [];
  readonly #image: CheckedImage;
  readonly #report: Report;
  readonly #repair: Repair;
  readonly #keep: boolean;

  /** @param keep the counters stay as they are; otherwise they hold the refcounts of the file afterwards */
  constructor(image: CheckedImage, report: Report, repair: Repair, keep: boolean) {
    this.#image = image;
    this.#report = report;
    this.#repair = repair;
    this.#keep = keep;
  }

  run(): void {
    const image = this.#image;
    const { clusterSize, perBlock } = image;
    const end = image.countedClusters;
    let signalled = false;
    for (let block = 0; block * perBlock < end; ) {
      const first = block * perBlock;
      if (block >= image.refcountTableEntries) {
        this.#withoutBlock(first, end);
        break;
      }
      const last = Math.min(end, first + perBlock);
      const offset = image.refcountTableEntry(block) & REFCOUNT_TABLE_OFFSET_MASK;
      if (offset % BigInt(clusterSize) !== 0n) {
        if (!signalled) this.#signal(offset, block);
        signalled = true;
        this.#unreadable(first, last);
      } else if (offset === 0n || offset >= BigInt(image.file.length)) {
        this.#withoutBlock(first, last);
      } else {
        this.#block(Number(offset), first, last);
      }
      block++;
    }
  }

  #signal(offset: bigint, block: number): void {
    this.#report.say(
      `qcow2: Image is corrupt: Refblock offset 0x${hex(offset)} unaligned (reftable index: ${prefixedHex(block)}); further non-fatal corruption events will be suppressed`,
    );
  }

  #unreadable(first: number, end: number): void {
    for (let cluster = first; cluster < end; cluster++) {
      this.#report.errors++;
      this.#report.say(`Can't get refcount for cluster ${cluster}: Input/output error`);
    }
  }

  /** All refcounts of the clusters [first, end) are 0. */
  #withoutBlock(first: number, end: number): void {
    this.#image.references.forEachPiece(first, end, (cluster, count, counters) => {
      if (counters.pointer !== 0) this.#compare(cluster, count, counters, 0, 0);
      return undefined;
    });
  }

  #block(offset: number, first: number, end: number): void {
    const image = this.#image;
    const { refcountBits } = image.header;
    const perPiece = Math.min(image.perBlock, (PIECE_BYTES * 8) / refcountBits);
    for (let from = first; from < end; from += perPiece) {
      const stop = Math.min(end, from + perPiece);
      const place = offset + ((from - first) * refcountBits) / 8;
      const bytes = Math.ceil(((stop - from) * refcountBits) / 8);
      if (!image.read(place, image.buffer, bytes)) {
        this.#withoutBlock(from, stop);
        continue;
      }
      let changed = false;
      image.references.forEachPiece(from, stop, (cluster, count, counters) => {
        if (this.#compare(cluster, count, counters, image.buffer, cluster - from)) changed = true;
        return undefined;
      });
      if (changed) image.write(place, image.buffer, bytes);
    }
  }

  /**
   * Compares `count` counters with the refcounts from entry `index` of the block in memory on.
   *
   * @returns whether the block in memory was changed
   */
  #compare(cluster: number, count: number, counters: Counters, block: number, index: number): boolean {
    const { kernels } = this.#image.runtime;
    const { refcountOrder } = this.#image.header;
    const step = counters.wide ? 4 : 1;
    let changed = false;
    let at = 0;
    // The counters may move when one of them gets wider.
    let now = counters;
    while (at < count) {
      const pointer = now.pointer === 0 ? 0 : now.pointer + at * (now.wide ? 4 : step);
      at += kernels.checkRefcounts(block, index + at, refcountOrder, pointer, now.wide, count - at);
      if (at >= count) break;
      if (this.#mismatch(cluster + at, block, index + at)) changed = true;
      at++;
      if (!this.#keep) now = this.#image.references.at(cluster);
    }
    if (now.pointer !== 0) {
      const used = kernels.countersLastUsed(now.pointer, now.wide, count);
      if (used >= 0) this.highest = Math.max(this.highest, cluster + used);
    }
    return changed;
  }

  /** @returns whether the block in memory was changed */
  #mismatch(cluster: number, block: number, index: number): boolean {
    const image = this.#image;
    const { references, header } = image;
    const { arena } = image.runtime;
    const stored = block === 0 ? 0n : exactRefcount(image, block, index);
    const counted = references.get(cluster);
    this.highest = Math.max(this.highest, cluster);
    image.spend(WRONG_COST);
    const low = stored < BigInt(counted);
    if (stored === 0n) this.rebuild = true;
    const fixes = stored !== 0n && (low ? this.#repair.errors : this.#repair.leaks);
    const what = fixes ? 'Repairing' : low ? 'ERROR' : 'Leaked';
    this.#report.say(`${what} cluster ${cluster} refcount=${stored} reference=${counted}`);
    if (fixes) {
      storeRefcount(arena, block, index, header.refcountOrder, counted);
      if (low) this.#report.corruptionsFixed++;
      else this.#report.leaksFixed++;
      if (counted === 0) this.#free(cluster);
      return true;
    }
    if (low) this.#report.corruptions++;
    else this.#report.leaks++;
    if (!this.#keep) references.set(cluster, Number(stored));
    return false;
  }

  #free(cluster: number): void {
    const { freed } = this;
    const [first = 0, count = 0] = freed.slice(-2);
    if (freed.length > 0 && first + count === cluster) freed[freed.length - 1] = count + 1;
    else freed.push(cluster, 1);
  }
}

/** A refcount of a block in memory, exact for all widths. */
function exactRefcount(image: CheckedImage, block: number, index: number): bigint {
  const { view } = image.runtime.arena;
  const { refcountBits } = image.header;
  switch (refcountBits) {
    case 64:
      return view.getBigUint64(block + index * 8);
    case 32:
      return BigInt(view.getUint32(block + index * 4));
    case 16:
      return BigInt(view.getUint16(block + index * 2));
    default: {
      const bit = index * refcountBits;
      return BigInt((view.getUint8(block + (bit >> 3)) >> (bit & 7)) & (2 ** refcountBits - 1));
    }
  }
}

/**
 * The refcount of a cluster after a comparison that left the refcounts of the file in the counters.
 *
 * @returns undefined where its refcount block cannot be read
 */
export function refcountOf(image: CheckedImage, cluster: number): bigint | undefined {
  const { perBlock, clusterSize, references, runtime } = image;
  const { refcountBits } = image.header;
  const offset = image.refcountTableEntry(Math.floor(cluster / perBlock)) & REFCOUNT_TABLE_OFFSET_MASK;
  if (offset % BigInt(clusterSize) !== 0n) return undefined;
  if (offset === 0n || offset >= BigInt(image.file.length)) return 0n;
  if (cluster < image.countedClusters) {
    const known = references.get(cluster);
    // Larger ones may have been too large for their counter.
    if (known < 255) return BigInt(known);
  }
  const bit = (cluster % perBlock) * refcountBits;
  const pointer = runtime.arena.alloc(8, `a refcount of '${image.path}'`);
  try {
    image.file.read(Number(offset) + Math.floor(bit / 64) * 8, pointer, 8);
    return exactRefcount(image, pointer, (bit % 64) / refcountBits);
  } finally {
    runtime.arena.free(pointer);
  }
}
