import type { JobHandle, JobProgress, JobType } from '../engine/job.js';
import { StillframeError } from '../errors.js';
import type { JobStatus } from '../job/status.js';
import { checkVerb } from '../job/status.js';
import { jobErrorText, QmpError } from '../qmp/errors.js';
import type { QmpEvent } from '../qmp/monitor.js';
import type { JsonObject } from '../qmp/types.js';
import { checkSpeed } from './job-arguments.js';

/** How long an answer waits for what a job makes of a command, in milliseconds. */
const SETTLE_MS = 1000;

/** How a job was made that its own handle does not tell. */
export interface JobOptions {
  readonly autoFinalize: boolean;
  readonly autoDismiss: boolean;
  readonly speed: number;
  /** Called when it is over. */
  readonly onEnd?: (() => void | Promise<void>) | undefined;
}

/** A job of QEMU's type `create`: it makes an image and can be dismissed then. */
class CreateJob {
  readonly id: string;
  status: JobStatus = 'created';
  error: string | undefined;

  constructor(id: string) {
    this.id = id;
  }
}

interface Entry {
  readonly id: string;
  readonly handle: JobHandle | undefined;
  readonly create: CreateJob | undefined;
  readonly options: JobOptions;
  speed: number;
  /** The last one that monitors were told of. */
  status: JobStatus;
  ioStatus: 'ok' | 'failed' | 'nospace';
  /** Undefined while the job is not over, and where all went well. */
  error: string | undefined;
}

/** The jobs that monitors see, with the events they make (QAPI: qapi/job.json, qapi/block-core.json). */
export class Jobs {
  readonly #entries = new Map<string, Entry>();
  readonly #tell: (event: QmpEvent) => void;
  readonly #settle: () => void;
  readonly #waiting = new Set<(id: string, status: JobStatus) => void>();
  readonly #ending = new Set<Promise<void>>();

  /** @param settle is called when what a job has used is nobody's any more */
  constructor(tell: (event: QmpEvent) => void, settle: () => void) {
    this.#tell = tell;
    this.#settle = settle;
  }

  /** @throws QmpError where a job has that name */
  checkFree(id: string): void {
    if (!/^[A-Za-z][A-Za-z0-9\-._]*$/.test(id)) throw new QmpError(`Invalid job ID '${id}'`);
    if (this.#entries.has(id)) throw new QmpError(`Job ID '${id}' already in use`);
  }

  /** Takes jobs on that were started at once. Resolves when monitors were told that they run. */
  async add(started: readonly { readonly handle: JobHandle; readonly options: JobOptions }[]): Promise<void> {
    const entries = started.map(({ handle, options }): Entry => {
      const { id } = handle;
      const { speed } = options;
      return {
        ...{ id, handle, create: undefined, options, speed },
        ...{ status: 'created', ioStatus: 'ok', error: undefined },
      };
    });
    for (const entry of entries) {
      this.#entries.set(entry.id, entry);
      this.#status(entry.id, 'created');
    }
    const running = started.map(({ handle }) => firstStatus(handle));
    let open = (): void => undefined;
    const told = new Promise<void>((resolve) => {
      open = resolve;
    });
    for (const entry of entries) this.#follow(entry, told);
    await Promise.all(running);
    // Backups start while the drives are drained: they run, are paused, and run.
    const drained = started.flatMap(({ handle: { id, type } }) => (type === 'backup' ? id : []));
    for (const { id } of entries) {
      this.#status(id, 'running');
      if (drained.includes(id)) this.#status(id, 'paused');
    }
    for (const id of drained) this.#status(id, 'running');
    open();
  }

  /** Tells of what becomes of a job. @param told resolves once monitors know that it runs */
  #follow(entry: Entry, told: Promise<void>): void {
    const { handle, id } = entry;
    if (handle === undefined) return;
    const { type } = handle;
    let early: QmpEvent[] | undefined = [];
    const tell = (event: QmpEvent): void => {
      if (early === undefined) this.#say(event);
      else early.push(event);
    };
    void told.then(() => {
      const events = early ?? [];
      early = undefined;
      // The first one has been told of.
      for (const event of events.slice(1)) this.#say(event);
    });
    handle.on('status', (status) => {
      // The last two come with what became of the job.
      if (status !== 'concluded' && status !== 'null') tell(statusEvent(id, status));
      if (status === 'running' || status === 'ready') entry.ioStatus = 'ok';
    });
    handle.on('ready', (progress) =>
      tell({ event: 'BLOCK_JOB_READY', data: progressOf(entry, handle, progress) }),
    );
    handle.on('pending', () => tell({ event: 'BLOCK_JOB_PENDING', data: { type, id } }));
    handle.on('io-error', ({ operation, action, noSpace }) => {
      if (action === 'stop') entry.ioStatus = noSpace ? 'nospace' : 'failed';
      tell({ event: 'BLOCK_JOB_ERROR', data: { device: id, operation, action } });
    });
    const ending = this.#conclude(entry, handle, told).finally(() => this.#ending.delete(ending));
    this.#ending.add(ending);
  }

