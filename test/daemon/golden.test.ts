/** The same sessions with our daemon and with QEMU's: answers, and the events of each job, are the same. */
import { describe, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import { hasQemu, MiB, qcow2, type Session, type Step, same, sh, until } from '../support/sessions.js';

const plays = (prepare: string, steps: readonly Step[]): Session => ({ prepare, steps, drains: true });

describe.skipIf(!hasQemu())('a session', () => {
  it('with nodes, exports and the verbs of a job', async () => {
    const job = { id: 'j' };
    await same(
      plays(
        `
          qemu-img create -q -f qcow2 base.qcow2 4M
          qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2
          qemu-img bitmap --add d.qcow2 pb
          qemu-img create -q -f qcow2 t.qcow2 4M
          qemu-io -c 'write -P 1 0 1M' d.qcow2 >/dev/null`,
        [
          qcow2('d'),
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
          ...[
            ...[
              { iothread: 'none' },
              { name: 'x'.repeat(4097) },
              { name: 'y', description: 'x'.repeat(4097) },
            ],
            ...[
              { name: 'y', bitmaps: ['pb'] },
              { name: 'z', bitmaps: ['pb'], writable: true },
            ],
          ].map((more): Step => ['block-export-add', { type: 'nbd', id: 'e1', 'node-name': 'd', ...more }]),
          ['block-export-del', { id: 'e1' }],
          sh("qemu-img info 'nbd+unix:///nope?socket=n.sock'"),
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
      ),
    );
  });

  it('with dirty bitmaps, bitmap modes and wrong arguments', async () => {
    const bitmap = (action: string, given: Message): Step => [`block-dirty-bitmap-${action}`, given];
    const d = (name: string): Message => ({ node: 'd', name });
    const backup = (given: Message): Step[] => [
      ['blockdev-backup', { device: 'd', target: 't', 'job-id': 'j', ...given }],
      until('j', given['auto-finalize'] === false ? 'pending' : 'null'),
    ];
    const nodes: Step = ['query-named-block-nodes', { flat: true }];
    await same(
      plays(
        `
          qemu-img create -q -f qcow2 d.qcow2 4M
          qemu-img bitmap --add d.qcow2 pb
          qemu-io -c 'write -P 1 0 1M' d.qcow2 >/dev/null
          for i in t t2; do qemu-img create -q -f qcow2 $i.qcow2 4M; done
          qemu-img create -q -f qcow2 t3.qcow2 5M
          qemu-img create -q -f raw r.raw 4M`,
        [
          ...['d', 't', 't2', 't3'].map((name) => qcow2(name)),
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
      ),
    );
  });

  it('with transactions and jobs that make images', async () => {
    const transaction = (actions: readonly Message[], properties?: Message): Step[] => [
      ['transaction', { actions, ...(properties === undefined ? {} : { properties }) }],
      ...actions.flatMap(({ data }): readonly Step[] => {
        const id = (data as Message)['job-id'];
        return id === undefined ? [] : [until(String(id), statusOf(String(id)))];
      }),
    ];
    // Those that wait for others, and those that never end by themselves.
    const statusOf = (id: string): string =>
      ({ a3: 'pending', b3: 'pending', a5: 'waiting', b5: 'running' })[id] ?? 'null';
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
      plays(
        `
          for i in d t t2; do qemu-img create -q -f qcow2 $i.qcow2 4M; done
          qemu-io -c 'write -P 1 0 1M' d.qcow2 >/dev/null
          qemu-img create -q -f raw r.raw 4M`,
        [
          ...['d', 't', 't2'].map((name) => qcow2(name)),
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
      ),
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
      plays(
        `
          qemu-img create -q -f raw r.raw 64k
          qemu-io -f raw -c 'write -P 1 0 64k' r.raw >/dev/null`,
        [
          ['blockdev-add', { driver: 'raw', 'node-name': 'r', file: { driver: 'file', filename: 'r.raw' } }],
          ...steps,
        ],
      ),
    );
  });
});
