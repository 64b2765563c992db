/** Sessions with NBD servers and their clients, played to QEMU's daemon and to ours. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { makeCertificates } from '../support/certificates.js';
import { hasPeer } from '../support/peers.js';
import type { Message } from '../support/qmp.js';
import { del, event, hasQemu, nodes, play, type Step, same, sh } from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-nbd-sessions-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Servers end with the session, and after a while where it has no end. */
const server = (name: string, options: string): string =>
  `(timeout 100 qemu-nbd -t -e 0 -f raw -k "$PWD/${name}.sock" --pid-file=${name}.pid ${options} >/dev/null 2>&1 &)
   while [ ! -s ${name}.pid ]; do sleep 0.05; done`;
const after = 'for pid in $(cat *.pid); do kill $pid 2>/dev/null; done';

const unix = (name: string, more: Message = {}): Message => ({
  server: { type: 'unix', path: `${name}.sock`, ...more },
});
const inet = (more: Message): Message => ({
  server: { type: 'inet', host: '127.0.0.1', port: '1', ...more },
});
const add = (given: Message): Step => ['blockdev-add', { driver: 'nbd', 'node-name': 'a', ...given }];
const gone = del('a');
const start = (more: Message = {}): Step => [
  'nbd-server-start',
  { addr: { type: 'unix', data: { path: 'n.sock' } }, ...more },
];
const exported = (id: string, more: Message = {}): Step => [
  'block-export-add',
  { type: 'nbd', id, 'node-name': 'd', name: id, ...more },
];
/** The answer may come before. */
const deleted = (id: string): Step => event('BLOCK_EXPORT_DELETED', { id });
/** Stays until it is killed. */
const client = (name: string): Step =>
  sh(`
    (timeout 100 qemu-storage-daemon --pidfile c.pid --blockdev \
      driver=nbd,node-name=n,read-only=on,server.type=unix,server.path=n.sock,export=${name} >/dev/null 2>&1 &)
    while [ ! -s c.pid ]; do sleep 0.05; done`);

