import { BITMAP_SET_BYTES, BitmapSet } from '../bitmap/bitmap-set.js';
import { DirtyBitmap } from '../bitmap/dirty-bitmap.js';
import { StillframeError } from '../errors.js';
import { advance, load, store, waitWhile } from '../kernels/futex.js';
import type { Runtime } from '../kernels/runtime.js';
import { livesOf } from './files.js';
import {
  type CopyBuffer,
  Frame,
  type FrameDescriptor,
  type FrameSource,
} from './filters/copy-before-write.js';
import { Mirror, type MirrorDescriptor } from './filters/mirror.js';
import { SnapshotAccess } from './filters/snapshot-access.js';
import { attachNode, liveDisk } from './graph.js';
import type { BlockNode, HostRange, NodeDescriptor } from './node.js';
import { type ChainExtent, chainStatus } from './status.js';
import { TRACKER_BYTES, TrackedRequests } from './tracked-requests.js';

/**
 * A live disk: the root of a graph, what a guest reads and writes. Every mutation is a tracked request and
 * passes the copy-before-write of every frame taken of the disk.
 *
 * Control block: the tracked requests, then
 *
 *     +0  frame count   int32
 *     +4  mirror        { id int32, descriptor pointer uint32, descriptor length uint32 }, id 0: none
 *     +16 frames        8 × { id int32, descriptor pointer uint32, descriptor length uint32, - }
 *     then the set of the dirty bitmaps that the image does not keep itself, then what the disk lies on:
 *
 *     +0  generation    int32   0: what the descriptor says; advanced when that changes
 *     +4  changing      int32   1 keeps everybody from the node
 *     +8  users         int32   who read or flush
 *     +12 sequence      int32   advanced when a change ends, and when a user leaves while somebody wants to make one
 *     +16 root          { pointer uint32, length uint32 } of what the descriptor is from the first change on
 */
export interface DiskDescriptor extends DiskRoot {
  /** Never reused within an engine. */
  readonly id: number;
  readonly control: number;
  /** The node is somebody else's, and stays open. */
  readonly borrowed?: boolean | undefined;
}

/** What a disk lies on, and how it uses it; see {@link changeRoots}. */
export interface DiskRoot {
  readonly node: NodeDescriptor;
  /** Virtual size in bytes. */
  readonly length: number;
  readonly readOnly: boolean;
  /** What a discard does: pass it down or drop it (QEMU's node option `discard`). */
  readonly discard: 'unmap' | 'ignore';
}

/** Frames one disk can have at once. */
export const MAX_FRAMES = 8;
const FRAMES = TRACKER_BYTES;
const MIRROR = FRAMES + 4;
const FIRST_FRAME = FRAMES + 16;
const FRAME_ENTRY = 16;
/** Where the disk's own dirty bitmaps are: see `disk-bitmaps.ts`. */
export const DISK_BITMAPS = FIRST_FRAME + MAX_FRAMES * FRAME_ENTRY;
const ROOT = DISK_BITMAPS + BITMAP_SET_BYTES;
const GENERATION = ROOT;
const CHANGING = ROOT + 4;
const USERS = ROOT + 8;
const SEQUENCE = ROOT + 12;
const ROOT_POINTER = ROOT + 16;
const ROOT_LENGTH = ROOT + 20;
/** Bytes of a disk's control block. */
export const DISK_CONTROL_BYTES = ROOT + 24;

/** Whole clusters of what a disk lay on in a generation. */
interface Clusters {
  /** Bytes. */
  readonly start: number;
  readonly end: number;
  readonly generation: number;
}

/** One thread's view of a disk. */
export class Disk {
  readonly #runtime: Runtime;
  readonly #control: number;
  #descriptor: DiskDescriptor;
  #generation = -1;
  #node: BlockNode | undefined;
  /** What this thread does with the node at the moment that keeps it from being changed. */
  #using = 0;
  readonly #requests: TrackedRequests;
  readonly #frames = new Map<number, Frame>();
  #mirror: Mirror | undefined;
  readonly #bitmaps: BitmapSet;
  #held = false;
  readonly #buffer: () => CopyBuffer;
  readonly #attach: typeof attachNode;

