/** What jobs within backing chains leave on the disk: when the daemon is killed, and where images are in another folder. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, afterEach, describe, expect, it } from 'vitest';
import { CLI } from '../support/cli.js';
import { tool } from '../support/nbd-client.js';
import { hasPeer } from '../support/peers.js';
import { type Message, QmpClient } from '../support/qmp.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-chain-jobs-'));
let daemon: ChildProcess | undefined;
afterEach(() => {
  daemon?.kill('SIGKILL');
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Images of 32 MiB in the folder `images` of a new one, the last of which is the node `n2`. */
async function makeChain(): Promise<string> {
  const place = mkdtempSync(join(folder, 'chain-'));
  const images = join(place, 'images');
  mkdirSync(images);
  for (let number = 0; number < 3; number++) {
    const on = number === 0 ? [] : ['-b', `b${number - 1}.qcow2`, '-F', 'qcow2'];
    const file = join(images, `b${number}.qcow2`);
    await tool('qemu-img', 'create', '-q', '-f', 'qcow2', ...on, file, '32M');
    await tool('qemu-io', '-c', `write -P ${number + 1} ${number * 6}M 12M`, file);
  }
  await tool('qemu-img', 'convert', '-O', 'raw', join(images, 'b2.qcow2'), join(place, 'was.raw'));
  return place;
}

async function start(place: string): Promise<QmpClient> {
  daemon = spawn(
    process.execPath,
    [
      ...[CLI, 'daemon', '--chardev', 'socket,id=c,path=q.sock,server=on,wait=off', '--monitor', 'c'],
      ...['--blockdev', 'driver=qcow2,node-name=n2,file.driver=file,file.filename=images/b2.qcow2'],
    ],
    { cwd: place, stdio: ['ignore', 'ignore', 'inherit'] },
  );
  const client = await QmpClient.connect(join(place, 'q.sock'));
  await client.execute('qmp_capabilities');
  return client;
}

async function ended(): Promise<void> {
  if (daemon?.exitCode !== null || daemon.signalCode !== null) return;
  await new Promise((resolve) => daemon?.once('exit', resolve));
}

/** Waits for the end of the job, and ends the daemon. */
async function concludes(client: QmpClient): Promise<void> {
  for (;;) {
    const [job] = (await client.execute('query-jobs')) as readonly Message[];
    if (job?.['status'] === 'concluded') break;
    await delay(20);
  }
  await client.execute('quit');
  client.close();
  await ended();
}

const JOBS: readonly (readonly [string, Message])[] = [
  ['block-stream', {}],
  ['block-commit', { top: 'images/b1.qcow2' }],
  ['block-commit', {}],
];

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('of a chain', () => {
  it.each(JOBS)('nothing is lost when the daemon is killed: %s %j', async (command, given) => {
    // From the beginning of the job to some time after its end.
    for (const waitMs of [0, 15, 30, 60, 120, 250]) {
      const place = await makeChain();
      const client = await start(place);
      await client.execute(command, { 'job-id': 'j', device: 'n2', ...given });
      await delay(waitMs);
      // What a ready job is told is its end; it may be over, or not be as far.
      client.execute('job-complete', { id: 'j' }).catch(() => undefined);
      await delay(waitMs / 10);
      daemon?.kill('SIGKILL');
      client.close();
      await ended();
      const top = join(place, 'images', 'b2.qcow2');
      await tool('qemu-img', 'compare', top, join(place, 'was.raw'));
      for (const name of ['b0', 'b1', 'b2']) {
        await tool('qemu-img', 'check', '-q', '-r', 'leaks', join(place, 'images', `${name}.qcow2`));
      }
    }
  });

  it('relative names in headers are relative to the image', async () => {
    const place = await makeChain();
    const client = await start(place);
    await client.execute('block-stream', {
      'job-id': 'j',
      device: 'n2',
      base: 'b0.qcow2',
      'auto-dismiss': false,
    });
    await concludes(client);
    const top = join(place, 'images', 'b2.qcow2');
    await tool('qemu-img', 'compare', top, join(place, 'was.raw'));
    const info = JSON.parse(await tool('qemu-img', 'info', '--output', 'json', top)) as Message;
    expect(info['full-backing-filename']).toBe(join(place, 'images', 'b0.qcow2'));
  });

  it('what a short image cuts off of its base does not come to light when it is committed', async () => {
    const place = mkdtempSync(join(folder, 'chain-'));
    const images = join(place, 'images');
    mkdirSync(images);
    const [b0, b1, b2] = ['b0.qcow2', 'b1.qcow2', 'b2.qcow2'].map((name) => join(images, name));
    if (b0 === undefined || b1 === undefined || b2 === undefined) throw new TypeError('three images');
    await tool('qemu-img', 'create', '-q', '-f', 'qcow2', b0, '4M');
    await tool('qemu-io', '-c', 'write -P 1 0 4M', b0);
    await tool('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'b0.qcow2', '-F', 'qcow2', b1, '1M');
    await tool('qemu-io', '-c', 'write -P 2 0 64k', b1);
    await tool('qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'b1.qcow2', '-F', 'qcow2', b2, '3M');
    await tool('qemu-img', 'convert', '-O', 'raw', b2, join(place, 'was.raw'));
    const client = await start(place);
    await client.execute('block-commit', {
      'job-id': 'j',
      device: 'n2',
      top: 'images/b1.qcow2',
      'auto-dismiss': false,
    });
    await concludes(client);
    await tool('qemu-img', 'compare', b2, join(place, 'was.raw'));
    // What nobody sees is left as it was.
    await tool('qemu-io', '-r', '-c', 'read -P 1 3M 1M', b0);
    const info = JSON.parse(await tool('qemu-img', 'info', '--output', 'json', b2)) as Message;
    expect(info['full-backing-filename']).toBe(b0);
  });
});
