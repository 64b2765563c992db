import { StillframeError } from '../errors.js';
import type { QmpClient } from '../qmp/client.js';
import type { JsonObject } from '../qmp/types.js';
import type { Drive, DriveBitmap } from './drive.js';
import { runOf } from './names.js';

/** Sync modes of a backup of a running QEMU. */
export const HOT_SYNC_MODES = ['full', 'incremental', 'bitmap'] as const;
export type HotSyncMode = (typeof HOT_SYNC_MODES)[number];
export const HOT_BITMAP_MODES = ['on-success', 'never'] as const;
export type HotBitmapMode = (typeof HOT_BITMAP_MODES)[number];

/** What is asked for. */
export interface BitmapWish {
  readonly sync: HotSyncMode;
  readonly bitmap: string | undefined;
  readonly bitmapMode: HotBitmapMode | undefined;
}

/** One action of a QMP transaction. */
interface Action {
  readonly type: string;
  readonly data: JsonObject;
}

/**
 * What becomes of a drive's dirty bitmap. It is left as it is, and goes on recording, until the backup is complete: what
 * is to be copied is a copy of it, and what is written after the instant is in another bitmap. So nothing can be lost,
 * wherever a run ends; whoever uses the bitmap then copies too much at worst.
 *
 * The bitmaps of ours do not have to be kept by the image: they matter to nobody but the run that has made them.
 */
export class BitmapPlan {
  readonly #drive: Drive;
  readonly #name: string;
  readonly #found: DriveBitmap | undefined;
  /** It says what is copied. */
  readonly #copies: boolean;
  /** It is brought up to date. */
  readonly #updates: boolean;
  readonly #frozen: string;
  readonly #next: string;

  private constructor(drive: Drive, name: string, { sync, bitmapMode }: BitmapWish, id: string) {
    this.#drive = drive;
    this.#name = name;
    this.#found = drive.bitmaps.find((bitmap) => bitmap.name === name);
    this.#copies = sync !== 'full';
    this.#updates = bitmapMode !== 'never';
    this.#frozen = `${id}-frozen`;
    this.#next = `${id}-next`;
  }

  /**
   * @param id what names of ours begin with
   * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_INCONSISTENT, …_BITMAP_BUSY, …_READ_ONLY,
   *   …_INVALID_ARGUMENT
   */
  static of(drive: Drive, wish: BitmapWish, id: string): BitmapPlan | undefined {
    const name = checkWish(wish);
    if (name === undefined) return undefined;
    const plan = new BitmapPlan(drive, name, wish, id);
    plan.#check();
    return plan;
  }

