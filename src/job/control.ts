import { type PlainError, StillframeError } from '../errors.js';
import type { Arena } from '../kernels/arena.js';
import { advance, load, store, waitWhile, withLock } from '../kernels/futex.js';
import { canTransition, JOB_STATUSES, type JobStatus } from './status.js';

/**
 * The shared state of a job. Verbs of the host thread are words that the job's threads look at between runs;
 * every change advances `wake`, on which they sleep.
 */
const STATUS = 0;
const PAUSE = 4;
const CANCEL = 8;
const FINALIZE = 12;
const PASS = 16;
const ACTIVE = 20;
const WAKE = 24;
const ERROR_SET = 28;
const ERROR_LENGTH = 32;
const RATE_LOCK = 36;
const RELEASE = 40;
const COMPLETE = 44;
const SPEED = 48;
const NEXT_ALLOWED_MS = 56;
const ANSWER = 64;
const DONE = 72;
const TOTAL = 80;
const ERROR = 88;
const CANCEL_SOFT = 1;
const CANCEL_FORCED = 2;
/** Bytes of a job's control block. */
export const JOB_CONTROL_BYTES = 4096;

/** An error of a job's thread, on its way to the job's error policy. */
export interface JobError {
  readonly operation: 'read' | 'write';
  readonly error: PlainError;
}

/** A limit that changes wakes who waits for it; this is for clocks. */
const LONGEST_WAIT_MS = 60_000;

function nowMs(): number {
  return Number(process.hrtime.bigint() / 1000n) / 1000;
}

export class JobControl {
  readonly pointer: number;
  readonly #arena: Arena;

  constructor(arena: Arena, pointer: number) {
    this.#arena = arena;
    this.pointer = pointer;
  }

