import { readSync, writeSync } from 'node:fs';
import type { Arena } from '../../kernels/arena.js';
import type { ServerSockets } from '../../os/server-sockets.js';

/**
 * How the bytes of one connection get from its socket to the arena and back. One thread may send while another receives.
 * Failures, interruptions (`EINTR`) included, are thrown; where sending was interrupted nothing was taken.
 */
export interface Wire {
  /** Files can be sent without passing through memory. */
  readonly takesFiles: boolean;
  /**
   * Reads what there is, and waits for the first of it.
   *
   * @returns the bytes read, 0 at the end, undefined where none came for the time-out of the socket
   */
  receive(pointer: number, most: number): number | undefined;
  /** Reads all of it. @returns fewer bytes only at the end or after the time-out; undefined: the same with none read */
  receiveAll(pointer: number, length: number): number | undefined;
  /**
   * Reads without sleeping, and looks for bytes again and again.
   *
   * @param until how long, by `performance.now()`, in milliseconds
   * @returns the bytes read; 0 or less: nothing, or nothing that {@link receive} would not tell
   */
  lookOut(pointer: number, most: number, until: number): number;
  /** Waits until something was taken. @param more what follows belongs to it @returns the bytes taken */
  send(pointer: number, length: number, more: boolean): number;
}

/** Without TLS. */
export class PlainWire implements Wire {
  readonly takesFiles = true;
  readonly #arena: Arena;
  readonly #sockets: ServerSockets;
  readonly #memory: number;
  readonly #fd: number;

  /** @param memory address of the arena */
  constructor(arena: Arena, sockets: ServerSockets, memory: number, fd: number) {
    this.#arena = arena;
    this.#sockets = sockets;
    this.#memory = memory;
    this.#fd = fd;
  }

  receive(pointer: number, most: number): number | undefined {
    return readSync(this.#fd, this.#arena.u8, pointer, most, null);
  }

  receiveAll(pointer: number, length: number): number | undefined {
    return this.#sockets.receiveAll(this.#fd, this.#memory + pointer, length);
  }

  lookOut(pointer: number, most: number, until: number): number {
    return receiveUntil(this.#sockets, this.#fd, this.#memory + pointer, most, until);
  }

  send(pointer: number, length: number, more: boolean): number {
    if (more) return this.#sockets.sendFrom(this.#fd, this.#memory + pointer, length, true);
    return writeSync(this.#fd, this.#arena.u8, pointer, length, null);
  }
}

/** Reads what there is, and looks for the first of it until then. @returns as {@link ServerSockets.receiveNow} */
export function receiveUntil(
  sockets: ServerSockets,
  fd: number,
  address: number,
  length: number,
  until: number,
): number {
  for (;;) {
    const came = sockets.receiveNow(fd, address, length);
    if (came >= 0 || performance.now() >= until) return came;
  }
}
