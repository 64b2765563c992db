import { DirtyBitmap } from '../../bitmap/dirty-bitmap.js';
import { StillframeError } from '../../errors.js';
import { advance, load, store, waitWhile } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import { type BlockNode, type NodeDescriptor, STATUS_ALLOCATED, STATUS_ZERO } from '../node.js';
import { chainStatus } from '../status.js';
import { CopyDesk } from './copy-desk.js';

/**
 * A frame: the drive as it stood at one instant, held by copy-before-write. Bulk copy and guest writes copy
 * through the same code; who copies a cluster is settled by an atomic claim of its state in the arena.
 *
 *     todo ──claim──▶ busy ──copied──▶ done
 *      ▲                │
 *      └───failed───────┴──not in the plan──▶ none
 *
 * Invariant (copy before write): while a cluster is `todo` or `busy`, no guest mutation of it has reached the
 * source since the instant. Whoever holds it `busy` may read the source and reads the instant.
 */

export const CLUSTER_NONE = 0;
export const CLUSTER_TODO = 1;
export const CLUSTER_BUSY = 2;
export const CLUSTER_DONE = 3;

/** What a guest write does when the old data cannot be saved. QMP `on-cbw-error`. */
export type OnCbwError = 'break-guest-write' | 'break-snapshot';

/** Plain data of a frame; any thread may attach to it. */
export interface FrameDescriptor {
  /** Never reused within an engine. */
  readonly id: number;
  readonly control: number;
  readonly states: number;
  readonly target: NodeDescriptor;
  /** Bytes. */
  readonly length: number;
  /** Granularity of copying in bytes, a power of two. */
  readonly clusterSize: number;
  readonly clusters: number;
  /** The target reads as zeroes wherever nothing was written. */
  readonly targetReadsZero: boolean;
  /** Pointer of a dirty bitmap that nobody changes: clusters without anything dirty are not part of the plan. */
  readonly plan?: number | undefined;
  /** Sync mode `top`: clusters without allocation in the top layer are not part of the plan. */
  readonly skipUnallocated: boolean;
  /** The target takes compressed clusters: see `checkCompression`. */
  readonly compress: boolean;
  /** Most bytes that the background copy moves in one step, in whole clusters; default 1 MiB (QMP `max-chunk`). */
  readonly maxChunk?: number | undefined;
  /** Zeroes count for the rate limit, so that a step of them is no longer than one of data. */
  readonly paceZeroes?: boolean | undefined;
  /** What was copied is discarded on the source (QMP `discard-source`). */
  readonly discardSource?: boolean | undefined;
  readonly onCbwError: OnCbwError;
  /** Its job goes on where old data was lost (QEMU's backup job): what it copies is not the instant then. */
  readonly outlivesLoss?: boolean | undefined;
  /** How long a guest may be kept for its old data, in milliseconds; 0 and undefined: as long as it takes. */
  readonly cbwTimeoutMs?: number | undefined;
  /** Pointer of a {@link CopyDesk}, where guests have a time-out: threads there copy for them. */
  readonly desk?: number | undefined;
  /** Word of the arena to advance when the frame breaks: its owner sleeps there. */
  readonly owner: number;
  /**
   * The frame that holds the instant this one copies (image fleecing), whose clusters are as large or parts of these.
   * Guests know only that one; what was copied it need not hold any more.
   */
  readonly holder?: FrameDescriptor | undefined;
}

// Control block, byte offsets: int32 words, then int64 counters.
const BROKEN = 0;
// Bits: old data was lost that the job still wanted; its job was cancelled.
const LOST = 1;
const GIVEN_UP = 2;
const REMAINING = 4;
const SEQUENCE = 8;
const WAITERS = 12;
const COUNTERS = 64;
/** Bytes of a frame's control block. */
export const FRAME_CONTROL_BYTES = 128;

const COUNTER_NAMES = ['copied', 'zero', 'skipped', 'cbw', 'bytesRead', 'bytesWritten', 'checksum'] as const;
type Counter = (typeof COUNTER_NAMES)[number];

/** Counters of a frame: clusters, except where the name says bytes. */
export type FrameCounters = Readonly<Record<Exclude<Counter, 'checksum'>, number>> & {
  /** Clusters that are still to be looked at or under way. */
  readonly remaining: number;
  /** Sum of the leaves of all clusters of the plan so far, modulo 2^64. */
  readonly checksum: bigint;
};

