import { createPrivateKey, type KeyObject, X509Certificate } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { toStillframeError } from '../errors.js';
import { parsePskFile } from '../nbd/credentials.js';
import { QmpError, strerror } from '../qmp/errors.js';
import type { JsonObject } from '../qmp/types.js';

/** Whose key of a file a client has, where nobody says. */
export const DEFAULT_USERNAME = 'qemu';

/** File with the keys of credentials that are keys. */
export function keysFile(dir: unknown): string {
  return join(String(dir), 'keys.psk');
}

/**
 * Looks at the files of credentials when they are named, as QEMU does, so that a mistake is known before a server or a
 * node relies on them.
 *
 * @param passphrase what the key is encrypted with
 * @throws QmpError
 */
export function checkCredentials(type: string, options: JsonObject, passphrase: string | undefined): void {
  const { dir, endpoint = 'client' } = options;
  if (typeof dir !== 'string') throw new QmpError("Missing 'dir' property value");
  const isServer = endpoint === 'server';
  if (type === 'tls-creds-psk') checkKeys(keysFile(dir), isServer, options['username']);
  else checkCertificates(dir, isServer, options['sanity-check'] !== false, passphrase);
}

function checkKeys(file: string, isServer: boolean, username: unknown): void {
  if (isServer && username !== undefined)
    throw new QmpError('username should not be set when endpoint=server');
  const text = read(file, true) ?? '';
  const name = username ?? DEFAULT_USERNAME;
  if (isServer || parsePskFile(text).some(({ identity }) => identity === name)) return;
  throw new QmpError(`Username ${String(name)} not found in PSK file ${file}`);
}

function checkCertificates(
  dir: string,
  isServer: boolean,
  isSane: boolean,
  passphrase: string | undefined,
): void {
  const who = isServer ? 'server' : 'client';
  const at = (name: string): string => join(dir, name);
  const [caFile, certFile, keyFile] = [
    at('ca-cert.pem'),
    at(`${who}-cert.pem`),
    at(`${who}-key.pem`),
  ] as const;
  const ca = read(caFile, true) ?? '';
  const cert = read(certFile, isServer);
  const key = read(keyFile, isServer);
  const authorities = isSane ? certificates(ca) : [];
  if (authorities === undefined) throw new QmpError(`Unable to import CA certificate list ${caFile}`);
  const chain = cert === undefined ? [] : certificates(cert);
  const pair = `Cannot load certificate '${certFile}' & key '${keyFile}'`;
  if (chain === undefined) {
    throw new QmpError(
      isSane
        ? `Unable to import ${who} certificate ${certFile}: Base64 unexpected header error.`
        : `${pair}: Base64 decoding error.`,
    );
  }
  const [own] = chain;
  if (isSane) {
    for (const one of authorities) checkTime(one, `CA certificate ${caFile}`);
    if (own !== undefined) {
      checkTime(own, `${who} certificate ${certFile}`);
      if (!isIssued(own, chain, authorities)) {
        throw new QmpError(
          `Our own certificate ${certFile} failed validation against ${caFile}: The certificate hasn't got a known issuer`,
        );
      }
    }
  }
  if (own === undefined || key === undefined) return;
  if (own.checkPrivateKey(privateKey(key, passphrase, pair))) return;
  throw new QmpError(`${pair}: The certificate and the given key do not match.`);
}

function privateKey(key: string, passphrase: string | undefined, pair: string): KeyObject {
  try {
    return createPrivateKey({ key, passphrase });
  } catch {
    throw new QmpError(
      `${pair}: ${key.includes('ENCRYPTED') ? 'Decryption has failed.' : 'Base64 decoding error.'}`,
    );
  }
}

function checkTime(one: X509Certificate, what: string): void {
  const now = Date.now();
  if (Date.parse(one.validTo) < now) throw new QmpError(`The ${what} has expired`);
  if (Date.parse(one.validFrom) > now) throw new QmpError(`The ${what} is not yet active`);
}

/** Whether an authority has issued it, if only by way of others that come with it. */
function isIssued(
  own: X509Certificate,
  chain: readonly X509Certificate[],
  authorities: readonly X509Certificate[],
): boolean {
  const issues = (one: X509Certificate, subject: X509Certificate): boolean =>
    subject.checkIssued(one) && subject.verify(one.publicKey);
  let subject: X509Certificate | undefined = own;
  for (let step = 0; subject !== undefined && step < chain.length; step++) {
    const of: X509Certificate = subject;
    if (authorities.some((one) => issues(one, of))) return true;
    subject = chain.find((one) => one !== of && issues(one, of));
  }
  return false;
}

const PEM = /-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----/gs;

/** Undefined where there is none, or a damaged one. */
function certificates(text: string): readonly X509Certificate[] | undefined {
  try {
    const found = [...text.matchAll(PEM)].map(([pem]) => new X509Certificate(pem));
    return found.length === 0 ? undefined : found;
  } catch {
    return undefined;
  }
}

/** Undefined where there is no such file, and there need not be. */
function read(file: string, isNeeded: boolean): string | undefined {
  try {
    return readFileSync(file, 'utf8');
  } catch (error) {
    const known = toStillframeError(error);
    if (!isNeeded && known.errno === 'ENOENT') return undefined;
    throw new QmpError(`Unable to access credentials ${file}: ${strerror(known) ?? known.message}`);
  }
}
