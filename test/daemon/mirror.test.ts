/** A drive moves to another image while clients write to it over NBD, by QMP alone. */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CLI } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { History, LENGTH, readExport, startWriters } from '../support/nbd-rounds.js';
import { hasPeer, run } from '../support/peers.js';
import { type Message, QmpClient } from '../support/qmp.js';

let folder: string;
const at = (name: string): string => join(folder, name);
let daemon: ChildProcess | undefined;
let ended: Promise<number | null>;
let client: QmpClient;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-mirror-'));
});
afterEach(async () => {
  client?.close();
  daemon?.kill('SIGTERM');
  await ended;
  daemon = undefined;
  rmSync(folder, { recursive: true, force: true });
});

type Format = 'raw' | 'qcow2';

const image = (name: string, format: Format): Message => ({
  driver: format,
  'node-name': name,
  discard: 'unmap',
  file: { driver: 'file', filename: name },
});

function makeImage(name: string, format: Format, content: Uint8Array): void {
  writeFileSync(at('content'), content);
  run('qemu-img', ['convert', '-f', 'raw', '-O', format, at('content'), at(name)]);
}

function contentOf(name: string, format: Format): Uint8Array {
  run('qemu-img', ['convert', '-U', '-f', format, '-O', 'raw', at(name), at('image')]);
  return readFileSync(at('image'));
}

/** A daemon with a drive `d` that is exported, and an image `t` for its mirror. */
async function start(formats: readonly [Format, Format], initial: Uint8Array): Promise<void> {
  const [from, to] = formats;
  makeImage('d', from, initial);
  makeImage('t', to, new Random(99).bytes(LENGTH));
  daemon = spawn(
    process.execPath,
    [CLI, 'daemon', '--chardev', 'socket,id=c,path=qmp,server=on,wait=off', '--monitor', 'c'],
    { cwd: folder, stdio: ['ignore', 'ignore', 'inherit'] },
  );
  const child = daemon;
  ended = new Promise((resolve) => child.once('exit', resolve));
  client = await QmpClient.connect(at('qmp'));
  await client.execute('qmp_capabilities');
  await client.execute('blockdev-add', image('d', from));
  await client.execute('blockdev-add', image('t', to));
  await client.execute('nbd-server-start', { addr: { type: 'unix', data: { path: 'nbd' } } });
  await client.execute('block-export-add', {
    ...{ type: 'nbd', id: 'e', 'node-name': 'd', name: 'drive', writable: true },
  });
}

/** Another program has the target. */
async function serveTarget(): Promise<ChildProcess> {
  rmSync(at('far'), { force: true });
  if (!existsSync(at('far.raw'))) writeFileSync(at('far.raw'), new Uint8Array(LENGTH));
  const server = spawn('qemu-nbd', ['-f', 'raw', '-t', '-k', at('far'), at('far.raw')], { stdio: 'inherit' });
  while (!existsSync(at('far'))) await moment();
  return server;
}

