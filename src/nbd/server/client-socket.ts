import { availableParallelism } from 'node:os';
import type { Arena } from '../../kernels/arena.js';
import { lock, unlock } from '../../kernels/futex.js';
import { requireOpenSsl } from '../../os/openssl.js';
import type { ServerSockets } from '../../os/server-sockets.js';
import type { Sockets } from '../../os/sockets.js';
import type { FilePipe } from './file-pipe.js';
import { type ConnectionState, RECEIVE_BYTES } from './state.js';
import { TlsWire } from './tls-wire.js';
import { PlainWire, type Wire } from './wire.js';

/** The client is gone. */
export class ClientLost extends Error {}

/** Longest time for which a thread waits for the next request before it leaves the connection to the poller. */
export const IDLE_MS = 100;
/** Requests with less data than this are read ahead. */
const AHEAD_BYTES = 16 * 1024;

/**
 * Of so much data the client sends parts as they are taken, one after the other. Where few connections are at work, looking
 * out for each part spares the client from waking us for each of them; where many are, somebody always has something to
 * do, and a call that waits for all of them takes less processor time.
 */
const BULK_BYTES = 64 * 1024;
/** Threads that may be at work when a large payload is looked out for: each has a client that wants a processor. */
const MOST_FOR_BULK = Math.max(1, Math.floor(availableParallelism() / 2));

/** How long a thread looks out for bytes before it sleeps, in milliseconds. */
const LOOK_OUT_MS = 0.05;
/** Threads that may look out at once: somebody has to make the bytes. */
const MOST_LOOK_OUT = Math.max(0, availableParallelism() - 1);
/** Requests that have to come one by one before it is tried: where several come together, sleeping costs little. */
const SINGLE_REQUESTS = 8;
/** After how many vain attempts, as a power of two, the pauses between them grow no more. */
const MAX_PAUSE_BITS = 10;

/** Experience with looking out for bytes: what is of no use is tried less and less often. */
class LookOut {
  #failures = 0;
  #pause = 0;

  get worthwhile(): boolean {
    if (this.#pause === 0) return true;
    this.#pause--;
    return false;
  }

  learn(useful: boolean): void {
    this.#failures = useful ? 0 : Math.min(this.#failures + 1, MAX_PAUSE_BITS);
    this.#pause = useful ? 0 : 2 ** this.#failures;
  }
}

/** What a thread has of one connection: blocking reads and writes between its socket and the arena. */
export class ClientSocket {
  readonly state: ConnectionState;
  readonly fd: number;
  readonly #arena: Arena;
  readonly #sockets: Sockets & ServerSockets;
  readonly #wire: Wire;
  readonly #forRequest = new LookOut();
  readonly #forRest = new LookOut();
  /** Requests before which nothing was read ahead, one after the other. */
  #singles = 0;

  constructor(arena: Arena, sockets: Sockets & ServerSockets, memory: number, state: ConnectionState) {
    this.state = state;
    this.fd = state.fd;
    this.#arena = arena;
    this.#sockets = sockets;
    this.#wire = wireOf(arena, sockets, memory, state);
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
  fill(bytes: number, what: 'request' | 'data'): 'ready' | 'idle' | 'end' {
    const { state } = this;
    let { begin, end } = state;
    const wanted = end - begin < bytes;
    if (what === 'request') this.#singles = wanted ? this.#singles + 1 : 0;
    if (!wanted) return 'ready';
    const { buffer } = state;
    if (begin > 0) {
      this.#arena.u8.copyWithin(buffer, buffer + begin, buffer + end);
      end -= begin;
      begin = 0;
      state.setRange(begin, end);
    }
    while (end < bytes) {
      const most = state.readsAhead ? RECEIVE_BYTES - end : bytes - end;
      const got =
        this.#lookOut(buffer + end, most, what === 'data' || end > 0) ??
        this.#attempt(() => this.#wire.receive(buffer + end, most));
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
      const left = length - done;
      const looksOut = left < BULK_BYTES || this.state.busyThreads <= MOST_FOR_BULK;
      const got =
        (looksOut ? this.#lookOut(pointer + done, left, true) : undefined) ??
        this.#attempt(() => this.#wire.receiveAll(pointer + done, left));
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

  /** Runs `body` while nobody else sends. */
  sending(body: () => void): void {
    lock(this.#arena, this.state.sending);
    try {
      body();
    } finally {
      unlock(this.#arena, this.state.sending);
    }
  }

  /** Whether {@link writeWithFile} can be used. */
  get takesFiles(): boolean {
    return this.#wire.takesFiles;
  }

  /** Within {@link sending}: sends the beginning of an answer, and what is in the pipe behind it. @throws ClientLost */
  writeWithFile(pointer: number, length: number, pipe: FilePipe, pipeBytes: number): void {
    for (let done = 0; done < length; ) {
      done += this.#attempt(() => this.#wire.send(pointer + done, length - done, true)) ?? 0;
    }
    for (let done = 0; done < pipeBytes; ) {
      done += this.#attempt(() => pipe.drain(this.fd, pipeBytes - done)) ?? 0;
    }
  }

  /** Within {@link sending}. @throws ClientLost */
  write(pointer: number, length: number): void {
    for (let done = 0; done < length; ) {
      done += this.#attempt(() => this.#wire.send(pointer + done, length - done, false)) ?? 0;
    }
  }

  /**
   * Looks for bytes again and again before the thread is put to sleep: with a processor to spare that takes far less time
   * than being woken. Whether it is of any use, experience says.
   *
   * @returns undefined where nothing came, or it is not worth trying
   */
  #lookOut(pointer: number, most: number, rest: boolean): number | undefined {
    const lookOut = rest ? this.#forRest : this.#forRequest;
    if (!rest && this.#singles <= SINGLE_REQUESTS) return undefined;
    if (!lookOut.worthwhile || !this.state.beginLookOut(MOST_LOOK_OUT)) return undefined;
    let got = 0;
    try {
      const until = performance.now() + LOOK_OUT_MS;
      got = this.#attempt(() => this.#wire.lookOut(pointer, most, until)) ?? 0;
    } finally {
      this.state.endLookOut();
    }
    lookOut.learn(got > 0);
    // The end, and what goes wrong, is for the call that waits to tell.
    return got > 0 ? got : undefined;
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

function wireOf(
  arena: Arena,
  sockets: Sockets & ServerSockets,
  memory: number,
  state: ConnectionState,
): Wire {
  const { channel } = state;
  if (channel === undefined) return new PlainWire(arena, sockets, memory, state.fd);
  return new TlsWire(arena, sockets, memory, state, requireOpenSsl(), channel);
}
