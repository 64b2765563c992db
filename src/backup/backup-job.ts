import type { MessagePort } from 'node:worker_threads';
import type { Disk } from '../block/disk.js';
import {
  brokenFrameError,
  CopyError,
  Frame,
  type FrameCounters,
  type FrameDescriptor,
  freeFrame,
  type OnCbwError,
} from '../block/filters/copy-before-write.js';
import { attachNode } from '../block/graph.js';
import { type PlainError, StillframeError, toStillframeError } from '../errors.js';
import type { JobControl, JobError } from '../job/control.js';
import type { JobStatus } from '../job/status.js';
import type { Runtime } from '../kernels/runtime.js';
import { allocateFrame, closeScratch, type FrameMemory, type HolderOptions, makeHolder } from './freeze.js';
import {
  abandonTarget,
  commitTarget,
  copyClusterSize,
  effectiveSync,
  isCompressed,
  openTarget,
  type SyncMode,
  type Target,
  type TargetOptions,
} from './target.js';

/** What to do about an I/O error of the background copy. QAPI `BlockdevOnError`. */
export type OnError = 'report' | 'ignore' | 'enospc' | 'stop' | 'auto';

/** Arguments of a backup job, as plain data. */
export interface BackupJobOptions extends TargetOptions {
  readonly onSourceError: OnError;
  readonly onTargetError: OnError;
  readonly onCbwError: OnCbwError;
  readonly cbwTimeoutMs?: number | undefined;
  /** Guests save old data to a scratch file, in the folder of this name or that of the image. */
  readonly fleece?: boolean | string | undefined;
  readonly autoFinalize: boolean;
}

/** How a job ended. `cancelled` is the normal end of sync mode `none`. */
export type JobOutcome = 'completed' | 'cancelled' | 'failed';

/** What the job's thread tells the host thread, in order. */
export type JobMessage =
  | {
      readonly type: 'started';
      readonly frame: FrameDescriptor;
      readonly sync: SyncMode;
      readonly path: string;
    }
  | { readonly type: 'status'; readonly status: JobStatus }
  | {
      readonly type: 'error';
      readonly operation: 'read' | 'write';
      readonly action: 'report' | 'ignore' | 'stop';
    }
  | { readonly type: 'pending' }
  | {
      readonly type: 'ended';
      readonly outcome: JobOutcome;
      readonly counters: FrameCounters;
      readonly error: PlainError | undefined;
    };

/** How long an ignored error keeps the copy from trying again, in milliseconds. */
const RETRY_MS = 100;

/**
 * A backup job, from its first status to its last, on the calling thread; other threads may help with
 * {@link helpCopying}. Semantics: QMP `drive-backup` and `blockdev-backup`.
 *
 * Everything that can be refused is refused before `started` is posted: this throws then and nothing is left
 * behind. Afterwards it does not throw.
 */
export class BackupJob {
  readonly #runtime: Runtime;
  readonly #disk: Disk;
  readonly #control: JobControl;
  readonly #port: MessagePort;
  readonly #options: BackupJobOptions;
  readonly #sync: SyncMode;
  readonly #target: Target;
  readonly #frame: Frame;

