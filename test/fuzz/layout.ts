/** A number in a file that a mutation can change. */
export interface Field {
  /** Which kind of thing it is part of; each kind is chosen as often as any other. */
  readonly kind: string;
  /** Bytes from the start of the file. */
  readonly at: number;
  readonly width: 1 | 2 | 4 | 8;
}

/** Bytes in a file that a mutation can change one by one. */
export interface Region {
  readonly kind: string;
  readonly at: number;
  readonly length: number;
}

/** What the fuzzer knows of an image. */
export interface Layout {
  readonly fields: readonly Field[];
  readonly regions: readonly Region[];
  /** Offsets in the file at which something begins. */
  readonly places: readonly number[];
  /** Bytes things are aligned to, a power of two. */
  readonly unit: number;
  /** Whether numbers are little-endian. */
  readonly little: boolean;
}
