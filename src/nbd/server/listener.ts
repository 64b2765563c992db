import type { ServerSockets } from '../../os/server-sockets.js';
import type { Sockets } from '../../os/sockets.js';
import { ServerHandshake, type Step } from '../protocol/server-handshake.js';
import { IDLE_MS } from './client-socket.js';
import { type HandshakeStream, PlainHandshakeStream, TlsHandshakeStream } from './handshake-stream.js';
import { type ConnectionState, PHASE_OF, type ServerState } from './state.js';
import type { TlsHandshakes } from './tls.js';

/** Most steps of one handshake before others get their turn. */
const STEPS_AT_ONCE = 64;
/** How long nobody is let in after the process ran out of descriptors or memory, in milliseconds. */
const PAUSE_MS = 100;

const WAKE_TAG = 0;
const LISTENER_TAG = 0x10000;
const HANDSHAKE_TAG = 0x20000000;
const CONNECTION_TAG = 0x40000000;

/** The poller's tag of a connection that is parked there. */
export function tagOf({ index }: { readonly index: number }): number {
  return CONNECTION_TAG + index;
}

export interface ListenerContext {
  readonly state: ServerState;
  readonly sockets: Sockets & ServerSockets;
  readonly poller: number;
  /** Becomes readable when something has changed. */
  readonly wake: number;
  readonly listeners: readonly number[];
  /** Connections that were made by others. */
  readonly connected: readonly number[];
  /** Clients speak TLS; undefined: nobody does. */
  readonly tls: TlsHandshakes | undefined;
  /** How long a client may take until it has chosen an export. */
  readonly handshakeMs: number;
  /** There is more work than there are threads. */
  readonly more: () => void;
  /** The listening sockets are not used any more, once the server is closing. */
  readonly stoppedListening: () => void;
  /** There are no clients, and nobody can come in any more. */
  readonly finished: () => void;
}

/** A client that has not chosen an export yet. */
interface Newcomer {
  readonly id: number;
  readonly fd: number;
  stream: HandshakeStream;
  readonly handshake: ServerHandshake;
  readonly deadlineMs: number;
  /** What came of the bytes that are wanted. */
  bytes: Uint8Array;
  have: number;
  /** What is still to be sent, and what comes then. */
  unsent: Uint8Array[];
  after: Step | undefined;
  /** Its place among the connections, from when it has chosen an export. */
  connection: ConnectionState | undefined;
}

/**
 * The thread that lets clients in: accepts, agrees on an export with each, and waits for all those that have nothing to
 * say at the moment. It never blocks on one of them.
 */
export class Listener {
  readonly #context: ListenerContext;
  readonly #newcomers = new Map<number, Newcomer>();
  #nextId = 0;
  #accepting = false;
  #isDoorClosed = false;
  #pausedUntilMs = 0;

  constructor(context: ListenerContext) {
    this.#context = context;
  }

