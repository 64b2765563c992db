import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { createRuntime } from '#src/kernels/runtime.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { ReferenceKernels, xxh3 } from '../support/reference.js';

const SIZE = 2 << 20;
const { arena, kernels } = createRuntime(SIZE);
/** The same memory, for the reference. */
const shadow = new Uint8Array(SIZE);
const reference = new ReferenceKernels(shadow);
const HEAP = 128 * 1024;
const HEAP_BYTES = SIZE - HEAP;
const ROUNDS = 400;

/** Puts the same bytes into both memories. */
function put(pointer: number, bytes: Uint8Array): void {
  arena.u8.set(bytes, pointer);
  shadow.set(bytes, pointer);
}

function expectSameMemory(pointer = HEAP, length = HEAP_BYTES): void {
  const end = pointer + length;
  expect(firstDifference(arena.copyOut(pointer, length), shadow.subarray(pointer, end))).toBe(-1);
}

/** Runs a body many times with seeded random numbers; a failure says the seed. */
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

/** Mostly zero, mostly one value, or noise: what kernels branch on. */
function content(random: Random, length: number): Uint8Array {
  const kind = random.between(0, 4);
  if (kind === 0) return new Uint8Array(length);
  if (kind === 1) {
    const bytes = new Uint8Array(length);
    if (length > 0) bytes[random.between(0, length - 1)] = random.between(1, 255);
    return bytes;
  }
  if (kind === 2) return new Uint8Array(length).fill(255);
  return kind === 3 ? random.bytes(length) : random.noise(length);
}

/** A length around the borders of vectors, stripes and blocks. */
function aroundBorders(random: Random): number {
  const border = random.pick([0, 16, 64, 128, 240, 256, 1024, 4096, 65536]);
  return Math.max(0, border + random.between(-20, 20));
}

describe('XXH3-64', () => {
  /** Vectors of the reference implementation's sanity test: its generated buffer, seed 0. */
  const sanity = Buffer.alloc(2367);
  let generator = 2654435761n;
  for (let at = 0; at < sanity.length; at++) {
    sanity[at] = Number(generator >> 56n);
    generator = (generator * 11400714785074694797n) & ((1n << 64n) - 1n);
  }
  it.each<[number, bigint]>([
    [0, 0x2d06800538d394c2n],
    [1, 0xc44bdff4074eecdbn],
    [6, 0x27b56a84cd2d7325n],
    [12, 0xa713daf0dfbb77e7n],
    [24, 0xa3fe70bf9d3510ebn],
    [48, 0x397da259ecba1f11n],
    [80, 0xbcdefbbb2c47c90an],
    [195, 0xcd94217ee362ec3an],
    [403, 0xcdeb804d65c6dea4n],
    [512, 0x617e49599013cb6bn],
    [2048, 0xdd59e2c3a5f038e0n],
    [2099, 0xc6b9d9b3fc9ac765n],
    [2240, 0x6e73a90539cf2948n],
    [2367, 0xcb37aeb9e5d361edn],
  ])('of the official test buffer, %d bytes', (length, hash) => {
    put(HEAP, sanity);
    expect(kernels.xxh3(HEAP, length)).toBe(hash);
    expect(xxh3(sanity.subarray(0, length))).toBe(hash);
  });

  it('agrees with the reference at every length up to 600 and any alignment', () => {
    put(HEAP, new Random(7).noise(1024));
    for (let length = 0; length <= 600; length++) {
      const pointer = HEAP + (length % 7);
      expect(kernels.xxh3(pointer, length), `${length} bytes`).toBe(reference.xxh3(pointer, length));
    }
  });

  it('agrees with the reference on long input', () => {
    rounds(60, (random) => {
      const length = random.between(600, 300_000);
      put(HEAP, content(random, length));
      expect(kernels.xxh3(HEAP, length)).toBe(reference.xxh3(HEAP, length));
    });
  });

  it.skipIf(!hasPeer('xxhsum'))('agrees with xxhsum', async () => {
    const { withFolder } = await import('../support/data.js');
    const { writeFileSync } = await import('node:fs');
    await withFolder((folder) => {
      for (const length of [0, 1, 17, 129, 241, 65536, 1_000_001]) {
        const bytes = new Random(length).noise(length);
        put(HEAP, bytes);
        writeFileSync(`${folder}/file`, bytes);
        const digest = kernels.xxh3(HEAP, length).toString(16).padStart(16, '0');
        expect(run('xxhsum', ['-H3', `${folder}/file`])).toContain(digest);
      }
    });
  });
});

