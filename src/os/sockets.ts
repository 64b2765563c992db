import { createRequire } from 'node:module';
import { getSystemErrorMap } from 'node:util';
import { throughFfi } from './ffi.js';

/**
 * Blocking stream sockets of Linux, which Node does not offer: a thread that moves data waits in the kernel. What is
 * read and written goes through `fs.readSync` and `fs.writeSync` on their descriptors. Failures are `Error`s with
 * `code` (errno name) and `syscall`, as Node's own are.
 */
export interface Sockets {
  /**
   * Addresses of a host, in the order in which they should be tried.
   *
   * @throws Error with `code` `ENOTFOUND`
   */
  resolve(host: string, port: number): SocketAddress[];
  /** Address of a socket in the file system; one that starts with a NUL byte is of the abstract namespace. */
  unixAddress(path: string): SocketAddress;
  /** A blocking socket for an address, not connected yet. */
  open(address: SocketAddress): number;
  /** Connects. Waits no longer than the time-out of the socket; then `ETIMEDOUT`. */
  connect(fd: number, address: SocketAddress): void;
  /** How long one call may block, in milliseconds; it fails with `EAGAIN` then. 0: for ever. */
  setTimeout(fd: number, timeoutMs: number): void;
  /** Ends both directions of a connection at once: whoever is blocked in it comes back. Never throws. */
  shutdown(fd: number): void;
  /** Says that nothing more will be sent. Never throws. */
  finish(fd: number): void;
  close(fd: number): void;
  /** Two sockets that are connected to each other. */
  pair(): [number, number];
}

export interface SocketAddress {
  readonly family: number;
  /** The `sockaddr` of its family. */
  readonly bytes: Uint8Array;
}

const AF_UNIX = 1;
const AF_INET = 2;
const AF_INET6 = 10;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
const SO_KEEPALIVE = 9;
const SO_RCVTIMEO = 20;
const SO_SNDTIMEO = 21;
const IPPROTO_TCP = 6;
const TCP_NODELAY = 1;
const SHUT_WR = 1;
const SHUT_RDWR = 2;
export const MAX_UNIX_PATH_BYTES = 107;

/** The part of koffi that is used; its own types are far wider. */
export interface Koffi {
  load(path: string | null): { func(prototype: string): (...args: unknown[]) => unknown };
  errno(): number;
  address(memory: Uint8Array): bigint;
  decode(pointer: unknown, type: string, length?: number): unknown;
  decode(pointer: unknown, offset: number, type: string, length?: number): unknown;
  proto(result: string, parameters: readonly string[]): unknown;
  pointer(type: unknown): unknown;
  /** Something that C can call, as long as this thread is within a call of its own. */
  register(callback: (...args: never[]) => unknown, type: unknown): bigint;
  unregister(callback: bigint): void;
}

export class SocketError extends Error {
  readonly code: string;
  readonly syscall: string;

  constructor(syscall: string, code: string, text: string) {
    super(`${code}: ${text}, ${syscall}`);
    this.code = code;
    this.syscall = syscall;
  }
}

/** @throws Error where the FFI has no binary for this platform */
export function loadKoffi(): Koffi {
  return createRequire(import.meta.url)('koffi');
}

/** The error of the call that just failed. */
export function socketError(syscall: string, errno: number): SocketError {
  const [code, text] = getSystemErrorMap().get(-errno) ?? [`E${errno}`, 'unknown error'];
  return new SocketError(syscall, code, text);
}

