import type { Arena } from '../../kernels/arena.js';

/**
 * Entries of refcount blocks: 2^order bits wide, big-endian, those below a byte packed from the least
 * significant bit on.
 *
 *     order 0:  byte n = | e7 e6 e5 e4 e3 e2 e1 e0 |   (bit 0 is entry 8n)
 *     order 4:  | e0 high, e0 low | e1 high, e1 low | …
 */
export function loadRefcount(arena: Arena, block: number, index: number, order: number): number {
  const { view, u8 } = arena;
  switch (order) {
    case 4:
      return view.getUint16(block + index * 2);
    case 3:
      return u8[block + index] ?? 0;
    case 5:
      return view.getUint32(block + index * 4);
    case 6:
      // Beyond 2^53 the low bits are lost; nothing but "more than one" is made of such a number.
      return Number(view.getBigUint64(block + index * 8));
    default: {
      const width = 1 << order;
      const perByte = 8 >> order;
      const byte = u8[block + Math.floor(index / perByte)] ?? 0;
      return (byte >> ((index % perByte) * width)) & ((1 << width) - 1);
    }
  }
}

/** Stores `value`, which must fit the width. */
export function storeRefcount(
  arena: Arena,
  block: number,
  index: number,
  order: number,
  value: number,
): void {
  const { view, u8 } = arena;
  switch (order) {
    case 4:
      view.setUint16(block + index * 2, value);
      return;
    case 3:
      u8[block + index] = value;
      return;
    case 5:
      view.setUint32(block + index * 4, value);
      return;
    case 6:
      view.setBigUint64(block + index * 8, BigInt(value));
      return;
    default: {
      const width = 1 << order;
      const perByte = 8 >> order;
      const at = block + Math.floor(index / perByte);
      const shift = (index % perByte) * width;
      const mask = ((1 << width) - 1) << shift;
      u8[at] = ((u8[at] ?? 0) & ~mask) | (value << shift);
    }
  }
}

/**
 * Adds one; exact for all widths. Returns false, with nothing done, where the entry is 0 (the cluster is free) or as
 * large as it can be.
 */
export function incrementRefcount(arena: Arena, block: number, index: number, order: number): boolean {
  if (order === 6) {
    const value = arena.view.getBigUint64(block + index * 8);
    if (value === 0n || value === 2n ** 64n - 1n) return false;
    arena.view.setBigUint64(block + index * 8, value + 1n);
    return true;
  }
  const value = loadRefcount(arena, block, index, order);
  if (value === 0 || value === 2 ** (2 ** order) - 1) return false;
  storeRefcount(arena, block, index, order, value + 1);
  return true;
}

/** Takes one off; exact for all widths. The refcount must not be 0. Returns whether it became 0. */
export function decrementRefcount(arena: Arena, block: number, index: number, order: number): boolean {
  if (order === 6) {
    const value = arena.view.getBigUint64(block + index * 8) - 1n;
    arena.view.setBigUint64(block + index * 8, value);
    return value === 0n;
  }
  const value = loadRefcount(arena, block, index, order) - 1;
  storeRefcount(arena, block, index, order, value);
  return value === 0;
}

/** Sets `count` entries from `index` on to 1: entries that were 0. */
export function fillRefcounts(
  arena: Arena,
  block: number,
  index: number,
  count: number,
  order: number,
): void {
  if (order === 4) {
    // 0x0001 big-endian is 0x0100 as the little-endian machine sees it.
    const first = (block >> 1) + index;
    arena.u16.fill(0x0100, first, first + count);
    return;
  }
  for (let entry = index; entry < index + count; entry++) storeRefcount(arena, block, entry, order, 1);
}
