import { chownSync, rmSync, type Stats, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, isAbsolute, join } from 'node:path';
import { isNbdName } from '../block/nbd/uri.js';
import type { BackupHandle, BackupResult } from '../engine/backup.js';
import type { BackupOptions, DiskHandle } from '../engine/disk.js';
import type { Engine } from '../engine/engine.js';
import { StillframeError } from '../errors.js';
import { QmpClient, type ServerEvent } from '../qmp/client.js';
import { isObject } from '../qmp/types.js';
import { BitmapPlan, type HotBitmapMode, type HotSyncMode } from './bitmap-plan.js';
import { type Drive, findDrives } from './drive.js';
import { GuestAgent } from './guest-agent.js';
import { takeAwayLeftovers } from './leftovers.js';
import { makePlace, nameRun, removePlace } from './names.js';
import { exportAt } from './nbd-place.js';
import { cancelAll, pull } from './pull.js';
import { endJob, list, removeExport } from './qemu.js';
import { checkSpace, type ScratchFolder, watchSpace } from './scratch-space.js';

/** One drive of a running QEMU, and how it is backed up. */
export interface HotBackupDisk
  extends Omit<
    BackupOptions,
    | 'sync'
    | 'bitmapMode'
    | 'fleece'
    | 'targetNode'
    | 'autoFinalize'
    | 'autoDismiss'
    | 'onCbwError'
    | 'cbwTimeoutMs'
    | 'signal'
  > {
  /** The drive: its device, the id of its device in the guest, or its node. */
  readonly device: string;
  /** `incremental` and `bitmap` copy what `bitmap` has dirty, on top of `backing`. Default `full`. */
  readonly sync?: HotSyncMode | undefined;
  /**
   * Name of a dirty bitmap in the QEMU. A full backup makes it where it is not there, or not usable any more, which begins
   * a chain: afterwards it tells what was written since the instant. An image of format qcow2 keeps it.
   */
  readonly bitmap?: string | undefined;
  /** Whether the bitmap is brought up to date when all backups are complete. Default `on-success`. */
  readonly bitmapMode?: HotBitmapMode | undefined;
}

/** How drives of a running QEMU are backed up. */
export interface HotBackupOptions {
  /** Path of the QMP socket. */
  readonly qmp: string;
  /** The drives, which are backed up as they are at one instant, all of them or none. */
  readonly disks: readonly HotBackupDisk[];
  /** Folder for old data, which QEMU has to be able to write to. Default: that of each image, or that for temporary files. */
  readonly scratch?: string | undefined;
  /**
   * Where the NBD server of the QEMU listens, if it has one: `unix:PATH`, `HOST:PORT` or an NBD URI without an export. It
   * is used then, and goes on. Default: one is started and stopped.
   */
  readonly nbd?: string | undefined;
  /** Path of the socket of the QEMU guest agent, which freezes the guest's file systems for the moment of the instant. */
  readonly guestAgent?: string | undefined;
  /** How long the guest agent may take for each answer, in milliseconds. Default 30 000. */
  readonly guestAgentTimeoutMs?: number | undefined;
  /**
   * Take the risk of a QEMU before 9.0 whose drives are in threads of their own (`iothread`): it may end itself when this
   * program is killed while it copies. Default false: refused.
   */
  readonly allowIothreads?: boolean | undefined;
  /** Ends the backup. Nothing is left of the targets then. */
  readonly signal?: AbortSignal | undefined;
  /** Is given the jobs that pull, in the order of the disks. */
  readonly onJobs?: ((jobs: readonly BackupHandle[]) => void) | undefined;
  /** Takes what is worth a word although the backups are complete. */
  readonly onWarning?: ((message: string) => void) | undefined;
}

const GUEST_AGENT_MS = 30_000;
/**
 * Before this version a QEMU may end itself when a client leaves an export of a drive that is in a thread of its own
 * (`nbd_blockdev_client_closed: Assertion … failed`, 7.2.14 and others). It does not when it takes the export away first,
 * so that is the order in everything that is done here; but when we are killed, nobody does.
 */
