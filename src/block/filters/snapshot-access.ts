import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { Disk } from '../disk.js';
import {
  type BlockNode,
  type Extent,
  type NodeDescriptor,
  STATUS_ALLOCATED,
  STATUS_DATA,
  STATUS_ZERO,
} from '../node.js';
import { chainStatus } from '../status.js';
import { brokenFrameError, CLUSTER_DONE, type Frame, type FrameDescriptor } from './copy-before-write.js';

/** How far the status of what was not saved is looked at at once: guests' writes there wait for it. */
const STATUS_BYTES = 64 * 1024 * 1024;

/**
 * The drive as a frame holds it: what was saved comes from the frame's target, the rest from the live disk, which has
 * not changed there since the instant. What is read from the disk is kept from being changed for as long as that takes.
 * Only for frames that plan every cluster.
 */
export class SnapshotAccess implements BlockNode {
  readonly descriptor: NodeDescriptor;
  readonly length: number;
  readonly readOnly = true;
  readonly clusterSize = undefined;
  readonly backing = undefined;
  readonly #runtime: Runtime;
  readonly #disk: Disk;
  readonly #frame: Frame;

  constructor(runtime: Runtime, disk: Disk, frame: FrameDescriptor) {
    this.descriptor = disk.descriptor.node;
    this.length = frame.length;
    this.#runtime = runtime;
    this.#disk = disk;
    this.#frame = disk.attachFrame(frame);
  }

  /** @throws StillframeError ERR_STILLFRAME_BROKEN_FRAME and what reading the two throws */
  read(offset: number, pointer: number, length: number): void {
    const end = offset + length;
    for (let at = offset; at < end; ) {
      const { saved, stop } = this.#run(at, end);
      const to = pointer + at - offset;
      if (saved) this.#frame.target.read(at, to, stop - at);
      else this.#disk.undisturbed(at, stop - at, () => this.#readHeld(at, to, stop));
      at = stop;
    }
    if (this.#frame.broken) throw brokenFrameError('the frozen drive cannot be read');
  }

  /** Nobody changes the range meanwhile; but it may have been saved and changed since it was looked at. */
  #readHeld(offset: number, pointer: number, end: number): void {
    for (let at = offset; at < end; ) {
      const { saved, stop } = this.#run(at, end);
      const node = saved ? this.#frame.target : this.#disk.node;
      node.read(at, pointer + at - offset, stop - at);
      at = stop;
    }
  }

  /** Whether the old data of the cluster at `offset` is saved, and how far that goes on. */
  #run(offset: number, end: number): { readonly saved: boolean; readonly stop: number } {
    const { clusterSize, states } = this.#frame.descriptor;
    const { kernels } = this.#runtime;
    const first = Math.floor(offset / clusterSize);
    const last = Math.ceil(end / clusterSize);
    const pending = kernels.clustersNextPending(states, first, last);
    if (pending !== first) {
      return { saved: true, stop: pending < 0 ? end : Math.min(end, pending * clusterSize) };
    }
    const done = kernels.clustersNext(states, first, last, CLUSTER_DONE);
    return { saved: false, stop: done < 0 ? end : Math.min(end, done * clusterSize) };
  }

  status(offset: number, length: number): Extent {
    if (this.#frame.broken) throw brokenFrameError('the frozen drive cannot be read');
    const { saved, stop } = this.#run(offset, offset + length);
    if (saved) return this.#extent(this.#frame.target, offset, stop - offset);
    const most = Math.min(stop - offset, STATUS_BYTES);
    let extent: Extent | undefined;
    this.#disk.undisturbed(offset, most, () => {
      const now = this.#run(offset, offset + most);
      extent = this.#extent(now.saved ? this.#frame.target : this.#disk.node, offset, now.stop - offset);
    });
    if (extent === undefined) throw new Error('invariant: it was looked at');
    return extent;
  }

  #extent(node: BlockNode, offset: number, length: number): Extent {
    const found = chainStatus(node, offset, length);
    const flags = STATUS_ALLOCATED | (found.flags & STATUS_ZERO ? STATUS_ZERO : STATUS_DATA);
    return { length: found.length, flags, hostOffset: -1 };
  }

  write(): void {
    this.#refuse();
  }

  writeUnits(): void {
    this.#refuse();
  }

  writeZeroes(): void {
    this.#refuse();
  }

  discard(): void {
    this.#refuse();
  }

  flush(): void {
    // Nothing of ours is to be made durable.
  }

  #refuse(): never {
    throw new StillframeError(
      'ERR_STILLFRAME_READ_ONLY',
      `'${this.#disk.descriptor.node.path}', as it is frozen, cannot be written to; write to the live disk`,
    );
  }
}
