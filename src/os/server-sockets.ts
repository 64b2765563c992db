import { throughFfi } from './ffi.js';
import { type Koffi, loadKoffi, type SocketAddress, SocketError, socketError } from './sockets.js';

/**
 * What a server needs of Linux that Node does not offer: sockets that listen, a poller over many connections, and calls
 * that do not wait. Failures are `Error`s with `code` (errno name) and `syscall`.
 */
export interface ServerSockets {
  /**
   * A listening socket that does not block.
   *
   * @param mode permissions of the socket in the file system
   */
  listen(address: SocketAddress, mode: number): number;
  /** Whether a descriptor listens (true), is connected (false), or is no stream socket (undefined). */
  listens(fd: number): boolean | undefined;
  /** The port a TCP socket is bound to; undefined for other sockets. */
  port(fd: number): number | undefined;
  /** A descriptor does not block any more, or does; it is closed in programs that are started. */
  setBlocking(fd: number, blocking: boolean): void;
  /** The next connection, which blocks; undefined where nobody waits. */
  accept(fd: number): number | undefined;
  /** Reads without waiting. @returns the bytes read, 0 at the end, undefined where there is nothing yet */
  receive(fd: number, bytes: Uint8Array): number | undefined;
  /** Writes without waiting. @returns the bytes taken, perhaps 0 */
  send(fd: number, bytes: Uint8Array): number;
  /** How long reading may block, in milliseconds; it fails with `EAGAIN` then. */
  setReceiveTimeout(fd: number, timeoutMs: number): void;
  /** Nothing more is read: whoever reads comes to the end, and what is written still arrives. Never throws. */
  endReceiving(fd: number): void;
  /** A poller without descriptors. */
  poller(): number;
  /** Watches a descriptor; `once`: only until it was reported the first time, then {@link rewatch}. */
  watch(poller: number, fd: number, tag: number, once: boolean): void;
  /** Watches one again that was reported, or for something else. */
  rewatch(poller: number, fd: number, tag: number, what: 'readable' | 'writable'): void;
  /** Never throws: it may be closed by then. */
  unwatch(poller: number, fd: number): void;
  /** Tags of descriptors that something can be done with. @param timeoutMs -1: waits for ever */
  wait(poller: number, timeoutMs: number): number[];
  /** Where memory is, for {@link ServerSockets.receiveAll}; for as long as it exists. */
  addressOf(memory: Uint8Array): number;
  /**
   * Fills memory, waiting as long as it takes, or as {@link setReceiveTimeout} says.
   *
   * @param address of the first byte
   * @returns the bytes read, fewer only at the end or after the time-out; undefined after the time-out with nothing read
   */
  receiveAll(fd: number, address: number, length: number): number | undefined;
  /** Reads what there is to memory. @param waits for the first byte @returns as {@link receiveAll} */
  receiveTo(fd: number, address: number, length: number, waits: boolean): number | undefined;
  /** Reads to memory without waiting. @returns the bytes read, 0 at the end, -1 where there is nothing, or an error, yet */
  receiveNow(fd: number, address: number, length: number): number;
  /** Writes from memory, waiting until something was taken. @param more: what follows belongs to it. @returns the bytes taken */
  sendFrom(fd: number, address: number, length: number, more: boolean): number;
  /** Writes from memory without waiting. @returns the bytes taken, perhaps 0 */
  sendNow(fd: number, address: number, length: number): number;
  /**
   * A pipe, for data that goes from a file to a socket without being copied.
   *
   * @param bytes how much it should hold; the system may allow less
   */
  pipe(bytes: number): Pipe;
  /** Puts a part of a file into an empty pipe. @returns the bytes put, fewer at the end of the file or of the pipe */
  spliceIn(fd: number, offset: number, pipe: Pipe, length: number): number;
  /** Sends what is in a pipe, waiting as long as it takes. @returns the bytes taken */
  spliceOut(pipe: Pipe, fd: number, length: number): number;
}

export interface Pipe {
  readonly read: number;
  readonly write: number;
  /** Bytes it holds, of whole pages. */
  readonly capacity: number;
}

