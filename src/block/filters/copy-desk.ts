import { type PlainError, StillframeError, toStillframeError } from '../../errors.js';
import type { Arena } from '../../kernels/arena.js';
import { advance, load, store, waitWhile } from '../../kernels/futex.js';

/**
 * Where guests' writes that may not wait for ever leave the copying of old data to other threads: a guest hands over what
 * it has claimed, and waits for the outcome no longer than it may. A copy that takes longer goes on without it, and settles
 * the states of its clusters when it is over.
 *
 *     +0   ended     int32   1: no thread is to copy any more
 *     +4   sequence  int32   advanced when a place has become free
 *     +64  places    PLACES × PLACE_BYTES, one for each thread that copies
 *
 * A place:
 *
 *     +0   state     int32   see ABSENT
 *     +4   first     uint32  what is to be copied: number of a cluster
 *     +8   count     uint32
 *     +12  length    uint32  bytes of the error
 *     +64  error     what went wrong, as JSON
 *
 *     absent ──▶ free ──guest──▶ taken ──▶ posted ──copied──▶ copied, failed ──guest──▶ free
 *                 ▲                          └──guest leaves──▶ left ──copied──▶ free
 */
const ENDED = 0;
const SEQUENCE = 4;
const FIRST_PLACE = 64;
/** Copies that may be under way at once, those that nobody waits for any more included. */
export const PLACES = 2;
const PLACE_BYTES = 4096;
export const DESK_BYTES = FIRST_PLACE + PLACES * PLACE_BYTES;

const STATE = 0;
const FIRST = 4;
const COUNT = 8;
const LENGTH = 12;
const ERROR = 64;

/** There is no thread. */
const ABSENT = 0;
const FREE = 1;
const TAKEN = 2;
const POSTED = 3;
const COPIED = 4;
const FAILED = 5;
/** The guest does not wait any more. */
const LEFT = 6;

/** How long threads may take to start before guests copy themselves, in milliseconds. */
const START_MS = 5000;
/** Characters of a message that fit whatever they are. */
const MESSAGE_CHARS = 600;

/** One thread's view of it. */
export class CopyDesk {
  readonly #arena: Arena;
  readonly #control: number;

  constructor(arena: Arena, control: number) {
    this.#arena = arena;
    this.#control = control;
  }

  static allocate(arena: Arena): number {
    return arena.alloc(DESK_BYTES, 'copies for guests');
  }

  /** Whether there are threads that copy. */
  get attended(): boolean {
    return this.#places().some((place) => load(this.#arena, place) !== ABSENT);
  }

  /** Whether all threads that copy are there. */
  get ready(): boolean {
    return this.#places().every((place) => load(this.#arena, place) !== ABSENT);
  }

