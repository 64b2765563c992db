/**
 * Checks of qcow2 tables. Counters of references, one per host cluster, are in chunks of 2^16 clusters that exist where
 * they are needed; a directory of 32-bit pointers has one for every chunk:
 *
 *     directory   | pointer 0 | pointer 1 | …       0: no chunk, all counters are 0
 *                       |                           bit 0 set: wide counters
 *                       v
 *     chunk       | counter of cluster 0 | 1 | …    8 bits each, in a wide chunk 32
 *
 * The tables are as in l2.ts and refcount.ts. An entry of an image with subclusters has a second word:
 *
 *      63 … 32                      31 … 0
 *     +----------------------------+-----------------------------+
 *     | subcluster reads as zeroes | subcluster is allocated     |
 *     +----------------------------+-----------------------------+
 */
const OFFSET_MASK: u64 = 0x00fffffffffffe00;
const RESERVED_MASK: u64 = 0x3f000000000001fe;
const ZERO: u64 = 1;
const COMPRESSED: u64 = 1 << 62;
const COPIED: u64 = 1 << 63;
const WIDE: u32 = 1;
const CHUNK_BITS: u32 = 16;
const CHUNK_MASK: u64 = 0xffff;
const NARROW_MOST: u32 = 255;

let directory: usize = 0;
let clusters: u64 = 0;
let clusterBits: u32 = 0;
let extended: bool = false;
let external: bool = false;
let most: u32 = 0;
let narrowMost: u32 = 0;
/** Bytes of the file up to which a reference may reach. */
let reach: u64 = 0;

let allocated: u32 = 0;
let fragmented: u32 = 0;
let compressed: u32 = 0;
/** References to clusters that had one already. */
let shared: u32 = 0;
/** Clusters of the totals, those of compressed data apart, whose entry has no flag COPIED. */
let uncopied: u32 = 0;
/** Where the next cluster of the table would be if it was not fragmented; 0 at the beginning of a table. */
let following: u64 = 0;

export function checkSetup(
  directoryPointer: usize,
  clusterCount: u32,
  bits: u32,
  hasSubclusters: bool,
  hasDataFile: bool,
  mostReferences: u32,
  fileBytes: f64,
): void {
  directory = directoryPointer;
  clusters = clusterCount;
  clusterBits = bits;
  extended = hasSubclusters;
  external = hasDataFile;
  most = mostReferences;
  narrowMost = min(mostReferences, NARROW_MOST);
  reach = (fileBytes as u64) + (1 << (bits as u64)) - 1;
}

export function checkResetTotals(): void {
  allocated = 0;
  fragmented = 0;
  compressed = 0;
  shared = 0;
  uncopied = 0;
}

export function checkAllocated(): u32 {
  return allocated;
}

export function checkFragmented(): u32 {
  return fragmented;
}

export function checkCompressed(): u32 {
  return compressed;
}

export function checkShared(): u32 {
  return shared;
}

export function checkUncopied(): u32 {
  return uncopied;
}

export function checkBeginTable(): void {
  following = 0;
}

/** Takes a cluster of data at `offset` into the totals. */
export function checkNoteData(offset: u64): void {
  allocated++;
  if (following != 0 && offset != following) fragmented++;
  following = offset + (1 << (clusterBits as u64));
}

export function checkNoteCompressed(): void {
  allocated++;
  compressed++;
  // They share sectors with their neighbours: none can be read in one go with the next.
  fragmented++;
}

/** Counts `weight` references to the cluster where its counter is there and has room for them. */
function tally(cluster: u64, weight: u32): bool {
  if (cluster >= clusters) return false;
  const chunk = load<u32>(directory + (((cluster >> CHUNK_BITS) as usize) << 2));
  if (chunk == 0) return false;
  const index = (cluster & CHUNK_MASK) as u32;
  if (chunk & WIDE) {
    const at = (chunk ^ WIDE) + (index << 2);
    const before = load<u32>(at);
    if (weight > most || before > most - weight) return false;
    store<u32>(at, before + weight);
    shared += (before | (weight - 1)) != 0 ? 1 : 0;
  } else {
    const before = load<u8>(chunk + index) as u32;
    if (weight > narrowMost || before > narrowMost - weight) return false;
    store<u8>(chunk + index, before + weight);
    shared += (before | (weight - 1)) != 0 ? 1 : 0;
  }
  return true;
}

