import { readSync, writeSync } from 'node:fs';
import {
  requireOpenSsl,
  TLS_END,
  TLS_NEEDS_INPUT,
  TLS_NEEDS_ROOM,
  type TlsChannel,
  TlsError,
} from '../../os/openssl.js';
import { type ServerSockets, serverSockets } from '../../os/server-sockets.js';
import { SocketError } from '../../os/sockets.js';
import { receiveInput, sayGoodbye, sendOutNow } from '../../os/tls-channel.js';

/** The connection is gone, or takes too long: nothing more can be done with it. */
export class ConnectionLost extends Error {}

/** How bytes get to the server and back. Both wait until some have; the time-out of the socket is the error `EAGAIN`. */
interface Wire {
  /** @returns the bytes read, at most `length`; 0 at the end, undefined where what came was no data */
  receive(bytes: Uint8Array, start: number, length: number): number | undefined;
  /** @returns the bytes taken */
  send(bytes: Uint8Array, start: number, length: number): number;
}

/** Data that is encrypted before the deadline is looked at again, in bytes. */
const PART_BYTES = 128 * 1024;

function plainWire(fd: number): Wire {
  return {
    receive: (bytes, start, length) => readSync(fd, bytes, start, length, null),
    send: (bytes, start, length) => writeSync(fd, bytes, start, length, null),
  };
}

/** The TLS of one connection; whoever has the connection for itself uses it. */
export class TlsWire implements Wire {
  readonly #fd: number;
  readonly #channel: TlsChannel;
  readonly #tls = requireOpenSsl();
  readonly #sockets: ServerSockets;

  constructor(fd: number, channel: TlsChannel) {
    const calls = serverSockets();
    if (calls === undefined) throw new Error('invariant: there are sockets');
    this.#fd = fd;
    this.#channel = channel;
    this.#sockets = calls;
  }

  /**
   * Takes a step towards an agreement with the server on the keys.
   *
   * @returns 1 once there is one, otherwise as {@link Wire.receive}
   * @throws TlsError where one does not trust the other
   */
  handshake(): number | undefined {
    return this.#step(() => this.#tls.handshake(this.#channel), 0);
  }

  receive(bytes: Uint8Array, start: number, length: number): number | undefined {
    const to = bytes.subarray(start, start + length);
    return this.#step(() => this.#tls.read(this.#channel, to), length);
  }

  send(bytes: Uint8Array, start: number, length: number): number {
    const from = bytes.subarray(start, start + Math.min(length, PART_BYTES));
    for (;;) {
      const taken = this.#tls.write(this.#channel, from);
      this.#sendOut();
      if (taken === from.length) return taken;
      if (taken !== TLS_NEEDS_ROOM) throw new Error('a server that wants a handshake in between');
    }
  }

  /** Tells the server that nothing more will come, as far as it takes that at once. */
  finish(): void {
    sayGoodbye(this.#tls, this.#channel, this.#sockets, this.#fd);
  }

  /** Calls `step`, or waits for what it needs. @param toCome data that the server still has to send, or is sending */
  #step(step: () => number, toCome: number): number | undefined {
    const got = this.#answering(step);
    if (got >= 0) return got;
    if (got !== TLS_NEEDS_INPUT) return undefined;
    const came = receiveInput(this.#tls, this.#channel, this.#sockets, this.#fd, toCome);
    if (came === undefined) throw new SocketError('recv', 'EAGAIN', 'nothing came');
    if (came === 0) return TLS_END;
    this.#tls.putIn(this.#channel, came);
    return undefined;
  }

  /** The server is told what is wrong with it, and gets an answer to what is no data. */
  #answering(step: () => number): number {
    try {
      const got = step();
      if (got <= 0) this.#sendOut();
      return got;
    } catch (error) {
      if (error instanceof TlsError) sendOutNow(this.#tls, this.#channel, this.#sockets, this.#fd);
      throw error;
    }
  }

  #sendOut(): void {
    for (;;) {
      const { address, length } = this.#tls.output(this.#channel);
      if (length === 0) return;
      this.#tls.tookOut(this.#channel, this.#sockets.sendFrom(this.#fd, address, length, false));
    }
  }
}

/** Blocking reads and writes on a connected socket, with a deadline over any number of them. */
export class SocketStream {
  readonly fd: number;
  /** Nothing is waited for beyond it, in the milliseconds of `performance.now()`. */
  deadlineMs: number;
  readonly #wire: Wire;

  /**
   * The time-out of the socket bounds each call; see {@link Sockets.setTimeout}.
   *
   * @param wire default: plain text
   */
  constructor(fd: number, deadlineMs: number, wire: Wire = plainWire(fd)) {
    this.fd = fd;
    this.deadlineMs = deadlineMs;
    this.#wire = wire;
  }

  /** Fills `length` bytes from `start` on. @throws ConnectionLost */
  read(bytes: Uint8Array, start: number, length: number): void {
    const end = start + length;
    for (let at = start; at < end; ) {
      this.#checkTime();
      const got = this.#attempt(() => this.#wire.receive(bytes, at, end - at));
      if (got === undefined) continue;
      if (got === 0) throw new ConnectionLost('the server has closed the connection');
      at += got;
    }
  }

  /** Sends `length` bytes from `start` on. @throws ConnectionLost */
  write(bytes: Uint8Array, start: number, length: number): void {
    const end = start + length;
    for (let at = start; at < end; ) {
      at += this.#attempt(() => this.#wire.send(bytes, at, end - at));
      if (at < end) this.#checkTime();
    }
  }

  #attempt<T>(call: () => T): T {
    for (;;) {
      try {
        return call();
      } catch (error) {
        const code = error instanceof Error && 'code' in error ? error.code : undefined;
        if (code === 'EINTR') continue;
        if (code === 'EAGAIN') throw late();
        const reason = error instanceof Error ? error.message : String(error);
        throw new ConnectionLost(`the connection was lost (${reason})`, { cause: error });
      }
    }
  }

  /** @throws ConnectionLost when the deadline is over */
  #checkTime(): void {
    if (performance.now() > this.deadlineMs) throw late();
  }
}

function late(): ConnectionLost {
  return new ConnectionLost('the server takes too long to answer');
}
