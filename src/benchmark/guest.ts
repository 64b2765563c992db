import { readSync, writeSync } from 'node:fs';
import { Worker } from 'node:worker_threads';
import { StillframeError } from '../errors.js';
import { NBD_MAGIC, OPTION, OPTION_MAGIC } from '../nbd/protocol/numbers.js';
import { type Sockets, sockets } from '../os/sockets.js';
import { type Answered, GuestMemory } from './guest-memory.js';
import type { GuestThreadData, Load } from './guest-thread.js';

/** How long what is under way may take when the load has ended, in milliseconds. */
const DRAIN_MS = 30_000;
/** What is remembered of requests at most: a run of minutes. */
const MOST_REQUESTS = 4_000_000;
/** Flags of a client: the fixed handshake, without its zeroes. */
const FIXED_NO_ZEROES = 3;

/**
 * A guest that writes to a drive, over a unix socket: the load is open, so a drive that does not answer meets as many
 * requests as one that does, and those that could not even be made in time are late by that.
 */
export class Guest {
  readonly #sockets: Sockets;
  readonly #fd: number;
  readonly #memory: GuestMemory;
  readonly #threads: readonly Worker[];
  readonly #ends: readonly Promise<unknown>[];
  #failure: string | undefined;

  /**
   * @param seconds of load that are remembered at least
   * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE, …_IO
   */
  constructor(socket: string, exportName: string, load: Load, seconds: number) {
    const calls = sockets();
    if (calls === undefined) {
      throw new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        'there are no blocking sockets on this platform: guests are measured on Linux, with the FFI package',
      );
    }
    this.#sockets = calls;
    const address = calls.unixAddress(socket);
    this.#fd = calls.open(address);
    try {
      calls.connect(this.#fd, address);
      shakeHands(this.#fd, exportName);
    } catch (error) {
      calls.close(this.#fd);
      throw error;
    }
    this.#memory = GuestMemory.allocate(
      Math.min(MOST_REQUESTS, Math.ceil(2 * load.rate * seconds) + 100_000),
    );
    const start = (role: GuestThreadData['role']): Worker => {
      const workerData: GuestThreadData = { role, fd: this.#fd, memory: this.#memory.buffer, load };
      const thread = new Worker(new URL('./guest-thread.js', import.meta.url), { workerData });
      thread.on('message', (text: string) => {
        this.#failure ??= text;
      });
      thread.on('error', (error) => {
        this.#failure ??= error.message;
      });
      return thread;
    };
    this.#threads = [start('receiver'), start('sender')];
    this.#ends = this.#threads.map((thread) => new Promise((resolve) => thread.once('exit', resolve)));
  }

  /** Throws what went wrong. */
  check(): void {
    if (this.#failure !== undefined) {
      throw new StillframeError('ERR_STILLFRAME_IO', `the guest of the benchmark: ${this.#failure}`);
    }
  }

  /**
   * Ends the load.
   *
   * @param drainMs how long what is under way may take, in milliseconds
   * @returns all that was asked for
   * @throws StillframeError ERR_STILLFRAME_IO where a write failed
   */
  async end(drainMs = DRAIN_MS): Promise<Answered> {
    this.#memory.stop();
    const timer = setTimeout(() => this.#sockets.shutdown(this.#fd), drainMs);
    await Promise.all(this.#ends);
    clearTimeout(timer);
    this.#sockets.close(this.#fd);
    const all = this.#memory.all();
    // What was not answered for so long is in it, and no failure of the guest.
    if (this.#memory.answered === this.#memory.sent) this.check();
    return all;
  }
}

/** The shortest handshake there is, after which answers are simple. */
function shakeHands(fd: number, exportName: string): void {
  const greeting = receive(fd, 18);
  if (greeting.readBigUInt64BE(0) !== NBD_MAGIC || greeting.readBigUInt64BE(8) !== OPTION_MAGIC) {
    throw new StillframeError(
      'ERR_STILLFRAME_NBD_PROTOCOL',
      'the server of the benchmark does not speak NBD',
    );
  }
  const name = Buffer.from(exportName, 'utf8');
  const hello = Buffer.alloc(20 + name.length);
  hello.writeUInt32BE(FIXED_NO_ZEROES, 0);
  hello.writeBigUInt64BE(OPTION_MAGIC, 4);
  hello.writeUInt32BE(OPTION.exportName, 12);
  hello.writeUInt32BE(name.length, 16);
  name.copy(hello, 20);
  writeSync(fd, hello);
  receive(fd, 10);
}

function receive(fd: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let done = 0; done < length; ) {
    const got = readSync(fd, bytes, done, length - done, null);
    if (got === 0) {
      throw new StillframeError('ERR_STILLFRAME_NBD_CONNECTION', 'the server of the benchmark went away');
    }
    done += got;
  }
  return bytes;
}
