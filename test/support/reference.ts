/**
 * The kernels once more, in plain scalar TypeScript, as slow and as obvious as can be: what the WebAssembly has to
 * agree with bit by bit. Pointers are offsets into `bytes`.
 */

const MASK64 = (1n << 64n) - 1n;
const PRIME32_1 = 0x9e3779b1n;
const PRIME32_2 = 0x85ebca77n;
const PRIME32_3 = 0xc2b2ae3dn;
const PRIME64_1 = 0x9e3779b185ebca87n;
const PRIME64_2 = 0xc2b2ae3d27d4eb4fn;
const PRIME64_3 = 0x165667b19e3779f9n;
const PRIME64_4 = 0x85ebca77c2b2ae63n;
const PRIME64_5 = 0x27d4eb2f165667c5n;
const PRIME_MX1 = 0x165667919e3779f9n;
const PRIME_MX2 = 0x9fb21c651e98df25n;

const SECRET = Uint8Array.from(
  Buffer.from(
    'b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221' +
      'b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8' +
      'a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb' +
      '170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e',
    'hex',
  ),
);
const SECRET_VIEW = new DataView(SECRET.buffer);

const secret64 = (offset: number): bigint => SECRET_VIEW.getBigUint64(offset, true);
const rotate = (value: bigint, bits: bigint): bigint => ((value << bits) | (value >> (64n - bits))) & MASK64;

function mulFold(a: bigint, b: bigint): bigint {
  const product = a * b;
  return (product & MASK64) ^ (product >> 64n);
}

function swap(value: bigint): bigint {
  const view = new DataView(new ArrayBuffer(8));
  view.setBigUint64(0, value);
  return view.getBigUint64(0, true);
}

function avalanche(hash: bigint): bigint {
  let h = hash & MASK64;
  h ^= h >> 37n;
  h = (h * PRIME_MX1) & MASK64;
  return h ^ (h >> 32n);
}

function avalanche64(hash: bigint): bigint {
  let h = hash ^ (hash >> 33n);
  h = (h * PRIME64_2) & MASK64;
  h ^= h >> 29n;
  h = (h * PRIME64_3) & MASK64;
  return h ^ (h >> 32n);
}

/** XXH3-64 with seed 0. */
export function xxh3(bytes: Uint8Array): bigint {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const { length } = bytes;
  const u64 = (offset: number): bigint => view.getBigUint64(offset, true);
  if (length <= 16) return xxh3Short(view);
  if (length > 240) return xxh3Long(view);
  const mix = (offset: number, key: number): bigint =>
    mulFold(u64(offset) ^ secret64(key), u64(offset + 8) ^ secret64(key + 8));
  let hash = (BigInt(length) * PRIME64_1) & MASK64;
  if (length <= 128) {
    for (let index = Math.floor((length - 1) / 32); index >= 0; index--) {
      hash += mix(index * 16, index * 32) + mix(length - (index + 1) * 16, index * 32 + 16);
    }
    return avalanche(hash);
  }
  for (let index = 0; index < 8; index++) hash += mix(index * 16, index * 16);
  hash = avalanche(hash);
  for (let index = 8; index < Math.floor(length / 16); index++) hash += mix(index * 16, (index - 8) * 16 + 3);
  return avalanche(hash + mix(length - 16, 136 - 17));
}

