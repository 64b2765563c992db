/** Clients within TLS, with good manners and without: records in any pieces, broken ones, missing ones. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Duplex } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import type { ConnectionOptions } from 'node:tls';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type NbdServer, type TlsOptions } from '#src/index.js';
import { makeCertificates, makeIntermediate } from '../support/certificates.js';
import { Random } from '../support/data.js';
import { u16, u32, u64 } from '../support/fake-nbd.js';
import { counted, RawClient, tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';
import { beforeTls, byKey, speakTls, Tampering } from '../support/tls-client.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-tls-clients-'));
const at = (name: string): string => join(folder, name);
const socket = at('socket');
const LENGTH = 8 << 20;
const content = new Random(5).bytes(LENGTH);
const KEY = '0123456789abcdef'.repeat(2);
const GO = Buffer.concat([Buffer.from('IHAVEOPT'), u32(7), u32(6), counted(''), u16(0)]);

const read = (cookie: number, offset: number, length: number): Buffer =>
  Buffer.concat([u32(0x25609513), u16(0), u16(0), u64(cookie), u64(offset), u32(length)]);

let engine: Engine;
let disk: Disk;
let server: NbdServer | undefined;
const clients: RawClient[] = [];

beforeAll(async () => {
  if (hasPeer('openssl')) for (const name of ['pki', 'other']) makeCertificates(at(name));
  writeFileSync(at('keys'), `alice:${KEY}\n`);
  writeFileSync(at('disk'), content);
  engine = await createEngine({ workers: 1 });
  disk = await engine.openDisk(at('disk'), { format: 'raw' });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
afterEach(async () => {
  for (const client of clients.splice(0)) client.destroy();
  await server?.close();
  server = undefined;
});

async function serve(tls: TlsOptions = { pskFile: at('keys') }): Promise<NbdServer> {
  server = await engine.serveNbd({ listen: `unix:${socket}`, exports: [{ disk }], tls });
  return server;
}

const until = async (condition: () => boolean): Promise<void> => {
  while (!condition()) await sleep(2);
};

/** Bytes of the drive are those that they should be. */
const same = (data: Buffer, offset: number): boolean =>
  data.equals(content.subarray(offset, offset + data.length));

/** One who has begun with TLS, and chosen nothing yet. */
async function secure(
  options: ConnectionOptions = {},
  tamper?: ConstructorParameters<typeof Tampering>[1],
): Promise<RawClient> {
  const plain = await beforeTls(socket);
  const wire = tamper === undefined ? plain : new Tampering(plain, tamper);
  const client = new RawClient(await speakTls(wire, { ...byKey('alice', KEY), ...options }));
  clients.push(client);
  return client;
}

async function choose(client: RawClient): Promise<RawClient> {
  const answers = await client.option(7, counted(''), u16(0));
  expect(answers.at(-1)?.type).toBe(1);
  return client;
}

/** Somebody with good manners is served. */
async function expectService(): Promise<void> {
  const good = await choose(await secure());
  good.request(0, 1, 4096, 512);
  expect(same((await good.answer(512)).data, 4096)).toBe(true);
  good.request(2, 2, 0, 0);
  await good.closed();
}

const versions = ['TLSv1.2', 'TLSv1.3'] as const;

