import { describe, expect, it } from 'vitest';
import { WRITE_MARKS_BYTES, WriteMarks } from '#src/block/write-marks.js';
import { Arena } from '#src/kernels/arena.js';

function marks(): WriteMarks {
  const arena = Arena.create(1 << 20);
  return new WriteMarks(arena, arena.alloc(WRITE_MARKS_BYTES, 'marks'));
}

describe('marks of writes', () => {
  it('keep the end that was highest', () => {
    const of = marks();
    for (const end of [4096, 2 ** 45, 512]) of.end(end);
    expect(of.highest).toBe(2 ** 45);
  });

  it('tell of a threshold once, by the first write that ends beyond it', async () => {
    const of = marks();
    of.threshold = 4096;
    const next = of.next(of.told);
    of.begin(4096);
    expect([of.threshold, of.told]).toEqual([4096, 0]);
    of.begin(4097);
    of.begin(9000);
    await next;
    expect(of.passed).toEqual({ threshold: 4096, excess: 1 });
    expect([of.threshold, of.told]).toEqual([0, 1]);
  });

  it('let whoever waits go on when they end', async () => {
    const of = marks();
    const next = of.next(of.told);
    of.close();
    await next;
  });

  it('count discards', () => {
    const of = marks();
    of.discarded(512, true);
    of.discarded(1024, true);
    of.discarded(2048, false);
    expect(of.discards).toEqual({ done: 2, failed: 1, bytes: 1536 });
  });
});