describe('zero scan and checksum', () => {
  it('isZero', () => {
    rounds(ROUNDS, (random) => {
      const length = aroundBorders(random);
      const pointer = HEAP + random.between(0, 70);
      // Neighbours that are not zero must not matter.
      put(pointer - 64, new Uint8Array(64).fill(1));
      put(pointer, content(random, length));
      put(pointer + length, new Uint8Array(64).fill(1));
      expect(kernels.isZero(pointer, length)).toBe(reference.isZero(pointer, length));
    });
  });

  it('isZero sees a single bit anywhere', () => {
    put(HEAP, new Uint8Array(1000));
    for (let at = 0; at < 1000; at++) {
      arena.u8[HEAP + at] = 1 << (at % 8);
      expect(kernels.isZero(HEAP, 1000), `byte ${at}`).toBe(false);
      arena.u8[HEAP + at] = 0;
    }
    expect(kernels.isZero(HEAP, 1000)).toBe(true);
  });

  it('digestUnits, zeroMask and zeroLeaves', () => {
    rounds(80, (random) => {
      const unit = 2 ** random.between(9, 16);
      const units = random.between(1, 70);
      const length = Math.min(HEAP_BYTES / 2, (units - 1) * unit + random.between(1, unit));
      const bytes = random.noise(length);
      for (let at = 0; at < length; at += unit) if (random.chance(0.5)) bytes.fill(0, at, at + unit);
      const [mask, data] = [HEAP, HEAP + 1024];
      put(mask, random.noise(64));
      put(data, bytes);
      const first = random.between(0, 2 ** 31);
      expect(kernels.digestUnits(data, length, unit, first, mask)).toBe(
        reference.digestUnits(data, length, unit, first, mask),
      );
      const zero = reference.bitmapCount(mask, 0, Math.ceil(length / unit));
      expect(kernels.zeroUnits).toBe(zero);
      expectSameMemory();
      put(mask, random.noise(64));
      expect(kernels.zeroMask(data, length, unit, mask)).toBe(reference.zeroMask(data, length, unit, mask));
      expectSameMemory();
      const last = random.between(1, unit);
      const count = random.between(0, 20);
      expect(kernels.zeroLeaves(unit, last, first, count)).toBe(
        reference.zeroLeaves(unit, last, first, count),
      );
    });
  });

  it('gives zeroes one checksum, seen or passed over', () => {
    const unit = 65536;
    put(HEAP, new Uint8Array(unit * 4));
    const seen = kernels.digestUnits(HEAP, unit * 3 + 512, unit, 77, HEAP + unit * 5);
    put(HEAP + unit * 5, new Uint8Array(4));
    expect(kernels.zeroLeaves(unit, 512, 77, 4)).toBe(seen);
  });
});

describe('bitmaps', () => {
  const BITS = 4096;
  const [a, b] = [HEAP, HEAP + BITS / 8 + 64];

  function fill(random: Random, at: number): void {
    const density = random.pick([0, 1, 2, 3]);
    put(
      at,
      [
        new Uint8Array(BITS / 8),
        new Uint8Array(BITS / 8).fill(255),
        content(random, BITS / 8),
        random.noise(BITS / 8),
      ][density] ?? new Uint8Array(),
    );
  }

  it('set, clear, test, test and clear, count, next', () => {
    rounds(ROUNDS, (random) => {
      fill(random, a);
      const start = random.between(0, BITS);
      const count = random.between(0, BITS - start);
      const end = start + count;
      const index = random.between(0, BITS - 1);
      expect(kernels.bitmapTest(a, index)).toBe(reference.bitmapTest(a, index));
      expect(kernels.bitmapNextSet(a, start, end)).toBe(reference.bitmapNextSet(a, start, end));
      expect(kernels.bitmapNextClear(a, start, end)).toBe(reference.bitmapNextClear(a, start, end));
      expect(kernels.bitmapCount(a, start, count)).toBe(reference.bitmapCount(a, start, count));
      switch (random.between(0, 2)) {
        case 0:
          kernels.bitmapSet(a, start, count);
          reference.bitmapSet(a, start, count);
          break;
        case 1:
          kernels.bitmapClear(a, start, count);
          reference.bitmapClear(a, start, count);
          break;
        default:
          expect(kernels.bitmapTestAndClear(a, start, count)).toBe(
            reference.bitmapTestAndClear(a, start, count),
          );
      }
      expectSameMemory();
    });
  });

  it('merge and coarsen', () => {
    rounds(ROUNDS, (random) => {
      fill(random, a);
      fill(random, b);
      const bits = random.between(0, BITS);
      if (random.chance(0.5)) {
        kernels.bitmapMerge(a, b, bits);
        reference.bitmapMerge(a, b, bits);
      } else {
        const shift = random.between(0, 12);
        kernels.bitmapCoarsen(a, b, bits, shift);
        reference.bitmapCoarsen(a, b, bits, shift);
      }
      expectSameMemory();
    });
  });
});

