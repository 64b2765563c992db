/** Controlling `serve` by QMP, beside QEMU's storage daemon where both can do the same. */
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { startStillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';
import { QmpClient as Client, type Message } from '../support/qmp.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-qmp-'));
const at = (name: string): string => join(folder, name);
const LENGTH = 4 << 20;
const content = new Random(12).bytes(LENGTH);

let server: ReturnType<typeof startStillframe> | undefined;
let daemon: ChildProcessWithoutNullStreams | undefined;
const clients: Client[] = [];

async function client(path: string): Promise<Client> {
  const made = await Client.connect(path);
  clients.push(made);
  return made;
}

async function serve(): Promise<Client> {
  writeFileSync(at('disk'), content);
  server = startStillframe([
    'serve',
    at('disk'),
    '-f',
    'raw',
    '--nbd',
    `unix:${at('nbd')}`,
    '--qmp',
    at('ours'),
  ]);
  return await client(at('ours'));
}

async function storageDaemon(): Promise<Client> {
  writeFileSync(at('their-disk'), content);
  daemon = spawn('qemu-storage-daemon', [
    ...['--blockdev', `driver=file,filename=${at('their-disk')},node-name=drive0`],
    ...['--chardev', `socket,path=${at('theirs')},server=on,wait=off,id=c`, '--monitor', 'chardev=c'],
  ]);
  return await client(at('theirs'));
}

