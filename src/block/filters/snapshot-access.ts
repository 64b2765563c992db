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
import { brokenFrameError, CLUSTER_DONE, CLUSTER_NONE, type Frame } from './copy-before-write.js';

/** How far the status of what was not saved is looked at at once: guests' writes there wait for it. */
const STATUS_BYTES = 64 * 1024 * 1024;

/**
 * The drive as a frame holds it: what was saved comes from the frame's target, the rest from the live disk, which has
 * not changed there since the instant. What is read from the disk is kept from being changed for as long as that takes.
 * Clusters that are not in the frame's plan, or were discarded, cannot be read.
 */
export class SnapshotAccess implements BlockNode {
  readonly descriptor: NodeDescriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly clusterSize = undefined;
  readonly backing = undefined;
  readonly #runtime: Runtime;
  readonly #disk: Disk;
  readonly #frame: Frame;

  /** @param readOnly nothing of it may be discarded either */
  constructor(runtime: Runtime, disk: Disk, frame: Frame, readOnly = true) {
    this.descriptor = disk.descriptor.node;
    this.length = frame.descriptor.length;
    this.readOnly = readOnly;
    this.#runtime = runtime;
    this.#disk = disk;
    this.#frame = frame;
  }

  /** @throws StillframeError ERR_STILLFRAME_BROKEN_FRAME and what reading the two throws */
  read(offset: number, pointer: number, length: number): void {
    const end = offset + length;
    for (let at = offset; at < end; ) {
      const { found, stop } = this.#run(at, end);
      const to = pointer + at - offset;
      if (found === 'nowhere') throw this.#gone(at);
      if (found === 'saved') this.#frame.target.read(at, to, stop - at);
      else this.#disk.undisturbed(at, stop - at, () => this.#readHeld(at, to, stop));
      at = stop;
    }
    if (this.#frame.broken) throw brokenFrameError('the frozen drive cannot be read');
  }

  /** Nobody changes the range meanwhile; but it may have been saved and changed since it was looked at. */
  #readHeld(offset: number, pointer: number, end: number): void {
    for (let at = offset; at < end; ) {
      const { found, stop } = this.#run(at, end);
      if (found === 'nowhere') throw this.#gone(at);
      const node = found === 'live' ? this.#disk.node : this.#frame.target;
      node.read(at, pointer + at - offset, stop - at);
      at = stop;
    }
  }

  /**
   * Where the content of the cluster at `offset` is, and how far that goes on: on the live disk, saved, or nowhere, since
   * the cluster is not in the plan.
   */
  #run(offset: number, end: number): { readonly found: 'live' | 'saved' | 'nowhere'; readonly stop: number } {
    const { clusterSize, states } = this.#frame.descriptor;
    const { kernels } = this.#runtime;
    const first = Math.floor(offset / clusterSize);
    const last = Math.ceil(end / clusterSize);
    const state = kernels.clusterState(states, first);
    const found = state === CLUSTER_DONE ? 'saved' : state === CLUSTER_NONE ? 'nowhere' : 'live';
    let stop = end;
    const until = (cluster: number): void => {
      if (cluster >= 0) stop = Math.min(stop, cluster * clusterSize);
    };
    if (found !== 'live') until(kernels.clustersNextPending(states, first + 1, last));
    if (found !== 'saved') until(kernels.clustersNext(states, first + 1, last, CLUSTER_DONE));
    if (found !== 'nowhere') until(kernels.clustersNext(states, first + 1, last, CLUSTER_NONE));
    return { found, stop };
  }

  status(offset: number, length: number): Extent {
    if (this.#frame.broken) throw brokenFrameError('the frozen drive cannot be read');
    const { found, stop } = this.#run(offset, offset + length);
    if (found !== 'live') return this.#extent(found, offset, stop - offset);
    const most = Math.min(stop - offset, STATUS_BYTES);
    let extent: Extent | undefined;
    this.#disk.undisturbed(offset, most, () => {
      const now = this.#run(offset, offset + most);
      extent = this.#extent(now.found, offset, now.stop - offset);
    });
    if (extent === undefined) throw new Error('invariant: it was looked at');
    return extent;
  }

  #extent(found: 'live' | 'saved' | 'nowhere', offset: number, length: number): Extent {
    if (found === 'nowhere') {
      if (!this.#frame.descriptor.skipUnallocated) throw this.#gone(offset);
      return { length, flags: 0, hostOffset: -1 };
    }
    // Of frames that plan only what the topmost image holds, what is saved was there.
    const top = found === 'live' && this.#frame.descriptor.skipUnallocated;
    const node = found === 'live' ? this.#disk.node : this.#frame.target;
    const extent = top ? node.status(offset, length) : chainStatus(node, offset, length);
    if (top && (extent.flags & STATUS_ALLOCATED) === 0) {
      return { length: extent.length, flags: 0, hostOffset: -1 };
    }
    const flags = STATUS_ALLOCATED | (extent.flags & STATUS_ZERO ? STATUS_ZERO : STATUS_DATA);
    return { length: extent.length, flags, hostOffset: -1 };
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

  /** Nobody will want the range any more: whole clusters of it are not held from now on (QEMU's `snapshot-access`). */
  discard(offset: number, length: number): void {
    const { clusterSize, clusters } = this.#frame.descriptor;
    const first = Math.ceil(offset / clusterSize);
    const end = offset + length === this.length ? clusters : Math.floor((offset + length) / clusterSize);
    if (end > first) this.#frame.forget(first * clusterSize, Math.min(end * clusterSize, this.length));
  }

  flush(): void {
    // Nothing of ours is to be made durable.
  }

  #gone(offset: number): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_PERMISSION',
      `'${this.#disk.descriptor.node.path}', as it is frozen, cannot be read at ${offset}: that place is not held, or was given up`,
      { errno: 'EACCES' },
    );
  }

  #refuse(): never {
    throw new StillframeError(
      'ERR_STILLFRAME_READ_ONLY',
      `'${this.#disk.descriptor.node.path}', as it is frozen, cannot be written to; write to the live disk`,
      { errno: 'ENOTSUP' },
    );
  }
}