describe.skipIf(!hasQemu())('a session', () => {
  it('with clients of servers that are there, and of others', async () => {
    await same({
      prepare: `
        qemu-img create -q -f raw d.raw 4M
        ${server('w', '-x exp d.raw')}
        ${server('r', '-r d.raw')}`,
      steps: [
        ...[{}, { export: 'nope' }].map((more) => add({ ...unix('w'), ...more })),
        add({ ...unix('none') }),
        add({ ...unix('x'.repeat(200)) }),
        // Nobody listens there, whatever is in the folder.
        add({ ...unix('w', { abstract: true }), export: 'exp' }),
        ...[{}, { port: 'nope' }, { port: '-1' }, { ipv4: false, ipv6: false }].map((more) =>
          add(inet(more)),
        ),
        ...['qemu:dirty-bitmap:nope', 'nope', '', 'qemu:', 'qemu:allocation-depth', 'x'.repeat(4097)].map(
          (name) => add({ ...unix('w'), export: 'exp', 'x-dirty-bitmap': name }),
        ),
        add({ ...unix('w'), export: 'exp', 'x-dirty-bitmap': 'base:allocation' }),
        gone,
        add({ ...unix('w'), export: 'exp', 'reconnect-delay': 4294967295, 'open-timeout': 4294967295 }),
        nodes,
        ['block_resize', { 'node-name': 'a', size: 1024 }],
        ['block_resize', { 'node-name': 'a', size: 8 << 20 }],
        ['blockdev-reopen', { options: [{ driver: 'nbd', 'node-name': 'a', ...unix('r'), export: 'exp' }] }],
        ['blockdev-add', { driver: 'raw', 'node-name': 'b', file: 'a' }],
        ['block_resize', { 'node-name': 'b', size: 8 << 20 }],
        nodes,
        del('b'),
        gone,
        add(unix('r')),
        add({ ...unix('r'), 'auto-read-only': true }),
        nodes,
        gone,
      ],
      after,
    });
  });

  it('with exports that are removed while somebody uses another one', async () => {
    await same({
      prepare: 'qemu-img create -q -f raw d.raw 4M',
      steps: [
        ['blockdev-add', { driver: 'file', 'node-name': 'd', filename: 'd.raw' }],
        start(),
        ['nbd-server-add', { device: 'd', name: '' }],
        ['nbd-server-add', { device: 'd', name: 'b c' }],
        ...['a', 'b', 'c'].map((id) => exported(id)),
        client('a'),
        ['nbd-server-remove', { name: 'a' }],
        ['nbd-server-remove', { name: 'b' }],
        deleted('b'),
        ['block-export-del', { id: 'c' }],
        deleted('c'),
        ['block-export-del', { id: 'a' }],
        ['query-block-exports'],
        ['block-export-del', { id: 'a', mode: 'hard' }],
        deleted('a'),
        ['query-block-exports'],
        ['nbd-server-stop'],
        // Who counted on several connections would wait for itself.
        start({ 'max-connections': 1 }),
        exported('a'),
        ...(hasPeer('nbdinfo') ? [sh("nbdinfo 'nbd+unix:///a?socket=n.sock'")] : []),
      ],
      after,
    });
  });

  it('with exports the data of which is durable before that is said', async () => {
    const write = (name: string, what: string): Step =>
      sh(`qemu-io -t writeback -f raw -c '${what}' 'nbd+unix:///${name}?socket=n.sock'`);
    const file = { driver: 'file', filename: 'd.raw' };
    const rule = { event: 'none', iotype: 'flush', errno: 28 };
    await same({
      // Nothing of it can be made durable in the end.
      end: 'SIGKILL',
      prepare: 'qemu-img create -q -f raw d.raw 4M',
      steps: [
        ['blockdev-add', { driver: 'blkdebug', 'node-name': 'd', image: file, 'inject-error': [rule] }],
        start(),
        ...[exported('a', { writable: true }), exported('b', { writable: true, writethrough: true })],
        ...[
          'write -P 1 0 64k',
          'write -P 2 1M 2M',
          'write -z 64k 64k',
          'discard 128k 64k',
          'read 0 64k',
        ].flatMap((what) => [write('a', what), write('b', what)]),
      ],
    });
  });

  it('with errors of the system that clients are told', async () => {
    const errors = [1, 12, 13, 22, 27, 28];
    await same({
      prepare: '',
      steps: [
        start(),
        ...errors.flatMap((errno): Step[] => {
          const rules = ['read', 'write'].map((iotype) => ({ event: 'none', iotype, errno }));
          const image = { driver: 'null-co', size: 1 << 20, 'read-zeroes': true };
          const name = `e${errno}`;
          return [
            ['blockdev-add', { driver: 'blkdebug', 'node-name': name, image, 'inject-error': rules }],
            ['block-export-add', { type: 'nbd', id: name, 'node-name': name, writable: true }],
          ];
        }),
        ...errors.map((errno) =>
          sh(`qemu-io -f raw -c 'write 0 64k' -c 'read 0 64k' 'nbd+unix:///e${errno}?socket=n.sock'`),
        ),
      ],
    });
  });

  it('with TLS, where the files say whether there can be any', async () => {
    const pki = makeCertificates(join(folder, 'pki'));
    const other = makeCertificates(join(folder, 'other'));
    const object = (id: string, given: Message): Step => [
      'object-add',
      { 'qom-type': 'tls-creds-x509', id, endpoint: 'client', dir: pki, ...given },
    ];
    const keys = (id: string, given: Message = {}): Step => [
      'object-add',
      { 'qom-type': 'tls-creds-psk', id, endpoint: 'client', dir: 'keys', ...given },
    ];
    const credentials = (dir: string): string =>
      `--object tls-creds-x509,id=t,dir=${dir},endpoint=server,verify-peer=off --tls-creds t`;
    await same({
      prepare: `
        qemu-img create -q -f raw d.raw 4M
        mkdir keys none garbled mixed strange
        openssl genpkey -genparam -algorithm DH -pkeyopt group:ffdhe2048 -out dh-params.pem
        for dir in keys none ${pki}; do cp -n dh-params.pem $dir; done
        for user in qemu alice; do echo $user:$(openssl rand -hex 32); done > keys/keys.psk
        cp ${pki}/*.pem garbled; echo no > garbled/ca-cert.pem
        cp ${pki}/*.pem mixed; cp ${other}/*-key.pem mixed
        cp ${pki}/*.pem strange; cp ${other}/ca-cert.pem strange
        ${server('w', 'd.raw')}
        ${server('t', `${credentials(pki)} d.raw`)}
        ${server('k', '--object tls-creds-psk,id=t,dir=$PWD/keys,endpoint=server --tls-creds t d.raw')}`,
      steps: [
        ...(['server', 'client'] as const).flatMap((endpoint) => [
          ...['none', 'garbled', 'mixed', 'strange'].map((dir) => object('x', { dir, endpoint })),
          ...['none', 'mixed'].map((dir) => object('x', { dir, endpoint, 'sanity-check': false })),
          object('x', { dir: undefined, endpoint }),
          keys('x', { dir: undefined, endpoint }),
          keys('x', { dir: endpoint === 'client' ? 'none' : 'keys', endpoint, username: 'bob' }),
        ]),
        keys('x', { username: 'bob' }),
        object('s', { endpoint: 'server', 'verify-peer': false }),
        ...[object('c', {}), object('anybody', { 'verify-peer': false })],
        ...[keys('q'), keys('alice', { username: 'alice' })],
        ['object-add', { 'qom-type': 'secret', id: 'secret', data: 'x' }],
        add(unix('t')),
        add({ ...unix('w'), 'tls-creds': 'c' }),
        ...['nope', 's', 'secret'].map((creds) => add({ ...unix('t'), 'tls-creds': creds })),
        add({ ...unix('t'), 'tls-creds': 'c', 'tls-hostname': 'localhost' }),
        nodes,
        // Who has them keeps what they say.
        ['object-del', { id: 'c' }],
        gone,
        ...[add({ ...unix('t'), 'tls-creds': 'anybody' }), gone],
        ...['q', 'alice'].flatMap((creds) => [add({ ...unix('k'), 'tls-creds': creds }), gone]),
        start({ 'tls-creds': 's' }),
        ['object-del', { id: 's' }],
        ['nbd-server-stop'],
      ],
      after,
    });
  });
});

it('a server that was to ask somebody else whom it may serve is none', async () => {
  const { answers } = await play('stillframe', join(folder, 'authz'), {
    prepare: 'mkdir keys; echo qemu:0123456789abcdef > keys/keys.psk',
    steps: [
      ['object-add', { 'qom-type': 'tls-creds-psk', id: 't', endpoint: 'server', dir: 'keys' }],
      start({ 'tls-creds': 't', 'tls-authz': 'a' }),
      ['nbd-server-stop'],
    ],
  });
  const told = answers.filter((one) => String((one as Message)['execute']).startsWith('nbd-server-'));
  expect(told).toMatchObject([
    { answer: { error: { desc: expect.stringContaining("'tls-authz' is not supported") } } },
    { answer: { error: { desc: 'NBD server not running' } } },
  ]);
});
