import { load, waitWhile, withLock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, ThrottleDescriptor } from '../node.js';
import { FilterNode } from './filter.js';
import { BUCKETS, type Bucket, type ThrottleLimits } from './throttle-limits.js';
import { type Direction, THROTTLE_QUEUE_BYTES, ThrottleQueue } from './throttle-queue.js';

/*
 * In the arena: a lock int32, then as float64 when the buckets were looked at last (milliseconds), the bytes of one
 * request, and for each bucket
 *
 *     average, max (per second), maxLength (seconds), level, burst level (bytes or requests)
 *
 * and the queue of those that wait.
 *
 * Buckets leak: the level falls by the average of a second, the burst level by the max. What goes through raises both.
 * Nothing goes through while one of them is above what its bucket holds.
 */
const SEEN = 8;
const IOPS_SIZE = 16;
const FIRST = 24;
const STRIDE = 40;
const [AVERAGE, MAX, LEVEL, BURST] = [0, 1, 3, 4];
const QUEUE = FIRST + BUCKETS.length * STRIDE;
/** Bytes of a group: its buckets, and its queue. */
export const THROTTLE_GROUP_BYTES = QUEUE + THROTTLE_QUEUE_BYTES;
/** A bucket holds what goes through in a tenth of a second, where nothing else is said. */
const TENTH = 10;

function nowMs(): number {
  return Number(process.hrtime.bigint() / 1000n) / 1000;
}

/** Sets the limits of a group; its buckets are empty then. Whoever waits is let through by the new ones. */
export function setLimits(runtime: Pick<Runtime, 'arena'>, group: number, limits: ThrottleLimits): void {
  const { arena } = runtime;
  withLock(arena, group, () => {
    arena.f64[(group + SEEN) / 8] = nowMs();
    arena.f64[(group + IOPS_SIZE) / 8] = limits.iopsSize;
    BUCKETS.forEach((bucket, index) => {
      const { average, max, maxLength } = limits.buckets[bucket];
      arena.f64.set([average, max, maxLength, 0, 0], (group + FIRST + index * STRIDE) / 8);
    });
    new ThrottleQueue(arena, group + QUEUE).wake();
  });
}

/** Lets requests through no faster than the limits of its group say: leaky buckets that the members share. */
export class ThrottleNode extends FilterNode {
  readonly #runtime: Runtime;
  readonly #group: number;
  readonly #member: number;
  readonly #queue: ThrottleQueue;

  constructor(runtime: Runtime, descriptor: ThrottleDescriptor, child: BlockNode) {
    super(descriptor, child);
    this.#runtime = runtime;
    this.#group = descriptor.group;
    this.#member = descriptor.member;
    this.#queue = new ThrottleQueue(runtime.arena, descriptor.group + QUEUE);
  }

  override read(offset: number, pointer: number, length: number): void {
    this.#wait('read', length);
    super.read(offset, pointer, length);
  }

  override write(offset: number, pointer: number, length: number): void {
    this.#wait('write', length);
    super.write(offset, pointer, length);
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#wait('write', length);
    super.writeUnits(offset, pointer, length, unit, skip);
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#wait('write', length);
    super.writeZeroes(offset, length, mayUnmap);
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    this.#wait('write', length);
    return super.writeZeroesFast(offset, length, mayUnmap);
  }

  override discard(offset: number, length: number): void {
    this.#wait('write', length);
    super.discard(offset, length);
  }

  #wait(direction: Direction, bytes: number): void {
    const { arena } = this.#runtime;
    const wanted = [`bps-total`, `bps-${direction}`, 'iops-total', `iops-${direction}`] as const;
    if (wanted.every((bucket) => this.#average(bucket) === 0)) return;
    const queue = this.#queue;
    let slot: number | undefined;
    for (;;) {
      const wait = withLock(arena, this.#group, () => {
        this.#leak();
        // Nobody overtakes those that wait already.
        const isTurn = queue.turn(direction) === slot;
        const delay = isTurn ? Math.max(...wanted.map((bucket) => this.#delay(bucket))) : Infinity;
        if (delay === 0) {
          for (const bucket of wanted) this.#account(bucket, bytes);
          if (slot !== undefined) queue.leave(slot, direction);
          return undefined;
        }
        slot ??= queue.join(direction, this.#member);
        const word = slot === undefined ? queue.freed : queue.word(slot);
        return { word, value: load(arena, word), delay };
      });
      if (wait === undefined) return;
      waitWhile(arena, wait.word, wait.value, wait.delay);
    }
  }

  #at(bucket: Bucket): number {
    return (this.#group + FIRST + BUCKETS.indexOf(bucket) * STRIDE) / 8;
  }

  #average(bucket: Bucket): number {
    return this.#runtime.arena.f64[this.#at(bucket) + AVERAGE] ?? 0;
  }

  #leak(): void {
    const { f64 } = this.#runtime.arena;
    const now = nowMs();
    const seconds = Math.max(0, now - (f64[(this.#group + SEEN) / 8] ?? now)) / 1000;
    f64[(this.#group + SEEN) / 8] = now;
    for (const bucket of BUCKETS) {
      const at = this.#at(bucket);
      f64[at + LEVEL] = Math.max(0, (f64[at + LEVEL] ?? 0) - (f64[at + AVERAGE] ?? 0) * seconds);
      f64[at + BURST] = Math.max(0, (f64[at + BURST] ?? 0) - (f64[at + MAX] ?? 0) * seconds);
    }
  }

  /** How long nothing goes through, in milliseconds. */
  #delay(bucket: Bucket): number {
    const at = this.#at(bucket);
    const [average = 0, max = 0, maxLength = 1, level = 0, burst = 0] = this.#runtime.arena.f64.subarray(
      at,
      at + STRIDE / 8,
    );
    if (average === 0) return 0;
    const extra = level - (max === 0 ? average / TENTH : max * maxLength);
    if (extra > 0) return (extra / average) * 1000;
    const burstExtra = maxLength > 1 ? burst - max / TENTH : 0;
    return burstExtra > 0 ? (burstExtra / max) * 1000 : 0;
  }

  #account(bucket: Bucket, bytes: number): void {
    const { f64 } = this.#runtime.arena;
    const size = f64[(this.#group + IOPS_SIZE) / 8] ?? 0;
    const requests = size > 0 && bytes > size ? bytes / size : 1;
    const amount = bucket.startsWith('bps') ? bytes : requests;
    const at = this.#at(bucket);
    f64[at + LEVEL] = (f64[at + LEVEL] ?? 0) + amount;
    f64[at + BURST] = (f64[at + BURST] ?? 0) + amount;
  }
}
