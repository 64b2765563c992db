import type { Disk, DiskDescriptor } from '../block/disk.js';
import { type DiskBitmapAction, editDiskBitmap } from '../block/disk-bitmaps.js';
import { drainOrder } from '../block/drain-order.js';
import { StillframeError, toStillframeError } from '../errors.js';
import { JobControl } from '../job/control.js';
import type { Runtime } from '../kernels/runtime.js';
import { abandonBackup, type BackupJobOptions, type BegunBackup, beginBackup } from './backup-job.js';

/** One action of a transaction, as plain data (QMP `transaction`). */
export type TransactionAction =
  | {
      readonly type: 'backup';
      readonly disk: DiskDescriptor;
      /** Arena pointer of the job's control block. */
      readonly control: number;
      readonly options: BackupJobOptions;
      /** Number of the frame, never used before in this engine. */
      readonly id: number;
    }
  | { readonly type: 'bitmap'; readonly disk: DiskDescriptor; readonly edit: DiskBitmapAction }
  /** Fails, and everything with it. @param why default: that it is there to */
  | { readonly type: 'abort'; readonly why?: string | undefined };

interface Done {
  readonly begun?: BegunBackup | undefined;
  readonly keep: () => void;
  readonly undo: () => void;
}

/**
 * Carries actions out in order, all of them at one instant: nobody changes any of the disks meanwhile. Where one fails
 * those before it are taken back, last first.
 *
 * @param attach gives this thread's view of a disk
 * @returns the backups that were begun, in the places of their actions
 * @throws StillframeError the error of the action that failed
 */
export function transact(
  runtime: Runtime,
  actions: readonly TransactionAction[],
  attach: (disk: DiskDescriptor) => Disk,
): (BegunBackup | undefined)[] {
  const disks = new Map<number, Disk>();
  for (const action of actions) {
    if (action.type !== 'abort') disks.set(action.disk.id, attach(action.disk));
  }
  return drainedAll(actions.length > 1 ? drainOrder(runtime, [...disks.values()]) : [], () => {
    const done: Done[] = [];
    try {
      for (const action of actions) done.push(carryOut(runtime, action, attach));
    } catch (error) {
      const failed = toStillframeError(error);
      failed.action = done.length;
      for (const { undo } of done.reverse()) undo();
      throw failed;
    }
    for (const { keep } of done) keep();
    return done.map(({ begun }) => begun);
  });
}

function drainedAll<T>([first, ...rest]: readonly Disk[], body: () => T): T {
  return first === undefined ? body() : first.drained(() => drainedAll(rest, body));
}

function carryOut(runtime: Runtime, action: TransactionAction, attach: (disk: DiskDescriptor) => Disk): Done {
  switch (action.type) {
    case 'abort':
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        action.why ?? 'Transaction aborted using Abort action',
      );
    case 'bitmap':
      return editDiskBitmap(runtime, action.disk, action.edit);
    case 'backup': {
      const disk = attach(action.disk);
      const control = new JobControl(runtime.arena, action.control);
      const begun = beginBackup(runtime, disk, control, action.options, action.id);
      return { begun, keep: () => undefined, undo: () => abandonBackup(runtime, disk, begun) };
    }
  }
}
