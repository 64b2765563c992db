import type { MessagePort } from 'node:worker_threads';
import type { Disk } from '../block/disk.js';
import { findAbove, layersOf } from '../block/layered-status.js';
import { STATUS_ZERO } from '../block/node.js';
import { type PlainError, StillframeError } from '../errors.js';
import type { JobControl } from '../job/control.js';
import type { Runtime } from '../kernels/runtime.js';
import { ChainJob, type ChainJobOptions, type ChainStep, copying, STEP_BYTES } from './chain-job.js';

export interface CommitJobOptions extends ChainJobOptions {
  /** Bytes that the images on the top show: what the base has there beyond the top's end, they must not show. */
  readonly shown: number;
  /** Why the base could not be made as long as the top. */
  readonly failure?: PlainError | undefined;
}

/**
 * Writes what an image in the middle of a chain, and those between it and the base, have into the base. Nobody else writes
 * to any of them. The layers that are counted begin with the image. Semantics: QMP `block-commit`.
 */
export class CommitJob extends ChainJob {
  readonly #top: Disk;
  readonly #base: Disk;
  readonly #shown: number;
  readonly #failure: PlainError | undefined;

  private constructor(
    runtime: Runtime,
    top: Disk,
    base: Disk,
    control: JobControl,
    port: MessagePort,
    options: CommitJobOptions,
  ) {
    super(runtime, control, port, options);
    this.#top = top;
    this.#base = base;
    this.#shown = options.shown;
    this.#failure = options.failure;
  }

  /** From its first status to its last, on the calling thread. It does not throw. */
  static run(
    runtime: Runtime,
    top: Disk,
    base: Disk,
    control: JobControl,
    port: MessagePort,
    options: CommitJobOptions,
  ): void {
    new CommitJob(runtime, top, base, control, port, options).run();
  }

  protected override get length(): number {
    const { length } = this.#base.descriptor;
    return Math.max(this.#top.descriptor.length, Math.min(this.#shown, length));
  }

  protected override work(): 'completed' | 'cancelled' {
    if (this.#failure === undefined) return super.work();
    this.control.progress = { done: 0, total: this.length };
    throw StillframeError.fromPlain(this.#failure);
  }

  protected override step(offset: number): ChainStep {
    const { from, length } = copying('read', () =>
      this.#top.use((node) => findAbove(layersOf(node, this.layers), offset, this.length - offset)),
    );
    if (from === undefined) return { length, copied: false };
    const bytes = Math.min(length, STEP_BYTES);
    if (from === 'zero') copying('write', () => this.#writeZeroes(offset, bytes));
    else {
      copying('read', () => this.#top.read(offset, this.buffer, bytes));
      copying('write', () => this.#base.write(offset, this.buffer, bytes));
    }
    return { length: bytes, copied: true };
  }

  #writeZeroes(offset: number, length: number): void {
    for (let at = offset; at < offset + length; ) {
      const extent = this.#base.status(at, offset + length - at);
      if ((extent.flags & STATUS_ZERO) === 0) this.#base.writeZeroes(at, extent.length, false);
      at += extent.length;
    }
  }

  /** It is tried again until it goes well. */
  protected override ignored(): number {
    return 0;
  }

  protected override finished(): void {
    // What failed was not left out.
  }

  protected override prepare(): void {
    this.#base.flush();
  }
}
