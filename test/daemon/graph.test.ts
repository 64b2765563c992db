/** The graph of a daemon changes while its drives are in use. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { tool } from '../support/nbd-client.js';
import { hasPeer } from '../support/peers.js';
import type { Message } from '../support/qmp.js';
import { MiB, play, type Session, sh, until } from '../support/sessions.js';
import { startDaemon, verify } from '../support/written-drive.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-graph-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const qcow2 = (name: string, more: Message = {}): Message => ({
  driver: 'qcow2',
  'node-name': name,
  file: { driver: 'file', filename: `${name}.qcow2`, 'node-name': `${name}-file` },
  ...more,
});
const raw = (name: string): Message => ({
  driver: 'raw',
  'node-name': name,
  file: { driver: 'file', filename: `${name}.raw`, 'node-name': `${name}-file` },
});
const server = ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }] as const;
const exported = (id: string, node: string) =>
  ['block-export-add', { type: 'nbd', id, 'node-name': node, name: id, writable: true }] as const;
const io = (...commands: readonly string[]) =>
  sh(`qemu-io -f raw ${commands.map((one) => `-c '${one}'`).join(' ')} 'nbd+unix:///live?socket=n.sock'`);
const resize = (node: string, size: number) => ['block_resize', { 'node-name': node, size }] as const;
const nodes = ['query-named-block-nodes', { flat: true }] as const;
const image = (name: string): string =>
  `qemu-img info ${name}.qcow2; qemu-img check ${name}.qcow2 | sed 's/, .*fragmented//; /end offset/d';`;

async function same(session: Session): Promise<void> {
  const [theirs, ours] = await Promise.all([
    play('qemu-storage-daemon', join(folder, 'theirs'), session),
    play('stillframe', join(folder, 'ours'), session),
  ]);
  expect(ours.answers).toEqual(theirs.answers);
  expect(ours.events).toEqual(theirs.events);
}

describe.skipIf(!hasPeer('qemu-storage-daemon') || !hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'beside QEMU',
  () => {
    it('drives become larger and smaller, with their bitmaps, where nobody minds', async () => {
      await same({
        prepare: `
          for x in a t; do qemu-img create -q -f qcow2 $x.qcow2 4M; done
          qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 over.qcow2; truncate -s 3M r.raw
          qemu-img bitmap --add a.qcow2 kept; qemu-io -f qcow2 -c 'write -P 7 0 1M' a.qcow2 >/dev/null`,
        steps: [
          ['blockdev-add', qcow2('a')],
          ['blockdev-add', raw('r')],
          ['block-dirty-bitmap-add', { node: 'a', name: 'own', granularity: 65536 }],
          ['block-dirty-bitmap-add', { node: 'r', name: 'own', granularity: 65536 }],
          server,
          resize('a', 8 * MiB),
          nodes,
          resize('a', -1),
          resize('a', 1000),
          resize('nobody', MiB),
          ['block_resize', { device: 'a', size: MiB }],
          ['block_resize', { size: MiB }],
          resize('a-file', MiB),
          resize('r', 2 * MiB),
          resize('r-file', 4_097_152),
          resize('r', 1001),
          nodes,
          exported('live', 'a'),
          io('write -P 3 7M 64k'),
          resize('a', 6 * MiB),
          ['block-export-del', { id: 'live' }],
          resize('a', 6 * MiB),
          nodes,
          ['blockdev-add', qcow2('over', { backing: 'a' })],
          resize('a', 4 * MiB),
          resize('over', 2 * MiB),
          ['blockdev-del', { 'node-name': 'over' }],
          ['blockdev-add', qcow2('t', { 'read-only': true })],
          resize('t', 6 * MiB),
          ['blockdev-del', { 'node-name': 't' }],
          ['blockdev-add', qcow2('t')],
          resize('a', 4 * MiB),
          ['blockdev-backup', { 'job-id': 'j', device: 'a', target: 't', sync: 'none' }],
          resize('a', 6 * MiB),
          resize('t', 6 * MiB),
          ['job-cancel', { id: 'j' }],
          until('j', 'null'),
          resize('a', 6 * MiB),
        ],
        after: `${image('a')} ${image('over')} wc -c <r.raw
          qemu-io -r -f qcow2 -c 'read -P 7 0 1M' -c 'read -P 0 1M 5M' a.qcow2`,
      });
    });

    it('overlays are put on drives that clients write to', async () => {
      const overlay = (node: string, name: string, more: Message = {}) => ({
        'node-name': node,
        'snapshot-file': `${name}.qcow2`,
        'snapshot-node-name': name,
        ...more,
      });
      const sync = 'blockdev-snapshot-sync';
      await same({
        prepare: `
          for x in a s1 t; do qemu-img create -q -f qcow2 $x.qcow2 4M; done
          for x in r r2; do truncate -s 4M $x.raw; done
          qemu-img bitmap --add a.qcow2 kept; qemu-io -f qcow2 -c 'write -P 7 0 1M' a.qcow2 >/dev/null`,
        steps: [
          ['blockdev-add', qcow2('a')],
          ['blockdev-add', raw('r')],
          ['blockdev-add', raw('r2')],
          ['block-dirty-bitmap-add', { node: 'a', name: 'own', granularity: 65536 }],
          server,
          exported('live', 'a'),
          exported('live2', 'r'),
          io('write -P 1 1M 64k'),
          ['blockdev-add', qcow2('s1', { backing: null })],
          ['blockdev-snapshot', { node: 'nobody', overlay: 's1' }],
          ['blockdev-snapshot', { node: 'a', overlay: 'nobody' }],
          ['blockdev-snapshot', { node: 'a', overlay: 'a' }],
          ['blockdev-snapshot', { node: 'a', overlay: 'r2' }],
          ['blockdev-snapshot', { node: 'a', overlay: 's1' }],
          nodes,
          ['query-named-block-nodes'],
          ['query-block-exports'],
          io('write -P 2 0 64k', 'read -P 1 1M 64k', 'read -P 7 64k 64k'),
          ['blockdev-snapshot', { node: 'a', overlay: 's1' }],
          ['blockdev-snapshot', { node: 's1', overlay: 'a' }],
          ['blockdev-del', { 'node-name': 'a' }],
          ['blockdev-del', { 'node-name': 's1' }],
          [sync, { 'node-name': 's1', 'snapshot-file': 'o1.qcow2' }],
          [sync, overlay('s1', 'r')],
          [sync, overlay('nobody', 'o1')],
          [sync, { device: 's1', 'snapshot-file': 'o1.qcow2' }],
          [sync, { ...overlay('s1', 'o1'), 'snapshot-file': '/nowhere/o1.qcow2' }],
          [sync, overlay('s1', 'o1', { format: 'raw' })],
          [sync, overlay('s1', 'o1', { format: 'nonsense' })],
          [sync, overlay('s1', 'o1', { mode: 'existing' })],
          [sync, overlay('s1', 'o1')],
          nodes,
          io('write -P 3 128k 64k', 'read -P 2 0 64k', 'read -P 1 1M 64k', 'read -P 7 64k 64k'),
          ['block-dirty-bitmap-remove', { node: 'a', name: 'kept' }],
          [
            'transaction',
            {
              actions: [
                { type: sync, data: overlay('o1', 'o2') },
                { type: sync, data: overlay('nobody', 'o3') },
              ],
            },
          ],
          [
            'transaction',
            {
              actions: [
                { type: sync, data: overlay('o1', 'o2') },
                { type: 'abort', data: {} },
              ],
            },
          ],
          nodes,
          ['blockdev-add', qcow2('t')],
          [
            'transaction',
            {
              actions: [
                { type: sync, data: overlay('o1', 'o2') },
                { type: sync, data: overlay('r', 'o3') },
                { type: 'block-dirty-bitmap-add', data: { node: 'r2', name: 'new' } },
                {
                  type: 'blockdev-backup',
                  data: { 'job-id': 'j', device: 'r2', target: 't', sync: 'full', 'auto-dismiss': false },
                },
              ],
            },
          ],
          until('j', 'concluded'),
          ['job-dismiss', { id: 'j' }],
          nodes,
          ['blockdev-backup', { 'job-id': 'k', device: 'r2', target: 't', sync: 'none' }],
          [sync, overlay('t', 'o4')],
          ['job-cancel', { id: 'k' }],
          until('k', 'null'),
          io('read -P 2 0 64k', 'write -P 4 2M 64k', 'read -P 3 128k 64k'),
          // Overlays that nobody has named are kept by those who use them.
          ['block-export-del', { id: 'live', mode: 'hard' }],
          ['block-export-del', { id: 'live2', mode: 'hard' }],
          nodes,
        ],
        drains: true,
        after: `${['a', 's1', 'o1', 'o2', 'o3', 't'].map(image).join(' ')}
          qemu-io -r -f qcow2 -c 'read -P 2 0 64k' -c 'read -P 3 128k 64k' -c 'read -P 1 1M 64k' -c 'read -P 4 2M 64k' o2.qcow2`,
      });
    });

    it('nodes are opened with other options and on other children', async () => {
      const file = (name: string): Message => ({
        driver: 'file',
        filename: `${name}.qcow2`,
        'node-name': `${name}-file`,
      });
      const on = (name: string, more: Message = {}): Message => ({
        driver: 'qcow2',
        'node-name': name,
        file: `${name}-file`,
        ...more,
      });
      const rawOn = (name: string, more: Message = {}): Message => ({
        driver: 'raw',
        'node-name': 'r',
        file: name,
        ...more,
      });
      const reopen = (...options: readonly Message[]) => ['blockdev-reopen', { options }] as const;
      await same({
        prepare: `
          for x in base b2 c; do qemu-img create -q -f qcow2 $x.qcow2 4M; done
          qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 a.qcow2; truncate -s 4M r.raw; truncate -s 4M r2.raw
          qemu-io -f qcow2 -c 'write -P 5 0 64k' b2.qcow2 >/dev/null; qemu-img bitmap --add a.qcow2 kept
          qemu-io -f qcow2 -c 'write -P 6 0 64k' base.qcow2 >/dev/null`,
        steps: [
          ...['a', 'base', 'b2'].map((name) => ['blockdev-add', file(name)] as const),
          ['blockdev-add', on('b2', { 'read-only': true })],
          ['blockdev-add', on('base', { 'read-only': true })],
          ['blockdev-add', on('a', { backing: 'base', discard: 'unmap' })],
          ['blockdev-add', raw('r')],
          ['blockdev-add', { driver: 'file', filename: 'r2.raw', 'node-name': 'r2-file' }],
          ['block-dirty-bitmap-add', { node: 'a', name: 'own' }],
          server,
          reopen({}),
          reopen({ driver: 'qcow2' }),
          reopen({ driver: 'qcow2', file: 'a-file' }),
          reopen(on('nobody')),
          reopen({ driver: 'raw', 'node-name': 'a', file: 'a-file' }),
          reopen(on('a', { file: 'b2-file' })),
          reopen(on('a')),
          reopen(on('a', { backing: 'base', 'read-only': true })),
          reopen(on('a', { backing: 'base', 'read-only': true })),
          nodes,
          exported('live', 'a'),
          reopen(on('a', { backing: 'base' })),
          nodes,
          exported('live', 'a'),
          reopen(on('a', { backing: 'base', 'read-only': true })),
          io('read -P 6 0 64k'),
          reopen(on('a', { backing: 'b2' })),
          io('read -P 5 0 64k', 'write -P 9 1M 64k'),
          nodes,
          reopen(on('a', { backing: null })),
          io('read -P 0 0 64k', 'read -P 9 1M 64k'),
          reopen(on('a', { backing: 'a' })),
          reopen(on('a', { backing: 'nobody' })),
          reopen(on('a', { backing: { driver: 'null-co' } })),
          reopen(on('a', { backing: 'base', 'lazy-refcounts': true })),
          reopen(on('a', { backing: 'base', bogus: true })),
          reopen(on('a', { backing: 'base', discard: 'ignore', 'detect-zeroes': 'on' })),
          reopen(on('a', { backing: 'base', 'detect-zeroes': 'unmap' })),
          reopen({ ...file('a'), filename: 'b2.qcow2' }),
          reopen(file('a')),
          reopen({ ...file('a'), 'read-only': true }),
          reopen(rawOn('r2-file')),
          nodes,
          reopen(rawOn('r2-file', { offset: MiB })),
          nodes,
          // Where one cannot be, none is.
          reopen(rawOn('r2-file'), on('a', { file: 'nobody' })),
          reopen(on('b2')),
          reopen(on('b2', { 'read-only': true })),
          io('read -P 6 0 64k', 'read -P 9 1M 64k', 'write -P 8 2M 64k'),
          ['block-export-del', { id: 'live', mode: 'hard' }],
          nodes,
        ],
        after: `${image('a')} ${image('b2')} qemu-io -r -f qcow2 -c 'read -P 6 0 64k' -c 'read -P 9 1M 64k' -c 'read -P 8 2M 64k' a.qcow2`,
      });
    });

    it('what was made for an image is opened as that is', async () => {
      const below = (name: string, more: Message = {}): Message => ({
        ...{ driver: 'qcow2', file: { driver: 'file', filename: `${name}.qcow2`, ...more } },
      });
      const over = (more: Message = {}): Message => ({
        ...{ ...below('over'), 'node-name': 'over', backing: below('a'), ...more },
      });
      const rawPart = (more: Message): Message => ({ ...raw('r'), ...more });
      const reopen = (...options: readonly Message[]) => ['blockdev-reopen', { options }] as const;
      await same({
        prepare: `
          for x in a b c; do qemu-img create -q -f qcow2 $x.qcow2 4M; done; truncate -s 2M r.raw
          qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 over.qcow2; qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M`,
        steps: [
          ['blockdev-add', over({ cache: { direct: false, 'no-flush': true } })],
          ['block-dirty-bitmap-add', { node: 'over', name: 'kept', persistent: true }],
          nodes,
          reopen(over({ 'read-only': true })),
          nodes,
          sh('qemu-img info over.qcow2 | grep -A 9 bitmaps'),
          ['x-debug-block-dirty-bitmap-sha256', { node: 'over', name: 'kept' }],
          reopen(over({ ...below('over', { 'read-only': false }), 'read-only': true })),
          nodes,
          reopen(over(below('over', { 'read-only': true }))),
          reopen(over({ backing: below('a', { 'read-only': true }), cache: { 'no-flush': true } })),
          nodes,
          reopen(over({ backing: { ...below('a'), 'node-name': 'other' } })),
          reopen(over({ backing: { ...below('a'), driver: 'raw' } })),
          reopen(over(below('over', { driver: 'host_device' }))),
          reopen(over({ backing: null })),
          reopen({ ...below('over'), 'node-name': 'over' }),
          ...[
            ...[{ 'l2-cache-entry-size': 131072 }, { 'l2-cache-entry-size': 1000 }],
            ...[
              { 'cache-size': 1, 'l2-cache-size': 2 },
              { 'cache-size': 1, 'refcount-cache-size': 2 },
            ],
            ...[{ 'cache-size': 2, 'l2-cache-size': 1, 'refcount-cache-size': 1 }],
            ...[
              { 'overlap-check': 'some' },
              { 'overlap-check': { template: 'all' } },
              { 'overlap-check': 5 },
            ],
            ...[{ 'cache-clean-interval': -1 }],
          ].map((more) => reopen(over({ backing: null, ...more }))),
          ['blockdev-add', { ...below('old'), 'node-name': 'old', 'lazy-refcounts': true }],
          ['blockdev-add', { ...below('b'), 'node-name': 'b', 'data-file': { driver: 'null-co' } }],
          // All of them or none; and each as those before it have become.
          ['blockdev-add', raw('r')],
          reopen(rawPart({ size: 3 * MiB })),
          reopen(rawPart({ offset: 3 * MiB })),
          reopen(over({ backing: null, 'detect-zeroes': 'on' }), rawPart({ size: 100 })),
          nodes,
          ['blockdev-add', qcow2('b')],
          ['blockdev-add', qcow2('c')],
          reopen(over({ backing: 'b' }), qcow2('b', { backing: 'c' })),
          reopen(qcow2('b', { backing: null }), over({ backing: 'c' }), qcow2('c', { backing: 'b' })),
          reopen(qcow2('b', { backing: 'over' })),
          reopen(over({ backing: 'b' })),
          reopen(over({ backing: { driver: 'qcow2', file: 'b-file' } })),
          ['blockdev-del', { 'node-name': 'b' }],
          nodes,
        ],
        after: `${image('over')} ${image('b')}`,
      });
    });

    it('links of a chain that a job rests on stay', async () => {
      const chain = (a: unknown): Message => qcow2('a', { backing: a });
      const b = (backing: unknown): Message => qcow2('b', { backing });
      const reopen = (...options: readonly Message[]) => ['blockdev-reopen', { options }] as const;
      const attempts = [reopen(chain(b(null))), reopen(chain(null))];
      const waiting = { 'job-id': 'j', 'auto-finalize': false };
      const end: readonly Session['steps'][number][] = [
        ['job-finalize', { id: 'j' }],
        until('j', 'null'),
        nodes,
        ['blockdev-del', { 'node-name': 'a' }],
      ];
      const begin = ['blockdev-add', chain(b(qcow2('c')))] as const;
      await same({
        prepare: 'for x in a b c; do qemu-img create -q -f qcow2 $x.qcow2 1M; done',
        steps: [
          begin,
          ['block-stream', { ...waiting, device: 'a', 'base-node': 'c' }],
          until('j', 'pending'),
          reopen(chain(null)),
          ...end,
          begin,
          ['block-commit', { ...waiting, device: 'a', 'top-node': 'b' }],
          until('j', 'pending'),
          ...attempts,
          ...end,
          begin,
          ['block-stream', { ...waiting, device: 'b' }],
          until('j', 'pending'),
          ...attempts,
          ...end,
        ],
        after: '',
        drains: true,
      });
    });
  },
);

describe.skipIf(!hasPeer('fio') || !hasPeer('qemu-img'))('under a client that writes and verifies', () => {
  it('nothing is lost when overlays are put on the drive and it is opened anew', async () => {
    const { client, place, end } = await startDaemon(folder);
    const written = verify(place);
    let done = false;
    written.finally(() => {
      done = true;
    });
    let overlays = 0;
    for (let top = 'a'; overlays < 12 && !done; overlays++) {
      const next = `o${overlays}`;
      await client.execute('blockdev-snapshot-sync', {
        'node-name': top,
        'snapshot-file': `${next}.qcow2`,
        'snapshot-node-name': next,
      });
      // What has no name of its own is part of its image's options.
      await client.execute('blockdev-reopen', {
        options: [
          {
            driver: 'qcow2',
            'node-name': next,
            file: { driver: 'file', filename: `${next}.qcow2` },
            backing: top,
            discard: overlays % 2 === 0 ? 'unmap' : 'ignore',
          },
        ],
      });
      top = next;
    }
    expect(overlays).toBeGreaterThan(2);
    expect(await written).toContain('err= 0');
    await end();
    for (let number = 0; number < overlays; number++) {
      await tool('qemu-img', 'check', '-q', join(place, `o${number}.qcow2`));
    }
  });
});
