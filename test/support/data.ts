import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** Deterministic random numbers; whoever reports a failure prints the seed. */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** In [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x9e3779b9) >>> 0;
    let mixed = this.#state;
    mixed = Math.imul(mixed ^ (mixed >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 4294967296;
  }

  /** Whole number in [low, high]. */
  between(low: number, high: number): number {
    return low + Math.floor(this.next() * (high - low + 1));
  }

  chance(probability: number): boolean {
    return this.next() < probability;
  }

  pick<T>(choices: readonly [T, ...T[]]): T {
    return choices[this.between(0, choices.length - 1)] ?? choices[0];
  }

  /** Bytes without any pattern, from a generator fast enough for megabytes. */
  noise(length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    let word = this.between(0, 2 ** 32 - 1) | 1;
    for (let at = 0; at < length; at++) {
      word = (Math.imul(word, 1664525) + 1013904223) | 0;
      bytes[at] = word >>> 24;
    }
    return bytes;
  }

  /** Bytes of which some compress well, some a little and some not at all, in pieces of about `unit` bytes. */
  mixture(length: number, unit: number): Buffer {
    const bytes = Buffer.alloc(length);
    for (let at = 0; at < length; ) {
      const size = Math.min(length - at, this.between(1, unit * 2));
      const noise = this.noise(size);
      const kind = this.between(0, 3);
      if (kind === 0) bytes.set(noise, at);
      else if (kind === 1)
        for (let index = 0; index < size; index++) bytes[at + index] = (noise[index] ?? 0) & 15;
      else if (kind === 2) bytes.fill(noise.subarray(0, Math.min(size, 16)), at, at + size);
      at += size;
    }
    return bytes;
  }

  /** Random bytes with runs of one value, now and then zero, as drives have. */
  bytes(length: number): Uint8Array {
    const data = new Uint8Array(length);
    for (let index = 0; index < length; ) {
      const end = Math.min(length, index + this.between(1, 70_000));
      const kind = this.next();
      if (kind > 0.2) for (let at = index; at < end; at++) data[at] = this.next() * 256;
      else if (kind > 0.1) data.fill(this.between(1, 255), index, end);
      index = end;
    }
    return data;
  }
}

/** Where two buffers differ first, or -1. Cheaper to report than a dump of both. */
export function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (Buffer.compare(a, b) === 0) return -1;
  const end = Math.min(a.length, b.length);
  for (let at = 0; at < end; at++) if (a[at] !== b[at]) return at;
  return end;
}

/** Makes a folder for the body and removes it afterwards, whatever happens. */
export async function withFolder<T>(body: (folder: string) => Promise<T> | T): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-'));
  try {
    return await body(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
