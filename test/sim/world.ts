/**
 * The simulated world: one shared memory that owns the order of every step of every thread.
 *
 * The production code runs as it ships, in real threads, but only one of them at a time. Before each step (an atomic
 * access, a system call) a thread says what it is about to do and hands over to whom the scheduler picks, which may
 * be itself. What happens between two steps happens at once. So a run is a function of its seed, or of the list of
 * choices it is given.
 */

// The true ones: the names of the global object are replaced later.
const { load, store, wait, notify } = Atomics;

/** What a step does with what it names; who depends on whom follows from this, see {@link dependent}. */
export const LOCAL = 0;
export const READ = 1;
export const WRITE = 2;
/** Adds a number and does not look at the result: adds commute. */
export const ADD = 3;
/** Looks at a word and goes to sleep on it. */
export const WAIT = 4;
export const NOTIFY = 5;

/** Places that steps name: the arena by address, the names of files, the content of inode n (FILE + n). */
export const ARENA = 0;
export const NAMES = 1;
/** Cluster states by index, for the explorer; otherwise they are bytes of the arena. */
export const STATES = 2;
/** A guest's change is about to reach the drive. */
export const CHANGE = 3;
export const FILE = 16;

export const MAX_THREADS = 8;

export const IDLE = 0;
export const READY = 1;
export const BLOCKED = 2;

const Word = {
  Generation: 0,
  Finished: 1,
  Aborted: 2,
  Steps: 3,
  StepLimit: 4,
  Random: 5,
  Strategy: 6,
  Order: 7,
  TraceCount: 8,
  PrefixCount: 9,
  Sleep: 10,
  Current: 11,
  TextLength: 12,
  ResultLength: 13,
  Switches: 14,
  StopAt: 15,
  Hash: 16,
  /** An I/O call may fail in this run: 1 allowed, 2 done. */
  Fault: 17,
  Ios: 18,
  NoteLength: 19,
  Explore: 20,
  Locks: 21,
  Choices: 22,
  Seen: 23,
} as const;

const THREADS = 64;
const THREAD_WORDS = 16;
const Slot = {
  Turn: 0,
  State: 1,
  Address: 2,
  Order: 3,
  Woken: 4,
  Cause: 5,
  Kind: 6,
  Place: 7,
  Low: 8,
  High: 9,
  Priority: 10,
  Io: 11,
  LocalA: 12,
  LocalB: 13,
} as const;

const CLOCK_AT = 1024; // bytes: float64 now, then a deadline per thread; ends before word 512
const LOCKS_AT = 512;
const LOCK_CAPACITY = 64;
const SLEEPERS_AT = 1024;
const SLEEPER_ACCESSES = 250;
const SLEEPER_WORDS = 1 + SLEEPER_ACCESSES * 4;
const TRACE_AT = 16384;
export const TRACE_WORDS = 10;
const TRACE_CAPACITY = 300_000;
const PREFIX_AT = TRACE_AT + TRACE_CAPACITY * TRACE_WORDS;
const PREFIX_CAPACITY = 100_000;
const TEXT_AT = (PREFIX_AT + PREFIX_CAPACITY) * 4;
const TEXT_BYTES = 1 << 20;
const RESULT_AT = TEXT_AT + TEXT_BYTES;
const RESULT_BYTES = 1 << 20;
const NOTE_AT = RESULT_AT + RESULT_BYTES;
const NOTE_BYTES = 1 << 16;
const CHOICE_AT = (NOTE_AT + NOTE_BYTES) / 4;
const CHOICE_WORDS = 3;
const SEEN_AT = NOTE_AT + NOTE_BYTES + PREFIX_CAPACITY * CHOICE_WORDS * 4;
const SEEN_CAPACITY = 1 << 23;
/** Of an entry of the table of seen states: the first digest, and the second with the sleep set in its low bits. */
const SEEN_WORDS = 2;
const WORLD_BYTES = SEEN_AT + SEEN_CAPACITY * SEEN_WORDS * 8;
const SEEN_SLEEP = 2 ** MAX_THREADS;

/** Why a world stopped before its threads ended by themselves. */
export const RUNNING = 0;
export const POWER_CUT = 1;
export const VIOLATED = 2;
/** Every continuation was explored elsewhere. */
export const REDUNDANT = 3;

