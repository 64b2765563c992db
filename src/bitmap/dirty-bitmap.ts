import { StillframeError } from '../errors.js';
import { load, store } from '../kernels/futex.js';
import type { Runtime } from '../kernels/runtime.js';

/** Smallest and largest granularity in bytes; powers of two. */
export const MIN_GRANULARITY = 512;
export const MAX_GRANULARITY = 2 ** 31;
/** Longest name in bytes of UTF-8. */
export const MAX_NAME_BYTES = 1023;
/** The kernels count bits up to here. */
const MAX_BITS = 2 ** 31 - 1;
/** The kernels look at this many bytes at once. */
const BITS_ALIGNMENT = 16;

// The block of one bitmap in the arena; the name, UTF-8, is behind it.
const NEXT = 0;
const FLAGS = 4;
const BITS = 8;
const NAME_BYTES = 12;
const GRANULARITY = 16;
const LENGTH = 24;
const PLACE = 32;
const SUCCESSOR = 40;
const PINS = 44;
const HOME = 48;
const HEAD_BYTES = 56;

const ENABLED = 1;
const PERSISTENT = 2;
const INCONSISTENT = 4;
const CHANGED = 8;
const BUSY = 16;

export interface BitmapOptions {
  /** Empty: anonymous. */
  readonly name: string;
  /** Bytes that one bit stands for: a power of two. */
  readonly granularity: number;
  /** Bytes of the drive. */
  readonly length: number;
  readonly enabled: boolean;
  readonly persistent: boolean;
  readonly inconsistent?: boolean | undefined;
  /** See {@link DirtyBitmap.place}. Default -1. */
  readonly place?: number | undefined;
}

/** Granularity of a bitmap nobody chose one for: the cluster size, but from 4 KiB to 64 KiB; as in QEMU. */
export function defaultGranularity(clusterSize: number | undefined): number {
  return Math.min(65536, Math.max(4096, clusterSize ?? 65536));
}

/** Granularity from 64 KiB on with which a bitmap of a drive of that length can be had. */
export function smallestGranularity(length: number): number {
  let granularity = 65536;
  while (bitsOf(length, granularity) > MAX_BITS) granularity *= 2;
  return granularity;
}

/** Bits of a bitmap. */
export function bitsOf(length: number, granularity: number): number {
  return Math.ceil(length / granularity);
}

/**
 * @param options what somebody asked for; texts of errors as QMP `block-dirty-bitmap-add` has them
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function checkBitmap(options: Pick<BitmapOptions, 'name' | 'granularity' | 'length'>): void {
  const { name, granularity, length } = options;
  const invalid = (message: string) => new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
  if (name === '') throw invalid('Bitmap name cannot be empty');
  if (Buffer.byteLength(name) > MAX_NAME_BYTES) {
    throw invalid(`Bitmap name too long: ${name.slice(0, 2 * MAX_NAME_BYTES)}`);
  }
  if (name.includes('\0')) throw invalid('Bitmap name cannot contain a zero byte');
  const power = Number.isInteger(Math.log2(granularity));
  if (!power || granularity < MIN_GRANULARITY || granularity > MAX_GRANULARITY) {
    throw invalid(`Granularity must be power of 2 and at least 512, at most 2G; it is ${granularity}`);
  }
  checkBits(length, granularity);
}

function checkBits(length: number, granularity: number): void {
  if (bitsOf(length, granularity) <= MAX_BITS) return;
  throw new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `Too much space will be occupied by the bitmap: ${length} bytes need more than ${MAX_BITS} bits of ${granularity} bytes. Use larger granularity`,
  );
}

/**
 * A dirty bitmap: which parts of a drive were written to while it was enabled. One thread's view of it; all of it is
 * in the arena. Offsets and lengths are bytes of the drive. Bits are changed atomically by any number of threads.
 *
 * In memory and on disk alike bit n, for the bytes from n × granularity on, is bit n % 8 of byte n / 8.
 */
export class DirtyBitmap {
  /** Of its block in the arena: the same for every thread. */
  readonly pointer: number;
  readonly granularity: number;
  readonly #runtime: Runtime;

