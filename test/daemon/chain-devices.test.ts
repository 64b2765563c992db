/** QMP `block-stream` and `block-commit` of devices, and beside dirty bitmaps, beside QEMU. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, it } from 'vitest';
import { chain, compared, create, graph, images, jobs } from '../support/chains.js';
import { hasPeer } from '../support/peers.js';
import type { Message } from '../support/qmp.js';
import { event, type Step, until } from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-chain-devices-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const ready = (job: string): readonly Step[] => [until(job, 'ready'), event('BLOCK_JOB_READY')];
const ended = (job: string): Step => until(job, 'null');
const bitmap = (node: string, name: string, more: Message = {}): Step => [
  'block-dirty-bitmap-add',
  { node, name, granularity: 65536, ...more },
];

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('chains', () => {
  it.skipIf(!hasPeer('qemu-system-x86_64'))('of devices, which give jobs their names', async () => {
    await compared(folder, {
      drains: true,
      peer: 'qemu-system-x86_64',
      options: ['--drive', 'if=none,id=drive0,file=b4.qcow2,format=qcow2'],
      prepare: create(5),
      steps: [
        ['block-stream', { device: 'drive0', base: 'b3.qcow2', 'auto-finalize': false }],
        until('drive0', 'pending'),
        ...jobs,
        ['block-stream', { device: 'drive0', base: 'b3.qcow2' }],
        ['block-job-cancel', { device: 'drive0' }],
        ended('drive0'),
        ['block-stream', { device: 'drive0', base: 'b2.qcow2' }],
        ended('drive0'),
        ['block-commit', { device: 'drive0', top: 'b2.qcow2', base: 'b1.qcow2' }],
        ended('drive0'),
        graph,
        ['block-commit', { device: 'drive0', base: 'b1.qcow2' }],
        ...ready('drive0'),
        ['block-job-complete', { device: 'drive0' }],
        ended('drive0'),
        graph,
        ['block-stream', { device: 'drive0' }],
        ended('drive0'),
        graph,
      ],
      after: images(2),
    });
  });

  it.skipIf(!hasPeer('qemu-storage-daemon'))('with dirty bitmaps', async () => {
    const sums = (node: string, ...names: readonly string[]): readonly Step[] =>
      names.map((name): Step => ['x-debug-block-dirty-bitmap-sha256', { node, name }]);
    await compared(folder, {
      drains: true,
      prepare: `${create(4)} qemu-img bitmap --add b3.qcow2 kept; qemu-img bitmap --add b0.qcow2 below`,
      steps: [
        chain(4),
        bitmap('n3', 'own'),
        bitmap('n0', 'other'),
        ['block-stream', { 'job-id': 'j', device: 'n3', base: 'b1.qcow2' }],
        ended('j'),
        ...sums('n3', 'own', 'kept'),
        ['block-commit', { 'job-id': 'j', device: 'n3', 'top-node': 'n1', 'base-node': 'n0' }],
        ended('j'),
        ...sums('n0', 'other', 'below'),
        ['block-commit', { 'job-id': 'j', device: 'n3' }],
        ...ready('j'),
        ['job-complete', { id: 'j' }],
        ended('j'),
        ...sums('n0', 'other', 'below'),
        ...sums('n3', 'own', 'kept'),
        graph,
      ],
      after:
        'qemu-img info b0.qcow2; qemu-img info b3.qcow2; qemu-img compare b0.qcow2 was.raw; qemu-img check b0.qcow2 | grep -v "fragmented\\|end offset"',
    });
  });
});
