import { createRequire } from 'node:module';
import { getSystemErrorMap } from 'node:util';

/**
 * The system calls of Linux that Node does not offer. Offsets and lengths are bytes. Failures are `Error`s with
 * `code` (errno name), `errno` (negative) and `syscall`, as Node's own are.
 */
export interface Syscalls {
  /** First byte of data at or after `offset`, undefined where only a hole follows. */
  seekData(fd: number, offset: number): number | undefined;
  /** First byte of a hole at or after `offset` (the end of the file counts as one). */
  seekHole(fd: number, offset: number): number | undefined;
  /** Length of a file or block device. */
  seekEnd(fd: number): number;
  /** Frees the range of the file; it reads as zeroes. */
  punchHole(fd: number, offset: number, length: number): void;
  /** Makes the range read as zeroes and keeps its space allocated. */
  zeroRange(fd: number, offset: number, length: number): void;
  /** Takes the space of the range; what is there stays, and the file becomes as long as the range needs. */
  allocate(fd: number, offset: number, length: number): void;
  /** Copies inside the kernel. @returns the bytes copied, 0 at the end of the input */
  copyFileRange(fdIn: number, offsetIn: number, fdOut: number, offsetOut: number, length: number): number;
  /** Takes (or with `unlock` drops) a shared OFD lock. @returns false where somebody's exclusive lock is in the way */
  lockShared(fd: number, start: number, length: number, unlock?: boolean): boolean;
  /** Whether somebody else's lock would keep us from an exclusive OFD lock. */
  isLocked(fd: number, start: number, length: number): boolean;
  /** Starts writing dirty pages of the range out, without waiting. */
  startWriteback(fd: number, offset: number, length: number): void;
}

const SEEK_END = 2;
const SEEK_DATA = 3;
const SEEK_HOLE = 4;
const FALLOC_FL_KEEP_SIZE = 0x01;
const FALLOC_FL_PUNCH_HOLE = 0x02;
const FALLOC_FL_ZERO_RANGE = 0x10;
const F_OFD_GETLK = 36;
const F_OFD_SETLK = 37;
const F_RDLCK = 0;
const F_WRLCK = 1;
const F_UNLCK = 2;
const SYNC_FILE_RANGE_WRITE = 2;

/** The part of koffi that is used; its own types are far wider. */
interface Koffi {
  load(path: string | null): { func(prototype: string): (...args: unknown[]) => unknown };
  errno(): number;
}

class SystemCallError extends Error {
  readonly code: string;
  readonly errno: number;
  readonly syscall: string;

  constructor(syscall: string, errno: number) {
    const [code, text] = getSystemErrorMap().get(-errno) ?? [`E${errno}`, 'unknown error'];
    super(`${code}: ${text}, ${syscall}`);
    this.code = code;
    this.errno = -errno;
    this.syscall = syscall;
  }
}

/** struct flock of 64-bit Linux: type int16, whence int16, (pad), start int64, length int64, pid int32. */
function flock(type: number, start: number, length: number): Uint8Array {
  const bytes = new Uint8Array(32);
  const view = new DataView(bytes.buffer);
  view.setInt16(0, type, true);
  view.setBigInt64(8, BigInt(start), true);
  view.setBigInt64(16, BigInt(length), true);
  return bytes;
}

/** @throws Error where the FFI has no binary for this platform */
export function loadSyscalls(): Syscalls {
  const koffi: Koffi = createRequire(import.meta.url)('koffi');
  const libc = koffi.load(null);
  const lseek = libc.func('int64 lseek(int fd, int64 offset, int whence)');
  const fallocate = libc.func('int fallocate(int fd, int mode, int64 offset, int64 length)');
  const copyRange = libc.func(
    'int64 copy_file_range(int in, void *inOffset, int out, void *outOffset, size_t length, unsigned int flags)',
  );
  const fcntl = libc.func('int fcntl(int fd, int command, void *lock)');
  const syncRange = libc.func('int sync_file_range(int fd, int64 offset, int64 length, unsigned int flags)');

  const checked = (syscall: string, result: unknown): number => {
    const value = Number(result);
    if (value < 0) throw new SystemCallError(syscall, koffi.errno());
    return value;
  };
  const seek = (fd: number, offset: number, whence: number): number | undefined => {
    const found = Number(lseek(fd, offset, whence));
    if (found >= 0) return found;
    const error = new SystemCallError('lseek', koffi.errno());
    if (error.code === 'ENXIO') return undefined;
    throw error;
  };
  return {
    seekData: (fd, offset) => seek(fd, offset, SEEK_DATA),
    seekHole: (fd, offset) => seek(fd, offset, SEEK_HOLE),
    seekEnd: (fd) => checked('lseek', lseek(fd, 0, SEEK_END)),
    punchHole(fd, offset, length) {
      checked('fallocate', fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length));
    },
    zeroRange(fd, offset, length) {
      checked('fallocate', fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length));
    },
    allocate(fd, offset, length) {
      checked('fallocate', fallocate(fd, 0, offset, length));
    },
    copyFileRange(fdIn, offsetIn, fdOut, offsetOut, length) {
      const from = new BigInt64Array([BigInt(offsetIn)]);
      const to = new BigInt64Array([BigInt(offsetOut)]);
      return checked('copy_file_range', copyRange(fdIn, from, fdOut, to, length, 0));
    },
    lockShared(fd, start, length, unlock = false) {
      if (Number(fcntl(fd, F_OFD_SETLK, flock(unlock ? F_UNLCK : F_RDLCK, start, length))) === 0) return true;
      const error = new SystemCallError('fcntl', koffi.errno());
      if (error.code === 'EAGAIN' || error.code === 'EACCES') return false;
      throw error;
    },
    isLocked(fd, start, length) {
      const lock = flock(F_WRLCK, start, length);
      checked('fcntl', fcntl(fd, F_OFD_GETLK, lock));
      return new DataView(lock.buffer).getInt16(0, true) !== F_UNLCK;
    },
    startWriteback(fd, offset, length) {
      checked('sync_file_range', syncRange(fd, offset, length, SYNC_FILE_RANGE_WRITE));
    },
  };
}
