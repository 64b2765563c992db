import type { BegunBackup } from '../backup/backup-job.js';
import { BITMAP_MODES, SYNC_MODES, type SyncMode } from '../backup/modes.js';
import type { TransactionAction } from '../backup/transaction.js';
import type { ImageChecksum } from '../block/checksum.js';
import type { DiskDescriptor } from '../block/disk.js';
import { interruptNode } from '../block/files.js';
import {
  type FrameCounters,
  type FrameDescriptor,
  freeFrame,
  guestsFrame,
  type HeldCounts,
  heldCounts,
  readFrameCounters,
} from '../block/filters/copy-before-write.js';
import type { NodeDescriptor } from '../block/node.js';
import { StillframeError } from '../errors.js';
import { checkJobId, type JobControl } from '../job/control.js';
import type { JobOutcome } from '../job/job.js';
import type { Arena } from '../kernels/arena.js';
import type { Runtime } from '../kernels/runtime.js';
import type { BackupOptions } from './disk.js';
import type { Engine } from './engine.js';
import { guestCopies } from './guest-copies.js';
import {
  checkSpeed,
  Group,
  type HandleOptions,
  JobHandle,
  type JobProgress,
  launchJob,
  makeControl,
  type RunningJob,
} from './job.js';
import type { Task } from './tasks.js';

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

/** A backup at one moment. Bytes are those of whole clusters. */
export interface BackupProgress extends BackupCounts, JobProgress {}

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
   * Of the clusters of the plan, which with `full` are all: {@link ImageChecksum}, and {@link Engine.imageChecksum} of
   * the backup says the same.
   */
  readonly checksum: Pick<ImageChecksum, 'algorithm' | 'root'>;
}

/** QMP takes seconds in 32 bits. */
const MAX_TIMEOUT_MS = 1000 * (2 ** 32 - 1);

/** A backup job, as the host program sees it: verbs, events, progress and the result. */
export class BackupHandle extends JobHandle {
  readonly sync: SyncMode;
  /** Where the image is while the job runs; a new one is renamed to `target` at the commit point. */
  readonly path: string;
  readonly target: string;
  readonly #source: NodeDescriptor;
  readonly #frame: FrameDescriptor;
  readonly #borrowed: boolean;
  /** Once the job is over. */
  #counters: FrameCounters | undefined;

  /** @internal */
  constructor(
    arena: Arena,
    source: NodeDescriptor,
    options: Omit<HandleOptions, 'type'> & { readonly target: string },
    begun: BegunBackup,
    control: JobControl,
    running: RunningJob,
    group: Group | undefined,
  ) {
    super(arena, { ...options, type: 'backup' }, control, running, group);
    this.target = options.target;
    this.sync = begun.sync;
    this.path = begun.target.partialPath ?? begun.target.finalPath;
    this.#source = source;
    this.#frame = begun.frame;
    this.#borrowed = begun.target.borrowed === true;
  }

