import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, CompressDescriptor } from '../node.js';
import { FilterNode } from './filter.js';
import { eachRun } from './units.js';

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
    eachRun(this.#runtime, length, unit, skip, (start, bytes) =>
      this.write(offset + start, pointer + start, bytes),
    );
  }
}
