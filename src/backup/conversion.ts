import { COPY_BUFFER_BYTES, type CopyBuffer } from '../block/filters/copy-before-write.js';
import { attachNode } from '../block/graph.js';
import { type BlockNode, type NodeDescriptor, STATUS_ALLOCATED, STATUS_ZERO } from '../block/node.js';
import { chainStatus } from '../block/status.js';
import { toStillframeError } from '../errors.js';
import type { Team } from '../job/team.js';
import type { Runtime } from '../kernels/runtime.js';

/** A conversion that is under way, as plain data: any thread may help with it. Sizes are bytes. */
export interface Conversion {
  /** They follow one another, each filled up to whole sectors. */
  readonly sources: readonly NodeDescriptor[];
  /** What is copied of each. */
  readonly parts: readonly Part[];
  readonly target: NodeDescriptor;
  readonly length: number;
  /** Granularity of copying, a power of two: what has data anywhere is read whole. */
  readonly align: number;
  /** A multiple of `align`. */
  readonly claimBytes: number;
  /** Smallest run of zeroes that is not written; 0: all are. */
  readonly sparseSize: number;
  readonly targetReadsZero: boolean;
  /**
   * Only what the topmost image of the source holds is copied, since the target has a backing file of so many bytes.
   */
  readonly onlyTop: number | undefined;
  readonly compress: boolean;
  readonly salvage: boolean;
  readonly bytesPerSecond: number | undefined;
}

/** Part of an image, in bytes. */
export interface Part {
  readonly offset: number;
  readonly length: number;
}

/** Where a thread of a conversion tells how far it is. */
export interface ConversionListener {
  progress(done: number, total: number): void;
  message(line: string): void;
}

type Kind = 'skip' | 'zero' | 'data';

/** Bytes copied in one step. */
const RUN_BYTES = 1 << 20;
const SECTOR = 512;
/** Of a cluster with an extended L2 entry. */
const SUBCLUSTERS = 32;

/** How much of what has no known status is looked at at once, in bytes. */
const SALVAGE_BYTES = 4096;

function isUnreadable(error: unknown): boolean {
  const { code } = toStillframeError(error);
  return code === 'ERR_STILLFRAME_IO' || code === 'ERR_STILLFRAME_CORRUPT_IMAGE';
}

/** Copies part after part along with the other threads of the team, until nothing is left to claim. */
export function copyPart(
  runtime: Runtime,
  conversion: Conversion,
  team: Team,
  buffer: CopyBuffer,
  listener: ConversionListener,
): void {
  new Copier(runtime, conversion, team, buffer, listener).run();
}

/** Part of a source that is [start, end) of what is copied, the last bytes of it filled up with zeroes. */
interface Piece extends Part {
  readonly start: number;
  readonly end: number;
  readonly node: BlockNode;
}

/** Sources that follow one another. */
class Sources {
  readonly #pieces: Piece[] = [];
  readonly #onlyTop: number | undefined;
  readonly #zero: 'zero' | 'data';
  readonly #salvage: boolean;

  constructor(runtime: Runtime, { sources, parts, onlyTop, sparseSize, salvage }: Conversion) {
    let start = 0;
    for (const [index, source] of sources.entries()) {
      const { offset, length } = parts[index] ?? { offset: 0, length: 0 };
      const end = start + roundUp(length, SECTOR);
      this.#pieces.push({ start, end, node: attachNode(runtime, source), offset, length });
      start = end;
    }
    this.#onlyTop = onlyTop;
    this.#salvage = salvage;
    this.#zero = sparseSize === 0 ? 'data' : 'zero';
  }

