import {
  EXPORT,
  HANDSHAKE,
  INFO,
  MAX_STRING_BYTES,
  NBD_MAGIC,
  OPTION,
  OPTION_BYTES,
  OPTION_ERROR,
  OPTION_MAGIC,
  OPTION_REPLY_BYTES,
  OPTION_REPLY_MAGIC,
  REPLY,
} from './numbers.js';

/** What a server offers under one name. */
export interface Offer {
  readonly name: string;
  /** Empty: none. */
  readonly description: string;
  /** Bytes. */
  readonly length: number;
  /** Transmission flags (`EXPORT`), without those that depend on what is agreed on. */
  readonly flags: number;
  /** Names of the metadata contexts; the number of one is its place here and one more. */
  readonly contexts: readonly string[];
}

/** What is the same for every client of a server. */
export interface HandshakeRules {
  /** What there is at the moment, the first name first. */
  readonly offers: () => readonly Offer[];
  /** `required`: nothing but TLS is spoken of before there is TLS. */
  readonly tls: 'none' | 'required';
  /** No new work is taken on. */
  readonly closing: () => boolean;
  /** There is no room for a second connection: who counted on one would wait for itself. */
  readonly single: boolean;
}

/** Block sizes that every offer has, in bytes: least, preferred, most. */
export const BLOCK_SIZES = [1, 4096, 32 * 1024 * 1024] as const;

/** What a client has chosen. */
export interface Agreement {
  readonly offer: Offer;
  readonly headers: 'simple' | 'structured' | 'extended';
  /** Numbers of the metadata contexts chosen, in ascending order. */
  readonly contexts: readonly number[];
  /** Transmission flags as the client was told them. */
  readonly flags: number;
}

/** What comes of a step: bytes for the client, and how it goes on once they are sent. */
export type Step =
  | { readonly send: readonly Uint8Array[]; readonly next: 'continue' | 'start-tls' | 'close' }
  | { readonly send: readonly Uint8Array[]; readonly next: 'transmission'; readonly agreement: Agreement };

/** Most bytes of an option that are looked at; a longer one is skipped. */
const MAX_OPTION_BYTES = 1024 * 1024;
/** Longest option that is skipped. */
const MAX_SKIPPED_BYTES = 32 * 1024 * 1024;
const SKIP_BYTES = 65536;
/** Most questions for metadata contexts in one option, and most contexts one client may choose. */
const MAX_QUERIES = 1024;
export const MAX_CONTEXTS = 16;

const HANDSHAKE_FLAGS = HANDSHAKE.fixedNewstyle | HANDSHAKE.noZeroes;
const NOTHING = new Uint8Array(0);

/** An option was refused: the reply for it. */
class Refusal extends Error {
  readonly type: number;

  constructor(type: number, text: string) {
    super(text);
    this.type = type;
  }
}

/**
 * The server's side of the agreement with one client, without its socket: it takes exactly the bytes it wants next and
 * says what to send.
 *
 *     client flags ──▶ option header ──▶ option data ──▶ (reply) ──▶ option header …
 *                          │  ▲              │
 *                          ▼  │              ├──▶ start-tls ──▶ option header, everything forgotten
 *                         skipping           ├──▶ transmission
 *                                            └──▶ close
 *
 * Whoever drives it must not read on ahead of what is wanted: what is behind STARTTLS belongs to TLS, and what is behind
 * GO are requests.
 */
export class ServerHandshake {
  readonly #rules: HandshakeRules;
  #state: 'flags' | 'header' | 'data' | 'skipping' = 'flags';
  #wanted = 4;
  #option = 0;
  #skip = 0;
  #fixed = false;
  #noZeroes = false;
  #secure = false;
  #headers: Agreement['headers'] = 'simple';
  #chosen: { readonly exportName: string; readonly contexts: readonly number[] } | undefined;

  constructor(rules: HandshakeRules) {
    this.#rules = rules;
  }

  /** How many bytes the next step takes. */
  get wanted(): number {
    return this.#wanted;
  }

  /** What the server says first. */
  static greeting(): Uint8Array {
    const bytes = Buffer.alloc(18);
    bytes.writeBigUInt64BE(NBD_MAGIC, 0);
    bytes.writeBigUInt64BE(OPTION_MAGIC, 8);
    bytes.writeUInt16BE(HANDSHAKE_FLAGS, 16);
    return bytes;
  }

  /** TLS was started: all that was said before it is void. */
  secured(): void {
    this.#secure = true;
    this.#headers = 'simple';
    this.#chosen = undefined;
  }

