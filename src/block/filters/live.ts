import type { Disk } from '../disk.js';
import type { LiveDescriptor } from '../node.js';
import { FilterNode } from './filter.js';

/** A live disk as another node's child: what is written passes its copy-before-write and is recorded. */
export class LiveNode extends FilterNode {
  readonly #disk: Disk;

  constructor(descriptor: LiveDescriptor, disk: Disk) {
    super(descriptor, disk.node);
    this.#disk = disk;
  }

  override write(offset: number, pointer: number, length: number): void {
    this.#disk.write(offset, pointer, length);
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#disk.mutate('write', offset, length, () =>
      this.child.writeUnits(offset, pointer, length, unit, skip),
    );
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#disk.writeZeroes(offset, length, mayUnmap);
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    return this.#disk.writeZeroesFast(offset, length, mayUnmap);
  }

  override discard(offset: number, length: number): void {
    this.#disk.discard(offset, length);
  }

  override flush(): void {
    this.#disk.flush();
  }
}
