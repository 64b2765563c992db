import { Socket } from 'node:net';
import { createServer, type TLSSocket, type TlsOptions } from 'node:tls';
import { parentPort, workerData } from 'node:worker_threads';
import { forward, PlainSide } from '../../block/nbd/forward.js';
import { PSK_CIPHERS } from '../../block/nbd/psk.js';
import type { RelayData, RelayMessage } from './threads.js';

/** How long the second direction of a connection may go on once the first has ended, in milliseconds. */
const LEAVE_MS = 2000;

const { secrets, port }: RelayData = workerData;
const options = optionsOf();
const connections = new Set<() => void>();

function optionsOf(): TlsOptions {
  if ('keys' in secrets) {
    const keys = new Map(secrets.keys.map(({ identity, key }) => [identity, key]));
    return {
      minVersion: 'TLSv1.2',
      ciphers: PSK_CIPHERS,
      honorCipherOrder: true,
      // Without it the keys of old connections could be found from the shared one, with TLS 1.2.
      dhparam: 'auto',
      pskCallback: (_, identity) => {
        const key = keys.get(identity);
        return key === undefined ? null : Buffer.from(key);
      },
    };
  }
  const { cert, key, ca } = secrets;
  return {
    minVersion: 'TLSv1.2',
    ciphers: `TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:ECDHE+AESGCM:ECDHE+CHACHA20`,
    honorCipherOrder: true,
    cert,
    key,
    ...(ca === undefined ? {} : { ca, requestCert: true, rejectUnauthorized: true }),
  };
}

/** Speaks TLS with a client and plain text with the threads that serve it. */
function relay(remote: number, local: number): void {
  const ours = new PlainSide(local);
  const plain = ours.socket;
  const raw = new Socket({ fd: remote, readable: true, writable: true });
  // It never listens: it has this one connection.
  const server = createServer(options);
  let secure: TLSSocket | undefined;
  const end = (): void => {
    connections.delete(end);
    secure?.destroy();
    raw.destroy();
    plain.destroy();
  };
  const watch = (side: Socket): void => {
    side.on('error', end);
    side.on('close', end);
    side.on('end', () => setTimeout(end, LEAVE_MS).unref());
  };
  connections.add(end);
  watch(plain);
  watch(raw);
  server.on('tlsClientError', end);
  server.on('secureConnection', (made) => {
    secure = made;
    watch(made);
    ours.forwardTo(made);
    forward(made, plain);
  });
  server.emit('connection', raw);
}

port.on('message', ({ remote, local }: RelayMessage) => relay(remote, local));
parentPort?.on('message', () => {
  port.close();
  parentPort?.close();
  setTimeout(() => {
    for (const end of connections) end();
  }, LEAVE_MS).unref();
});
