import { StillframeError } from '../errors.js';
import { syscalls } from './index.js';

/**
 * Image locks as QEMU takes them, so that a running QEMU and we keep each other out. A permission that is used is a
 * shared lock on byte 100 + its number, a permission that others must not use one on byte 200 + its number. Whoever
 * comes later looks whether the opposite byte is locked by somebody else.
 */
export type LockMode =
  /** Others may read, nobody may write or resize. */
  | 'read'
  /** We write and resize; others may not even open it for reading unless they force it. */
  | 'write'
  /** Nothing is taken or looked at (QEMU's `force-share`). */
  | 'none';

const CONSISTENT_READ = 0;
const WRITE = 1;
const RESIZE = 3;
const USED = 100;
const UNSHARED = 200;

const names: Readonly<Record<number, string>> = {
  [CONSISTENT_READ]: 'consistent read',
  [WRITE]: 'write',
  [RESIZE]: 'resize',
};

/** Permissions that others must not use. */
const NOT_SHARED = [WRITE, RESIZE];

function usedBy(mode: LockMode): readonly number[] {
  return mode === 'write' ? [CONSISTENT_READ, WRITE, RESIZE] : [CONSISTENT_READ];
}

/**
 * Locks the image behind a descriptor; closing the descriptor gives the locks back.
 *
 * @param path for the error
 * @throws StillframeError ERR_STILLFRAME_LOCKED, with no lock kept
 */
export function lockImage(fd: number, path: string, mode: LockMode): void {
  if (mode === 'none' || syscalls === undefined) return;
  const used = usedBy(mode);
  const taken: number[] = [];
  const refuse = (what: string): never => {
    for (const byte of taken) syscalls?.lockShared(fd, byte, 1, true);
    throw new StillframeError(
      'ERR_STILLFRAME_LOCKED',
      `Failed to get ${what} lock on '${path}': another program has it open; stop that program, or open the image ` +
        'with --force-share (-U) where stale data is acceptable',
    );
  };
  for (const permission of used) {
    if (!syscalls.lockShared(fd, USED + permission, 1)) refuse(`"${names[permission]}"`);
    taken.push(USED + permission);
  }
  for (const permission of NOT_SHARED) {
    if (!syscalls.lockShared(fd, UNSHARED + permission, 1)) refuse(`shared "${names[permission]}"`);
    taken.push(UNSHARED + permission);
  }
  for (const permission of used) {
    if (syscalls.isLocked(fd, UNSHARED + permission, 1)) refuse(`"${names[permission]}"`);
  }
  for (const permission of NOT_SHARED) {
    if (syscalls.isLocked(fd, USED + permission, 1)) refuse(`shared "${names[permission]}"`);
  }
}

/** Gives back the locks that {@link lockImage} took. */
export function unlockImage(fd: number, mode: LockMode): void {
  if (mode === 'none' || syscalls === undefined) return;
  for (const permission of usedBy(mode)) syscalls.lockShared(fd, USED + permission, 1, true);
  for (const permission of NOT_SHARED) syscalls.lockShared(fd, UNSHARED + permission, 1, true);
}