/** Largest buffer one step of copying uses, in bytes: the largest cluster size of any format. */
export const COPY_BUFFER_BYTES = 2 * 1024 * 1024;
/** Bytes copied in one step when clusters are not larger. */
const RUN_BYTES = 1024 * 1024;
/** How far a run of clusters without data is extended in one step, in bytes. */
const SPARSE_RUN_BYTES = 64 * 1024 * 1024 * 1024;
/** Smallest hole that is kept, in bytes: a page of the host's file system. */
const HOLE_BYTES = 4096;
/** Bit masks of units behind the buffer: enough for a buffer of 512-byte units. */
const MASK_BYTES = COPY_BUFFER_BYTES / 512 / 8;

type Kind = 'skip' | 'zero' | 'data';

/** Marks an error with the side it came from, for the job's error policy. */
export class CopyError extends Error {
  readonly operation: 'read' | 'write';
  override readonly cause: unknown;

  constructor(operation: 'read' | 'write', cause: unknown) {
    super(`copy failed on ${operation}`);
    this.operation = operation;
    this.cause = cause;
  }
}

/** What one step of the background copy did. */
export interface CopiedRun {
  /** Cluster after its last one. */
  readonly end: number;
  /** Bytes of data. */
  readonly bytes: number;
  /** Bytes of clusters without data that are part of the plan. */
  readonly zeroes: number;
}

/** Memory for one thread's copying: a buffer and a mask, from the arena for as long as the thread lives. */
export class CopyBuffer {
  readonly data: number;
  readonly mask: number;

  constructor(runtime: Runtime) {
    this.data = runtime.arena.alloc(COPY_BUFFER_BYTES + MASK_BYTES, 'copy buffer of a thread');
    this.mask = this.data + COPY_BUFFER_BYTES;
  }
}

/** Reads a frame's counters; the only part of a frame the host thread touches. */
export function readFrameCounters(
  arena: Runtime['arena'],
  { control, clusterSize, holder }: Pick<FrameDescriptor, 'control' | 'clusterSize' | 'holder'>,
): FrameCounters {
  const unit = holder?.clusterSize ?? clusterSize;
  const at = (name: Counter, of = control): bigint =>
    Atomics.load(arena.u64, (of + COUNTERS) / 8 + COUNTER_NAMES.indexOf(name));
  return {
    copied: Number(at('copied')),
    zero: Number(at('zero')),
    skipped: Number(at('skipped')),
    // In clusters of this frame, a part of one counting whole.
    cbw: Math.ceil((Number(at('cbw', holder?.control)) * unit) / clusterSize),
    bytesRead: Number(at('bytesRead')),
    bytesWritten: Number(at('bytesWritten')),
    checksum: at('checksum'),
    remaining: load(arena, control + REMAINING),
  };
}

/** Bytes of a frame's cluster states, with the bits behind them that say where guests have changed something. */
export function frameStateBytes(clusters: number): number {
  return stateBytes(clusters) + Math.ceil(clusters / 64) * 8;
}

function stateBytes(clusters: number): number {
  return Math.ceil(clusters / 32) * 8;
}

/** What a frame holds, in bytes of whole clusters. */
export interface HeldCounts {
  /** What can be read of the instant. */
  readonly access: number;
  /** What is still to be copied, or to be saved before it changes. */
  readonly copy: number;
  /** Where guests have changed something since the instant. */
  readonly done: number;
}

export function heldCounts(
  arena: Runtime['arena'],
  kernels: Runtime['kernels'],
  frame: FrameDescriptor,
): HeldCounts {
  const { clusters, clusterSize, states } = frame.holder ?? frame;
  const changed = kernels.bitmapCount(states + stateBytes(clusters), 0, clusters);
  const { skipped, remaining } = readFrameCounters(arena, frame);
  return {
    access: (clusters - skipped) * clusterSize,
    copy: remaining * clusterSize,
    done: changed * clusterSize,
  };
}

/** The frame that guests know, where another one copies what it holds. */
export function guestsFrame(frame: FrameDescriptor): FrameDescriptor {
  return frame.holder ?? frame;
}

/** Gives a frame's memory back; nobody may look at its counters afterwards. */
export function freeFrame(
  runtime: Pick<Runtime, 'arena'>,
  frame: Pick<FrameDescriptor, 'control' | 'states' | 'desk' | 'holder'>,
): void {
  if (frame.desk !== undefined) runtime.arena.free(frame.desk);
  runtime.arena.free(frame.states);
  runtime.arena.free(frame.control);
  if (frame.holder !== undefined) freeFrame(runtime, frame.holder);
}