  constructor(runtime: Runtime, pointer: number) {
    this.#runtime = runtime;
    this.pointer = pointer;
    this.granularity = runtime.arena.f64[(pointer + GRANULARITY) / 8] ?? 0;
  }

  /** Makes one without bits and in no set. @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED */
  static create(runtime: Runtime, options: BitmapOptions): DirtyBitmap {
    const { arena } = runtime;
    const name = Buffer.from(options.name, 'utf8');
    const pointer = arena.alloc(HEAD_BYTES + name.length, `dirty bitmap '${options.name}'`);
    arena.u8.set(name, pointer + HEAD_BYTES);
    arena.u32[(pointer + NAME_BYTES) >> 2] = name.length;
    arena.f64[(pointer + GRANULARITY) / 8] = options.granularity;
    arena.f64[(pointer + LENGTH) / 8] = options.length;
    arena.f64[(pointer + PLACE) / 8] = options.place ?? -1;
    arena.i32[(pointer + FLAGS) >> 2] =
      (options.enabled ? ENABLED : 0) |
      (options.persistent ? PERSISTENT : 0) |
      (options.inconsistent === true ? INCONSISTENT : 0);
    return new DirtyBitmap(runtime, pointer);
  }

  /** Empty: anonymous. */
  get name(): string {
    const { arena } = this.#runtime;
    const bytes = arena.u32[(this.pointer + NAME_BYTES) >> 2] ?? 0;
    return Buffer.from(arena.copyOut(this.pointer + HEAD_BYTES, bytes)).toString('utf8');
  }

  /** Bytes of the drive. */
  get length(): number {
    return this.#runtime.arena.f64[(this.pointer + LENGTH) / 8] ?? 0;
  }

  get bits(): number {
    return bitsOf(this.length, this.granularity);
  }

  /** Whether writes are recorded, unless it is inconsistent. */
  get enabled(): boolean {
    return this.#flag(ENABLED);
  }

  set enabled(value: boolean) {
    this.#setFlag(ENABLED, value);
  }

  /** Whether what is written from now on is kept, here or in its successor. */
  get recording(): boolean {
    return !this.inconsistent && (this.enabled || this.successor?.enabled === true);
  }

  /** A job or an export relies on it: nobody else may change it. */
  get busy(): boolean {
    return this.#flag(BUSY);
  }

  set busy(value: boolean) {
    this.#setFlag(BUSY, value);
  }

