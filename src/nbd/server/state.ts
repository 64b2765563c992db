import type { Arena } from '../../kernels/arena.js';
import { advance, load, store, waitWhile, withLock } from '../../kernels/futex.js';
import type { TlsChannel } from '../../os/openssl.js';
import { loadChannel, storeChannel } from '../../os/tls-channel.js';
import type { Agreement } from '../protocol/server-handshake.js';
import type { ExportDescriptor } from './exports.js';

/**
 * What the threads of a server share, in the arena.
 *
 *     +0   phase         int32   see PHASE
 *     +4   lock          int32   of everything below
 *     +8   sequence      int32   advanced when there is work, or none ever again
 *     +12  idle          int32   threads that wait for work
 *     +16  threads       int32   threads that serve connections, those that are starting included
 *     +20  first         uint32  where the queue of work starts in its ring
 *     +24  queued        uint32
 *     +28  open          int32   connections past their handshake
 *     +32  large bytes   int32   memory for requests that are larger than the buffers of threads
 *     +36  exports       uint32  pointer of the list of exports as JSON
 *     +40  exports bytes uint32
 *     +44  looking out   int32   threads that look out for bytes without sleeping
 *     +48  helpers       int32   threads that use connections beyond one for each, places in the queue included
 *     +64  connections
 *     then the queue: uint32, connections that something can be done for
 *
 * A connection:
 *
 *     +0   state         int32   free, open, or leaving: nothing more is read from it
 *     +4   users         int32   threads that use it, places in the queue included
 *     +8   receiving     int32   lock: who reads requests
 *     +12  sending       int32   lock: who writes an answer
 *     +16  fd            int32
 *     +20  export        int32   number of its export
 *     +24  headers       int32   0 simple, 1 structured, 2 extended
 *     +28  flags         int32   transmission flags
 *     +32  begin, end    uint32  what was read ahead and not looked at, in its buffer
 *     +40  buffer        uint32  pointer
 *     +44  slowness      int32   how long requests take of late, in microseconds
 *     +48  contexts      uint32  how many of them, then their numbers as uint16
 *     +84  summoned      int32   help was called and has not come yet
 *     +88  ahead         int32   read on ahead of a request: they are small
 *     +92  tls           int32   lock: who uses the channel
 *     +96  channel       2 × float64: addresses of what speaks TLS with the client; 0: nothing does
 *     +112 slow for      int32   time spent on requests since they are slow, in microseconds
 */
const PHASE = 0;
const LOCK = 4;
const SEQUENCE = 8;
const IDLE = 12;
const THREADS = 16;
const FIRST = 20;
const QUEUED = 24;
const OPEN = 28;
const LARGE_BYTES = 32;
const EXPORTS = 36;
const EXPORTS_BYTES = 40;
const LOOKING_OUT = 44;
const HELPERS = 48;
const CONNECTIONS = 64;

const STATE = 0;
const USERS = 4;
const RECEIVING = 8;
const SENDING = 12;
const FD = 16;
const EXPORT = 20;
const HEADERS = 24;
const FLAGS = 28;
const BEGIN = 32;
const END = 36;
const BUFFER = 40;
const SLOWNESS = 44;
const CONTEXTS = 48;
const CONTEXT_NUMBERS = 52;
const SUMMONED = 84;
const AHEAD = 88;
const TLS = 92;
const CHANNEL = 96;
const SLOW_FOR = 112;
const CONNECTION_BYTES = 128;

const FREE = 0;
const SERVING = 1;
const LEAVING = 2;

/** `closing`: no new work is taken on. `gone`: threads end. */
export const PHASE_OF = { serving: 0, closing: 1, gone: 2 } as const;

/** Bytes that are read ahead of requests. */
export const RECEIVE_BYTES = 128 * 1024;
/** Memory for large requests of all connections together, in bytes; what does not fit is carried out in parts. */
const MAX_LARGE_BYTES = 96 * 1024 * 1024;

/** Threads beyond one for each connection: what those with slow drives keep busy. */
export const MAX_HELPERS = 16;

function queueSlots(maxConnections: number): number {
  return maxConnections + MAX_HELPERS;
}

const HEADERS_OF = ['simple', 'structured', 'extended'] as const;

/** One thread's view of it. */
export class ServerState {
  readonly arena: Arena;
  readonly control: number;
  readonly maxConnections: number;
  readonly #queue: number;
  /** There is always a place: every connection is there once, but for help. */
  readonly #queueSlots: number;

