import { existsSync } from 'node:fs';
import { isIP } from 'node:net';
import { join } from 'node:path';
import { StillframeError } from '../../errors.js';
import {
  PSK_CIPHERS,
  type Psk,
  readAuthorities,
  readCertificate,
  readCredentials,
  readPskFile,
} from '../../nbd/credentials.js';
import {
  type Certificate,
  type OpenSsl,
  requireOpenSsl,
  type TlsChannel,
  TlsError,
  type TlsSettings,
} from '../../os/openssl.js';
import { SocketError } from '../../os/sockets.js';
import { untrustedError } from './errors.js';
import { ConnectionLost, SocketStream, TlsWire } from './stream.js';
import type { NbdTarget, NbdTls } from './uri.js';

/** TLS 1.3, and 1.2; as for Node's own clients. */
const CIPHERS = {
  suites: 'TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256',
  ciphers: 'ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:HIGH:!aNULL:!eNULL:!PSK:!SRP:!CAMELLIA',
};

/** No authority: a certificate is no proof of who has the key. */
const NOBODY = '';

/** With what client and server convince each other. */
interface Credentials {
  readonly settings: TlsSettings;
  readonly psk: Psk | undefined;
}

/**
 * Makes a connection confidential.
 *
 * @param keep takes the channel before it is used; whoever closes the connection frees it
 * @returns what to speak with from then on
 * @throws ConnectionLost, StillframeError ERR_STILLFRAME_NBD_REFUSED where the two do not trust each other,
 *   …_INVALID_ARGUMENT, …_UNSUPPORTED_FEATURE and what reading a file throws
 */
export function startTls(
  path: string,
  target: NbdTarget,
  plain: SocketStream,
  keep: (channel: TlsChannel) => void,
): SocketStream {
  if (target.tls === undefined) throw new Error('invariant: only a target with TLS starts it');
  const { settings, psk } = credentials(path, target.tls);
  const tls = requireOpenSsl();
  const context = withText(path, 'the certificates cannot be used', () => tls.createContext(settings));
  const forget = psk === undefined ? undefined : tls.giveKey(context, psk.identity, psk.key);
  try {
    const channel = openChannel(path, target, tls, context);
    keep(channel);
    const wire = new TlsWire(plain.fd, channel);
    shakeHands(path, plain, wire, channel);
    return new SocketStream(plain.fd, plain.deadlineMs, wire);
  } finally {
    forget?.();
    tls.freeContext(context);
  }
}

function openChannel(path: string, target: NbdTarget, tls: OpenSsl, context: number): TlsChannel {
  const { address } = target;
  const name = target.tls?.hostname ?? (address.type === 'tcp' ? address.host : 'localhost');
  return withText(path, `'${name}' is no name for a host`, () =>
    tls.openClient(context, isIP(name) === 0 ? { name } : { ip: name }),
  );
}

function shakeHands(path: string, { deadlineMs }: SocketStream, wire: TlsWire, channel: TlsChannel): void {
  const late = 'the server takes too long for the TLS handshake';
  try {
    for (;;) {
      const came = wire.handshake();
      if (came === 0) throw untrustedError(path, 'it has closed the connection');
      if (came !== undefined) return;
      if (performance.now() > deadlineMs) throw new ConnectionLost(late);
    }
  } catch (error) {
    if (error instanceof TlsError) {
      const why = requireOpenSsl().distrust(channel);
      throw untrustedError(
        path,
        why === undefined ? error.message : `its certificate is not trusted: ${why}`,
      );
    }
    if (!(error instanceof SocketError)) throw error;
    throw new ConnectionLost(error.code === 'EAGAIN' ? late : error.message, { cause: error });
  }
}

function withText<T>(path: string, what: string, body: () => T): T {
  try {
    return body();
  } catch (error) {
    if (!(error instanceof TlsError)) throw error;
    throw new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `'${path}': ${what}: ${error.message}`);
  }
}

function credentials(path: string, tls: NbdTls): Credentials {
  const { certificates: folder, pskFile, verifyPeer } = tls;
  if (pskFile !== undefined) {
    const psk = findPsk(path, pskFile, tls.username);
    return {
      psk,
      settings: { endpoint: 'client', ...PSK_CIPHERS, certificate: undefined, authorities: NOBODY },
    };
  }
  const own = folder !== undefined && existsSync(join(folder, 'client-cert.pem'));
  const certificate = own ? clientCertificate(path, folder, tls.passphrase) : undefined;
  const authorities = (): string => (folder === undefined ? knownAuthorities() : readAuthorities(folder));
  return {
    psk: undefined,
    settings: {
      endpoint: 'client',
      ...CIPHERS,
      certificate,
      authorities: verifyPeer ? authorities() : undefined,
    },
  };
}

/** Where systems keep the authorities that their users trust, all in one file. */
const SYSTEM_AUTHORITIES = [
  '/etc/ssl/certs/ca-certificates.crt',
  '/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem',
  '/etc/pki/tls/certs/ca-bundle.crt',
  '/etc/ssl/ca-bundle.pem',
  '/etc/ssl/cert.pem',
];

/**
 * PEM: those that the system trusts, as other NBD programs have it, or where it has none those that Node brings. Which file it is
 * `SSL_CERT_FILE` can say, as to OpenSSL; `NODE_EXTRA_CA_CERTS` adds more, as to Node.
 */
function knownAuthorities(): string {
  const { SSL_CERT_FILE: chosen = '', NODE_EXTRA_CA_CERTS: more = '' } = process.env;
  const file = chosen === '' ? SYSTEM_AUTHORITIES.find((path) => existsSync(path)) : chosen;
  // Node's module is large, and hardly anybody needs it here.
  const known =
    file === undefined
      ? process.getBuiltinModule('node:tls').rootCertificates.join('\n')
      : readCredentials(file);
  return more === '' ? known : `${known}\n${readCredentials(more)}`;
}

function clientCertificate(path: string, folder: string, passphrase: string | undefined): Certificate {
  try {
    return readCertificate(folder, 'client', passphrase);
  } catch (error) {
    if (error instanceof StillframeError) throw error;
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `'${path}': '${join(folder, 'client-key.pem')}' is encrypted, and not with what was given: ${error instanceof Error ? error.message : String(error)}`,
    );
  }
}

/** @param username undefined: whose key it is where there is only one */
function findPsk(path: string, file: string, username: string | undefined): Psk {
  const entries = readPskFile(file);
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
