import type { BlkdebugEvent } from '../filters/blkdebug-events.js';
import type { FileNode } from '../raw/file.js';
import type { State } from './state.js';

/** What is told to the file before slices are read and written. */
export interface CacheEvents {
  readonly load: BlkdebugEvent | undefined;
  readonly update: BlkdebugEvent;
}

const NO_KEY = -1;
/** Slots of a set: the places a slice may have. */
const WAYS = 8;
const HEAD_BYTES = 64;
/** Bytes per slot besides the slice: key, last use, since, needed. */
const SLOT_BYTES = 32;

/** Bytes of the arena that a cache takes. */
export function cacheBytes(slots: number, sliceBytes: number): number {
  return HEAD_BYTES + slots * (SLOT_BYTES + sliceBytes);
}

/**
 * A write-back cache of slices of metadata (parts of L2 tables or of refcount blocks) in the shared state,
 * keyed by their offset in the file, set-associative. All calls are made under the state's lock, and a pointer is
 * good until the next {@link load}.
 *
 *     +0 dirty slots           float64
 *     +64 slots × key          float64   offset of the slice in the file, -1 none
 *         slots × used         float64   tick of the last use
 *         slots × since        float64   sequence of the first change that is not in the file, 0 clean
 *         slots × needed       float64   may be written when the state's `durable` is at least this
 *         slots × slice
 */
export class SliceCache {
  readonly sliceBytes: number;
  readonly #state: State;
  readonly #file: FileNode;
  readonly #slots: number;
  readonly #ways: number;
  readonly #sets: number;
  readonly #head: Float64Array;
  readonly #keys: Float64Array;
  readonly #used: Float64Array;
  readonly #since: Float64Array;
  readonly #needed: Float64Array;
  readonly #slices: number;
  /** Makes dirty slices writable when every slot holds one that is not. */
  readonly #makeWritable: () => void;
  readonly #events: CacheEvents;
  #hint = 0;

  /** @param slots a power of two */
  constructor(
    state: State,
    file: FileNode,
    pointer: number,
    slots: number,
    events: CacheEvents,
    makeWritable: () => void,
  ) {
    this.#events = events;
    this.sliceBytes = state.get('sliceBytes');
    this.#state = state;
    this.#file = file;
    this.#slots = slots;
    this.#ways = Math.min(slots, WAYS);
    this.#sets = slots / Math.max(1, this.#ways);
    this.#makeWritable = makeWritable;
    const { f64 } = state.arena;
    this.#head = f64.subarray(pointer / 8, (pointer + HEAD_BYTES) / 8);
    const first = (pointer + HEAD_BYTES) / 8;
    this.#keys = f64.subarray(first, first + slots);
    this.#used = f64.subarray(first + slots, first + slots * 2);
    this.#since = f64.subarray(first + slots * 2, first + slots * 3);
    this.#needed = f64.subarray(first + slots * 3, first + slots * 4);
    this.#slices = pointer + HEAD_BYTES + slots * SLOT_BYTES;
  }

  /** Once, at open. */
  initialise(): void {
    this.#keys.fill(NO_KEY);
  }

  /** The slot of the slice at `offset`, or -1. */
  find(offset: number): number {
    if (this.#keys[this.#hint] !== offset) {
      const slot = this.#slotOf(offset);
      if (slot < 0) return -1;
      this.#hint = slot;
    }
    const tick = this.#state.get('tick') + 1;
    this.#state.set('tick', tick);
    this.#used[this.#hint] = tick;
    return this.#hint;
  }