describe('cluster states', () => {
  const COUNT = 2000;
  const states = HEAP;

  it('fill, claim, transition, next, count', () => {
    rounds(ROUNDS, (random) => {
      put(states, random.chance(0.5) ? random.noise(COUNT / 4) : new Uint8Array(COUNT / 4).fill(0x55));
      for (let step = 0; step < 20; step++) {
        const from = random.between(0, COUNT);
        const end = random.between(from, COUNT);
        const state = random.between(0, 3);
        expect(kernels.clustersNext(states, from, end, state)).toBe(
          reference.clustersNext(states, from, end, state),
        );
        expect(kernels.clustersNextPending(states, from, end)).toBe(
          reference.clustersNextPending(states, from, end),
        );
        expect(kernels.clustersCount(states, from, end - from, state)).toBe(
          reference.clustersCount(states, from, end - from, state),
        );
        const index = random.between(0, COUNT - 1);
        expect(kernels.clusterState(states, index)).toBe(reference.clusterState(states, index));
        switch (random.between(0, 3)) {
          case 0:
            kernels.clustersFill(states, from, end - from, state);
            reference.clustersFill(states, from, end - from, state);
            break;
          case 1:
            expect(kernels.clustersClaimAt(states, from, end)).toBe(
              reference.clustersClaimAt(states, from, end),
            );
            break;
          case 2: {
            const most = random.between(1, 300);
            const claim = reference.clustersClaimNext(states, from, end, most);
            expect(kernels.clustersClaimNext(states, from, end, most)).toBe(claim.first);
            if (claim.first >= 0) expect(kernels.claimedCount).toBe(claim.count);
            break;
          }
          default: {
            const run = reference.clustersClaimAt(states, from, end);
            expect(kernels.clustersClaimAt(states, from, end)).toBe(run);
            kernels.clustersTransition(states, from, run, 2, 3);
            reference.clustersFill(states, from, run, 3);
          }
        }
        expectSameMemory(states, COUNT / 4);
      }
    });
  });

  it('a transition from a state that is not there is an error that names the cluster', () => {
    put(states, new Uint8Array(COUNT / 4));
    kernels.clustersFill(states, 10, 100, 2);
    kernels.clustersFill(states, 50, 1, 1);
    expect(() => kernels.clustersTransition(states, 10, 100, 2, 3)).toThrow(
      'cluster 50 is in state 1, not 2',
    );
  });
});

describe('copying and comparing', () => {
  it('compactUnits moves what is kept to the front', () => {
    rounds(150, (random) => {
      const unit = 2 ** random.between(9, 14);
      const units = random.between(1, 60);
      const length = (units - 1) * unit + random.between(1, unit);
      const [skip, data] = [HEAP, HEAP + 64];
      put(skip, random.pick([new Uint8Array(16), new Uint8Array(16).fill(255), random.noise(16)]));
      put(data, random.noise(length));
      const kept = reference.compactUnits(data, length, unit, skip);
      expect(kernels.compactUnits(data, length, unit, skip)).toBe(kept);
      expectSameMemory(data, kept);
    });
  });

  it('firstDifference finds the very byte', () => {
    rounds(ROUNDS, (random) => {
      const length = aroundBorders(random);
      const [a, b] = [HEAP + random.between(0, 40), HEAP + 200_000 + random.between(0, 40)];
      const bytes = content(random, length);
      put(a, bytes);
      put(b, bytes);
      if (length > 0 && random.chance(0.8)) {
        const at = random.between(0, length - 1);
        put(b + at, Uint8Array.of(((bytes[at] ?? 0) + random.between(1, 255)) & 255));
      }
      expect(kernels.firstDifference(a, b, length)).toBe(reference.firstDifference(a, b, length));
    });
  });
});

