/**
 * States of clusters, two bits each, 32 to a 64-bit word:
 *
 *     bits  63 62 | 61 60 | … | 3 2 | 1 0
 *     cluster  31 |    30 | … |   1 |   0        (of the word)
 *
 *     00 none   01 todo   10 busy   11 done
 *
 * Every change is a compare-and-swap of one word, so a cluster is claimed by exactly one thread.
 */
const ODD: u64 = 0x5555555555555555;
const TODO: u32 = 1;
const BUSY: u32 = 2;

let claimed: u32 = 0;
let trouble: u32 = 0;

/** Clusters of the last successful claim. */
export function claimedCount(): u32 {
  return claimed;
}

/** The cluster that broke the last clustersTransition. */
export function offendingCluster(): u32 {
  return trouble;
}

function word(states: usize, index: u32): usize {
  return states + (((index >> 5) as usize) << 3);
}

/** All bits of clusters [from, to) of one word, 0 <= from < to <= 32. */
function rangeMask(from: u32, to: u32): u64 {
  return (u64.MAX_VALUE >> (64 - 2 * (to - from))) << (2 * from);
}

/** The low bit of each cluster that is in `state`. */
function inState(value: u64, state: u32): u64 {
  const same = ~(value ^ (ODD * (state as u64)));
  return same & (same >> 1) & ODD;
}

export function clustersFill(states: usize, start: u32, count: u32, state: u32): void {
  const end = start + count;
  const pattern = ODD * (state as u64);
  while (start < end) {
    const base = start & ~31;
    const stop = min(base + 32, end);
    const mask = rangeMask(start - base, stop - base);
    const at = word(states, start);
    for (;;) {
      const old = atomic.load<u64>(at);
      const value = (old & ~mask) | (pattern & mask);
      if (old == value || atomic.cmpxchg<u64>(at, old, value) == old) break;
    }
    start = stop;
  }
}

export function clusterState(states: usize, index: u32): u32 {
  return ((atomic.load<u64>(word(states, index)) >> (2 * (index & 31))) & 3) as u32;
}

/** Claims contiguous todo clusters that begin at `index`, up to `end`. Returns how many. */
export function clustersClaimAt(states: usize, index: u32, end: u32): u32 {
  const start = index;
  while (index < end) {
    const base = index & ~31;
    const stop = min(base + 32, end);
    const mask = rangeMask(index - base, stop - base);
    const at = word(states, index);
    let run: u32 = 0;
    for (;;) {
      const old = atomic.load<u64>(at);
      const other = ~inState(old, TODO) & ODD & mask;
      run = (other == 0 ? stop : base + (ctz<u64>(other) as u32) / 2) - index;
      if (run == 0) break;
      const claim = rangeMask(index - base, index - base + run);
      // todo (01) becomes busy (10): both bits flip.
      if (atomic.cmpxchg<u64>(at, old, old ^ claim) == old) break;
    }
    index += run;
    if (index != stop) break;
  }
  claimed = index - start;
  return claimed;
}

/** First cluster in [from, end) in `state`, -1 where there is none. */
export function clustersNext(states: usize, from: u32, end: u32, state: u32): i32 {
  const pattern = i64x2.splat(ODD * (state as u64));
  const odd = i64x2.splat(ODD);
  while (from < end) {
    if ((from & 31) == 0) {
      for (; end - from >= 64; from += 64) {
        const other = v128.xor(v128.load(word(states, from)), pattern);
        // A cluster in the state has two clear bits here.
        const differs = v128.and(v128.or(other, i64x2.shr_u(other, 1)), odd);
        if (v128.any_true(v128.xor(differs, odd))) break;
      }
      if (from == end) return -1;
    }
    const base = from & ~31;
    const found =
      inState(atomic.load<u64>(word(states, from)), state) & (u64.MAX_VALUE << (2 * (from - base)));
    if (found != 0) {
      const index = base + (ctz<u64>(found) as u32) / 2;
      return index < end ? (index as i32) : -1;
    }
    from = base + 32;
  }
  return -1;
}

/** First cluster in [from, end) that is todo or busy, -1 where there is none. */
export function clustersNextPending(states: usize, from: u32, end: u32): i32 {
  const odd = i64x2.splat(ODD);
  while (from < end) {
    if ((from & 31) == 0) {
      for (; end - from >= 64; from += 64) {
        const value = v128.load(word(states, from));
        if (v128.any_true(v128.and(v128.xor(value, i64x2.shr_u(value, 1)), odd))) break;
      }
      if (from == end) return -1;
    }
    const base = from & ~31;
    const value = atomic.load<u64>(word(states, from));
    const found = (value ^ (value >> 1)) & ODD & (u64.MAX_VALUE << (2 * (from - base)));
    if (found != 0) {
      const index = base + (ctz<u64>(found) as u32) / 2;
      return index < end ? (index as i32) : -1;
    }
    from = base + 32;
  }
  return -1;
}

/** Claims the first run of todo clusters in [from, end), at most `most` of them. Returns its start or -1. */
export function clustersClaimNext(states: usize, from: u32, end: u32, most: u32): i32 {
  let first = clustersNext(states, from, end, TODO);
  while (first >= 0) {
    const index = first as u32;
    if (clustersClaimAt(states, index, index + min(most, end - index)) > 0) break;
    // Somebody else was faster.
    first = clustersNext(states, index, end, TODO);
  }
  return first;
}

/** Every cluster of the range goes from `before` to `after`. False, with the rest untouched, where one was not `before`. */
export function clustersTransition(states: usize, start: u32, count: u32, before: u32, after: u32): bool {
  const end = start + count;
  const flip = ODD * ((before ^ after) as u64);
  while (start < end) {
    const base = start & ~31;
    const stop = min(base + 32, end);
    const mask = rangeMask(start - base, stop - base);
    const at = word(states, start);
    for (;;) {
      const old = atomic.load<u64>(at);
      const other = ~inState(old, before) & ODD & mask;
      if (other != 0) {
        trouble = base + (ctz<u64>(other) as u32) / 2;
        return false;
      }
      if (atomic.cmpxchg<u64>(at, old, old ^ (flip & mask)) == old) break;
    }
    start = stop;
  }
  return true;
}

export function clustersCount(states: usize, start: u32, count: u32, state: u32): u32 {
  const end = start + count;
  let total: u32 = 0;
  while (start < end) {
    const base = start & ~31;
    const stop = min(base + 32, end);
    const value =
      inState(atomic.load<u64>(word(states, start)), state) & rangeMask(start - base, stop - base);
    total += popcnt<u64>(value) as u32;
    start = stop;
  }
  return total;
}
