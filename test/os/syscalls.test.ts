import {
  closeSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadSyscalls } from '#src/os/syscalls.js';

const syscalls = loadSyscalls();
/** A multiple of every block size a file system is likely to have. */
const BLOCK = 65536;
let folder: string;
let fd: number;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-os-'));
  fd = openSync(join(folder, 'file'), 'w+');
});
afterEach(() => {
  closeSync(fd);
  rmSync(folder, { recursive: true });
});

function fill(block: number, count: number, value: number): void {
  writeSync(fd, Buffer.alloc(BLOCK * count, value), 0, BLOCK * count, block * BLOCK);
}

describe('seekData and seekHole', () => {
  it('find where data and holes begin, beyond 4 GiB too', () => {
    const far = 2 ** 33 / BLOCK;
    ftruncateSync(fd, 2 ** 40);
    fill(2, 3, 1);
    fill(far, 1, 2);
    expect(syscalls.seekData(fd, 0)).toBe(2 * BLOCK);
    expect(syscalls.seekData(fd, 3 * BLOCK + 5)).toBe(3 * BLOCK + 5);
    expect(syscalls.seekHole(fd, 0)).toBe(0);
    expect(syscalls.seekHole(fd, 2 * BLOCK)).toBe(5 * BLOCK);
    expect(syscalls.seekData(fd, 5 * BLOCK)).toBe(2 ** 33);
    expect(syscalls.seekHole(fd, 2 ** 33)).toBe(2 ** 33 + BLOCK);
    expect(syscalls.seekData(fd, 2 ** 34)).toBeUndefined();
  });

  it('know the end of the file', () => {
    fill(0, 1, 1);
    expect(syscalls.seekHole(fd, 0)).toBe(BLOCK);
    expect(syscalls.seekData(fd, BLOCK)).toBeUndefined();
    expect(syscalls.seekHole(fd, BLOCK)).toBeUndefined();
  });
});

describe('punchHole and zeroRange', () => {
  it.each(['punchHole', 'zeroRange'] as const)(
    '%s makes exactly the range zero and keeps the length',
    (name) => {
      fill(0, 4, 7);
      try {
        syscalls[name](fd, 1000, 2 * BLOCK);
      } catch (error) {
        // Not every file system can do it; saying so is right then.
        expect(error).toMatchObject({ code: 'EOPNOTSUPP', syscall: 'fallocate' });
        return;
      }
      const bytes = readFileSync(join(folder, 'file'));
      expect(bytes.length).toBe(4 * BLOCK);
      const expected = Buffer.alloc(4 * BLOCK, 7).fill(0, 1000, 1000 + 2 * BLOCK);
      expect(bytes.equals(expected)).toBe(true);
      const blocks = statSync(join(folder, 'file')).blocks * 512;
      if (name === 'punchHole') expect(blocks).toBeLessThan(4 * BLOCK);
    },
  );
});

describe('copyFileRange', () => {
  it('copies between files, short at the end of the input', () => {
    fill(0, 1, 3);
    const out = openSync(join(folder, 'out'), 'w+');
    try {
      expect(syscalls.copyFileRange(fd, 100, out, 4096, 1000)).toBe(1000);
      expect(syscalls.copyFileRange(fd, BLOCK - 10, out, 0, 1000)).toBe(10);
      expect(syscalls.copyFileRange(fd, BLOCK, out, 0, 1000)).toBe(0);
      const bytes = readFileSync(join(folder, 'out'));
      expect(bytes.length).toBe(5096);
      expect(bytes.subarray(4096).every((byte) => byte === 3)).toBe(true);
      expect(bytes.subarray(0, 10).every((byte) => byte === 3)).toBe(true);
      expect(bytes.subarray(10, 4096).every((byte) => byte === 0)).toBe(true);
    } finally {
      closeSync(out);
    }
  });
});

describe('locks', () => {
  it('hold between descriptors of one file, shared ones side by side', () => {
    const other = openSync(join(folder, 'file'), 'r+');
    try {
      expect(syscalls.isLocked(other, 100, 1)).toBe(false);
      expect(syscalls.lockShared(fd, 100, 1)).toBe(true);
      expect(syscalls.isLocked(other, 100, 1)).toBe(true);
      expect(syscalls.isLocked(other, 101, 1)).toBe(false);
      // One's own lock is in nobody's way.
      expect(syscalls.isLocked(fd, 100, 1)).toBe(false);
      expect(syscalls.lockShared(other, 100, 1)).toBe(true);
      expect(syscalls.isLocked(fd, 100, 1)).toBe(true);
      syscalls.lockShared(other, 100, 1, true);
      expect(syscalls.isLocked(fd, 100, 1)).toBe(false);
    } finally {
      closeSync(other);
    }
  });
});

describe('a failing system call', () => {
  it.each<[string, () => unknown, string]>([
    ['seekData', () => syscalls.seekData(-1, 0), 'lseek'],
    ['punchHole', () => syscalls.punchHole(-1, 0, 1), 'fallocate'],
    ['copyFileRange', () => syscalls.copyFileRange(-1, 0, -1, 0, 1), 'copy_file_range'],
    ['isLocked', () => syscalls.isLocked(-1, 0, 1), 'fcntl'],
    ['startWriteback', () => syscalls.startWriteback(-1, 0, 1), 'sync_file_range'],
  ])('%s throws an error like those of Node', (_, call, syscall) => {
    expect(call).toThrow(expect.objectContaining({ code: 'EBADF', errno: -9, syscall }));
  });
});