/** Where a frame's old data is read from: what a disk lies on, which stays the same for as long as a body runs. */
export interface FrameSource {
  use<T>(body: (node: BlockNode) => T): T;
}

/** No thread copies for guests any more when this returns; once the frame is not the disk's any more, or before they start. */
export function endCopies(runtime: Pick<Runtime, 'arena'>, { desk }: Pick<FrameDescriptor, 'desk'>): void {
  if (desk !== undefined) new CopyDesk(runtime.arena, desk).end();
}

/** One thread's view of a frame. */
export class Frame {
  readonly descriptor: FrameDescriptor;
  readonly target: BlockNode;
  readonly #runtime: Runtime;
  readonly #source: FrameSource;
  readonly #buffer: CopyBuffer;
  readonly #holder: Frame | undefined;
  readonly #runClusters: number;
  readonly #guestRunClusters: number;
  readonly #plan: DirtyBitmap | undefined;
  readonly #desk: CopyDesk | undefined;

  /** @param holder the frame that `source` reads the instant from, where that is not the disk itself */
  constructor(
    runtime: Runtime,
    descriptor: FrameDescriptor,
    source: FrameSource,
    target: BlockNode,
    buffer: CopyBuffer,
    holder?: Frame,
  ) {
    if (descriptor.clusterSize > COPY_BUFFER_BYTES) {
      throw new RangeError(
        `cluster size ${descriptor.clusterSize} is larger than ${COPY_BUFFER_BYTES} bytes`,
      );
    }
    this.descriptor = descriptor;
    this.target = target;
    this.#runtime = runtime;
    this.#source = source;
    this.#buffer = buffer;
    this.#holder = holder;
    this.#plan = descriptor.plan === undefined ? undefined : new DirtyBitmap(runtime, descriptor.plan);
    const { clusterSize, maxChunk = RUN_BYTES } = descriptor;
    this.#guestRunClusters = Math.max(1, RUN_BYTES / clusterSize);
    this.#runClusters = Math.min(this.#guestRunClusters, Math.ceil(maxChunk / clusterSize));
    this.#desk = descriptor.desk === undefined ? undefined : new CopyDesk(runtime.arena, descriptor.desk);
  }

  /** Puts every cluster in the plan. Called once, before the frame is part of a disk. */
  static arm(runtime: Runtime, descriptor: FrameDescriptor): void {
    const { states, clusters } = descriptor;
    runtime.kernels.clustersFill(states, 0, clusters, CLUSTER_TODO);
    runtime.kernels.bitmapClear(states + stateBytes(clusters), 0, clusters);
    store(runtime.arena, descriptor.control + REMAINING, descriptor.clusters);
  }

