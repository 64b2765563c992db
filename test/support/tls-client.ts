import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { type ConnectionOptions, type TLSSocket, connect as tlsConnect } from 'node:tls';
import { u32 } from './fake-nbd.js';

async function take(socket: Socket, length: number): Promise<void> {
  while (socket.read(length) === null) {
    if (socket.readableEnded || socket.destroyed) throw new Error('the server went away');
    await Promise.race([once(socket, 'readable'), once(socket, 'end'), once(socket, 'close')]);
  }
}

/** A connection on which both sides have agreed on TLS, in plain text, and not begun with it. */
export async function beforeTls(path: string): Promise<Socket> {
  const socket = connect({ path, allowHalfOpen: true });
  socket.on('error', () => undefined);
  try {
    await take(socket, 18);
    socket.write(Buffer.concat([u32(3), Buffer.from('IHAVEOPT'), u32(5), u32(0)]));
    await take(socket, 20);
  } catch (error) {
    socket.destroy();
    throw error;
  }
  return socket;
}

/** How a client knows the server by a key that both have. */
export function byKey(identity: string, hexadecimal: string): ConnectionOptions {
  return {
    ciphers: 'TLS_AES_128_GCM_SHA256:DHE-PSK-AES128-GCM-SHA256:PSK-AES128-GCM-SHA256',
    pskCallback: () => ({ identity, psk: Buffer.from(hexadecimal, 'hex') }),
    checkServerIdentity: () => undefined,
  };
}

/** What lies between a client and the server, and does with the client's bytes what a test wants. */
export class Tampering extends Duplex {
  readonly socket: Socket;
  readonly #change: (bytes: Buffer, socket: Socket) => Promise<void>;

  /** @param change hands on to the socket what it is to get of some bytes */
  constructor(socket: Socket, change: (bytes: Buffer, socket: Socket) => Promise<void>) {
    super();
    this.socket = socket;
    this.#change = change;
    socket.on('data', (data) => this.push(data));
    socket.on('end', () => this.push(null));
    socket.on('close', () => this.destroy());
  }

  override _read(): void {
    // Whatever comes is handed on.
  }

  override _write(bytes: Buffer, _: BufferEncoding, done: (error?: Error | null) => void): void {
    this.#change(bytes, this.socket).then(() => done(), done);
  }

  override _final(done: () => void): void {
    this.socket.end(done);
  }

  override _destroy(error: Error | null, done: (error?: Error | null) => void): void {
    this.socket.destroy();
    done(error);
  }
}

/** Begins with TLS. Rejects where that fails. */
export async function speakTls(wire: Socket | Tampering, options: ConnectionOptions): Promise<TLSSocket> {
  const secure = tlsConnect({ socket: wire, ...options });
  try {
    await once(secure, 'secureConnect');
  } catch (error) {
    secure.destroy();
    wire.destroy();
    throw error;
  }
  // What goes wrong later is seen by the end that comes with it.
  secure.on('error', () => undefined);
  return secure;
}
