/** Bits 9 to 55 of an L1 or L2 entry: the offset of what it refers to. */
export const OFFSET_MASK = 0x00fffffffffffe00n;
/** What it refers to has the refcount 1. */
export const COPIED = 1n << 63n;
export const COMPRESSED = 1n << 62n;
