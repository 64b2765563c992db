import { StillframeError } from '../../errors.js';
import type { Arena } from '../../kernels/arena.js';
import { advance, load, store, waitWhile, withLock } from '../../kernels/futex.js';
import { EXPORT } from '../../nbd/protocol/numbers.js';
import { requireOpenSsl, type TlsChannel, TlsError } from '../../os/openssl.js';
import { type SocketAddress, type Sockets, sockets } from '../../os/sockets.js';
import { loadChannel, storeChannel } from '../../os/tls-channel.js';
import {
  CHANNEL,
  CONTEXTS,
  CONTROL_BYTES,
  COOKIE,
  EDGE_LOCK,
  FD,
  FD_LOCK,
  FLUSHED,
  HEADERS_AT,
  INTERRUPTED,
  LEAVING,
  LIMIT,
  LOST,
  MAX_CONNECTIONS,
  MUTATIONS,
  OPEN,
  OWNER,
  READY,
  SEQUENCE,
  SLOT_BYTES,
  SLOTS,
  STATE,
  WRITTEN,
} from './control.js';
import { connectionError, refusedError, untrustedError } from './errors.js';
import { negotiate, type Session } from './handshake.js';
import { currentOwner } from './owner.js';
import { ConnectionLost, SocketStream, TlsWire } from './stream.js';
import { startTls } from './tls.js';
import type { NbdTarget } from './uri.js';

/** States of a slot: nothing in it; waiting to be taken; taken. */
const FREE = 0;
const IDLE = 1;
const TAKEN = 2;

const HEADERS = ['simple', 'structured', 'extended'] as const;

/** How long the handshake may take in milliseconds; that of a connection beside others is given up sooner. */
const HANDSHAKE_MS = 30_000;
const FURTHER_MS = 5_000;
/**
 * How long the server may take for each answer in milliseconds once the export is being closed: what it was asked for it
 * can do without us, and whoever waits has other files to close.
 */
const LEAVING_MS = 5_000;
/** Pause between two attempts to connect, in milliseconds. */
const RETRY_MS = 100;

/** A connection that a thread has for itself. */
export interface Taken {
  readonly slot: number;
  readonly stream: SocketStream;
  readonly headers: Session['headers'];
}

/** What all connections to an export have in common. */
export interface Export {
  readonly path: string;
  readonly target: NbdTarget;
  /** What the first connection found; undefined while it is being made. */
  readonly agreed: Pick<Session, 'length' | 'minBlock' | 'maxBlock' | 'flags'> | undefined;
  /** Names of the contexts, by the place that a slot has for their numbers. */
  readonly contexts: readonly string[];
  readonly control: number;
}

function socketsFor(path: string): Sockets {
  const calls = sockets();
  if (calls !== undefined) return calls;
  throw new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `'${path}': NBD needs the system calls of Linux, which are not there on this platform (or left out by STILLFRAME_NO_FFI)`,
  );
}

/** Takes memory for connections. @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE, …_ARENA_EXHAUSTED */
export function allocateConnections(arena: Arena, path: string): number {
  socketsFor(path);
  const control = arena.alloc(CONTROL_BYTES, `connections of '${path}'`);
  for (let index = 0; index < MAX_CONNECTIONS; index++)
    store(arena, control + SLOTS + index * SLOT_BYTES + FD, -1);
  store(arena, control + LIMIT, 1);
  return control;
}

/** One thread's view of the connections to an export. */
export class Connections {
  readonly #arena: Arena;
  readonly #export: Export;
  readonly #control: number;
  readonly #sockets: Sockets;

  constructor(arena: Arena, nbdExport: Export) {
    this.#arena = arena;
    this.#export = nbdExport;
    this.#control = nbdExport.control;
    this.#sockets = socketsFor(nbdExport.path);
  }

