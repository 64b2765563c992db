/**
 * What must be true of a run: a drive in plain memory beside the simulated one, frozen at the instant, and the
 * invariants of the design, each named in the check of it. Shared by all threads of the world.
 */
import type { FrameDescriptor } from '#src/block/filters/copy-before-write.js';
import type { BlockNode, Extent, NodeDescriptor } from '#src/block/node.js';
import type { Arena } from '#src/kernels/arena.js';
import { Random } from '../support/data.js';
import { JobRecord, jobRecordBytes } from './job-record.js';
import type { GuestOp, Scenario } from './scenario.js';
import { CHANGE, LOCAL, type World } from './world.js';

/** The names under which violations are reported: the invariants of the design. */
export const INVARIANTS = {
  copyBeforeWrite: 'copy before write',
  instant: 'the backup is the drive at its instant',
  brokenNeverCompletes: 'a broken frame never completes',
  durable: 'completed means durable',
  unfinished: 'unfinished never looks finished',
  waits: 'a guest waits only for what it overlaps',
  memory: 'memory is bounded and given back',
  source: 'the source is never damaged',
  guest: 'a guest reads what was written',
  errors: 'no error without a cause',
  format: 'an image is consistent at every moment',
  bitmap: 'a dirty bitmap knows all that is not in the backup before',
  mirror: 'a mirror that completes is the drive',
  blocking: 'a guest is answered once its change is in the mirror',
} as const;

/** Bytes of a drive at most. */
export const DRIVE_BYTES = 4 << 20;
const SECTOR = 512;
const SECTORS = DRIVE_BYTES / SECTOR;
const MAX_OPS = 512;
const OP_WORDS = 4;
const TEXT_BYTES = 65536;

const Word = {
  Mutations: 0,
  Stamp: 1,
  Draining: 2,
  DiskText: 3,
  Unit: 4,
  Length: 5,
} as const;
/** Ranges that threads keep guests out of: two words for each thread, in sectors. */
const HOLD_AT = 16;
const HOLD_THREADS = 24;
const OP_AT = 64;
const OpWord = { Begun: 0, Applied: 1, State: 2, Called: 3 } as const;
const WORDS = OP_AT + MAX_OPS * OP_WORDS;
const TEXTS_AT = WORDS * 4;
const DRIVE_AT = TEXTS_AT + TEXT_BYTES;
const UNKNOWN_AT = DRIVE_AT + DRIVE_BYTES;
const INITIAL_AT = UNKNOWN_AT + SECTORS;
const JOBS_AT = INITIAL_AT + DRIVE_BYTES;
/** Jobs of a scenario at most. */
export const JOBS = 2;
const JOB_BYTES = jobRecordBytes(DRIVE_BYTES, SECTORS);
const ORACLE_BYTES = JOBS_AT + JOBS * JOB_BYTES;

/** States of a cluster of a frame. */
const TODO = 1;
const BUSY = 2;

/** State of a guest's request. */
const CALLED = 1;
const DONE = 2;
const FAILED = 3;

export function makeOracleMemory(): SharedArrayBuffer {
  return new SharedArrayBuffer(ORACLE_BYTES);
}

// Twice the same, so that data which starts anywhere is in one piece.
const NOISE = new Uint8Array(2 * DRIVE_BYTES);
NOISE.set(new Random(1).noise(DRIVE_BYTES));
NOISE.copyWithin(DRIVE_BYTES, 0, DRIVE_BYTES);

/** The bytes that request (or range of the setup) `id` writes to [offset, offset + length). */
export function dataOf(id: number, offset: number, length: number): Uint8Array {
  // Some requests write zeroes by hand, as guests do.
  if (id % 11 === 7) return new Uint8Array(length);
  const start = (offset + id * 40_503 * 512) % DRIVE_BYTES;
  return NOISE.subarray(start, start + length);
}

/** One thread's view of the oracle. */
export class Oracle {
  readonly drive: Uint8Array;
  readonly initial: Uint8Array;
  /** Sectors whose content is not known, since a request on them failed. */
  readonly unknown: Uint8Array;
  readonly jobs: readonly JobRecord[];
  readonly #world: World;
  readonly #words: Int32Array;
  readonly #bytes: Uint8Array;

