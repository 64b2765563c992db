/** The same sessions with our daemon and with QEMU's: answers, and the events of each job, are the same. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { CLI } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';
import { type Message, QmpClient } from '../support/qmp.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-golden-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const MiB = 1 << 20;

/** A command with its arguments, or a job that is to have one of these statuses before anything else happens. */
type Step =
  | readonly [command: string, given?: Message]
  | { readonly job: string; readonly is: readonly string[] };

/** `null`: there is no such job. */
const until = (job: string, ...is: readonly string[]): Step => ({ job, is });

interface Played {
  readonly answers: readonly unknown[];
  /** Events of each job, and others. */
  readonly events: Readonly<Record<string, readonly unknown[]>>;
}

/** Plays a session in a folder of its own. */
async function play(
  who: 'qemu' | 'stillframe',
  prepare: (at: (name: string) => string) => void,
  session: readonly Step[],
): Promise<Played> {
  const place = join(folder, who);
  rmSync(place, { recursive: true, force: true });
  mkdirSync(place);
  prepare((name) => join(place, name));
  const [command, ...words] = who === 'qemu' ? ['qemu-storage-daemon'] : [process.execPath, CLI, 'daemon'];
  const options = ['--chardev', 'socket,id=c,path=q.sock,server=on,wait=off', '--monitor', 'c'];
  const daemon: ChildProcess = spawn(command ?? '', [...words, ...options], {
    cwd: place,
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  let said = '';
  daemon.stderr?.on('data', (data) => {
    said += String(data);
  });
  const ended = new Promise<number | null>((resolve) => daemon.once('exit', resolve));
  const client = await QmpClient.connect(join(place, 'q.sock'));
  const answers: unknown[] = [];
  for (const step of [['qmp_capabilities'] as const, ...session, ['quit'] as const]) {
    if ('job' in step) await settle(client, step.job, step.is);
    else {
      const [execute, given = {}] = step;
      const answer = await client.send(JSON.stringify({ execute, arguments: given }));
      answers.push({ execute, given, answer: normalise(answer) });
    }
  }
  expect(await ended, said).toBe(0);
  const events: Record<string, unknown[]> = {};
  for (const { event, data } of client.messages) {
    if (event === undefined) continue;
    const { id, device } = (data ?? {}) as Message;
    const key = String(id ?? device ?? '');
    events[key] = [...(events[key] ?? []), { event, data }];
  }
  client.close();
  return { answers, events };
}

/** Resolves when a job has one of these statuses, and events of it had time to come. */
async function settle(client: QmpClient, job: string, statuses: readonly string[]): Promise<void> {
  for (;;) {
    const jobs = (await client.execute('query-jobs')) as readonly Message[];
    const found = jobs.find(({ id }) => id === job);
    if (statuses.includes(String(found?.['status'] ?? null))) break;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  await new Promise((resolve) => setTimeout(resolve, 30));
}

/** Names that nobody chose, what a file system makes of a file, and flags that we set later, are no matter. */
function normalise(answer: unknown): unknown {
  const text = JSON.stringify(answer, (key, value) => {
    if (key === 'actual-size') return undefined;
    if (key === 'flags' && Array.isArray(value)) return value.filter((flag) => flag !== 'in-use');
    return value;
  });
  return JSON.parse(text.replaceAll(/#block\d+/g, '#block'));
}

async function same(
  prepare: (at: (name: string) => string) => void,
  session: readonly Step[],
): Promise<void> {
  const theirs = await play('qemu', prepare, session);
  const ours = await play('stillframe', prepare, session);
  expect(ours.answers).toEqual(theirs.answers);
  expect(ours.events).toEqual(theirs.events);
}

const qcow2 = (name: string): Message => ({
  driver: 'qcow2',
  'node-name': name,
  file: { driver: 'file', filename: `${name}.qcow2` },
});

describe.skipIf(!hasPeer('qemu-storage-daemon') || !hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'a session',
  () => {
    it('with nodes, exports and the verbs of a job', async () => {
      const job = { id: 'j' };
      await same(
        (at) => {
          run('qemu-img', ['create', '-q', '-f', 'qcow2', at('base.qcow2'), '4M']);
          run('sh', ['-c', `cd ${at('.')} && qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2`]);
          run('qemu-img', ['bitmap', '--add', at('d.qcow2'), 'pb']);
          run('qemu-img', ['create', '-q', '-f', 'qcow2', at('t.qcow2'), '4M']);
          run('qemu-io', ['-c', 'write -P 1 0 1M', at('d.qcow2')]);
        },
        [
          ['blockdev-add', qcow2('d')],
          [
            'blockdev-add',
            {
              driver: 'qcow2',
              'node-name': 't',
              file: { driver: 'file', filename: 't.qcow2', 'node-name': 'tf' },
            },
          ],
          ['query-named-block-nodes'],
          ['query-named-block-nodes', { flat: true }],
          ['query-block'],
          ['query-blockstats'],
          ['block-export-add', { type: 'nbd', id: 'e0', 'node-name': 'd', writable: true }],
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['block-export-add', { type: 'nbd', id: 'e0', 'node-name': 'd', writable: true }],
          ['block-export-add', { type: 'nbd', id: 'e0', 'node-name': 'd', writable: true }],
          ['block-export-add', { type: 'nbd', id: 'e1', 'node-name': 'nope', writable: true }],
          ['query-block-exports'],
          ['blockdev-del', { 'node-name': 'd' }],
          ['blockdev-del', { 'node-name': 'tf' }],
          ['blockdev-del', { 'node-name': 'x' }],
          [
            'blockdev-backup',
            {
              device: 'd',
              target: 't',
              sync: 'full',
              'job-id': 'j',
              'auto-finalize': false,
              'auto-dismiss': false,
            },
          ],
          until('j', 'pending'),
          ['query-jobs'],
          ['query-block-jobs'],
          ['blockdev-del', { 'node-name': 't' }],
          ['block_resize', { 'node-name': 't', size: MiB }],
          ['job-pause', job],
          ['job-resume', job],
          ['job-complete', job],
          ['job-dismiss', job],
          ['block-job-pause', { device: 'j' }],
          ['block-job-resume', { device: 'j' }],
          ['block-job-complete', { device: 'j' }],
          ['block-job-set-speed', { device: 'j', speed: 5 }],
          ['job-pause', { id: 'zz' }],
          ['block-job-pause', { device: 'zz' }],
          ['blockdev-backup', { device: 'd', target: 't', sync: 'full', 'job-id': 'j2' }],
          ['blockdev-backup', { device: 't', target: 'd', sync: 'full', 'job-id': 'j2' }],
          ['job-finalize', job],
          until('j', 'concluded'),
          ['query-jobs'],
          ['query-block-jobs'],
          ['job-cancel', job],
          ['job-dismiss', job],
          ['job-dismiss', job],
          ['block-export-del', { id: 'e0' }],
          ['block-export-del', { id: 'e0' }],
          ['blockdev-del', { 'node-name': 't' }],
          ['nbd-server-stop'],
          ['nbd-server-stop'],
          ['blockdev-add', { driver: 'nope', 'node-name': 'z' }],
          ['blockdev-add', { driver: 'qcow2', 'node-name': 'z', file: { driver: 'file' } }],
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 'z', file: { driver: 'file', filename: 'zz', bogus: 1 } },
          ],
          ['blockdev-add', { driver: 'qcow2', 'node-name': 'z', file: 'nonode' }],
          ['blockdev-add', { driver: 'qcow2', 'node-name': 'z', file: { driver: 'file', filename: 'zz' } }],
          ['blockdev-add', { driver: 'file', 'node-name': 'd', filename: 't.qcow2' }],
          ['blockdev-add', { driver: 'file', 'node-name': '1d', filename: 't.qcow2' }],
          ['blockdev-add', { driver: 'file', filename: 't.qcow2' }],
          ['object-add', { 'qom-type': 'throttle-group', id: 'g0', limits: { 'bps-total': 1000000 } }],
          ['object-add', { 'qom-type': 'throttle-group', id: 'g0' }],
          ['object-add', { 'qom-type': 'nope', id: 'g0' }],
          ['blockdev-add', { driver: 'throttle', 'node-name': 'th', 'throttle-group': 'g0', file: 'd' }],
          ['object-del', { id: 'g0' }],
          ['object-del', { id: 'zz' }],
          ['blockdev-del', { 'node-name': 'd' }],
          ['blockdev-del', { 'node-name': 'th' }],
          ['blockdev-del', { 'node-name': 'd' }],
          ['query-named-block-nodes'],
        ],
      );
    });

    it('with dirty bitmaps, bitmap modes and wrong arguments', async () => {
      const bitmap = (action: string, given: Message): Step => [`block-dirty-bitmap-${action}`, given];
      const d = (name: string): Message => ({ node: 'd', name });
      const backup = (given: Message): Step[] => [
        ['blockdev-backup', { device: 'd', target: 't', 'job-id': 'j', ...given }],
        until('j', 'null', 'pending'),
      ];
      const nodes: Step = ['query-named-block-nodes', { flat: true }];
      await same(
        (at) => {
          run('qemu-img', ['create', '-q', '-f', 'qcow2', at('d.qcow2'), '4M']);
          run('qemu-img', ['bitmap', '--add', at('d.qcow2'), 'pb']);
          run('qemu-io', ['-c', 'write -P 1 0 1M', at('d.qcow2')]);
          for (const name of ['t', 't2'])
            run('qemu-img', ['create', '-q', '-f', 'qcow2', at(`${name}.qcow2`), '4M']);
          run('qemu-img', ['create', '-q', '-f', 'qcow2', at('t3.qcow2'), '5M']);
          run('qemu-img', ['create', '-q', '-f', 'raw', at('r.raw'), '4M']);
        },
        [
          ...['d', 't', 't2', 't3'].map((name): Step => ['blockdev-add', qcow2(name)]),
          ['blockdev-add', { driver: 'raw', 'node-name': 'r', file: { driver: 'file', filename: 'r.raw' } }],
          bitmap('add', d('b0')),
          bitmap('add', d('b0')),
          bitmap('add', d('')),
          bitmap('add', d('x'.repeat(1024))),
          bitmap('add', { ...d('g'), granularity: 1000 }),
          bitmap('add', { ...d('g'), granularity: 256 }),
          bitmap('add', { ...d('g'), granularity: 4096, disabled: true }),
          bitmap('add', { node: 'nope', name: 'g' }),
          bitmap('add', { node: 'r', name: 'p' }),
          bitmap('clear', d('nope')),
          bitmap('enable', d('g')),
          bitmap('disable', d('g')),
          bitmap('remove', d('nope')),
          bitmap('merge', { node: 'd', target: 'b0', bitmaps: ['g'] }),
          bitmap('merge', { node: 'd', target: 'b0', bitmaps: ['nope'] }),
          bitmap('merge', { node: 'd', target: 'nope', bitmaps: ['g'] }),
          bitmap('merge', { node: 'd', target: 'g', bitmaps: [d('b0')] }),
          bitmap('merge', { node: 'd', target: 'g', bitmaps: [{ node: 't3', name: 'b0' }] }),
          bitmap('merge', { node: 'd', target: 'g', bitmaps: [{ node: 'r', name: 'p' }] }),
          ['x-debug-block-dirty-bitmap-sha256', d('pb')],
          ['x-debug-block-dirty-bitmap-sha256', d('b0')],
          nodes,
          ...[
            { sync: 'incremental' },
            { sync: 'bitmap' },
            { sync: 'incremental', bitmap: 'x' },
            { sync: 'incremental', bitmap: 'pb', 'bitmap-mode': 'never' },
            { sync: 'bitmap', bitmap: 'pb' },
            { sync: 'full', 'bitmap-mode': 'always' },
            { sync: 'full', bitmap: 'pb' },
            { sync: 'none', bitmap: 'pb', 'bitmap-mode': 'always' },
            { sync: 'full', bitmap: 'pb', 'bitmap-mode': 'never' },
            { sync: 'top', bitmap: 'pb', 'bitmap-mode': 'never' },
            { sync: 'full', target: 'd' },
            { sync: 'full', target: 't3' },
            { sync: 'full', target: 'zz' },
            { sync: 'full', device: 'zz' },
            { sync: 'full', 'job-id': '1bad' },
            { sync: 'weird' },
            { sync: 'full', 'x-perf': { 'max-workers': 0 } },
            { sync: 'full', 'x-perf': { 'max-chunk': -1 } },
            { sync: 'full', 'x-perf': { 'max-chunk': 4096 } },
            { sync: 'full', compress: true, target: 'r' },
            { sync: 'full', bogus: 1 },
            { sync: 'full', speed: 'x' },
            { sync: 'full', 'auto-finalize': 3 },
            { sync: 'bitmap', bitmap: 'pb', 'bitmap-mode': 'never' },
            { sync: 'incremental', bitmap: 'pb', 'auto-finalize': false },
          ].flatMap(backup),
          ['blockdev-backup', { device: 'd', target: 't2', sync: 'full' }],
          ['blockdev-backup', { device: 'd', sync: 'full' }],
          bitmap('clear', d('pb')),
          bitmap('remove', d('pb')),
          bitmap('enable', d('pb')),
          bitmap('disable', d('pb')),
          bitmap('merge', { node: 'd', target: 'pb', bitmaps: ['b0'] }),
          bitmap('merge', { node: 'd', target: 'b0', bitmaps: ['pb'] }),
          [
            'blockdev-backup',
            { device: 'd', target: 't2', sync: 'incremental', bitmap: 'pb', 'job-id': 'j9' },
          ],
          ['job-cancel', { id: 'j' }],
          until('j', 'null'),
          nodes,
          ...backup({ sync: 'incremental', bitmap: 'pb' }),
          nodes,
          ...backup({ sync: 'full', bitmap: 'b0', 'bitmap-mode': 'always' }),
          nodes,
        ],
      );
    });

    it('with transactions and jobs that make images', async () => {
      const transaction = (actions: readonly Message[], properties?: Message): Step[] => [
        ['transaction', { actions, ...(properties === undefined ? {} : { properties }) }],
        ...actions.flatMap(({ data }): readonly Step[] => {
          const id = (data as Message)['job-id'];
          return id === undefined ? [] : [until(String(id), 'null', 'pending', ...statusOf(String(id)))];
        }),
      ];
      // Those that wait for others, and those that never end by themselves.
      const statusOf = (id: string): readonly string[] =>
        id === 'a5' ? ['waiting'] : id === 'b5' ? ['running'] : [];
      const grouped = { 'completion-mode': 'grouped' };
      const backup = (device: string, target: string, id: string, more: Message = {}): Message => ({
        type: 'blockdev-backup',
        data: { device, target, sync: 'full', 'job-id': id, ...more },
      });
      const bitmap = (action: string, name: string): Message => ({
        type: `block-dirty-bitmap-${action}`,
        data: { node: 'd', name },
      });
      const nodes: Step = ['query-named-block-nodes', { flat: true }];
      const create = (options: Message): Step[] => [
        ['blockdev-create', { 'job-id': 'c', options }],
        until('c', 'concluded'),
        ['query-jobs'],
        ['job-dismiss', { id: 'c' }],
      ];
      await same(
        (at) => {
          for (const name of ['d', 't', 't2']) {
            run('qemu-img', ['create', '-q', '-f', 'qcow2', at(`${name}.qcow2`), '4M']);
          }
          run('qemu-io', ['-c', 'write -P 1 0 1M', at('d.qcow2')]);
          run('qemu-img', ['create', '-q', '-f', 'raw', at('r.raw'), '4M']);
        },
        [
          ...['d', 't', 't2'].map((name): Step => ['blockdev-add', qcow2(name)]),
          ['blockdev-add', { driver: 'raw', 'node-name': 'r', file: { driver: 'file', filename: 'r.raw' } }],
          ...transaction([{ type: 'abort', data: {} }]),
          ...transaction([{ type: 'nope', data: {} }]),
          ...transaction([
            { type: 'block-dirty-bitmap-add', data: { node: 'd', name: 'b', granularity: 'x' } },
          ]),
          ...transaction([bitmap('add', 'b0'), bitmap('add', 'g')]),
          ...transaction([bitmap('add', 'n1'), bitmap('clear', 'b0'), { type: 'abort', data: {} }]),
          nodes,
          ...transaction([bitmap('add', 'n1'), bitmap('disable', 'b0'), bitmap('remove', 'g')]),
          nodes,
          ...transaction([backup('d', 't', 'a'), backup('r', 't2', 'b')]),
          ...transaction([backup('d', 't', 'a2'), backup('r', 't2', 'b2')], grouped),
          ...transaction(
            [backup('d', 't', 'a3', { 'auto-finalize': false }), backup('r', 't2', 'b3')],
            grouped,
          ),
          ['job-finalize', { id: 'b3' }],
          until('a3', 'null'),
          until('b3', 'null'),
          ['query-jobs'],
          ...transaction([backup('d', 't', 'a4'), backup('r', 'zz', 'b4')]),
          ...transaction(
            [
              backup('d', 't', 'a5', { 'auto-dismiss': false }),
              backup('r', 't2', 'b5', { sync: 'none', 'auto-dismiss': false }),
            ],
            grouped,
          ),
          ['query-jobs'],
          ['job-cancel', { id: 'b5' }],
          until('a5', 'concluded'),
          until('b5', 'concluded'),
          ['query-jobs'],
          ['query-block-jobs'],
          ['job-dismiss', { id: 'a5' }],
          ['job-dismiss', { id: 'b5' }],
          ...create({ driver: 'file', filename: 'new.qcow2', size: 0 }),
          ['blockdev-add', { driver: 'file', 'node-name': 'nf', filename: 'new.qcow2' }],
          ...create({ driver: 'qcow2', file: 'nf', size: MiB }),
          ...create({ driver: 'qcow2', file: 'zz', size: MiB }),
          ['drive-backup', { device: 'd', target: 'db.qcow2', sync: 'full', 'job-id': 'x1' }],
          until('x1', 'null'),
          ['drive-backup', { device: 'd', target: '/nonexistent/db', sync: 'full', 'job-id': 'x2' }],
          ['drive-backup', { device: 'd', target: 'no', sync: 'full', mode: 'existing', 'job-id': 'x2' }],
          ['drive-backup', { device: 'd', target: 'db2', sync: 'full', format: 'bogus', 'job-id': 'x2' }],
        ],
      );
    });

    it('with errors of the target under every policy', async () => {
      const steps = (['report', 'stop', 'enospc', 'auto'] as const).flatMap((policy) =>
        [5, 28].flatMap((errno): Step[] => {
          const id = `${policy}${errno}`;
          const stops = policy === 'stop' || (errno === 28 && policy !== 'report');
          return [
            [
              'blockdev-add',
              {
                driver: 'blkdebug',
                'node-name': `bd-${id}`,
                image: { driver: 'null-co', size: 65536 },
                'inject-error': [{ event: 'none', iotype: 'write', errno, once: true }],
              },
            ],
            [
              'blockdev-backup',
              {
                ...{ device: 'r', target: `bd-${id}`, sync: 'full', 'job-id': id, 'auto-dismiss': false },
                'on-target-error': policy,
                // Nobody else has another try at what has failed.
                'x-perf': { 'max-workers': 1 },
              },
            ],
            until(id, stops ? 'paused' : 'concluded'),
            ['query-jobs'],
            ['query-block-jobs'],
            ...(stops
              ? ([['job-resume', { id }], until(id, 'concluded'), ['query-jobs']] satisfies readonly Step[])
              : []),
            ['job-dismiss', { id }],
          ];
        }),
      );
      await same(
        (at) => {
          run('qemu-img', ['create', '-q', '-f', 'raw', at('r.raw'), '64k']);
          run('qemu-io', ['-f', 'raw', '-c', 'write -P 1 0 64k', at('r.raw')]);
        },
        [
          ['blockdev-add', { driver: 'raw', 'node-name': 'r', file: { driver: 'file', filename: 'r.raw' } }],
          ...steps,
        ],
      );
    });
  },
);
