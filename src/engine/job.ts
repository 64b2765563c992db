import { EventEmitter } from 'node:events';
import { MessageChannel } from 'node:worker_threads';
import { type BegunBackup, BITMAP_MODES, type JobMessage, type JobOutcome } from '../backup/backup-job.js';
import { SYNC_MODES, type SyncMode } from '../backup/target.js';
import type { TransactionAction } from '../backup/transaction.js';
import type { DiskDescriptor } from '../block/disk.js';
import {
  type FrameCounters,
  type FrameDescriptor,
  freeFrame,
  readFrameCounters,
} from '../block/filters/copy-before-write.js';
import { interruptNode } from '../block/graph.js';
import type { NodeDescriptor } from '../block/node.js';
import { StillframeError } from '../errors.js';
import { checkJobId, JOB_CONTROL_BYTES, JobControl } from '../job/control.js';
import { checkVerb, type JobStatus, type JobVerb } from '../job/status.js';
import type { Arena } from '../kernels/arena.js';
import type { BackupOptions } from './disk.js';
import type { Engine } from './engine.js';

/** Counts of clusters and bytes of a backup. */
export interface BackupCounts {
  readonly clusters: {
    /** Clusters of the drive. */
    readonly total: number;
    /** Clusters the sync mode copies; known in full once the job has scanned the drive. */
    readonly planned: number;
    /** Clusters whose data was copied. */
    readonly copied: number;
    /** Clusters that are zero and took no data. */
    readonly zero: number;
    /** Those of the above that a guest's write copied (copy-before-write). */
    readonly cbw: number;
  };
  readonly bytes: {
    /** Data read from the source. */
    readonly read: number;
    /** Data written to the target. */
    readonly written: number;
  };
}

/** A job at one moment. */
export interface BackupProgress extends BackupCounts {
  readonly status: JobStatus;
  /** Bytes done, in whole clusters (QMP `offset`). */
  readonly offset: number;
  /** Bytes in all, in whole clusters (QMP `len`). */
  readonly length: number;
  readonly elapsedMs: number;
}

/** What a backup did. */
export interface BackupResult extends BackupCounts {
  /** `cancelled` only in sync mode `none`, whose normal end it is. */
  readonly outcome: Exclude<JobOutcome, 'failed'>;
  readonly sync: SyncMode;
  readonly target: string;
  /** Bytes. */
  readonly virtualSize: number;
  /** Granularity of copying in bytes. */
  readonly clusterSize: number;
  readonly durationMs: number;
  /**
   * `root` is the sum modulo 2^64, as 16 hexadecimal digits, of one leaf per cluster of the plan: the XXH3-64 of
   * (XXH3-64 of the cluster's bytes, its index), both as little-endian 64-bit words.
   */
  readonly checksum: { readonly algorithm: 'xxh3-64'; readonly root: string };
}

export interface BackupEvents {
  /** The job has a new status (QMP `JOB_STATUS_CHANGE`). */
  status: [status: JobStatus];
  /** An I/O error of the background copy, and what the error policy did (QMP `BLOCK_JOB_ERROR`). */
  'io-error': [
    error: {
      readonly operation: 'read' | 'write';
      readonly action: 'report' | 'ignore' | 'stop';
      /** It was a lack of space. */
      readonly noSpace: boolean;
    },
  ];
  /** The job waits for {@link BackupHandle.finalize} (QMP `BLOCK_JOB_PENDING`). */
  pending: [];
}

const PROGRESS_MS = 100;
/** QMP takes seconds in 32 bits. */
const MAX_TIMEOUT_MS = 1000 * (2 ** 32 - 1);

/** A backup job, as the host program sees it: verbs, events, progress and the result. */
export class BackupHandle extends EventEmitter<BackupEvents> {
  readonly id: string;
  readonly sync: SyncMode;
  /** Where the image is while the job runs; a new one is renamed to `target` at the commit point. */
  readonly path: string;
  readonly target: string;
  /** Settles when the job is over and its threads are free, whatever became of it. */
  readonly ended: Promise<void>;
  readonly #arena: Arena;
  readonly #source: NodeDescriptor;
  readonly #frame: FrameDescriptor;
  readonly #borrowed: boolean;
  readonly #group: Group | undefined;
  readonly #autoFinalize: boolean;
  readonly #started = performance.now();
  #control: JobControl | undefined;
  #status: JobStatus = 'created';
  #final:
    | { outcome: JobOutcome; counters: FrameCounters; error: StillframeError | undefined; durationMs: number }
    | undefined;
  #cancelReason: unknown;

