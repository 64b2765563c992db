/** Sessions with mirrors, played to QEMU's daemon and to ours. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { hasPeer } from '../support/peers.js';
import type { Message } from '../support/qmp.js';
import { event, MiB, play, type Session, type Step, sh, until } from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-mirrors-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const qcow2 = (name: string, more: Message = {}): Step => [
  'blockdev-add',
  { driver: 'qcow2', 'node-name': name, file: { driver: 'file', filename: `${name}.qcow2` }, ...more },
];
const raw = (name: string, more: Message = {}): Step => [
  'blockdev-add',
  { driver: 'raw', 'node-name': name, file: { driver: 'file', filename: `${name}.raw` }, ...more },
];
const create = (...names: readonly string[]): string =>
  names.map((name) => `qemu-img create -q -f qcow2 ${name}.qcow2 4M`).join('; ');

/** The fields of a block job that do not depend on the moment. */
const jobs: readonly Step[] = [['query-jobs'], ['query-block-jobs']];

const id = { id: 'm' };
const device = { device: 'm' };
const ready = event('BLOCK_JOB_READY', device);
const mirror = (given: Message): Step => [
  'blockdev-mirror',
  { 'job-id': 'm', device: 'd', target: 't', sync: 'full', 'auto-dismiss': false, ...given },
];
/** A mirror that can be refused, and is cancelled where it was not. */
const refused = (given: Message): readonly Step[] => [mirror(given)];
const over: readonly Step[] = [until('m', 'concluded'), ...jobs, ['job-dismiss', id]];

async function same(session: Session): Promise<void> {
  const { peer = 'qemu-storage-daemon' } = session;
  const [theirs, ours] = await Promise.all([
    play(peer, join(folder, 'qemu'), session),
    play('stillframe', join(folder, 'stillframe'), session),
  ]);
  expect(ours.answers).toEqual(theirs.answers);
  // A machine tells of its end.
  const { '': _, ...events } = theirs.events;
  expect(ours.events).toEqual(peer === 'qemu-storage-daemon' ? theirs.events : events);
}