const AF_UNIX = 1;
const AF_INET6 = 10;
const SOCK_STREAM = 1;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
const SO_REUSEADDR = 2;
const SO_TYPE = 3;
const SO_KEEPALIVE = 9;
const SO_RCVTIMEO = 20;
const SO_ACCEPTCONN = 30;
const SO_DOMAIN = 39;
const IPPROTO_TCP = 6;
const TCP_NODELAY = 1;
const IPPROTO_IPV6 = 41;
const IPV6_V6ONLY = 26;
const SHUT_RD = 0;
const MSG_DONTWAIT = 0x40;
const MSG_WAITALL = 0x100;
const MSG_NOSIGNAL = 0x4000;
const MSG_MORE = 0x8000;
const SPLICE_F_NONBLOCK = 2;
const F_SETPIPE_SZ = 1031;
const F_GETPIPE_SZ = 1032;
const O_CLOEXEC = 0o2000000;
const F_SETFD = 2;
const F_GETFL = 3;
const F_SETFL = 4;
const FD_CLOEXEC = 1;
const O_NONBLOCK = 0o4000;
const EPOLL_CLOEXEC = 0o2000000;
const EPOLL_CTL_ADD = 1;
const EPOLL_CTL_DEL = 2;
const EPOLL_CTL_MOD = 3;
const EPOLLIN = 1;
const EPOLLOUT = 4;
const EPOLLRDHUP = 0x2000;
const EPOLLONESHOT = 1 << 30;
/** `struct epoll_event` is packed on this processor alone. */
const EVENT_BYTES = process.arch === 'x64' ? 12 : 16;
const EVENT_TAG = process.arch === 'x64' ? 4 : 8;
const EVENTS_AT_ONCE = 64;
const BACKLOG = 128;
/** What comes of a connection that its client gave up before it was accepted. */
const GIVEN_UP = ['ECONNABORTED', 'EPROTO', 'EPERM', 'EINTR', 'ENETDOWN', 'EHOSTUNREACH', 'ENETUNREACH'];

