import { StillframeError } from '../errors.js';
import { syscalls } from './index.js';

/**
 * Image locks as QEMU takes them, so that a running QEMU and we keep each other out. A permission that is used is a
 * shared lock on byte 100 + its number, a permission that others must not use one on byte 200 + its number. Whoever
 * comes later looks whether the opposite byte is locked by somebody else.
 */
export interface ImageLock {
  /** Bits of permissions. */
  readonly used: number;
  /** Those that others must not use. */
  readonly unshared: number;
}

/** What can be done with an image. The numbers of the bits are those of the locks. */
export const CONSISTENT_READ = 1;
export const WRITE = 2;
export const WRITE_UNCHANGED = 4;
export const RESIZE = 8;
export const ALL_PERMISSIONS = CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE;

const NAMES = ['consistent read', 'write', 'write unchanged', 'resize'] as const;
const USED = 100;
const UNSHARED = 200;

export const UNLOCKED: ImageLock = { used: 0, unshared: 0 };

/** The locks of an image that is opened as a whole. */
export type LockMode =
  /** Others may read, nobody may write or resize. */
  | 'read'
  /** We write and resize; others may not even open it for reading unless they force it. */
  | 'write'
  /** Nothing is taken or looked at (QEMU's `force-share`). */
  | 'none';

const MODES: Readonly<Record<LockMode, ImageLock>> = {
  read: { used: CONSISTENT_READ, unshared: WRITE | RESIZE },
  write: { used: CONSISTENT_READ | WRITE | RESIZE, unshared: WRITE | RESIZE },
  none: UNLOCKED,
};

/**
 * Locks the image behind a descriptor; closing the descriptor gives the locks back.
 *
 * @param path for the error
 * @throws StillframeError ERR_STILLFRAME_LOCKED, with no lock kept
 */
export function lockImage(fd: number, path: string, mode: LockMode): void {
  extendLock(fd, path, UNLOCKED, MODES[mode]);
}

/**
 * Takes what an image is to be locked for beside the locks that it has.
 *
 * @param path for the error
 * @returns all that it is locked for then
 * @throws StillframeError ERR_STILLFRAME_LOCKED, with the locks as they were
 */
export function extendLock(fd: number, path: string, has: ImageLock, wanted: ImageLock): ImageLock {
  const all = { used: has.used | wanted.used, unshared: has.unshared | wanted.unshared };
  if (syscalls === undefined) return all;
  try {
    copyLock(fd, path, all);
    for (const [bit, name] of bitsOf(wanted.used)) {
      if (syscalls.isLocked(fd, UNSHARED + bit, 1)) throw refusal(path, `"${name}"`);
    }
    for (const [bit, name] of bitsOf(wanted.unshared)) {
      if (syscalls.isLocked(fd, USED + bit, 1)) throw refusal(path, `shared "${name}"`);
    }
  } catch (error) {
    shrinkLock(fd, has);
    throw error;
  }
  return all;
}

/**
 * Takes locks without looking at those of others: another descriptor of ours has them.
 *
 * @throws StillframeError ERR_STILLFRAME_LOCKED where somebody has locked a byte for himself
 */
export function copyLock(fd: number, path: string, { used, unshared }: ImageLock): void {
  for (const [base, permissions, what] of [
    [USED, used, ''],
    [UNSHARED, unshared, 'shared '],
  ] as const) {
    for (const [bit, name] of bitsOf(permissions)) {
      if (syscalls?.lockShared(fd, base + bit, 1) === false) throw refusal(path, `${what}"${name}"`);
    }
  }
}

/** Gives back all locks but those. */
export function shrinkLock(fd: number, { used, unshared }: ImageLock): void {
  for (const [base, permissions] of [
    [USED, used],
    [UNSHARED, unshared],
  ] as const) {
    for (const [bit] of bitsOf(ALL_PERMISSIONS & ~permissions)) {
      syscalls?.lockShared(fd, base + bit, 1, true);
    }
  }
}

function bitsOf(permissions: number): (readonly [bit: number, name: string])[] {
  return NAMES.flatMap((name, bit) => ((permissions & (1 << bit)) === 0 ? [] : [[bit, name] as const]));
}

function refusal(path: string, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_LOCKED',
    `Failed to get ${what} lock on '${path}': another program has it open; stop that program, or open the image ` +
      'with --force-share (-U) where stale data is acceptable',
  );
}