  /** Makes the first connection. @returns what was agreed on */
  open(): Session {
    const { target } = this.#export;
    this.#store(OPEN, 1);
    const session = this.#connectUntil(0, performance.now() + target.openTimeoutMs);
    const several = (session.flags & EXPORT.multiConn) !== 0;
    this.#store(LIMIT, several ? target.connections : 1);
    store(this.#arena, this.#slot(0) + STATE, IDLE);
    return session;
  }

  /**
   * A connection for this thread alone; waits for one where all are taken.
   *
   * @param reconnectUntilMs how long a server that does not answer is asked again, as of `performance.now()`
   * @throws StillframeError ERR_STILLFRAME_NBD_CONNECTION and what making a connection throws
   */
  take(reconnectUntilMs: number): Taken {
    for (;;) {
      this.checkInterrupted();
      const sequence = this.#load(SEQUENCE);
      const slot = withLock(this.#arena, this.#control, () => this.#claim());
      if (slot === undefined) {
        waitWhile(this.#arena, this.#control + SEQUENCE, sequence, 1000);
        continue;
      }
      const at = this.#slot(slot);
      const untilMs = this.#load(LEAVING) === 0 ? reconnectUntilMs : 0;
      if (load(this.#arena, at + FD) < 0 && !this.#connect(slot, untilMs)) continue;
      const fd = load(this.#arena, at + FD);
      if (this.#load(LEAVING) !== 0) this.#sockets.setTimeout(fd, this.timeoutMs);
      return {
        slot,
        stream: new SocketStream(fd, 0, this.#wire(slot, fd)),
        headers: HEADERS[load(this.#arena, at + HEADERS_AT)] ?? 'simple',
      };
    }
  }

  /** How long the server may take for an answer, in milliseconds. */
  get timeoutMs(): number {
    const { timeoutMs } = this.#export.target;
    return this.#load(LEAVING) === 0 ? timeoutMs : Math.min(timeoutMs, LEAVING_MS);
  }

  /** A slot that is this thread's from now on, with a connection in it or not; under the lock. */
  #claim(): number | undefined {
    const { i32 } = this.#arena;
    let free: number | undefined;
    for (let index = 0; index < MAX_CONNECTIONS; index++) {
      const state = load(this.#arena, this.#slot(index) + STATE);
      if (state === IDLE) return this.#claimed(index);
      if (state === FREE) free ??= index;
    }
    if (free === undefined || this.#load(OPEN) >= this.#load(LIMIT)) return undefined;
    Atomics.add(i32, (this.#control + OPEN) >> 2, 1);
    return this.#claimed(free);
  }

  #claimed(slot: number): number {
    store(this.#arena, this.#slot(slot) + STATE, TAKEN);
    store(this.#arena, this.#slot(slot) + OWNER, (currentOwner()?.mark ?? 0) | 0);
    return slot;
  }

  /** Connects a claimed slot. @returns false where another connection has to do */
  #connect(slot: number, untilMs: number): boolean {
    try {
      this.#connectUntil(slot, untilMs);
      return true;
    } catch (error) {
      this.discard(slot);
      // The server may not want as many connections as we do.
      const ready = this.#ready();
      const unwanted =
        error instanceof StillframeError &&
        ['ERR_STILLFRAME_NBD_CONNECTION', 'ERR_STILLFRAME_NBD_REFUSED'].includes(error.code);
      if (ready === 0 || !unwanted || this.#interrupted()) throw error;
      this.#store(LIMIT, ready);
      return false;
    }
  }

  /** How many connections there are that requests can be made on. */
  #ready(): number {
    let ready = 0;
    for (let slot = 0; slot < MAX_CONNECTIONS; slot++) ready += load(this.#arena, this.#slot(slot) + READY);
    return ready;
  }

  /** Tries again until then, unless another connection will do. */
  #connectUntil(slot: number, untilMs: number): Session {
    for (;;) {
      try {
        return this.#connectOnce(slot, this.#ready() > 0 ? FURTHER_MS : HANDSHAKE_MS);
      } catch (error) {
        this.#close(slot);
        this.checkInterrupted();
        const known = error instanceof StillframeError ? error : this.#connectionError(error);
        const again =
          known.code === 'ERR_STILLFRAME_NBD_CONNECTION' && performance.now() + RETRY_MS < untilMs;
        if (!again || this.#ready() > 0) throw known;
      }
      waitWhile(this.#arena, this.#control + SEQUENCE, this.#load(SEQUENCE), RETRY_MS);
      this.checkInterrupted();
    }
  }

  #connectOnce(slot: number, handshakeMs: number): Session {
    const { path, target, agreed } = this.#export;
    const deadline = performance.now() + Math.min(handshakeMs, target.timeoutMs);
    const plain = new SocketStream(this.#socketTo(slot, deadline), deadline);
    const { stream, session } = negotiate(path, target, plain, (before) =>
      startTls(path, target, before, (channel) => this.#setChannel(slot, channel)),
    );
    if (agreed !== undefined && !sameExport(agreed, session)) {
      throw refusedError(
        path,
        `it is not the export any more that it was when it was opened (then ${agreed.length} bytes, now ${session.length}); open it again`,
      );
    }
    this.#sockets.setTimeout(stream.fd, target.timeoutMs);
    const at = this.#slot(slot);
    store(this.#arena, at + COOKIE, 0);
    store(this.#arena, at + HEADERS_AT, HEADERS.indexOf(session.headers));
    for (const [index, name] of this.#export.contexts.entries()) {
      store(this.#arena, at + CONTEXTS + index * 4, session.contexts.get(name) ?? -1);
    }
    store(this.#arena, at + READY, 1);
    return session;
  }

  /** A connected socket in the slot. */
  #socketTo(slot: number, deadlineMs: number): number {
    const { address } = this.#export.target;
    const calls = this.#sockets;
    const places: SocketAddress[] =
      address.type === 'unix' ? [calls.unixAddress(address.path)] : calls.resolve(address.host, address.port);
    let failure: unknown = new ConnectionLost('its host has no address');
    for (const place of places) {
      const fd = calls.open(place);
      this.#keep(slot, fd);
      try {
        calls.setTimeout(fd, Math.max(1, deadlineMs - performance.now()));
        calls.connect(fd, place);
        return fd;
      } catch (error) {
        failure = error;
        this.#close(slot);
        this.checkInterrupted();
      }
    }
    throw failure;
  }

  #connectionError(error: unknown): StillframeError {
    const { path, target } = this.#export;
    // With TLS 1.3 a client has made its handshake by the time when it hears that it is not trusted.
    if (error instanceof ConnectionLost && error.cause instanceof TlsError) {
      return untrustedError(path, error.cause.message);
    }
    if (error instanceof ConnectionLost) return connectionError(path, error.message, error);
    const { address } = target;
    const place =
      address.type === 'unix' ? address.path.replace('\0', '@') : `${address.host}:${address.port}`;
    const reason = error instanceof Error ? error.message.replace(/, [a-z]+$/, '') : String(error);
    return connectionError(path, `cannot connect to ${place}: ${reason}`, error);
  }

  /** Gives a connection back that can be used again. */
  giveBack({ slot }: Taken): void {
    store(this.#arena, this.#slot(slot) + OWNER, 0);
    withLock(this.#arena, this.#control, () => store(this.#arena, this.#slot(slot) + STATE, IDLE));
    advance(this.#arena, this.#control + SEQUENCE);
  }

  /** Gives a connection back that is of no use any more. */
  discard(slot: number): void {
    this.#close(slot);
    store(this.#arena, this.#slot(slot) + OWNER, 0);
    withLock(this.#arena, this.#control, () => {
      store(this.#arena, this.#slot(slot) + STATE, FREE);
      Atomics.sub(this.#arena.i32, (this.#control + OPEN) >> 2, 1);
    });
    advance(this.#arena, this.#control + SEQUENCE);
  }

  cookie({ slot }: Taken): number {
    return this.#arena.u32[(this.#slot(slot) + COOKIE) >> 2] ?? 0;
  }

  setCookie({ slot }: Taken, cookie: number): void {
    this.#arena.u32[(this.#slot(slot) + COOKIE) >> 2] = cookie;
  }

  /** The number that the server has given to a context, undefined where it does not have it. */
  contextOf({ slot }: Taken, index: number): number | undefined {
    const id = load(this.#arena, this.#slot(slot) + CONTEXTS + index * 4);
    return id === -1 ? undefined : id >>> 0;
  }

  get mutations(): number {
    return this.#load(MUTATIONS);
  }

  countMutation(): void {
    Atomics.add(this.#arena.i32, (this.#control + MUTATIONS) >> 2, 1);
  }

  /** Runs `body` while no other thread changes parts of blocks. */
  withEdges<T>(body: () => T): T {
    return withLock(this.#arena, this.#control + EDGE_LOCK, body);
  }

  /** How many writes were carried out so far. */
  get written(): number {
    return this.#arena.f64[(this.#control + WRITTEN) / 8] ?? 0;
  }

  countWrite(): void {
    withLock(this.#arena, this.#control, () => {
      this.#arena.f64[(this.#control + WRITTEN) / 8] = this.written + 1;
    });
  }

  /** The first `count` writes are durable. */
  countFlush(count: number): void {
    withLock(this.#arena, this.#control, () => {
      const index = (this.#control + FLUSHED) / 8;
      this.#arena.f64[index] = Math.max(this.#arena.f64[index] ?? 0, count);
    });
  }

  /** A connection was lost: what was written and not flushed may be lost with it. */
  countLoss(): void {
    if (this.#export.target.trusted) return;
    if (this.written > (this.#arena.f64[(this.#control + FLUSHED) / 8] ?? 0)) this.#store(LOST, 1);
  }

  get lostWrites(): boolean {
    return this.#load(LOST) !== 0;
  }

  #interrupted(): boolean {
    return this.#load(INTERRUPTED) !== 0 || currentOwner()?.cancelled() === true;
  }

  /** @throws StillframeError ERR_STILLFRAME_JOB_CANCELLED */
  checkInterrupted(): void {
    if (!this.#interrupted()) return;
    throw new StillframeError(
      'ERR_STILLFRAME_JOB_CANCELLED',
      `'${this.#export.path}': the job was cancelled`,
    );
  }

  /** Closes all connections after a last word. Nobody may use any of them. */
  close(farewell: (taken: Taken) => void): void {
    for (let slot = 0; slot < MAX_CONNECTIONS; slot++) {
      const at = this.#slot(slot);
      const fd = load(this.#arena, at + FD);
      if (fd < 0) continue;
      try {
        const headers = HEADERS[load(this.#arena, at + HEADERS_AT)] ?? 'simple';
        // Nobody reads what the server would have to say: it is not worth waiting for.
        this.#sockets.setTimeout(fd, RETRY_MS);
        const wire = this.#wire(slot, fd);
        const stream = new SocketStream(fd, performance.now() + RETRY_MS, wire);
        farewell({ slot, stream, headers });
        if (wire !== undefined) {
          // TLS has its own farewell. The server's is waited for: who closes before it has come resets the connection.
          wire.finish();
          this.#sockets.finish(fd);
          stream.read(new Uint8Array(1), 0, 1);
        }
      } catch {
        // It is gone already.
      }
      this.#close(slot);
    }
    this.#arena.free(this.#control);
  }

  #keep(slot: number, fd: number): void {
    store(this.#arena, this.#slot(slot) + FD, fd);
    // Whoever interrupts looks at the descriptor after setting the mark.
    if (this.#export.target.cut && this.#interrupted()) this.#sockets.shutdown(fd);
  }

  /** What speaks TLS on the connection of a slot; undefined: nothing does. */
  #channel(slot: number): TlsChannel | undefined {
    return loadChannel(this.#arena.f64, this.#slot(slot) + CHANNEL);
  }

  #wire(slot: number, fd: number): TlsWire | undefined {
    const channel = this.#channel(slot);
    return channel && new TlsWire(fd, channel);
  }

  #setChannel(slot: number, channel: TlsChannel | undefined): void {
    storeChannel(this.#arena.f64, this.#slot(slot) + CHANNEL, channel);
  }

  #close(slot: number): void {
    const at = this.#slot(slot);
    store(this.#arena, at + READY, 0);
    const channel = this.#channel(slot);
    this.#setChannel(slot, undefined);
    if (channel !== undefined) requireOpenSsl().free(channel);
    withLock(this.#arena, at + FD_LOCK, () => {
      const fd = load(this.#arena, at + FD);
      store(this.#arena, at + FD, -1);
      if (fd >= 0) this.#sockets.close(fd);
    });
  }

  #slot(index: number): number {
    return this.#control + SLOTS + index * SLOT_BYTES;
  }

  #load(offset: number): number {
    return load(this.#arena, this.#control + offset);
  }

  #store(offset: number, value: number): void {
    store(this.#arena, this.#control + offset, value);
  }
}

function sameExport(before: NonNullable<Export['agreed']>, now: Session): boolean {
  const needed = EXPORT.readOnly | EXPORT.flush | EXPORT.fua;
  return (
    before.length === now.length &&
    now.minBlock <= before.minBlock &&
    now.maxBlock >= before.maxBlock &&
    (before.flags & needed) === (now.flags & needed)
  );
}
