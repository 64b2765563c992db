import { StillframeError } from '../../../errors.js';
import type { Runtime } from '../../../kernels/runtime.js';
import type { FileNode } from '../../raw/file.js';
import {
  AUTOCLEAR_BITMAPS,
  AUTOCLEAR_DATA_FILE_RAW,
  EXTENSION_BITMAPS,
  FIELD,
  INCOMPATIBLE_CORRUPT,
  INCOMPATIBLE_DIRTY,
  type Qcow2Header,
  readHeader,
} from '../header.js';
import { RefcountComparison, type Repair } from './compare.js';
import { CopiedFlags } from './copied-flags.js';
import { ReferenceCount, type Totals } from './count.js';
import { CheckedImage } from './image.js';
import { moveSnapshotTable } from './move-snapshot-table.js';
import { rebuildRefcounts } from './rebuild.js';
import { Report } from './report.js';
import { SnapshotTable } from './snapshot-table.js';

/** What is put right: `leaks`, refcounts that are too high; `all`, whatever can be. */
export type RepairMode = 'leaks' | 'all';

/** What one check of an image has found. Offsets are bytes. */
export interface Qcow2Check {
  /** Things that could not be looked at or written. */
  readonly errors: number;
  readonly corruptions: number;
  readonly leaks: number;
  readonly corruptionsFixed: number;
  readonly leaksFixed: number;
  readonly imageEndOffset: number;
  /** Guest clusters of the active image, and how many of them are there, out of line and compressed. */
  readonly totalClusters: number;
  readonly totals: Totals;
}

/**
 * Checks the metadata of an image and repairs what it is told to. The results, the order in which things are looked at
 * and the text of every line are those of `qemu-img check` 7.2, with three differences in repairs: a refcount block at
 * an impossible place is a reason to make the refcount structure anew, not to give up; freed clusters lose their
 * space in the file only where nothing but leaks was wrong; and no table is written to that cannot be one.
 *
 * Whatever is written is written so that a crash leaves the image no worse: entries that refer to nothing any more,
 * then refcounts, then flags, each durable before the next.
 *
 * Memory of the arena: the L1 table (at most 32 MiB), the refcount table (8 MiB), buffers of 1 to 2 MiB and a byte
 * for every cluster near others that are referred to, at most 192 MiB.
 *
 * @param onMessage takes the lines as they come
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE where the image is too damaged to be checked, or has to be
 *   repaired by `all`; …_ARENA_EXHAUSTED, …_IO and what {@link readHeader} throws
 */
export function checkQcow2(
  runtime: Runtime,
  file: FileNode,
  repair: RepairMode | undefined,
  onMessage: (line: string) => void,
): Qcow2Check {
  const header = readHeader(runtime, file, 'check');
  const image = new CheckedImage(runtime, file, header);
  try {
    return new Check(image, repair, onMessage).run();
  } finally {
    image.dispose();
  }
}

/**
 * Makes the refcounts of an image right that was not closed cleanly, as QEMU does before it writes to one.
 *
 * @returns its header as it is then
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE where more than refcounts is wrong
 */
export function repairDirty(runtime: Runtime, file: FileNode): Qcow2Header {
  const { errors, corruptions } = checkQcow2(runtime, file, 'all', () => undefined);
  if (errors + corruptions > 0) {
    throw new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${file.descriptor.path}' was not closed cleanly (dirty bit) and has ${errors + corruptions} errors besides outdated refcounts, which could not be repaired; look at it with 'stillframe check'`,
    );
  }
  return readHeader(runtime, file);
}

const NOTHING: Repair = { leaks: false, errors: false };

class Check {
  readonly #image: CheckedImage;
  readonly #repair: Repair;
  readonly #report: Report;
  #highest = 0;

  constructor(image: CheckedImage, repair: RepairMode | undefined, onMessage: (line: string) => void) {
    this.#image = image;
    this.#repair = { leaks: repair !== undefined, errors: repair === 'all' };
    this.#report = new Report(onMessage);
  }

  run(): Qcow2Check {
    const image = this.#image;
    const report = this.#report;
    this.#warnOfBitmaps();
    const snapshots = new SnapshotTable(image, report, this.#repair.errors);
    try {
      image.snapshotsOffset = snapshots.offset;
      image.snapshotsBytes = snapshots.bytes;
      const totals = this.#refcounts(snapshots);
      if (snapshots.toRepair > 0) {
        moveSnapshotTable(image, snapshots);
        report.corruptionsFixed += snapshots.toRepair;
      }
      this.#finish();
      const { errors, corruptions, leaks, corruptionsFixed, leaksFixed } = report;
      return {
        errors,
        corruptions,
        leaks,
        corruptionsFixed,
        leaksFixed,
        imageEndOffset: (this.#highest + 1) * image.clusterSize,
        totalClusters: Math.ceil(image.header.length / image.clusterSize),
        totals,
      };
    } finally {
      snapshots.dispose();
    }
  }

  #warnOfBitmaps(): void {
    const { header } = this.#image;
    if ((header.autoclearFeatures & AUTOCLEAR_BITMAPS) !== 0n) return;
    if (!header.extensions.some(({ type }) => type === EXTENSION_BITMAPS)) return;
    this.#report.say(
      'warning: a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent',
    );
  }

