import { type OnReadOpts, Socket, type SocketConstructorOpts } from 'node:net';
import type { Duplex } from 'node:stream';

/** Bytes on their way to the plain side at which no more are read. */
const MAX_PENDING_BYTES = 4 * 1024 * 1024;
/** Buffers that the plain side is read to in turn: one is read to while the others are on their way. */
const BUFFERS = 3;
const MOST_ON_THEIR_WAY = BUFFERS - 1;
const BUFFER_BYTES = 256 * 1024;

/**
 * The relay's end of the pair on which plain text is spoken. What comes in is read to the same few buffers again and
 * again, much of it at once: buffers made anew for each read, and many small writes, cost more than the encryption.
 */
export class PlainSide {
  readonly socket: Socket;
  readonly #free: Uint8Array[] = [];
  #made = 0;
  #onTheirWay = 0;
  #to: Duplex | undefined;
  /** What came before there was anybody to take it; nothing more is read then. */
  #early: { readonly bytes: number; readonly buffer: Uint8Array } | undefined;

  constructor(fd: number) {
    // A socket made from a descriptor takes this option as well as one that connects.
    const options: SocketConstructorOpts & { readonly onread: OnReadOpts } = {
      fd,
      readable: true,
      writable: true,
      allowHalfOpen: true,
      onread: { buffer: () => this.#next(), callback: (bytes, buffer) => this.#send(bytes, buffer) },
    };
    this.socket = new Socket(options);
  }

  /** Sends what comes in to the other side from now on. */
  forwardTo(to: Duplex): void {
    this.#to = to;
    this.socket.on('end', () => to.end());
    if (this.#early === undefined) return;
    this.#send(this.#early.bytes, this.#early.buffer);
    this.socket.resume();
  }

  /** The buffer for the next read: there always is one that is free. */
  #next(): Uint8Array {
    const buffer = this.#free.pop();
    if (buffer !== undefined) return buffer;
    if (this.#made === BUFFERS)
      throw new Error('invariant: nothing is read while all buffers are on their way');
    this.#made++;
    return new Uint8Array(BUFFER_BYTES);
  }

  /** @returns whether more may be read once the next buffer is full too */
  #send(bytes: number, buffer: Uint8Array): boolean {
    if (this.#to === undefined) {
      this.#early = { bytes, buffer };
      return false;
    }
    this.#onTheirWay++;
    this.#to.write(buffer.subarray(0, bytes), () => {
      this.#free.push(buffer);
      if (this.#onTheirWay-- === MOST_ON_THEIR_WAY) this.socket.resume();
    });
    return this.#onTheirWay < MOST_ON_THEIR_WAY;
  }
}

/** As `pipe`, but what comes in one turn of the event loop is sent with one call: records of TLS are small. */
export function forward(from: Duplex, to: Duplex): void {
  let corked = false;
  from.on('data', (bytes: Uint8Array) => {
    if (!corked) {
      corked = true;
      to.cork();
      setImmediate(() => {
        corked = false;
        to.uncork();
      });
    }
    to.write(bytes);
    if (to.writableLength > MAX_PENDING_BYTES) from.pause();
  });
  to.on('drain', () => from.resume());
  from.on('end', () => to.end());
}
