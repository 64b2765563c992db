/** Dirty bitmaps of the daemon: what modes make of them however a job ends, what is in the way, and what images keep. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
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
  KiB,
  nodes,
  play,
  qcow2,
  raw,
  type Session,
  type Step,
  same,
  serve,
  sh,
  sha256,
  until,
} from '../support/sessions.js';

const over = until('j', 'null');
const merge = (target: string, bitmaps: unknown, node = 'd'): Command => [
  'block-dirty-bitmap-merge',
  { node, target, bitmaps },
];
const BITMAPS = 'qemu-img info --output=json d.qcow2 | grep -e \'"name"\' -e auto -e in-use -e granularity';

const session = (...steps: readonly Step[]): Session => ({
  drains: true,
  prepare: `
    for i in d t; do qemu-img create -q -f qcow2 $i.qcow2 4M; done
    qemu-io -c 'write -P 1 0 2M' d.qcow2 >/dev/null
    for i in r bad; do qemu-img create -q -f raw $i.raw 4M; done
    qemu-img bitmap --add d.qcow2 kept
    qemu-img bitmap --add -g 4096 d.qcow2 fine
    qemu-img bitmap --disable d.qcow2 fine`,
  steps: [qcow2('d'), qcow2('t'), raw('r'), ...serve('d'), ...steps],
  after: `${BITMAPS}; qemu-img check d.qcow2 | head -1; qemu-img compare d.qcow2 t.qcow2`,
});

const ENDS = ['success', 'failure', 'cancel', 'early cancel'] as const;
/** Sync modes, and bitmap modes that go with them. */
const MODES = [
  ...['on-success', 'never', 'always'].map((mode) => ({ sync: 'bitmap', 'bitmap-mode': mode })),
  ...['full', 'top'].flatMap((sync) =>
    ['on-success', 'always'].map((mode) => ({ sync, 'bitmap-mode': mode })),
  ),
  { sync: 'incremental' },
];

/** A guest writes before a backup, and while it is under way. */
function round(mode: (typeof MODES)[number], end: (typeof ENDS)[number]): readonly Step[] {
  const early = end === 'early cancel';
  const ends: Readonly<Record<(typeof ENDS)[number], readonly Step[]>> = {
    success: [until('j', 'pending'), guest('d', 'write -P 5 512k 64k'), nodes, ['job-finalize', { id: 'j' }]],
    cancel: [until('j', 'pending'), guest('d', 'write -P 5 512k 64k'), nodes, ['job-cancel', { id: 'j' }]],
    failure: [],
    'early cancel': [
      copied('j', 64 * KiB),
      ['job-pause', { id: 'j' }],
      until('j', 'paused'),
      guest('d', 'write -P 5 512k 64k'),
      ['job-cancel', { id: 'j' }],
    ],
  };
  return [
    bitmap('add', 'b', { persistent: mode.sync === 'bitmap', granularity: 64 * KiB }),
    guest('d', 'write -P 2 1M 64k', 'write -P 3 2M 100', 'write -P 4 3M 64k'),
    sha256('b'),
    backup({
      ...{ ...mode, bitmap: 'b', 'auto-finalize': false },
      target: end === 'failure' ? 'broken' : 't',
      ...(early ? { speed: 1 } : {}),
      'x-perf': { 'max-workers': 1, 'max-chunk': 64 * KiB },
    }),
    ...ends[end],
    over,
    sha256('b'),
    nodes,
    bitmap('remove', 'b'),
  ];
}

