/** The nodes that jobs within backing chains have above what they work on, beside QEMU. */
import { describe, it } from 'vitest';
import { chain, create, graph, images, io, server } from '../support/chains.js';
import { del, hasQemu, type Step, same, sh, until } from '../support/sessions.js';

const nested: Step = ['query-named-block-nodes', {}];
const exported: Step = ['query-block-exports'];
const share = (node: string, writable = true): Step => [
  'block-export-add',
  { type: 'nbd', id: `e-${node}`, 'node-name': node, name: node === 'over' ? 'live' : node, writable },
];
const stop = (node: string): Step => ['block-export-del', { id: `e-${node}`, mode: 'hard' }];
const job = (command: string, given: object): Step => [
  command,
  { 'job-id': 'j', 'auto-finalize': false, 'filter-node-name': 'over', ...given },
];
const finish: readonly Step[] = [['job-finalize', { id: 'j' }], until('j', 'null')];

describe.skipIf(!hasQemu())('the filter of a job', () => {
  it('takes what was on its node, shows what that does, and is nobody else’s', async () => {
    await same({
      drains: true,
      prepare: create(4),
      steps: [
        chain(4),
        server,
        share('n3'),
        job('block-stream', { device: 'n3', base: 'b1.qcow2' }),
        until('j', 'pending'),
        ...[graph, nested, exported],
        ['block-stream', { device: 'n3', 'job-id': 'k' }],
        ['block-stream', { device: 'over', 'job-id': 'k' }],
        ['block-commit', { device: 'over', 'job-id': 'k' }],
        ...['over', 'n3'].map(del),
        share('over'),
        io('write -P 9 2M 64k', 'read -P 4 900k 64k'),
        ...finish,
        ...[graph, exported],
        io('read -P 9 2M 64k'),
        ...['n3', 'over'].map(stop),
        job('block-commit', { device: 'n3', top: 'b1.qcow2' }),
        until('j', 'pending'),
        ...[graph, nested, del('over')],
        ...finish,
        graph,
        job('block-commit', { device: 'n3' }),
        until('j', 'ready'),
        ...[graph, nested, del('over')],
        ['job-complete', { id: 'j' }],
        until('j', 'pending'),
        ...finish,
        graph,
      ],
      after: images(4).replace(/; qemu-img compare.*/, ''),
    });
  });

  it('is none where another node of the daemon has the file to be written to', async () => {
    await same({
      drains: true,
      prepare: `${create(3)} qemu-img create -q -f qcow2 -b b0.qcow2 -F qcow2 other.qcow2`,
      steps: [
        chain(3),
        [
          'blockdev-add',
          { driver: 'qcow2', 'node-name': 'o', file: { driver: 'file', filename: 'other.qcow2' } },
        ],
        job('block-commit', { device: 'n2', top: 'b1.qcow2' }),
        graph,
        sh('qemu-io -c "read 0 64k" b1.qcow2 2>&1 | head -1'),
      ],
    });
  });
});
