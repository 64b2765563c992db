/** NBD over TLS with real servers, by certificates and by keys that both know. */
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { makeCertificates, makeIntermediate } from '../support/certificates.js';
import { firstDifference, Random } from '../support/data.js';
import { ACK, GREETING, optionReply, withFakeServer } from '../support/fake-nbd.js';
import { nbdkit, qemuNbd, type Server } from '../support/nbd.js';
import { hasPeer } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-tls-'));
const at = (name: string): string => join(folder, name);
const content = new Random(4).noise(6 << 20);
const KEY = '0123456789abcdef'.repeat(4);
const peers = hasPeer('qemu-nbd') && hasPeer('nbdkit') && hasPeer('openssl');

let engine: Engine;
let server: Server | undefined;
beforeAll(async () => {
  engine = await createEngine({ workers: 2 });
  if (!peers) return;
  makeCertificates(at('pki'));
  makeCertificates(at('other'), 'DNS:*.example.org', 'IP:127.0.0.1');
  makeIntermediate(at('pki'), at('middle'));
  for (const folder of ['anonymous', 'stranger']) mkdirSync(at(folder));
  for (const folder of ['middle', 'anonymous', 'stranger']) {
    cpSync(join(at('pki'), 'ca-cert.pem'), join(at(folder), 'ca-cert.pem'));
  }
  for (const file of ['client-cert.pem', 'client-key.pem']) {
    cpSync(join(at('other'), file), join(at('stranger'), file));
  }
  writeFileSync(at('disk'), content);
  writeFileSync(at('keys.psk'), `alice:${KEY}\n`);
  writeFileSync(at('wrong.psk'), `alice:${'ff'.repeat(32)}\n`);
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
afterEach(() => {
  server?.stop();
  server = undefined;
});

function nameOf({ uri }: Server, parameters: string, user = ''): string {
  return uri('', parameters).replace('nbd+unix://', `nbds+unix://${user}`);
}

async function readAll(name: string): Promise<void> {
  const disk = await engine.openDisk(name, { format: 'raw', readOnly: true });
  try {
    const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full', force: true });
    await job.result();
    for (let offset = 0; offset < content.length; offset += 1 << 20) {
      const found = Buffer.from(await disk.read(offset, 1 << 20));
      expect(firstDifference(found, content.subarray(offset, offset + (1 << 20)))).toBe(-1);
    }
  } finally {
    await disk.close();
  }
}

const kitX509 = (...args: string[]) =>
  nbdkit(['-r', '--tls=require', `--tls-certificates=${at('pki')}`, ...args, 'file', at('disk')]);
const kitPsk = () => nbdkit(['-r', '--tls=require', `--tls-psk=${at('keys.psk')}`, 'file', at('disk')]);
const qemu = (credentials: string, priority = 'NORMAL') =>
  qemuNbd([
    '-r',
    '-f',
    'raw',
    '-e',
    '4',
    '--object',
    `${credentials},id=tls0,endpoint=server,priority=${priority},dir=${at(credentials.endsWith('psk') ? '.' : 'pki')}`,
    '--tls-creds',
    'tls0',
    at('disk'),
  ]);

describe.skipIf(!peers)('an export is read over TLS', () => {
  it.each<[what: string, serve: () => Server, parameters: () => string, user?: string]>([
    ['nbdkit with certificates', () => kitX509(), () => `&tls-certificates=${at('pki')}`],
    [
      'nbdkit that wants to know the client',
      () => kitX509('--tls-verify-peer'),
      () => `&tls-certificates=${at('pki')}`,
    ],
    ['nbdkit with a key', kitPsk, () => `&tls-psk-file=${at('keys.psk')}`, 'alice@'],
    ['qemu-nbd with certificates', () => qemu('tls-creds-x509'), () => `&tls-certificates=${at('pki')}`],
    ['qemu-nbd with a key', () => qemu('tls-creds-psk'), () => `&tls-psk-file=${at('keys.psk')}`],
    [
      'qemu-nbd with certificates and TLS 1.2',
      () => qemu('tls-creds-x509', 'NORMAL:-VERS-TLS1.3'),
      () => `&tls-certificates=${at('pki')}`,
    ],
    [
      'qemu-nbd with a key and TLS 1.2',
      () => qemu('tls-creds-psk', 'NORMAL:-VERS-TLS1.3'),
      () => `&tls-psk-file=${at('keys.psk')}`,
    ],
    [
      'nbdkit whose certificate another one has signed in between',
      () => kitX509(`--tls-certificates=${at('middle')}`),
      () => `&tls-certificates=${at('pki')}`,
    ],
    [
      'nbdkit with a certificate for all hosts of a domain',
      () => kitX509(`--tls-certificates=${at('other')}`),
      () => `&tls-certificates=${at('other')}&tls-hostname=a.example.org`,
    ],
    [
      'nbdkit with a certificate for an address',
      () => kitX509(`--tls-certificates=${at('other')}`),
      () => `&tls-certificates=${at('other')}`,
      '127.0.0.1',
    ],
  ])('from %s', async (_, serve, parameters, user) => {
    server = serve();
    await readAll(nameOf(server, parameters(), user));
  });

  it.each<[what: string, serve: () => Server, parameters: () => string, text: RegExp]>([
    [
      'a certificate of an unknown authority',
      () => kitX509(),
      () => `&tls-certificates=${at('other')}`,
      /certificate/,
    ],
    ['no authority', () => kitX509(), () => '', /certificate/],
    [
      'a certificate for another host',
      () => kitX509(),
      () => `&tls-certificates=${at('pki')}&tls-hostname=example.com`,
      /example\.com/,
    ],
    [
      'a certificate for a part of the name',
      () => kitX509(`--tls-certificates=${at('other')}`),
      () => `&tls-certificates=${at('other')}&tls-hostname=a.b.example.org`,
      /a\.b\.example\.org/,
    ],
    ['a wrong key', kitPsk, () => `&tls-psk-file=${at('wrong.psk')}`, /TLS/],
    [
      'a key where the server has a certificate',
      () => kitX509(),
      () => `&tls-psk-file=${at('keys.psk')}`,
      /TLS/,
    ],
    [
      'a server without TLS',
      () => nbdkit(['-r', 'file', at('disk')]),
      () => `&tls-certificates=${at('pki')}`,
      /TLS/,
    ],
  ])('but not with %s', async (_, serve, parameters, text) => {
    server = serve();
    await expect(readAll(nameOf(server, parameters()))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_NBD_REFUSED',
      message: expect.stringMatching(text),
    });
  });

  it.each([
    ['no certificate of ours', 'anonymous'],
    ['one of another authority', 'stranger'],
  ])('but not by a server that wants to know the client, with %s', async (_, folder) => {
    server = kitX509('--tls-verify-peer');
    await expect(readAll(nameOf(server, `&tls-certificates=${at(folder)}`))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_NBD_CONNECTION',
      message: expect.stringContaining('client-cert.pem'),
    });
  });

  it.each([
    ['localhost', 0],
    ['127.0.0.1', 'ERR_STILLFRAME_NBD_REFUSED'],
    ['127.0.0.1', 0, 'tls-hostname=localhost'],
  ])('from the host %s: %s', async (host, expected, parameter = '') => {
    const port = 30_000 + (process.pid % 10_000);
    server = kitX509('--port', String(port), '--ipaddr', '127.0.0.1');
    const name = `nbds://${host}:${port}/?tls-certificates=${at('pki')}&${parameter}`;
    const outcome = await readAll(name).then(
      () => 0,
      ({ code }) => code,
    );
    expect(outcome).toBe(expected);
  });

  it.each([
    ['certificates', ['--tls-certificates', 'pki'], '&tls-certificates='],
    ['a key', ['--tls-psk', 'keys.psk'], '&tls-psk-file='],
  ] as const)('and written, with %s', async (_, [option, file], parameter) => {
    writeFileSync(at('target'), new Uint8Array(content.length).fill(0xee));
    server = nbdkit(['--tls=require', `${option}=${at(file)}`, 'file', at('target')]);
    const disk = await engine.openDisk(at('disk'), { format: 'raw', readOnly: true });
    try {
      const target = nameOf(server, `${parameter}${at(file)}`);
      await (await disk.backup({ target, sync: 'full' })).result();
    } finally {
      await disk.close();
    }
    expect(firstDifference(readFileSync(at('target')), content)).toBe(-1);
  });

  it.each([
    ['NODE_EXTRA_CA_CERTS', 'adds to those that are known'],
    ['SSL_CERT_FILE', 'puts in the place of the known ones'],
  ])('from an authority that %s %s', async (variable) => {
    server = kitX509();
    const name = nameOf(server, '');
    const open = async (): Promise<void> => {
      // Threads have the environment of the time when they were started.
      const other = await createEngine({ workers: 1 });
      try {
        await (await other.openDisk(name, { format: 'raw', readOnly: true })).close();
      } finally {
        await other.close();
      }
    };
    try {
      vi.stubEnv(variable, join(at('pki'), 'ca-cert.pem'));
      await open();
      vi.stubEnv(variable, join(at('other'), 'ca-cert.pem'));
      await expect(open()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_REFUSED' });
      vi.stubEnv(variable, at('nowhere.pem'));
      await expect(open()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NOT_FOUND' });
    } finally {
      vi.unstubAllEnvs();
    }
  });

  it('with anybody, where nobody is to be verified', async () => {
    server = kitX509();
    await readAll(nameOf(server, '&tls-verify-peer=0'));
  });

  it('and not without, where the server wants it', async () => {
    server = kitX509();
    await expect(readAll(server.uri())).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_NBD_REFUSED',
      message: expect.stringContaining('nbds'),
    });
  });

  it('and not without a certificate of ours, where the server says that it wants one', async () => {
    const disk = await engine.openDisk(at('disk'), { format: 'raw', readOnly: true });
    const socket = at('ours.sock');
    const ours = await engine.serveNbd({
      listen: `unix:${socket}`,
      exports: [{ disk }],
      tls: { certificates: at('pki'), verifyPeer: true },
    });
    try {
      const name = (folder: string) =>
        `nbds+unix://localhost/?socket=${socket}&tls-certificates=${at(folder)}`;
      await readAll(name('pki'));
      await expect(readAll(name('anonymous'))).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_NBD_REFUSED',
        message: expect.stringContaining('certificate required'),
      });
    } finally {
      await ours.close();
      await disk.close();
    }
  });

  it('with the keys of users that are there', async () => {
    server = kitPsk();
    await expect(readAll(nameOf(server, `&tls-psk-file=${at('keys.psk')}`, 'bob@'))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_INVALID_ARGUMENT',
    });
    await expect(readAll(nameOf(server, `&tls-psk-file=${at('none.psk')}`))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_NOT_FOUND',
    });
  });

  it('and a job that waits for it ends as soon as it is cancelled', async () => {
    server = nbdkit([
      ...['-r', '--tls=require', `--tls-certificates=${at('pki')}`],
      ...['--filter=delay', 'file', at('disk'), 'rdelay=1000'],
    ]);
    const disk = await engine.openDisk(nameOf(server, `&tls-certificates=${at('pki')}`), {
      format: 'raw',
      readOnly: true,
    });
    const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full', force: true });
    const outcome = job.result();
    job.cancel();
    await expect(outcome).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    server.kill();
    await disk.close();
  });

  it('until it goes away', async () => {
    server = kitX509();
    const disk = await engine.openDisk(nameOf(server, `&tls-certificates=${at('pki')}`), {
      format: 'raw',
      readOnly: true,
    });
    server.kill();
    await expect(disk.read(0, 512)).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_CONNECTION' });
    await disk.close();
  });
});

it('a server that sends plain text behind its leave to start TLS is not believed', async () => {
  const outcome = withFakeServer(
    async (peer) => {
      peer.write(GREETING);
      await peer.read(4);
      const { option } = await peer.option();
      peer.write(optionReply(option, ACK), optionReply(8, ACK), optionReply(10, ACK), optionReply(7, ACK));
    },
    (uri) => engine.openDisk(uri.replace('nbd+', 'nbds+'), { format: 'raw', readOnly: true }),
  );
  await expect(outcome).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_REFUSED' });
});

it('a server that never answers the TLS handshake is given up', async () => {
  const outcome = withFakeServer(
    async (peer) => {
      peer.write(GREETING);
      await peer.read(4);
      const { option } = await peer.option();
      peer.write(optionReply(option, ACK));
    },
    (uri) => engine.openDisk(uri.replace('nbd+', 'nbds+'), { format: 'raw', readOnly: true }),
  );
  await expect(outcome).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_CONNECTION' });
});
