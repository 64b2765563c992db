import { describe, expect, it } from 'vitest';
import { ARENA_BASE, Arena } from '#src/kernels/arena.js';

const SIZE = 1 << 20;

describe('Arena', () => {
  it('hands out zeroed, aligned, disjoint memory above the static data', () => {
    const arena = Arena.create(SIZE);
    const a = arena.alloc(100, 'a');
    const b = arena.alloc(1, 'b');
    expect(a % 64).toBe(0);
    expect(b % 64).toBe(0);
    expect(a).toBeGreaterThan(ARENA_BASE);
    expect(b).toBeGreaterThanOrEqual(a + 100);
    arena.u8.fill(0xff, a, a + 100);
    expect(arena.u8[b]).toBe(0);
    arena.free(a);
    const again = arena.alloc(64, 'again');
    expect(again).toBe(a);
    expect(arena.copyOut(again, 64).every((byte) => byte === 0)).toBe(true);
  });

  it('refuses what it does not hold and names it', () => {
    const arena = Arena.create(SIZE);
    expect(() => arena.alloc(SIZE, "cluster states of job 'j0'")).toThrowError(
      expect.objectContaining({
        code: 'ERR_STILLFRAME_ARENA_EXHAUSTED',
        message: expect.stringContaining("cluster states of job 'j0'"),
      }),
    );
  });

  it('merges freed neighbours, so that nothing is lost over any number of rounds', () => {
    const arena = Arena.create(SIZE);
    const before = arena.usedBytes;
    for (let round = 0; round < 200; round++) {
      const pointers = Array.from({ length: 20 }, (_, index) =>
        arena.alloc(1 + ((round * 7919 + index * 104729) % 20000), 'block'),
      );
      const order = round % 2 ? pointers : pointers.reverse();
      for (const pointer of order) arena.free(pointer);
    }
    expect(arena.usedBytes).toBe(before);
    const most = SIZE - ARENA_BASE - 64 - 64;
    arena.free(arena.alloc(most, 'everything'));
  });

  it('detects a double free', () => {
    const arena = Arena.create(SIZE);
    const pointer = arena.alloc(10, 'once');
    arena.free(pointer);
    expect(() => arena.free(pointer)).toThrowError(/invariant/);
  });

  it('can be filled to the last byte without running over', () => {
    const arena = Arena.create(256 * 1024);
    const pointers: number[] = [];
    for (;;) {
      try {
        pointers.push(arena.alloc(1000, 'filler'));
      } catch {
        break;
      }
    }
    for (const pointer of pointers) arena.u8.fill(0xee, pointer, pointer + 1000);
    for (const pointer of pointers) arena.free(pointer);
    const all = arena.alloc(256 * 1024 - ARENA_BASE - 128, 'all');
    expect(arena.copyOut(all, 256 * 1024 - ARENA_BASE - 128).every((byte) => byte === 0)).toBe(true);
  });

  it.each([0, 1000, 2 ** 32])('refuses to be %d bytes large', (bytes) => {
    expect(() => Arena.create(bytes)).toThrowError(RangeError);
  });
});
