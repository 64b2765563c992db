import { StillframeError } from '../../errors.js';
import {
  EXPORT,
  HANDSHAKE,
  INFO,
  MAX_STRING_BYTES,
  NBD_MAGIC,
  OLD_MAGIC,
  OPTION,
  OPTION_ERROR,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  REPLY,
  REPLY_ERROR,
} from '../../nbd/protocol/numbers.js';
import { TlsError } from '../../os/openssl.js';
import { connectionError, protocolError, refusedError, serverText } from './errors.js';
import { ConnectionLost, type SocketStream } from './stream.js';
import type { NbdTarget } from './uri.js';

/** What client and server have agreed on. */
export interface Session {
  /** Bytes of the export. */
  readonly length: number;
  /** Transmission flags: `EXPORT`. */
  readonly flags: number;
  readonly headers: 'simple' | 'structured' | 'extended';
  /** See NbdDescriptor. */
  readonly minBlock: number;
  readonly preferredBlock: number;
  readonly maxBlock: number;
  /** Numbers that the server has given to the metadata contexts it offers, by name. */
  readonly contexts: ReadonlyMap<string, number>;
}

export const BASE_ALLOCATION = 'base:allocation';

/** Longest answer to an option that is read, and most answers to one. */
const MAX_REPLY_BYTES = 2 * MAX_STRING_BYTES;
const MAX_REPLIES = 256;
/** Largest request without an agreement, and the largest we make. */
const MAX_BLOCK = 32 * 1024 * 1024;
/** Lengths are numbers that must stay exact, rounded up to 512 as well. */
const MAX_EXPORT_BYTES = 2 ** 53 - 512;

/**
 * Comes to an agreement with the server of a fresh connection about an export, up to the moment when requests may be
 * made.
 *
 * @param startTls makes the stream confidential, once the server agreed to
 * @returns the stream to go on with and the agreement
 * @throws ConnectionLost, StillframeError ERR_STILLFRAME_NBD_PROTOCOL, …_NBD_REFUSED, …_NBD_CONNECTION,
 *   …_UNSUPPORTED_FEATURE
 */
export function negotiate(
  name: string,
  target: NbdTarget,
  plain: SocketStream,
  startTls: (plain: SocketStream) => SocketStream,
): { readonly stream: SocketStream; readonly session: Session } {
  const greeting = greet(name, plain);
  let talk = new Haggling(name, plain);
  if (target.tls !== undefined) {
    if (!greeting.fixed) throw refusedError(name, 'the server is too old for TLS');
    talk.option(OPTION.startTls, new Uint8Array(0), 'TLS');
    // Nothing was read ahead: whatever somebody put behind the answer goes to TLS, which will not have it.
    talk = new Haggling(name, startTls(plain));
  }
  const { stream } = talk;
  if (!greeting.fixed) {
    const agreed = exportName(talk, target, greeting.noZeroes);
    return { stream, session: { ...agreed, headers: 'simple', contexts: new Map() } };
  }
  const headers = target.tls === undefined ? chooseHeaders(talk) : heard(() => chooseHeaders(talk));
  const contexts =
    headers === 'simple'
      ? new Map<string, number>()
      : chooseContexts(talk, target.exportName, [BASE_ALLOCATION, ...target.contexts]);
  const agreed = go(talk, target) ?? exportName(talk, target, greeting.noZeroes);
  return { stream, session: { ...agreed, headers, contexts } };
}

/** What is asked first after the TLS handshake: only with its answer it is known that the server trusts us, too. */
function heard<T>(ask: () => T): T {
  try {
    return ask();
  } catch (error) {
    // A server that says why tells of it in TLS; many only go away.
    if (!(error instanceof ConnectionLost) || error.cause instanceof TlsError) throw error;
    const why =
      'it may want another certificate of its clients (client-cert.pem in the folder tls-certificates)';
    throw new ConnectionLost(`${error.message} after the TLS handshake: ${why}`, { cause: error.cause });
  }
}

function greet(name: string, stream: SocketStream): { fixed: boolean; noZeroes: boolean } {
  const bytes = Buffer.alloc(18);
  stream.read(bytes, 0, 16);
  if (bytes.readBigUInt64BE(0) !== NBD_MAGIC)
    throw protocolError(name, 'it does not greet as an NBD server does');
  const style = bytes.readBigUInt64BE(8);
  if (style === OLD_MAGIC) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${name}': the server speaks the old style of the protocol, which is not supported; start it with the new style`,
    );
  }
  if (style !== OPTION_MAGIC) throw protocolError(name, 'it does not greet as an NBD server does');
  stream.read(bytes, 16, 2);
  const flags = bytes.readUInt16BE(16);
  const ours = Buffer.alloc(4);
  ours.writeUInt32BE(flags & (HANDSHAKE.fixedNewstyle | HANDSHAKE.noZeroes));
  stream.write(ours, 0, 4);
  return {
    fixed: (flags & HANDSHAKE.fixedNewstyle) !== 0,
    noZeroes: (flags & HANDSHAKE.noZeroes) !== 0,
  };
}

