import { constants as osConstants } from 'node:os';
import { systemError } from '../../errors.js';
import { withLock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlkdebugDescriptor, BlockNode, Extent } from '../node.js';
import { FilterNode } from './filter.js';

export type IoType = 'read' | 'write' | 'write-zeroes' | 'discard' | 'flush' | 'block-status';

/** What happens at an event (QAPI `BlkdebugInjectErrorOptions`, `BlkdebugSetStateOptions`). */
export type BlkdebugRule =
  | {
      readonly kind: 'inject-error';
      readonly event: string;
      /** Only in this state; undefined: in any. */
      readonly state: number | undefined;
      readonly iotype: IoType | undefined;
      /** Number of the error. */
      readonly errno: number;
      /** Only requests that touch the byte; undefined: all. */
      readonly offset: number | undefined;
      readonly once: boolean;
    }
  | {
      readonly kind: 'set-state';
      readonly event: string;
      readonly state: number | undefined;
      readonly newState: number;
    };

// In the arena: a lock int32, the state int32, then for each rule whether it has struck and shall not again, int32.
const STATE = 4;
const SPENT = 8;

export function blkdebugBytes(rules: number): number {
  return SPENT + rules * 4;
}

/** Puts a node of that kind into its first state. */
export function resetBlkdebug(runtime: Pick<Runtime, 'arena'>, state: number): void {
  runtime.arena.i32[(state + STATE) >> 2] = 1;
}

/** The events that a request of each type is; QEMU's drivers tell more of them apart. */
const EVENTS: Readonly<Record<IoType, readonly string[]>> = {
  read: ['read_aio', 'l1_load', 'l2_load', 'refblock_load', 'pread'],
  write: ['write_aio', 'pwritev', 'pwritev_done', 'l1_update', 'l2_update', 'refblock_update'],
  'write-zeroes': ['pwritev_zero', 'write_aio'],
  discard: ['pdiscard'],
  flush: ['flush_to_os', 'flush_to_disk'],
  'block-status': [],
};

const NAMES = new Map(Object.entries(osConstants.errno).map(([name, number]) => [number, name]));

/** Fails requests as its rules say, and passes the others on. */
export class BlkdebugNode extends FilterNode {
  declare readonly descriptor: BlkdebugDescriptor;
  readonly #runtime: Runtime;

  constructor(runtime: Runtime, descriptor: BlkdebugDescriptor, child: BlockNode) {
    super(descriptor, child);
    this.#runtime = runtime;
  }

  override read(offset: number, pointer: number, length: number): void {
    this.#meet('read', offset, length);
    super.read(offset, pointer, length);
  }

  override write(offset: number, pointer: number, length: number): void {
    this.#meet('write', offset, length);
    super.write(offset, pointer, length);
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#meet('write', offset, length);
    super.writeUnits(offset, pointer, length, unit, skip);
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#meet('write-zeroes', offset, length);
    super.writeZeroes(offset, length, mayUnmap);
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    this.#meet('write-zeroes', offset, length);
    return super.writeZeroesFast(offset, length, mayUnmap);
  }

  override discard(offset: number, length: number): void {
    this.#meet('discard', offset, length);
    super.discard(offset, length);
  }

  override flush(): void {
    this.#meet('flush', 0, 0);
    super.flush();
  }

  override status(offset: number, length: number): Extent {
    this.#meet('block-status', offset, length);
    return super.status(offset, length);
  }

  /** @throws StillframeError what a rule says */
  #meet(type: IoType, offset: number, length: number): void {
    const { rules, state, path } = this.descriptor;
    if (rules.length === 0) return;
    const { i32 } = this.#runtime.arena;
    const errno = withLock(this.#runtime.arena, state, () => {
      const current = i32[(state + STATE) >> 2] ?? 0;
      let next = current;
      let failure: number | undefined;
      rules.forEach((rule, index) => {
        if (rule.state !== undefined && rule.state !== 0 && rule.state !== current) return;
        const happens = rule.event === 'none' || EVENTS[type].includes(rule.event);
        if (rule.kind === 'set-state') {
          if (happens) next = rule.newState;
          return;
        }
        const spent = (state + SPENT + index * 4) >> 2;
        const { iotype, offset: at } = rule;
        const applies =
          happens &&
          failure === undefined &&
          i32[spent] === 0 &&
          (iotype === undefined ? type !== 'block-status' : iotype === type) &&
          (at === undefined || (at >= offset && at < offset + length));
        if (!applies) return;
        if (rule.once) i32[spent] = 1;
        failure = rule.errno;
      });
      i32[(state + STATE) >> 2] = next;
      return failure;
    });
    if (errno === undefined || errno === 0) return;
    const code = NAMES.get(errno) ?? 'EIO';
    const injected = Object.assign(new Error(`${code}: injected`), { code });
    throw systemError(`cannot ${type} ${length} bytes at ${offset} of '${path}'`, injected);
  }
}
