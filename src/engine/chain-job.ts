import type { ChainJobOptions } from '../backup/chain-job.js';
import type { CommitJobOptions } from '../backup/commit-job.js';
import type { DiskDescriptor } from '../block/disk.js';
import { interruptNode } from '../block/files.js';
import type { JobControl } from '../job/control.js';
import type { JobOutcome } from '../job/job.js';
import type { Arena } from '../kernels/arena.js';
import type { Engine } from './engine.js';
import {
  type HandleOptions,
  JobHandle,
  type JobProgress,
  launchJob,
  makeControl,
  type RunningJob,
} from './job.js';

/** What a job within a backing chain works on. */
export type ChainWork =
  | { readonly type: 'stream'; readonly disk: DiskDescriptor; readonly options: ChainJobOptions }
  | {
      readonly type: 'commit';
      readonly top: DiskDescriptor;
      readonly base: DiskDescriptor;
      readonly options: CommitJobOptions;
    };

/** A job within a backing chain, as the host program sees it. */
class ChainJobHandle extends JobHandle {
  readonly #disks: readonly DiskDescriptor[];
  #control: JobControl | undefined;
  /** Once the job is over. */
  #progress: JobControl['progress'] = { done: 0, total: 0 };

  constructor(
    arena: Arena,
    disks: readonly DiskDescriptor[],
    options: HandleOptions,
    control: JobControl,
    running: RunningJob,
  ) {
    super(arena, options, control, running);
    this.#disks = disks;
    this.#control = control;
  }

  override snapshot(): JobProgress {
    const { done, total } = this.#control?.progress ?? this.#progress;
    return { status: this.status, offset: done, length: total, elapsedMs: this.elapsedMs };
  }

  override async result(): Promise<{ readonly outcome: Exclude<JobOutcome, 'failed'> }> {
    return { outcome: await this.outcome(false) };
  }

  protected override interrupt(control: JobControl): void {
    for (const { node } of this.#disks) interruptNode(this.arena, node, control.pointer);
  }

  protected override free(): void {
    this.#progress = this.#control?.progress ?? this.#progress;
    this.#control = undefined;
  }
}

/**
 * Starts a job within a backing chain.
 *
 * @param commit what the host does at the end: it changes the chain
 * @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED
 */
export function startChainJob(
  engine: Engine,
  work: ChainWork,
  { id, speed, autoDismiss }: { readonly id: string; readonly speed: number; readonly autoDismiss: boolean },
  commit: () => Promise<void>,
): JobHandle {
  const words = makeControl(engine.arena, speed);
  const { type } = work;
  const { autoFinalize } = work.options;
  const disks = work.type === 'stream' ? [work.disk] : [work.top, work.base];
  const job = launchJob(
    engine,
    (port) => ({ kind: 'chain-job', work, control: words.pointer, port }),
    [],
    (running) =>
      new ChainJobHandle(engine.arena, disks, { id, type, autoFinalize, autoDismiss }, words, running),
  );
  job.onCommit = commit;
  return job;
}
