import {
  type BigIntStats,
  closeSync,
  constants,
  fdatasyncSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { resolve } from 'node:path';
import { StillframeError, systemError } from '../../errors.js';
import type { Arena } from '../../kernels/arena.js';
import { withLock } from '../../kernels/futex.js';
import type { Runtime } from '../../kernels/runtime.js';
import { type LockMode, lockImage, shrinkLock, UNLOCKED } from '../../os/image-lock.js';
import { syscalls } from '../../os/index.js';
import { attachNbd, closeNbd } from '../nbd/index.js';
import { NestedFile } from '../nested.js';
import {
  type BlockNode,
  type Extent,
  type FileDescriptor,
  type FileNode,
  type HostRange,
  type NodeDescriptor,
  STATUS_ALLOCATED,
  STATUS_DATA,
  STATUS_ZERO,
  type StorageDescriptor,
} from '../node.js';
import { withTraits } from '../traits.js';

export type { FileNode } from '../node.js';

export interface OpenFileOptions {
  readonly readOnly: boolean;
  readonly lock: LockMode;
  /** For files that are written once and then made durable: targets of backups. Default false. */
  readonly writeBehind?: boolean | undefined;
  /**
   * `truncate`: make the file where it is missing and empty it where it is not, once it is locked. `private`: make it,
   * for nobody else to read. Links are not followed.
   */
  readonly create?: 'truncate' | 'private' | undefined;
}

// Control block: length float64 at +0, lock int32 at +8, int32 at +12 that changes whenever data becomes a hole.
const CONTROL_BYTES = 16;
const HOLES = 12;
const LENGTH_LOCK = 8;
/** Most bytes one system call moves. */
const CALL_BYTES = 1 << 30;
/** Lengths are numbers that must stay exact, rounded up to 512 as well. */
const MAX_FILE_BYTES = 2 ** 53 - 512;
/** Smallest write that is worth a system call to start its way to the disk. */
const WRITE_BEHIND_BYTES = 256 * 1024;
/** Codes of a file system that cannot do what was asked in place; writing zeroes does it everywhere. */
const UNSUPPORTED: ReadonlySet<string> = new Set(['EOPNOTSUPP', 'ENOTSUP', 'ENOSYS', 'EINVAL', 'ENODEV']);

let zeroes: Uint8Array | undefined;

function isUnsupported(error: unknown): boolean {
  return error instanceof Error && 'code' in error && UNSUPPORTED.has(String(error.code));
}

/** What a path leads to, links followed; undefined where there is nothing. @throws StillframeError …_PERMISSION, …_IO */
export function statFile(path: string): BigIntStats | undefined {
  try {
    return statSync(path, { bigint: true, throwIfNoEntry: false });
  } catch (error) {
    throw systemError(`cannot look at '${path}'`, error);
  }
}

/** Names what a path leads to: the same for every link to a file, and for every device node of a device. */
export function identityOf(stat: BigIntStats): string {
  return stat.isBlockDevice() ? `device ${stat.rdev}` : `${stat.dev}:${stat.ino}`;
}

/**
 * Opens a file or block device of the host.
 *
 * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_READ_ONLY, …_FORMAT (neither a regular file
 *   nor a block device), …_LOCKED, …_IO
 */
export function openFile(runtime: Runtime, name: string, options: OpenFileOptions): FileDescriptor {
  const path = resolve(name);
  const kind = statFile(path);
  // Looked at before it is opened: opening a FIFO would wait for its other end.
  if (kind !== undefined && !kind.isFile() && !kind.isBlockDevice()) {
    throw new StillframeError(
      'ERR_STILLFRAME_FORMAT',
      `'${path}' is neither a regular file nor a block device and cannot hold an image; check the path`,
    );
  }
  const access = options.readOnly ? constants.O_RDONLY : constants.O_RDWR;
  const own = options.create === 'private';
  const exclusive = own ? constants.O_EXCL : 0;
  const create = options.create === undefined ? 0 : constants.O_CREAT | constants.O_NOFOLLOW | exclusive;
  let fd: number;
  try {
    fd = openSync(path, access | create | constants.O_NONBLOCK, own ? 0o600 : 0o644);
  } catch (error) {
    throw systemError(`cannot open '${path}' for ${options.readOnly ? 'reading' : 'writing'}`, error);
  }
  let made = false;
  try {
    lockImage(fd, path, options.lock);
    made = kind === undefined;
    if (options.create === 'truncate') ftruncateSync(fd, 0);
    const stat = fstatSync(fd, { bigint: true });
    const blockDevice = stat.isBlockDevice();
    const length = blockDevice ? deviceLength(fd, path) : Number(stat.size);
    if (length > MAX_FILE_BYTES) {
      throw new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        `'${path}' has ${stat.size} bytes; more than ${MAX_FILE_BYTES} (2^53 - 512) are not supported`,
      );
    }
    const control = runtime.arena.alloc(CONTROL_BYTES, `state of '${path}'`);
    runtime.arena.f64[control / 8] = length;
    runtime.arena.i32[(control + HOLES) >> 2] = 0;
    return {
      driver: 'file',
      path,
      fd,
      readOnly: options.readOnly,
      blockDevice,
      control,
      identity: identityOf(stat),
      writeBehind: options.writeBehind ?? false,
    };
  } catch (error) {
    closeSync(fd);
    // An empty file of our own making; before the lock was ours it might have been somebody else's.
    if (made) rmSync(path, { force: true });
    throw systemError(`cannot open '${path}'`, error);
  }
}