  /** @param bytes exactly as many as were {@link wanted}; valid only during the call */
  take(bytes: Uint8Array): Step {
    if (bytes.length !== this.#wanted) throw new RangeError(`${this.#wanted} bytes are wanted`);
    const data = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
    switch (this.#state) {
      case 'flags':
        return this.#clientFlags(data.readUInt32BE(0));
      case 'header':
        return this.#header(data);
      case 'skipping':
        this.#skip -= data.length;
        return this.#skipOn();
      case 'data':
        this.#expect('header', OPTION_BYTES);
        return this.#answer(this.#option, data);
    }
  }

  #expect(state: 'header' | 'data' | 'skipping', bytes: number): void {
    this.#state = state;
    this.#wanted = bytes;
  }

  #clientFlags(flags: number): Step {
    if ((flags & ~HANDSHAKE_FLAGS) !== 0) return close();
    this.#fixed = (flags & HANDSHAKE.fixedNewstyle) !== 0;
    this.#noZeroes = (flags & HANDSHAKE.noZeroes) !== 0;
    this.#expect('header', OPTION_BYTES);
    return reply();
  }

  #header(data: Buffer): Step {
    if (data.readBigUInt64BE(0) !== OPTION_MAGIC) return close();
    this.#option = data.readUInt32BE(8);
    const length = data.readUInt32BE(12);
    // Who does not know answers to options cannot be given any.
    if (!this.#fixed && this.#option !== OPTION.exportName) return close();
    if (this.#option === OPTION.exportName && length > MAX_STRING_BYTES) return close();
    if (length > MAX_SKIPPED_BYTES) return close();
    if (length > MAX_OPTION_BYTES) {
      this.#skip = length;
      return this.#skipOn();
    }
    if (length > 0) {
      this.#expect('data', length);
      return reply();
    }
    this.#expect('header', OPTION_BYTES);
    return this.#answer(this.#option, Buffer.from(NOTHING));
  }

  #skipOn(): Step {
    if (this.#skip > 0) {
      this.#expect('skipping', Math.min(this.#skip, SKIP_BYTES));
      return reply();
    }
    this.#expect('header', OPTION_BYTES);
    const known = Object.values(OPTION).some((option) => option === this.#option);
    if (this.#option === OPTION.abort) return this.#answer(OPTION.abort, Buffer.from(NOTHING));
    return known
      ? this.#refuse(OPTION_ERROR.tooBig, `more than ${MAX_OPTION_BYTES} bytes`)
      : this.#refuse(OPTION_ERROR.unsupported, 'unknown option');
  }

  #answer(option: number, data: Buffer): Step {
    try {
      return this.#handle(option, data);
    } catch (error) {
      if (error instanceof Refusal) return this.#refuse(error.type, error.message);
      throw error;
    }
  }

  #refuse(type: number, text: string): Step {
    return reply(optionReply(this.#option, type, Buffer.from(text)));
  }

  #acknowledge(...replies: readonly Uint8Array[]): Step {
    return reply(...replies, optionReply(this.#option, REPLY.ack, NOTHING));
  }

  #handle(option: number, data: Buffer): Step {
    if (option === OPTION.abort) {
      return { send: [optionReply(option, REPLY.ack, NOTHING)], next: 'close' };
    }
    const secure = this.#secure || this.#rules.tls === 'none';
    if (!secure && option !== OPTION.startTls) {
      if (option === OPTION.exportName) return close();
      throw new Refusal(OPTION_ERROR.tlsRequired, 'TLS is required');
    }
    if (this.#rules.closing()) {
      if (option === OPTION.exportName) return close();
      throw new Refusal(OPTION_ERROR.shutdown, 'the server is shutting down');
    }
    switch (option) {
      case OPTION.exportName:
        return this.#exportName(data);
      case OPTION.list:
        noData(data);
        return this.#acknowledge(...this.#rules.offers().map((offer) => serverReply(offer)));
      case OPTION.startTls:
        return this.#startTls(data);
      case OPTION.info:
      case OPTION.go:
        return this.#go(option, data);
      case OPTION.structuredReply:
        noData(data);
        if (this.#headers === 'extended') {
          throw new Refusal(
            OPTION_ERROR.extendedHeadersRequired,
            'extended headers are agreed on already, which are structured replies, too',
          );
        }
        if (this.#headers === 'structured') {
          throw new Refusal(OPTION_ERROR.invalid, 'structured replies are agreed on already');
        }
        this.#headers = 'structured';
        return this.#acknowledge();
      case OPTION.extendedHeaders:
        noData(data);
        if (this.#headers === 'extended') {
          throw new Refusal(OPTION_ERROR.invalid, 'extended headers are agreed on already');
        }
        this.#headers = 'extended';
        return this.#acknowledge();
      case OPTION.listMetaContext:
      case OPTION.setMetaContext:
        return this.#metaContexts(option, data);
      default:
        throw new Refusal(OPTION_ERROR.unsupported, 'unknown option');
    }
  }

  #startTls(data: Buffer): Step {
    noData(data);
    if (this.#secure) throw new Refusal(OPTION_ERROR.invalid, 'there is TLS already');
    if (this.#rules.tls === 'none') throw new Refusal(OPTION_ERROR.policy, 'TLS is not set up');
    return { send: [optionReply(OPTION.startTls, REPLY.ack, NOTHING)], next: 'start-tls' };
  }

  #find(name: string): Offer | undefined {
    return this.#rules.offers().find((offer) => offer.name === name);
  }

  #exportName(data: Buffer): Step {
    // There is no answer to this option but the export itself.
    const name = decodeName(data);
    const offer = name === undefined ? undefined : this.#find(name);
    if (offer === undefined || this.#headers === 'extended') return close();
    const agreement = this.#agree(offer);
    const bytes = Buffer.alloc(10 + (this.#noZeroes ? 0 : 124));
    bytes.writeBigUInt64BE(BigInt(offer.length), 0);
    bytes.writeUInt16BE(agreement.flags, 8);
    return { send: [bytes], next: 'transmission', agreement };
  }

  #go(option: typeof OPTION.info | typeof OPTION.go, data: Buffer): Step {
    const reader = new OptionReader(data);
    const offer = this.#offerOf(reader);
    const wanted = new Set<number>();
    for (let count = reader.uint16(); count > 0; count--) wanted.add(reader.uint16());
    reader.end();
    const agreement = this.#agree(offer);
    const about = Buffer.alloc(12);
    about.writeUInt16BE(INFO.export, 0);
    about.writeBigUInt64BE(BigInt(offer.length), 2);
    about.writeUInt16BE(agreement.flags, 10);
    const sizes = Buffer.alloc(14);
    sizes.writeUInt16BE(INFO.blockSize, 0);
    for (const [index, size] of BLOCK_SIZES.entries()) sizes.writeUInt32BE(size, 2 + 4 * index);
    const infos: Uint8Array[] = [about];
    if (wanted.has(INFO.name)) infos.push(textInfo(INFO.name, offer.name));
    if (wanted.has(INFO.description) && offer.description !== '') {
      infos.push(textInfo(INFO.description, offer.description));
    }
    infos.push(sizes);
    const { send } = this.#acknowledge(...infos.map((info) => optionReply(option, REPLY.info, info)));
    return option === OPTION.go ? { send, next: 'transmission', agreement } : { send, next: 'continue' };
  }

  #agree(offer: Offer): Agreement {
    const headers = this.#headers;
    const contexts =
      headers !== 'simple' && this.#chosen?.exportName === offer.name ? this.#chosen.contexts : [];
    const df = headers === 'simple' ? 0 : EXPORT.df;
    const payload = headers === 'extended' ? EXPORT.blockStatusPayload : 0;
    const offered = this.#rules.single ? offer.flags & ~EXPORT.multiConn : offer.flags;
    return { offer, headers, contexts, flags: offered | EXPORT.hasFlags | df | payload };
  }

  #offerOf(reader: OptionReader): Offer {
    const name = reader.name();
    const offer = this.#find(name);
    if (offer === undefined) throw new Refusal(OPTION_ERROR.unknown, `export '${shorten(name)}' not present`);
    return offer;
  }

  #metaContexts(option: typeof OPTION.listMetaContext | typeof OPTION.setMetaContext, data: Buffer): Step {
    const choosing = option === OPTION.setMetaContext;
    // A choice replaces the one before it even where it fails.
    if (choosing) this.#chosen = undefined;
    if (choosing && this.#headers === 'simple') {
      throw new Refusal(OPTION_ERROR.invalid, 'structured replies have to be agreed on first');
    }
    const reader = new OptionReader(data);
    const exportName = reader.name();
    const count = reader.uint32();
    if (count > MAX_QUERIES) throw new Refusal(OPTION_ERROR.tooBig, `more than ${MAX_QUERIES} queries`);
    const queries: string[] = [];
    for (let index = 0; index < count; index++) queries.push(reader.text());
    reader.end();
    const offer = this.#find(exportName);
    if (offer === undefined)
      throw new Refusal(OPTION_ERROR.unknown, `export '${shorten(exportName)}' not present`);
    const matches = (name: string): boolean =>
      choosing ? queries.includes(name) : count === 0 || queries.some((query) => listed(query, name));
    const found = offer.contexts.flatMap((name, index) =>
      matches(name) ? [{ name, number: index + 1 }] : [],
    );
    if (choosing && found.length > MAX_CONTEXTS) {
      throw new Refusal(OPTION_ERROR.tooBig, `more than ${MAX_CONTEXTS} contexts at once`);
    }
    if (choosing) this.#chosen = { exportName, contexts: found.map(({ number }) => number) };
    return this.#acknowledge(
      ...found.map(({ name, number }) => {
        const text = Buffer.from(name);
        const bytes = Buffer.alloc(4 + text.length);
        bytes.writeUInt32BE(choosing ? number : 0, 0);
        bytes.set(text, 4);
        return optionReply(option, REPLY.metaContext, bytes);
      }),
    );
  }
}

