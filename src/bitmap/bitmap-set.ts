import { StillframeError } from '../errors.js';
import { load, store, withLock } from '../kernels/futex.js';
import type { Runtime } from '../kernels/runtime.js';
import { type BitmapOptions, DirtyBitmap, NEXT_BITMAP } from './dirty-bitmap.js';

/** Bytes of the words in the arena that a set needs, zero at first: lock int32, first bitmap uint32. */
export const BITMAP_SET_BYTES = 8;
const FIRST = 4;

/** As QMP says it. */
export function bitmapNotFound(name: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_BITMAP_NOT_FOUND', `Dirty bitmap '${name}' not found`);
}

/**
 * The dirty bitmaps of a node of the block graph, in the order they were added. One thread's view; the list is in the
 * arena.
 */
export class BitmapSet {
  readonly #runtime: Runtime;
  readonly #control: number;

  constructor(runtime: Runtime, control: number) {
    this.#runtime = runtime;
    this.#control = control;
  }

  /** The set that a bitmap is in now: that of its node, wherever the disk is that somebody found it on. */
  static of(runtime: Runtime, bitmap: DirtyBitmap): BitmapSet {
    return new BitmapSet(runtime, bitmap.home);
  }

  get empty(): boolean {
    return load(this.#runtime.arena, this.#control + FIRST) === 0;
  }

  all(): DirtyBitmap[] {
    return this.empty ? [] : this.#locked(() => [...this.#each()]);
  }

  /** @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND */
  get(name: string): DirtyBitmap {
    const found = this.all().find((bitmap) => bitmap.name === name);
    if (found !== undefined) return found;
    throw bitmapNotFound(name);
  }

  /**
   * Adds a bitmap without bits: see {@link DirtyBitmap.makeBits}. Nothing is recorded before it has them.
   *
   * @throws StillframeError ERR_STILLFRAME_BITMAP_EXISTS, …_ARENA_EXHAUSTED
   */
  add(options: BitmapOptions): DirtyBitmap {
    return this.#locked(() => {
      for (const bitmap of this.#each()) {
        if (options.name !== '' && bitmap.name === options.name) {
          throw new StillframeError('ERR_STILLFRAME_BITMAP_EXISTS', `Bitmap already exists: ${options.name}`);
        }
      }
      const added = DirtyBitmap.create(this.#runtime, options);
      this.#append(added);
      return added;
    });
  }

  /** Takes a bitmap out of the set and gives its memory back. */
  remove(bitmap: DirtyBitmap): void {
    this.#locked(() => this.#unlink(bitmap));
    bitmap.free();
  }

  /** Takes those out that no image keeps; whoever has them {@link adopt}s them elsewhere. Nobody may use them meanwhile. */
  takeTransient(): DirtyBitmap[] {
    return this.#locked(() => {
      const taken = [...this.#each()].filter(({ persistent }) => !persistent);
      for (const bitmap of taken) this.#unlink(bitmap);
      return taken;
    });
  }

  /** Adds bitmaps that were taken out of another set. */
  adopt(bitmaps: readonly DirtyBitmap[]): void {
    this.#locked(() => {
      for (const bitmap of bitmaps) {
        store(this.#runtime.arena, bitmap.pointer + NEXT_BITMAP, 0);
        this.#append(bitmap);
      }
    });
  }

  /**
   * From now on `successor` takes what is written, and `bitmap` stays as it is: a job relies on it. Called while nobody
   * changes the drive.
   *
   * @param successor one of the same granularity and length with bits, all clear, and in no set
   */
  freeze(bitmap: DirtyBitmap, successor: DirtyBitmap): void {
    this.#locked(() => {
      successor.enabled = bitmap.enabled;
      bitmap.enabled = false;
      bitmap.busy = true;
      bitmap.successor = successor;
      this.#append(successor);
    });
  }

  /**
   * The job that relied on a bitmap is over: what was written meanwhile is all that is dirty (`abdicate`), or is dirty as
   * well (`reclaim`). Then `body`, which may make more of it dirty. Semantics: QEMU's `bdrv_dirty_bitmap_abdicate` and
   * `…_reclaim`.
   */
  unfreeze(bitmap: DirtyBitmap, how: 'abdicate' | 'reclaim', body?: () => void): void {
    const { successor } = bitmap;
    if (successor === undefined) throw new Error(`bitmap invariant: '${bitmap.name}' is not frozen`);
    this.#locked(() => {
      if (how === 'abdicate') bitmap.swapBits(successor);
      else bitmap.merge(successor);
      body?.();
      bitmap.enabled = successor.enabled;
      bitmap.successor = undefined;
      bitmap.busy = false;
      // The successor is as old as the job.
      if (how === 'abdicate') this.#moveBehind(bitmap, successor);
      this.#unlink(successor);
    });
    successor.free();
  }

  #unlink(bitmap: DirtyBitmap): void {
    const { arena } = this.#runtime;
    let link = this.#control + FIRST;
    for (const other of this.#each()) {
      const next = other.pointer + NEXT_BITMAP;
      if (other.pointer === bitmap.pointer) store(arena, link, load(arena, next));
      else link = next;
    }
  }

  /** Puts a bitmap of the set behind another one of it. */
  #moveBehind(bitmap: DirtyBitmap, other: DirtyBitmap): void {
    const { arena } = this.#runtime;
    this.#unlink(bitmap);
    store(arena, bitmap.pointer + NEXT_BITMAP, load(arena, other.pointer + NEXT_BITMAP));
    store(arena, other.pointer + NEXT_BITMAP, bitmap.pointer);
  }

  #append(bitmap: DirtyBitmap): void {
    store(this.#runtime.arena, this.#endLink(), bitmap.pointer);
    bitmap.home = this.#control;
  }

  /** Where the pointer to one more bitmap goes. */
  #endLink(): number {
    let link = this.#control + FIRST;
    for (const bitmap of this.#each()) link = bitmap.pointer + NEXT_BITMAP;
    return link;
  }

  /** Marks the range dirty in every bitmap that records: after it was written, whether or not that went well. */
  record(offset: number, length: number): void {
    if (this.empty) return;
    this.#locked(() => {
      for (const bitmap of this.#each()) {
        if (bitmap.enabled && bitmap.loaded) bitmap.set(offset, length);
      }
    });
  }

  /** Gives the memory of all bitmaps back; the set is empty then. */
  free(): void {
    for (const bitmap of this.all()) this.remove(bitmap);
  }

  *#each(): Generator<DirtyBitmap> {
    const { arena } = this.#runtime;
    for (let pointer = load(arena, this.#control + FIRST) >>> 0; pointer !== 0; ) {
      const next = load(arena, pointer + NEXT_BITMAP) >>> 0;
      yield new DirtyBitmap(this.#runtime, pointer);
      pointer = next;
    }
  }

  #locked<T>(body: () => T): T {
    return withLock(this.#runtime.arena, this.#control, body);
  }
}