/**
 * Opens an open file anew, for reading or for writing. The descriptor it had stays open, with its locks: whoever has taken
 * those over closes it, and nobody may use it.
 *
 * @throws StillframeError ERR_STILLFRAME_PERMISSION, …_READ_ONLY, …_IO
 */
export function reopenFile(file: FileDescriptor, readOnly: boolean): FileDescriptor {
  const access = readOnly ? constants.O_RDONLY : constants.O_RDWR;
  try {
    // The name may lead to another file by now.
    const fd = openSync(`/proc/self/fd/${file.fd}`, access | constants.O_NONBLOCK);
    return { ...file, fd, readOnly };
  } catch (error) {
    throw systemError(`cannot open '${file.path}' for ${readOnly ? 'reading' : 'writing'}`, error);
  }
}

/**
 * Looks whether others have made a file longer while it was not locked: it would be cut off at the length that is known when
 * it grows. For any thread.
 */
export function noticeGrowth(arena: Arena, { fd, control, blockDevice }: FileDescriptor): void {
  if (blockDevice) return;
  const { size } = fstatSync(fd);
  if (size > MAX_FILE_BYTES) return;
  const bits = new BigInt64Array(Float64Array.of(size).buffer)[0] ?? 0n;
  for (;;) {
    const known = Atomics.load(arena.i64, control / 8);
    // Bits of lengths are in the order of the lengths.
    if (known >= bits || Atomics.compareExchange(arena.i64, control / 8, known, bits) === known) return;
  }
}

/** Length in bytes of a block device; its stat says 0. Without the FFI by looking for the last byte to be read. */
function deviceLength(fd: number, path: string): number {
  if (syscalls !== undefined) return syscalls.seekEnd(fd);
  const probe = new Uint8Array(512);
  let [low, high] = [0, 2 ** 52];
  while (low < high) {
    const middle = Math.floor((low + high) / 1024) * 512;
    if (readSync(fd, probe, 0, 512, middle) === 512) low = middle + 512;
    else high = middle;
  }
  if (low === 0)
    throw new StillframeError('ERR_STILLFRAME_IO', `cannot find the size of the device '${path}'`);
  return low;
}

/** The graph has this file as a part of itself: it says here how its nodes are attached, where one is below a file. */
let attachBelow: (runtime: Runtime, descriptor: NodeDescriptor) => BlockNode = () => {
  throw new Error('invariant: nothing is below a file without a graph');
};

