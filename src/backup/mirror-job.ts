import type { MessagePort } from 'node:worker_threads';
import { DirtyBitmap, defaultGranularity } from '../bitmap/dirty-bitmap.js';
import type { Disk, DiskDescriptor } from '../block/disk.js';
import { bitmapsOfDisk } from '../block/disk-bitmaps.js';
import { CopyError } from '../block/filters/copy-before-write.js';
import {
  endsMirror,
  MIRROR_CONTROL_BYTES,
  type Mirror,
  type MirrorDescriptor,
  type MirrorWorker,
} from '../block/filters/mirror.js';
import { findAbove, layersOf } from '../block/layered-status.js';
import { STATUS_ALLOCATED } from '../block/node.js';
import { mayUnmapZeroes } from '../block/unmap.js';
import { type PlainError, StillframeError, toStillframeError } from '../errors.js';
import type { JobControl } from '../job/control.js';
import { type CommonJobOptions, helpJob, Job, type JobOutcome, jobError } from '../job/job.js';
import type { Runtime } from '../kernels/runtime.js';

/** What a mirror copies to begin with: everything, what the top image holds, or nothing but what is written later. */
export const MIRROR_SYNC_MODES = ['full', 'top', 'none'] as const;
export type MirrorSyncMode = (typeof MIRROR_SYNC_MODES)[number];

/** When guests' writes come to the target: some time later, or before the guest is answered (QAPI `MirrorCopyMode`). */
export const MIRROR_COPY_MODES = ['background', 'write-blocking'] as const;
export type MirrorCopyMode = (typeof MIRROR_COPY_MODES)[number];

/** Arguments of a mirror job, as plain data. */
export interface MirrorJobOptions extends CommonJobOptions {
  readonly sync: MirrorSyncMode;
  readonly copyMode: MirrorCopyMode;
  /** Bytes that one bit of the dirty bitmap stands for, a power of two. Default: the target's cluster, but from 4 KiB to 64 KiB. */
  readonly granularity?: number | undefined;
  /** Zeroes may become holes of the target, also where it has discards dropped. */
  readonly unmap: boolean;
  /** The target reads as zeroes wherever nothing was written. */
  readonly targetReadsZero: boolean;
  /** The host has something to do at the commit point of a job that was told to complete. */
  readonly pivots: boolean;
  /** With `sync: top`: how many layers of the source are copied, where the target is below them; default 1. */
  readonly layers?: number | undefined;
  /** Why the target could not be made as long as the source. */
  readonly failure?: PlainError | undefined;
}

/** A mirror that is about to run, as plain data. */
export interface BegunMirror {
  readonly options: MirrorJobOptions;
  readonly mirror: MirrorDescriptor;
}

/** Smallest and largest granularity in bytes. */
const MIN_GRANULARITY = 512;
const MAX_GRANULARITY = 64 * 1024 * 1024;
/** How often a job that is ready looks for what guests have written, in milliseconds. */
const SLICE_MS = 100;
/** What guests may be kept from writing for, at the end, in bytes. */
const REST_BYTES = 16 * 1024 * 1024;
/** Bytes that are looked at, or made zero, in one step before the copy begins. */
const STEP_BYTES = 1024 * 1024 * 1024;

/**
 * Makes everything ready to copy a disk to another one; from now on what is written is noticed. Semantics and texts of
 * errors: QMP `blockdev-mirror`.
 *
 * @param id number of the mirror, never used before in this engine
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_READ_ONLY (the target), …_ARENA_EXHAUSTED
 */
export function beginMirror(
  runtime: Runtime,
  disk: Disk,
  target: Disk,
  options: MirrorJobOptions,
  id: number,
): BegunMirror {
  const { clusterSize } = target.node;
  const granularity = options.granularity ?? defaultGranularity(clusterSize);
  checkGranularity(granularity);
  if (target.descriptor.readOnly) {
    throw new StillframeError('ERR_STILLFRAME_READ_ONLY', 'Block node is read-only');
  }
  const { length } = disk.descriptor;
  const set = bitmapsOfDisk(runtime, disk.descriptor);
  const bitmap = set.add({ name: '', granularity, length, enabled: false, persistent: false });
  let control: number;
  try {
    bitmap.makeBits();
    control = runtime.arena.alloc(MIRROR_CONTROL_BYTES, 'state of a mirror');
  } catch (error) {
    set.remove(bitmap);
    throw error;
  }
  bitmap.enabled = true;
  const mirror = {
    id,
    control,
    bitmap: bitmap.pointer,
    target: target.descriptor,
    length,
    unit: Math.max(granularity, clusterSize ?? 0),
    unmap: options.unmap,
  };
  return { options, mirror };
}