  #check(): void {
    const found = this.#found;
    const refuse = (code: StillframeError['code'], what: string, advice: string): never => {
      const bitmap = `dirty bitmap '${this.#name}' of the drive '${this.#drive.device}'`;
      throw new StillframeError(code, `${bitmap} ${what}; ${advice}`);
    };
    const anew = `take a new full backup with --sync full --bitmap ${this.#name}, which begins a new chain`;
    if (found?.busy === true) {
      refuse('ERR_STILLFRAME_BITMAP_BUSY', 'is in use by a job or an export', 'wait for its end');
    }
    if (this.#copies) {
      if (found === undefined) {
        const kept = this.#drive.keepsBitmaps ? '' : ', and its image keeps none when the QEMU ends';
        refuse('ERR_STILLFRAME_BITMAP_NOT_FOUND', `is not there${kept}`, anew);
      }
      if (found?.inconsistent === true) {
        const why =
          'is inconsistent: the QEMU ended without storing it, so it does not tell what was written';
        refuse('ERR_STILLFRAME_BITMAP_INCONSISTENT', why, anew);
      }
      if (found?.recording === false && this.#updates) {
        const why = 'is disabled, so it does not tell what was written since';
        refuse('ERR_STILLFRAME_BITMAP_INCONSISTENT', why, anew);
      }
    }
    if (this.#updates && this.#drive.readOnly && found?.persistent === true) {
      const advice = 'use --sync bitmap --bitmap-mode never, which leaves it as it is';
      refuse('ERR_STILLFRAME_READ_ONLY', 'cannot be changed, since the drive is read-only', advice);
    }
  }

  /**
   * Looks whether the bitmap that will be made can be made, so that a backup does not come to its end for nothing.
   *
   * @throws StillframeError ERR_STILLFRAME_QMP
   */
  async rehearse(client: QmpClient): Promise<void> {
    if (!this.#updates || this.#found !== undefined) return;
    const actions = [this.#add(this.#name, { persistent: this.#drive.keepsBitmaps }), ABORT];
    await client.execute('transaction', { actions }).catch((error: unknown) => {
      if (!(error instanceof StillframeError) || !error.message.includes('using Abort action')) throw error;
    });
  }

  /** Name of the bitmap that says what is to be copied. */
  get frozen(): string | undefined {
    return this.#copies ? this.#frozen : undefined;
  }

  /** Names of the bitmaps that are made in the QEMU. */
  get made(): readonly string[] {
    return [...(this.#copies ? [this.#frozen] : []), ...(this.#updates ? [this.#next] : [])];
  }

  /** Actions that come before the instant in its transaction: whatever is written afterwards has to be on record. */
  before(): readonly Action[] {
    return this.#updates ? [this.#add(this.#next, this.#granularity())] : [];
  }

  /** Actions that come after it: whatever was written before has to be in the copy. */
  after(): readonly Action[] {
    if (!this.#copies) return [];
    return [
      this.#add(this.#frozen, { disabled: true, ...this.#granularity() }),
      this.#merge(this.#frozen, this.#name),
    ];
  }

  /** What is to be done once all backups are complete: two transactions, since a name is free only after the first. */
  done(): { readonly first: readonly Action[]; readonly second: readonly Action[] } {
    const found = this.#found;
    if (!this.#updates) return { first: [], second: [] };
    const own = { node: this.#drive.node, name: this.#name };
    const merge = this.#merge(this.#name, this.#next);
    if (found !== undefined && !found.inconsistent) {
      const enable = found.recording ? [] : [{ type: 'block-dirty-bitmap-enable', data: own }];
      // Recorded in both from the first action on: nothing is lost between them.
      return { first: [], second: [...enable, { type: 'block-dirty-bitmap-clear', data: own }, merge] };
    }
    const remove = { type: 'block-dirty-bitmap-remove', data: own };
    const add = this.#add(this.#name, { persistent: this.#drive.keepsBitmaps });
    return { first: found === undefined ? [] : [remove], second: [add, merge] };
  }

  #granularity(): JsonObject {
    const found = this.#found;
    return found === undefined || found.inconsistent ? {} : { granularity: found.granularity };
  }

  #add(name: string, options: JsonObject): Action {
    return { type: 'block-dirty-bitmap-add', data: { node: this.#drive.node, name, ...options } };
  }

  #merge(target: string, source: string): Action {
    return {
      type: 'block-dirty-bitmap-merge',
      data: { node: this.#drive.node, target, bitmaps: [source] },
    };
  }
}

const ABORT: Action = { type: 'abort', data: {} };

/** @returns the name of the bitmap; texts of errors as far as QMP `blockdev-backup` has them */
function checkWish({ sync, bitmap, bitmapMode }: BitmapWish): string | undefined {
  const invalid = (message: string): StillframeError =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
  const one = <T extends string>(what: string, value: T, all: readonly T[]): void => {
    if (!all.includes(value)) {
      throw invalid(`of a running QEMU ${what} is ${all.join(' or ')}, not '${value}'`);
    }
  };
  one('the sync mode', sync, HOT_SYNC_MODES);
  if (bitmapMode !== undefined) one('the bitmap mode', bitmapMode, HOT_BITMAP_MODES);
  if (bitmap === undefined || bitmap === '') {
    if (sync !== 'full') throw invalid(`must provide a valid bitmap name for '${sync}' sync mode`);
    if (bitmapMode !== undefined) throw invalid('Cannot specify bitmap sync mode without a bitmap');
    return undefined;
  }
  if (runOf(bitmap) !== undefined) throw invalid(`'${bitmap}' is a name that backups use for themselves`);
  if (sync === 'bitmap' && bitmapMode === undefined) {
    throw invalid('Bitmap sync mode must be given when providing a bitmap');
  }
  if (bitmapMode === 'never' && sync !== 'bitmap') {
    throw invalid(
      sync === 'full'
        ? "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'"
        : "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    );
  }
  return bitmap;
}
