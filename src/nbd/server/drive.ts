import { DirtyBitmap } from '../../bitmap/dirty-bitmap.js';
import type { Disk } from '../../block/disk.js';
import { STATUS_DATA, STATUS_ZERO } from '../../block/node.js';
import { chainStatus } from '../../block/status.js';
import type { Runtime } from '../../kernels/runtime.js';
import { DIRTY, STATE } from '../protocol/numbers.js';
import type { ContextKind } from './exports.js';

/** An extent as a metadata context tells it. */
export interface ContextExtent {
  /** Bytes. */
  readonly length: number;
  readonly flags: number;
}

/** The extent of a metadata context that starts at `offset`; at least 1 and at most `length` bytes. */
export function contextExtent(
  runtime: Runtime,
  disk: Disk,
  context: ContextKind,
  offset: number,
  length: number,
): ContextExtent {
  switch (context.kind) {
    case 'allocation': {
      const extent = chainStatus(disk.node, offset, length);
      const hole = (extent.flags & STATUS_DATA) === 0 ? STATE.hole : 0;
      const zero = (extent.flags & STATUS_ZERO) === 0 ? 0 : STATE.zero;
      return { length: extent.length, flags: hole | zero };
    }
    case 'depth': {
      const extent = chainStatus(disk.node, offset, length);
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
