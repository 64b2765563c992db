/** Secrets, and keys that are encrypted with them. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { makeCertificates } from '../support/certificates.js';
import { startStillframe, stillframe } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';
import { hasQemu, type Step, same } from '../support/sessions.js';

const secret = (id: string, more: object): Step => ['object-add', { 'qom-type': 'secret', id, ...more }];
const KEY = Buffer.alloc(32, 7).toString('base64');
const IV = Buffer.alloc(16, 9).toString('base64');

describe.skipIf(!hasQemu())('secrets, beside QEMU', () => {
  it('are text or base64, and encrypted by others', () =>
    same({
      prepare: 'printf hello >f',
      steps: [
        secret('s', { data: 'x', file: 'f' }),
        secret('s', {}),
        secret('s', { file: 'nope' }),
        secret('s', { data: '%%%', format: 'base64' }),
        secret('s', { data: 'x', format: 'nope' }),
        secret('s', { data: 'x', keyid: 'k' }),
        secret('short', { data: 'x' }),
        secret('file', { file: 'f' }),
        secret('k', { data: KEY, format: 'base64' }),
        ['object-add', { 'qom-type': 'iothread', id: 't' }],
        secret('s', { data: 'x', keyid: 't', iv: IV }),
        secret('s', { data: 'x', keyid: 'short', iv: IV }),
        secret('s', { data: 'x', keyid: 'k' }),
        secret('s', { data: 'x', keyid: 'k', iv: '%%' }),
        secret('s', { data: 'x', keyid: 'k', iv: 'AAAA' }),
        secret('s', { data: 'x', keyid: 'k', iv: IV }),
        secret('s', { data: '%%', format: 'base64', keyid: 'k', iv: IV }),
        secret('s', { data: 'A'.repeat(22), format: 'base64', keyid: 'k', iv: IV }),
        secret('s', { data: 'x', iv: IV }),
      ],
    }));
});

describe.skipIf(!hasQemu() || !hasPeer('openssl'))('an encrypted key', () => {
  let folder = '';
  let certificates = '';

  beforeAll(() => {
    folder = mkdtempSync(join(tmpdir(), 'stillframe-secrets-'));
    certificates = makeCertificates(join(folder, 'pki'));
    for (const who of ['server', 'client']) {
      const key = join(certificates, `${who}-key.pem`);
      run('openssl', ['pkcs8', '-topk8', '-in', key, '-out', `${key}.new`, '-passout', 'pass:hello']);
      run('mv', [`${key}.new`, key]);
    }
  });
  afterAll(() => {
    rmSync(folder, { recursive: true, force: true });
  });

  const credentials = (id: string, endpoint: string, passwordid: string): Step => [
    'object-add',
    { 'qom-type': 'tls-creds-x509', id, endpoint, dir: certificates, passwordid },
  ];

  it('is opened by its secret, and by no other one', () =>
    same({
      prepare: 'truncate -s 64k a.raw',
      steps: [
        credentials('c', 'server', 'good'),
        secret('bad', { data: 'nope' }),
        secret('good', { data: 'hello' }),
        ['object-add', { 'qom-type': 'iothread', id: 't' }],
        credentials('c', 'server', 't'),
        credentials('c', 'server', 'bad'),
        credentials('c', 'client', 'bad'),
        credentials('s', 'server', 'good'),
        credentials('c', 'client', 'good'),
      ],
    }));

  it.each(['qemu-nbd', 'stillframe'])('is what %s serves with, and a client of ours has', async (server) => {
    const address = join(folder, `${server}.sock`);
    rmSync(address, { force: true });
    const image = join(folder, 'a.raw');
    run('truncate', ['-s', '64k', image]);
    const objects = (endpoint: string): string[] => [
      ...['--object', 'secret,id=s,data=hello'],
      ...['--object', `tls-creds-x509,id=t,endpoint=${endpoint},dir=${certificates},passwordid=s`],
    ];
    const served =
      server === 'qemu-nbd'
        ? spawn('qemu-nbd', [
            ...objects('server'),
            '--tls-creds',
            't',
            '-t',
            '-k',
            address,
            '-f',
            'raw',
            image,
          ])
        : startStillframe([
            ...['daemon', ...objects('server')],
            ...['--blockdev', `raw,node-name=a,file.driver=file,file.filename=${image}`],
            ...['--nbd-server', `addr.type=unix,addr.path=${address},tls-creds=t`],
            ...['--export', 'nbd,id=e,node-name=a,name=,writable=on'],
          ]).child;
    const gone = once(served, 'exit');
    try {
      await expect.poll(() => existsSync(address), { timeout: 30_000 }).toBe(true);
      const there = join(folder, `${server}.pid`);
      const client = startStillframe([
        ...['daemon', ...objects('client')],
        '--blockdev',
        `nbd,node-name=n,server.type=unix,server.path=${address},tls-creds=t,tls-hostname=localhost`,
        ...['--pidfile', there],
      ]);
      const ended = client.finished.then(({ stderr }) => stderr);
      await Promise.race([ended, expect.poll(() => existsSync(there), { timeout: 30_000 }).toBe(true)]);
      client.child.kill('SIGTERM');
      expect(await ended).toBe('');
      // And a tool whose image is named by options.
      const at = `file.server.type=unix,file.server.path=${address}`;
      const image = `driver=raw,file.driver=nbd,${at},file.tls-creds=t,file.tls-hostname=localhost`;
      const info = ['info', '--output=json', ...objects('client'), '--image-opts', image];
      for (const told of [stillframe(info).stdout, run('qemu-img', info)]) {
        expect(JSON.parse(told)).toMatchObject({ 'virtual-size': 65536, format: 'raw' });
      }
    } finally {
      served.kill('SIGTERM');
      await gone;
    }
  });
});
