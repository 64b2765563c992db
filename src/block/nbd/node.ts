import { StillframeError, systemError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import { COMMAND, COMMAND_FLAG, EXPORT, STATE } from '../../nbd/protocol/numbers.js';
import {
  type Extent,
  type FileNode,
  type NbdDescriptor,
  STATUS_ALLOCATED,
  STATUS_DATA,
  STATUS_ZERO,
} from '../node.js';
import { Connections, type Taken } from './connections.js';
import { connectionError } from './errors.js';
import { Exchange, type NbdRequest, type RequestError } from './exchange.js';
import { BASE_ALLOCATION } from './handshake.js';
import { ConnectionLost } from './stream.js';

/** Bytes of one request for data: large enough to be cheap, small enough that several overlap. */
const PIECE_BYTES = 256 * 1024;
/** Bytes of one request that moves no data: a server that has to write zeroes for it should not take long. */
const EFFECT_BYTES = 128 * 1024 * 1024;
/** How far block status is asked for ahead, in bytes, and how long the answer is believed, in milliseconds. */
const STATUS_BYTES = 1024 * 1024 * 1024;
const STATUS_MS = 1000;
/** Bytes for which requests are made at once: there are never many of them. */
const EFFECT_STEP_BYTES = 64 * EFFECT_BYTES;
const ZERO_STEP_BYTES = 64 * PIECE_BYTES;

/** An extent of a metadata context: `length` bytes with the same flags. */
export interface ContextExtent {
  readonly length: number;
  readonly flags: number;
}

/** What was learned of the block status: extent i ends at `ends[i]` and starts where the one before ends. */
interface KnownStatus {
  readonly start: number;
  readonly ends: number[];
  readonly flags: number[];
  readonly mutations: number;
  readonly asOfMs: number;
}

let zeroes: Uint8Array | undefined;
function zeroBytes(): Uint8Array {
  zeroes ??= new Uint8Array(PIECE_BYTES);
  return zeroes;
}

/** Driver `nbd`: one thread's facade of an export. */
export class NbdNode implements FileNode {
  readonly descriptor: NbdDescriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly fixedLength = true;
  readonly clusterSize = undefined;
  readonly backing = undefined;
  readonly #runtime: Runtime;
  readonly #connections: Connections;
  #status: KnownStatus | undefined;

  constructor(runtime: Runtime, descriptor: NbdDescriptor) {
    this.descriptor = descriptor;
    this.length = descriptor.length;
    this.readOnly = descriptor.readOnly;
    this.#runtime = runtime;
    this.#connections = new Connections(runtime.arena, {
      path: descriptor.path,
      target: descriptor.target,
      agreed: descriptor,
      contexts: contextNames(descriptor.target.contexts),
      control: descriptor.control,
    });
  }

  read(offset: number, pointer: number, length: number): void {
    this.#read(offset, this.#runtime.arena.u8, pointer, length);
  }

  readBytes(offset: number, bytes: Uint8Array): void {
    this.#read(offset, bytes, 0, bytes.length);
  }

  #read(offset: number, bytes: Uint8Array, start: number, length: number): void {
    const inside = Math.max(0, Math.min(length, this.length - offset));
    if (inside < length) bytes.fill(0, start + inside, start + length);
    if (inside === 0) return;
    const { minBlock } = this.descriptor;
    const end = offset + inside;
    const from = roundUp(offset, minBlock);
    const to = end - (end % minBlock);
    if (from === offset && to === end) {
      this.#request('read', offset, inside, this.#pieces(COMMAND.read, 0, offset, inside, bytes, start));
      return;
    }
    const edges = this.#edgesOf(offset, inside);
    const requests = edges.map(({ block, buffer }) => this.#blockRequest(COMMAND.read, block, buffer));
    if (from < to)
      requests.push(...this.#pieces(COMMAND.read, 0, from, to - from, bytes, start + from - offset));
    this.#request('read', offset, inside, requests);
    for (const { block, first, stop, buffer } of edges) {
      bytes.set(buffer.subarray(first - block, stop - block), start + first - offset);
    }
  }

  write(offset: number, pointer: number, length: number): void {
    this.#write([{ offset, length, bytes: this.#runtime.arena.u8, start: pointer }]);
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    const { arena, kernels } = this.#runtime;
    const units = Math.ceil(length / unit);
    const runs: Run[] = [];
    for (let first = kernels.bitmapNextClear(skip, 0, units); first >= 0; ) {
      const next = kernels.bitmapNextSet(skip, first, units);
      const start = first * unit;
      const end = Math.min(length, (next < 0 ? units : next) * unit);
      runs.push({ offset: offset + start, length: end - start, bytes: arena.u8, start: pointer + start });
      first = next < 0 ? -1 : kernels.bitmapNextClear(skip, next, units);
    }
    this.#write(runs);
  }

  #write(runs: readonly Run[]): void {
    const [first] = runs;
    const last = runs.at(-1);
    if (first === undefined || last === undefined) return;
    const length = last.offset + last.length - first.offset;
    this.#checkWritable('write', first.offset, length);
    const flags = this.#writeFlags();
    const requests: NbdRequest[] = [];
    for (const run of runs) {
      const { offset, bytes, start } = run;
      const { from, to } = this.#inner(offset, run.length);
      if (to - from < run.length) this.#writeEdges(offset, run.length, run);
      if (from < to)
        requests.push(...this.#pieces(COMMAND.write, flags, from, to - from, bytes, start + from - offset));
    }
    this.#change('write', first.offset, length, requests);
  }

  /** Changes the blocks that a range only has a part of. @param run undefined: to zeroes */
  #writeEdges(offset: number, length: number, run: Run | undefined): void {
    this.#connections.withEdges(() => {
      const edges = this.#edgesOf(offset, length);
      const blocks = (command: typeof COMMAND.read | typeof COMMAND.write): NbdRequest[] =>
        edges.map(({ block, buffer }) => this.#blockRequest(command, block, buffer));
      this.#request('read', offset, length, blocks(COMMAND.read));
      for (const { block, first, stop, buffer } of edges) {
        if (run === undefined) buffer.fill(0, first - block, stop - block);
        else {
          const start = run.start + first - offset;
          buffer.set(run.bytes.subarray(start, start + stop - first), first - block);
        }
      }
      this.#change('write', offset, length, blocks(COMMAND.write));
    });
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#checkWritable('write zeroes', offset, length);
    const { from, to } = this.#inner(offset, length);
    if (to - from < length) this.#writeEdges(offset, length, undefined);
    if (from === to) return;
    if ((this.descriptor.flags & EXPORT.writeZeroes) === 0) {
      this.#writeZeroBytes(from, to - from);
      return;
    }
    const flags = this.#writeFlags() | (mayUnmap ? 0 : COMMAND_FLAG.noHole);
    this.#changeInSteps('write zeroes', COMMAND.writeZeroes, flags, from, to - from);
  }

  #writeZeroBytes(offset: number, length: number): void {
    const flags = this.#writeFlags();
    for (let done = 0; done < length; done += ZERO_STEP_BYTES) {
      const bytes = Math.min(ZERO_STEP_BYTES, length - done);
      const requests = this.#pieces(COMMAND.write, flags, offset + done, bytes, zeroBytes(), undefined);
      this.#change('write zeroes', offset + done, bytes, requests);
    }
  }

  /**
   * Makes the range zero where the server can do so faster than by writing; for the preparation of a whole drive.
   *
   * @param offset a multiple of the block size, as is `length`, which is at most 8 GiB
   * @returns false where it cannot; whatever was zeroed until then stays so
   */
  tryFastZero(offset: number, length: number): boolean {
    this.#checkWritable('write zeroes', offset, length);
    const needed = EXPORT.writeZeroes | EXPORT.fastZero;
    if ((this.descriptor.flags & needed) !== needed) return false;
    const flags = this.#writeFlags() | COMMAND_FLAG.fastZero;
    this.#connections.countMutation();
    try {
      const failure = this.#run(effects(COMMAND.writeZeroes, flags, offset, length), true);
      if (failure === undefined) return true;
      if (failure.errno === 'ENOTSUP') return false;
      throw this.#requestError('write zeroes', offset, length, failure);
    } finally {
      this.#countWrite();
    }
  }

  discard(offset: number, length: number): void {
    this.#checkWritable('discard', offset, length);
    if ((this.descriptor.flags & EXPORT.trim) === 0) return;
    const { from, to } = this.#inner(offset, length);
    if (from === to) return;
    this.#changeInSteps('discard', COMMAND.trim, 0, from, to - from);
  }

  flush(): void {
    if (this.readOnly) return;
    this.#checkNothingLost();
    if ((this.descriptor.flags & EXPORT.flush) === 0) return;
    const { written } = this.#connections;
    const failure = this.#run([{ command: COMMAND.flush, flags: 0, offset: 0, length: 0 }], true);
    if (failure !== undefined) throw this.#requestError('flush', 0, 0, failure);
    this.#connections.countFlush(written);
  }

  /** Says that the range will be read soon. */
  cache(offset: number, length: number): void {
    this.#check('cache', offset, length);
    if ((this.descriptor.flags & EXPORT.cache) === 0) return;
    const { from, to } = this.#inner(offset, length);
    if (from < to) this.#request('cache', offset, length, effects(COMMAND.cache, 0, from, to - from));
  }

  status(offset: number, length: number): Extent {
    const end = offset + length;
    if (offset >= this.length) return { length, flags: STATUS_ZERO | STATUS_ALLOCATED, hostOffset: offset };
    const known = this.#statusAt(offset);
    if (known === undefined) {
      const stop = Math.min(end, this.length);
      return { length: stop - offset, flags: STATUS_DATA | STATUS_ALLOCATED, hostOffset: offset };
    }
    const { ends, flags } = known;
    let low = 0;
    for (let high = ends.length - 1; low < high; ) {
      const middle = (low + high) >>> 1;
      if ((ends[middle] ?? 0) > offset) high = middle;
      else low = middle + 1;
    }
    const state = flags[low] ?? 0;
    const data = (state & STATE.hole) === 0 ? STATUS_DATA : 0;
    const zero = (state & STATE.zero) === 0 ? 0 : STATUS_ZERO;
    return {
      length: Math.min(ends[low] ?? end, end) - offset,
      flags: STATUS_ALLOCATED | data | zero,
      hostOffset: offset,
    };
  }

  /** Extents that cover `offset`, asked for where they are not known; undefined where the server does not say. */
  #statusAt(offset: number): KnownStatus | undefined {
    const { mutations } = this.#connections;
    const known = this.#status;
    const now = performance.now();
    if (known !== undefined && known.mutations === mutations && now - known.asOfMs < STATUS_MS) {
      if (offset >= known.start && offset < (known.ends.at(-1) ?? 0)) return known;
    }
    const start = offset - (offset % this.descriptor.minBlock);
    const ends: number[] = [];
    const flags: number[] = [];
    const asked = this.#askStatus(start, Math.min(STATUS_BYTES, this.length - start), 0, (bytes, state) => {
      const stop = (ends.at(-1) ?? start) + bytes;
      if (flags.at(-1) === state) ends[ends.length - 1] = stop;
      else {
        ends.push(stop);
        flags.push(state);
      }
    });
    if (!asked || (ends.at(-1) ?? 0) <= offset) return undefined;
    this.#status = { start, ends, flags, mutations, asOfMs: now };
    return this.#status;
  }

  /** @returns false where the server does not have the context, or has no answer */
  #askStatus(
    offset: number,
    length: number,
    context: number,
    onExtent: (length: number, flags: number) => void,
  ): boolean {
    if (!this.descriptor.contexts[context]) return false;
    const failure = this.#runOn((taken) => {
      const id = this.#connections.contextOf(taken, context);
      return [
        {
          command: COMMAND.blockStatus,
          flags: 0,
          offset,
          length,
          onExtent: (from, bytes, flags) => {
            if (from === id) onExtent(bytes, flags);
          },
        },
      ];
    }, false);
    return failure === undefined;
  }

  /**
   * Extents of a metadata context the name of which was given when the export was opened, for example
   * `qemu:dirty-bitmap:NAME`, in order; flags are as the server gives them.
   *
   * @param onExtent takes the extents; neighbours may have equal flags
   * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND where the server does not have it
   */
  contextExtents(
    name: string,
    offset: number,
    length: number,
    onExtent: (extent: ContextExtent) => void,
  ): void {
    this.#check('look at', offset, length);
    const context = contextNames(this.descriptor.target.contexts).indexOf(name);
    const end = offset + length;
    for (let at = offset; at < end; ) {
      let reached = at - (at % this.descriptor.minBlock);
      const asked = this.#askStatus(
        reached,
        Math.min(STATUS_BYTES, this.length - reached),
        context,
        (bytes, flags) => {
          const from = Math.max(at, reached);
          reached += bytes;
          const stop = Math.min(reached, end);
          if (from < stop) onExtent({ length: stop - from, flags });
        },
      );
      if (!asked || reached <= at) {
        throw new StillframeError(
          'ERR_STILLFRAME_BITMAP_NOT_FOUND',
          `'${this.descriptor.path}': the server does not say anything of '${name}'; see 'nbdinfo --list' for what it has`,
        );
      }
      at = reached;
    }
  }

  preallocate(offset: number, length: number, mode: 'falloc' | 'full'): void {
    if (mode === 'falloc') this.writeZeroes(offset, length, false);
    else this.#writeZeroBytes(offset, length);
  }

  truncate(length: number): void {
    if (length !== this.length) this.extend(Number.POSITIVE_INFINITY);
  }

  extend(length: number): void {
    if (length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_NO_SPACE',
      `'${this.descriptor.path}' has ${this.length} bytes, and the size of an export cannot be changed; make it larger on the server`,
      { errno: 'ENOSPC' },
    );
  }

  allocatedBytes(): undefined {
    return undefined;
  }

  #check(what: string, offset: number, length: number): void {
    if (offset >= 0 && length >= 0 && offset + length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' has ${this.length} bytes`,
    );
  }

  #checkWritable(what: string, offset: number, length: number): void {
    if (this.readOnly) {
      throw new StillframeError(
        'ERR_STILLFRAME_READ_ONLY',
        `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' is open read-only`,
      );
    }
    if (offset + length > this.length) this.extend(offset + length);
    this.#check(what, offset, length);
    this.#checkNothingLost();
  }

  #checkNothingLost(): void {
    if (!this.#connections.lostWrites) return;
    throw new StillframeError(
      'ERR_STILLFRAME_IO',
      `'${this.descriptor.path}': a connection was lost after writes that were not flushed, so it is not known whether the server still has them; open it again and write everything anew`,
      { errno: 'EIO' },
    );
  }

  /** Without a command to flush every write has to be durable by itself. */
  #writeFlags(): number {
    const { flags } = this.descriptor;
    return (flags & EXPORT.flush) === 0 && (flags & EXPORT.fua) !== 0 ? COMMAND_FLAG.fua : 0;
  }

  /** The whole blocks of a range; none: both are its start. */
  #inner(offset: number, length: number): { readonly from: number; readonly to: number } {
    const { minBlock } = this.descriptor;
    const from = roundUp(offset, minBlock);
    const end = offset + length;
    const to = end - (end % minBlock);
    return from < to ? { from, to } : { from: offset, to: offset };
  }

  /** The blocks that a range only has a part of: at most one at each end. */
  #edgesOf(offset: number, length: number): Edge[] {
    const { minBlock } = this.descriptor;
    const end = offset + length;
    const first = offset - (offset % minBlock);
    const last = end - (end % minBlock);
    const blocks = [
      ...(first < offset ? [first] : []),
      ...(last < end && (last !== first || first === offset) ? [last] : []),
    ];
    return blocks.map((block) => ({
      block,
      first: Math.max(offset, block),
      stop: Math.min(end, block + minBlock),
      buffer: new Uint8Array(minBlock),
    }));
  }

  #blockRequest(
    command: typeof COMMAND.read | typeof COMMAND.write,
    offset: number,
    bytes: Uint8Array,
  ): NbdRequest {
    const flags = command === COMMAND.write ? this.#writeFlags() : 0;
    return { command, flags, offset, length: bytes.length, data: { bytes, start: 0 } };
  }

  /** Requests for data. @param start undefined: all of them have the same `bytes` from 0 on */
  #pieces(
    command: typeof COMMAND.read | typeof COMMAND.write,
    flags: number,
    offset: number,
    length: number,
    bytes: Uint8Array,
    start: number | undefined,
  ): NbdRequest[] {
    const most = Math.min(PIECE_BYTES, this.descriptor.maxBlock);
    const requests: NbdRequest[] = [];
    for (let done = 0; done < length; done += most) {
      const size = Math.min(most, length - done);
      const data = { bytes, start: start === undefined ? 0 : start + done };
      requests.push({ command, flags, offset: offset + done, length: size, data });
    }
    return requests;
  }

  #changeInSteps(
    what: string,
    command: NbdRequest['command'],
    flags: number,
    offset: number,
    length: number,
  ): void {
    for (let done = 0; done < length; done += EFFECT_STEP_BYTES) {
      const bytes = Math.min(EFFECT_STEP_BYTES, length - done);
      this.#change(what, offset + done, bytes, effects(command, flags, offset + done, bytes));
    }
  }

  #change(what: string, offset: number, length: number, requests: readonly NbdRequest[]): void {
    if (requests.length === 0) return;
    // Before: what is learned of the block status while it is under way is void as well.
    this.#connections.countMutation();
    try {
      const failure = this.#run(requests, true);
      if (failure !== undefined) throw this.#requestError(what, offset, length, failure);
    } finally {
      this.#countWrite();
    }
  }

  /** A change was made, or a part of it. */
  #countWrite(): void {
    this.#connections.countMutation();
    if ((this.descriptor.flags & EXPORT.flush) !== 0) this.#connections.countWrite();
  }

  #request(what: string, offset: number, length: number, requests: readonly NbdRequest[]): void {
    const failure = this.#run(requests, false);
    if (failure !== undefined) throw this.#requestError(what, offset, length, failure);
  }

  #run(requests: readonly NbdRequest[], changing: boolean): RequestError | undefined {
    return requests.length === 0 ? undefined : this.#runOn(() => requests, changing);
  }

  /** Carries requests out on some connection; on another one where it was lost, within the time there is for that. */
  #runOn(requestsOn: (taken: Taken) => readonly NbdRequest[], changing: boolean): RequestError | undefined {
    const connections = this.#connections;
    const { path, target } = this.descriptor;
    let lostMs: number | undefined;
    for (;;) {
      const untilMs = (lostMs ?? performance.now()) + target.reconnectDelayMs;
      const taken = connections.take(untilMs);
      try {
        const exchange = new Exchange(
          path,
          taken.stream,
          this.#session(taken),
          connections.timeoutMs,
          connections.cookie(taken),
        );
        const failure = exchange.run(requestsOn(taken));
        connections.setCookie(taken, exchange.cookie);
        connections.giveBack(taken);
        return failure;
      } catch (error) {
        connections.discard(taken.slot);
        if (!(error instanceof ConnectionLost)) throw error;
        connections.countLoss();
        connections.checkInterrupted();
        if (changing) this.#checkNothingLost();
        lostMs ??= performance.now();
        if (performance.now() >= lostMs + target.reconnectDelayMs)
          throw connectionError(path, error.message, error);
      }
    }
  }

  #session(taken: Taken): { readonly headers: Taken['headers']; readonly length: number } {
    return { headers: taken.headers, length: this.length };
  }

  #requestError(
    what: string,
    offset: number,
    length: number,
    { errno, text }: RequestError,
  ): StillframeError {
    const { path } = this.descriptor;
    const attempt =
      length === 0 ? `cannot ${what} '${path}'` : `cannot ${what} ${length} bytes at ${offset} of '${path}'`;
    const reason = new Error(text === '' ? 'the server reports an error' : `the server says: ${text}`);
    return systemError(attempt, Object.assign(reason, { code: errno }));
  }
}

/** Data for a range, in memory. */
interface Run {
  readonly offset: number;
  readonly length: number;
  readonly bytes: Uint8Array;
  readonly start: number;
}

/** A block of the server of which the bytes from `first` to `stop` belong to a request. Offsets of the export. */
interface Edge {
  readonly block: number;
  readonly first: number;
  readonly stop: number;
  readonly buffer: Uint8Array;
}

/** Requests that move no data. */
function effects(
  command: NbdRequest['command'],
  flags: number,
  offset: number,
  length: number,
): NbdRequest[] {
  const requests: NbdRequest[] = [];
  for (let done = 0; done < length; done += EFFECT_BYTES) {
    requests.push({ command, flags, offset: offset + done, length: Math.min(EFFECT_BYTES, length - done) });
  }
  return requests;
}

function roundUp(offset: number, unit: number): number {
  const rest = offset % unit;
  return rest === 0 ? offset : offset + unit - rest;
}

/** Names of the contexts to ask for, the status of allocation first. */
export function contextNames(more: readonly string[]): readonly string[] {
  return [BASE_ALLOCATION, ...more];
}
