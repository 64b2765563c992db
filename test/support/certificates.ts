import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { run } from './peers.js';

/**
 * Makes a folder of certificates by the names that NBD programs look for: an authority's, a server's for `localhost`
 * and a client's.
 *
 * @param names for whom else the server's is, in OpenSSL's notation
 */
export function makeCertificates(folder: string, ...names: readonly string[]): string {
  mkdirSync(folder);
  const at = (name: string): string => join(folder, name);
  const key = (name: string) => [
    ...['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'],
    '-keyout',
    at(name),
  ];
  const ca = ['-x509', '-subj', '/CN=Authority', '-days', '2', '-out', at('ca-cert.pem')];
  run('openssl', ['req', ...key('ca-key.pem'), ...ca, '-addext', 'keyUsage=keyCertSign']);
  for (const [name, usage] of [
    ['server', 'serverAuth'],
    ['client', 'clientAuth'],
  ] as const) {
    const request = at(`${name}.csr`);
    run('openssl', ['req', ...key(`${name}-key.pem`), '-subj', '/CN=localhost', '-out', request]);
    writeFileSync(
      at('extensions'),
      `subjectAltName=${['DNS:localhost', ...names].join()}\nextendedKeyUsage=${usage}\nkeyUsage=digitalSignature\n`,
    );
    run('openssl', [
      ...['x509', '-req', '-in', request, '-days', '2', '-CA', at('ca-cert.pem'), '-CAkey', at('ca-key.pem')],
      ...['-CAcreateserial', '-extfile', at('extensions'), '-out', at(`${name}-cert.pem`)],
    ]);
  }
  return folder;
}

/**
 * Makes a folder with a certificate for `localhost` that another authority has signed, which that of `from` has.
 *
 * @param from a folder that {@link makeCertificates} has made
 */
export function makeIntermediate(from: string, folder: string): void {
  mkdirSync(folder);
  const at = (name: string): string => join(folder, name);
  const sign = (name: string, subject: string, authority: string, extensions: string): void => {
    const curve = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'];
    run('openssl', [
      ...['req', ...curve, '-keyout', at(`${name}-key.pem`), '-subj', subject, '-out', at('request')],
    ]);
    writeFileSync(at('extensions'), extensions);
    run('openssl', [
      ...['x509', '-req', '-in', at('request'), '-days', '2', '-CA', `${authority}-cert.pem`],
      ...['-CAkey', `${authority}-key.pem`, '-CAcreateserial', '-extfile', at('extensions')],
      ...['-out', at(`${name}-cert.pem`)],
    ]);
  };
  const server = 'subjectAltName=DNS:localhost\nextendedKeyUsage=serverAuth\nkeyUsage=digitalSignature\n';
  sign('middle', '/CN=Middle', join(from, 'ca'), 'basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign\n');
  sign('server', '/CN=localhost', at('middle'), server);
  appendFileSync(at('server-cert.pem'), readFileSync(at('middle-cert.pem')));
}