const NO_IOTHREADS_BEFORE = 9;
/** Statuses of a job that holds an instant no more. */
const ENDED = new Set(['aborting', 'concluded', 'null']);

/**
 * Backs up drives of a running QEMU, as they are at one instant, while its guest goes on: the QEMU saves old data to
 * scratch files before it is overwritten (image fleecing), and what they hold together with the drives is pulled over NBD.
 *
 * What is needed in the QEMU (nodes, jobs, exports, its NBD server) is made here and taken away again, whatever
 * happens; what a run that was killed has left is taken away by the next one. Dirty bitmaps are only changed when
 * everything is complete, so that nothing that was written is ever missing from the next increment.
 *
 * @returns what was done, in the order of the disks
 * @throws StillframeError ERR_STILLFRAME_QMP (what the QEMU says, its class as `qmpClass`), …_QMP_CONNECTION (it has gone
 *   away), …_NOT_FOUND (a drive), …_LOCKED (another backup of it is under way), …_BITMAP_NOT_FOUND,
 *   …_BITMAP_INCONSISTENT, …_BITMAP_BUSY, …_UNSUPPORTED_FEATURE (threads of drives), …_GUEST_AGENT, …_PERMISSION and …_NO_SPACE (the scratch), …_BROKEN_FRAME
 *   and what a backup throws
 */
export async function backupRunning(engine: Engine, options: HotBackupOptions): Promise<BackupResult[]> {
  if (options.disks.length === 0) throw invalid('say which drives are to be backed up');
  const run = nameRun(options.nbd === undefined);
  if (options.nbd !== undefined) exportAt(options.nbd, run);
  options.signal?.throwIfAborted();
  const client = await QmpClient.connect(options.qmp);
  try {
    const backup = new HotBackup(engine, client, run, options);
    return await backup.run(await takeAwayLeftovers(client));
  } finally {
    client.close();
  }
}

/** A drive, what is to be done with it, and the name of what is made for that. */
interface Member {
  readonly id: string;
  readonly drive: Drive;
  readonly disk: HotBackupDisk;
  readonly plan: BitmapPlan | undefined;
}

/** One backup. What was made is taken away in the opposite order. */
class HotBackup {
  readonly #engine: Engine;
  readonly #client: QmpClient;
  readonly #run: string;
  readonly #options: HotBackupOptions;
  readonly #undo: (() => Promise<unknown> | unknown)[] = [];
  readonly #unwatch: (() => void)[] = [];
  readonly #disks: DiskHandle[] = [];
  #jobs: readonly BackupHandle[] = [];
  /** Why what is held is the instant no more. */
  #broken: StillframeError | undefined;

  constructor(engine: Engine, client: QmpClient, run: string, options: HotBackupOptions) {
    this.#engine = engine;
    this.#client = client;
    this.#run = run;
    this.#options = options;
  }

  /** @param leftovers a run that was killed has left something */
  async run(leftovers: boolean): Promise<BackupResult[]> {
    await this.#checkThreads();
    const members = await this.#members();
    let failed = true;
    try {
      const place = await this.#hold(members, leftovers);
      const results = await this.#pull(members, place);
      failed = false;
      await this.#advanceBitmaps(members);
      return results;
    } catch (error) {
      throw failed ? await this.#reason(error) : error;
    } finally {
      await this.#takeAway();
    }
  }

  async #checkThreads(): Promise<void> {
    if (this.#options.allowIothreads === true) return;
    const version = await this.#client.execute('query-version');
    const qemu = isObject(version) ? version['qemu'] : undefined;
    const major = isObject(qemu) ? Number(qemu['major']) : NO_IOTHREADS_BEFORE;
    if (major >= NO_IOTHREADS_BEFORE) return;
    const threads = await list(this.#client, 'query-iothreads').catch(() => []);
    if (threads.length === 0) return;
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `this QEMU (before ${NO_IOTHREADS_BEFORE}.0) has drives in threads of their own (iothread), and may end itself, and its guest, when ` +
        'whoever copies from it over NBD is killed; take that risk with --allow-iothreads (option allowIothreads), and never kill the backup: Ctrl-C and SIGTERM are safe',
    );
  }

