import type { MessagePort } from 'node:worker_threads';
import { BitmapSet } from '../bitmap/bitmap-set.js';
import { DirtyBitmap } from '../bitmap/dirty-bitmap.js';
import type { Disk, DiskDescriptor } from '../block/disk.js';
import { bitmapsOfDisk, claimDiskBitmap, findBitmap, makeSuccessor } from '../block/disk-bitmaps.js';
import {
  brokenFrameError,
  CopyError,
  endCopies,
  Frame,
  type FrameDescriptor,
  freeFrame,
  guestsFrame,
  type OnCbwError,
} from '../block/filters/copy-before-write.js';
import { attachNode } from '../block/graph.js';
import { StillframeError, toStillframeError } from '../errors.js';
import type { JobControl, JobError } from '../job/control.js';
import { type CommonJobOptions, helpJob, Job, type JobOutcome, jobError, RETRY_MS } from '../job/job.js';
import type { Runtime } from '../kernels/runtime.js';
import { allocateFrame, closeScratch, type FrameMemory, type HolderOptions, makeHolder } from './freeze.js';
import type { BitmapMode, SyncMode } from './modes.js';
import {
  abandonTarget,
  commitTarget,
  copyClusterSize,
  effectiveSync,
  isBitmapSync,
  isCompressed,
  openTarget,
  type Target,
  type TargetOptions,
} from './target.js';

/** What only monitors ask for, as QEMU has it. */
export interface BackupExtras {
  /** Least bytes copied at once, a power of two (QMP `x-perf.min-cluster-size`). */
  readonly minClusterSize?: number | undefined;
  /** Most bytes that one step moves (QMP `x-perf.max-chunk`), in whole clusters; default 1 MiB. */
  readonly maxChunk?: number | undefined;
  /** The rate limit counts zeroes that need not be read as well. Default false: only data. */
  readonly paceZeroes?: boolean | undefined;
  /** What was copied is discarded on the source, which is an instant that is held. Default false. */
  readonly discardSource?: boolean | undefined;
  /**
   * It ends as QEMU's job where that is less strict: also completed where old data was lost to a guest's write that was let
   * through, and without a flush of a target that somebody gave it. Default false.
   */
  readonly asQemu?: boolean | undefined;
  /**
   * Why the job is refused, where somebody has found something wrong already: for its nodes, before anything is opened, or
   * for the job itself, after everything else. So the first thing that is wrong is told of in QEMU's order.
   */
  readonly refusals?: { readonly nodes?: string | undefined; readonly job?: string | undefined } | undefined;
}

/** Arguments of a backup job, as plain data. */
export interface BackupJobOptions extends TargetOptions, CommonJobOptions, BackupExtras {
  readonly onCbwError: OnCbwError;
  readonly cbwTimeoutMs?: number | undefined;
  /** Guests save old data to a scratch file, in the folder of this name or that of the image. */
  readonly fleece?: boolean | string | undefined;
  /** Name of the disk's dirty bitmap that says what is copied, or (sync modes `full` and `top`) is made to say it. */
  readonly bitmap?: string | undefined;
  readonly bitmapMode?: BitmapMode | undefined;
}

/** A backup whose instant is taken, as plain data: any thread may carry it out, or give it up. */
export interface BegunBackup {
  readonly options: BackupJobOptions;
  /** What is copied. */
  readonly sync: SyncMode;
  readonly target: Target;
  readonly frame: FrameDescriptor;
  /** Arena pointer of the dirty bitmap that the job relies on. */
  readonly bitmap: number | undefined;
}

/** Smallest cluster of a scratch file: a page, which is what file systems move. */
const SCRATCH_CLUSTER_BYTES = 4096;
/** Clusters that it may be cut into, at two bits each. */
const MAX_SCRATCH_CLUSTERS = 2 ** 24;

/**
 * Takes the instant of a disk and makes everything ready to copy it. Everything that can be refused is refused here, and
 * nothing is left behind then.
 *
 * Semantics: QMP `drive-backup` and `blockdev-backup`.
 *
 * @param id number of the frame, never used before in this engine
 * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_BUSY, …_BITMAP_INCONSISTENT, …_INVALID_ARGUMENT,
 *   …_READ_ONLY (a bitmap of a read-only image), …_ARENA_EXHAUSTED and what {@link openTarget} throws
 */
