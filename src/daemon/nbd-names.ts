import { MAX_STRING_BYTES } from '../nbd/protocol/numbers.js';
import { MAX_UNIX_PATH_BYTES } from '../os/sockets.js';
import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import type { Objects } from './objects.js';

/**
 * The name of a unix socket as the system takes it: one of the abstract namespace has a NUL byte in front, and others
 * behind it where it is not to be `tight`.
 */
export function unixName({ path, abstract, tight }: JsonObject): string {
  const name = String(path);
  if (abstract !== true) return name;
  if (tight !== false) return `\0${name}`;
  return `\0${name}${'\0'.repeat(Math.max(0, MAX_UNIX_PATH_BYTES - Buffer.byteLength(name)))}`;
}

/** @throws QmpError where a name for the server is too long */
export function checkNbdNames({ export: name = '', 'x-dirty-bitmap': bitmap = '' }: JsonObject): void {
  for (const [what, text] of [
    ['export name', name],
    ['x-dirty-bitmap query', bitmap],
  ]) {
    if (Buffer.byteLength(String(text)) <= MAX_STRING_BYTES) continue;
    throw new QmpError(`${String(what)} too long to send to server`);
  }
}

/** The URI of an export, from the options of its node, with all its settings. @throws QmpError */
export function nbdName(options: JsonObject, objects: Objects): string {
  const uri = options['x-uri'];
  if (typeof uri === 'string') return uri;
  const { server, export: name = '', 'tls-creds': creds } = options;
  if (!isObject(server)) throw new TypeError('the schema was not looked at');
  const parameters = typeof creds === 'string' ? objects.clientTlsOf(creds) : new URLSearchParams();
  const set = (key: string, value: unknown): void => {
    if (value !== undefined) parameters.set(key, String(value));
  };
  set('x-reconnect-delay', options['reconnect-delay']);
  // Who waits for a server to come back takes it as it comes.
  if (Number(options['reconnect-delay'] ?? 0) > 0) set('x-trusted', 1);
  set('x-open-timeout', options['open-timeout']);
  set('x-dirty-bitmap', options['x-dirty-bitmap']);
  set('tls-hostname', options['tls-hostname']);
  const scheme = typeof creds === 'string' ? 'nbds' : 'nbd';
  const path = encodeURIComponent(String(name));
  if (server['type'] === 'unix') {
    set('socket', unixName(server));
    return `${scheme}+unix:///${path}?${parameters}`;
  }
  const query = parameters.size === 0 ? '' : `?${parameters}`;
  return `${scheme}://${inetPlace(server)}/${path}${query}`;
}

function inetPlace(server: JsonObject): string {
  if (server['type'] !== 'inet') {
    throw new QmpError(
      server['type'] === 'fd'
        ? 'only QEMU supports file descriptor passing'
        : `an NBD server of type '${String(server['type'])}' is not supported; use inet or unix`,
    );
  }
  const { ipv4, ipv6 } = server;
  if (ipv4 === false && ipv6 === false) throw new QmpError('Cannot disable IPv4 and IPv6 at same time');
  const [host, port] = [String(server['host']), String(server['port'])];
  if (!/^\d+$/.test(port) || Number(port) > 65535) {
    throw new QmpError(
      `address resolution failed for ${host}:${port}: Servname not supported for ai_socktype`,
    );
  }
  return `${host.includes(':') ? `[${host}]` : host}:${port}`;
}

/** The name of an export in queries, as QEMU has it: without what says how it is reached and used. */
export function nbdFilename({ server, export: name }: JsonObject): string | undefined {
  if (!isObject(server)) return undefined;
  const path = name === undefined ? '' : `/${encoded(String(name))}`;
  if (server['type'] === 'unix') return `nbd+unix://${path}?socket=${encoded(String(server['path']))}`;
  return `nbd://${String(server['host'])}:${String(server['port'])}${path}`;
}

/** Only what would end this part of a URI is encoded. */
function encoded(text: string): string {
  return encodeURI(text).replace(/[?#&+]/g, encodeURIComponent);
}