/** Takes the references to the clusters [first, end) back. */
function untally(first: u64, end: u64, weight: u32): void {
  for (let cluster = first; cluster < end; cluster++) {
    const chunk = load<u32>(directory + (((cluster >> CHUNK_BITS) as usize) << 2));
    const index = (cluster & CHUNK_MASK) as u32;
    if (chunk & WIDE) {
      const at = (chunk ^ WIDE) + (index << 2);
      store<u32>(at, load<u32>(at) - weight);
    } else {
      store<u8>(chunk + index, (load<u8>(chunk + index) as u32) - weight);
    }
  }
}

/**
 * Counts what the entries [from, end) of an L2 table refer to, each `weight` times, up to the first one that is
 * wrong in itself, refers to a place outside of the file or to a counter that does not exist or would overflow.
 * `note`: the clusters are taken into the totals. Returns the index of that entry, `end` where there is none.
 */
export function checkCountEntries(table: usize, from: u32, end: u32, weight: u32, note: bool): u32 {
  const bits = clusterBits as u64;
  const within: u64 = (1 << bits) - 1;
  const step: usize = extended ? 16 : 8;
  const subclusters = extended;
  let at = table + (from as usize) * step;
  for (let index = from; index < end; index++, at += step) {
    const raw = load<u64>(at);
    const bitmap: u64 = subclusters ? bswap<u64>(load<u64>(at, 8)) : 0;
    if (raw == 0) {
      if (bitmap & 0xffffffff) return index;
      continue;
    }
    const entry = bswap<u64>(raw);
    if (entry & COMPRESSED) {
      if (entry & COPIED || external || bitmap != 0) return index;
      const x: u64 = 62 - (bits - 8);
      const offset = entry & ((1 << x) - 1);
      const length = (((entry & (COMPRESSED - 1)) >> x) + 1) * 512 - (offset & 511);
      if (offset + length > reach) return index;
      const first = offset >> bits;
      const last = (offset + length - 1) >> bits;
      const before = shared;
      for (let cluster = first; cluster <= last; cluster++) {
        if (tally(cluster, weight)) continue;
        untally(first, cluster, weight);
        shared = before;
        return index;
      }
      if (note) checkNoteCompressed();
      continue;
    }
    if (entry & RESERVED_MASK) return index;
    const offset = entry & OFFSET_MASK;
    if (offset == 0) {
      if (!subclusters && entry & ZERO) continue;
      if (!external || !(entry & COPIED)) {
        if (bitmap & 0xffffffff) return index;
        continue;
      }
    }
    if (offset & within || ((bitmap >> 32) & bitmap) != 0) return index;
    if (!external) {
      if (offset + within >= reach) return index;
      if (!tally(offset >> bits, weight)) return index;
    }
    if (note) {
      checkNoteData(offset);
      uncopied += entry & COPIED ? 0 : 1;
    }
  }
  return end;
}

/**
 * First of the entries [from, end) of an L2 table whose flag COPIED does not agree with the refcount of its cluster,
 * or whose refcount is not among the counters; `end` where there is none. The counters hold refcounts here.
 */
export function checkCopiedFlags(table: usize, from: u32, end: u32): u32 {
  const bits = clusterBits as u64;
  const step: usize = extended ? 16 : 8;
  let at = table + (from as usize) * step;
  for (let index = from; index < end; index++, at += step) {
    const raw = load<u64>(at);
    if (raw == 0) continue;
    const entry = bswap<u64>(raw);
    if (entry & COMPRESSED) continue;
    const offset = entry & OFFSET_MASK;
    const copied = (entry & COPIED) != 0;
    // With an external data file the flag alone makes a cluster at offset 0 allocated.
    if (offset == 0 && !(external && copied && (extended || !(entry & ZERO)))) continue;
    if (external) {
      if (!copied) return index;
      continue;
    }
    const cluster = offset >> bits;
    if (cluster >= clusters) return index;
    const chunk = load<u32>(directory + (((cluster >> CHUNK_BITS) as usize) << 2));
    if (chunk == 0) return index;
    const inChunk = (cluster & CHUNK_MASK) as u32;
    const refcount: u32 =
      chunk & WIDE ? load<u32>((chunk ^ WIDE) + (inChunk << 2)) : (load<u8>(chunk + inChunk) as u32);
    if ((refcount == 1) != copied) return index;
  }
  return end;
}