export function beginBackup(
  runtime: Runtime,
  disk: Disk,
  control: JobControl,
  options: BackupJobOptions,
  id: number,
): BegunBackup {
  const bitmap = findJobBitmap(runtime, disk.descriptor, options);
  refuse(options.refusals?.nodes);
  // A node is given to be written to as it is; whoever names a file wants a whole backup there.
  const sync =
    options.targetNode === undefined ? effectiveSync(options.sync, disk.descriptor.node) : options.sync;
  const successor = bitmap && makeSuccessor(runtime, bitmap);
  try {
    if (bitmap !== undefined && options.bitmapMode !== 'never') {
      claimDiskBitmap(runtime, disk.descriptor, bitmap);
    }
    const target = openTarget(runtime, disk.descriptor.node, options);
    try {
      const frame = beginFrame(runtime, disk, control, options, { sync, target, bitmap, successor, id });
      return { options, sync, target, frame, bitmap: bitmap?.pointer };
    } catch (error) {
      abandonTarget(runtime, target);
      throw error;
    }
  } catch (error) {
    successor?.free();
    throw error;
  }
}

function refuse(why: string | undefined): void {
  if (why !== undefined) throw new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', why);
}

/** Gives up a backup that nobody has begun to carry out. */
export function abandonBackup(runtime: Runtime, disk: Disk, begun: BegunBackup): void {
  const { frame, bitmap, target } = begun;
  endCopies(runtime, guestsFrame(frame));
  disk.removeFrame(frame.id);
  if (bitmap !== undefined) {
    const frozen = new DirtyBitmap(runtime, bitmap);
    BitmapSet.of(runtime, frozen).unfreeze(frozen, 'reclaim');
  }
  if (frame.holder !== undefined) closeScratch(runtime, frame.holder);
  freeFrame(runtime, frame);
  abandonTarget(runtime, target);
}

/** The bitmap that a job wants. Texts of errors: QMP `blockdev-backup`. */
function findJobBitmap(
  runtime: Runtime,
  disk: DiskDescriptor,
  { sync, bitmap: name, bitmapMode }: BackupJobOptions,
): DirtyBitmap | undefined {
  const invalid = (message: string): StillframeError =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
  if (isBitmapSync(sync)) {
    if (name === undefined) throw invalid(`must provide a valid bitmap name for '${sync}' sync mode`);
    if (sync === 'incremental' && bitmapMode !== undefined && bitmapMode !== 'on-success') {
      throw invalid(`Bitmap sync mode must be 'on-success' when using sync mode 'incremental'`);
    }
  }
  if (name === undefined) {
    if (bitmapMode === undefined) return undefined;
    throw invalid('Cannot specify bitmap sync mode without a bitmap');
  }
  if (
    bitmapsOfDisk(runtime, disk)
      .all()
      .every((bitmap) => bitmap.name !== name)
  ) {
    throw new StillframeError('ERR_STILLFRAME_BITMAP_NOT_FOUND', `Bitmap '${name}' could not be found`);
  }
  if (bitmapMode === undefined && sync !== 'incremental') {
    throw invalid('Bitmap sync mode must be given when providing a bitmap');
  }
  const checks = ['busy', 'inconsistent'] as const;
  const found = findBitmap(runtime, disk, name, checks);
  if (sync === 'none') throw invalid("sync mode 'none' does not produce meaningful bitmap outputs");
  if (bitmapMode === 'never' && sync !== 'bitmap') {
    throw invalid(`Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '${sync}'`);
  }
  return bitmapMode === 'never' ? found : findBitmap(runtime, disk, name, ['read-only', ...checks]);
}

/** What {@link beginFrame} has been given already. */
interface Beginning extends Pick<BegunBackup, 'sync' | 'target'> {
  readonly bitmap: DirtyBitmap | undefined;
  readonly successor: DirtyBitmap | undefined;
  readonly id: number;
}

/** Takes the instant. */
function beginFrame(
  runtime: Runtime,
  disk: Disk,
  control: JobControl,
  options: BackupJobOptions,
  { sync, target, bitmap, successor, id }: Beginning,
): FrameDescriptor {
  const clusterSize = Math.max(
    copyClusterSize(attachNode(runtime, target.descriptor)),
    options.minClusterSize ?? 0,
  );
  const { maxChunk = 0 } = options;
  if (maxChunk !== 0 && maxChunk < clusterSize) {
    refuse(`Required max-chunk (${maxChunk}) is less than backup cluster size (${clusterSize})`);
  }
  refuse(options.refusals?.job);
  // With a scratch file guests know the frame that saves to that.
  const fleeces = (options.fleece ?? false) !== false;
  const memory = allocateFrame(runtime, disk, clusterSize, fleeces ? 0 : options.cbwTimeoutMs);
  const planned = isBitmapSync(sync);
  let holder: FrameDescriptor | undefined;
  try {
    const common = {
      id,
      clusterSize,
      skipUnallocated: sync === 'top',
      onCbwError: options.onCbwError,
      cbwTimeoutMs: options.cbwTimeoutMs,
      owner: control.wakeWord,
    };
    holder = scratchHolder(runtime, disk, options.fleece, common);
    const frame: FrameDescriptor = {
      ...common,
      ...memory,
      target: target.descriptor,
      length: disk.descriptor.length,
      targetReadsZero: target.readsZero,
      compress: isCompressed(options.compress),
      maxChunk: maxChunk === 0 ? undefined : maxChunk,
      paceZeroes: options.paceZeroes,
      discardSource: options.discardSource,
      outlivesLoss: options.asQemu,
      plan: planned ? bitmap?.pointer : undefined,
      holder,
    };
    if (holder !== undefined) Frame.arm(runtime, frame);
    disk.drained(() => {
      disk.addFrame(holder ?? frame);
      if (bitmap !== undefined && successor !== undefined) {
        bitmapsOfDisk(runtime, disk.descriptor).freeze(bitmap, successor);
      }
    });
    return frame;
  } catch (error) {
    if (holder !== undefined) closeScratch(runtime, holder);
    freeFrame(runtime, { ...memory, holder });
    throw error;
  }
}

