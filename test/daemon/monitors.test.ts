/** What monitors make of their input, and several of them at once: as QEMU's. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { CLI } from '../support/cli.js';
import { type Message, QmpClient } from '../support/qmp.js';
import { hasQemu } from '../support/sessions.js';

type Who = 'stillframe' | 'qemu-storage-daemon';

let folder = '';
const children: ChildProcess[] = [];

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'stillframe-monitors-'));
});

afterEach(() => {
  for (const child of children.splice(0)) child.kill('SIGKILL');
});

afterAll(async () => {
  await rm(folder, { recursive: true, force: true });
});

/** Starts a daemon with a monitor on each of these sockets of its folder. */
function start(who: Who, ...sockets: readonly string[]): (name: string) => string {
  const cwd = mkdtempSync(join(folder, who));
  const options = sockets.flatMap((name) => [
    ...['--chardev', `socket,id=${name},path=${name},server=on,wait=off`],
    ...['--monitor', `chardev=${name}`],
  ]);
  const [command, words] =
    who === 'stillframe' ? [process.execPath, [CLI, 'daemon', ...options]] : [who, options];
  children.push(spawn(command, words, { cwd, stdio: 'ignore' }));
  return (name) => join(cwd, name);
}

/** What both make of the same. */
async function both<T>(play: (who: Who) => Promise<T>): Promise<{ readonly theirs: T; readonly ours: T }> {
  const [theirs, ours] = await Promise.all([play('qemu-storage-daemon'), play('stillframe')]);
  return { theirs, ours };
}

/** Sends all of it to a new monitor, and then a command; what is told up to the answer of that. */
async function told(path: string, input: Buffer): Promise<readonly Message[]> {
  // The client before may not be gone yet as far as the daemon knows: the greeting comes when it is.
  const socket = connect(path);
  try {
    return await new Promise((resolve, reject) => {
      let text = '';
      socket.on('error', reject);
      socket.setTimeout(10_000, () => reject(new Error(`no answer to ${String(input)}`)));
      socket.on('data', (data) => {
        if (text === '')
          socket.write(Buffer.concat([input, Buffer.from('\n{"execute":"query-jobs","id":"end"}\n')]));
        text += String(data);
        const lines = text.split('\r\n').slice(1, -1);
        const messages = lines.map((line): Message => JSON.parse(line));
        if (messages.at(-1)?.['id'] === 'end') resolve(messages);
      });
    });
  } finally {
    socket.destroy();
  }
}

async function answers(
  who: Who,
  inputs: readonly (string | Buffer)[],
): Promise<readonly (readonly Message[])[]> {
  const path = start(who, 'q')('q');
  (await QmpClient.connect(path)).close();
  const found: (readonly Message[])[] = [];
  for (const input of inputs) found.push(await told(path, Buffer.from(input)));
  return found;
}

const negotiate = '{"execute":"qmp_capabilities"}';
const enable = (given: unknown): string =>
  JSON.stringify({ execute: 'qmp_capabilities', arguments: { enable: given } });
const nested = (depth: number): string => '['.repeat(depth) + ']'.repeat(depth);

/** Answered to the letter. */
const EXACT = [
  '{"execute":"query-version","id":1}',
  '{"execute":"nope"}{"exec-oob":"query-jobs"}',
  `${negotiate}${negotiate}{"execute":"qmp_capabilities","arguments":{"x":1}}`,
  ['nope', 'oob', 1, null, {}, ['nope'], ['oob', 'nope'], [1], [null]].map(enable).join('\n'),
  // One each: these are answered before what was sent earlier.
  ...[
    '{"exec-oob":"query-jobs","id":7}',
    '{"exec-oob":"nope","id":[]}',
    '{"exec-oob":"query-jobs","execute":"query-jobs"}',
    '{"exec-oob":5}',
    '{"exec-oob":"qmp_capabilities"}',
  ].map((command) => enable(['oob', 'oob']) + command),
  `${enable([])}{"exec-oob":"query-jobs","id":7}{"exec-oob":"qmp_capabilities"}`,
  ...[
    'null',
    '1',
    '-1',
    '0',
    '1.5',
    '1e3',
    'true',
    'false',
    '""',
    '"x"',
    '[]',
    '{}',
    '[1,{"a":[null]}]',
    '"\\u0000"',
  ].map((id) => `${negotiate}{"execute":"nope","id":${id}}{"execute":"query-jobs","id":${id}}`),
  `${negotiate} [1] "x" 5 true null {} [] 'y'\n`,
  `${negotiate}{"execute":5}{"execute":null}{"execute":[]}{"execute":""}{"arguments":{},"id":3}`,
  `${negotiate}{"execute":"query-jobs","arguments":[]}{"execute":"query-jobs","arguments":null}`,
  `${negotiate}{"execute":"query-jobs","extra":1,"id":3}{"execute":"query-jobs","arguments":{"x":1},"id":3}`,
  `\r\n\t { "execute" \r\n : \n\n "qmp_capabilities" \t}\r\n\r\n{"execute":\r\n"query-jobs"}\r\n`,
  `{'execute':'qmp_capabilities','id':'it\\'s "x"'}{'execute':"query-jobs",'id':{'a':"it's"}}`,
  `${negotiate}{"execute":"query-jobs","id":${nested(1023)}}`,
  `${negotiate}{"execute":"query-jobs","id":${nested(1024)}}`,
  `${negotiate}${nested(1024)}${nested(1025)}`,
  `{"execute":nope}${negotiate}`,
];

