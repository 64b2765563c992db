import type { Arena } from '../../kernels/arena.js';
import { advance, load, store } from '../../kernels/futex.js';

/*
 * Who waits for a throttle group, reads and writes apart. Members of the group have their turns one after the other, and of
 * one member the request goes that came first, as in QEMU. In the arena: the number of the next one to come, float64; for
 * each direction the slot whose turn it is (int32, from 1 on; 0: nobody waits); a sequence int32 that slots which become
 * free advance when all were taken; then the slots
 *
 *     +0   direction int32, from 1 on; 0: the slot is free
 *     +4   member    int32
 *     +8   number    float64
 *     +16  turn      int32, advanced when it is time to look again
 */
const NEXT = 0;
const TURN = 8;
const FREED = 16;
const FIRST = 24;
const STRIDE = 24;
const SLOTS = 128;
const [DIRECTION, MEMBER, NUMBER, WORD] = [0, 4, 8, 16];
/** Bytes of a queue, zero at first. */
export const THROTTLE_QUEUE_BYTES = FIRST + SLOTS * STRIDE;

export const DIRECTIONS = ['read', 'write'] as const;
export type Direction = (typeof DIRECTIONS)[number];

/** One thread's view of it. All methods are called under the lock of the group. */
export class ThrottleQueue {
  readonly #arena: Arena;
  readonly #pointer: number;

  constructor(arena: Arena, pointer: number) {
    this.#arena = arena;
    this.#pointer = pointer;
  }

  /** The slot whose turn it is; undefined where nobody waits. */
  turn(direction: Direction): number | undefined {
    const turn = load(this.#arena, this.#turnAt(direction));
    return turn === 0 ? undefined : turn - 1;
  }

  /** @returns a slot for one more that waits; undefined where all are taken: {@link freed} advances when one is free */
  join(direction: Direction, member: number): number | undefined {
    const { f64 } = this.#arena;
    for (let slot = 0; slot < SLOTS; slot++) {
      const at = this.#at(slot);
      if (load(this.#arena, at + DIRECTION) !== 0) continue;
      const number = f64[(this.#pointer + NEXT) / 8] ?? 0;
      f64[(this.#pointer + NEXT) / 8] = number + 1;
      store(this.#arena, at + DIRECTION, DIRECTIONS.indexOf(direction) + 1);
      store(this.#arena, at + MEMBER, member);
      f64[(at + NUMBER) / 8] = number;
      if (this.turn(direction) === undefined) store(this.#arena, this.#turnAt(direction), slot + 1);
      return slot;
    }
    return undefined;
  }

  /** The slot whose turn it was goes on; the next one is woken. */
  leave(slot: number, direction: Direction): void {
    const at = this.#at(slot);
    const member = load(this.#arena, at + MEMBER);
    store(this.#arena, at + DIRECTION, 0);
    advance(this.#arena, this.freed);
    const next = this.#after(member, direction);
    store(this.#arena, this.#turnAt(direction), next === undefined ? 0 : next + 1);
    if (next !== undefined) advance(this.#arena, this.word(next));
  }

  /** Those whose turn it is look again. */
  wake(): void {
    for (const direction of DIRECTIONS) {
      const turn = this.turn(direction);
      if (turn !== undefined) advance(this.#arena, this.word(turn));
    }
  }

  /** Arena pointer of the word that a slot waits on. */
  word(slot: number): number {
    return this.#at(slot) + WORD;
  }

  /** Arena pointer of the word that advances when a slot becomes free. */
  get freed(): number {
    return this.#pointer + FREED;
  }

  /** The request that came first of the next member that has one; the last one to come into the group comes first. */
  #after(member: number, direction: Direction): number | undefined {
    const { f64 } = this.#arena;
    let found: { readonly slot: number; readonly distance: number; readonly number: number } | undefined;
    for (let slot = 0; slot < SLOTS; slot++) {
      const at = this.#at(slot);
      if (load(this.#arena, at + DIRECTION) !== DIRECTIONS.indexOf(direction) + 1) continue;
      const behind = member - load(this.#arena, at + MEMBER);
      const distance = behind > 0 ? behind : behind + 2 ** 32;
      const number = f64[(at + NUMBER) / 8] ?? 0;
      const isNearer = found === undefined || distance < found.distance;
      if (isNearer || (distance === found?.distance && number < found.number))
        found = { slot, distance, number };
    }
    return found?.slot;
  }

  #turnAt(direction: Direction): number {
    return this.#pointer + TURN + DIRECTIONS.indexOf(direction) * 4;
  }

  #at(slot: number): number {
    return this.#pointer + FIRST + slot * STRIDE;
  }
}
