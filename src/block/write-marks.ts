import type { Arena } from '../kernels/arena.js';
import { advance, load } from '../kernels/futex.js';

/**
 * What a node keeps of the writes and discards that came to it, for whoever asks (QMP `query-blockstats`,
 * `block-set-write-threshold`). In the arena:
 *
 *     +0  highest    int64  end of the write that reached furthest, bytes
 *     +8  threshold  int64  a write beyond it is told of, once; 0: none is
 *     +16 passed     int64  the threshold that was passed last
 *     +24 excess     int64  bytes by which it was
 *     +32 discards   3 × int64: how many were carried out, how many failed, bytes that were
 *     +56 told       int32  advanced when a threshold is passed, and when nobody is to wait for that any more
 */
const HIGHEST = 0;
const THRESHOLD = 8;
const PASSED = 16;
const EXCESS = 24;
const DISCARDS = 32;
const DISCARDS_FAILED = 40;
const DISCARDED = 48;
const TOLD = 56;
export const WRITE_MARKS_BYTES = 64;

/** A threshold that a write went beyond. */
export interface PassedThreshold {
  /** Bytes. */
  readonly threshold: number;
  readonly excess: number;
}

/** One thread's view of them. */
export class WriteMarks {
  readonly #arena: Arena;
  readonly #pointer: number;

  constructor(arena: Arena, pointer: number) {
    this.#arena = arena;
    this.#pointer = pointer;
  }

  /** A write is about to be made that ends at `end`. */
  begin(end: number): void {
    const threshold = this.#get(THRESHOLD);
    if (threshold === 0 || end <= threshold) return;
    const { i64 } = this.#arena;
    const known = BigInt(threshold);
    // Whoever takes it away tells of it.
    if (Atomics.compareExchange(i64, this.#index(THRESHOLD), known, 0n) !== known) return;
    Atomics.store(i64, this.#index(PASSED), known);
    Atomics.store(i64, this.#index(EXCESS), BigInt(end - threshold));
    advance(this.#arena, this.#pointer + TOLD);
  }

  /** A write that ends at `end` is over, whether or not it went well. */
  end(end: number): void {
    const { i64 } = this.#arena;
    const index = this.#index(HIGHEST);
    const wanted = BigInt(end);
    for (let known = Atomics.load(i64, index); known < wanted; ) {
      const found = Atomics.compareExchange(i64, index, known, wanted);
      if (found === known) return;
      known = found;
    }
  }

  /** A discard is over. */
  discarded(length: number, ok: boolean): void {
    const { i64 } = this.#arena;
    Atomics.add(i64, this.#index(ok ? DISCARDS : DISCARDS_FAILED), 1n);
    if (ok) Atomics.add(i64, this.#index(DISCARDED), BigInt(length));
  }

  /** Bytes. */
  get highest(): number {
    return this.#get(HIGHEST);
  }

  get discards(): { readonly done: number; readonly failed: number; readonly bytes: number } {
    return {
      done: this.#get(DISCARDS),
      failed: this.#get(DISCARDS_FAILED),
      bytes: this.#get(DISCARDED),
    };
  }

  /** Bytes; 0 where there is none. */
  get threshold(): number {
    return this.#get(THRESHOLD);
  }

  set threshold(bytes: number) {
    Atomics.store(this.#arena.i64, this.#index(THRESHOLD), BigInt(bytes));
  }

  /** The one that was passed last. */
  get passed(): PassedThreshold {
    return { threshold: this.#get(PASSED), excess: this.#get(EXCESS) };
  }

  /** How often {@link next} has had something to say. */
  get told(): number {
    return load(this.#arena, this.#pointer + TOLD);
  }

  /** Resolves when a threshold has been passed since `told`, or {@link close} was called. */
  async next(told: number): Promise<void> {
    // Not looked at again: whoever wakes may give the memory back.
    await Atomics.waitAsync(this.#arena.i32, (this.#pointer + TOLD) >> 2, told).value;
  }

  /** Gives the memory back; whoever waits goes on. */
  close(): void {
    advance(this.#arena, this.#pointer + TOLD);
    this.#arena.free(this.#pointer);
  }

  #index(at: number): number {
    return (this.#pointer + at) >> 3;
  }

  #get(at: number): number {
    return Number(Atomics.load(this.#arena.i64, this.#index(at)));
  }
}