const over = (id: string): Promise<unknown> => client.event('JOB_STATUS_CHANGE', { id, status: 'null' });
const moment = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 20));

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io') || !hasPeer('qemu-nbd'))(
  'the mirror of a drive that clients write to',
  () => {
    it.each([
      ['raw', 'raw', 'background', 4096],
      ['raw', 'qcow2', 'write-blocking', 65536],
      ['qcow2', 'raw', 'write-blocking', 512],
      ['qcow2', 'qcow2', 'background', 65536],
    ] as const)(
      'from %s to %s takes its place, copying %s, and nothing is lost',
      async (from, to, mode, granularity) => {
        const initial = new Random(5).bytes(LENGTH);
        await start([from, to], initial);
        const history = new History();
        const stop = await startWriters(at('nbd'), history, 7, 'drive');
        const job = { 'job-id': 'm', device: 'd', target: 't', sync: 'full', granularity, 'copy-mode': mode };
        await client.execute('blockdev-mirror', job);
        await client.event('BLOCK_JOB_READY', { device: 'm' });
        await moment();
        await client.execute('job-complete', { id: 'm' });
        await over('m');
        expect(await client.event('BLOCK_JOB_COMPLETED', { device: 'm' })).not.toHaveProperty('error');
        const before = history.changes.length;
        while (history.changes.length < before + 100) await moment();
        await stop();
        const end = history.now();
        const bytes = await readExport(at('nbd'), 'drive');
        expect(history.flaw(bytes, initial, end, end)).toBe(-1);
        expect(await client.execute('query-block-exports')).toMatchObject([{ id: 'e', 'node-name': 't' }]);
        // The drive is on the target, and nobody is on what it was on before.
        await client.execute('blockdev-del', { 'node-name': 'd' });
        expect(firstDifference(await readExport(at('nbd'), 'drive'), bytes)).toBe(-1);
        client.close();
        daemon?.kill('SIGTERM');
        expect(await ended).toBe(0);
        expect(firstDifference(contentOf('t', to), bytes)).toBe(-1);
      },
    );

    it.each([
      ['raw', 'qcow2', 'background'],
      ['qcow2', 'raw', 'write-blocking'],
    ] as const)(
      'from %s to %s, copying %s, is one moment of it where it is cancelled',
      async (from, to, mode) => {
        const initial = new Random(6).bytes(LENGTH);
        await start([from, to], initial);
        const history = new History();
        const stop = await startWriters(at('nbd'), history, 8, 'drive');
        await client.execute('blockdev-mirror', {
          ...{ 'job-id': 'm', device: 'd', target: 't', sync: 'full', 'copy-mode': mode },
        });
        await client.event('BLOCK_JOB_READY', { device: 'm' });
        await moment();
        const first = history.now();
        await client.execute('block-job-cancel', { device: 'm' });
        await client.event('BLOCK_JOB_COMPLETED', { device: 'm' });
        const last = history.now();
        await moment();
        await stop();
        expect(history.flaw(contentOf('t', to), initial, first, last)).toBe(-1);
        const end = history.now();
        expect(history.flaw(await readExport(at('nbd'), 'drive'), initial, end, end)).toBe(-1);
        expect(await client.execute('query-block-exports')).toMatchObject([{ id: 'e', 'node-name': 'd' }]);
      },
    );

    it('stays one where the drive is opened anew meanwhile', async () => {
      const initial = new Random(8).bytes(LENGTH);
      await start(['qcow2', 'raw'], initial);
      const history = new History();
      const stop = await startWriters(at('nbd'), history, 9, 'drive');
      await client.execute('blockdev-mirror', {
        ...{ 'job-id': 'm', device: 'd', target: 't', sync: 'full', 'copy-mode': 'write-blocking' },
      });
      await client.event('BLOCK_JOB_READY', { device: 'm' });
      for (let round = 0; round < 20; round++) {
        await client.execute('blockdev-reopen', { options: [image('d', 'qcow2')] });
      }
      await client.execute('job-complete', { id: 'm' });
      await over('m');
      expect(await client.event('BLOCK_JOB_COMPLETED', { device: 'm' })).not.toHaveProperty('error');
      await stop();
      const end = history.now();
      expect(history.flaw(await readExport(at('nbd'), 'drive'), initial, end, end)).toBe(-1);
    });

    it('goes on where its target was away, once it is told to', async () => {
      const initial = new Random(7).bytes(LENGTH);
      await start(['raw', 'raw'], initial);
      let server = await serveTarget();
      try {
        await client.execute('blockdev-add', {
          ...{ driver: 'nbd', 'node-name': 'far', server: { type: 'unix', path: at('far') } },
          'reconnect-delay': 1,
        });
        await client.execute('blockdev-mirror', {
          ...{ 'job-id': 'm', device: 'd', target: 'far', sync: 'full', 'on-target-error': 'stop' },
        });
        await client.event('BLOCK_JOB_READY', { device: 'm' });
        server.kill('SIGKILL');
        const expected = Buffer.from(initial);
        const write = (pattern: number, offset: number): void => {
          run('qemu-io', [
            ...['-f', 'raw', '-c', `write -P ${pattern} ${offset} 4k`],
            `nbd+unix:///drive?socket=${at('nbd')}`,
          ]);
          expected.fill(pattern, offset, offset + 4096);
        };
        write(1, 0);
        await client.event('BLOCK_JOB_ERROR', { device: 'm', operation: 'write', action: 'stop' });
        await client.event('JOB_STATUS_CHANGE', { id: 'm', status: 'standby' });
        // The drive itself goes on.
        write(2, 65536);
        server = await serveTarget();
        client.forget();
        await client.execute('job-resume', { id: 'm' });
        await client.event('JOB_STATUS_CHANGE', { id: 'm', status: 'ready' });
        await client.execute('job-complete', { id: 'm' });
        expect(await client.event('BLOCK_JOB_COMPLETED', { device: 'm' })).not.toHaveProperty('error');
        write(3, 131072);
        expect(firstDifference(await readExport(at('nbd'), 'drive'), expected)).toBe(-1);
        client.close();
        daemon?.kill('SIGTERM');
        expect(await ended).toBe(0);
        expect(firstDifference(readFileSync(at('far.raw')), expected)).toBe(-1);
      } finally {
        server.kill('SIGKILL');
      }
    });
  },
);