  private constructor(
    runtime: Runtime,
    disk: Disk,
    control: JobControl,
    port: MessagePort,
    options: BackupJobOptions,
    id: number,
  ) {
    this.#runtime = runtime;
    this.#disk = disk;
    this.#control = control;
    this.#port = port;
    this.#options = options;
    this.#sync = effectiveSync(options.sync, disk.descriptor.node);
    this.#target = openTarget(runtime, disk.descriptor.node, options);
    try {
      this.#frame = this.#begin(id);
    } catch (error) {
      abandonTarget(runtime, this.#target);
      throw error;
    }
  }

  /** @param id number of the frame, never used before in this engine */
  static run(
    runtime: Runtime,
    disk: Disk,
    control: JobControl,
    port: MessagePort,
    options: BackupJobOptions,
    id: number,
  ): void {
    new BackupJob(runtime, disk, control, port, options, id).#run();
  }

  /** Takes the instant. */
  #begin(id: number): Frame {
    const runtime = this.#runtime;
    const disk = this.#disk;
    const { compress, onCbwError, cbwTimeoutMs } = this.#options;
    const clusterSize = copyClusterSize(attachNode(runtime, this.#target.descriptor));
    const memory = allocateFrame(runtime, disk, clusterSize);
    let holder: FrameDescriptor | undefined;
    try {
      const common = {
        id,
        clusterSize,
        skipUnallocated: this.#sync === 'top',
        onCbwError,
        cbwTimeoutMs,
        owner: this.#control.wakeWord,
      };
      holder = this.#makeHolder(common);
      const descriptor: FrameDescriptor = {
        ...common,
        ...memory,
        target: this.#target.descriptor,
        length: disk.descriptor.length,
        targetReadsZero: this.#target.readsZero,
        compress: isCompressed(compress),
        holder,
      };
      const frame = disk.attachFrame(descriptor);
      if (holder !== undefined) Frame.arm(runtime, descriptor);
      disk.addFrame(holder ?? descriptor);
      return frame;
    } catch (error) {
      if (holder !== undefined) closeScratch(runtime, holder);
      freeFrame(runtime, { ...memory, holder });
      throw error;
    }
  }

  /** The frame that guests know, where that is not the one whose target is the backup's. */
  #makeHolder(common: Omit<HolderOptions, keyof FrameMemory | 'scratch'>): FrameDescriptor | undefined {
    const { fleece = false } = this.#options;
    if (fleece === false) return undefined;
    const memory = allocateFrame(this.#runtime, this.#disk, common.clusterSize);
    const scratch = fleece === true ? undefined : fleece;
    try {
      return makeHolder(this.#runtime, this.#disk, { ...common, ...memory, scratch });
    } catch (error) {
      freeFrame(this.#runtime, memory);
      throw error;
    }
  }

  #run(): void {
    const path = this.#target.partialPath ?? this.#target.finalPath;
    this.#post({ type: 'started', frame: this.#frame.descriptor, sync: this.#sync, path });
    let failure: StillframeError | undefined;
    let outcome: JobOutcome;
    try {
      this.#transition('running');
      outcome = this.#copy();
      if (outcome === 'completed') outcome = this.#finalize();
    } catch (error) {
      failure = toStillframeError(error);
      outcome = 'failed';
      if (failure.code === 'ERR_STILLFRAME_JOB_CANCELLED' && this.#control.cancelled) {
        failure = undefined;
        outcome = 'cancelled';
      }
    }
    failure = this.#end(outcome, failure);
    this.#transition('concluded');
    this.#post({
      type: 'ended',
      outcome: failure === undefined ? outcome : 'failed',
      counters: this.#frame.counters,
      error: failure?.toPlain(),
    });
  }

  /** The background copy with its error policy. Returns once everything planned is in the target. */
  #copy(): 'completed' | 'cancelled' {
    const control = this.#control;
    if (this.#sync === 'none') {
      for (;;) {
        control.waitUntil(() => control.cancelled || control.paused || this.#frame.broken);
        if (control.cancelled) return 'cancelled';
        if (this.#frame.broken) throw brokenFrameError('the backup has failed');
        this.#pause();
      }
    }
    let scanned: number | undefined = this.#sync === 'top' ? 0 : undefined;
    for (;;) {
      if (control.cancelled) return 'cancelled';
      if (this.#frame.broken) throw brokenFrameError('the backup has failed');
      if (control.paused) {
        this.#pause();
        continue;
      }
      if (scanned !== undefined) scanned = this.#scan(scanned);
      else if (this.#frame.remaining > 0) this.#pass();
      else return 'completed';
      const error = control.takeError();
      if (error !== undefined) this.#applyPolicy(error);
    }
  }

  #scan(from: number): number | undefined {
    let next: number | undefined = from;
    try {
      while (next !== undefined && !this.#control.cancelled && !this.#control.paused) {
        next = this.#frame.scanNext(next);
      }
    } catch (error) {
      this.#control.fail(jobError(error));
    }
    return next;
  }

  /** One pass of all threads over the plan; returns when none of them is copying. */
  #pass(): void {
    const control = this.#control;
    const pass = control.pass + 1;
    control.pass = pass;
    control.participate(pass, () => copyUntilInterrupted(this.#frame, control));
    if (!control.interrupted) {
      // Nothing is left to claim; guests and other threads may still hold clusters, and a failed one comes back.
      this.#frame.waitForOthers(RETRY_MS);
    }
    control.pass = pass + 1;
    control.waitUntil(() => control.activeThreads === 0);
  }

  #applyPolicy(error: JobError): void {
    const { onSourceError, onTargetError } = this.#options;
    const policy = error.operation === 'read' ? onSourceError : onTargetError;
    const noSpace = error.error.code === 'ERR_STILLFRAME_NO_SPACE';
    const action = policy === 'enospc' || policy === 'auto' ? (noSpace ? 'stop' : 'report') : policy;
    this.#post({ type: 'error', operation: error.operation, action });
    if (action === 'report') throw StillframeError.fromPlain(error.error);
    if (action === 'stop') this.#control.paused = true;
    else this.#sleep(RETRY_MS);
  }

  #pause(): void {
    const control = this.#control;
    this.#transition('paused');
    control.waitUntil(() => control.cancelled || !control.paused || this.#frame.broken);
    this.#transition('running');
  }

  #sleep(timeoutMs: number): void {
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, timeoutMs);
  }

  /** From the last copied cluster to the commit point, copy-before-write still active. */
  #finalize(): JobOutcome {
    const control = this.#control;
    // Most of the data becomes durable here, so that the commit point is short.
    this.#frame.target.flush();
    this.#transition('waiting');
    this.#transition('pending');
    if (!this.#options.autoFinalize) {
      this.#post({ type: 'pending' });
      control.waitUntil(() => control.finalizeRequested || control.cancelled);
    }
    return control.cancelled ? 'cancelled' : 'completed';
  }

