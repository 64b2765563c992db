import type { BackupExtras } from '../backup/backup-job.js';
import type { FreezeOptions, FrozenDescriptor, HoldOptions } from '../backup/freeze.js';
import type { BitmapMode } from '../backup/modes.js';
import type { TargetOptions } from '../backup/target.js';
import type { DiskDescriptor } from '../block/disk.js';
import type { BitmapStatus, DiskBitmapAction } from '../block/disk-bitmaps.js';
import type { OnCbwError } from '../block/filters/copy-before-write.js';
import type { Extent } from '../block/node.js';
import { closedError, StillframeError } from '../errors.js';
import type { OnError } from '../job/job.js';
import { type BackupHandle, startBackups } from './backup.js';
import type { Engine } from './engine.js';
import { FrozenDisk } from './frozen-disk.js';
import type { JobHandle } from './job.js';
import { type MirrorHandle, type MirrorOptions, startMirror } from './mirror.js';
import type { NbdServer } from './nbd-server.js';
import type { GuestRequest } from './tasks.js';

/** Arguments of a backup (QMP `drive-backup`, `blockdev-backup`). */
export interface BackupOptions extends TargetOptions {
  /** Job id as QEMU allows it. Default `backup` and a number. */
  readonly jobId?: string | undefined;
  /**
   * Name of a dirty bitmap of the disk: what it has dirty is copied (sync modes `incremental` and `bitmap`), or it is only
   * brought up to date (`full` and `top` with bitmap mode `always` or `on-success`).
   */
  readonly bitmap?: string | undefined;
  /**
   * When what was copied is taken off the bitmap (QMP `bitmap-mode`): `on-success`, `never`, `always` (what was not copied
   * stays on it). For sync mode `incremental` it is `on-success`.
   */
  readonly bitmapMode?: BitmapMode | undefined;
  /** Limit of the background copy in bytes per second; 0 (default) is none. */
  readonly speed?: number | undefined;
  /** Threads that copy. Default: the engine's. */
  readonly workers?: number | undefined;
  /** QMP `on-source-error`. Default `report`. */
  readonly onSourceError?: OnError | undefined;
  /** QMP `on-target-error`. Default `report`. */
  readonly onTargetError?: OnError | undefined;
  /** QMP `on-cbw-error`. Default `break-guest-write`. */
  readonly onCbwError?: OnCbwError | undefined;
  /** How long a guest's write may wait for its old data, in milliseconds, before that is such an error; 0 (default): long. */
  readonly cbwTimeoutMs?: number | undefined;
  /**
   * Guests' writes save old data to a scratch file first, which empties as the copy catches up, so that they never wait
   * for the target (QEMU: image fleecing). A text is the folder of the scratch file; `true`: that of the image. Default
   * false. Not for sync mode `none`.
   */
  readonly fleece?: boolean | string | undefined;
  /** With false the finished job waits for {@link BackupHandle.finalize}. Default true. */
  readonly autoFinalize?: boolean | undefined;
  /** With false the ended job waits for {@link BackupHandle.dismiss}. Default true. */
  readonly autoDismiss?: boolean | undefined;
  /** Cancels the job. What was written of a new target is removed. */
  readonly signal?: AbortSignal | undefined;
  /** @internal What only monitors ask for. */
  readonly internal?: BackupExtras | undefined;
}

/** An action on a dirty bitmap; sources of a merge may be bitmaps of other disks. */
export type DiskBitmapEdit =
  | Exclude<DiskBitmapAction, { readonly action: 'merge' }>
  | {
      readonly action: 'merge';
      readonly name: string;
      readonly sources: readonly (string | { readonly disk: DiskHandle; readonly name: string })[];
    };

/** @internal */
export function plainEdit(edit: DiskBitmapEdit): DiskBitmapAction {
  if (edit.action !== 'merge') return edit;
  const sources = edit.sources.map((source) =>
    typeof source === 'string' ? source : { disk: source.disk.descriptor, name: source.name },
  );
  return { ...edit, sources };
}

/** Bytes of one buffer through which requests travel; larger requests are split. */
const SLOT_BYTES = 1024 * 1024;
const SLOTS = 8;

/** A live disk, as the host program sees it. Every method may be called while others are under way. */
export class DiskHandle {
  #descriptor: DiskDescriptor;
  /** @internal Servers that export it. */
  readonly servers = new Set<NbdServer>();
  readonly #engine: Engine;
  readonly #onClose: () => void;
  readonly #jobs = new Set<JobHandle>();
  readonly #frozen = new Set<FrozenDisk>();
  readonly #pending = new Set<Promise<unknown>>();
  #slots: { base: number; free: number[]; waiting: ((slot: number) => void)[] } | undefined;
  #closing: Promise<void> | undefined;

  /** @internal Use {@link Engine.openDisk}. */
  constructor(engine: Engine, descriptor: DiskDescriptor, onClose: () => void) {
    this.#descriptor = descriptor;
    this.#engine = engine;
    this.#onClose = onClose;
  }

  get descriptor(): DiskDescriptor {
    return this.#descriptor;
  }