  constructor(memory: SharedArrayBuffer, world: World) {
    this.#world = world;
    this.#words = new Int32Array(memory, 0, WORDS);
    this.#bytes = new Uint8Array(memory);
    this.drive = this.#bytes.subarray(DRIVE_AT, DRIVE_AT + DRIVE_BYTES);
    this.initial = this.#bytes.subarray(INITIAL_AT, INITIAL_AT + DRIVE_BYTES);
    this.unknown = this.#bytes.subarray(UNKNOWN_AT, UNKNOWN_AT + SECTORS);
    this.jobs = Array.from(
      { length: JOBS },
      (_, job) => new JobRecord(memory, JOBS_AT + job * JOB_BYTES, DRIVE_BYTES, SECTORS),
    );
  }

  /** @param unit bytes to which requests are rounded out before they are kept apart */
  begin(length: number, unit: number): void {
    this.#words.fill(0);
    for (const job of this.jobs) job.begin();
    this.unknown.fill(0);
    this.#words[Word.Unit] = unit;
    this.#words[Word.Length] = length;
    this.initial.set(this.drive.subarray(0, length));
  }

  // ---- What threads tell each other ---------------------------------------------------------------------------

  get diskText(): string {
    return this.#text(Word.DiskText, 0);
  }

  set diskText(text: string) {
    this.#setText(Word.DiskText, 0, text);
  }

  // ---- The instant --------------------------------------------------------------------------------------------

