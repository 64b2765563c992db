/** Index of the first byte in which `length` bytes at `a` and `b` differ, -1 where none does. */
export function firstDifference(a: usize, b: usize, length: usize): i32 {
  let at: usize = 0;
  while (at + 32 <= length) {
    const low = v128.xor(v128.load(a + at), v128.load(b + at));
    const high = v128.xor(v128.load(a + at, 16), v128.load(b + at, 16));
    if (v128.any_true(v128.or(low, high))) break;
    at += 32;
  }
  while (at < length) {
    if (load<u8>(a + at) != load<u8>(b + at)) return at as i32;
    at++;
  }
  return -1;
}