function refcountAt(block: usize, index: u32, order: u32): u64 {
  switch (order) {
    case 3:
      return load<u8>(block + index);
    case 4:
      return bswap<u16>(load<u16>(block + ((index as usize) << 1)));
    case 5:
      return bswap<u32>(load<u32>(block + ((index as usize) << 2)));
    case 6:
      return bswap<u64>(load<u64>(block + ((index as usize) << 3)));
    default: {
      const bit = index << order;
      return (load<u8>(block + (bit >> 3)) >> (bit & 7)) & ((1 << (1 << order)) - 1);
    }
  }
}

/**
 * How many of the `entries` counters from `counters` on (8 bits each, `wide`: 32) agree with the refcounts from entry
 * `index` of the block on. `block` 0: all refcounts are 0; `counters` 0: all counters are.
 */
export function checkRefcounts(
  block: usize,
  index: u32,
  order: u32,
  counters: usize,
  wide: bool,
  entries: u32,
): u32 {
  let n: u32 = 0;
  const usual = order == 4 && !wide && block != 0 && counters != 0;
  while (n < entries) {
    if (usual) {
      // Sixteen at once: the high bytes are 0 and the low bytes are the counters.
      while (entries - n >= 16) {
        const at = block + (((index + n) as usize) << 1);
        const a = v128.load(at);
        const b = v128.load(at, 16);
        const high = v128.shuffle<u8>(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const low = v128.shuffle<u8>(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        if (v128.any_true(v128.or(high, v128.xor(low, v128.load(counters + n))))) break;
        n += 16;
      }
      if (n == entries) break;
    }
    const refcount: u64 = block == 0 ? 0 : refcountAt(block, index + n, order);
    const counter: u64 =
      counters == 0 ? 0 : wide ? load<u32>(counters + ((n as usize) << 2)) : load<u8>(counters + n);
    if (refcount != counter) return n;
    n++;
  }
  return n;
}

/** First counter that is not 0 among `entries` of them (8 bits each, `wide`: 32), `entries` where there is none. */
export function countersNextUsed(counters: usize, wide: bool, from: u32, entries: u32): u32 {
  const shift: u32 = wide ? 2 : 0;
  let n = from;
  while (n < entries) {
    const at = counters + ((n as usize) << shift);
    const perVector: u32 = 16 >> shift;
    if (entries - n >= perVector && !v128.any_true(v128.load(at))) {
      n += perVector;
      continue;
    }
    if ((wide ? load<u32>(at) : (load<u8>(at) as u32)) != 0) return n;
    n++;
  }
  return entries;
}

/** First counter that is 0 among `entries` of them, `entries` where there is none. */
export function countersNextFree(counters: usize, wide: bool, from: u32, entries: u32): u32 {
  for (let n = from; n < entries; n++) {
    if (!wide) {
      const zero = i8x16.splat(0);
      while (entries - n >= 16 && !v128.any_true(i8x16.eq(v128.load(counters + n), zero))) n += 16;
      if (n == entries) return n;
    }
    if ((wide ? load<u32>(counters + ((n as usize) << 2)) : (load<u8>(counters + n) as u32)) == 0) return n;
  }
  return entries;
}

/** Last counter that is not 0 among the first `entries`, -1 where there is none. */
export function countersLastUsed(counters: usize, wide: bool, entries: u32): i32 {
  for (let n = (entries as i32) - 1; n >= 0; n--) {
    if ((wide ? load<u32>(counters + ((n as usize) << 2)) : (load<u8>(counters + n) as u32)) != 0) return n;
  }
  return -1;
}