  /** @internal It lies on something else now. */
  changed(descriptor: DiskDescriptor): void {
    this.#descriptor = descriptor;
  }

  /** Absolute path of the image. */
  get path(): string {
    return this.descriptor.node.path;
  }

  /** Virtual size in bytes. */
  get length(): number {
    return this.descriptor.length;
  }

  get readOnly(): boolean {
    return this.descriptor.readOnly;
  }

  /** Reads `length` bytes. @throws StillframeError ERR_STILLFRAME_OUT_OF_RANGE, …_IO, …_CORRUPT_IMAGE */
  async read(offset: number, length: number): Promise<Uint8Array> {
    this.#checkRange('read', offset, length);
    const data = new Uint8Array(length);
    await this.#split(length, async (done, pointer, bytes) => {
      await this.#request({ op: 'read', offset: offset + done, pointer, length: bytes });
      data.set(this.#engine.arena.u8.subarray(pointer, pointer + bytes), done);
    });
    return data;
  }

  /**
   * Writes `data`. The bytes are borrowed until the promise settles. A request of more than 1 MiB is carried out
   * in parts, in no particular order.
   *
   * @throws StillframeError ERR_STILLFRAME_OUT_OF_RANGE, …_READ_ONLY, …_NO_SPACE, …_IO; under `on-cbw-error`
   *   `break-guest-write` also the error of the copy that has to come before the write
   */
  async write(offset: number, data: Uint8Array): Promise<void> {
    this.#checkRange('write', offset, data.length);
    await this.#split(data.length, async (done, pointer, bytes) => {
      this.#engine.arena.u8.set(data.subarray(done, done + bytes), pointer);
      await this.#request({ op: 'write', offset: offset + done, pointer, length: bytes });
    });
  }

  /** Makes the range read as zeroes. `unmap`: space may be given back. Errors as {@link write}. */
  async writeZeroes(offset: number, length: number, options: { unmap?: boolean } = {}): Promise<void> {
    this.#checkRange('write zeroes', offset, length);
    await this.#request({ op: 'zeroes', offset, length, unmap: options.unmap ?? false });
  }

  /** Says that the content of the range no longer matters. Errors as {@link write}. */
  async discard(offset: number, length: number): Promise<void> {
    this.#checkRange('discard', offset, length);
    await this.#request({ op: 'discard', offset, length });
  }

  /** Resolves when every write that was resolved before is durable. */
  async flush(): Promise<void> {
    await this.#request({ op: 'flush' });
  }

  /**
   * Takes the instant and starts a backup of it. When this resolves the instant is fixed: writes resolved
   * before the call are in the backup, writes made afterwards are not.
   *
   * Semantics: QMP `drive-backup`.
   *
   * @throws StillframeError ERR_STILLFRAME_SAME_NODE, …_TARGET_EXISTS, …_SIZE_MISMATCH, …_BACKING_UNSUPPORTED,
   *   …_LOCKED, …_INVALID_ARGUMENT, …_ARENA_EXHAUSTED and what making a file throws
   */
  async backup(options: BackupOptions): Promise<BackupHandle> {
    if (this.#closing !== undefined) throw closedError(`'${this.path}'`);
    options.signal?.throwIfAborted();
    const [job] = await startBackups(this.#engine, [{ type: 'backup', disk: this.descriptor, options }]);
    if (job === undefined) throw new Error('invariant: a backup that was started has a job');
    await this.own(job);
    return job;
  }

  /**
   * Starts to make another disk a copy of this one, of the same length, and to keep it one: what is written here goes there as
   * well. Nobody else may write to `target` meanwhile. Once the job is `ready` its method `complete` ends it, with the two the same at
   * that moment.
   *
   * Semantics: QMP `blockdev-mirror`, but nothing takes the place of anything.
   *
   * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_SAME_NODE, …_READ_ONLY, …_ARENA_EXHAUSTED
   */
  async mirror(target: DiskHandle, options: MirrorOptions): Promise<MirrorHandle> {
    if (this.#closing !== undefined) throw closedError(`'${this.path}'`);
    if (target === this) {
      throw new StillframeError('ERR_STILLFRAME_SAME_NODE', `'${this.path}' cannot be a mirror of itself`);
    }
    const job = await startMirror(this.#engine, this.descriptor, target.descriptor, options);
    await Promise.all([this.own(job), target.own(job)]);
    return job;
  }

  /** @internal A job of this disk ends with it. */
  async own(job: JobHandle): Promise<void> {
    this.#jobs.add(job);
    const forget = (): boolean => this.#jobs.delete(job);
    job.ended.then(forget, forget);
    if (this.#closing !== undefined) await job.stop();
  }

  /** The dirty bitmaps of the disk: those that its image keeps, and others. */
  bitmaps(): Promise<BitmapStatus[]> {
    return this.#engine.run({ kind: 'bitmaps', disk: this.descriptor });
  }

  /**
   * Carries one action out on a dirty bitmap of the disk. Semantics: QMP `block-dirty-bitmap-add`, `…-remove`, `…-clear`,
   * `…-enable`, `…-disable` and `…-merge`.
   *
   * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_EXISTS, …_BITMAP_BUSY, …_BITMAP_INCONSISTENT,
   *   …_READ_ONLY, …_INVALID_ARGUMENT, …_SIZE_MISMATCH, …_UNSUPPORTED_FEATURE, …_ARENA_EXHAUSTED
   */
  async editBitmap(edit: DiskBitmapEdit): Promise<void> {
    if (this.#closing !== undefined) throw closedError(`'${this.path}'`);
    const action = { type: 'bitmap', disk: this.descriptor, edit: plainEdit(edit) } as const;
    await this.#engine.run({ kind: 'transact', actions: [action] });
  }

  /**
   * Takes the instant now and holds it: what guests write from then on waits until the old data is saved to a scratch
   * file. Export it with {@link NbdServer.addExport}. Writes resolved before the call are in it, writes made after this
   * resolves are not.
   *
   * Semantics: QEMU's image fleecing (`copy-before-write` and `snapshot-access`).
   *
   * @throws StillframeError ERR_STILLFRAME_NO_SPACE, …_PERMISSION, …_NOT_FOUND (the scratch), …_ARENA_EXHAUSTED,
   *   …_INVALID_ARGUMENT (8 instants of the disk are held already)
   */
  freeze(options: FreezeOptions = {}): Promise<FrozenDisk> {
    return this.hold(options);
  }

  /** @internal As {@link freeze}. */
  async hold(options: HoldOptions): Promise<FrozenDisk> {
    if (this.#closing !== undefined) throw closedError(`'${this.path}'`);
    const frozen = await this.#engine.run<FrozenDescriptor>({
      kind: 'freeze',
      disk: this.descriptor,
      options,
      id: this.#engine.nextId(),
    });
    const handle = new FrozenDisk(this.#engine, this, frozen, () => this.#frozen.delete(handle));
    this.#frozen.add(handle);
    await handle.ready;
    if (this.#closing !== undefined) await handle.close();
    return handle;
  }

  /** Cancels the disk's jobs, flushes and closes. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    await Promise.all([...this.servers].map((server) => server.close()));
    await Promise.allSettled(this.#pending);
    await Promise.all([...this.#frozen].map((frozen) => frozen.close()));
    await Promise.all([...this.#jobs].map((job) => job.stop()));
    try {
      await this.#engine.run<void>({ kind: 'close', disk: this.descriptor });
    } finally {
      if (this.#slots !== undefined) this.#engine.arena.free(this.#slots.base);
      this.#onClose();
    }
  }

  /** @internal Carries one request out as it is, on memory of the arena. */
  request(request: GuestRequest): Promise<void> {
    return this.#request(request);
  }

  /** @internal As `BlockNode.status` of the disk's node. */
  status(offset: number, length: number): Promise<Extent> {
    return this.#engine.run<Extent>({ kind: 'disk-status', disk: this.descriptor, offset, length });
  }

  #checkRange(what: string, offset: number, length: number): void {
    if (Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0) {
      if (offset + length <= this.length) return;
    }
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.path}' has ${this.length} bytes`,
    );
  }

  async #request(request: GuestRequest): Promise<void> {
    if (this.#closing !== undefined) throw closedError(`'${this.path}'`);
    const pending = this.#engine.run<void>({ kind: 'request', disk: this.descriptor, request });
    this.#pending.add(pending);
    try {
      await pending;
    } finally {
      this.#pending.delete(pending);
    }
  }

  /** Runs `part` over slices of a request, each with a buffer; waits for all of them even when one fails. */
  async #split(
    length: number,
    part: (done: number, pointer: number, bytes: number) => Promise<void>,
  ): Promise<void> {
    const parts: Promise<void>[] = [];
    for (let done = 0; done < length; done += SLOT_BYTES) {
      const slot = await this.#takeSlot();
      const bytes = Math.min(SLOT_BYTES, length - done);
      const pending = part(done, slot, bytes).finally(() => this.#giveSlot(slot));
      // A failed part is reported by allSettled below; until then nobody else looks at it.
      pending.catch(() => undefined);
      parts.push(pending);
    }
    for (const result of await Promise.allSettled(parts)) {
      if (result.status === 'rejected') throw result.reason;
    }
  }

  async #takeSlot(): Promise<number> {
    if (this.#closing !== undefined) throw closedError(`'${this.path}'`);
    if (this.#slots === undefined) {
      const base = this.#engine.arena.alloc(SLOTS * SLOT_BYTES, `request buffers of '${this.path}'`);
      const free = Array.from({ length: SLOTS }, (_, index) => base + index * SLOT_BYTES);
      this.#slots = { base, free, waiting: [] };
    }
    const { free, waiting } = this.#slots;
    return free.pop() ?? new Promise((resolve) => waiting.push(resolve));
  }

  #giveSlot(slot: number): void {
    const next = this.#slots?.waiting.shift();
    if (next !== undefined) next(slot);
    else this.#slots?.free.push(slot);
  }
}