  /** Returns when the server is gone. */
  run(): void {
    const { state, sockets, poller, wake, connected, finished } = this.#context;
    sockets.watch(poller, wake, WAKE_TAG, false);
    for (const fd of connected) this.#greet(fd);
    for (;;) {
      const { phase } = state;
      if (phase === PHASE_OF.gone) break;
      if (phase === PHASE_OF.closing) this.#closeDoor();
      else this.#setAccepting(this.#room > 0 && performance.now() >= this.#pausedUntilMs);
      for (const tag of sockets.wait(poller, this.#timeout())) this.#event(tag);
      this.#dropLate();
      if (this.#finished) finished();
    }
    for (const newcomer of [...this.#newcomers.values()]) this.#drop(newcomer);
  }

  get #finished(): boolean {
    return (
      this.#context.listeners.length === 0 && this.#newcomers.size === 0 && this.#context.state.open === 0
    );
  }

  /** Clients that may still come in. */
  get #room(): number {
    const { state } = this.#context;
    return state.maxConnections - state.open - this.#newcomers.size;
  }

  /** Watches the listening sockets, or does not: whoever has to wait does so in their queues. */
  #setAccepting(accepting: boolean): void {
    const { sockets, poller, listeners } = this.#context;
    if (this.#accepting === accepting) return;
    this.#accepting = accepting;
    for (const [index, fd] of listeners.entries()) {
      if (accepting) sockets.watch(poller, fd, LISTENER_TAG + index, false);
      else sockets.unwatch(poller, fd);
    }
  }

  /** Nobody is let in any more, and those in the door have to go. */
  #closeDoor(): void {
    this.#setAccepting(false);
    if (!this.#isDoorClosed) this.#context.stoppedListening();
    this.#isDoorClosed = true;
    for (const newcomer of [...this.#newcomers.values()]) {
      // In the middle of something there is still an answer for: it is told by the rules of the handshake.
      if (newcomer.have === 0) this.#drop(newcomer);
    }
  }

  #timeout(): number {
    const now = performance.now();
    let until = this.#pausedUntilMs > now ? this.#pausedUntilMs : Number.POSITIVE_INFINITY;
    for (const { deadlineMs } of this.#newcomers.values()) until = Math.min(until, deadlineMs);
    return until === Number.POSITIVE_INFINITY ? -1 : Math.max(0, until - now);
  }

  #dropLate(): void {
    const now = performance.now();
    for (const newcomer of [...this.#newcomers.values()])
      if (newcomer.deadlineMs <= now) this.#drop(newcomer);
  }

  #event(tag: number): void {
    const { state, sockets, wake, more } = this.#context;
    if (tag === WAKE_TAG) {
      const bytes = new Uint8Array(64);
      while ((sockets.receive(wake, bytes) ?? 0) > 0);
    } else if (tag >= CONNECTION_TAG) {
      if (state.enqueue(state.connection(tag - CONNECTION_TAG), false)) more();
    } else if (tag >= HANDSHAKE_TAG) {
      const newcomer = this.#newcomers.get(tag - HANDSHAKE_TAG);
      if (newcomer !== undefined) this.#guard(newcomer, () => this.#goOn(newcomer));
    } else this.#accept(tag - LISTENER_TAG);
  }

  #accept(index: number): void {
    const { sockets, listeners } = this.#context;
    const listener = listeners[index];
    while (listener !== undefined && this.#room > 0) {
      let fd: number | undefined;
      try {
        fd = sockets.accept(listener);
      } catch {
        this.#pausedUntilMs = performance.now() + PAUSE_MS;
        return;
      }
      if (fd === undefined) return;
      this.#greet(fd);
    }
  }

  #greet(fd: number): void {
    const { state, sockets, poller, tls, handshakeMs } = this.#context;
    const id = this.#nextId++ % (CONNECTION_TAG - HANDSHAKE_TAG);
    const handshake = new ServerHandshake({
      offers: () => state.exports.flatMap((exported) => exported?.offer ?? []),
      tls: tls === undefined ? 'none' : 'required',
      closing: () => state.phase !== PHASE_OF.serving,
      single: state.maxConnections === 1,
    });
    const newcomer: Newcomer = {
      id,
      fd,
      stream: new PlainHandshakeStream(sockets, fd),
      handshake,
      deadlineMs: performance.now() + handshakeMs,
      bytes: new Uint8Array(handshake.wanted),
      have: 0,
      unsent: [ServerHandshake.greeting()],
      after: undefined,
      connection: undefined,
    };
    this.#newcomers.set(id, newcomer);
    this.#guard(newcomer, () => {
      sockets.watch(poller, fd, HANDSHAKE_TAG + id, true);
      this.#goOn(newcomer);
    });
  }