  override snapshot(): BackupProgress {
    const counters = this.#counters ?? readFrameCounters(this.arena, this.#frame);
    const { clusterSize } = this.#frame;
    const counts = this.#counts(counters);
    const none = this.sync === 'none';
    const done = counts.clusters.copied + counts.clusters.zero;
    return {
      status: this.status,
      offset: done * clusterSize,
      length: (none ? this.#frame.clusters : counts.clusters.planned) * clusterSize,
      elapsedMs: this.elapsedMs,
      ...counts,
    };
  }

  /**
   * The result, once the job is over.
   *
   * @throws StillframeError the error that failed the job; ERR_STILLFRAME_JOB_CANCELLED when it was cancelled
   *   (or the reason given to {@link cancel}, or the reason of the aborted signal)
   */
  override async result(): Promise<BackupResult> {
    const outcome = await this.outcome(this.sync === 'none');
    const counters = this.#counters;
    if (counters === undefined) throw new Error('job invariant: ended without a result');
    return {
      outcome,
      sync: this.sync,
      target: this.target,
      virtualSize: this.#frame.length,
      clusterSize: this.#frame.clusterSize,
      ...this.#counts(counters),
      durationMs: Math.round(this.elapsedMs),
      checksum: { algorithm: 'xxh3-64', root: counters.checksum.toString(16).padStart(16, '0') },
    };
  }

  /** @internal What the job's copy-before-write holds, in whole clusters. */
  get held(): { readonly granularity: number; readonly length: number } {
    const { clusterSize, clusters } = this.#frame;
    return { granularity: clusterSize, length: clusterSize * clusters };
  }

  /** @internal Counts of it in bytes, as long as the job is not over. */
  heldCounts(kernels: Runtime['kernels']): HeldCounts {
    if (this.#counters !== undefined) return { access: 0, copy: 0, done: 0 };
    // All of it can be read, whatever the job copies.
    return { ...heldCounts(this.arena, kernels, this.#frame), access: this.held.length };
  }

  protected override interrupt(control: JobControl): void {
    // In sync mode `none` the target is still to be committed.
    if (this.sync === 'none') return;
    interruptNode(this.arena, this.#source, control.pointer);
    interruptNode(this.arena, this.#frame.target, this.#borrowed ? control.pointer : undefined);
  }

  protected override free(): void {
    this.#counters = readFrameCounters(this.arena, this.#frame);
    freeFrame({ arena: this.arena }, this.#frame);
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
  const control = makeControl(engine.arena, options.speed ?? 0);
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
      ...options.internal,
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
 * @param section of which the instant is a part
 * @returns their jobs, in order
 */
export async function startBackups(
  engine: Engine,
  items: readonly (BackupItem | Exclude<TransactionAction, { type: 'backup' }>)[],
  grouped = false,
  section?: InstantSection,
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
    begun = await (section ?? engine).run<(BegunBackup | undefined)[]>({ kind: 'transact', actions });
  } catch (error) {
    for (const { control } of prepared) engine.arena.free(control.pointer);
    throw error;
  }
  let failure: { readonly error: unknown } | undefined;
  try {
    await section?.rest();
  } catch (error) {
    failure = { error };
  }
  const started = begun.filter((one) => one !== undefined);
  const jobs = prepared.flatMap((one, index) => {
    const [options, backup] = [wanted[index], started[index]];
    return options === undefined || backup === undefined ? [] : launch(engine, one, options, backup, group);
  });
  if (failure === undefined) return jobs;
  await Promise.all(jobs.map((job) => job.stop()));
  throw failure.error;
}

/** A part of a program in which nobody changes disks. */
export interface InstantSection {
  /** Carries a task out within it. */
  run<T>(task: Task): Promise<T>;
  /** What else is done at the instant, before any job runs. */
  rest(): Promise<void>;
}

/** Starts the threads of a backup that has begun. */
function launch(
  engine: Engine,
  { id, control: words, action: { disk } }: Prepared,
  options: BackupOptions,
  begun: BegunBackup,
  group: Group | undefined,
): BackupHandle {
  const control = words.pointer;
  // In sync mode `none` there is nothing to help with.
  const helpers = begun.sync === 'none' ? 0 : (options.workers ?? engine.workers) - 1;
  const copy = { kind: 'copy', disk, frame: begun.frame, control } as const;
  // Where the target of a cancelled job is still to be committed, what guests have to save is still saved.
  const copies = guestCopies(disk, guestsFrame(begun.frame), begun.sync === 'none' ? undefined : control);
  const { target, autoFinalize = true, autoDismiss = true } = options;
  return launchJob(
    engine,
    (port) => ({ kind: 'backup', disk, control, port, begun }),
    [...copies, ...Array.from({ length: helpers }, () => copy)],
    (running) =>
      new BackupHandle(
        engine.arena,
        disk.node,
        { id, target, autoFinalize, autoDismiss },
        begun,
        words,
        running,
        group,
      ),
    options.signal,
  );
}