describe('qcow2 tables', () => {
  it('l2Extent decodes every kind of entry', () => {
    const kinds = new Set<number>();
    rounds(3000, (random) => {
      const clusterBits = random.between(9, 21);
      const count = 64;
      const slice = new Uint8Array(count * 8);
      const view = new DataView(slice.buffer);
      let entry = 0n;
      for (let index = 0; index < count; index++) {
        const previous = entry;
        const cluster = BigInt(random.between(0, 1000)) << BigInt(clusterBits);
        const copied = random.chance(0.5) ? 1n << 63n : 0n;
        const wild = (BigInt(random.between(0, 2 ** 32 - 1)) << 32n) | BigInt(random.between(0, 2 ** 32 - 1));
        entry = random.chance(0.7)
          ? previous + (1n << BigInt(clusterBits))
          : random.pick([0n, 1n, cluster | copied, cluster | copied | 1n, (1n << 62n) | (wild >> 3n), wild]);
        entry &= (1n << 64n) - 1n;
        view.setBigUint64(index * 8, entry);
      }
      put(HEAP, slice);
      const features = random.pick([0, 1, 1, 5]);
      for (let index = 0; index < count; ) {
        const most = random.between(1, count - index);
        const found = reference.l2Extent(HEAP, index, most, clusterBits, features);
        kinds.add(found.kind);
        const n = kernels.l2Extent(HEAP, index, most, clusterBits, features);
        expect(n).toBe(found.count);
        expect(kernels.l2Kind).toBe(found.kind);
        if (found.kind !== 5) {
          expect(kernels.l2HostOffset).toBe(found.hostOffset);
          expect(kernels.l2Copied).toBe(found.copied);
          if (found.kind === 4) expect(kernels.l2CompressedLength).toBe(found.compressedLength);
        }
        index += n;
      }
    });
    expect([...kinds].sort()).toEqual([0, 1, 2, 3, 4, 5]);
  });

  it('l2Extent decodes every kind of subcluster', () => {
    const kinds = new Set<number>();
    const lengths = new Set<number>();
    rounds(3000, (random) => {
      const clusterBits = random.between(14, 21);
      const entries = 8;
      const slice = new Uint8Array(entries * 16);
      const view = new DataView(slice.buffer);
      let entry = 0n;
      let bitmap: [zero: number, allocated: number] = [0, 0];
      const word = () => random.between(0, 2 ** 32 - 1);
      for (let index = 0; index < entries; index++) {
        const cluster = BigInt(random.between(0, 1000)) << BigInt(clusterBits);
        const copied = 1n << 63n;
        if (random.chance(0.6)) entry = entry === 0n ? 0n : entry + (1n << BigInt(clusterBits));
        else entry = random.pick([0n, 1n, copied, cluster | copied, cluster, (1n << 62n) | BigInt(word())]);
        const low = random.between(0, 32);
        const mask = (2 ** low - 1) >>> 0;
        const empty = entry === 0n;
        bitmap = random.pick<[number, number]>([
          bitmap,
          [0, empty ? 0 : 0xffffffff],
          [0, 0],
          [0xffffffff, 0],
          [mask, empty ? 0 : ~mask >>> 0],
          [~mask >>> 0, empty ? 0 : mask],
          [word(), word()],
        ]);
        view.setBigUint64(index * 16, entry & ((1n << 64n) - 1n));
        view.setUint32(index * 16 + 8, bitmap[0]);
        view.setUint32(index * 16 + 12, bitmap[1]);
      }
      put(HEAP, slice);
      const features = random.pick([3, 3, 7]);
      const count = entries * 32;
      for (let index = random.between(0, 31); index < count; ) {
        const most = random.between(1, count - index);
        const found = reference.l2Extent(HEAP, index, most, clusterBits, features);
        kinds.add(found.kind);
        lengths.add(found.count);
        const n = kernels.l2Extent(HEAP, index, most, clusterBits, features);
        expect(kernels.l2Kind).toBe(found.kind);
        expect(n).toBe(found.count);
        if (found.kind !== 5) {
          expect(kernels.l2HostOffset).toBe(found.hostOffset);
          expect(kernels.l2Copied).toBe(found.copied);
          if (found.kind === 4) expect(kernels.l2CompressedLength).toBe(found.compressedLength);
        }
        index += n;
      }
    });
    expect([...kinds].sort()).toEqual([0, 1, 2, 3, 4, 5, 6]);
    expect(Math.max(...lengths)).toBeGreaterThan(64);
  });

  it('refcountFindFree and refcountFreeRun, all widths', () => {
    rounds(ROUNDS, (random) => {
      const order = random.between(0, 6);
      const block = 512;
      const entries = (block * 8) / 2 ** order;
      const bytes = random.pick([
        new Uint8Array(block),
        new Uint8Array(block).fill(255),
        random.noise(block),
      ]);
      for (let index = 0; index < 20; index++) {
        const at = random.between(0, block - 8);
        bytes.fill(random.pick([0, 1]), at, at + random.between(1, 8));
      }
      put(HEAP, bytes);
      const from = random.between(0, entries);
      const most = random.between(0, entries);
      expect(kernels.refcountFindFree(HEAP, from, entries, order)).toBe(
        reference.refcountFindFree(HEAP, from, entries, order),
      );
      expect(kernels.refcountFreeRun(HEAP, from, entries, order, most)).toBe(
        reference.refcountFreeRun(HEAP, from, entries, order, most),
      );
    });
  });
});

