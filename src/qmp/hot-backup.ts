import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, isAbsolute, join } from 'node:path';
import type { BackupHandle, BackupResult } from '../engine/backup.js';
import type { BackupOptions } from '../engine/disk.js';
import type { Engine } from '../engine/engine.js';
import { StillframeError } from '../errors.js';
import { QmpClient } from './client.js';
import { isObject, type JsonObject } from './types.js';

/** How a drive of a running QEMU is backed up. */
export interface HotBackupOptions
  extends Omit<
    BackupOptions,
    'sync' | 'bitmap' | 'bitmapMode' | 'backing' | 'fleece' | 'targetNode' | 'autoFinalize' | 'onCbwError'
  > {
  /** Path of the QMP socket. */
  readonly qmp: string;
  /** The drive: its device, the id of its device in the guest, or its node. */
  readonly device: string;
  /** Folder for old data, which QEMU has to be able to write to. Default: that of the image. */
  readonly scratch?: string | undefined;
}

/** What we make in a QEMU has a name that begins with it, so that the next run knows what a killed one has left. */
const PREFIX = 'stillframe-';
const POLL_MS = 20;

/**
 * Backs up a drive of a running QEMU, as it is at one instant, while its guest goes on: the QEMU saves old data to a
 * scratch file before it is overwritten (image fleecing), and what the two hold together is pulled over NBD.
 *
 * What is needed in the QEMU (a node, a job, an export, its NBD server) is made here and taken away again, whatever
 * happens; what a run that was killed has left is taken away by the next one.
 *
 * @param onJob is given the job that pulls
 * @throws StillframeError ERR_STILLFRAME_QMP (what the QEMU says), …_NOT_FOUND (the device) and what a backup throws
 */
export async function backupRunning(
  engine: Engine,
  { qmp, device, scratch, ...options }: HotBackupOptions,
  onJob: (job: BackupHandle) => void = () => undefined,
): Promise<BackupResult> {
  const client = await QmpClient.connect(qmp);
  try {
    await takeAwayLeftovers(client);
    const drive = await findDrive(client, device);
    return await new HotBackup(engine, client, drive).run(scratch, options, onJob);
  } finally {
    client.close();
  }
}

interface Drive {
  readonly node: string;
  /** Bytes. */
  readonly length: number;
  readonly filename: string;
}

async function list(client: QmpClient, command: string, given: JsonObject = {}): Promise<JsonObject[]> {
  const found = await client.execute(command, given);
  return Array.isArray(found) ? found.filter(isObject) : [];
}

async function findDrive(client: QmpClient, device: string): Promise<Drive> {
  const devices = await list(client, 'query-block');
  const found = devices.find(
    ({ device: name, qdev }) => name === device || qdev === device || String(qdev).includes(`/${device}/`),
  );
  const inserted = found === undefined ? undefined : found['inserted'];
  const wanted = isObject(inserted) ? inserted['node-name'] : device;
  const nodes = await list(client, 'query-named-block-nodes', { flat: true });
  const node = nodes.find((one) => one['node-name'] === wanted);
  const image = node?.['image'];
  if (node === undefined || !isObject(image)) {
    const names = [...devices.map((one) => one['device']), ...nodes.map((one) => one['node-name'])].filter(
      (name) => typeof name === 'string' && name !== '' && !name.startsWith('#'),
    );
    throw new StillframeError(
      'ERR_STILLFRAME_NOT_FOUND',
      `the QEMU has no drive '${device}'; it has ${names.length === 0 ? 'none' : names.join(', ')}`,
    );
  }
  return {
    node: String(wanted),
    length: Number(image['virtual-size']),
    filename: String(image['filename']),
  };
}

/** Takes away what has one of our names: nobody else is at work here now, or it would be another QEMU. */
async function takeAwayLeftovers(client: QmpClient): Promise<void> {
  const ours = (name: unknown): name is string => typeof name === 'string' && name.startsWith(PREFIX);
  const exports = (await list(client, 'query-block-exports')).flatMap(({ id }) => (ours(id) ? id : []));
  for (const id of exports) await removeExport(client, id);
  const jobs = (await list(client, 'query-block-jobs')).flatMap(({ device }) => (ours(device) ? device : []));
  for (const id of jobs) await endJob(client, id);
  const nodes = await list(client, 'query-named-block-nodes', { flat: true });
  for (const { 'node-name': name } of nodes) {
    if (ours(name)) await client.execute('blockdev-del', { 'node-name': name });
  }
  if (exports.length > 0) await client.execute('nbd-server-stop');
}

async function removeExport(client: QmpClient, id: string): Promise<void> {
  await client.execute('block-export-del', { id, mode: 'hard' });
  while ((await list(client, 'query-block-exports')).some((one) => one['id'] === id)) await pause();
}

