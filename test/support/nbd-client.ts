import { execFile } from 'node:child_process';
import { connect } from 'node:net';
import type { Duplex } from 'node:stream';
import { promisify } from 'node:util';
import { Peer, u16, u32, u64 } from './fake-nbd.js';

const exec = promisify(execFile);

/** Runs a tool beside a server in this process. @returns what it printed */
export async function tool(name: string, ...args: readonly string[]): Promise<string> {
  const { stdout } = await exec(name, args, { maxBuffer: 1 << 28, timeout: 60_000 });
  return stdout;
}

export const SIMPLE = 0x67446698;
export const STRUCTURED = 0x668e33ef;
export const EXTENDED = 0x6e8a278c;

export interface OptionReply {
  readonly option: number;
  readonly type: number;
  readonly data: Buffer;
}

/** One reply, or one chunk of one. */
export interface Answer {
  readonly magic: number;
  /** Of simple replies and error chunks; 0 elsewhere. */
  readonly error: number;
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  readonly data: Buffer;
}

/** A client that does what it is told, right or wrong. */
export class RawClient {
  readonly peer: Peer;
  readonly #socket: Duplex;

  /** @param to a socket's path, or what is connected already */
  constructor(to: string | Duplex) {
    this.#socket = typeof to === 'string' ? connect({ path: to, allowHalfOpen: true }) : to;
    this.peer = new Peer(this.#socket);
  }

  /** One that has agreed on an export. */
  static async to(
    path: string,
    {
      options = [8] as readonly number[],
      contexts = [] as readonly string[],
      exportName = '',
      flags = 3,
    } = {},
  ): Promise<RawClient> {
    const client = new RawClient(path);
    await client.greet(flags);
    for (const option of options) await client.option(option);
    if (contexts.length > 0) {
      const names = contexts.map((context) => Buffer.concat([u32(context.length), Buffer.from(context)]));
      await client.option(10, counted(exportName), u32(names.length), ...names);
    }
    const answers = await client.option(7, counted(exportName), u16(0));
    if (answers.at(-1)?.type !== 1) throw new Error('no export');
    return client;
  }

  async greet(flags = 3): Promise<void> {
    await this.peer.read(18);
    this.send(u32(flags));
  }

  send(...parts: readonly Uint8Array[]): void {
    this.peer.write(...parts);
  }

  /** The answers to an option, up to the last one. */
  async option(option: number, ...data: readonly Uint8Array[]): Promise<OptionReply[]> {
    const bytes = Buffer.concat(data);
    this.send(Buffer.from('IHAVEOPT'), u32(option), u32(bytes.length), bytes);
    const answers: OptionReply[] = [];
    for (;;) {
      const header = await this.peer.read(20);
      const type = header.readUInt32BE(12);
      const length = header.readUInt32BE(16);
      answers.push({ option: header.readUInt32BE(8), type, data: await this.peer.read(length) });
      if (type === 1 || type >= 0x80000000) return answers;
    }
  }

  request(
    command: number,
    cookie: number,
    offset: number | bigint,
    length: number,
    flags = 0,
    data: Uint8Array = Buffer.alloc(0),
  ): void {
    this.send(u32(0x25609513), u16(flags), u16(command), u64(cookie), u64(offset), u32(length), data);
  }

  extended(
    command: number,
    cookie: number,
    offset: number | bigint,
    length: number | bigint,
    flags = 0,
    data: Uint8Array = Buffer.alloc(0),
  ): void {
    this.send(u32(0x21e41c71), u16(flags), u16(command), u64(cookie), u64(offset), u64(length), data);
  }

  /** @param bytes of data behind a simple reply without an error */
  async answer(bytes = 0): Promise<Answer> {
    const magic = (await this.peer.read(4)).readUInt32BE(0);
    if (magic === SIMPLE) {
      const header = await this.peer.read(12);
      const error = header.readUInt32BE(0);
      const data = await this.peer.read(error === 0 ? bytes : 0);
      return { magic, error, flags: 1, type: 0, cookie: header.readBigUInt64BE(4), data };
    }
    const header = await this.peer.read(magic === EXTENDED ? 28 : 16);
    const length = magic === EXTENDED ? Number(header.readBigUInt64BE(20)) : header.readUInt32BE(12);
    const data = await this.peer.read(length);
    const type = header.readUInt16BE(2);
    return {
      magic,
      error: (type & 0x8000) === 0 ? 0 : data.readUInt32BE(0),
      flags: header.readUInt16BE(0),
      type,
      cookie: header.readBigUInt64BE(4),
      data,
    };
  }

  /** All parts of the next answer. */
  async answers(bytes = 0): Promise<Answer[]> {
    const all: Answer[] = [];
    do all.push(await this.answer(bytes));
    while (((all.at(-1)?.flags ?? 1) & 1) === 0);
    return all;
  }

  /** Resolves when the server has closed the connection; whatever it still sends is thrown away. */
  async closed(): Promise<void> {
    for (;;) {
      try {
        await this.peer.read(1);
      } catch {
        return;
      }
    }
  }

  /** Says that nothing more will be sent. */
  end(): void {
    this.#socket.end();
  }

  /** Nothing that comes is taken any more. */
  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  destroy(): void {
    this.#socket.destroy();
  }
}

export function counted(text: string | Uint8Array): Buffer {
  const bytes = Buffer.from(text);
  return Buffer.concat([u32(bytes.length), bytes]);
}
