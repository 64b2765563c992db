import { StillframeError } from '../../errors.js';
import type { Arena } from '../../kernels/arena.js';
import type { SnapshotTable } from './listings.js';

/** Ranges of the file, [start, end) in bytes one after the other, in order and apart from each other. */
export type Places = Float64Array;

/** Where a snapshot table and the L1 tables of its snapshots are: no table of the active image refers to them. */
export function placesOfSnapshots({ offset, length, snapshots }: SnapshotTable): Places {
  const l1Tables = snapshots.map(({ l1TableOffset, l1Size }) => ({
    offset: l1TableOffset,
    length: l1Size * 8,
  }));
  const ranges = [{ offset, length }, ...l1Tables]
    .filter((range) => range.length > 0 && Number.isSafeInteger(range.offset + range.length))
    .sort((a, b) => a.offset - b.offset);
  const places: number[] = [];
  for (const range of ranges) {
    const end = range.offset + range.length;
    const last = places.length - 1;
    if (range.offset <= (places[last] ?? -1)) places[last] = Math.max(places[last] ?? 0, end);
    else places.push(range.offset, end);
  }
  return Float64Array.from(places);
}

/** Whether [start, end) has bytes of one of the places. */
export function overlapsPlace(places: Places, start: number, end: number): boolean {
  // The first place that ends behind `start`.
  let low = 0;
  let high = places.length / 2;
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    if ((places[middle * 2 + 1] ?? 0) <= start) low = middle + 1;
    else high = middle;
  }
  return (places[low * 2] ?? Infinity) < end;
}

/**
 * Checks that a table of the active image is in none of the places: what is written to it would be written to a
 * snapshot.
 *
 * @param offset of the table, bytes
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE
 */
export function checkApart(path: string, places: Places, what: string, offset: number, length: number): void {
  if (!overlapsPlace(places, offset, offset + length)) return;
  throw new StillframeError(
    'ERR_STILLFRAME_CORRUPT_IMAGE',
    `'${path}' is damaged: its ${what} at offset ${offset} is in a table of the snapshots, so that it can only be opened read-only; copy it with 'stillframe convert'`,
  );
}

/** A table of entries in the arena, each of which may say where a cluster of metadata is. */
export interface ReferringTable {
  /** For errors: `L1 entry`. */
  readonly what: string;
  /** Arena pointer to big-endian entries of 64 bits. */
  readonly pointer: number;
  readonly entries: number;
  /** Where it is in the file, bytes. */
  readonly offset: number;
}

/**
 * Checks that no two entries of the tables refer to one cluster, nor any to a table of fixed place: what is written to
 * one table would be in another one.
 *
 * @param fixed names the header or table of fixed place that the cluster at an offset overlaps
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE
 */
export function checkNoneShared(
  arena: Arena,
  path: string,
  tables: readonly ReferringTable[],
  fixed: (offset: number) => string | undefined,
): void {
  const damaged = (what: string): StillframeError =>
    new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${path}' is damaged: ${what}, so that it can only be opened read-only; repair it with 'stillframe check --repair all'`,
    );
  const offsets: number[] = [];
  const each = (visit: (offset: number, what: string) => void): void => {
    for (const { what, pointer, entries, offset } of tables) {
      for (let index = 0; index < entries; index++) {
        const at = pointer + index * 8;
        const high = arena.view.getUint32(at) & 0x00ffffff;
        const low = arena.view.getUint32(at + 4) & 0xfffffe00;
        if (high === 0 && low === 0) continue;
        visit(high * 2 ** 32 + (low >>> 0), `${what} ${index} (at offset ${offset + index * 8})`);
      }
    }
  };
  each((offset, what) => {
    const problem = fixed(offset);
    if (problem !== undefined)
      throw damaged(`${what} refers to the cluster at offset ${offset}, which ${problem}`);
    offsets.push(offset);
  });
  const sorted = Float64Array.from(offsets).sort();
  const shared = sorted.find((offset, index) => offset === sorted[index + 1]);
  if (shared === undefined) return;
  const users: string[] = [];
  each((offset, what) => {
    if (offset === shared && users.length < 2) users.push(what);
  });
  throw damaged(`${users.join(' and ')} both refer to the cluster at offset ${shared}`);
}
