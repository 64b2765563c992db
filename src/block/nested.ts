import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import type { BlkdebugEvent } from './filters/blkdebug-events.js';
import { FilterNode } from './filters/filter.js';
import { PreallocateNode } from './filters/preallocate.js';
import type { BlockNode, FileNode, NestedDescriptor } from './node.js';

/** Some other node as what an image lies on (QEMU: any node can be the child `file`). */
export class NestedFile extends FilterNode implements FileNode {
  declare readonly descriptor: NestedDescriptor;
  readonly fixedLength: boolean;
  readonly #runtime: Runtime;
  readonly #file: FileNode | undefined;

  /** @param file the file at the bottom, where its length can be changed from here */
  constructor(runtime: Runtime, descriptor: NestedDescriptor, node: BlockNode, file: FileNode | undefined) {
    super(descriptor, node);
    this.fixedLength = file?.fixedLength ?? true;
    this.#runtime = runtime;
    this.#file = file;
  }

  override read(offset: number, pointer: number, length: number): void {
    const there = Math.max(0, Math.min(length, this.length - offset));
    // A file below that can get longer reads as zeroes beyond its end by itself.
    const most = this.fixedLength ? there : length;
    if (most > 0) super.read(offset, pointer, most);
    this.#runtime.arena.u8.fill(0, pointer + most, pointer + length);
  }

  override flush(): void {
    this.child.flush();
  }

  event(name: BlkdebugEvent): void {
    this.child.event?.(name);
  }

  readBytes(offset: number, bytes: Uint8Array): void {
    const { arena } = this.#runtime;
    const buffer = arena.alloc(bytes.length, `a part of '${this.descriptor.path}'`);
    try {
      this.read(offset, buffer, bytes.length);
      bytes.set(arena.u8.subarray(buffer, buffer + bytes.length));
    } finally {
      arena.free(buffer);
    }
  }

  preallocate(offset: number, length: number): void {
    this.writeZeroes(offset, length, false);
  }

  truncate(length: number): void {
    if (this.#file === undefined) this.#refuse(length);
    else this.#resized(this.#file).truncate(length);
  }

  extend(length: number): void {
    if (this.#file !== undefined) this.#resized(this.#file).extend(length);
    else if (length > this.length) this.#refuse(length);
  }

  giveBack(): void {
    if (this.child instanceof PreallocateNode) this.child.giveBack();
    else this.#file?.giveBack?.();
  }

  /** The data of a filter that takes space ahead may end before its file does. */
  #resized(file: FileNode): Pick<FileNode, 'truncate' | 'extend'> {
    return this.child instanceof PreallocateNode && !file.fixedLength ? this.child : file;
  }

  allocatedBytes(): number | undefined {
    return this.#file?.allocatedBytes();
  }

  #refuse(length: number): never {
    throw new StillframeError(
      'ERR_STILLFRAME_NO_SPACE',
      `'${this.descriptor.path}' cannot be made ${length} bytes long: what is below it has ${this.length} bytes, which cannot be changed from here`,
    );
  }
}
