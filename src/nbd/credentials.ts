import { createPrivateKey } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { systemError } from '../errors.js';
import type { Certificate } from '../os/openssl.js';

/** The fastest cipher of TLS 1.3 (of those with the hash that keys are for), and of TLS 1.2. */
export const PSK_CIPHERS = {
  suites: 'TLS_AES_128_GCM_SHA256',
  ciphers: 'DHE-PSK-AES128-GCM-SHA256:PSK-AES128-GCM-SHA256:PSK',
};

/** A key that both sides know, and whose it is. */
export interface Psk {
  readonly identity: string;
  readonly key: Uint8Array;
}

/** The keys of a file with lines `user:hexadecimal key`; what is no such line is passed over. */
export function parsePskFile(text: string): Psk[] {
  return text.split('\n').flatMap((line) => {
    const [, identity, key] = /^([^#:][^:]*):([0-9a-f]{2,})\s*$/i.exec(line) ?? [];
    return identity === undefined || key === undefined ? [] : [{ identity, key: Buffer.from(key, 'hex') }];
  });
}

/**
 * What a file of credentials says.
 *
 * @throws StillframeError …_NOT_FOUND, …_PERMISSION and others of the file system
 */
export function readCredentials(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    throw systemError(`cannot read '${path}'`, error);
  }
}

/** The keys of a file: {@link parsePskFile}. @throws what {@link readCredentials} throws */
export function readPskFile(path: string): Psk[] {
  return parsePskFile(readCredentials(path));
}

/**
 * Reads `server-cert.pem` and `server-key.pem`, or those of the client: the names that NBD programs look for.
 *
 * @throws what {@link readCredentials} throws, Error where the key has another passphrase
 */
export function readCertificate(
  folder: string,
  end: 'server' | 'client',
  passphrase: string | undefined,
): Certificate {
  const chain = readCredentials(join(folder, `${end}-cert.pem`));
  const key = readCredentials(join(folder, `${end}-key.pem`));
  if (!key.includes('ENCRYPTED')) return { chain, key };
  const plain = createPrivateKey({ key, passphrase }).export({ type: 'pkcs8', format: 'pem' });
  return { chain, key: plain.toString() };
}

/** Certificates of the authorities that the others need one of. @throws what {@link readCredentials} throws */
export function readAuthorities(folder: string): string {
  return readCredentials(join(folder, 'ca-cert.pem'));
}
