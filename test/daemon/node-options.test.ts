/** What `discard` and `detect-zeroes` make of requests, node by node. */
import { describe, it } from 'vitest';
import { type Command, del, guest, hasQemu, qcow2, raw, same, serve, sh } from '../support/sessions.js';

const onFile = (driver: string, name: string, more: object, file: object): Command => [
  'blockdev-add',
  {
    ...{ driver, 'node-name': name, ...more },
    file: { driver: 'file', filename: `${name}.${driver}`, ...file },
  },
];
const unmap = { discard: 'unmap' };
const ignore = { discard: 'ignore' };

const prepare = `
  for i in a b c d e; do
    truncate -s 1M $i.raw; qemu-io -f raw -c 'write -P 1 0 1M' $i.raw >/dev/null
    qemu-img create -q -f qcow2 q$i.qcow2 1M; qemu-io -c 'write -P 1 0 1M' q$i.qcow2 >/dev/null
  done
`;

/** Space in units of 64 KiB: a file system needs some for itself. */
const space = (...names: readonly string[]) =>
  sh(`for i in ${names.join(' ')}; do echo $i $(($(stat -c %b $i) / 128)); done`);

describe.skipIf(!hasQemu())('options of every node, beside QEMU', () => {
  it.each(['raw', 'qcow2'])('say what becomes of discards and zeroes: %s', async (format) => {
    const names = ['a', 'b', 'c', 'd', 'e'].map((name) => (format === 'raw' ? name : `q${name}`));
    const [plain = '', unmaps = '', above = '', detects = '', keeps = ''] = names;
    const files = names.map((name) => `${name}.${format}`);
    await same({
      prepare,
      steps: [
        // The space that an image itself gives back is another matter.
        onFile(format, plain, {}, format === 'raw' ? {} : ignore),
        onFile(format, unmaps, unmap, {}),
        onFile(format, above, unmap, ignore),
        onFile(format, detects, { ...unmap, 'detect-zeroes': 'unmap' }, {}),
        onFile(format, keeps, { ...unmap, 'detect-zeroes': 'on' }, {}),
        ...serve(...names),
        ...names.map((name) =>
          guest(name, 'discard 0 128k', 'write -z 128k 128k', 'write -zu 256k 128k', 'write -P 0 384k 128k'),
        ),
        ...names.flatMap((name) => [['block-export-del', { id: `e-${name}` }] as const, del(name)]),
        space(...files),
        ...files.map((file) => sh(`qemu-img map -f ${format} --output=json ${file}`)),
      ],
    });
  });

  it('pass through filters that have their own', () =>
    same({
      prepare,
      steps: [
        raw('a', unmap),
        raw('b'),
        raw('c', unmap),
        ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
        ...['a', 'b'].map(
          (file): Command => [
            'blockdev-add',
            { driver: 'throttle', 'node-name': `t${file}`, 'throttle-group': 'g', file, ...unmap },
          ],
        ),
        ['blockdev-add', { driver: 'throttle', 'node-name': 'tc', 'throttle-group': 'g', file: 'c' }],
        ...serve('ta', 'tb', 'tc'),
        ...['ta', 'tb', 'tc'].map((name) => guest(name, 'discard 0 256k', 'write -zu 512k 256k')),
        space('a.raw', 'b.raw', 'c.raw'),
      ],
    }));

  it('change when nodes are opened anew', () =>
    same({
      prepare,
      steps: [
        raw('a'),
        ...serve('a'),
        guest('a', 'discard 0 256k'),
        space('a.raw'),
        [
          'blockdev-reopen',
          {
            options: [
              {
                driver: 'raw',
                'node-name': 'a',
                'detect-zeroes': 'unmap',
                ...unmap,
                file: { driver: 'file', filename: 'a.raw' },
              },
            ],
          },
        ],
        guest('a', 'discard 0 256k', 'write -P 0 512k 128k'),
        space('a.raw'),
      ],
    }));

  it('let others see at once what has become of data', () => {
    const map = sh(
      "qemu-img map --output=json -f raw 'nbd+unix:///a?socket=n.sock' | sed 's/, .offset.*}/}/'",
    );
    return same({
      prepare,
      steps: [
        ...[onFile('raw', 'a', unmap, {}), ...serve('a'), map],
        ...[guest('a', 'discard 128k 128k'), map, guest('a', 'write -zu 512k 128k'), map],
      ],
    });
  });

  it('have to go together', () =>
    same({
      prepare,
      steps: [
        onFile('raw', 'a', { 'detect-zeroes': 'unmap' }, {}),
        onFile('raw', 'a', { 'detect-zeroes': 'unmap', ...ignore }, {}),
        onFile('raw', 'nope', { 'detect-zeroes': 'unmap' }, {}),
        onFile('raw', 'a', { 'detect-zeroes': 'nonsense' }, {}),
        onFile('raw', 'a', {}, { 'detect-zeroes': 'unmap' }),
        qcow2('qa', { 'detect-zeroes': 'unmap' }),
        ['blockdev-add', { driver: 'null-co', 'node-name': 'x', 'detect-zeroes': 'unmap' }],
      ],
    }));

  it('are those of drives as well', () =>
    same({
      prepare,
      peer: 'qemu-system-x86_64',
      options: [
        ...['--drive', 'file=a.raw,format=raw,id=a,if=none,discard=on,detect-zeroes=unmap'],
        ...['--drive', 'file=b.raw,format=raw,id=b,if=none,discard=off,detect-zeroes=on'],
        ...['--drive', 'file=c.raw,format=raw,id=c,if=none'],
      ],
      steps: [
        ['query-block'],
        ...['a', 'b', 'c'].flatMap((name) =>
          ['write -P 0 0 64k', 'discard 64k 64k', 'write -zu 128k 64k', 'write -z 256k 64k'].map(
            (line): Command => ['human-monitor-command', { 'command-line': `qemu-io ${name} "${line}"` }],
          ),
        ),
        space('a.raw', 'b.raw', 'c.raw'),
      ],
    }));

  it('name files, backing files and servers that are there', () => {
    const add = (options: object): Command => ['blockdev-add', { 'node-name': 'x', ...options }];
    const file = (filename: string, more: object = {}) => add({ driver: 'file', filename, ...more });
    const far = { driver: 'nbd', server: { type: 'unix', path: 's.sock' } };
    const listen = (type: string, data: object): Command => ['nbd-server-start', { addr: { type, data } }];
    return same({
      prepare: `
        truncate -s 1M a.raw; mkdir sub; qemu-img create -q -f qcow2 m.qcow2 1M
        qemu-img rebase -u -b a.raw -F qcow2 m.qcow2; cp m.qcow2 sub/m.qcow2
        qemu-nbd -f raw -t -x a -k $PWD/s.sock --fork --pid-file=pid a.raw`,
      steps: [
        ...['.', '', '/dev/null', 'a.raw/x', 'x'.repeat(300)].map((name) => file(name)),
        file('.', { 'read-only': true }),
        ...['a.raw', '', 'nope'].map((filename) => add({ driver: 'host_device', filename })),
        qcow2('m'),
        add({ driver: 'qcow2', file: { driver: 'file', filename: 'sub/m.qcow2' } }),
        ...['nope', '', 'x'.repeat(4097)].map((name) => add({ ...far, export: name })),
        add({ ...far, server: { type: 'fd', str: 'nope' } }),
        add({ ...far, export: 'a', 'read-only': true, 'reconnect-delay': 1, 'open-timeout': 1 }),
        ['query-named-block-nodes', { flat: true }],
        del('x'),
        sh('kill $(cat pid)'),
        listen('unix', { path: 'nowhere/n.sock' }),
        listen('unix', { path: 'x'.repeat(120) }),
        listen('inet', { host: '127.0.0.1', port: 'nonsense' }),
        ['object-add', { 'qom-type': 'throttle-group', id: '0' }],
        raw('a'),
        ...['a', { driver: 'null-co' }, { driver: 'blkdebug', image: 'a' }].map((below) =>
          add({ driver: 'compress', file: below }),
        ),
      ],
    });
  });
});
