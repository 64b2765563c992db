import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';
import type { BlockNode, Qcow2Descriptor } from '#src/block/node.js';
import {
  attachQcow2,
  type CreateQcow2Options,
  closeQcow2,
  createQcow2,
  openQcow2,
} from '#src/block/qcow2/index.js';
import { attachFile, closeFile, type FileNode, openFile } from '#src/block/raw/file.js';
import { createRuntime, type Runtime } from '#src/kernels/runtime.js';
import { VolatileFile } from './volatile-file.js';

/** A folder for the test file that calls it, removed at its end. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-qcow2-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

export interface OpenImage {
  readonly descriptor: Qcow2Descriptor;
  readonly file: FileNode;
  readonly node: BlockNode;
  close(): void;
}

export const BUFFER_BYTES = 4 * 1024 * 1024;

/** One runtime with a buffer, and images opened on it. */
export class Workbench {
  readonly runtime: Runtime & ReturnType<typeof createRuntime>;
  readonly buffer: number;

  constructor(arenaBytes = 192 * 1024 * 1024) {
    this.runtime = createRuntime(arenaBytes);
    this.buffer = this.runtime.arena.alloc(BUFFER_BYTES, 'test buffer');
  }

  create(path: string, options: CreateQcow2Options): void {
    const file = openFile(this.runtime, path, { readOnly: false, lock: 'write', create: 'truncate' });
    try {
      createQcow2(this.runtime, attachFile(this.runtime, file), options);
    } finally {
      closeFile(this.runtime, file);
    }
  }

  /** An image to write to, whose file remembers what a power cut may lose. */
  openVolatile(path: string): OpenImage & { readonly file: VolatileFile } {
    const wrap = (plain: FileNode): FileNode => new VolatileFile(this.runtime.arena, plain);
    const image = this.open(path, false, undefined, wrap);
    const { file } = image;
    if (file instanceof VolatileFile) return { ...image, file };
    throw new Error('the file was not wrapped');
  }

  /** @param wrap makes the file node the image works on out of the plain one */
  open(path: string, readOnly: boolean, backing?: OpenImage, wrap = (file: FileNode) => file): OpenImage {
    const { runtime } = this;
    const opened = openFile(runtime, path, { readOnly, lock: readOnly ? 'read' : 'write' });
    let descriptor: Qcow2Descriptor;
    try {
      descriptor = openQcow2(runtime, opened, backing?.descriptor, { readOnly });
    } catch (error) {
      closeFile(runtime, opened);
      throw error;
    }
    const file = wrap(attachFile(runtime, opened));
    return {
      descriptor,
      file,
      node: attachQcow2(runtime, descriptor, file, backing?.node),
      close: () => {
        try {
          closeQcow2(runtime, descriptor, file);
        } finally {
          closeFile(runtime, opened);
        }
      },
    };
  }

  write(node: BlockNode, offset: number, bytes: Uint8Array): void {
    this.runtime.arena.u8.set(bytes, this.buffer);
    node.write(offset, this.buffer, bytes.length);
  }

  /** Whole clusters, or up to the end of the drive. */
  writeCompressed(node: BlockNode, offset: number, bytes: Uint8Array): void {
    if (node.writeCompressed === undefined) throw new TypeError('the node does not compress');
    this.runtime.arena.u8.set(bytes, this.buffer);
    node.writeCompressed(offset, this.buffer, bytes.length);
  }

  read(node: BlockNode, offset: number, length: number): Buffer {
    const parts: Uint8Array[] = [];
    for (let done = 0; done < length; done += BUFFER_BYTES) {
      const bytes = Math.min(BUFFER_BYTES, length - done);
      // Whatever a read leaves alone shows.
      this.runtime.arena.u8.fill(0xee, this.buffer, this.buffer + bytes);
      node.read(offset + done, this.buffer, bytes);
      parts.push(this.runtime.arena.copyOut(this.buffer, bytes));
    }
    return Buffer.concat(parts);
  }
}
