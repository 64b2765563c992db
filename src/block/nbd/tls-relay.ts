import { Socket } from 'node:net';
import { type ConnectionOptions, checkServerIdentity, connect } from 'node:tls';
import { workerData } from 'node:worker_threads';
import { forward, PlainSide } from './forward.js';
import { PSK_CIPHERS, PSK_SUITES } from './psk.js';
import {
  FAILED,
  type RelayData,
  type RelayTls,
  SECURE,
  serverName,
  TEXT_AT,
  TEXT_BYTES,
  WAITING,
} from './tls.js';

function optionsOf({ hostname, verifyPeer, ca, cert, key, psk }: RelayTls): ConnectionOptions {
  const common: ConnectionOptions = { minVersion: 'TLSv1.2', servername: serverName(hostname) };
  if (psk !== undefined) {
    return {
      ...common,
      ciphers: `${PSK_SUITES}:${PSK_CIPHERS}`,
      // No certificate is any good: whoever does not know the key is not let in by one.
      ca: [],
      pskCallback: () => ({ identity: psk.identity, psk: psk.key }),
      checkServerIdentity: () => undefined,
    };
  }
  return {
    ...common,
    ...(ca === undefined ? {} : { ca }),
    ...(cert === undefined || key === undefined ? {} : { cert, key }),
    rejectUnauthorized: verifyPeer,
    checkServerIdentity: (_, certificate) => checkServerIdentity(hostname, certificate),
  };
}

/** How long the second direction may go on once the first has ended, in milliseconds. */
const LEAVE_MS = 5000;

/** Speaks TLS with the server and plain text with the thread that has the other end of the pair. */
function relay({ remote, local, tls, outcome }: RelayData): void {
  const ours = new PlainSide(local);
  const plain = ours.socket;
  const socket = new Socket({ fd: remote, readable: true, writable: true });
  const secure = connect({ ...optionsOf(tls), socket });
  const state = new Int32Array(outcome, 0, 2);
  const settle = (to: typeof SECURE | typeof FAILED, text: string): void => {
    if (state[0] !== WAITING) return;
    const bytes = new TextEncoder().encode(text).subarray(0, TEXT_BYTES);
    new Uint8Array(outcome, TEXT_AT).set(bytes);
    state[1] = bytes.length;
    Atomics.store(state, 0, to);
    Atomics.notify(state, 0);
  };
  const end = (error?: Error): void => {
    settle(FAILED, error?.message ?? 'the connection was closed during the handshake');
    secure.destroy();
    socket.destroy();
    plain.destroy();
  };
  for (const side of [plain, socket, secure]) {
    side.on('error', end);
    side.on('close', () => end());
    // The other direction may take a moment more, but nobody waits for a server that never ends it.
    side.on('end', () => setTimeout(end, LEAVE_MS));
  }
  secure.once('secureConnect', () => {
    if (tls.psk !== undefined && Object.keys(secure.getPeerCertificate()).length > 0) {
      end(new Error('the server has a certificate instead of the key'));
      return;
    }
    settle(SECURE, '');
    ours.forwardTo(secure);
    forward(secure, plain);
  });
}

const data: RelayData = workerData;
relay(data);