export function attachBelowWith(attach: typeof attachBelow): void {
  attachBelow = attach;
}

/** This thread's facade of what an image lies on. */
export function attachFile(runtime: Runtime, descriptor: StorageDescriptor): FileNode {
  return withTraits(runtime, descriptor, attachStorage(runtime, descriptor), false);
}

function attachStorage(runtime: Runtime, descriptor: StorageDescriptor): FileNode {
  if (descriptor.driver === 'nbd') return attachNbd(runtime, descriptor);
  if (descriptor.driver === 'nested') {
    const { node, file } = descriptor;
    return new NestedFile(runtime, descriptor, attachBelow(runtime, node), file && attachFile(runtime, file));
  }
  return new HostFile(runtime.arena, descriptor);
}

export function closeFile(runtime: Runtime, descriptor: StorageDescriptor): void {
  if (descriptor.driver === 'nbd') {
    closeNbd(runtime, descriptor);
    return;
  }
  // Whoever has made it of other nodes closes those.
  if (descriptor.driver === 'nested') return;
  runtime.arena.free(descriptor.control);
  try {
    closeDescriptor(descriptor.fd);
  } catch (error) {
    throw systemError(`cannot close '${descriptor.path}'`, error);
  }
}

/** Gives back the locks of a descriptor, and it: a program that is being started has it too, for a moment, and would keep them. */
export function closeDescriptor(fd: number): void {
  shrinkLock(fd, UNLOCKED);
  closeSync(fd);
}

/** Driver `file`. Reads beyond the end give zeroes; writes beyond it make the file longer. */
export class HostFile implements FileNode {
  readonly descriptor: FileDescriptor;
  readonly readOnly: boolean;
  readonly clusterSize = undefined;
  readonly backing = undefined;
  readonly fixedLength: boolean;
  readonly #arena: Arena;
  // The last extent of data that was seen, for as long as we make no holes. Some file systems look at every page up to
  // the next hole, and data that others have made one meanwhile still reads right; the opposite could not be kept so.
  #dataStart = 0;
  #dataEnd = 0;
  #holes = 0;

  constructor(arena: Arena, descriptor: FileDescriptor) {
    this.descriptor = descriptor;
    this.readOnly = descriptor.readOnly;
    this.fixedLength = descriptor.blockDevice;
    this.#arena = arena;
  }

  get length(): number {
    return this.#arena.f64[this.descriptor.control / 8] ?? 0;
  }

  read(offset: number, pointer: number, length: number): void {
    this.#readBytes(offset, this.#arena.u8, pointer, length);
  }

  readBytes(offset: number, bytes: Uint8Array): void {
    this.#readBytes(offset, bytes, 0, bytes.length);
  }