  async #members(): Promise<Member[]> {
    const { disks } = this.#options;
    const drives = await findDrives(
      this.#client,
      disks.map(({ device }) => device),
    );
    const members = disks.flatMap((disk, index): Member | [] => {
      const drive = drives[index];
      if (drive === undefined) return [];
      const id = `${this.#run}-${index}`;
      const { sync = 'full', bitmap, bitmapMode } = disk;
      return { id, drive, disk, plan: BitmapPlan.of(drive, { sync, bitmap, bitmapMode }, id) };
    });
    for (const { plan } of members) await plan?.rehearse(this.#client);
    return members;
  }

  /** Has the QEMU hold the instant and export it. @returns where its NBD server listens */
  async #hold(members: readonly Member[], leftovers: boolean): Promise<string> {
    const agent = await this.#agent(leftovers);
    try {
      const folder = makePlace(this.#run);
      this.#undo.push(() => removePlace(this.#run));
      for (const member of members) await this.#addScratch(member);
      for (const scratch of this.#scratchFolders(members)) await checkSpace(scratch);
      const place = this.#options.nbd ?? (await this.#startServer(folder, members));
      this.#watch(members);
      const takeInstant = (): Promise<void> => this.#takeInstant(members);
      await (agent === undefined ? takeInstant() : agent.whileFrozen(takeInstant, this.#options.signal));
      this.#undo.push(() => this.#closeDisks());
      for (const { id, plan } of members) await this.#export(id, plan?.frozen);
      return place;
    } finally {
      agent?.close();
    }
  }

  /** The guest agent, if there is to be one. Nothing was made yet where it is not there. */
  async #agent(leftovers: boolean): Promise<GuestAgent | undefined> {
    const { guestAgent: path, guestAgentTimeoutMs = GUEST_AGENT_MS, signal } = this.#options;
    if (path === undefined) return undefined;
    const agent = await GuestAgent.connect(path, guestAgentTimeoutMs, signal);
    try {
      if (!(await agent.isFrozen())) return agent;
      if (!leftovers) {
        throw new StillframeError(
          'ERR_STILLFRAME_GUEST_AGENT',
          'the guest is frozen already; wait for whoever has frozen it, or thaw it with guest-fsfreeze-thaw',
        );
      }
      await agent.thaw();
      this.#warn('the guest was frozen still by a backup that was killed, and was thawed');
      return agent;
    } catch (error) {
      agent.close();
      throw error;
    }
  }

  #scratchOf({ filename }: Drive): string {
    const { scratch } = this.#options;
    if (scratch !== undefined) return scratch;
    // Beside a device there is no disk.
    return ownerOf(filename) === undefined ? tmpdir() : dirname(filename);
  }

  /** The folders for old data, and how much there may be of it. */
  #scratchFolders(members: readonly Member[]): ScratchFolder[] {
    const lengths = new Map<string, number>();
    for (const { drive } of members) {
      const path = this.#scratchOf(drive);
      lengths.set(path, (lengths.get(path) ?? 0) + drive.length);
    }
    return [...lengths].map(([path, length]) => ({ path, length }));
  }

  async #addScratch({ id, drive }: Member): Promise<void> {
    const client = this.#client;
    this.#check();
    const file = join(this.#scratchOf(drive), `.${id}.qcow2`);
    await this.#engine.createImage(file, { format: 'qcow2', length: drive.length });
    try {
      giveTo(drive.filename, file);
      await client.execute('blockdev-add', {
        ...{ driver: 'qcow2', 'node-name': id, discard: 'unmap' },
        file: { driver: 'file', filename: file },
        backing: drive.node,
      });
    } catch (error) {
      throw scratchError(error, file);
    } finally {
      // The QEMU has it open: it goes with the QEMU, whatever becomes of us.
      rmSync(file, { force: true });
    }
    this.#undo.push(() => client.execute('blockdev-del', { 'node-name': id }));
  }

