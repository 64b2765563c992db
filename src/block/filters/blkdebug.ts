import { constants as osConstants } from 'node:os';
import { systemError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlkdebugDescriptor, BlockNode, Extent } from '../node.js';
import type { BlkdebugEvent } from './blkdebug-events.js';
import { BlkdebugState, type IoType } from './blkdebug-state.js';
import { FilterNode } from './filter.js';
import { eachRun } from './units.js';

/** Limits of a node's requests, in bytes; 0 is none (QAPI `BlockdevOptionsBlkdebug`). */
export interface BlkdebugLimits {
  /** What offsets and lengths of requests are multiples of; requests that are not get there by reading around them. */
  readonly align: number;
  readonly maxTransfer: number;
  /** Smallest aligned range of zeroes; smaller ones are written as data. */
  readonly optWriteZero: number;
  readonly maxWriteZero: number;
  /** What ranges that are discarded are cut at. */
  readonly optDiscard: number;
  readonly maxDiscard: number;
}

/** Requests go on as they are. */
export const NO_LIMITS: BlkdebugLimits = {
  align: 0,
  maxTransfer: 0,
  optWriteZero: 0,
  maxWriteZero: 0,
  optDiscard: 0,
  maxDiscard: 0,
};

const ALIGN_MAX = 2 ** 31 - 1;

/** The limits that an aligned option has to keep, and what is wrong with one that does not, in QEMU's words. */
export function wrongLimit(limits: BlkdebugLimits): string | undefined {
  const { align } = limits;
  const wrong = (name: string, value: number): string => `Cannot meet constraints with ${name} ${value}`;
  if (align !== 0 && (align >= ALIGN_MAX || !Number.isInteger(Math.log2(align))))
    return wrong('align', align);
  const unit = Math.max(align, 1);
  const aligned = (value: number, to: number): boolean => value < ALIGN_MAX && value % to === 0;
  if (!aligned(limits.maxTransfer, unit)) return wrong('max-transfer', limits.maxTransfer);
  if (!aligned(limits.optWriteZero, unit)) return wrong('opt-write-zero', limits.optWriteZero);
  if (!aligned(limits.maxWriteZero, Math.max(unit, limits.optWriteZero))) {
    return wrong('max-write-zero', limits.maxWriteZero);
  }
  if (!aligned(limits.optDiscard, unit)) return wrong('opt-discard', limits.optDiscard);
  if (!aligned(limits.maxDiscard, Math.max(unit, limits.optDiscard))) {
    return wrong('max-discard', limits.maxDiscard);
  }
  return undefined;
}

/** Zeroes are written in parts of at most so many bytes. */
const ZERO_BYTES = 64 * 1024;

const NAMES = new Map(Object.entries(osConstants.errno).map(([name, number]) => [number, name]));

/** A part of a request as the limits have it. Offsets and lengths are bytes. */
interface Part {
  readonly offset: number;
  readonly length: number;
}

/** Fails and suspends requests as its rules and breakpoints say, and passes the others on within its limits. */
export class BlkdebugNode extends FilterNode {
  declare readonly descriptor: BlkdebugDescriptor;
  readonly #runtime: Runtime;
  readonly #state: BlkdebugState;
  readonly #align: number;