/** @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
export function checkGranularity(bytes: number): void {
  const invalid = (what: string): StillframeError =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `Parameter 'granularity' expects a ${what}`);
  if (bytes < MIN_GRANULARITY || bytes > MAX_GRANULARITY) throw invalid('value in range [512B, 64MB]');
  if (!Number.isInteger(Math.log2(bytes))) throw invalid('power of 2');
}

/** What is written from now on is of no interest. */
function endMirror(runtime: Runtime, disk: DiskDescriptor, mirror: MirrorDescriptor): void {
  if (!endsMirror(runtime.arena, mirror)) return;
  bitmapsOfDisk(runtime, disk).remove(new DirtyBitmap(runtime, mirror.bitmap));
}

/**
 * A mirror job; other threads may help with {@link helpMirroring}. Semantics: QMP `blockdev-mirror` and `drive-mirror`.
 */
export class MirrorJob extends Job {
  readonly #runtime: Runtime;
  readonly #disk: Disk;
  readonly #target: Disk;
  readonly #options: MirrorJobOptions;
  readonly #mirror: Mirror;
  /** Where the look for what is to be copied to begin with goes on; undefined once that is known. */
  #scanned: number | undefined;
  /** How much of the target was made zero; undefined where all is that has to be. */
  #zeroed: number | undefined;
  /** All that is to be copied to begin with is known. */
  #isFollowing = false;
  /** At the end of the last pass nothing was left of what was dirty before. */
  #caughtUp = false;
  #isReady = false;

  private constructor(
    runtime: Runtime,
    disk: Disk,
    target: Disk,
    control: JobControl,
    port: MessagePort,
    { options, mirror }: BegunMirror,
  ) {
    super(control, port, options);
    this.#runtime = runtime;
    this.#disk = disk;
    this.#target = target;
    this.#options = options;
    this.#mirror = disk.attachMirror(mirror);
  }

  /** From its first status to its last, on the calling thread. It does not throw. */
  static run(
    runtime: Runtime,
    disk: Disk,
    target: Disk,
    control: JobControl,
    port: MessagePort,
    begun: BegunMirror,
  ): void {
    new MirrorJob(runtime, disk, target, control, port, begun).run();
  }

  protected override work(): 'completed' | 'cancelled' {
    const { control } = this;
    const { length } = this.#disk.descriptor;
    const { layers, failure } = this.#options;
    if (failure !== undefined) throw StillframeError.fromPlain(failure);
    if (layers === undefined && this.#target.descriptor.length !== length) {
      throw new StillframeError(
        'ERR_STILLFRAME_SIZE_MISMATCH',
        'Source and target image have different sizes',
      );
    }
    this.#plan();
    for (;;) {
      // Before: a job that is cancelled is asked to end as well.
      const isEnding = this.#isEnding();
      if (control.cancelled) return 'cancelled';
      if (control.paused) this.pause();
      else if (this.#zeroed !== undefined) this.#attempt(() => this.#zero());
      else if (this.#scanned !== undefined) this.#attempt(() => this.#scan());
      else if (!this.#isFollowing) this.#follow();
      else if (!this.#isReady) {
        if (this.#caughtUp) this.#becomeReady();
        else this.#copy();
      } else if (!isEnding) {
        if (this.#mirror.dirty) this.#copy();
        else this.#wait();
      } else if (this.#mirror.count() > REST_BYTES) this.#copy();
      else if (this.#attempt(() => this.#disk.drained(() => this.#mirror.finish()))) return 'completed';
      this.settleError();
    }
  }

  /** What differs to begin with. */
  #plan(): void {
    const { sync, targetReadsZero } = this.#options;
    const { length, discard } = this.#target.descriptor;
    if (sync === 'none') {
      // The target comes to lie on what was written before, which nobody may flush any more then.
      this.#disk.flush();
      return;
    }
    if (sync === 'full' && !targetReadsZero) {
      if (discard !== 'unmap' || !mayUnmapZeroes(this.#target.descriptor.node)) {
        this.#mirror.mark(0, length);
        return;
      }
      this.#zeroed = 0;
    }
    this.#scanned = 0;
  }

  #zero(): void {
    const from = this.#zeroed ?? 0;
    const { length } = this.#disk.descriptor;
    const bytes = Math.min(STEP_BYTES, length - from);
    if (bytes > 0) this.#mirror.zeroTarget(from, bytes);
    this.#zeroed = from + bytes < length ? from + bytes : undefined;
  }

  #scan(): void {
    const { length } = this.#disk.descriptor;
    const { sync, layers = 1 } = this.#options;
    const isTop = sync === 'top';
    let position = this.#scanned ?? 0;
    const stop = Math.min(length, position + STEP_BYTES);
    while (position < stop) {
      const bytes = stop - position;
      let found: { readonly length: number; readonly isData: boolean };
      try {
        found = isTop ? this.#findAbove(layers, position, bytes) : this.#findData(position, bytes);
      } catch (error) {
        throw new CopyError('read', error);
      }
      if (found.isData) this.#mirror.mark(position, found.length);
      position += found.length;
    }
    this.#scanned = position < length ? position : undefined;
  }

  #findAbove(
    layers: number,
    at: number,
    bytes: number,
  ): { readonly length: number; readonly isData: boolean } {
    const { length, from } = this.#disk.use((node) => findAbove(layersOf(node, layers), at, bytes));
    return { length, isData: from !== undefined };
  }

  #findData(at: number, bytes: number): { readonly length: number; readonly isData: boolean } {
    const { length, flags } = this.#disk.status(at, bytes);
    return { length, isData: (flags & STATUS_ALLOCATED) !== 0 };
  }

  #follow(): void {
    if (this.#options.copyMode === 'write-blocking') this.#disk.setMirror(this.#mirror.descriptor);
    this.#isFollowing = true;
    this.#caughtUp = this.#mirror.count() === 0;
  }

  /** Whether it was told to end as it may end once it is ready. */
  #isEnding(): boolean {
    return this.control.completeRequested || this.control.cancelRequested;
  }

  #becomeReady(): void {
    this.#isReady = this.#attempt(() => this.#mirror.flush());
    if (this.#isReady) this.becomeReady(this.#mirror.done);
  }

  /** A guest's writes are not worth a pass each. */
  #wait(): void {
    const { control } = this;
    control.waitUntil(
      () => control.cancelled || control.paused || control.failed || this.#isEnding(),
      SLICE_MS,
    );
  }

  /** One pass over what differs. */
  #copy(): void {
    let left = true;
    this.pass(
      () => copyUntilInterrupted(this.#mirror, this.control),
      () => {
        left = false;
      },
    );
    this.#mirror.count();
    this.#caughtUp = !left && !this.control.failed;
  }

  /** @returns whether it went well; where not, the error is one for the error policy */
  #attempt(body: () => void): boolean {
    try {
      body();
      return true;
    } catch (error) {
      this.control.fail(copyError(error));
      return false;
    }
  }

