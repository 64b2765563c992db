/** What the threads of a guest and their host share. */

/** Requests that may be under way; beyond that the guest waits, and its time goes on. */
export const DEPTH = 4096;

const [STOP, SENT, ANSWERED] = [0, 1, 2] as const;

/** Where and how a guest writes. */
export const PATTERNS = ['random', 'sequential', 'hot'] as const;
export type Pattern = (typeof PATTERNS)[number];

/** Requests that were answered, in that order: when they were made, and how long they took, in milliseconds. */
export interface Answered {
  readonly starts: Float64Array;
  readonly latencies: Float64Array;
}

/** In milliseconds, the same clock for all threads. */
export function clockMs(): number {
  return Number(process.hrtime.bigint()) / 1e6;
}

/** Counters, the requests that are under way by their cookies, and what became of those that are not. */
export class GuestMemory {
  readonly buffer: SharedArrayBuffer;
  readonly #words: Int32Array;
  /** Whether a cookie is in use. */
  readonly #busy: Int32Array;
  /** When its request was made. */
  readonly #starts: Float64Array;
  readonly #answered: Answered;

  /** @param most requests that are remembered */
  static allocate(most: number): GuestMemory {
    return new GuestMemory(new SharedArrayBuffer(16 + DEPTH * 12 + most * 16));
  }

  constructor(buffer: SharedArrayBuffer) {
    const most = (buffer.byteLength - 16 - DEPTH * 12) / 16;
    this.buffer = buffer;
    this.#words = new Int32Array(buffer, 0, 4);
    this.#busy = new Int32Array(buffer, 16, DEPTH);
    const starts = 16 + DEPTH * 4;
    this.#starts = new Float64Array(buffer, starts, DEPTH);
    const answered = starts + DEPTH * 8;
    this.#answered = {
      starts: new Float64Array(buffer, answered, most),
      latencies: new Float64Array(buffer, answered + most * 8, most),
    };
  }

  get stopped(): boolean {
    return Atomics.load(this.#words, STOP) !== 0;
  }

  /** Ends the load; what is under way is answered still. */
  stop(): void {
    Atomics.store(this.#words, STOP, 1);
    Atomics.notify(this.#words, STOP);
  }

  /** Sleeps until then, or until the load ends. */
  sleepUntil(ms: number): void {
    const left = ms - clockMs();
    if (left > 0) Atomics.wait(this.#words, STOP, 0, left);
  }

  get sent(): number {
    return Atomics.load(this.#words, SENT);
  }

  get answered(): number {
    return Atomics.load(this.#words, ANSWERED);
  }

  /** Waits until a cookie is free, and takes it for a request. @returns false where the load ends before */
  take(cookie: number, startMs: number): boolean {
    while (Atomics.load(this.#busy, cookie) !== 0) {
      if (this.stopped) return false;
      Atomics.wait(this.#busy, cookie, 1, 100);
    }
    this.#starts[cookie] = startMs;
    Atomics.store(this.#busy, cookie, 1);
    Atomics.add(this.#words, SENT, 1);
    return true;
  }

  /** A request was answered. @returns false where it was none */
  give(cookie: number, nowMs: number): boolean {
    if (Atomics.load(this.#busy, cookie) === 0) return false;
    const count = this.answered;
    const start = this.#starts[cookie] ?? nowMs;
    const { starts, latencies } = this.#answered;
    starts[count % starts.length] = start;
    latencies[count % starts.length] = nowMs - start;
    Atomics.store(this.#busy, cookie, 0);
    Atomics.notify(this.#busy, cookie);
    Atomics.add(this.#words, ANSWERED, 1);
    return true;
  }

  /** All requests so far, those that nobody has answered as if they were now. */
  all(): Answered {
    const count = Math.min(this.answered, this.#answered.starts.length);
    const now = clockMs();
    const waiting = this.#starts.filter((_, cookie) => Atomics.load(this.#busy, cookie) !== 0);
    const joined = (done: Float64Array, more: Float64Array): Float64Array => {
      const both = new Float64Array(count + more.length);
      both.set(done.subarray(0, count));
      both.set(more, count);
      return both;
    };
    return {
      starts: joined(this.#answered.starts, waiting),
      latencies: joined(
        this.#answered.latencies,
        waiting.map((start) => now - start),
      ),
    };
  }
}