/** Runs a script, which posts one number, in so many threads. */
function runThreads(count: number, body: string, data: Readonly<Record<string, unknown>>): Promise<number>[] {
  const module = new URL('../../dist/kernels/runtime.js', import.meta.url).href;
  return Array.from({ length: count }, (_, index) => {
    const worker = new Worker(body, { eval: true, workerData: { ...data, module, seed: index + 1 } });
    return new Promise<number>((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
  });
}

describe('threads', () => {
  it('never hold one cluster at once', async () => {
    const { shared, ...runtime } = createRuntime(4 << 20);
    const clusters = 96;
    const states = runtime.arena.alloc(64, 'states');
    const holders = runtime.arena.alloc(clusters, 'holders by cluster');
    runtime.kernels.clustersFill(states, 0, clusters, 1);
    const body = `
      const { parentPort, workerData } = require('node:worker_threads');
      import(workerData.module).then(({ attachRuntime }) => {
        const { arena, kernels } = attachRuntime(workerData.shared);
        const { states, holders, clusters, seed } = workerData;
        let random = seed;
        const next = (most) => (random = (Math.imul(random, 1103515245) + 12345) >>> 0) % most;
        let violations = 0;
        for (let round = 0; round < 300_000; round++) {
          const first = kernels.clustersClaimNext(states, next(clusters), clusters, 1 + next(3));
          if (first < 0) continue;
          const count = kernels.claimedCount;
          for (let c = first; c < first + count; c++) violations += Atomics.add(arena.u8, holders + c, 1) === 0 ? 0 : 1;
          for (let c = first; c < first + count; c++) Atomics.sub(arena.u8, holders + c, 1);
          kernels.clustersTransition(states, first, count, 2, 1);
        }
        parentPort.postMessage(violations);
      });`;
    const violations = await Promise.all(runThreads(3, body, { shared, states, holders, clusters }));
    expect(violations).toEqual([0, 0, 0]);
    expect(runtime.kernels.clustersCount(states, 0, clusters, 1)).toBe(clusters);
  });

  it('claim every cluster exactly once, and clear every bit exactly once', async () => {
    const { shared, ...runtime } = createRuntime(4 << 20);
    const clusters = 100_000;
    const states = runtime.arena.alloc(clusters / 4 + 8, 'states');
    const bitmap = runtime.arena.alloc(clusters / 8 + 4, 'bitmap');
    const claims = runtime.arena.alloc(clusters, 'claims by cluster');
    runtime.kernels.clustersFill(states, 0, clusters, 1);
    runtime.kernels.bitmapSet(bitmap, 0, clusters);
    const body = `
      const { parentPort, workerData } = require('node:worker_threads');
      import(workerData.module).then(({ attachRuntime }) => {
        const { arena, kernels } = attachRuntime(workerData.shared);
        const { states, bitmap, claims, clusters, seed } = workerData;
        let random = seed;
        const next = (most) => (random = (Math.imul(random, 1103515245) + 12345) >>> 0) % most;
        let cleared = 0;
        for (let from = 0; ; ) {
          const first = kernels.clustersClaimNext(states, from, clusters, 1 + next(40));
          if (first < 0 && from === 0) break;
          if (first < 0) { from = 0; continue; }
          const count = kernels.claimedCount;
          if (next(4) === 0) {
            kernels.clustersTransition(states, first, count, 2, 1);
          } else {
            for (let c = first; c < first + count; c++) Atomics.add(arena.u8, claims + c, 1);
            kernels.clustersTransition(states, first, count, 2, 3);
          }
          from = next(3) === 0 ? next(clusters) : first + count;
          const start = next(clusters);
          cleared += kernels.bitmapTestAndClear(bitmap, start, Math.min(clusters - start, next(100)));
        }
        cleared += kernels.bitmapTestAndClear(bitmap, 0, clusters);
        parentPort.postMessage(cleared);
      });`;
    const threads = runThreads(3, body, { shared, states, bitmap, claims, clusters });
    const cleared = await Promise.all(threads);
    expect(cleared.reduce((sum, n) => sum + n, 0)).toBe(clusters);
    expect(runtime.kernels.bitmapCount(bitmap, 0, clusters)).toBe(0);
    expect(runtime.kernels.clustersCount(states, 0, clusters, 3)).toBe(clusters);
    expect(runtime.arena.copyOut(claims, clusters).every((count) => count === 1)).toBe(true);
  });
});
