import { setTimeout as sleep } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import { StillframeError } from '../../errors.js';
import type { Runtime, SharedRuntime } from '../../kernels/runtime.js';
import { type ServerSockets, serverSockets } from '../../os/server-sockets.js';
import { type Sockets, sockets } from '../../os/sockets.js';
import type { ListenAddress } from './address.js';
import type { ThreadMessage } from './connection-thread.js';
import type { ExportDescriptor } from './exports.js';
import { type Listening, listenOn, stopListening } from './listen.js';
import { MAX_HELPERS, PHASE_OF, ServerState } from './state.js';
import type { ConnectionData, ListenerData } from './threads.js';
import { type ListenerTls, prepareTls, releaseTls, type TlsOptions } from './tls.js';

/** How a server treats its clients. */
export interface ServerOptions {
  /** Clients at once; others wait until one has left. Default 100. */
  readonly maxConnections?: number | undefined;
  /** How long a client may take until it has chosen an export, in milliseconds. Default 10,000. */
  readonly handshakeTimeoutMs?: number | undefined;
  /** Permissions of sockets in the file system. Default 0600. */
  readonly socketMode?: number | undefined;
  /** Serve with TLS, and only so. Default: plain text. */
  readonly tls?: TlsOptions | undefined;
}

/** How long clients may take for what is under way when the server closes, in milliseconds. */
const GRACE_MS = 5000;
const POLL_MS = 5;

/** An NBD server, on the host thread: it starts threads and ends them. */
export class Server {
  readonly listening: Listening;
  readonly #sockets: Sockets & ServerSockets;
  readonly #state: ServerState;
  readonly #workers = new Set<Worker>();
  #tls: ListenerTls | undefined;
  readonly #poller: number;
  readonly #waker: readonly [number, number];
  readonly #connectionData: Omit<ConnectionData, 'resident'>;
  /** Resolves when nobody can come any more: the server has closed, or it had no more than connections that have ended. */
  readonly finished: Promise<void>;
  #onFinished: () => void = () => undefined;
  #starting = 0;
  /** The thread that lets clients in uses the listening sockets. */
  #isListening = true;
  #failure: unknown;
  #closing: Promise<void> | undefined;

