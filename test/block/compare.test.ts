import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { Random } from '../support/data.js';
import { temporaryFolder } from './qcow2-support.js';

const folder = temporaryFolder();
const engine = await createEngine({ workers: 3 });
afterAll(() => engine.close());

const MIB = 1 << 20;
const LENGTH = 40 * MIB + 512;
const first = join(folder, 'first');
const second = join(folder, 'second');
const raw = { first: { format: 'raw' }, second: { format: 'raw' } } as const;

describe('images compared by several threads', () => {
  const bytes = Buffer.alloc(LENGTH);
  bytes.set(new Random(1).noise(9 * MIB), 3 * MIB);
  bytes.set(new Random(2).noise(9 * MIB), 29 * MIB);

  it('are the same where every part is', async () => {
    writeFileSync(first, bytes);
    writeFileSync(second, bytes);
    const done: number[] = [];
    const onProgress = (progress: { done: number; total: number }): void => {
      expect(progress.total).toBe(LENGTH);
      done.push(progress.done);
    };
    const result = await engine.compareImages(first, second, { ...raw, onProgress });
    expect(result).toEqual({ identical: true, sizesDiffer: false });
    expect(Math.max(...done)).toBe(LENGTH);
  });

  it.each(Array.from({ length: 12 }, (_, seed) => seed))(
    'differ where they differ first, %i',
    async (seed) => {
      const random = new Random(seed);
      const places = Array.from({ length: random.between(1, 6) }, () => random.between(0, LENGTH - 1));
      const other = Buffer.from(bytes);
      for (const place of places) other[place] = (other[place] ?? 0) ^ 1;
      writeFileSync(first, bytes);
      writeFileSync(second, other);
      // A place that is hit twice is what it was.
      const offset = bytes.findIndex((byte, index) => byte !== other[index]);
      expect(await engine.compareImages(first, second, raw)).toEqual({
        identical: false,
        sizesDiffer: false,
        reason: 'content',
        offset,
      });
    },
  );

  it('may have different lengths where the longer one ends with zeroes', async () => {
    writeFileSync(first, bytes.subarray(0, 39 * MIB));
    writeFileSync(second, bytes);
    truncateSync(second, 2 ** 40);
    expect(await engine.compareImages(first, second, raw)).toEqual({ identical: true, sizesDiffer: true });
    expect(await engine.compareImages(first, second, { ...raw, strict: true })).toEqual({
      identical: false,
      sizesDiffer: true,
      reason: 'size',
    });
    writeFileSync(first, bytes.subarray(0, 30 * MIB));
    expect(await engine.compareImages(first, second, raw)).toMatchObject({
      identical: false,
      offset: 30 * MIB,
    });
  });
});
