import { BITMAP_SET_BYTES, BitmapSet } from '../bitmap/bitmap-set.js';
import { StillframeError } from '../errors.js';
import { load, store } from '../kernels/futex.js';
import type { Runtime } from '../kernels/runtime.js';
import { type CopyBuffer, Frame, type FrameDescriptor } from './filters/copy-before-write.js';
import { SnapshotAccess } from './filters/snapshot-access.js';
import { attachNode } from './graph.js';
import type { BlockNode, HostRange, NodeDescriptor } from './node.js';
import { TRACKER_BYTES, TrackedRequests } from './tracked-requests.js';

/**
 * A live disk: the root of a graph, what a guest reads and writes. Every mutation is a tracked request and
 * passes the copy-before-write of every frame taken of the disk.
 *
 * Control block: the tracked requests, then
 *
 *     +0  frame count   int32
 *     +16 frames        8 × { id int32, descriptor pointer uint32, descriptor length uint32, - }
 *     then the set of the dirty bitmaps that the image does not keep itself
 */
export interface DiskDescriptor {
  /** Never reused within an engine. */
  readonly id: number;
  readonly control: number;
  readonly node: NodeDescriptor;
  /** Virtual size in bytes. */
  readonly length: number;
  readonly readOnly: boolean;
  /** What a discard does: pass it down or drop it (QEMU's node option `discard`). */
  readonly discard: 'unmap' | 'ignore';
  /** What a write of zeroes becomes: zeroes without data, with `unmap` without space (`detect-zeroes`). Default: data. */
  readonly detectZeroes?: 'on' | 'unmap' | undefined;
  /** The node is somebody else's, and stays open. */
  readonly borrowed?: boolean | undefined;
}

/** Frames one disk can have at once. */
export const MAX_FRAMES = 8;
const FRAMES = TRACKER_BYTES;
const FIRST_FRAME = FRAMES + 16;
const FRAME_ENTRY = 16;
/** Where the disk's own dirty bitmaps are: see `disk-bitmaps.ts`. */
export const DISK_BITMAPS = FIRST_FRAME + MAX_FRAMES * FRAME_ENTRY;
/** Bytes of a disk's control block. */
export const DISK_CONTROL_BYTES = DISK_BITMAPS + BITMAP_SET_BYTES;

/** One thread's view of a disk. */
export class Disk {
  readonly descriptor: DiskDescriptor;
  readonly node: BlockNode;
  readonly #runtime: Runtime;
  readonly #requests: TrackedRequests;
  readonly #frames = new Map<number, Frame>();
  readonly #bitmaps: BitmapSet;
  #held = false;
  readonly #buffer: () => CopyBuffer;

  /** @param buffer gives the calling thread's copy buffer */
  constructor(runtime: Runtime, descriptor: DiskDescriptor, buffer: () => CopyBuffer) {
    this.descriptor = descriptor;
    this.node = attachNode(runtime, descriptor.node);
    this.#runtime = runtime;
    this.#requests = new TrackedRequests(runtime, descriptor.control);
    this.#bitmaps = new BitmapSet(runtime, descriptor.control + DISK_BITMAPS);
    this.#buffer = buffer;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#check('read', offset, length);
    this.node.read(offset, pointer, length);
  }

  /** As {@link BlockNode.hostRange}. */
  hostRange(offset: number, length: number): HostRange | undefined {
    return this.node.hostRange?.(offset, length);
  }

  write(offset: number, pointer: number, length: number): void {
    const { detectZeroes } = this.descriptor;
    if (detectZeroes !== undefined && length > 0 && this.#runtime.kernels.isZero(pointer, length)) {
      this.writeZeroes(offset, length, detectZeroes === 'unmap' && this.descriptor.discard === 'unmap');
      return;
    }
    this.mutate('write', offset, length, () => this.node.write(offset, pointer, length));
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.mutate('write zeroes', offset, length, () => this.node.writeZeroes(offset, length, mayUnmap));
  }

