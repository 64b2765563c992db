import { readFileSync } from 'node:fs';
import type { FileDescriptor } from '#src/block/node.js';
import { type FileNode, HostFile } from '#src/block/raw/file.js';
import type { Arena } from '#src/kernels/arena.js';

export interface FileWrite {
  readonly offset: number;
  /** undefined: zeroes */
  readonly bytes: Uint8Array | undefined;
  readonly length: number;
}

/** The descriptor of what is a file of this host. */
export function hostFile({ descriptor }: FileNode): FileDescriptor {
  if (descriptor.driver !== 'file') throw new TypeError(`'${descriptor.path}' is no file`);
  return descriptor;
}

/** A file that remembers what reached it since its last sync: what a power cut may or may not lose. */
export class VolatileFile extends HostFile {
  readonly #recordedArena: Arena;
  durable: Buffer;
  pending: FileWrite[] = [];
  /** Called after every write: the moments at which the power may fail. */
  afterWrite: () => void = () => undefined;

  constructor(arena: Arena, file: FileNode) {
    super(arena, hostFile(file));
    this.#recordedArena = arena;
    this.durable = readFileSync(file.descriptor.path);
  }

  override write(offset: number, pointer: number, length: number): void {
    super.write(offset, pointer, length);
    this.pending.push({ offset, bytes: this.#recordedArena.copyOut(pointer, length), length });
    this.afterWrite();
  }

  override writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    super.writeZeroes(offset, length, mayUnmap);
    this.pending.push({ offset, bytes: undefined, length });
    this.afterWrite();
  }

  override discard(offset: number, length: number): void {
    super.discard(offset, length);
    this.pending.push({ offset, bytes: undefined, length });
    this.afterWrite();
  }

  override flush(): void {
    super.flush();
    this.durable = applied(this.durable, this.pending, () => true);
    this.pending = [];
  }
}

/** The bytes after those sectors of the writes that `survives` picks reached the disk. */
export function applied(base: Buffer, writes: readonly FileWrite[], survives: () => boolean): Buffer {
  const end = writes.reduce((most, write) => Math.max(most, write.offset + write.length), base.length);
  const bytes = Buffer.alloc(end);
  base.copy(bytes);
  for (const write of writes) {
    for (let at = write.offset; at < write.offset + write.length; ) {
      const stop = Math.min(write.offset + write.length, at - (at % 512) + 512);
      if (survives()) {
        if (write.bytes) bytes.set(write.bytes.subarray(at - write.offset, stop - write.offset), at);
        else bytes.fill(0, at, stop);
      }
      at = stop;
    }
  }
  return bytes;
}