  protected override prepare(): void {
    this.#disk.setMirror(undefined);
  }

  protected override end(
    outcome: JobOutcome,
    failure: StillframeError | undefined,
  ): StillframeError | undefined {
    this.#disk.setMirror(undefined);
    if (outcome === 'completed') {
      try {
        // Guests may have gone on while it was pending.
        while (this.#mirror.count() > REST_BYTES) this.#mirror.copyNext(DETERMINED);
        if (this.#options.pivots && this.control.completeRequested) this.askHost();
        else this.#disk.drained(() => this.#mirror.finish());
      } catch (error) {
        failure = toStillframeError(error instanceof CopyError ? error.cause : error);
      }
    }
    endMirror(this.#runtime, this.#disk.descriptor, this.#mirror.descriptor);
    return failure;
  }
}

/**
 * The last part of a mirror, while nobody uses the disk: after it the target can take its place.
 *
 * @throws StillframeError what reading and writing throws
 */
export function finishMirror(runtime: Runtime, disk: Disk, descriptor: MirrorDescriptor): void {
  try {
    disk.attachMirror(descriptor).finish();
  } catch (error) {
    throw error instanceof CopyError ? error.cause : error;
  }
  endMirror(runtime, disk.descriptor, descriptor);
}

function copyError(error: unknown): ReturnType<typeof jobError> {
  return error instanceof CopyError ? jobError(error.operation, error.cause) : jobError('read', error);
}

function copyUntilInterrupted(mirror: Mirror, control: JobControl): void {
  const worker: MirrorWorker = {
    get interrupted() {
      return control.interrupted;
    },
    failed: (error) => control.fail(copyError(error)),
  };
  try {
    while (!control.interrupted) {
      const began = control.throttle();
      let moved: number | undefined;
      try {
        if (control.interrupted) return;
        moved = mirror.copyNext(worker);
        if (moved === undefined) return;
      } finally {
        if (began !== undefined) control.account(began, moved ?? 0);
      }
    }
  } catch (error) {
    control.fail(copyError(error));
  }
}

/** It goes on to the end, or throws. */
const DETERMINED: MirrorWorker = {
  interrupted: false,
  failed: (error) => {
    throw error;
  },
};

/** Copies along with a mirror's own thread until the job ends. */
export function helpMirroring(disk: Disk, descriptor: MirrorDescriptor, control: JobControl): void {
  const mirror = disk.attachMirror(descriptor);
  helpJob(control, () => copyUntilInterrupted(mirror, control));
}