  constructor(arena: Arena, control: number, maxConnections: number) {
    this.arena = arena;
    this.control = control;
    this.maxConnections = maxConnections;
    this.#queue = control + CONNECTIONS + maxConnections * CONNECTION_BYTES;
    this.#queueSlots = queueSlots(maxConnections);
  }

  static allocate(arena: Arena, maxConnections: number): number {
    const bytes = CONNECTIONS + maxConnections * CONNECTION_BYTES + queueSlots(maxConnections) * 4;
    return arena.alloc(bytes, 'state of an NBD server');
  }

  /** Gives all memory back. No thread may use it any more. */
  free(): void {
    const exports = this.#load(EXPORTS) >>> 0;
    if (exports !== 0) this.arena.free(exports);
    this.arena.free(this.control);
  }

  get phase(): number {
    return this.#load(PHASE);
  }

  set phase(phase: number) {
    this.#locked(() => store(this.arena, this.control + PHASE, phase));
    advance(this.arena, this.control + SEQUENCE);
  }

  get open(): number {
    return this.#load(OPEN);
  }

  get threads(): number {
    return this.#load(THREADS);
  }

  /** Threads that do not wait for work. */
  get busyThreads(): number {
    return this.#load(THREADS) - this.#load(IDLE);
  }

  /** In the order they were added; null: it was removed. */
  set exports(exports: readonly (ExportDescriptor | null)[]) {
    const json = new TextEncoder().encode(JSON.stringify(exports));
    const pointer = this.arena.alloc(json.length, 'exports of an NBD server');
    this.arena.u8.set(json, pointer);
    this.#locked(() => {
      const before = this.#load(EXPORTS) >>> 0;
      store(this.arena, this.control + EXPORTS, pointer);
      store(this.arena, this.control + EXPORTS_BYTES, json.length);
      if (before !== 0) this.arena.free(before);
    });
  }

  get exports(): readonly (ExportDescriptor | null)[] {
    const json = this.#locked(() => this.arena.copyOut(this.#load(EXPORTS) >>> 0, this.#load(EXPORTS_BYTES)));
    return JSON.parse(new TextDecoder().decode(json));
  }

  /** The place of an export among {@link exports}; -1 where there is none of that name. */
  exportIndex(name: string): number {
    return this.exports.findIndex((exported) => exported?.offer.name === name);
  }

  connection(index: number): ConnectionState {
    return new ConnectionState(this, this.control + CONNECTIONS + index * CONNECTION_BYTES, index);
  }

  /** Takes a place for a connection; undefined where there is none, or nobody is let in any more. */
  openConnection(
    fd: number,
    exportIndex: number,
    { headers, flags, contexts }: Agreement,
    channel: TlsChannel | undefined,
  ): ConnectionState | undefined {
    const buffer = this.arena.alloc(RECEIVE_BYTES, 'requests of an NBD client');
    const found = this.#locked(() => {
      // Under the lock: who closes the server finds every connection that was opened before.
      if (this.phase !== PHASE_OF.serving) return undefined;
      for (let index = 0; index < this.maxConnections; index++) {
        const connection = this.connection(index);
        if (connection.get(STATE) !== FREE) continue;
        for (const field of [USERS, RECEIVING, SENDING, BEGIN, END, SLOWNESS, SLOW_FOR, SUMMONED, TLS])
          connection.set(field, 0);
        connection.set(FD, fd);
        connection.set(EXPORT, exportIndex);
        connection.set(HEADERS, HEADERS_OF.indexOf(headers));
        connection.set(FLAGS, flags);
        connection.set(BUFFER, buffer);
        connection.set(AHEAD, 1);
        connection.channel = channel;
        connection.set(CONTEXTS, contexts.length);
        this.arena.u16.set(contexts, (connection.pointer + CONTEXT_NUMBERS) >> 1);
        connection.set(STATE, SERVING);
        Atomics.add(this.arena.i32, (this.control + OPEN) >> 2, 1);
        return connection;
      }
      return undefined;
    });
    if (found === undefined) this.arena.free(buffer);
    return found;
  }

  /** Takes the place of a connection back that nobody serves yet. Its socket is not closed. */
  cancelConnection(connection: ConnectionState): void {
    this.#locked(() => this.#vacate(connection));
  }

  /** Under the lock. */
  #vacate(connection: ConnectionState): void {
    this.arena.free(connection.buffer);
    connection.set(STATE, FREE);
    Atomics.sub(this.arena.i32, (this.control + OPEN) >> 2, 1);
  }

  /**
   * Does something with the descriptor of every connection that is open.
   *
   * @param exportIndex only of those to this export
   * @returns how many there are
   */
  forEachOpen(body: (fd: number) => void, exportIndex?: number): number {
    return this.#locked(() => {
      let count = 0;
      for (let index = 0; index < this.maxConnections; index++) {
        const connection = this.connection(index);
        if (connection.get(STATE) === FREE) continue;
        if (exportIndex !== undefined && connection.exportIndex !== exportIndex) continue;
        body(connection.fd);
        count++;
      }
      return count;
    });
  }

  /**
   * Puts a connection into the queue of work.
   *
   * @param help somebody serves it already: another thread only where there is one for every other connection
   * @returns whether there are fewer idle threads than work
   */
  enqueue(connection: ConnectionState, help: boolean): boolean {
    const { arena, control } = this;
    const dropped = this.#locked(() => {
      const queued = this.#load(QUEUED);
      // It may have ended since whoever saw something to do looked.
      if (connection.get(STATE) !== SERVING) return true;
      if (help && this.#load(HELPERS) >= MAX_HELPERS) {
        connection.helped();
        return true;
      }
      if (Atomics.add(arena.i32, (connection.pointer + USERS) >> 2, 1) > 0) this.#countHelper(1);
      const place = (this.#load(FIRST) + queued) % this.#queueSlots;
      store(arena, this.#queue + place * 4, connection.index);
      store(arena, control + QUEUED, queued + 1);
      return false;
    });
    if (dropped) return false;
    Atomics.add(arena.i32, (control + SEQUENCE) >> 2, 1);
    Atomics.notify(arena.i32, (control + SEQUENCE) >> 2, 1);
    return this.#load(QUEUED) > this.#load(IDLE);
  }

  /**
   * The next connection that something can be done for; the caller uses it then.
   *
   * @returns undefined when the server is gone, or there was nothing to do for `timeoutMs`
   */
  dequeue(timeoutMs: number): ConnectionState | undefined {
    const { arena, control } = this;
    const until = performance.now() + timeoutMs;
    Atomics.add(arena.i32, (control + IDLE) >> 2, 1);
    try {
      for (;;) {
        const sequence = this.#load(SEQUENCE);
        const index = this.#locked(() => {
          const queued = this.#load(QUEUED);
          if (queued === 0) return -1;
          const first = this.#load(FIRST);
          store(arena, control + FIRST, (first + 1) % this.#queueSlots);
          store(arena, control + QUEUED, queued - 1);
          return load(arena, this.#queue + first * 4);
        });
        if (index >= 0) return this.connection(index);
        if (this.phase === PHASE_OF.gone) return undefined;
        const left = until - performance.now();
        if (left <= 0) return undefined;
        waitWhile(arena, control + SEQUENCE, sequence, left);
      }
    } finally {
      Atomics.sub(arena.i32, (control + IDLE) >> 2, 1);
    }
  }

  /** Connections that wait for a thread beyond those that are idle. */
  get lacking(): number {
    return this.#load(QUEUED) - this.#load(IDLE);
  }

  /** A thread more, or one less. @returns how many there are now */
  countThread(by: 1 | -1): number {
    const count = Atomics.add(this.arena.i32, (this.control + THREADS) >> 2, by) + by;
    return count;
  }

  /** Memory for a request larger than a thread's buffer; undefined where there is not enough. */
  takeLarge(bytes: number): number | undefined {
    const words = this.arena.i32;
    const index = (this.control + LARGE_BYTES) >> 2;
    if (Atomics.add(words, index, bytes) + bytes <= MAX_LARGE_BYTES) {
      try {
        return this.arena.alloc(bytes, 'a large request');
      } catch {
        // The arena has more to do than this.
      }
    }
    Atomics.sub(words, index, bytes);
    return undefined;
  }

  giveLarge(pointer: number, bytes: number): void {
    this.arena.free(pointer);
    Atomics.sub(this.arena.i32, (this.control + LARGE_BYTES) >> 2, bytes);
  }

  /**
   * The caller does not use the connection any more.
   *
   * @param close called where it was the last one and nothing more is read from the connection
   * @returns whether the connection has ended with that
   */
  exit(connection: ConnectionState, close: (connection: ConnectionState) => void): boolean {
    return this.#locked(() => {
      const users = Atomics.sub(this.arena.i32, (connection.pointer + USERS) >> 2, 1) - 1;
      if (users > 0) this.#countHelper(-1);
      if (users > 0 || !connection.leaving) return false;
      // Under the lock: whoever looks for open connections must not find a descriptor that is somebody else's by then.
      close(connection);
      this.#vacate(connection);
      return true;
    });
  }

  /** @returns false where `most` threads look out already */
  beginLookOut(most: number): boolean {
    const index = (this.control + LOOKING_OUT) >> 2;
    if (Atomics.add(this.arena.i32, index, 1) < most) return true;
    Atomics.sub(this.arena.i32, index, 1);
    return false;
  }

  endLookOut(): void {
    Atomics.sub(this.arena.i32, (this.control + LOOKING_OUT) >> 2, 1);
  }

  #countHelper(by: 1 | -1): void {
    store(this.arena, this.control + HELPERS, this.#load(HELPERS) + by);
  }

  #load(offset: number): number {
    return load(this.arena, this.control + offset);
  }

  #locked<T>(body: () => T): T {
    return withLock(this.arena, this.control + LOCK, body);
  }
}