/** Choices that are not a thread's number: how an I/O call ends. */
export const IO_SUCCEEDS = 64;
export const IO_FAILS = 65;

/** How the scheduler picks. */
export const UNIFORM = 0;
export const STICKY = 1;
export const PRIORITY = 2;

/** Thrown through production code when the world has ended. */
export class WorldEnded extends Error {
  constructor() {
    super('the simulated world has ended');
  }
}

/** Folds a number into a digest of 53 bits. */
export function mix(digest: number, value: number): number {
  const low = Math.imul((digest >>> 0) ^ (value | 0), 0x9e3779b1) ^ ((value / 4294967296) | 0);
  const high = (digest / 4294967296) >>> 0;
  const turned = Math.imul(high ^ (low >>> 15) ^ (low << 3), 0x85ebca6b);
  return (
    ((turned >>> 11) * 4294967296 + (Math.imul(low ^ (turned >>> 13), 0xc2b2ae35) >>> 0)) % 9007199254740992
  );
}

/** Whether two steps of different threads may not be swapped. */
export function dependent(kindA: number, kindB: number): boolean {
  switch (kindA) {
    case READ:
      return kindB === WRITE || kindB === ADD;
    case WRITE:
      return kindB === READ || kindB === WRITE || kindB === ADD || kindB === WAIT;
    case ADD:
      return kindB === READ || kindB === WRITE || kindB === WAIT;
    case WAIT:
      return kindB === WRITE || kindB === ADD || kindB === WAIT || kindB === NOTIFY;
    case NOTIFY:
      return kindB === WAIT;
    default:
      return false;
  }
}

export interface Step {
  readonly thread: number;
  readonly kind: number;
  readonly place: number;
  readonly low: number;
  readonly high: number;
  /** The step that woke the thread, for the step after a sleep; -1 otherwise, -2 where everything before did. */
  readonly cause: number;
  /** What the thread said it was about to do: at least what it did. */
  readonly announced: Access;
  /** The thread went on within a critical section: this step and the one before are one choice. */
  readonly continued: boolean;
}

/** Choices to repeat, and the threads that need not be run after them until something disturbs them. */
export interface ExploreOptions {
  readonly prefix: readonly number[];
  /** One I/O call of a run may fail, any one. */
  readonly fault: boolean;
  readonly sleepers: readonly { readonly thread: number; readonly accesses: readonly Access[] }[];
}

/** A place where a run could have gone on in another way. */
export interface Choice {
  /** The thread that went on, or how an I/O call ended. */
  readonly chosen: number;
  /** What could be chosen, a bit each: threads, or from {@link IO_SUCCEEDS} on. 0 where it was told to. */
  readonly open: number;
  /** Steps before it. */
  readonly trace: number;
}

export interface Access {
  readonly kind: number;
  readonly place: number;
  readonly low: number;
  readonly high: number;
}

export function makeWorldMemory(): SharedArrayBuffer {
  return new SharedArrayBuffer(WORLD_BYTES);
}

/** One thread's view of the world. The controller's thread number is -1. */
export class World {
  readonly memory: SharedArrayBuffer;
  readonly thread: number;
  /** Steps of this thread are scheduled; false while the world is set up or looked at. */
  running = false;
  readonly #words: Int32Array;
  readonly #clock: Float64Array;
  readonly #bytes: Uint8Array;
  readonly #seen: Float64Array;
  /** What an explorer takes the state of the world for: two numbers of 53 bits, equal for equal states. */
  digest: () => readonly [number, number] = () => [0, 0];
  /** What this thread's own state is taken for: two numbers of 32 bits. */
  localDigest: () => readonly [number, number] = () => [0, 0];
  /** Told of what this thread has seen of the shared state. */
  observe: (key: number, value: number) => void = () => undefined;
  /** What this thread has seen so far no longer matters to it: but for these keys. */
  forgetSeen: (...but: readonly number[]) => void = () => undefined;
  /** Where an explorer may let others come in between. */
  isVisible: (kind: number, place: number, low: number) => boolean = () => true;
  /** Runs when this thread is about to sleep on an address. */
  onSleep: (address: number) => void = () => undefined;

