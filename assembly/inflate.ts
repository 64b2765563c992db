/**
 * Decompression of raw deflate streams (RFC 1951).
 *
 * Codes are looked up in tables of two levels. A table begins with 2^root entries, which the next `root` bits of the
 * stream select; a longer code selects an entry that leads to a second table, for the bits that follow:
 *
 *     entry   | value (16) | kind (8) | bits (8) |
 *
 *     kind 0: a symbol, `bits` long in all      kind 1: second table at `value`, `bits` more bits select
 *     bits 0: no code begins like this
 */

const MAX_BITS: i32 = 15;
const LITERAL_ROOT: i32 = 10;
const DISTANCE_ROOT: i32 = 8;
const LENGTHS_ROOT: i32 = 7;
/** Entries of a table that no set of codes exceeds: every entry of the first level could lead to a second one. */
const TABLE_ENTRIES: i32 = 4096;

// The workspace, byte offsets.
const LITERALS: usize = 0;
const DISTANCES: usize = LITERALS + ((TABLE_ENTRIES as usize) << 2);
const LENGTHS: usize = DISTANCES + ((TABLE_ENTRIES as usize) << 2);
const COUNTS: usize = LENGTHS + 320;
const SORTED: usize = COUNTS + 64;
const PLACES: usize = SORTED + 640;
/** Bytes of the workspace. */
export const INFLATE_WORKSPACE: i32 = (PLACES + 64) as i32;

/** Symbols of code lengths come in this order. */
const ORDER = memory.data<u8>([16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15]);
/** Of the length symbols from 257 on: the smallest length, and how many bits are added to it. */
const LENGTH_BASE = memory.data<u16>([
  3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
  227, 258, 0, 0,
]);
const LENGTH_EXTRA = memory.data<u8>([
  0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0, 0, 0,
]);
const DISTANCE_BASE = memory.data<u16>([
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097,
  6145, 8193, 12289, 16385, 24577, 0, 0,
]);
const DISTANCE_EXTRA = memory.data<u8>([
  0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 0, 0,
]);

const DAMAGED: i32 = -1;

let input: usize = 0;
let inputEnd: usize = 0;
let hold: u64 = 0;
let bits: i32 = 0;
/** Zero bytes that were taken for what is behind the end of the input. */
let beyond: i32 = 0;

/** At least 48 bits in `hold`. */
function refill(): void {
  if (input + 8 <= inputEnd) {
    hold |= load<u64>(input) << (bits as u64);
    input += (63 - bits) >> 3;
    bits |= 56;
    return;
  }
  while (bits <= 56) {
    if (input < inputEnd) hold |= (load<u8>(input++) as u64) << (bits as u64);
    else beyond++;
    bits += 8;
  }
}

function take(count: i32): i32 {
  const value = (hold & (((1 as u64) << (count as u64)) - 1)) as i32;
  hold >>= count as u64;
  bits -= count;
  return value;
}

function exhausted(): bool {
  return beyond << 3 > bits;
}

/** The bits of a code in the order of the stream. */
function reversed(code: i32, length: i32): i32 {
  let result = 0;
  for (let index = 0; index < length; index++) {
    result = (result << 1) | (code & 1);
    code >>= 1;
  }
  return result;
}