/**
 * Clusters of a scratch file, in bytes: guests wait for these to be saved before their first write to them, so they are as
 * small as the state of each may take memory for.
 */
function holderClusterSize(
  { descriptor }: Disk,
  { clusterSize }: Pick<FrameDescriptor, 'clusterSize'>,
): number {
  let size = Math.min(clusterSize, SCRATCH_CLUSTER_BYTES);
  while (size < clusterSize && descriptor.length / size > MAX_SCRATCH_CLUSTERS) size *= 2;
  return size;
}

/** The frame that guests know, where that is not the one whose target is the backup's. */
function scratchHolder(
  runtime: Runtime,
  disk: Disk,
  fleece: BackupJobOptions['fleece'] = false,
  common: Omit<HolderOptions, keyof FrameMemory | 'scratch'>,
): FrameDescriptor | undefined {
  if (fleece === false) return undefined;
  // A cluster of which only a part is in the topmost image is in the plan: in parts it would not be.
  const clusterSize = common.skipUnallocated ? common.clusterSize : holderClusterSize(disk, common);
  const memory = allocateFrame(runtime, disk, clusterSize, common.cbwTimeoutMs);
  const scratch = fleece === true ? undefined : fleece;
  try {
    return makeHolder(runtime, disk, { ...common, ...memory, clusterSize, scratch });
  } catch (error) {
    freeFrame(runtime, memory);
    throw error;
  }
}

/**
 * A backup job; other threads may help with {@link helpCopying}. Semantics: QMP `drive-backup` and `blockdev-backup`.
 */
export class BackupJob extends Job {
  readonly #runtime: Runtime;
  readonly #disk: Disk;
  readonly #options: BackupJobOptions;
  readonly #sync: SyncMode;
  readonly #target: Target;
  readonly #frame: Frame;
  readonly #bitmap: DirtyBitmap | undefined;

  private constructor(
    runtime: Runtime,
    disk: Disk,
    control: JobControl,
    port: MessagePort,
    begun: BegunBackup,
  ) {
    super(control, port, begun.options);
    this.#runtime = runtime;
    this.#disk = disk;
    this.#options = begun.options;
    this.#sync = begun.sync;
    this.#target = begun.target;
    this.#frame = disk.attachFrame(begun.frame);
    this.#bitmap = begun.bitmap === undefined ? undefined : new DirtyBitmap(runtime, begun.bitmap);
  }

  /** From its first status to its last, on the calling thread. It does not throw. */
  static run(runtime: Runtime, disk: Disk, control: JobControl, port: MessagePort, begun: BegunBackup): void {
    new BackupJob(runtime, disk, control, port, begun).run();
  }

  /** The background copy. Returns once everything planned is in the target. */
  protected override work(): 'completed' | 'cancelled' {
    const { control } = this;
    const unusable = (): boolean => this.#frame.unusable;
    if (this.#sync === 'none') {
      for (;;) {
        control.waitUntil(() => control.cancelled || control.paused || unusable());
        if (control.cancelled) return 'cancelled';
        if (unusable()) throw brokenFrameError('the backup has failed');
        this.pause(unusable);
      }
    }
    const scans = this.#sync === 'top' || isBitmapSync(this.#sync);
    let scanned: number | undefined = scans ? 0 : undefined;
    for (;;) {
      if (control.cancelled) return 'cancelled';
      if (unusable()) throw brokenFrameError('the backup has failed');
      if (control.paused) {
        this.pause(unusable);
        continue;
      }
      if (scanned !== undefined) scanned = this.#scan(scanned);
      else if (this.#frame.remaining > 0) this.#copy();
      else return 'completed';
      this.settleError();
    }
  }

  #scan(from: number): number | undefined {
    let next: number | undefined = from;
    try {
      while (next !== undefined && !this.control.cancelled && !this.control.paused) {
        next = this.#frame.scanNext(next);
      }
    } catch (error) {
      this.control.fail(copyError(error));
    }
    return next;
  }