function xxh3Short(view: DataView): bigint {
  const length = view.byteLength;
  if (length > 8) {
    const low = view.getBigUint64(0, true) ^ secret64(24) ^ secret64(32);
    const high = view.getBigUint64(length - 8, true) ^ secret64(40) ^ secret64(48);
    return avalanche(BigInt(length) + swap(low) + high + mulFold(low, high));
  }
  if (length >= 4) {
    const first = BigInt(view.getUint32(0, true));
    const last = BigInt(view.getUint32(length - 4, true));
    let hash = ((last + (first << 32n)) & MASK64) ^ secret64(8) ^ secret64(16);
    hash ^= rotate(hash, 49n) ^ rotate(hash, 24n);
    hash = (hash * PRIME_MX2) & MASK64;
    hash ^= (hash >> 35n) + BigInt(length);
    hash = (hash * PRIME_MX2) & MASK64;
    return hash ^ (hash >> 28n);
  }
  if (length === 0) return avalanche64(secret64(56) ^ secret64(64));
  const combined =
    (BigInt(view.getUint8(0)) << 16n) |
    (BigInt(view.getUint8(length >> 1)) << 24n) |
    BigInt(view.getUint8(length - 1)) |
    (BigInt(length) << 8n);
  const key = BigInt((SECRET_VIEW.getUint32(0, true) ^ SECRET_VIEW.getUint32(4, true)) >>> 0);
  return avalanche64(combined ^ key);
}

/** The high 32 bits of a product of unsigned 32-bit numbers. */
function mulHigh(a: number, b: number): number {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const cross = aLow * bHigh + (middle & 0xffff);
  return (aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(cross / 65536)) >>> 0;
}

/** The long form on 32-bit halves, as fast as JavaScript without BigInt in its loop goes. */
function xxh3Long(view: DataView): bigint {
  const length = view.byteLength;
  const start = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];
  const low = Uint32Array.from(start, (value) => Number(value & 0xffffffffn));
  const high = Uint32Array.from(start, (value) => Number(value >> 32n));
  const add = (lane: number, addLow: number, addHigh: number): void => {
    const sum = (low[lane] ?? 0) + addLow;
    low[lane] = sum;
    high[lane] = (high[lane] ?? 0) + addHigh + (sum > 0xffffffff ? 1 : 0);
  };
  const accumulate = (offset: number, key: number): void => {
    for (let lane = 0; lane < 8; lane++) {
      const dataLow = view.getUint32(offset + lane * 8, true);
      const dataHigh = view.getUint32(offset + lane * 8 + 4, true);
      const a = (dataLow ^ SECRET_VIEW.getUint32(key + lane * 8, true)) >>> 0;
      const b = (dataHigh ^ SECRET_VIEW.getUint32(key + lane * 8 + 4, true)) >>> 0;
      add(lane ^ 1, dataLow, dataHigh);
      add(lane, Math.imul(a, b) >>> 0, mulHigh(a, b));
    }
  };
  const scramble = (key: number): void => {
    const prime = Number(PRIME32_1);
    for (let lane = 0; lane < 8; lane++) {
      const l = low[lane] ?? 0;
      const h = high[lane] ?? 0;
      const mixed = (l ^ (h >>> 15) ^ SECRET_VIEW.getUint32(key + lane * 8, true)) >>> 0;
      const mixedHigh = (h ^ SECRET_VIEW.getUint32(key + lane * 8 + 4, true)) >>> 0;
      low[lane] = Math.imul(mixed, prime);
      high[lane] = mulHigh(mixed, prime) + Math.imul(mixedHigh, prime);
    }
  };
  const stripes = Math.floor((length - 1) / 64);
  for (let stripe = 0; stripe < stripes; stripe++) {
    accumulate(stripe * 64, (stripe % 16) * 8);
    if (stripe % 16 === 15) scramble(192 - 64);
  }
  accumulate(length - 64, 192 - 64 - 7);
  const lane = (index: number): bigint => (BigInt(high[index] ?? 0) << 32n) | BigInt(low[index] ?? 0);
  let hash = (BigInt(length) * PRIME64_1) & MASK64;
  for (let pair = 0; pair < 4; pair++) {
    hash += mulFold(lane(pair * 2) ^ secret64(11 + pair * 16), lane(pair * 2 + 1) ^ secret64(19 + pair * 16));
  }
  return avalanche(hash);
}

