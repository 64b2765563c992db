/**
 * When are two states of the simulated world the same? When the shared memory and the files hold the same, and every
 * thread is at the same place of the code and last saw the same of what it has looked at.
 *
 * Left out is what no decision rests on: counters for progress, ticks of caches, and the values of sequence words. Of
 * the last only matters whether a thread has seen the present one.
 */
import type { Arena } from '#src/kernels/arena.js';
import type { Runtime } from '#src/kernels/runtime.js';
import type { Files } from './files.js';
import { MAX_THREADS, mix, type World } from './world.js';

export interface Region {
  readonly from: number;
  readonly bytes: number;
}

const PAIRS = 12;
/** Numbers that make up a state at most. */
const PARTS = 400;

export class Digest {
  readonly #world: World;
  readonly #arena: Arena;
  readonly #runtime: Runtime;
  readonly #files: Files;
  readonly #buffer: number;
  /** Sequence words that threads saw: per thread pairs of address and value, address 0 ends them. */
  readonly #pairs: Int32Array;
  /** Memory for the parts of a state. */
  readonly #parts: number;
  #isSequence: (address: number) => boolean = () => false;
  readonly #seen = new Map<number, number>();

  /** @param shared arena pointer to 4 KiB that all threads have in common */
  constructor(world: World, runtime: Runtime, files: Files, buffer: number, shared: number) {
    this.#world = world;
    this.#runtime = runtime;
    this.#arena = runtime.arena;
    this.#files = files;
    this.#buffer = buffer;
    this.#parts = shared + MAX_THREADS * PAIRS * 8;
    this.#pairs = runtime.arena.i32.subarray(shared >> 2, (shared >> 2) + MAX_THREADS * PAIRS * 2);
  }

  /** A run begins. */
  begin(isSequence: (address: number) => boolean): void {
    this.#isSequence = isSequence;
    this.clear();
  }

  /** Forgets what this thread has seen, but for these keys. */
  clear(...but: readonly number[]): void {
    for (const key of this.#seen.keys()) if (!but.includes(key)) this.#seen.delete(key);
    const first = this.#world.thread * PAIRS * 2;
    let kept = first;
    for (let at = first; at < first + PAIRS * 2; at += 2) {
      const [key = 0, value = 0] = [this.#pairs[at], this.#pairs[at + 1]];
      this.#pairs[at] = 0;
      if (key === 0 || !but.includes(key)) continue;
      this.#pairs[kept] = key;
      this.#pairs[kept + 1] = value;
      kept += 2;
    }
  }

  observe(key: number, value: number): void {
    if (!this.#isSequence(key)) {
      this.#seen.set(key, value);
      return;
    }
    const first = this.#world.thread * PAIRS * 2;
    for (let at = first; at < first + PAIRS * 2; at += 2) {
      if (this.#pairs[at] !== 0 && this.#pairs[at] !== key) continue;
      this.#pairs[at] = key;
      this.#pairs[at + 1] = value;
      return;
    }
    throw new Error('too many sequence words');
  }

  observeRead(inode: number, buffer: Uint8Array, offset: number, length: number): void {
    // Data goes to the arena, but for the few bytes that the code keeps elsewhere.
    if (buffer.buffer === this.#arena.u8.buffer) this.#seen.set(-100 - inode, this.#hash(offset, length));
  }

  /** Where this thread is and what it saw. */
  local(): readonly [number, number] {
    let mixed = stackDigest();
    let sum = 0;
    for (const [key, value] of this.#seen) sum = (sum + mix(mix(7, key), value)) % 9007199254740881;
    mixed = mix(mixed, sum);
    return [mixed | 0, (mixed / 4294967296) | 0];
  }

  /** @param regions what counts of the arena; `left`: what does not of them */
  whole(regions: readonly Region[], left: readonly Region[]): readonly [number, number] {
    const { u8, i32 } = this.#arena;
    const kept = left.map(({ from, bytes }) => u8.slice(from, from + bytes));
    for (const { from, bytes } of left) u8.fill(0, from, from + bytes);
    const parts = this.#world.localParts();
    for (const { from, bytes } of regions) parts.push(from, this.#hash(from, bytes));
    left.forEach(({ from }, index) => {
      const bytes = kept[index];
      if (bytes !== undefined) u8.set(bytes, from);
    });
    for (let at = 0; at < this.#pairs.length; at += 2) {
      const address = this.#pairs[at] ?? 0;
      parts.push(address === 0 ? 0 : this.#pairs[at + 1] === i32[address >> 2] ? 1 : 2);
    }
    const { bytes: content } = this.#files;
    let files = 0;
    this.#files.forEachPage((inode, page, at, bytes) => {
      u8.set(content.subarray(at, at + bytes), this.#buffer);
      files = (files + mix(mix(inode + 1, page), this.#hash(this.#buffer, bytes))) % 9007199254740881;
    });
    let described = 0;
    const description = this.#files.describe();
    for (let at = 0; at < description.length; at++) described = mix(described, description.charCodeAt(at));
    parts.push(files, described);
    if (parts.length > PARTS) throw new Error('a state has too many parts');
    const { f64 } = this.#arena;
    f64.set(parts, this.#parts / 8);
    const first = this.#hash(this.#parts, parts.length * 8);
    f64[this.#parts / 8] = 97;
    return [first, this.#hash(this.#parts, parts.length * 8)];
  }

  #hash(pointer: number, bytes: number): number {
    return Number(this.#runtime.kernels.xxh3(pointer, bytes) >> 11n);
  }
}

/** The simulator's own calls at the top of the stack, up to where the thread gives its turn away. */
const OWN_FRAMES = 5;

interface Site {
  getPosition(): number;
}

/** The place in the code the caller is at, with all its callers. */
function stackDigest(): number {
  const { prepareStackTrace, stackTraceLimit } = Error;
  Error.stackTraceLimit = 60;
  let mixed = 1;
  Error.prepareStackTrace = (_, sites) => {
    const places = sites as unknown as readonly Site[];
    for (let index = OWN_FRAMES; index < places.length; index++)
      mixed = mix(mixed, places[index]?.getPosition() ?? 0);
    return '';
  };
  // Looked at, it calls the function above.
  const { stack } = new Error();
  Error.prepareStackTrace = prepareStackTrace;
  Error.stackTraceLimit = stackTraceLimit;
  return stack === '' ? mixed : 0;
}
