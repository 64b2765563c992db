import { dirname } from 'node:path';
import type { DirtyBitmap } from '#src/bitmap/dirty-bitmap.js';
import { run } from './peers.js';

/** A dirty area of a drive, bytes. */
export interface Area {
  readonly offset: number;
  readonly length: number;
}

/** The dirty areas of a bitmap in memory. */
export function areasOf(bitmap: DirtyBitmap): Area[] {
  const areas: Area[] = [];
  for (let from = 0; from < bitmap.length; ) {
    const area = bitmap.nextDirty(from);
    if (area === undefined) break;
    areas.push(area);
    from = area.offset + area.length;
  }
  return areas;
}

/** The dirty areas of a persistent bitmap as QEMU reads it. */
export function dirtyInQemu(path: string, name: string): Area[] {
  const server = ['qemu-nbd', '-r', '-f', 'qcow2', '-B', name, path];
  const args = ['--json', `--map=qemu:dirty-bitmap:${name}`, '--', '[', ...server, ']'];
  const answer = run('nbdinfo', args, [0], dirname(path));
  const extents: { offset: number; length: number; type: number }[] = JSON.parse(answer);
  return joined(extents.filter(({ type }) => type !== 0));
}

/** Areas with neighbours joined. */
export function joined(areas: readonly Area[]): Area[] {
  const all: { offset: number; length: number }[] = [];
  for (const { offset, length } of areas) {
    const last = all.at(-1);
    if (last !== undefined && last.offset + last.length === offset) last.length += length;
    else all.push({ offset, length });
  }
  return all;
}

/** What a dirty bitmap should say: a drive of bytes, each clean or dirty. */
export class DirtyModel {
  readonly length: number;
  readonly granularity: number;
  readonly #granules: Uint8Array;

  constructor(length: number, granularity: number) {
    this.length = length;
    this.granularity = granularity;
    this.#granules = new Uint8Array(Math.ceil(length / granularity));
  }

  mark(offset: number, length: number): void {
    if (length === 0) return;
    const first = Math.floor(offset / this.granularity);
    this.#granules.fill(1, first, Math.ceil((offset + length) / this.granularity));
  }

  clear(): void {
    this.#granules.fill(0);
  }

  merge(source: DirtyModel): void {
    for (const { offset, length } of source.areas()) this.mark(offset, length);
  }

  areas(): Area[] {
    const all: Area[] = [];
    this.#granules.forEach((dirty, index) => {
      const offset = index * this.granularity;
      if (dirty !== 0) all.push({ offset, length: Math.min(this.granularity, this.length - offset) });
    });
    return joined(all);
  }

  /** Whether the byte is in a dirty granule. */
  has(offset: number): boolean {
    return this.#granules[Math.floor(offset / this.granularity)] === 1;
  }
}
