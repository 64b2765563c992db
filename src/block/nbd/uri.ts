import { resolve } from 'node:path';
import { StillframeError } from '../../errors.js';
import { MAX_STRING_BYTES } from '../../nbd/protocol/numbers.js';

/** Where an export is and how it is to be used, from its name. */
export interface NbdTarget {
  readonly address: /** `path` is absolute; one that starts with a NUL byte is a name of the abstract namespace. */
    | { readonly type: 'unix'; readonly path: string }
    | { readonly type: 'tcp'; readonly host: string; readonly port: number };
  /** As the server knows it; the empty one is the default export. */
  readonly exportName: string;
  /** Undefined: plain text. Otherwise nothing but TLS will do. */
  readonly tls: NbdTls | undefined;
  /** How long a lost connection is tried to be made again, in milliseconds; 0: not at all. */
  readonly reconnectDelayMs: number;
  /** How long the first connection is tried to be made; 0: once. */
  readonly openTimeoutMs: number;
  /** How long a server may take for one answer before it is given up. */
  readonly timeoutMs: number;
  /** Most connections that are made where the server allows several. */
  readonly connections: number;
  /** Whether cancelling a job cuts the connections that it waits for; otherwise it waits for the answers. */
  readonly cut: boolean;
  /** A server that comes back is trusted to have what it took and was not told to make durable. */
  readonly trusted: boolean;
  /** Metadata contexts to ask for beside `base:allocation`. */
  readonly contexts: readonly string[];
}

/** How the two sides convince each other who they are. */
export interface NbdTls {
  /** Folder with `ca-cert.pem` and, where the server wants one, `client-cert.pem` and `client-key.pem`. */
  readonly certificates: string | undefined;
  /** File with lines `user:hexadecimal key`; then keys known to both are used instead of certificates. */
  readonly pskFile: string | undefined;
  readonly username: string | undefined;
  /** Name that the certificate must have, where it is not the host's. */
  readonly hostname: string | undefined;
  /** False: anybody may be the server. */
  readonly verifyPeer: boolean;
  /** What `client-key.pem` is encrypted with: no part of a name. */
  readonly passphrase?: string | undefined;
}

/** The port of NBD. */
const PORT = 10809;
const MAX_CONNECTIONS = 16;
const DEFAULTS = {
  reconnectDelayMs: 0,
  openTimeoutMs: 0,
  timeoutMs: 120_000,
  connections: 4,
  cut: true,
  trusted: false,
} as const;

/** Whether an image name is an export's rather than a file's; a file of such a name is called `./nbd:…`. */
export function isNbdName(name: string): boolean {
  return /^nbds?(\+[a-z]+)?:/i.test(name);
}