/** XXH3-64 of LE64(hash), LE64(index). */
function leaf(hash: bigint, index: bigint): bigint {
  const view = new DataView(new ArrayBuffer(16));
  view.setBigUint64(0, hash, true);
  view.setBigUint64(8, index, true);
  return xxh3(new Uint8Array(view.buffer));
}

/** What {@link ReferenceKernels.l2Extent} finds. */
export interface ReferenceExtent {
  readonly count: number;
  readonly kind: number;
  readonly hostOffset: number;
  readonly compressedLength: number;
  readonly copied: boolean;
}

export class ReferenceKernels {
  readonly bytes: Uint8Array;
  readonly #view: DataView;

  constructor(bytes: Uint8Array) {
    this.bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  isZero(pointer: number, length: number): boolean {
    for (let at = pointer; at < pointer + length; at++) if (this.bytes[at] !== 0) return false;
    return true;
  }

  xxh3(pointer: number, length: number): bigint {
    return xxh3(this.bytes.subarray(pointer, pointer + length));
  }

  zeroMask(pointer: number, length: number, unit: number, mask: number): number {
    let zero = 0;
    const units = Math.ceil(length / unit);
    for (let index = 0; index < units; index++) {
      const isZero = this.isZero(pointer + index * unit, Math.min(unit, length - index * unit));
      this.#setBit(mask, index, isZero);
      if (isZero) zero++;
    }
    // The rest of the last word is cleared.
    for (let index = units; index % 32 !== 0; index++) this.#setBit(mask, index, false);
    return zero;
  }

  digestUnits(pointer: number, length: number, unit: number, first: number, mask: number): bigint {
    this.zeroMask(pointer, length, unit, mask);
    let sum = 0n;
    for (let index = 0; index * unit < length; index++) {
      const hash = this.xxh3(pointer + index * unit, Math.min(unit, length - index * unit));
      sum += leaf(hash, BigInt(first + index));
    }
    return sum & MASK64;
  }

  zeroLeaves(unit: number, last: number, first: number, count: number): bigint {
    let sum = 0n;
    for (let index = 0; index < count; index++) {
      sum += leaf(xxh3(new Uint8Array(index === count - 1 ? last : unit)), BigInt(first + index));
    }
    return sum & MASK64;
  }

  // ---- Bitmaps ----

  bitmapTest(bitmap: number, index: number): boolean {
    return (((this.bytes[bitmap + (index >> 3)] ?? 0) >> (index & 7)) & 1) === 1;
  }

  #setBit(bitmap: number, index: number, value: boolean): void {
    const at = bitmap + (index >> 3);
    const bit = 1 << (index & 7);
    this.bytes[at] = value ? (this.bytes[at] ?? 0) | bit : (this.bytes[at] ?? 0) & ~bit;
  }

  bitmapSet(bitmap: number, start: number, count: number): void {
    for (let index = start; index < start + count; index++) this.#setBit(bitmap, index, true);
  }

  bitmapClear(bitmap: number, start: number, count: number): void {
    for (let index = start; index < start + count; index++) this.#setBit(bitmap, index, false);
  }

  bitmapTestAndClear(bitmap: number, start: number, count: number): number {
    const set = this.bitmapCount(bitmap, start, count);
    this.bitmapClear(bitmap, start, count);
    return set;
  }

