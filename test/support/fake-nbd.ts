import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';

/** The other side of a connection, for a scripted server. */
export class Peer {
  readonly socket: Duplex;
  #buffer = Buffer.alloc(0);
  #waiting: (() => void) | undefined;
  #ended = false;

  constructor(socket: Duplex) {
    this.socket = socket;
    socket.on('data', (data) => {
      this.#buffer = Buffer.concat([this.#buffer, data]);
      this.#waiting?.();
    });
    for (const event of ['end', 'error', 'close']) {
      socket.on(event, () => {
        this.#ended = true;
        this.#waiting?.();
      });
    }
  }

  /** Rejects when the client goes away first. */
  async read(length: number): Promise<Buffer> {
    while (this.#buffer.length < length) {
      if (this.#ended) throw new Error('the client went away');
      await new Promise<void>((resolve) => {
        this.#waiting = resolve;
      });
    }
    const bytes = this.#buffer.subarray(0, length);
    this.#buffer = this.#buffer.subarray(length);
    return bytes;
  }

  write(...parts: readonly Uint8Array[]): void {
    if (!this.socket.destroyed) this.socket.write(Buffer.concat(parts));
  }

  /** The option that comes next. */
  async option(): Promise<{ readonly option: number; readonly data: Buffer }> {
    const header = await this.read(16);
    return { option: header.readUInt32BE(8), data: await this.read(header.readUInt32BE(12)) };
  }

  /** As {@link request}, with extended headers. */
  async extendedRequest(): Promise<{
    readonly command: number;
    readonly flags: number;
    readonly cookie: Buffer;
    readonly offset: number;
    readonly length: number;
  }> {
    const header = await this.read(32);
    if (header.readUInt32BE(0) !== 0x21e41c71) throw new Error('no extended request');
    return {
      flags: header.readUInt16BE(4),
      command: header.readUInt16BE(6),
      cookie: header.subarray(8, 16),
      offset: Number(header.readBigUInt64BE(16)),
      length: Number(header.readBigUInt64BE(24)),
    };
  }

  /** The request that comes next; the data of a write is left to be read. */
  async request(): Promise<{
    readonly command: number;
    readonly flags: number;
    readonly cookie: Buffer;
    readonly offset: number;
    readonly length: number;
  }> {
    const header = await this.read(28);
    return {
      flags: header.readUInt16BE(4),
      command: header.readUInt16BE(6),
      cookie: header.subarray(8, 16),
      offset: Number(header.readBigUInt64BE(16)),
      length: header.readUInt32BE(24),
    };
  }
}

export const u16 = (value: number): Buffer => {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
};
export const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};
export const u64 = (value: number | bigint): Buffer => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return bytes;
};

export const GREETING = Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(3)]);
export const ACK = 1;
export const UNSUPPORTED = 0x80000001;

export function optionReply(option: number, type: number, data: Uint8Array = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u64(0x0003e889045565a9n), u32(option), u32(type), u32(data.length), data]);
}

export function simpleReply(cookie: Uint8Array, error = 0, data: Uint8Array = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u32(0x67446698), u32(error), cookie, data]);
}

/** @param flags 1: the last chunk of the answer */
export function chunk(
  flags: number,
  type: number,
  cookie: Uint8Array,
  data: Uint8Array = Buffer.alloc(0),
): Buffer {
  return Buffer.concat([u32(0x668e33ef), u16(flags), u16(type), cookie, u32(data.length), data]);
}

/** A chunk of an answer to an extended request. */
export function extendedChunk(
  flags: number,
  type: number,
  cookie: Uint8Array,
  data: Uint8Array = Buffer.alloc(0),
): Buffer {
  return Buffer.concat([u32(0x6e8a278c), u16(flags), u16(type), cookie, u64(0), u64(data.length), data]);
}

export interface Manners {
  /** Answers to options, by their numbers, instead of the right ones; undefined: the right one. */
  readonly options?: (option: number, data: Buffer) => Buffer | undefined;
  readonly length?: number | bigint;
  /** Transmission flags. */
  readonly flags?: number;
}

/** A well-behaved handshake, but for what `manners` says; to the end of it. */
export async function handshake(peer: Peer, manners: Manners = {}): Promise<void> {
  peer.write(GREETING);
  await peer.read(4);
  for (;;) {
    const { option, data } = await peer.option();
    const own = manners.options?.(option, data);
    if (own !== undefined) {
      peer.write(own);
      if (option === 7) return;
    } else if (option === 7) {
      const information = Buffer.concat([
        u16(0),
        u64(manners.length ?? 1 << 20),
        u16(manners.flags ?? 0x1ed),
      ]);
      peer.write(optionReply(option, 3, information), optionReply(option, ACK));
      return;
    } else if (option === 8) peer.write(optionReply(option, ACK));
    else if (option === 10) {
      peer.write(
        optionReply(option, 4, Buffer.concat([u32(7), Buffer.from('base:allocation')])),
        optionReply(option, ACK),
      );
    } else peer.write(optionReply(option, UNSUPPORTED));
  }
}

/**
 * Runs `body` with the name of an export of a server that follows `script` on each connection; what the script throws
 * because the client went away is no matter.
 */
export async function withFakeServer<T>(
  script: (peer: Peer) => Promise<void>,
  body: (uri: string) => Promise<T>,
): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-fake-'));
  const peers = new Set<Socket>();
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    peers.add(socket);
    script(new Peer(socket)).catch(() => undefined);
  });
  server.listen(join(folder, 'socket'));
  await once(server, 'listening');
  try {
    return await body(`nbd+unix:///?socket=${folder}/socket&x-timeout=0.5`);
  } finally {
    for (const socket of peers) socket.destroy();
    server.close();
    rmSync(folder, { recursive: true, force: true });
  }
}
