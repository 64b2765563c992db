import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, Extent, HostRange, RawDescriptor, StorageDescriptor } from '../node.js';
import { attachFile, type FileNode } from './file.js';

/** Sizes of images are multiples of this many bytes. */
const SECTOR = 512;

/** Driver `raw`: the bytes of a file are the bytes of the drive, padded with zeroes to a multiple of 512. */
export function openRaw(runtime: Runtime, file: StorageDescriptor, part: RawPart = {}): RawDescriptor {
  const { offset = 0, size, readOnly = false } = part;
  const total = attachFile(runtime, file).length;
  const invalid = (what: string): StillframeError =>
    new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', what);
  if (offset > total) {
    throw invalid(`Offset (${offset}) cannot be greater than size of the containing file (${total})`);
  }
  if (size !== undefined && size > total - offset) {
    throw invalid(
      `The sum of offset (${offset}) and size (${size}) has to be smaller or equal to the  actual size of the containing file (${total})`,
    );
  }
  if (size !== undefined && size % SECTOR !== 0) throw invalid(`Specified size is not multiple of ${SECTOR}`);
  const length = Math.ceil((size ?? total - offset) / SECTOR) * SECTOR;
  return { driver: 'raw', path: file.path, readOnly: readOnly || file.readOnly, file, length, offset, size };
}

/** Which part of its file a raw image is; offsets and sizes in bytes. Default: all of it. */
export interface RawPart {
  readonly offset?: number | undefined;
  readonly size?: number | undefined;
  /** Nobody writes, whoever else writes to the file. Default: as the file is open. */
  readonly readOnly?: boolean | undefined;
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
  readonly #start: number;

  constructor(descriptor: RawDescriptor, file: FileNode) {
    this.descriptor = descriptor;
    this.length = descriptor.length;
    this.readOnly = descriptor.readOnly;
    this.#file = file;
    this.#start = descriptor.offset ?? 0;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#check('read', offset, length);
    this.#file.event?.('read_aio');
    this.#file.read(this.#start + offset, pointer, length);
  }

  write(offset: number, pointer: number, length: number): void {
    this.#check('write', offset, length);
    this.#file.event?.('write_aio');
    this.#file.write(this.#start + offset, pointer, length);
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#check('write', offset, length);
    this.#file.event?.('write_aio');
    this.#file.writeUnits(this.#start + offset, pointer, length, unit, skip);
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#check('write zeroes', offset, length);
    this.#file.writeZeroes(this.#start + offset, length, mayUnmap);
  }

  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    this.#check('write zeroes', offset, length);
    return this.#file.writeZeroesFast?.(this.#start + offset, length, mayUnmap) ?? false;
  }

  discard(offset: number, length: number): void {
    this.#check('discard', offset, length);
    this.#file.discard(this.#start + offset, length);
  }

  flush(): void {
    this.#file.event?.('flush_to_os');
    this.#file.event?.('flush_to_disk');
    this.#file.flush();
  }

  hostRange(offset: number, length: number): HostRange | undefined {
    this.#check('look at', offset, length);
    return this.#file.hostRange?.(this.#start + offset, length);
  }

  status(offset: number, length: number): Extent {
    this.#check('look at', offset, length);
    return this.#file.status(this.#start + offset, length);
  }

  #check(what: string, offset: number, length: number): void {
    if (offset >= 0 && length >= 0 && offset + length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' has ${this.length} bytes`,
    );
  }
}