  /** The frame of a job is being armed: this is its instant. */
  freeze(job: JobRecord, frame: FrameDescriptor): void {
    if (this.#get(Word.Mutations) !== 0) {
      this.#world.violate(
        INVARIANTS.instant,
        `${this.#get(Word.Mutations)} requests are in flight at the instant`,
      );
    }
    const drive = this.drive.subarray(0, this.#get(Word.Length));
    job.freeze(drive, this.unknown, frame, this.#stamp());
  }

  /** Nobody changes the drive at the moment: a mirror of it is the same. */
  snapshot(job: JobRecord): void {
    if (this.#get(Word.Mutations) !== 0) {
      this.#world.violate(
        INVARIANTS.mirror,
        `${this.#get(Word.Mutations)} requests are in flight when it completes`,
      );
    }
    job.snapshot(this.drive.subarray(0, this.#get(Word.Length)), this.unknown, this.#stamp());
  }

  /** Whether a guest changed the drive after the job's frame was taken off it. */
  changedSinceThaw(scenario: Scenario, job: JobRecord): boolean {
    return scenario.writers.flat().some((op) => this.changedSince(op, job.thawed));
  }

  /** Whether a request has changed the drive after a moment, or has failed, so that it may have. */
  changedSince({ id }: GuestOp, stamp: number): boolean {
    const failed = this.#op(id, OpWord.State) === FAILED && this.#op(id, OpWord.Called) > 0;
    return failed || this.#op(id, OpWord.Applied) > stamp;
  }

  /** Whether a request changed the drive between two moments. */
  changedBetween({ id, kind }: GuestOp, from: number, to: number): boolean {
    const [begun, applied] = [this.#op(id, OpWord.Begun), this.#op(id, OpWord.Applied)];
    // What was under way at `from` may have been in the drive by then.
    return kind !== 'read' && kind !== 'flush' && begun > from && applied > 0 && applied <= to;
  }

  /** Whether a request has come to its end, and well. */
  isDone({ id }: GuestOp): boolean {
    return this.#op(id, OpWord.State) === DONE;
  }

  /** A job begins, or ends, to drain the requests of the disk. */
  drain(begins: boolean): void {
    this.#words[Word.Draining] = this.#get(Word.Draining) + (begins ? 1 : -1);
  }

  /** A thread keeps guests from changing [start, end) for a while; an empty range: no more. */
  hold(thread: number, start: number, end: number): void {
    if (thread >= HOLD_THREADS) throw new RangeError(`thread ${thread} is one too many`);
    this.#words[HOLD_AT + 2 * thread] = Math.floor(start / SECTOR);
    this.#words[HOLD_AT + 2 * thread + 1] = Math.ceil(end / SECTOR);
  }

  /** Whether guests are kept out of some of [low, high). */
  #isHeld(low: number, high: number): boolean {
    const unit = this.#get(Word.Unit);
    for (let thread = 0; thread < HOLD_THREADS; thread++) {
      const [start, end] = [this.#get(HOLD_AT + 2 * thread), this.#get(HOLD_AT + 2 * thread + 1)];
      if (start === end) continue;
      const [from, to] = [start * SECTOR, end * SECTOR];
      if (Math.floor(from / unit) * unit < high && low < Math.ceil(to / unit) * unit) return true;
    }
    return false;
  }

  // ---- Requests of guests -------------------------------------------------------------------------------------

  call(op: GuestOp): void {
    this.#setOp(op.id, OpWord.State, CALLED);
    this.#setOp(op.id, OpWord.Called, this.#stamp());
  }

  ended(op: GuestOp, failed: boolean): void {
    this.#setOp(op.id, OpWord.State, failed ? FAILED : DONE);
  }

  /** A moment of its own, so that others can come between the end of copy-before-write and the change. */
  announceMutation(): void {
    this.#world.forgetSeen();
    this.#world.step(LOCAL, CHANGE, 0, 1);
  }

  /** A change of [offset, offset + length) is about to reach the node. */
  beginMutation(op: GuestOp, arena: Arena): void {
    const { offset, length } = op;
    this.#setOp(op.id, OpWord.Begun, this.#stamp());
    this.#words[Word.Mutations] = this.#get(Word.Mutations) + 1;
    if (length === 0) return;
    for (const job of this.jobs) {
      if (!job.active || arena.i32[job.control >> 2] !== 0) continue;
      const size = job.clusterSize;
      for (let cluster = Math.floor(offset / size); cluster * size < offset + length; cluster++) {
        const state = job.state(arena.u64, cluster);
        if (state !== TODO && state !== BUSY) continue;
        const what = `${op.kind} ${op.id} of ${length} bytes at ${offset} reaches cluster ${cluster}`;
        const which = `which is ${state === TODO ? 'todo' : 'busy'} in the frame of job ${this.jobs.indexOf(job) + 1}`;
        this.#world.violate(INVARIANTS.copyBeforeWrite, `${what}, ${which}`);
      }
    }
  }

  /** The change has been made: these bytes are there now; undefined where it failed and nobody knows. */
  endMutation(op: GuestOp, bytes: Uint8Array | undefined): void {
    const { offset, length } = op;
    this.#words[Word.Mutations] = this.#get(Word.Mutations) - 1;
    const [first, end] = [Math.floor(offset / SECTOR), Math.ceil((offset + length) / SECTOR)];
    if (bytes === undefined) {
      this.unknown.fill(1, first, end);
      return;
    }
    if (op.kind === 'discard') this.#checkDiscarded(op, bytes);
    this.drive.set(bytes, offset);
    this.unknown.fill(0, first, end);
    this.#setOp(op.id, OpWord.Applied, this.#stamp());
  }

  #checkDiscarded({ id, offset }: GuestOp, bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length; at++) {
      if (bytes[at] === 0 || bytes[at] === this.drive[offset + at]) continue;
      if (this.unknown[Math.floor((offset + at) / SECTOR)] === 1) continue;
      this.#world.violate(INVARIANTS.guest, `discard ${id} made byte ${offset + at} into ${bytes[at]}`);
    }
  }

  /** A read has given `data`; `begun` is the stamp at its start. */
  checkRead(op: GuestOp, begun: number, before: Uint8Array, data: Uint8Array, ops: readonly GuestOp[]): void {
    const meddling = ops.filter((other) => {
      if (other.offset >= op.offset + op.length || op.offset >= other.offset + other.length) return false;
      const [otherBegun, applied] = [this.#op(other.id, OpWord.Begun), this.#op(other.id, OpWord.Applied)];
      return otherBegun !== 0 && (applied === 0 || applied > begun);
    });
    for (let at = 0; at < op.length; at++) {
      const offset = op.offset + at;
      if (data[at] === before[at] || data[at] === this.drive[offset]) continue;
      if (this.unknown[Math.floor(offset / SECTOR)] === 1) continue;
      const explained = meddling.some(
        (other) =>
          offset >= other.offset &&
          offset < other.offset + other.length &&
          valuesOf(other, offset).includes(data[at] ?? 0),
      );
      if (explained) continue;
      this.#world.violate(
        INVARIANTS.guest,
        `read ${op.id} sees ${data[at]} at ${offset}, where ${this.drive[offset]} was written`,
      );
    }
  }

  stamp(): number {
    return this.#stamp();
  }

  /** A guest goes to sleep: is there anything it may wait for? */
  checkWait(
    address: number,
    arena: Arena,
    op: GuestOp | undefined,
    diskControl: number,
    ops: readonly GuestOp[],
  ): void {
    if (op === undefined || op.kind === 'read' || op.kind === 'flush') return;
    const unit = this.#get(Word.Unit);
    const [low, high] = [
      Math.floor(op.offset / unit) * unit,
      Math.ceil((op.offset + op.length) / unit) * unit,
    ];
    if (address > diskControl && address < diskControl + 64) {
      if (this.#get(Word.Draining) > 0 || this.#isHeld(low, high)) return;
      const overlaps = ops.some(
        (other) =>
          other.id !== op.id &&
          this.#op(other.id, OpWord.State) === CALLED &&
          other.offset < high &&
          low < Math.ceil((other.offset + other.length) / unit) * unit,
      );
      if (!overlaps)
        this.#world.violate(INVARIANTS.waits, `${op.kind} ${op.id} waits for a request it does not overlap`);
      return;
    }
    const job = this.jobs.find(
      ({ active, control }) => active && address >= control && address < control + 64,
    );
    if (job === undefined) return;
    const size = job.clusterSize;
    for (let cluster = Math.floor(op.offset / size); cluster * size < op.offset + op.length; cluster++) {
      if (job.state(arena.u64, cluster) === BUSY) return;
    }
    // Whoever has just ended a claim is on its way to wake those who wait for it.
    if (this.#world.othersAt(job.control, job.control + 128)) return;
    // So is who ends a claim that goes on in the next words of the states: each word is a step of its own.
    const last = Math.floor((op.offset + op.length - 1) / size);
    const end = Math.ceil(this.#get(Word.Length) / size);
    if (this.#world.othersAt(job.stateWord(last) + 8, job.stateWord(end) + 8)) return;
    this.#world.violate(
      INVARIANTS.waits,
      `${op.kind} ${op.id} waits although none of its clusters is being copied`,
    );
  }

  // ---- After the run ------------------------------------------------------------------------------------------

  /**
   * @param besides sectors that do not count
   * @returns what is wrong with `data` as the drive at the instant of a job, or as the drive now
   */
  difference(data: Uint8Array, job?: JobRecord, besides?: Uint8Array): string | undefined {
    const [bytes, unknown] = job === undefined ? [this.drive, this.unknown] : [job.frozen, job.unknown];
    const at = firstDifference(
      data,
      bytes,
      0,
      data.length,
      besides === undefined ? [unknown] : [unknown, besides],
    );
    return at === undefined ? undefined : `byte ${at} is ${data[at]}, not ${bytes[at]}`;
  }

  /** @returns what is wrong with `data` as what the drive holds from `offset` on */
  differenceAt(data: Uint8Array, offset: number): string | undefined {
    for (let index = 0; index < data.length; index++) {
      const at = offset + index;
      if (data[index] === this.drive[at] || this.unknown[Math.floor(at / SECTOR)] === 1) continue;
      return `byte ${at} is ${data[index]}, not ${this.drive[at]}`;
    }
    return undefined;
  }

  /** @returns where the drive is another now than `before` was, which is the drive at the instant of a job or not */
  differenceFrom(
    before: Uint8Array,
    low: number,
    high: number,
    job: JobRecord | undefined,
  ): string | undefined {
    const unknown = job === undefined ? [this.unknown] : [this.unknown, job.unknown];
    const at = firstDifference(before, this.drive, low, high, unknown);
    return at === undefined ? undefined : `byte ${at} is ${this.drive[at]} now and was ${before[at]}`;
  }

  /**
   * What is wrong with the drive's bytes after a power cut: nothing older than the last flush may have come back.
   *
   * @param durableAt a moment at which all was durable that had been written
   */
  differenceAfterCut(data: Uint8Array, scenario: Scenario, durableAt = 0): string | undefined {
    const ops = scenario.writers.flat();
    const changes = ops.filter(
      ({ kind, id }) => kind !== 'read' && kind !== 'flush' && this.#op(id, OpWord.Begun) > 0,
    );
    let flushed = durableAt;
    for (const { kind, id } of ops) {
      if (kind === 'flush' && this.#op(id, OpWord.State) === DONE)
        flushed = Math.max(flushed, this.#op(id, OpWord.Called));
    }
    const order = (op: GuestOp): number => this.#op(op.id, OpWord.Applied) || Infinity;
    for (let sector = 0; sector * SECTOR < data.length; sector++) {
      const [low, high] = [sector * SECTOR, (sector + 1) * SECTOR];
      if (Buffer.compare(data.subarray(low, high), this.drive.subarray(low, high)) === 0) continue;
      const covering = changes
        .filter((op) => op.offset < high && low < op.offset + op.length)
        .sort((a, b) => order(b) - order(a));
      let explained = false;
      let sure = false;
      for (const op of covering) {
        const matches = (bytes: Uint8Array): boolean => Buffer.compare(data.subarray(low, high), bytes) === 0;
        if (matches(op.kind === 'write' ? dataOf(op.id, low, SECTOR) : new Uint8Array(SECTOR)))
          explained = true;
        // A discard may have left the old data; what failed may have done nothing.
        sure = op.kind !== 'discard' && order(op) < flushed && this.#op(op.id, OpWord.State) !== FAILED;
        if (explained || sure) break;
      }
      if (!explained && !sure) {
        explained = Buffer.compare(data.subarray(low, high), this.initial.subarray(low, high)) === 0;
      }
      if (!explained) return `the sector at ${low} holds neither what was flushed nor anything written since`;
    }
    return undefined;
  }

  #op(id: number, word: number): number {
    return this.#get(OP_AT + id * OP_WORDS + word);
  }

  #setOp(id: number, word: number, value: number): void {
    this.#words[OP_AT + id * OP_WORDS + word] = value;
  }

  #stamp(): number {
    const next = this.#get(Word.Stamp) + 1;
    this.#words[Word.Stamp] = next;
    return next;
  }

  #get(word: number): number {
    return this.#words[word] ?? 0;
  }

  #text(word: number, slot: number): string {
    const at = TEXTS_AT + slot * TEXT_BYTES;
    return new TextDecoder().decode(this.#bytes.slice(at, at + this.#get(word)));
  }

  #setText(word: number, slot: number, text: string): void {
    const bytes = new TextEncoder().encode(text);
    this.#bytes.set(bytes, TEXTS_AT + slot * TEXT_BYTES);
    this.#words[word] = bytes.length;
  }
}

/** The first byte from `low` on that is not the same in both, but for those of sectors that are not known. */
function firstDifference(
  one: Uint8Array,
  other: Uint8Array,
  low: number,
  high: number,
  unknown: readonly Uint8Array[],
): number | undefined {
  if (Buffer.compare(one.subarray(low, high), other.subarray(low, high)) === 0) return undefined;
  for (let at = low; at < high; at++) {
    const sector = Math.floor(at / SECTOR);
    if (one[at] !== other[at] && !unknown.some((sectors) => sectors[sector] === 1)) return at;
  }
  return undefined;
}

/** What a request may have left at a byte. */
function valuesOf(op: GuestOp, offset: number): readonly number[] {
  return op.kind === 'write' ? [dataOf(op.id, offset, 1)[0] ?? 0] : [0];
}

/** A thread that uses the drive. */
export interface Guest {
  /** The request it is at. */
  op: GuestOp | undefined;
}

/** The root of the live disk as a guest's thread sees it: passes everything on and tells the oracle. */
export class GuestNode implements BlockNode {
  readonly descriptor: NodeDescriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly clusterSize: number | undefined;
  readonly backing: BlockNode | undefined;
  readonly #guest: Guest;
  readonly #inner: BlockNode;
  readonly #oracle: Oracle;
  readonly #arena: Arena;
  /** Where what changes nothing of what guests read goes. */
  readonly unrecorded: BlockNode;
  /** Where a discarded range is read back to. */
  readonly #scratch: number;

