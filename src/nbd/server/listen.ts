import { chmodSync, rmSync, statSync } from 'node:fs';
import { StillframeError, systemError } from '../../errors.js';
import type { ServerSockets } from '../../os/server-sockets.js';
import type { SocketAddress, Sockets } from '../../os/sockets.js';
import type { ListenAddress } from './address.js';

/** What a server listens on, and how others call it. */
export interface Listening {
  readonly listeners: number[];
  readonly connected: number[];
  /** Where clients find it: URIs without an export. */
  readonly places: ListenAddress[];
  /** Sockets in the file system that are ours to remove. */
  readonly paths: string[];
}

type AllSockets = Sockets & ServerSockets;

/**
 * Listens on addresses.
 *
 * @param mode permissions of sockets in the file system
 * @throws StillframeError ERR_STILLFRAME_NBD_CONNECTION (somebody else listens there), …_PERMISSION, …_NOT_FOUND,
 *   …_INVALID_ARGUMENT (no such host or descriptor)
 */
export function listenOn(sockets: AllSockets, addresses: readonly ListenAddress[], mode: number): Listening {
  const all: Listening = { listeners: [], connected: [], places: [], paths: [] };
  try {
    for (const address of addresses) listenAt(sockets, address, mode, all);
    return all;
  } catch (error) {
    stopListening(sockets, all);
    throw error;
  }
}

/** Closes everything that listens, and removes its names. */
export function stopListening(sockets: AllSockets, { listeners, paths }: Listening): void {
  for (const path of paths.splice(0)) rmSync(path, { force: true });
  for (const fd of listeners.splice(0)) sockets.close(fd);
}

function listenAt(sockets: AllSockets, address: ListenAddress, mode: number, all: Listening): void {
  switch (address.type) {
    case 'fd': {
      const listens = sockets.listens(address.fd);
      if (listens === undefined) {
        throw new StillframeError(
          'ERR_STILLFRAME_INVALID_ARGUMENT',
          `descriptor ${address.fd} is no stream socket; start the program with one that listens or is connected`,
        );
      }
      sockets.setBlocking(address.fd, !listens);
      (listens ? all.listeners : all.connected).push(address.fd);
      const port = listens ? sockets.port(address.fd) : undefined;
      all.places.push(port === undefined ? address : { type: 'tcp', host: 'localhost', port });
      return;
    }
    case 'unix': {
      const { path } = address;
      const name = attempt(`unix:${path}`, () => sockets.unixAddress(path));
      if (!path.startsWith('\0')) removeStale(sockets, path, name);
      all.listeners.push(attempt(`unix:${path}`, () => sockets.listen(name, mode)));
      if (!path.startsWith('\0')) {
        all.paths.push(path);
        // What the process masks was taken from the permissions it was made with.
        attempt(`unix:${path}`, () => chmodSync(path, mode));
      }
      all.places.push(address);
      return;
    }
    case 'tcp':
      listenTcp(sockets, address, mode, all);
  }
}

/** On every address that the name stands for; enough that one works. */
function listenTcp(
  sockets: AllSockets,
  { host, port }: Extract<ListenAddress, { type: 'tcp' }>,
  mode: number,
  all: Listening,
): void {
  const place = `${host}:${port}`;
  const addresses = attempt(place, () => sockets.resolve(host, port));
  let bound: number | undefined;
  let failure: unknown;
  for (const address of addresses) {
    // A free port is chosen once, for all of them.
    const at = bound === undefined ? address : withPort(address, bound);
    try {
      const fd = sockets.listen(at, mode);
      all.listeners.push(fd);
      bound ??= sockets.port(fd);
    } catch (error) {
      failure ??= error;
      const code = error instanceof Error && 'code' in error ? error.code : undefined;
      // A machine without IPv6 has the name of an address that nobody can listen on.
      if (code !== 'EADDRNOTAVAIL' && code !== 'EAFNOSUPPORT') break;
    }
  }
  if (bound === undefined) throw listenError(place, failure);
  all.places.push({ type: 'tcp', host, port: bound });
}

function withPort({ family, bytes }: SocketAddress, port: number): SocketAddress {
  const copy = bytes.slice();
  new DataView(copy.buffer).setUint16(2, port);
  return { family, bytes: copy };
}

/** Removes a socket that a server left behind; nobody answers there. */
function removeStale(sockets: AllSockets, path: string, address: SocketAddress): void {
  if (statSync(path, { throwIfNoEntry: false })?.isSocket() !== true) return;
  const fd = sockets.open(address);
  try {
    sockets.connect(fd, address);
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ECONNREFUSED')
      rmSync(path, { force: true });
  } finally {
    sockets.close(fd);
  }
}

function attempt<T>(place: string, call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw listenError(place, error);
  }
}

function listenError(place: string, error: unknown): StillframeError {
  const code = error instanceof Error && 'code' in error ? error.code : undefined;
  if (code === 'EADDRINUSE') {
    return new StillframeError(
      'ERR_STILLFRAME_NBD_CONNECTION',
      `cannot listen on ${place}: somebody else does already, or there is a file of that name; choose another address`,
      { cause: error, errno: 'EADDRINUSE' },
    );
  }
  return systemError(`cannot listen on ${place}`, error);
}