function loadServerSockets(): ServerSockets {
  const koffi: Koffi = loadKoffi();
  const libc = koffi.load(null);
  const socket = libc.func('int socket(int domain, int type, int protocol)');
  const bind = libc.func('int bind(int fd, void *address, unsigned int length)');
  const listen = libc.func('int listen(int fd, int backlog)');
  const accept = libc.func('int accept4(int fd, void *address, void *length, int flags)');
  const close = libc.func('int close(int fd)');
  const fchmod = libc.func('int fchmod(int fd, unsigned int mode)');
  const fcntl = libc.func('int fcntl(int fd, int command, int value)');
  const setsockopt = libc.func(
    'int setsockopt(int fd, int level, int name, void *value, unsigned int length)',
  );
  const getsockopt = libc.func('int getsockopt(int fd, int level, int name, void *value, void *length)');
  const getsockname = libc.func('int getsockname(int fd, void *address, void *length)');
  const shutdown = libc.func('int shutdown(int fd, int how)');
  const recv = libc.func('int64 recv(int fd, void *bytes, size_t length, int flags)');
  const recvTo = libc.func('int64 recv(int fd, size_t address, size_t length, int flags)');
  const send = libc.func('int64 send(int fd, void *bytes, size_t length, int flags)');
  const sendFrom = libc.func('int64 send(int fd, size_t address, size_t length, int flags)');
  const pipe2 = libc.func('int pipe2(_Out_ int *fds, int flags)');
  const splice = libc.func(
    'int64 splice(int in, void *inOffset, int out, void *outOffset, size_t length, unsigned int flags)',
  );
  const epollCreate = libc.func('int epoll_create1(int flags)');
  const epollCtl = libc.func('int epoll_ctl(int poller, int operation, int fd, void *event)');
  const epollWait = libc.func('int epoll_wait(int poller, void *events, int most, int timeout)');

  const checked = (syscall: string, result: unknown): number => {
    const value = Number(result);
    if (value >= 0) return value;
    throw socketError(syscall, koffi.errno());
  };
  /** Undefined where it would have to wait. */
  const attempt = (syscall: string, call: () => unknown): number | undefined => {
    for (;;) {
      const value = Number(call());
      if (value >= 0) return value;
      const error = socketError(syscall, koffi.errno());
      if (error.code === 'EAGAIN') return undefined;
      if (error.code !== 'EINTR') throw error;
    }
  };
  const setOption = (fd: number, level: number, name: number, value: number): void => {
    checked('setsockopt', setsockopt(fd, level, name, Int32Array.of(value), 4));
  };
  const option = (fd: number, name: number): number | undefined => {
    const value = Int32Array.of(0);
    return Number(getsockopt(fd, SOL_SOCKET, name, value, Uint32Array.of(4))) === 0 ? value[0] : undefined;
  };
  const isTcp = (fd: number): boolean => option(fd, SO_DOMAIN) !== AF_UNIX;
  const control = (poller: number, operation: number, fd: number, events: number, tag: number): void => {
    const event = new DataView(new ArrayBuffer(EVENT_BYTES));
    event.setUint32(0, events, true);
    event.setUint32(EVENT_TAG, tag, true);
    checked('epoll_ctl', epollCtl(poller, operation, fd, new Uint8Array(event.buffer)));
  };
  const interruptible = (syscall: string, call: () => unknown): number => {
    for (;;) {
      const value = Number(call());
      if (value >= 0) return value;
      const error = socketError(syscall, koffi.errno());
      if (error.code !== 'EINTR') throw error;
    }
  };
  const spliceOffset = new BigInt64Array(1);
  const events = new Uint8Array(EVENT_BYTES * EVENTS_AT_ONCE);
  const eventView = new DataView(events.buffer);
  return {
    listen({ family, bytes }, mode) {
      const type = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
      const fd = checked('socket', socket(family, type, 0));
      try {
        // Before it has a name: nobody else may connect at any time.
        if (family === AF_UNIX) checked('fchmod', fchmod(fd, mode));
        else setOption(fd, SOL_SOCKET, SO_REUSEADDR, 1);
        if (family === AF_INET6) setOption(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
        checked('bind', bind(fd, bytes, bytes.length));
        checked('listen', listen(fd, BACKLOG));
        return fd;
      } catch (error) {
        close(fd);
        throw error;
      }
    },
    listens(fd) {
      const accepts = option(fd, SO_TYPE) === SOCK_STREAM ? option(fd, SO_ACCEPTCONN) : undefined;
      return accepts === undefined ? undefined : accepts !== 0;
    },
    port(fd) {
      if (!isTcp(fd)) return undefined;
      const address = new Uint8Array(128);
      checked('getsockname', getsockname(fd, address, Uint32Array.of(address.length)));
      return new DataView(address.buffer).getUint16(2);
    },
    setBlocking(fd, blocking) {
      const flags = checked('fcntl', fcntl(fd, F_GETFL, 0));
      checked('fcntl', fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK));
      checked('fcntl', fcntl(fd, F_SETFD, FD_CLOEXEC));
    },
    accept(fd) {
      const client = Number(accept(fd, null, null, SOCK_CLOEXEC));
      if (client < 0) {
        const error = socketError('accept', koffi.errno());
        if (error.code === 'EAGAIN' || GIVEN_UP.includes(error.code)) return undefined;
        throw error;
      }
      if (isTcp(client)) {
        setOption(client, IPPROTO_TCP, TCP_NODELAY, 1);
        setOption(client, SOL_SOCKET, SO_KEEPALIVE, 1);
      }
      return client;
    },
    receive: (fd, bytes) => attempt('recv', () => recv(fd, bytes, bytes.length, MSG_DONTWAIT)),
    send: (fd, bytes) =>
      attempt('send', () => send(fd, bytes, bytes.length, MSG_DONTWAIT | MSG_NOSIGNAL)) ?? 0,
    setReceiveTimeout(fd, timeoutMs) {
      const value = BigInt64Array.of(BigInt(Math.floor(timeoutMs / 1000)), BigInt((timeoutMs % 1000) * 1000));
      checked('setsockopt', setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, value, 16));
    },
    endReceiving(fd) {
      shutdown(fd, SHUT_RD);
    },
    poller: () => checked('epoll_create1', epollCreate(EPOLL_CLOEXEC)),
    watch(poller, fd, tag, once) {
      control(poller, EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLRDHUP | (once ? EPOLLONESHOT : 0), tag);
    },
    rewatch(poller, fd, tag, what) {
      const wanted = what === 'readable' ? EPOLLIN | EPOLLRDHUP : EPOLLOUT;
      control(poller, EPOLL_CTL_MOD, fd, wanted | EPOLLONESHOT, tag);
    },
    unwatch(poller, fd) {
      epollCtl(poller, EPOLL_CTL_DEL, fd, new Uint8Array(EVENT_BYTES));
    },
    wait(poller, timeoutMs) {
      const count = Number(epollWait(poller, events, EVENTS_AT_ONCE, Math.ceil(timeoutMs)));
      if (count < 0) {
        const error = socketError('epoll_wait', koffi.errno());
        if (error.code === 'EINTR') return [];
        throw error;
      }
      return Array.from({ length: count }, (_, index) =>
        eventView.getUint32(index * EVENT_BYTES + EVENT_TAG, true),
      );
    },
    addressOf: (memory) => Number(koffi.address(memory)),
    receiveAll: (fd, address, length) => attempt('recv', () => recvTo(fd, address, length, MSG_WAITALL)),
    receiveTo: (fd, address, length, waits) =>
      attempt('recv', () => recvTo(fd, address, length, waits ? 0 : MSG_DONTWAIT)),
    receiveNow: (fd, address, length) => Number(recvTo(fd, address, length, MSG_DONTWAIT)),
    sendFrom: (fd, address, length, more) =>
      interruptible('send', () => sendFrom(fd, address, length, MSG_NOSIGNAL | (more ? MSG_MORE : 0))),
    sendNow: (fd, address, length) =>
      attempt('send', () => sendFrom(fd, address, length, MSG_DONTWAIT | MSG_NOSIGNAL)) ?? 0,
    pipe(bytes) {
      const fds: [number, number] = [-1, -1];
      checked('pipe2', pipe2(fds, O_CLOEXEC));
      const [read, write] = fds;
      fcntl(write, F_SETPIPE_SZ, bytes);
      return { read, write, capacity: Number(fcntl(write, F_GETPIPE_SZ, 0)) };
    },
    spliceIn(fd, offset, pipe, length) {
      spliceOffset[0] = BigInt(offset);
      const flags = SPLICE_F_NONBLOCK;
      return interruptible('splice', () => splice(fd, spliceOffset, pipe.write, null, length, flags));
    },
    spliceOut: (pipe, fd, length) =>
      interruptible('splice', () => splice(pipe.read, null, fd, null, length, 0)),
  };
}

/** The sockets of this platform. */
export const serverSockets = throughFfi(loadServerSockets, (error) => error instanceof SocketError);
