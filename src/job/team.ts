/** The memory the threads of a {@link Team} share. */
export type TeamMemory = SharedArrayBuffer;

// Words: int32, then int64.
const STOPPED = 0;
const CLOSED = 1;
const MEMBERS = 2;
const NEXT = 2;
const DONE = 3;
const BYTES = 32;

/**
 * Threads that share one piece of work on a range of bytes: each claims the next part of it until nothing is left. One
 * of them leads: it opens what all of them use, and closes it when the others have left.
 *
 *     0 ── claimed by some thread ──▶ next ── nobody's yet ──▶ end
 */
export class Team {
  readonly #words: Int32Array;
  readonly #counts: BigInt64Array;

  constructor(memory: TeamMemory) {
    this.#words = new Int32Array(memory);
    this.#counts = new BigInt64Array(memory);
  }

  static memory(): TeamMemory {
    return new SharedArrayBuffer(BYTES);
  }

  /** No thread claims anything any more. */
  stop(): void {
    Atomics.store(this.#words, STOPPED, 1);
  }

  get stopped(): boolean {
    return Atomics.load(this.#words, STOPPED) !== 0;
  }

  /** Bytes that are done. */
  get done(): number {
    return Number(Atomics.load(this.#counts, DONE));
  }

  addDone(bytes: number): void {
    Atomics.add(this.#counts, DONE, BigInt(bytes));
  }

  /** The start of the next `bytes` bytes before `end`, which are the caller's; undefined where there is nothing to do. */
  claim(bytes: number, end: number): number | undefined {
    if (this.stopped || Number(Atomics.load(this.#counts, NEXT)) >= end) return undefined;
    const start = Number(Atomics.add(this.#counts, NEXT, BigInt(bytes)));
    return start < end ? start : undefined;
  }

  /** Makes what follows a claim that ends at `from` the caller's, up to `to`. False where somebody else has it. */
  claimOn(from: number, to: number): boolean {
    return Atomics.compareExchange(this.#counts, NEXT, BigInt(from), BigInt(to)) === BigInt(from);
  }

  /**
   * Runs `body` as one of those who help the leader.
   *
   * @returns undefined where the leader has ended already
   */
  help<T>(body: () => T): T | undefined {
    Atomics.add(this.#words, MEMBERS, 1);
    try {
      return Atomics.load(this.#words, CLOSED) === 0 ? body() : undefined;
    } finally {
      Atomics.sub(this.#words, MEMBERS, 1);
      Atomics.notify(this.#words, MEMBERS);
    }
  }

  /** For the leader: waits until all who help have left; nobody comes any more. */
  close(): void {
    Atomics.store(this.#words, CLOSED, 1);
    for (let members = 1; members > 0; ) {
      members = Atomics.load(this.#words, MEMBERS);
      if (members > 0) Atomics.wait(this.#words, MEMBERS, members);
    }
  }
}
