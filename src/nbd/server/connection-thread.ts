import { availableParallelism } from 'node:os';
import { CopyBuffer } from '../../block/filters/copy-before-write.js';
import { tryLock, unlock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import { requireOpenSsl } from '../../os/openssl.js';
import type { ServerSockets } from '../../os/server-sockets.js';
import type { Sockets } from '../../os/sockets.js';
import { closeChannel } from '../../os/tls-channel.js';
import { COMMAND, WIRE_ERROR } from '../protocol/numbers.js';
import { judge, MAX_DRAINED_BYTES, Request, requestBytes } from '../protocol/request.js';
import { ClientLost, ClientSocket } from './client-socket.js';
import { attachDrive, type Drive } from './drive.js';
import type { ExportDescriptor } from './exports.js';
import { FilePipe } from './file-pipe.js';
import { ANSWER_BYTES, DATA_BYTES, Session } from './session.js';
import { type ConnectionState, PHASE_OF, RECEIVE_BYTES, type ServerState } from './state.js';

/** Most threads that one connection keeps busy. */
const THREADS_OF_ONE = 16;
/**
 * Requests that take longer are worth the help of another thread, in microseconds: calling it takes time as well, and
 * with few processors there is nobody to help.
 */
const SLOW_US = availableParallelism() > 2 ? 60 : 250;
/**
 * How much time they have to take together before another thread is called, in microseconds: it costs more than it gains
 * in less. Requests are slow as well while this thread is new, and its code has not been compiled.
 */
const SLOW_FOR_US = 50_000;
/** How long a thread without work stays, in milliseconds. */
const STAY_MS = 10_000;

/**
 * What threads tell the host thread. `more`: there is more work than there are threads; `stopped-listening`: the sockets
 * that listen are of no use any more; `finished`: there are no clients and nobody can come in any more.
 */
export type ThreadMessage = 'started' | 'more' | 'stopped-listening' | 'finished';

export interface ThreadContext {
  readonly runtime: Runtime;
  readonly state: ServerState;
  readonly sockets: Sockets & ServerSockets;
  /** Where idle connections are parked, and the tag of one there. */
  readonly poller: number;
  readonly tagOf: (connection: ConnectionState) => number;
  /** A connection has ended: somebody else may come in. */
  readonly ended: () => void;
  readonly post: (message: ThreadMessage) => void;
  /** It is one of those that always stay. */
  readonly resident: boolean;
}

/**
 * A thread that serves connections: takes one that has something to say, and reads and answers requests until there are
 * none for a while. As long as requests are quick it does so alone. When they are slow it calls others, hands them the
 * right to read the next request and carries its own out beside them.
 */
export class ConnectionThread {
  readonly #context: ThreadContext;
  readonly #memory: number;
  readonly #answers: number;
  readonly #data: number;
  readonly #pipe: FilePipe;
  readonly #drives = new Map<number, Drive>();
  readonly #request = new Request();
  #exports: readonly (ExportDescriptor | null)[] = [];
  #buffer: CopyBuffer | undefined;

  constructor(context: ThreadContext) {
    const { arena } = context.runtime;
    this.#context = context;
    this.#memory = context.sockets.addressOf(arena.u8);
    this.#answers = arena.alloc(ANSWER_BYTES + DATA_BYTES, 'a thread that serves NBD');
    this.#data = this.#answers + ANSWER_BYTES;
    this.#pipe = new FilePipe(context.sockets);
  }

  /** Serves until the server is gone, or there was nothing to do for long. */
  run(): void {
    const { state, post, resident, runtime } = this.#context;
    post('started');
    try {
      for (;;) {
        const connection = state.dequeue(resident ? Number.POSITIVE_INFINITY : STAY_MS);
        if (connection === undefined) break;
        this.#serve(connection);
      }
    } finally {
      runtime.arena.free(this.#answers);
      this.#pipe.close();
      if (this.#buffer !== undefined) runtime.arena.free(this.#buffer.data);
      state.countThread(-1);
    }
  }

  #serve(connection: ConnectionState): void {
    const { state, sockets, runtime, ended } = this.#context;
    connection.helped();
    const socket = new ClientSocket(runtime.arena, sockets, this.#memory, connection);
    try {
      if (!connection.leaving) this.#answer(socket);
    } catch (error) {
      socket.abort();
      // What is not the client's doing is a defect; it must not take the others along.
      if (!(error instanceof ClientLost)) process.emitWarning(error instanceof Error ? error : String(error));
    } finally {
      if (state.exit(connection, (one) => this.#close(one))) ended();
    }
  }

  #close({ fd, channel }: ConnectionState): void {
    const { sockets } = this.#context;
    if (channel !== undefined) closeChannel(requireOpenSsl(), channel, sockets, fd);
    sockets.close(fd);
  }

  #answer(socket: ClientSocket): void {
    const session = this.#session(socket);
    while (this.#turn(socket, session));
  }

  /**
   * Reads requests, and answers those that are quick.
   *
   * @returns false when there is nothing to read for now, or somebody else reads
   */
  #turn(socket: ClientSocket, session: Session): boolean {
    const { arena } = this.#context.runtime;
    const { state } = socket;
    if (!tryLock(arena, state.receiving)) return false;
    let locked = true;
    const release = (): void => {
      locked = false;
      unlock(arena, state.receiving);
    };
    try {
      while (!state.leaving) {
        const next = this.#next(socket, session);
        if (next === 'idle') {
          // Before it is parked: whoever is woken from there would find it taken, and nobody would be woken again.
          release();
          this.#park(socket);
        }
        if (next !== 'ready') return false;
        const request = this.#request;
        if (request.command === COMMAND.disconnect) {
          session.flush();
          state.leave();
          return false;
        }
        const bytes = request.payloadBytes(session.rules.headers);
        const refusal =
          this.#context.state.phase === PHASE_OF.serving
            ? judge(request, session.rules)
            : { error: WIRE_ERROR.ESHUTDOWN, text: 'the server is shutting down' };
        if (refusal !== undefined) {
          this.#skip(socket, session, bytes);
          session.refuse(request, refusal);
          continue;
        }
        if (bytes > DATA_BYTES) {
          this.#writeLarge(socket, session, bytes, release);
          return true;
        }
        const slow = state.slowFor >= SLOW_FOR_US || session.isSlow(request);
        const data = this.#payload(socket, session, bytes, slow);
        if (slow) {
          session.flush();
          this.#summon(state);
          release();
        }
        const start = performance.now() - session.sentMs;
        session.carryOut(request, data);
        this.#learn(state, performance.now() - session.sentMs - start);
        if (slow) {
          session.flush();
          return true;
        }
      }
      return false;
    } catch (error) {
      session.forget();
      throw error;
    } finally {
      if (locked) release();
    }
  }

  /** Reads the header of the next request. @returns `idle` where there is none for now, `end` where there is none any more */
  #next(socket: ClientSocket, session: Session): 'ready' | 'idle' | 'end' {
    const { headers } = session.rules;
    const bytes = requestBytes(headers);
    if (socket.available < bytes) session.flush();
    const outcome = socket.fill(bytes, 'request');
    if (outcome === 'end') socket.state.leave();
    if (outcome !== 'ready') return outcome;
    const at = socket.consume(bytes);
    if (this.#request.decode(this.#context.runtime.arena.view, at, headers)) return 'ready';
    throw new ClientLost('no request');
  }

  /** Leaves the connection to the poller until it has something to say. */
  #park(socket: ClientSocket): void {
    const { sockets, poller, tagOf } = this.#context;
    sockets.rewatch(poller, socket.fd, tagOf(socket.state), 'readable');
  }

  /** Reads the data of a request that is refused. @throws ClientLost where it would be too much */
  #skip(socket: ClientSocket, session: Session, bytes: number): void {
    if (bytes > MAX_DRAINED_BYTES) throw new ClientLost('too much data');
    if (bytes > socket.available) session.flush();
    socket.skip(bytes, this.#data, DATA_BYTES);
  }

  /**
   * Reads the data of a request.
   *
   * @param own it must not be in the memory that requests are read to, which others will use
   * @returns where it is
   */
  #payload(socket: ClientSocket, session: Session, bytes: number, own: boolean): number {
    if (bytes === 0) {
      socket.state.readsAhead = true;
      return this.#data;
    }
    if (bytes > socket.available) session.flush();
    if (!socket.fits(bytes) || own || bytes > RECEIVE_BYTES) {
      socket.readTo(this.#data, bytes);
      return this.#data;
    }
    if (socket.fill(bytes, 'data') !== 'ready') {
      // Nothing at all of it has come yet.
      socket.readTo(this.#data, bytes);
      return this.#data;
    }
    return socket.consume(bytes);
  }

  /**
   * Carries out a write larger than our memory: from memory for the whole of it where there is some, so that nothing
   * comes of half a request; otherwise as it comes in.
   */
  #writeLarge(socket: ClientSocket, session: Session, bytes: number, release: () => void): void {
    const { state } = this.#context;
    const request = this.#request;
    session.flush();
    if (request.command !== COMMAND.write) {
      this.#skip(socket, session, bytes);
      session.refuse(request, { error: WIRE_ERROR.EINVAL, text: 'too much data' });
      session.flush();
      return;
    }
    const large = state.takeLarge(bytes);
    let failure: { readonly error: unknown } | undefined;
    const write = (from: number, done: number): void => {
      try {
        const length = Math.min(DATA_BYTES, bytes - done);
        if (failure === undefined) session.writePart(request.offset + done, from, length);
      } catch (error) {
        failure = { error };
      }
    };
    try {
      if (large !== undefined) {
        socket.readTo(large, bytes);
        this.#summon(socket.state);
        release();
      }
      for (let done = 0; done < bytes; done += DATA_BYTES) {
        if (large === undefined) socket.readTo(this.#data, Math.min(DATA_BYTES, bytes - done));
        write(large === undefined ? this.#data : large + done, done);
      }
    } finally {
      if (large !== undefined) state.giveLarge(large, bytes);
    }
    if (failure === undefined) this.#finish(session, request);
    else session.fail(request, failure.error);
    session.flush();
  }

  #finish(session: Session, request: Request): void {
    try {
      session.finish(request);
    } catch (error) {
      if (error instanceof ClientLost) throw error;
      session.fail(request, error);
    }
  }

  /** Calls another thread to read the next request. */
  #summon(connection: ConnectionState): void {
    const { state, post } = this.#context;
    if (connection.users >= THREADS_OF_ONE || !connection.summon()) return;
    if (state.enqueue(connection, true)) post('more');
  }

  /** Notes how long a request took. Of one that stands out no more counts than that it was slow. */
  #learn(connection: ConnectionState, tookMs: number): void {
    const before = connection.slowness;
    const took = Math.min(Math.round(tookMs * 1000), 2 * SLOW_US);
    const slowness = Math.round(before + (took - before) / 16);
    connection.slowness = slowness;
    connection.slowFor = slowness > SLOW_US ? Math.min(connection.slowFor + took, 2 * SLOW_FOR_US) : 0;
  }

  #session(socket: ClientSocket): Session {
    const { state, runtime } = this.#context;
    const { exportIndex } = socket.state;
    if (this.#exports[exportIndex] === undefined) this.#exports = state.exports;
    const served = this.#exports[exportIndex];
    if (served === undefined || served === null) throw new ClientLost('the export is gone');
    let drive = this.#drives.get(exportIndex);
    if (drive === undefined) {
      drive = attachDrive(runtime, served, this.#copyBuffer);
      this.#drives.set(exportIndex, drive);
    }
    return new Session(runtime, socket, served, drive, this.#answers, this.#pipe);
  }

  readonly #copyBuffer = (): CopyBuffer => {
    this.#buffer ??= new CopyBuffer(this.#context.runtime);
    return this.#buffer;
  };
}
