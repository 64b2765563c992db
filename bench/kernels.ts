/**
 * GB/s of each kernel beside its scalar TypeScript twin: `npm run bench:kernels -- [--ms N]`. Both work on the same
 * bytes; what a kernel reads from memory counts as its bytes.
 */
import { parseArgs } from 'node:util';
import { Bench } from 'tinybench';
import { createRuntime } from '#src/kernels/runtime.js';
import { Random } from '../test/support/data.js';
import { ReferenceKernels } from '../test/support/reference.js';

const { values } = parseArgs({ options: { ms: { type: 'string', default: '300' } } });
const { arena, kernels } = createRuntime(16 << 20);
const reference = new ReferenceKernels(new Uint8Array(16 << 20));
const MiB = 1 << 20;
const [noise, copy, zeroes, small, moved] = [2 * MiB, 4 * MiB, 6 * MiB, 8 * MiB, 10 * MiB];
const random = new Random(1);
const data = random.noise(MiB);
const put = (pointer: number, bytes: Uint8Array): void => {
  arena.u8.set(bytes, pointer);
  reference.bytes.set(bytes, pointer);
};
put(noise, data);
put(copy, data);
const slice = new Uint8Array(65536);
const view = new DataView(slice.buffer);
for (let index = 0; index < 8192; index++)
  view.setBigUint64(index * 8, (1n << 63n) | BigInt((index + 1) * 65536));

interface Case {
  readonly name: string;
  readonly bytes: number;
  /** What comes before every run; its time is not counted. */
  readonly before?: () => void;
  readonly wasm: () => unknown;
  readonly scalar: () => unknown;
}

const skip = small + 65536;
const every = new Uint8Array(128).fill(0b01010101);
const cases: readonly Case[] = [
  {
    name: 'isZero, 1 MiB of zeroes',
    bytes: MiB,
    wasm: () => kernels.isZero(zeroes, MiB),
    scalar: () => reference.isZero(zeroes, MiB),
  },
  {
    name: 'xxh3, 1 MiB',
    bytes: MiB,
    wasm: () => kernels.xxh3(noise, MiB),
    scalar: () => reference.xxh3(noise, MiB),
  },
  {
    name: 'digestUnits, 16 × 64 KiB of noise',
    bytes: MiB,
    wasm: () => kernels.digestUnits(noise, MiB, 65536, 0, skip),
    scalar: () => reference.digestUnits(noise, MiB, 65536, 0, skip),
  },
  {
    name: 'digestUnits, 16 × 64 KiB of zeroes',
    bytes: MiB,
    wasm: () => kernels.digestUnits(zeroes, MiB, 65536, 0, skip),
    scalar: () => reference.digestUnits(zeroes, MiB, 65536, 0, skip),
  },
  {
    name: 'firstDifference, 1 MiB alike',
    bytes: MiB,
    wasm: () => kernels.firstDifference(noise, copy, MiB),
    scalar: () => reference.firstDifference(noise, copy, MiB),
  },
  {
    name: 'compactUnits, every other 4 KiB of 1 MiB',
    bytes: MiB,
    before: () => put(skip, every),
    wasm: () => kernels.compactUnits(moved, MiB, 4096, skip),
    scalar: () => reference.compactUnits(moved, MiB, 4096, skip),
  },
  {
    name: 'bitmapNextSet, 64 KiB of zeroes',
    bytes: 65536,
    wasm: () => kernels.bitmapNextSet(zeroes, 0, 65536 * 8),
    scalar: () => reference.bitmapNextSet(zeroes, 0, 65536 * 8),
  },
  {
    name: 'bitmapCount, 64 KiB',
    bytes: 65536,
    wasm: () => kernels.bitmapCount(noise, 0, 65536 * 8),
    scalar: () => reference.bitmapCount(noise, 0, 65536 * 8),
  },
  {
    name: 'bitmapMerge, 64 KiB',
    bytes: 65536,
    wasm: () => kernels.bitmapMerge(small, noise, 65536 * 8),
    scalar: () => reference.bitmapMerge(small, noise, 65536 * 8),
  },
  {
    name: 'clustersNext, 64 KiB of states',
    bytes: 65536,
    wasm: () => kernels.clustersNext(zeroes, 0, 65536 * 4, 1),
    scalar: () => reference.clustersNext(zeroes, 0, 65536 * 4, 1),
  },
  {
    name: 'clustersFill, 64 KiB of states',
    bytes: 65536,
    wasm: () => kernels.clustersFill(small, 0, 65536 * 4, 1),
    scalar: () => reference.clustersFill(small, 0, 65536 * 4, 1),
  },
  {
    name: 'l2Extent, 64 KiB of entries in a row',
    bytes: 65536,
    before: () => put(small, slice),
    wasm: () => kernels.l2Extent(small, 0, 8192, 16, 1),
    scalar: () => reference.l2Extent(small, 0, 8192, 16, 1),
  },
  {
    name: 'refcountFreeRun, 64 KiB of free 16-bit entries',
    bytes: 65536,
    wasm: () => kernels.refcountFreeRun(zeroes, 0, 32768, 4, 32768),
    scalar: () => reference.refcountFreeRun(zeroes, 0, 32768, 4, 32768),
  },
];

const bench = new Bench({ time: Number(values.ms), warmupTime: 100 });
for (const { name, before, wasm, scalar } of cases) {
  const options = before === undefined ? {} : { beforeAll: before };
  bench.add(`${name} wasm`, () => void wasm(), options);
  bench.add(`${name} scalar`, () => void scalar(), options);
}
await bench.run();

function gigabytesPerSecond(task: string, bytes: number): number {
  const result = bench.getTask(task)?.result;
  if (result === undefined || !('latency' in result)) throw new Error(`${task} did not complete`);
  // Latencies are milliseconds.
  return bytes / (result.latency.p50 / 1000) / 1e9;
}

console.log(`node ${process.version}, medians, GB/s`);
console.table(
  Object.fromEntries(
    cases.map(({ name, bytes }) => {
      const wasm = gigabytesPerSecond(`${name} wasm`, bytes);
      const scalar = gigabytesPerSecond(`${name} scalar`, bytes);
      return [
        name,
        { wasm: wasm.toPrecision(3), scalar: scalar.toPrecision(3), ratio: `${(wasm / scalar).toFixed(1)}×` },
      ];
    }),
  ),
);
