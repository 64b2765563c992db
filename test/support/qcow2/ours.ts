import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import type { BlockNode, NodeDescriptor } from '#src/block/node.js';
import { createRuntime, type Runtime } from '#src/kernels/runtime.js';
import { mapEntries } from '../map.js';
import type { Operation, Patterns } from './operation.js';
import type { MapLine } from './qemu.js';

const BUFFER_BYTES = 4 << 20;

/** Opens images, with their chains, on one runtime. */
export class Ours {
  readonly runtime: Runtime;
  readonly buffer: number;

  constructor(arenaBytes = 192 << 20) {
    this.runtime = createRuntime(arenaBytes);
    this.buffer = this.runtime.arena.alloc(BUFFER_BYTES, 'test buffer');
  }

  open(
    path: string,
    { readOnly, format = 'qcow2' }: { readonly readOnly: boolean; readonly format?: 'raw' | 'qcow2' },
  ): OpenImage {
    return new OpenImage(this, openImage(this.runtime, path, { format, readOnly }));
  }

  /** Opens an image for as long as `body` takes. */
  with<T>(
    path: string,
    options: { readonly readOnly: boolean; readonly format?: 'raw' | 'qcow2' },
    body: (image: OpenImage) => T,
  ): T {
    const image = this.open(path, options);
    let result: T;
    try {
      result = body(image);
    } catch (error) {
      // What went wrong first is what is told.
      try {
        image.close();
      } catch {}
      throw error;
    }
    image.close();
    return result;
  }
}

export class OpenImage {
  readonly node: BlockNode;
  readonly descriptor: NodeDescriptor;
  readonly #ours: Ours;

  constructor(ours: Ours, descriptor: NodeDescriptor) {
    this.#ours = ours;
    this.descriptor = descriptor;
    this.node = attachNode(ours.runtime, descriptor);
  }

  close(): void {
    closeNode(this.#ours.runtime, this.descriptor);
  }

  read(offset: number, length: number): Buffer {
    const { runtime, buffer } = this.#ours;
    const bytes = Buffer.alloc(length);
    for (let done = 0; done < length; done += BUFFER_BYTES) {
      const step = Math.min(BUFFER_BYTES, length - done);
      // Whatever a read leaves alone shows.
      runtime.arena.u8.fill(0xee, buffer, buffer + step);
      this.node.read(offset + done, buffer, step);
      bytes.set(runtime.arena.u8.subarray(buffer, buffer + step), done);
    }
    return bytes;
  }

  content(): Buffer {
    return this.read(0, this.node.length);
  }

  apply(operations: readonly Operation[], patterns: Patterns): void {
    for (const operation of operations) this.#apply(operation, patterns);
  }

  #apply(operation: Operation, patterns: Patterns): void {
    const { node } = this;
    switch (operation.kind) {
      case 'write':
      case 'compressed': {
        const { offset, length, pattern } = operation;
        const { runtime, buffer } = this.#ours;
        const bytes = patterns.bytes(pattern, length);
        for (let done = 0; done < length; done += BUFFER_BYTES) {
          const step = Math.min(BUFFER_BYTES, length - done);
          runtime.arena.u8.set(bytes.subarray(done, done + step), buffer);
          if (operation.kind === 'write') node.write(offset + done, buffer, step);
          else node.writeCompressed?.(offset + done, buffer, step);
        }
        break;
      }
      case 'zeroes':
        node.writeZeroes(operation.offset, operation.length, operation.unmap);
        break;
      case 'discard':
        node.discard(operation.offset, operation.length);
        break;
      case 'flush':
        node.flush();
        break;
    }
  }

  /** As `qemu-img map --output=json` lists it. */
  map(): MapLine[] {
    const entries = mapEntries(this.node, this.descriptor.path);
    return entries.map(({ filename, compressed, ...line }) => line);
  }
}
