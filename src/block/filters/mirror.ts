import type { DirtyBitmap } from '../../bitmap/dirty-bitmap.js';
import { StillframeError } from '../../errors.js';
import { withLock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { Disk, DiskDescriptor } from '../disk.js';
import { STATUS_ZERO } from '../node.js';
import { TRACKER_BYTES, TrackedRequests } from '../tracked-requests.js';
import { COPY_BUFFER_BYTES, type CopyBuffer, CopyError } from './copy-before-write.js';

/**
 * A mirror: a target that becomes a copy of a live disk, and stays one while guests write. A dirty bitmap of the disk
 * says where the two differ. Whoever copies a range takes it off the bitmap first and reads it then; a guest's write makes
 * it dirty once it is made. So nothing that is written is missed:
 *
 *     dirty ──taken off──▶ copied ──▶ the same
 *       ▲                    │           │
 *       └──────failed────────┴──written──┘
 *
 * Two threads never copy the same range at once, so that older data never comes after newer data.
 */
export interface MirrorDescriptor {
  /** Never reused within an engine. */
  readonly id: number;
  /** Arena pointer to the shared state. */
  readonly control: number;
  /** Arena pointer of the dirty bitmap. */
  readonly bitmap: number;
  /** Nobody else changes it. */
  readonly target: DiskDescriptor;
  /** Bytes. */
  readonly length: number;
  /** Granularity of copying in bytes, a power of two: that of the bitmap, but at least a cluster of the target. */
  readonly unit: number;
  /** Zeroes may become holes of the target. */
  readonly unmap: boolean;
}

// The shared state: who copies what, then
const LOCK = TRACKER_BYTES;
/** Its dirty bitmap is gone. */
const ENDED = TRACKER_BYTES + 4;
/** Where to look for something dirty next, in bytes. */
const CURSOR = TRACKER_BYTES + 8;
/** Bytes that were dirty and have been copied. */
const DONE = TRACKER_BYTES + 16;
/** Bytes that are dirty or under way, when somebody last counted, less what was copied since. */
const REMAINING = TRACKER_BYTES + 24;
/** Bytes of the shared state. */
export const MIRROR_CONTROL_BYTES = TRACKER_BYTES + 32;

/** Bytes of data copied in one step where units are not larger. */
const RUN_BYTES = 1024 * 1024;
/** How far a hole is followed in one step, in bytes. */
const SPARSE_RUN_BYTES = 16 * 1024 * 1024 * 1024;
/** Smallest run of zeroes in data that is written as zeroes, in bytes. */
const ZERO_BYTES = 65536;

/** Who copies, and may be told to stop; it is told of an error before anybody else can try again. */
export interface MirrorWorker {
  readonly interrupted: boolean;
  failed(error: CopyError): void;
}

/** How far a mirror is, in bytes; all that the host thread looks at. */
export function mirrorProgress(
  arena: Runtime['arena'],
  control: number,
): { readonly done: number; readonly remaining: number } {
  const at = (offset: number): number => Number(Atomics.load(arena.u64, (control + offset) / 8));
  return { done: at(DONE), remaining: at(REMAINING) };
}

/** Whether this call is the one that ends it: the dirty bitmap is the caller's to remove. */
export function endsMirror(arena: Runtime['arena'], { control }: MirrorDescriptor): boolean {
  return Atomics.exchange(arena.i32, (control + ENDED) >> 2, 1) === 0;
}

/** One thread's view of a mirror. */
export class Mirror {
  readonly descriptor: MirrorDescriptor;
  readonly #runtime: Runtime;
  readonly #source: Disk;
  readonly #target: Disk;
  readonly #bitmap: DirtyBitmap;
  readonly #requests: TrackedRequests;
  readonly #buffer: CopyBuffer;

  constructor(
    runtime: Runtime,
    descriptor: MirrorDescriptor,
    source: Disk,
    target: Disk,
    bitmap: DirtyBitmap,
    buffer: CopyBuffer,
  ) {
    this.descriptor = descriptor;
    this.#runtime = runtime;
    this.#source = source;
    this.#target = target;
    this.#bitmap = bitmap;
    this.#requests = new TrackedRequests(runtime, descriptor.control);
    this.#buffer = buffer;
  }

  /** Whether anything differs, but for what is under way. */
  get dirty(): boolean {
    return this.#bitmap.nextDirty(0) !== undefined;
  }

  get done(): number {
    return mirrorProgress(this.#runtime.arena, this.descriptor.control).done;
  }

  /** Counts what is left, while no job's thread copies. @returns bytes */
  count(): number {
    const bytes = this.#bitmap.dirtyBytes;
    const { arena } = this.#runtime;
    Atomics.store(arena.u64, (this.descriptor.control + REMAINING) / 8, BigInt(bytes));
    return bytes;
  }

  /** From now on the range differs. */
  mark(offset: number, length: number): void {
    this.#bitmap.set(offset, length);
  }

  /**
   * Copies the next part that differs; what cannot be copied is dirty again.
   *
   * @returns bytes of data that moved, or undefined where nothing is dirty
   */
  copyNext(worker: MirrorWorker): number | undefined {
    const { length, control } = this.descriptor;
    const start = withLock(this.#runtime.arena, control + LOCK, () => this.#takeCursor());
    if (start === undefined) return undefined;
    let end = this.#endOf(start, RUN_BYTES);
    const moved = this.#copy(start, end, worker);
    // A hole usually goes on: follow it in growing steps.
    for (
      let step = RUN_BYTES * 16;
      moved === 0 && end < length && this.#bitmap.test(end) && !worker.interrupted;
      step = Math.min(step * 16, SPARSE_RUN_BYTES)
    ) {
      const zeroes = this.#zeroesAt(end, Math.min(step, length - end));
      if (zeroes === 0) break;
      this.#copy(end, end + zeroes, worker);
      end += zeroes;
      if (zeroes < step) break;
    }
    this.#moveCursor(start, end);
    return moved;
  }

  /** Makes the target the same, and durable. Only while nobody changes the disk. @throws CopyError */
  finish(): void {
    const worker = {
      interrupted: false,
      failed: (error: CopyError): never => {
        throw error;
      },
    };
    while (this.copyNext(worker) !== undefined);
    this.count();
    this.flush();
  }

  /** Copies what differs of a range, as the only one. @returns bytes of data that moved */
  #copy(start: number, end: number, worker: MirrorWorker): number {
    const [from, to] = [this.#startOf(start), this.#endOf(start, end - start)];
    // Whoever changes what the disk lies on waits for guests, and a guest may wait for this range: it ends first.
    return this.#source.use(() => this.#requests.run(from, to, () => this.#copyDirty(from, to, worker)));
  }

  #copyDirty(from: number, to: number, worker: MirrorWorker): number {
    let moved = 0;
    try {
      for (let position = from; !worker.interrupted; ) {
        const area = this.#bitmap.nextDirty(position, to);
        if (area === undefined) break;
        const piece = this.#copyPiece(this.#startOf(area.offset), this.#endOf(area.offset, area.length));
        moved += piece.moved;
        position = piece.end;
      }
    } catch (error) {
      if (!(error instanceof CopyError)) throw error;
      worker.failed(error);
    }
    return moved;
  }

  /**
   * Copies what a guest has written just now, before the guest is answered. Where it cannot be copied it is dirty, and
   * the job's own threads will see.
   */
  afterWrite(offset: number, length: number): void {
    this.#copy(offset, offset + length, { interrupted: false, failed: () => undefined });
  }

  /** Makes a part of the target zero, whatever it was. @throws CopyError */
  zeroTarget(offset: number, length: number): void {
    this.#onTarget(offset, length, (node) => node.writeZeroes(offset, length, this.descriptor.unmap));
  }

  /** Makes what was copied durable. @throws CopyError */
  flush(): void {
    try {
      this.#target.flush();
    } catch (error) {
      throw new CopyError('write', error);
    }
  }

  /** Where the next part that is dirty starts, from the cursor on and around; the cursor moves behind what is copied. */
  #takeCursor(): number | undefined {
    const { control } = this.descriptor;
    const { f64 } = this.#runtime.arena;
    const cursor = f64[(control + CURSOR) / 8] ?? 0;
    const area = this.#bitmap.nextDirty(cursor, Infinity, 1) ?? this.#bitmap.nextDirty(0, cursor, 1);
    if (area === undefined) return undefined;
    const start = this.#startOf(area.offset);
    f64[(control + CURSOR) / 8] = this.#endOf(start, RUN_BYTES);
    return start;
  }

  /** What follows was copied as well. */
  #moveCursor(start: number, end: number): void {
    const { control } = this.descriptor;
    const { arena } = this.#runtime;
    withLock(arena, control + LOCK, () => {
      const index = (control + CURSOR) / 8;
      if (arena.f64[index] === this.#endOf(start, RUN_BYTES)) arena.f64[index] = end;
    });
  }

  /** Copies some bytes from the unit boundary `start` on. @throws CopyError; they are dirty again */
  #copyPiece(start: number, stop: number): { readonly end: number; readonly moved: number } {
    const zeroes = this.#zeroesAt(start, stop - start);
    const end = zeroes > 0 ? start + zeroes : this.#endOf(start, Math.min(RUN_BYTES, stop - start));
    // Taken off before anything is read: what is written from now on is dirty again.
    const taken = this.#bitmap.take(start, end - start);
    try {
      const isZero = zeroes > 0 && this.#zeroesAt(start, zeroes) === zeroes;
      const moved = isZero ? 0 : this.#copyData(start, end);
      if (isZero) this.zeroTarget(start, end - start);
      this.#account(taken);
      return { end, moved };
    } catch (error) {
      this.#bitmap.set(start, end - start);
      throw error;
    }
  }

  #copyData(start: number, end: number): number {
    const { data } = this.#buffer;
    for (let position = start; position < end; ) {
      const bytes = Math.min(COPY_BUFFER_BYTES, end - position);
      try {
        this.#source.read(position, data, bytes);
      } catch (error) {
        throw new CopyError('read', error);
      }
      this.#writeData(position, bytes);
      position += bytes;
    }
    return end - start;
  }

  /** Writes the buffer, its long runs of zeroes as such. */
  #writeData(offset: number, bytes: number): void {
    const { data, mask } = this.#buffer;
    const { kernels } = this.#runtime;
    const unit = Math.max(ZERO_BYTES, Math.min(this.descriptor.unit, COPY_BUFFER_BYTES));
    const units = Math.ceil(bytes / unit);
    kernels.zeroMask(data, bytes, unit, mask);
    for (let first = 0; first < units; ) {
      const isZero = kernels.bitmapTest(mask, first);
      const next = isZero
        ? kernels.bitmapNextClear(mask, first, units)
        : kernels.bitmapNextSet(mask, first, units);
      const last = next < 0 ? units : next;
      const [from, to] = [first * unit, Math.min(last * unit, bytes)];
      if (isZero) this.zeroTarget(offset + from, to - from);
      else {
        this.#onTarget(offset + from, to - from, (node) => node.write(offset + from, data + from, to - from));
      }
      first = last;
    }
  }

  #onTarget(offset: number, length: number, body: Parameters<Disk['changeAlone']>[2]): void {
    try {
      this.#target.changeAlone(offset, length, body);
    } catch (error) {
      throw new CopyError('write', error);
    }
  }

  /** Bytes in whole units from a unit boundary on that read as zeroes without being read, at most `length`. */
  #zeroesAt(start: number, length: number): number {
    const { unit, length: size } = this.descriptor;
    let bytes = 0;
    try {
      while (bytes < length) {
        const extent = this.#source.status(start + bytes, length - bytes);
        if ((extent.flags & STATUS_ZERO) === 0) break;
        bytes += extent.length;
      }
    } catch (error) {
      // Reading it will tell.
      if (!(error instanceof StillframeError)) throw error;
      return 0;
    }
    return start + bytes === size ? bytes : Math.floor(bytes / unit) * unit;
  }

  #startOf(offset: number): number {
    const { unit } = this.descriptor;
    return Math.floor(offset / unit) * unit;
  }

  /** End of the unit that holds the last of `length` bytes from `offset` on. */
  #endOf(offset: number, length: number): number {
    const { unit, length: size } = this.descriptor;
    return Math.min(size, Math.ceil((offset + length) / unit) * unit);
  }

  #account(bytes: number): void {
    const { arena } = this.#runtime;
    const { control } = this.descriptor;
    Atomics.add(arena.u64, (control + DONE) / 8, BigInt(bytes));
    // Guests may have made more dirty since it was counted.
    const index = (control + REMAINING) / 8;
    const left = Atomics.load(arena.u64, index);
    Atomics.sub(arena.u64, index, left < BigInt(bytes) ? left : BigInt(bytes));
  }
}
