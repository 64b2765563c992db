import type { BitmapSet } from '../../bitmap/bitmap-set.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, Extent, NodeDescriptor } from '../node.js';

/**
 * Records every change of a node in its dirty bitmaps. A range becomes dirty once the change was made: whoever takes
 * dirty ranges out of a bitmap and reads them afterwards misses no change. It becomes dirty even when the change failed,
 * since a part of it may have been made.
 */
export class RecordDirty implements BlockNode {
  readonly descriptor: NodeDescriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly clusterSize: number | undefined;
  readonly backing: BlockNode | undefined;
  readonly #runtime: Runtime;
  readonly #node: Required<Omit<BlockNode, 'hostRange' | 'event' | 'unrecorded'>>;
  readonly #bitmaps: BitmapSet;

  constructor(
    runtime: Runtime,
    node: Required<Omit<BlockNode, 'hostRange' | 'event' | 'unrecorded'>>,
    bitmaps: BitmapSet,
  ) {
    this.descriptor = node.descriptor;
    this.length = node.length;
    this.readOnly = node.readOnly;
    this.clusterSize = node.clusterSize;
    this.backing = node.backing;
    this.#runtime = runtime;
    this.#node = node;
    this.#bitmaps = bitmaps;
  }

  get unrecorded(): BlockNode {
    return this.#node;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#node.read(offset, pointer, length);
  }

  write(offset: number, pointer: number, length: number): void {
    try {
      this.#node.write(offset, pointer, length);
    } finally {
      this.#bitmaps.record(offset, length);
    }
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    try {
      this.#node.writeUnits(offset, pointer, length, unit, skip);
    } finally {
      if (!this.#bitmaps.empty) this.#recordUnits(offset, length, unit, skip);
    }
  }

  writeCompressed(offset: number, pointer: number, length: number): void {
    try {
      this.#node.writeCompressed(offset, pointer, length);
    } finally {
      this.#bitmaps.record(offset, length);
    }
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    try {
      this.#node.writeZeroes(offset, length, mayUnmap);
    } finally {
      this.#bitmaps.record(offset, length);
    }
  }

  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    let changed = true;
    try {
      changed = this.#node.writeZeroesFast(offset, length, mayUnmap);
      return changed;
    } finally {
      if (changed) this.#bitmaps.record(offset, length);
    }
  }

  discard(offset: number, length: number): void {
    try {
      this.#node.discard(offset, length);
    } finally {
      this.#bitmaps.record(offset, length);
    }
  }

  flush(): void {
    this.#node.flush();
  }

  status(offset: number, length: number): Extent {
    return this.#node.status(offset, length);
  }

  /** The units whose bit in `skip` is clear. */
  #recordUnits(offset: number, length: number, unit: number, skip: number): void {
    const { kernels } = this.#runtime;
    const units = Math.ceil(length / unit);
    for (let first = kernels.bitmapNextClear(skip, 0, units); first >= 0; ) {
      const next = kernels.bitmapNextSet(skip, first, units);
      const end = next < 0 ? units : next;
      const start = first * unit;
      this.#bitmaps.record(offset + start, Math.min(length, end * unit) - start);
      first = next < 0 ? -1 : kernels.bitmapNextClear(skip, next, units);
    }
  }
}
