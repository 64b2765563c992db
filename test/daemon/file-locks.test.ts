/** Files are locked for what is done with their nodes: byte for byte as QEMU does it, whatever comes and goes. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  backup,
  del,
  exported,
  hasQemu,
  play,
  qcow2,
  raw,
  type Step,
  same,
  serve,
  sh,
  transaction,
  until,
} from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-file-locks-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const file = (name: string, filename: string, more: Message = {}): Step => [
  'blockdev-add',
  { driver: 'file', 'node-name': name, filename, ...more },
];
const on = (driver: string, name: string, below: string, more: Message = {}): Step => [
  'blockdev-add',
  { driver, 'node-name': name, file: below, ...more },
];
const share = (node: string, writable: boolean): Step => [
  'block-export-add',
  { ...exported(node), writable },
];
const unshare = (node: string): Step => ['block-export-del', { id: `e-${node}` }];
const reopen = (...options: readonly Message[]): Step => ['blockdev-reopen', { options }];

/**
 * The bytes that are locked of each file, with how many have locked one where it is not one alone. Whoever writes keeps
 * other writers away (201) here, always, and in QEMU only where he says so: that counts as if it were the same. The
 * kernel's list is read in parts, and has locks twice where others have put theirs into it meanwhile: it has to say the same
 * three times.
 */
const locks = (...files: readonly string[]): Step =>
  sh(
    `look() { all=$(cat /proc/locks); for f in ${files.join(' ')}; do i=$(stat -c %i $f); echo $f: $(echo "$all" | ` +
      `awk -v i=":$i$" '$6 ~ i { for (b = $7; b <= $8; b++) n[b]++ } END { n[201] = n[201] < n[101] ? n[101] : n[201]; ` +
      'for (b = 100; b < 204; b++) if (n[b]) printf "%s ", (n[b] > 1 ? b "x" n[b] : b) }\'); done; }; ' +
      'for t in 1 2 3 4 5 6 7 8; do seen=$(look); [ "$seen" = "$(look)" ] && [ "$seen" = "$(look)" ] && break; done; echo "$seen"',
  );
const images = (format: string, ...names: readonly string[]): string =>
  names.map((name) => `qemu-img create -q -f ${format} ${name}.${format} 4M;`).join(' ');

