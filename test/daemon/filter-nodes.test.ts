/** The filters of jobs and of instants that are held, as nodes of the graph. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  backup,
  bitmap,
  blkdebug,
  type Command,
  copied,
  del,
  exported,
  guest,
  hasQemu,
  MiB,
  nodes,
  play,
  qcow2,
  raw,
  type Step,
  same,
  serve,
  sh,
  until,
} from '../support/sessions.js';

const over = until('j', 'null');
const cancel: Step = ['job-cancel', { id: 'j' }];
const add = (driver: string, name: string, more: Message): Command => [
  'blockdev-add',
  { driver, 'node-name': name, ...more },
];
const share = (node: string, more: Message = {}): Step => ['block-export-add', exported(node, more)];
const stop = (id: string): Step => ['block-export-del', { id }];

const prepare = `
  for i in d t t2; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
  qemu-io -c 'write -P 1 0 512k' d.qcow2 >/dev/null
  for i in s r; do qemu-img create -q -f raw $i.raw 1M; done`;

/** What others may do while a job's filter `f` lies on `d`. */
const tries: readonly Step[] = [
  ['query-named-block-nodes'],
  ['query-block-exports'],
  ...['f', 'd', 't'].map(del),
  add('null-co', 'f', {}),
  bitmap('add', 'x'),
  bitmap('remove', 'x'),
  ...[
    { id: 'ff', name: 'ff', 'node-name': 'f', writable: true },
    { id: 'ro', name: 'ro', 'node-name': 'd' },
    { id: 'rt', name: 'rt', 'node-name': 't' },
    { id: 'rw', name: 'rw', 'node-name': 'd', writable: true },
    { id: 'rtw', name: 'rtw', 'node-name': 't', writable: true },
  ].flatMap((given): Step[] => [share('', given), ['query-block-exports']]),
  ...['ff', 'ro', 'rt', 'rw', 'rtw'].map(stop),
  ...[
    ['d', 't2'],
    ['f', 't2'],
    ['t', 't2'],
    ['t2', 't'],
    ['t2', 'd'],
    ['t2', 'f'],
    ['d', 'f'],
    ['f', 'd'],
  ].flatMap(([device, target]): Step[] => [backup({ device, target, 'job-id': 'k' }), until('k', 'null')]),
  ...['d', 'f', 't'].map((name): Step => ['block_resize', { 'node-name': name, size: 8 * MiB }]),
  ...['f', 'd', 't'].flatMap((file): Step[] => [add('raw', 'over', { file }), del('over')]),
];

describe.skipIf(!hasQemu())('the filter of a job', () => {
  it('is a node, with its name or without one', async () => {
    const start = [qcow2('d'), qcow2('t'), qcow2('t2')];
    await same({
      drains: true,
      prepare,
      steps: [
        ...start,
        ...serve(),
        backup({ sync: 'none', 'filter-node-name': 'f' }),
        ...tries,
        cancel,
        over,
        del('f'),
        backup({ 'auto-finalize': false }),
        until('j', 'pending'),
        nodes,
        ['job-finalize', { id: 'j' }],
        over,
        nodes,
      ],
    });
  });

  it('is what clients of the drive are on, as long as it is there', async () => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), qcow2('t'), qcow2('t2')],
        ...serve('d'),
        backup({ sync: 'none', 'filter-node-name': 'f' }),
        ...tries,
        guest('d', 'write -P 3 0 64k'),
        nodes,
        cancel,
        over,
        del('f'),
        ['query-block-exports'],
        guest('d', 'read -P 3 0 64k'),
        nodes,
      ],
    });
  });
});

