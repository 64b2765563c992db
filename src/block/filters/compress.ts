import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, CompressDescriptor } from '../node.js';
import { FilterNode } from './filter.js';

/** Writes whole clusters compressed, and parts of clusters as they are (QEMU: `compress`). */
export class CompressNode extends FilterNode {
  readonly #runtime: Runtime;

  constructor(runtime: Runtime, descriptor: CompressDescriptor, child: BlockNode) {
    super(descriptor, child);
    this.#runtime = runtime;
  }

  override write(offset: number, pointer: number, length: number): void {
    const { clusterSize = 1, length: end } = this;
    const whole = offset % clusterSize === 0 && (length % clusterSize === 0 || offset + length === end);
    if (whole && this.child.writeCompressed !== undefined)
      this.child.writeCompressed(offset, pointer, length);
    else this.child.write(offset, pointer, length);
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    const { kernels } = this.#runtime;
    const units = Math.ceil(length / unit);
    for (let first = kernels.bitmapNextClear(skip, 0, units); first >= 0; ) {
      const next = kernels.bitmapNextSet(skip, first, units);
      const end = next < 0 ? units : next;
      const from = first * unit;
      this.write(offset + from, pointer + from, Math.min(end * unit, length) - from);
      first = end < units ? kernels.bitmapNextClear(skip, end, units) : -1;
    }
  }
}
