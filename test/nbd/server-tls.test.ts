import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type NbdServer, type TlsOptions } from '#src/index.js';
import { makeCertificates } from '../support/certificates.js';
import { stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { u32 } from '../support/fake-nbd.js';
import { RawClient, tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-serve-tls-'));
const at = (name: string): string => join(folder, name);
const socket = at('socket');
const content = new Random(4).bytes(8 << 20);
const KEY = '0123456789abcdef0123456789abcdef';
const uri = (parameters: string, user = ''): string =>
  `nbds+unix://${user}/?socket=${socket}&tls-hostname=localhost${parameters}`;

let engine: Engine;
let disk: Disk;
let server: NbdServer | undefined;

beforeAll(async () => {
  if (hasPeer('openssl')) makeCertificates(at('pki'));
  mkdirSync(at('psk'));
  writeFileSync(at('psk/keys.psk'), `alice:${KEY}\nbob:${KEY.replaceAll('0', '1')}\n`);
  writeFileSync(at('wrong.psk'), `alice:${KEY.replaceAll('0', '2')}\n`);
  writeFileSync(at('disk'), content);
  engine = await createEngine({ workers: 1 });
  disk = await engine.openDisk(at('disk'), { format: 'raw' });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
afterEach(() => server?.close());

async function serve(tls: TlsOptions): Promise<void> {
  server = await engine.serveNbd({
    listen: `unix:${socket}`,
    exports: [{ disk }],
    handshakeTimeoutMs: 2000,
    tls,
  });
}

const psk = (): TlsOptions => ({ pskFile: at('psk/keys.psk') });
const x509 = (verifyPeer = false): TlsOptions => ({ certificates: at('pki'), verifyPeer });
const PSK = `&tls-psk-file=${at('psk/keys.psk')}`;
const X509 = `&tls-certificates=${at('pki')}`;
const expectContent = (path: string): void => expect(firstDifference(readFileSync(path), content)).toBe(-1);

describe.skipIf(!hasPeer('openssl') || !hasPeer('nbdcopy'))('TLS', () => {
  it.each<[name: string, tls: () => TlsOptions, uri: () => string]>([
    ['keys', psk, () => uri(PSK, 'alice@')],
    ['certificates', x509, () => uri(X509)],
    ["certificates, the client's as well", () => x509(true), () => uri(X509)],
  ])('serves nbdcopy, nbdinfo, qemu-img, qemu-io and our client with %s', async (_, tls, name) => {
    await serve(tls());
    expect(server?.uris[0]).toMatch(/^nbds\+unix:/);
    rmSync(at('copy'), { force: true });
    await tool('nbdcopy', name(), at('copy'));
    expectContent(at('copy'));
    await tool('nbdcopy', '--flush', at('copy'), name());
    expectContent(at('disk'));
    const remote = await engine.openDisk(name(), { format: 'raw', readOnly: true });
    try {
      expect(firstDifference(await remote.read(0, content.length), content)).toBe(-1);
    } finally {
      await remote.close();
    }
    const secret = name().includes('psk')
      ? `tls-creds-psk,id=tls,endpoint=client,dir=${at('psk')},username=alice`
      : `tls-creds-x509,id=tls,endpoint=client,dir=${at('pki')}`;
    const options = `driver=nbd,server.type=unix,server.path=${socket},tls-creds=tls,tls-hostname=localhost`;
    await tool(
      ...([
        'qemu-img',
        'convert',
        '--object',
        secret,
        '--image-opts',
        options,
        '-O',
        'raw',
        at('converted'),
      ] as const),
    );
    expectContent(at('converted'));
    expect((await tool('nbdinfo', '--size', name())).trim()).toBe(String(content.length));
    const read = await tool('qemu-io', '--object', secret, '--image-opts', options, '-c', 'read -v 0 16');
    expect(read).toContain(
      [...content.subarray(0, 4)].map((byte) => byte.toString(16).padStart(2, '0')).join(' '),
    );
  });

  it.skipIf(!hasPeer('fio'))('serves fio, which finds what it has written', async () => {
    writeFileSync(at('scratch'), Buffer.alloc(content.length));
    const scratch = await engine.openDisk(at('scratch'), { format: 'raw' });
    try {
      const exports = [{ disk: scratch }];
      server = await engine.serveNbd({ listen: `unix:${socket}`, exports, tls: x509() });
      // It lets a URI name no file: no key, and nothing that the server's certificate could be held against.
      await tool(
        ...(['fio', '--name=verify', '--ioengine=nbd'] as const),
        `--uri=nbds+unix:///?socket=${socket}&tls-verify-peer=false`,
        ...['--rw=randrw', '--bsrange=512-64k', '--bs_unaligned', '--iodepth=32', `--size=${content.length}`],
        ...['--verify=crc32c', '--verify_fatal=1', '--verify_state_save=0', '--randseed=7', '--minimal'],
      );
    } finally {
      await server?.close();
      await scratch.close();
    }
    expect(readFileSync(at('scratch')).every((byte) => byte === 0)).toBe(false);
  });

  it('speaks of nothing in plain text', async () => {
    await serve(psk());
    const client = new RawClient(socket);
    await client.greet();
    expect((await client.option(3)).map(({ type }) => type)).toEqual([0x80000005]);
    expect((await client.option(8)).map(({ type }) => type)).toEqual([0x80000005]);
    client.destroy();
    await expect(tool('nbdinfo', `nbd+unix:///?socket=${socket}`)).rejects.toThrow();
  });

  it('puts out who says anything in plain text behind the question for TLS', async () => {
    await serve(psk());
    const client = new RawClient(socket);
    await client.greet();
    const structured = Buffer.concat([Buffer.from('IHAVEOPT'), u32(8), u32(0)]);
    client.send(Buffer.from('IHAVEOPT'), u32(5), u32(0), structured, structured);
    expect((await client.peer.read(20)).readUInt32BE(12)).toBe(1);
    await client.closed();
    client.destroy();
    await tool('nbdinfo', '--size', uri(PSK, 'alice@'));
  });

  it.each<[name: string, tls: () => TlsOptions, uri: () => string]>([
    ['another key', psk, () => uri(`&tls-psk-file=${at('wrong.psk')}`, 'alice@')],
    ['an unknown name', psk, () => uri(PSK, 'carol@')],
    ['no certificate where one is wanted', () => x509(true), () => uri('&tls-verify-peer=0')],
  ])('refuses %s', async (_, tls, name) => {
    await serve(tls());
    await expect(tool('nbdinfo', '--size', name())).rejects.toThrow();
  });

  it('puts out who never starts with it', async () => {
    await serve(psk());
    const client = new RawClient(socket);
    await client.greet();
    client.send(Buffer.from('IHAVEOPT'), u32(5), u32(0));
    await client.closed();
    client.destroy();
  });

  it('is looked at before anything is served', () => {
    const command = ['serve', at('disk'), '-r', '-U', '--nbd', `unix:${at('other')}`];
    writeFileSync(at('empty'), '# nothing\n');
    expect(stillframe([...command, '--tls-psk', at('empty')]).stderr).toContain('has no key');
    expect(stillframe([...command, '--tls-certificates', at('psk')]).stderr).toContain('server-cert.pem');
    mkdirSync(at('mixed'));
    run('cp', [at('pki/server-cert.pem'), at('mixed')]);
    run('cp', [at('pki/client-key.pem'), at('mixed/server-key.pem')]);
    expect(stillframe([...command, '--tls-certificates', at('mixed')]).stderr).toContain('belong together');
    expect(stillframe([...command, '--tls-verify-peer']).stderr).toContain('needs --tls-certificates');
  });
});