  /** How many exports show it; it cannot go as long as one does. */
  get pins(): number {
    return load(this.#runtime.arena, this.pointer + PINS);
  }

  pin(by: 1 | -1): void {
    Atomics.add(this.#runtime.arena.i32, (this.pointer + PINS) >> 2, by);
  }

  /** The bitmap that takes what is written while a job uses this one, which stays as it is meanwhile. */
  get successor(): DirtyBitmap | undefined {
    const pointer = load(this.#runtime.arena, this.pointer + SUCCESSOR) >>> 0;
    return pointer === 0 ? undefined : new DirtyBitmap(this.#runtime, pointer);
  }

  set successor(value: DirtyBitmap | undefined) {
    store(this.#runtime.arena, this.pointer + SUCCESSOR, value?.pointer ?? 0);
  }

  /** Arena pointer of the set that it is in, or was in last. */
  get home(): number {
    return load(this.#runtime.arena, this.pointer + HOME) >>> 0;
  }

  set home(pointer: number) {
    store(this.#runtime.arena, this.pointer + HOME, pointer);
  }

  /** Has the other one's bits from now on, and the other one has these. Both are of one granularity and length. */
  swapBits(other: DirtyBitmap): void {
    const { u32 } = this.#runtime.arena;
    const [own, theirs] = [(this.pointer + BITS) >> 2, (other.pointer + BITS) >> 2];
    [u32[own], u32[theirs]] = [u32[theirs] ?? 0, u32[own] ?? 0];
  }

  /** Whether the image keeps it when it is closed. */
  get persistent(): boolean {
    return this.#flag(PERSISTENT);
  }

  /** Whoever recorded into it did not come to store it: it can be removed and nothing else. */
  get inconsistent(): boolean {
    return this.#flag(INCONSISTENT);
  }

  set inconsistent(value: boolean) {
    this.#setFlag(INCONSISTENT, value);
  }

  /** What the image has stored of it is not valid any more. */
  get changed(): boolean {
    return this.#flag(CHANGED);
  }

  set changed(value: boolean) {
    this.#setFlag(CHANGED, value);
  }

  /** Where the image has stored it, in the image format's own terms; -1 nowhere yet. */
  get place(): number {
    return this.#runtime.arena.f64[(this.pointer + PLACE) / 8] ?? -1;
  }

  set place(value: number) {
    this.#runtime.arena.f64[(this.pointer + PLACE) / 8] = value;
  }

  /** Whether its bits are in memory: all but {@link name}, sizes and flags needs them. */
  get loaded(): boolean {
    return (this.#runtime.arena.u32[(this.pointer + BITS) >> 2] ?? 0) !== 0;
  }

  /** Gives it bits, all clear. @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED */
  makeBits(): void {
    this.#runtime.arena.u32[(this.pointer + BITS) >> 2] = this.#allocateBits(this.bits);
  }

  /** Arena pointer of the bits: {@link bitBytes} bytes, those behind the last bit zero. */
  get bitsPointer(): number {
    const pointer = this.#runtime.arena.u32[(this.pointer + BITS) >> 2] ?? 0;
    if (pointer === 0) throw new Error(`bitmap invariant: the bits of '${this.name}' are not in memory`);
    return pointer;
  }

  /** Bytes that hold the bits. */
  get bitBytes(): number {
    return Math.ceil(this.bits / 8);
  }

  /** Clears what is behind the last bit, after somebody wrote the bits as bytes. */
  clearTail(): void {
    const { bits, bitBytes } = this;
    if (bits % 8 === 0) return;
    const { u8 } = this.#runtime.arena;
    const last = this.bitsPointer + bitBytes - 1;
    u8[last] = (u8[last] ?? 0) & ((1 << (bits % 8)) - 1);
  }

  /** Bytes that are dirty, in whole granules: the last one may reach beyond the end of the drive. */
  get count(): number {
    return this.#runtime.kernels.bitmapCount(this.bitsPointer, 0, this.bits) * this.granularity;
  }

  /** Bytes of the drive that are dirty. */
  get dirtyBytes(): number {
    return this.count - this.#beyondEnd();
  }

  /** Bytes that the last granule has beyond the end of the drive, where it is dirty. */
  #beyondEnd(): number {
    const { bits, granularity, length } = this;
    return bits > 0 && this.test(length - 1) ? bits * granularity - length : 0;
  }

  /** Whether the granule of a byte is dirty. */
  test(offset: number): boolean {
    return this.#runtime.kernels.bitmapTest(this.bitsPointer, Math.floor(offset / this.granularity));
  }

  /** Every granule that the range touches becomes dirty. What is outside of the drive does not count. */
  set(offset: number, length: number): void {
    if (length <= 0) return;
    const first = Math.max(0, Math.floor(offset / this.granularity));
    const end = Math.min(this.bits, Math.ceil((offset + length) / this.granularity));
    if (end > first) this.#runtime.kernels.bitmapSet(this.bitsPointer, first, end - first);
  }

  /** Cleans whole granules: the range starts at one and ends at one or at the end of the drive. */
  clear(offset: number, length: number): void {
    this.take(offset, length);
  }

  /** Cleans whole granules as {@link clear} does. @returns bytes of the drive that were dirty */
  take(offset: number, length: number): number {
    const { granularity } = this;
    const end = offset + length;
    if (offset % granularity !== 0 || (end % granularity !== 0 && end !== this.length)) {
      throw new RangeError(`[${offset}, ${end}) is not made of granules of ${granularity} bytes`);
    }
    const first = offset / granularity;
    const last = Math.ceil(end / granularity);
    if (last <= first) return 0;
    const beyond = end === this.length ? this.#beyondEnd() : 0;
    const granules = this.#runtime.kernels.bitmapTestAndClear(this.bitsPointer, first, last - first);
    return granules * granularity - beyond;
  }

  /**
   * The first dirty area in [from, end), at most `most` bytes of it; undefined where there is none. It starts
   * and ends inside of the range even where its granules do not.
   */
  nextDirty(
    from: number,
    end: number = this.length,
    most = Infinity,
  ): { offset: number; length: number } | undefined {
    const { granularity } = this;
    const { kernels } = this.#runtime;
    const stop = Math.min(end, this.length);
    if (from >= stop) return undefined;
    const bits = this.bitsPointer;
    const lastBit = Math.ceil(stop / granularity);
    const first = kernels.bitmapNextSet(bits, Math.floor(from / granularity), lastBit);
    if (first < 0) return undefined;
    const offset = Math.max(from, first * granularity);
    const reach = Math.min(stop, offset + most);
    const clean = kernels.bitmapNextClear(bits, first, Math.ceil(reach / granularity));
    return { offset, length: (clean < 0 ? reach : Math.min(reach, clean * granularity)) - offset };
  }

  /**
   * Everything dirty in `source` becomes dirty here; granularities may differ, and a granule of ours is dirty when
   * any part of it is.
   *
   * @throws StillframeError ERR_STILLFRAME_SIZE_MISMATCH
   */
  merge(source: DirtyBitmap): void {
    if (source.length !== this.length) {
      throw new StillframeError(
        'ERR_STILLFRAME_SIZE_MISMATCH',
        `Bitmaps are of different sizes (destination size is ${this.length}, source size is ${source.length}) and can't be merged`,
      );
    }
    const { kernels } = this.#runtime;
    const [target, from] = [this.bitsPointer, source.bitsPointer];
    if (source.granularity === this.granularity) {
      kernels.bitmapMerge(target, from, this.bits);
    } else if (source.granularity < this.granularity) {
      const shift = Math.log2(this.granularity / source.granularity);
      kernels.bitmapCoarsen(target, from, source.bits, shift);
    } else {
      for (let area = source.nextDirty(0); area !== undefined; ) {
        this.set(area.offset, area.length);
        area = source.nextDirty(area.offset + area.length);
      }
    }
  }

  /**
   * The drive has another length now: what was dirty and is still there stays dirty, what is new is clean.
   * Nobody may use the bitmap meanwhile.
   *
   * @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED, ERR_STILLFRAME_INVALID_ARGUMENT (too many bits)
   */
  resize(length: number): void {
    const { arena } = this.#runtime;
    if (this.loaded) {
      checkBits(length, this.granularity);
      const old = this.bitsPointer;
      const bits = bitsOf(length, this.granularity);
      const fresh = this.#allocateBits(bits);
      const bytes = Math.ceil(Math.min(bits, this.bits) / 8);
      arena.u8.copyWithin(fresh, old, old + bytes);
      arena.u32[(this.pointer + BITS) >> 2] = fresh;
      arena.free(old);
    }
    arena.f64[(this.pointer + LENGTH) / 8] = length;
    if (this.loaded) this.clearTail();
  }

  /** Gives its memory back. Nobody may use it any more. */
  free(): void {
    if (this.loaded) this.#runtime.arena.free(this.bitsPointer);
    this.#runtime.arena.free(this.pointer);
  }

  #allocateBits(bits: number): number {
    const bytes = Math.ceil(bits / 8 / BITS_ALIGNMENT) * BITS_ALIGNMENT;
    return this.#runtime.arena.alloc(Math.max(BITS_ALIGNMENT, bytes), `dirty bitmap '${this.name}'`);
  }

  #flag(flag: number): boolean {
    return (load(this.#runtime.arena, this.pointer + FLAGS) & flag) !== 0;
  }

  #setFlag(flag: number, value: boolean): void {
    const { i32 } = this.#runtime.arena;
    const word = (this.pointer + FLAGS) >> 2;
    if (value) Atomics.or(i32, word, flag);
    else Atomics.and(i32, word, ~flag);
  }
}

/** Links of the list in a {@link BitmapSet}. */
export const NEXT_BITMAP = NEXT;