  constructor(runtime: Runtime, descriptor: BlkdebugDescriptor, child: BlockNode) {
    super(descriptor, child);
    this.#runtime = runtime;
    this.#state = new BlkdebugState(runtime.arena, descriptor.state, descriptor.rules);
    this.#align = Math.max(1, descriptor.limits.align);
    // Whoever keeps changes of one cluster apart keeps those of one block apart.
    if (this.#align > 1) this.clusterSize = Math.max(this.#align, child.clusterSize ?? 1);
  }

  /** Takes part in the work of the driver that lies on this node. */
  event(name: BlkdebugEvent): void {
    // A drive that was not written to since has nothing to be flushed.
    if (name === 'flush_to_disk' && !this.#state.takeChangesAbove()) return;
    this.#state.event(name);
  }

  override read(offset: number, pointer: number, length: number): void {
    const end = this.#up(offset + length);
    for (const part of this.#parts(this.#down(offset), end, this.descriptor.limits.maxTransfer)) {
      this.#strike('read', part.offset, part.length);
      const from = Math.max(offset, part.offset);
      const to = Math.min(offset + length, part.offset + part.length);
      this.#readBelow(from, pointer + (from - offset), to - from);
    }
  }

  override write(offset: number, pointer: number, length: number): void {
    if (length === 0) return;
    if (this.#isAligned(offset) && this.#isAligned(length)) this.#writeAligned(offset, pointer, length);
    else
      this.#writeAround(offset, length, (at) =>
        this.#runtime.arena.u8.copyWithin(at, pointer, pointer + length),
      );
  }

  override writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    eachRun(this.#runtime, length, unit, skip, (start, bytes) =>
      this.write(offset + start, pointer + start, bytes),
    );
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    const [start, end] = [this.#up(offset), this.#down(offset + length)];
    const zero = (from: number, to: number): void => {
      if (from >= to) return;
      this.#writeAround(from, to - from, (at) => this.#runtime.arena.u8.fill(0, at, at + (to - from)));
    };
    if (start >= end) {
      if (this.#down(offset) === this.#down(offset + length - 1)) zero(offset, offset + length);
      else {
        zero(offset, start);
        zero(start, offset + length);
      }
      return;
    }
    zero(offset, start);
    this.#changing('pwritev_zero', () => {
      const { optWriteZero, maxWriteZero } = this.descriptor.limits;
      const smallest = Math.max(this.#align, optWriteZero);
      for (const part of alignedParts(start, end, smallest, maxWriteZero)) {
        if (part.length < smallest) this.#writeZeroBytes(part.offset, part.length);
        else {
          this.#strike('write-zeroes', part.offset, part.length);
          super.writeZeroes(part.offset, part.length, mayUnmap);
        }
      }
    });
    zero(end, offset + length);
  }

  override writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    if (!this.#isAligned(offset) || !this.#isAligned(length)) return false;
    const { optWriteZero, maxWriteZero } = this.descriptor.limits;
    const smallest = Math.max(this.#align, optWriteZero);
    let done = true;
    this.#changing('pwritev_zero', () => {
      for (const part of alignedParts(offset, offset + length, smallest, maxWriteZero)) {
        if (part.length >= smallest) this.#strike('write-zeroes', part.offset, part.length);
        done = part.length >= smallest && super.writeZeroesFast(part.offset, part.length, mayUnmap);
        if (!done) return;
      }
    });
    return done;
  }

  override discard(offset: number, length: number): void {
    const { optDiscard, maxDiscard } = this.descriptor.limits;
    const smallest = Math.max(this.#align, optDiscard);
    try {
      for (const part of alignedParts(this.#up(offset), this.#down(offset + length), smallest, maxDiscard)) {
        this.#strike('discard', part.offset, part.length);
        super.discard(part.offset, part.length);
      }
    } finally {
      this.#state.changed();
    }
  }

  override flush(): void {
    const { child } = this;
    child.event?.('flush_to_os');
    const changes = this.#state.unflushed;
    if (changes !== undefined) {
      child.event?.('flush_to_disk');
      this.#strike('flush', 0, 0);
    }
    child.flush();
    if (changes !== undefined) this.#state.flushed(changes);
  }

  override status(offset: number, length: number): Extent {
    this.#strike('block-status', offset, length);
    return super.status(offset, length);
  }

  /** Runs what changes the drive, between the events for it. */
  #changing(event: BlkdebugEvent, body: () => void): void {
    this.#state.event(event);
    try {
      body();
    } finally {
      this.#state.event('pwritev_done');
      this.#state.changed();
    }
  }

  #writeAligned(offset: number, pointer: number, length: number): void {
    this.#changing('pwritev', () => {
      for (const part of this.#parts(offset, offset + length, this.descriptor.limits.maxTransfer)) {
        this.#strike('write', part.offset, part.length);
        super.write(part.offset, pointer + (part.offset - offset), part.length);
      }
    });
  }

  /** Writes bytes that are no whole blocks, with what is around them. @param put puts the new ones where it is told */
  #writeAround(offset: number, length: number, put: (pointer: number) => void): void {
    const { arena } = this.#runtime;
    const [start, end] = [this.#down(offset), this.#up(offset + length)];
    const [head, tail] = [start < offset, offset + length < end];
    const lastBlock = end - this.#align;
    // What is read of one block, or of two in a row, is read at once.
    const together = end - start <= 2 * this.#align;
    const buffer = arena.alloc(end - start, `blocks of '${this.descriptor.path}'`);
    const read = (from: number, bytes: number): void => {
      this.#strike('read', from, bytes);
      this.#readBelow(from, buffer + (from - start), bytes);
    };
    try {
      this.#state.exclusively(() => {
        if (head || together) {
          if (head) this.#state.event('pwritev_rmw_head');
          if (together && tail) this.#state.event('pwritev_rmw_tail');
          read(start, together ? end - start : this.#align);
          if (head) this.#state.event('pwritev_rmw_after_head');
          if (together && tail) this.#state.event('pwritev_rmw_after_tail');
        }
        if (tail && !together) {
          this.#state.event('pwritev_rmw_tail');
          read(lastBlock, this.#align);
          this.#state.event('pwritev_rmw_after_tail');
        }
        put(buffer + (offset - start));
        // The drive may end inside of its last block.
        const inside = Math.max(offset + length, Math.min(end, this.length));
        this.#changing('pwritev', () => {
          for (const part of this.#parts(start, end, this.descriptor.limits.maxTransfer)) {
            this.#strike('write', part.offset, part.length);
            const bytes = Math.min(part.length, inside - part.offset);
            super.write(part.offset, buffer + (part.offset - start), bytes);
          }
        });
      });
    } finally {
      arena.free(buffer);
    }
  }

  #writeZeroBytes(offset: number, length: number): void {
    const { arena } = this.#runtime;
    const { maxTransfer } = this.descriptor.limits;
    const most = Math.max(this.#align, maxTransfer === 0 ? ZERO_BYTES : Math.min(maxTransfer, ZERO_BYTES));
    const buffer = arena.alloc(Math.min(most, length), `zeroes for '${this.descriptor.path}'`);
    try {
      for (const part of this.#parts(offset, offset + length, most)) {
        this.#strike('write', part.offset, part.length);
        super.write(part.offset, buffer, part.length);
      }
    } finally {
      arena.free(buffer);
    }
  }

  /** Behind the end of what is below there are zeroes. */
  #readBelow(offset: number, pointer: number, length: number): void {
    const inside = Math.max(0, Math.min(length, this.length - offset));
    if (inside > 0) super.read(offset, pointer, inside);
    if (inside < length) this.#runtime.arena.u8.fill(0, pointer + inside, pointer + length);
  }

  *#parts(start: number, end: number, most: number): Generator<Part> {
    const step = most === 0 ? Number.MAX_SAFE_INTEGER : most;
    for (let at = start; at < end; at += step) yield { offset: at, length: Math.min(step, end - at) };
  }

  #isAligned(bytes: number): boolean {
    return bytes % this.#align === 0;
  }

  #down(offset: number): number {
    return offset - (offset % this.#align);
  }

  #up(offset: number): number {
    return Math.ceil(offset / this.#align) * this.#align;
  }

  /** @throws StillframeError what a rule says */
  #strike(type: IoType, offset: number, length: number): void {
    const errno = this.#state.strike(type, offset, length);
    if (errno <= 0) return;
    const code = NAMES.get(errno) ?? 'EIO';
    const injected = Object.assign(new Error(`${code}: injected`), { code });
    throw systemError(`cannot ${type} ${length} bytes at ${offset} of '${this.descriptor.path}'`, injected);
  }
}

/** Parts of a range at the borders of units: what comes before the first, whole units, at most `most` bytes, and the rest. */
function* alignedParts(start: number, end: number, unit: number, most: number): Generator<Part> {
  let at = start;
  while (at < end) {
    const head = at % unit;
    let stop = end;
    if (head !== 0) stop = Math.min(end, at + unit - head);
    else if (end - at > unit) stop = end - (end % unit);
    if (most !== 0) stop = Math.min(stop, at + most);
    yield { offset: at, length: stop - at };
    at = stop;
  }
}
