/**
 * Refcount blocks of qcow2: entries of 2^order bits. Entries of 8 bits and more are big-endian; smaller ones fill a
 * byte from its least significant bit up.
 *
 *     order 0:  byte  | 7 6 5 4 3 2 1 0 |     entry i is bit i & 7 of byte i >> 3
 */
function isFree(block: usize, index: u32, order: u32): bool {
  switch (order) {
    case 3:
      return load<u8>(block + index) == 0;
    case 4:
      return load<u16>(block + ((index as usize) << 1)) == 0;
    case 5:
      return load<u32>(block + ((index as usize) << 2)) == 0;
    case 6:
      return load<u64>(block + ((index as usize) << 3)) == 0;
    default: {
      const bit = index << order;
      return ((load<u8>(block + (bit >> 3)) >> (bit & 7)) & ((1 << (1 << order)) - 1)) == 0;
    }
  }
}

/** First entry from `from` on with refcount 0, -1 where there is none. */
export function refcountFindFree(block: usize, from: u32, entries: u32, order: u32): i32 {
  for (let index = from; index < entries; index++) {
    if (order == 4) {
      // The usual width: eight entries at once.
      const zero = i16x8.splat(0);
      while (
        entries - index >= 8 &&
        !v128.any_true(i16x8.eq(v128.load(block + ((index as usize) << 1)), zero))
      ) {
        index += 8;
      }
      if (index == entries) return -1;
    }
    if (isFree(block, index, order)) return index as i32;
  }
  return -1;
}

/** How many entries from `from` on have refcount 0, without a gap, at most `most`. */
export function refcountFreeRun(block: usize, from: u32, entries: u32, order: u32, most: u32): u32 {
  const end = max(from, min(entries, from + most));
  const perVector: u32 = 128 >> order;
  let index = from;
  while (index < end && isFree(block, index, order)) {
    index++;
    if ((index & (perVector - 1)) != 0) continue;
    while (end - index >= perVector && !v128.any_true(v128.load(block + ((index << order) >> 3)))) {
      index += perVector;
    }
  }
  return index - from;
}
