import { describe, expect, it } from 'vitest';
import { BITMAP_SET_BYTES, BitmapSet } from '#src/bitmap/bitmap-set.js';
import { checkBitmap, DirtyBitmap, defaultGranularity } from '#src/bitmap/dirty-bitmap.js';
import { createRuntime } from '#src/kernels/runtime.js';
import { Random } from '../support/data.js';

const runtime = createRuntime(64 * 1024 * 1024);
const { arena } = runtime;

function create(length: number, granularity: number, name = 'b'): DirtyBitmap {
  const bitmap = DirtyBitmap.create(runtime, { name, granularity, length, enabled: true, persistent: false });
  bitmap.makeBits();
  return bitmap;
}

/** What a bitmap should say, granule by granule. */
class Model {
  readonly granules: boolean[];
  readonly granularity: number;
  readonly length: number;

  constructor(length: number, granularity: number) {
    this.length = length;
    this.granularity = granularity;
    this.granules = new Array(Math.ceil(length / granularity)).fill(false);
  }

  mark(offset: number, length: number, value: boolean): void {
    for (let at = Math.floor(offset / this.granularity); at * this.granularity < offset + length; at++) {
      if (at < this.granules.length) this.granules[at] = value;
    }
  }

  /** Dirty areas, clipped to [from, end) and to `most` bytes. */
  next(from: number, end: number, most: number): { offset: number; length: number } | undefined {
    const dirty = (at: number) => this.granules[Math.floor(at / this.granularity)] === true;
    let offset = from;
    const step = (at: number) => (Math.floor(at / this.granularity) + 1) * this.granularity;
    while (offset < end && !dirty(offset)) offset = step(offset);
    if (offset >= end) return undefined;
    let stop = offset;
    while (stop < end && dirty(stop)) stop = step(stop);
    return { offset, length: Math.min(stop, end, offset + most) - offset };
  }
}

function expectAlike(bitmap: DirtyBitmap, model: Model): void {
  expect(model.granules.map((_, index) => bitmap.test(index * model.granularity))).toEqual(model.granules);
  expect(bitmap.count).toBe(model.granules.filter(Boolean).length * model.granularity);
}

