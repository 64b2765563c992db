import type { FrozenDescriptor } from '../backup/freeze.js';
import { type HeldCounts, heldCounts, readFrameCounters } from '../block/filters/copy-before-write.js';
import type { DiskHandle } from './disk.js';
import type { Engine } from './engine.js';
import { guestCopies, untilAttended } from './guest-copies.js';
import type { NbdServer } from './nbd-server.js';

/** An instant of a disk that is held, to be exported: see {@link DiskHandle.freeze}. */
export class FrozenDisk {
  /** The live disk. */
  readonly disk: DiskHandle;
  readonly descriptor: FrozenDescriptor;
  /** @internal Servers that export it, and the names by which they do. */
  readonly exports = new Map<NbdServer, string>();
  readonly #engine: Engine;
  readonly #onClose: () => void;
  readonly #copies: Promise<unknown>;
  /** @internal Resolves when its time-out can be kept. */
  readonly ready: Promise<void>;
  #closing: Promise<void> | undefined;

  /** @internal Use {@link DiskHandle.freeze}. */
  constructor(engine: Engine, disk: DiskHandle, descriptor: FrozenDescriptor, onClose: () => void) {
    this.#engine = engine;
    this.disk = disk;
    this.descriptor = descriptor;
    this.#onClose = onClose;
    const { frame } = descriptor;
    let over = false;
    this.#copies = Promise.allSettled(
      guestCopies(disk.descriptor, frame).map((task) => engine.run<void>(task)),
    ).finally(() => {
      over = true;
    });
    this.ready = untilAttended(engine.arena, frame, () => over);
  }

  /** Virtual size in bytes. */
  get length(): number {
    return this.descriptor.frame.length;
  }

  /** @internal What its copy-before-write holds, in whole clusters. */
  get held(): { readonly granularity: number; readonly length: number } {
    const { clusterSize, clusters } = this.descriptor.frame;
    return { granularity: clusterSize, length: clusterSize * clusters };
  }

  /** @internal Counts of it in bytes, as long as it is not closed. */
  heldCounts(): HeldCounts {
    if (this.#closing !== undefined) return { access: 0, copy: 0, done: 0 };
    return heldCounts(this.#engine.arena, this.#engine.kernels, this.descriptor.frame);
  }

  /** Bytes of old data that guests' writes have put into the scratch file. */
  get savedBytes(): number {
    return this.#closing === undefined
      ? readFrameCounters(this.#engine.arena, this.descriptor.frame).bytesWritten
      : 0;
  }

  /** Lets the instant go; exports of it end. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    await Promise.all([...this.exports].map(([server, name]) => server.removeExport(name)));
    const task = { disk: this.disk.descriptor, frozen: this.descriptor };
    try {
      if (this.descriptor.frame.desk !== undefined) {
        await this.#engine.run<void>({ kind: 'end-frozen', ...task });
        await this.#copies;
      }
      await this.#engine.run<void>({ kind: 'thaw', ...task });
    } finally {
      this.#onClose();
    }
  }
}
