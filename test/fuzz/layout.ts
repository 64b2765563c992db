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
  /** Bytes that references count in. */
  readonly scale: number;
  /** Bits of a reference that are no part of the place. */
  readonly flags: bigint;
}

/** Gathers the layout of an image; what is not in the file is left out. */
export class Collector {
  readonly fields: Field[] = [];
  readonly regions: Region[] = [];
  readonly places = new Set<number>([0]);
  readonly #length: number;

  constructor(bytes: Buffer) {
    this.#length = bytes.length;
  }

  field(kind: string, at: number, width: Field['width']): void {
    if (at + width <= this.#length) this.fields.push({ kind, at, width });
  }

  region(kind: string, at: number, length: number): void {
    const end = Math.min(at + length, this.#length);
    if (end > at) this.regions.push({ kind, at, length: end - at });
    this.places.add(at);
  }
}
