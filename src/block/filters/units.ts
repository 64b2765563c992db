import type { Runtime } from '../../kernels/runtime.js';

/** Calls `body` for each run of units of a buffer that is not to be skipped; see `BlockNode.writeUnits`. Bytes from its start. */
export function eachRun(
  { kernels }: Runtime,
  length: number,
  unit: number,
  skip: number,
  body: (start: number, length: number) => void,
): void {
  const units = Math.ceil(length / unit);
  for (let first = kernels.bitmapNextClear(skip, 0, units); first >= 0; ) {
    const next = kernels.bitmapNextSet(skip, first, units);
    const end = next < 0 ? units : next;
    const start = first * unit;
    body(start, Math.min(end * unit, length) - start);
    first = end < units ? kernels.bitmapNextClear(skip, end, units) : -1;
  }
}
