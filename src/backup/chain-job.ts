import type { MessagePort } from 'node:worker_threads';
import { CopyError } from '../block/filters/copy-before-write.js';
import { type StillframeError, toStillframeError } from '../errors.js';
import type { JobControl } from '../job/control.js';
import { type CommonJobOptions, Job, type JobOutcome, jobError, RETRY_MS } from '../job/job.js';
import type { Runtime } from '../kernels/runtime.js';

/** Arguments of a job that moves data within a backing chain, as plain data. */
export interface ChainJobOptions extends Omit<CommonJobOptions, 'onSourceError' | 'onTargetError'> {
  readonly onError: CommonJobOptions['onSourceError'];
  /** How many layers of the chain are above what is to stay below; see the jobs for which one is the first. */
  readonly layers: number;
}

/** Most bytes that are copied in one step. */
export const STEP_BYTES = 512 * 1024;

/** What was made of a part of the image. */
export interface ChainStep {
  /** Bytes from the offset on that need nothing more. */
  readonly length: number;
  /** It was copied, and counts against the limit of speed. */
  readonly copied: boolean;
}

/** A job that goes through an image from its start to its end, and at the end has the host change the chain. */
export abstract class ChainJob extends Job {
  protected readonly runtime: Runtime;
  protected readonly layers: number;
  /** A buffer of {@link STEP_BYTES}. */
  protected buffer = 0;
  #offset = 0;

  protected constructor(
    runtime: Runtime,
    control: JobControl,
    port: MessagePort,
    { onError, layers, ...common }: ChainJobOptions,
  ) {
    super(control, port, { ...common, onSourceError: onError, onTargetError: onError });
    this.runtime = runtime;
    this.layers = layers;
  }

  /** Bytes to go through. */
  protected abstract get length(): number;

  /** Looks at what is at `offset`, and copies it where that is to be done. @throws CopyError */
  protected abstract step(offset: number): ChainStep;

  /** An error is ignored. @returns bytes that are left out; 0 tries again */
  protected abstract ignored(error: StillframeError): number;

  /** Everything was looked at. @throws StillframeError what fails the job after all */
  protected abstract finished(): void;

  protected override work(): 'completed' | 'cancelled' {
    const { control } = this;
    const { arena } = this.runtime;
    const { length } = this;
    control.progress = { done: 0, total: length };
    this.buffer = arena.alloc(STEP_BYTES, 'buffer of a job');
    try {
      while (this.#offset < length) {
        if (control.cancelled) return 'cancelled';
        if (control.paused) {
          this.pause();
          continue;
        }
        this.pass(
          () => this.#goOn(length),
          () => undefined,
        );
        const error = this.actOnError();
        if (error === undefined) continue;
        const leftOut = this.ignored(error);
        if (leftOut === 0) control.waitUntil(() => control.cancelled || control.paused, RETRY_MS);
        this.#advance(length, leftOut);
      }
    } finally {
      arena.free(this.buffer);
    }
    this.finished();
    return 'completed';
  }

  #goOn(length: number): void {
    const { control } = this;
    try {
      while (this.#offset < length) {
        const startMs = control.throttle();
        if (control.interrupted) return;
        let copied = 0;
        try {
          const step = this.step(this.#offset);
          this.#advance(length, step.length);
          if (step.copied) copied = step.length;
        } finally {
          if (startMs !== undefined) control.account(startMs, copied);
        }
      }
    } catch (error) {
      control.fail(
        error instanceof CopyError ? jobError(error.operation, error.cause) : jobError('read', error),
      );
    }
  }

  #advance(length: number, bytes: number): void {
    this.#offset += bytes;
    this.control.progress = { done: this.#offset, total: length };
  }

  protected override end(
    outcome: JobOutcome,
    failure: StillframeError | undefined,
  ): StillframeError | undefined {
    if (outcome !== 'completed') return failure;
    try {
      this.askHost();
      return undefined;
    } catch (error) {
      return toStillframeError(error);
    }
  }
}

/** Runs `body`; what it throws is an error of reading or of writing. */
export function copying<T>(operation: CopyError['operation'], body: () => T): T {
  try {
    return body();
  } catch (error) {
    throw error instanceof CopyError ? error : new CopyError(operation, error);
  }
}