  #readBytes(offset: number, bytes: Uint8Array, start: number, length: number): void {
    const { fd } = this.descriptor;
    let done = 0;
    while (done < length) {
      const wanted = Math.min(length - done, CALL_BYTES);
      const got = this.#attempt('read', offset + done, wanted, () =>
        readSync(fd, bytes, start + done, wanted, offset + done),
      );
      if (got === 0) break;
      done += got;
    }
    if (done < length) bytes.fill(0, start + done, start + length);
  }

  write(offset: number, pointer: number, length: number): void {
    this.#writeBytes(offset, this.#arena.u8, pointer, length);
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    const units = Math.ceil(length / unit);
    const skipped = (index: number): boolean =>
      (((this.#arena.u32[(skip >> 2) + (index >> 5)] ?? 0) >>> (index & 31)) & 1) === 1;
    let index = 0;
    while (index < units) {
      const first = index;
      const skipping = skipped(first);
      while (index < units && skipped(index) === skipping) index++;
      const start = first * unit;
      if (!skipping) this.write(offset + start, pointer + start, Math.min(index * unit, length) - start);
    }
  }

  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#checkWritable('write zeroes', offset, length);
    if (this.writeZeroesFast(offset, length, mayUnmap)) return;
    const inside = Math.max(0, Math.min(length, this.length - offset));
    this.#writeZeroBytes(offset, inside);
    if (inside < length) this.extend(offset + length);
  }

  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    this.#checkWritable('write zeroes', offset, length);
    const inside = Math.max(0, Math.min(length, this.length - offset));
    if (inside > 0 && !this.#zeroInPlace(offset, inside, mayUnmap)) return false;
    if (inside < length) this.extend(offset + length);
    return true;
  }

  #writeZeroBytes(offset: number, length: number): void {
    zeroes ??= new Uint8Array(1 << 20);
    for (let done = 0; done < length; done += zeroes.length) {
      this.#writeBytes(offset + done, zeroes, 0, Math.min(zeroes.length, length - done));
    }
  }

  discard(offset: number, length: number): void {
    this.#checkWritable('discard', offset, length);
    const inside = Math.min(length, this.length - offset);
    if (inside > 0) this.#zeroInPlace(offset, inside, true);
  }

  flush(): void {
    if (this.readOnly) return;
    this.#attempt('flush', 0, 0, () => fdatasyncSync(this.descriptor.fd));
  }

  hostRange(offset: number, length: number): HostRange | undefined {
    return offset + length > this.length ? undefined : { fd: this.descriptor.fd, offset };
  }

  status(offset: number, length: number): Extent {
    const { fd } = this.descriptor;
    const end = offset + length;
    const hole = (stop: number): Extent => ({
      length: Math.min(stop, end) - offset,
      flags: STATUS_ZERO | STATUS_ALLOCATED,
      hostOffset: offset,
    });
    const data = (stop: number): Extent => ({
      length: Math.min(stop, end) - offset,
      flags: STATUS_DATA | STATUS_ALLOCATED,
      hostOffset: offset,
    });
    if (offset >= this.length) return hole(end);
    if (syscalls === undefined || this.descriptor.blockDevice) return data(Math.min(end, this.length));
    const holes = Atomics.load(this.#arena.i32, (this.descriptor.control + HOLES) >> 2);
    if (holes === this.#holes && offset >= this.#dataStart && offset < this.#dataEnd)
      return data(this.#dataEnd);
    const firstData = this.#attempt('find data', offset, length, () => syscalls?.seekData(fd, offset));
    if (firstData === undefined) return hole(end);
    if (firstData > offset) return hole(firstData);
    const firstHole = this.#attempt('find a hole', offset, length, () => syscalls?.seekHole(fd, offset));
    this.#holes = holes;
    this.#dataStart = offset;
    this.#dataEnd = firstHole !== undefined && firstHole > offset ? firstHole : end;
    return data(this.#dataEnd);
  }

  /**
   * Takes the space of a range that reads as zeroes: `falloc` from the file system, `full` by writing zeroes.
   * A file system that cannot give space gets zeroes written.
   */
  preallocate(offset: number, length: number, mode: 'falloc' | 'full'): void {
    this.#checkWritable('preallocate', offset, length);
    if (length === 0 || (mode === 'falloc' && this.#allocate(offset, length))) return;
    this.#writeZeroBytes(offset, length);
  }

  #allocate(offset: number, length: number): boolean {
    if (syscalls === undefined) return false;
    this.extend(offset + length);
    try {
      syscalls.allocate(this.descriptor.fd, offset, length);
    } catch (error) {
      if (isUnsupported(error)) return false;
      throw this.#error('preallocate', offset, length, error);
    }
    return true;
  }

  reserve(end: number): boolean {
    const { fd, blockDevice } = this.descriptor;
    if (syscalls === undefined || blockDevice || this.readOnly) return false;
    const { allocate } = syscalls;
    return withLock(this.#arena, this.descriptor.control + LENGTH_LOCK, () => {
      const { length } = this;
      if (end <= length) return true;
      try {
        allocate(fd, length, end - length);
      } catch {
        // A part of the space may have been taken.
        this.#attempt('truncate to', length, 0, () => ftruncateSync(fd, length));
        return false;
      }
      this.#arena.f64[this.descriptor.control / 8] = end;
      return true;
    });
  }

  allocatedBytes(): number {
    return this.#attempt('look at', 0, 0, () => fstatSync(this.descriptor.fd).blocks * 512);
  }

  truncate(length: number): void {
    this.#checkWritable('truncate', length, 0);
    withLock(this.#arena, this.descriptor.control + LENGTH_LOCK, () => {
      this.#attempt('truncate to', length, 0, () => ftruncateSync(this.descriptor.fd, length));
      this.#arena.f64[this.descriptor.control / 8] = length;
    });
    this.#madeHole();
  }

  #madeHole(): void {
    Atomics.add(this.#arena.i32, (this.descriptor.control + HOLES) >> 2, 1);
  }

  /**
   * Makes the file at least `length` bytes long. Nothing else ever does: a file made longer by a write itself could be
   * cut again by a thread that extends it to less, knowing only the old length.
   */
  extend(length: number): void {
    if (length <= this.length) return;
    withLock(this.#arena, this.descriptor.control + LENGTH_LOCK, () => {
      if (length <= this.length) return;
      this.#attempt('truncate to', length, 0, () => ftruncateSync(this.descriptor.fd, length));
      this.#arena.f64[this.descriptor.control / 8] = length;
    });
  }

  #writeBytes(offset: number, bytes: Uint8Array, start: number, length: number): void {
    this.#checkWritable('write', offset, length);
    const { fd, blockDevice } = this.descriptor;
    if (!blockDevice) this.extend(offset + length);
    let done = 0;
    while (done < length) {
      const wanted = Math.min(length - done, CALL_BYTES);
      const put = this.#attempt('write', offset + done, wanted, () =>
        writeSync(fd, bytes, start + done, wanted, offset + done),
      );
      if (put === 0) {
        throw new StillframeError(
          'ERR_STILLFRAME_NO_SPACE',
          `cannot write ${wanted} bytes at ${offset + done} of '${this.descriptor.path}': nothing was taken`,
          { errno: 'ENOSPC' },
        );
      }
      done += put;
    }
    if (this.descriptor.writeBehind && length >= WRITE_BEHIND_BYTES) this.#startWriteback(offset, length);
  }

  /** Only a start: what goes wrong shows when the file is flushed. */
  #startWriteback(offset: number, length: number): void {
    try {
      syscalls?.startWriteback(this.descriptor.fd, offset, length);
    } catch {
      // Not every file system can.
    }
  }

  /** False where the file system cannot. */
  #zeroInPlace(offset: number, length: number, mayUnmap: boolean): boolean {
    if (syscalls === undefined) return false;
    const { fd } = this.descriptor;
    try {
      if (mayUnmap) syscalls.punchHole(fd, offset, length);
      else syscalls.zeroRange(fd, offset, length);
      this.#madeHole();
      return true;
    } catch (error) {
      if (isUnsupported(error)) return false;
      throw this.#error('zero', offset, length, error);
    }
  }

  #checkWritable(what: string, offset: number, length: number): void {
    if (!this.readOnly) return;
    throw new StillframeError(
      'ERR_STILLFRAME_READ_ONLY',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' is open read-only`,
    );
  }

  #attempt<T>(what: string, offset: number, length: number, call: () => T): T {
    for (;;) {
      try {
        return call();
      } catch (error) {
        if (error instanceof Error && 'code' in error && error.code === 'EINTR') continue;
        throw this.#error(what, offset, length, error);
      }
    }
  }

  #error(what: string, offset: number, length: number, error: unknown): StillframeError {
    const { path } = this.descriptor;
    if (length === 0) return systemError(`cannot ${what} '${path}'`, error);
    return systemError(`cannot ${what} ${length} bytes at ${offset} of '${path}'`, error);
  }
}
