/** QMP `block-stream`, beside QEMU. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, it } from 'vitest';
import { chain, compared, create, exported, graph, images, io, jobs, server } from '../support/chains.js';
import { hasPeer } from '../support/peers.js';
import type { Message } from '../support/qmp.js';
import { event, MiB, type Session, type Step, until } from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-stream-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const stream = (given: Message): Step => ['block-stream', { 'job-id': 'j', device: 'n4', ...given }];
const id = { id: 'j' };
const ended = until('j', 'null');
const policies = [5, 28].flatMap((errno) =>
  ['report', 'ignore', 'stop', 'enospc', 'auto'].map((policy) => [errno, policy] as const),
);
const same = (session: Session): Promise<void> => compared(folder, session);

describe.skipIf(!hasPeer('qemu-storage-daemon') || !hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'block-stream beside QEMU',
  () => {
    it('arguments that do not fit are refused', async () => {
      await same({
        prepare: create(5),
        steps: [
          chain(5),
          ['block-stream', { device: 'n4' }],
          ...[
            { device: 'nobody' },
            { device: '' },
            { base: 'x', 'base-node': 'y' },
            { base: 'x', bottom: 'y' },
            { 'base-node': 'x', bottom: 'y' },
            { base: 'x', 'base-node': 'y', bottom: 'z' },
            { base: 'nowhere.qcow2' },
            { base: 'b4.qcow2' },
            { base: '' },
            { 'base-node': 'nobody' },
            { 'base-node': 'n4' },
            { 'base-node': 'f4' },
            { 'base-node': 'f1' },
            { device: 'n1', 'base-node': 'n3' },
            { device: 'n1', base: 'b3.qcow2' },
            { bottom: 'nobody' },
            { bottom: 'f4' },
            { device: 'n1', bottom: 'n3' },
            { 'backing-file': 'x' },
            { bottom: 'n2', 'backing-file': 'x' },
            { speed: -1 },
            { 'job-id': '0j' },
            { 'job-id': '' },
            { 'on-error': 'nonsense' },
            { speed: 'fast' },
            { unknown: 1 },
            { 'filter-node-name': 'n4' },
            { 'filter-node-name': '0' },
            { 'filter-node-name': 'a-name-that-is-longer-than-names-may-be' },
            { 'filter-node-name': 'n4', speed: -1 },
            { 'filter-node-name': 'n4', 'job-id': '0' },
          ].map(stream),
          graph,
        ],
        after: images(5),
      });
    });

    it('a whole chain comes into its top image', async () => {
      await same({
        prepare: create(5),
        steps: [
          chain(5),
          server,
          exported('live', 'n4'),
          io('write -P 9 1M 64k', 'write -z 128k 64k', 'discard 3M 64k'),
          stream({ 'auto-finalize': false, 'auto-dismiss': false, 'filter-node-name': 'above' }),
          until('j', 'pending'),
          event('BLOCK_JOB_PENDING'),
          ...jobs,
          io('read -P 9 1M 64k', 'write -P 8 1M 4k'),
          ['job-finalize', id],
          until('j', 'concluded'),
          ...jobs,
          // QEMU 7.2 does not survive the look at its nodes before that.
          ['job-dismiss', id],
          graph,
          stream({}),
          ended,
          stream({ device: 'n2' }),
          ended,
          graph,
          io('read -P 8 1M 4k', 'read -P 9 1028k 60k', 'read -P 0 128k 64k'),
        ],
        after: images(5),
      });
    });

    it.each([
      [{ base: 'b2.qcow2' }, { base: 'b0.qcow2', 'backing-file': 'b0.qcow2' }],
      [{ 'base-node': 'n2' }, { 'base-node': 'n1', 'backing-file': './b1.qcow2' }],
      [{ bottom: 'n3' }, { bottom: 'n1' }],
      [{ base: './b3.qcow2' }, { bottom: 'n4' }],
      [{ base: 'b3.qcow2', 'backing-file': 'elsewhere.qcow2' }, { base: 'elsewhere.qcow2' }],
    ])('a part of a chain: %j, then %j', async (first, second) => {
      await same({
        prepare: create(5),
        steps: [chain(5), stream(first), ended, graph, stream(second), ended, graph],
        after: images(5),
      });
    });

    it('into an image in the middle', async () => {
      await same({
        prepare: create(5),
        steps: [
          chain(5),
          stream({ device: 'n3', base: 'b0.qcow2', 'auto-finalize': false }),
          until('j', 'pending'),
          graph,
          ['job-finalize', id],
          ended,
          graph,
          stream({ device: 'n3', 'auto-finalize': false }),
          until('j', 'pending'),
          ['job-cancel', id],
          ended,
          graph,
        ],
        after: images(5),
      });
    });

    it('into several images of a chain at once', async () => {
      await same({
        drains: true,
        prepare: create(7),
        steps: [
          chain(7),
          stream({ 'job-id': 'k1', device: 'n6', 'base-node': 'n4', 'auto-finalize': false }),
          stream({ 'job-id': 'k2', device: 'n4', 'base-node': 'n2', 'auto-finalize': false }),
          stream({ 'job-id': 'k3', device: 'n2', 'auto-finalize': false }),
          ...['k1', 'k2', 'k3'].map((name) => until(name, 'pending')),
          stream({ device: 'n5' }),
          stream({ device: 'n3' }),
          stream({ device: 'n1' }),
          stream({ 'job-id': 'k1', device: 'n0' }),
          stream({ device: 'n6', bottom: 'n5' }),
          ['job-finalize', { id: 'k2' }],
          until('k2', 'null'),
          graph,
          ['job-finalize', { id: 'k1' }],
          until('k1', 'null'),
          graph,
          ['job-finalize', { id: 'k3' }],
          until('k3', 'null'),
          graph,
        ],
        after: images(7),
      });
    });

    it('others keep away from the nodes of the job', async () => {
      await same({
        drains: true,
        prepare: `${create(4)} qemu-img create -q -f qcow2 t.qcow2 4M; qemu-img create -q -f qcow2 s.qcow2 4M`,
        steps: [
          chain(4),
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 't', file: { driver: 'file', filename: 't.qcow2' } },
          ],
          server,
          exported('live', 'n3'),
          stream({ device: 'n3', 'base-node': 'n0', 'auto-finalize': false }),
          until('j', 'pending'),
          ...['n0', 'n1', 'n2', 'n3'].flatMap((name): Step[] => [
            ['block_resize', { 'node-name': name, size: 8 * MiB }],
            ['blockdev-del', { 'node-name': name }],
            [
              'blockdev-snapshot-sync',
              { 'node-name': name, 'snapshot-file': 's2.qcow2', 'snapshot-node-name': 's2' },
            ],
          ]),
          ['blockdev-snapshot', { node: 'n3', overlay: 't' }],
          stream({ device: 'n3' }),
          stream({ 'job-id': 'k', device: 'n3' }),
          stream({ 'job-id': 'k', device: 'n2' }),
          ['blockdev-backup', { 'job-id': 'k', device: 'n3', target: 't', sync: 'full' }],
          ['blockdev-backup', { 'job-id': 'k', device: 'n2', target: 't', sync: 'full' }],
          ['blockdev-mirror', { 'job-id': 'k', device: 'n3', target: 't', sync: 'full' }],
          ['block-commit', { 'job-id': 'k', device: 'n3' }],
          ['change-backing-file', { device: 'n3', 'image-node-name': 'n3', 'backing-file': 'x' }],
          exported('second', 'n2'),
          exported('third', 'n1', false),
          io('write -P 3 2M 64k'),
          ['block-export-del', { id: 'third' }],
          ['job-finalize', id],
          ended,
          graph,
          ['block_resize', { 'node-name': 'n3', size: 4 * MiB }],
          ['block-export-del', { id: 'live', mode: 'hard' }],
          ['block_resize', { 'node-name': 'n3', size: 8 * MiB }],
        ],
        after: images(4),
      });
    });

    it.each(policies)('error %i with on-error %s', async (errno, policy) => {
      const image = (name: string, more: Message): Step => [
        'blockdev-add',
        { driver: 'qcow2', 'node-name': name, ...more },
      ];
      // The second chunk that the job reads.
      const sector = (0x50000 + 512 * 1024) / 512;
      const stops = policy === 'stop' || (errno === 28 && policy !== 'report' && policy !== 'ignore');
      await same({
        prepare: `qemu-img create -q -f qcow2 b0.qcow2 4M; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2M 1M' b0.qcow2 >/dev/null
              qemu-img create -q -f qcow2 -b b0.qcow2 -F qcow2 b1.qcow2`,
        steps: [
          [
            'blockdev-add',
            {
              driver: 'blkdebug',
              'node-name': 'bad',
              image: { driver: 'file', filename: 'b0.qcow2' },
              'inject-error': [{ event: 'none', iotype: 'read', sector, errno, once: true }],
            },
          ],
          image('n0', { file: 'bad', 'read-only': true }),
          image('n1', { file: { driver: 'file', filename: 'b1.qcow2' }, backing: 'n0' }),
          stream({ device: 'n1', 'on-error': policy, 'auto-dismiss': false }),
          ...(stops
            ? [until('j', 'paused'), event('BLOCK_JOB_ERROR'), ...jobs, ['job-resume', id] as const]
            : []),
          until('j', 'concluded'),
          ...jobs,
          ['job-dismiss', id],
        ],
        after: `qemu-img info b1.qcow2; qemu-img check b1.qcow2 | grep -v 'fragmented\\|end offset'`,
      });
    });

    it('verbs in each of its statuses', async () => {
      const verbs: readonly Step[] = [
        ['job-complete', id],
        ['job-resume', id],
        ['job-dismiss', id],
        ['block-job-set-speed', { device: 'j', speed: -1 }],
      ];
      await same({
        prepare: `qemu-img create -q -f qcow2 n0.qcow2 64M; qemu-io -c 'write -P 1 0 64M' n0.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -b n0.qcow2 -F qcow2 n1.qcow2`,
        steps: [
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 'n1', file: { driver: 'file', filename: 'n1.qcow2' } },
          ],
          stream({ device: 'n1', speed: 65536 }),
          until('j', 'running'),
          ['job-finalize', id],
          ...verbs,
          ['job-pause', id],
          until('j', 'paused'),
          ...verbs.slice(0, 1),
          ['job-finalize', id],
          ['job-pause', id],
          ['block-job-cancel', { device: 'j' }],
          ['block-job-set-speed', { device: 'j', speed: 131072 }],
          ['job-resume', id],
          until('j', 'running'),
          ['block-job-set-speed', { device: 'j', speed: 0 }],
          ended,
          stream({ device: 'n1', speed: 65536 }),
          ended,
        ],
        after: `qemu-img info n1.qcow2; qemu-img check n1.qcow2 | grep -v 'fragmented\\|end offset'; qemu-io -r -c 'read -P 1 0 64M' n1.qcow2`,
      });
      await same({
        prepare: `qemu-img create -q -f qcow2 n0.qcow2 64M; qemu-io -c 'write -P 1 0 64M' n0.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -b n0.qcow2 -F qcow2 n1.qcow2`,
        steps: [
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 'n1', file: { driver: 'file', filename: 'n1.qcow2' } },
          ],
          stream({ device: 'n1', speed: 1, 'auto-dismiss': false }),
          until('j', 'running'),
          ['block-job-cancel', { device: 'j' }],
          until('j', 'concluded'),
          ['query-jobs'],
          ['job-dismiss', id],
          graph,
        ],
        after: 'qemu-img info n1.qcow2; qemu-io -r -c "read -P 1 0 64M" n1.qcow2',
      });
    });

    it('images of other sizes, clusters and formats below', async () => {
      await same({
        prepare: `
          truncate -s 5M b0.raw; qemu-io -f raw -c 'write -P 1 0 5M' b0.raw >/dev/null
          qemu-img create -q -f qcow2 -o cluster_size=4k -b b0.raw -F raw b1.qcow2 2M
          qemu-io -c 'write -P 2 4k 4k' -c 'write -z 12k 8k' b1.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -o cluster_size=2M -b b1.qcow2 -F qcow2 b2.qcow2 7M
          qemu-io -c 'write -P 3 6M 4k' b2.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -o extended_l2=on -b b2.qcow2 -F qcow2 b3.qcow2 6M
          cp b3.qcow2 copy.qcow2`,
        steps: [
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 'n3', file: { driver: 'file', filename: 'b3.qcow2' } },
          ],
          stream({ device: 'n3', base: 'b0.raw' }),
          ended,
          stream({ device: 'n3' }),
          ended,
        ],
        after:
          'qemu-img compare b3.qcow2 copy.qcow2; qemu-img info b3.qcow2; qemu-img check b3.qcow2 | grep -v "fragmented\\|end offset"',
      });
    });

    it('with filters between, above and below', async () => {
      const throttled = (name: string, file: string): Message => ({
        driver: 'throttle',
        'node-name': name,
        'throttle-group': 'g',
        file,
      });
      const image = (name: string, number: number, more: Message = {}): Message => ({
        driver: 'qcow2',
        'node-name': name,
        file: { driver: 'file', filename: `b${number}.qcow2` },
        ...more,
      });
      await same({
        prepare: create(3),
        steps: [
          ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
          ['blockdev-add', image('n0', 0, { 'read-only': true })],
          ['blockdev-add', image('n1', 1, { backing: 'n0', 'read-only': true })],
          ['blockdev-add', { ...throttled('between', 'n1'), 'read-only': true }],
          ['blockdev-add', image('n2', 2, { backing: 'between' })],
          ['blockdev-add', throttled('above', 'n2')],
          stream({ device: 'above', bottom: 'between' }),
          stream({ device: 'above', 'base-node': 'between' }),
          ended,
          graph,
          stream({ device: 'above', 'base-node': 'n0' }),
          ended,
          graph,
        ],
        after: images(3),
      });
    });

    it('change-backing-file writes the header, and nothing else', async () => {
      const change = (device: string, image: string, name: string): Step => [
        'change-backing-file',
        { device, 'image-node-name': image, 'backing-file': name },
      ];
      await same({
        prepare: create(3),
        steps: [
          chain(3),
          change('nobody', 'n2', 'x'),
          change('n1', 'n1', 'x'),
          change('n2', 'nobody', 'x'),
          change('n2', 'n0', 'x'),
          change('n2', 'f2', 'x'),
          change('n2', 'n2', `/${'x'.repeat(1100)}`),
          change('n2', 'n2', './b1.qcow2'),
          change('n2', 'n1', 'elsewhere.qcow2'),
          graph,
        ],
        after: 'qemu-img info b2.qcow2; qemu-img info b1.qcow2',
      });
    });
  },
);
