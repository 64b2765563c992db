import type { BegunMirror, MirrorCopyMode, MirrorJobOptions, MirrorSyncMode } from '../backup/mirror-job.js';
import type { DiskDescriptor } from '../block/disk.js';
import { interruptNode } from '../block/files.js';
import { mirrorProgress } from '../block/filters/mirror.js';
import type { PlainError } from '../errors.js';
import { checkJobId, type JobControl } from '../job/control.js';
import type { JobOutcome, OnError } from '../job/job.js';
import type { Arena } from '../kernels/arena.js';
import type { Engine } from './engine.js';
import {
  checkSpeed,
  type HandleOptions,
  JobHandle,
  type JobProgress,
  launchJob,
  makeControl,
  type RunningJob,
} from './job.js';

/** Arguments of a mirror (QMP `blockdev-mirror`). */
export interface MirrorOptions {
  /** Job id as QEMU allows it. Default `mirror` and a number. */
  readonly jobId?: string | undefined;
  readonly sync: MirrorSyncMode;
  /** Default `background`. */
  readonly copyMode?: MirrorCopyMode | undefined;
  /** Bytes, a power of two from 512 to 64 MiB. Default: the target's cluster size, but from 4 KiB to 64 KiB. */
  readonly granularity?: number | undefined;
  /** Zeroes may become holes of the target. Default true. */
  readonly unmap?: boolean | undefined;
  /** The target reads as zeroes wherever nothing was written. Default false. */
  readonly targetReadsZero?: boolean | undefined;
  /** Limit of the copy in bytes per second, but for what guests write; 0 (default) is none. */
  readonly speed?: number | undefined;
  /** Threads that copy. Default: the engine's. */
  readonly workers?: number | undefined;
  readonly onSourceError?: OnError | undefined;
  readonly onTargetError?: OnError | undefined;
  readonly autoFinalize?: boolean | undefined;
  readonly autoDismiss?: boolean | undefined;
  /** @internal What is done when it completes, with a mirror that has everything but what was written a moment ago. */
  readonly pivot?: ((mirror: BegunMirror['mirror']) => Promise<void>) | undefined;
  /** @internal The target is below this many layers of the disk, whose data goes into it. */
  readonly commit?: { readonly layers: number; readonly failure?: PlainError | undefined } | undefined;
}

/** A mirror job, as the host program sees it. */
export class MirrorHandle extends JobHandle {
  readonly #source: DiskDescriptor;
  readonly #mirror: BegunMirror['mirror'];
  /** Once the job is over. */
  #progress: ReturnType<typeof mirrorProgress> | undefined;

  /** @internal */
  constructor(
    arena: Arena,
    source: DiskDescriptor,
    options: Omit<HandleOptions, 'completable'>,
    { mirror }: BegunMirror,
    control: JobControl,
    running: RunningJob,
  ) {
    super(arena, { ...options, completable: true }, control, running);
    this.#source = source;
    this.#mirror = mirror;
  }

  override snapshot(): JobProgress {
    const { done, remaining } = this.#progress ?? mirrorProgress(this.arena, this.#mirror.control);
    return { status: this.status, offset: done, length: done + remaining, elapsedMs: this.elapsedMs };
  }

  override async result(): Promise<{ readonly outcome: Exclude<JobOutcome, 'failed'> }> {
    return { outcome: await this.outcome(false) };
  }

  protected override interrupt(control: JobControl): void {
    interruptNode(this.arena, this.#source.node, control.pointer);
    interruptNode(this.arena, this.#mirror.target.node, control.pointer);
  }

  protected override free(): void {
    this.#progress = mirrorProgress(this.arena, this.#mirror.control);
    this.arena.free(this.#mirror.control);
  }
}

/**
 * @internal Starts a mirror of a disk to another one, which nobody else may use.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_READ_ONLY, …_ARENA_EXHAUSTED
 */
export async function startMirror(
  engine: Engine,
  disk: DiskDescriptor,
  target: DiskDescriptor,
  options: MirrorOptions,
): Promise<MirrorHandle> {
  const { speed = 0, pivot, commit, autoFinalize = true, autoDismiss = true } = options;
  const type = commit === undefined ? 'mirror' : 'commit';
  checkSpeed(speed);
  const number = engine.nextId();
  const id = options.jobId ?? `mirror${number}`;
  checkJobId(id);
  const wanted: MirrorJobOptions = {
    sync: options.sync,
    copyMode: options.copyMode ?? 'background',
    granularity: options.granularity,
    unmap: options.unmap ?? true,
    targetReadsZero: options.targetReadsZero ?? false,
    onSourceError: options.onSourceError ?? 'report',
    onTargetError: options.onTargetError ?? 'report',
    autoFinalize,
    pivots: pivot !== undefined,
    ...commit,
  };
  const words = makeControl(engine.arena, speed);
  const control = words.pointer;
  let begun: BegunMirror;
  try {
    begun = await engine.run<BegunMirror>({
      kind: 'begin-mirror',
      disk,
      target,
      options: wanted,
      id: number,
    });
  } catch (error) {
    engine.arena.free(control);
    throw error;
  }
  const { mirror } = begun;
  const help = { kind: 'help-mirror', disk, mirror, control } as const;
  const job = launchJob(
    engine,
    (port) => ({ kind: 'mirror', disk, target, control, port, begun }),
    Array.from({ length: (options.workers ?? engine.workers) - 1 }, () => help),
    (running) =>
      new MirrorHandle(engine.arena, disk, { id, type, autoFinalize, autoDismiss }, begun, words, running),
  );
  if (pivot !== undefined) job.onCommit = () => pivot(mirror);
  return job;
}