function loadSockets(): Sockets {
  const koffi = loadKoffi();
  const libc = koffi.load(null);
  const socket = libc.func('int socket(int domain, int type, int protocol)');
  const connect = libc.func('int connect(int fd, void *address, unsigned int length)');
  const setsockopt = libc.func(
    'int setsockopt(int fd, int level, int name, void *value, unsigned int length)',
  );
  const shutdown = libc.func('int shutdown(int fd, int how)');
  const socketpair = libc.func('int socketpair(int domain, int type, int protocol, _Out_ int *fds)');
  // Not Node's: it knows nothing of these descriptors, and in a worker it warns of closing one that it did not open.
  const close = libc.func('int close(int fd)');
  const getaddrinfo = libc.func(
    'int getaddrinfo(const char *node, const char *service, void *hints, _Out_ void **result)',
  );
  const freeaddrinfo = libc.func('void freeaddrinfo(void *list)');

  const checked = (syscall: string, result: unknown): number => {
    const value = Number(result);
    if (value >= 0) return value;
    throw socketError(syscall, koffi.errno());
  };
  const setOption = (fd: number, level: number, name: number, value: Uint8Array): void => {
    checked('setsockopt', setsockopt(fd, level, name, value, value.length));
  };
  const one = new Uint8Array(Int32Array.of(1).buffer);
  return {
    resolve(host, port) {
      const hints = new Int32Array(12);
      hints[2] = SOCK_STREAM;
      const result: [unknown] = [null];
      if (getaddrinfo(host, String(port), hints, result) !== 0) {
        throw new SocketError('getaddrinfo', 'ENOTFOUND', `there is no host of the name '${host}'`);
      }
      const addresses: SocketAddress[] = [];
      // struct addrinfo: flags, family, socket type, protocol, address length (int32 each), address at 24, next at 40.
      for (let entry = result[0]; entry !== null; ) {
        const family = Number(koffi.decode(entry, 4, 'int32'));
        const length = Number(koffi.decode(entry, 16, 'uint32'));
        const address = koffi.decode(entry, 24, 'void *');
        if (family === AF_INET || family === AF_INET6) {
          const bytes = koffi.decode(address, 'uint8', length);
          if (bytes instanceof Uint8Array) addresses.push({ family, bytes: bytes.slice() });
          else if (Array.isArray(bytes)) addresses.push({ family, bytes: Uint8Array.from(bytes) });
        }
        entry = koffi.decode(entry, 40, 'void *');
      }
      freeaddrinfo(result[0]);
      return addresses;
    },
    unixAddress(path) {
      const name = new TextEncoder().encode(path);
      const abstract = name[0] === 0;
      if (name.length > MAX_UNIX_PATH_BYTES + (abstract ? 1 : 0)) {
        throw new SocketError(
          'connect',
          'ENAMETOOLONG',
          `a socket's name has at most ${MAX_UNIX_PATH_BYTES} bytes`,
        );
      }
      const bytes = new Uint8Array(2 + name.length + (abstract ? 0 : 1));
      new DataView(bytes.buffer).setUint16(0, AF_UNIX, true);
      bytes.set(name, 2);
      return { family: AF_UNIX, bytes };
    },
    open({ family }) {
      const fd = checked('socket', socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
      if (family !== AF_UNIX) {
        setOption(fd, IPPROTO_TCP, TCP_NODELAY, one);
        setOption(fd, SOL_SOCKET, SO_KEEPALIVE, one);
      }
      return fd;
    },
    connect(fd, { bytes }) {
      try {
        checked('connect', connect(fd, bytes, bytes.length));
      } catch (error) {
        const late = error instanceof SocketError && ['EINPROGRESS', 'EAGAIN'].includes(error.code);
        throw late ? new SocketError('connect', 'ETIMEDOUT', 'connection timed out') : error;
      }
    },
    setTimeout(fd, timeoutMs) {
      const seconds = Math.floor(timeoutMs / 1000);
      const value = new BigInt64Array([
        BigInt(seconds),
        BigInt(Math.round((timeoutMs - seconds * 1000) * 1000)),
      ]);
      const bytes = new Uint8Array(value.buffer);
      setOption(fd, SOL_SOCKET, SO_RCVTIMEO, bytes);
      setOption(fd, SOL_SOCKET, SO_SNDTIMEO, bytes);
    },
    shutdown(fd) {
      shutdown(fd, SHUT_RDWR);
    },
    finish(fd) {
      shutdown(fd, SHUT_WR);
    },
    close(fd) {
      checked('close', close(fd));
    },
    pair() {
      const fds: [number, number] = [-1, -1];
      checked('socketpair', socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
      return fds;
    },
  };
}

/** The sockets of this platform. */
export const sockets = throughFfi(loadSockets);
