import { withLock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import {
  type BlockNode,
  type Extent,
  type FileNode,
  type PreallocateDescriptor,
  STATUS_ALLOCATED,
  STATUS_ZERO,
} from '../node.js';
import type { BlkdebugEvent } from './blkdebug-events.js';
import { FilterNode } from './filter.js';

/*
 * In the arena: a lock int32, then as float64 where the data ends (-1: where the file does, since nobody has written yet)
 * and where the file ends with the space that was taken last (0: none is in hand). From the one to the other the file
 * reads as zeroes: whoever writes there moves the end of the data first.
 */
const DATA_END = 8;
const TAKEN_END = 16;
const STATE_BYTES = 24;
const SECTOR = 512;
/** How much is taken at once, and what the length of the file is a multiple of then, in bytes, where nothing is said. */
const DEFAULT_SIZE = 128 * 1024 * 1024;
const DEFAULT_ALIGN = 1024 * 1024;

/** @param given bytes; `align` 0: any length */
export function openPreallocate(
  { arena }: Runtime,
  filter: Pick<PreallocateDescriptor, 'path' | 'readOnly' | 'length' | 'child'>,
  given: { readonly size: number | undefined; readonly align: number | undefined },
): PreallocateDescriptor {
  const state = arena.alloc(STATE_BYTES, 'state of a preallocate node');
  arena.f64[(state + DATA_END) / 8] = -1;
  const { size = DEFAULT_SIZE, align = DEFAULT_ALIGN } = given;
  return { ...filter, driver: 'preallocate', size, align: Math.max(1, align), state };
}

/** Takes space from the file system ahead of the writes that need it; who is above sees the data alone. */
export class PreallocateNode extends FilterNode {
  declare readonly descriptor: PreallocateDescriptor;
  readonly #runtime: Runtime;
  readonly #file: FileNode | undefined;

  /** @param file the one below, where its length can be changed */
  constructor(
    runtime: Runtime,
    descriptor: PreallocateDescriptor,
    child: BlockNode,
    file: FileNode | undefined,
  ) {
    super(descriptor, child);
    this.#runtime = runtime;
    this.#file = file?.fixedLength === false ? file : undefined;
  }

  override get length(): number {
    if (this.#file === undefined) return this.child.length;
    return Math.ceil(this.#end(this.#file) / SECTOR) * SECTOR;
  }

  override write(offset: number, pointer: number, length: number): void {
    this.extend(offset + length);
    super.write(offset, pointer, length);
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.extend(offset + length);
    super.writeUnits(offset, pointer, length, unit, skip);
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    const inside = this.#inside(offset, length);
    if (inside > 0) super.writeZeroes(offset, inside, mayUnmap);
    this.extend(offset + length);
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    const inside = this.#inside(offset, length);
    if (inside > 0 && !super.writeZeroesFast(offset, inside, mayUnmap)) return false;
    this.extend(offset + length);
    return true;
  }

  override discard(offset: number, length: number): void {
    const inside = this.#inside(offset, length);
    if (inside > 0) super.discard(offset, inside);
  }

  override status(offset: number, length: number): Extent {
    const inside = this.#inside(offset, length);
    if (inside > 0) return super.status(offset, inside);
    return { length, flags: STATUS_ZERO | STATUS_ALLOCATED, hostOffset: offset };
  }

  event(name: BlkdebugEvent): void {
    this.child.event?.(name);
  }

  /** Makes the data at least `length` bytes long. */
  extend(length: number): void {
    const file = this.#file;
    // The end of the file says where the data ends only to those who keep others from moving it.
    if (file === undefined || length <= this.#dataEnd) return;
    this.#locked(() => {
      if (this.#dataEnd < 0) this.#set(DATA_END, file.length);
      if (length <= this.#dataEnd) return;
      if (length > file.length) this.#grow(file, length);
      this.#set(DATA_END, length);
    });
  }

  /** Makes the data, and the file, `length` bytes long. */
  truncate(length: number): void {
    const file = this.#file;
    if (file === undefined) return;
    this.#locked(() => {
      file.truncate(length);
      this.#set(DATA_END, length);
      this.#set(TAKEN_END, 0);
    });
  }

  /** Gives back what was taken and not used. Nobody writes meanwhile. */
  giveBack(): void {
    const file = this.#file;
    if (file === undefined) return;
    this.#locked(() => {
      if (this.#inHand(file)) file.truncate(this.#dataEnd);
      this.#forget();
    });
  }

  /** Looks at the length of the file anew, which others may have changed. Nobody writes meanwhile. */
  refresh(): void {
    const file = this.#file;
    if (file === undefined) return;
    this.#locked(() => {
      if (!this.#inHand(file)) this.#forget();
    });
  }

  #forget(): void {
    this.#set(DATA_END, -1);
    this.#set(TAKEN_END, 0);
  }

  #inHand(file: FileNode): boolean {
    const taken = this.#get(TAKEN_END);
    return taken > this.#dataEnd && file.length === taken;
  }

  /** Within the lock. */
  #grow(file: FileNode, length: number): void {
    const { size, align } = this.descriptor;
    const wanted = Math.ceil((length + size) / align) * align;
    if (Number.isSafeInteger(wanted) && file.reserve?.(wanted) === true) {
      this.#set(TAKEN_END, wanted);
      return;
    }
    // Data may have the space that is left, and will tell where there is none.
    file.extend(length);
    this.#set(TAKEN_END, 0);
  }

  #inside(offset: number, length: number): number {
    if (this.#file === undefined) return length;
    return Math.max(0, Math.min(length, this.#end(this.#file) - offset));
  }

  #end(file: FileNode): number {
    const end = this.#dataEnd;
    return end < 0 ? file.length : end;
  }

  get #dataEnd(): number {
    return this.#get(DATA_END);
  }

  #get(field: number): number {
    return this.#runtime.arena.f64[(this.descriptor.state + field) / 8] ?? 0;
  }

  #set(field: number, bytes: number): void {
    this.#runtime.arena.f64[(this.descriptor.state + field) / 8] = bytes;
  }

  #locked(body: () => void): void {
    withLock(this.#runtime.arena, this.descriptor.state, body);
  }
}
