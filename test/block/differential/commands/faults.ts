import type { Info } from './look.js';
import type { Command } from './words.js';

/** What QEMU says where it refuses what we do: zeroes of version 2 over a longer backing file, and a size that is the same. */
const REFUSALS = [
  /Failed to zero out new clusters/,
  /Block job failed: Operation not supported/,
  /Can't resize a v2 image which has snapshots/,
];

export function refusesNeedlessly(stderr: string): boolean {
  return REFUSALS.some((words) => words.test(stderr));
}

/** Whether QEMU loses data when it is told this of an image. */
export function losesData(command: Command, info: Info): boolean {
  const [name] = command;
  const { snapshots = [], 'backing-filename': backing, 'format-specific': specific } = info;
  // A repair loses the snapshots where there are bitmaps as well.
  if (name === 'check' && command.some((word) => word.startsWith('-r'))) {
    return snapshots.length > 0 && (specific?.data.bitmaps ?? []).length > 0;
  }
  // What an image of version 2 on nothing reads as zeroes shows the new backing file.
  const safe = name === 'rebase' && !command.includes('-u');
  return safe && backing === undefined && specific?.data.compat === '0.10';
}