  /** Takes the frame off the disk and commits or removes the target. Returns the error of the job, if any. */
  #end(outcome: JobOutcome, failure: StillframeError | undefined): StillframeError | undefined {
    const keep = outcome === 'completed' || (outcome === 'cancelled' && this.#sync === 'none');
    if (outcome !== 'completed') this.#transition('aborting');
    this.#control.pass = -1;
    this.#control.waitUntil(() => this.#control.activeThreads === 0);
    const { id, holder } = this.#frame.descriptor;
    this.#disk.removeFrame(id);
    // No guest is in the frame any more: from here on nothing can break it.
    if (failure === undefined && this.#frame.broken) failure = brokenFrameError('the backup has failed');
    if (holder !== undefined) closeScratch(this.#runtime, holder);
    if (keep && failure === undefined) {
      try {
        commitTarget(this.#runtime, this.#target);
      } catch (error) {
        failure = toStillframeError(error);
      }
    } else {
      abandonTarget(this.#runtime, this.#target);
    }
    if (failure !== undefined && outcome === 'completed') this.#transition('aborting');
    return failure;
  }

  #transition(status: JobStatus): void {
    this.#control.transition(status);
    this.#post({ type: 'status', status });
  }

  #post(message: JobMessage): void {
    this.#port.postMessage(message);
  }
}

function jobError(error: unknown): JobError {
  const operation = error instanceof CopyError ? error.operation : 'read';
  const cause = error instanceof CopyError ? error.cause : error;
  return { operation, error: toStillframeError(cause).toPlain() };
}

function copyUntilInterrupted(frame: Frame, control: JobControl): void {
  let from = 0;
  try {
    while (!control.interrupted && !frame.broken) {
      control.throttle();
      if (control.interrupted) return;
      const run = frame.copyNext(from);
      if (run === undefined) return;
      control.account(run.bytes);
      from = run.end;
    }
  } catch (error) {
    control.fail(jobError(error));
  }
}

/** Copies along with a job's own thread until the job ends. */
export function helpCopying(disk: Disk, descriptor: FrameDescriptor, control: JobControl): void {
  const frame = disk.attachFrame(descriptor);
  let done = 0;
  for (;;) {
    control.waitUntil(() => control.pass < 0 || (control.pass % 2 === 1 && control.pass !== done));
    const pass = control.pass;
    if (pass < 0) return;
    if (pass % 2 !== 1) continue;
    done = pass;
    control.participate(pass, () => copyUntilInterrupted(frame, control));
  }
}