  /** Counts, compares and repairs. */
  #refcounts(snapshots: SnapshotTable): Totals {
    const image = this.#image;
    const repair = this.#repair;
    const report = this.#report;
    const changing = repair.leaks;
    // The snapshot table is judged on its own.
    const table = report.corruptions;
    const count = new ReferenceCount(image, report, repair);
    count.run(snapshots);
    const before = { corruptions: report.corruptions, leaks: report.leaks };
    const found = this.#compare(NOTHING, changing);
    const wrong = report.corruptions - table + report.leaks;
    if ((count.rebuild || found.rebuild) && changing) {
      this.#rebuild(snapshots, table);
    } else if (changing && wrong > 0) {
      report.corruptions = before.corruptions;
      report.leaks = before.leaks;
      // Entries that were emptied must be so on the disk before their clusters are free.
      image.flush();
      this.#discard(this.#compare(repair, false));
    }
    if (image.changed) image.flush();
    const left = report.errors + report.corruptions - table + report.leaks;
    const flags = repair.errors || (repair.leaks && left === 0);
    const { corruptionsFixed, leaksFixed } = report;
    // Nothing wrong so far, and every refcount is 1: so are the flags, which have all been seen.
    const known = count.allUnique && left + table + corruptionsFixed + leaksFixed === 0;
    if (!known) new CopiedFlags(image, report, flags).run();
    return count.totals;
  }

  #compare(repair: Repair, keep: boolean): RefcountComparison {
    const comparison = new RefcountComparison(this.#image, this.#report, repair, keep);
    comparison.run();
    this.#highest = comparison.highest;
    return comparison;
  }

  /** @param table corruptions of the snapshot table */
  #rebuild(snapshots: SnapshotTable, table: number): void {
    const image = this.#image;
    const report = this.#report;
    if (!this.#repair.errors) {
      report.say('ERROR need to rebuild refcount structures');
      throw new StillframeError(
        'ERR_STILLFRAME_CORRUPT_IMAGE',
        `'${image.path}': more than leaks is wrong and its refcount structure has to be made anew; nothing was repaired; run it with 'check --repair all'`,
      );
    }
    const before = { corruptions: report.corruptions, leaks: report.leaks };
    report.say('Rebuilding refcount structure');
    // What could not be read does not matter any more.
    report.errors = 0;
    image.flush();
    rebuildRefcounts(image);
    report.corruptions = table;
    report.leaks = 0;
    image.references.clear();
    new ReferenceCount(image, report, NOTHING).run(snapshots);
    const counted = { corruptions: report.corruptions, leaks: report.leaks };
    const fixed = { corruptions: report.corruptionsFixed, leaks: report.leaksFixed };
    // Only what the old structure leaves behind: it is not the fault of the image.
    const comparison = this.#compare({ leaks: true, errors: false }, false);
    if (comparison.rebuild) report.say('ERROR rebuilt refcount structure is still broken');
    report.corruptions = counted.corruptions;
    report.leaks = counted.leaks;
    report.corruptionsFixed = fixed.corruptions + Math.max(0, before.corruptions - counted.corruptions);
    report.leaksFixed = fixed.leaks + Math.max(0, before.leaks - counted.leaks);
    this.#discard(comparison);
  }

  /** Gives the space of freed clusters back to the file system, where nothing else was wrong. */
  #discard({ freed }: RefcountComparison): void {
    const image = this.#image;
    const report = this.#report;
    if (freed.length === 0 || report.errors + report.corruptions + report.corruptionsFixed > 0) return;
    image.flush();
    for (let index = 0; index < freed.length; index += 2) {
      const [first = 0, count = 0] = freed.slice(index, index + 2);
      image.file.discard(first * image.clusterSize, count * image.clusterSize);
    }
  }

  /** What a repaired image has in its header. */
  #finish(): void {
    const image = this.#image;
    const { header, buffer, runtime } = image;
    const { view } = runtime.arena;
    if (!this.#repair.leaks || header.version < 3) {
      if (image.changed) image.flush();
      return;
    }
    const sound = this.#report.errors + this.#report.corruptions === 0;
    const marks = header.incompatibleFeatures & (INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
    const known = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW;
    const autoclear = (header.autoclearFeatures & ~known) !== 0n;
    if (sound && marks !== 0n) {
      image.flush();
      view.setBigUint64(buffer, header.incompatibleFeatures & ~marks);
      image.write(FIELD.incompatibleFeatures, buffer, 8);
    }
    if (image.changed && autoclear) {
      view.setBigUint64(buffer, header.autoclearFeatures & known);
      image.write(FIELD.autoclearFeatures, buffer, 8);
    }
    if (image.changed) image.flush();
  }
}
