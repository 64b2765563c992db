/** Backups of drives that somebody has open and writes to, by the QMP socket alone. */
import { existsSync, rmSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type BackupJob, backupRunning, createEngine, type Engine, type HotBackupDisk } from '#src/index.js';
import { hasProgram, LENGTH, Machine, type MachineOptions, PROGRAMS, type Program } from './machine.js';

let engine: Engine;
let machine: Machine;

beforeEach(async () => {
  engine = await createEngine({ workers: 1 });
});
afterEach(async () => {
  await engine.close();
  await machine.remove();
});

async function start(program: Program, options?: MachineOptions): Promise<void> {
  machine = await Machine.start(program, options);
}

async function backup(
  disks: readonly HotBackupDisk[],
  onJobs?: (jobs: readonly BackupJob[]) => void,
  onWarning?: (message: string) => void,
) {
  const { qmp, nbd } = machine;
  return await backupRunning(engine, { qmp, nbd, disks, onJobs, onWarning });
}

/** Takes a backup while somebody writes all the time, and holds it to be the drives at one moment. */
async function backupUnderWrites(disks: readonly HotBackupDisk[], during?: () => Promise<void>) {
  machine.mark();
  let begun = (): void => undefined;
  const beginning = new Promise<void>((resolve) => {
    begun = resolve;
  });
  // Slow until a good part was written to.
  const slow = disks.map((disk) => ({ ...disk, speed: 65536 }));
  let running: readonly BackupJob[] = [];
  const backing = backup(slow, (jobs) => {
    running = jobs;
    begun();
  });
  const writing = machine.writeDuring(backing);
  await Promise.race([beginning, backing]);
  for (let count = 0; count < 20; count++) await machine.write(count % machine.content.length);
  await during?.();
  for (const job of running) if (!['concluded', 'null'].includes(job.status)) job.setSpeed(0);
  const results = await backing;
  await writing;
  expect(machine.momentOf(disks.map(({ target }) => target))).toBeDefined();
  return results;
}

describe.each(PROGRAMS)('a drive that %s has open', { timeout: 180_000 }, (program) => {
  const test = it.skipIf(!hasProgram(program));

  test('is backed up as it was, while it is written to', async () => {
    await start(program);
    const [result] = await backupUnderWrites([{ device: 'drv0', target: machine.at('target') }]);
    expect(result?.virtualSize).toBe(LENGTH);
    expect(await machine.leftovers()).toEqual([]);
  });

  test('is backed up again and again by what a dirty bitmap names, while it is written to', async () => {
    await start(program);
    const disk = { device: 'drv0', bitmap: 'daily' };
    await backupUnderWrites([{ ...disk, target: machine.at('full') }]);
    expect(await machine.bitmap('daily')).toMatchObject({ recording: true, persistent: true, busy: false });
    let backing = machine.at('full');
    for (const name of ['monday', 'tuesday', 'wednesday']) {
      const target = machine.at(name);
      const [result] = await backupUnderWrites([{ ...disk, sync: 'incremental', target, backing }]);
      expect(result?.sync).toBe('incremental');
      backing = target;
    }
    expect(await machine.leftovers()).toEqual([]);
    // Only what was written since is in the next one.
    await backup([{ ...disk, sync: 'incremental', target: machine.at('between'), backing }]);
    machine.mark();
    await machine.write(0, { offset: 65536, length: 4096 });
    const last = { ...disk, sync: 'incremental' as const, target: machine.at('last') };
    const [few] = await backup([{ ...last, backing: machine.at('between') }]);
    expect(few?.clusters.planned).toBe(1);
    expect(machine.momentOf([machine.at('last')])).toBe(1);
  });

  test('is backed up with others at one instant', async () => {
    await start(program, { count: 3 });
    const disks = [0, 1, 2].map((index) => ({
      device: `drv${index}`,
      target: machine.at(`t${index}`),
      bitmap: 'all',
    }));
    await backupUnderWrites(disks);
    let before = disks;
    for (const name of ['monday', 'tuesday']) {
      const next = before.map((disk, index) => ({
        ...disk,
        sync: 'incremental' as const,
        backing: disk.target,
        target: machine.at(`${name}${index}`),
      }));
      await backupUnderWrites(next);
      before = next;
    }
    expect(await machine.leftovers()).toEqual([]);
  });

  test('has everything in the next increment after one that failed, was cancelled or was killed', async () => {
    await start(program);
    const disk = { device: 'drv0', bitmap: 'daily' };
    await backup([{ ...disk, target: machine.at('full') }]);
    await machine.write(0, { offset: 0, length: 65536 });
    const next = { ...disk, sync: 'incremental' as const, backing: machine.at('full') };

    await expect(
      backup([{ ...next, target: machine.at('lost'), speed: 4096 }], ([job]) => job?.cancel()),
    ).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    expect(await machine.leftovers()).toEqual([]);
    await machine.write(0, { offset: 1 << 20, length: 65536 });

    const interrupted = { ...next, target: machine.at('killed'), speed: 4096 };
    await machine.killBackup({ nbd: machine.nbd, disks: [interrupted] });
    expect(existsSync(interrupted.target)).toBe(false);
    expect(await machine.leftovers()).not.toEqual([]);
    await machine.write(0, { offset: 2 << 20, length: 65536 });

    machine.mark();
    const [result] = await backup([{ ...next, target: machine.at('monday') }]);
    expect(result?.clusters.planned).toBe(3);
    expect(machine.momentOf([machine.at('monday')])).toBe(0);
    expect(await machine.leftovers()).toEqual([]);
  });

  test('says what to do where the dirty bitmap is of no use', async () => {
    await start(program);
    const disk = { device: 'drv0', bitmap: 'daily' };
    const increment = () =>
      backup([{ ...disk, sync: 'incremental', target: machine.at('x'), backing: machine.at('full') }]);
    await expect(increment()).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_BITMAP_NOT_FOUND',
      message: expect.stringContaining('take a new full backup with --sync full --bitmap daily'),
    });
    await backup([{ ...disk, target: machine.at('full') }]);
    await machine.monitor.execute('block-dirty-bitmap-disable', { node: 'drv0', name: 'daily' });
    await expect(increment()).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_BITMAP_INCONSISTENT',
      message: expect.stringContaining('is disabled'),
    });
    await backup([{ ...disk, target: machine.at('full'), force: true }]);
    await machine.write();
    await increment();
    // What it has stored is not true any more, and what was recorded since is lost.
    await machine.quit();
    await machine.launch();
    await machine.write();
    await machine.crash();
    await machine.launch();
    await expect(increment()).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_BITMAP_INCONSISTENT',
      message: expect.stringContaining('take a new full backup'),
    });
    expect(await machine.leftovers()).toEqual([]);
    // That is all it takes to begin a new chain.
    await backup([{ ...disk, target: machine.at('full'), force: true }]);
    rmSync(machine.at('x'));
    await machine.write();
    machine.mark();
    await increment();
    expect(machine.momentOf([machine.at('x')])).toBe(0);
  });

  test('keeps its dirty bitmap over an orderly end of the program', async () => {
    await start(program);
    const disk = { device: 'drv0', bitmap: 'daily' };
    await backup([{ ...disk, target: machine.at('full') }]);
    await machine.write();
    await machine.quit();
    await machine.launch();
    await machine.write();
    machine.mark();
    const next = { ...disk, sync: 'incremental' as const, backing: machine.at('full') };
    await backup([{ ...next, target: machine.at('next') }]);
    expect(machine.momentOf([machine.at('next')])).toBe(0);
  });
});