  /** The slot of the slice at `offset`, read from the file where needed. */
  load(offset: number): number {
    const found = this.find(offset);
    if (found >= 0) return found;
    const slot = this.#evict(this.#firstOf(offset));
    this.#keys[slot] = NO_KEY;
    if (this.#events.load !== undefined) this.#file.event?.(this.#events.load);
    this.#file.read(offset, this.pointer(slot), this.sliceBytes);
    this.#keys[slot] = offset;
    this.#clean(slot);
    this.#needed[slot] = 0;
    this.#hint = slot;
    return this.find(offset);
  }

  pointer(slot: number): number {
    return this.#slices + slot * this.sliceBytes;
  }

  /**
   * Marks a slice changed by the change `sequence`.
   *
   * @param needed what has to be durable before the slice may be written; 0 nothing new
   */
  markDirty(slot: number, sequence: number, needed: number): void {
    if (this.#since[slot] === 0) {
      this.#since[slot] = sequence;
      this.#head[0] = this.#dirty + 1;
    }
    if (needed > (this.#needed[slot] ?? 0)) this.#needed[slot] = needed;
  }

  /** Writes the dirty slices that may be. Returns the oldest change left unwritten, or Infinity. */
  writeDirty(): number {
    const durable = this.#state.get('durable');
    let oldest = Infinity;
    for (let slot = 0, left = this.#dirty; slot < this.#slots && left > 0; slot++) {
      const since = this.#since[slot] ?? 0;
      if (since === 0) continue;
      left--;
      if ((this.#needed[slot] ?? 0) <= durable) this.#write(slot);
      else oldest = Math.min(oldest, since);
    }
    return oldest;
  }

  /** The oldest change that is not in the file, or Infinity. */
  oldestChange(): number {
    let oldest = Infinity;
    for (let slot = 0, left = this.#dirty; slot < this.#slots && left > 0; slot++) {
      const since = this.#since[slot] ?? 0;
      if (since === 0) continue;
      left--;
      if (since < oldest) oldest = since;
    }
    return oldest;
  }

  /** Forgets, unwritten, what is cached of the file's bytes [start, end): they became something else. */
  forget(start: number, end: number): void {
    for (let offset = start; offset < end; offset += this.sliceBytes) {
      const slot = this.#slotOf(offset);
      if (slot < 0) continue;
      this.#keys[slot] = NO_KEY;
      this.#clean(slot);
      this.#needed[slot] = 0;
      this.#used[slot] = 0;
    }
  }

  /** Whether most slots are dirty, so that it is time to write before a reader has to. */
  get crowded(): boolean {
    return this.#dirty * 2 > this.#slots;
  }

  get #dirty(): number {
    return this.#head[0] ?? 0;
  }

  #clean(slot: number): void {
    if (this.#since[slot] !== 0) this.#head[0] = this.#dirty - 1;
    this.#since[slot] = 0;
  }

  /** The first slot of the set that a slice belongs to. */
  #firstOf(offset: number): number {
    const index = Math.floor(offset / this.sliceBytes);
    // Tables at equal distances must not all fall into one set.
    return ((index + Math.floor(index / this.#sets)) % this.#sets) * this.#ways;
  }

  #slotOf(offset: number): number {
    const first = this.#firstOf(offset);
    for (let slot = first; slot < first + this.#ways; slot++) if (this.#keys[slot] === offset) return slot;
    return -1;
  }

  #write(slot: number): void {
    this.#file.event?.(this.#events.update);
    this.#file.write(this.#keys[slot] ?? NO_KEY, this.pointer(slot), this.sliceBytes);
    this.#clean(slot);
  }

  #evict(first: number): number {
    const clean = this.#leastUsed(first, (slot) => this.#since[slot] === 0);
    if (clean >= 0) return clean;
    const writable = (slot: number) => (this.#needed[slot] ?? 0) <= this.#state.get('durable');
    let slot = this.#leastUsed(first, writable);
    if (slot < 0) {
      this.#makeWritable();
      slot = this.#leastUsed(first, writable);
    }
    this.#write(slot);
    return slot;
  }

  #leastUsed(first: number, eligible: (slot: number) => boolean): number {
    let best = -1;
    let bestUsed = Infinity;
    for (let slot = first; slot < first + this.#ways; slot++) {
      const used = this.#used[slot] ?? 0;
      if (used < bestUsed && eligible(slot)) {
        best = slot;
        bestUsed = used;
      }
    }
    return best;
  }
}
