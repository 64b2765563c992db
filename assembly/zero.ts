/** True when all `length` bytes at `pointer` are zero. Looks at 128 bytes a turn and stops at the first that has data. */
export function isZero(pointer: usize, length: usize): bool {
  const end = pointer + length;
  let at = pointer;
  while (at + 128 <= end) {
    const a = v128.or(
      v128.or(v128.load(at), v128.load(at, 16)),
      v128.or(v128.load(at, 32), v128.load(at, 48)),
    );
    const b = v128.or(
      v128.or(v128.load(at, 64), v128.load(at, 80)),
      v128.or(v128.load(at, 96), v128.load(at, 112)),
    );
    if (v128.any_true(v128.or(a, b))) return false;
    at += 128;
  }
  while (at + 8 <= end) {
    if (load<u64>(at) != 0) return false;
    at += 8;
  }
  while (at < end) {
    if (load<u8>(at) != 0) return false;
    at++;
  }
  return true;
}

/**
 * Bit i of `mask` (bit i & 31 of 32-bit word i >> 5) becomes 1 where unit i of the buffer is zero, 0 where it has
 * data. Returns how many are zero.
 */
export function zeroMask(pointer: usize, length: usize, unit: usize, mask: usize): u32 {
  let zero: u32 = 0;
  let word: u32 = 0;
  let index: u32 = 0;
  for (let done: usize = 0; done < length; done += unit, index++) {
    if (isZero(pointer + done, min(unit, length - done))) {
      word |= 1 << (index & 31);
      zero++;
    }
    if ((index & 31) == 31) {
      store<u32>(mask + ((index >> 5) << 2), word);
      word = 0;
    }
  }
  if ((index & 31) != 0) store<u32>(mask + ((index >> 5) << 2), word);
  return zero;
}
