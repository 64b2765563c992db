import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import {
  type BlockNode,
  type Extent,
  type NullDescriptor,
  STATUS_ALLOCATED,
  STATUS_DATA,
  STATUS_ZERO,
} from './node.js';

const SLEEPER = new Int32Array(new SharedArrayBuffer(4));

/** Driver `null-co`: takes everything and keeps nothing. */
export class NullNode implements BlockNode {
  readonly descriptor: NullDescriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly clusterSize = undefined;
  readonly backing = undefined;
  readonly #runtime: Runtime;

  constructor(runtime: Runtime, descriptor: NullDescriptor) {
    this.descriptor = descriptor;
    this.length = descriptor.length;
    this.readOnly = descriptor.readOnly;
    this.#runtime = runtime;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#pass('read', offset, length);
    // What other drives' buffers held is nobody's business, whatever was asked for.
    this.#runtime.arena.u8.fill(0, pointer, pointer + length);
  }

  write(offset: number, _pointer: number, length: number): void {
    this.#pass('write', offset, length);
  }

  writeUnits(offset: number, _pointer: number, length: number): void {
    this.#pass('write', offset, length);
  }

  writeZeroes(offset: number, length: number): void {
    this.#pass('write zeroes', offset, length);
  }

  writeZeroesFast(offset: number, length: number): boolean {
    this.#pass('write zeroes', offset, length);
    return true;
  }

  discard(offset: number, length: number): void {
    this.#pass('discard', offset, length);
  }

  flush(): void {
    this.#pass('flush', 0, 0);
  }

  status(offset: number, length: number): Extent {
    this.#check('look at', offset, length);
    const flags = STATUS_ALLOCATED | STATUS_DATA | (this.descriptor.readsZero ? STATUS_ZERO : 0);
    return { length, flags, hostOffset: -1 };
  }

  #pass(what: string, offset: number, length: number): void {
    this.#check(what, offset, length);
    const { latencyMs } = this.descriptor;
    if (latencyMs > 0) Atomics.wait(SLEEPER, 0, 0, latencyMs);
  }

  #check(what: string, offset: number, length: number): void {
    if (offset >= 0 && length >= 0 && offset + length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' has ${this.length} bytes`,
    );
  }
}
