import { isZero } from './zero';

/**
 * XXH3, 64 bit, seed 0, after the published specification of the algorithm
 * (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md). Inputs of more than 240 bytes run through
 * eight 64-bit accumulators, two to a vector; a stripe is 64 bytes, a block 16 stripes.
 */

const PRIME32_1: u64 = 0x9e3779b1;
const PRIME32_2: u64 = 0x85ebca77;
const PRIME32_3: u64 = 0xc2b2ae3d;
const PRIME64_1: u64 = 0x9e3779b185ebca87;
const PRIME64_2: u64 = 0xc2b2ae3d27d4eb4f;
const PRIME64_3: u64 = 0x165667b19e3779f9;
const PRIME64_4: u64 = 0x85ebca77c2b2ae63;
const PRIME64_5: u64 = 0x27d4eb2f165667c5;
const PRIME_MX1: u64 = 0x165667919e3779f9;
const PRIME_MX2: u64 = 0x9fb21c651e98df25;

const SECRET_BYTES: usize = 192;
const STRIPE: usize = 64;
const STRIPES_PER_BLOCK: usize = 16;

/** The default secret of the specification. */
const secret = memory.data<u8>(
  [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde,
    0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79,
    0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46,
    0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb,
    0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2,
    0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c,
    0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59,
    0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3,
    0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3,
    0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8,
    0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb,
    0xca, 0xbb, 0x4b, 0x40, 0x7e,
  ],
  16,
);

/** A stripe of zeroes, for hashing zeroes that are not in memory. */
const zeroes = memory.data(256, 16);

/** Both halves of the 128-bit product, folded by exclusive or. */
function mulFold(a: u64, b: u64): u64 {
  const aLow = a & 0xffffffff;
  const aHigh = a >> 32;
  const bLow = b & 0xffffffff;
  const bHigh = b >> 32;
  const low = aLow * bLow;
  const cross = (low >> 32) + aHigh * bLow;
  const middle = (cross & 0xffffffff) + aLow * bHigh;
  const high = (cross >> 32) + (middle >> 32) + aHigh * bHigh;
  return ((middle << 32) | (low & 0xffffffff)) ^ high;
}

function avalanche(hash: u64): u64 {
  hash ^= hash >> 37;
  hash *= PRIME_MX1;
  return hash ^ (hash >> 32);
}

function avalanche64(hash: u64): u64 {
  hash ^= hash >> 33;
  hash *= PRIME64_2;
  hash ^= hash >> 29;
  hash *= PRIME64_3;
  return hash ^ (hash >> 32);
}

function mix16(pointer: usize, key: usize): u64 {
  return mulFold(load<u64>(pointer) ^ load<u64>(key), load<u64>(pointer, 8) ^ load<u64>(key, 8));
}

function hash0to16(pointer: usize, length: usize): u64 {
  if (length > 8) {
    const low = load<u64>(pointer) ^ load<u64>(secret, 24) ^ load<u64>(secret, 32);
    const high = load<u64>(pointer + length - 8) ^ load<u64>(secret, 40) ^ load<u64>(secret, 48);
    return avalanche((length as u64) + bswap<u64>(low) + high + mulFold(low, high));
  }
  if (length >= 4) {
    const first: u64 = load<u32>(pointer);
    const last: u64 = load<u32>(pointer + length - 4);
    let hash = (last + (first << 32)) ^ load<u64>(secret, 8) ^ load<u64>(secret, 16);
    hash ^= rotl<u64>(hash, 49) ^ rotl<u64>(hash, 24);
    hash *= PRIME_MX2;
    hash ^= (hash >> 35) + (length as u64);
    hash *= PRIME_MX2;
    return hash ^ (hash >> 28);
  }
  if (length > 0) {
    const first: u32 = load<u8>(pointer);
    const middle: u32 = load<u8>(pointer + (length >> 1));
    const last: u32 = load<u8>(pointer + length - 1);
    const combined: u64 = (first << 16) | (middle << 24) | last | ((length as u32) << 8);
    return avalanche64(combined ^ ((load<u32>(secret) ^ load<u32>(secret, 4)) as u64));
  }
  return avalanche64(load<u64>(secret, 56) ^ load<u64>(secret, 64));
}

function hash17to240(pointer: usize, length: usize): u64 {
  let hash = (length as u64) * PRIME64_1;
  const last = pointer + length - 16;
  if (length <= 128) {
    if (length > 32) {
      if (length > 64) {
        if (length > 96) hash += mix16(pointer + 48, secret + 96) + mix16(last - 48, secret + 112);
        hash += mix16(pointer + 32, secret + 64) + mix16(last - 32, secret + 80);
      }
      hash += mix16(pointer + 16, secret + 32) + mix16(last - 16, secret + 48);
    }
    hash += mix16(pointer, secret) + mix16(last, secret + 16);
    return avalanche(hash);
  }
  for (let i: usize = 0; i < 8; i++) hash += mix16(pointer + 16 * i, secret + 16 * i);
  hash = avalanche(hash);
  const rounds = length / 16;
  for (let i: usize = 8; i < rounds; i++) hash += mix16(pointer + 16 * i, secret + 16 * (i - 8) + 3);
  return avalanche(hash + mix16(last, secret + 119));
}

/** low 32 bits times high 32 bits of both lanes of data ^ key. */
function product(data: v128, key: v128): v128 {
  const keyed = v128.xor(data, key);
  return i64x2.extmul_low_i32x4_u(
    v128.shuffle<u32>(keyed, keyed, 0, 2, 0, 2),
    v128.shuffle<u32>(keyed, keyed, 1, 3, 1, 3),
  );
}

