import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Random } from '../data.js';
import { type Shape, subclusterSize } from './shape.js';

/** A change of an image. Offsets and lengths are bytes. */
export type Operation =
  | {
      readonly kind: 'write' | 'compressed';
      readonly offset: number;
      readonly length: number;
      /** Which of the {@link Patterns}; -1 is zeroes. */
      readonly pattern: number;
    }
  | { readonly kind: 'zeroes'; readonly offset: number; readonly length: number; readonly unmap: boolean }
  | { readonly kind: 'discard'; readonly offset: number; readonly length: number }
  | { readonly kind: 'flush' };

/** Contents to write, the same for both sides: each is a file whose bytes are repeated as often as needed. */
export class Patterns {
  static readonly COUNT = 10;
  readonly #folder: string;
  readonly #contents: readonly Buffer[];

  constructor(folder: string) {
    this.#folder = folder;
    const random = new Random(1);
    this.#contents = Array.from({ length: Patterns.COUNT }, (_, index) => {
      // Of no length that divides a cluster, so that a byte in the wrong place shows.
      const bytes = random.noise(70_001 + index);
      // The odd ones compress well.
      return Buffer.from(index % 2 === 0 ? bytes : bytes.map((byte, at) => (at % 8 < 6 ? index : byte % 7)));
    });
    for (const [index, bytes] of this.#contents.entries()) writeFileSync(this.file(index), bytes);
  }

  file(pattern: number): string {
    return join(this.#folder, `pattern-${pattern}`);
  }

  bytes(pattern: number, length: number): Buffer {
    const bytes = Buffer.alloc(length);
    const content = this.#contents[pattern];
    return content === undefined || length === 0 ? bytes : bytes.fill(content);
  }
}

/** How the command of a compressed write starts, the only one that is not told to be quiet. */
export const COMPRESSED_WRITE = 'write -c';

/** The command of `qemu-io` that does it. */
export function qemuIoCommand(operation: Operation, patterns: Patterns): string {
  switch (operation.kind) {
    case 'write':
    case 'compressed': {
      const { kind, offset, length, pattern } = operation;
      const content = pattern < 0 ? '-P 0' : `-s ${patterns.file(pattern)}`;
      return `${kind === 'compressed' ? COMPRESSED_WRITE : 'write -q'} ${content} ${offset} ${length}`;
    }
    case 'zeroes':
      return `write -q -z ${operation.unmap ? '-u ' : ''}${operation.offset} ${operation.length}`;
    case 'discard':
      return `discard -q ${operation.offset} ${operation.length}`;
    case 'flush':
      return 'flush';
  }
}

/** Random changes of an image of `length` bytes, of whole clusters, whole subclusters, sectors and single bytes. */
export function randomOperations(random: Random, shape: Shape, length: number, count: number): Operation[] {
  return Array.from({ length: count }, () => randomOperation(random, shape, length));
}

export function randomOperation(random: Random, shape: Shape, length: number): Operation {
  const { clusterSize } = shape;
  const unit = random.pick([clusterSize, clusterSize, subclusterSize(shape), 512, 1]);
  const most = random.chance(0.1) ? 20 * clusterSize : 3 * clusterSize;
  const start = Math.min(random.between(0, length - 1), length - 1);
  const offset = start - (start % unit);
  const wanted = Math.ceil(random.between(1, most) / unit) * unit;
  const range = { offset, length: Math.min(wanted, length - offset, Math.max(clusterSize, 3 << 20)) };
  const kind = random.next();
  if (kind < 0.03) return { kind: 'flush' };
  if (kind < 0.2) return { kind: 'zeroes', ...range, unmap: random.chance(0.5) };
  if (kind < 0.35) return { kind: 'discard', ...range };
  const pattern = random.chance(0.08) ? -1 : random.between(0, Patterns.COUNT - 1);
  if (kind < 0.5 && shape.compression !== 'none') {
    // One whole cluster; the last one of the image may be shorter.
    const first = offset - (offset % clusterSize);
    return {
      kind: 'compressed',
      offset: first,
      length: Math.min(clusterSize, length - first),
      pattern,
    };
  }
  return { kind: 'write', ...range, pattern };
}
