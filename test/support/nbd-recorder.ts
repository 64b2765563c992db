import { connect, createServer, type Server } from 'node:net';
import { Peer } from './fake-nbd.js';

const COMMAND = { read: 0, write: 1, disconnect: 2, trim: 4, writeZeroes: 6 } as const;
const GO = 7;
const ACK = 1;
const SIMPLE = 0x67446698;
const SECTOR = 512;

/**
 * Stands between an NBD client and a server, and keeps a record of its own of what was written. It speaks of no more of
 * the protocol than it takes to know where requests and answers begin.
 */
export class NbdRecorder {
  /** The drive as it must be. */
  readonly drive: Uint8Array;
  /** Sectors that were discarded and not written to since: nobody knows what they are. */
  readonly unknown: Uint8Array;
  /** Requests that were answered with an error. */
  errors = 0;
  readonly #server: Server;
  readonly #peers: Peer[] = [];
  #inFlight = 0;
  #idle: (() => void) | undefined;
  #gate: Promise<void> = Promise.resolve();
  #open: () => void = () => undefined;
  writes = 0;

  private constructor(server: Server, content: Uint8Array) {
    this.#server = server;
    this.drive = content;
    this.unknown = new Uint8Array(Math.ceil(content.length / SECTOR));
  }

  /** @param content of the drive at the beginning */
  static async listen(path: string, upstream: string, content: Uint8Array): Promise<NbdRecorder> {
    const server = createServer();
    const recorder = new NbdRecorder(server, content);
    server.on('connection', (socket) => {
      const [client, far] = [new Peer(socket), new Peer(connect(upstream))];
      recorder.#peers.push(client, far);
      recorder.#carry(client, far).catch(() => {
        client.socket.destroy();
        far.socket.destroy();
      });
    });
    await new Promise<void>((resolve) => server.listen(path, resolve));
    return recorder;
  }

  /** Keeps new requests back. Resolves when all that were let through are answered. */
  async hold(): Promise<void> {
    this.#gate = new Promise((resolve) => {
      this.#open = resolve;
    });
    if (this.#inFlight === 0) return;
    await new Promise<void>((resolve) => {
      this.#idle = resolve;
    });
  }

  release(): void {
    this.#open();
  }

  close(): void {
    this.release();
    for (const peer of this.#peers) peer.socket.destroy();
    this.#server.close();
  }

  async #carry(client: Peer, far: Peer): Promise<void> {
    client.write(await far.read(18));
    far.write(await client.read(4));
    for (;;) {
      const head = await client.read(16);
      const data = await client.read(head.readUInt32BE(12));
      far.write(head, data);
      if ((await this.#optionAnswer(client, far)) && head.readUInt32BE(8) === GO) break;
    }
    const lengths = new Map<bigint, number>();
    await Promise.race([this.#requests(client, far, lengths), this.#answers(client, far, lengths)]);
  }

  /** @returns whether the option was granted */
  async #optionAnswer(client: Peer, far: Peer): Promise<boolean> {
    for (;;) {
      const head = await far.read(20);
      client.write(head, await far.read(head.readUInt32BE(16)));
      const type = head.readUInt32BE(12);
      if (type === ACK || type >= 0x80000000) return type === ACK;
    }
  }

  async #requests(client: Peer, far: Peer, lengths: Map<bigint, number>): Promise<void> {
    for (;;) {
      const head = await client.read(28);
      const command = head.readUInt16BE(6);
      const length = head.readUInt32BE(24);
      const data = await client.read(command === COMMAND.write ? length : 0);
      await this.#gate;
      if (command === COMMAND.disconnect) {
        far.write(head);
        return;
      }
      this.#inFlight++;
      lengths.set(head.readBigUInt64BE(8), command === COMMAND.read ? length : 0);
      this.#record(command, Number(head.readBigUInt64BE(16)), length, data);
      far.write(head, data);
    }
  }

  #record(command: number, offset: number, length: number, data: Uint8Array): void {
    const [first, end] = [Math.floor(offset / SECTOR), Math.ceil((offset + length) / SECTOR)];
    if (command === COMMAND.write) this.drive.set(data, offset);
    else if (command === COMMAND.writeZeroes) this.drive.fill(0, offset, offset + length);
    else if (command === COMMAND.trim) this.unknown.fill(1, first, end);
    if (command !== COMMAND.write && command !== COMMAND.writeZeroes) return;
    this.unknown.fill(0, first, end);
    this.writes++;
  }

  async #answers(client: Peer, far: Peer, lengths: Map<bigint, number>): Promise<void> {
    for (;;) {
      const magic = await far.read(4);
      const simple = magic.readUInt32BE(0) === SIMPLE;
      const head = await far.read(simple ? 12 : 16);
      const cookie = head.readBigUInt64BE(4);
      const error = simple ? head.readUInt32BE(0) !== 0 : head.readUInt16BE(2) >= 0x8000;
      const bytes = simple ? (error ? 0 : (lengths.get(cookie) ?? 0)) : head.readUInt32BE(12);
      client.write(magic, head, await far.read(bytes));
      if (error) this.errors++;
      if (!simple && (head.readUInt16BE(0) & 1) === 0) continue;
      lengths.delete(cookie);
      this.#inFlight--;
      if (this.#inFlight > 0) continue;
      this.#idle?.();
      this.#idle = undefined;
    }
  }
}
