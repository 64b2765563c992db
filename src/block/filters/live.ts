import type { Runtime } from '../../kernels/runtime.js';
import type { Disk } from '../disk.js';
import { fileBelow } from '../file-below.js';
import type { BlockNode, Extent, LiveDescriptor } from '../node.js';
import { attachFile } from '../raw/file.js';
import type { BlkdebugEvent } from './blkdebug-events.js';
import { FilterNode } from './filter.js';
import { eachRun } from './units.js';

/**
 * A live disk as another node's child: what is written passes its copy-before-write and is recorded. The disk is as long
 * as its node was at first; where that is a file that an image above makes longer, what is behind is nothing of the disk
 * and goes to the file.
 */
export class LiveNode extends FilterNode {
  readonly #runtime: Runtime;
  readonly #disk: Disk;
  #seen: BlockNode | undefined;
  #growing: BlockNode | undefined;

  constructor(runtime: Runtime, descriptor: LiveDescriptor, disk: Disk) {
    super(descriptor, disk.node);
    this.#runtime = runtime;
    this.#disk = disk;
  }

  override get length(): number {
    const { length } = this.#disk.descriptor;
    return Math.max(length, this.#growingOf(this.#disk.node)?.length ?? 0);
  }

  override read(offset: number, pointer: number, length: number): void {
    this.#split(
      offset,
      length,
      false,
      (inside) => this.#disk.read(offset, pointer, inside),
      (node, start, rest) => node.read(start, pointer + start - offset, rest),
    );
  }

  override status(offset: number, length: number): Extent {
    const inside = this.#inside(offset, length, false);
    return this.#disk.use((node) =>
      inside > 0 ? node.status(offset, inside) : (this.#growingOf(node) ?? node).status(offset, length),
    );
  }

  override write(offset: number, pointer: number, length: number): void {
    this.#split(
      offset,
      length,
      true,
      (inside) => this.#disk.write(offset, pointer, inside),
      (node, start, rest) => node.write(start, pointer + start - offset, rest),
    );
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    if (this.#inside(offset, length, true) === length) {
      this.#disk.mutate('write', offset, length, (node) =>
        node.writeUnits(offset, pointer, length, unit, skip),
      );
      return;
    }
    eachRun(this.#runtime, length, unit, skip, (start, bytes) =>
      this.write(offset + start, pointer + start, bytes),
    );
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    const unmap = mayUnmap && this.#unmaps;
    this.#split(
      offset,
      length,
      true,
      (inside) => this.#disk.writeZeroes(offset, inside, unmap),
      (node, start, rest) => node.writeZeroes(start, rest, unmap),
    );
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    const unmap = mayUnmap && this.#unmaps;
    const inside = this.#inside(offset, length, true);
    if (inside === length) return this.#disk.writeZeroesFast(offset, length, unmap);
    if (inside > 0 && !this.#disk.writeZeroesFast(offset, inside, unmap)) return false;
    const [start, rest] = [offset + inside, length - inside];
    return this.#disk.use((node) => this.#growingOf(node)?.writeZeroesFast?.(start, rest, unmap) ?? false);
  }

  get #unmaps(): boolean {
    return this.#disk.descriptor.discard === 'unmap';
  }

  override discard(offset: number, length: number): void {
    this.#split(
      offset,
      length,
      true,
      (inside) => this.#disk.discard(offset, inside),
      (node, start, rest) => node.discard(start, rest),
    );
  }

  override flush(): void {
    this.#disk.flush();
  }

  event(name: BlkdebugEvent): void {
    this.#disk.use((node) => node.event?.(name));
  }

  /** Carries a request out on the disk, and on the file where that goes on behind the end of the disk. */
  #split(
    offset: number,
    length: number,
    changes: boolean,
    disk: (inside: number) => void,
    behind: (node: BlockNode, start: number, rest: number) => void,
  ): void {
    const inside = this.#inside(offset, length, changes);
    if (inside > 0 || length === 0) disk(inside);
    if (inside === length) return;
    this.#disk.use((node) => behind(this.#growingOf(node) ?? node, offset + inside, length - inside));
  }

  /** Bytes of a range that are the disk's; all of them where it cannot get longer or change: it says what is wrong then. */
  #inside(offset: number, length: number, changes: boolean): number {
    const { length: end, readOnly } = this.#disk.descriptor;
    if (offset + length <= end || (changes && readOnly)) return length;
    const grows = this.#disk.use((node) => this.#growingOf(node) !== undefined);
    return grows ? Math.max(0, Math.min(length, end - offset)) : length;
  }

  /** What takes requests behind the end of the disk; undefined where nothing does. */
  #growingOf(node: BlockNode): BlockNode | undefined {
    if (node === this.#seen) return this.#growing;
    const { descriptor } = node;
    const file = fileBelow(descriptor);
    const grows = file !== undefined && !attachFile(this.#runtime, file).fixedLength;
    const growing = descriptor.driver === 'raw' ? attachFile(this.#runtime, descriptor.file) : node;
    this.#seen = node;
    this.#growing = grows ? growing : undefined;
    return this.#growing;
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