/** Whether a question of a listing asks for a context: a name, or the start of some as the namespaces define it. */
function listed(query: string, name: string): boolean {
  const wildcard = query === 'base:' || query === 'qemu:' || query === 'qemu:dirty-bitmap:';
  return query === name || (wildcard && name.startsWith(query));
}

/** Reads the data of an option; whatever does not fit is refused. */
class OptionReader {
  readonly #data: Buffer;
  #at = 0;

  constructor(data: Buffer) {
    this.#data = data;
  }

  uint16(): number {
    return this.#take(2).readUInt16BE(0);
  }

  uint32(): number {
    return this.#take(4).readUInt32BE(0);
  }

  /** A string behind its length. */
  text(): string {
    const length = this.uint32();
    if (length > MAX_STRING_BYTES) {
      throw new Refusal(OPTION_ERROR.invalid, `a string of more than ${MAX_STRING_BYTES} bytes`);
    }
    const text = decodeName(this.#take(length));
    if (text === undefined) throw new Refusal(OPTION_ERROR.invalid, 'a string that is not valid');
    return text;
  }

  /** Name of an export. */
  name(): string {
    return this.text();
  }

  end(): void {
    if (this.#at < this.#data.length)
      throw new Refusal(OPTION_ERROR.invalid, 'more data than there should be');
  }

  #take(length: number): Buffer {
    if (length > this.#data.length - this.#at) {
      throw new Refusal(OPTION_ERROR.invalid, 'less data than there should be');
    }
    const bytes = this.#data.subarray(this.#at, this.#at + length);
    this.#at += length;
    return bytes;
  }
}

/** Undefined where the bytes are no valid string: UTF-8 without NUL. */
function decodeName(bytes: Uint8Array): string | undefined {
  if (bytes.length > MAX_STRING_BYTES || bytes.includes(0)) return undefined;
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return undefined;
  }
}

