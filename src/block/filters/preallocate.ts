import { load, store, withLock } from '../../kernels/futex.js';
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
 * In the arena: a lock int32, an int32 that is 1 once the file system has refused space, then as float64 where the data
 * ends and how long the file is. From the one to the other the file reads as zeroes: whoever writes there moves the end
 * of the data first.
 */
const REFUSED = 4;
const DATA_END = 8;
const FILE_END = 16;
/** Bytes of the state of a node. */
export const PREALLOCATE_BYTES = 24;
const SECTOR = 512;
/** How much is taken at once, and what the file's length is a multiple of then, in bytes, where nothing is said. */
export const PREALLOCATE_SIZE = 128 * 1024 * 1024;
export const PREALLOCATE_ALIGN = 1024 * 1024;

/** @param length of the file below, in bytes */
export function initialisePreallocate({ arena }: Runtime, state: number, length: number): void {
  arena.i32.fill(0, state / 4, (state + DATA_END) / 4);
  arena.f64[(state + DATA_END) / 8] = length;
  arena.f64[(state + FILE_END) / 8] = length;
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
    return Math.ceil(this.#dataEnd / SECTOR) * SECTOR;
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
    if (file === undefined || length <= this.#dataEnd) return;
    withLock(this.#runtime.arena, this.descriptor.state, () => {
      if (length <= this.#dataEnd) return;
      if (length > this.#fileEnd) this.#grow(file, length);
      this.#set(DATA_END, length);
    });
  }

  /** Makes the data, and the file, `length` bytes long. */
  truncate(length: number): void {
    const file = this.#file;
    if (file === undefined) return;
    withLock(this.#runtime.arena, this.descriptor.state, () => {
      file.truncate(length);
      this.#set(DATA_END, length);
      this.#set(FILE_END, length);
    });
  }

  /** Gives back what was taken and not used. */
  giveBack(): void {
    const file = this.#file;
    if (file === undefined) return;
    withLock(this.#runtime.arena, this.descriptor.state, () => {
      if (this.#fileEnd <= this.#dataEnd) return;
      file.truncate(this.#dataEnd);
      this.#set(FILE_END, this.#dataEnd);
    });
  }

  /** Within the lock, so that nobody writes where the file is made longer. */
  #grow(file: FileNode, length: number): void {
    const { arena } = this.#runtime;
    const { state, size, align } = this.descriptor;
    const was = this.#fileEnd;
    const wanted = Math.ceil((length + size) / align) * align;
    if (load(arena, state + REFUSED) === 0 && Number.isSafeInteger(wanted)) {
      try {
        file.preallocate(was, wanted - was, 'falloc');
        this.#set(FILE_END, wanted);
        return;
      } catch {
        // Data may have the space that is left, and will tell where there is none.
        store(arena, state + REFUSED, 1);
        file.truncate(was);
      }
    }
    file.extend(length);
    this.#set(FILE_END, length);
  }

  #inside(offset: number, length: number): number {
    return this.#file === undefined ? length : Math.max(0, Math.min(length, this.#dataEnd - offset));
  }

  get #dataEnd(): number {
    return this.#runtime.arena.f64[(this.descriptor.state + DATA_END) / 8] ?? 0;
  }

  get #fileEnd(): number {
    return this.#runtime.arena.f64[(this.descriptor.state + FILE_END) / 8] ?? 0;
  }

  #set(field: number, bytes: number): void {
    this.#runtime.arena.f64[(this.descriptor.state + field) / 8] = bytes;
  }
}
