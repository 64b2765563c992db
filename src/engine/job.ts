import { EventEmitter } from 'node:events';
import { MessageChannel, type MessagePort } from 'node:worker_threads';
import { StillframeError, toStillframeError } from '../errors.js';
import { JOB_CONTROL_BYTES, JobControl } from '../job/control.js';
import type { JobEnd, JobMessage, JobOutcome } from '../job/job.js';
import { checkVerb, type JobStatus, type JobVerb } from '../job/status.js';
import type { Arena } from '../kernels/arena.js';
import type { Engine } from './engine.js';
import type { Task } from './tasks.js';

/** What a job does (QAPI `JobType`). */
export type JobType = 'backup' | 'mirror' | 'commit' | 'stream' | 'create';

/** A job at one moment. */
export interface JobProgress {
  readonly status: JobStatus;
  /** Bytes done (QMP `offset`). */
  readonly offset: number;
  /** Bytes in all (QMP `len`). */
  readonly length: number;
  readonly elapsedMs: number;
}

export interface JobEvents {
  /** The job has a new status (QMP `JOB_STATUS_CHANGE`). */
  status: [status: JobStatus];
  /** An I/O error of the job's own work, and what the error policy did (QMP `BLOCK_JOB_ERROR`). */
  'io-error': [
    error: {
      readonly operation: 'read' | 'write';
      readonly action: 'report' | 'ignore' | 'stop';
      /** It was a lack of space. */
      readonly noSpace: boolean;
    },
  ];
  /** It goes on until {@link JobHandle.complete} or {@link JobHandle.cancel} (QMP `BLOCK_JOB_READY`). */
  ready: [progress: { readonly offset: number; readonly length: number }];
  /** The job waits for {@link JobHandle.finalize} (QMP `BLOCK_JOB_PENDING`). */
  pending: [];
}

/** What every job is told. */
export interface HandleOptions {
  readonly id: string;
  readonly type: JobType;
  readonly autoFinalize: boolean;
  readonly autoDismiss: boolean;
  /** It can be told to complete once it is ready. Default false. */
  readonly completable?: boolean | undefined;
}

const PROGRESS_MS = 100;

/** A job, as the host program sees it: verbs, events, progress and what became of it. */
export abstract class JobHandle extends EventEmitter<JobEvents> {
  readonly id: string;
  /** @internal */
  readonly type: JobType;
  /** Settles when the job is over and its threads are free, whatever became of it. */
  readonly ended: Promise<void>;
  /**
   * @internal The host's part of the commit point, between `pending` and `concluded`; where it fails so does the job. Only
   * jobs that ask for it have one.
   */
  onCommit: () => void | Promise<void> = () => undefined;
  protected readonly arena: Arena;
  readonly #options: HandleOptions;
  readonly #group: Group | undefined;
  readonly #started = performance.now();
  #durationMs: number | undefined;
  #control: JobControl | undefined;
  #status: JobStatus = 'created';
  #end: JobEnd | undefined;
  #cancelReason: unknown;
  /** Why the host could not do its part of the commit point. */
  #hostError: unknown;

  /** @internal @param threads settles when they are free @param end what the job says when it is over */
  protected constructor(
    arena: Arena,
    options: HandleOptions,
    control: JobControl,
    { threads, end }: RunningJob,
    group?: Group,
  ) {
    super();
    this.id = options.id;
    this.type = options.type;
    this.arena = arena;
    this.#options = options;
    this.#control = control;
    this.#group = group;
    this.ended = this.#whenEnded(threads, end);
    this.ended.catch(() => undefined);
    group?.add(this);
  }

  get status(): JobStatus {
    return this.#status;
  }

  /** Somebody has paused it, or its error policy has. */
  get paused(): boolean {
    return this.#control?.paused === true;
  }

  /** @throws StillframeError ERR_STILLFRAME_JOB_VERB when the job is paused already or its status does not allow it */
  pause(): void {
    const control = this.#verb('pause');
    if (control.paused) throw verbError('Job is already paused');
    control.paused = true;
  }

  /** @throws StillframeError ERR_STILLFRAME_JOB_VERB when the job was not paused */
  resume(): void {
    if (!this.paused) throw verbError("Can't resume a job that was not paused");
    this.#verb('resume').paused = false;
  }

  /** @param bytesPerSecond limit of the job's own work; 0 is none */
  setSpeed(bytesPerSecond: number): void {
    checkSpeed(bytesPerSecond);
    this.#verb('set-speed').speed = bytesPerSecond;
  }

  /**
   * Ends the job. In sync mode `none` this is the normal end of a backup and its target is kept; in other cases what was
   * written of a new target is removed and {@link result} rejects with `reason`.
   */
  cancel(reason?: unknown): void {
    const control = this.#verb('cancel');
    this.#cancelReason ??= reason;
    control.cancel();
    this.interrupt(control);
  }

