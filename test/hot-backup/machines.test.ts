/** Drives as they are put together in real machines, and machines that go wrong. */
import { chmodSync, existsSync, mkdirSync, readdirSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  type BackupJob,
  backupRunning,
  createEngine,
  type Engine,
  type HotBackupOptions,
} from '#src/index.js';
import { run } from '../support/peers.js';
import { hasProgram, LENGTH, Machine, type MachineOptions } from './machine.js';

const program = 'qemu-system-x86_64';
let engine: Engine;
let machine: Machine;

beforeEach(async () => {
  engine = await createEngine({ workers: 1 });
});
afterEach(async () => {
  await engine.close();
  await machine.remove();
});

async function start(options?: MachineOptions): Promise<void> {
  machine = await Machine.start(program, options);
}

const backup = (device: string, more: Partial<HotBackupOptions> = {}) =>
  backupRunning(engine, {
    qmp: machine.qmp,
    allowIothreads: true,
    disks: [{ device, target: machine.at('target') }],
    ...more,
  });

const failure = (promise: Promise<unknown>): Promise<unknown> =>
  promise.then(
    () => undefined,
    (error) => error,
  );

describe.skipIf(!hasProgram(program))('a machine', { timeout: 180_000 }, () => {
  it.each<[what: string, device: string, drives: (file: string) => string[], format: 'qcow2' | 'raw']>([
    [
      'a drive of -drive',
      'old',
      (file) => [
        '-drive',
        `id=old,if=none,format=qcow2,file=${file}`,
        '-device',
        'virtio-blk-pci,drive=old,id=disk0',
      ],
      'qcow2',
    ],
    [
      'a drive with filters above',
      'disk0',
      (file) => [
        ...['-object', 'throttle-group,id=tg,x-iops-total=100000'],
        ...['-blockdev', `qcow2,node-name=drv0,file.driver=file,file.filename=${file}`],
        ...['-blockdev', 'copy-on-read,node-name=cor,file=drv0'],
        ...['-blockdev', 'throttle,node-name=thr,throttle-group=tg,file=cor'],
        ...['-device', 'virtio-blk-pci,drive=thr,id=disk0'],
      ],
      'qcow2',
    ],
    [
      'a raw drive in a thread of its own',
      'drv0',
      (file) => [
        ...['-object', 'iothread,id=io0'],
        ...['-blockdev', `raw,node-name=drv0,file.driver=file,file.filename=${file}`],
        ...['-device', 'virtio-blk-pci,drive=drv0,id=disk0,iothread=io0'],
      ],
      'raw',
    ],
  ])('has increments of %s', async (_, device, drives, format) => {
    // The file is named before there is a machine with a folder.
    await start({ format, drivesOf: (folder) => drives(`${folder}/drive0`) });
    const disk = { device, bitmap: 'daily' };
    await backup(device, { disks: [{ ...disk, target: machine.at('full') }] });
    if (device !== 'old')
      expect(await machine.bitmap('daily')).toMatchObject({ persistent: format === 'qcow2' });
    await machine.write();
    machine.mark();
    const next = { ...disk, sync: 'incremental' as const, backing: machine.at('full') };
    const [result] = await backup(device, { disks: [{ ...next, target: machine.at('next') }] });
    expect(result?.clusters.planned).toBeLessThan(LENGTH / 65536 / 2);
    expect(machine.momentOf([machine.at('next')])).toBe(0);
    expect(await machine.leftovers()).toEqual([]);
  });

  it('has backups of a read-only drive, and no bitmap of it that the image would keep', async () => {
    await start({
      drivesOf: (folder) => [
        ...['-blockdev', `qcow2,node-name=drv0,read-only=on,file.driver=file,file.filename=${folder}/drive0`],
        ...['-device', 'virtio-blk-pci,drive=drv0,id=disk0'],
      ],
    });
    machine.mark();
    await backup('disk0', { disks: [{ device: 'disk0', target: machine.at('target'), bitmap: 'daily' }] });
    expect(machine.momentOf([machine.at('target')])).toBe(0);
    expect(await machine.bitmap('daily')).toMatchObject({ persistent: false });
    expect(await machine.leftovers()).toEqual([]);
  });

  it('keeps the NBD server that it has', async () => {
    await start();
    const nbd = `unix:${machine.at('server')}`;
    const address = { type: 'unix', data: { path: machine.at('server') } };
    await machine.monitor.execute('nbd-server-start', { addr: address });
    await machine.monitor.execute('block-export-add', {
      type: 'nbd',
      id: 'theirs',
      'node-name': 'drv0',
      name: 'theirs',
    });
    const refused = await failure(backup('disk0'));
    expect(refused).toMatchObject({
      code: 'ERR_STILLFRAME_QMP',
      message: expect.stringContaining('--nbd unix:PATH'),
    });
    expect(await machine.leftovers()).toEqual([]);

    machine.mark();
    await backup('disk0', { nbd });
    expect(machine.momentOf([machine.at('target')])).toBe(0);
    expect(run('nbdinfo', ['--size', `nbd+unix:///theirs?socket=${machine.at('server')}`]).trim()).toBe(
      String(LENGTH),
    );

    // Not even after a kill.
    await machine.killBackup({ nbd, disks: [{ device: 'disk0', target: machine.at('t2'), speed: 1024 }] });
    expect(await machine.leftovers()).not.toEqual([]);
    await backup('disk0', { nbd, disks: [{ device: 'disk0', target: machine.at('t2') }] });
    expect(await machine.leftovers()).toEqual([]);
    expect(run('nbdinfo', ['--size', `nbd+unix:///theirs?socket=${machine.at('server')}`]).trim()).toBe(
      String(LENGTH),
    );
  });

  it('has backups of a drive that is no file', async () => {
    await start({
      drivesOf: () => [
        ...['-blockdev', `null-co,node-name=drv0,read-zeroes=on,size=${LENGTH}`],
        ...['-device', 'virtio-blk-pci,drive=drv0,id=disk0'],
      ],
    });
    await backup('disk0');
    expect(machine.raw(machine.at('target')).equals(Buffer.alloc(LENGTH))).toBe(true);
    // What is only a part of the name of its device is no name.
    for (const device of ['peripheral', 'virtio-backend', 'disk']) {
      await expect(backup(device)).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NOT_FOUND' });
    }
    await expect(backup('')).rejects.toMatchObject({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' });
  });

  it('has an increment of a drive that has grown', async () => {
    await start();
    const disk = { device: 'disk0', bitmap: 'daily' };
    await backup('disk0', { disks: [{ ...disk, target: machine.at('full') }] });
    await machine.monitor.execute('block_resize', { 'node-name': 'drv0', size: 2 * LENGTH });
    machine.content[0] = Buffer.concat([machine.content[0] ?? Buffer.of(), Buffer.alloc(LENGTH)]);
    await machine.write(0, { offset: LENGTH - 4096, length: 8192 });
    await machine.write(0, { offset: 2 * LENGTH - 65536, length: 65536 });
    machine.mark();
    const next = { ...disk, sync: 'incremental' as const, backing: machine.at('full') };
    const [result] = await backup('disk0', { disks: [{ ...next, target: machine.at('next') }] });
    expect(result?.virtualSize).toBe(2 * LENGTH);
    expect(machine.momentOf([machine.at('next')])).toBe(0);
  });

  it('whose bitmap cannot be brought up to date is backed up all the same, and that is told', async () => {
    await start();
    const { monitor, qmp } = machine;
    await monitor.execute('block-dirty-bitmap-add', { node: 'drv0', name: 'daily' });
    const warnings: string[] = [];
    machine.mark();
    await backupRunning(engine, {
      qmp,
      disks: [{ device: 'disk0', target: machine.at('target'), bitmap: 'daily', speed: 4 << 20 }],
      onJobs: () => void monitor.execute('block-dirty-bitmap-remove', { node: 'drv0', name: 'daily' }),
      onWarning: (message) => warnings.push(message),
    });
    expect(warnings).toEqual([expect.stringContaining("Dirty bitmap 'daily' not found")]);
    expect(machine.momentOf([machine.at('target')])).toBe(0);
    expect(await machine.leftovers()).toEqual([]);
  });

  it('is not backed up where one of its drives cannot be, and no target is left', async () => {
    await start({ count: 2 });
    const { qmp, monitor } = machine;
    const disks = [0, 1].map((index) => ({
      device: `disk${index}`,
      target: machine.at(`t${index}`),
      bitmap: 'daily',
    }));
    // Refused in the transaction: somebody else has a job on the second one.
    await monitor.execute('blockdev-add', { driver: 'null-co', 'node-name': 'null', size: LENGTH });
    const job = { device: 'drv1', target: 'null', sync: 'none', 'job-id': 'theirs' };
    await monitor.execute('blockdev-mirror', job);
    const busy = { code: 'ERR_STILLFRAME_QMP', message: expect.stringContaining("Node 'drv1' is busy") };
    await expect(backupRunning(engine, { qmp, disks })).rejects.toMatchObject(busy);
    await monitor.execute('job-cancel', { id: 'theirs' });
    // Failed when the first one is copied.
    const slow = disks.map((disk, index) => ({ ...disk, speed: index === 0 ? 0 : 1024 }));
    const onJobs = ([, second]: readonly BackupJob[]): void => second?.cancel(new Error('enough'));
    await expect(backupRunning(engine, { qmp, disks: slow, onJobs })).rejects.toThrow('enough');
    for (const name of ['t0', 't1', 't0.partial', 't1.partial'])
      expect(existsSync(machine.at(name))).toBe(false);
    expect(await machine.bitmap('daily')).toBeUndefined();
    expect(await machine.leftovers()).toEqual([]);
  });

  it('that went away after its backup was killed leaves no place of that behind', async () => {
    await start();
    const before = process.env['TMPDIR'];
    // Other tests look after the usual place.
    process.env['TMPDIR'] = machine.folder;
    try {
      const places = (): string[] =>
        readdirSync(machine.folder).filter((name) => name.startsWith('stillframe-own-'));
      await machine.killBackup({ disks: [{ device: 'disk0', target: machine.at('target'), speed: 1024 }] });
      expect(places()).toHaveLength(1);
      await machine.crash();
      await machine.launch();
      await backup('disk0');
      expect(places()).toEqual([]);
    } finally {
      if (before === undefined) delete process.env['TMPDIR'];
      else process.env['TMPDIR'] = before;
    }
  });

  it('that goes away fails the backup, and nothing looks finished', async () => {
    await start();
    const { qmp } = machine;
    const disks = [{ device: 'disk0', target: machine.at('target'), speed: 1024 }];
    const error = await failure(backupRunning(engine, { qmp, disks, onJobs: () => void machine.kill() }));
    expect(error).toMatchObject({
      code: 'ERR_STILLFRAME_QMP_CONNECTION',
      message: expect.stringContaining('the QEMU has gone away during the backup'),
    });
    expect(existsSync(machine.at('target'))).toBe(false);
    expect(existsSync(machine.at('target.partial'))).toBe(false);
  });

  it('that gives the instant up fails the backup at once', async () => {
    await start();
    const { qmp, monitor } = machine;
    const disks = [{ device: 'disk0', target: machine.at('target'), speed: 1024 }];
    const onJobs = async (): Promise<void> => {
      const jobs: unknown = await monitor.execute('query-jobs');
      for (const { id } of Array.isArray(jobs) ? jobs : []) await monitor.execute('job-cancel', { id });
    };
    const error = await failure(backupRunning(engine, { qmp, disks, onJobs: () => void onJobs() }));
    expect(error).toMatchObject({ code: 'ERR_STILLFRAME_BROKEN_FRAME' });
    expect(existsSync(machine.at('target'))).toBe(false);
    expect(await machine.leftovers()).toEqual([]);
  });

  it('loses what killed runs have left, whatever state it is in', async () => {
    await start();
    const { monitor } = machine;
    const id = 'stillframe-own-0123456789ab-0';
    run('qemu-img', ['create', '-q', '-f', 'qcow2', machine.at('left'), String(LENGTH)]);
    const file = { driver: 'file', filename: machine.at('left') };
    await monitor.execute('blockdev-add', { driver: 'qcow2', 'node-name': id, file });
    await monitor.execute('block-dirty-bitmap-add', { node: 'drv0', name: `${id}-next` });
    await monitor.execute('block-dirty-bitmap-add', { node: 'drv0', name: 'stillframe-daily' });
    // One that waits to be finalized, one that waits to be dismissed.
    const job = { device: 'drv0', target: id, 'auto-finalize': false, 'auto-dismiss': false };
    await monitor.execute('blockdev-backup', { ...job, 'job-id': id, sync: 'full' });
    await until('pending');
    machine.mark();
    await backup('disk0');
    expect(machine.momentOf([machine.at('target')])).toBe(0);
    expect(await machine.leftovers()).toEqual([]);
    await monitor.execute('blockdev-add', { driver: 'qcow2', 'node-name': id, file });
    await monitor.execute('blockdev-backup', { ...job, 'job-id': id, sync: 'none' });
    await monitor.execute('job-cancel', { id });
    await until('concluded');
    await backup('disk0', { disks: [{ device: 'disk0', target: machine.at('target'), force: true }] });
    expect(await machine.leftovers()).toEqual([]);
    // It only has a name like ours.
    expect(await machine.bitmap('stillframe-daily')).toBeDefined();
  });

  it('is left alone while another backup of it is under way', async () => {
    await start();
    const { qmp } = machine;
    let begun = (_: readonly BackupJob[]): void => undefined;
    const beginning = new Promise<readonly BackupJob[]>((resolve) => {
      begun = resolve;
    });
    const disks = [{ device: 'disk0', target: machine.at('target'), speed: 1024 }];
    const first = backupRunning(engine, { qmp, disks, onJobs: begun });
    const jobs = await beginning;
    // Its other socket is in use by the test.
    machine.monitor.close();
    const second = backup('disk0', {
      qmp: machine.at('other'),
      disks: [{ device: 'disk0', target: machine.at('t2') }],
    });
    await expect(second).rejects.toMatchObject({ code: 'ERR_STILLFRAME_LOCKED' });
    for (const job of jobs) job.setSpeed(0);
    await first;
  });

  it('that cannot use the scratch folder is told so', async () => {
    await start();
    const scratch = machine.at('scratch');
    mkdirSync(scratch);
    chmodSync(scratch, 0o500);
    // Root can write to it all the same.
    const error = await failure(backup('disk0', { scratch }));
    if (process.getuid?.() === 0) expect(error).toBeUndefined();
    else
      expect(error).toMatchObject({
        code: 'ERR_STILLFRAME_PERMISSION',
        message: expect.stringContaining(scratch),
      });
    expect(await machine.leftovers()).toEqual([]);
  });

  async function until(status: string): Promise<void> {
    for (;;) {
      const jobs: unknown = await machine.monitor.execute('query-jobs');
      if (Array.isArray(jobs) && jobs.some((job) => job['status'] === status)) return;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
});
