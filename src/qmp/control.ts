import type { DiskHandle } from '../engine/disk.js';
import type { FrozenDisk } from '../engine/frozen-disk.js';
import type { BackupHandle } from '../engine/job.js';
import type { NbdServer } from '../engine/nbd-server.js';
import { Jobs } from './jobs.js';
import { type Handlers, QmpError, type QmpEvent } from './monitor.js';
import type { ArgumentsOf } from './schema.js';

/** A disk as monitors know it. */
export interface Device {
  /** Names by which it is called. */
  readonly names: readonly string[];
  readonly disk: DiskHandle;
}

/** What monitors control: the disks of a server, their backups, and the instants it exports. */
export class Control {
  readonly handlers: Handlers;
  readonly #devices: readonly Device[];
  readonly #server: NbdServer;
  readonly #tell: (event: QmpEvent) => void;
  readonly #jobs: Jobs;
  readonly #frozen = new Map<string, FrozenDisk>();

  /**
   * @param tell takes an event to every monitor
   * @param quit ends the program, a little later
   */
  constructor(
    devices: readonly Device[],
    server: NbdServer,
    tell: (event: QmpEvent) => void,
    quit: () => void,
  ) {
    this.#devices = devices;
    this.#server = server;
    this.#tell = tell;
    this.#jobs = new Jobs(tell);
    const jobs = this.#jobs;
    this.handlers = {
      'query-status': () => ({ status: 'running', singlestep: false, running: true }),
      'query-jobs': () => jobs.list(),
      'query-block-jobs': () => jobs.listBlockJobs(),
      'query-block-exports': () => this.#exports(),
      'drive-backup': (given) => this.#backup(given),
      'job-pause': ({ id }) => this.#pause(jobs.job(id)),
      'job-resume': ({ id }) => this.#resume(jobs.job(id)),
      'job-cancel': ({ id }) => this.#cancel(jobs.job(id)),
      'job-finalize': ({ id }) => this.#finalize(jobs.job(id)),
      'job-dismiss': ({ id }) => jobs.dismiss(id),
      'block-job-pause': ({ device }) => this.#pause(jobs.blockJob(device)),
      'block-job-resume': ({ device }) => this.#resume(jobs.blockJob(device)),
      'block-job-cancel': ({ device, force = false }) => this.#cancel(jobs.blockJob(device), force),
      'block-job-set-speed': ({ device, speed }) => jobs.setSpeed(device, speed),
      'block-job-finalize': ({ id }) => this.#finalize(jobs.blockJob(id)),
      'block-job-dismiss': ({ id }) => {
        jobs.blockJob(id);
        jobs.dismiss(id);
      },
      'x-freeze': (given) => this.#freeze(given),
      'x-thaw': (given) => this.#thaw(given),
      quit: () => {
        quit();
      },
    };
  }

  #disk(name: string): DiskHandle {
    const found = this.#devices.find(({ names }) => names.includes(name));
    if (found !== undefined) return found.disk;
    throw new QmpError(`Cannot find device='${name}' nor node-name='${name}'`);
  }

  async #backup(given: ArgumentsOf<'drive-backup'>): Promise<void> {
    const { sync, format, speed = 0, mode = 'absolute-paths' } = given;
    const disk = this.#disk(given.device);
    if (sync === 'incremental' || sync === 'bitmap') {
      throw new QmpError(`sync mode '${sync}' is not supported yet; it takes full, top and none`);
    }
    if (format !== undefined && format !== 'raw' && format !== 'qcow2') {
      throw new QmpError(`Unknown driver '${format}'; a backup is raw or qcow2`);
    }
    if (speed < 0) throw new QmpError("Parameter 'speed' expects a non-negative value");
    const jobId = given['job-id'] ?? given.device;
    this.#jobs.checkFree(jobId);
    const options = {
      autoFinalize: given['auto-finalize'] ?? true,
      autoDismiss: given['auto-dismiss'] ?? true,
      speed,
    };
    const fleece = given['x-fleece'] ?? given['x-scratch'] !== undefined;
    const job = await disk.backup({
      ...options,
      jobId,
      target: given.target,
      sync,
      format,
      existing: mode === 'existing',
      // As QEMU does with what it makes.
      force: true,
      compress: given.compress,
      onSourceError: given['on-source-error'],
      onTargetError: given['on-target-error'],
      onCbwError: given['on-cbw-error'],
      cbwTimeoutMs: (given['x-cbw-timeout'] ?? 0) * 1000,
      fleece: fleece && (given['x-scratch'] ?? true),
      // Until all monitors were told of its end.
      autoDismiss: false,
    });
    await this.#jobs.settle(job, () => this.#jobs.add(job, options), 'running');
  }

  async #pause(job: BackupHandle): Promise<void> {
    await this.#jobs.settle(job, () => job.pause(), 'paused');
  }

  async #resume(job: BackupHandle): Promise<void> {
    await this.#jobs.settle(job, () => job.resume(), 'running');
  }

  async #finalize(job: BackupHandle): Promise<void> {
    await this.#jobs.settle(job, () => job.finalize(), this.#jobs.lastStatus(job));
  }

  async #cancel(job: BackupHandle, force = true): Promise<void> {
    if (job.status === 'paused' && !force) {
      throw new QmpError(`The block job for device '${job.id}' is currently paused`);
    }
    await this.#jobs.settle(job, () => job.cancel(), this.#jobs.lastStatus(job));
  }

  #exports(): object[] {
    return this.#server.exportNames.map((id) => ({ id, type: 'nbd', 'shutting-down': false }));
  }

  async #freeze(given: ArgumentsOf<'x-freeze'>): Promise<void> {
    const disk = this.#disk(given.device);
    const name = given.export;
    const frozen = await disk.freeze({
      scratch: given.scratch,
      onCbwError: given['on-cbw-error'],
      cbwTimeoutMs: (given['cbw-timeout'] ?? 0) * 1000,
    });
    try {
      await this.#server.addExport({ disk: frozen, name });
    } catch (error) {
      await frozen.close();
      throw error;
    }
    this.#frozen.set(name, frozen);
  }

  async #thaw({ export: name }: ArgumentsOf<'x-thaw'>): Promise<void> {
    const frozen = this.#frozen.get(name);
    if (frozen === undefined) throw new QmpError(`no instant is exported as '${name}'`);
    this.#frozen.delete(name);
    await frozen.close();
    this.#tell({ event: 'BLOCK_EXPORT_DELETED', data: { id: name } });
  }
}
