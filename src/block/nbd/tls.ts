import { createPrivateKey } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { isIP } from 'node:net';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { StillframeError, systemError } from '../../errors.js';
import type { Sockets } from '../../os/sockets.js';
import { refusedError } from './errors.js';
import { type Psk, parsePskFile } from './psk.js';
import { ConnectionLost, SocketStream } from './stream.js';
import type { NbdTarget, NbdTls } from './uri.js';

/** How the relay is to convince itself and the server; plain data. */
export interface RelayTls {
  /** Name that the certificate has to have. */
  readonly hostname: string;
  readonly verifyPeer: boolean;
  /** PEM; undefined: the authorities that Node knows. */
  readonly ca: string | undefined;
  readonly cert: string | undefined;
  readonly key: string | undefined;
  /** Undefined: certificates. */
  readonly psk: Psk | undefined;
}

/** What the relay thread gets. */
export interface RelayData {
  /** The connection to the server and our side of it in plain text: both are the relay's own. */
  readonly remote: number;
  readonly local: number;
  readonly tls: RelayTls;
  /** A state word, the length of a text, and the text. */
  readonly outcome: SharedArrayBuffer;
}

/** States of the outcome. */
export const WAITING = 0;
export const SECURE = 1;
export const FAILED = 2;
/** Where the text of the outcome is, and its longest length, in bytes. */
export const TEXT_AT = 8;
export const TEXT_BYTES = 1024;

/**
 * Makes a connection confidential: a thread of its own speaks TLS to the server and plain text with us, over a pair of
 * sockets, so that all else stays the same blocking code.
 *
 * @returns our end of the pair
 * @throws ConnectionLost, StillframeError ERR_STILLFRAME_NBD_REFUSED where the two do not trust each other,
 *   …_INVALID_ARGUMENT and what reading a file throws
 */
export function startTls(
  path: string,
  target: NbdTarget,
  plain: SocketStream,
  sockets: Sockets,
): SocketStream {
  if (target.tls === undefined) throw new Error('invariant: only a target with TLS starts it');
  const tls = relayTls(path, target, target.tls);
  const outcome = new SharedArrayBuffer(TEXT_AT + TEXT_BYTES);
  const state = new Int32Array(outcome, 0, 2);
  const [ours, theirs] = sockets.pair();
  const data: RelayData = { remote: sockets.duplicate(plain.fd), local: theirs, tls, outcome };
  const relay = new Worker(new URL('./tls-relay.js', import.meta.url), { workerData: data });
  // It ends by itself when either side does.
  relay.unref();
  relay.on('error', () => undefined);
  Atomics.wait(state, 0, WAITING, Math.max(0, plain.deadlineMs - performance.now()));
  // Before the connection ends: the relay would take that for a failure of the handshake.
  const came = Atomics.load(state, 0);
  if (came === SECURE) return new SocketStream(ours, plain.deadlineMs);
  sockets.shutdown(plain.fd);
  sockets.close(ours);
  if (came === WAITING) throw new ConnectionLost('the server takes too long for the TLS handshake');
  const text = new TextDecoder().decode(new Uint8Array(outcome, TEXT_AT, state[1]).slice());
  throw refusedError(path, `no TLS with the server: ${text}`);
}

function relayTls(path: string, { address }: NbdTarget, tls: NbdTls): RelayTls {
  const { verifyPeer } = tls;
  const hostname = tls.hostname ?? (address.type === 'tcp' ? address.host : 'localhost');
  const common = { hostname, verifyPeer, ca: undefined, cert: undefined, key: undefined, psk: undefined };
  if (tls.pskFile !== undefined) return { ...common, psk: findPsk(path, tls.pskFile, tls.username) };
  const folder = tls.certificates;
  if (folder === undefined) return common;
  const own = existsSync(join(folder, 'client-cert.pem'));
  return {
    ...common,
    ca: readText(join(folder, 'ca-cert.pem')),
    cert: own ? readText(join(folder, 'client-cert.pem')) : undefined,
    key: own ? clientKey(path, join(folder, 'client-key.pem'), tls.passphrase) : undefined,
  };
}

function clientKey(path: string, file: string, passphrase: string | undefined): string {
  const key = readText(file);
  try {
    return decryptKey(key, passphrase);
  } catch (error) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${path}': '${file}' is encrypted, and not with what was given: ${error instanceof Error ? error.message : String(error)}`,
    );
  }
}

/** A private key without a passphrase. @param key PEM @throws Error where it has another one */
export function decryptKey(key: string, passphrase: string | undefined): string {
  if (!key.includes('ENCRYPTED')) return key;
  return createPrivateKey({ key, passphrase }).export({ type: 'pkcs8', format: 'pem' }).toString();
}

function readText(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    throw systemError(`cannot read '${path}'`, error);
  }
}

/** @param username undefined: whose key it is where there is only one */
function findPsk(path: string, file: string, username: string | undefined): RelayTls['psk'] {
  const entries = parsePskFile(readText(file));
  const found =
    username === undefined && entries.length === 1
      ? entries[0]
      : entries.find(({ identity }) => identity === username);
  if (found !== undefined) return found;
  throw new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `'${path}': ${username === undefined ? `'${file}' has ${entries.length} keys; say whose to use: nbds://USER@HOST/` : `'${file}' has no key of '${username}'`}`,
  );
}

/** Name for the server to choose its certificate by: addresses have none. */
export function serverName(hostname: string): string {
  return isIP(hostname) === 0 ? hostname : '';
}
