import type { BackupHandle, BackupResult } from '../engine/backup.js';
import type { BackupOptions, DiskHandle } from '../engine/disk.js';
import type { Engine } from '../engine/engine.js';
import { StillframeError } from '../errors.js';

/** What is copied, and how. */
export interface Pull {
  /** Name of the export. */
  readonly uri: string;
  readonly options: BackupOptions;
}

/**
 * Copies exports to targets, which are all committed when everything is copied, or none of them.
 *
 * @param disks takes the exports that were opened, which the caller is to close
 * @param onJobs is given the jobs
 * @param check is called when everything is copied, before the targets get their names; where it throws they do not
 * @throws StillframeError what a backup throws
 */
export async function pull(
  engine: Engine,
  pulls: readonly Pull[],
  disks: DiskHandle[],
  onJobs: (jobs: readonly BackupHandle[]) => void,
  check: () => Promise<void>,
): Promise<BackupResult[]> {
  for (const { uri } of pulls) disks.push(await engine.openDisk(uri, { format: 'raw', readOnly: true }));
  const items = pulls.flatMap(({ options }, index) => {
    const disk = disks[index];
    return disk === undefined
      ? []
      : { type: 'backup' as const, disk, options: { ...options, autoFinalize: false } };
  });
  const jobs = await engine.transaction(items, { grouped: true });
  const copied = allPending(jobs);
  onJobs(jobs);
  if (await copied) await finalize(jobs, check);
  return await results(jobs);
}

/** @returns false where one of them has ended before */
function allPending(jobs: readonly BackupHandle[]): Promise<boolean> {
  const pending = Promise.all(
    jobs.map((job) => new Promise<void>((resolve) => job.once('pending', resolve))),
  ).then(() => true);
  const ended = jobs.map((job) =>
    job.ended.then(
      () => false,
      () => false,
    ),
  );
  return Promise.race([pending, ...ended]);
}

async function finalize([job, ...more]: readonly BackupHandle[], check: () => Promise<void>): Promise<void> {
  try {
    await check();
    job?.finalize();
  } catch (reason) {
    cancelAll(
      [job, ...more].filter((one) => one !== undefined),
      reason,
    );
  }
}

/** Cancels jobs as far as they are not over, or ending for another reason. */
export function cancelAll(jobs: readonly BackupHandle[], reason: unknown): void {
  for (const job of jobs) {
    try {
      job.cancel(reason);
    } catch {
      // Its result tells why.
    }
  }
}

/** Waits for all of them, and tells of the one that has failed rather than of those that ended because of it. */
async function results(jobs: readonly BackupHandle[]): Promise<BackupResult[]> {
  const settled = await Promise.allSettled(jobs.map((job) => job.result()));
  const failures = settled.flatMap((one) => (one.status === 'rejected' ? [one.reason] : []));
  const done = settled.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []));
  if (failures.length === 0) return done;
  const cancelled = (error: unknown): boolean =>
    error instanceof StillframeError && error.code === 'ERR_STILLFRAME_JOB_CANCELLED';
  const first = failures.find((error) => !cancelled(error)) ?? failures[0];
  if (done.length === 0 || !(first instanceof StillframeError)) throw first;
  throw new StillframeError(
    first.code,
    `${first.message}; complete, and of the same instant, are ${done.map(({ target }) => `'${target}'`).join(', ')}`,
    { cause: first, errno: first.errno },
  );
}
