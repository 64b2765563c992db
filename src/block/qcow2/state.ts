import { StillframeError } from '../../errors.js';
import type { Arena } from '../../kernels/arena.js';
import { load, lock, unlock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import {
  AUTOCLEAR_BITMAPS,
  AUTOCLEAR_DATA_FILE_RAW,
  MAX_REFCOUNT_TABLE_BYTES,
  type Qcow2Header,
} from './header.js';
import type { Places } from './places.js';
import { cacheBytes } from './slice-cache.js';

/**
 * The shared state of an open qcow2 image: one block of the arena.
 *
 *     +0    lock           int32   held for look-ups and changes of metadata, never across I/O of data
 *     +4    failed         int32   a sync of the disk failed: what is durable is unknown from then on
 *     +8    scratch mask   int32   bit per scratch buffer in use
 *     +12   readers[2]     int32   reads in flight, by the epoch they began in
 *     +20   mutated        int32   first mutation seen: autoclear bits are dealt with
 *     +24   relieving      int32   a thread is writing metadata back to make room
 *     +28   preallocated   int32   0 not known, 1 no, 2 yes: the holes of the file are looked at as well
 *     +32   damaged        int32   damage was found in a writable image: it takes no more changes
 *     +40   bitmaps                the dirty bitmaps: see BitmapSet
 *     +64   numbers        float64 × 64, see NUMBERS
 *     +1024 cache slots, caches, tables, deferred frees, scratch buffers (pointers are among the numbers)
 *
 * Numbers are read and written under the lock, except the constant ones, which are set before any other thread
 * knows of the image.
 */
const LOCK = 0;
const FAILED = 4;
const DAMAGED = 32;
export const SCRATCH_MASK = 8;
export const READERS = 12;
export const MUTATED = 20;
export const RELIEVING = 24;
export const PREALLOCATED = 28;
export const BITMAPS = 40;
const NUMBERS_AT = 64;
const HEAD_BYTES = 1024;

const NUMBERS = [
  // Constants: pointers into the arena, sizes in bytes unless named otherwise.
  'l1',
  'l1Entries',
  'l1Offset',
  'l2Cache',
  'l2Slots',
  'refcountCache',
  'refcountSlots',
  'sliceBytes',
  'metaBuffer',
  'metaBytes',
  'frees',
  'freeCapacity',
  'scratch',
  'scratchBytes',
  'scratchCount',
  /** Zero bytes, never written. */
  'zeroes',
  'zeroBytes',
  /** Length of the file when it was opened: what lies behind was allocated by us. */
  'openLength',
  'refcountTable',
  'refcountTableCapacity',
  /** The header names a backing file, opened or not: unallocated is not zero. */
  'hasBacking',
  // Variables.
  /** Places of snapshots' metadata, see places.ts: pointer, how many numbers, and memory of their own, 0: none. */
  'places',
  'placesCount',
  'placesOwned',
  'refcountTableOffset',
  'refcountTableEntries',
  /** 1 while the header has autoclear bits that a writer of ours has to clear; those that it keeps. */
  'autoclear',
  'autoclearKept',
  /** Where the bitmap directory is, and its bytes, 0 where there is none. */
  'bitmapsOffset',
  'bitmapsBytes',
  /** Counts changes of L1 and L2 entries. */
  'sequence',
  /** Everything that changes up to this sequence rely on (data, refcounts, new tables) is durable. */
  'durable',
  /** Counts uses of cache slots. */
  'tick',
  /** No cluster below this index is free. */
  'firstFree',
  /** Counts the times freed clusters became allocatable. */
  'generation',
  /** Where compressed data goes next: inside of a cluster that has some and room for more; 0 where none has. */
  'packAt',
  /** As `packAt`: the cluster with the most room that was left when no more fitted in. */
  'spareAt',
  'l1DirtyFrom',
  'l1DirtyTo',
  'l1Since',
  'l1Needed',
  'refcountTableDirtyFrom',
  'refcountTableDirtyTo',
  'freeCount',
  'freeDurable',
  'freeGrace',
  'epoch',
] as const;
export type NumberName = (typeof NUMBERS)[number];

/** Smallest and largest unit the caches work in. */
const SLICE_BYTES = 4096;
/** A cache holds the L2 tables of the whole image if they fit into this. */
const MIN_L2_CACHE_BYTES = 64 * 1024;
const MAX_L2_CACHE_BYTES = 8 * 1024 * 1024;
/** No image takes a larger part of the arena for its cache, so that there is room for long chains. */
const L2_CACHE_PART = 64;
const REFCOUNT_CACHE_BYTES = 256 * 1024;
const META_BYTES = 65536;
/** Deferred frees that fit: { offset, clusters, sequence } as float64. */
const FREE_CAPACITY = 8192;
export const FREE_ENTRY = 24;

export function sliceBytesOf(clusterSize: number): number {
  return Math.min(clusterSize, SLICE_BYTES);
}

/**
 * Allocates the state and fills its constants. Tables are not read yet.
 *
 * @param places what belongs to snapshots; only a writable image needs to know
 */
export function allocateState(
  runtime: Runtime,
  path: string,
  header: Qcow2Header,
  fileLength: number,
  readOnly: boolean,
  places: Places,
): number {
  const { arena } = runtime;
  const { clusterSize } = header;
  const sliceBytes = sliceBytesOf(clusterSize);
  const l2Slots = l2CacheBytes(arena, header) / sliceBytes;
  const refcountSlots = readOnly ? 0 : REFCOUNT_CACHE_BYTES / sliceBytes;
  const freeCapacity = readOnly ? 0 : FREE_CAPACITY;
  const metaBytes = readOnly ? 0 : META_BYTES;
  const tableCapacity = readOnly ? 0 : refcountTableCapacity(header, fileLength);
  // For reading compressed clusters; a writer fills up clusters there, too.
  const scratchBytes = clusterSize * 3;
  const scratchCount = readOnly ? 2 : 4;

  let total = HEAD_BYTES;
  const place = (bytes: number): number => {
    const at = total;
    total += Math.ceil(bytes / 64) * 64;
    return at;
  };
  const l2Cache = place(cacheBytes(l2Slots, sliceBytes));
  const refcountCache = place(cacheBytes(refcountSlots, sliceBytes));
  const l1 = place(header.l1Size * 8);
  const refcountTable = place(tableCapacity * 8);
  const frees = place(freeCapacity * FREE_ENTRY);
  const metaBuffer = place(metaBytes);
  const zeroBytes = Math.min(clusterSize, metaBytes);
  const zeroes = place(zeroBytes);
  const scratch = place(scratchBytes * scratchCount);
  const placesAt = place(places.byteLength);

  // Bitmaps without the bit are out of date, and the bit without bitmaps means nothing.
  const autoclearKept =
    (header.dataFileRaw ? AUTOCLEAR_DATA_FILE_RAW : 0n) |
    (header.hasBitmaps ? header.autoclearFeatures & AUTOCLEAR_BITMAPS : 0n);

  const control = arena.alloc(total, `metadata of '${path}'`);
  const state = new State(runtime.arena, control, path);
  const constants: Partial<Record<NumberName, number>> = {
    l1: control + l1,
    l1Entries: header.l1Size,
    l1Offset: header.l1TableOffset,
    l2Cache: control + l2Cache,
    l2Slots,
    refcountCache: control + refcountCache,
    refcountSlots,
    sliceBytes,
    metaBuffer: control + metaBuffer,
    metaBytes,
    frees: control + frees,
    freeCapacity,
    scratch: control + scratch,
    scratchBytes,
    scratchCount,
    zeroes: control + zeroes,
    zeroBytes,
    openLength: fileLength,
    places: control + placesAt,
    placesCount: places.length,
    autoclear: header.autoclearFeatures === autoclearKept ? 0 : 1,
    autoclearKept: Number(autoclearKept),
    refcountTable: control + refcountTable,
    refcountTableCapacity: tableCapacity,
    hasBacking: header.backingFile === undefined ? 0 : 1,
    refcountTableOffset: header.refcountTableOffset,
    refcountTableEntries: (header.refcountTableClusters * clusterSize) / 8,
    sequence: 1,
    durable: 0,
    firstFree: 1,
  };
  for (const name of NUMBERS) state.set(name, constants[name] ?? 0);
  arena.f64.set(places, (control + placesAt) / 8);
  return control;
}

/** Snapshots have other tables from now on. Under the lock; facades that know the old ones are to be made anew. */
export function replacePlaces({ arena }: Runtime, state: State, places: Places): void {
  const owned = places.length === 0 ? 0 : arena.alloc(places.byteLength, 'places of snapshots');
  arena.f64.set(places, owned / 8);
  if (state.get('placesOwned') !== 0) arena.free(state.get('placesOwned'));
  state.set('places', owned);
  state.set('placesCount', places.length);
  state.set('placesOwned', owned);
}

/** Gives the state of an image back. */
export function freeState({ arena }: Runtime, control: number): void {
  const owned = new State(arena, control, '').get('placesOwned');
  if (owned !== 0) arena.free(owned);
  arena.free(control);
}

/** A power of two. */
function l2CacheBytes(arena: Arena, header: Qcow2Header): number {
  const tables = Math.ceil(header.length / header.clusterSize) * (header.extendedL2 ? 16 : 8);
  const most = Math.min(MAX_L2_CACHE_BYTES, arena.u8.length / L2_CACHE_PART);
  // Room for tables in use at once even where the image is tiny.
  const bytes = Math.max(MIN_L2_CACHE_BYTES, Math.min(tables, most));
  return 2 ** Math.floor(Math.log2(bytes * 2 - 1));
}

/**
 * Entries the refcount table may grow to. Room for it is taken at open, so that no write fails for want of it:
 * what the file has now, and twice the whole disk written anew.
 */
function refcountTableCapacity(header: Qcow2Header, fileLength: number): number {
  const { clusterSize } = header;
  const perBlock = (clusterSize * 8) / header.refcountBits;
  const clusters = (2 * header.length + fileLength) / clusterSize + 65536;
  const perCluster = clusterSize / 8;
  const wanted = Math.max(
    header.refcountTableClusters * perCluster,
    // Half as much again for the steps it grows in.
    Math.ceil((clusters / perBlock) * 1.5) + perCluster,
  );
  return Math.min(Math.ceil(wanted / perCluster) * perCluster, MAX_REFCOUNT_TABLE_BYTES / 8);
}

const INDEX = Object.fromEntries(NUMBERS.map((name, index) => [name, index])) as Record<NumberName, number>;

/** One thread's view of the shared state. */
export class State {
  readonly arena: Arena;
  readonly control: number;
  readonly #path: string;
  readonly #numbers: Float64Array;

  constructor(arena: Arena, control: number, path: string) {
    this.arena = arena;
    this.control = control;
    this.#path = path;
    const first = (control + NUMBERS_AT) / 8;
    this.#numbers = arena.f64.subarray(first, first + NUMBERS.length);
  }

  get(name: NumberName): number {
    return this.#numbers[INDEX[name]] ?? 0;
  }

  set(name: NumberName, value: number): void {
    this.#numbers[INDEX[name]] = value;
  }

  lock(): void {
    lock(this.arena, this.control + LOCK);
  }

  unlock(): void {
    unlock(this.arena, this.control + LOCK);
  }

  withLock<T>(body: () => T): T {
    this.lock();
    try {
      return body();
    } finally {
      this.unlock();
    }
  }

  /** A change of an L1 or L2 entry is about to be made: its sequence number. */
  nextSequence(): number {
    const next = this.get('sequence') + 1;
    this.set('sequence', next);
    return next;
  }

  /**
   * Syncs by `flush`, with the lock let go meanwhile unless `hold`. A failure is final: the kernel may have dropped
   * the pages it could not write, so no later sync can promise anything.
   */
  sync(flush: () => void, hold: boolean): void {
    this.checkHealth();
    if (!hold) this.unlock();
    try {
      flush();
    } catch (error) {
      Atomics.store(this.arena.i32, (this.control + FAILED) >> 2, 1);
      throw error;
    } finally {
      if (!hold) this.lock();
    }
  }

  /** Latches that the image is damaged. @returns whether this call was the first */
  latchDamage(): boolean {
    return Atomics.exchange(this.arena.i32, (this.control + DAMAGED) >> 2, 1) === 0;
  }

  /** Whether damage was found. */
  get damaged(): boolean {
    return load(this.arena, this.control + DAMAGED) !== 0;
  }

  /** @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE once damage was found */
  checkUndamaged(): void {
    if (!this.damaged) return;
    throw new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${this.#path}' takes no more changes since damage was found in it; close it and repair it with 'stillframe check --repair all'`,
    );
  }

  /** @throws StillframeError ERR_STILLFRAME_IO after a failed sync */
  checkHealth(): void {
    if (load(this.arena, this.control + FAILED) === 0) return;
    throw new StillframeError(
      'ERR_STILLFRAME_IO',
      `'${this.#path}': an earlier sync to the disk failed, so its state there is unknown; close the image and check it with 'qemu-img check'`,
    );
  }
}
