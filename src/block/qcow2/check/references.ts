import { StillframeError } from '../../../errors.js';
import type { Runtime } from '../../../kernels/runtime.js';

/** Clusters of a chunk of counters. */
const CHUNK_CLUSTERS = 65536;
const CHUNK_BITS = 16;
/** The flag of a chunk whose counters have 32 bits instead of 8. */
const WIDE = 1;
const NARROW_MOST = 255;
const MARK_BYTES = CHUNK_CLUSTERS / 8;
/** Most memory for counters: more than 170 million clusters, 10 TiB of clusters of 64 KiB. */
const MOST_BYTES = 192 * 1024 * 1024;

/** Counters in a row: {@link pointer} is 0 where they were never needed and are all 0. */
export interface Counters {
  readonly pointer: number;
  /** 32 bits each, else 8. */
  readonly wide: boolean;
}

/**
 * One counter and one mark for every cluster of a file, in chunks that take memory only where something is counted:
 * the layout is that of assembly/check.ts, with a bitmap of marks behind the counters of each chunk.
 */
export class References {
  /** Most that a counter counts to. */
  readonly most: number;
  readonly #runtime: Runtime;
  readonly #path: string;
  /** References that {@link add} counted to clusters that had one before. */
  shared = 0;
  #directory: number;
  #chunks: number;
  #clusters: number;
  #bytes = 0;

  /**
   * @param clusters how many there are, at most 2^31 - 1
   * @param most what a refcount of the image can hold; counters hold no more than 2^32 - 1
   */
  constructor(runtime: Runtime, path: string, clusters: number, most: number) {
    this.#runtime = runtime;
    this.#path = path;
    this.most = Math.min(most, 2 ** 32 - 1);
    this.#clusters = clusters;
    this.#chunks = Math.max(1, Math.ceil(clusters / CHUNK_CLUSTERS));
    this.#directory = runtime.arena.alloc(this.#chunks * 4, `directory of counters of '${path}'`);
  }

  /** Pointer to the directory, for the kernels; changes when the file {@link grow}s. */
  get directory(): number {
    return this.#directory;
  }

  get clusters(): number {
    return this.#clusters;
  }

