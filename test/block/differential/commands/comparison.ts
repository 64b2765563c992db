import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import type { Area } from '../../../support/bitmaps.js';
import { firstDifference } from '../../../support/data.js';
import { allocationOf, differenceOf } from '../../../support/qcow2/qemu.js';
import { Diverged } from '../divergence.js';
import { Look } from './look.js';

/** Folders with the images that a side was told about. */
export const SIDES = ['ours', 'theirs'] as const;

type Bitmaps = ReadonlyMap<string, readonly Area[]>;

/**
 * Compares every image of both sides as QEMU sees them.
 *
 * @param folder of the folders of both sides, and of `made` with the images as they were before
 * @param copied more or less may be allocated: QEMU copies in other pieces than we do
 */
export function compareSides(folder: string, copied: boolean): void {
  const [ours = [], theirs = []] = SIDES.map((side) =>
    readdirSync(join(folder, side))
      .filter((name) => !name.endsWith('.data'))
      .sort(),
  );
  same('files', 'files', ours, theirs);
  for (const name of ours) new Comparison(folder, name).run(copied);
}

class Comparison {
  readonly #folder: string;
  readonly #name: string;
  readonly #ours: Look;
  readonly #theirs: Look;

  constructor(folder: string, name: string) {
    this.#folder = folder;
    this.#name = name;
    this.#ours = new Look(join(folder, 'ours'), name);
    this.#theirs = new Look(join(folder, 'theirs'), name);
  }

  run(copied: boolean): void {
    const [name, ours, theirs] = [this.#name, this.#ours, this.#theirs];
    same('info', `info of ${name}`, ours.description(), theirs.description());
    this.#compareContents();
    // QEMU writes zeroes at the start of a raw file that it makes.
    if (!copied && name !== 'new.raw') {
      const different = differenceOf(allocationOf(ours.map()), allocationOf(theirs.map()));
      if (different !== undefined) throw new Diverged('map', `${name}: ${different}`);
    }
    if (ours.info.format === 'raw') return;
    const [check, other] = [ours.check(), theirs.check()];
    // Refcounts that are put right by whoever writes next say nothing yet.
    const counted = ours.info['dirty-flag'] === true ? [] : ['corruptions', 'leaks'];
    for (const key of counted) {
      // QEMU leaks clusters where a snapshot fails.
      const [own = 0, most = 0] = [check[key], other[key]];
      if (own > most) throw new Diverged('check', `${name} has ${own} ${key}, with QEMU ${most}`);
    }
    const counts = copied ? [] : ['allocated-clusters', 'compressed-clusters'];
    for (const key of counts) same('check', `${key} of ${name}`, check[key], other[key]);
    for (const snapshot of ours.snapshots()) this.#compareContents(snapshot);
    const [bitmaps, others] = [ours.bitmaps(), theirs.bitmaps()];
    if (copied && existsSync(join(this.#folder, 'made', name))) this.#expectMarked(bitmaps, others);
    else same('bitmaps', `bitmaps of ${name}`, [...bitmaps], [...others]);
  }

  #content(look: Look, snapshot?: string): Buffer {
    return look.content(join(this.#folder, 'content'), snapshot);
  }

  #compareContents(snapshot?: string): void {
    const content = this.#content(this.#ours, snapshot);
    const where = `${this.#name} ${snapshot ?? ''}`;
    const at = firstDifference(content, this.#content(this.#theirs, snapshot));
    if (at >= 0) throw new Diverged('content', `${where} differs at byte ${at}`);
    const dataFile = snapshot === undefined ? this.#ours.rawDataFile() : undefined;
    if (dataFile === undefined) return;
    // It ends with a whole cluster.
    const alone = firstDifference(content, readFileSync(dataFile).subarray(0, content.length));
    if (alone >= 0) throw new Diverged('content', `${where} is not its raw data file at byte ${alone}`);
  }

  /** Each copies in pieces of its own and leaves alone what is the same; whatever is different now is dirty. */
  #expectMarked(bitmaps: Bitmaps, others: Bitmaps): void {
    const before = this.#content(new Look(join(this.#folder, 'made'), this.#name));
    const after = this.#content(this.#ours);
    for (const [bitmap, areas] of others) {
      const marked = Buffer.alloc(after.length);
      for (const { offset, length } of bitmaps.get(bitmap) ?? []) marked.fill(1, offset, offset + length);
      for (const { offset, length } of areas) {
        const end = Math.min(offset + length, before.length);
        for (let at = offset; at < end; at++) {
          if (before[at] === after[at] || marked[at] === 1) continue;
          throw new Diverged('bitmaps', `byte ${at} of ${this.#name} is not dirty in '${bitmap}'`);
        }
      }
    }
  }
}

function same(kind: string, what: string, ours: unknown, theirs: unknown): void {
  if (isDeepStrictEqual(ours, theirs)) return;
  throw new Diverged(kind, `${what}\n  ours: ${JSON.stringify(ours)}\n  QEMU: ${JSON.stringify(theirs)}`);
}
