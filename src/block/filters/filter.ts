import type { BlockNode, Extent, HostRange, NodeDescriptor } from '../node.js';

/** A node that passes requests on to the one below; filters override what they change. */
export class FilterNode implements BlockNode {
  readonly descriptor: NodeDescriptor;
  readonly readOnly: boolean;
  clusterSize: number | undefined;
  readonly backing: BlockNode | undefined;
  protected readonly child: BlockNode;

  constructor(descriptor: NodeDescriptor, child: BlockNode) {
    this.descriptor = descriptor;
    this.readOnly = child.readOnly;
    this.clusterSize = child.clusterSize;
    this.backing = child.backing;
    this.child = child;
  }

  get length(): number {
    return this.child.length;
  }

  read(offset: number, pointer: number, length: number): void {
    this.child.read(offset, pointer, length);
  }

  write(offset: number, pointer: number, length: number): void {
    this.child.write(offset, pointer, length);
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.child.writeUnits(offset, pointer, length, unit, skip);
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.child.writeZeroes(offset, length, mayUnmap);
  }

  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    return this.child.writeZeroesFast?.(offset, length, mayUnmap) ?? false;
  }

  discard(offset: number, length: number): void {
    this.child.discard(offset, length);
  }

  flush(): void {
    this.child.event?.('flush_to_os');
    this.child.event?.('flush_to_disk');
    this.child.flush();
  }

  /** What passes by here is to be seen: no way around. */
  hostRange(): HostRange | undefined {
    return undefined;
  }

  status(offset: number, length: number): Extent {
    return this.child.status(offset, length);
  }
}
