import { resolve } from 'node:path';
import { isNbdName, parseNbdName } from '../../block/nbd/uri.js';
import { StillframeError } from '../../errors.js';

/** Where a server listens. */
export type ListenAddress =
  /** A socket in the file system, or of the abstract namespace where the path starts with a NUL byte. */
  | { readonly type: 'unix'; readonly path: string }
  /** Port 0: any that is free. */
  | { readonly type: 'tcp'; readonly host: string; readonly port: number }
  /** A descriptor that is open: a socket that listens, or one that is connected to a client. */
  | { readonly type: 'fd'; readonly fd: number };

/** What a text says of where to listen, and of what. */
export interface ListenPlace {
  readonly address: ListenAddress;
  /** From a URI with a path. */
  readonly exportName: string | undefined;
  /** A URI says that there must be TLS. */
  readonly tls: boolean;
}

const PORT = 10809;
const FIRST_INHERITED = 3;

function invalid(text: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `'${text}' is no address to listen on; give unix:PATH, HOST:PORT, :PORT, fd:N, nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH`,
  );
}

/**
 * Parses an address: `unix:PATH`, `HOST:PORT`, `HOST` (port 10809), `:PORT` (this machine only), `[IPV6]:PORT`, `fd:N`
 * or an NBD URI.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function parseListenAddress(text: string): ListenPlace {
  if (isNbdName(text)) {
    const { address, exportName, tls } = parseNbdName(text);
    return { address, exportName: exportName === '' ? undefined : exportName, tls: tls !== undefined };
  }
  const plain = (address: ListenAddress): ListenPlace => ({ address, exportName: undefined, tls: false });
  if (text.startsWith('unix:')) {
    const path = text.slice('unix:'.length);
    if (path === '' || path.includes('\0')) throw invalid(text);
    return plain({ type: 'unix', path: path.startsWith('@') ? `\0${path.slice(1)}` : resolve(path) });
  }
  const [, fd] = /^fd:(\d{1,6})$/.exec(text) ?? [];
  if (fd !== undefined) return plain({ type: 'fd', fd: Number(fd) });
  const [, bracketed, host, digits] = /^(?:\[([^\]]+)\]|([^:[\]/]*))(?::(\d{1,5}))?$/.exec(text) ?? [];
  if (bracketed === undefined && host === undefined) throw invalid(text);
  const port = digits === undefined ? PORT : Number(digits);
  if (port > 65535 || (text === '' && digits === undefined)) throw invalid(text);
  return plain({ type: 'tcp', host: bracketed ?? (host === '' ? 'localhost' : (host ?? '')), port });
}

/**
 * The sockets that the program was started with to listen on, as systemd, nbdcopy and libnbd do it (`LISTEN_FDS` and
 * `LISTEN_PID`); undefined where it was not.
 */
export function inheritedSockets(): ListenAddress[] | undefined {
  const count = Number(process.env['LISTEN_FDS']);
  if (Number(process.env['LISTEN_PID']) !== process.pid || !Number.isInteger(count) || count < 1) {
    return undefined;
  }
  return Array.from({ length: count }, (_, index) => ({ type: 'fd', fd: FIRST_INHERITED + index }));
}
