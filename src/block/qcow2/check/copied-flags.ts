import { COPIED, OFFSET_MASK } from '../entries.js';
import { refcountOf } from './compare.js';
import type { CheckedImage } from './image.js';
import { L2Tables } from './l2-tables.js';
import { hex, type Report } from './report.js';

/** Work of looking at one wrong flag, in bytes read. */
const WRONG_COST = 64;

/**
 * Checks that exactly the entries of the active L1 table and its L2 tables whose cluster has refcount 1 say so (flag
 * COPIED). The counters of the image hold the refcounts of the file.
 */
export class CopiedFlags {
  readonly #image: CheckedImage;
  readonly #report: Report;
  readonly #repair: boolean;
  readonly #tables: L2Tables;

  /** @param repair flags that are wrong are put right */
  constructor(image: CheckedImage, report: Report, repair: boolean) {
    this.#image = image;
    this.#report = report;
    this.#repair = repair;
    this.#tables = new L2Tables(image);
  }

  run(): void {
    const image = this.#image;
    const { header, l1 } = image;
    const { u32, view } = image.runtime.arena;
    image.setUpKernels(image.countedClusters);
    for (let index = 0; index < header.l1Size; index++) {
      const at = l1 + index * 8;
      if (u32[at >> 2] === 0 && u32[(at >> 2) + 1] === 0) continue;
      const entry = view.getBigUint64(at);
      const offset = Number(entry & OFFSET_MASK);
      if (offset === 0) continue;
      const refcount = refcountOf(image, Math.floor(offset / image.clusterSize));
      // Where the refcount is not known, nothing is said of the table either.
      if (refcount === undefined) continue;
      if ((refcount === 1n) !== ((entry & COPIED) !== 0n)) {
        if (!this.#l1Entry(index, entry, refcount)) return;
      }
      if (!this.#table(offset, at, header.l1Size - index)) return;
    }
  }

  /** @returns false where nothing more can be written */
  #l1Entry(index: number, entry: bigint, refcount: bigint): boolean {
    const image = this.#image;
    const text = `OFLAG_COPIED L2 cluster: l1_index=${index} l1_entry=${hex(entry)} refcount=${refcount}`;
    if (!this.#repair) {
      this.#report.corrupt(`ERROR ${text}`);
      return true;
    }
    const { l1TableOffset, l1Size } = image.header;
    const overlap = image.overlap(l1TableOffset, l1Size * 8, 'L1 table');
    if (overlap !== undefined) {
      this.#report.corrupt(`ERROR ${text}`);
      this.#report.errors++;
      this.#report.say(`ERROR: Could not write the L1 table: it overlaps the ${overlap}`);
      return false;
    }
    this.#report.fixed(`Repairing ${text}`);
    const at = image.l1 + index * 8;
    image.runtime.arena.view.setBigUint64(at, refcount === 1n ? entry | COPIED : entry & ~COPIED);
    image.write(l1TableOffset + index * 8, at, 8);
    return true;
  }

  /** @returns false where nothing more can be written */
  #table(offset: number, l1: number, entries: number): boolean {
    const image = this.#image;
    const { l2Entries, clusterSize } = image;
    const { kernels } = image.runtime;
    const table = this.#tables.load(offset, l1, entries);
    if (table < 0) return true;
    // What is not where a table can be may be anything: not to be written to.
    const repair = this.#repair && offset % clusterSize === 0;
    let changed = 0;
    for (let index = 0; index < l2Entries; index++) {
      index = kernels.checkCopiedFlags(table, index, l2Entries);
      if (index >= l2Entries) break;
      if (this.#entry(table + index * image.entryBytes, repair)) changed++;
    }
    if (changed === 0) return true;
    const overlap = image.overlap(offset, clusterSize);
    if (overlap !== undefined) {
      this.#report.corruptions += changed;
      this.#report.errors++;
      this.#report.say(
        `ERROR: Could not write L2 table; metadata overlap check failed: it overlaps the ${overlap}`,
      );
      return false;
    }
    image.write(offset, table, clusterSize);
    this.#report.corruptionsFixed += changed;
    return true;
  }

  /** @returns whether the entry was changed */
  #entry(at: number, repair: boolean): boolean {
    const image = this.#image;
    const { view } = image.runtime.arena;
    const entry = view.getBigUint64(at);
    const offset = entry & OFFSET_MASK;
    const refcount = image.header.hasDataFile
      ? 1n
      : refcountOf(image, Number(offset / BigInt(image.clusterSize)));
    if (refcount === undefined || (refcount === 1n) === ((entry & COPIED) !== 0n)) return false;
    image.spend(WRONG_COST);
    const text = `OFLAG_COPIED data cluster: l2_entry=${hex(entry)} refcount=${refcount}`;
    if (!repair) {
      this.#report.corrupt(`ERROR ${text}`);
      return false;
    }
    this.#report.say(`Repairing ${text}`);
    view.setBigUint64(at, refcount === 1n ? entry | COPIED : entry & ~COPIED);
    return true;
  }
}