describe.skipIf(!hasQemu())('an instant that is held', () => {
  const fleecing = (more: Message = {}): readonly Step[] => [
    add('copy-before-write', 'cbw', { file: 'd', target: 's', ...more }),
    add('snapshot-access', 'sa', { file: 'cbw', discard: 'unmap' }),
  ];

  it('is put together, read and taken apart in QEMU’s order', async () => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), raw('s'), qcow2('t')],
        ...serve(),
        ...[
          { target: 'zz' },
          {},
          { target: 's', 'on-cbw-error': 'x' },
          { target: 's', 'cbw-timeout': -1 },
        ].map((more) => add('copy-before-write', 'cbw', { file: 'd', ...more })),
        add('snapshot-access', 'sa', {}),
        ...fleecing(),
        share('cbw', { writable: true }),
        share('sa'),
        ['query-block-exports'],
        guest('sa', 'read -P 1 0 512k', 'read -P 0 512k 512k'),
        guest('cbw', 'write -P 5 0 64k', 'write -P 6 600k 10k', 'discard 128k 64k', 'read -P 5 0 64k'),
        guest('sa', 'read -P 1 0 512k', 'read -P 0 512k 512k'),
        nodes,
        ...['sa', 'cbw', 'd', 's'].map(del),
        stop('e-cbw'),
        ...['cbw', 'sa'].map(del),
        stop('e-sa'),
        ...['cbw', 's', 'sa', 's', 'd', 'cbw', 's', 'd'].map(del),
        nodes,
      ],
    });
  });

  it('holds what a bitmap names, where that is wanted', async () => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), raw('s'), qcow2('t')],
        ...serve('d'),
        bitmap('add', 'b', { granularity: 65536 }),
        guest('d', 'write -P 2 64k 64k'),
        stop('e-d'),
        ...fleecing({ bitmap: { node: 'd', name: 'b' } }),
        share('cbw', { writable: true }),
        share('sa'),
        nodes,
        guest('sa', 'read -P 2 64k 64k', 'read 0 64k', 'read 64k 128k'),
        guest('cbw', 'write -P 5 0 256k'),
        guest('sa', 'read -P 2 64k 64k', 'read 0 64k'),
        nodes,
        bitmap('remove', 'b'),
        backup({ device: 'sa' }),
        over,
        backup({ device: 'sa', sync: 'none' }),
        cancel,
        over,
        nodes,
      ],
    });
  });

  it('can be given up by who reads it, and not written to', async () => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[raw('s'), raw('r'), qcow2('t')],
        ...fleecing({ file: 'r' }),
        add('snapshot-access', 'kept', { file: 'cbw' }),
        add('snapshot-access', 'ro', { file: 'cbw', 'read-only': true }),
        ...serve('sa', 'kept', 'ro', 'cbw'),
        ...['write 0 64k', 'write -z 0 64k', 'flush', 'discard 512k 64k', 'discard 0 128k'].flatMap(
          (command) => [guest('kept', command), guest('sa', command)],
        ),
        guest('cbw', 'write -P 2 0 1M'),
        guest('sa', 'read 0 64k', 'read 512k 64k', 'read -P 0 128k 64k'),
        backup({ device: 'sa' }),
        over,
        backup({ device: 't', target: 'sa' }),
        over,
        nodes,
      ],
    });
  });

  it('is backed up from there while a guest writes', async () => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), raw('s'), raw('r')],
        ...serve(),
        ...fleecing({ 'on-cbw-error': 'break-snapshot' }),
        share('cbw', { writable: true }),
        backup({ device: 'sa', target: 'r', speed: 1, 'x-perf': { 'max-chunk': 65536 } }),
        copied('j', 65536),
        ['job-pause', { id: 'j' }],
        until('j', 'paused'),
        guest('cbw', 'write -P 7 0 1M'),
        ...['sa', 'cbw', 's'].map(del),
        ['job-resume', { id: 'j' }],
        ['block-job-set-speed', { device: 'j', speed: 0 }],
        over,
        sh(`qemu-io -U -f raw -c 'read -P 1 0 512k' -c 'read -P 0 512k 512k' r.raw`),
      ],
    });
  });

  it('is read from an overlay that old data is saved to', async () => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), qcow2('t', { backing: 'd' })],
        ...serve('d'),
        backup({ sync: 'none' }),
        share('t', { name: 'still' }),
        guest('still', 'read -P 1 0 512k', 'read -P 0 512k 512k'),
        guest('d', 'write -P 7 0 600k', 'write -z 900k 100k'),
        guest('still', 'read -P 1 0 512k', 'read -P 0 512k 512k'),
        ['query-block-jobs'],
        nodes,
        cancel,
        over,
        guest('still', 'read -P 1 0 512k'),
        stop('e-t'),
        ...['t', 'd'].map(del),
      ],
    });
  });

  it.each(['break-snapshot', 'break-guest-write'])('breaks one of the two: %s', async (policy) => {
    await same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), raw('s'), blkdebug('bad', 's', { iotype: 'write', errno: 28, once: true })],
        ...serve(),
        ...fleecing({ target: 'bad', 'on-cbw-error': policy }),
        share('cbw', { writable: true }),
        share('sa'),
        guest('cbw', 'write -P 5 0 64k'),
        guest('sa', 'read 0 64k', 'read 128k 64k'),
        guest('cbw', 'write -P 5 128k 64k', 'read 0 64k'),
        guest('sa', 'read 128k 64k'),
      ],
    });
  });

  it('gives up what a backup with discard-source has copied', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'stillframe-discard-'));
    try {
      const { answers } = await play('stillframe', join(folder, 'x'), {
        prepare,
        steps: [
          ...[qcow2('d'), raw('s', { discard: 'unmap' }), raw('r')],
          ...serve(),
          ...fleecing(),
          share('cbw', { writable: true }),
          share('sa'),
          guest('cbw', 'write -P 7 0 128k'),
          sh('stat -c %b s.raw'),
          backup({ device: 'sa', target: 'r', 'discard-source': true }),
          over,
          guest('sa', 'read 0 64k'),
          sh('stat -c %b s.raw'),
          guest('cbw', 'write -P 8 256k 128k'),
          sh('stat -c %b s.raw'),
          nodes,
          backup({ device: 'd', target: 'r', 'discard-source': true }),
        ],
        after: `qemu-io -f raw -c 'read -P 1 0 512k' -c 'read -P 0 512k 512k' r.raw | grep -c failed`,
      });
      const said = answers.flatMap((one) => (one as { said?: string }).said ?? []);
      const [before, read, ...blocks] = said.filter((text) => !text.startsWith('wrote'));
      expect(read).toMatch(/Permission denied|read failed/);
      expect(Number(before)).toBeGreaterThan(0);
      expect(blocks).toEqual(['0\n', '0\n', '0\n']);
      expect(JSON.stringify(answers)).toContain("'discard-source' is for nodes of the driver");
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
