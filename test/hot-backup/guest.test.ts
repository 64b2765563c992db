/** A real guest that writes to its file system while its drive is backed up, and a guest agent in it. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import {
  type BackupJob,
  backupRunning,
  createEngine,
  type Engine,
  type HotBackupDisk,
  QmpClient,
} from '#src/index.js';
import { Guest, hasGuest, proveFiles } from '../support/guest.js';
import { hasPeer, run } from '../support/peers.js';

const LENGTH = 64 << 20;
const present =
  hasGuest() && ['qemu-img', 'qemu-ga', 'e2fsck', 'dumpe2fs', 'debugfs'].every((name) => hasPeer(name));

const folder = mkdtempSync(join(tmpdir(), 'stillframe-hot-guest-'));
const at = (name: string): string => join(folder, name);
let engine: Engine;
let guest: Guest;

beforeAll(async () => {
  if (!present) return;
  run('truncate', ['-s', String(LENGTH), at('base')]);
  run('mkfs.ext4', ['-q', '-F', '-E', 'lazy_itable_init=0', at('base')]);
  run('qemu-img', ['convert', '-O', 'qcow2', at('base'), at('drive')]);
  engine = await createEngine({ workers: 2 });
  guest = new Guest(folder, '', {
    agent: true,
    options: [
      ...['-object', 'iothread,id=io0'],
      ...['-blockdev', `qcow2,node-name=drv0,discard=unmap,file.driver=file,file.filename=${at('drive')}`],
      ...['-device', 'virtio-blk-pci,drive=drv0,id=disk0,iothread=io0'],
      ...['-chardev', `socket,id=ga,path=${at('agent')},server=on,wait=off`, '-device', 'virtio-serial-pci'],
      ...['-device', 'virtserialport,chardev=ga,name=org.qemu.guest_agent.0'],
      ...['-qmp', `unix:${at('qmp')},server=on,wait=off`],
    ],
  });
});
afterAll(async () => {
  if (present) {
    guest.kill();
    await engine.close();
  }
  rmSync(folder, { recursive: true, force: true });
});

/** Takes a backup that goes on until the guest has written more, and proves it. */
async function backup(disk: Omit<HotBackupDisk, 'device'>, frozen: boolean): Promise<void> {
  await guest.writes(4);
  const files = guest.safeFiles();
  let begun = (_: readonly BackupJob[]): void => undefined;
  const beginning = new Promise<readonly BackupJob[]>((resolve) => {
    begun = resolve;
  });
  const backing = backupRunning(engine, {
    qmp: at('qmp'),
    allowIothreads: true,
    disks: [{ device: 'disk0', bitmap: 'daily', speed: 65536, ...disk }],
    ...(frozen ? { guestAgent: at('agent') } : {}),
    onJobs: begun,
  });
  const jobs = await Promise.race([beginning, backing.then(() => [])]);
  await guest.writes(4);
  for (const job of jobs) if (job.status === 'running') job.setSpeed(0);
  const [result] = await backing;
  if (disk.sync === 'incremental') expect(result?.clusters.planned).toBeLessThan(LENGTH / 65536 / 2);
  run('qemu-img', ['check', '-q', disk.target]);
  run('qemu-img', ['convert', '-O', 'raw', disk.target, at('raw')]);
  proveFiles(at('raw'), files, folder, frozen);
}

/** Backups that are given up while requests are under way, or a little earlier or later. */
async function cancelled(): Promise<void> {
  for (let delayMs = 0; delayMs < 24; delayMs += 4) {
    const abort = new AbortController();
    const enough = new Error('enough');
    const backing = backupRunning(engine, {
      qmp: at('qmp'),
      allowIothreads: true,
      disks: [{ device: 'disk0', target: at('cancelled'), force: true }],
      signal: abort.signal,
      onJobs: () => setTimeout(() => abort.abort(enough), delayMs),
    });
    await backing.catch((error: unknown) => expect(error).toBe(enough));
  }
  await guest.writes(2);
}

it.skipIf(!present)(
  'goes on writing while full and incremental backups are taken, with its file system frozen for their instants or not',
  async () => {
    await guest.writes(4);
    await expect(
      backupRunning(engine, { qmp: at('qmp'), disks: [{ device: 'disk0', target: at('full') }] }),
    ).rejects.toMatchObject({ code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE' });
    await cancelled();
    await backup({ target: at('full') }, true);
    await backup({ target: at('next1'), sync: 'incremental', backing: at('full') }, false);
    await backup({ target: at('next2'), sync: 'incremental', backing: at('next1') }, true);
    await backup({ target: at('next3'), sync: 'incremental', backing: at('next2') }, false);
    const monitor = await QmpClient.connect(at('qmp'));
    expect(JSON.stringify(await monitor.execute('query-named-block-nodes', { flat: true }))).not.toContain(
      '"stillframe-',
    );
    expect(await monitor.execute('query-jobs')).toEqual([]);
    monitor.close();
    await guest.writes(4);
    await guest.stop();
    expect(guest.console).toContain('GUEST done');
    expect(guest.console).not.toMatch(/GUEST cannot|I\/O error|EXT4-fs (error|warning)/);
    run('qemu-img', ['check', '-q', at('drive')]);
  },
  300_000,
);
