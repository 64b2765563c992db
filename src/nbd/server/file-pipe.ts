import type { HostRange } from '../../block/node.js';
import type { Pipe, ServerSockets } from '../../os/server-sockets.js';
import { SocketError } from '../../os/sockets.js';

/** What it should hold, in bytes. */
const PIPE_BYTES = 1024 * 1024;
const PAGE_BYTES = 4096;

/**
 * A thread's way from files to sockets for large reads: the kernel passes its pages on and nothing is copied. Data goes
 * into the pipe first, so that what cannot be read is known before a client is told that its data follows.
 */
export class FilePipe {
  readonly #sockets: ServerSockets & { close(fd: number): void };
  #pipe: Pipe | undefined;
  #impossible = false;
  /** Bytes in the pipe. */
  #held = 0;

  constructor(sockets: ServerSockets & { close(fd: number): void }) {
    this.#sockets = sockets;
  }

  /** @returns whether all of it is in the pipe; otherwise nothing is, and the data has to take another way */
  fill({ fd, offset }: HostRange, length: number): boolean {
    // Left over from a client that went away: nobody else may get it.
    if (this.#held > 0) this.close();
    const pipe = this.#open();
    // Data that does not begin with a page takes room for a part of one more.
    if (pipe === undefined || length + (offset % PAGE_BYTES === 0 ? 0 : PAGE_BYTES) > pipe.capacity)
      return false;
    let done = 0;
    try {
      while (done < length) {
        const put = this.#sockets.spliceIn(fd, offset + done, pipe, length - done);
        if (put === 0) break;
        done += put;
        this.#held = done;
      }
    } catch (error) {
      // Whoever reads it in the usual way finds out what is wrong, if anything is but that this file cannot be spliced.
      this.#impossible = error instanceof SocketError && error.code === 'EINVAL';
    }
    if (done === length) return true;
    this.close();
    return false;
  }

  /** Sends what is in the pipe. @returns the bytes taken */
  drain(socket: number, length: number): number {
    if (this.#pipe === undefined) throw new Error('invariant: the pipe was filled');
    const taken = this.#sockets.spliceOut(this.#pipe, socket, length);
    this.#held -= taken;
    return taken;
  }

  /** Gives the pipe back, with what is in it. The next {@link fill} makes another. */
  close(): void {
    const pipe = this.#pipe;
    this.#pipe = undefined;
    this.#held = 0;
    if (pipe === undefined) return;
    this.#sockets.close(pipe.read);
    this.#sockets.close(pipe.write);
  }

  #open(): Pipe | undefined {
    if (this.#impossible) return undefined;
    try {
      this.#pipe ??= this.#sockets.pipe(PIPE_BYTES);
    } catch {
      // Too many descriptors are open.
    }
    return this.#pipe;
  }
}