function accumulate(acc: v128, data: v128, key: v128): v128 {
  return i64x2.add(i64x2.add(acc, v128.shuffle<u64>(data, data, 1, 0)), product(data, key));
}

function scramble(acc: v128, key: v128): v128 {
  return i64x2.mul(v128.xor(v128.xor(acc, i64x2.shr_u(acc, 47)), key), i64x2.splat(PRIME32_1));
}

function merge(acc: v128, key: usize): u64 {
  return mulFold(
    (i64x2.extract_lane(acc, 0) as u64) ^ load<u64>(key),
    (i64x2.extract_lane(acc, 1) as u64) ^ load<u64>(key, 8),
  );
}

/** @param step 64, or 0 to read the same stripe again and again */
function hashLong(pointer: usize, length: usize, step: usize): u64 {
  let a = i64x2(PRIME32_3, PRIME64_1);
  let b = i64x2(PRIME64_2, PRIME64_3);
  let c = i64x2(PRIME64_4, PRIME32_2);
  let d = i64x2(PRIME64_5, PRIME32_1);
  const stripes = (length - 1) / STRIPE;
  let at = pointer;
  for (let stripe: usize = 0; stripe < stripes; ) {
    const end = min(stripe + STRIPES_PER_BLOCK, stripes);
    const full = end - stripe == STRIPES_PER_BLOCK;
    let key = secret;
    for (; stripe < end; stripe++) {
      a = accumulate(a, v128.load(at), v128.load(key));
      b = accumulate(b, v128.load(at, 16), v128.load(key, 16));
      c = accumulate(c, v128.load(at, 32), v128.load(key, 32));
      d = accumulate(d, v128.load(at, 48), v128.load(key, 48));
      at += step;
      key += 8;
    }
    if (full) {
      const mix = secret + SECRET_BYTES - STRIPE;
      a = scramble(a, v128.load(mix));
      b = scramble(b, v128.load(mix, 16));
      c = scramble(c, v128.load(mix, 32));
      d = scramble(d, v128.load(mix, 48));
    }
  }
  const last = step == 0 ? pointer : pointer + length - STRIPE;
  const key = secret + SECRET_BYTES - STRIPE - 7;
  a = accumulate(a, v128.load(last), v128.load(key));
  b = accumulate(b, v128.load(last, 16), v128.load(key, 16));
  c = accumulate(c, v128.load(last, 32), v128.load(key, 32));
  d = accumulate(d, v128.load(last, 48), v128.load(key, 48));
  const start = secret + 11;
  const hash = merge(a, start) + merge(b, start + 16) + merge(c, start + 32) + merge(d, start + 48);
  return avalanche((length as u64) * PRIME64_1 + hash);
}

/** XXH3-64 of `length` bytes at `pointer`. */
export function xxh3(pointer: usize, length: usize): u64 {
  if (length <= 16) return hash0to16(pointer, length);
  if (length <= 240) return hash17to240(pointer, length);
  return hashLong(pointer, length, STRIPE);
}

/** XXH3-64 of `length` zero bytes, which need not be anywhere. */
function xxh3Zeroes(length: usize): u64 {
  return length <= 240 ? xxh3(zeroes, length) : hashLong(zeroes, length, 0);
}

let cachedUnit: usize = 0;
let cachedHash: u64 = 0;

function zeroHash(unit: usize): u64 {
  if (unit != cachedUnit) {
    cachedHash = xxh3Zeroes(unit);
    cachedUnit = unit;
  }
  return cachedHash;
}

/** XXH3-64 of the 16 bytes LE64(hash) LE64(index), without a trip through memory. */
function leaf(hash: u64, index: u64): u64 {
  const low = hash ^ load<u64>(secret, 24) ^ load<u64>(secret, 32);
  const high = index ^ load<u64>(secret, 40) ^ load<u64>(secret, 48);
  return avalanche(16 + bswap<u64>(low) + high + mulFold(low, high));
}

let zeroCount: u32 = 0;

/** Zero units of the last digestUnits. */
export function zeroUnits(): u32 {
  return zeroCount;
}

/**
 * One pass over a buffer of units: zero scan, hash, leaf. Bit i of `mask` (bit i & 31 of 32-bit word i >> 5) becomes
 * 1 where unit i is zero. Returns the sum of the leaves modulo 2^64.
 */
export function digestUnits(pointer: usize, length: usize, unit: usize, first: u64, mask: usize): u64 {
  let sum: u64 = 0;
  let word: u32 = 0;
  let index: u32 = 0;
  zeroCount = 0;
  for (let done: usize = 0; done < length; done += unit, index++) {
    const bytes = min(unit, length - done);
    let hash: u64;
    if (isZero(pointer + done, bytes)) {
      word |= 1 << (index & 31);
      zeroCount++;
      hash = bytes == unit ? zeroHash(unit) : xxh3Zeroes(bytes);
    } else {
      hash = xxh3(pointer + done, bytes);
    }
    sum += leaf(hash, first + (index as u64));
    if ((index & 31) == 31) {
      store<u32>(mask + ((index >> 5) << 2), word);
      word = 0;
    }
  }
  if ((index & 31) != 0) store<u32>(mask + ((index >> 5) << 2), word);
  return sum;
}

/** Sum of the leaves of `count` zero units from `first` on, the very last of them `last` bytes long. */
export function zeroLeaves(unit: usize, last: usize, first: u64, count: u64): u64 {
  if (count == 0) return 0;
  const hash = zeroHash(unit);
  let sum: u64 = 0;
  for (let index: u64 = 0; index < count - 1; index++) sum += leaf(hash, first + index);
  return sum + leaf(last == unit ? hash : xxh3Zeroes(last), first + count - 1);
}
