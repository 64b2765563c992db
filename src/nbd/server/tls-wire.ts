import type { Arena } from '../../kernels/arena.js';
import { lock, tryLock, unlock } from '../../kernels/futex.js';
import { type OpenSsl, TLS_NEEDS_INPUT, TLS_NEEDS_ROOM, type TlsChannel } from '../../os/openssl.js';
import type { ServerSockets } from '../../os/server-sockets.js';
import type { Sockets } from '../../os/sockets.js';
import { receiveInput, sendOutNow } from '../../os/tls-channel.js';
import type { ConnectionState } from './state.js';
import { receiveUntil, type Wire } from './wire.js';

/**
 * With TLS. The channel is used under a lock of its own, for as long as it takes to encrypt or to decrypt; threads wait
 * for the socket outside of it. What is to be sent only the holder of the lock for sending takes out, what has come only
 * that of the lock for receiving puts in.
 */
export class TlsWire implements Wire {
  readonly takesFiles = false;
  readonly #arena: Arena;
  readonly #sockets: Sockets & ServerSockets;
  readonly #memory: number;
  readonly #state: ConnectionState;
  readonly #fd: number;
  readonly #tls: OpenSsl;
  readonly #channel: TlsChannel;

  /** @param memory address of the arena */
  constructor(
    arena: Arena,
    sockets: Sockets & ServerSockets,
    memory: number,
    state: ConnectionState,
    tls: OpenSsl,
    channel: TlsChannel,
  ) {
    this.#arena = arena;
    this.#sockets = sockets;
    this.#memory = memory;
    this.#state = state;
    this.#fd = state.fd;
    this.#tls = tls;
    this.#channel = channel;
  }

  receive(pointer: number, most: number): number | undefined {
    return this.#receive(pointer, most, 0);
  }

  receiveAll(pointer: number, length: number): number | undefined {
    let done = 0;
    while (done < length) {
      const got = this.#receive(pointer + done, length - done, length - done);
      if (got === undefined) return done > 0 ? done : undefined;
      if (got === 0) break;
      done += got;
    }
    return done;
  }

  lookOut(pointer: number, most: number, until: number): number {
    for (;;) {
      const got = this.#locked(() => this.#tls.readTo(this.#channel, this.#memory + pointer, most));
      // What else is to be done, receiving does.
      if (got !== TLS_NEEDS_INPUT) return got;
      const { address, length } = this.#tls.input(this.#channel);
      const came = receiveUntil(this.#sockets, this.#fd, address, length, until);
      if (came <= 0) return came;
      this.#put(came);
    }
  }

  /** @param toCome so much data at least the client still has to send, or is sending */
  #receive(pointer: number, most: number, toCome: number): number | undefined {
    for (;;) {
      const got = this.#decrypt(pointer, most);
      if (got >= 0) return got;
      const came = receiveInput(this.#tls, this.#channel, this.#sockets, this.#fd, toCome);
      if (came === undefined) return undefined;
      if (came === 0) return this.#end();
      this.#put(came);
    }
  }

  send(pointer: number, length: number): number {
    for (;;) {
      const taken = this.#locked(() => this.#tls.writeFrom(this.#channel, this.#memory + pointer, length));
      this.#sendOut();
      if (taken === length) return length;
      if (taken !== TLS_NEEDS_ROOM)
        throw new Error('a client may not make us wait for it in the middle of an answer');
    }
  }

  /** @returns 0 at the end, {@link TLS_NEEDS_INPUT} */
  #decrypt(pointer: number, most: number): number {
    for (;;) {
      let got = TLS_NEEDS_INPUT;
      try {
        got = this.#locked(() => this.#tls.readTo(this.#channel, this.#memory + pointer, most));
      } finally {
        // It may have an answer to something else than data: whoever sends takes it along.
        if (got <= 0 && tryLock(this.#arena, this.#state.sending)) {
          try {
            this.#sendOutNow();
          } finally {
            unlock(this.#arena, this.#state.sending);
          }
        }
      }
      if (got !== TLS_NEEDS_ROOM) return got;
      lock(this.#arena, this.#state.sending);
      try {
        this.#sendOut();
      } finally {
        unlock(this.#arena, this.#state.sending);
      }
    }
  }

  /** The client says nothing more, without having said so: no harm in between two requests, where all of them was told. */
  #end(): number {
    if (this.#locked(() => this.#tls.hasPending(this.#channel)))
      throw new Error('the rest of a record is missing');
    return 0;
  }

  #put(bytes: number): void {
    this.#locked(() => this.#tls.putIn(this.#channel, bytes));
  }

  /** Sends all that there is to send. */
  #sendOut(): void {
    for (;;) {
      const { address, length } = this.#locked(() => this.#tls.output(this.#channel));
      if (length === 0) return;
      const sent = this.#sockets.sendFrom(this.#fd, address, length, false);
      this.#locked(() => this.#tls.tookOut(this.#channel, sent));
    }
  }

  /** Sends what is taken at once. */
  #sendOutNow(): void {
    this.#locked(() => sendOutNow(this.#tls, this.#channel, this.#sockets, this.#fd));
  }

  #locked<T>(body: () => T): T {
    lock(this.#arena, this.#state.tls);
    try {
      return body();
    } finally {
      unlock(this.#arena, this.#state.tls);
    }
  }
}
