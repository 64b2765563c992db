/** What people do with the daemon: backups of drives that are written to over NBD, by QMP alone. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CLI } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';
import { QmpClient } from '../support/qmp.js';

const MiB = 1 << 20;
const LENGTH = 8 * MiB;
const content = new Random(9).bytes(LENGTH);

let folder: string;
const at = (name: string): string => join(folder, name);
const uri = (name: string): string => `nbd+unix:///${name}?socket=${at('nbd')}`;
let daemon: ChildProcess | undefined;
let ended: Promise<number | null>;
let client: QmpClient;
/** What the daemon has written to its stdout. */
let said = '';

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-daemon-'));
  writeFileSync(at('content'), content);
});
afterEach(async () => {
  client?.close();
  daemon?.kill('SIGTERM');
  await ended;
  daemon = undefined;
  rmSync(folder, { recursive: true, force: true });
});
afterAll(() => undefined);

const MONITOR = ['--chardev', 'socket,id=c,path=qmp,server=on,wait=off', '--monitor', 'chardev=c'];

async function start(...options: readonly string[]): Promise<void> {
  daemon = spawn(process.execPath, [CLI, 'daemon', ...options, ...MONITOR], {
    cwd: folder,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  const child = daemon;
  said = '';
  child.stdout?.on('data', (data) => {
    said += String(data);
  });
  ended = new Promise((resolve) => child.once('exit', resolve));
  client = await QmpClient.connect(at('qmp'));
  await client.execute('qmp_capabilities');
}

/** A drive under a name of its own, exported as `drive`. */
async function startWithDrive(format: 'raw' | 'qcow2', ...more: readonly string[]): Promise<void> {
  if (format === 'raw') writeFileSync(at('drive'), content);
  else run('qemu-img', ['convert', '-f', 'raw', '-O', format, at('content'), at('drive')]);
  await start(
    ...[
      '--blockdev',
      `${format},node-name=drv0,x-device=drive0,discard=unmap,file.driver=file,file.filename=drive`,
    ],
    ...['--nbd-server', 'addr.type=unix,addr.path=nbd'],
    ...['--export', 'nbd,id=live,node-name=drv0,name=drive,writable=on'],
    ...more,
  );
}

const write = (pattern: number, offset: number, length: number): string =>
  run('qemu-io', ['-f', 'raw', '-c', `write -P ${pattern} ${offset} ${length}`, '-c', 'flush', uri('drive')]);

const concluded = (id: string): Promise<unknown> => client.event('JOB_STATUS_CHANGE', { id, status: 'null' });

function expectImage(path: string, format: string, expected: Uint8Array): void {
  run('qemu-img', ['convert', '-U', '-f', format, '-O', 'raw', path, at('image')]);
  expect(firstDifference(readFileSync(at('image')), expected)).toBe(-1);
}

const image = (name: string, format: 'raw' | 'qcow2' = 'qcow2'): Record<string, unknown> => ({
  driver: format,
  'node-name': name,
  file: { driver: 'file', filename: name },
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io') || !hasPeer('nbdcopy'))(
  'a drive that is written to',
  () => {
    it.each(['raw', 'qcow2'] as const)('has full and incremental backups of its %s image', async (format) => {
      await startWithDrive(format);
      const expected = [Buffer.from(content)];
      for (const index of [0, 1, 2]) {
        const name = `backup${index}`;
        const backing = index === 0 ? [] : ['-b', at(`backup${index - 1}`), '-F', 'qcow2'];
        run('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, at(name), String(LENGTH)]);
        await client.execute('blockdev-add', { ...image(name), backing: null });
        const sync = index === 0 ? { sync: 'full' } : { sync: 'incremental', bitmap: 'b' };
        await client.execute('transaction', {
          actions: [
            ...(index === 0
              ? [
                  {
                    type: 'block-dirty-bitmap-add',
                    data: { node: 'drv0', name: 'b', persistent: format === 'qcow2' },
                  },
                ]
              : []),
            {
              type: 'blockdev-backup',
              data: { device: 'drive0', target: name, 'job-id': name, ...sync, speed: MiB },
            },
          ],
        });
        // The guest goes on meanwhile.
        write(index + 1, index * 2 * MiB + 4096, MiB);
        await client.execute('block-job-set-speed', { device: name, speed: 0 });
        await concluded(name);
        await client.execute('blockdev-del', { 'node-name': name });
        const next = Buffer.from(expected[index] ?? []);
        expected.push(next.fill(index + 1, index * 2 * MiB + 4096, index * 2 * MiB + 4096 + MiB));
      }
      for (const index of [0, 1, 2])
        expectImage(at(`backup${index}`), 'qcow2', expected[index] ?? Buffer.of());
      await client.execute('quit');
      expect(await ended).toBe(0);
      expectImage(at('drive'), format, expected[3] ?? Buffer.of());
      if (format !== 'qcow2') return;
      run('qemu-img', ['check', '-q', at('drive')]);
      const info = JSON.parse(run('qemu-img', ['info', '--output', 'json', at('drive')]));
      expect(info['format-specific'].data.bitmaps).toEqual([
        { flags: ['auto'], name: 'b', granularity: 65536 },
      ]);
    });

    it('is read as it was by image fleecing, and backed up from there', async () => {
      await startWithDrive('qcow2');
      for (const name of ['scratch', 'target'])
        run('qemu-img', ['create', '-q', '-f', 'raw', at(name), String(LENGTH)]);
      await client.execute('blockdev-add', image('scratch', 'raw'));
      await client.execute('blockdev-add', image('target', 'raw'));
      await client.execute('blockdev-add', {
        ...{ driver: 'copy-before-write', 'node-name': 'cbw', file: 'drv0', target: 'scratch' },
      });
      await client.execute('blockdev-add', { driver: 'snapshot-access', 'node-name': 'still', file: 'cbw' });
      await client.execute('block-export-add', {
        type: 'nbd',
        id: 'still',
        'node-name': 'still',
        name: 'still',
      });
      write(7, MiB, MiB);
      await client.execute('blockdev-backup', {
        device: 'still',
        target: 'target',
        sync: 'full',
        'job-id': 'job',
      });
      write(8, 3 * MiB, MiB);
      await concluded('job');
      await tool('nbdcopy', uri('still'), at('copy'));
      expect(firstDifference(readFileSync(at('copy')), content)).toBe(-1);
      await expect(client.execute('blockdev-del', { 'node-name': 'cbw' })).rejects.toThrow('in use');
      await client.execute('block-export-del', { id: 'still' });
      for (const name of ['still', 'cbw', 'scratch', 'target']) {
        await client.execute('blockdev-del', { 'node-name': name });
      }
      expectImage(at('target'), 'raw', content);
      write(9, 0, MiB);
    });

    it('is read as it was from an overlay that its old data is saved to', async () => {
      await startWithDrive('qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', at('overlay'), String(LENGTH)]);
      await client.execute('blockdev-add', { ...image('overlay'), backing: 'drv0' });
      await client.execute('blockdev-backup', {
        device: 'drive0',
        target: 'overlay',
        sync: 'none',
        'job-id': 'job',
      });
      await client.execute('block-export-add', {
        type: 'nbd',
        id: 'still',
        'node-name': 'overlay',
        name: 'still',
      });
      let stop = false;
      const writing = (async () => {
        for (let round = 0; !stop; round++) {
          const steps = Array.from({ length: 50 }, (_, step) => [
            '-c',
            `write -P ${round + 1} ${((step * 7 + round) % 127) * 65536 + 512} 64k`,
          ]);
          await tool('qemu-io', '-f', 'raw', ...steps.flat(), uri('drive'));
        }
      })();
      for (let pass = 0; pass < 4; pass++) {
        await tool('nbdcopy', uri('still'), at('copy'));
        expect(firstDifference(readFileSync(at('copy')), content)).toBe(-1);
      }
      stop = true;
      await writing;
      await client.execute('block-export-del', { id: 'still', mode: 'hard' });
      await client.execute('job-cancel', { id: 'job' });
      await concluded('job');
      await client.execute('blockdev-del', { 'node-name': 'overlay' });
    });

    it('saves only what a bitmap names, where that is wanted', async () => {
      await startWithDrive('qcow2');
      await client.execute('block-dirty-bitmap-add', { node: 'drv0', name: 'b' });
      write(3, 2 * MiB, 65536);
      run('qemu-img', ['create', '-q', '-f', 'raw', at('scratch'), String(LENGTH)]);
      await client.execute('blockdev-add', image('scratch', 'raw'));
      await client.execute('blockdev-add', {
        ...{ driver: 'copy-before-write', 'node-name': 'cbw', file: 'drv0', target: 'scratch' },
        bitmap: { node: 'drv0', name: 'b' },
      });
      write(4, 0, 4 * MiB);
      const saved = readFileSync(at('scratch'));
      expect(saved.subarray(0, 2 * MiB).every((byte) => byte === 0)).toBe(true);
      expect(saved.subarray(2 * MiB, 2 * MiB + 65536).every((byte) => byte === 3)).toBe(true);
    });

    it('is written to past a filter, and its bitmaps and backups see that', async () => {
      await startWithDrive('raw', '--object', 'throttle-group,id=g,limits.iops-total=1000');
      await client.execute('blockdev-add', {
        driver: 'throttle',
        'node-name': 'slow',
        'throttle-group': 'g',
        file: 'drv0',
      });
      await client.execute('block-export-del', { id: 'live' });
      await client.execute('block-export-add', {
        ...{ type: 'nbd', id: 'slow', 'node-name': 'slow', name: 'drive', writable: true },
      });
      await client.execute('block-dirty-bitmap-add', { node: 'drv0', name: 'b' });
      await client.execute('drive-backup', {
        ...{ device: 'drive0', target: 'target', sync: 'full', format: 'raw', 'job-id': 'job', speed: MiB },
      });
      write(5, 6 * MiB, MiB);
      await client.execute('block-job-set-speed', { device: 'job', speed: 0 });
      await concluded('job');
      expect(firstDifference(readFileSync(at('target')), content)).toBe(-1);
      const nodes = (await client.execute('query-named-block-nodes')) as { 'node-name': string }[];
      expect(nodes.find((node) => node['node-name'] === 'drv0')).toMatchObject({
        'dirty-bitmaps': [{ name: 'b', count: MiB }],
      });
      // A filter keeps nobody from writing past it, as with QEMU; that is seen all the same.
      await client.execute('block-export-add', {
        ...{ type: 'nbd', id: 'past', 'node-name': 'drv0', name: 'past', writable: true },
      });
      run('qemu-io', [...['-f', 'raw', '-c', `write 0 ${MiB}`], `nbd+unix:///past?socket=${at('nbd')}`]);
      const after = (await client.execute('query-named-block-nodes')) as { 'node-name': string }[];
      expect(after.find((node) => node['node-name'] === 'drv0')).toMatchObject({
        'dirty-bitmaps': [{ name: 'b', count: 2 * MiB }],
      });
    });

    it('is backed up into an export of another server', async () => {
      run('qemu-img', ['create', '-q', '-f', 'qcow2', at('remote'), String(LENGTH)]);
      await startWithDrive(
        'raw',
        ...['--blockdev', 'qcow2,node-name=remote,file.driver=file,file.filename=remote'],
        ...['--export', 'nbd,id=remote,node-name=remote,name=remote,writable=on'],
      );
      await client.execute('blockdev-add', {
        ...{
          driver: 'nbd',
          'node-name': 'there',
          export: 'remote',
          server: { type: 'unix', path: at('nbd') },
        },
      });
      await client.execute('blockdev-backup', {
        device: 'drive0',
        target: 'there',
        sync: 'full',
        'job-id': 'job',
      });
      write(6, 0, MiB);
      await concluded('job');
      expectImage(at('remote'), 'qcow2', content);
    });

    it('can be poked from the monitor', async () => {
      await startWithDrive('raw');
      const poke = (command: string): Promise<unknown> =>
        client.execute('human-monitor-command', { 'command-line': `qemu-io drv0 "${command}"` });
      await client.execute('block-dirty-bitmap-add', { node: 'drv0', name: 'b' });
      expect(await poke('write -P 0x11 1M 64k')).toBe('');
      await poke('write -z 2M 65536');
      await poke('read -P 17 1M 64k');
      await poke('read -P 18 1M 64k');
      await poke('aio_write -P 300 0 1');
      await poke('write 8M 1');
      await poke('nonsense 0 1');
      await client.execute('human-monitor-command', { 'command-line': 'qemu-io -d drive0 flush' });
      const nowhere = { 'command-line': 'qemu-io nowhere flush' };
      expect(await client.execute('human-monitor-command', nowhere)).toMatch(
        /^Error: Cannot find device='' nor node-name='nowhere'/,
      );
      expect(await client.execute('human-monitor-command', { 'command-line': 'info' })).toMatch(
        /unknown command/,
      );
      expect(
        said
          .replaceAll(/\(.*\)/g, '(…)')
          .replaceAll(/\d+\.\d+ sec/g, '00')
          .split('\n'),
      ).toEqual([
        'wrote 65536/65536 bytes at offset 1048576',
        '64 KiB, 1 ops; 00 (…)',
        'wrote 65536/65536 bytes at offset 2097152',
        '64 KiB, 1 ops; 00 (…)',
        'read 65536/65536 bytes at offset 1048576',
        '64 KiB, 1 ops; 00 (…)',
        'Pattern verification failed at offset 1048576, 65536 bytes',
        'read 65536/65536 bytes at offset 1048576',
        '64 KiB, 1 ops; 00 (…)',
        '300 is not a valid pattern byte',
        'write failed: Input/output error',
        '',
      ]);
      const nodes = (await client.execute('query-named-block-nodes')) as { 'node-name': string }[];
      expect(nodes.find((node) => node['node-name'] === 'drv0')).toMatchObject({
        'dirty-bitmaps': [{ name: 'b', count: 2 * 65536 }],
      });
    });

    it('keeps its bitmap for an export that shows it', async () => {
      await startWithDrive('raw', '--blockdev', 'null-co,node-name=nothing,size=8M');
      await client.execute('block-dirty-bitmap-add', { node: 'drv0', name: 'b' });
      write(1, 0, 65536);
      const shown = { type: 'nbd', id: 'shown', 'node-name': 'drv0', name: 'shown', bitmaps: ['b'] };
      await expect(client.execute('block-export-add', shown)).rejects.toThrow(
        "Enabled bitmap 'b' incompatible with readonly export",
      );
      await client.execute('block-dirty-bitmap-disable', { node: 'drv0', name: 'b' });
      await client.execute('block-export-add', shown);
      const map = await tool('nbdinfo', '--map=qemu:dirty-bitmap:b', uri('shown'));
      expect(map.trim().split('\n')[0]?.trim().split(/\s+/).slice(0, 3)).toEqual(['0', '65536', '1']);
      const busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
      await expect(client.execute('block-dirty-bitmap-remove', { node: 'drv0', name: 'b' })).rejects.toThrow(
        busy,
      );
      await client.execute('block-export-del', { id: 'shown', mode: 'hard' });
      await client.execute('block-dirty-bitmap-remove', { node: 'drv0', name: 'b' });
    });
  },
);

describe('the command line', () => {
  const daemonOf = (...options: readonly string[]) =>
    spawnSync(process.execPath, [CLI, 'daemon', ...options], {
      cwd: folder,
      encoding: 'utf8',
      timeout: 20_000,
    });

  it('takes drives as QEMU has them, which jobs know by their ids', async () => {
    writeFileSync(at('drive'), content);
    await start('--drive', 'file=drive,format=raw,if=none,id=hd0,node-name=n0,cache=none,read-only=on');
    await client.execute('drive-backup', { device: 'hd0', target: 'target', sync: 'full', format: 'raw' });
    await concluded('hd0');
    expect(firstDifference(readFileSync(at('target')), content)).toBe(-1);
    expect(await client.execute('query-block')).toMatchObject([
      { device: 'hd0', inserted: { 'node-name': 'n0', ro: true, cache: { direct: true } } },
    ]);
  });

  it('goes on in the background, and says where it is', async () => {
    writeFileSync(at('drive'), content);
    const drive = JSON.stringify({
      driver: 'raw',
      'node-name': 'd',
      file: { driver: 'file', filename: 'drive' },
    });
    const { status, stderr } = daemonOf('--blockdev', drive, ...MONITOR, '--daemonize', '--pidfile', 'pid');
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    const pid = Number(readFileSync(at('pid'), 'utf8'));
    client = await QmpClient.connect(at('qmp'));
    await client.execute('qmp_capabilities');
    expect(await client.execute('query-named-block-nodes')).toHaveLength(2);
    process.kill(pid, 'SIGTERM');
    while (existsSync(at('pid'))) await new Promise((resolve) => setTimeout(resolve, 5));
  });

  it('cancels jobs and stores bitmaps when it is told to end', async () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('drive'), '8M']);
    run('qemu-img', ['bitmap', '--add', at('drive'), 'b']);
    await start('--drive', 'file=drive,format=qcow2,id=hd0');
    await client.execute('drive-backup', {
      ...{ device: 'hd0', target: 'target', sync: 'incremental', bitmap: 'b', 'auto-finalize': false },
    });
    daemon?.kill('SIGINT');
    expect(await ended).toBe(0);
    expect(existsSync(at('target'))).toBe(false);
    run('qemu-img', ['check', '-q', at('drive')]);
    expect(run('qemu-img', ['info', at('drive')])).not.toContain('in-use');
  });

  it.each([
    [['--blockdev', 'file,filename=x'], "'node-name' must be specified for the root node"],
    [
      ['--blockdev', 'file,node-name=x,filename=nothing'],
      "Could not open 'nothing': No such file or directory",
    ],
    [['--blockdev', '{"driver":'], 'JSON parse error'],
    [['--blockdev', 'nope,node-name=x'], "Parameter 'driver' does not accept value 'nope'"],
    [['--blockdev', 'file,node-name=x,filename=x,read-only=maybe'], "Invalid parameter type for 'read-only'"],
    [['--object', 'throttle-group,id=g,x-iops-total=2,x-iops-read=1'], 'cannot be used at the same time'],
    [['--monitor', 'nope'], 'chardev "nope" not found'],
    [['--export', 'nbd,id=x,node-name=y'], "node-name='y'"],
    [['--nbd-server', 'addr.type=unix'], "Parameter 'addr.path' is missing"],
    [['--chardev', 'socket'], 'chardev: no id specified'],
  ])('refuses %j', (options, text) => {
    const { status, stderr } = daemonOf(...options);
    expect(status).toBe(1);
    expect(stderr).toContain(text);
  });
});
