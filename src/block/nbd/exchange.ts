import {
  CHUNK,
  CHUNK_DONE,
  CHUNK_ERROR,
  COMMAND,
  COMMAND_FLAG,
  type Command,
  ERRNO,
  EXTENDED_BYTES,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_MAGIC,
  MAX_STRING_BYTES,
  REQUEST_BYTES,
  REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from '../../nbd/protocol/numbers.js';
import { protocolError, serverText } from './errors.js';
import type { Session } from './handshake.js';
import { ConnectionLost, type SocketStream } from './stream.js';

/** One request on its way. Offsets and lengths are bytes. */
export interface NbdRequest {
  readonly command: Command;
  /** `COMMAND_FLAG` bits. */
  readonly flags: number;
  readonly offset: number;
  readonly length: number;
  /** Where the data of a write comes from, and that of a read goes to: `length` bytes from `start` on. */
  readonly data?: { readonly bytes: Uint8Array; readonly start: number };
  /** Takes the extents of a block status, context by context, in order. */
  readonly onExtent?: (context: number, length: number, flags: number) => void;
}

/** What the server says went wrong with a request. */
export interface RequestError {
  readonly request: NbdRequest;
  /** Name of the error number. */
  readonly errno: string;
  /** What the server says about it; empty where it says nothing. */
  readonly text: string;
}

/** Requests that are on their way at once; qemu-nbd takes no more. */
export const MAX_IN_FLIGHT = 16;
/** Extents of one answer that are looked at; there may be more of them than anybody wants to keep. */
const MAX_EXTENTS = 16384;
const PART_BYTES = 65536;
/** Separate pieces in which the data of one read may come, as long as they are not neighbours. */
const MAX_PIECES = 4096;

// Of this thread, which is in one exchange at a time.
const header = Buffer.alloc(64);
const sending = Buffer.alloc(MAX_IN_FLIGHT * EXTENDED_BYTES);

interface InFlight {
  readonly request: NbdRequest;
  readonly covered: Coverage;
  readonly contexts: Set<number>;
  error: RequestError | undefined;
}

/** The ranges of a read that have come, and proof that none came twice. */
class Coverage {
  readonly #starts: number[] = [];
  readonly #ends: number[] = [];
  bytes = 0;

  /** False where the range overlaps one that came before, or there are too many pieces. */
  add(start: number, end: number): boolean {
    const [starts, ends] = [this.#starts, this.#ends];
    let index = starts.length;
    while (index > 0 && (starts[index - 1] ?? 0) > start) index--;
    const before = index === 0 ? -1 : (ends[index - 1] ?? 0);
    const after = starts[index] ?? Number.POSITIVE_INFINITY;
    if (before > start || after < end) return false;
    this.bytes += end - start;
    if (before === start && after === end) {
      ends[index - 1] = ends[index] ?? 0;
      starts.splice(index, 1);
      ends.splice(index, 1);
    } else if (before === start) ends[index - 1] = end;
    else if (after === end) starts[index] = start;
    else {
      starts.splice(index, 0, start);
      ends.splice(index, 0, end);
    }
    return starts.length <= MAX_PIECES;
  }
}

/** Requests and answers on one connection, for as long as one thread has it for itself. */
export class Exchange {
  readonly #name: string;
  readonly #stream: SocketStream;
  readonly #session: Pick<Session, 'headers' | 'length'>;
  readonly #timeoutMs: number;
  readonly #inFlight = new Map<number, InFlight>();
  #cookie: number;
  #failure: RequestError | undefined;
  #shutdown = false;

  /** @param cookie a number from which on none was used on this connection before */
  constructor(
    name: string,
    stream: SocketStream,
    session: Pick<Session, 'headers' | 'length'>,
    timeoutMs: number,
    cookie: number,
  ) {
    this.#name = name;
    this.#stream = stream;
    this.#session = session;
    this.#timeoutMs = timeoutMs;
    this.#cookie = cookie;
  }

  /** The number from which on no cookie was used. */
  get cookie(): number {
    return this.#cookie;
  }

  /**
   * Carries requests out, several at a time and in no particular order. After an error no further ones are sent.
   *
   * @returns the first error of the server, undefined where everything went well
   * @throws ConnectionLost, StillframeError ERR_STILLFRAME_NBD_PROTOCOL; the connection is of no use any more then
   */
  run(requests: readonly NbdRequest[]): RequestError | undefined {
    let next = 0;
    for (;;) {
      const stop = this.#failure !== undefined || this.#shutdown;
      if (!stop && next < requests.length && this.#inFlight.size < MAX_IN_FLIGHT)
        next = this.#send(requests, next);
      if (this.#inFlight.size === 0) break;
      this.#stream.deadlineMs = performance.now() + this.#timeoutMs;
      // A chunk of several is no progress: the clock runs on.
      while (!this.#receive());
    }
    if (this.#shutdown) throw new ConnectionLost('the server is shutting down');
    return this.#failure;
  }

  /** Tells the server that nothing more will come. */
  disconnect(): void {
    const bytes = this.#encode(0, { command: COMMAND.disconnect, flags: 0, offset: 0, length: 0 });
    this.#stream.write(sending, 0, bytes);
  }

  /** Sends what may be on its way. @returns the first request that was not sent */
  #send(requests: readonly NbdRequest[], from: number): number {
    this.#stream.deadlineMs = performance.now() + this.#timeoutMs;
    let buffered = 0;
    let next = from;
    while (next < requests.length && this.#inFlight.size < MAX_IN_FLIGHT) {
      const request = requests[next++];
      if (request === undefined) break;
      this.#inFlight.set(this.#cookie, {
        request,
        covered: new Coverage(),
        contexts: new Set(),
        error: undefined,
      });
      buffered += this.#encode(buffered, request);
      if (request.command !== COMMAND.write || request.data === undefined) continue;
      this.#stream.write(sending, 0, buffered);
      buffered = 0;
      this.#stream.write(request.data.bytes, request.data.start, request.length);
    }
    if (buffered > 0) this.#stream.write(sending, 0, buffered);
    return next;
  }

  /** @returns the bytes of the header, which are at `at` of the buffer for sending */
  #encode(at: number, { command, flags, offset, length }: NbdRequest): number {
    const bytes = sending;
    const cookie = this.#cookie;
    this.#cookie = cookie === 0xffffffff ? 0 : cookie + 1;
    const extended = this.#session.headers === 'extended';
    bytes.writeUInt32BE(extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC, at);
    const payload = extended && command === COMMAND.write ? COMMAND_FLAG.payloadLength : 0;
    bytes.writeUInt16BE(flags | payload, at + 4);
    bytes.writeUInt16BE(command, at + 6);
    bytes.writeUInt32BE(0, at + 8);
    bytes.writeUInt32BE(cookie, at + 12);
    bytes.writeBigUInt64BE(BigInt(offset), at + 16);
    if (!extended) {
      bytes.writeUInt32BE(length, at + 24);
      return REQUEST_BYTES;
    }
    bytes.writeBigUInt64BE(BigInt(length), at + 24);
    return EXTENDED_BYTES;
  }

  /** Reads one answer or chunk of one. @returns whether a request is finished by it */
  #receive(): boolean {
    const { headers } = this.#session;
    this.#stream.read(header, 0, headers === 'extended' ? EXTENDED_BYTES : 16);
    const magic = header.readUInt32BE(0);
    if (headers === 'extended') {
      if (magic !== EXTENDED_REPLY_MAGIC) throw this.#violation('an answer has a wrong magic');
      const length = header.readBigUInt64BE(24);
      if (length > 0xffffffffn) throw this.#violation(`a chunk of ${length} bytes`);
      return this.#chunk(Number(length));
    }
    if (magic === SIMPLE_REPLY_MAGIC) return this.#simple();
    if (magic !== STRUCTURED_REPLY_MAGIC || headers === 'simple') {
      throw this.#violation('an answer has a wrong magic');
    }
    this.#stream.read(header, 16, 4);
    return this.#chunk(header.readUInt32BE(16));
  }

  #find(): { readonly cookie: number; readonly entry: InFlight } {
    const cookie = header.readUInt32BE(12);
    const entry = header.readUInt32BE(8) === 0 ? this.#inFlight.get(cookie) : undefined;
    if (entry === undefined) throw this.#violation('it answers a request that was not made');
    return { cookie, entry };
  }

  #simple(): boolean {
    const { cookie, entry } = this.#find();
    const { request } = entry;
    const error = header.readUInt32BE(4);
    if (error !== 0) entry.error = { request, errno: ERRNO[error] ?? 'EINVAL', text: '' };
    else if (request.command === COMMAND.read) {
      if (this.#session.headers !== 'simple') throw this.#violation('a simple answer to a read');
      if (request.data !== undefined) {
        this.#stream.read(request.data.bytes, request.data.start, request.length);
        entry.covered.bytes = request.length;
      }
    } else if (request.command === COMMAND.blockStatus) {
      throw this.#violation('a simple answer to a question for the block status');
    }
    this.#finish(cookie, entry);
    return true;
  }

  /** @param length of the payload, which is read in full */
  #chunk(length: number): boolean {
    const { cookie, entry } = this.#find();
    const flags = header.readUInt16BE(4);
    const type = header.readUInt16BE(6);
    const { command } = entry.request;
    if ((type & CHUNK_ERROR) !== 0) this.#errorChunk(entry, type, length);
    else if (type === CHUNK.none) {
      if (length !== 0 || (flags & CHUNK_DONE) === 0)
        throw this.#violation('a chunk of nothing that is something');
    } else if (type === CHUNK.offsetData && command === COMMAND.read) this.#dataChunk(entry, length);
    else if (type === CHUNK.offsetHole && command === COMMAND.read) this.#holeChunk(entry, length);
    else if (
      type === CHUNK.blockStatus &&
      command === COMMAND.blockStatus &&
      this.#session.headers !== 'extended'
    ) {
      this.#statusChunk(entry, length, 4, 8);
    } else if (
      type === CHUNK.blockStatusExtended &&
      command === COMMAND.blockStatus &&
      this.#session.headers === 'extended'
    ) {
      this.#statusChunk(entry, length, 8, 16);
    } else throw this.#violation(`a chunk of the type ${type} in answer to the command ${command}`);
    if ((flags & CHUNK_DONE) === 0) return false;
    this.#finish(cookie, entry);
    return true;
  }

  #finish(cookie: number, { request, error, covered, contexts }: InFlight): void {
    this.#inFlight.delete(cookie);
    if (error !== undefined) {
      if (error.errno === 'ESHUTDOWN') this.#shutdown = true;
      this.#failure ??= error;
    } else if (request.command === COMMAND.read && covered.bytes !== request.length) {
      throw this.#violation(`${covered.bytes} bytes in answer to a read of ${request.length}`);
    } else if (request.command === COMMAND.blockStatus && contexts.size === 0) {
      throw this.#violation('no extent in answer to a question for the block status');
    }
  }

  #errorChunk(entry: InFlight, type: number, length: number): void {
    const most = 6 + MAX_STRING_BYTES + 8;
    if (length < 6 || length > most) throw this.#violation(`an error of ${length} bytes`);
    const bytes = Buffer.alloc(length);
    this.#stream.read(bytes, 0, length);
    const error = bytes.readUInt32BE(0);
    const textLength = bytes.readUInt16BE(4);
    const known = type - CHUNK_ERROR === 1 ? 6 : 14;
    if (error === 0 || (type - CHUNK_ERROR <= 2 && known + textLength !== length)) {
      throw this.#violation(`an error ${error} with a text of ${textLength} bytes in a chunk of ${length}`);
    }
    const text = serverText(bytes.subarray(6, 6 + textLength));
    entry.error ??= { request: entry.request, errno: ERRNO[error] ?? 'EINVAL', text };
  }

  #dataChunk(entry: InFlight, length: number): void {
    if (length < 9) throw this.#violation(`a chunk of data of ${length} bytes`);
    this.#stream.read(header, 32, 8);
    const at = this.#place(entry, length - 8);
    const { data } = entry.request;
    if (data !== undefined) this.#stream.read(data.bytes, data.start + at, length - 8);
  }

  #holeChunk(entry: InFlight, length: number): void {
    if (length !== 12) throw this.#violation(`a chunk of a hole of ${length} bytes`);
    this.#stream.read(header, 32, 12);
    const bytes = header.readUInt32BE(40);
    if (bytes === 0) throw this.#violation('a hole of no bytes');
    const at = this.#place(entry, bytes);
    entry.request.data?.bytes.fill(0, entry.request.data.start + at, entry.request.data.start + at + bytes);
  }

  /** Where a part of a read belongs, in bytes from its start; the offset is in the header. */
  #place({ request, covered }: InFlight, length: number): number {
    const at = Number(header.readBigUInt64BE(32) - BigInt(request.offset));
    if (at < 0 || at + length > request.length) throw this.#violation('data that was not asked for');
    if (!covered.add(at, at + length)) throw this.#violation('the same data twice, or in too many pieces');
    return at;
  }

  /** @param head bytes before the extents, of which the first four are the context */
  #statusChunk(entry: InFlight, length: number, head: number, each: number): void {
    if (length < head + each || (length - head) % each !== 0) {
      throw this.#violation(`a chunk of block status of ${length} bytes`);
    }
    const part = Buffer.alloc(Math.min(PART_BYTES, Math.max(length - head, head)));
    this.#stream.read(part, 0, head);
    const context = part.readUInt32BE(0);
    const { request, contexts } = entry;
    if (contexts.has(context)) throw this.#violation('the block status of one context twice');
    contexts.add(context);
    let known = request.offset;
    let kept = 0;
    for (let left = length - head; left > 0; ) {
      const bytes = Math.min(left, part.length - (part.length % each));
      this.#stream.read(part, 0, bytes);
      left -= bytes;
      for (let at = 0; at < bytes && kept < MAX_EXTENTS && known < this.#session.length; at += each, kept++) {
        const extent = each === 8 ? part.readUInt32BE(at) : Number(part.readBigUInt64BE(at));
        const flags = each === 8 ? part.readUInt32BE(at + 4) : Number(part.readBigUInt64BE(at + 8));
        if (extent === 0) throw this.#violation('an extent of no bytes');
        // The last one may go on beyond what was asked for.
        const inside = Math.min(extent, this.#session.length - known);
        request.onExtent?.(context, inside, flags);
        known += inside;
      }
    }
  }

  #violation(what: string): Error {
    return protocolError(this.#name, what);
  }
}