  /** Waits until there are threads that copy, for as long as it takes to start them. @returns whether there are */
  waitForThreads(): boolean {
    const until = performance.now() + START_MS;
    for (;;) {
      const sequence = load(this.#arena, this.#control + SEQUENCE);
      if (this.attended) return true;
      const left = until - performance.now();
      if (left <= 0 || this.#ended) return false;
      waitWhile(this.#arena, this.#control + SEQUENCE, sequence, left);
    }
  }

  /** Copies for guests until it is ended. @param copy gives what it could not copy back before it throws */
  serve(index: number, copy: (first: number, count: number) => void): void {
    const place = this.#place(index);
    this.#free(place);
    for (;;) {
      const state = load(this.#arena, place);
      if (state === POSTED || state === LEFT) this.#serveOne(place, copy);
      // Looked at after the place was seen free: whoever ends it looks at the place afterwards.
      else if (this.#ended && this.#exchange(place, FREE, ABSENT)) break;
      else waitWhile(this.#arena, place + STATE, state);
    }
    advance(this.#arena, this.#control + SEQUENCE);
  }

  #serveOne(place: number, copy: (first: number, count: number) => void): void {
    let outcome = COPIED;
    try {
      const words = this.#arena.u32;
      copy(words[(place + FIRST) >> 2] ?? 0, words[(place + COUNT) >> 2] ?? 0);
    } catch (error) {
      outcome = FAILED;
      this.#putError(place, error);
    }
    if (!this.#exchange(place, POSTED, outcome)) this.#free(place);
  }

  /** A place whose thread has nothing to do, which is the caller's then. */
  take(): number | undefined {
    return this.#places().find((place) => this.#exchange(place, FREE, TAKEN));
  }

  /** The caller has nothing to be copied at the place that it has taken. */
  giveBack(place: number): void {
    this.#free(place);
  }

  /** Waits until a place has become free, `again` says true, or the time is over. @param deadline by `performance.now()` */
  waitForPlace(deadline: number, again: () => boolean): void {
    const sequence = load(this.#arena, this.#control + SEQUENCE);
    if (again() || !this.attended) return;
    if (this.#places().some((place) => load(this.#arena, place) === FREE)) return;
    const left = deadline - performance.now();
    if (left > 0) waitWhile(this.#arena, this.#control + SEQUENCE, sequence, left);
  }

  /**
   * Has clusters copied that the caller has claimed, which are not its own from then on.
   *
   * @param place that it has taken
   * @param deadline by `performance.now()`
   * @returns false when the time is over: the copy goes on without the caller
   * @throws StillframeError what went wrong
   */
  copy(place: number, first: number, count: number, deadline: number): boolean {
    const words = this.#arena.u32;
    words[(place + FIRST) >> 2] = first;
    words[(place + COUNT) >> 2] = count;
    this.#set(place, POSTED);
    while (load(this.#arena, place) === POSTED) {
      const left = deadline - performance.now();
      if (left > 0) waitWhile(this.#arena, place + STATE, POSTED, left);
      else if (this.#exchange(place, POSTED, LEFT)) return false;
    }
    const error = load(this.#arena, place) === FAILED ? this.#getError(place) : undefined;
    this.#free(place);
    if (error !== undefined) throw StillframeError.fromPlain(error);
    return true;
  }

  /**
   * Nothing is copied any more when this returns. Guests that come all the same, before there were any threads, copy
   * themselves.
   */
  end(): void {
    store(this.#arena, this.#control + ENDED, 1);
    advance(this.#arena, this.#control + SEQUENCE);
    for (const place of this.#places()) {
      Atomics.notify(this.#arena.i32, (place + STATE) >> 2);
      for (;;) {
        const state = load(this.#arena, place);
        if (state === ABSENT) break;
        waitWhile(this.#arena, place + STATE, state);
      }
    }
  }

  get #ended(): boolean {
    return load(this.#arena, this.#control + ENDED) !== 0;
  }

  #places(): number[] {
    return Array.from({ length: PLACES }, (_, index) => this.#place(index));
  }

  #place(index: number): number {
    return this.#control + FIRST_PLACE + index * PLACE_BYTES;
  }

  #free(place: number): void {
    this.#set(place, FREE);
    advance(this.#arena, this.#control + SEQUENCE);
  }

  #set(place: number, state: number): void {
    store(this.#arena, place + STATE, state);
    Atomics.notify(this.#arena.i32, (place + STATE) >> 2);
  }

  #exchange(place: number, from: number, to: number): boolean {
    const index = (place + STATE) >> 2;
    if (Atomics.compareExchange(this.#arena.i32, index, from, to) !== from) return false;
    Atomics.notify(this.#arena.i32, index);
    return true;
  }

  #putError(place: number, error: unknown): void {
    const { code, message, errno } = toStillframeError(error);
    const plain: PlainError = { code, message: message.slice(0, MESSAGE_CHARS), errno };
    const json = new TextEncoder().encode(JSON.stringify(plain));
    this.#arena.u8.set(json, place + ERROR);
    this.#arena.u32[(place + LENGTH) >> 2] = json.length;
  }

  #getError(place: number): PlainError {
    const length = this.#arena.u32[(place + LENGTH) >> 2] ?? 0;
    return JSON.parse(new TextDecoder().decode(this.#arena.copyOut(place + ERROR, length)));
  }
}
