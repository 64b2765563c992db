import { STATUS_ZERO } from '../../block/node.js';
import type { Runtime } from '../../kernels/runtime.js';
import { COMMAND, COMMAND_FLAG, EXPORT, WIRE_ERROR } from '../protocol/numbers.js';
import {
  dataHeaderBytes,
  encodeData,
  encodeDone,
  encodeEnd,
  encodeError,
  encodeExtent,
  encodeHole,
  encodeStatus,
  holeBytes,
  MAX_EXTENTS,
  MAX_PLAIN_BYTES,
  statusBytes,
} from '../protocol/reply.js';
import type { Request, RequestRefusal, TransmissionRules } from '../protocol/request.js';
import { ClientLost, type ClientSocket } from './client-socket.js';
import { type ContextExtent, contextExtent, type Drive } from './drive.js';
import { wireError } from './errors.js';
import type { ContextKind, ExportDescriptor } from './exports.js';
import type { FilePipe } from './file-pipe.js';

/** Data of one request that a thread moves at once, in bytes. */
export const DATA_BYTES = 1024 * 1024;
/** A thread's memory for answers: the data of a read and what is said about it, or as many extents as there may be. */
export const ANSWER_BYTES = DATA_BYTES + 65536;
/** Answers are collected up to here before they are sent. */
const SEND_BYTES = 128 * 1024;
/** Data of a read that is worth being sent from the pages of its file; the rest is copied, and collected. */
const SPLICE_BYTES = 32 * 1024;
/** A read of less is not looked at for holes. */
const SPARSE_BYTES = 4096;
/** How much is zeroed or freed at once: others who wait for a part of it get their turn in between. */
const EFFECT_BYTES = 256 * 1024 * 1024;
/** Looks at the status of a drive for one answer, so that it comes in time. */
const MAX_LOOKS = 2 * MAX_EXTENTS;

/** Carries requests of one connection out, on one thread, and collects the answers. */
export class Session {
  readonly rules: TransmissionRules;
  readonly socket: ClientSocket;
  readonly #runtime: Runtime;
  readonly #drive: Drive;
  readonly #writethrough: boolean;
  readonly #contexts: ReadonlyMap<number, ContextKind>;
  readonly #answers: number;
  readonly #pipe: FilePipe;
  readonly #view: DataView;
  #collected = 0;
  #sentMs = 0;

