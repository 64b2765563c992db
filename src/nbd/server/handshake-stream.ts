import type { OpenSsl, TlsChannel } from '../../os/openssl.js';
import { TLS_NEEDS_INPUT, TLS_NEEDS_ROOM } from '../../os/openssl.js';
import type { ServerSockets } from '../../os/server-sockets.js';
import type { Sockets } from '../../os/sockets.js';
import { closeChannel, sendOutNow } from '../../os/tls-channel.js';

/** Reads or records of a client before others get their turn. */
const READS_AT_ONCE = 64;

/** What is said during a handshake, without ever waiting; failures are thrown. */
export interface HandshakeStream {
  /** Undefined: plain text. */
  readonly channel: TlsChannel | undefined;
  /** Something has come that nobody has read, and the socket will not tell of it. */
  readonly hasPending: boolean;
  /** What the socket has to be watched for where {@link receive} has nothing. */
  readonly waitsFor: 'readable' | 'writable';
  /** @returns the bytes read, 0 at the end, undefined where there is nothing yet */
  receive(bytes: Uint8Array): number | undefined;
  /** @returns the bytes taken; the rest goes on with the next call, once the socket can be written to */
  send(bytes: Uint8Array): number;
  /** Closes the socket. */
  close(): void;
}

export class PlainHandshakeStream implements HandshakeStream {
  readonly channel = undefined;
  readonly hasPending = false;
  readonly waitsFor = 'readable';
  readonly #sockets: Sockets & ServerSockets;
  readonly #fd: number;

  constructor(sockets: Sockets & ServerSockets, fd: number) {
    this.#sockets = sockets;
    this.#fd = fd;
  }

  receive(bytes: Uint8Array): number | undefined {
    return this.#sockets.receive(this.#fd, bytes);
  }

  send(bytes: Uint8Array): number {
    return this.#sockets.send(this.#fd, bytes);
  }

  close(): void {
    this.#sockets.close(this.#fd);
  }
}

/** The handshake of TLS takes place within the first {@link receive}s. */
export class TlsHandshakeStream implements HandshakeStream {
  readonly channel: TlsChannel;
  waitsFor: 'readable' | 'writable' = 'readable';
  readonly #tls: OpenSsl;
  readonly #sockets: Sockets & ServerSockets;
  readonly #fd: number;
  /** All that was to be sent is encrypted, but not all of it is sent. */
  #encrypted = false;

  constructor(tls: OpenSsl, context: number, sockets: Sockets & ServerSockets, fd: number) {
    this.#tls = tls;
    this.#sockets = sockets;
    this.#fd = fd;
    this.channel = tls.open(context);
  }

  get hasPending(): boolean {
    return this.#tls.hasPending(this.channel);
  }

  receive(bytes: Uint8Array): number | undefined {
    for (let reads = 0; reads < READS_AT_ONCE; reads++) {
      const got = this.#read(bytes);
      if (got >= 0) return got;
      if (!this.#sendOut()) return this.#waitFor('writable');
      if (got !== TLS_NEEDS_INPUT) continue;
      const { address, length } = this.#tls.input(this.channel);
      const came = this.#sockets.receiveTo(this.#fd, address, length, false);
      if (came === undefined) return this.#waitFor('readable');
      if (came === 0) return 0;
      this.#tls.putIn(this.channel, came);
    }
    // It can be written to at once as a rule, and then there is more to read.
    return this.#waitFor('writable');
  }

  send(bytes: Uint8Array): number {
    while (!this.#encrypted) {
      const taken = this.#tls.write(this.channel, bytes);
      if (taken === bytes.length) this.#encrypted = true;
      else if (taken !== TLS_NEEDS_ROOM) throw new Error('a client in the middle of a handshake of TLS');
      else if (!this.#sendOut()) return 0;
    }
    if (!this.#sendOut()) return 0;
    this.#encrypted = false;
    return bytes.length;
  }

  close(): void {
    closeChannel(this.#tls, this.channel, this.#sockets, this.#fd);
    this.#sockets.close(this.#fd);
  }

  #read(bytes: Uint8Array): number {
    try {
      return this.#tls.read(this.channel, bytes);
    } catch (error) {
      // The client is told what is wrong.
      this.#sendOut();
      throw error;
    }
  }

  #sendOut(): boolean {
    return sendOutNow(this.#tls, this.channel, this.#sockets, this.#fd);
  }

  #waitFor(what: 'readable' | 'writable'): undefined {
    this.waitsFor = what;
    return undefined;
  }
}
