import { describe, expect, it } from 'vitest';
import { createRuntime } from '#src/kernels/runtime.js';
import { firstDifference, Random } from '../support/data.js';

const { arena, kernels } = createRuntime(4 << 20);
const CHUNK = 65536;
const COPIED = 1n << 63n;
const COMPRESSED = 1n << 62n;
const RESERVED = 0x3f000000000001fen;
const OFFSET = 0x00fffffffffffe00n;

interface Image {
  readonly clusterBits: number;
  readonly extended: boolean;
  readonly external: boolean;
  readonly most: number;
  readonly fileBytes: number;
  /** Clusters with a counter. */
  readonly clusters: number;
}

/** What the kernels count, in the plainest of words. */
class Twin {
  readonly image: Image;
  /** Per chunk: undefined where there is none. */
  readonly chunks: ({ wide: boolean; counters: number[] } | undefined)[];
  allocated = 0;
  fragmented = 0;
  compressed = 0;
  shared = 0;
  uncopied = 0;
  #following = 0n;

  constructor(image: Image, chunks: Twin['chunks']) {
    this.image = image;
    this.chunks = chunks;
  }

  beginTable(): void {
    this.#following = 0n;
  }

  #fits(cluster: bigint, weight: number): boolean {
    if (cluster >= BigInt(this.image.clusters)) return false;
    const chunk = this.chunks[Number(cluster) >> 16];
    if (chunk === undefined) return false;
    const most = chunk.wide ? this.image.most : Math.min(this.image.most, 255);
    return (chunk.counters[Number(cluster) % CHUNK] ?? 0) + weight <= most;
  }

  #add(cluster: bigint, weight: number): void {
    const counters = this.chunks[Number(cluster) >> 16]?.counters ?? [];
    const before = counters[Number(cluster) % CHUNK] ?? 0;
    if (before + weight > 1) this.shared++;
    counters[Number(cluster) % CHUNK] = before + weight;
  }

  /** Whether the entry needs no closer look; it is counted then. */
  count(entry: bigint, bitmap: bigint, weight: number, note: boolean): boolean {
    const { clusterBits, extended, external, fileBytes } = this.image;
    const clusterSize = 1n << BigInt(clusterBits);
    const alloc = bitmap & 0xffffffffn;
    if ((entry & COMPRESSED) !== 0n) {
      if ((entry & COPIED) !== 0n || external || bitmap !== 0n) return false;
      const x = BigInt(62 - (clusterBits - 8));
      const offset = entry & ((1n << x) - 1n);
      const length = (((entry & (COMPRESSED - 1n)) >> x) + 1n) * 512n - (offset % 512n);
      if (offset + length >= BigInt(fileBytes) + clusterSize) return false;
      const touched: bigint[] = [];
      for (let at = offset / clusterSize; at <= (offset + length - 1n) / clusterSize; at++) touched.push(at);
      if (!touched.every((cluster) => this.#fits(cluster, weight))) return false;
      for (const cluster of touched) this.#add(cluster, weight);
      if (note) {
        this.allocated++;
        this.compressed++;
        this.fragmented++;
      }
      return true;
    }
    if ((entry & RESERVED) !== 0n) return false;
    const offset = entry & OFFSET;
    if (offset === 0n && !extended && (entry & 1n) !== 0n) return true;
    if (offset === 0n && !(external && (entry & COPIED) !== 0n)) return alloc === 0n;
    if (offset % clusterSize !== 0n || ((bitmap >> 32n) & bitmap) !== 0n) return false;
    if (!external) {
      if (offset >= BigInt(fileBytes) || !this.#fits(offset / clusterSize, weight)) return false;
      this.#add(offset / clusterSize, weight);
    }
    if (note) {
      this.allocated++;
      if (this.#following !== 0n && offset !== this.#following) this.fragmented++;
      this.#following = offset + clusterSize;
      if ((entry & COPIED) === 0n) this.uncopied++;
    }
    return true;
  }

  /** Whether the flag COPIED is what the counters, which hold refcounts, ask for. */
  copied(entry: bigint): boolean {
    const { clusterBits, extended, external, clusters } = this.image;
    if ((entry & COMPRESSED) !== 0n) return true;
    const offset = entry & OFFSET;
    const copied = (entry & COPIED) !== 0n;
    if (offset === 0n && !(external && copied && (extended || (entry & 1n) === 0n))) return true;
    if (external) return copied;
    const cluster = offset >> BigInt(clusterBits);
    if (cluster >= BigInt(clusters)) return false;
    const chunk = this.chunks[Number(cluster) >> 16];
    return chunk !== undefined && ((chunk.counters[Number(cluster) % CHUNK] ?? 0) === 1) === copied;
  }
}

function rounds(count: number, body: (random: Random) => void): void {
  for (let seed = 1; seed <= count; seed++) {
    try {
      body(new Random(seed));
    } catch (error) {
      throw new Error(`seed ${seed}: ${error instanceof Error ? error.message : String(error)}`, {
        cause: error,
      });
    }
  }
}

const DIRECTORY = arena.alloc(64, 'directory');
const CHUNKS = [0, 1, 2].map(() => arena.alloc(CHUNK * 4, 'chunk'));
const TABLE = arena.alloc(4096, 'table');

/** Takes back what a round left in the memory of its chunks. */
function clean(twin: Twin): void {
  for (const [index, chunk] of twin.chunks.entries()) {
    const pointer = CHUNKS[index] ?? 0;
    chunk?.counters.forEach((_, at) => {
      if (chunk.wide) arena.u32[(pointer >> 2) + at] = 0;
      else arena.u8[pointer + at] = 0;
    });
  }
}

/** Three chunks, of which the one in the middle may be missing; few counters are set, the first of each. */
function place(random: Random, image: Image): Twin {
  const chunks = CHUNKS.map((pointer, index): Twin['chunks'][number] => {
    if (index === 1 && random.chance(0.5)) {
      arena.u32[(DIRECTORY >> 2) + index] = 0;
      return undefined;
    }
    const wide = random.chance(0.3);
    const counters = Array.from({ length: 16 }, () =>
      random.pick([0, 0, 0, 1, 1, 2, 254, 255, wide ? 1000 : 3]),
    );
    for (const [at, value] of counters.entries()) {
      if (wide) arena.u32[(pointer >> 2) + at] = Math.min(value, image.most);
      else arena.u8[pointer + at] = Math.min(value, image.most);
      counters[at] = Math.min(value, image.most);
    }
    arena.u32[(DIRECTORY >> 2) + index] = pointer | (wide ? 1 : 0);
    return { wide, counters };
  });
  const { clusters, clusterBits, extended, external, most, fileBytes } = image;
  kernels.checkSetup(DIRECTORY, clusters, clusterBits, extended, external, most, fileBytes);
  kernels.checkResetTotals();
  return new Twin(image, chunks);
}

function randomImage(random: Random): Image {
  const clusterBits = random.pick([9, 12, 14, 16, 21]);
  const clusters = random.pick([10, CHUNK + 10, 3 * CHUNK]);
  return {
    clusterBits,
    extended: clusterBits >= 14 && random.chance(0.5),
    external: random.chance(0.2),
    most: random.pick([1, 3, 255, 65535, 2 ** 32 - 1]),
    clusters,
    fileBytes: (clusters - 1) * 2 ** clusterBits - random.pick([0, 0, 512, 1]),
  };
}

/** Mostly entries that are fine or nearly so. */
function randomEntry(random: Random, image: Image): { entry: bigint; bitmap: bigint } {
  const size = 2 ** image.clusterBits;
  const cluster = random.pick([0, 1, 2]) * CHUNK + random.between(0, 12);
  const offset = BigInt(cluster * size);
  const wild = (BigInt(random.between(0, 2 ** 32 - 1)) << 32n) | BigInt(random.between(0, 2 ** 32 - 1));
  const compressed = COMPRESSED | (BigInt(random.between(0, 3)) << BigInt(62 - (image.clusterBits - 8)));
  const entry = random.pick([
    0n,
    1n,
    COPIED,
    offset | COPIED,
    offset | COPIED,
    offset,
    offset | 1n,
    offset + 512n,
    offset | (1n << BigInt(random.between(0, 63))),
    compressed | (offset + BigInt(random.between(0, size))),
    wild,
  ]);
  const plain = random.pick([0n, 0n, 0xffffffffn, 0xffffn, 0xffff0000_0000ffffn, wild]);
  return { entry, bitmap: image.extended ? plain : 0n };
}

/** Fills the table and returns its entries. */
function fill(random: Random, image: Image, count: number): { entry: bigint; bitmap: bigint }[] {
  const step = image.extended ? 16 : 8;
  return Array.from({ length: count }, (_, index) => {
    const both = randomEntry(random, image);
    arena.view.setBigUint64(TABLE + index * step, both.entry);
    if (image.extended) arena.view.setBigUint64(TABLE + index * step + 8, both.bitmap);
    return both;
  });
}

describe('the check of L2 tables', () => {
  it('counts what it can and stops at what it cannot', () => {
    let stops = 0;
    let counted = 0;
    rounds(4000, (random) => {
      const image = randomImage(random);
      const twin = place(random, image);
      const entries = fill(random, image, 32);
      const weight = random.pick([1, 1, 1, 2, 200, 70000]);
      const note = random.chance(0.7);
      kernels.checkBeginTable();
      twin.beginTable();
      for (let index = 0; index < entries.length; index++) {
        let expected = index;
        while (expected < entries.length) {
          const { entry, bitmap } = entries[expected] ?? { entry: 0n, bitmap: 0n };
          if (!twin.count(entry, bitmap, weight, note)) break;
          expected++;
          counted++;
        }
        expect(kernels.checkCountEntries(TABLE, index, entries.length, weight, note)).toBe(expected);
        if (expected < entries.length) stops++;
        index = expected;
      }
      const { allocated, fragmented, compressed, shared, uncopied } = twin;
      expect(kernels.checkTotals).toEqual({ allocated, fragmented, compressed, shared, uncopied });
      for (const [index, chunk] of twin.chunks.entries()) {
        const pointer = CHUNKS[index] ?? 0;
        // Those that were never counted are missing, which forEach passes over.
        chunk?.counters.forEach((value, at) => {
          expect(chunk.wide ? arena.u32[(pointer >> 2) + at] : arena.u8[pointer + at]).toBe(value);
        });
      }
      clean(twin);
    });
    expect(stops).toBeGreaterThan(1000);
    expect(counted).toBeGreaterThan(10000);
  });

  it('finds flags that do not agree with the refcounts', () => {
    let wrong = 0;
    rounds(3000, (random) => {
      const image = randomImage(random);
      const twin = place(random, image);
      const entries = fill(random, image, 32);
      for (let index = 0; index < entries.length; index++) {
        const rest = entries.slice(index).findIndex(({ entry }) => !twin.copied(entry));
        const expected = rest < 0 ? entries.length : index + rest;
        expect(kernels.checkCopiedFlags(TABLE, index, entries.length)).toBe(expected);
        if (rest >= 0) wrong++;
        index = expected;
      }
      clean(twin);
    });
    expect(wrong).toBeGreaterThan(1000);
  });

  it('takes notes of entries that were looked at by hand', () => {
    kernels.checkSetup(DIRECTORY, 10, 16, false, false, 1, 0);
    kernels.checkResetTotals();
    kernels.checkBeginTable();
    for (const offset of [0x50000n, 0x60000n, 0x80000n]) kernels.checkNoteData(offset);
    kernels.checkNoteCompressed();
    expect(kernels.checkTotals).toEqual({
      allocated: 4,
      fragmented: 2,
      compressed: 1,
      shared: 0,
      uncopied: 0,
    });
  });
});

describe('the check of refcounts', () => {
  const BLOCK = arena.alloc(8192, 'block');
  const COUNTERS = arena.alloc(8192, 'counters');

  it('compares them with counters of both widths', () => {
    let differences = 0;
    rounds(3000, (random) => {
      const order = random.between(0, 6);
      const wide = random.chance(0.3);
      const count = random.between(1, 200);
      const first = random.between(0, 40);
      const noBlock = random.chance(0.1);
      const noCounters = random.chance(0.1);
      const most = Math.min(2 ** (2 ** order) - 1, wide ? 2 ** 32 - 1 : 255);
      const values = Array.from({ length: count }, () => Math.min(most, random.pick([0, 1, 1, 1, 2, most])));
      const refcounts = values.map((value) => (random.chance(0.02) ? (value === 0 ? 1 : value - 1) : value));
      arena.u8.fill(0xff, BLOCK, BLOCK + 8192);
      for (const [at, value] of refcounts.entries()) {
        const index = first + at;
        if (order === 6) arena.view.setBigUint64(BLOCK + index * 8, BigInt(value));
        else if (order === 5) arena.view.setUint32(BLOCK + index * 4, value);
        else if (order === 4) arena.view.setUint16(BLOCK + index * 2, value);
        else {
          for (let bit = 0; bit < 2 ** order; bit++) {
            const place = index * 2 ** order + bit;
            const mask = 1 << (place % 8);
            const byte = BLOCK + Math.floor(place / 8);
            const old = arena.u8[byte] ?? 0;
            arena.u8[byte] = (value >> bit) & 1 ? old | mask : old & ~mask;
          }
        }
      }
      for (const [at, value] of values.entries()) {
        if (wide) arena.u32[(COUNTERS >> 2) + at] = value;
        else arena.u8[COUNTERS + at] = value;
      }
      const found = values.findIndex(
        (value, at) => (noCounters ? 0 : value) !== (noBlock ? 0 : refcounts[at]),
      );
      const expected = found < 0 ? count : found;
      if (found >= 0) differences++;
      const [block, counters] = [noBlock ? 0 : BLOCK, noCounters ? 0 : COUNTERS];
      expect(kernels.checkRefcounts(block, first, order, counters, wide, count)).toBe(expected);
    });
    expect(differences).toBeGreaterThan(500);
  });

  it('sees a refcount of more than any counter holds', () => {
    arena.u8.fill(0, BLOCK, BLOCK + 256);
    arena.u8.fill(0, COUNTERS, COUNTERS + 256);
    arena.u8.fill(1, COUNTERS, COUNTERS + 32);
    for (let index = 0; index < 32; index++) arena.view.setUint16(BLOCK + index * 2, 1);
    expect(kernels.checkRefcounts(BLOCK, 0, 4, COUNTERS, false, 32)).toBe(32);
    arena.view.setUint16(BLOCK + 20 * 2, 0x0101);
    expect(kernels.checkRefcounts(BLOCK, 0, 4, COUNTERS, false, 32)).toBe(20);
    arena.view.setBigUint64(BLOCK, 0x1_0000_0001n);
    expect(kernels.checkRefcounts(BLOCK, 0, 6, COUNTERS, false, 1)).toBe(0);
  });

  it('finds counters in use and free ones', () => {
    rounds(2000, (random) => {
      const wide = random.chance(0.3);
      const count = random.between(1, 150);
      const density = random.pick([0.01, 0.5, 0.99]);
      const values = Array.from({ length: count }, () =>
        random.chance(density) ? random.pick([1, 255]) : 0,
      );
      arena.u8.fill(0x55, COUNTERS, COUNTERS + 1024);
      for (const [at, value] of values.entries()) {
        if (wide) arena.u32[(COUNTERS >> 2) + at] = value;
        else arena.u8[COUNTERS + at] = value;
      }
      const from = random.between(0, count);
      const next = (test: (value: number) => boolean): number => {
        const found = values.findIndex((value, at) => at >= from && test(value));
        return found < 0 ? count : found;
      };
      const used = next((value) => value !== 0);
      const free = next((value) => value === 0);
      expect(kernels.countersNextUsed(COUNTERS, wide, from, count)).toBe(used);
      expect(kernels.countersNextFree(COUNTERS, wide, from, count)).toBe(free);
      expect(kernels.countersLastUsed(COUNTERS, wide, count)).toBe(
        values.findLastIndex((value) => value !== 0),
      );
    });
  });

  it('leaves memory alone', () => {
    const before = arena.copyOut(BLOCK, 8192);
    kernels.checkRefcounts(BLOCK, 0, 4, COUNTERS, false, 1000);
    expect(firstDifference(arena.copyOut(BLOCK, 8192), before)).toBe(-1);
  });
});
