/**
 * L2 entries of qcow2, big-endian in the file. Standard ones have 64 bits:
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
 *
 * Extended ones have 64 bits more, two for each of the 32 subclusters, and no ZERO flag:
 *
 *      63 … 32               31 … 0
 *     +---------------------+---------------------+
 *     | reads as zeroes     | allocated           |      both: invalid
 *     +---------------------+---------------------+
 *
 * In an image with an external data file the data is at the guest's own offsets, 0 among them: there COPIED tells
 * an allocated cluster at 0 from an unallocated one.
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
/** A subcluster without data in a cluster that has a place in the file. */
const UNALLOCATED_PLACE: u32 = 6;

/** Bits of the image's features, see `L2_FEATURE_*` in src/kernels. */
const HAS_ZERO_FLAG: u32 = 1;
const HAS_SUBCLUSTERS: u32 = 2;
const HAS_DATA_FILE: u32 = 4;

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

function kindOf(entry: u64, clusterBits: u32, features: u32): u32 {
  if (entry & COMPRESSED) return entry & COPIED || features & HAS_DATA_FILE ? INVALID : COMPRESSED_DATA;
  if (entry & RESERVED_MASK) return INVALID;
  const offset = entry & OFFSET_MASK;
  if (offset & ((1 << (clusterBits as u64)) - 1)) return INVALID;
  if (entry & ZERO) return !(features & HAS_ZERO_FLAG) ? INVALID : offset ? ZERO_ALLOCATED : ZERO_PLAIN;
  if (offset) return DATA;
  if (!(entry & COPIED)) return UNALLOCATED;
  return features & HAS_DATA_FILE ? DATA : INVALID;
}

/** Kind of one subcluster of an extended entry that is not compressed. */
function subclusterKind(cluster: u32, bitmap: u64, subcluster: u32): u32 {
  const allocated = (bitmap >> (subcluster as u64)) & 1;
  const zero = (bitmap >> ((subcluster + 32) as u64)) & 1;
  if (cluster == INVALID || (allocated & zero) != 0) return INVALID;
  if (allocated) return cluster == DATA ? DATA : INVALID;
  if (zero) return cluster == DATA ? ZERO_ALLOCATED : ZERO_PLAIN;
  return cluster == DATA ? UNALLOCATED_PLACE : UNALLOCATED;
}

/** How many subclusters from `from` on have the same two bits as that one. */
function sameBits(bitmap: u64, from: u32): u32 {
  const allocated = (bitmap as u32) >> from;
  const zero = ((bitmap >> 32) as u32) >> from;
  const differs = (allocated & 1 ? ~allocated : allocated) | (zero & 1 ? ~zero : zero);
  const run: u32 = differs ? (ctz<u32>(differs) as u32) : 32;
  return min(run, 32 - from);
}

function describeCompressed(entry: u64, clusterBits: u32): void {
  const x: u64 = 62 - ((clusterBits as u64) - 8);
  hostOffset = entry & ((1 << x) - 1);
  const sectors = ((entry & (COMPRESSED - 1)) >> x) + 1;
  compressedLength = (sectors * 512 - (hostOffset & 511)) as u32;
}

/**
 * The extent that starts at subcluster `index` of the slice (an image without subclusters: cluster), at most `count`
 * of them long: those of one kind, those with a place in the file contiguous there and equal in COPIED. A compressed
 * cluster is an extent of its own. Returns how many subclusters it has; the place is that of the first one's cluster.
 */
export function l2Extent(slice: usize, index: u32, count: u32, clusterBits: u32, features: u32): u32 {
  if (features & HAS_SUBCLUSTERS) return extendedExtent(slice, index, count, clusterBits, features);
  const at = slice + ((index as usize) << 3);
  const first = bswap<u64>(load<u64>(at));
  kind = kindOf(first, clusterBits, features);
  hostOffset = first & OFFSET_MASK;
  copied = (first & COPIED) != 0;
  if (kind == INVALID) return 1;
  if (kind == COMPRESSED_DATA) {
    describeCompressed(first, clusterBits);
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

function extendedExtent(slice: usize, index: u32, count: u32, clusterBits: u32, features: u32): u32 {
  let at = slice + (((index >> 5) as usize) << 4);
  let entry = bswap<u64>(load<u64>(at));
  let bitmap = bswap<u64>(load<u64>(at, 8));
  const within = index & 31;
  // Without the ZERO flag bit 0 is reserved.
  const cluster = entry & ZERO && !(entry & COMPRESSED) ? INVALID : kindOf(entry, clusterBits, features);
  hostOffset = entry & OFFSET_MASK;
  copied = (entry & COPIED) != 0;
  if (cluster == COMPRESSED_DATA) {
    kind = cluster;
    describeCompressed(entry, clusterBits);
    return min(count, 32 - within);
  }
  kind = subclusterKind(cluster, bitmap, within);
  if (kind == INVALID) return 1;
  let n = sameBits(bitmap, within);
  const step: u64 = cluster == DATA ? 1 << (clusterBits as u64) : 0;
  // On into the next clusters where this one is of the kind up to its end.
  while (n < count && ((index + n) & 31) == 0) {
    at += 16;
    entry += step;
    const next = bswap<u64>(load<u64>(at));
    bitmap = bswap<u64>(load<u64>(at, 8));
    if (next != entry || subclusterKind(cluster, bitmap, 0) != kind) break;
    n += sameBits(bitmap, 0);
  }
  return min(n, count);
}