  async #startServer(folder: string, members: readonly Member[]): Promise<string> {
    for (const { drive } of members) giveTo(drive.filename, folder);
    const path = join(folder, 'nbd');
    this.#check();
    try {
      await this.#client.execute('nbd-server-start', { addr: { type: 'unix', data: { path } } });
    } catch (error) {
      if (!(error instanceof StillframeError) || !error.message.includes('already running')) throw error;
      throw new StillframeError(
        error.code,
        `${error.message}; say where it listens with --nbd unix:PATH or --nbd HOST:PORT (option nbd), so that it is used and goes on`,
        { cause: error, qmpClass: error.qmpClass },
      );
    }
    this.#undo.push(() => this.#client.execute('nbd-server-stop'));
    return `unix:${path}`;
  }

  /** The one instant of all drives, and of what their bitmaps say. */
  async #takeInstant(members: readonly Member[]): Promise<void> {
    const client = this.#client;
    this.#check();
    await client.execute('transaction', {
      actions: [
        ...members.flatMap(({ plan }) => plan?.before() ?? []),
        ...members.map(({ id, drive }) => ({
          type: 'blockdev-backup',
          data: { device: drive.node, target: id, sync: 'none', 'job-id': id },
        })),
        ...members.flatMap(({ plan }) => plan?.after() ?? []),
      ],
    });
    for (const { id, drive, plan } of members) {
      for (const name of plan?.made ?? []) {
        this.#undo.push(() => client.execute('block-dirty-bitmap-remove', { node: drive.node, name }));
      }
      this.#undo.push(() => endJob(client, id));
    }
  }

  async #export(id: string, bitmap: string | undefined): Promise<void> {
    this.#check();
    await this.#client.execute('block-export-add', {
      ...{ type: 'nbd', id, 'node-name': id, name: id },
      ...(bitmap === undefined ? {} : { bitmaps: [bitmap] }),
    });
    this.#undo.push(() => removeExport(this.#client, id));
  }

  async #pull(members: readonly Member[], place: string): Promise<BackupResult[]> {
    const pulls = members.map(({ id, disk, plan }) => {
      const { device: _, sync = 'full', bitmap: __, bitmapMode: ___, ...options } = disk;
      const frozen = plan?.frozen;
      const isThere = options.existing === true || isNbdName(options.target);
      return {
        uri: exportAt(place, id, frozen),
        options: {
          ...options,
          sync,
          format: options.format ?? (isThere ? undefined : 'qcow2'),
          signal: this.#options.signal,
          ...(frozen === undefined ? {} : { bitmap: frozen }),
          ...(sync === 'bitmap' ? { bitmapMode: 'never' as const } : {}),
        },
      };
    });
    this.#check();
    const onJobs = (jobs: readonly BackupHandle[]): void => {
      this.#jobs = jobs;
      this.#cancelBroken();
      this.#options.onJobs?.(jobs);
    };
    return await pull(this.#engine, pulls, this.#disks, onJobs, () => this.#checkHeld(members));
  }

  /** Only when the QEMU has taken its exports away: see {@link NO_IOTHREADS_BEFORE}. */
  async #closeDisks(): Promise<void> {
    for (const disk of this.#disks) await disk.close();
  }

  /** What is pulled is of no use any more once the QEMU is gone, or holds the instant no more. */
  #watch(members: readonly Member[]): void {
    const ids = new Set(members.map(({ id }) => id));
    const breakFor = (reason: StillframeError): void => {
      this.#broken ??= reason;
      this.#cancelBroken();
    };
    this.#unwatch.push(
      watchSpace(this.#scratchFolders(members), breakFor),
      this.#client.onEnd((reason) => breakFor(goneError(reason))),
      this.#client.onEvent(({ event, data }: ServerEvent) => {
        if (event !== 'JOB_STATUS_CHANGE' || !ids.has(String(data['id']))) return;
        if (ENDED.has(String(data['status']))) breakFor(notHeldError());
      }),
    );
  }

  #cancelBroken(): void {
    if (this.#broken !== undefined) cancelAll(this.#jobs, this.#broken);
  }

  /** What was pulled is the instant only if the QEMU has held it to the end. */
  async #checkHeld(members: readonly Member[]): Promise<void> {
    const jobs = await list(this.#client, 'query-jobs');
    this.#check();
    for (const { id } of members) {
      const job = jobs.find((one) => one['id'] === id);
      if (job === undefined || ENDED.has(String(job['status'])) || job['error'] !== undefined) {
        throw notHeldError();
      }
    }
  }

  #check(): void {
    this.#options.signal?.throwIfAborted();
    if (this.#broken !== undefined) throw this.#broken;
  }

  /** Why the backup has failed: a connection that broke may be all that is seen of a QEMU that has gone away. */
  async #reason(error: unknown): Promise<unknown> {
    if (!(error instanceof StillframeError) || !error.code.startsWith('ERR_STILLFRAME_NBD_')) return error;
    const gone = await this.#client.execute('query-status').catch((reason: unknown) => reason);
    const isGone = gone instanceof StillframeError && gone.code === 'ERR_STILLFRAME_QMP_CONNECTION';
    return this.#broken ?? (isGone ? goneError(gone) : error);
  }

  /** All targets are complete: what the bitmaps say is what was written since. */
  async #advanceBitmaps(members: readonly Member[]): Promise<void> {
    const steps = members.flatMap(({ plan }) => plan?.done() ?? []);
    const first = steps.flatMap((step) => step.first);
    const second = steps.flatMap((step) => step.second);
    try {
      for (const actions of [first, second]) {
        if (actions.length > 0) await this.#client.execute('transaction', { actions });
      }
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error);
      this.#warn(
        `the backup is complete, but its dirty bitmap could not be brought up to date (${why}); the next increment copies more than it has to, or asks for a new full backup`,
      );
    }
  }

  #warn(message: string): void {
    this.#options.onWarning?.(message);
  }

  /** Takes away what was made, all that can be; what cannot is taken away by the next run. */
  async #takeAway(): Promise<void> {
    for (const one of this.#unwatch) one();
    for (const undo of this.#undo.reverse()) {
      try {
        await undo();
      } catch (error) {
        if (error instanceof StillframeError && error.code === 'ERR_STILLFRAME_QMP_CONNECTION') continue;
        const why = error instanceof Error ? error.message : String(error);
        this.#warn(`something of the backup is left in the QEMU, and is taken away by the next one: ${why}`);
      }
    }
  }
}