describe.skipIf(!hasQemu())('the file of a node is locked', () => {
  it('for exports, formats and filters on it, and not for itself', async () => {
    await same({
      prepare: images('raw', 'a') + images('qcow2', 'c'),
      steps: [
        ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
        file('f', 'a.raw'),
        file('f2', 'a.raw', { 'read-only': true }),
        locks('a.raw'),
        sh('qemu-img info a.raw; qemu-io -f raw -c "write -P 1 0 64k" a.raw | head -1'),
        ...serve(),
        share('f', false),
        locks('a.raw'),
        sh('qemu-img resize -f raw a.raw 8M'),
        share('f2', false),
        locks('a.raw'),
        unshare('f'),
        on('throttle', 't', 'f', { 'throttle-group': 'g' }),
        on('raw', 'r', 't', { offset: 65536 }),
        locks('a.raw'),
        share('r', true),
        locks('a.raw'),
        sh('qemu-img info a.raw | head -2; qemu-img convert a.raw other'),
        unshare('r'),
        locks('a.raw'),
        del('r'),
        del('t'),
        unshare('f2'),
        locks('a.raw'),
        file('fc', 'c.qcow2'),
        file('fc2', 'c.qcow2'),
        on('qcow2', 'c', 'fc'),
        locks('c.qcow2'),
        sh('qemu-img info c.qcow2'),
        sh('qemu-img info -U c.qcow2 | head -2'),
        on('qcow2', 'c2', 'fc2'),
        on('qcow2', 'c2', 'fc2', { 'read-only': true }),
        on('raw', 'c2', 'fc2'),
        share('c2', false),
        share('c2', true),
        locks('c.qcow2'),
        del('c'),
        locks('c.qcow2'),
        share('c2', false),
        on('qcow2', 'c', 'fc'),
        unshare('c2'),
        on('qcow2', 'c', 'fc', { 'read-only': true }),
        locks('c.qcow2'),
        sh('qemu-img info c.qcow2 | head -2; qemu-io -c "write 0 64k" c.qcow2'),
      ],
    });
  });

  it('or not at all, where its options say so', async () => {
    await same({
      prepare: images('qcow2', 'c'),
      steps: [
        qcow2('c'),
        qcow2('d', { file: { driver: 'file', filename: 'c.qcow2' } }),
        on('qcow2', 'd', 'off'),
        file('off', 'c.qcow2', { locking: 'off', 'read-only': true }),
        on('qcow2', 'd', 'off', { 'read-only': true }),
        locks('c.qcow2'),
        del('c'),
        locks('c.qcow2'),
      ],
    });
  });

  it('for a backing chain', async () => {
    await same({
      prepare:
        images('raw', 'a') +
        images('qcow2', 'c') +
        'qemu-img create -q -f qcow2 -b a.raw -F raw o.qcow2; qemu-img create -q -f qcow2 -b c.qcow2 -F qcow2 p.qcow2',
      steps: [
        qcow2('o'),
        qcow2('p', { 'read-only': true }),
        locks('a.raw', 'o.qcow2', 'c.qcow2', 'p.qcow2'),
        ...serve('o'),
        share('p', false),
        locks('a.raw', 'o.qcow2', 'c.qcow2', 'p.qcow2'),
        file('f', 'c.qcow2'),
        on('qcow2', 'c', 'f'),
        on('qcow2', 'c', 'f', { 'read-only': true }),
        unshare('o'),
        del('o'),
        locks('a.raw', 'o.qcow2'),
      ],
    });
  });

  it('for what blockdev-reopen makes of it', async () => {
    const c = (more: Message): Message => ({ driver: 'qcow2', 'node-name': 'c', file: 'f', ...more });
    await same({
      prepare: images('qcow2', 'c', 'e'),
      steps: [
        file('f', 'c.qcow2'),
        file('f2', 'c.qcow2'),
        ['blockdev-add', c({ 'read-only': true })],
        on('qcow2', 'c2', 'f2', { 'read-only': true }),
        reopen(c({ 'read-only': false })),
        locks('c.qcow2'),
        del('c2'),
        reopen(c({ 'read-only': false })),
        locks('c.qcow2'),
        reopen(c({ 'read-only': true })),
        locks('c.qcow2'),
        reopen(c({ 'read-only': false })),
        file('g', 'e.qcow2'),
        file('g2', 'e.qcow2'),
        on('qcow2', 'e', 'g'),
        reopen(c({ file: 'g2' })),
        locks('c.qcow2', 'e.qcow2'),
        del('e'),
        reopen(c({ file: 'g2' })),
        locks('c.qcow2', 'e.qcow2'),
        on('qcow2', 'e', 'f'),
        // All of them or none.
        reopen({ driver: 'qcow2', 'node-name': 'e', file: 'f', 'read-only': true }, c({ file: 'f2' })),
        locks('c.qcow2', 'e.qcow2'),
      ],
    });
  });

  it('for images that are made in it, and for new lengths', async () => {
    const create = (node: string): Step[] => [
      ['blockdev-create', { 'job-id': 'k', options: { driver: 'qcow2', file: node, size: 1 << 20 } }],
      until('k', 'concluded'),
      ['query-jobs'],
      ['job-dismiss', { id: 'k' }],
      locks('t.raw'),
    ];
    await same({
      prepare: images('raw', 't'),
      steps: [
        file('f', 't.raw'),
        file('f2', 't.raw'),
        ...serve(),
        share('f2', false),
        ...create('f'),
        ['block_resize', { 'node-name': 'f', size: 1 << 20 }],
        unshare('f2'),
        ['block_resize', { 'node-name': 'f', size: 1 << 20 }],
        ...create('f'),
        qcow2('t', { file: 'f' }),
        ...create('f2'),
        ['block_resize', { 'node-name': 'f2', size: 1 << 20 }],
      ],
    });
  });

  it('for what is put on it, and only while that is there', async () => {
    await same({
      prepare: `${images('raw', 'a')} ${images('qcow2', 'c')} qemu-img create -q -f qcow2 ov 4M; qemu-img create -q -f qcow2 ov2 4M`,
      drains: true,
      steps: [
        raw('a'),
        qcow2('c'),
        ...serve('a', 'c'),
        file('fo', 'ov'),
        on('qcow2', 'o', 'fo', { backing: null }),
        file('fo2', 'ov2'),
        on('qcow2', 'o2', 'fo2', { backing: null }),
        ['blockdev-snapshot', { node: 'a', overlay: 'o' }],
        ['blockdev-snapshot', { node: 'c', overlay: 'o2' }],
        locks('a.raw', 'c.qcow2', 'ov', 'ov2'),
        ['block-commit', { device: 'o', 'job-id': 'j' }],
        ['block-commit', { device: 'o2', 'job-id': 'k' }],
        until('j', 'ready'),
        until('k', 'ready'),
        locks('a.raw', 'c.qcow2', 'ov', 'ov2'),
        ['job-complete', { id: 'j' }],
        ['job-complete', { id: 'k' }],
        until('j', 'null'),
        until('k', 'null'),
        locks('a.raw', 'c.qcow2', 'ov', 'ov2'),
        unshare('a'),
        unshare('c'),
        locks('a.raw', 'c.qcow2', 'ov', 'ov2'),
      ],
    });
  });
});

