/**
 * Standard L2 entries of qcow2, 64 bits, big-endian in the file:
 *
 *      63      62         61 … 56   55 … 9        8 … 1     0
 *     +------+----------+---------+-------------+---------+------+
 *     |COPIED|COMPRESSED| reserved| host offset | reserved| ZERO |      not compressed
 *     +------+----------+---------+-------------+---------+------+
 *
 *      63  62   61 … x               x-1 … 0              x = 62 - (cluster_bits - 8)
 *     +---+---+--------------------+---------------+
 *     | 0 | 1 | extra 512-sectors  | host offset   |      compressed
 *     +---+---+--------------------+---------------+
 */
const OFFSET_MASK: u64 = 0x00fffffffffffe00;
const RESERVED_MASK: u64 = 0x3f000000000001fe;
const ZERO: u64 = 1;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;

const UNALLOCATED: u32 = 0;
const ZERO_PLAIN: u32 = 1;
const ZERO_ALLOCATED: u32 = 2;
const DATA: u32 = 3;
const COMPRESSED_DATA: u32 = 4;
const INVALID: u32 = 5;

let kind: u32 = 0;
let hostOffset: u64 = 0;
let compressedLength: u32 = 0;
let copied: bool = false;

export function l2Kind(): u32 {
  return kind;
}

export function l2HostOffset(): f64 {
  return hostOffset as f64;
}

export function l2CompressedLength(): u32 {
  return compressedLength;
}

export function l2Copied(): bool {
  return copied;
}

function kindOf(entry: u64, clusterBits: u32, hasZeroFlag: bool): u32 {
  if (entry & COMPRESSED) return entry & COPIED ? INVALID : COMPRESSED_DATA;
  if (entry & RESERVED_MASK) return INVALID;
  const offset = entry & OFFSET_MASK;
  if (offset & ((1 << (clusterBits as u64)) - 1)) return INVALID;
  if (entry & ZERO) return !hasZeroFlag ? INVALID : offset ? ZERO_ALLOCATED : ZERO_PLAIN;
  if (offset) return DATA;
  return entry & COPIED ? INVALID : UNALLOCATED;
}

/**
 * The extent that starts at entry `index` of the slice, at most `count` entries long: entries of one kind, those
 * with a host cluster contiguous in the file and equal in COPIED. Returns how many entries it has.
 */
export function l2Extent(slice: usize, index: u32, count: u32, clusterBits: u32, hasZeroFlag: bool): u32 {
  const at = slice + ((index as usize) << 3);
  const first = bswap<u64>(load<u64>(at));
  kind = kindOf(first, clusterBits, hasZeroFlag);
  hostOffset = first & OFFSET_MASK;
  copied = (first & COPIED) != 0;
  if (kind == INVALID) return 1;
  if (kind == COMPRESSED_DATA) {
    const x: u64 = 62 - ((clusterBits as u64) - 8);
    hostOffset = first & ((1 << x) - 1);
    const sectors = ((first & (COMPRESSED - 1)) >> x) + 1;
    compressedLength = (sectors * 512 - (hostOffset & 511)) as u32;
    return 1;
  }
  const step: u64 = kind == DATA || kind == ZERO_ALLOCATED ? 1 << (clusterBits as u64) : 0;
  let expected = first;
  let n: u32 = 1;
  for (; n < count; n++) {
    expected += step;
    if (load<u64>(at + ((n as usize) << 3)) != bswap<u64>(expected)) break;
  }
  return n;
}
