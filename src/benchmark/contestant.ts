import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { StillframeError } from '../errors.js';
import { QmpClient, type ServerEvent } from '../qmp/client.js';
import type { JsonObject } from '../qmp/types.js';

/** How long a daemon may take to start, in milliseconds. */
const START_MS = 20_000;
/** How long a client or a job may take to leave a node, in milliseconds. */
const LEAVE_MS = 10_000;
/** What is kept of what it says of errors. */
const MOST_TEXT = 4096;

/** A storage daemon that is told by QMP what to do: ours, or QEMU's. */
export class Contestant {
  readonly name: string;
  /** Of its NBD server. */
  readonly socket: string;
  readonly #child: ChildProcess;
  readonly #qmp: QmpClient;

  private constructor(name: string, socket: string, child: ChildProcess, qmp: QmpClient) {
    this.name = name;
    this.socket = socket;
    this.#child = child;
    this.#qmp = qmp;
  }

  /**
   * Starts a daemon.
   *
   * @param command its program and the arguments before those that both have
   * @param folder for its sockets
   * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_IO
   */
  static async start(name: string, command: readonly string[], folder: string): Promise<Contestant> {
    const [program = '', ...first] = command;
    const monitor = join(folder, 'qmp');
    const socket = join(folder, 'nbd');
    await Promise.all([monitor, socket].map((path) => rm(path, { force: true })));
    const child = spawn(
      program,
      [
        ...first,
        ...['--chardev', `socket,id=monitor,path=${monitor},server=on,wait=off`],
        ...['--monitor', 'chardev=monitor'],
        ...['--nbd-server', `addr.type=unix,addr.path=${socket}`],
      ],
      { stdio: ['ignore', 'ignore', 'pipe'] },
    );
    let text = '';
    child.stderr.on('data', (data) => {
      text = (text + String(data)).slice(-MOST_TEXT);
    });
    let failure: Error | undefined;
    child.once('error', (error) => {
      failure = error;
    });
    const failed = (what: string): StillframeError =>
      new StillframeError('ERR_STILLFRAME_IO', `${name} (${program}) ${what}: ${text.trim()}`);
    const until = performance.now() + START_MS;
    while (!existsSync(monitor) || !existsSync(socket)) {
      if (failure !== undefined) {
        throw new StillframeError(
          'ERR_STILLFRAME_NOT_FOUND',
          `'${program}' cannot be started: ${failure.message}`,
        );
      }
      if (child.exitCode !== null) throw failed(`ended with ${child.exitCode}`);
      if (performance.now() > until) {
        child.kill('SIGKILL');
        throw failed('does not start');
      }
      await sleep(10);
    }
    return new Contestant(name, socket, child, await QmpClient.connect(monitor));
  }

  tell(command: string, given: JsonObject = {}): Promise<unknown> {
    return this.#qmp.execute(command, given);
  }

  /** Closes a node as soon as nobody uses it any more: whoever did may take a moment to leave. */
  async stopUsing(node: string): Promise<void> {
    for (const until = performance.now() + LEAVE_MS; ; await sleep(10)) {
      try {
        await this.tell('blockdev-del', { 'node-name': node });
        return;
      } catch (error) {
        const isBusy = error instanceof StillframeError && /in use|is used/.test(error.message);
        if (!isBusy || performance.now() > until) throw error;
      }
    }
  }

  /** The next event that `test` picks. @throws StillframeError where the daemon goes away first */
  next(test: (event: ServerEvent) => boolean): Promise<ServerEvent> {
    return new Promise((resolve, reject) => {
      const stopEvents = this.#qmp.onEvent((event) => {
        if (!test(event)) return;
        stopEvents();
        stopEnd();
        resolve(event);
      });
      const stopEnd = this.#qmp.onEnd((reason) => {
        stopEvents();
        reject(reason);
      });
    });
  }

  async stop(): Promise<void> {
    this.#qmp.close();
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const gone = once(this.#child, 'exit');
    this.#child.kill('SIGTERM');
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), START_MS);
    await gone;
    clearTimeout(timer);
  }
}
