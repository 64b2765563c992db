import { chmodSync, existsSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { StringDecoder } from 'node:string_decoder';
import { StillframeError, systemError } from '../errors.js';
import { type Handlers, MAX_QUEUED, Monitor, type QmpEvent } from './monitor.js';

/** Answers and events that a client has not taken are kept up to here; then it has to go. */
const MAX_PENDING_BYTES = 16 * 1024 * 1024;
/** Monitors at once. */
const MAX_MONITORS = 64;

/** What carries commands out, given who takes events to every monitor. */
export type MakeHandlers = (tell: (event: QmpEvent) => void) => Handlers;

/** Where monitors are: a unix socket, for its owner alone. */
export class QmpListener {
  readonly #path: string;
  readonly #version: string;
  readonly #server: Server;
  readonly #monitors = new Map<Socket, Monitor>();
  readonly #handlers: Handlers;

  private constructor(path: string, version: string, makeHandlers: MakeHandlers) {
    this.#path = path;
    this.#version = version;
    this.#handlers = makeHandlers((event) => {
      for (const monitor of this.#monitors.values()) monitor.tell(event);
    });
    this.#server = createServer((socket) => this.#accept(socket));
    this.#server.maxConnections = MAX_MONITORS;
  }

  /** @throws StillframeError ERR_STILLFRAME_TARGET_EXISTS, …_NOT_FOUND, …_PERMISSION */
  static async listen(path: string, version: string, makeHandlers: MakeHandlers): Promise<QmpListener> {
    if (existsSync(path)) {
      throw new StillframeError(
        'ERR_STILLFRAME_TARGET_EXISTS',
        `cannot make the QMP socket '${path}': there is something of that name; remove it or name another one`,
      );
    }
    const listener = new QmpListener(path, version, makeHandlers);
    const mask = process.umask(0o177);
    try {
      await new Promise<void>((resolve, reject) => {
        listener.#server.once('error', reject);
        listener.#server.listen(path, resolve);
      });
      chmodSync(path, 0o600);
    } catch (error) {
      throw systemError(`cannot make the QMP socket '${path}'`, error);
    } finally {
      process.umask(mask);
    }
    return listener;
  }

  async close(): Promise<void> {
    const closed = new Promise((resolve) => this.#server.close(resolve));
    for (const socket of this.#monitors.keys()) {
      socket.end();
      setTimeout(() => socket.destroy(), 200).unref();
    }
    await closed;
    rmSync(this.#path, { force: true });
  }

  #accept(socket: Socket): void {
    const decoder = new StringDecoder('utf8');
    const monitor = new Monitor(this.#handlers, this.#version, (line) => {
      socket.write(line);
      if (socket.writableLength > MAX_PENDING_BYTES) socket.destroy();
    });
    this.#monitors.set(socket, monitor);
    const forget = (): boolean => this.#monitors.delete(socket);
    socket.on('close', forget);
    socket.on('error', () => socket.destroy());
    socket.on('data', (data) => {
      void monitor.take(decoder.write(data)).then(() => socket.resume());
      if (monitor.queued >= MAX_QUEUED) socket.pause();
    });
  }
}