  async #conclude(entry: Entry, handle: JobHandle, told: Promise<void>): Promise<void> {
    const { id } = entry;
    let cancelled = false;
    try {
      cancelled = (await handle.result()).outcome === 'cancelled';
    } catch (error) {
      cancelled = error instanceof StillframeError && error.code === 'ERR_STILLFRAME_JOB_CANCELLED';
      if (!cancelled) entry.error = jobErrorText(error);
    }
    await told;
    await entry.options.onEnd?.();
    try {
      this.#settle();
    } catch (error) {
      entry.error ??= jobErrorText(error);
    }
    const end = progressOf(entry, handle);
    if (cancelled) this.#tell({ event: 'BLOCK_JOB_CANCELLED', data: end });
    else {
      const error = entry.error === undefined ? {} : { error: entry.error };
      this.#tell({ event: 'BLOCK_JOB_COMPLETED', data: { ...end, ...error } });
    }
    if (cancelled) entry.error = 'Operation canceled';
    this.#status(id, 'concluded');
    if (entry.options.autoDismiss) this.#forget(entry);
  }

  /** Runs a job of type `create`; monitors were told of its start when this returns, and are of its end. */
  create(id: string, body: () => Promise<void>): void {
    const create = new CreateJob(id);
    const options = { autoFinalize: true, autoDismiss: false, speed: 0 };
    const entry: Entry = {
      id,
      handle: undefined,
      create,
      options,
      speed: 0,
      status: 'created',
      ioStatus: 'ok',
      error: undefined,
    };
    this.#entries.set(id, entry);
    const to = (status: JobStatus): void => {
      create.status = status;
      this.#status(id, status);
    };
    to('created');
    to('running');
    const ending = body()
      .finally(this.#settle)
      .then(
        () => {
          to('waiting');
          to('pending');
        },
        (error: unknown) => {
          entry.error = jobErrorText(error);
          to('aborting');
        },
      )
      .then(() => to('concluded'))
      .finally(() => this.#ending.delete(ending));
    this.#ending.add(ending);
  }

  #forget(entry: Entry): void {
    const { id, handle } = entry;
    checkVerb(id, entry.status, 'dismiss');
    handle?.dismiss();
    this.#entries.delete(id);
    this.#status(id, 'null');
  }

  #status(id: string, status: JobStatus): void {
    this.#say(statusEvent(id, status));
  }

  #say(event: QmpEvent): void {
    this.#tell(event);
    if (event.event !== 'JOB_STATUS_CHANGE') return;
    const { id, status } = event.data as { id: string; status: JobStatus };
    const entry = this.#entries.get(id);
    if (entry !== undefined) entry.status = status;
    for (const look of this.#waiting) look(id, status);
  }

  /**
   * Gives a job a command, and waits until monitors were told of one of these statuses, so that the events of a job that
   * has nothing else to do come before the answer, as with QEMU. It does not wait for long.
   */
  async settle(job: JobHandle, command: () => void, ...statuses: readonly JobStatus[]): Promise<void> {
    command();
    // What becomes of one of a group becomes of all.
    const left = new Set((isEnd(statuses) ? job.group : [job]).map(({ id }) => id));
    await new Promise<void>((resolve) => {
      const end = (): void => {
        clearTimeout(timer);
        this.#waiting.delete(look);
        resolve();
      };
      const look = (id: string, status: JobStatus): void => {
        const last = this.#entries.get(id)?.options.autoDismiss === false ? 'concluded' : 'null';
        if (statuses.includes(status) || (isEnd(statuses) && status === last)) left.delete(id);
        if (left.size === 0) end();
      };
      const timer = setTimeout(end, SETTLE_MS);
      this.#waiting.add(look);
    });
  }

  /** The last status that monitors are told of a job. */
  lastStatus({ id }: JobHandle): JobStatus {
    return this.#entries.get(id)?.options.autoDismiss === false ? 'concluded' : 'null';
  }

  /** A job by its name, for `job-*`. */
  job(id: string, verb: Parameters<typeof checkVerb>[2]): JobHandle {
    const { handle, create } = this.#entry(id, () => new QmpError('Job not found'));
    if (handle !== undefined) return handle;
    if (verb === 'resume') throw new QmpError("Can't resume a job that was not paused");
    checkVerb(id, create?.status ?? 'null', verb);
    throw new QmpError(`Job '${id}' of type 'create' cannot accept command verb '${verb}'`);
  }

  /** A job by its name, for `block-job-*`. */
  blockJob(device: string): JobHandle {
    const missing = (): QmpError => new QmpError(`Block job '${device}' not found`, 'DeviceNotActive');
    const { handle } = this.#entry(device, missing);
    if (handle === undefined) throw missing();
    return handle;
  }

  setSpeed(device: string, bytesPerSecond: number): void {
    const handle = this.blockJob(device);
    checkVerb(device, handle.status, 'set-speed');
    checkSpeed(bytesPerSecond);
    handle.setSpeed(bytesPerSecond);
    const entry = this.#entries.get(device);
    if (entry !== undefined) entry.speed = bytesPerSecond;
  }

  /** Forgets a job that is over. @throws StillframeError ERR_STILLFRAME_JOB_VERB where it is not */
  dismiss(id: string): void {
    this.#forget(this.#entry(id, () => new QmpError('Job not found')));
  }

  #entry(id: string, otherwise: () => QmpError): Entry {
    const entry = this.#entries.get(id);
    if (entry === undefined) throw otherwise();
    return entry;
  }

  /** Tells of jobs that were made and never started, since something else of their transaction failed. */
  neverStarted(ids: readonly string[]): void {
    for (const id of ids) {
      for (const status of ['created', 'aborting', 'concluded', 'null'] as const) this.#status(id, status);
    }
  }

  /** Tells of a job that was made and refused at once. */
  refused(id: string): void {
    for (const status of ['created', 'null'] as const) this.#status(id, status);
  }

  /** Cancels all jobs, waits until they are over, and forgets them. */
  async close(): Promise<void> {
    for (const { handle } of this.#entries.values()) await handle?.stop();
    await Promise.all(this.#ending);
    for (const entry of [...this.#entries.values()]) this.#forget(entry);
  }

  #newestFirst(): Entry[] {
    return [...this.#entries.values()].reverse();
  }

  /** `query-jobs` */
  list(): object[] {
    return this.#newestFirst().map(({ id, handle, create, status, error }) => {
      const { offset, length } = handle?.snapshot() ?? { offset: 0, length: 0 };
      const isOver = status === 'concluded' || status === 'null';
      return {
        'current-progress': create !== undefined && isOver ? 1 : offset,
        status,
        'total-progress': create !== undefined ? 1 : length,
        type: (handle?.type ?? 'create') satisfies JobType,
        id,
        ...(error === undefined ? {} : { error }),
      };
    });
  }

  /** `query-block-jobs` */
  listBlockJobs(): object[] {
    return this.#newestFirst().flatMap(({ id, handle, options, status, speed, error, ioStatus }) => {
      if (handle === undefined) return [];
      const { offset, length } = handle.snapshot();
      return {
        'auto-finalize': options.autoFinalize,
        'io-status': ioStatus,
        device: id,
        'auto-dismiss': options.autoDismiss,
        // Whoever asks finds it between two steps.
        busy: false,
        len: length,
        offset,
        status,
        paused: status === 'paused' || status === 'standby',
        speed,
        ready: status === 'ready' || status === 'standby',
        type: handle.type,
        ...(error === undefined ? {} : { error }),
      };
    });
  }
}

/** How far a job is, as events have it. */
function progressOf(
  { id, speed }: Entry,
  handle: JobHandle,
  { offset, length }: Pick<JobProgress, 'offset' | 'length'> = handle.snapshot(),
): JsonObject {
  return { device: id, len: length, offset, speed, type: handle.type };
}

/** Whether a job is over then. */
function isEnd(statuses: readonly JobStatus[]): boolean {
  return statuses.includes('concluded') || statuses.includes('null');
}

function statusEvent(id: string, status: JobStatus): QmpEvent {
  return { event: 'JOB_STATUS_CHANGE', data: { status, id } };
}

/** Resolves with the first status that a job has of its own. */
function firstStatus(handle: JobHandle): Promise<void> {
  return new Promise((resolve) => handle.once('status', () => resolve()));
}
