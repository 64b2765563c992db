import { describe, expect, it } from 'vitest';
import { guestFigures } from '#src/benchmark/figures.js';
import { clockMs, DEPTH, GuestMemory } from '#src/benchmark/guest-memory.js';

/** @param requests when each was made and answered, in milliseconds */
function answered(...requests: readonly (readonly [start: number, end: number])[]) {
  return {
    starts: Float64Array.from(requests, ([start]) => start),
    latencies: Float64Array.from(requests, ([start, end]) => end - start),
  };
}

const ALL = [{ from: 0, to: 1e9 }];

describe('figures of a guest', () => {
  it('are those of the requests that were made within the spans', () => {
    const requests = Array.from({ length: 1000 }, (_, index) => [index, index + (index + 1) / 1000] as const);
    const all = guestFigures(answered(...requests), ALL);
    expect(all).toMatchObject({ requests: 1000, stalledMs: 0 });
    expect(all.p50).toBeCloseTo(501);
    expect(all.p90).toBeCloseTo(901);
    expect(all.p99).toBeCloseTo(991);
    expect(all.p999).toBeCloseTo(1000);
    expect(all.max).toBeCloseTo(1000);
    const some = guestFigures(answered(...requests), [
      { from: 10, to: 20 },
      { from: 500, to: 501 },
    ]);
    expect(some.requests).toBe(11);
    expect(some.max).toBeCloseTo(501);
  });

  it('are none where nothing was asked for', () => {
    expect(guestFigures(answered(), ALL)).toMatchObject({ requests: 0, max: Number.NaN, stalledMs: 0 });
  });

  it.each<[what: string, stalledMs: number, requests: readonly (readonly [number, number])[]]>([
    [
      'a request that takes long while others are answered',
      0,
      [
        [0, 40],
        [5, 6],
        [14, 15],
        [23, 24],
        [32, 33],
      ],
    ],
    [
      'requests that wait together',
      40,
      [
        [0, 40],
        [1, 40],
        [2, 41],
      ],
    ],
    [
      'a time without requests',
      0,
      [
        [0, 1],
        [100, 101],
      ],
    ],
    [
      'a wait that begins after a time without requests',
      20,
      [
        [0, 1],
        [100, 120],
      ],
    ],
    [
      'two of them',
      45,
      [
        [0, 20],
        [21, 46],
        [22, 46],
      ],
    ],
    [
      'what is short of 10 ms',
      0,
      [
        [0, 9],
        [9, 18],
      ],
    ],
  ])('tell how long it stood still: %s', (_, stalledMs, requests) => {
    for (const order of [requests, requests.toReversed()]) {
      expect(guestFigures(answered(...order), ALL).stalledMs).toBeCloseTo(stalledMs);
    }
  });
});

describe('requests of a guest', () => {
  it('that nobody has answered are counted as if they were now', () => {
    const memory = GuestMemory.allocate(10);
    const start = clockMs() - 1000;
    for (const cookie of [0, 1, 2]) expect(memory.take(cookie, start + cookie)).toBe(true);
    expect(memory.give(1, start + 5)).toBe(true);
    expect(memory.give(1, start + 5)).toBe(false);
    expect([memory.sent, memory.answered]).toEqual([3, 1]);
    const { starts, latencies } = memory.all();
    expect([...starts]).toEqual([start + 1, start, start + 2]);
    expect(latencies[0]).toBeCloseTo(4);
    expect(latencies[1]).toBeGreaterThanOrEqual(1000);
    expect(latencies[2]).toBeGreaterThanOrEqual(998);
  });

  it('are not made any more when it has ended', () => {
    const memory = GuestMemory.allocate(10);
    for (let cookie = 0; cookie < DEPTH; cookie++) memory.take(cookie, 0);
    memory.stop();
    expect(memory.take(0, 0)).toBe(false);
    const before = clockMs();
    memory.sleepUntil(before + 60_000);
    expect(clockMs() - before).toBeLessThan(30_000);
  });
});