  /** @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE and what {@link listenOn} throws */
  constructor(
    runtime: Runtime & { readonly shared: SharedRuntime },
    addresses: readonly ListenAddress[],
    exports: readonly ExportDescriptor[],
    options: ServerOptions,
  ) {
    const { maxConnections = 100, handshakeTimeoutMs = 10_000, socketMode = 0o600, tls } = options;
    if (!Number.isInteger(maxConnections) || maxConnections < 1 || maxConnections > 10_000) {
      throw new RangeError(`maxConnections is 1 to 10000, not ${maxConnections}`);
    }
    const [plain, server] = [sockets(), serverSockets()];
    if (plain === undefined || server === undefined) {
      throw new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        'there are no blocking sockets on this platform: NBD is served on Linux, with the FFI package',
      );
    }
    this.#sockets = { ...plain, ...server };
    const control = ServerState.allocate(runtime.arena, maxConnections);
    this.#state = new ServerState(runtime.arena, control, maxConnections);
    try {
      this.#tls = tls && prepareTls(tls);
      this.#state.exports = exports;
      this.listening = listenOn(this.#sockets, addresses, socketMode);
    } catch (error) {
      this.#free();
      throw error;
    }
    this.finished = new Promise((resolve) => {
      this.#onFinished = resolve;
    });
    this.#poller = server.poller();
    this.#waker = plain.pair();
    const [wake, waker] = this.#waker;
    const { shared } = runtime;
    const common = { shared, control, maxConnections, poller: this.#poller };
    this.#connectionData = { ...common, role: 'connection', waker };
    const { listeners, connected } = this.listening;
    this.#start({
      ...common,
      role: 'listener',
      wake,
      listeners: [...listeners],
      connected,
      tls: this.#tls,
      handshakeMs: handshakeTimeoutMs,
    });
    this.#grow(true);
  }

  /** Clients that have chosen an export. */
  get connections(): number {
    return this.#state.open;
  }

  /** Clients that have chosen this export. */
  connectionsTo(name: string): number {
    const state = this.#state;
    const index = state.exportIndex(name);
    return index < 0 ? 0 : state.forEachOpen(() => undefined, index);
  }

  /** Whether clients speak TLS with it. */
  get secure(): boolean {
    return this.#tls !== undefined;
  }

  /** Threads that serve connections. */
  get threads(): number {
    return this.#state.threads;
  }

  #free(): void {
    if (this.#tls !== undefined) releaseTls(this.#tls);
    this.#state.free();
  }

  #fail(error: unknown): void {
    // A defect: what that thread held nobody gives back, so nothing can go on.
    this.#failure ??= error;
    this.close().catch(() => undefined);
  }

  #start(data: ListenerData | ConnectionData): void {
    const worker = new Worker(new URL('./thread.js', import.meta.url), { workerData: data });
    this.#workers.add(worker);
    worker.on('message', (message: ThreadMessage) => {
      if (message === 'started') this.#starting--;
      if (message === 'stopped-listening') this.#isListening = false;
      if (message === 'finished') this.#onFinished();
      else this.#growAsNeeded();
    });
    worker.on('error', (error) => this.#fail(error));
    worker.on('exit', () => this.#workers.delete(worker));
  }

  #grow(resident: boolean): void {
    this.#starting++;
    this.#state.countThread(1);
    this.#start({ ...this.#connectionData, resident });
  }

  #growAsNeeded(): void {
    const most = this.#state.maxConnections + MAX_HELPERS;
    while (this.#state.lacking > this.#starting && this.#state.threads < most) this.#grow(false);
  }

  /** What is exported now. */
  get exports(): readonly ExportDescriptor[] {
    return this.#state.exports.flatMap((exported) => exported ?? []);
  }

  /** Exports one more, for clients that come from now on. */
  add(exported: ExportDescriptor): void {
    this.#state.exports = [...this.#state.exports, exported];
  }

  /** Ends an export: nobody can choose it any more, and the connections of those who have are ended. */
  async remove(name: string): Promise<void> {
    const state = this.#state;
    const index = state.exportIndex(name);
    if (index < 0) return;
    state.exports = state.exports.map((exported, at) => (at === index ? null : exported));
    // One that was on its way in when its export was removed comes a moment later.
    do await sleep(POLL_MS);
    while (state.forEachOpen(this.#sockets.shutdown, index) > 0);
  }

  #wake(): void {
    this.#sockets.send(this.#waker[1], Uint8Array.of(1));
  }

  /**
   * Closes: nobody is let in any more, new requests are refused, those under way are answered, for 5 seconds at most.
   *
   * @throws what has gone wrong with the server itself
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const state = this.#state;
    const { endReceiving, shutdown } = this.#sockets;
    state.phase = PHASE_OF.closing;
    this.#wake();
    // Not before: the numbers of descriptors that are closed may be others' by then.
    while (this.#isListening && this.#failure === undefined) await sleep(POLL_MS);
    stopListening(this.#sockets, this.listening);
    state.forEachOpen(endReceiving);
    const patience = performance.now() + GRACE_MS;
    while (state.open > 0 && this.#failure === undefined) {
      if (performance.now() > patience) state.forEachOpen(shutdown);
      await sleep(POLL_MS);
    }
    state.phase = PHASE_OF.gone;
    this.#wake();
    if (this.#failure !== undefined) state.forEachOpen(shutdown);
    while (this.#workers.size > 0) await sleep(POLL_MS);
    for (const fd of [this.#poller, ...this.#waker]) this.#sockets.close(fd);
    this.#free();
    this.#onFinished();
    if (this.#failure !== undefined) throw this.#failure;
  }
}