/** A name for a message, which must not grow with what a client sends. */
function shorten(name: string): string {
  return name.length > 60 ? `${name.slice(0, 60)}…` : name;
}

function noData(data: Buffer): void {
  if (data.length > 0) throw new Refusal(OPTION_ERROR.invalid, 'the option has no data');
}

function reply(...send: readonly Uint8Array[]): Step {
  return { send, next: 'continue' };
}

function close(): Step {
  return { send: [], next: 'close' };
}

function optionReply(option: number, type: number, data: Uint8Array): Uint8Array {
  const bytes = Buffer.alloc(OPTION_REPLY_BYTES + data.length);
  bytes.writeBigUInt64BE(OPTION_REPLY_MAGIC, 0);
  bytes.writeUInt32BE(option, 8);
  bytes.writeUInt32BE(type, 12);
  bytes.writeUInt32BE(data.length, 16);
  bytes.set(data, OPTION_REPLY_BYTES);
  return bytes;
}

function serverReply({ name, description }: Offer): Uint8Array {
  const text = Buffer.from(name);
  const about = Buffer.from(description);
  const bytes = Buffer.alloc(4 + text.length + about.length);
  bytes.writeUInt32BE(text.length, 0);
  bytes.set(text, 4);
  bytes.set(about, 4 + text.length);
  return optionReply(OPTION.list, REPLY.server, bytes);
}

function textInfo(type: number, text: string): Uint8Array {
  const data = Buffer.from(text);
  const bytes = Buffer.alloc(2 + data.length);
  bytes.writeUInt16BE(type, 0);
  bytes.set(data, 2);
  return bytes;
}