  /** @param answers pointer of {@link ANSWER_BYTES} */
  constructor(
    runtime: Runtime,
    socket: ClientSocket,
    { offer, contexts, writethrough }: ExportDescriptor,
    drive: Drive,
    answers: number,
    pipe: FilePipe,
  ) {
    const { state } = socket;
    const chosen = state.contexts;
    this.socket = socket;
    this.rules = {
      length: offer.length,
      headers: state.headers,
      flags: state.flags,
      contexts: chosen.length,
    };
    this.#runtime = runtime;
    this.#drive = drive;
    this.#writethrough = writethrough;
    this.#contexts = new Map(
      chosen.flatMap((number) => {
        const context = contexts[number - 1];
        return context === undefined ? [] : [[number, context] as const];
      }),
    );
    this.#answers = answers;
    this.#pipe = pipe;
    this.#view = runtime.arena.view;
  }

  /** Sends what was collected. @throws ClientLost */
  flush(): void {
    const bytes = this.#collected;
    this.#collected = 0;
    if (bytes > 0) this.#sending(() => this.socket.write(this.#answers, bytes));
  }

  #sending(body: () => void): void {
    const start = performance.now();
    this.socket.sending(body);
    this.#sentMs += performance.now() - start;
  }

  /** How long sending has taken in all, in milliseconds: another thread would not make it quicker. */
  get sentMs(): number {
    return this.#sentMs;
  }

  /** What was collected is of no use any more. */
  forget(): void {
    this.#collected = 0;
  }

  /** Answers that a request is refused. */
  refuse(request: Request, { error, text }: RequestRefusal): void {
    const at = this.#room(MAX_PLAIN_BYTES);
    this.#collected += encodeError(this.#view, at, this.rules.headers, request, error, text);
  }

  /** Whether it takes long, whatever was seen of late. */
  isSlow(request: Request): boolean {
    const { command, length } = request;
    if (command === COMMAND.flush || this.#isDurable(request)) return true;
    return command !== COMMAND.blockStatus && length > DATA_BYTES;
  }

  /**
   * Carries out a request without data, or that of a write of no more than {@link DATA_BYTES}, and collects the answer.
   *
   * @param data pointer of the data
   * @throws ClientLost
   */
  carryOut(request: Request, data: number): void {
    try {
      switch (request.command) {
        case COMMAND.read:
          this.#read(request);
          return;
        case COMMAND.blockStatus:
          this.#status(request, data);
          return;
        case COMMAND.write:
          this.#drive.write(request.offset, data, request.length);
          break;
        case COMMAND.flush:
          this.#drive.flush();
          break;
        case COMMAND.trim:
          this.#inSteps(request, (at, length) => this.#drive.discard(at, length));
          break;
        case COMMAND.writeZeroes:
          if (!this.#writeZeroes(request)) return;
          break;
        case COMMAND.cache:
          this.#cache(request);
          break;
      }
      this.finish(request);
    } catch (error) {
      if (error instanceof ClientLost) throw error;
      this.fail(request, error);
    }
  }

  /** Writes a part of a write. */
  writePart(offset: number, data: number, length: number): void {
    this.#drive.write(offset, data, length);
  }

  /** Makes what was changed durable where that is asked for, and answers that it is done. */
  finish(request: Request): void {
    if (this.#isDurable(request)) this.#drive.flush();
    const at = this.#room(MAX_PLAIN_BYTES);
    this.#collected += encodeDone(this.#view, at, this.rules.headers, request);
  }

  #isDurable({ command, flags }: Request): boolean {
    // Whether space was given up is nobody's data.
    const writes = command === COMMAND.write || command === COMMAND.writeZeroes;
    const changes = command !== COMMAND.read && command !== COMMAND.flush;
    return (writes && this.#writethrough) || (changes && (flags & COMMAND_FLAG.fua) !== 0);
  }

  /** Answers what went wrong. */
  fail(request: Request, error: unknown): void {
    const { error: number, text } = wireError(error);
    this.refuse(request, { error: number, text });
  }

  /** Where the next `bytes` of an answer go. */
  #room(bytes: number): number {
    if (this.#collected > 0 && this.#collected + bytes > SEND_BYTES) this.flush();
    return this.#answers + this.#collected;
  }

  #read(request: Request): void {
    const { headers } = this.rules;
    const { offset, length } = request;
    if (length === 0) {
      const at = this.#room(MAX_PLAIN_BYTES);
      this.#collected +=
        headers === 'simple'
          ? encodeData(this.#view, at, headers, request, offset, 0, true)
          : encodeEnd(this.#view, at, headers, request);
      return;
    }
    const whole = headers === 'simple' || (request.flags & COMMAND_FLAG.df) !== 0;
    if (whole && length > DATA_BYTES) this.#readLarge(request);
    else if (whole || length < SPARSE_BYTES) this.#readPart(request, offset, length, true);
    else this.#readSparse(request);
  }

  /** Data of a read, or a part of it. */
  #readPart(request: Request, offset: number, length: number, last: boolean): void {
    if (length >= SPLICE_BYTES && this.socket.takesFiles && this.#splice(request, offset, length, last))
      return;
    const { headers } = this.rules;
    const head = dataHeaderBytes(headers);
    const at = this.#room(head + length);
    this.#drive.read(offset, at + head, length);
    this.#collected += encodeData(this.#view, at, headers, request, offset, length, last) + length;
  }

  /** Sends data from the pages of its file, behind what was collected. @returns false where it cannot be: copy it */
  #splice(request: Request, offset: number, length: number, last: boolean): boolean {
    const filled = this.#drive.use(() => {
      const place = this.#drive.hostRange(offset, length);
      return place !== undefined && this.#pipe.fill(place, length);
    });
    if (!filled) return false;
    const { headers } = this.rules;
    const at = this.#room(dataHeaderBytes(headers));
    const bytes = this.#collected + encodeData(this.#view, at, headers, request, offset, length, last);
    this.#collected = 0;
    this.#sending(() => this.socket.writeWithFile(this.#answers, bytes, this.#pipe, length));
    return true;
  }

  /** Holes as such; the rest in parts that fit. */
  #readSparse(request: Request): void {
    const { headers } = this.rules;
    const end = request.offset + request.length;
    for (let at = request.offset; at < end; ) {
      const { zero, length } = this.#zeroOrData(at, end - at);
      const last = at + length === end;
      if (zero) {
        const to = this.#room(holeBytes(headers));
        this.#collected += encodeHole(this.#view, to, headers, request, at, length, last);
      } else this.#readPart(request, at, length, last);
      at += length;
    }
  }

  /** How far there are only zeroes, or only data, from `offset` on; of data no more than fits at once. */
  #zeroOrData(offset: number, length: number): { readonly zero: boolean; readonly length: number } {
    const first = this.#drive.status(offset, length);
    const zero = (first.flags & STATUS_ZERO) !== 0;
    const most = zero ? length : Math.min(length, DATA_BYTES);
    let reached = first.length;
    while (reached < most) {
      const next = this.#drive.status(offset + reached, most - reached);
      if (((next.flags & STATUS_ZERO) !== 0) !== zero) break;
      reached += next.length;
    }
    return { zero, length: Math.min(reached, most) };
  }

  /** All data in one piece, larger than our memory: nobody else may answer in between. */
  #readLarge(request: Request): void {
    const { headers } = this.rules;
    const { offset, length } = request;
    this.flush();
    this.#sending(() => {
      const { u8 } = this.#runtime.arena;
      let failure: unknown;
      for (let done = 0; done < length; done += DATA_BYTES) {
        const bytes = Math.min(DATA_BYTES, length - done);
        const head =
          done === 0 ? encodeData(this.#view, this.#answers, headers, request, offset, length, false) : 0;
        const at = this.#answers + head;
        try {
          if (failure === undefined) this.#drive.read(offset + done, at, bytes);
        } catch (error) {
          failure = error;
        }
        if (failure !== undefined) {
          // Before anything was sent an error can still be told; simple replies have no other place for one.
          if (done === 0) break;
          if (headers === 'simple') {
            this.socket.abort();
            return;
          }
          u8.fill(0, at, at + bytes);
        }
        this.socket.write(this.#answers, head + bytes);
      }
      if (failure !== undefined) {
        const { error, text } = wireError(failure);
        this.socket.write(
          this.#answers,
          encodeError(this.#view, this.#answers, headers, request, error, text),
        );
      } else if (headers !== 'simple') {
        this.socket.write(this.#answers, encodeEnd(this.#view, this.#answers, headers, request));
      }
    });
  }

  #inSteps({ offset, length }: Request, body: (offset: number, length: number) => void): void {
    for (let done = 0; done < length; done += EFFECT_BYTES) {
      body(offset + done, Math.min(EFFECT_BYTES, length - done));
    }
  }

  /** @returns false where it is answered already */
  #writeZeroes(request: Request): boolean {
    const mayUnmap = (request.flags & COMMAND_FLAG.noHole) === 0;
    if ((request.flags & COMMAND_FLAG.fastZero) !== 0) {
      // In one step: it is quick, or nothing of it happens.
      if (this.#drive.writeZeroesFast(request.offset, request.length, mayUnmap)) return true;
      this.refuse(request, { error: WIRE_ERROR.ENOTSUP, text: 'zeroes would have to be written' });
      return false;
    }
    this.#inSteps(request, (at, length) => this.#drive.writeZeroes(at, length, mayUnmap));
    return true;
  }

  #cache({ offset, length }: Request): void {
    this.flush();
    for (let done = 0; done < length; done += DATA_BYTES) {
      this.#drive.read(offset + done, this.#answers, Math.min(DATA_BYTES, length - done));
    }
  }

  #status(request: Request, data: number): void {
    const asked = this.#askedStatus(request, data);
    if ('error' in asked) {
      this.refuse(request, asked);
      return;
    }
    const { length, contexts } = asked;
    for (const [index, number] of contexts.entries()) {
      const context = this.#contexts.get(number);
      if (context === undefined) throw new Error('invariant: only contexts that were chosen are asked for');
      this.#contextStatus(request, length, number, context, index === contexts.length - 1);
    }
  }

  /** What a question for the status asks for: in its header, or in its data. */
  #askedStatus(
    request: Request,
    data: number,
  ): { readonly length: number; readonly contexts: readonly number[] } | RequestRefusal {
    const chosen = [...this.#contexts.keys()];
    if ((request.flags & COMMAND_FLAG.payloadLength) === 0) {
      return { length: request.length, contexts: chosen };
    }
    const invalid = (text: string): RequestRefusal => ({ error: WIRE_ERROR.EINVAL, text });
    const count = (request.length - 8) / 4;
    if (count < 1 || !Number.isInteger(count) || count > chosen.length) {
      return invalid(`${request.length} bytes of data do not choose metadata contexts`);
    }
    const length = this.#view.getUint32(data) * 2 ** 32 + this.#view.getUint32(data + 4);
    const contexts = Array.from({ length: count }, (_, index) => this.#view.getUint32(data + 8 + 4 * index));
    if (new Set(contexts).size !== count || contexts.some((number) => !this.#contexts.has(number))) {
      return invalid('a metadata context that was not chosen, or one twice');
    }
    const end = request.offset + length;
    if (length === 0 || !Number.isSafeInteger(end) || end > this.rules.length) {
      return invalid(`the drive has ${this.rules.length} bytes`);
    }
    return { length, contexts };
  }

  #contextStatus(
    request: Request,
    length: number,
    number: number,
    context: ContextKind,
    last: boolean,
  ): void {
    const { headers } = this.rules;
    const { offset } = request;
    const view = this.#view;
    // The extents are put where they go, the header in front of them when their number is known.
    this.flush();
    const head = statusBytes(headers, 0);
    const each = statusBytes(headers, 1) - head;
    const longest = headers === 'extended' ? length : 0xfffffe00;
    const most = (request.flags & COMMAND_FLAG.reqOne) !== 0 ? 1 : MAX_EXTENTS;
    let count = 0;
    let before: ContextExtent | undefined;
    const put = (extent: ContextExtent): void => {
      encodeExtent(view, this.#answers + head + each * count, headers, extent.length, extent.flags);
      count++;
    };
    for (let done = 0, looks = 0; done < length && looks < MAX_LOOKS; looks++) {
      const extent = contextExtent(this.#runtime, this.#drive, context, offset + done, length - done);
      const joined = (before?.length ?? 0) + extent.length;
      if (before !== undefined && before.flags === extent.flags && joined <= longest) {
        before = { length: joined, flags: extent.flags };
      } else {
        if (before !== undefined) put(before);
        if (count === most) {
          before = undefined;
          break;
        }
        before = { length: Math.min(extent.length, longest), flags: extent.flags };
        done += before.length;
        continue;
      }
      done += extent.length;
    }
    if (before !== undefined) put(before);
    encodeStatus(view, this.#answers, headers, request, number, count, last);
    this.#collected = head + each * count;
  }
}

/** Transmission flags of an export. @param fastZero its driver knows when zeroes are written without data */
export function exportFlags(readOnly: boolean, fastZero: boolean): number {
  const common = EXPORT.hasFlags | EXPORT.flush | EXPORT.fua | EXPORT.multiConn | EXPORT.cache;
  if (readOnly) return common | EXPORT.readOnly;
  return common | EXPORT.trim | EXPORT.writeZeroes | (fastZero ? EXPORT.fastZero : 0);
}