/** Makes the table of `count` code lengths. False where they make no code. */
function makeTable(lengths: usize, count: i32, root: i32, table: usize, work: usize): bool {
  const counts = work + COUNTS;
  const sorted = work + SORTED;
  const places = work + PLACES;
  memory.fill(counts, 0, 64);
  for (let symbol = 0; symbol < count; symbol++) {
    const at = counts + ((load<u8>(lengths + symbol) as usize) << 2);
    store<i32>(at, load<i32>(at) + 1);
  }
  memory.fill(table, 0, (1 << root) << 2);
  let longest = MAX_BITS;
  while (longest > 0 && load<i32>(counts + (longest << 2)) === 0) longest--;
  if (longest === 0) return true;
  let left = 1;
  let place = 0;
  for (let length = 1; length <= MAX_BITS; length++) {
    left = (left << 1) - load<i32>(counts + (length << 2));
    if (left < 0) return false;
    store<i32>(places + (length << 2), place);
    place += load<i32>(counts + (length << 2));
  }
  // One code of one bit is the only set that may leave codes out, and not among those of code lengths.
  if (left > 0 && (longest !== 1 || root === LENGTHS_ROOT)) return false;
  for (let symbol = 0; symbol < count; symbol++) {
    const length = load<u8>(lengths + symbol) as usize;
    if (length === 0) continue;
    const at = places + (length << 2);
    const position = load<i32>(at);
    store<u16>(sorted + ((position as usize) << 1), symbol as u16);
    store<i32>(at, position + 1);
  }
  let used = 1 << root;
  let prefix = -1;
  let second = 0;
  let secondBits = 0;
  let code = 0;
  let position = 0;
  for (let length = 1; length <= longest; length++, code <<= 1) {
    const counted = counts + (length << 2);
    while (load<i32>(counted) > 0) {
      const symbol = load<u16>(sorted + ((position++ as usize) << 1)) as u32;
      const stream = reversed(code, length);
      code++;
      if (length <= root) {
        const entry = (symbol << 16) | (length as u32);
        for (let at = stream; at < 1 << root; at += 1 << length)
          store<u32>(table + ((at as usize) << 2), entry);
      } else {
        const low = stream & ((1 << root) - 1);
        if (low !== prefix) {
          prefix = low;
          // As many bits as the codes that begin like this need, by what is left of each length.
          secondBits = length - root;
          let room = 1 << secondBits;
          while (secondBits + root < longest) {
            room -= load<i32>(counts + ((secondBits + root) << 2));
            if (room <= 0) break;
            secondBits++;
            room <<= 1;
          }
          second = used;
          used += 1 << secondBits;
          if (used > TABLE_ENTRIES) return false;
          memory.fill(table + ((second as usize) << 2), 0, (1 << secondBits) << 2);
          store<u32>(table + ((low as usize) << 2), ((second as u32) << 16) | 0x100 | (secondBits as u32));
        }
        const entry = (symbol << 16) | (length as u32);
        for (let at = stream >> root; at < 1 << secondBits; at += 1 << (length - root)) {
          store<u32>(table + (((second + at) as usize) << 2), entry);
        }
      }
      store<i32>(counted, load<i32>(counted) - 1);
    }
  }
  return true;
}

/** The next symbol, -1 where there is no such code. Needs 15 bits in `hold`. */
function decode(table: usize, root: i32): i32 {
  let entry = load<u32>(table + (((hold & (((1 as u64) << (root as u64)) - 1)) as usize) << 2));
  if ((entry & 0x100) !== 0) {
    const at = ((hold >> (root as u64)) & (((1 as u64) << ((entry & 0xff) as u64)) - 1)) as usize;
    entry = load<u32>(table + (((entry >> 16) as usize) << 2) + (at << 2));
  }
  const length = (entry & 0xff) as i32;
  if (length === 0) return DAMAGED;
  hold >>= length as u64;
  bits -= length;
  return (entry >> 16) as i32;
}

function fixedTables(work: usize): void {
  const lengths = work + LENGTHS;
  memory.fill(lengths, 8, 144);
  memory.fill(lengths + 144, 9, 112);
  memory.fill(lengths + 256, 7, 24);
  memory.fill(lengths + 280, 8, 8);
  makeTable(lengths, 288, LITERAL_ROOT, work + LITERALS, work);
  memory.fill(lengths, 5, 32);
  makeTable(lengths, 32, DISTANCE_ROOT, work + DISTANCES, work);
}

