import type { MessagePort } from 'node:worker_threads';
import { type PlainError, StillframeError, toStillframeError } from '../errors.js';
import type { JobControl, JobError } from './control.js';
import type { JobStatus } from './status.js';

/** What to do about an I/O error of a job's own work. QAPI `BlockdevOnError`. */
export type OnError = 'report' | 'ignore' | 'enospc' | 'stop' | 'auto';

/** How a job ended. `cancelled` is the normal end of a backup with sync mode `none`. */
export type JobOutcome = 'completed' | 'cancelled' | 'failed';

/** What the job's thread tells the host thread, in order. */
export type JobMessage =
  | { readonly type: 'status'; readonly status: JobStatus }
  | {
      readonly type: 'error';
      readonly operation: 'read' | 'write';
      readonly action: 'report' | 'ignore' | 'stop';
      readonly noSpace: boolean;
    }
  /** It has done what it was started for, `offset` bytes of work, and goes on until it is told to complete. */
  | { readonly type: 'ready'; readonly offset: number }
  | { readonly type: 'pending' }
  /** The host has its part of the commit point to do, and tells the job by {@link JobControl.answer}. */
  | { readonly type: 'commit' }
  | JobEnd;

export interface JobEnd {
  readonly type: 'ended';
  readonly outcome: JobOutcome;
  readonly error: PlainError | undefined;
}

/** What every job is told. */
export interface CommonJobOptions {
  readonly onSourceError: OnError;
  readonly onTargetError: OnError;
  readonly autoFinalize: boolean;
  /** It is one of several that succeed or fail together: it waits for the others before its commit point. */
  readonly grouped?: boolean | undefined;
}

/** How long an ignored error keeps a job from trying again, in milliseconds. */
export const RETRY_MS = 100;

/**
 * A job, from its first status to its last, on the calling thread. Other threads may help with {@link helpJob}. What a
 * type of job does are the abstract methods, in the order in which they are called. Semantics: QAPI `job.json`.
 */
export abstract class Job {
  protected readonly control: JobControl;
  readonly #port: MessagePort;
  readonly #options: CommonJobOptions;

  protected constructor(control: JobControl, port: MessagePort, options: CommonJobOptions) {
    this.control = control;
    this.#port = port;
    this.#options = options;
  }

  /**
   * The work, until everything is done that can be done before the commit point. It looks at the words of its control
   * block between steps, and throws what fails the job.
   */
  protected abstract work(): 'completed' | 'cancelled';

  /** Makes the commit point short: what can be made durable before it. */
  protected abstract prepare(): void;

  /**
   * The commit point where the outcome is `completed`, and the giving up of everything else. Nobody helps any more. It
   * does not throw.
   *
   * @returns the error of the job, if any
   */
  protected abstract end(
    outcome: JobOutcome,
    failure: StillframeError | undefined,
  ): StillframeError | undefined;

  /** It does not throw. */
  protected run(): void {
    let failure: StillframeError | undefined;
    let outcome: JobOutcome;
    try {
      this.transition('running');
      outcome = this.work();
      if (outcome === 'completed') outcome = this.#finalize();
    } catch (error) {
      failure = toStillframeError(error);
      outcome = 'failed';
      if (failure.code === 'ERR_STILLFRAME_JOB_CANCELLED' && this.control.cancelled) {
        failure = undefined;
        outcome = 'cancelled';
      }
    }
    if (outcome !== 'completed') this.transition('aborting');
    this.control.pass = -1;
    this.control.waitUntil(() => this.control.activeThreads === 0);
    failure = this.end(outcome, failure);
    if (failure !== undefined && outcome === 'completed') this.transition('aborting');
    this.transition('concluded');
    this.#post({
      type: 'ended',
      outcome: failure === undefined ? outcome : 'failed',
      error: failure?.toPlain(),
    });
  }

  /** From the end of the work to the commit point. */
  #finalize(): JobOutcome {
    const { control } = this;
    this.prepare();
    this.transition('waiting');
    // The others of its transaction may not be so far.
    if (this.#options.grouped === true) control.waitUntil(() => control.released || control.cancelled);
    if (control.cancelled) return 'cancelled';
    this.transition('pending');
    if (!this.#options.autoFinalize) {
      this.#post({ type: 'pending' });
      control.waitUntil(() => control.finalizeRequested || control.cancelled);
    }
    return control.cancelled ? 'cancelled' : 'completed';
  }

  /** One pass of this thread and all that help over what is to be done; returns when none of them is at work. */
  protected pass(body: () => void, whenIdle: () => void): void {
    const { control } = this;
    const pass = control.pass + 1;
    control.pass = pass;
    control.participate(pass, body);
    if (!control.interrupted) whenIdle();
    control.pass = pass + 1;
    control.waitUntil(() => control.activeThreads === 0);
  }

  /** Does what the error policy says about the error of the last pass, if there is one. @throws StillframeError */
  protected settleError(): void {
    if (this.actOnError() !== undefined) sleep(RETRY_MS);
  }

  /**
   * As {@link settleError}, for a job that goes on at once.
   *
   * @returns an error that is ignored
   * @throws StillframeError
   */
  protected actOnError(): StillframeError | undefined {
    const error = this.control.takeError();
    if (error === undefined) return undefined;
    const { onSourceError, onTargetError } = this.#options;
    const policy = error.operation === 'read' ? onSourceError : onTargetError;
    const noSpace = error.error.code === 'ERR_STILLFRAME_NO_SPACE';
    const action = policy === 'enospc' || policy === 'auto' ? (noSpace ? 'stop' : 'report') : policy;
    this.#post({ type: 'error', operation: error.operation, action, noSpace });
    if (action === 'report') throw StillframeError.fromPlain(error.error);
    if (action === 'ignore') return StillframeError.fromPlain(error.error);
    this.control.paused = true;
    return undefined;
  }

  /** Stands still until it is resumed or cancelled. @param until ends it as well */
  protected pause(until: () => boolean = () => false): void {
    const { control } = this;
    const isReady = control.status === 'ready';
    this.transition(isReady ? 'standby' : 'paused');
    control.waitUntil(() => control.cancelled || !control.paused || until());
    this.transition(isReady ? 'ready' : 'running');
  }

  /** It goes on until it is told to complete. @param offset bytes of work that it has done so far, which is all of it */
  protected becomeReady(offset: number): void {
    this.transition('ready');
    this.#post({ type: 'ready', offset });
  }

  /**
   * Has the host do its part of the commit point, and waits for that.
   *
   * @throws StillframeError what the host failed with
   */
  protected askHost(): void {
    this.#post({ type: 'commit' });
    this.control.waitUntil(() => this.control.answered);
    const error = this.control.takeError();
    if (error !== undefined) throw StillframeError.fromPlain(error.error);
  }

  protected transition(status: JobStatus): void {
    this.control.transition(status);
    this.#post({ type: 'status', status });
  }

  #post(message: JobMessage): void {
    this.#port.postMessage(message);
  }
}

/** Helps with the passes of a job until it ends. @param body of one pass */
export function helpJob(control: JobControl, body: () => void): void {
  let done = 0;
  for (;;) {
    control.waitUntil(() => control.pass < 0 || (control.pass % 2 === 1 && control.pass !== done));
    const pass = control.pass;
    if (pass < 0) return;
    if (pass % 2 !== 1) continue;
    done = pass;
    control.participate(pass, body);
  }
}

/** An error for the error policy. */
export function jobError(operation: JobError['operation'], error: unknown): JobError {
  return { operation, error: toStillframeError(error).toPlain() };
}

function sleep(timeoutMs: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, timeoutMs);
}