  /** Nothing that goes wrong with one client is anybody else's business. */
  #guard(newcomer: Newcomer, body: () => void): void {
    try {
      body();
    } catch {
      this.#drop(newcomer);
    }
  }

  #drop({ id, stream, connection }: Newcomer): void {
    if (!this.#newcomers.delete(id)) return;
    if (connection !== undefined) this.#context.state.cancelConnection(connection);
    stream.close();
  }

  /** Sends and reads as far as that goes without waiting. */
  #goOn(newcomer: Newcomer): void {
    const { sockets, poller } = this.#context;
    for (let steps = 0; steps < STEPS_AT_ONCE; steps++) {
      if (!this.#sendRest(newcomer)) {
        sockets.rewatch(poller, newcomer.fd, HANDSHAKE_TAG + newcomer.id, 'writable');
        return;
      }
      if (newcomer.after !== undefined && !this.#follow(newcomer, newcomer.after)) return;
      newcomer.after = undefined;
      if (newcomer.have === 0 && newcomer.bytes.length !== newcomer.handshake.wanted) {
        newcomer.bytes = new Uint8Array(newcomer.handshake.wanted);
      }
      const got = newcomer.stream.receive(newcomer.bytes.subarray(newcomer.have));
      if (got === 0) {
        this.#drop(newcomer);
        return;
      }
      if (got === undefined) {
        const { waitsFor } = newcomer.stream;
        sockets.rewatch(poller, newcomer.fd, HANDSHAKE_TAG + newcomer.id, waitsFor);
        return;
      }
      newcomer.have += got;
      if (newcomer.have < newcomer.bytes.length) continue;
      newcomer.have = 0;
      newcomer.after = newcomer.handshake.take(newcomer.bytes);
      if (!this.#place(newcomer, newcomer.after)) {
        this.#drop(newcomer);
        return;
      }
      newcomer.unsent.push(...newcomer.after.send);
    }
    // What has come already the socket does not tell of, but it can be written to as a rule.
    const what = newcomer.stream.hasPending ? 'writable' : 'readable';
    sockets.rewatch(poller, newcomer.fd, HANDSHAKE_TAG + newcomer.id, what);
  }

  /**
   * Gives a client that has chosen an export its place: before it is told, so that it uses the export once it knows.
   *
   * @returns false where there is none
   */
  #place(newcomer: Newcomer, step: Step): boolean {
    if (step.next !== 'transmission') return true;
    const { state } = this.#context;
    const { agreement } = step;
    const index = state.exportIndex(agreement.offer.name);
    if (index < 0) return false;
    newcomer.connection = state.openConnection(newcomer.fd, index, agreement, newcomer.stream.channel);
    return newcomer.connection !== undefined;
  }

  /** @returns whether everything was taken */
  #sendRest(newcomer: Newcomer): boolean {
    if (newcomer.unsent.length === 0) return true;
    const all = newcomer.unsent.length === 1 ? newcomer.unsent[0] : Buffer.concat(newcomer.unsent);
    if (all === undefined || all.length === 0) {
      newcomer.unsent = [];
      return true;
    }
    const sent = newcomer.stream.send(all);
    newcomer.unsent = sent === all.length ? [] : [all.subarray(sent)];
    return newcomer.unsent.length === 0;
  }

  /** Does what comes after an answer. @returns false where the handshake is over */
  #follow(newcomer: Newcomer, step: Step): boolean {
    const { sockets, tls } = this.#context;
    switch (step.next) {
      case 'continue':
        return true;
      case 'close':
        this.#drop(newcomer);
        return false;
      case 'start-tls':
        if (tls === undefined) throw new Error('invariant: TLS starts only where it can');
        newcomer.stream = new TlsHandshakeStream(tls.openSsl, tls.context, sockets, newcomer.fd);
        newcomer.handshake.secured();
        return true;
      case 'transmission':
        this.#admit(newcomer);
        return false;
    }
  }

  #admit({ id, fd, stream, connection }: Newcomer): void {
    const { state, sockets, poller, more } = this.#context;
    if (connection === undefined) throw new Error('invariant: who has chosen an export has a place');
    sockets.setReceiveTimeout(fd, IDLE_MS);
    this.#newcomers.delete(id);
    // Its first request may have come with the rest of the handshake, and the socket does not tell of that any more.
    if (!stream.hasPending) sockets.rewatch(poller, fd, tagOf(connection), 'readable');
    else if (state.enqueue(connection, false)) more();
  }
}