beforeAll(() => undefined);
afterEach(async () => {
  for (const one of clients.splice(0)) one.close();
  daemon?.kill();
  daemon = undefined;
  if (server !== undefined) {
    server.child.kill('SIGTERM');
    await server.finished;
  }
  server = undefined;
  for (const name of ['ours', 'theirs', 'nbd', 'target']) rmSync(at(name), { force: true });
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe('serve --qmp', () => {
  it('is for its owner, greets, and wants capabilities to be negotiated first', async () => {
    const one = await serve();
    expect(statSync(at('ours')).mode & 0o777).toBe(0o600);
    expect(one.messages[0]).toMatchObject({ QMP: { capabilities: ['oob'] } });
    expect(await one.send('{"execute":"query-jobs","id":4}')).toEqual({
      id: 4,
      error: { class: 'CommandNotFound', desc: "Expecting capabilities negotiation with 'qmp_capabilities'" },
    });
    expect(await one.execute('qmp_capabilities')).toEqual({});
    await expect(one.execute('qmp_capabilities')).rejects.toThrow('already complete');
    expect(await one.execute('query-jobs')).toEqual([]);
  });

  it.each(['full', 'none'] as const)(
    'takes a backup of mode %s while the disk is written to',
    async (sync) => {
      const one = await serve();
      const other = await client(at('ours'));
      for (const monitor of [one, other]) await monitor.execute('qmp_capabilities');
      const uri = `nbd+unix:///?socket=${at('nbd')}`;
      await one.execute('drive-backup', {
        ...{ device: 'drive0', target: at('target'), sync, 'job-id': 'job1', speed: 65536, format: 'qcow2' },
      });
      run('qemu-io', ['-f', 'raw', '-c', 'write -P 7 1M 1M', uri]);
      expect(await other.execute('query-block-jobs')).toMatchObject([
        { device: 'job1', status: 'running', speed: 65536 },
      ]);
      if (sync === 'none') {
        await one.execute('block-job-cancel', { device: 'job1' });
        expect(await other.event('BLOCK_JOB_CANCELLED')).toMatchObject({ device: 'job1', type: 'backup' });
      } else {
        await one.execute('block-job-set-speed', { device: 'job1', speed: 0 });
        expect(await other.event('BLOCK_JOB_COMPLETED')).toEqual({
          ...{ device: 'job1', len: LENGTH, offset: LENGTH, speed: 0, type: 'backup' },
        });
      }
      await one.event('JOB_STATUS_CHANGE', { status: 'null' });
      run('qemu-img', ['convert', '-U', '-O', 'raw', at('target'), at('copy')]);
      expect(firstDifference(readFileSync(at('copy')), content)).toBe(-1);
      expect(await one.execute('query-jobs')).toEqual([]);
    },
  );

  it('takes an instant at any time, and lets it go', async () => {
    const one = await serve();
    await one.execute('qmp_capabilities');
    const uri = `nbd+unix:///?socket=${at('nbd')}`;
    run('qemu-io', ['-f', 'raw', '-c', 'write -P 1 0 64k', uri]);
    await one.execute('x-freeze', { device: 'drive0', export: 'still', scratch: folder });
    run('qemu-io', ['-f', 'raw', '-c', 'write -P 2 0 1M', uri]);
    expect(await one.execute('query-block-exports')).toMatchObject([{ id: 'still' }, { id: '' }]);
    await tool('nbdcopy', `nbd+unix:///still?socket=${at('nbd')}`, at('copy'));
    expect(firstDifference(readFileSync(at('copy')), Buffer.from(content).fill(1, 0, 65536))).toBe(-1);
    await expect(one.execute('x-freeze', { device: 'drive0', export: 'still' })).rejects.toThrow('still');
    await one.execute('x-thaw', { export: 'still' });
    await one.event('BLOCK_EXPORT_DELETED', { id: 'still' });
    await expect(one.execute('x-thaw', { export: 'still' })).rejects.toThrow('no instant');
  });

  it('ends when it is told to', async () => {
    const one = await serve();
    await one.execute('qmp_capabilities');
    expect(await one.execute('quit')).toEqual({});
    expect((await server?.finished)?.status).toBe(0);
    expect(existsSync(at('ours'))).toBe(false);
  });

  it('stays up whatever it is sent', async () => {
    await serve();
    const random = new Random(3);
    for (let round = 0; round < 30; round++) {
      const bad = connect(at('ours'));
      bad.on('error', () => undefined);
      bad.write(Buffer.from(random.noise(random.between(1, 20_000))));
      bad.write('['.repeat(random.between(1, 5000)));
      bad.write(`{"execute":"qmp_capabilities"}{"execute":"${'x'.repeat(random.between(1, 100_000))}"}`);
      bad.resume();
      if (round % 3 > 0) bad.destroy();
    }
    const one = await client(at('ours'));
    await one.execute('qmp_capabilities');
    expect(await one.execute('query-status')).toMatchObject({ running: true });
  });
});

const SESSION = [
  '{"execute":"query-jobs"}',
  '{"execute":"qmp_capabilities","arguments":{"enable":["nope"]}}',
  '{"execute":"qmp_capabilities","arguments":{"enable":5}}',
  '{"exec-oob":"query-jobs"}',
  '{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}',
  '{"execute":"qmp_capabilities"}',
  '{"execute":"nope","id":{"a":1}}',
  '{"exec-oob":"nope","id":1}',
  '{"exec-oob":"query-jobs","id":2}',
  '{"exec-oob":"query-jobs","execute":"query-jobs"}',
  '{"execute":"query-jobs","foo":1}',
  '{"execute":"job-pause","arguments":{"id":"zz"}}',
  '{"execute":"job-pause","arguments":{}}',
  '{"execute":"job-pause","arguments":{"id":5}}',
  '{"execute":"job-pause","arguments":{"id":"zz","x":1}}',
  '{"execute":"block-job-pause","arguments":{"device":"zz"}}',
  '{"exec":"a"}',
  '["x"]',
  '"str"',
  '5',
  '{"execute": 5}',
  '{"execute":"a","arguments":5}',
  '{bad}',
  "{'execute':'query-block-jobs'}",
  '{"execute":"query-jobs","id":[null,"x"]}',
  '{"exec-oob":"query-jobs"}',
  '{"execute":"drive-backup","arguments":{"device":"nope","target":"TARGET","sync":"full","job-id":"j"}}',
  '{"execute":"drive-backup","arguments":{"device":"drive0","target":"TARGET","sync":"weird","job-id":"j"}}',
  '{"execute":"drive-backup","arguments":{"device":"drive0","sync":"full","job-id":"j"}}',
  '{"execute":"drive-backup","arguments":{"device":"drive0","target":"TARGET","sync":"full","job-id":"j","speed":true}}',
  '{"execute":"drive-backup","arguments":{"device":"drive0","target":"TARGET","sync":"full","job-id":"j","format":"raw","auto-dismiss":false,"auto-finalize":false,"speed":65536}}',
  '{"execute":"job-pause","arguments":{"id":"j"}}',
  '{"execute":"job-pause","arguments":{"id":"j"}}',
  '{"execute":"block-job-cancel","arguments":{"device":"j"}}',
  '{"execute":"job-resume","arguments":{"id":"j"}}',
  '{"execute":"block-job-resume","arguments":{"device":"j"}}',
  '{"execute":"job-finalize","arguments":{"id":"j"}}',
  '{"execute":"job-dismiss","arguments":{"id":"j"}}',
  '{"execute":"block-job-set-speed","arguments":{"device":"j","speed":0}}',
  'pending',
  '{"execute":"block-job-set-speed","arguments":{"device":"j","speed":1}}',
  '{"execute":"job-finalize","arguments":{"id":"j"}}',
  'concluded',
  '{"execute":"query-jobs"}',
  '{"execute":"block-job-cancel","arguments":{"device":"j"}}',
  '{"execute":"job-dismiss","arguments":{"id":"j"}}',
  '{"execute":"job-dismiss","arguments":{"id":"j"}}',
];

/** Plays the session, one line at a time. */
async function play(monitor: Client): Promise<Message[]> {
  const begin = monitor.messages.length;
  for (const line of SESSION) {
    if (line === 'pending' || line === 'concluded') {
      await monitor.event('JOB_STATUS_CHANGE', { status: line, id: 'j' });
      await new Promise((resolve) => setTimeout(resolve, 30));
    } else {
      await monitor.send(line.replace('TARGET', at('target')));
      // Whatever comes of it.
      await new Promise((resolve) => setTimeout(resolve, 60));
    }
  }
  return monitor.since(begin);
}

describe.skipIf(!hasPeer('qemu-storage-daemon'))('beside qemu-storage-daemon', () => {
  it('a session has the same answers and events', async () => {
    const theirs = await play(await storageDaemon());
    rmSync(at('target'));
    const ours = await play(await serve());
    expect(ours).toEqual(theirs);
    expect(firstDifference(readFileSync(at('target')), content)).toBe(-1);
  });
});
