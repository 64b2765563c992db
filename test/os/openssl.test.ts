/** Both ends of TLS, in memory: what one wants to send is put in at the other. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, it } from 'vitest';
import { loadOpenSsl, type OpenSsl, TLS_NEEDS_INPUT, type TlsChannel } from '#src/os/openssl.js';
import { loadKoffi } from '#src/os/sockets.js';
import { makeCertificates } from '../support/certificates.js';
import { Random } from '../support/data.js';
import { hasPeer } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-openssl-'));
afterAll(() => rmSync(folder, { recursive: true }));

const SUITES = 'TLS_AES_128_GCM_SHA256';
const CIPHERS = 'ECDHE+AESGCM';
const WRITE_BYTES = 20_000;

/** @returns the bytes that went over */
function pass(tls: OpenSsl, from: TlsChannel, to: TlsChannel): number {
  const memcpy = loadKoffi().load(null).func('void *memcpy(size_t to, size_t from, size_t length)');
  let passed = 0;
  for (;;) {
    const out = tls.output(from);
    if (out.length === 0) return passed;
    const place = tls.input(to);
    const bytes = Math.min(out.length, place.length);
    if (bytes === 0) return passed;
    memcpy(place.address, out.address, bytes);
    tls.putIn(to, bytes);
    tls.tookOut(from, bytes);
    passed += bytes;
  }
}

function read(tls: OpenSsl, channel: TlsChannel, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let done = 0; done < length; ) {
    const got = tls.read(channel, bytes.subarray(done));
    if (got <= 0) throw new Error(`${got} after ${done} of ${length} bytes`);
    done += got;
  }
  return bytes;
}

/** Sends writes to and fro. @returns the bytes that each has taken on the way */
function talk(tls: OpenSsl, writes: number): number[] {
  const pem = (name: string): string => readFileSync(join(folder, 'pki', name), 'utf8');
  const common = { suites: SUITES, ciphers: CIPHERS };
  const certificate = { chain: pem('server-cert.pem'), key: pem('server-key.pem') };
  const contexts = [
    tls.createContext({ endpoint: 'server', ...common, certificate, authorities: undefined }),
    tls.createContext({
      ...{ endpoint: 'client', ...common, certificate: undefined },
      authorities: pem('ca-cert.pem'),
    }),
  ] as const;
  const server = tls.open(contexts[0]);
  const client = tls.openClient(contexts[1], { name: 'localhost' });
  for (let round = 0; tls.handshake(client) === TLS_NEEDS_INPUT; round++) {
    expect(round).toBeLessThan(10);
    pass(tls, client, server);
    expect(tls.read(server, Buffer.alloc(1))).toBe(TLS_NEEDS_INPUT);
    pass(tls, server, client);
  }
  pass(tls, client, server);
  expect(tls.read(server, Buffer.alloc(1))).toBe(TLS_NEEDS_INPUT);
  const random = new Random(7);
  const sizes = Array.from({ length: writes }, (_, index) => {
    const [from, to] = index % 2 === 0 ? [client, server] : [server, client];
    const data = random.noise(WRITE_BYTES);
    expect(tls.write(from, data)).toBe(data.length);
    const bytes = pass(tls, from, to);
    expect(read(tls, to, data.length).equals(data)).toBe(true);
    return bytes;
  });
  for (const channel of [server, client]) tls.free(channel);
  for (const context of contexts) tls.freeContext(context);
  return sizes;
}

it.skipIf(!hasPeer('openssl'))('changes the key of what is sent after so many bytes, both ways', () => {
  makeCertificates(join(folder, 'pki'));
  const usual = talk(loadOpenSsl(), 40);
  const [first = 0] = usual;
  expect(new Set(usual)).toEqual(new Set([first]));
  // A record with the news goes ahead of the next write of each.
  const more = talk(loadOpenSsl(5 * WRITE_BYTES), 40).filter((bytes) => bytes > first);
  expect(more.length).toBeGreaterThanOrEqual(6);
  expect(more.length).toBeLessThanOrEqual(8);
});
