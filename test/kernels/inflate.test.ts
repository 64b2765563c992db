import { deflateRawSync, inflateRawSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { createRuntime } from '#src/kernels/runtime.js';
import { firstDifference, Random } from '../support/data.js';

const { arena, kernels } = createRuntime(4 << 20);
const MOST = 1 << 19;
const work = arena.alloc(kernels.inflateWorkspace, 'tables');
const to = arena.alloc(MOST + 8, 'output');

/** What the kernel makes of a stream that ends where its memory does; undefined where it is damaged. */
function inflated(stream: Uint8Array, capacity: number): Uint8Array | undefined {
  const from = arena.alloc(stream.length, 'input');
  arena.u8.set(stream, from);
  // What was there before must not show, and what is behind must not change.
  arena.u8.fill(0xee, to, to + capacity);
  const bytes = kernels.inflate(from, stream.length, to, capacity, work);
  arena.free(from);
  return bytes < 0 ? undefined : arena.copyOut(to, bytes);
}

function content(random: Random, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  const kind = random.pick(['zero', 'noise', 'letters', 'pattern', 'matches']);
  for (let at = 0; at < length; at++) {
    if (kind === 'noise') bytes[at] = random.between(0, 255);
    if (kind === 'letters') bytes[at] = random.between(65, 69);
    if (kind === 'pattern') bytes[at] = (at % 13) * 7;
    if (kind === 'matches') {
      const back = at - random.between(1, 5000);
      bytes[at] = random.between(0, 9) > 0 && back >= 0 ? (bytes[back] ?? 0) : random.between(0, 255);
    }
  }
  return bytes;
}

const stream = (random: Random, bytes: Uint8Array): Buffer =>
  deflateRawSync(bytes, {
    level: random.between(0, 9),
    strategy: random.between(0, 4),
    windowBits: random.between(9, 15),
    memLevel: random.between(1, 9),
  });

describe('inflate', () => {
  it.each([1, 2, 3, 4])('gives back what zlib compressed, whole or in part (seed %i)', (seed) => {
    const random = new Random(seed);
    for (let round = 0; round < 60; round++) {
      const bytes = content(random, random.pick([0, 1, 5, 300, 4096, 65536, 150_000]));
      const packed = stream(random, bytes);
      const whole = inflated(Buffer.concat([packed, random.noise(20)]), MOST);
      expect(whole?.length).toBe(bytes.length);
      if (whole !== undefined) expect(firstDifference(whole, bytes)).toBe(-1);
      const some = random.between(0, bytes.length);
      const part = inflated(packed, some);
      expect(part?.length).toBe(some);
      if (part !== undefined) expect(firstDifference(part, bytes.subarray(0, some))).toBe(-1);
    }
  });

  it.each([1, 2, 3, 4])('finds the damage that zlib finds, and no other (seed %i)', (seed) => {
    const random = new Random(seed);
    const seen = { damaged: 0, different: 0 };
    for (let round = 0; round < 300; round++) {
      const packed = stream(random, content(random, random.pick([300, 4096, 30_000])));
      for (let times = random.between(1, 3); times > 0; times--) {
        const at = random.between(0, packed.length - 1);
        packed[at] = (packed[at] ?? 0) ^ (1 << random.between(0, 7));
      }
      let expected: Buffer | undefined;
      try {
        expected = inflateRawSync(packed, { maxOutputLength: MOST });
      } catch (error) {
        if (error instanceof Error && 'code' in error && error.code === 'ERR_BUFFER_TOO_LARGE') continue;
      }
      const found = inflated(packed, MOST);
      if (expected === undefined) seen.damaged++;
      else seen.different++;
      expect(found?.length).toBe(expected?.length);
      if (found !== undefined && expected !== undefined) expect(firstDifference(found, expected)).toBe(-1);
    }
    expect(seen.damaged).toBeGreaterThan(20);
    expect(seen.different).toBeGreaterThan(20);
  });

  it('takes a stream that is cut off for damaged, unless all that is wanted came before', () => {
    const bytes = new Random(9).noise(5000);
    const packed = deflateRawSync(bytes);
    for (const length of [0, 1, 2, 3, 7, 100, packed.length - 1]) {
      expect(inflated(packed.subarray(0, length), 5000)).toBeUndefined();
    }
    expect(inflated(packed.subarray(0, 2000), 1000)).toEqual(new Uint8Array(bytes.subarray(0, 1000)));
  });

  it.each([
    ['a block of no type', [7]],
    ['a stored block whose length is not told twice', [1, 5, 0, 0, 0]],
    ['more literals than there are', [0xfd, 0xff, 0xff]],
    ['a distance before the start', [0x4b, 0x04, 0x62, 0x00]],
  ])('refuses %s', (_, bytes) => {
    expect(inflated(Uint8Array.from(bytes), 100)).toBeUndefined();
  });
});
