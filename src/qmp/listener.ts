import { chmodSync, createWriteStream, lstatSync, rmSync } from 'node:fs';
import { createServer, type NetConnectOpts, type Server, Socket } from 'node:net';
import { PassThrough } from 'node:stream';
import { StringDecoder } from 'node:string_decoder';
import { StillframeError, systemError } from '../errors.js';
import { type Handlers, MAX_QUEUED, Monitor, type QmpEvent } from './monitor.js';

/** Answers and events that a client has not taken are kept up to here; then it has to go. */
const MAX_PENDING_BYTES = 16 * 1024 * 1024;
/** Monitors at once. */
const MAX_MONITORS = 64;

/** Where clients come from, or are gone to. */
export type MonitorPlace =
  | { readonly path: string }
  | { readonly host: string; readonly port: number }
  /** An open descriptor: a socket that listens, or that is connected. */
  | { readonly fd: number };

/** What clients can write to and read from. */
interface Stream {
  readonly input: NodeJS.ReadableStream;
  readonly output: NodeJS.WritableStream & { readonly writableLength: number };
  readonly end: () => void;
}

/** All monitors of a program: sockets on which clients come, and connections. */
export class Monitors {
  readonly #version: string;
  readonly #servers = new Set<Server>();
  readonly #paths: string[] = [];
  readonly #streams = new Map<Stream, Monitor>();
  readonly #timers = new Set<NodeJS.Timeout>();
  #handlers: Handlers | undefined;
  #closed = false;
  #onClient: (() => void) | undefined;
  /** Where commands have to wait: what clients ask for may not be there yet. */
  #started: Promise<void> = Promise.resolve();

  constructor(version: string) {
    this.#version = version;
  }

  /** What carries commands out. Set before the first client can come. */
  set handlers(handlers: Handlers) {
    this.#handlers = handlers;
  }

  /** Clients can come, and their commands wait until what is returned is called. */
  hold(): () => void {
    let start = (): void => undefined;
    this.#started = new Promise((resolve) => {
      start = resolve;
    });
    return start;
  }

  tell(event: QmpEvent): void {
    for (const monitor of this.#streams.values()) monitor.tell(event);
  }

  /** Resolves when a client has come. */
  client(): Promise<void> {
    if (this.#streams.size > 0) return Promise.resolve();
    return new Promise((resolve) => {
      this.#onClient = resolve;
    });
  }

  /**
   * Lets clients come. A unix socket is for its owner alone; one that is left over in its place is replaced.
   *
   * @throws StillframeError ERR_STILLFRAME_TARGET_EXISTS (something else is there), …_NOT_FOUND, …_PERMISSION
   */
  async listen(place: MonitorPlace): Promise<void> {
    const server = createServer((socket) => this.#accept(socket));
    server.maxConnections = MAX_MONITORS;
    const what = `cannot make the monitor's socket '${'path' in place ? place.path : JSON.stringify(place)}'`;
    if ('path' in place) removeStale(place.path, what);
    const mask = process.umask(0o177);
    try {
      await new Promise<void>((resolve, reject) => {
        server.once('error', reject);
        server.listen(place, resolve);
      });
      if ('path' in place) chmodSync(place.path, 0o600);
    } catch (error) {
      throw systemError(what, error);
    } finally {
      process.umask(mask);
    }
    if ('path' in place) this.#paths.push(place.path);
    this.#servers.add(server);
  }

  /**
   * Connects to a client that listens.
   *
   * @param again after how many milliseconds it is tried again when that fails, or the connection ends; 0: never
   * @throws StillframeError where it fails and is not tried again
   */
  async connect(place: MonitorPlace, again = 0): Promise<void> {
    const retry = (): void => {
      if (this.#closed || again === 0) return;
      const timer = setTimeout(() => {
        this.#timers.delete(timer);
        void this.connect(place, again);
      }, again);
      this.#timers.add(timer);
    };
    try {
      const socket = await connected(place);
      socket.once('close', retry);
      this.#accept(socket);
    } catch (error) {
      if (again === 0) throw systemError(`cannot connect to the monitor's client`, error);
      retry();
    }
  }

  /** Makes the program's own input and output a monitor. */
  stdio(): void {
    const stream = { input: process.stdin, output: process.stdout, end: () => process.stdin.destroy() };
    this.#add(stream);
  }

  /** A monitor that only tells, into an open file. */
  write(fd: number): void {
    const output = createWriteStream('', { fd });
    this.#add({ input: new PassThrough(), output, end: () => output.end() });
  }

  /** A monitor on the open ends of a pipe, or of two. */
  pipe({ input, output }: { readonly input: number; readonly output: number }): void {
    const reads = new Socket({ fd: input, writable: false });
    const writes = new Socket({ fd: output, readable: false });
    for (const end of [reads, writes]) end.on('error', () => end.destroy());
    const end = (): void => {
      reads.destroy();
      writes.end();
    };
    this.#add({ input: reads, output: writes, end });
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const timer of this.#timers) clearTimeout(timer);
    const closed = [...this.#servers].map((server) => new Promise((resolve) => server.close(resolve)));
    for (const { end } of this.#streams.keys()) end();
    await Promise.all(closed);
    for (const path of this.#paths) rmSync(path, { force: true });
  }

  #accept(socket: Socket): void {
    const end = (): void => {
      socket.end();
      setTimeout(() => socket.destroy(), 200).unref();
    };
    const stream = { input: socket, output: socket, end };
    socket.on('close', () => this.#streams.delete(stream));
    socket.on('error', () => socket.destroy());
    this.#add(stream);
  }

  #add(stream: Stream): void {
    const handlers = this.#handlers;
    if (handlers === undefined) throw new Error('invariant: a monitor has handlers');
    const { input, output, end } = stream;
    const decoder = new StringDecoder('utf8');
    const monitor = new Monitor(handlers, this.#version, (line) => {
      output.write(line);
      if (output.writableLength > MAX_PENDING_BYTES) end();
    });
    this.#streams.set(stream, monitor);
    void this.#started.then(() => {
      input.on('data', (data: Buffer) => {
        void monitor.take(decoder.write(withResets(data))).then(() => input.resume());
        if (monitor.queued >= MAX_QUEUED) input.pause();
      });
    });
    this.#onClient?.();
  }
}

/**
 * The byte 0xFF is in no UTF-8: a client puts both sides in step again with it, whatever is under way. For what takes the
 * input apart that is a control character.
 */
function withResets(data: Buffer): Uint8Array {
  return data.includes(0xff) ? data.map((byte) => (byte === 0xff ? 1 : byte)) : data;
}

/** A socket that nobody listens on any more is in the way; anything else stays. */
function removeStale(path: string, what: string): void {
  const stat = lstatSync(path, { throwIfNoEntry: false });
  if (stat === undefined) return;
  if (stat.isSocket()) {
    rmSync(path);
    return;
  }
  throw new StillframeError(
    'ERR_STILLFRAME_TARGET_EXISTS',
    `${what}: there is something of that name; remove it or name another one`,
  );
}

function connected(place: MonitorPlace): Promise<Socket> {
  if ('fd' in place) return Promise.resolve(new Socket({ fd: place.fd }));
  return new Promise((resolve, reject) => {
    const socket = new Socket();
    socket.once('error', reject);
    socket.connect(place satisfies NetConnectOpts, () => {
      socket.off('error', reject);
      resolve(socket);
    });
  });
}