  get status(): JobStatus {
    return JOB_STATUSES[this.#load(STATUS)] ?? 'undefined';
  }

  /** Called by the job's own thread only, except for `concluded` to `null`. */
  transition(to: JobStatus): void {
    const from = this.status;
    if (!canTransition(from, to)) throw new Error(`job invariant: no transition from '${from}' to '${to}'`);
    this.#store(STATUS, JOB_STATUSES.indexOf(to));
  }

  get paused(): boolean {
    return this.#load(PAUSE) !== 0;
  }

  set paused(value: boolean) {
    this.#store(PAUSE, value ? 1 : 0);
    this.wake();
  }

  /** It shall end without having done its work. */
  get cancelled(): boolean {
    return this.#load(CANCEL) === CANCEL_FORCED;
  }

  /** It shall end: {@link cancelled}, or as a job that is ready may end, with its work as it is. */
  get cancelRequested(): boolean {
    return this.#load(CANCEL) !== 0;
  }

  cancel(): void {
    this.#store(CANCEL, CANCEL_FORCED);
    this.wake();
  }

  /** Ends a job that is ready with its work as it is. */
  cancelSoftly(): void {
    Atomics.compareExchange(this.#arena.i32, (this.pointer + CANCEL) >> 2, 0, CANCEL_SOFT);
    this.wake();
  }

  get completeRequested(): boolean {
    return this.#load(COMPLETE) !== 0;
  }

  /** Ends a job that is ready with all that it is to come to. */
  complete(): void {
    this.#store(COMPLETE, 1);
    this.wake();
  }

  get finalizeRequested(): boolean {
    return this.#load(FINALIZE) !== 0;
  }

  finalize(): void {
    this.#store(FINALIZE, 1);
    this.wake();
  }

  /** The host has done its part of the commit point. */
  get answered(): boolean {
    return this.#load(ANSWER) !== 0;
  }

  /** Called by the host. @param error why it could not do its part */
  answer(error?: PlainError): void {
    if (error !== undefined) this.fail({ operation: 'write', error });
    this.#store(ANSWER, 1);
    this.wake();
  }

  /** The others of the job's transaction have come to their ends as well. */
  get released(): boolean {
    return this.#load(RELEASE) !== 0;
  }

  release(): void {
    this.#store(RELEASE, 1);
    this.wake();
  }

  /** Bytes per second for the background copy; 0 is no limit. */
  get speed(): number {
    return this.#arena.f64[(this.pointer + SPEED) / 8] ?? 0;
  }

  set speed(bytesPerSecond: number) {
    withLock(this.#arena, this.pointer + RATE_LOCK, () => {
      this.#arena.f64[(this.pointer + SPEED) / 8] = bytesPerSecond;
      this.#arena.f64[(this.pointer + NEXT_ALLOWED_MS) / 8] = 0;
    });
    this.wake();
  }

  /** Bytes that are done and bytes in all, of a job that goes through an image from its start to its end. */
  get progress(): { readonly done: number; readonly total: number } {
    const { f64 } = this.#arena;
    return { done: f64[(this.pointer + DONE) / 8] ?? 0, total: f64[(this.pointer + TOTAL) / 8] ?? 0 };
  }

  set progress({ done, total }) {
    const { f64 } = this.#arena;
    f64[(this.pointer + TOTAL) / 8] = total;
    f64[(this.pointer + DONE) / 8] = done;
  }

  /** Odd while threads shall copy, even while they shall not, negative when they shall end. */
  get pass(): number {
    return this.#load(PASS);
  }

  set pass(value: number) {
    this.#store(PASS, value);
    this.wake();
  }

  /** Whether copying shall stop at the next run boundary. */
  get interrupted(): boolean {
    return this.pass % 2 !== 1 || this.paused || this.cancelled || this.failed;
  }

  /** Runs `body` as one of the threads that copy, unless the pass is over already. */
  participate(pass: number, body: () => void): void {
    const { i32 } = this.#arena;
    const active = (this.pointer + ACTIVE) >> 2;
    Atomics.add(i32, active, 1);
    try {
      if (this.pass === pass) body();
    } finally {
      Atomics.sub(i32, active, 1);
      this.wake();
    }
  }

  get activeThreads(): number {
    return this.#load(ACTIVE);
  }

  get failed(): boolean {
    return this.#load(ERROR_SET) !== 0;
  }

  /** Keeps the first error of a pass; later ones are dropped. */
  fail(error: JobError): void {
    const { i32, u8 } = this.#arena;
    const set = (this.pointer + ERROR_SET) >> 2;
    if (Atomics.compareExchange(i32, set, 0, 1) !== 0) return;
    const { code, message, errno } = error.error;
    const plain = { operation: error.operation, error: { code, message: message.slice(0, 500), errno } };
    const json = new TextEncoder().encode(JSON.stringify(plain)).subarray(0, JOB_CONTROL_BYTES - ERROR);
    u8.set(json, this.pointer + ERROR);
    this.#store(ERROR_LENGTH, json.length);
    Atomics.store(i32, set, 2);
    this.wake();
  }

  /** The error of the last pass, taken away. Only once no thread is active. */
  takeError(): JobError | undefined {
    if (this.#load(ERROR_SET) !== 2) return undefined;
    const json = this.#arena.copyOut(this.pointer + ERROR, this.#load(ERROR_LENGTH));
    this.#store(ERROR_SET, 0);
    const error: JobError = JSON.parse(new TextDecoder().decode(json));
    return error;
  }

  /**
   * Blocks until the rate limit lets the next run go; returns early when the job is interrupted.
   *
   * @param over so it does where this says true, which is looked at when the job's threads are woken
   * @returns where there is a limit, when the run goes, and it alone until {@link account} says how much it was
   */
  throttle(over: () => boolean = () => false): number | undefined {
    const index = (this.pointer + NEXT_ALLOWED_MS) / 8;
    for (;;) {
      const sequence = this.#load(WAKE);
      if (this.speed === 0 || this.interrupted || over()) return undefined;
      const now = nowMs();
      let waitMs = 0;
      withLock(this.#arena, this.pointer + RATE_LOCK, () => {
        waitMs = (this.#arena.f64[index] ?? 0) - now;
        if (waitMs <= 0) this.#arena.f64[index] = Number.POSITIVE_INFINITY;
      });
      if (waitMs <= 0) return now;
      waitWhile(this.#arena, this.pointer + WAKE, sequence, Math.min(waitMs, LONGEST_WAIT_MS));
    }
  }

  /** Counts `bytes` of the run that went at `startMs` against the rate limit; the next one may go when they are paid for. */
  account(startMs: number, bytes: number): void {
    withLock(this.#arena, this.pointer + RATE_LOCK, () => {
      const { speed } = this;
      const index = (this.pointer + NEXT_ALLOWED_MS) / 8;
      this.#arena.f64[index] = speed === 0 ? 0 : startMs + (bytes / speed) * 1000;
    });
    this.wake();
  }

  /** The word on which the job's threads sleep. */
  get wakeWord(): number {
    return this.pointer + WAKE;
  }

  wake(): void {
    advance(this.#arena, this.wakeWord);
  }

  /**
   * Blocks until `condition` holds; it is looked at again after every change of the job.
   *
   * @param timeoutMs after which it returns all the same
   */
  waitUntil(condition: () => boolean, timeoutMs = Infinity): void {
    const deadline = timeoutMs === Infinity ? Infinity : nowMs() + timeoutMs;
    for (;;) {
      const sequence = this.#load(WAKE);
      const leftMs = deadline === Infinity ? Infinity : deadline - nowMs();
      if (condition() || leftMs <= 0) return;
      waitWhile(this.#arena, this.pointer + WAKE, sequence, leftMs);
    }
  }

  #load(offset: number): number {
    return load(this.#arena, this.pointer + offset);
  }

  #store(offset: number, value: number): void {
    store(this.#arena, this.pointer + offset, value);
  }
}

/** @throws StillframeError when the id is not one QEMU would accept */
export function checkJobId(id: string): void {
  if (!/^[A-Za-z][A-Za-z0-9\-._]*$/.test(id)) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `Invalid job ID '${id}': a letter first, then letters, digits, '-', '.' and '_'`,
    );
  }
}