interface OptionReply {
  readonly type: number;
  readonly data: Buffer;
}

/** Options and the answers to them. */
class Haggling {
  readonly name: string;
  readonly stream: SocketStream;

  constructor(name: string, stream: SocketStream) {
    this.name = name;
    this.stream = stream;
  }

  send(option: number, data: Uint8Array): void {
    const bytes = Buffer.alloc(16 + data.length);
    bytes.writeBigUInt64BE(OPTION_MAGIC, 0);
    bytes.writeUInt32BE(option, 8);
    bytes.writeUInt32BE(data.length, 12);
    bytes.set(data, 16);
    this.stream.write(bytes, 0, bytes.length);
  }

  /**
   * The answers to an option up to the last one, which is an acknowledgement.
   *
   * @param wanted names what is asked for, in the error
   * @throws StillframeError ERR_STILLFRAME_NBD_REFUSED where the server answers with an error
   */
  option(option: number, data: Uint8Array, wanted: string): OptionReply[] {
    const replies = this.tryOption(option, data);
    if (Array.isArray(replies)) return replies;
    throw this.refusal(replies, wanted);
  }

  /** The answers up to the acknowledgement, or the error. */
  tryOption(option: number, data: Uint8Array): OptionReply[] | OptionReply {
    this.send(option, data);
    const replies: OptionReply[] = [];
    for (;;) {
      const reply = this.#reply(option);
      if (reply.type === REPLY.ack) return replies;
      if (reply.type >= REPLY_ERROR) return reply;
      if (replies.push(reply) > MAX_REPLIES) {
        throw protocolError(this.name, `more than ${MAX_REPLIES} answers to one option`);
      }
    }
  }

  #reply(option: number): OptionReply {
    const header = Buffer.alloc(20);
    this.stream.read(header, 0, 20);
    if (header.readBigUInt64BE(0) !== OPTION_REPLY_MAGIC)
      throw protocolError(this.name, 'an answer has a wrong magic');
    const about = header.readUInt32BE(8);
    if (about !== option)
      throw protocolError(this.name, `it answers to the option ${about} instead of ${option}`);
    const type = header.readUInt32BE(12);
    const length = header.readUInt32BE(16);
    if (length > MAX_REPLY_BYTES) {
      throw protocolError(this.name, `an answer of ${length} bytes to the option ${option}`);
    }
    const data = Buffer.alloc(length);
    this.stream.read(data, 0, length);
    return { type, data };
  }

  refusal({ type, data }: OptionReply, wanted: string): StillframeError {
    const text = data.length === 0 ? '' : ` (the server says: ${serverText(data)})`;
    switch (type) {
      case OPTION_ERROR.unknown:
        return refusedError(
          this.name,
          `the server has no such export${text}; 'nbdinfo --list' shows those it has`,
        );
      case OPTION_ERROR.tlsRequired:
        return refusedError(this.name, `the server wants TLS${text}; use nbds:// or nbds+unix://`);
      case OPTION_ERROR.shutdown:
        return connectionError(this.name, `the server is shutting down${text}`);
      default:
        return refusedError(this.name, `the server refuses ${wanted} (error ${type - REPLY_ERROR})${text}`);
    }
  }
}

function chooseHeaders(talk: Haggling): Session['headers'] {
  const nothing = new Uint8Array(0);
  if (Array.isArray(talk.tryOption(OPTION.extendedHeaders, nothing))) return 'extended';
  const structured = talk.tryOption(OPTION.structuredReply, nothing);
  if (Array.isArray(structured)) return 'structured';
  // Only after TLS can more be said.
  if (structured.type === OPTION_ERROR.tlsRequired) throw talk.refusal(structured, 'structured replies');
  return 'simple';
}