describe('a dirty bitmap', () => {
  it.each([
    [512, 1_000_003],
    [4096, 4096 * 128],
    [65536, 65536 * 300 + 1],
    [65536, 100],
    [2 ** 31, 2 ** 40 + 5],
  ])('of %i bytes a bit for a drive of %i bytes does what its model does', (granularity, length) => {
    const random = new Random(granularity + length);
    const bitmap = create(length, granularity);
    const model = new Model(length, granularity);
    const place = () => Math.floor(random.next() * length);
    for (let round = 0; round < 300; round++) {
      const offset = place();
      const bytes = Math.min(length - offset, Math.floor(random.next() ** 4 * length) + 1);
      if (random.chance(0.6)) {
        bitmap.set(offset, bytes);
        model.mark(offset, bytes, true);
      } else {
        const first = Math.floor(offset / granularity) * granularity;
        const end = Math.min(length, Math.ceil((offset + bytes) / granularity) * granularity);
        bitmap.clear(first, end - first);
        model.mark(first, end - first, false);
      }
      const [from, end] = [place(), place()];
      const most = random.pick([Infinity, 1, granularity, granularity * 5 + 7]);
      expect(bitmap.nextDirty(from, end, most)).toEqual(model.next(from, end, most));
    }
    expectAlike(bitmap, model);
    bitmap.free();
  });

  it('rounds what becomes dirty outward and does not clean parts of granules', () => {
    const bitmap = create(100_000, 4096);
    bitmap.set(4095, 2);
    expect(bitmap.nextDirty(0)).toEqual({ offset: 0, length: 8192 });
    expect(() => bitmap.clear(1, 4095)).toThrow(RangeError);
    expect(() => bitmap.clear(0, 4095)).toThrow(RangeError);
    // The last granule is whole where the drive ends.
    bitmap.set(99_999, 1);
    bitmap.clear(24 * 4096, 100_000 - 24 * 4096);
    bitmap.clear(0, 8192);
    expect(bitmap.count).toBe(0);
    bitmap.free();
  });

  it('takes no notice of what is outside of the drive', () => {
    const bitmap = create(10_000, 512);
    bitmap.set(-5, 3);
    bitmap.set(10_300, 5000);
    bitmap.set(Number.NaN, 10);
    bitmap.set(0, 0);
    expect(bitmap.count).toBe(0);
    bitmap.set(-1, 2);
    bitmap.set(9999, 2 ** 52);
    expect(bitmap.count).toBe(1024);
    bitmap.free();
  });

  it('keeps its bits as the disk has them: bit n is bit n % 8 of byte n / 8', () => {
    const bitmap = create(512 * 20, 512);
    bitmap.set(512 * 3, 1);
    bitmap.set(512 * 17, 512 * 2);
    expect([...arena.copyOut(bitmap.bitsPointer, bitmap.bitBytes)]).toEqual([8, 0, 6]);
    arena.u8.fill(0xff, bitmap.bitsPointer, bitmap.bitsPointer + 3);
    bitmap.clearTail();
    expect(bitmap.count).toBe(512 * 20);
    expect(arena.u8[bitmap.bitsPointer + 2]).toBe(0x0f);
    bitmap.free();
  });

  it('merges bitmaps of any granularity', () => {
    const random = new Random(77);
    for (let round = 0; round < 60; round++) {
      const length = random.between(1, 3_000_000);
      const [from, to] = [2 ** random.between(9, 20), 2 ** random.between(9, 20)];
      const [source, target] = [create(length, from), create(length, to)];
      const [a, b] = [new Model(length, from), new Model(length, to)];
      for (let write = 0; write < 20; write++) {
        const offset = random.between(0, length - 1);
        const bytes = random.between(1, Math.min(length - offset, 40_000));
        const [bitmap, model] = random.chance(0.7) ? [source, a] : [target, b];
        bitmap.set(offset, bytes);
        model.mark(offset, bytes, true);
      }
      target.merge(source);
      a.granules.forEach((dirty, index) => {
        const start = index * from;
        if (dirty) b.mark(start, Math.min(length, start + from) - start, true);
      });
      expectAlike(target, b);
      expectAlike(source, a);
      source.free();
      target.free();
    }
    const [one, other] = [create(1000, 512), create(1001, 512)];
    expect(() => one.merge(other)).toThrow(
      "Bitmaps are of different sizes (destination size is 1000, source size is 1001) and can't be merged",
    );
    one.merge(one);
    one.free();
    other.free();
  });

  it('follows the drive when that gets another length: what is new is clean', () => {
    const random = new Random(78);
    let length = 1_000_000;
    const bitmap = create(length, 4096);
    let model = new Model(length, 4096);
    for (let round = 0; round < 50; round++) {
      const offset = random.between(0, length - 1);
      const bytes = random.between(1, length - offset);
      bitmap.set(offset, bytes);
      model.mark(offset, bytes, true);
      const fresh = random.between(1, 3_000_000);
      const next = new Model(fresh, 4096);
      for (let index = 0; index < next.granules.length; index++) {
        next.granules[index] = model.granules[index] ?? false;
      }
      length = fresh;
      model = next;
      bitmap.resize(length);
      expect(bitmap.length).toBe(length);
      expectAlike(bitmap, model);
    }
    bitmap.free();
  });

  it('has the granularity QEMU would choose', () => {
    const sizes = [undefined, 512, 4096, 8192, 65536, 2 ** 21];
    expect(sizes.map(defaultGranularity)).toEqual([65536, 4096, 4096, 8192, 65536, 65536]);
  });

  it.each([
    [{ name: '' }, 'Bitmap name cannot be empty'],
    [{ name: 'ä'.repeat(512) }, 'Bitmap name too long'],
    [{ name: 'a\0' }, 'zero byte'],
    [{ granularity: 1000 }, 'Granularity must be power of 2 and at least 512'],
    [{ granularity: 256 }, 'Granularity must be power of 2 and at least 512'],
    [{ granularity: 2 ** 32 }, 'Granularity must be power of 2 and at least 512'],
    [{ granularity: 0 }, 'Granularity must be power of 2 and at least 512'],
    [{ granularity: Number.NaN }, 'Granularity must be power of 2 and at least 512'],
    [{ length: 2 ** 40 }, 'Use larger granularity'],
  ])('is refused with %o', (wrong, message) => {
    const good = { name: 'ä'.repeat(511), granularity: 512, length: 2 ** 40 - 512 };
    checkBitmap(good);
    expect(() => checkBitmap({ ...good, ...wrong })).toThrow(message);
  });
});

describe('a set of bitmaps', () => {
  const options = { granularity: 512, length: 10_240, enabled: true, persistent: false };

  it('records in those that are enabled and have bits, and gives all memory back', () => {
    const before = arena.usedBytes;
    const control = arena.alloc(BITMAP_SET_BYTES, 'set');
    const set = new BitmapSet(runtime, control);
    expect(set.empty).toBe(true);
    set.record(0, 512);
    const names = ['a', 'b', 'c', '', ''];
    for (const name of names) set.add({ ...options, name, enabled: name !== 'b' });
    for (const bitmap of set.all()) if (bitmap.name !== 'c') bitmap.makeBits();
    expect(set.all().map(({ name }) => name)).toEqual(names);
    expect(() => set.add({ ...options, name: 'c' })).toThrow('Bitmap already exists: c');
    // Another thread sees the same.
    new BitmapSet(runtime, control).record(1000, 100);
    const counts = set.all().map((bitmap) => (bitmap.loaded ? bitmap.count : -1));
    expect(counts).toEqual([1024, 0, -1, 1024, 1024]);
    set.remove(set.get('b'));
    set.remove(set.get('a'));
    expect(set.all().map(({ name }) => name)).toEqual(['c', '', '']);
    expect(() => set.get('a')).toThrow("Dirty bitmap 'a' not found");
    const last = set.all()[2];
    if (last === undefined) throw new Error('gone');
    set.remove(last);
    set.add({ ...options, name: 'd' });
    expect(set.all().map(({ name }) => name)).toEqual(['c', '', 'd']);
    set.free();
    expect(set.empty).toBe(true);
    arena.free(control);
    expect(arena.usedBytes).toBe(before);
  });
});
