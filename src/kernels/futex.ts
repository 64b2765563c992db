import type { Arena } from './arena.js';

/**
 * Blocking primitives on words of the arena, for worker threads. Every wait of the data path goes through
 * this file. A lock is one zeroed int32 word: 0 free, 1 held, 2 held with waiters.
 */

/** Blocks until the lock word at `pointer` is ours. Not recursive. */
export function lock(arena: Arena, pointer: number): void {
  const words = arena.i32;
  const index = pointer >> 2;
  if (Atomics.compareExchange(words, index, 0, 1) === 0) return;
  while (Atomics.exchange(words, index, 2) !== 0) Atomics.wait(words, index, 2);
}

/** Takes the lock where nobody has it. */
export function tryLock(arena: Arena, pointer: number): boolean {
  return Atomics.compareExchange(arena.i32, pointer >> 2, 0, 1) === 0;
}

export function unlock(arena: Arena, pointer: number): void {
  const words = arena.i32;
  const index = pointer >> 2;
  if (Atomics.exchange(words, index, 0) === 2) Atomics.notify(words, index, 1);
}

/** Runs `body` under the lock word at `pointer`. */
export function withLock<T>(arena: Arena, pointer: number, body: () => T): T {
  lock(arena, pointer);
  try {
    return body();
  } finally {
    unlock(arena, pointer);
  }
}

/**
 * Blocks while the word at `pointer` holds `value`, at most `timeoutMs`. May return early: callers loop on
 * their own condition.
 */
export function waitWhile(arena: Arena, pointer: number, value: number, timeoutMs = Infinity): void {
  Atomics.wait(arena.i32, pointer >> 2, value, timeoutMs);
}

/** Adds one to the sequence word at `pointer` and wakes everyone who waits on it. */
export function advance(arena: Arena, pointer: number): void {
  Atomics.add(arena.i32, pointer >> 2, 1);
  Atomics.notify(arena.i32, pointer >> 2);
}

export function load(arena: Arena, pointer: number): number {
  return Atomics.load(arena.i32, pointer >> 2);
}

export function store(arena: Arena, pointer: number, value: number): void {
  Atomics.store(arena.i32, pointer >> 2, value);
}