  constructor(inner: BlockNode, guest: Guest, oracle: Oracle, arena: Arena, scratch: number) {
    this.#inner = inner;
    this.#guest = guest;
    this.unrecorded = inner.unrecorded ?? inner;
    this.#oracle = oracle;
    this.#arena = arena;
    this.#scratch = scratch;
    this.descriptor = inner.descriptor;
    this.length = inner.length;
    this.readOnly = inner.readOnly;
    this.clusterSize = inner.clusterSize;
    this.backing = inner.backing;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#inner.read(offset, pointer, length);
  }

  write(offset: number, pointer: number, length: number): void {
    this.#mutate(() => {
      this.#inner.write(offset, pointer, length);
      return this.#arena.u8.subarray(pointer, pointer + length);
    });
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#inner.writeUnits(offset, pointer, length, unit, skip);
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#mutate(() => {
      this.#inner.writeZeroes(offset, length, mayUnmap);
      return new Uint8Array(length);
    });
  }

  discard(offset: number, length: number): void {
    this.#mutate(() => {
      this.#inner.discard(offset, length);
      // Old data or zeroes, as the driver likes: what it became is the truth from here on.
      this.#inner.read(offset, this.#scratch, length);
      return this.#arena.u8.subarray(this.#scratch, this.#scratch + length);
    });
  }

  flush(): void {
    this.#inner.flush();
  }

  status(offset: number, length: number): Extent {
    return this.#inner.status(offset, length);
  }

  #mutate(body: () => Uint8Array): void {
    const { op } = this.#guest;
    if (op === undefined) throw new Error('a change that no guest asked for');
    this.#oracle.announceMutation();
    this.#oracle.beginMutation(op, this.#arena);
    let bytes: Uint8Array | undefined;
    try {
      bytes = body();
    } finally {
      this.#oracle.endMutation(op, bytes);
    }
  }
}
