import { withLock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, ThrottleDescriptor } from '../node.js';
import { FilterNode } from './filter.js';

/** Limits of a group (QAPI `ThrottleLimits`); 0 is none. */
export interface ThrottleLimits {
  readonly 'bps-total'?: number | undefined;
  readonly 'bps-read'?: number | undefined;
  readonly 'bps-write'?: number | undefined;
  readonly 'iops-total'?: number | undefined;
  readonly 'iops-read'?: number | undefined;
  readonly 'iops-write'?: number | undefined;
}

const BUCKETS = ['bps-total', 'bps-read', 'bps-write', 'iops-total', 'iops-read', 'iops-write'] as const;
type Bucket = (typeof BUCKETS)[number];

// In the arena: a lock, then for each bucket { rate per second, milliseconds from when on a request may pass } float64.
const FIRST = 8;
const STRIDE = 16;
/** Bytes of a group's buckets. */
export const THROTTLE_GROUP_BYTES = FIRST + BUCKETS.length * STRIDE;
/** What a bucket that has not been used for a while lets through at once, in milliseconds of its rate. */
const BURST_MS = 100;

const SLEEPER = new Int32Array(new SharedArrayBuffer(4));

function nowMs(): number {
  return Number(process.hrtime.bigint() / 1000n) / 1000;
}

/** Sets the limits of a group; of those that are missing there are none. */
export function setLimits(runtime: Pick<Runtime, 'arena'>, group: number, limits: ThrottleLimits): void {
  withLock(runtime.arena, group, () => {
    BUCKETS.forEach((bucket, index) => {
      const at = (group + FIRST + index * STRIDE) / 8;
      runtime.arena.f64[at] = limits[bucket] ?? 0;
      runtime.arena.f64[at + 1] = 0;
    });
  });
}

/** Lets requests through no faster than the limits of its group say: leaky buckets that the members share. */
export class ThrottleNode extends FilterNode {
  readonly #runtime: Runtime;
  readonly #group: number;

  constructor(runtime: Runtime, descriptor: ThrottleDescriptor, child: BlockNode) {
    super(descriptor, child);
    this.#runtime = runtime;
    this.#group = descriptor.group;
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

  #wait(direction: 'read' | 'write', bytes: number): void {
    const delay = Math.max(
      this.#take('bps-total', bytes),
      this.#take(`bps-${direction}`, bytes),
      this.#take('iops-total', 1),
      this.#take(`iops-${direction}`, 1),
    );
    if (delay > 0) Atomics.wait(SLEEPER, 0, 0, delay);
  }

  /** Takes from a bucket. @returns how long to wait, in milliseconds */
  #take(bucket: Bucket, amount: number): number {
    const { arena } = this.#runtime;
    const at = (this.#group + FIRST + BUCKETS.indexOf(bucket) * STRIDE) / 8;
    if ((arena.f64[at] ?? 0) === 0) return 0;
    return withLock(arena, this.#group, () => {
      const rate = arena.f64[at] ?? 0;
      if (rate === 0) return 0;
      const now = nowMs();
      const from = Math.max(arena.f64[at + 1] ?? 0, now - BURST_MS);
      arena.f64[at + 1] = from + (amount / rate) * 1000;
      return Math.max(0, from - now);
    });
  }
}
