import { readSync, writeSync } from 'node:fs';
import type { Arena } from '../../kernels/arena.js';
import { lock, unlock } from '../../kernels/futex.js';
import type { ServerSockets } from '../../os/server-sockets.js';
import type { Sockets } from '../../os/sockets.js';
import { type ConnectionState, RECEIVE_BYTES } from './state.js';

/** The client is gone. */
export class ClientLost extends Error {}

/** Longest time for which a thread waits for the next request before it leaves the connection to the poller. */
export const IDLE_MS = 100;
/** Requests with less data than this are read ahead. */
const AHEAD_BYTES = 16 * 1024;

/** What a thread has of one connection: blocking reads and writes between its socket and the arena. */
export class ClientSocket {
  readonly state: ConnectionState;
  readonly fd: number;
  readonly #arena: Arena;
  readonly #sockets: Sockets & ServerSockets;
  readonly #memory: number;

  constructor(arena: Arena, sockets: Sockets & ServerSockets, memory: number, state: ConnectionState) {
    this.state = state;
    this.fd = state.fd;
    this.#arena = arena;
    this.#sockets = sockets;
    this.#memory = memory;
  }

  /** Ends the connection at once, for all threads. */
  abort(): void {
    this.state.leave();
    this.#sockets.shutdown(this.fd);
  }

  /** Bytes that were read ahead. */
  get available(): number {
    return this.state.end - this.state.begin;
  }

  /**
   * Reads ahead until there are `bytes`. Whoever calls has the lock for receiving, as for everything that reads.
   *
   * @returns `idle` where nothing at all came for a while, `end` where the client says that nothing more will come
   * @throws ClientLost in the middle of a request
   */
  fill(bytes: number): 'ready' | 'idle' | 'end' {
    const { state } = this;
    let { begin, end } = state;
    if (end - begin >= bytes) return 'ready';
    const { buffer } = state;
    if (begin > 0) {
      this.#arena.u8.copyWithin(buffer, buffer + begin, buffer + end);
      end -= begin;
      begin = 0;
      state.setRange(begin, end);
    }
    while (end < bytes) {
      const most = state.readsAhead ? RECEIVE_BYTES - end : bytes - end;
      const got = this.#attempt(() => readSync(this.fd, this.#arena.u8, buffer + end, most, null));
      if (got === undefined) {
        if (end === 0) return 'idle';
        continue;
      }
      if (got === 0) {
        if (end === 0) return 'end';
        throw new ClientLost('the client went away in the middle of a request');
      }
      end += got;
      state.setRange(begin, end);
    }
    return 'ready';
  }

  /** Arena pointer of the next bytes that were read ahead, which are used up. */
  consume(bytes: number): number {
    const { state } = this;
    const at = state.buffer + state.begin;
    state.setRange(state.begin + bytes, state.end);
    return at;
  }

  /** Whether the data of a request is best read ahead with other requests. */
  fits(bytes: number): boolean {
    this.state.readsAhead = bytes <= AHEAD_BYTES;
    return bytes <= AHEAD_BYTES;
  }

  /** Reads data to another place of the arena. @throws ClientLost */
  readTo(pointer: number, length: number): void {
    const ahead = Math.min(this.available, length);
    if (ahead > 0) {
      const from = this.consume(ahead);
      this.#arena.u8.copyWithin(pointer, from, from + ahead);
    }
    for (let done = ahead; done < length; ) {
      const at = this.#memory + pointer + done;
      const got = this.#attempt(() => this.#sockets.receiveAll(this.fd, at, length - done));
      if (got === 0) throw new ClientLost('the client went away in the middle of its data');
      done += got ?? 0;
    }
  }

  /** Reads data and forgets it. @param scratch memory for it @throws ClientLost */
  skip(length: number, scratch: number, scratchBytes: number): void {
    for (let done = 0; done < length; ) {
      const bytes = Math.min(length - done, scratchBytes);
      this.readTo(scratch, bytes);
      done += bytes;
    }
  }

  /** Sends an answer, or a part of one that may stand for itself. @throws ClientLost */
  send(pointer: number, length: number): void {
    this.sending(() => this.write(pointer, length));
  }

  /** Runs `body` while nobody else sends. */
  sending(body: () => void): void {
    lock(this.#arena, this.state.sending);
    try {
      body();
    } finally {
      unlock(this.#arena, this.state.sending);
    }
  }

  /** Within {@link sending}. @throws ClientLost */
  write(pointer: number, length: number): void {
    for (let done = 0; done < length; ) {
      done +=
        this.#attempt(() => writeSync(this.fd, this.#arena.u8, pointer + done, length - done, null)) ?? 0;
    }
  }

  /** Undefined after the time-out. */
  #attempt(call: () => number | undefined): number | undefined {
    for (;;) {
      try {
        return call();
      } catch (error) {
        const code = error instanceof Error && 'code' in error ? error.code : undefined;
        if (code === 'EAGAIN') return undefined;
        if (code !== 'EINTR') throw new ClientLost('the connection was lost', { cause: error });
      }
    }
  }
}