async function endJob(client: QmpClient, id: string): Promise<void> {
  await client.execute('block-job-cancel', { device: id, force: true });
  while ((await list(client, 'query-block-jobs')).some(({ device }) => device === id)) await pause();
}

function pause(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, POLL_MS));
}

/** One backup. What was made is taken away in the opposite order. */
class HotBackup {
  readonly #engine: Engine;
  readonly #client: QmpClient;
  readonly #drive: Drive;
  readonly #id = `${PREFIX}${randomBytes(6).toString('hex')}`;
  readonly #undo: (() => Promise<unknown> | unknown)[] = [];

  constructor(engine: Engine, client: QmpClient, drive: Drive) {
    this.#engine = engine;
    this.#client = client;
    this.#drive = drive;
  }

  async run(
    scratch: string | undefined,
    options: Omit<HotBackupOptions, 'qmp' | 'device' | 'scratch'>,
    onJob: (job: BackupHandle) => void,
  ): Promise<BackupResult> {
    try {
      const socket = await this.#export(scratch);
      return await this.#pull(socket, options, onJob);
    } finally {
      await this.#takeAway();
    }
  }

  /** Has the QEMU hold the instant and export it. @returns path of the socket */
  async #export(scratch: string | undefined): Promise<string> {
    const client = this.#client;
    const id = this.#id;
    const { node, length, filename } = this.#drive;
    const folder = scratch ?? (isAbsolute(filename) ? dirname(filename) : tmpdir());
    const file = join(folder, `.${id}.qcow2`);
    await this.#engine.createImage(file, { format: 'qcow2', length });
    try {
      await client.execute('blockdev-add', {
        ...{ driver: 'qcow2', 'node-name': id, discard: 'unmap' },
        file: { driver: 'file', filename: file },
        backing: node,
      });
    } finally {
      // The QEMU has it open: it goes with the QEMU, whatever becomes of us.
      rmSync(file, { force: true });
    }
    this.#undo.push(() => client.execute('blockdev-del', { 'node-name': id }));
    const place = mkdtempSync(join(tmpdir(), PREFIX));
    this.#undo.push(() => rmSync(place, { recursive: true, force: true }));
    const path = join(place, 'nbd');
    await client.execute('nbd-server-start', { addr: { type: 'unix', data: { path } } });
    this.#undo.push(() => client.execute('nbd-server-stop'));
    await client.execute('blockdev-backup', { device: node, target: id, sync: 'none', 'job-id': id });
    this.#undo.push(() => endJob(client, id));
    await client.execute('block-export-add', { type: 'nbd', id, 'node-name': id, name: id });
    this.#undo.push(() => removeExport(client, id));
    return path;
  }

  async #pull(
    socket: string,
    options: Omit<HotBackupOptions, 'qmp' | 'device' | 'scratch'>,
    onJob: (job: BackupHandle) => void,
  ): Promise<BackupResult> {
    const uri = `nbd+unix:///${this.#id}?socket=${encodeURIComponent(socket)}`;
    const disk = await this.#engine.openDisk(uri, { format: 'raw', readOnly: true });
    try {
      const format = options.format ?? 'qcow2';
      const job = await disk.backup({ ...options, format, sync: 'full', autoFinalize: false });
      const pending = new Promise<void>((resolve) => job.once('pending', resolve));
      onJob(job);
      const over = await Promise.race([
        pending.then(() => false),
        job.ended.then(
          () => true,
          () => true,
        ),
      ]);
      if (!over) {
        await this.#checkHeld(job);
        job.finalize();
      }
      return await job.result();
    } finally {
      await disk.close();
    }
  }

  /** What was pulled is the instant only if the QEMU has held it to the end. */
  async #checkHeld(job: BackupHandle): Promise<void> {
    const jobs = await list(this.#client, 'query-block-jobs');
    const held = jobs.find(({ device }) => device === this.#id);
    if (held?.['status'] === 'running' && held['error'] === undefined) return;
    const reason = new StillframeError(
      'ERR_STILLFRAME_BROKEN_FRAME',
      'the QEMU did not hold the instant until everything was copied: its job has ended; take a new backup',
    );
    job.cancel(reason);
    await job.ended;
    throw reason;
  }

  /** Takes away what was made, all that can be; the first error is thrown then. */
  async #takeAway(): Promise<void> {
    let failure: { readonly error: unknown } | undefined;
    for (const undo of this.#undo.reverse()) {
      try {
        await undo();
      } catch (error) {
        failure ??= { error };
      }
    }
    if (failure !== undefined) throw failure.error;
  }
}