/** A QEMU without our rights has to be able to use what we make: as the image does, it belongs to that user then. */
function giveTo(image: string, path: string): void {
  const owner = process.getuid?.() === 0 ? ownerOf(image) : undefined;
  if (owner !== undefined) chownSync(path, owner.uid, owner.gid);
}

/** Who has the file of an image; undefined where it is none, but a device or something else. */
function ownerOf(image: string): Stats | undefined {
  if (!isAbsolute(image)) return undefined;
  const stats = statSync(image, { throwIfNoEntry: false });
  return stats?.isFile() === true ? stats : undefined;
}

function scratchError(error: unknown, file: string): unknown {
  if (!(error instanceof StillframeError) || !/Permission denied|No such file/.test(error.message))
    return error;
  return new StillframeError(
    'ERR_STILLFRAME_PERMISSION',
    `the QEMU cannot open the scratch file '${file}'; choose a folder that it can write to with --scratch (option scratch): ${error.message}`,
    { cause: error, qmpClass: error.qmpClass },
  );
}

function notHeldError(): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_BROKEN_FRAME',
    'the QEMU did not hold the instant until everything was copied: its job has ended; take a new backup',
  );
}

function goneError(reason: StillframeError): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_QMP_CONNECTION',
    `the QEMU has gone away during the backup: ${reason.message}; take a new one when it is there again`,
    { cause: reason },
  );
}

function invalid(message: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
}
