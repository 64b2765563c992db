/** QMP `block-commit`, beside QEMU. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import { chain, compared, create, exported, graph, images, io, jobs, server } from '../support/chains.js';
import { tool } from '../support/nbd-client.js';
import { hasPeer } from '../support/peers.js';
import type { Message } from '../support/qmp.js';
import { event, MiB, type Session, type Step, until } from '../support/sessions.js';
import { startDaemon, verify } from '../support/written-drive.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-commit-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const commit = (given: Message): Step => ['block-commit', { 'job-id': 'j', device: 'n4', ...given }];
const id = { id: 'j' };
const ended = until('j', 'null');
const policies = [5, 28].flatMap((errno) =>
  ['report', 'ignore', 'stop', 'enospc', 'auto'].map((policy) => [errno, policy] as const),
);
const same = (session: Session): Promise<void> => compared(folder, session);

describe.skipIf(!hasPeer('qemu-storage-daemon') || !hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'block-commit beside QEMU',
  () => {
    it('arguments that do not fit are refused', async () => {
      await same({
        prepare: create(5),
        steps: [
          chain(5),
          ['block-commit', { device: 'nobody' }],
          ['block-commit', { device: '' }],
          ['block-commit', { device: 'n4', top: 'b2.qcow2' }],
          ...[
            { device: 'n2' },
            { device: 'f4' },
            { top: 'x', 'top-node': 'y' },
            { top: 'nowhere.qcow2' },
            { top: '' },
            { 'top-node': 'nobody' },
            { 'top-node': 'f4' },
            { 'top-node': 'f1' },
            { top: 'b2.qcow2', base: 'x', 'base-node': 'y' },
            { top: 'b2.qcow2', base: 'nowhere.qcow2' },
            { top: 'b2.qcow2', base: 'b2.qcow2' },
            { top: 'b2.qcow2', base: 'b3.qcow2' },
            { top: 'b2.qcow2', 'base-node': 'nobody' },
            { top: 'b2.qcow2', 'base-node': 'n4' },
            { top: 'b2.qcow2', 'base-node': 'f0' },
            { 'top-node': 'n2', 'base-node': 'n2' },
            { 'top-node': 'n0' },
            { 'base-node': 'n4' },
            { 'backing-file': 'x' },
            { top: 'b4.qcow2', 'backing-file': 'x' },
            { top: 'b2.qcow2', speed: -1 },
            { top: 'b2.qcow2', 'job-id': '0' },
            { top: 'b2.qcow2', 'job-id': '' },
            { top: 'b2.qcow2', 'on-error': 'nonsense' },
            { top: 'b2.qcow2', 'filter-node-name': 'n4' },
            { top: 'b2.qcow2', 'filter-node-name': '0' },
            { top: 'b2.qcow2', 'filter-node-name': 'n4', speed: -1 },
            { top: 'b2.qcow2', 'filter-node-name': 'n4', 'job-id': '0' },
          ].map(commit),
          graph,
        ],
        after: images(5),
      });
    });

    it.each([
      { top: 'b3.qcow2', base: 'b1.qcow2' },
      { top: 'b2.qcow2' },
      { 'top-node': 'n3', 'base-node': 'n2', 'backing-file': './b2.qcow2' },
      { 'top-node': 'n1', base: './b0.qcow2', 'backing-file': 'elsewhere.qcow2' },
      { top: './b3.qcow2', 'base-node': 'n0', 'filter-node-name': 'over' },
    ])('images in the middle go into those below: %j', async (given: Message) => {
      await same({
        prepare: create(5),
        steps: [
          chain(5),
          server,
          exported('live', 'n4'),
          io('write -P 9 1M 64k', 'write -z 128k 64k', 'discard 3M 64k'),
          commit({ ...given, 'auto-finalize': false, 'auto-dismiss': false }),
          until('j', 'pending'),
          event('BLOCK_JOB_PENDING'),
          ...jobs,
          graph,
          io('read -P 9 1M 64k', 'write -P 8 1M 4k'),
          ['job-finalize', id],
          until('j', 'concluded'),
          ...jobs,
          ['job-dismiss', id],
          graph,
          io('read -P 8 1M 4k', 'read -P 9 1028k 60k', 'read -P 0 128k 64k'),
          commit({ top: 'b3.qcow2' }),
          ended,
          graph,
        ],
        after: images(5),
      });
    });

    it('a base that is smaller becomes larger', async () => {
      await same({
        prepare: `
          truncate -s 1M b0.raw
          qemu-img create -q -f qcow2 -b b0.raw -F raw b1.qcow2 2M; qemu-io -c 'write -P 1 1M 64k' b1.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -b b1.qcow2 -F qcow2 b2.qcow2 3M; qemu-io -c 'write -P 2 0 64k' b2.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -b b2.qcow2 -F qcow2 b3.qcow2 4M; qemu-io -c 'write -P 3 2M 64k' b3.qcow2 >/dev/null
          qemu-img create -q -f qcow2 -b b3.qcow2 -F qcow2 b4.qcow2 4M; qemu-img convert -O raw b4.qcow2 was.raw`,
        steps: [
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 'n4', file: { driver: 'file', filename: 'b4.qcow2' } },
          ],
          commit({ top: 'b2.qcow2', base: 'b1.qcow2' }),
          ended,
          graph,
          commit({ top: 'b3.qcow2' }),
          ended,
          graph,
        ],
        after: `qemu-img compare b4.qcow2 was.raw; wc -c <b0.raw; ${['b1', 'b2', 'b3', 'b4'].map((name) => `qemu-img info ${name}.qcow2`).join('; ')}`,
      });
    });

    it('others keep away from the nodes of the job', async () => {
      await same({
        drains: true,
        prepare: `${create(5)} qemu-img create -q -f qcow2 t.qcow2 4M; qemu-img create -q -f qcow2 s.qcow2 4M`,
        steps: [
          chain(5),
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 't', file: { driver: 'file', filename: 't.qcow2' } },
          ],
          server,
          exported('live', 'n4'),
          commit({ 'top-node': 'n2', 'base-node': 'n0', 'auto-finalize': false }),
          until('j', 'pending'),
          ...['n0', 'n1', 'n2', 'n3', 'n4'].flatMap((name): Step[] => [
            ['block_resize', { 'node-name': name, size: 8 * MiB }],
            ['blockdev-del', { 'node-name': name }],
            [
              'blockdev-snapshot-sync',
              { 'node-name': name, 'snapshot-file': 's2.qcow2', 'snapshot-node-name': 's2' },
            ],
            ['block-stream', { 'job-id': 'k', device: name }],
            exported('again', name, false),
            ['block-export-del', { id: 'again' }],
            exported('again', name),
          ]),
          ['blockdev-snapshot', { node: 'n4', overlay: 't' }],
          commit({ 'job-id': 'k' }),
          commit({ 'job-id': 'k', 'top-node': 'n2' }),
          ['change-backing-file', { device: 'n4', 'image-node-name': 'n4', 'backing-file': 'x' }],
          io('write -P 3 2M 64k'),
          ['job-cancel', id],
          ended,
          graph,
        ],
        after: images(4),
      });
    });

    it.each(policies)('error %i with on-error %s', async (errno, policy) => {
      // The second chunk that the job reads.
      const sector = (0x50000 + 512 * 1024) / 512;
      const stops = policy === 'stop' || (errno === 28 && policy !== 'report' && policy !== 'ignore');
      await same({
        prepare: `qemu-img create -q -f qcow2 b0.qcow2 4M
              qemu-img create -q -f qcow2 -b b0.qcow2 -F qcow2 b1.qcow2
              qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2M 1M' b1.qcow2 >/dev/null
              qemu-img create -q -f qcow2 -b b1.qcow2 -F qcow2 b2.qcow2; qemu-img convert -O raw b2.qcow2 was.raw`,
        steps: [
          [
            'blockdev-add',
            {
              driver: 'blkdebug',
              'node-name': 'bad',
              image: { driver: 'file', filename: 'b1.qcow2' },
              'inject-error': [{ event: 'none', iotype: 'read', sector, errno, once: true }],
            },
          ],
          ['blockdev-add', { driver: 'qcow2', 'node-name': 'n1', file: 'bad', 'read-only': true }],
          [
            'blockdev-add',
            {
              driver: 'qcow2',
              'node-name': 'n2',
              file: { driver: 'file', filename: 'b2.qcow2' },
              backing: 'n1',
            },
          ],
          commit({ device: 'n2', 'top-node': 'n1', 'on-error': policy, 'auto-dismiss': false }),
          ...(stops
            ? [until('j', 'paused'), event('BLOCK_JOB_ERROR'), ...jobs, ['job-resume', id] as const]
            : []),
          until('j', 'concluded'),
          ...jobs,
          ['job-dismiss', id],
        ],
        after: `qemu-img info b2.qcow2; qemu-img check b0.qcow2 | grep -v 'fragmented\\|end offset'; qemu-img compare b2.qcow2 was.raw`,
      });
    });

    it('verbs in each of its statuses', async () => {
      const base = `qemu-img create -q -f qcow2 n0.qcow2 64M; qemu-img create -q -f qcow2 -b n0.qcow2 -F qcow2 n1.qcow2
        qemu-io -c 'write -P 1 0 64M' n1.qcow2 >/dev/null; qemu-img create -q -f qcow2 -b n1.qcow2 -F qcow2 n2.qcow2`;
      const added: Step = [
        'blockdev-add',
        { driver: 'qcow2', 'node-name': 'n2', file: { driver: 'file', filename: 'n2.qcow2' } },
      ];
      const verbs: readonly Step[] = [
        ['job-complete', id],
        ['job-resume', id],
        ['job-dismiss', id],
        ['job-finalize', id],
        ['block-job-set-speed', { device: 'j', speed: -1 }],
      ];
      await same({
        prepare: base,
        steps: [
          added,
          commit({ device: 'n2', top: 'n1.qcow2', speed: 65536 }),
          until('j', 'running'),
          ...verbs,
          ['job-pause', id],
          until('j', 'paused'),
          ['job-pause', id],
          ['block-job-cancel', { device: 'j' }],
          ['job-resume', id],
          until('j', 'running'),
          ['block-job-set-speed', { device: 'j', speed: 0 }],
          ended,
          graph,
        ],
        after: `qemu-img info n2.qcow2; qemu-img check n0.qcow2 | grep -v 'fragmented\\|end offset'; qemu-io -r -c 'read -P 1 0 64M' n2.qcow2`,
      });
      await same({
        prepare: base,
        steps: [
          added,
          commit({ device: 'n2', top: 'n1.qcow2', speed: 1, 'auto-dismiss': false }),
          until('j', 'running'),
          ['block-job-cancel', { device: 'j' }],
          until('j', 'concluded'),
          ['query-jobs'],
          ['job-dismiss', id],
          graph,
        ],
        after: 'qemu-img info n2.qcow2; qemu-io -r -c "read -P 1 0 64M" n2.qcow2',
      });
    });

    const ready: readonly Step[] = [until('j', 'ready'), event('BLOCK_JOB_READY')];
    const active = (given: Message): Step => commit({ 'auto-dismiss': false, ...given });
    const over: readonly Step[] = [until('j', 'concluded'), ...jobs, ['job-dismiss', id], graph];

    it.each([{}, { base: 'b3.qcow2' }, { 'base-node': 'n1', 'top-node': 'n4', 'filter-node-name': 'over' }])(
      'the active image goes into one below, which takes its place: %j',
      async (given: Message) => {
        await same({
          drains: true,
          prepare: create(5),
          steps: [
            chain(5),
            server,
            exported('live', 'n4'),
            io('write -P 9 1M 64k', 'write -z 128k 64k', 'discard 3M 64k'),
            active(given),
            ...ready,
            ...jobs,
            graph,
            io('read -P 9 1M 64k', 'write -P 8 2M 64k', 'write -z 192k 64k'),
            ['job-complete', id],
            ...over,
            ['query-block-exports'],
            io('read -P 9 1M 64k', 'read -P 8 2M 64k', 'read -P 0 128k 128k', 'write -P 7 3M 64k'),
            ['block-export-del', { id: 'live', mode: 'hard' }],
            graph,
          ],
          after: [0, 1, 2, 3, 4]
            .map(
              (n) =>
                `qemu-img info b${n}.qcow2; qemu-img check b${n}.qcow2 | grep -v 'fragmented\\|end offset'`,
            )
            .join('; '),
        });
      },
    );

    it.each([
      ['block-job-cancel', { device: 'j' }],
      ['block-job-cancel', { device: 'j', force: true }],
      ['job-cancel', id],
    ] as const)('the active image stays where the job is cancelled: %s %j', async (verb, given) => {
      await same({
        prepare: create(3),
        steps: [
          chain(3),
          ['block-commit', { 'job-id': 'j', device: 'n2', base: 'b1.qcow2', 'auto-dismiss': false }],
          ...ready,
          ['job-pause', id],
          until('j', 'standby'),
          ...jobs,
          ['job-resume', id],
          until('j', 'ready'),
          [verb, given],
          ...over,
          ['block-commit', { 'job-id': 'j', device: 'n2', 'auto-finalize': false, 'auto-dismiss': false }],
          ...ready,
          ['job-complete', id],
          until('j', 'pending'),
          ['job-cancel', id],
          ...over,
        ],
        after: images(3),
      });
    });

    it('a smaller base of the active image becomes larger', async () => {
      await same({
        prepare: `
          truncate -s 1M b0.raw
          qemu-img create -q -f qcow2 -b b0.raw -F raw b1.qcow2 2M; qemu-io -c 'write -P 1 1M 64k' b1.qcow2 >/dev/null
          qemu-img convert -O raw b1.qcow2 was.raw`,
        steps: [
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 'n4', file: { driver: 'file', filename: 'b1.qcow2' } },
          ],
          active({}),
          ...ready,
          ['job-complete', id],
          ...over,
        ],
        after: 'cmp b0.raw was.raw; wc -c <b0.raw',
      });
    });

    it('others keep away from the nodes of an active commit', async () => {
      await same({
        drains: true,
        prepare: `${create(3)} qemu-img create -q -f qcow2 t.qcow2 4M`,
        steps: [
          chain(3),
          [
            'blockdev-add',
            { driver: 'qcow2', 'node-name': 't', file: { driver: 'file', filename: 't.qcow2' } },
          ],
          server,
          exported('live', 'n2'),
          active({ device: 'n2', 'job-id': '0' }),
          active({ device: 'n2', speed: -1 }),
          active({ device: 'n2', 'filter-node-name': 'n1' }),
          active({ device: 'n2', 'filter-node-name': '0' }),
          active({ device: 'n2', 'base-node': 'n0' }),
          ...ready,
          ...['n0', 'n1', 'n2'].flatMap((name): Step[] => [
            ['block_resize', { 'node-name': name, size: 8 * MiB }],
            ['blockdev-del', { 'node-name': name }],
            [
              'blockdev-snapshot-sync',
              { 'node-name': name, 'snapshot-file': 's2.qcow2', 'snapshot-node-name': 's2' },
            ],
            ['block-stream', { 'job-id': 'k', device: name }],
          ]),
          commit({ device: 'n2', 'job-id': 'k' }),
          ['blockdev-mirror', { 'job-id': 'k', device: 'n2', target: 't', sync: 'full' }],
          ['job-cancel', id],
          ...over,
        ],
        after: images(3),
      });
    });
  },
);

describe.skipIf(!hasPeer('fio') || !hasPeer('qemu-img'))('under a client that writes and verifies', () => {
  it('nothing is lost when overlays are put on, streamed into and committed', async () => {
    const { client, place, end } = await startDaemon(folder);
    const written = verify(place);
    let done = false;
    written.finally(() => {
      done = true;
    });
    /** Runs a job to its end. */
    const run = async (command: string, given: Message): Promise<void> => {
      await client.execute(command, { 'job-id': 'j', 'auto-dismiss': false, ...given });
      for (;;) {
        const [job] = (await client.execute('query-jobs')) as readonly Message[];
        if (job?.['status'] === 'ready') {
          // It may have been told already.
          await client.execute('job-complete', { id: 'j' }).catch(() => undefined);
        }
        if (job?.['status'] === 'concluded') {
          expect(job['error']).toBeUndefined();
          await client.execute('job-dismiss', { id: 'j' });
          return;
        }
        await delay(20);
      }
    };
    let rounds = 0;
    let top = 'a';
    let overlays = 0;
    const overlay = async (): Promise<void> => {
      const next = `o${overlays++}`;
      await client.execute('blockdev-snapshot-sync', {
        'node-name': top,
        'snapshot-file': `${next}.qcow2`,
        'snapshot-node-name': next,
      });
      top = next;
    };
    for (; rounds < 6 && !done; rounds++) {
      const below = top;
      await overlay();
      const middle = top;
      await overlay();
      // What was streamed into has the data of both, and lies on what the one below lies on.
      if (rounds % 3 === 0) await run('block-stream', { device: top });
      else if (rounds % 3 === 1) {
        await run('block-commit', { device: top, 'top-node': middle, 'base-node': below });
      } else {
        await run('block-commit', { device: top, 'base-node': below });
        top = below;
      }
    }
    expect(rounds).toBeGreaterThan(2);
    expect(await written).toContain('err= 0');
    await end();
    for (let number = 0; number < overlays; number++) {
      await tool('qemu-img', 'check', '-q', join(place, `o${number}.qcow2`));
    }
  });
});