describe.skipIf(!hasQemu())('dirty bitmaps', () => {
  it('are what each mode makes of them, whatever becomes of the job', async () => {
    await same(
      session(
        raw('bad'),
        blkdebug('broken', 'bad', { iotype: 'write', errno: 5, sector: 2048, once: false }),
        ...MODES.flatMap((mode) => ENDS.flatMap((end) => round(mode, end))),
      ),
    );
  });

  it('are seen beside those that jobs have for themselves, and are in nobody else’s way', async () => {
    await same(
      session(
        bitmap('add', 'b', { granularity: 64 * KiB }),
        bitmap('add', 'off', { disabled: true, granularity: 512 }),
        guest('d', 'write -P 2 1M 64k'),
        backup({ sync: 'bitmap', bitmap: 'b', 'bitmap-mode': 'on-success', 'auto-finalize': false }),
        until('j', 'pending'),
        nodes,
        ...['b', 'off', 'kept'].map((name) => sha256(name)),
        backup({ target: 'r', sync: 'incremental', bitmap: 'b', 'job-id': 'k' }),
        merge('off', ['b']),
        merge('b', ['off']),
        ...['clear', 'remove', 'enable', 'disable'].map((action) => bitmap(action, 'b')),
        ['block-export-add', { ...exported('d', { id: 'e2', name: 'x', bitmaps: ['b'] }) }],
        ['job-finalize', { id: 'j' }],
        over,
        nodes,
        ['block-export-add', { ...exported('d', { id: 'e3', name: 'y', bitmaps: ['off'] }), writable: true }],
        nodes,
        ...['clear', 'remove', 'enable', 'disable'].map((action) => bitmap(action, 'off')),
        merge('off', ['kept']),
        merge('kept', ['off']),
        backup({ target: 'r', sync: 'incremental', bitmap: 'off', 'job-id': 'k' }),
        ['block-export-del', { id: 'e3' }],
        bitmap('remove', 'off'),
        backup({ sync: 'none' }),
        nodes,
        guest('d', 'write -P 9 2M 64k', 'write -P 9 100 10'),
        nodes,
        ['query-block-jobs'],
        ['job-cancel', { id: 'j' }],
        over,
        nodes,
      ),
    );
  });

  it('are refused names, granularities and nodes that QEMU refuses', async () => {
    const names = [undefined, null, 5, '', 'ä', 'x'.repeat(1023), 'x'.repeat(1024), 'a b', 'ä'.repeat(512)];
    const granularities = [0, 1, 511, 512, 513, 1024, 2 ** 31, 2 ** 32, -1, 'x', 65536.5];
    const actions = ['clear', 'enable', 'disable', 'remove'];
    const bad: readonly object[] = [
      ...[{}, { node: 'd' }, { name: 'kept' }, { node: 'zz', name: 'kept' }, { node: '', name: 'kept' }],
      ...[
        { node: 'd', name: 'nope' },
        { node: 'd', name: '' },
        { node: 'd', name: 'kept', x: 1 },
      ],
    ];
    await same(
      session(
        ...names.flatMap((name): Step[] => [
          ['block-dirty-bitmap-add', { node: 'd', name }],
          ['block-dirty-bitmap-remove', { node: 'd', name }],
        ]),
        ...granularities.map((granularity) => bitmap('add', `g${granularity}`, { granularity })),
        ...actions.flatMap((action) =>
          bad.map((given): Step => [`block-dirty-bitmap-${action}`, given as Record<string, unknown>]),
        ),
        bitmap('add', 'p', { node: 'zz' }),
        bitmap('add', 'p', { node: 'r', persistent: true }),
        ...['zz', 'd'].map((node) => sha256('nope', node)),
        bitmap('add', 'm1', { granularity: 4096 }),
        bitmap('add', 'm2', { granularity: 131_072, persistent: true }),
        bitmap('add', 'm3', { disabled: true, persistent: true }),
        guest('d', 'write 0 4k', 'write 1M 4k', 'write -z 2M 4k', 'discard 3M 64k'),
        nodes,
        merge('m3', ['m1', 'm2']),
        merge('m3', ['m1', 'zz']),
        merge('m3', ['m3']),
        ...[5, [5], [{ node: 'd' }], [{ node: 'd', name: 'm1', z: 1 }], [{ node: 'zz', name: 'm1' }]].map(
          (bitmaps) => merge('m3', bitmaps),
        ),
        merge('m3', ['m1'], 'zz'),
        bitmap('add', 'q', { node: 'r' }),
        merge('q', [{ node: 'd', name: 'm1' }], 'r'),
        nodes,
        ...['m1', 'm2', 'm3'].map((name) => sha256(name)),
      ),
    );
  });

  it('of images that cannot keep them, or are only read', async () => {
    await same({
      drains: true,
      prepare: `
        qemu-img create -q -f qcow2 d.qcow2 1M
        qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M
        qemu-img create -q -f qcow2 read.qcow2 1M
        qemu-img bitmap --add read.qcow2 p`,
      steps: [
        ...['d', 'old'].map((name) => qcow2(name)),
        qcow2('read', { 'read-only': true }),
        bitmap('add', 'p', { node: 'old', persistent: true }),
        bitmap('add', 'q', { node: 'read' }),
        bitmap('add', 'p', { node: 'read' }),
        nodes,
        ...['clear', 'disable', 'enable', 'remove'].map((action) => bitmap(action, 'p', { node: 'read' })),
        merge('p', ['q'], 'read'),
        merge('q', ['p'], 'read'),
        backup({ device: 'read', target: 'd', sync: 'incremental', bitmap: 'p' }),
        backup({ device: 'read', target: 'd', sync: 'bitmap', bitmap: 'p', 'bitmap-mode': 'never' }),
        over,
        nodes,
      ],
    });
  });

  it('are in the image once it is closed, and qemu-img may change them there', async () => {
    await same(
      session(
        bitmap('add', 'a', { persistent: true }),
        bitmap('add', 'b', { persistent: true, disabled: true, granularity: 4096 }),
        bitmap('add', 'c'),
        guest('d', 'write 0 64k'),
        nodes,
        ['block-export-del', { id: 'e-d' }],
        del('d'),
        sh(`${BITMAPS}; qemu-img check d.qcow2 | head -1
          qemu-img bitmap --add d.qcow2 z
          qemu-img bitmap --merge a d.qcow2 z
          qemu-img bitmap --remove d.qcow2 b`),
        qcow2('d'),
        nodes,
        sha256('a'),
        sha256('z'),
        backup({ sync: 'incremental', bitmap: 'z' }),
        over,
        nodes,
      ),
    );
  });

  it.each(['never', 'on-success'] as const)(
    'are in use in the file after a backup with bitmap-mode %s and what a guest wrote',
    async (mode) => {
      await same({
        ...session(
          backup({ sync: 'bitmap', bitmap: 'kept', 'bitmap-mode': mode }),
          over,
          guest('d', 'write 1M 64k', 'flush'),
        ),
        end: 'SIGKILL',
        after: `${BITMAPS} | grep -B 2 kept`,
      });
    },
  );

  it('that do not count any more are empty to who asks for their bits', async () => {
    await same(
      session(
        guest('d', 'write -P 2 1M 64k', 'flush'),
        sh('cp d.qcow2 c.qcow2'),
        qcow2('c'),
        ...['kept', 'fine'].map((name) => sha256(name, 'c')),
        bitmap('enable', 'kept', { node: 'c' }),
        del('c'),
      ),
    );
  });

  it('that record writes are exported for reading where they are named with their node', async () => {
    const share = (id: string, bitmaps: unknown): Step => [
      'block-export-add',
      { ...exported('t'), id, bitmaps },
    ];
    await same(
      session(
        bitmap('add', 'b', { node: 't' }),
        share('a', ['b']),
        share('b', [{ node: 't', name: 'b' }]),
        share('c', [{ node: 'r', name: 'b' }]),
      ),
    );
  });

  it('do not come back as they were once they are removed', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'stillframe-bitmaps-'));
    try {
      const { answers } = await play('stillframe', join(folder, 'ours'), {
        ...session(bitmap('remove', 'kept'), guest('d', 'write 1M 64k', 'flush')),
        end: 'SIGKILL',
        after: `qemu-img info --output=json d.qcow2 | tr -d ' \\n' | grep -o '"bitmaps":.*'`,
      });
      const kept = '{"flags":["in-use","auto"],"name":"kept","granularity":65536}';
      expect(answers.at(-1)).toMatchObject({ said: expect.stringContaining(kept) });
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
