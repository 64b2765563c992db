/**
 * Bitmaps of one bit per cluster, shared by all threads.
 *
 *     word  0                                1
 *     bit   31 30 …                2  1  0   63 62 …
 *
 * Bit i is bit (i & 31) of the 32-bit word i >> 5. Changes are atomic by word; a word that would not change is
 * not written. Scans look at 128 bits at once; a bit that changes meanwhile may or may not be seen.
 */

function maskOf(from: u32, to: u32): u32 {
  // Bits [from, to) of one word, 0 <= from < to <= 32.
  return (u32.MAX_VALUE >> (32 - (to - from))) << from;
}

function word(bitmap: usize, index: u32): usize {
  return bitmap + (((index >> 5) as usize) << 2);
}

export function bitmapSet(bitmap: usize, start: u32, count: u32): void {
  const end = start + count;
  while (start < end) {
    const next = min((start & ~31) + 32, end);
    const mask = maskOf(start & 31, next - (start & ~31));
    const at = word(bitmap, start);
    if ((atomic.load<u32>(at) & mask) != mask) atomic.or<u32>(at, mask);
    start = next;
  }
}

export function bitmapClear(bitmap: usize, start: u32, count: u32): void {
  bitmapTestAndClear(bitmap, start, count);
}

export function bitmapTest(bitmap: usize, index: u32): bool {
  return ((atomic.load<u32>(word(bitmap, index)) >> (index & 31)) & 1) != 0;
}

/** Clears the range and returns how many of its bits this call cleared. */
export function bitmapTestAndClear(bitmap: usize, start: u32, count: u32): u32 {
  const end = start + count;
  let cleared: u32 = 0;
  while (start < end) {
    const next = min((start & ~31) + 32, end);
    const mask = maskOf(start & 31, next - (start & ~31));
    const at = word(bitmap, start);
    if ((atomic.load<u32>(at) & mask) != 0) cleared += popcnt<u32>(atomic.and<u32>(at, ~mask) & mask);
    start = next;
  }
  return cleared;
}

function next(bitmap: usize, from: u32, end: u32, flip: u32): i32 {
  const flips = i32x4.splat(flip);
  while (from < end) {
    if ((from & 127) == 0) {
      while (end - from >= 128 && !v128.any_true(v128.xor(v128.load(word(bitmap, from)), flips))) from += 128;
      if (from == end) return -1;
    }
    const base = from & ~31;
    const value = (atomic.load<u32>(word(bitmap, from)) ^ flip) & (u32.MAX_VALUE << (from & 31));
    if (value != 0) {
      const found = base + ctz<u32>(value);
      return found < end ? (found as i32) : -1;
    }
    from = base + 32;
  }
  return -1;
}

/** First set bit in [from, end), -1 where there is none. */
export function bitmapNextSet(bitmap: usize, from: u32, end: u32): i32 {
  return next(bitmap, from, end, 0);
}

export function bitmapNextClear(bitmap: usize, from: u32, end: u32): i32 {
  return next(bitmap, from, end, u32.MAX_VALUE);
}

export function bitmapCount(bitmap: usize, start: u32, count: u32): u32 {
  const end = start + count;
  let set: u32 = 0;
  while (start < end) {
    if ((start & 127) == 0 && end - start >= 128) {
      let sums = i32x4.splat(0);
      do {
        const bytes = i8x16.popcnt(v128.load(word(bitmap, start)));
        sums = i32x4.add(sums, i32x4.extadd_pairwise_i16x8_u(i16x8.extadd_pairwise_i8x16_u(bytes)));
        start += 128;
      } while (end - start >= 128);
      set += i32x4.extract_lane(sums, 0) + i32x4.extract_lane(sums, 1);
      set += i32x4.extract_lane(sums, 2) + i32x4.extract_lane(sums, 3);
      continue;
    }
    const stop = min((start & ~31) + 32, end);
    set += popcnt<u32>(atomic.load<u32>(word(bitmap, start)) & maskOf(start & 31, stop - (start & ~31)));
    start = stop;
  }
  return set;
}

/** target |= source, over `bits` bits. */
export function bitmapMerge(target: usize, source: usize, bits: u32): void {
  for (let index: u32 = 0; index < bits; index += 32) {
    const mask = maskOf(0, min<u32>(32, bits - index));
    const value = atomic.load<u32>(word(source, index)) & mask;
    const at = word(target, index);
    if ((atomic.load<u32>(at) | value) != atomic.load<u32>(at)) atomic.or<u32>(at, value);
  }
}

/** Sets bit i of `target` where any of the 2^shift bits of `source` it stands for is set. */
export function bitmapCoarsen(target: usize, source: usize, bits: u32, shift: u32): void {
  let bit = bitmapNextSet(source, 0, bits);
  while (bit >= 0) {
    const coarse = (bit as u32) >> shift;
    bitmapSet(target, coarse, 1);
    const beyond = ((coarse as u64) + 1) << (shift as u64);
    if (beyond >= (bits as u64)) return;
    bit = bitmapNextSet(source, beyond as u32, bits);
  }
}