/** Reads the codes of a block. False where they are damaged. */
function readTables(work: usize): bool {
  const lengths = work + LENGTHS;
  refill();
  const literals = take(5) + 257;
  const distances = take(5) + 1;
  const given = take(4) + 4;
  if (literals > 286 || distances > 30) return false;
  memory.fill(lengths, 0, 19);
  for (let index = 0; index < given; index++) {
    refill();
    store<u8>(lengths + load<u8>(ORDER + index), take(3) as u8);
  }
  if (!makeTable(lengths, 19, LENGTHS_ROOT, work + LITERALS, work)) return false;
  const total = literals + distances;
  for (let index = 0; index < total; ) {
    refill();
    const symbol = decode(work + LITERALS, LENGTHS_ROOT);
    if (symbol < 0 || exhausted()) return false;
    if (symbol < 16) {
      store<u8>(lengths + index++, symbol as u8);
      continue;
    }
    let value: u8 = 0;
    let times: i32;
    if (symbol === 16) {
      if (index === 0) return false;
      value = load<u8>(lengths + index - 1);
      times = 3 + take(2);
    } else {
      times = symbol === 17 ? 3 + take(3) : 11 + take(7);
    }
    if (index + times > total) return false;
    memory.fill(lengths + index, value, times);
    index += times;
  }
  // Without an end the block has none.
  if (load<u8>(lengths + 256) === 0) return false;
  return (
    makeTable(lengths, literals, LITERAL_ROOT, work + LITERALS, work) &&
    makeTable(lengths + literals, distances, DISTANCE_ROOT, work + DISTANCES, work)
  );
}

/**
 * Decompresses until the stream ends or `capacity` bytes are there, whatever follows.
 *
 * @param to has room for 8 bytes more than `capacity`
 * @param work INFLATE_WORKSPACE bytes
 * @returns the bytes, or -1 where the stream is damaged or cut off before
 */
export function inflate(from: usize, length: i32, to: usize, capacity: i32, work: usize): i32 {
  input = from;
  inputEnd = from + length;
  hold = 0;
  bits = 0;
  beyond = 0;
  let out = to;
  const end = to + capacity;
  const literals = work + LITERALS;
  const distances = work + DISTANCES;
  let last = false;
  while (!last && out < end) {
    refill();
    last = take(1) !== 0;
    const type = take(2);
    if (type === 0) {
      // Bytes as they are: what `hold` has of them goes back.
      const skipped = bits & 7;
      hold >>= skipped as u64;
      bits -= skipped;
      refill();
      const size = take(16);
      const check = take(16);
      if (exhausted() || (size ^ 0xffff) !== check) return DAMAGED;
      input -= (bits >> 3) - beyond;
      hold = 0;
      bits = 0;
      beyond = 0;
      const room = (end - out) as i32;
      const bytes = size < room ? size : room;
      if (input + bytes > inputEnd) return DAMAGED;
      memory.copy(out, input, bytes);
      input += bytes;
      out += bytes;
    } else if (type === 3) {
      return DAMAGED;
    } else {
      if (type === 1) fixedTables(work);
      else if (!readTables(work)) return DAMAGED;
      while (out < end) {
        refill();
        let symbol = decode(literals, LITERAL_ROOT);
        if (symbol < 256) {
          if (symbol < 0) return DAMAGED;
          store<u8>(out++, symbol as u8);
          // Bits for one more: a literal takes 15 at most.
          if (out === end) break;
          symbol = decode(literals, LITERAL_ROOT);
          if (symbol < 256) {
            if (symbol < 0) return DAMAGED;
            store<u8>(out++, symbol as u8);
            continue;
          }
          refill();
        }
        if (symbol === 256) break;
        symbol -= 257;
        if (symbol >= 29) return DAMAGED;
        let count =
          (load<u16>(LENGTH_BASE + ((symbol as usize) << 1)) as i32) +
          take(load<u8>(LENGTH_EXTRA + symbol) as i32);
        const code = decode(distances, DISTANCE_ROOT);
        if (code < 0 || code >= 30) return DAMAGED;
        const distance =
          (load<u16>(DISTANCE_BASE + ((code as usize) << 1)) as i32) +
          take(load<u8>(DISTANCE_EXTRA + code) as i32);
        if (distance > ((out - to) as i32)) return DAMAGED;
        const room = (end - out) as i32;
        if (count > room) count = room;
        let source = out - distance;
        const stop = out + count;
        if (distance >= 8) {
          // Up to seven bytes too many, which what follows overwrites.
          do {
            store<u64>(out, load<u64>(source));
            out += 8;
            source += 8;
          } while (out < stop);
        } else {
          do {
            store<u8>(out++, load<u8>(source++));
          } while (out < stop);
        }
        out = stop;
      }
    }
    if (exhausted()) return DAMAGED;
  }
  return (out - to) as i32;
}
