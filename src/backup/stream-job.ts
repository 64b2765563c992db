import type { MessagePort } from 'node:worker_threads';
import type { Disk } from '../block/disk.js';
import { findAbove, type LayeredExtent, layersOf } from '../block/layered-status.js';
import { type BlockNode, STATUS_ALLOCATED } from '../block/node.js';
import type { StillframeError } from '../errors.js';
import type { JobControl } from '../job/control.js';
import type { Runtime } from '../kernels/runtime.js';
import { ChainJob, type ChainJobOptions, type ChainStep, copying, STEP_BYTES } from './chain-job.js';

/**
 * Brings what the layers between an image and its base have into the image, so that the image can lie on the base alone. The
 * layers that are counted begin below the image. Semantics: QMP `block-stream`.
 */
export class StreamJob extends ChainJob {
  readonly #disk: Disk;
  /** Bytes that the last step was about. */
  #wanted = 0;
  #ignored: StillframeError | undefined;

  private constructor(
    runtime: Runtime,
    disk: Disk,
    control: JobControl,
    port: MessagePort,
    options: ChainJobOptions,
  ) {
    super(runtime, control, port, options);
    this.#disk = disk;
  }

  /** From its first status to its last, on the calling thread. It does not throw. */
  static run(
    runtime: Runtime,
    disk: Disk,
    control: JobControl,
    port: MessagePort,
    options: ChainJobOptions,
  ): void {
    new StreamJob(runtime, disk, control, port, options).run();
  }

  protected override get length(): number {
    return this.layers === 0 ? 0 : this.#disk.descriptor.length;
  }

  protected override step(offset: number): ChainStep {
    this.#wanted = Math.min(STEP_BYTES, this.length - offset);
    const { from, length } = copying('read', () =>
      this.#disk.use((node) => this.#find(node, offset, node.length - offset)),
    );
    if (from === undefined) return { length, copied: false };
    this.#wanted = Math.min(length, STEP_BYTES);
    copying('read', () => this.#populate(offset, this.#wanted));
    return { length: this.#wanted, copied: true };
  }

  /** What the image lacks and the layers below it have. */
  #find(node: BlockNode, offset: number, most: number): LayeredExtent {
    const { flags, length } = node.status(offset, most);
    if ((flags & STATUS_ALLOCATED) !== 0) return { length, from: undefined };
    return findAbove(layersOf(node, this.layers + 1).slice(1), offset, length);
  }

  /** Nobody changes the range meanwhile, and for nobody it changes: it is read from elsewhere, and that is all. */
  #populate(offset: number, length: number): void {
    const end = offset + length;
    const { kernels } = this.runtime;
    this.#disk.undisturbed(offset, length, (node) => {
      const target = node.unrecorded ?? node;
      for (let at = offset; at < end; ) {
        // A guest may have written since it was looked at.
        const { from, length: bytes } = this.#find(node, at, end - at);
        if (from === 'zero') target.writeZeroes(at, bytes, false);
        else if (from !== undefined) {
          from.read(at, this.buffer, bytes);
          node.event?.('cor_write');
          if (kernels.isZero(this.buffer, bytes)) target.writeZeroes(at, bytes, false);
          else target.write(at, this.buffer, bytes);
        }
        at += bytes;
      }
    });
  }

  /** The image keeps its backing file then. */
  protected override ignored(error: StillframeError): number {
    this.#ignored ??= error;
    return this.#wanted;
  }

  protected override finished(): void {
    if (this.#ignored !== undefined) throw this.#ignored;
  }

  protected override prepare(): void {
    this.#disk.flush();
  }
}