  constructor(memory: SharedArrayBuffer, thread: number) {
    this.memory = memory;
    this.thread = thread;
    this.#words = new Int32Array(memory);
    this.#clock = new Float64Array(memory, CLOCK_AT, 1 + MAX_THREADS);
    this.#bytes = new Uint8Array(memory);
    this.#seen = new Float64Array(memory, SEEN_AT, SEEN_CAPACITY * SEEN_WORDS);
  }

  // ---- What the controller does -------------------------------------------------------------------------------

  /** Starts a run of threads 0 to `count` - 1; thread 0 begins, alone, by setting the world up. */
  start(options: {
    readonly threads: number;
    readonly text: string;
    readonly seed: number;
    readonly strategy: number;
    readonly stepLimit: number;
    readonly stopAt: number;
    /** Explores: choices to repeat, then who sleeps. */
    readonly explore?: ExploreOptions;
  }): void {
    const words = this.#words;
    words[Word.Finished] = 0;
    words[Word.Aborted] = RUNNING;
    words[Word.Steps] = 0;
    words[Word.StepLimit] = options.stepLimit;
    words[Word.Random] = options.seed | 1;
    words[Word.Strategy] = options.strategy;
    words[Word.Order] = 0;
    words[Word.TraceCount] = 0;
    words[Word.Switches] = 0;
    words[Word.StopAt] = options.stopAt;
    words[Word.Hash] = 0;
    words[Word.NoteLength] = 0;
    words[Word.Fault] = options.explore?.fault === true ? 1 : 0;
    words[Word.Explore] = options.explore === undefined ? 0 : 1;
    words[Word.PrefixCount] = options.explore?.prefix.length ?? 0;
    words[Word.Choices] = 0;
    words[Word.Sleep] = 0;
    for (const { thread, accesses } of options.explore?.sleepers ?? []) {
      words[Word.Sleep] = (words[Word.Sleep] ?? 0) | (1 << thread);
      const at = SLEEPERS_AT + thread * SLEEPER_WORDS;
      const kept = accesses.slice(0, SLEEPER_ACCESSES);
      words[at] = kept.length;
      kept.forEach(({ kind, place, low, high }, index) => {
        words.set([kind, place, low, high], at + 1 + index * 4);
      });
    }
    if (options.explore !== undefined) words.set(options.explore.prefix, PREFIX_AT);
    this.#clock[0] = 1000;
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      const at = THREADS + thread * THREAD_WORDS;
      words.fill(0, at + 1, at + THREAD_WORDS);
      words[at + Slot.State] = thread < options.threads ? READY : IDLE;
      words[at + Slot.Cause] = -1;
      words[at + Slot.Priority] = this.random();
    }
    this.#write(Word.TextLength, TEXT_AT, TEXT_BYTES, options.text);
    words[Word.ResultLength] = 0;
    this.#grant(0);
  }

  /** Blocks the controller until the run is over. @returns what thread 0 said of it, undefined after `timeoutMs` */
  finish(timeoutMs: number): string | undefined {
    const words = this.#words;
    while (load(words, Word.Finished) === 0) {
      if (wait(words, Word.Finished, 0, timeoutMs) === 'timed-out') return undefined;
    }
    return this.#read(Word.ResultLength, RESULT_AT);
  }

  /** Another scenario begins: its locks are found out anew, no state was seen. */
  forget(): void {
    this.#words[Word.Locks] = 0;
    if (this.#words[Word.Seen] !== 0) this.#seen.fill(0);
    this.#words[Word.Seen] = 0;
  }

  /** Different states that explored runs came to. */
  get seenStates(): number {
    return this.#words[Word.Seen] ?? 0;
  }

  /** The choices of the last run. */
  choices(): Choice[] {
    const words = this.#words;
    const choices: Choice[] = [];
    for (let index = 0; index < (words[Word.Choices] ?? 0); index++) {
      const at = CHOICE_AT + index * CHOICE_WORDS;
      const [chosen = 0, open = 0, trace = 0] = words.subarray(at, at + CHOICE_WORDS);
      if (chosen < 0) break;
      choices.push({ chosen, open, trace });
    }
    return choices;
  }

  trace(): Step[] {
    const words = this.#words;
    const steps: Step[] = [];
    for (let index = 0; index < (words[Word.TraceCount] ?? 0); index++) {
      const at = TRACE_AT + index * TRACE_WORDS;
      const [thread = 0, kind = 0, place = 0, low = 0, high = 0, cause = 0] = words.subarray(at, at + 6);
      const announced = {
        kind: words[at + 6] ?? 0,
        place,
        low: words[at + 7] ?? 0,
        high: words[at + 8] ?? 0,
      };
      steps.push({ thread, kind, place, low, high, cause, announced, continued: words[at + 9] === 1 });
    }
    return steps;
  }

  get aborted(): number {
    return this.#words[Word.Aborted] ?? 0;
  }

  /** The choices of this run are made by an explorer. */
  get exploring(): boolean {
    return this.#words[Word.Explore] === 1;
  }

  get steps(): number {
    return this.#words[Word.Steps] ?? 0;
  }

  /** A digest of every step of the run. */
  get hash(): number {
    return (this.#words[Word.Hash] ?? 0) >>> 0;
  }

  // ---- What threads do outside of a run -----------------------------------------------------------------------

  /** Blocks until it is this thread's turn. @returns the text the run was started with */
  awaitTurn(): string {
    this.#sleepUntilTurn();
    this.#throws = 0;
    this.#held = 0;
    if (this.thread > 0 && this.aborted === RUNNING) this.#record(-1);
    return this.#read(Word.TextLength, TEXT_AT);
  }

  /** The thread's part is over. Thread 0 comes back from this when every thread is at its end. */
  end(): void {
    this.running = false;
    const words = this.#words;
    words[this.#slot(Slot.State)] = IDLE;
    words[this.#slot(Slot.LocalA)] = 0;
    words[this.#slot(Slot.LocalB)] = 0;
    const next = this.#choose();
    if (next >= 0) this.#grant(next);
    else if (this.thread === 0) return;
    else this.#grant(0);
    if (this.thread === 0) this.#sleepUntilTurn();
  }

  /** Thread 0: the result of the run, which is over now. */
  report(result: string): void {
    this.#write(Word.ResultLength, RESULT_AT, RESULT_BYTES, result);
    store(this.#words, Word.Finished, 1);
    notify(this.#words, Word.Finished);
  }

  // ---- What threads do in a run -------------------------------------------------------------------------------

  /** About to do something to bytes [low, high) of a place. */
  step(kind: number, place: number, low: number, high: number): void {
    if (!this.running) return;
    if (this.aborted !== RUNNING) throw this.#ended();
    const words = this.#words;
    const slot = this.#slot(0);
    words[slot + Slot.Kind] = kind;
    words[slot + Slot.Place] = place;
    words[slot + Slot.Low] = low;
    words[slot + Slot.High] = high;
    const within = this.exploring && (this.#held > 0 || !this.isVisible(kind, place, low));
    if (!within) this.#yield();
    this.#record(words[slot + Slot.Cause] ?? -1, within);
    words[slot + Slot.Cause] = -1;
  }

  /**
   * The thread has taken (or given back) the lock word at an address. An explorer lets critical sections run
   * undisturbed: what they work on is touched under the lock only, so whoever would come in between could do no more
   * than wait for its end. What happens at a contended lock is explored for itself.
   */
  lockTaken(address: number): void {
    if (this.exploring && this.#isLock(address)) this.#held++;
  }

  lockGiven(address: number): void {
    if (this.#isLock(address)) {
      this.#held = Math.max(0, this.#held - 1);
      return;
    }
    // While an explorer is at work what counts as a lock must not change.
    const words = this.#words;
    const count = words[Word.Locks] ?? 0;
    if (this.exploring || count === LOCK_CAPACITY) return;
    words[LOCKS_AT + count] = address;
    words[Word.Locks] = count + 1;
  }

  #isLock(address: number): boolean {
    const count = this.#words[Word.Locks] ?? 0;
    for (let index = 0; index < count; index++) if (this.#words[LOCKS_AT + index] === address) return true;
    return false;
  }

  #held = 0;

  /** What the last step of this thread turned out to have been. */
  refine(kind: number, low?: number, high?: number): void {
    if (!this.running) return;
    const words = this.#words;
    const at = TRACE_AT + ((words[Word.TraceCount] ?? 0) - 1) * TRACE_WORDS;
    words[at + 1] = kind;
    if (low !== undefined) words[at + 3] = low;
    if (high !== undefined) words[at + 4] = high;
  }

  /** Sleeps on an address (or -1: on none) until {@link wake} or the deadline. @returns whether it was woken */
  sleep(address: number, timeoutMs: number): boolean {
    const words = this.#words;
    const slot = this.#slot(0);
    this.onSleep(address);
    words[slot + Slot.State] = BLOCKED;
    words[slot + Slot.Address] = address;
    words[slot + Slot.Woken] = 0;
    words[slot + Slot.Order] = (words[Word.Order] ?? 0) + 1;
    words[Word.Order] = words[slot + Slot.Order] ?? 0;
    this.#clock[1 + this.thread] = this.now + timeoutMs;
    // Whoever runs again after a sleep does nothing but go on to its next step.
    words[slot + Slot.Kind] = LOCAL;
    this.#yield();
    this.#record(words[slot + Slot.Cause] ?? -1);
    words[slot + Slot.Cause] = -1;
    return words[slot + Slot.Woken] === 1;
  }

  /** Wakes up to `most` of those who sleep on the address, first come first served. @returns how many */
  wake(address: number, most: number): number {
    const words = this.#words;
    let woken = 0;
    while (woken < most) {
      let first = -1;
      let firstOrder = Infinity;
      for (let thread = 0; thread < MAX_THREADS; thread++) {
        const slot = THREADS + thread * THREAD_WORDS;
        if (words[slot + Slot.State] !== BLOCKED || words[slot + Slot.Address] !== address) continue;
        const order = words[slot + Slot.Order] ?? 0;
        if (order < firstOrder) {
          first = slot;
          firstOrder = order;
        }
      }
      if (first < 0) break;
      words[first + Slot.State] = READY;
      words[first + Slot.Woken] = 1;
      words[first + Slot.Cause] = (words[Word.TraceCount] ?? 0) - 1;
      woken++;
    }
    return woken;
  }

  /** Whether another thread is about to touch bytes [low, high) of the arena. */
  othersAt(low: number, high: number): boolean {
    const words = this.#words;
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      const slot = THREADS + thread * THREAD_WORDS;
      if (thread === this.thread || words[slot + Slot.State] !== READY) continue;
      if (words[slot + Slot.Kind] === LOCAL || words[slot + Slot.Place] !== ARENA) continue;
      if ((words[slot + Slot.Low] ?? 0) < high && low < (words[slot + Slot.High] ?? 0)) return true;
    }
    return false;
  }

  /** Virtual time in milliseconds. */
  get now(): number {
    return this.#clock[0] ?? 0;
  }

  /** Ends the world: all threads fall out of whatever they do. The first reason counts. */
  abort(reason: number, note = ''): void {
    const words = this.#words;
    if (words[Word.Aborted] !== RUNNING) return;
    words[Word.Aborted] = reason;
    this.#write(Word.NoteLength, NOTE_AT, NOTE_BYTES, note);
  }

  /** Ends the world here and now. */
  cutPower(): never {
    this.abort(POWER_CUT);
    throw this.#ended();
  }

  /** Ends the world because something that must hold does not. */
  violate(invariant: string, what: string): never {
    this.abort(VIOLATED, `${invariant}: ${what}`);
    throw this.#ended();
  }

  /** An I/O call of this run failed because the explorer wanted it to. */
  get faulty(): boolean {
    return this.#words[Word.Fault] === 2;
  }

  get note(): string {
    return this.#read(Word.NoteLength, NOTE_AT);
  }

  /** An I/O call is under way. @returns whether the explorer wants it to fail */
  chooseFault(): boolean {
    const words = this.#words;
    if (!this.running || words[Word.Fault] !== 1) return false;
    const count = words[Word.Choices] ?? 0;
    words[Word.Choices] = count + 1;
    const repeats = count < (words[Word.PrefixCount] ?? 0);
    const choice = repeats ? (words[PREFIX_AT + count] ?? 0) : IO_SUCCEEDS;
    this.#noteChoice(count, choice, repeats ? 0 : 3);
    if (choice !== IO_FAILS) return false;
    words[Word.Fault] = 2;
    this.observe(-6, 1);
    return true;
  }

  /** The world's next random number, uint32. */
  random(): number {
    let x = this.#words[Word.Random] ?? 1;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.#words[Word.Random] = x;
    return Math.imul(x, 0x9e3779b1) >>> 0;
  }

  // ---- Scheduling ---------------------------------------------------------------------------------------------

  #yield(): void {
    // While choices are repeated nobody asks where a thread is that goes on at once.
    const repeats = (this.#words[Word.Choices] ?? 0) < (this.#words[Word.PrefixCount] ?? 0);
    if (this.exploring && !repeats) this.#noteLocal();
    const next = this.#choose();
    if (next !== this.thread) {
      if (this.exploring && repeats) this.#noteLocal();
      this.#words[Word.Switches] = (this.#words[Word.Switches] ?? 0) + 1;
      if (next >= 0) this.#grant(next);
      if (next >= 0) this.#sleepUntilTurn();
    }
    if (this.aborted !== RUNNING) throw this.#ended();
  }

  #noteLocal(): void {
    const [a, b] = this.localDigest();
    this.#words[this.#slot(Slot.LocalA)] = a;
    this.#words[this.#slot(Slot.LocalB)] = b;
  }

  /** What every thread is at, as numbers, for the digest of the state. */
  localParts(): number[] {
    const words = this.#words;
    const parts = [words[Word.Fault] ?? 0];
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      const slot = THREADS + thread * THREAD_WORDS;
      const state = words[slot + Slot.State] ?? 0;
      parts.push(state, words[slot + Slot.LocalA] ?? 0, words[slot + Slot.LocalB] ?? 0);
      parts.push(state === BLOCKED ? (words[slot + Slot.Address] ?? 0) : 0);
    }
    return parts;
  }

  /**
   * The state before a new choice: which of the threads that are ready have to be explored from it? Sleep sets with
   * state caching (Godefroid, "Partial-Order Methods for the Verification of Concurrent Systems", 5.3): a state seen
   * before is explored again only for threads that were asleep then and are not now.
   */
  #openThreads(ready: number): number {
    const words = this.#words;
    const sleep = (words[Word.Sleep] ?? 0) & ready;
    const [first, second] = this.digest();
    const key = second - (second % SEEN_SLEEP);
    for (let slot = first % SEEN_CAPACITY; ; slot = (slot + 1) % SEEN_CAPACITY) {
      const at = slot * SEEN_WORDS;
      const entry = this.#seen[at + 1] ?? 0;
      if (this.#seen[at] === 0 && entry === 0) {
        if ((words[Word.Seen] ?? 0) > SEEN_CAPACITY * 0.9) throw new Error('too many states for the table');
        words[Word.Seen] = (words[Word.Seen] ?? 0) + 1;
        this.#seen[at] = first;
        this.#seen[at + 1] = key + sleep;
        return ready & ~sleep;
      }
      if (this.#seen[at] === first && entry - (entry % SEEN_SLEEP) === key) {
        const before = entry % SEEN_SLEEP;
        this.#seen[at + 1] = key + (before & sleep);
        return before & ~sleep;
      }
    }
  }

  /** Who goes on; -1 where nobody is left. */
  #choose(): number {
    const count = this.#words[Word.Choices] ?? 0;
    if (!this.exploring || this.aborted !== RUNNING) return this.#pick();
    this.#noteChoice(count, -1, 0);
    const next = this.#pick();
    if (this.aborted === RUNNING) this.#words[CHOICE_AT + count * CHOICE_WORDS] = next;
    return next;
  }

  #noteChoice(index: number, chosen: number, open: number): void {
    const at = CHOICE_AT + index * CHOICE_WORDS;
    this.#words[at] = chosen;
    this.#words[at + 1] = open;
    this.#words[at + 2] = this.#words[Word.TraceCount] ?? 0;
  }

  #pick(): number {
    const words = this.#words;
    let ready = 0;
    let only = -1;
    let blocked = -1;
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      const state = words[THREADS + thread * THREAD_WORDS + Slot.State];
      if (state === READY) {
        ready++;
        only = thread;
      } else if (state === BLOCKED) blocked = thread;
    }
    if (words[Word.Aborted] !== RUNNING) {
      // All fall out, the sleeping too.
      if (ready > 0) return only;
      if (blocked >= 0) words[THREADS + blocked * THREAD_WORDS + Slot.State] = READY;
      return blocked;
    }
    const steps = (words[Word.Steps] ?? 0) + 1;
    words[Word.Steps] = steps;
    words[Word.Choices] = (words[Word.Choices] ?? 0) + 1;
    this.#clock[0] = this.now + 0.01;
    if (steps === words[Word.StopAt]) {
      this.abort(POWER_CUT);
      return this.#pick();
    }
    if (steps > (words[Word.StepLimit] ?? 0)) {
      this.abort(VIOLATED, `progress: no end after ${steps} steps`);
      return this.#pick();
    }
    if (ready === 0) {
      if (blocked < 0) return -1;
      const sleeper = this.#earliest();
      if (sleeper < 0) {
        this.abort(
          VIOLATED,
          `no lost wakeup: every thread sleeps and nobody is left to wake one (${this.#sleepers()})`,
        );
        return this.#pick();
      }
      return this.#expire(sleeper);
    }
    if (words[Word.Explore] === 1) return this.#chooseExploring();
    // Time may pass at any moment: whoever sleeps with a deadline may be next.
    if (blocked >= 0 && this.random() < 0x02000000) {
      const sleeper = this.#earliest();
      if (sleeper >= 0) return this.#expire(sleeper);
    }
    if (ready === 1) return only;
    switch (words[Word.Strategy]) {
      case STICKY:
        if (words[this.#slot(Slot.State)] === READY && this.random() > 0x18000000) return this.thread;
        break;
      case PRIORITY: {
        if (this.random() < 0x04000000) words[this.#slot(Slot.Priority)] = this.random();
        let best = -1;
        let bestPriority = -1;
        for (let thread = 0; thread < MAX_THREADS; thread++) {
          const slot = THREADS + thread * THREAD_WORDS;
          const priority = (words[slot + Slot.Priority] ?? 0) >>> 0;
          if (words[slot + Slot.State] !== READY || priority <= bestPriority) continue;
          best = thread;
          bestPriority = priority;
        }
        return best;
      }
      default:
    }
    let pick = this.random() % ready;
    for (let thread = 0; ; thread++) {
      if (words[THREADS + thread * THREAD_WORDS + Slot.State] !== READY) continue;
      if (pick-- === 0) return thread;
    }
  }

  #chooseExploring(): number {
    const words = this.#words;
    const count = (words[Word.Choices] ?? 0) - 1;
    const isReady = (thread: number): boolean =>
      words[THREADS + thread * THREAD_WORDS + Slot.State] === READY;
    if (count < (words[Word.PrefixCount] ?? 0)) {
      const chosen = words[PREFIX_AT + count] ?? 0;
      if (!isReady(chosen)) {
        this.abort(
          VIOLATED,
          `determinism: thread ${chosen} cannot go on at choice ${count} of a repeated run`,
        );
        return this.#pick();
      }
      return chosen;
    }
    let ready = 0;
    for (let thread = 0; thread < MAX_THREADS; thread++) if (isReady(thread)) ready |= 1 << thread;
    const open = (ready & (ready - 1)) === 0 ? ready & ~(words[Word.Sleep] ?? 0) : this.#openThreads(ready);
    words[CHOICE_AT + count * CHOICE_WORDS + 1] = open;
    if ((open & (1 << this.thread)) !== 0) return this.thread;
    if (open !== 0) return 31 - Math.clz32(open & -open);
    this.abort(REDUNDANT);
    return this.#pick();
  }

  #earliest(): number {
    let first = -1;
    let firstDeadline = Infinity;
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      const slot = THREADS + thread * THREAD_WORDS;
      const deadline = this.#clock[1 + thread] ?? Infinity;
      if (this.#words[slot + Slot.State] !== BLOCKED || !(deadline < firstDeadline)) continue;
      first = thread;
      firstDeadline = deadline;
    }
    return first;
  }

  #expire(thread: number): number {
    const slot = THREADS + thread * THREAD_WORDS;
    this.#words[slot + Slot.State] = READY;
    this.#words[slot + Slot.Woken] = 0;
    // Time passes when nobody else can go on: all that was done before came before.
    this.#words[slot + Slot.Cause] = -2;
    this.#clock[0] = Math.max(this.now, this.#clock[1 + thread] ?? 0);
    return thread;
  }

  #sleepers(): string {
    const list: string[] = [];
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      const slot = THREADS + thread * THREAD_WORDS;
      if (this.#words[slot + Slot.State] === BLOCKED) {
        list.push(`thread ${thread} on ${this.#words[slot + Slot.Address]}`);
      }
    }
    return list.join(', ');
  }

  #record(cause: number, continued = false): void {
    const words = this.#words;
    const count = words[Word.TraceCount] ?? 0;
    const slot = this.#slot(0);
    const kind = words[slot + Slot.Kind] ?? 0;
    const place = words[slot + Slot.Place] ?? 0;
    const low = words[slot + Slot.Low] ?? 0;
    const high = words[slot + Slot.High] ?? 0;
    words[Word.Hash] =
      (Math.imul((words[Word.Hash] ?? 0) ^ (this.thread * 8 + kind), 0x01000193) ^
        Math.imul(place, 0x85ebca6b) ^
        low) |
      0;
    if (count >= TRACE_CAPACITY) return;
    const at = TRACE_AT + count * TRACE_WORDS;
    words[at] = this.thread;
    words[at + 1] = kind;
    words[at + 2] = place;
    words[at + 3] = low;
    words[at + 4] = high;
    words[at + 5] = cause;
    words[at + 6] = kind;
    words[at + 7] = low;
    words[at + 8] = high;
    words[at + 9] = continued ? 1 : 0;
    words[Word.TraceCount] = count + 1;
    if (words[Word.Explore] === 1 && (words[Word.Choices] ?? 0) >= (words[Word.PrefixCount] ?? 0))
      this.#wakeDependents(kind, place, low, high);
  }

  /** Threads in the sleep set leave it once something they depend on has happened. */
  #wakeDependents(kind: number, place: number, low: number, high: number): void {
    const words = this.#words;
    let sleep = words[Word.Sleep] ?? 0;
    if (sleep === 0) return;
    for (let thread = 0; thread < MAX_THREADS; thread++) {
      if ((sleep & (1 << thread)) === 0) continue;
      const at = SLEEPERS_AT + thread * SLEEPER_WORDS;
      const count = words[at] ?? 0;
      for (let index = 0; index < count; index++) {
        const access = at + 1 + index * 4;
        if (words[access + 1] !== place || !dependent(kind, words[access] ?? 0)) continue;
        if (low >= (words[access + 3] ?? 0) || (words[access + 2] ?? 0) >= high) continue;
        sleep &= ~(1 << thread);
        break;
      }
    }
    words[Word.Sleep] = sleep;
  }

  #grant(thread: number): void {
    const index = THREADS + thread * THREAD_WORDS + Slot.Turn;
    store(this.#words, index, 1);
    notify(this.#words, index);
  }

  #sleepUntilTurn(): void {
    const index = this.#slot(Slot.Turn);
    while (load(this.#words, index) === 0) wait(this.#words, index, 0);
    store(this.#words, index, 0);
  }

  #slot(word: number): number {
    return THREADS + this.thread * THREAD_WORDS + word;
  }

  #throws = 0;

  #ended(): WorldEnded {
    if (++this.#throws > 100_000) {
      console.error('the code does not let go although its world has ended');
      process.exit(3);
    }
    return new WorldEnded();
  }

  #write(length: number, at: number, most: number, text: string): void {
    const bytes = new TextEncoder().encode(text).subarray(0, most);
    this.#bytes.set(bytes, at);
    this.#words[length] = bytes.length;
  }

  #read(length: number, at: number): string {
    return new TextDecoder().decode(this.#bytes.slice(at, at + (this.#words[length] ?? 0)));
  }
}