  /** One pass over the plan. */
  #copy(): void {
    this.pass(
      () => copyUntilInterrupted(this.#frame, this.control),
      // Nothing is left to claim; guests and other threads may still hold clusters, and a failed one comes back.
      () => this.#frame.waitForOthers(RETRY_MS),
    );
  }

  /** Most of the data becomes durable here; copy-before-write is still active. */
  protected override prepare(): void {
    if (!this.#leavesFlushing) this.#frame.target.flush();
  }

  /** Whoever gave the target makes it durable. */
  get #leavesFlushing(): boolean {
    return this.#options.asQemu === true && this.#target.borrowed === true;
  }

  /** Takes the frame off the disk and commits or removes the target. */
  protected override end(
    outcome: JobOutcome,
    failure: StillframeError | undefined,
  ): StillframeError | undefined {
    const keep = outcome === 'completed' || (outcome === 'cancelled' && this.#sync === 'none');
    const { id, holder } = this.#frame.descriptor;
    this.#disk.removeFrame(id);
    endCopies(this.#runtime, holder ?? this.#frame.descriptor);
    // No guest is in the frame any more: from here on nothing can break it.
    // A job that was cancelled needs its frame no more.
    const isSpoilt = keep ? this.#frame.unusable : this.#frame.lost && this.#options.asQemu !== true;
    if (failure === undefined && isSpoilt) failure = brokenFrameError('the backup has failed');
    if (holder !== undefined) closeScratch(this.#runtime, holder);
    /** What was copied is in the target for good. */
    let isKept = false;
    if (keep && failure === undefined) {
      try {
        if (!this.#leavesFlushing) commitTarget(this.#runtime, this.#target);
      } catch (error) {
        failure = toStillframeError(error);
      }
    } else {
      isKept = abandonTarget(this.#runtime, this.#target) && this.#flushesPart();
    }
    this.#settleBitmap(outcome === 'completed' && failure === undefined, isKept);
    return failure;
  }

  /** Flushes what a bitmap is to say that it was copied, to a target that stays open. @returns whether that went well */
  #flushesPart(): boolean {
    const { bitmapMode } = this.#options;
    if (bitmapMode !== 'always' || this.#target.borrowed !== true || this.#leavesFlushing) return true;
    try {
      this.#frame.target.flush();
      return true;
    } catch {
      return false;
    }
  }

  /**
   * What the bitmap says from now on (QAPI `BitmapSyncMode`).
   *
   * @param isKept where the job has not succeeded: what it has copied stays in the target
   */
  #settleBitmap(success: boolean, isKept: boolean): void {
    const bitmap = this.#bitmap;
    if (bitmap === undefined) return;
    const { bitmapMode = 'on-success' } = this.#options;
    // Its node may have got an overlay, which the disk is on now.
    const set = BitmapSet.of(this.#runtime, bitmap);
    if (bitmapMode === 'always' && !success) {
      // Else there is no backup but the one before.
      const how = isKept ? 'abdicate' : 'reclaim';
      set.unfreeze(bitmap, how, () => this.#frame.markUncopied(bitmap, !isKept));
      return;
    }
    set.unfreeze(bitmap, success && bitmapMode !== 'never' ? 'abdicate' : 'reclaim');
  }
}

function copyError(error: unknown): JobError {
  return error instanceof CopyError ? jobError(error.operation, error.cause) : jobError('read', error);
}

function copyUntilInterrupted(frame: Frame, control: JobControl): void {
  let from = 0;
  try {
    while (!control.interrupted && !frame.unusable) {
      const began = control.throttle(() => frame.unusable || frame.remaining === 0);
      let counted = 0;
      try {
        if (control.interrupted || frame.unusable) return;
        const paced = began !== undefined && frame.descriptor.paceZeroes === true;
        const run = frame.copyNext(from, paced);
        if (run === undefined) return;
        counted = run.bytes + (paced ? run.zeroes : 0);
        from = run.end;
      } finally {
        if (began !== undefined) control.account(began, counted);
      }
    }
  } catch (error) {
    control.fail(copyError(error));
  }
}

/** Copies along with a job's own thread until the job ends. */
export function helpCopying(disk: Disk, descriptor: FrameDescriptor, control: JobControl): void {
  const frame = disk.attachFrame(descriptor);
  helpJob(control, () => copyUntilInterrupted(frame, control));
}
