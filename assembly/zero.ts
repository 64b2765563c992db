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
