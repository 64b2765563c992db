import { readSync, writeSync } from 'node:fs';

/** The connection is gone, or takes too long: nothing more can be done with it. */
export class ConnectionLost extends Error {}

/** Blocking reads and writes on a connected socket, with a deadline over any number of them. */
export class SocketStream {
  readonly fd: number;
  /** Nothing is waited for beyond it, in the milliseconds of `performance.now()`. */
  deadlineMs: number;

  /** The time-out of the socket bounds each call; see {@link Sockets.setTimeout}. */
  constructor(fd: number, deadlineMs: number) {
    this.fd = fd;
    this.deadlineMs = deadlineMs;
  }

  /** Fills `length` bytes from `start` on. @throws ConnectionLost */
  read(bytes: Uint8Array, start: number, length: number): void {
    const end = start + length;
    for (let at = start; at < end; ) {
      this.#checkTime();
      const got = this.#attempt(() => readSync(this.fd, bytes, at, end - at, null));
      if (got === 0) throw new ConnectionLost('the server has closed the connection');
      at += got;
    }
  }

  /** Sends `length` bytes from `start` on. @throws ConnectionLost */
  write(bytes: Uint8Array, start: number, length: number): void {
    const end = start + length;
    for (let at = start; at < end; ) {
      at += this.#attempt(() => writeSync(this.fd, bytes, at, end - at, null));
      if (at < end) this.#checkTime();
    }
  }

  #attempt(call: () => number): number {
    for (;;) {
      try {
        return call();
      } catch (error) {
        const code = error instanceof Error && 'code' in error ? error.code : undefined;
        if (code === 'EINTR') continue;
        if (code === 'EAGAIN') throw late();
        const reason = error instanceof Error ? error.message : String(error);
        throw new ConnectionLost(`the connection was lost (${reason})`, { cause: error });
      }
    }
  }

  /** @throws ConnectionLost when the deadline is over */
  #checkTime(): void {
    if (performance.now() > this.deadlineMs) throw late();
  }
}

function late(): ConnectionLost {
  return new ConnectionLost('the server takes too long to answer');
}
