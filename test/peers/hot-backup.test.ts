/** Backups of drives that a QEMU has open and somebody writes to, by its QMP socket alone. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type BackupJob, backupRunning, createEngine, type Engine, QmpClient } from '#src/index.js';
import { stillframe } from '../support/cli.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const LENGTH = 32 << 20;
let folder: string;
let engine: Engine;
let qemu: ChildProcess | undefined;
let ended: Promise<unknown>;
const at = (name: string): string => join(folder, name);

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-hot-'));
  engine = await createEngine({ workers: 1 });
  run('qemu-img', ['create', '-q', '-f', 'qcow2', at('drive'), String(LENGTH)]);
  const random = new Random(3);
  const writes = Array.from({ length: 40 }, () => [
    '-c',
    `write -P ${random.between(1, 250)} ${random.between(0, 500) * 65536} 64k`,
  ]);
  run('qemu-io', [...writes.flat(), at('drive')]);
  run('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', at('drive'), at('before')]);
});
afterEach(async () => {
  await engine.close();
  qemu?.kill('SIGKILL');
  await ended;
  qemu = undefined;
  rmSync(folder, { recursive: true, force: true });
});

const node = (): string => `qcow2,node-name=drv0,file.driver=file,file.filename=${at('drive')}`;

async function start(command: string, options: readonly string[]): Promise<void> {
  qemu = spawn(command, options, { stdio: ['ignore', 'ignore', 'inherit'] });
  const child = qemu;
  ended = new Promise((resolve) => child.once('exit', resolve));
  while (!existsSync(at('qmp'))) await new Promise((resolve) => setTimeout(resolve, 10));
}

const startDaemon = (): Promise<void> =>
  start('qemu-storage-daemon', [
    ...['--blockdev', node()],
    ...['--chardev', `socket,id=c,path=${at('qmp')},server=on,wait=off`, '--monitor', 'c'],
  ]);

/** A machine without a guest; writes are made by its monitor. */
const startMachine = (): Promise<void> =>
  start('qemu-system-x86_64', [
    ...['-machine', 'q35,accel=tcg', '-nodefaults', '-display', 'none', '-S'],
    ...['-blockdev', node(), '-device', 'virtio-blk-pci,drive=drv0,id=disk0'],
    ...['-qmp', `unix:${at('qmp')},server=on,wait=off`, '-qmp', `unix:${at('other')},server=on,wait=off`],
  ]);

const expectInstant = (target: string): unknown =>
  run('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', at('before'), target]);

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('a drive of a running QEMU', () => {
  it.skipIf(!hasPeer('qemu-system-x86_64'))('is backed up as it was, while it is written to', async () => {
    await startMachine();
    const monitor = await QmpClient.connect(at('other'));
    try {
      let job: BackupJob | undefined;
      const backing = backupRunning(
        engine,
        { qmp: at('qmp'), device: 'disk0', target: at('target'), speed: 4 << 20 },
        (started) => {
          job = started;
        },
      );
      while (job === undefined) await new Promise((resolve) => setTimeout(resolve, 5));
      for (let offset = 0; offset < 32; offset += 2) {
        await monitor.execute('human-monitor-command', {
          'command-line': `qemu-io drv0 "write -P 255 ${offset}M 1M"`,
        });
      }
      job.setSpeed(0);
      const result = await backing;
      expect(result.virtualSize).toBe(LENGTH);
      expectInstant(at('target'));
      // Nothing of ours is left in it, and nothing beside the drive.
      expect(await monitor.execute('query-block-jobs')).toEqual([]);
      expect(await monitor.execute('query-block-exports')).toEqual([]);
      expect(JSON.stringify(await monitor.execute('query-named-block-nodes'))).not.toContain(
        '"node-name":"stillframe-',
      );
      expect(readdirSync(folder).filter((name) => name.includes('stillframe-'))).toEqual([]);
    } finally {
      monitor.close();
    }
  });

  it.skipIf(!hasPeer('qemu-storage-daemon'))('is backed up by the command line', async () => {
    await startDaemon();
    const { status, stderr, stdout } = stillframe([
      ...[
        'backup',
        '--qmp',
        at('qmp'),
        '--device',
        'drv0',
        at('target'),
        '--compress',
        'zstd',
        '--output',
        'json',
      ],
    ]);
    expect(status, stderr).toBe(0);
    expect(JSON.parse(stdout.trim().split('\n').at(-1) ?? '')).toMatchObject({
      type: 'result',
      sync: 'full',
    });
    expectInstant(at('target'));
  });

  it.skipIf(!hasPeer('qemu-storage-daemon'))('is free again after a run that was killed', async () => {
    await startDaemon();
    const script = `
      import { backupRunning, createEngine } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url).href)};
      const [qmp, target] = process.argv.slice(1);
      await backupRunning(await createEngine(), { qmp, device: 'drv0', target, speed: 65536 }, () => console.log('begun'));`;
    const child = spawn(process.execPath, ['--input-type=module', '-e', script, at('qmp'), at('killed')]);
    await new Promise((resolve) => child.stdout.once('data', resolve));
    child.kill('SIGKILL');
    await new Promise((resolve) => child.once('exit', resolve));
    expect(existsSync(at('killed'))).toBe(false);
    await backupRunning(engine, { qmp: at('qmp'), device: 'drv0', target: at('target') });
    expectInstant(at('target'));
    // Two in a row, and then it can be closed.
    await backupRunning(engine, { qmp: at('qmp'), device: 'drv0', target: at('target'), force: true });
    const monitor = await QmpClient.connect(at('qmp'));
    await monitor.execute('blockdev-del', { 'node-name': 'drv0' });
    monitor.close();
  });

  it.skipIf(!hasPeer('qemu-storage-daemon'))(
    'leaves nothing behind where it is cancelled or refused',
    async () => {
      await startDaemon();
      const qmp = at('qmp');
      await expect(backupRunning(engine, { qmp, device: 'nope', target: at('t') })).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_NOT_FOUND',
        message: expect.stringContaining('it has drv0'),
      });
      await expect(
        backupRunning(engine, { qmp: at('nothing'), device: 'x', target: at('t') }),
      ).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_NOT_FOUND',
      });
      await expect(
        backupRunning(engine, { qmp, device: 'drv0', target: at('t'), speed: 65536 }, (job) => job.cancel()),
      ).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
      expect(existsSync(at('t'))).toBe(false);
      const monitor = await QmpClient.connect(qmp);
      expect(await monitor.execute('query-named-block-nodes', { flat: true })).toHaveLength(2);
      await expect(monitor.execute('nbd-server-stop')).rejects.toMatchObject({ code: 'ERR_STILLFRAME_QMP' });
      monitor.close();
    },
  );
});
