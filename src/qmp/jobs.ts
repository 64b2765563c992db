import type { BackupHandle } from '../engine/job.js';
import { StillframeError } from '../errors.js';
import type { JobStatus } from '../job/status.js';
import { QmpError, type QmpEvent } from './monitor.js';

/** How long an answer waits for what a job makes of a command, in milliseconds. */
const SETTLE_MS = 250;

/** How a job was made that its own handle does not tell. */
export interface JobOptions {
  readonly autoFinalize: boolean;
  readonly autoDismiss: boolean;
  readonly speed: number;
}

interface Entry {
  readonly handle: BackupHandle;
  readonly options: JobOptions;
  speed: number;
  /** Undefined while the job is not over, and where all went well. */
  error: string | undefined;
}

/** The block jobs that monitors see, with the events they make (QAPI: qapi/job.json, qapi/block-core.json). */
export class Jobs {
  readonly #entries = new Map<string, Entry>();
  readonly #tell: (event: QmpEvent) => void;
  readonly #waiting = new Set<(id: string, status: JobStatus) => void>();

  constructor(tell: (event: QmpEvent) => void) {
    this.#tell = tell;
  }

  /** @throws QmpError where a job has that name */
  checkFree(id: string): void {
    if (this.#entries.has(id)) throw new QmpError(`Job ID '${id}' already in use`);
  }

  /** Takes a job on. Its instant was taken. */
  add(handle: BackupHandle, options: JobOptions): void {
    const entry: Entry = { handle, options, speed: options.speed, error: undefined };
    this.#entries.set(handle.id, entry);
    this.#status(handle.id, 'created');
    handle.on('status', (status) => {
      // The last two come with what became of the job.
      if (status !== 'concluded' && status !== 'null') this.#status(handle.id, status);
    });
    handle.on('pending', () =>
      this.#tell({ event: 'BLOCK_JOB_PENDING', data: { type: 'backup', id: handle.id } }),
    );
    handle.on('io-error', ({ operation, action }) =>
      this.#tell({ event: 'BLOCK_JOB_ERROR', data: { device: handle.id, operation, action } }),
    );
    void this.#conclude(entry);
  }

  async #conclude(entry: Entry): Promise<void> {
    const { handle } = entry;
    const { id } = handle;
    let cancelled = false;
    try {
      cancelled = (await handle.result()).outcome === 'cancelled';
    } catch (error) {
      cancelled = error instanceof StillframeError && error.code === 'ERR_STILLFRAME_JOB_CANCELLED';
      if (!cancelled) entry.error = error instanceof Error ? error.message : String(error);
    }
    const { offset, length } = handle.snapshot();
    const end = { device: id, len: length, offset, speed: entry.speed, type: 'backup' };
    if (cancelled) this.#tell({ event: 'BLOCK_JOB_CANCELLED', data: end });
    else {
      const error = entry.error === undefined ? {} : { error: entry.error };
      this.#tell({ event: 'BLOCK_JOB_COMPLETED', data: { ...end, ...error } });
    }
    this.#status(id, 'concluded');
    if (entry.options.autoDismiss) this.#forget(entry);
  }

  #forget({ handle }: Entry): void {
    handle.dismiss();
    this.#entries.delete(handle.id);
    this.#status(handle.id, 'null');
  }

  #status(id: string, status: JobStatus): void {
    this.#tell({ event: 'JOB_STATUS_CHANGE', data: { status, id } });
    for (const look of this.#waiting) look(id, status);
  }

  /**
   * Gives a job a command, and waits until monitors were told of one of these statuses, so that the events of a job that
   * has nothing else to do come before the answer, as with QEMU. It does not wait for long.
   */
  async settle(job: BackupHandle, command: () => void, ...statuses: readonly JobStatus[]): Promise<void> {
    command();
    await new Promise<void>((resolve) => {
      const end = (): void => {
        clearTimeout(timer);
        this.#waiting.delete(look);
        resolve();
      };
      const look = (id: string, status: JobStatus): void => {
        if (id === job.id && statuses.includes(status)) end();
      };
      const timer = setTimeout(end, SETTLE_MS);
      this.#waiting.add(look);
    });
  }

  /** The last status that monitors are told of a job. */
  lastStatus({ id }: BackupHandle): JobStatus {
    return this.#entries.get(id)?.options.autoDismiss === false ? 'concluded' : 'null';
  }

  /** A job by its name, for `job-*`. */
  job(id: string): BackupHandle {
    return this.#entry(id, () => new QmpError('Job not found')).handle;
  }

  /** A job by its name, for `block-job-*`. */
  blockJob(device: string): BackupHandle {
    return this.#entry(device, () => new QmpError(`Block job '${device}' not found`, 'DeviceNotActive'))
      .handle;
  }

  setSpeed(device: string, bytesPerSecond: number): void {
    const handle = this.blockJob(device);
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

  /** `query-jobs` */
  list(): object[] {
    return [...this.#entries.values()].map(({ handle, error }) => {
      const { status, offset, length } = handle.snapshot();
      return {
        'current-progress': offset,
        status,
        'total-progress': length,
        type: 'backup',
        id: handle.id,
        ...(error === undefined ? {} : { error }),
      };
    });
  }

  /** `query-block-jobs` */
  listBlockJobs(): object[] {
    return [...this.#entries.values()].map(({ handle, options, speed, error }) => {
      const { status, offset, length } = handle.snapshot();
      return {
        'auto-finalize': options.autoFinalize,
        'io-status': 'ok',
        device: handle.id,
        'auto-dismiss': options.autoDismiss,
        busy: status === 'running',
        len: length,
        offset,
        status,
        paused: status === 'paused',
        speed,
        ready: false,
        type: 'backup',
        ...(error === undefined ? {} : { error }),
      };
    });
  }
}