describe.skipIf(!hasPeer('qemu-storage-daemon') || !hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'a session',
  () => {
    it('that leaves an overlay behind, which nobody has added, has no such node any more', async () => {
      const nodes: Step = ['query-named-block-nodes', { flat: true }];
      const overlay: Step = [
        'blockdev-snapshot-sync',
        { 'node-name': 'd', 'snapshot-file': 'o.qcow2', 'snapshot-node-name': 'o' },
      ];
      await same({
        prepare: create('d', 't'),
        steps: [
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          qcow2('d'),
          ['block-export-add', { type: 'nbd', id: 'e', 'node-name': 'd', writable: true }],
          overlay,
          qcow2('t', { backing: 'd' }),
          mirror({ device: 'o', sync: 'top' }),
          until('m', 'ready'),
          ready,
          ['block-job-cancel', device],
          ...over,
          nodes,
          mirror({ device: 'o', sync: 'top' }),
          until('m', 'ready'),
          ['job-complete', id],
          ...over,
          nodes,
          ['blockdev-del', { 'node-name': 'o' }],
        ],
      });
    });

    it('with the verbs of a mirror in all its statuses', async () => {
      await same({
        prepare: `qemu-img create -q -f qcow2 base.qcow2 4M; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2; qemu-io -c 'write -P 1 0 1M' d.qcow2; ${create('t', 't2')}`,
        steps: [
          qcow2('d'),
          qcow2('t'),
          qcow2('t2', { discard: 'unmap' }),
          mirror({}),
          until('m', 'ready'),
          ready,
          ...jobs,
          ['job-finalize', id],
          ['job-dismiss', id],
          ['job-resume', id],
          ['job-pause', id],
          until('m', 'standby'),
          ...jobs,
          ['job-pause', id],
          ['block-job-cancel', device],
          ['block-job-set-speed', { ...device, speed: 7 }],
          ['block-job-set-speed', { ...device, speed: -7 }],
          ['job-resume', id],
          until('m', 'ready'),
          ...jobs,
          ['job-complete', id],
          until('m', 'concluded'),
          ...jobs,
          ...(['job-pause', 'job-resume', 'job-complete', 'job-cancel', 'job-finalize'] as const).map(
            (verb): Step => [verb, id],
          ),
          ['job-dismiss', id],
          ['query-named-block-nodes', { flat: true }],
          // A copy of that moment.
          mirror({ target: 't2' }),
          until('m', 'ready'),
          ['block-job-cancel', device],
          ...over,
          mirror({ target: 't2', sync: 'top' }),
          until('m', 'ready'),
          ['job-cancel', id],
          ...over,
          mirror({ target: 't2', sync: 'top' }),
          until('m', 'ready'),
          ['block-job-cancel', { ...device, force: true }],
          ...over,
          mirror({ target: 't2', sync: 'none', 'auto-finalize': false }),
          until('m', 'ready'),
          ...jobs,
          ['block-job-complete', device],
          until('m', 'pending'),
          ['query-jobs'],
          ['job-complete', id],
          ['job-cancel', id],
          ...over,
          mirror({ target: 't2', sync: 'none', 'auto-finalize': false }),
          until('m', 'ready'),
          ['block-job-cancel', device],
          until('m', 'pending'),
          ['block-job-cancel', device],
          ...over,
          mirror({ target: 't2', sync: 'none', 'auto-finalize': false }),
          until('m', 'ready'),
          ['job-complete', id],
          until('m', 'pending'),
          ['job-finalize', id],
          ...over,
          ['query-named-block-nodes', { flat: true }],
          sh('qemu-img compare -U d.qcow2 t2.qcow2'),
        ],
        after: 'qemu-img compare d.qcow2 t.qcow2; qemu-img check t.qcow2 | grep -v fragmented',
      });
    });

    it('with wrong arguments of mirrors, and nodes that are in use', async () => {
      const second = (command: string, from: string, to: string): Step => [
        command,
        { 'job-id': 'm2', device: from, target: to, sync: 'full' },
      ];
      const endMirror: readonly Step[] = [until('m', 'ready'), ['job-cancel', id], ...over];
      await same({
        drains: true,
        prepare: `${create('base')}; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2; ${create('t', 't2', 'ro')}; qemu-img create -q -f qcow2 big.qcow2 5M; qemu-img create -q -f qcow2 small.qcow2 2M; qemu-img create -q -f raw r.raw 4M`,
        steps: [
          qcow2('d'),
          qcow2('t', { file: { driver: 'file', filename: 't.qcow2', 'node-name': 'tf' } }),
          ...['t2', 'big', 'small'].map((name) => qcow2(name)),
          qcow2('ro', { 'read-only': true }),
          raw('r'),
          ...[
            { granularity: 1000 },
            { granularity: 256 },
            { granularity: 1 << 27 },
            { 'buf-size': -1 },
            { speed: -1 },
            { sync: 'incremental' },
            { sync: 'bitmap' },
            { sync: 'weird' },
            { target: 'd' },
            { target: 'nope' },
            { device: 'nope' },
            { target: 'ro' },
            { 'job-id': '1bad' },
            { 'copy-mode': 'weird' },
            { 'on-source-error': 'weird' },
            { replaces: 'nope' },
            { replaces: 't' },
            { replaces: 'tf' },
            { 'filter-node-name': 't2' },
            { 'filter-node-name': '1x' },
            { unmap: true },
            { target: 'tf' },
            { device: 'tf', target: 'r' },
            { bogus: 1 },
          ].flatMap(refused),
          ['blockdev-mirror', { device: 'd', target: 't', sync: 'full' }],
          ['blockdev-mirror', { 'job-id': 'm', device: 'd', sync: 'full' }],
          ['blockdev-mirror', { 'job-id': 'm', device: 'd', target: 't' }],
          ...['big', 'small'].flatMap((target) => [mirror({ target }), ...over]),
          ...[
            { granularity: 0 },
            { granularity: 512 },
            { granularity: 1 << 26, 'copy-mode': 'write-blocking' },
            { 'buf-size': 1000, replaces: 'd', 'filter-node-name': 'filt' },
            { device: 'r', target: 't' },
            { target: 'r' },
          ].flatMap((given) => [mirror(given), ...endMirror]),
          mirror({}),
          until('m', 'ready'),
          second('blockdev-mirror', 'd', 't2'),
          second('blockdev-mirror', 't', 't2'),
          second('blockdev-mirror', 't2', 't'),
          second('blockdev-mirror', 't2', 'd'),
          mirror({ device: 't2', target: 'r' }),
          second('blockdev-backup', 'd', 't2'),
          second('blockdev-backup', 't', 't2'),
          second('blockdev-backup', 't2', 't'),
          second('blockdev-backup', 't2', 'd'),
          ['block_resize', { 'node-name': 'd', size: 8 * MiB }],
          ['block_resize', { 'node-name': 't', size: 8 * MiB }],
          ['blockdev-del', { 'node-name': 'd' }],
          ['blockdev-del', { 'node-name': 't' }],
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['block-export-add', { type: 'nbd', id: 'e0', 'node-name': 't', writable: true }],
          ['block-export-add', { type: 'nbd', id: 'e1', 'node-name': 't' }],
          ['job-cancel', id],
          ...over,
          ['block-export-add', { type: 'nbd', id: 'e3', 'node-name': 't2', writable: true }],
          ['block-export-add', { type: 'nbd', id: 'e4', 'node-name': 'r' }],
          mirror({ target: 't2' }),
          mirror({ target: 'r' }),
          ['block-export-del', { id: 'e3' }],
          ['block-export-del', { id: 'e4' }],
          ['nbd-server-stop'],
          second('blockdev-backup', 'd', 't2'),
          until('m2', 'null'),
        ],
      });
    });

    it('with errors of mirrors under every policy', async () => {
      const steps = (['source', 'target'] as const).flatMap((side) =>
        (['report', 'ignore', 'stop', 'enospc', 'auto'] as const).flatMap((policy) =>
          [5, 28].flatMap((errno): Step[] => {
            const job = `${side}-${policy}${errno}`;
            const stops = policy === 'stop' || (errno === 28 && policy !== 'report' && policy !== 'ignore');
            const goesOn = stops || policy === 'ignore';
            const broken = {
              driver: 'blkdebug',
              'node-name': `bd-${job}`,
              image: {
                driver: 'raw',
                file: { driver: 'file', filename: side === 'source' ? 's.raw' : 't.raw', locking: 'off' },
              },
              'inject-error': [
                { event: 'none', iotype: side === 'source' ? 'read' : 'write', errno, once: true },
              ],
            };
            return [
              ['blockdev-add', broken],
              [
                'blockdev-mirror',
                {
                  'job-id': job,
                  device: side === 'source' ? broken['node-name'] : 's',
                  target: side === 'source' ? 't' : broken['node-name'],
                  sync: 'full',
                  'auto-dismiss': false,
                  [`on-${side}-error`]: policy,
                },
              ],
              until(job, stops ? 'paused' : goesOn ? 'ready' : 'concluded'),
              ...jobs,
              ...(stops
                ? ([
                    ['job-complete', { id: job }],
                    ['block-job-cancel', { device: job }],
                    ['job-resume', { id: job }],
                    until(job, 'ready'),
                  ] as const)
                : []),
              ...(goesOn ? ([...jobs, ['block-job-cancel', { device: job }]] as const) : []),
              until(job, 'concluded'),
              ['query-jobs'],
              ['job-dismiss', { id: job }],
              ['blockdev-del', { 'node-name': broken['node-name'] }],
              sh('qemu-img compare -U -f raw -F raw s.raw t.raw'),
            ];
          }),
        ),
      );
      await same({
        prepare:
          "qemu-img create -q -f raw s.raw 64k; qemu-io -f raw -c 'write -P 1 0 64k' s.raw; qemu-img create -q -f raw t.raw 64k",
        steps: [
          raw('s', { file: { driver: 'file', filename: 's.raw', locking: 'off' } }),
          raw('t', { file: { driver: 'file', filename: 't.raw', locking: 'off' } }),
          ...steps,
        ],
      });
    });

    it('with errors of a mirror that is ready', async () => {
      const write = (pattern: number): Step =>
        sh(`qemu-io -f raw -c 'write -P ${pattern} 0 4k' 'nbd+unix:///d?socket=n.sock'`);
      const failing = (name: string): Step => [
        'blockdev-add',
        {
          driver: 'blkdebug',
          'node-name': name,
          image: { driver: 'raw', file: { driver: 'file', filename: 't.raw', locking: 'off' } },
          'inject-error': [{ event: 'none', iotype: 'write', errno: 5, once: true }],
        },
      ];
      await same({
        prepare:
          "qemu-img create -q -f raw s.raw 64k; qemu-io -f raw -c 'write -P 1 0 64k' s.raw; qemu-img create -q -f raw t.raw 64k",
        steps: [
          raw('d', { file: { driver: 'file', filename: 's.raw', locking: 'off' } }),
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['block-export-add', { type: 'nbd', id: 'e', 'node-name': 'd', writable: true }],
          failing('b1'),
          mirror({ target: 'b1', sync: 'none', 'on-target-error': 'stop' }),
          until('m', 'ready'),
          write(2),
          until('m', 'standby'),
          ['query-block-jobs'],
          write(3),
          ['job-resume', id],
          until('m', 'ready'),
          ['block-job-cancel', device],
          until('m', 'concluded'),
          ['query-jobs'],
          ['job-dismiss', id],
          sh('qemu-img compare -U -f raw -F raw s.raw t.raw'),
          failing('b2'),
          mirror({ target: 'b2', sync: 'none' }),
          until('m', 'ready'),
          write(4),
          until('m', 'concluded'),
          ...jobs,
          ['job-dismiss', id],
          ['block-export-del', { id: 'e' }],
        ],
      });
    });

    it('with mirrors that take the place of drives', async () => {
      const uri = "'nbd+unix:///x?socket=n.sock'";
      await same({
        prepare: `${create('base')}; qemu-io -c 'write -P 9 0 4M' base.qcow2; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2; qemu-io -c 'write -P 1 0 1M' d.qcow2; ${create('t')}; qemu-img create -q -f raw r.raw 4M; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2`,
        steps: [
          qcow2('d'),
          qcow2('t'),
          raw('r'),
          qcow2('over', { backing: null }),
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['block-export-add', { type: 'nbd', id: 'e', name: 'x', 'node-name': 'd', writable: true }],
          ['block-dirty-bitmap-add', { node: 'd', name: 'b' }],
          mirror({}),
          until('m', 'ready'),
          sh(`qemu-io -f raw -c 'write -P 5 64k 64k' -c 'write -z 3M 512k' -c 'discard 2M 64k' ${uri}`),
          ['job-complete', id],
          ...over.slice(0, 1),
          ['job-dismiss', id],
          ['query-block-exports'],
          sh(`qemu-io -f raw -c 'read -P 5 64k 64k' -c 'write -P 6 128k 64k' ${uri}`),
          ['query-named-block-nodes', { flat: true }],
          ['blockdev-del', { 'node-name': 't' }],
          ['blockdev-del', { 'node-name': 'd' }],
          // On to a raw image, and under an image that has what is on top only.
          mirror({ device: 't', target: 'r' }),
          until('m', 'ready'),
          sh(`qemu-io -f raw -c 'write -P 7 256k 64k' ${uri}`),
          ['job-complete', id],
          until('m', 'concluded'),
          ['job-dismiss', id],
          ['blockdev-del', { 'node-name': 't' }],
          sh(`qemu-io -f raw -c 'read -P 7 256k 64k' -c 'write -P 8 0 4k' ${uri}`),
          ['query-block-exports'],
          ['block-export-del', { id: 'e' }],
          ['blockdev-del', { 'node-name': 'r' }],
        ],
        after: `qemu-img compare t.qcow2 r.raw; qemu-io -f raw -c 'read -P 8 0 4k' -c 'read -P 5 64k 64k' -c 'read -P 6 128k 64k' -c 'read -P 7 256k 64k' r.raw; qemu-img check t.qcow2 | sed 's/, .* fragmented//'`,
      });
    });

    it('with mirrors below filters and above images', async () => {
      await same({
        prepare: `${create('d', 't', 't2')}; qemu-io -c 'write -P 1 0 1M' d.qcow2; qemu-img create -q -f qcow2 top.qcow2 4M`,
        steps: [
          ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
          qcow2('d'),
          qcow2('t'),
          qcow2('t2'),
          ['blockdev-add', { driver: 'throttle', 'node-name': 'th', 'throttle-group': 'g', file: 'd' }],
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['block-export-add', { type: 'nbd', id: 'e', 'node-name': 'th', writable: true }],
          mirror({}),
          mirror({ device: 'th', target: 'th' }),
          mirror({ device: 'th', target: 'd' }),
          mirror({ device: 'th', replaces: 'd' }),
          until('m', 'ready'),
          sh(`qemu-io -f raw -c 'write -P 2 2M 64k' 'nbd+unix:///th?socket=n.sock'`),
          ['job-complete', id],
          until('m', 'concluded'),
          ['job-dismiss', id],
          ['query-block-exports'],
          ['blockdev-del', { 'node-name': 'd' }],
          sh(`qemu-io -f raw -c 'read -P 2 2M 64k' -c 'write -P 3 3M 64k' 'nbd+unix:///th?socket=n.sock'`),
          mirror({ device: 'th', target: 't2' }),
          until('m', 'ready'),
          ['job-complete', id],
          until('m', 'concluded'),
          ['job-dismiss', id],
          ['query-block-exports'],
          ['blockdev-del', { 'node-name': 'th' }],
          ['blockdev-del', { 'node-name': 't' }],
          ['block-export-del', { id: 'e' }],
        ],
        after: 'qemu-img compare t.qcow2 t2.qcow2; qemu-img compare d.qcow2 t.qcow2',
      });
    });

    it('with drive-mirror', async () => {
      const drive = (given: Message): Step => [
        'drive-mirror',
        { 'job-id': 'm', device: 'd', target: 't.qcow2', sync: 'full', 'auto-dismiss': false, ...given },
      ];
      const nodes: Step = ['query-named-block-nodes', { flat: true }];
      const run = (given: Message, end: Step): readonly Step[] => [
        drive(given),
        until('m', 'ready', 'concluded'),
        ['query-block-jobs'],
        end,
        until('m', 'concluded'),
        ['query-jobs'],
        ['job-dismiss', id],
        nodes,
        sh(`qemu-img info -U '${String(given['target'])}'`),
      ];
      const soft: Step = ['block-job-cancel', device];
      const complete: Step = ['job-complete', id];
      await same({
        prepare: `${create('base')}; qemu-io -c 'write -P 2 2M 1M' base.qcow2; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2; qemu-io -c 'write -P 1 0 1M' d.qcow2; ${create('ex', 'b2')}; for x in exb exc; do qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 $x.qcow2; done; qemu-img create -q -f qcow2 big.qcow2 5M`,
        steps: [
          qcow2('d'),
          qcow2('b2'),
          ['drive-mirror', { device: 'd', target: 't.qcow2', sync: 'full' }],
          drive({ format: 'bogus' }),
          drive({ target: '/nonexistent/x' }),
          drive({ target: 'no.qcow2', mode: 'existing' }),
          drive({ device: 'nope' }),
          drive({ 'node-name': 'd' }),
          drive({ 'node-name': '1x' }),
          drive({ replaces: 'd' }),
          drive({ format: 'raw', sync: 'top', target: 't.raw' }),
          drive({ sync: 'incremental' }),
          drive({ granularity: 1000 }),
          drive({ speed: -1 }),
          drive({ mode: 'weird' }),
          drive({ 'filter-node-name': 'x' }),
          ...run({ target: 'big.qcow2', mode: 'existing', format: 'qcow2' }, complete),
          ...run({ target: 't0.qcow2', replaces: 'd', 'node-name': 'new' }, soft),
          ...run({ target: 't1.qcow2', 'node-name': 'n1' }, soft),
          ...run({ target: 't2.qcow2', 'node-name': 'n2', sync: 'top' }, soft),
          ...run({ target: 't3.qcow2', 'node-name': 'n3', sync: 'none' }, soft),
          ...run({ target: 't4.raw', format: 'raw', 'node-name': 'n4' }, ['job-cancel', id]),
          ...run({ target: 'exb.qcow2', mode: 'existing', 'node-name': 'n5', sync: 'top' }, soft),
          ...run({ target: 'ex.qcow2', mode: 'existing' }, complete),
          ...run({ target: 't7.qcow2', device: 'b2', unmap: false, 'node-name': 'n7' }, complete),
          // The drive stays on what takes its place, and what that lies on.
          ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
          ['block-export-add', { type: 'nbd', id: 'e', 'node-name': 'd', writable: true, name: 'x' }],
          ...run({ target: 't8.qcow2', 'node-name': 'n8', sync: 'top' }, complete),
          ['query-block-exports'],
          sh(
            `qemu-io -f raw -c 'read -P 1 0 1M' -c 'read -P 2 2M 1M' -c 'write -P 3 3M 64k' 'nbd+unix:///x?socket=n.sock'`,
          ),
          // What an image that was there says of its backing file counts from then on.
          ...run(
            { device: 'n8', target: 'exc.qcow2', mode: 'existing', 'node-name': 'n9', sync: 'top' },
            complete,
          ),
          sh(
            `qemu-io -f raw -c 'read -P 1 0 1M' -c 'read -P 2 2M 1M' -c 'read -P 3 3M 64k' 'nbd+unix:///x?socket=n.sock'`,
          ),
          ['blockdev-del', { 'node-name': 'd' }],
          ['blockdev-del', { 'node-name': 'n8' }],
          ['block-export-del', { id: 'e' }],
          nodes,
        ],
        after:
          'for name in t1 t2 t3 exb ex; do qemu-img compare d.qcow2 $name.qcow2; done; qemu-img compare -f qcow2 -F raw d.qcow2 t4.raw; qemu-io -c "read -P 3 3M 64k" -c "read -P 2 2M 1M" t8.qcow2',
      });
    });

    it.skipIf(!hasPeer('qemu-system-x86_64'))('with drive-mirror of devices', async () => {
      const drive = (name: string, target: string, more: Message = {}): Step => [
        'drive-mirror',
        { device: name, target: `${target}.qcow2`, sync: 'full', ...more },
      ];
      const nodes: Step = ['query-named-block-nodes'];
      const io = (name: string, command: string): Step => [
        'human-monitor-command',
        { 'command-line': `qemu-io ${name} "${command}"` },
      ];
      const move = (job: string): readonly Step[] => [['job-complete', { id: job }], until(job, 'null')];
      await same({
        peer: 'qemu-system-x86_64',
        drains: true,
        prepare: `${create('d', 'base')}; qemu-io -c 'write -P 1 0 1M' d.qcow2; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 o.qcow2`,
        options: [
          ...['--drive', 'if=none,id=drive0,file=d.qcow2,format=qcow2'],
          ...['--drive', 'if=none,id=drive1,file=o.qcow2,format=qcow2,node-name=o'],
        ],
        steps: [
          drive('drive0', 't'),
          until('drive0', 'ready'),
          ['query-block-jobs'],
          nodes,
          drive('drive0', 't2'),
          drive('drive1', 't2', { 'job-id': 'drive0' }),
          io('drive0', 'write -P 7 2M 64k'),
          ...move('drive0'),
          nodes,
          io('drive0', 'write -P 8 3M 64k'),
          drive('drive1', 't3', { sync: 'top', 'job-id': 'm' }),
          until('m', 'ready'),
          ...move('m'),
          nodes,
          // On top of the drive itself.
          drive('drive1', 't4', { sync: 'none', 'job-id': 'm' }),
          until('m', 'ready'),
          io('drive1', 'write -P 8 3M 64k'),
          ...move('m'),
          nodes,
        ],
        after:
          "qemu-io -c 'read -P 7 2M 64k' -c 'read -P 8 3M 64k' t.qcow2; qemu-io -c 'read -P 8 3M 64k' t4.qcow2; qemu-img compare d.qcow2 t.qcow2",
      });
    });

    it('with a mirror that is there at the end', async () => {
      await same({
        drains: true,
        prepare: `${create('d', 't')}; qemu-io -c 'write -P 1 0 1M' d.qcow2`,
        steps: [
          qcow2('d'),
          qcow2('t'),
          mirror({ 'filter-node-name': 'f' }),
          until('m', 'ready'),
          ['query-named-block-nodes'],
          ['query-named-block-nodes', { flat: true }],
          ['blockdev-del', { 'node-name': 'f' }],
        ],
        after: 'qemu-img compare d.qcow2 t.qcow2',
      });
    });
  },
);