  #next(bitmap: number, from: number, end: number, value: boolean): number {
    for (let index = from; index < end; index++) if (this.bitmapTest(bitmap, index) === value) return index;
    return -1;
  }

  bitmapNextSet(bitmap: number, from: number, end: number): number {
    return this.#next(bitmap, from, end, true);
  }

  bitmapNextClear(bitmap: number, from: number, end: number): number {
    return this.#next(bitmap, from, end, false);
  }

  bitmapCount(bitmap: number, start: number, count: number): number {
    let set = 0;
    for (let index = start; index < start + count; index++) if (this.bitmapTest(bitmap, index)) set++;
    return set;
  }

  bitmapMerge(target: number, source: number, bits: number): void {
    for (let index = 0; index < bits; index++) {
      if (this.bitmapTest(source, index)) this.#setBit(target, index, true);
    }
  }

  bitmapCoarsen(target: number, source: number, bits: number, shift: number): void {
    for (let index = 0; index < bits; index++) {
      if (this.bitmapTest(source, index)) this.#setBit(target, Math.floor(index / 2 ** shift), true);
    }
  }

  // ---- Cluster states ----

  clusterState(states: number, index: number): number {
    return ((this.bytes[states + (index >> 2)] ?? 0) >> ((index & 3) * 2)) & 3;
  }

  #setState(states: number, index: number, state: number): void {
    const at = states + (index >> 2);
    const shift = (index & 3) * 2;
    this.bytes[at] = ((this.bytes[at] ?? 0) & ~(3 << shift)) | (state << shift);
  }

  clustersFill(states: number, start: number, count: number, state: number): void {
    for (let index = start; index < start + count; index++) this.#setState(states, index, state);
  }

  clustersClaimAt(states: number, index: number, end: number): number {
    let count = 0;
    for (; index + count < end && this.clusterState(states, index + count) === 1; count++) {
      this.#setState(states, index + count, 2);
    }
    return count;
  }

  clustersNext(states: number, from: number, end: number, state: number): number {
    for (let index = from; index < end; index++) if (this.clusterState(states, index) === state) return index;
    return -1;
  }

  clustersNextPending(states: number, from: number, end: number): number {
    for (let index = from; index < end; index++) {
      if ([1, 2].includes(this.clusterState(states, index))) return index;
    }
    return -1;
  }

  clustersClaimNext(
    states: number,
    from: number,
    end: number,
    most: number,
  ): { first: number; count: number } {
    const first = this.clustersNext(states, from, end, 1);
    if (first < 0) return { first, count: 0 };
    return { first, count: this.clustersClaimAt(states, first, Math.min(end, first + most)) };
  }

  clustersCount(states: number, start: number, count: number, state: number): number {
    let found = 0;
    for (let index = start; index < start + count; index++) {
      if (this.clusterState(states, index) === state) found++;
    }
    return found;
  }

  // ---- Copying and comparing ----

  compactUnits(pointer: number, length: number, unit: number, skip: number): number {
    let target = pointer;
    for (let index = 0; index * unit < length; index++) {
      if (this.bitmapTest(skip, index)) continue;
      const from = pointer + index * unit;
      const end = Math.min(from + unit, pointer + length);
      for (let at = from; at < end; at++) this.bytes[target++] = this.bytes[at] ?? 0;
    }
    return target - pointer;
  }

  firstDifference(a: number, b: number, length: number): number {
    for (let at = 0; at < length; at++) if (this.bytes[a + at] !== this.bytes[b + at]) return at;
    return -1;
  }

  // ---- qcow2 ----

  l2Extent(
    slice: number,
    index: number,
    count: number,
    clusterBits: number,
    features: number,
  ): ReferenceExtent {
    if ((features & 2) !== 0) return this.#extendedExtent(slice, index, count, clusterBits, features);
    const hasZeroFlag = (features & 1) !== 0;
    const dataFile = (features & 4) !== 0;
    const entryAt = (at: number): bigint => this.#view.getBigUint64(slice + at * 8);
    const first = entryAt(index);
    const bit = (at: number): boolean => ((first >> BigInt(at)) & 1n) === 1n;
    const copied = bit(63);
    const offset = first & 0x00fffffffffffe00n;
    const of = (kind: number, n: number, host = offset, compressedLength = 0): ReferenceExtent => ({
      count: n,
      kind,
      hostOffset: Number(host),
      compressedLength,
      copied,
    });
    if (bit(62)) {
      if (copied || dataFile) return of(5, 1);
      const x = BigInt(62 - (clusterBits - 8));
      const host = first & ((1n << x) - 1n);
      const sectors = Number((first & ((1n << 62n) - 1n)) >> x) + 1;
      return of(4, 1, host, sectors * 512 - Number(host & 511n));
    }
    const reserved = (first & 0x3f000000000001fen) !== 0n;
    const unaligned = offset % (1n << BigInt(clusterBits)) !== 0n;
    if (reserved || unaligned || (bit(0) && !hasZeroFlag)) return of(5, 1);
    if (!bit(0) && offset === 0n && copied && !dataFile) return of(5, 1);
    const placed = offset !== 0n || copied;
    const kind = bit(0) ? (offset === 0n ? 1 : 2) : placed ? 3 : 0;
    const step = kind >= 2 ? 1n << BigInt(clusterBits) : 0n;
    let n = 1;
    while (n < count && entryAt(index + n) === ((first + BigInt(n) * step) & MASK64)) n++;
    return of(kind, n);
  }

  /** One subcluster at a time, by the words of the specification. */
  #extendedExtent(slice: number, index: number, count: number, clusterBits: number, features: number) {
    const first = this.#subcluster(slice, index, clusterBits, features);
    let n = 1;
    for (; n < count && first.kind !== 5; n++) {
      const next = this.#subcluster(slice, index + n, clusterBits, features);
      const clusters = Math.floor((index + n) / 32) - Math.floor(index / 32);
      const step = first.kind === 2 || first.kind === 3 || first.kind === 6 ? clusters * 2 ** clusterBits : 0;
      if (next.kind !== first.kind || next.copied !== first.copied) break;
      if (first.kind === 4 ? clusters > 0 : next.hostOffset !== first.hostOffset + step) break;
    }
    return { ...first, count: n };
  }

  #subcluster(slice: number, index: number, clusterBits: number, features: number): ReferenceExtent {
    const at = slice + Math.floor(index / 32) * 16;
    const entry = this.#view.getBigUint64(at);
    const copied = entry >> 63n === 1n;
    const zero = ((this.#view.getUint32(at + 8) >>> (index % 32)) & 1) === 1;
    const allocated = ((this.#view.getUint32(at + 12) >>> (index % 32)) & 1) === 1;
    const hostOffset = Number(entry & 0x00fffffffffffe00n);
    const of = (kind: number) => ({ count: 1, kind, hostOffset, compressedLength: 0, copied });
    if (((entry >> 62n) & 1n) === 1n) {
      // Compressed clusters are the same as in standard entries.
      return this.l2Extent(at, 0, 1, clusterBits, features & ~2);
    }
    const dataFile = (features & 4) !== 0;
    if ((entry & 0x3f000000000001ffn) !== 0n || hostOffset % 2 ** clusterBits !== 0) return of(5);
    if (hostOffset === 0 && copied && !dataFile) return of(5);
    const placed = hostOffset !== 0 || copied;
    if ((zero && allocated) || (allocated && !placed)) return of(5);
    return of(allocated ? 3 : zero ? (placed ? 2 : 1) : placed ? 6 : 0);
  }

  #refcount(block: number, index: number, order: number): bigint {
    let value = 0n;
    const bits = 2 ** order;
    if (bits < 8) {
      const byte = this.bytes[block + Math.floor((index * bits) / 8)] ?? 0;
      return BigInt((byte >> ((index * bits) % 8)) & (2 ** bits - 1));
    }
    for (let at = 0; at < bits / 8; at++) {
      value = (value << 8n) | BigInt(this.bytes[block + (index * bits) / 8 + at] ?? 0);
    }
    return value;
  }

  refcountFindFree(block: number, from: number, entries: number, order: number): number {
    for (let index = from; index < entries; index++)
      if (this.#refcount(block, index, order) === 0n) return index;
    return -1;
  }

  refcountFreeRun(block: number, from: number, entries: number, order: number, most: number): number {
    let run = 0;
    while (run < most && from + run < entries && this.#refcount(block, from + run, order) === 0n) run++;
    return run;
  }
}
