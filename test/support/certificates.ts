import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { run } from './peers.js';

/**
 * Makes a folder of certificates by the names that NBD programs look for: an authority's, a server's for `localhost`
 * and a client's.
 */
export function makeCertificates(folder: string): string {
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
      `subjectAltName=DNS:localhost\nextendedKeyUsage=${usage}\nkeyUsage=digitalSignature\n`,
    );
    run('openssl', [
      ...['x509', '-req', '-in', request, '-days', '2', '-CA', at('ca-cert.pem'), '-CAkey', at('ca-key.pem')],
      ...['-CAcreateserial', '-extfile', at('extensions'), '-out', at(`${name}-cert.pem`)],
    ]);
  }
  return folder;
}