/** Answered in other words: what is wrong with it is told of, and the commands behind it are carried out. */
const ALIKE = [
  '{"execute":"query-jobs",}',
  '{"execute":"query-jobs" "id":1}',
  '{"execute" "query-jobs"}',
  ...['{,}', '{5:1}', '[1,]', '}', ']', '{"a":1]', '[1}', '{"a"}', '{]}'],
  ...['01', '+1', '.5', '"\\q"', '@', 'nul', 'NULL', '1.', '0x1'].map(
    (id) => `{"execute":"query-jobs","id":${id}}`,
  ),
  '{"execute":"query-jo\n{"execute":"query-jobs"}',
  "{'execute':'query-jo\r\n{'execute':'query-jobs'}",
  '{"execute":"query\tjobs"}',
  '{"execute":{\u0001{"execute":"query-jobs"}',
  Buffer.from('{"execute":"que\xff{"execute":"query-jobs"}', 'latin1'),
  Buffer.from('{"execute":{"a":[\xff{"execute":"query-jobs"}', 'latin1'),
  `${'['.repeat(5000)}\u0001`,
].map((text) => Buffer.concat([Buffer.from(negotiate), Buffer.from(text)]));

/** Whatever is wrong with something that is no JSON, however many pieces it is in. */
function alike(messages: readonly Message[]): readonly unknown[] {
  const plain = messages.map((message) => {
    const { desc } = (message['error'] ?? {}) as Message;
    return /^JSON /.test(String(desc)) ? 'no JSON' : message;
  });
  return plain.filter((message, index) => message !== 'no JSON' || plain[index - 1] !== message);
}

describe.skipIf(!hasQemu())('a monitor', () => {
  it('answers whatever it is sent in QEMU’s words', async () => {
    const { theirs, ours } = await both((who) => answers(who, EXACT));
    for (const [index, input] of EXACT.entries())
      expect({ input, told: ours[index] }).toEqual({ input, told: theirs[index] });
  });

  it('goes on behind what is no JSON', async () => {
    const { theirs, ours } = await both((who) => answers(who, ALIKE));
    for (const [index, input] of ALIKE.entries()) {
      const text = input.toString('latin1');
      expect({ text, told: alike(ours[index] ?? []) }).toEqual({ text, told: alike(theirs[index] ?? []) });
    }
  });
});

describe.skipIf(!hasQemu())('several monitors', () => {
  /** Without what differs from run to run. */
  const eventsOf = (client: QmpClient): readonly unknown[] =>
    client.since(0).filter((message) => 'event' in message);

  it('see all events, also those of what others do, once they have negotiated', async () => {
    const { theirs, ours } = await both(async (who) => {
      const at = start(who, 'a', 'b', 'c', 'd');
      const [a, b, silent, late] = await Promise.all(
        (['a', 'b', 'c', 'd'] as const).map((name) => QmpClient.connect(at(name))),
      );
      if (a === undefined || b === undefined || silent === undefined || late === undefined) throw new Error();
      for (const client of [a, b]) await client.execute('qmp_capabilities');
      const size = 1 << 20;
      for (const name of ['s', 't'])
        await a.execute('blockdev-add', { driver: 'null-co', 'node-name': name, size, 'read-zeroes': true });
      await a.execute('blockdev-backup', { 'job-id': 'j', device: 's', target: 't', sync: 'none' });
      await b.event('JOB_STATUS_CHANGE', { id: 'j', status: 'running' });
      await b.execute('job-pause', { id: 'j' });
      await a.event('JOB_STATUS_CHANGE', { id: 'j', status: 'paused' });
      await late.execute('qmp_capabilities');
      await a.execute('job-resume', { id: 'j' });
      const refused = await b.send('{"execute":"job-finalize","arguments":{"id":"j"},"id":"b"}');
      await b.execute('job-cancel', { id: 'j' });
      for (const client of [a, b, late]) await client.event('JOB_STATUS_CHANGE', { id: 'j', status: 'null' });
      expect(eventsOf(b)).toEqual(eventsOf(a));
      expect(silent.messages).toHaveLength(1);
      const seen = [a, late].map(eventsOf);
      for (const client of [a, b, silent, late]) client.close();
      return { seen, refused };
    });
    expect(ours).toEqual(theirs);
  });

  it('have their commands answered in their order, each to who has sent it', async () => {
    const COUNT = 200;
    const { theirs, ours } = await both(async (who) => {
      const at = start(who, 'e', 'f');
      (await QmpClient.connect(at('e'))).close();
      const all = (name: string): Promise<readonly Message[]> => {
        const one = (index: number): string => {
          const node = `${name}${index}`;
          const given = { driver: 'null-co', 'node-name': node, size: 65536 };
          return [
            { execute: 'blockdev-add', arguments: given, id: [node, 'add'] },
            // Whether the other one is there at that time, nobody knows; that this one is, everybody does.
            { execute: 'blockdev-add', arguments: given, id: [node, 'again'] },
            { execute: 'blockdev-del', arguments: { 'node-name': node }, id: [node, 'del'] },
          ]
            .map((command) => JSON.stringify(command))
            .join(name === 'e' ? '\n' : '');
        };
        const commands = Array.from({ length: COUNT }, (_, index) => one(index)).join('');
        return told(at(name), Buffer.from(negotiate + commands));
      };
      return await Promise.all(['e', 'f'].map(all));
    });
    expect(theirs.map((messages) => messages.length)).toEqual([3 * COUNT + 2, 3 * COUNT + 2]);
    expect(ours).toEqual(theirs);
  });
});
