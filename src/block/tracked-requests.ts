import { advance, load, store, waitWhile, withLock } from '../kernels/futex.js';
import type { Runtime } from '../kernels/runtime.js';

/**
 * The requests in flight that change a disk. Overlapping ones run one after the other; a drain waits for all of
 * them and keeps new ones out, which is what makes an instant: everything before it is on the drive, nothing
 * after it is.
 *
 *     +0   lock        int32
 *     +4   sequence    int32   advanced when a slot is freed or a drain ends
 *     +8   waiters     int32
 *     +12  drained     int32   > 0 keeps new requests out
 *     +16  in flight   int32
 *     +64  slots       64 × { start float64, end float64 }, end 0 is free
 */
export const TRACKER_BYTES = 64 + 64 * 16;

const SLOTS = 64;
const SEQUENCE = 4;
const WAITERS = 8;
const DRAINED = 12;
const IN_FLIGHT = 16;
const FIRST_SLOT = 64;

export class TrackedRequests {
  readonly #arena: Runtime['arena'];
  readonly #control: number;
  readonly #slots: Float64Array;

  constructor(runtime: Runtime, control: number) {
    this.#arena = runtime.arena;
    this.#control = control;
    const first = (control + FIRST_SLOT) / 8;
    this.#slots = runtime.arena.f64.subarray(first, first + SLOTS * 2);
  }

  /** Runs `body` as the only request on bytes [start, end). */
  run<T>(start: number, end: number, body: () => T): T {
    const slot = this.#enter(start, end);
    try {
      return body();
    } finally {
      this.#leave(slot);
    }
  }

  /** Runs `body` while no request is in flight. */
  drained<T>(body: () => T): T {
    const { i32 } = this.#arena;
    const drained = (this.#control + DRAINED) >> 2;
    // One drain at a time: two instants are two moments.
    this.#waitUntil(() => {
      if (Atomics.load(i32, drained) > 0) return false;
      Atomics.store(i32, drained, 1);
      return true;
    });
    try {
      this.#waitUntil(() => load(this.#arena, this.#control + IN_FLIGHT) === 0);
      return body();
    } finally {
      withLock(this.#arena, this.#control, () => store(this.#arena, this.#control + DRAINED, 0));
      this.#wake();
    }
  }

  #enter(start: number, end: number): number {
    let slot = -1;
    this.#waitUntil(() => {
      if (load(this.#arena, this.#control + DRAINED) > 0) return false;
      slot = this.#freeSlot(start, end);
      if (slot < 0) return false;
      this.#slots[slot * 2] = start;
      this.#slots[slot * 2 + 1] = end;
      store(this.#arena, this.#control + IN_FLIGHT, load(this.#arena, this.#control + IN_FLIGHT) + 1);
      return true;
    });
    return slot;
  }

  #leave(slot: number): void {
    withLock(this.#arena, this.#control, () => {
      this.#slots[slot * 2 + 1] = 0;
      store(this.#arena, this.#control + IN_FLIGHT, load(this.#arena, this.#control + IN_FLIGHT) - 1);
    });
    this.#wake();
  }

  /** A free slot, or -1 when a request in flight overlaps or all slots are taken. Under the lock. */
  #freeSlot(start: number, end: number): number {
    const slots = this.#slots;
    let free = -1;
    for (let slot = 0; slot < SLOTS; slot++) {
      const otherEnd = slots[slot * 2 + 1] ?? 0;
      if (otherEnd === 0) {
        if (free < 0) free = slot;
      } else if (start < otherEnd && (slots[slot * 2] ?? 0) < end) {
        return -1;
      }
    }
    return free;
  }

  /** Blocks until `attempt`, made under the lock, says true. */
  #waitUntil(attempt: () => boolean): void {
    const waiters = (this.#control + WAITERS) >> 2;
    for (;;) {
      const sequence = load(this.#arena, this.#control + SEQUENCE);
      if (withLock(this.#arena, this.#control, attempt)) return;
      Atomics.add(this.#arena.i32, waiters, 1);
      // Someone who frees a slot between the attempt and here has moved the sequence on if it saw a waiter;
      // try once more as an announced waiter before sleeping.
      if (withLock(this.#arena, this.#control, attempt)) {
        Atomics.sub(this.#arena.i32, waiters, 1);
        return;
      }
      waitWhile(this.#arena, this.#control + SEQUENCE, sequence);
      Atomics.sub(this.#arena.i32, waiters, 1);
    }
  }

  #wake(): void {
    if (load(this.#arena, this.#control + WAITERS) > 0) advance(this.#arena, this.#control + SEQUENCE);
  }
}
