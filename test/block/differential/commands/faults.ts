import type { Info } from './look.js';

/** What QEMU says where it refuses what we do: zeroes of version 2 over a longer backing file, and a size that is the same. */
const REFUSALS = [
  /Failed to zero out new clusters/,
  /Block job failed: Operation not supported/,
  /Can't resize a v2 image which has snapshots/,
];

export function refusesNeedlessly(stderr: string): boolean {
  return REFUSALS.some((words) => words.test(stderr));
}

/** Whether QEMU's `check -r all` would lose the snapshots, as it does where there are bitmaps as well. */
export function losesSnapshots(info: Info): boolean {
  const { snapshots = [], 'format-specific': specific } = info;
  return snapshots.length > 0 && (specific?.data.bitmaps ?? []).length > 0;
}