  /** The old data of some cluster was lost to a guest write that was let through: nothing may rely on it. */
  get broken(): boolean {
    const own = load(this.#runtime.arena, this.descriptor.control + BROKEN) !== 0;
    return own || this.#holder?.broken === true;
  }

  /** It is so, and its job minds. */
  get unusable(): boolean {
    return this.descriptor.outlivesLoss === true ? this.#holder?.broken === true : this.broken;
  }

  /** It is broken, and not because its job was cancelled. */
  get lost(): boolean {
    const own = (load(this.#runtime.arena, this.descriptor.control + BROKEN) & LOST) !== 0;
    return own || this.#holder?.lost === true;
  }

  get remaining(): number {
    return load(this.#runtime.arena, this.descriptor.control + REMAINING);
  }

  get counters(): FrameCounters {
    return readFrameCounters(this.#runtime.arena, this.descriptor);
  }

  /**
   * Saves the old data of every cluster the range touches. Returns when the guest may write there.
   *
   * With a time for it (QEMU: `cbw-timeout`) other threads copy, where there are some: what they have not done by then
   * goes on without the guest. Otherwise the time is looked at between steps of at most 1 MiB.
   *
   * Where the job is cancelled meanwhile the guest goes on as well: nothing will rely on the frame.
   *
   * @throws StillframeError the copy's error under `break-guest-write`, ERR_STILLFRAME_CBW_TIMEOUT where it is late: the
   *   guest's write must fail then
   */
  beforeWrite(offset: number, length: number): void {
    if (length === 0 || this.broken) return;
    const { clusterSize, clusters, states } = this.descriptor;
    const { kernels } = this.#runtime;
    let deadline: number | undefined;
    const end = Math.ceil((offset + length) / clusterSize);
    const first = Math.floor(offset / clusterSize);
    let cluster = first;
    for (;;) {
      cluster = kernels.clustersNextPending(states, cluster, end);
      if (cluster < 0) break;
      deadline ??= this.#deadline();
      try {
        if (deadline < Number.POSITIVE_INFINITY && performance.now() >= deadline) throw this.#late(cluster);
        const stop = Math.min(end, cluster + this.#guestRunClusters);
        if (this.#desk?.attended === true) this.#haveCopied(this.#desk, cluster, stop, deadline);
        else this.#copyOrWait(cluster, stop, deadline);
      } catch (error) {
        const cause = error instanceof CopyError ? error.cause : error;
        const cancelled = isCancelled(cause);
        if (this.descriptor.onCbwError === 'break-snapshot' || cancelled) {
          const word = (this.descriptor.control + BROKEN) >> 2;
          Atomics.or(this.#runtime.arena.i32, word, cancelled ? GIVEN_UP : LOST);
          advance(this.#runtime.arena, this.descriptor.owner);
          this.#wake();
          return;
        }
        throw cause;
      }
    }
    kernels.bitmapSet(states + stateBytes(clusters), first, end - first);
  }

  /** Until when a guest's write may wait that begins to, by `performance.now()`. */
  #deadline(): number {
    const { cbwTimeoutMs = 0 } = this.descriptor;
    if (cbwTimeoutMs === 0) return Number.POSITIVE_INFINITY;
    // Its time is for copying: that threads have to start first is not the target's doing.
    this.#desk?.waitForThreads();
    return performance.now() + cbwTimeoutMs;
  }

  /** Copies what it can claim from `cluster` on, or waits until that one is copied. */
  #copyOrWait(cluster: number, stop: number, deadline: number): void {
    const { kernels } = this.#runtime;
    const count = kernels.clustersClaimAt(this.descriptor.states, cluster, stop);
    if (count > 0) this.#copyClaim(cluster, count, 'guest');
    else this.#waitWhileBusy(cluster, deadline);
  }

  /** The same, but another thread copies. @throws StillframeError ERR_STILLFRAME_CBW_TIMEOUT, and the copy goes on */
  #haveCopied(desk: CopyDesk, cluster: number, stop: number, deadline: number): void {
    const { kernels } = this.#runtime;
    const { states } = this.descriptor;
    if (kernels.clusterState(states, cluster) === CLUSTER_BUSY) {
      this.#waitWhileBusy(cluster, deadline);
      return;
    }
    const place = desk.take();
    if (place === undefined) {
      desk.waitForPlace(deadline, () => kernels.clusterState(states, cluster) !== CLUSTER_TODO);
      return;
    }
    const count = kernels.clustersClaimAt(states, cluster, stop);
    if (count === 0) desk.giveBack(place);
    else if (!desk.copy(place, cluster, count, deadline)) throw this.#late(cluster);
  }

  /** Copies clusters that a guest has claimed and left at the desk. @throws what went wrong, with the claim given back */
  copyForGuest(first: number, count: number): void {
    try {
      this.#source.use(() => this.#copyClaim(first, count, 'guest'));
    } catch (error) {
      throw error instanceof CopyError ? error.cause : error;
    }
  }

  /**
   * Copies the next run of the plan at or after `from`.
   *
   * @param stepwise a run without data is no longer than one with
   * @returns where the run ended and how many bytes of data and of zeroes it had, or undefined when nothing is left to
   *   claim
   * @throws CopyError with the claim given back
   */
  copyNext(from: number, stepwise = false): CopiedRun | undefined {
    const { states, clusters } = this.descriptor;
    const { kernels } = this.#runtime;
    return this.#source.use(() => {
      const first = kernels.clustersClaimNext(states, from, clusters, this.#runClusters);
      if (first < 0) return undefined;
      return this.#copyClaim(first, kernels.claimedCount, stepwise ? 'step' : 'run');
    });
  }

  /**
   * Takes clusters that the sync mode does not copy out of the plan, from `from` on, a bounded number of
   * them at once, so that progress totals are right early and a long scan can be interrupted.
   *
   * @returns where to go on, or undefined when the end was reached
   */
  scanNext(from: number): number | undefined {
    return this.#source.use(() => this.#scan(from));
  }

  #scan(from: number): number | undefined {
    const { states, clusters } = this.descriptor;
    const { kernels } = this.#runtime;
    const first = kernels.clustersClaimNext(states, from, clusters, SCAN_CLUSTERS);
    if (first < 0) return undefined;
    const end = first + kernels.claimedCount;
    let cluster = first;
    try {
      while (cluster < end) {
        const { kind, count } = this.#classify(cluster, end);
        if (kind === 'skip') this.#finish(cluster, count, CLUSTER_NONE);
        else this.#release(cluster, count);
        cluster += count;
      }
    } catch (error) {
      this.#release(cluster, end - cluster);
      throw error;
    }
    return end;
  }

  /**
   * Makes dirty what was not copied of the plan. Only once nobody copies.
   *
   * @param copiedToo what was copied as well: it is lost
   */
  markUncopied(bitmap: DirtyBitmap, copiedToo: boolean): void {
    const { states, clusters, clusterSize, length } = this.descriptor;
    const { kernels } = this.#runtime;
    const mark = (next: (from: number) => number, state: (cluster: number) => boolean): void => {
      for (let cluster = next(0); cluster >= 0; cluster = next(cluster)) {
        const first = cluster;
        while (cluster < clusters && state(cluster)) cluster++;
        const start = first * clusterSize;
        bitmap.set(start, Math.min(cluster * clusterSize, length) - start);
      }
    };
    const stateOf = (cluster: number): number => kernels.clusterState(states, cluster);
    mark(
      (from) => kernels.clustersNextPending(states, from, clusters),
      (cluster) => stateOf(cluster) === CLUSTER_TODO || stateOf(cluster) === CLUSTER_BUSY,
    );
    if (!copiedToo) return;
    mark(
      (from) => kernels.clustersNext(states, from, clusters, CLUSTER_DONE),
      (cluster) => stateOf(cluster) === CLUSTER_DONE,
    );
  }

  /**
   * Nobody needs the old data of a range any more: guests need not save it, and what they saved is dropped.
   *
   * @param start of a cluster, in bytes
   * @param end of a cluster, or of the drive
   */
  forget(start: number, end: number): void {
    const { states, clusterSize } = this.descriptor;
    const { kernels } = this.#runtime;
    const last = Math.ceil(end / clusterSize);
    for (let cluster = start / clusterSize; cluster < last; ) {
      const claimed = kernels.clustersClaimAt(states, cluster, last);
      if (claimed > 0) {
        this.#finish(cluster, claimed, CLUSTER_NONE);
        cluster += claimed;
        continue;
      }
      const pending = kernels.clustersNextPending(states, cluster, last);
      if (pending === cluster) {
        this.#waitWhileBusy(cluster);
        continue;
      }
      const stop = pending < 0 ? last : pending;
      const saved = kernels.clustersNext(states, cluster, stop, CLUSTER_DONE);
      if (saved >= 0) this.#drop(saved, stop);
      cluster = stop;
    }
  }

  /** Gives the space of what was saved back. */
  #drop(first: number, end: number): void {
    const { clusterSize, length } = this.descriptor;
    const start = first * clusterSize;
    try {
      this.target.discard(start, Math.min(end * clusterSize, length) - start);
    } catch (error) {
      // It only takes space for longer.
      if (!(error instanceof StillframeError)) throw error;
    }
  }

  /** Blocks until nothing is left to copy, some cluster came back for copying, or `timeoutMs` is over. */
  waitForOthers(timeoutMs: number): void {
    const { arena } = this.#runtime;
    const { control } = this.descriptor;
    Atomics.add(arena.i32, (control + WAITERS) >> 2, 1);
    const sequence = load(arena, control + SEQUENCE);
    if (this.remaining > 0) waitWhile(arena, control + SEQUENCE, sequence, timeoutMs);
    Atomics.sub(arena.i32, (control + WAITERS) >> 2, 1);
  }

  #late(cluster: number): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_CBW_TIMEOUT',
      `the old data at ${cluster * this.descriptor.clusterSize} was not saved within ${this.descriptor.cbwTimeoutMs} ms; back up to something faster, or with fleecing`,
    );
  }

  /** @param deadline after which it returns all the same, by `performance.now()` */
  #waitWhileBusy(cluster: number, deadline = Number.POSITIVE_INFINITY): void {
    const { arena, kernels } = this.#runtime;
    const { control, states } = this.descriptor;
    // Announced before the state is read, so that whoever ends the claim later sees a waiter.
    Atomics.add(arena.i32, (control + WAITERS) >> 2, 1);
    for (;;) {
      const sequence = load(arena, control + SEQUENCE);
      if (kernels.clusterState(states, cluster) !== CLUSTER_BUSY) break;
      if (deadline === Number.POSITIVE_INFINITY) {
        waitWhile(arena, control + SEQUENCE, sequence);
        continue;
      }
      const left = deadline - performance.now();
      if (left <= 0) break;
      waitWhile(arena, control + SEQUENCE, sequence, left);
    }
    Atomics.sub(arena.i32, (control + WAITERS) >> 2, 1);
  }

