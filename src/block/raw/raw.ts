import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, Extent, HostRange, RawDescriptor, StorageDescriptor } from '../node.js';
import { attachFile, type FileNode } from './file.js';

/** Sizes of images are multiples of this many bytes. */
const SECTOR = 512;

/** Driver `raw`: the bytes of a file are the bytes of the drive, padded with zeroes to a multiple of 512. */
export function openRaw(runtime: Runtime, file: StorageDescriptor): RawDescriptor {
  const length = Math.ceil(attachFile(runtime, file).length / SECTOR) * SECTOR;
  return { driver: 'raw', path: file.path, readOnly: file.readOnly, file, length };
}

export function attachRaw(_runtime: Runtime, descriptor: RawDescriptor, file: FileNode): BlockNode {
  return new RawNode(descriptor, file);
}

class RawNode implements BlockNode {
  readonly descriptor: RawDescriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly clusterSize = undefined;
  readonly backing = undefined;
  readonly #file: FileNode;

  constructor(descriptor: RawDescriptor, file: FileNode) {
    this.descriptor = descriptor;
    this.length = descriptor.length;
    this.readOnly = descriptor.readOnly;
    this.#file = file;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#check('read', offset, length);
    this.#file.read(offset, pointer, length);
  }

  write(offset: number, pointer: number, length: number): void {
    this.#check('write', offset, length);
    this.#file.write(offset, pointer, length);
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#check('write', offset, length);
    this.#file.writeUnits(offset, pointer, length, unit, skip);
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#check('write zeroes', offset, length);
    this.#file.writeZeroes(offset, length, mayUnmap);
  }

  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    this.#check('write zeroes', offset, length);
    return this.#file.writeZeroesFast?.(offset, length, mayUnmap) ?? false;
  }

  discard(offset: number, length: number): void {
    this.#check('discard', offset, length);
    this.#file.discard(offset, length);
  }

  flush(): void {
    this.#file.flush();
  }

  hostRange(offset: number, length: number): HostRange | undefined {
    this.#check('look at', offset, length);
    return this.#file.hostRange?.(offset, length);
  }

  status(offset: number, length: number): Extent {
    this.#check('look at', offset, length);
    return this.#file.status(offset, length);
  }

  #check(what: string, offset: number, length: number): void {
    if (offset >= 0 && length >= 0 && offset + length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' has ${this.length} bytes`,
    );
  }
}