  /** The file has more clusters now. */
  grow(clusters: number): void {
    if (clusters <= this.#clusters) return;
    const chunks = Math.ceil(clusters / CHUNK_CLUSTERS);
    const { arena } = this.#runtime;
    if (chunks > this.#chunks) {
      const directory = arena.alloc(chunks * 4, `directory of counters of '${this.#path}'`);
      arena.u8.copyWithin(directory, this.#directory, this.#directory + this.#chunks * 4);
      arena.free(this.#directory);
      this.#directory = directory;
      this.#chunks = chunks;
    }
    this.#clusters = clusters;
  }

  get(cluster: number): number {
    const chunk = this.#chunk(cluster);
    if (chunk === 0) return 0;
    const { u8, u32 } = this.#runtime.arena;
    const index = cluster % CHUNK_CLUSTERS;
    return ((chunk & WIDE) !== 0 ? u32[(chunk >> 2) + index] : u8[chunk + index]) ?? 0;
  }

  /** Sets a counter, to {@link most} at most. */
  set(cluster: number, value: number): void {
    const least = Math.min(value, this.most);
    let chunk = this.#chunk(cluster);
    if (chunk === 0) {
      if (least === 0) return;
      chunk = this.#make(cluster, least > NARROW_MOST);
    } else if (least > NARROW_MOST && (chunk & WIDE) === 0) {
      chunk = this.#widen(cluster, chunk);
    }
    const { u8, u32 } = this.#runtime.arena;
    const index = cluster % CHUNK_CLUSTERS;
    if ((chunk & WIDE) !== 0) u32[(chunk >> 2) + index] = least;
    else u8[chunk + index] = least;
  }

  /** @returns how many of the `weight` references were too many */
  add(cluster: number, weight: number): number {
    const value = this.get(cluster) + weight;
    if (value > 1) this.shared++;
    this.set(cluster, value);
    return Math.max(0, value - this.most);
  }

  /** Marks a cluster that has been counted. */
  mark(cluster: number): void {
    const byte = this.#markByte(cluster);
    const { u8 } = this.#runtime.arena;
    if (byte > 0) u8[byte] = (u8[byte] ?? 0) | (1 << (cluster & 7));
  }

  isMarked(cluster: number): boolean {
    const byte = this.#markByte(cluster);
    return byte > 0 && (((this.#runtime.arena.u8[byte] ?? 0) >> (cluster & 7)) & 1) === 1;
  }

  /**
   * Calls `body` for the counters of the clusters [first, end), piece by piece in order. It may stop by returning
   * false.
   */
  forEachPiece(
    first: number,
    end: number,
    body: (cluster: number, count: number, counters: Counters) => boolean | undefined,
  ): void {
    for (let at = first; at < end; ) {
      const count = Math.min(end, (Math.floor(at / CHUNK_CLUSTERS) + 1) * CHUNK_CLUSTERS) - at;
      if (body(at, count, this.at(at)) === false) return;
      at += count;
    }
  }

  /** The counters from a cluster on, up to the end of its chunk. */
  at(cluster: number): Counters {
    const chunk = this.#chunk(cluster);
    const wide = (chunk & WIDE) !== 0;
    const index = cluster % CHUNK_CLUSTERS;
    if (chunk === 0) return { pointer: 0, wide };
    return { pointer: (chunk & ~WIDE) + index * (wide ? 4 : 1), wide };
  }

  /** Sets all counters to 0 and takes all marks away. */
  clear(): void {
    const { arena } = this.#runtime;
    this.shared = 0;
    for (let index = 0; index < this.#chunks; index++) {
      const chunk = arena.u32[(this.#directory >> 2) + index] ?? 0;
      if (chunk === 0) continue;
      const start = chunk & ~WIDE;
      arena.u8.fill(0, start, start + this.#chunkBytes((chunk & WIDE) !== 0));
    }
  }

  free(): void {
    const { arena } = this.#runtime;
    for (let index = 0; index < this.#chunks; index++) {
      const chunk = arena.u32[(this.#directory >> 2) + index] ?? 0;
      if (chunk !== 0) arena.free(chunk & ~WIDE);
    }
    arena.free(this.#directory);
  }

  #chunk(cluster: number): number {
    if (cluster >= this.#clusters) throw new Error(`check invariant: cluster ${cluster} is not in the file`);
    return this.#runtime.arena.u32[(this.#directory >> 2) + (cluster >>> CHUNK_BITS)] ?? 0;
  }

  /** The byte with the mark of a cluster, 0 where it has no chunk. */
  #markByte(cluster: number): number {
    const chunk = this.#chunk(cluster);
    if (chunk === 0) return 0;
    const marks = (chunk & ~WIDE) + CHUNK_CLUSTERS * ((chunk & WIDE) !== 0 ? 4 : 1);
    return marks + ((cluster % CHUNK_CLUSTERS) >> 3);
  }

  #chunkBytes(wide: boolean): number {
    return CHUNK_CLUSTERS * (wide ? 4 : 1) + MARK_BYTES;
  }

  #make(cluster: number, wide: boolean): number {
    const bytes = this.#chunkBytes(wide);
    if (this.#bytes + bytes > MOST_BYTES) {
      throw new StillframeError(
        'ERR_STILLFRAME_ARENA_EXHAUSTED',
        `'${this.#path}' refers to so many clusters that counting them takes more than ${MOST_BYTES} bytes of memory; check it with 'qemu-img check', or copy it to an image with larger clusters`,
      );
    }
    const { arena } = this.#runtime;
    const start = arena.alloc(bytes, `counters of references in '${this.#path}'`);
    this.#bytes += bytes;
    const chunk = start | (wide ? WIDE : 0);
    arena.u32[(this.#directory >> 2) + (cluster >>> CHUNK_BITS)] = chunk;
    return chunk;
  }

  #widen(cluster: number, narrow: number): number {
    const wide = this.#make(cluster, true);
    const { arena } = this.#runtime;
    const start = wide & ~WIDE;
    for (let index = 0; index < CHUNK_CLUSTERS; index++) {
      arena.u32[(start >> 2) + index] = arena.u8[narrow + index] ?? 0;
    }
    const marks = narrow + CHUNK_CLUSTERS;
    arena.u8.copyWithin(start + CHUNK_CLUSTERS * 4, marks, marks + MARK_BYTES);
    arena.free(narrow);
    this.#bytes -= this.#chunkBytes(false);
    return wide;
  }
}

/** How often L2 tables were met again after they had been counted: a hash table of numbers, without an object each. */
export class Recurrences {
  /** Cluster + 1, 0 free. */
  #keys = new Uint32Array(256);
  #counts = new Uint32Array(256);
  /** Of them, how often in the active L1 table. */
  #active = new Uint32Array(256);
  #used = 0;

  add(cluster: number, active: boolean): void {
    if (this.#used * 2 >= this.#keys.length) this.#grow();
    const slot = this.#slot(cluster);
    if (this.#keys[slot] === 0) {
      this.#keys[slot] = cluster + 1;
      this.#used++;
    }
    this.#counts[slot] = (this.#counts[slot] ?? 0) + 1;
    if (active) this.#active[slot] = (this.#active[slot] ?? 0) + 1;
  }

  forEach(body: (cluster: number, count: number, active: number) => void): void {
    for (let slot = 0; slot < this.#keys.length; slot++) {
      const key = this.#keys[slot] ?? 0;
      if (key !== 0) body(key - 1, this.#counts[slot] ?? 0, this.#active[slot] ?? 0);
    }
  }

  #slot(cluster: number): number {
    const mask = this.#keys.length - 1;
    let slot = (Math.imul(cluster, 0x9e3779b1) >>> 7) & mask;
    for (;;) {
      const key = this.#keys[slot];
      if (key === 0 || key === cluster + 1) return slot;
      slot = (slot + 1) & mask;
    }
  }

  #grow(): void {
    const [keys, counts, active] = [this.#keys, this.#counts, this.#active];
    this.#keys = new Uint32Array(keys.length * 2);
    this.#counts = new Uint32Array(keys.length * 2);
    this.#active = new Uint32Array(keys.length * 2);
    for (let old = 0; old < keys.length; old++) {
      const key = keys[old] ?? 0;
      if (key === 0) continue;
      const slot = this.#slot(key - 1);
      this.#keys[slot] = key;
      this.#counts[slot] = counts[old] ?? 0;
      this.#active[slot] = active[old] ?? 0;
    }
  }
}