  /** @internal */
  constructor(
    arena: Arena,
    source: NodeDescriptor,
    options: { id: string; target: string; autoFinalize: boolean; autoDismiss: boolean },
    begun: BegunBackup,
    control: JobControl,
    group: Group | undefined,
    threads: Promise<unknown>,
    ended: Promise<Extract<JobMessage, { type: 'ended' }>>,
  ) {
    super();
    this.id = options.id;
    this.target = options.target;
    this.sync = begun.sync;
    this.path = begun.target.partialPath ?? begun.target.finalPath;
    this.#arena = arena;
    this.#source = source;
    this.#frame = begun.frame;
    this.#borrowed = begun.target.borrowed === true;
    this.#control = control;
    this.#group = group;
    this.#autoFinalize = options.autoFinalize;
    this.ended = this.#whenEnded(threads, ended, options.autoDismiss);
    this.ended.catch(() => undefined);
  }

  get status(): JobStatus {
    return this.#status;
  }

  /** @throws StillframeError ERR_STILLFRAME_JOB_VERB when the job is paused already or its status does not allow it */
  pause(): void {
    const control = this.#verb('pause');
    if (control.paused) throw verbError('Job is already paused');
    control.paused = true;
  }

  /** @throws StillframeError ERR_STILLFRAME_JOB_VERB when the job was not paused */
  resume(): void {
    if (this.#control?.paused !== true) throw verbError("Can't resume a job that was not paused");
    this.#verb('resume').paused = false;
  }

  /** @param bytesPerSecond limit of the background copy; 0 is none */
  setSpeed(bytesPerSecond: number): void {
    checkSpeed(bytesPerSecond);
    this.#verb('set-speed').speed = bytesPerSecond;
  }

  /**
   * Ends the job. In sync mode `none` this is the normal end and the target is kept; in the others what was
   * written of a new target is removed and {@link result} rejects with `reason`.
   */
  cancel(reason?: unknown): void {
    const control = this.#verb('cancel');
    this.#cancelReason ??= reason;
    control.cancel();
    // In sync mode `none` the target is still to be committed.
    if (this.sync === 'none') return;
    interruptNode(this.#arena, this.#source, control.pointer);
    interruptNode(this.#arena, this.#frame.target, this.#borrowed ? control.pointer : undefined);
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
  get group(): readonly BackupHandle[] {
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
  snapshot(): BackupProgress {
    const counters = this.#final?.counters ?? readFrameCounters(this.#arena, this.#frame);
    const { clusterSize } = this.#frame;
    const counts = this.#counts(counters);
    const none = this.sync === 'none';
    const done = counts.clusters.copied + counts.clusters.zero;
    return {
      status: this.#status,
      offset: done * clusterSize,
      length: (none ? this.#frame.clusters : counts.clusters.planned) * clusterSize,
      elapsedMs: this.#final?.durationMs ?? performance.now() - this.#started,
      ...counts,
    };
  }

  /** Yields the job's progress every `intervalMs` until it is over, the last state included. */
  async *progress(intervalMs: number = PROGRESS_MS): AsyncGenerator<BackupProgress, void, undefined> {
    let over = false;
    const end = this.ended.then(
      () => true,
      () => true,
    );
    while (!over) {
      yield this.snapshot();
      let timer: NodeJS.Timeout | undefined;
      const tick = new Promise<boolean>((resolve) => {
        timer = setTimeout(resolve, intervalMs, false);
      });
      over = await Promise.race([end, tick]);
      clearTimeout(timer);
    }
    yield this.snapshot();
  }

  /**
   * The result, once the job is over.
   *
   * @throws StillframeError the error that failed the job; ERR_STILLFRAME_JOB_CANCELLED when it was cancelled
   *   (or the reason given to {@link cancel}, or the reason of the aborted signal)
   */
  async result(): Promise<BackupResult> {
    await this.ended;
    const final = this.#final;
    if (final === undefined) throw new Error('job invariant: ended without a result');
    if (final.error !== undefined) throw final.error;
    const { outcome } = final;
    if (outcome === 'failed' || (outcome === 'cancelled' && this.sync !== 'none')) {
      throw this.#cancelReason ?? cancelledError(this.id);
    }
    return {
      outcome,
      sync: this.sync,
      target: this.target,
      virtualSize: this.#frame.length,
      clusterSize: this.#frame.clusterSize,
      ...this.#counts(final.counters),
      durationMs: Math.round(final.durationMs),
      checksum: { algorithm: 'xxh3-64', root: final.counters.checksum.toString(16).padStart(16, '0') },
    };
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
  deliver(message: Exclude<JobMessage, { type: 'ended' }>): void {
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
      case 'pending':
        if (!this.#autoFinalize) this.emit('pending');
        break;
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

  #counts(counters: FrameCounters): BackupCounts {
    const { clusters } = this.#frame;
    const none = this.sync === 'none';
    return {
      clusters: {
        total: clusters,
        planned: none ? 0 : clusters - counters.skipped,
        copied: counters.copied,
        zero: counters.zero,
        cbw: counters.cbw,
      },
      bytes: { read: counters.bytesRead, written: counters.bytesWritten },
    };
  }

  async #whenEnded(
    threads: Promise<unknown>,
    ended: Promise<Extract<JobMessage, { type: 'ended' }>>,
    autoDismiss: boolean,
  ): Promise<void> {
    const message = await ended;
    await threads;
    this.#final = {
      outcome: message.outcome,
      counters: message.counters,
      error: message.error && StillframeError.fromPlain(message.error),
      durationMs: performance.now() - this.#started,
    };
    const control = this.#control;
    this.#control = undefined;
    freeFrame({ arena: this.#arena }, this.#frame);
    if (control !== undefined) this.#arena.free(control.pointer);
    if (autoDismiss) this.#setStatus('null');
  }
}

function verbError(message: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_JOB_VERB', message);
}

function cancelledError(id: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_JOB_CANCELLED', `job '${id}' was cancelled`);
}

function checkSpeed(bytesPerSecond: number): void {
  if (!Number.isFinite(bytesPerSecond) || bytesPerSecond < 0) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `Parameter 'speed' expects a non-negative value, not ${bytesPerSecond}`,
    );
  }
}

function checkOptions(options: BackupOptions): void {
  checkSpeed(options.speed ?? 0);
  const invalid = (message: string): never => {
    throw new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
  };
  if (!SYNC_MODES.includes(options.sync)) {
    invalid(`Parameter 'sync' does not accept value '${options.sync}'; it takes ${SYNC_MODES.join(', ')}`);
  }
  const { bitmapMode } = options;
  if (bitmapMode !== undefined && !BITMAP_MODES.includes(bitmapMode)) {
    invalid(
      `Parameter 'bitmap-mode' does not accept value '${bitmapMode}'; it takes ${BITMAP_MODES.join(', ')}`,
    );
  }
  const { compress = false } = options;
  if (![true, false, 'zlib', 'zstd'].includes(compress)) {
    invalid(`compress must be true, false, 'zlib' or 'zstd', not '${compress}'`);
  }
  if (options.sync === 'none' && (options.fleece ?? false) !== false) {
    invalid(
      `sync mode 'none' copies nothing ahead, so nothing would empty the scratch of 'fleece'; use freeze`,
    );
  }
  const { cbwTimeoutMs = 0 } = options;
  if (!Number.isSafeInteger(cbwTimeoutMs) || cbwTimeoutMs < 0 || cbwTimeoutMs > MAX_TIMEOUT_MS) {
    invalid(`cbwTimeoutMs must be a whole number from 0 to ${MAX_TIMEOUT_MS}, not ${cbwTimeoutMs}`);
  }
  const workers = options.workers ?? 1;
  if (!Number.isInteger(workers) || workers < 1 || workers > 32) {
    invalid(`workers must be a whole number from 1 to 32, not ${workers}`);
  }
  const bits = Math.log2(options.targetClusterSize ?? 65536);
  if (!Number.isInteger(bits) || bits < 9 || bits > 21) {
    invalid(
      `the cluster size must be a power of two from 512 bytes to 2 MiB, not ${options.targetClusterSize}`,
    );
  }
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

/** A job whose instant is still to be taken. */
interface Prepared {
  readonly id: string;
  readonly control: JobControl;
  readonly action: Extract<TransactionAction, { type: 'backup' }>;
}

function prepare(
  engine: Engine,
  disk: DiskDescriptor,
  options: BackupOptions,
  group: Group | undefined,
): Prepared {
  checkOptions(options);
  const number = engine.nextId();
  const id = options.jobId ?? `backup${number}`;
  checkJobId(id);
  const { arena } = engine;
  const control = new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job control block'));
  control.transition('created');
  control.speed = options.speed ?? 0;
  const action = {
    type: 'backup',
    disk,
    control: control.pointer,
    id: number,
    options: {
      target: options.target,
      targetNode: options.targetNode,
      sync: options.sync,
      bitmap: options.bitmap,
      bitmapMode: options.bitmapMode,
      format: options.format,
      existing: options.existing,
      force: options.force,
      backing: options.backing,
      targetClusterSize: options.targetClusterSize,
      compress: options.compress,
      fleece: options.fleece,
      onSourceError: options.onSourceError ?? 'report',
      onTargetError: options.onTargetError ?? 'report',
      onCbwError: options.onCbwError ?? 'break-guest-write',
      cbwTimeoutMs: options.cbwTimeoutMs,
      // One that waits for its command keeps the others of its group waiting as well.
      autoFinalize: group === undefined ? (options.autoFinalize ?? true) : group.autoFinalize,
      grouped: group !== undefined,
    },
  } as const;
  return { id, control, action };
}

/** A backup of a disk, as an action of a transaction. */
export interface BackupItem {
  readonly type: 'backup';
  readonly disk: DiskDescriptor;
  readonly options: BackupOptions;
}

/**
 * @internal Carries all out at one instant and starts the backups among them.
 *
 * @returns their jobs, in order
 */
export async function startBackups(
  engine: Engine,
  items: readonly (BackupItem | Exclude<TransactionAction, { type: 'backup' }>)[],
  grouped = false,
): Promise<BackupHandle[]> {
  const wanted = items.flatMap((item) => (item.type === 'backup' ? item.options : []));
  const group = grouped ? new Group(wanted.every(({ autoFinalize = true }) => autoFinalize)) : undefined;
  const prepared: Prepared[] = [];
  let begun: readonly (BegunBackup | undefined)[];
  try {
    const actions = items.map((item): TransactionAction => {
      if (item.type !== 'backup') return item;
      const one = prepare(engine, item.disk, item.options, group);
      prepared.push(one);
      return one.action;
    });
    begun = await engine.run<(BegunBackup | undefined)[]>({ kind: 'transact', actions });
  } catch (error) {
    for (const { control } of prepared) engine.arena.free(control.pointer);
    throw error;
  }
  const started = begun.filter((one) => one !== undefined);
  return prepared.flatMap((one, index) => {
    const [options, backup] = [wanted[index], started[index]];
    return options === undefined || backup === undefined ? [] : launch(engine, one, options, backup, group);
  });
}

/** Starts the threads of a backup that has begun. */
function launch(
  engine: Engine,
  { id, control, action }: Prepared,
  options: BackupOptions,
  begun: BegunBackup,
  group: Group | undefined,
): BackupHandle {
  const { arena } = engine;
  const { disk } = action;
  const { port1, port2 } = new MessageChannel();
  /** Undefined once the caller has had a chance to listen. */
  let early: JobMessage[] | undefined = [];
  const ended = deferred<Extract<JobMessage, { type: 'ended' }>>();
  ended.promise.catch(() => undefined);
  const lead = engine.run<void>({ kind: 'backup', disk, control: control.pointer, port: port2, begun }, [
    port2,
  ]);
  lead.catch(ended.reject);
  // In sync mode `none` there is nothing to help with.
  const helpers = begun.sync === 'none' ? 0 : (options.workers ?? engine.workers) - 1;
  const threads = [lead];
  for (let index = 0; index < helpers; index++) {
    threads.push(engine.run({ kind: 'copy', disk, frame: begun.frame, control: control.pointer }));
  }
  const job = new BackupHandle(
    arena,
    disk.node,
    {
      id,
      target: options.target,
      autoFinalize: options.autoFinalize ?? true,
      autoDismiss: options.autoDismiss ?? true,
    },
    begun,
    control,
    group,
    Promise.all(threads),
    ended.promise,
  );
  group?.add(job);
  const deliver = (message: JobMessage): void => {
    if (message.type === 'ended') ended.resolve(message);
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
  const { signal } = options;
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

/** Jobs that succeed or fail together (QAPI `ActionCompletionMode` `grouped`). */
class Group {
  readonly autoFinalize: boolean;
  readonly all: BackupHandle[] = [];
  readonly #jobs = new Set<BackupHandle>();
  readonly #waiting = new Set<BackupHandle>();

  constructor(autoFinalize: boolean) {
    this.autoFinalize = autoFinalize;
  }

  add(job: BackupHandle): void {
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

  #cancelOthers(failed: BackupHandle): void {
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