function chooseContexts(talk: Haggling, exportName: string, names: readonly string[]): Map<string, number> {
  const parts = [counted(exportName), uint32(names.length), ...names.map(counted)];
  const replies = talk.tryOption(OPTION.setMetaContext, Buffer.concat(parts));
  const contexts = new Map<string, number>();
  // A server without them, or one that knows the export's name only later: everything is data then.
  if (!Array.isArray(replies)) return contexts;
  for (const { type, data } of replies) {
    if (type !== REPLY.metaContext || data.length < 4) {
      throw protocolError(talk.name, `an answer of the type ${type} to a question for metadata contexts`);
    }
    const name = data.toString('utf8', 4);
    if (!names.includes(name)) continue;
    const id = data.readUInt32BE(0);
    if (contexts.has(name) || [...contexts.values()].includes(id)) {
      throw protocolError(talk.name, 'it names a metadata context twice');
    }
    contexts.set(name, id);
  }
  return contexts;
}

type Agreed = Omit<Session, 'headers' | 'contexts'>;

/** Undefined where the server does not know the option. */
function go(talk: Haggling, { exportName }: NbdTarget): Agreed | undefined {
  const request = Buffer.concat([counted(exportName), uint16(1), uint16(INFO.blockSize)]);
  const replies = talk.tryOption(OPTION.go, request);
  if (!Array.isArray(replies)) {
    if (replies.type === OPTION_ERROR.unsupported) return undefined;
    throw talk.refusal(replies, 'the export');
  }
  let length: bigint | undefined;
  let flags = 0;
  let sizes: readonly [number, number, number] | undefined;
  for (const { type, data } of replies) {
    if (type !== REPLY.info || data.length < 2) {
      throw protocolError(talk.name, `an answer of the type ${type} to a question for an export`);
    }
    const kind = data.readUInt16BE(0);
    if (kind === INFO.export) {
      if (data.length !== 12)
        throw protocolError(talk.name, `information on the export of ${data.length} bytes`);
      length = data.readBigUInt64BE(2);
      flags = data.readUInt16BE(10);
    } else if (kind === INFO.blockSize) {
      if (data.length !== 14)
        throw protocolError(talk.name, `information on block sizes of ${data.length} bytes`);
      sizes = [data.readUInt32BE(2), data.readUInt32BE(6), data.readUInt32BE(10)];
    }
  }
  if (length === undefined) throw protocolError(talk.name, 'it does not say how large the export is');
  return agree(talk.name, length, flags, sizes);
}

/** The way of servers that know nothing else. They close the connection where they have no such export. */
function exportName(talk: Haggling, { exportName }: NbdTarget, noZeroes: boolean): Agreed {
  talk.send(OPTION.exportName, Buffer.from(exportName));
  const bytes = Buffer.alloc(10 + (noZeroes ? 0 : 124));
  talk.stream.read(bytes, 0, bytes.length);
  return agree(talk.name, bytes.readBigUInt64BE(0), bytes.readUInt16BE(8), undefined);
}

function agree(
  name: string,
  length: bigint,
  flags: number,
  sizes: readonly [number, number, number] | undefined,
): Agreed {
  if (length > MAX_EXPORT_BYTES) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      `'${name}' has ${length} bytes; more than ${MAX_EXPORT_BYTES} (2^53 - 512) are not supported`,
    );
  }
  const bytes = Number(length);
  const known = (flags & EXPORT.hasFlags) === 0 ? 0 : flags;
  if (sizes === undefined) {
    // Whoever says nothing of blocks should take any; what is aligned to 512 everybody takes.
    const minBlock = bytes % 512 === 0 ? 512 : 1;
    return { length: bytes, flags: known, minBlock, preferredBlock: 4096, maxBlock: MAX_BLOCK };
  }
  const [minBlock, preferredBlock, most] = sizes;
  const valid =
    powerOfTwo(minBlock) &&
    minBlock <= 65536 &&
    powerOfTwo(preferredBlock) &&
    preferredBlock >= minBlock &&
    most >= minBlock;
  if (!valid) {
    throw protocolError(name, `block sizes of ${minBlock}, ${preferredBlock} and ${most} bytes`);
  }
  if (bytes % minBlock !== 0) {
    throw protocolError(
      name,
      `an export of ${bytes} bytes, which is no multiple of its blocks of ${minBlock}`,
    );
  }
  const maxBlock = Math.floor(Math.min(most, MAX_BLOCK) / minBlock) * minBlock;
  return { length: bytes, flags: known, minBlock, preferredBlock, maxBlock };
}

function powerOfTwo(value: number): boolean {
  return value > 0 && Number.isInteger(Math.log2(value));
}

function uint16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

function counted(text: string): Buffer {
  const bytes = Buffer.from(text);
  return Buffer.concat([uint32(bytes.length), bytes]);
}
