import type { Runtime } from '../../kernels/runtime.js';
import type { Disk } from '../disk.js';
import { type BlockNode, type CopyOnReadDescriptor, STATUS_ALLOCATED } from '../node.js';
import { chainStatus } from '../status.js';
import { LiveNode } from './live.js';

/** Bytes that are copied at once, at most; a multiple of every cluster size up to it. */
const PIECE_BYTES = 2 * 1024 * 1024;

/**
 * What is read from the backing chain is written to the image on top (QEMU: `copy-on-read`). Nothing that a guest sees
 * changes by that: it is neither recorded as a change, nor does it pass copy-before-write.
 */
export class CopyOnReadNode extends LiveNode {
  readonly #runtime: Runtime;
  readonly #below: Disk;
  readonly #depth: number;

  constructor(runtime: Runtime, { path, readOnly, length, disk, depth }: CopyOnReadDescriptor, below: Disk) {
    super(runtime, { driver: 'live', path, readOnly, length, disk }, below);
    this.#runtime = runtime;
    this.#below = below;
    this.#depth = depth ?? Number.POSITIVE_INFINITY;
  }

  override read(offset: number, pointer: number, length: number): void {
    const end = offset + length;
    // An image that is only read stays as it is.
    for (let at = this.readOnly ? end : offset; at < end; ) {
      const { flags, length: bytes } = this.status(at, end - at);
      if (!(flags & STATUS_ALLOCATED)) this.#copy(at, bytes);
      at += bytes;
    }
    super.read(offset, pointer, length);
  }

  /** Copies the clusters that a range touches. */
  #copy(offset: number, length: number): void {
    const unit = this.clusterSize ?? 1;
    const start = Math.floor(offset / unit) * unit;
    const end = Math.min(this.length, Math.ceil((offset + length) / unit) * unit);
    for (let at = start; at < end; at += PIECE_BYTES) {
      const bytes = Math.min(PIECE_BYTES, end - at);
      this.#below.undisturbed(at, bytes, (node) => this.#copyUp(node, at, bytes));
    }
  }

  /** Nobody changes the range meanwhile. */
  #copyUp(node: BlockNode, offset: number, length: number): void {
    const { arena, kernels } = this.#runtime;
    const target = node.unrecorded ?? node;
    const buffer = arena.alloc(length, 'data that is copied on reading');
    try {
      for (let at = 0; at < length; ) {
        const { depth, node: layer, length: bytes } = chainStatus(node, offset + at, length - at);
        const wanted = layer === undefined ? this.#depth === Number.POSITIVE_INFINITY : depth <= this.#depth;
        if (depth > 0 && wanted) {
          node.read(offset + at, buffer, bytes);
          node.event?.('cor_write');
          if (kernels.isZero(buffer, bytes)) target.writeZeroes(offset + at, bytes, false);
          else target.write(offset + at, buffer, bytes);
        } else if (depth === 0 && layer === undefined && wanted) {
          target.writeZeroes(offset + at, bytes, false);
        }
        at += bytes;
      }
    } finally {
      arena.free(buffer);
    }
  }
}
