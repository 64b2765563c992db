import { DirtyBitmap } from '../../bitmap/dirty-bitmap.js';
import { Disk } from '../../block/disk.js';
import type { CopyBuffer } from '../../block/filters/copy-before-write.js';
import { SnapshotAccess } from '../../block/filters/snapshot-access.js';
import { STATUS_DATA, STATUS_ZERO } from '../../block/node.js';
import { type ChainExtent, chainStatus } from '../../block/status.js';
import type { Runtime } from '../../kernels/runtime.js';
import { DIRTY, STATE } from '../protocol/numbers.js';
import type { ContextKind, ExportDescriptor } from './exports.js';

/** What clients read and write. */
export type Drive = Pick<
  Disk,
  'read' | 'write' | 'writeZeroes' | 'writeZeroesFast' | 'discard' | 'flush' | 'hostRange' | 'status' | 'use'
>;

/** A drive at an instant. */
class FrozenDrive implements Drive {
  readonly #node: SnapshotAccess;

  constructor(node: SnapshotAccess) {
    this.#node = node;
  }

  use<T>(body: (node: SnapshotAccess) => T): T {
    return body(this.#node);
  }

  status(offset: number, length: number): ChainExtent {
    return chainStatus(this.#node, offset, length);
  }

  read(offset: number, pointer: number, length: number): void {
    this.#node.read(offset, pointer, length);
  }

  /** What is in the file may be of a later time by when it is sent. */
  hostRange(): undefined {
    return undefined;
  }

  write(): void {
    this.#node.write();
  }

  writeZeroes(): void {
    this.#node.writeZeroes();
  }

  writeZeroesFast(): boolean {
    this.#node.writeZeroes();
    return false;
  }

  discard(): void {
    this.#node.writeZeroes();
  }

  flush(): void {
    this.#node.flush();
  }
}

/** This thread's view of what is exported. @param buffer gives the thread's copy buffer */
export function attachDrive(
  runtime: Runtime,
  { disk: descriptor, frozen }: ExportDescriptor,
  buffer: () => CopyBuffer,
): Drive {
  const disk = new Disk(runtime, descriptor, buffer);
  if (frozen === undefined) return disk;
  return new FrozenDrive(new SnapshotAccess(runtime, disk, disk.attachFrame(frozen.frame)));
}

/** An extent as a metadata context tells it. */
export interface ContextExtent {
  /** Bytes. */
  readonly length: number;
  readonly flags: number;
}

/** The extent of a metadata context that starts at `offset`; at least 1 and at most `length` bytes. */
export function contextExtent(
  runtime: Runtime,
  drive: Drive,
  context: ContextKind,
  offset: number,
  length: number,
): ContextExtent {
  switch (context.kind) {
    case 'allocation': {
      const extent = drive.status(offset, length);
      const hole = (extent.flags & STATUS_DATA) === 0 ? STATE.hole : 0;
      const zero = (extent.flags & STATUS_ZERO) === 0 ? 0 : STATE.zero;
      return { length: extent.length, flags: hole | zero };
    }
    case 'depth': {
      const extent = drive.status(offset, length);
      return { length: extent.length, flags: extent.node === undefined ? 0 : extent.depth + 1 };
    }
    case 'bitmap': {
      const bitmap = new DirtyBitmap(runtime, context.pointer);
      const next = bitmap.nextDirty(offset, offset + length);
      if (next === undefined) return { length, flags: 0 };
      return next.offset > offset
        ? { length: next.offset - offset, flags: 0 }
        : { length: next.length, flags: DIRTY };
    }
  }
}