  #wake(): void {
    const { arena } = this.#runtime;
    const { control } = this.descriptor;
    if (load(arena, control + WAITERS) > 0) advance(arena, control + SEQUENCE);
  }

  #count(counter: Counter, amount: number | bigint): void {
    const index = (this.descriptor.control + COUNTERS) / 8 + COUNTER_NAMES.indexOf(counter);
    Atomics.add(this.#runtime.arena.u64, index, BigInt(amount));
  }

  #finish(cluster: number, count: number, state: typeof CLUSTER_DONE | typeof CLUSTER_NONE): void {
    this.#runtime.kernels.clustersTransition(this.descriptor.states, cluster, count, CLUSTER_BUSY, state);
    if (state === CLUSTER_NONE) this.#count('skipped', count);
    Atomics.sub(this.#runtime.arena.i32, (this.descriptor.control + REMAINING) >> 2, count);
    this.#wake();
    const start = cluster * this.descriptor.clusterSize;
    this.#holder?.forget(
      start,
      Math.min(start + count * this.descriptor.clusterSize, this.descriptor.length),
    );
  }

  #release(cluster: number, count: number): void {
    const { states } = this.descriptor;
    this.#runtime.kernels.clustersTransition(states, cluster, count, CLUSTER_BUSY, CLUSTER_TODO);
    this.#wake();
  }

  /** Copies clusters this thread holds `busy`; those it could not copy are `todo` again. */
  #copyClaim(first: number, count: number, how: 'guest' | 'run' | 'step'): CopiedRun {
    const { states, clusterSize, clusters, length } = this.descriptor;
    const { kernels } = this.#runtime;
    const sparseRun = Math.ceil(SPARSE_RUN_BYTES / clusterSize);
    let cluster = first;
    let end = first + count;
    let bytes = 0;
    let zeroes = 0;
    try {
      while (cluster < end) {
        const run = this.#classify(cluster, end);
        if (run.kind === 'data') bytes += this.#copyData(cluster, run.count, how === 'guest');
        else this.#passOver(cluster, run.count, run.kind);
        if (run.kind === 'zero') zeroes += run.count * clusterSize;
        cluster += run.count;
        if (how === 'step' && cluster < end && run.kind !== 'skip') {
          // The rest waits for its turn.
          this.#release(cluster, end - cluster);
          end = cluster;
          break;
        }
        if (run.kind === 'data' || cluster < end || how !== 'run') continue;
        // A hole usually goes on: follow it in growing steps. What the status says of a cluster before it is
        // claimed still holds once the claim succeeds, since `todo` means unchanged since the instant.
        for (let step = this.#runClusters; end < clusters; step = Math.min(step * 16, sparseRun)) {
          const beyond = this.#kindBeyond(end * clusterSize, Math.min((end + step) * clusterSize, length));
          const whole = this.#wholeClusters(end * clusterSize, beyond?.length ?? 0);
          const claimed = beyond?.kind === run.kind ? kernels.clustersClaimAt(states, end, end + whole) : 0;
          end += claimed;
          if (claimed > 0) this.#passOver(cluster, claimed, run.kind);
          if (run.kind === 'zero') zeroes += claimed * clusterSize;
          cluster = end;
          if (claimed < step) break;
        }
      }
    } catch (error) {
      this.#release(cluster, end - cluster);
      throw error;
    }
    return { end, bytes, zeroes };
  }

  #passOver(cluster: number, count: number, kind: 'skip' | 'zero'): void {
    const { clusterSize, length, targetReadsZero } = this.descriptor;
    if (kind === 'skip') {
      this.#finish(cluster, count, CLUSTER_NONE);
      return;
    }
    const start = cluster * clusterSize;
    const bytes = Math.min(count * clusterSize, length - start);
    if (!targetReadsZero) this.#onTarget(() => this.target.writeZeroes(start, bytes, true));
    const last = start + bytes === length ? length - (cluster + count - 1) * clusterSize : clusterSize;
    this.#discardSource(start, bytes);
    this.#count('checksum', this.#runtime.kernels.zeroLeaves(clusterSize, last, cluster, count));
    this.#count('zero', count);
    this.#finish(cluster, count, CLUSTER_DONE);
  }

  #copyData(cluster: number, count: number, guest: boolean): number {
    const { clusterSize, length, targetReadsZero } = this.descriptor;
    const { kernels } = this.#runtime;
    const { data, mask } = this.#buffer;
    const start = cluster * clusterSize;
    const bytes = Math.min(count * clusterSize, length - start);
    try {
      this.#source.use((node) => node.read(start, data, bytes));
    } catch (error) {
      throw new CopyError('read', error);
    }
    const leaves = kernels.digestUnits(data, bytes, clusterSize, cluster, mask);
    const zero = kernels.zeroUnits;
    let written = 0;
    this.#onTarget(() => {
      if (zero > 0 && !targetReadsZero) this.#zeroUnits(start, bytes, count);
      if (zero < count) written = this.#writeData(start, bytes);
    });
    this.#discardSource(start, bytes);
    this.#count('checksum', leaves);
    this.#count('bytesRead', bytes);
    this.#count('bytesWritten', written);
    this.#count('copied', count - zero);
    if (zero > 0) this.#count('zero', zero);
    if (guest) this.#count('cbw', count);
    this.#finish(cluster, count, CLUSTER_DONE);
    return bytes;
  }

  /**
   * Writes what the buffer has of data; the mask says which clusters have. A target that reads as zeroes keeps its
   * holes even inside of clusters.
   *
   * @returns the bytes written
   */
  #writeData(start: number, bytes: number): number {
    const { clusterSize, targetReadsZero } = this.descriptor;
    const { kernels } = this.#runtime;
    const { data, mask } = this.#buffer;
    const unit = targetReadsZero ? Math.max(HOLE_BYTES, this.target.clusterSize ?? 0) : clusterSize;
    if (unit < clusterSize) kernels.zeroMask(data, bytes, unit, mask);
    const units = Math.ceil(bytes / unit);
    if (this.descriptor.compress) this.#writeCompressed(start, bytes, unit);
    else this.target.writeUnits(start, data, bytes, unit, mask);
    const skipped = kernels.bitmapCount(mask, 0, units) * unit;
    // The last unit may be short.
    return bytes - skipped + (kernels.bitmapTest(mask, units - 1) ? units * unit - bytes : 0);
  }

  /** Writes the units that the mask does not call zero, compressed. */
  #writeCompressed(start: number, bytes: number, unit: number): void {
    const { target } = this;
    const { kernels } = this.#runtime;
    const { data, mask } = this.#buffer;
    if (target.writeCompressed === undefined) throw new TypeError('the target cannot be compressed');
    const units = Math.ceil(bytes / unit);
    for (let first = kernels.bitmapNextClear(mask, 0, units); first >= 0; ) {
      const next = kernels.bitmapNextSet(mask, first, units);
      const end = next < 0 ? units : next;
      const from = first * unit;
      target.writeCompressed(start + from, data + from, Math.min(end * unit, bytes) - from);
      first = end < units ? kernels.bitmapNextClear(mask, end, units) : -1;
    }
  }

  /** Zeroes the target under the units that the mask calls zero. */
  #zeroUnits(start: number, bytes: number, count: number): void {
    const { clusterSize } = this.descriptor;
    const { kernels } = this.#runtime;
    const { mask } = this.#buffer;
    for (let unit = kernels.bitmapNextSet(mask, 0, count); unit >= 0; ) {
      const next = kernels.bitmapNextClear(mask, unit, count);
      const end = next < 0 ? count : next;
      const from = unit * clusterSize;
      this.target.writeZeroes(start + from, Math.min(end * clusterSize, bytes) - from, true);
      unit = end < count ? kernels.bitmapNextSet(mask, end, count) : -1;
    }
  }

  /** While the clusters are still held: no guest has anything of its own there. */
  #discardSource(start: number, bytes: number): void {
    if (this.descriptor.discardSource !== true) return;
    try {
      this.#source.use((node) => node.discard(start, bytes));
    } catch (error) {
      // It only takes space for longer.
      if (!(error instanceof StillframeError)) throw error;
    }
  }

  #onTarget(body: () => void): void {
    try {
      body();
    } catch (error) {
      throw new CopyError('write', error);
    }
  }

  /**
   * What to do with the run of clusters that starts at `cluster`: the longest one of a kind, at most to
   * `end` (and for data at most what fits the buffer). A cluster with any allocated byte is allocated, one with
   * any byte of data is data (QEMU's rule for block status finer than a cluster).
   */
  #classify(cluster: number, stop: number): { readonly kind: Kind; readonly count: number } {
    const { clusterSize, length } = this.descriptor;
    let end = stop;
    if (this.#plan !== undefined) {
      const dirty = this.#plan.nextDirty(cluster * clusterSize, Math.min(end * clusterSize, length));
      const first = dirty === undefined ? end : Math.floor(dirty.offset / clusterSize);
      if (first > cluster) return { kind: 'skip', count: first - cluster };
      if (dirty !== undefined) end = Math.ceil((dirty.offset + dirty.length) / clusterSize);
    }
    let kind: Kind | undefined;
    let count = 0;
    while (cluster + count < end) {
      const start = (cluster + count) * clusterSize;
      const stop = Math.min(end * clusterSize, length);
      const extent = this.#kindAt(start, stop);
      // Only what covers whole clusters can be passed over.
      const whole = this.#wholeClusters(start, extent.length);
      const nextKind: Kind = whole === 0 ? 'data' : extent.kind;
      const clusters = nextKind === 'data' ? Math.ceil(extent.length / clusterSize) : whole;
      if (kind !== undefined && nextKind !== kind) break;
      kind = nextKind;
      count += clusters;
      if (kind === 'data' && count >= this.#runClusters) {
        count = this.#runClusters;
        break;
      }
    }
    return { kind: kind ?? 'data', count: Math.min(count, end - cluster) };
  }

  /** How many clusters `bytes` from the cluster boundary `start` cover; the tail of the image counts whole. */
  #wholeClusters(start: number, bytes: number): number {
    const { clusterSize, length } = this.descriptor;
    return start + bytes === length ? Math.ceil(bytes / clusterSize) : Math.floor(bytes / clusterSize);
  }

  /** The run of bytes of one kind that starts at `start`, merged over extents up to `stop`. */
  #kindAt(start: number, stop: number): { readonly kind: Kind; readonly length: number } {
    let kind: Kind | undefined;
    let position = start;
    while (position < stop) {
      const extent = this.#extentAt(position, stop - position);
      if (kind !== undefined && extent.kind !== kind) break;
      kind = extent.kind;
      position += extent.length;
      if (kind === 'data') break;
    }
    return { kind: kind ?? 'data', length: position - start };
  }

  /** The same of clusters that are not claimed: of some nothing can be said any more, since another thread was there. */
  #kindBeyond(start: number, stop: number): { readonly kind: Kind; readonly length: number } | undefined {
    try {
      return this.#kindAt(start, stop);
    } catch (error) {
      if (error instanceof CopyError) return undefined;
      throw error;
    }
  }

  #extentAt(offset: number, length: number): { readonly kind: Kind; readonly length: number } {
    try {
      if (this.descriptor.skipUnallocated) {
        const own = this.#source.use((node) => node.status(offset, length));
        if ((own.flags & STATUS_ALLOCATED) === 0) return { kind: 'skip', length: own.length };
        return { kind: own.flags & STATUS_ZERO ? 'zero' : 'data', length: own.length };
      }
      const extent = this.#source.use((node) => chainStatus(node, offset, length));
      return { kind: extent.flags & STATUS_ZERO ? 'zero' : 'data', length: extent.length };
    } catch (error) {
      throw new CopyError('read', error);
    }
  }
}

/** The job was cancelled, and its copy with it: nobody wants the old data any more. */
function isCancelled(error: unknown): boolean {
  return error instanceof StillframeError && error.code === 'ERR_STILLFRAME_JOB_CANCELLED';
}

/** Clusters looked at in one step of a scan: a guest write that meets the scan waits for at most one step. */
const SCAN_CLUSTERS = 8192;

/** The error of everything that would have to rely on a broken frame. */
export function brokenFrameError(what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_BROKEN_FRAME',
    `${what}: old data could not be saved before a guest write that was let through, so it is not the drive at ` +
      "its instant; mend the target and take a new backup (on-cbw-error 'break-guest-write' fails the guest's write instead)",
  );
}