  /** As {@link BlockNode.writeZeroesFast}; false as well where the driver does not know. */
  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    let done = true;
    this.mutate('write zeroes', offset, length, () => {
      done = this.node.writeZeroesFast?.(offset, length, mayUnmap) ?? false;
    });
    return done;
  }

  discard(offset: number, length: number): void {
    if (this.descriptor.discard === 'ignore') {
      this.#check('discard', offset, length);
      return;
    }
    this.mutate('discard', offset, length, () => this.node.discard(offset, length));
  }

  /** Runs `body` while nobody changes the range, or anything else of the clusters that it touches. */
  undisturbed<T>(offset: number, length: number, body: () => T): T {
    const { start, end } = this.#clustersOf(offset, length);
    return this.#requests.run(start, end, body);
  }

  flush(): void {
    if (!this.descriptor.readOnly) this.node.flush();
  }

  /** Runs `body` while no mutation is in flight. Instants that are taken in it are one instant. */
  drained<T>(body: () => T): T {
    if (this.#held) return body();
    return this.#requests.drained(() => {
      this.#held = true;
      try {
        return body();
      } finally {
        this.#held = false;
      }
    });
  }

  /** Makes the instant: once this returns, every mutation passes the frame's copy-before-write first. */
  addFrame(frame: FrameDescriptor): void {
    const { arena } = this.#runtime;
    const json = new TextEncoder().encode(JSON.stringify(frame));
    const pointer = arena.alloc(json.length, 'frame descriptor');
    arena.u8.set(json, pointer);
    this.drained(() => {
      const count = this.#frameCount();
      if (count === MAX_FRAMES) {
        arena.free(pointer);
        throw new StillframeError(
          'ERR_STILLFRAME_INVALID_ARGUMENT',
          `'${this.descriptor.node.path}' has ${MAX_FRAMES} backups under way, which is the most; wait for one to end`,
        );
      }
      const entry = (this.descriptor.control + FIRST_FRAME + count * FRAME_ENTRY) >> 2;
      arena.i32.set([frame.id, pointer, json.length], entry);
      Frame.arm(this.#runtime, frame);
      store(arena, this.descriptor.control + FRAMES, count + 1);
    });
  }

  /** Ends a frame's copy-before-write. No request of a guest is in it any more when this returns. */
  removeFrame(id: number): void {
    const { arena } = this.#runtime;
    const words = arena.u32;
    this.drained(() => {
      const count = this.#frameCount();
      const first = (this.descriptor.control + FIRST_FRAME) >> 2;
      const stride = FRAME_ENTRY >> 2;
      for (let index = 0; index < count; index++) {
        const entry = first + index * stride;
        if (words[entry] !== id) continue;
        arena.free(words[entry + 1] ?? 0);
        words.copyWithin(entry, entry + stride, first + count * stride);
        store(arena, this.descriptor.control + FRAMES, count - 1);
        return;
      }
    });
    this.#frames.delete(id);
  }

  #frameCount(): number {
    return load(this.#runtime.arena, this.descriptor.control + FRAMES);
  }

  /** Carries a change out once old data is saved, as the only one of its clusters. @param what it is, for errors */
  mutate(what: string, offset: number, length: number, body: () => void): void {
    this.#check(what, offset, length);
    if (this.descriptor.readOnly) {
      throw new StillframeError(
        'ERR_STILLFRAME_READ_ONLY',
        `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.node.path}' is open read-only; open it with readOnly: false`,
      );
    }
    if (length === 0) return;
    const { start, end } = this.#clustersOf(offset, length);
    this.#requests.run(start, end, () => {
      for (const frame of this.#activeFrames()) frame.beforeWrite(offset, length);
      try {
        body();
      } finally {
        // Whether or not it went well: a part of it may have been made.
        this.#bitmaps.record(offset, length);
      }
    });
  }

  /** Nodes want mutations of one cluster apart, so requests are tracked by whole clusters. */
  #clustersOf(offset: number, length: number): { readonly start: number; readonly end: number } {
    const unit = this.node.clusterSize ?? 1;
    return {
      start: Math.floor(offset / unit) * unit,
      end: Math.ceil((offset + length) / unit) * unit,
    };
  }

  /** The frames of the disk; stable while a request of ours is tracked. */
  #activeFrames(): Iterable<Frame> {
    const count = this.#frameCount();
    if (count === 0) {
      this.#frames.clear();
      return [];
    }
    const { arena } = this.#runtime;
    const active = new Set<number>();
    for (let index = 0; index < count; index++) {
      const entry = (this.descriptor.control + FIRST_FRAME + index * FRAME_ENTRY) >> 2;
      const id = arena.i32[entry] ?? 0;
      active.add(id);
      if (this.#frames.has(id)) continue;
      const json = arena.copyOut(arena.u32[entry + 1] ?? 0, arena.u32[entry + 2] ?? 0);
      const descriptor: FrameDescriptor = JSON.parse(new TextDecoder().decode(json));
      this.#frames.set(id, this.attachFrame(descriptor));
    }
    if (this.#frames.size !== active.size) {
      for (const id of this.#frames.keys()) if (!active.has(id)) this.#frames.delete(id);
    }
    return this.#frames.values();
  }

  /** This thread's view of a frame of this disk. */
  attachFrame(descriptor: FrameDescriptor): Frame {
    const target = attachNode(this.#runtime, descriptor.target);
    if (descriptor.holder === undefined) {
      return new Frame(this.#runtime, descriptor, this.node, target, this.#buffer());
    }
    const holder = this.attachFrame(descriptor.holder);
    const instant = new SnapshotAccess(this.#runtime, this, holder);
    return new Frame(this.#runtime, descriptor, instant, target, this.#buffer(), holder);
  }

  #check(what: string, offset: number, length: number): void {
    const valid = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (!valid || offset + length > this.descriptor.length) {
      throw new StillframeError(
        'ERR_STILLFRAME_OUT_OF_RANGE',
        `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.node.path}' has ${this.descriptor.length} bytes`,
      );
    }
  }
}