describe.each(versions)('%s', (version) => {
  const only: ConnectionOptions = { minVersion: version, maxVersion: version };

  it('answers requests that came in one record with the choice of the export', async () => {
    await serve();
    const client = await secure(only);
    client.send(Buffer.concat([GO, read(1, 0, 512), read(2, 1 << 20, 512)]));
    for (;;) {
      const header = await client.peer.read(20);
      await client.peer.read(header.readUInt32BE(16));
      if (header.readUInt32BE(12) === 1) break;
    }
    expect(same((await client.answer(512)).data, 0)).toBe(true);
    expect(same((await client.answer(512)).data, 1 << 20)).toBe(true);
  });

  it('takes records in any pieces, with pauses in the middle', async () => {
    await serve();
    const random = new Random(6);
    const client = await choose(
      await secure(only, async (bytes, wire) => {
        for (let done = 0; done < bytes.length; ) {
          const part = bytes.subarray(done, done + random.pick([1, 5, 100, 16_000]));
          wire.write(part);
          done += part.length;
          // Longer than a thread waits for the rest, at times.
          await sleep(random.chance(0.05) ? 120 : 0);
        }
      }),
    );
    for (let round = 0; round < 5; round++) {
      const offset = random.between(0, LENGTH - 70_000);
      client.request(1, 1, offset, 70_000, 0, content.subarray(offset, offset + 70_000));
      expect((await client.answer()).error).toBe(0);
      client.request(0, 2, offset, 70_000);
      expect(same((await client.answer(70_000)).data, offset)).toBe(true);
    }
  });

  it.each(['request', 'record'] as const)(
    'carries nothing out of a write that ends within a %s',
    async (what) => {
      await serve();
      let left = Number.POSITIVE_INFINITY;
      const client = await choose(
        await secure(only, async (bytes, wire) => {
          const part = bytes.subarray(0, left);
          left -= part.length;
          if (part.length > 0) wire.write(part);
          if (left === 0) wire.end();
        }),
      );
      left = what === 'record' ? 50_000 : Number.POSITIVE_INFINITY;
      const data = Buffer.alloc(1 << 20, 1);
      client.request(1, 1, 0, 1 << 20, 0, what === 'record' ? data : data.subarray(0, 200_000));
      if (what === 'request') client.end();
      await client.closed();
      await until(() => server?.connections === 0);
      expect(same(Buffer.from(await disk.read(0, 1 << 20)), 0)).toBe(true);
      await expectService();
    },
  );

  it('lets go of one who goes away without saying so, in between two records', async () => {
    await serve();
    const plain = await beforeTls(socket);
    const client = new RawClient(await speakTls(plain, { ...byKey('alice', KEY), ...only }));
    await choose(client);
    plain.destroy();
    await until(() => server?.connections === 0);
    await expectService();
  });

  it('lets go of one who reads none of its answers once that one is gone, and others do not wait for it', async () => {
    await serve();
    const deaf = await choose(await secure(only));
    deaf.pause();
    for (let index = 0; index < 100; index++) deaf.request(0, index, 0, 1 << 20);
    await expectService();
    deaf.destroy();
    await until(() => server?.connections === 0);
  });

  it('lets several threads answer one who asks for many things that take long', async () => {
    const running = await serve();
    const client = await choose(await secure(only));
    const random = new Random(8);
    const asked = Array.from({ length: 300 }, (_, cookie) => {
      const length = random.pick([512, 20_000, 70_000]);
      const command = random.pick([0, 1, 1, 3] as const);
      return { cookie, command, length, offset: random.between(0, LENGTH - length) };
    });
    for (const { cookie, command, offset, length } of asked) {
      if (command === 3) client.request(3, cookie, 0, 0);
      // Every write is to be durable when it is answered.
      else if (command === 1)
        client.request(1, cookie, offset, length, 1, content.subarray(offset, offset + length));
      else client.request(0, cookie, offset, length);
    }
    const left = new Map(asked.map((one) => [BigInt(one.cookie), one]));
    while (left.size > 0) {
      const header = await client.peer.read(16);
      const one = left.get(header.readBigUInt64BE(8));
      expect(header.readUInt32BE(4)).toBe(0);
      if (one?.command === 0) expect(same(await client.peer.read(one.length), one.offset)).toBe(true);
      left.delete(header.readBigUInt64BE(8));
    }
    expect(running.threads).toBeGreaterThan(1);
  });

  it('puts out who sends something else than records', async () => {
    await serve();
    for (const chosen of [false, true]) {
      let spoil = false;
      const client = await secure(only, async (bytes, wire) => {
        wire.write(spoil ? Buffer.alloc(bytes.length, 0x16) : bytes);
      });
      if (chosen) await choose(client);
      spoil = true;
      client.request(0, 1, 0, 512);
      await client.closed();
    }
    await until(() => server?.connections === 0);
    await expectService();
  });
});

it('says that it is done before it closes a connection', async () => {
  await serve();
  const types: number[] = [];
  const plain = await beforeTls(socket);
  const wire = new Tampering(plain, async (bytes, to) => {
    to.write(bytes);
  });
  let rest = Buffer.alloc(0);
  plain.on('data', (data) => {
    rest = Buffer.concat([rest, data]);
    while (rest.length >= 5 && rest.length >= 5 + rest.readUInt16BE(3)) {
      types.push(rest.readUInt8(0));
      rest = rest.subarray(5 + rest.readUInt16BE(3));
    }
  });
  const client = new RawClient(
    await speakTls(wire, { ...byKey('alice', KEY), maxVersion: 'TLSv1.2', minVersion: 'TLSv1.2' }),
  );
  await choose(client);
  client.request(2, 2, 0, 0);
  await client.closed();
  // The last record is an alert, and nothing is left of another.
  expect(types.at(-1)).toBe(21);
  expect(rest).toHaveLength(0);
});

it('does not start the handshake again in the middle of a connection', async () => {
  await serve();
  const plain = await beforeTls(socket);
  const secured = await speakTls(plain, {
    ...byKey('alice', KEY),
    minVersion: 'TLSv1.2',
    maxVersion: 'TLSv1.2',
  });
  const client = await choose(new RawClient(secured));
  clients.push(client);
  const refused = new Promise((resolve) => {
    secured.once('error', resolve);
    secured.renegotiate({}, resolve);
  });
  expect(await refused).toBeInstanceOf(Error);
  await expectService();
});