describe.skipIf(!hasQemu())('the files of a job are locked', () => {
  const data = `${images('raw', 'd', 't')} qemu-io -f raw -c 'write -P 7 0 4M' d.raw > a`;
  const outside = sh(
    'for i in d t; do qemu-img info $i.raw | head -2; qemu-img resize -f raw $i.raw 8M 2>&1 | tail -1; done',
  );

  it('while a backup runs, whose target others may use before', async () => {
    await same({
      prepare: data,
      steps: [
        raw('d'),
        raw('t'),
        file('f', 'd.raw'),
        file('f2', 't.raw'),
        sh('qemu-io -f raw -c "write -P 3 0 64k" t.raw | head -1; qemu-img info t.raw | head -2'),
        backup({ speed: 1, 'x-perf': { 'max-chunk': 65536 }, 'filter-node-name': 'F' }),
        ['x-debug-query-block-graph'],
        locks('d.raw', 't.raw'),
        outside,
        ...serve('F'),
        locks('d.raw', 't.raw'),
        share('f', true),
        share('f', false),
        share('f2', false),
        locks('d.raw', 't.raw'),
        ['job-cancel', { id: 'j' }],
        until('j', 'null'),
        locks('d.raw', 't.raw'),
        unshare('F'),
        unshare('f'),
        unshare('f2'),
        share('f', true),
        backup(),
        transaction([{ type: 'blockdev-backup', data: backup()[1] }]),
        locks('d.raw', 't.raw'),
        unshare('f'),
        backup(),
        until('j', 'null'),
        locks('d.raw', 't.raw'),
      ],
      after: 'cmp d.raw t.raw',
    });
  });

  it('while a mirror runs, and when it is over', async () => {
    const mirror = (more: Message): Step => [
      'blockdev-mirror',
      { device: 'd', target: 't', sync: 'full', 'job-id': 'j', ...more },
    ];
    await same({
      prepare: data,
      drains: true,
      steps: [
        raw('d'),
        raw('t'),
        file('f', 'd.raw'),
        file('f2', 't.raw'),
        ...serve('d'),
        share('f2', false),
        mirror({}),
        locks('d.raw', 't.raw'),
        unshare('f2'),
        mirror({}),
        until('j', 'ready'),
        locks('d.raw', 't.raw'),
        outside,
        share('f2', false),
        share('f', false),
        unshare('f'),
        ['job-complete', { id: 'j' }],
        until('j', 'null'),
        locks('d.raw', 't.raw'),
        share('f2', false),
        unshare('d'),
        locks('d.raw', 't.raw'),
      ],
      after: 'cmp d.raw t.raw',
    });
  });

  it('while a chain becomes shorter', async () => {
    const chain = ['c', 'p', 'r', 's'];
    const all = locks(...chain.map((name) => `${name}.qcow2`));
    const graph: Step = ['x-debug-query-block-graph'];
    const outsiders = sh('for i in c p r; do qemu-img info $i.qcow2 | head -2; done');
    const cancel: Step[] = [['job-cancel', { id: 'j' }], until('j', 'null'), all];
    await same({
      prepare:
        images('qcow2', 'c') +
        ['c p', 'p r', 'r s']
          .map((pair) => pair.split(' '))
          .map(([base, top]) => `qemu-img create -q -f qcow2 -b ${base}.qcow2 -F qcow2 ${top}.qcow2; `)
          .join('') +
        'for i in p r; do qemu-io -c "write 0 4M" $i.qcow2 > a; done',
      drains: true,
      steps: [
        qcow2('s', { file: { driver: 'file', filename: 's.qcow2' } }),
        all,
        ['block-stream', { device: 's', 'job-id': 'j', speed: 1 }],
        graph,
        all,
        outsiders,
        ...cancel,
        ['block-commit', { device: 's', 'job-id': 'j', speed: 1, top: 'r.qcow2' }],
        graph,
        all,
        outsiders,
        ...cancel,
        file('f', 'c.qcow2'),
        on('qcow2', 'other', 'f', { 'read-only': true }),
        ['block-commit', { device: 's', 'job-id': 'j', top: 'r.qcow2' }],
        ['block-commit', { device: 's', 'job-id': 'j' }],
        all,
        del('other'),
        ['block-commit', { device: 's', 'job-id': 'j' }],
        until('j', 'ready'),
        graph,
        all,
        outsiders,
        ...cancel,
        ['block-stream', { device: 's', 'job-id': 'j', base: 'c.qcow2' }],
        until('j', 'null'),
        all,
        ['block-commit', { device: 's', 'job-id': 'j' }],
        until('j', 'ready'),
        ['job-complete', { id: 'j' }],
        until('j', 'null'),
        all,
      ],
      after: 'qemu-img check s.qcow2 | head -1; qemu-img check c.qcow2 | head -1',
    });
  });
});

