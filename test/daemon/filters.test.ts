/** Nodes that filter and fail requests, and small commands: the same sessions with our daemon and with QEMU's. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  bitmap,
  del,
  exported,
  hasQemu,
  MiB,
  nodes,
  play,
  type Step,
  same,
  serve,
  sh,
} from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-filters-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

describe.skipIf(!hasQemu())('a session', () => {
  it.each([
    ['the whole chain', {}],
    ['layers down to one', { bottom: 'm' }],
  ])('copies what is read from %s, and nothing is dirty by that', async (_, options) => {
    const read = (name: string, ...commands: readonly string[]): Step =>
      sh(
        `qemu-io -f raw ${commands.map((one) => `-c '${one}'`).join(' ')} 'nbd+unix:///${name}?socket=n.sock' | grep -v ops`,
      );
    const overlay = (name: string, backing: Message): Message => ({
      driver: 'qcow2',
      'node-name': name,
      file: { driver: 'file', filename: `${name}.qcow2` },
      backing,
    });
    const base = { driver: 'qcow2', 'node-name': 'b', file: { driver: 'file', filename: 'b.qcow2' } };
    await same({
      prepare: `
        qemu-img create -q -f qcow2 b.qcow2 4M
        qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 m.qcow2
        qemu-img create -q -f qcow2 -b m.qcow2 -F qcow2 d.qcow2
        qemu-io -c 'write -q -P 1 0 1M' -c 'write -qz 2M 64k' b.qcow2
        qemu-io -c 'write -q -P 2 256k 128k' m.qcow2
        qemu-io -c 'write -q -P 3 320k 64k' d.qcow2`,
      steps: [
        ['blockdev-add', overlay('d', overlay('m', base))],
        bitmap('add', 'x'),
        bitmap('add', 'p', { persistent: true }),
        ['blockdev-add', { driver: 'copy-on-read', 'node-name': 'c', file: 'd', ...options }],
        ['blockdev-add', { driver: 'copy-on-read', 'node-name': 'e', file: 'd', bottom: 'nope' }],
        ...serve('c'),
        read(
          'c',
          'read -P 1 100k 20k',
          'read -P 2 260k 4k',
          'read 2M 128k',
          'read 3M 4k',
          'write -P 9 3584k 4k',
        ),
        sh('qemu-io -U -c map d.qcow2 >/dev/null'),
        nodes,
        ['block-export-del', { id: 'c', mode: 'hard' }],
        ['nbd-server-stop'],
        del('c'),
        del('d'),
        sh('qemu-io -c map d.qcow2 && qemu-img check -q d.qcow2'),
      ],
    });
  });

  it('makes character devices, and reads what is in their memory', async () => {
    const make = (id: string, type: string, data: Message = {}): Step => [
      'chardev-add',
      { id, backend: { type, data } },
    ];
    const change = (id: string): Step => ['chardev-change', { id, backend: { type: 'ringbuf', data: {} } }];
    const write = (device: string, data: string, format?: string): Step => [
      'ringbuf-write',
      { device, data, ...(format === undefined ? {} : { format }) },
    ];
    const read = (device: string, size: number, format?: string): Step => [
      'ringbuf-read',
      { device, size, ...(format === undefined ? {} : { format }) },
    ];
    const thread = (name: string, iothread: string | null): Step => [
      'x-blockdev-set-iothread',
      { 'node-name': name, iothread },
    ];
    await same({
      prepare: '',
      steps: [
        ['query-chardev'],
        make('n', 'null'),
        make('n', 'null'),
        make('r', 'ringbuf', { size: 16 }),
        make('r2', 'ringbuf', { size: 15 }),
        make('m', 'memory'),
        make('x', 'nope'),
        write('r', 'hello'),
        read('r', 3),
        read('r', 100),
        read('r', 0),
        read('r', -1),
        write('r', '0123456789abcdefXYZ'),
        read('r', 4),
        write('r', 'more'),
        read('r', 100),
        write('r', 'aGk=', 'base64'),
        read('r', 100, 'base64'),
        write('r', '!!!', 'base64'),
        read('n', 1),
        read('zz', 1),
        write('zz', 'x'),
        write('n', 'x'),
        ['chardev-send-break', { id: 'n' }],
        ['chardev-send-break', { id: 'zz' }],
        change('n'),
        change('zz'),
        change('c'),
        write('n', 'x'),
        read('n', 10),
        ...['n', 'n', 'c', 'r', 'm'].map((id): Step => ['chardev-remove', { id }]),
        ['query-chardev'],
        ['blockdev-add', { driver: 'null-co', 'node-name': 'nn' }],
        thread('zz', null),
        thread('nn', null),
        thread('nn', 'io'),
        ['object-add', { 'qom-type': 'iothread', id: 'io' }],
        thread('nn', 'io'),
        thread('nn', null),
      ],
    });
  });

  it('changes limits of throttle groups, and looks at objects', async () => {
    const group = (id: string, limits: Message, more: Message = {}): Step => [
      'object-add',
      { 'qom-type': 'throttle-group', id, limits, ...more },
    ];
    const get = (path: string, property: string): Step => ['qom-get', { path, property }];
    const set = (path: string, property: string, value: unknown): Step => [
      'qom-set',
      { path, property, value },
    ];
    const wrong: readonly Message[] = [
      { 'bps-total': 1, 'bps-read': 1 },
      { 'bps-total': 1, 'bps-read-max': 1 },
      { 'iops-total-max': 5, 'iops-read': 1 },
      { 'iops-size': 512 },
      { 'bps-total': -1 },
      { 'bps-total': 1000000000000001 },
      { 'bps-total': 10, 'bps-total-max': 5 },
      { 'bps-total-max': 5 },
      { 'bps-total': 10, 'bps-total-max-length': 0 },
      { 'bps-total': 10, 'bps-total-max-length': 5 },
      { 'bps-total': 10, 'bps-total-max': 20, 'bps-total-max-length': 5000000000 },
      { 'bps-total': 10, 'bps-total-max': 1000000000000000, 'bps-total-max-length': 100000 },
      { 'bps-total': 10, 'bps-total-max': 20, 'bps-total-max-length': -1 },
      { 'bps-total': 10, 'bps-total-max': -20 },
      { 'bps-total': 1.5 },
      { nope: 1 },
    ];
    await same({
      prepare: '',
      steps: [
        ...wrong.map((limits) => group('w', limits)),
        group('v', { 'bps-read': 5 }, { 'x-bps-total': 7 }),
        group('v', {}, { 'x-bps-total': 7, 'x-iops-size': 512 }),
        ['qom-list', { path: '/' }],
        ['qom-list', { path: '/objects' }],
        group('g', {
          ...{
            'bps-read': 5,
            'iops-read': 7,
            'iops-read-max': 9,
            'iops-read-max-length': 3,
            'iops-size': 4096,
          },
        }),
        ['qom-list', { path: '/objects' }],
        ['qom-list', { path: 'g' }],
        ['qom-list', { path: '/objects/g' }],
        ['qom-list', { path: '/nope' }],
        get('/objects/g', 'limits'),
        get('g', 'x-iops-read-max'),
        get('g', 'type'),
        get('g', 'nope'),
        get('nope', 'nope'),
        get('/', 'type'),
        get('', 'type'),
        set('g', 'limits', { 'bps-total': 5 }),
        set('g', 'limits', { 'bps-total': 5, 'bps-read': 0 }),
        get('g', 'limits'),
        set('g', 'limits', { 'bps-write-max': 5 }),
        set('g', 'limits', 5),
        set('g', 'limits', { nope: 5 }),
        set('g', 'x-bps-total', 5),
        set('g', 'type', 'x'),
        set('g', 'nope', 'x'),
        get('g', 'limits'),
        ['object-add', { 'qom-type': 'iothread', id: 'io' }],
        get('io', 'poll-max-ns'),
        set('io', 'poll-max-ns', 77),
        set('io', 'poll-max-ns', -7),
        set('io', 'poll-max-ns', 'x'),
        get('io', 'poll-max-ns'),
        ['object-add', { 'qom-type': 'secret', id: 'se', data: 'x' }],
        ['qom-list', { path: 'se' }],
        get('se', 'data'),
        get('se', 'format'),
        get('se', 'file'),
        get('se', 'loaded'),
        ...['throttle-group', 'iothread', 'secret', 'tls-creds-x509', 'tls-creds-psk', 'nope'].map(
          (typename): Step => ['qom-list-properties', { typename }],
        ),
        ['blockdev-add', { driver: 'null-aio', 'node-name': 'n', size: 65536, 'read-zeroes': true }],
        ['blockdev-add', { driver: 'throttle', 'node-name': 't', 'throttle-group': 'g', file: 'n' }],
        ['blockdev-add', { driver: 'null-co', 'node-name': 'n0' }],
        ['blockdev-add', { driver: 'null-co', 'node-name': 'n1', 'read-zeroes': false, 'latency-ns': 5 }],
        ['query-named-block-nodes', { flat: true }],
        ['object-del', { id: 'g' }],
        del('t'),
        ['object-del', { id: 'g' }],
      ],
    });
  });

  it('with blkdebug nodes that are told wrong things', async () => {
    const configs: Readonly<Record<string, string>> = {
      good: '# a comment\n[inject-error]\nevent = "write_aio"\nonce = "yes"\n[set-state "x"]\nevent = "read_aio"\n',
      event: '[inject-error]\nevent = "nope"\n',
      group: '[weird]\nevent = "write_aio"\n',
      nogroup: 'event = "write_aio"\n',
      key: '[inject-error]\nevent = "l2_update"\nbogus = "1"\n',
      number: '[inject-error]\nevent = "l2_update"\nstate = "x"\n',
      flag: '[inject-error]\nevent = "l2_update"\nonce = "maybe"\n',
      noevent: '[inject-error]\nstate = "1"\n',
      words: '[inject-error]\nhello world\n',
      spaces: '[set-state]\nevent="write_aio"\n',
      iotype: '[inject-error]\nevent = "write_aio"\niotype = "foo"\n',
    };
    const node = (given: Message): Step[] => [
      [
        'blockdev-add',
        { driver: 'blkdebug', 'node-name': 'b', image: { driver: 'null-co', size: 65536 }, ...given },
      ],
      ['blockdev-del', { 'node-name': 'b' }],
    ];
    const prepare = Object.entries(configs)
      .map(([name, text]) => `cat > ${name} <<'END'\n${text}END\n`)
      .join('');
    await same({
      prepare,
      steps: [
        ...Object.keys(configs).flatMap((config) => node({ config })),
        ...node({ config: 'nofile' }),
        ...node({ align: 3 }),
        ...node({ align: -5 }),
        ...node({ align: 2 ** 31 }),
        ...node({ align: 1024, 'max-transfer': 1000 }),
        ...node({ align: 1024, 'opt-write-zero': 1000 }),
        ...node({ align: 1024, 'opt-write-zero': 4096, 'max-write-zero': 6144 }),
        ...node({ align: 512, 'opt-discard': 1000 }),
        ...node({ 'opt-discard': 4096, 'max-discard': 1024 }),
        ...node({ align: 1, 'max-transfer': 1 }),
        ...node({ 'inject-error': [{ event: 'nope' }] }),
        ...node({ 'inject-error': [{}] }),
        ...node({ 'inject-error': [{ event: 'write_aio', iotype: 'x' }] }),
        ...node({ 'set-state': [{ event: 'write_aio' }] }),
        ...node({ 'take-child-perms': ['write'], 'unshare-child-perms': ['write'] }),
      ],
    });
  });

  /** An image on a filter of its file, and a client that makes the image longer. */
  const onFilter = (filter: Message): readonly Step[] => [
    ['blockdev-add', { driver: 'file', 'node-name': 'f', filename: 'd.qcow2' }],
    ['blockdev-add', { 'node-name': 'p', file: 'f', ...filter }],
    ['blockdev-add', { driver: 'qcow2', 'node-name': 'd', file: 'p' }],
    ...serve('d'),
    sh(
      "qemu-io -f raw -c 'write -P 5 0 1M' -c 'write -P 6 5M 3M' -c 'write -z 20M 1M' -c 'discard 6M 64k' -c flush \
        -c 'read -P 5 0 1M' -c 'read -P 6 5M 512k' -c 'read -P 0 20M 1M' 'nbd+unix:///d?socket=n.sock' | grep -v ops",
    ),
    sh('stat -c %s d.qcow2'),
  ];
  const whole =
    "stat -c %s d.qcow2; qemu-img check d.qcow2; qemu-io -c 'read -P 5 0 1M' d.qcow2 | grep -v ops";
  const prepare = 'qemu-img create -q -f qcow2 d.qcow2 64M';

  it('lets an image get longer on a filter of its file', async () => {
    await same({
      prepare,
      steps: [
        ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
        ...onFilter({ driver: 'throttle', 'throttle-group': 'g' }),
      ],
      after: whole,
    });
  });

  it.each<Message>([
    {},
    { 'prealloc-size': 0 },
    { 'prealloc-size': 4 * MiB, 'prealloc-align': 3 * MiB },
    { 'prealloc-size': 2 ** 52 },
  ])('takes space for an image ahead, and gives back what is left: %o', async (options) => {
    await same({ prepare, steps: onFilter({ driver: 'preallocate', ...options }), after: whole });
  });

  // QEMU 7.2 loses data here.
  it.each<[string, Message[]]>([
    ['throttle', [{ driver: 'throttle', 'throttle-group': 'g' }]],
    ['copy-on-read', [{ driver: 'copy-on-read' }]],
    ['preallocate', [{ driver: 'preallocate', 'prealloc-size': MiB }]],
    [
      'throttle over preallocate',
      [
        { driver: 'preallocate', 'prealloc-size': MiB },
        { driver: 'throttle', 'throttle-group': 'g' },
      ],
    ],
  ])('keeps what many writers write at once to an image on %s', async (_, filters) => {
    const place = join(folder, 'ours');
    const { answers } = await play('stillframe', place, {
      prepare: 'qemu-img create -q -f qcow2 d.qcow2 64M; head -c 12M /dev/urandom > r; truncate -s 64M r',
      steps: [
        ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
        ['blockdev-add', { driver: 'file', 'node-name': 'n0', filename: 'd.qcow2' }],
        ...filters.map((filter, index): Step => {
          const node = { 'node-name': `n${index + 1}`, file: `n${index}` };
          return ['blockdev-add', { ...node, ...filter }];
        }),
        ['blockdev-add', { driver: 'qcow2', 'node-name': 'd', file: `n${filters.length}` }],
        ...serve('d'),
        sh("qemu-img convert -n -m 16 -W -f raw -O raw r 'nbd+unix:///d?socket=n.sock'"),
      ],
      after: 'qemu-img check -q d.qcow2 && qemu-img compare -f raw -F qcow2 r d.qcow2; stat -c %s d.qcow2',
    });
    // 192 clusters of data and five of tables.
    const said = `Images are identical.\n${197 * 65536}\n`;
    expect(answers.at(-1)).toMatchObject({ said });
  });

  it('gives space back when the image is closed or only read from then on', async () => {
    const image = (more: Message = {}): Message => ({
      driver: 'qcow2',
      'node-name': 'd',
      file: 'p',
      ...more,
    });
    await same({
      prepare,
      steps: [
        ...onFilter({ driver: 'preallocate' }),
        ['block-export-del', { id: 'e-d', mode: 'hard' }],
        ['blockdev-reopen', { options: [image({ 'read-only': true })] }],
        sh('stat -c %s d.qcow2'),
        ['blockdev-reopen', { options: [image()] }],
        ['block-export-add', { ...exported('d'), writable: true }],
        sh("qemu-io -f raw -c 'write -P 7 30M 1M' 'nbd+unix:///d?socket=n.sock' | grep -v ops"),
        sh('stat -c %s d.qcow2'),
        ['block-export-del', { id: 'e-d', mode: 'hard' }],
        del('d'),
        sh('stat -c %s d.qcow2'),
        del('p'),
        del('f'),
      ],
      after: `${whole}; qemu-io -c 'read -P 7 30M 1M' d.qcow2 | grep -v ops`,
    });
  });

  it('leaves a valid image where the daemon is killed with space in hand', async () => {
    await same({
      prepare,
      steps: onFilter({ driver: 'preallocate' }),
      end: 'SIGKILL',
      after: `${whole}; qemu-io -c 'write -P 8 40M 8M' -c 'read -P 6 5M 512k' d.qcow2 | grep -v ops; qemu-img check d.qcow2`,
    });
  });

  it('with preallocate nodes that are told wrong things', async () => {
    const node = (given: Message): Step[] => [
      ['blockdev-add', { driver: 'preallocate', 'node-name': 'p', file: { driver: 'null-co' }, ...given }],
      ['blockdev-del', { 'node-name': 'p' }],
    ];
    await same({
      prepare: '',
      steps: [
        ...[0, 256, 1000, 1536, -1].flatMap((align) => node({ 'prealloc-align': align })),
        ...[0, 1000, -1, 'x'].flatMap((size) => node({ 'prealloc-size': size })),
        ...node({ 'prealloc-align': -512, 'prealloc-size': -1 }),
      ],
    });
  });
});