  /** Ends a job that is ready as it is; any other is cancelled. */
  cancelSoftly(): void {
    const control = this.#verb('cancel');
    if (this.#options.completable !== true || !['ready', 'standby'].includes(this.#status)) this.cancel();
    else control.cancelSoftly();
  }

  /** Completes a job that is ready. @throws StillframeError ERR_STILLFRAME_JOB_VERB where it is not, or has nothing to complete */
  complete(): void {
    const control = this.#verb('complete');
    if (this.#options.completable !== true || control.cancelRequested) {
      throw verbError(`The active block job '${this.id}' cannot be completed`);
    }
    control.complete();
  }

  /** Lets a job with `autoFinalize: false` commit, and those that succeed or fail with it. */
  finalize(): void {
    this.#verb('finalize');
    if (this.#group === undefined) this.finalizeAlone();
    else this.#group.finalize();
  }

  /** @internal */
  finalizeAlone(): void {
    this.#verb('finalize').finalize();
  }

  /** @internal It and those that succeed or fail with it. */
  get group(): readonly JobHandle[] {
    return this.#group?.all ?? [this];
  }

  /** @internal The others of its group have come as far as it. */
  release(): void {
    this.#control?.release();
  }

  /** Forgets a concluded job with `autoDismiss: false`. */
  dismiss(): void {
    checkVerb(this.id, this.#status, 'dismiss');
    this.#setStatus('null');
  }

  /** The job now. */
  abstract snapshot(): JobProgress;

  /** What became of the job, once it is over. @throws StillframeError why it failed, or …_JOB_CANCELLED */
  abstract result(): Promise<{ readonly outcome: Exclude<JobOutcome, 'failed'> }>;

  /** Yields the job's progress every `intervalMs` until it is over, the last state included. */
  async *progress(
    intervalMs: number = PROGRESS_MS,
  ): AsyncGenerator<ReturnType<this['snapshot']>, void, undefined> {
    let over = false;
    const end = this.ended.then(
      () => true,
      () => true,
    );
    while (!over) {
      yield this.snapshot() as ReturnType<this['snapshot']>;
      let timer: NodeJS.Timeout | undefined;
      const tick = new Promise<boolean>((resolve) => {
        timer = setTimeout(resolve, intervalMs, false);
      });
      over = await Promise.race([end, tick]);
      clearTimeout(timer);
    }
    yield this.snapshot() as ReturnType<this['snapshot']>;
  }

  /** @internal Cancels where that is still possible and waits for the end. */
  async stop(): Promise<void> {
    try {
      this.cancel();
    } catch {
      // Over already, or at its commit point: its end is near.
    }
    await this.ended.catch(() => undefined);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.stop();
  }

  /** @internal */
  deliver(message: Exclude<JobMessage, JobEnd>): void {
    switch (message.type) {
      case 'status':
        this.#setStatus(message.status);
        break;
      case 'error':
        this.emit('io-error', {
          operation: message.operation,
          action: message.action,
          noSpace: message.noSpace,
        });
        break;
      case 'ready':
        this.emit('ready', { offset: message.offset, length: message.offset });
        break;
      case 'pending':
        if (!this.#options.autoFinalize) this.emit('pending');
        break;
      case 'commit':
        void this.#commit();
        break;
    }
  }

  /** Ends what the job waits for on a server: it is cancelled. */
  protected abstract interrupt(control: JobControl): void;

  /** The job is over: what is of interest later is to be kept, and its memory given back. */
  protected abstract free(): void;

  protected get elapsedMs(): number {
    return this.#durationMs ?? performance.now() - this.#started;
  }

  /**
   * Waits for the end.
   *
   * @throws StillframeError the error that failed the job; what is given to {@link cancel}, or …_JOB_CANCELLED, when it was
   *   cancelled and that is not the normal end
   */
  protected async outcome(mayBeCancelled: boolean): Promise<Exclude<JobOutcome, 'failed'>> {
    await this.ended;
    if (this.#end === undefined) throw new Error('job invariant: ended without a result');
    const { outcome, error } = this.#end;
    if (error !== undefined) throw this.#hostError ?? StillframeError.fromPlain(error);
    if (outcome === 'failed' || (outcome === 'cancelled' && !mayBeCancelled)) {
      throw this.#cancelReason ?? cancelledError(this.id);
    }
    return outcome;
  }

  async #commit(): Promise<void> {
    try {
      await this.onCommit();
      this.#control?.answer();
    } catch (error) {
      this.#hostError = error;
      this.#control?.answer(toStillframeError(error).toPlain());
    }
  }

  #setStatus(status: JobStatus): void {
    this.#status = status;
    this.emit('status', status);
  }

  #verb(verb: JobVerb): JobControl {
    checkVerb(this.id, this.#status, verb);
    if (this.#control === undefined) throw verbError(`Job '${this.id}' is over`);
    return this.#control;
  }

  async #whenEnded(threads: Promise<unknown>, end: Promise<JobEnd>): Promise<void> {
    const message = await end;
    await threads;
    this.#durationMs = performance.now() - this.#started;
    this.#end = message;
    const control = this.#control;
    this.#control = undefined;
    this.free();
    if (control !== undefined) this.arena.free(control.pointer);
    if (this.#options.autoDismiss) this.#setStatus('null');
  }
}

function verbError(message: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_JOB_VERB', message);
}

function cancelledError(id: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_JOB_CANCELLED', `job '${id}' was cancelled`);
}

/** @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
export function checkSpeed(bytesPerSecond: number): void {
  if (!Number.isFinite(bytesPerSecond) || bytesPerSecond < 0) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `Parameter 'speed' expects a non-negative value, not ${bytesPerSecond}`,
    );
  }
}

/** The control block of a job that is about to be made. @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED */
export function makeControl(arena: Arena, speed: number): JobControl {
  const control = new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job control block'));
  control.transition('created');
  control.speed = speed;
  return control;
}

/** The threads of a job. */
export interface RunningJob {
  /** Settles when they are free. */
  readonly threads: Promise<unknown>;
  readonly end: Promise<JobEnd>;
}

/**
 * Starts the threads of a job.
 *
 * @param lead the task of the job's own thread, which tells of everything through the port
 * @param helpers tasks that end with the job
 * @param make gives the job's handle
 * @param signal cancels it
 */
export function launchJob<Handle extends JobHandle>(
  engine: Engine,
  lead: (port: MessagePort) => Task,
  helpers: readonly Task[],
  make: (running: RunningJob) => Handle,
  signal?: AbortSignal,
): Handle {
  const { port1, port2 } = new MessageChannel();
  /** Undefined once the caller has had a chance to listen. */
  let early: JobMessage[] | undefined = [];
  const end = deferred<JobEnd>();
  end.promise.catch(() => undefined);
  const leading = engine.run<void>(lead(port2), [port2]);
  leading.catch(end.reject);
  const threads = Promise.all([leading, ...helpers.map((task) => engine.run<void>(task))]);
  const job = make({ threads, end: end.promise });
  const deliver = (message: JobMessage): void => {
    if (message.type === 'ended') end.resolve(message);
    else job.deliver(message);
  };
  port1.on('message', (message: JobMessage) => {
    if (early === undefined) deliver(message);
    else early.push(message);
  });
  // Listeners of the caller are not there yet: what has happened already is delivered after they had a chance.
  setImmediate(() => {
    const messages = early ?? [];
    early = undefined;
    for (const message of messages) deliver(message);
  });
  const abort = (): void => {
    try {
      job.cancel(signal?.reason);
    } catch {
      // Over already.
    }
  };
  signal?.addEventListener('abort', abort, { once: true });
  const cleanup = (): void => {
    signal?.removeEventListener('abort', abort);
    port1.close();
  };
  job.ended.then(cleanup, cleanup);
  if (signal?.aborted) abort();
  return job;
}

interface Deferred<T> {
  readonly promise: Promise<T>;
  readonly resolve: (value: T) => void;
  readonly reject: (reason: unknown) => void;
}

function deferred<T>(): Deferred<T> {
  let resolve: Deferred<T>['resolve'] = () => undefined;
  let reject: Deferred<T>['reject'] = () => undefined;
  const promise = new Promise<T>((onResolve, onReject) => {
    resolve = onResolve;
    reject = onReject;
  });
  return { promise, resolve, reject };
}

/** Jobs that succeed or fail together (QAPI `ActionCompletionMode` `grouped`). */
export class Group {
  readonly autoFinalize: boolean;
  readonly all: JobHandle[] = [];
  readonly #jobs = new Set<JobHandle>();
  readonly #waiting = new Set<JobHandle>();

  constructor(autoFinalize: boolean) {
    this.autoFinalize = autoFinalize;
  }

  add(job: JobHandle): void {
    this.#jobs.add(job);
    this.all.push(job);
    job.on('status', (status) => {
      if (status === 'aborting') this.#cancelOthers(job);
      if (status !== 'waiting') return;
      this.#waiting.add(job);
      if (this.#waiting.size === this.#jobs.size) for (const one of this.#jobs) one.release();
    });
  }

  finalize(): void {
    for (const job of this.#jobs) job.finalizeAlone();
  }

  #cancelOthers(failed: JobHandle): void {
    this.#jobs.delete(failed);
    for (const job of this.#jobs) {
      try {
        job.cancel();
      } catch {
        // Over as well.
      }
    }
  }
}