describe.skipIf(!hasQemu())('qemu-io in a monitor', () => {
  it('locks files for what it writes, and tells of it where it cannot', async () => {
    const io = (node: string, command: string): Step => [
      'human-monitor-command',
      { 'command-line': `qemu-io ${node} "${command}"` },
    ];
    await same({
      peer: 'qemu-system-x86_64',
      prepare: `${images('raw', 'a')} ${images('qcow2', 'c')}`,
      steps: [
        file('f', 'a.raw'),
        file('f2', 'a.raw'),
        io('f', 'write 0 64k'),
        io('f', 'aio_write 0 64k'),
        io('f', 'aio_flush'),
        locks('a.raw'),
        ...serve(),
        share('f2', false),
        io('f', 'write 0 64k'),
        io('f', 'truncate 1M'),
        locks('a.raw'),
        file('g', 'c.qcow2'),
        file('g2', 'c.qcow2'),
        on('qcow2', 'c', 'g'),
        io('g2', 'write 0 64k'),
        io('g2', 'read 0 512'),
        io('g2', 'discard 0 64k'),
        io('c', 'write 0 64k'),
        locks('c.qcow2'),
      ],
      after: 'qemu-img check c.qcow2 | head -1',
    });
  });
});

describe.skipIf(!hasQemu())('unlike with QEMU', () => {
  const ours = async (prepare: string, steps: readonly Step[], after?: string): Promise<unknown[]> => {
    const { answers } = await play('stillframe', join(folder, 'ours'), { prepare, steps, after });
    return answers.map((one) => {
      const { answer, said } = one as { answer?: { error?: Message; return?: unknown }; said?: string };
      return said ?? answer?.error?.['desc'] ?? answer?.return ?? one;
    });
  };
  const refused = 'Failed to get "write" lock';
  const shared = 'Failed to get shared "write" lock';

  it('two nodes of a file, or a node and another program, never both write', async () => {
    const said = await ours(images('raw', 'a'), [
      file('f', 'a.raw'),
      file('f2', 'a.raw'),
      ...serve('f'),
      share('f2', true),
      sh('qemu-io -f raw -c "write 0 512" a.raw 2>&1 | head -1'),
      unshare('f'),
      share('f2', true),
    ]);
    expect(said.slice(5, -2)).toEqual([refused, `qemu-io: can't open device a.raw: ${refused}\n`, {}, {}]);
  });

  it('nobody writes past an instant that is held', async () => {
    const said = await ours(images('raw', 'd', 't'), [
      raw('d'),
      raw('t'),
      file('f', 'd.raw'),
      ...serve('f'),
      ['blockdev-add', { driver: 'copy-before-write', 'node-name': 'c', file: 'd', target: 't' }],
      unshare('f'),
      ['blockdev-add', { driver: 'copy-before-write', 'node-name': 'c', file: 'd', target: 't' }],
      share('f', true),
      del('c'),
      share('f', true),
    ]);
    expect(said.slice(6, -2)).toEqual([shared, {}, {}, refused, {}, {}]);
  });

  it('no file is made anew that a node is on, whether it is locked or not', async () => {
    const made = { 'job-id': 'j', options: { driver: 'file', filename: 'd.raw', size: 512 } };
    const said = await ours(
      `${images('raw', 'd', 'e')} qemu-io -f raw -c "write -P 9 0 4M" d.raw > a`,
      [
        raw('d'),
        raw('e'),
        ['drive-backup', { device: 'e', target: 'd.raw', sync: 'full', 'job-id': 'j' }],
        ['drive-mirror', { device: 'e', target: 'd.raw', sync: 'full', 'job-id': 'j' }],
        ['blockdev-snapshot-sync', { 'node-name': 'e', 'snapshot-file': 'd.raw', 'snapshot-node-name': 'o' }],
        ['blockdev-create', made],
        until('j', 'concluded'),
        ['query-jobs'],
      ],
      'qemu-io -f raw -r -c "read -P 9 0 4M" d.raw | head -1',
    );
    expect(said.slice(3, 6)).toEqual([refused, refused, refused]);
    expect(said[7]).toMatchObject([{ id: 'j', error: refused }]);
    expect(said.at(-1)).toBe('read 4194304/4194304 bytes at offset 0\n');
  });

  it('what others have made longer before is seen whole', async () => {
    const said = await ours(
      `${images('qcow2', 'd')} truncate -s 4M t.raw`,
      [
        file('f', 'd.qcow2'),
        sh('qemu-io -c "write -P 5 0 3M" d.qcow2 | head -1'),
        qcow2('d', { file: 'f' }),
        raw('t'),
        ...serve('d'),
        sh("qemu-io -f raw -c 'write -P 6 3M 1M' 'nbd+unix:///d?socket=n.sock' | head -1"),
        backup(),
        until('j', 'null'),
      ],
      'qemu-img check d.qcow2 | head -1; qemu-img compare d.qcow2 t.raw; qemu-io -f raw -c "read -P 5 0 3M" -c "read -P 6 3M 1M" t.raw | grep read',
    );
    expect(said.at(-1)).toBe(
      'No errors were found on the image.\nImages are identical.\n' +
        'read 3145728/3145728 bytes at offset 0\nread 1048576/1048576 bytes at offset 3145728\n',
    );
  });

  it('space that was taken ahead is given back under the lock', async () => {
    const said = await ours('truncate -s 1M a.raw', [
      file('f', 'a.raw'),
      file('f2', 'a.raw'),
      on('preallocate', 'p', 'f', { 'prealloc-size': 1 << 20, 'prealloc-align': 4096 }),
      ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
      share('p', true),
      unshare('p'),
      share('f2', true),
      del('p'),
      share('f2', true),
    ]);
    expect(said.slice(7, -2)).toEqual([refused, {}, {}]);
  });
});