/**
 * Parses an NBD URI, or one of QEMU's older forms `nbd:HOST:PORT[:exportname=NAME]` and
 * `nbd:unix:PATH[:exportname=NAME]`.
 *
 * Beside the parameters of the URI specification and libnbd's `tls-certificates` and `tls-psk-file` there are
 * `x-reconnect-delay`, `x-open-timeout` and `x-timeout` in seconds, `x-connections`, `x-cut`, `x-trusted`, and
 * `x-dirty-bitmap` as QEMU's driver has it.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function parseNbdName(name: string): NbdTarget {
  return /^nbds?(\+[a-z]+)?:\/\//i.test(name) ? parseUri(name) : parseOldName(name);
}

function invalid(name: string, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `'${name}' ${what}; names of NBD exports are like nbd://HOST/EXPORT and nbd+unix:///EXPORT?socket=PATH`,
  );
}

function parseOldName(name: string): NbdTarget {
  const [, place = '', , exportName = ''] = /^nbd:(.*?)(:exportname=(.*))?$/s.exec(name) ?? [];
  checkExportName(name, exportName);
  const common = { ...DEFAULTS, exportName, tls: undefined, contexts: [] };
  if (place.startsWith('unix:')) {
    const path = place.slice('unix:'.length);
    if (path === '') throw invalid(name, 'names no socket');
    return { ...common, address: { type: 'unix', path: resolve(path) } };
  }
  const [, bracketed, plain, port] = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d+)$/.exec(place) ?? [];
  const host = bracketed ?? plain;
  if (host === undefined) throw invalid(name, 'needs HOST:PORT or unix:PATH behind nbd:');
  return { ...common, address: { type: 'tcp', host, port: portOf(name, port) } };
}

function parseUri(name: string): NbdTarget {
  const match = /^(nbds?)(?:\+([a-z]+))?:\/\/([^/?#]*)(\/[^?#]*)?(?:\?([^#]*))?$/is.exec(name);
  if (match === null) throw invalid(name, 'is no NBD URI');
  const [, scheme = '', transport = 'tcp', authority = '', path = '', query] = match;
  const parameters = parseQuery(name, query ?? '');
  const at = authority.lastIndexOf('@');
  const username = at < 0 ? undefined : decode(name, authority.slice(0, at));
  const exportName = decode(name, path.slice(1));
  checkExportName(name, exportName);
  const secure = scheme.toLowerCase() === 'nbds';
  const host = authority.slice(at + 1);
  const over = transport.toLowerCase();
  // Whom a certificate at a socket has to be for, as other clients take it.
  const atSocket = secure && over === 'unix' && /^[^:]+$/.test(host) ? host : undefined;
  const address = addressOf(name, over, atSocket === undefined ? host : '', parameters.get('socket'));
  return {
    address,
    exportName,
    tls: secure ? tlsOf(name, parameters, username, atSocket) : undefined,
    reconnectDelayMs: milliseconds(name, parameters, 'x-reconnect-delay') ?? DEFAULTS.reconnectDelayMs,
    openTimeoutMs: milliseconds(name, parameters, 'x-open-timeout') ?? DEFAULTS.openTimeoutMs,
    timeoutMs: milliseconds(name, parameters, 'x-timeout') || DEFAULTS.timeoutMs,
    connections: connectionsOf(name, parameters.get('x-connections')),
    cut: parameters.get('x-cut') !== '0',
    trusted: parameters.get('x-trusted') === '1',
    contexts: contextsOf(parameters.get('x-dirty-bitmap')),
  };
}

function addressOf(
  name: string,
  transport: string,
  host: string,
  socket: string | undefined,
): NbdTarget['address'] {
  if (transport === 'unix') {
    if (socket === undefined || socket === '') throw invalid(name, 'needs the parameter socket=PATH');
    if (host !== '') throw invalid(name, `names the host '${host}', and a socket has none`);
    return { type: 'unix', path: socket.startsWith('\0') ? socket : resolve(socket) };
  }
  if (transport !== 'tcp')
    throw invalid(name, `asks for the transport '${transport}', which is not supported`);
  if (socket !== undefined)
    throw invalid(name, 'has the parameter socket, which goes with nbd+unix and nbds+unix');
  const [, bracketed, plain, port] = /^(?:\[([^\]]+)\]|([^:[\]]*))(?::(\d*))?$/.exec(host) ?? [];
  if (bracketed === undefined && plain === undefined)
    throw invalid(name, `has '${host}' where HOST:PORT should be`);
  // Without a host the specification says localhost.
  const decoded = bracketed ?? (decode(name, plain ?? '') || 'localhost');
  return { type: 'tcp', host: decoded, port: port === undefined || port === '' ? PORT : portOf(name, port) };
}

const PARAMETERS = new Set([
  'socket',
  'tls-certificates',
  'tls-hostname',
  'tls-psk-file',
  'tls-type',
  'tls-username',
  'tls-verify-peer',
]);

function parseQuery(name: string, query: string): ReadonlyMap<string, string> {
  const parameters = new Map<string, string>();
  for (const pair of query.split('&')) {
    if (pair === '') continue;
    const equals = pair.indexOf('=');
    const key = decode(name, equals < 0 ? pair : pair.slice(0, equals));
    if (!PARAMETERS.has(key) && !key.startsWith('x-')) {
      throw invalid(name, `has the parameter '${key}', which is not known`);
    }
    if (parameters.has(key)) throw invalid(name, `has the parameter '${key}' twice`);
    parameters.set(key, equals < 0 ? '' : decode(name, pair.slice(equals + 1)));
  }
  return parameters;
}

function tlsOf(
  name: string,
  parameters: ReadonlyMap<string, string>,
  username: string | undefined,
  hostname: string | undefined,
): NbdTls {
  const type = parameters.get('tls-type');
  if (type !== undefined && !['x509', 'psk'].includes(type)) {
    throw invalid(name, `asks for tls-type=${type}; x509 and psk are supported`);
  }
  const pskFile = parameters.get('tls-psk-file');
  if (type === 'psk' && pskFile === undefined)
    throw invalid(name, 'needs tls-psk-file=FILE for tls-type=psk');
  const verify = parameters.get('tls-verify-peer') ?? '1';
  if (!/^(0|1|on|off|yes|no|true|false)$/.test(verify)) {
    throw invalid(name, `has tls-verify-peer=${verify}, which is 0 or 1`);
  }
  return {
    certificates: parameters.get('tls-certificates'),
    pskFile: type === 'x509' ? undefined : pskFile,
    username: parameters.get('tls-username') ?? username,
    hostname: parameters.get('tls-hostname') ?? hostname,
    verifyPeer: /^(1|on|yes|true)$/.test(verify),
  };
}

function milliseconds(
  name: string,
  parameters: ReadonlyMap<string, string>,
  key: string,
): number | undefined {
  const text = parameters.get(key);
  if (text === undefined) return undefined;
  if (!/^\d{1,10}(\.\d+)?$/.test(text))
    throw invalid(name, `has ${key}=${text}, which should be a number of seconds`);
  return Number(text) * 1000;
}

function connectionsOf(name: string, text: string | undefined): number {
  if (text === undefined) return DEFAULTS.connections;
  const count = Number(text);
  if (Number.isInteger(count) && count >= 1 && count <= MAX_CONNECTIONS) return count;
  throw invalid(name, `has x-connections=${text}, which should be 1 to ${MAX_CONNECTIONS}`);
}

function contextsOf(bitmap: string | undefined): readonly string[] {
  // That one is asked for anyway.
  if (bitmap === undefined || bitmap === 'base:allocation') return [];
  return [bitmap.startsWith('qemu:') ? bitmap : `qemu:dirty-bitmap:${bitmap}`];
}

function portOf(name: string, text: string | undefined): number {
  const port = Number(text);
  if (Number.isInteger(port) && port > 0 && port < 65536) return port;
  throw invalid(name, `has the port ${text}, which should be 1 to 65535`);
}

function decode(name: string, text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw invalid(name, `has '${text}', where a '%' is not followed by the digits of valid UTF-8`);
  }
}

function checkExportName(name: string, exportName: string): void {
  if (exportName.includes('\0')) throw invalid(name, 'has a NUL byte in the name of the export');
  if (Buffer.byteLength(exportName) > MAX_STRING_BYTES) {
    throw invalid(name.slice(0, 80), `has a name of the export of more than ${MAX_STRING_BYTES} bytes`);
  }
}

/** Names an export, so that two names of one are known for the same. */
export function nbdIdentity({ address, exportName }: NbdTarget): string {
  const place =
    address.type === 'unix' ? `unix:${address.path}` : `${address.host.toLowerCase()}:${address.port}`;
  return `nbd:${place}/${exportName}`;
}