describe.skipIf(!hasPeer('openssl'))('with certificates', () => {
  const x509 = (name: string, verifyPeer = false): TlsOptions => ({ certificates: at(name), verifyPeer });
  const size = (name: string): Promise<string> =>
    tool(
      'nbdinfo',
      '--size',
      `nbds+unix:///?socket=${socket}&tls-hostname=localhost&tls-certificates=${at(name)}`,
    );

  it.skipIf(!hasPeer('nbdinfo'))(
    'serves those with a certificate of the authority, and nobody else',
    async () => {
      mkdirSync(at('impostor'));
      run('cp', [
        at('pki/ca-cert.pem'),
        at('other/client-cert.pem'),
        at('other/client-key.pem'),
        at('impostor'),
      ]);
      await serve(x509('pki', true));
      await expect(size('impostor')).rejects.toThrow();
      expect((await size('pki')).trim()).toBe(String(LENGTH));
    },
  );

  it.skipIf(!hasPeer('nbdinfo'))('proves who it is with all certificates up to the authority', async () => {
    makeIntermediate(at('pki'), at('chain'));
    await serve(x509('chain'));
    expect((await size('pki')).trim()).toBe(String(LENGTH));
  });

  it('refuses what it cannot use', async () => {
    const broken = async (name: string, change: Readonly<Record<string, string>>, verifyPeer = false) => {
      run('cp', ['-r', at('pki'), at(name)]);
      for (const [file, text] of Object.entries(change)) writeFileSync(join(at(name), file), text);
      await expect(serve(x509(name, verifyPeer))).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_INVALID_ARGUMENT',
        message: expect.stringContaining('has no certificate and key that belong together: '),
      });
    };
    const pem = readFileSync(at('pki/server-key.pem'), 'utf8');
    run('openssl', [
      ...[
        'pkey',
        '-in',
        at('pki/server-key.pem'),
        '-aes128',
        '-passout',
        'pass:secret',
        '-out',
        at('locked'),
      ],
    ]);
    await broken('no-certificate', { 'server-cert.pem': 'nothing' });
    await broken('no-key', { 'server-key.pem': '' });
    await broken('half-a-key', { 'server-key.pem': pem.replace(/^[A-Za-z0-9+/=]+$/m, '') });
    await broken('locked-key', { 'server-key.pem': readFileSync(at('locked'), 'utf8') });
    await broken('no-authority', { 'ca-cert.pem': '-----BEGIN CERTIFICATE-----\nAAAA\n' }, true);
  });

  /** `openssl s_client`, from where TLS begins. It takes letters of its own at the start of what is written at once. */
  async function sClient(
    ...args: readonly string[]
  ): Promise<{ client: RawClient; order: (letter: string, answer: string) => Promise<void> }> {
    const name = at(`proxy-${args.join('')}`);
    const proxy: Server = createServer((from) => {
      beforeTls(socket).then(
        (to) => {
          from.pipe(to).pipe(from);
          from.on('error', () => to.destroy());
          from.on('close', () => to.destroy());
        },
        () => from.destroy(),
      );
    });
    proxy.listen(name);
    await once(proxy, 'listening');
    const child = spawn('openssl', ['s_client', '-unix', name, '-quiet', '-no_ign_eof', ...args], {
      stdio: ['pipe', 'pipe', 'pipe'],
    });
    child.on('close', () => proxy.close());
    const stream = Duplex.from({ readable: child.stdout, writable: child.stdin });
    stream.on('error', () => undefined);
    stream.on('close', () => child.kill());
    const client = new RawClient(stream);
    clients.push(client);
    let said = '';
    child.stderr.on('data', (text) => {
      said += String(text);
    });
    const order = async (letter: string, answer: string): Promise<void> => {
      said = '';
      child.stdin.write(`${letter}\n`);
      await until(() => said.includes(answer));
    };
    return { client, order };
  }

  it.each(['k', 'K'])(
    'goes on when the client changes its key (%s: and asks for another)',
    async (letter) => {
      await serve(x509('pki'));
      const { client, order } = await sClient('-tls1_3');
      await choose(client);
      for (let round = 0; round < 5; round++) {
        await order(letter, 'KEYUPDATE');
        const offset = round * 100_000;
        client.request(0, round, offset, 100_000);
        expect(same((await client.answer(100_000)).data, offset)).toBe(true);
      }
    },
  );

  it('is not made to start the handshake again by openssl', async () => {
    await serve(x509('pki'));
    const { client, order } = await sClient('-tls1_2');
    await choose(client);
    await order('R', 'RENEGOTIATING');
    await client.closed();
    await until(() => server?.connections === 0);
    expect((await size('pki')).trim()).toBe(String(LENGTH));
  });

  it.skipIf(!hasPeer('nbdcopy'))('outlives clients that are killed in the middle of everything', async () => {
    const running = await serve(x509('pki'));
    const uri = `nbds+unix:///?socket=${socket}&tls-hostname=localhost&tls-certificates=${at('pki')}`;
    const used = engine.arena.usedBytes;
    const random = new Random(9);
    for (let round = 0; round < 12; round++) {
      const ends = round % 2 === 0 ? [uri, 'null:'] : [at('disk'), uri];
      const child = spawn('nbdcopy', ['-C', '4', ...ends], { stdio: 'ignore' });
      // It may be done by itself before that.
      const closed = once(child, 'close');
      await sleep(random.between(5, 80));
      child.kill('SIGKILL');
      await closed;
    }
    await until(() => running.connections === 0);
    expect(engine.arena.usedBytes - used).toBeLessThan(64 << 20);
    expect(same(Buffer.from(await disk.read(0, LENGTH)), 0)).toBe(true);
    expect((await size('pki')).trim()).toBe(String(LENGTH));
  });
});