  /**
   * @param buffer gives the calling thread's copy buffer
   * @param attach makes the facade of what the disk lies on
   */
  constructor(
    runtime: Runtime,
    descriptor: DiskDescriptor,
    buffer: () => CopyBuffer,
    attach: typeof attachNode = attachNode,
  ) {
    this.#descriptor = descriptor;
    this.#control = descriptor.control;
    this.#runtime = runtime;
    this.#attach = attach;
    this.#requests = new TrackedRequests(runtime, descriptor.control);
    this.#bitmaps = new BitmapSet(runtime, descriptor.control + DISK_BITMAPS);
    this.#buffer = buffer;
  }

  /** Whether this thread is at it, or keeps others from it. */
  get busy(): boolean {
    return this.#held || this.#using > 0;
  }

  /** The disk as it is now. */
  get descriptor(): DiskDescriptor {
    return this.use(() => this.#descriptor);
  }

  /** The same, without keeping it so. */
  #latest(): DiskDescriptor {
    const generation = load(this.#runtime.arena, this.#control + GENERATION);
    return generation > 0 && generation !== this.#generation ? this.descriptor : this.#descriptor;
  }

  /** What the disk lies on. It may be another one later, except while this thread {@link use}s or changes the disk. */
  get node(): BlockNode {
    return this.use((node) => node);
  }

  /** Runs `body` while what the disk lies on stays the same. Nothing in it may change the disk. */
  use<T>(body: (node: BlockNode) => T): T {
    if (this.#using > 0) return body(this.#current());
    const { arena } = this.#runtime;
    const users = (this.#control + USERS) >> 2;
    for (;;) {
      Atomics.add(arena.i32, users, 1);
      if (load(arena, this.#control + CHANGING) === 0) break;
      this.#leave();
      const sequence = load(arena, this.#control + SEQUENCE);
      if (load(arena, this.#control + CHANGING) !== 0) waitWhile(arena, this.#control + SEQUENCE, sequence);
    }
    try {
      return this.#holding(() => body(this.#current()));
    } finally {
      this.#leave();
    }
  }

  #leave(): void {
    const { arena } = this.#runtime;
    Atomics.sub(arena.i32, (this.#control + USERS) >> 2, 1);
    if (load(arena, this.#control + CHANGING) !== 0) advance(arena, this.#control + SEQUENCE);
  }

  #holding<T>(body: () => T): T {
    this.#using++;
    try {
      return body();
    } finally {
      this.#using--;
    }
  }

  /** This thread's facade of what the disk lies on. Called while that cannot be changed. */
  #current(): BlockNode {
    const { arena } = this.#runtime;
    const generation = load(arena, this.#control + GENERATION);
    if (this.#node === undefined || generation !== this.#generation) {
      if (generation > 0) {
        const json = arena.copyOut(
          load(arena, this.#control + ROOT_POINTER) >>> 0,
          load(arena, this.#control + ROOT_LENGTH),
        );
        const root: DiskRoot = JSON.parse(new TextDecoder().decode(json));
        const { id, control, borrowed } = this.#descriptor;
        this.#descriptor = { id, control, borrowed, ...root };
      }
      this.#node = this.#attach(this.#runtime, this.#descriptor.node, true);
      this.#generation = generation;
      this.#frames.clear();
    }
    return this.#node;
  }

  /** Runs `body`, which may change what the disk lies on with {@link changeRoot}, while nobody uses it. */
  exclusive<T>(body: () => T): T {
    const { arena } = this.#runtime;
    const changing = (this.#control + CHANGING) >> 2;
    this.#sequenced(() => Atomics.compareExchange(arena.i32, changing, 0, 1) === 0);
    try {
      // Before the drain: a user may be on its way to a request that the drain would keep out.
      this.#sequenced(() => load(arena, this.#control + USERS) === 0);
      return this.drained(body);
    } finally {
      store(arena, this.#control + CHANGING, 0);
      advance(arena, this.#control + SEQUENCE);
    }
  }

  /** Blocks until `attempt` says true. */
  #sequenced(attempt: () => boolean): void {
    const { arena } = this.#runtime;
    for (;;) {
      const sequence = load(arena, this.#control + SEQUENCE);
      if (attempt()) return;
      waitWhile(arena, this.#control + SEQUENCE, sequence);
    }
  }

  /**
   * From now on the disk lies on something else, in every thread. Called in {@link exclusive}; no frame relies on what it
   * was.
   *
   * @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED
   */
  changeRoot(root: DiskRoot): DiskDescriptor {
    const { arena } = this.#runtime;
    const { node, length, readOnly, discard } = root;
    const json = new TextEncoder().encode(JSON.stringify({ node, length, readOnly, discard }));
    const pointer = arena.alloc(json.length, 'description of a disk');
    arena.u8.set(json, pointer);
    freeRoot(this.#runtime, this.#control);
    store(arena, this.#control + ROOT_POINTER, pointer);
    store(arena, this.#control + ROOT_LENGTH, json.length);
    Atomics.add(arena.i32, (this.#control + GENERATION) >> 2, 1);
    this.#current();
    return this.#descriptor;
  }

  read(offset: number, pointer: number, length: number): void {
    this.use((node) => {
      this.#check('read', offset, length);
      node.read(offset, pointer, length);
    });
  }

  /** What the backing chain says of a range: see {@link chainStatus}. */
  status(offset: number, length: number): ChainExtent {
    return this.use((node) => chainStatus(node, offset, length));
  }

  /** As {@link BlockNode.hostRange}, for as long as this thread {@link use}s the disk. */
  hostRange(offset: number, length: number): HostRange | undefined {
    return this.use((node) => node.hostRange?.(offset, length));
  }

  write(offset: number, pointer: number, length: number): void {
    this.mutate('write', offset, length, (node) => node.write(offset, pointer, length));
  }

  /** As {@link BlockNode.writeCompressed}, with the errors that QEMU has. */
  writeCompressed(offset: number, pointer: number, length: number): void {
    this.mutate('write', offset, length, (node) => {
      const { clusterSize = 1 } = node;
      const whole =
        offset % clusterSize === 0 && (length % clusterSize === 0 || offset + length === node.length);
      if (whole && node.writeCompressed !== undefined) {
        node.writeCompressed(offset, pointer, length);
        return;
      }
      const errno = node.writeCompressed === undefined ? 'ENOTSUP' : 'EINVAL';
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `cannot write ${length} bytes at ${offset} of '${node.descriptor.path}' compressed: ${errno}`,
        { errno },
      );
    });
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.mutate('write zeroes', offset, length, (node) => node.writeZeroes(offset, length, mayUnmap));
  }

  /** As {@link BlockNode.writeZeroesFast}; false as well where the driver does not know. */
  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    let done = true;
    this.mutate('write zeroes', offset, length, (node) => {
      done = node.writeZeroesFast?.(offset, length, mayUnmap) ?? false;
    });
    return done;
  }

  discard(offset: number, length: number): void {
    if (this.#latest().discard === 'ignore') {
      this.use(() => this.#check('discard', offset, length));
      return;
    }
    this.mutate('discard', offset, length, (node) => node.discard(offset, length));
  }

  /** Runs `body` while nobody changes the range, or anything else of the clusters that it touches. */
  undisturbed<T>(offset: number, length: number, body: (node: BlockNode) => T): T {
    return this.#apart(() => this.#clustersOf(offset, length), body);
  }

  #apart<T>(clusters: () => Clusters, body: (node: BlockNode) => T): T {
    for (;;) {
      const { start, end, generation } = this.use(clusters);
      // Who keeps others from the disk is alone on it.
      if (this.#held) return this.use(body);
      const done = this.#requests.run(start, end, () =>
        this.#holding(() => {
          // With other clusters others may be in the way.
          if (load(this.#runtime.arena, this.#control + GENERATION) !== generation) return undefined;
          return { value: body(this.#current()) };
        }),
      );
      if (done !== undefined) return done.value;
    }
  }

  flush(): void {
    this.use((node) => {
      if (!this.#descriptor.readOnly) node.flush();
    });
  }

  /** Runs `body` while no mutation is in flight. Instants that are taken in it are one instant. */
  drained<T>(body: () => T): T {
    if (this.#held) return body();
    return this.#requests.drained(() => {
      this.#held = true;
      try {
        // Whoever waits to change what the disk lies on waits for this as well.
        return this.#holding(body);
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
          `'${this.#descriptor.node.path}' has ${MAX_FRAMES} backups under way, which is the most; wait for one to end`,
        );
      }
      const entry = (this.#control + FIRST_FRAME + count * FRAME_ENTRY) >> 2;
      arena.i32.set([frame.id, pointer, json.length], entry);
      Frame.arm(this.#runtime, frame);
      store(arena, this.#control + FRAMES, count + 1);
    });
  }

  /** Ends a frame's copy-before-write. No request of a guest is in it any more when this returns. */
  removeFrame(id: number): void {
    const { arena } = this.#runtime;
    const words = arena.u32;
    this.drained(() => {
      const count = this.#frameCount();
      const first = (this.#control + FIRST_FRAME) >> 2;
      const stride = FRAME_ENTRY >> 2;
      for (let index = 0; index < count; index++) {
        const entry = first + index * stride;
        if (words[entry] !== id) continue;
        arena.free(words[entry + 1] ?? 0);
        words.copyWithin(entry, entry + stride, first + count * stride);
        store(arena, this.#control + FRAMES, count - 1);
        return;
      }
    });
    this.#frames.delete(id);
  }

  #frameCount(): number {
    return load(this.#runtime.arena, this.#control + FRAMES);
  }

  /**
   * From now on what a guest writes is in the target of that mirror before the guest is answered; undefined: no more. No
   * request of a guest is in the mirror that was before when this returns.
   */
  setMirror(mirror: MirrorDescriptor | undefined): void {
    const { arena } = this.#runtime;
    const words = (this.#control + MIRROR) >> 2;
    let entry = [0, 0, 0];
    if (mirror !== undefined) {
      const json = new TextEncoder().encode(JSON.stringify(mirror));
      const pointer = arena.alloc(json.length, 'mirror descriptor');
      arena.u8.set(json, pointer);
      entry = [mirror.id, pointer, json.length];
    }
    this.drained(() => {
      const old = arena.u32[words + 1] ?? 0;
      arena.i32.set(entry, words);
      if (old !== 0) arena.free(old);
    });
  }

  /** The mirror that guests write to as well; stable while a request of ours is tracked. */
  #activeMirror(): Mirror | undefined {
    const { arena } = this.#runtime;
    const words = (this.#control + MIRROR) >> 2;
    const id = load(arena, this.#control + MIRROR);
    if (id === 0) {
      this.#mirror = undefined;
    } else if (this.#mirror?.descriptor.id !== id) {
      const json = arena.copyOut(arena.u32[words + 1] ?? 0, arena.u32[words + 2] ?? 0);
      this.#mirror = this.attachMirror(JSON.parse(new TextDecoder().decode(json)));
    }
    return this.#mirror;
  }

  /** This thread's view of a mirror of this disk. */
  attachMirror(descriptor: MirrorDescriptor): Mirror {
    return new Mirror(
      this.#runtime,
      descriptor,
      this,
      liveDisk(this.#runtime, descriptor.target),
      new DirtyBitmap(this.#runtime, descriptor.bitmap),
      this.#buffer(),
    );
  }

  /** Carries a change out once old data is saved, as the only one of its clusters. @param what it is, for errors */
  mutate(what: string, offset: number, length: number, body: (node: BlockNode) => void): void {
    const clusters = (): Clusters => {
      this.#checkChange(what, offset, length);
      return this.#clustersOf(offset, length);
    };
    if (length === 0) {
      this.use(clusters);
      return;
    }
    this.#apart(clusters, (node) => {
      for (const frame of this.#activeFrames()) frame.beforeWrite(offset, length);
      try {
        body(node);
      } finally {
        // Whether or not it went well: a part of it may have been made.
        this.#bitmaps.record(offset, length);
      }
      this.#activeMirror()?.afterWrite(offset, length);
    });
  }

  /** Carries a change out for the only one who changes the disk: it is recorded, and that is all. */
  changeAlone(offset: number, length: number, body: (node: BlockNode) => void): void {
    this.use((node) => {
      try {
        body(node);
      } finally {
        this.#bitmaps.record(offset, length);
      }
    });
  }

  #checkChange(what: string, offset: number, length: number): void {
    this.#check(what, offset, length);
    if (!this.#descriptor.readOnly) return;
    throw new StillframeError(
      'ERR_STILLFRAME_READ_ONLY',
      `cannot ${what} ${length} bytes at ${offset}: '${this.#descriptor.node.path}' is open read-only; open it with readOnly: false`,
    );
  }

  /** Nodes want mutations of one cluster apart, so requests are tracked by whole clusters. Within {@link use}. */
  #clustersOf(offset: number, length: number): Clusters {
    const unit = this.#current().clusterSize ?? 1;
    return {
      start: Math.floor(offset / unit) * unit,
      end: Math.ceil((offset + length) / unit) * unit,
      generation: this.#generation,
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
      const id = arena.i32[this.#frameEntry(index)] ?? 0;
      active.add(id);
      if (!this.#frames.has(id)) this.#frames.set(id, this.attachFrame(this.#frameAt(index)));
    }
    if (this.#frames.size !== active.size) {
      for (const id of this.#frames.keys()) if (!active.has(id)) this.#frames.delete(id);
    }
    return this.#frames.values();
  }

  /** Index of a frame's words. */
  #frameEntry(index: number): number {
    return (this.#control + FIRST_FRAME + index * FRAME_ENTRY) >> 2;
  }

  #frameAt(index: number): FrameDescriptor {
    const { arena } = this.#runtime;
    const entry = this.#frameEntry(index);
    const json = arena.copyOut(arena.u32[entry + 1] ?? 0, arena.u32[entry + 2] ?? 0);
    return JSON.parse(new TextDecoder().decode(json));
  }

  /** Other disks that requests on this one go on to: what it lies on, and what old data or new one is copied to. */
  get below(): DiskDescriptor[] {
    const look = ({ descriptor }: BlockNode): DiskDescriptor[] => {
      const targets = Array.from({ length: this.#frameCount() }, (_, index) => this.#frameAt(index).target);
      const mirror = this.#activeMirror()?.descriptor.target;
      return [...[descriptor, ...targets].flatMap(livesOf), ...(mirror === undefined ? [] : [mirror])];
    };
    return this.#held ? this.use(look) : this.undisturbed(0, 1, look);
  }

  /** This thread's view of a frame of this disk. */
  attachFrame(descriptor: FrameDescriptor): Frame {
    const target = attachNode(this.#runtime, descriptor.target);
    if (descriptor.holder === undefined) {
      return new Frame(this.#runtime, descriptor, this, target, this.#buffer());
    }
    const holder = this.attachFrame(descriptor.holder);
    const instant = new SnapshotAccess(this.#runtime, this, holder);
    const source: FrameSource = { use: (body) => body(instant) };
    return new Frame(this.#runtime, descriptor, source, target, this.#buffer(), holder);
  }

  #check(what: string, offset: number, length: number): void {
    const valid = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (!valid || offset + length > this.#descriptor.length) {
      throw new StillframeError(
        'ERR_STILLFRAME_OUT_OF_RANGE',
        `cannot ${what} ${length} bytes at ${offset}: '${this.#descriptor.node.path}' has ${this.#descriptor.length} bytes`,
      );
    }
  }
}

/** Gives the memory back in which a disk's control block says what it lies on. */
export function freeRoot(runtime: Runtime, control: number): void {
  const pointer = load(runtime.arena, control + ROOT_POINTER) >>> 0;
  if (pointer !== 0) runtime.arena.free(pointer);
}