  kindAt(offset: number, most: number): { readonly kind: Kind; readonly length: number } {
    try {
      return this.#kindAt(offset, most);
    } catch (error) {
      if (!this.#salvage || !isUnreadable(error)) throw error;
      // Perhaps it can be read all the same.
      return { kind: 'data', length: Math.min(most, SALVAGE_BYTES - (offset % SALVAGE_BYTES)) };
    }
  }

  #kindAt(offset: number, most: number): { readonly kind: Kind; readonly length: number } {
    const piece = this.#pieceAt(offset);
    const { node } = piece;
    const length = Math.min(most, piece.end - offset);
    const left = piece.start + piece.length - offset;
    // A tail that is less than a sector.
    if (left <= 0) return { kind: this.#zero, length };
    const inNode = Math.min(length, left);
    const at = piece.offset + (offset - piece.start);
    if (this.#onlyTop === undefined) {
      const { flags, length: bytes } = chainStatus(node, at, inNode);
      return { kind: flags & STATUS_ZERO ? this.#zero : 'data', length: bytes };
    }
    const own = node.status(at, inNode);
    if ((own.flags & STATUS_ALLOCATED) === 0) {
      if (offset < this.#onlyTop)
        return { kind: 'skip', length: Math.min(own.length, this.#onlyTop - offset) };
      // The target's backing file ends before; what the source's has there is copied.
      const { flags, length: bytes } = chainStatus(node, at, own.length);
      return { kind: flags & STATUS_ZERO ? 'skip' : 'data', length: bytes };
    }
    return { kind: own.flags & STATUS_ZERO ? this.#zero : 'data', length: own.length };
  }

  read(
    offset: number,
    pointer: number,
    length: number,
    zero: (pointer: number, length: number) => void,
  ): void {
    for (let done = 0; done < length; ) {
      const piece = this.#pieceAt(offset + done);
      const at = offset + done - piece.start;
      const bytes = Math.min(length - done, piece.end - piece.start - at);
      const inNode = Math.max(0, Math.min(bytes, piece.length - at));
      if (inNode > 0) piece.node.read(piece.offset + at, pointer + done, inNode);
      if (inNode < bytes) zero(pointer + done + inNode, bytes - inNode);
      done += bytes;
    }
  }

  #pieceAt(offset: number): Piece {
    const piece = this.#pieces.find(({ end }) => offset < end);
    if (piece === undefined) throw new RangeError(`offset ${offset} is beyond the last source`);
    return piece;
  }
}

class Copier {
  readonly #runtime: Runtime;
  readonly #conversion: Conversion;
  readonly #team: Team;
  readonly #data: number;
  readonly #mask: number;
  readonly #listener: ConversionListener;
  readonly #sources: Sources;
  readonly #target: BlockNode;
  readonly #unit: number;
  /** Units are written in runs: they are parts of clusters, or larger than what the data is aligned to. */
  readonly #byRuns: boolean;
  readonly #started = performance.now();

  constructor(
    runtime: Runtime,
    conversion: Conversion,
    team: Team,
    buffer: CopyBuffer,
    listener: ConversionListener,
  ) {
    this.#runtime = runtime;
    this.#conversion = conversion;
    this.#team = team;
    this.#data = buffer.data;
    this.#mask = buffer.mask;
    this.#listener = listener;
    this.#sources = new Sources(runtime, conversion);
    this.#target = attachNode(runtime, conversion.target);
    const { descriptor, clusterSize = SECTOR } = this.#target;
    const bySubcluster = descriptor.driver === 'qcow2' && descriptor.extendedL2 && !conversion.compress;
    const least = bySubcluster ? clusterSize / SUBCLUSTERS : clusterSize;
    // The masks of units are for powers of two.
    const unit = 2 ** Math.ceil(Math.log2(Math.max(least, conversion.sparseSize, SECTOR)));
    this.#unit = conversion.compress ? clusterSize : Math.min(COPY_BUFFER_BYTES, unit);
    this.#byRuns = bySubcluster || this.#unit > conversion.align;
  }

  run(): void {
    const { claimBytes, length } = this.#conversion;
    for (;;) {
      const start = this.#team.claim(claimBytes, length);
      if (start === undefined) return;
      this.#copyClaim(start, Math.min(start + claimBytes, length));
    }
  }

  #copyClaim(start: number, claimed: number): void {
    const { targetReadsZero, length } = this.#conversion;
    let end = claimed;
    for (let at = start; at < end && !this.#team.stopped; ) {
      const { kind, stop } = this.#next(at, end);
      let next = stop;
      if (kind === 'data') {
        this.#throttle();
        this.#copy(at, stop - at);
      } else {
        // A hole usually goes on.
        if (stop === end) next = end = this.#followHole(kind, end);
        if (kind === 'zero' && !targetReadsZero) this.#writeZeroes(at, next - at);
      }
      this.#team.addDone(next - at);
      this.#listener.progress(this.#team.done, length);
      at = next;
    }
  }

  /** Claims more and more of what follows as far as it is of the same kind. @returns the end of what is claimed then */
  #followHole(kind: Kind, from: number): number {
    const { length, align, claimBytes } = this.#conversion;
    let end = from;
    for (let step = claimBytes; end < length; step *= 16) {
      const most = Math.min(length, end + step);
      const beyond = this.#kindRun(end, most);
      const stop = beyond.stop === length ? length : beyond.stop - (beyond.stop % align);
      if (beyond.kind !== kind || stop <= end || !this.#team.claimOn(end, stop)) break;
      end = stop;
      if (stop < most) break;
    }
    return end;
  }

  /** The run of bytes of one kind that starts at `at`. */
  #kindRun(at: number, end: number): { readonly kind: Kind; readonly stop: number } {
    let { kind, length } = this.#sources.kindAt(at, end - at);
    while (at + length < end) {
      const more = this.#sources.kindAt(at + length, end - at - length);
      if (more.kind !== kind) break;
      length += more.length;
      if (kind === 'data' && length >= RUN_BYTES) break;
    }
    return { kind, stop: at + length };
  }

  /** What to do next: data up to a boundary, or whole units without any. */
  #next(at: number, end: number): { readonly kind: Kind; readonly stop: number } {
    const { align } = this.#conversion;
    const run = this.#kindRun(at, end);
    if (run.kind !== 'data') {
      const stop = run.stop === end ? end : run.stop - (run.stop % align);
      if (stop > at) return { kind: run.kind, stop };
    }
    const most = Math.min(end, at + Math.max(RUN_BYTES, align));
    let stop = Math.min(most, roundUp(run.stop, align));
    // Data that begins within the last unit is taken along.
    while (stop < most) {
      const more = this.#kindRun(stop, most);
      if (more.kind !== 'data') break;
      stop = Math.min(most, roundUp(more.stop, align));
    }
    return { kind: 'data', stop };
  }

  #copy(at: number, length: number): void {
    const { targetReadsZero, sparseSize, compress } = this.#conversion;
    const { kernels } = this.#runtime;
    this.#read(at, length);
    if (sparseSize === 0) {
      if (compress) this.#writeCompressed(at, 0, length);
      else this.#target.write(at, this.#data, length);
      return;
    }
    const units = Math.ceil(length / this.#unit);
    const zero = kernels.zeroMask(this.#data, length, this.#unit, this.#mask);
    if (zero < units) {
      if (compress)
        this.#runs(length, false, (from, to) => this.#writeCompressed(at + from, from, to - from));
      else if (this.#byRuns) {
        this.#runs(length, false, (from, to) => this.#target.write(at + from, this.#data + from, to - from));
      } else this.#target.writeUnits(at, this.#data, length, this.#unit, this.#mask);
    }
    if (zero > 0 && !targetReadsZero) {
      this.#runs(length, true, (from, to) => this.#writeZeroes(at + from, to - from));
    }
  }

  #writeCompressed(offset: number, from: number, length: number): void {
    if (this.#target.writeCompressed === undefined) throw new TypeError('the target cannot be compressed');
    this.#target.writeCompressed(offset, this.#data + from, length);
  }

  #writeZeroes(offset: number, length: number): void {
    this.#target.writeZeroes(offset, length, this.#conversion.sparseSize > 0);
  }

  /** The runs of units that the mask calls zero, or does not, as offsets in the buffer. */
  #runs(length: number, zero: boolean, body: (from: number, to: number) => void): void {
    const { kernels } = this.#runtime;
    const units = Math.ceil(length / this.#unit);
    const next = (set: boolean, from: number): number => {
      const found = set
        ? kernels.bitmapNextSet(this.#mask, from, units)
        : kernels.bitmapNextClear(this.#mask, from, units);
      return found < 0 ? units : found;
    };
    for (let first = next(zero, 0); first < units; ) {
      const end = next(!zero, first);
      body(first * this.#unit, Math.min(end * this.#unit, length));
      first = end < units ? next(zero, end) : units;
    }
  }

  #read(at: number, length: number): void {
    const zero = (pointer: number, bytes: number): void => {
      this.#runtime.arena.u8.fill(0, pointer, pointer + bytes);
    };
    try {
      this.#sources.read(at, this.#data, length, zero);
    } catch (error) {
      if (!this.#conversion.salvage || !isUnreadable(error)) throw error;
      this.#salvage(at, length, zero);
    }
  }

  /** Sector by sector. */
  #salvage(at: number, length: number, zero: (pointer: number, bytes: number) => void): void {
    for (let done = 0; done < length; done += SECTOR) {
      const bytes = Math.min(SECTOR, length - done);
      try {
        this.#sources.read(at + done, this.#data + done, bytes, zero);
      } catch (error) {
        zero(this.#data + done, bytes);
        const { message } = toStillframeError(error);
        this.#listener.message(`warning: error while reading offset ${at + done}: ${message}`);
      }
    }
  }

  /** Waits until there may be read on. */
  #throttle(): void {
    const { bytesPerSecond } = this.#conversion;
    if (bytesPerSecond === undefined) return;
    const dueMs = (this.#team.done / bytesPerSecond) * 1000 - (performance.now() - this.#started);
    if (dueMs > 0) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, dueMs);
  }
}

function roundUp(bytes: number, unit: number): number {
  return Math.ceil(bytes / unit) * unit;
}