/** One connection, as a thread sees it. */
export class ConnectionState {
  readonly pointer: number;
  readonly index: number;
  readonly #server: ServerState;

  constructor(server: ServerState, pointer: number, index: number) {
    this.#server = server;
    this.pointer = pointer;
    this.index = index;
  }

  get(offset: number): number {
    return load(this.#server.arena, this.pointer + offset);
  }

  set(offset: number, value: number): void {
    store(this.#server.arena, this.pointer + offset, value);
  }

  get fd(): number {
    return this.get(FD);
  }

  get exportIndex(): number {
    return this.get(EXPORT);
  }

  get headers(): (typeof HEADERS_OF)[number] {
    return HEADERS_OF[this.get(HEADERS)] ?? 'simple';
  }

  get flags(): number {
    return this.get(FLAGS);
  }

  get contexts(): number[] {
    const first = (this.pointer + CONTEXT_NUMBERS) >> 1;
    return [...this.#server.arena.u16.subarray(first, first + this.get(CONTEXTS))];
  }

  /** Arena pointer of what was read ahead: {@link RECEIVE_BYTES}. */
  get buffer(): number {
    return this.get(BUFFER) >>> 0;
  }

  get begin(): number {
    return this.get(BEGIN);
  }

  get end(): number {
    return this.get(END);
  }

  /** What of the buffer was not looked at yet. */
  setRange(begin: number, end: number): void {
    this.set(BEGIN, begin);
    this.set(END, end);
  }

  get readsAhead(): boolean {
    return this.get(AHEAD) !== 0;
  }

  set readsAhead(value: boolean) {
    this.set(AHEAD, value ? 1 : 0);
  }

  /** How long requests take of late, in microseconds. */
  get slowness(): number {
    return this.get(SLOWNESS);
  }

  set slowness(microseconds: number) {
    this.set(SLOWNESS, microseconds);
  }

  /** Time spent on requests since they are slow, in microseconds; 0 where they are not. */
  get slowFor(): number {
    return this.get(SLOW_FOR);
  }

  set slowFor(microseconds: number) {
    this.set(SLOW_FOR, microseconds);
  }

  /** Threads that use it, and places of it in the queue. */
  get users(): number {
    return this.get(USERS);
  }

  /** Pointers of its locks: for reading requests, and for writing an answer. */
  get receiving(): number {
    return this.pointer + RECEIVING;
  }

  get sending(): number {
    return this.pointer + SENDING;
  }

  /** Pointer of the lock under which the channel is used. */
  get tls(): number {
    return this.pointer + TLS;
  }

  /** What speaks TLS with the client, until the connection ends; undefined: the connection is plain. */
  get channel(): TlsChannel | undefined {
    return loadChannel(this.#server.arena.f64, this.pointer + CHANNEL);
  }

  set channel(channel: TlsChannel | undefined) {
    storeChannel(this.#server.arena.f64, this.pointer + CHANNEL, channel);
  }

  /** As {@link ServerState.busyThreads}. */
  get busyThreads(): number {
    return this.#server.busyThreads;
  }

  /** As {@link ServerState.beginLookOut}. */
  beginLookOut(most: number): boolean {
    return this.#server.beginLookOut(most);
  }

  endLookOut(): void {
    this.#server.endLookOut();
  }

  /** Nothing more is read from it. */
  get leaving(): boolean {
    return this.get(STATE) === LEAVING;
  }

  leave(): void {
    this.set(STATE, LEAVING);
  }

  /** @returns false where help was called already */
  summon(): boolean {
    return Atomics.compareExchange(this.#server.arena.i32, (this.pointer + SUMMONED) >> 2, 0, 1) === 0;
  }

  helped(): void {
    this.set(SUMMONED, 0);
  }
}
