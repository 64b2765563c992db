import type { Disk } from '../disk.js';
import type { BlockNode, Extent, LiveDescriptor } from '../node.js';
import type { BlkdebugEvent } from './blkdebug-events.js';
import { FilterNode } from './filter.js';

/** A live disk as another node's child: what is written passes its copy-before-write and is recorded. */
export class LiveNode extends FilterNode {
  readonly #disk: Disk;

  constructor(descriptor: LiveDescriptor, disk: Disk) {
    super(descriptor, disk.node);
    this.#disk = disk;
  }

  override get length(): number {
    return this.#disk.descriptor.length;
  }

  override read(offset: number, pointer: number, length: number): void {
    this.#disk.read(offset, pointer, length);
  }

  override status(offset: number, length: number): Extent {
    return this.#disk.use((node) => node.status(offset, length));
  }

  override write(offset: number, pointer: number, length: number): void {
    this.#disk.write(offset, pointer, length);
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#disk.mutate('write', offset, length, (node) =>
      node.writeUnits(offset, pointer, length, unit, skip),
    );
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#disk.writeZeroes(offset, length, mayUnmap && this.#unmaps);
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    return this.#disk.writeZeroesFast(offset, length, mayUnmap && this.#unmaps);
  }

  get #unmaps(): boolean {
    return this.#disk.descriptor.discard === 'unmap';
  }

  override discard(offset: number, length: number): void {
    this.#disk.discard(offset, length);
  }

  override flush(): void {
    this.#disk.flush();
  }

  event(name: BlkdebugEvent): void {
    this.#disk.use((node) => node.event?.(name));
  }
}

/**
 * An image on top of a live disk, which may be where that disk's old data is saved (QEMU: `sync: none` onto an overlay).
 * Nobody changes the disk between the look at what the image has and the reading of what it has not.
 */
export class OverLiveNode extends FilterNode {
  readonly writeCompressed: NonNullable<BlockNode['writeCompressed']>;
  readonly #below: Disk;

  constructor(node: BlockNode, below: Disk) {
    super(node.descriptor, node);
    this.#below = below;
    this.writeCompressed = (offset, pointer, length) => {
      if (node.writeCompressed === undefined) throw new TypeError('the image cannot be compressed');
      node.writeCompressed(offset, pointer, length);
    };
  }

  get unrecorded(): BlockNode | undefined {
    return this.child.unrecorded;
  }

  override read(offset: number, pointer: number, length: number): void {
    this.#below.undisturbed(offset, length, () => super.read(offset, pointer, length));
  }
}
