import type { Runtime } from '../kernels/runtime.js';
import type { Disk } from './disk.js';
import { liveDisk } from './graph.js';

/**
 * Disks in the order in which one thread keeps others from them. A request that has begun goes on to the disks below its
 * own before it ends, so these are free until it has; and two threads that do so never wait for each other.
 */
export function drainOrder(runtime: Runtime, disks: readonly Disk[]): Disk[] {
  const heights = new Map<number, number>();
  const heightOf = (disk: Disk): number => {
    const { id } = disk.descriptor;
    const known = heights.get(id);
    if (known !== undefined) return known;
    // An image that old data of its backing file is saved to lies on its source.
    heights.set(id, 0);
    const height = Math.max(0, ...disk.below.map((other) => 1 + heightOf(liveDisk(runtime, other))));
    heights.set(id, height);
    return height;
  };
  return disks
    .map((disk) => ({ disk, id: disk.descriptor.id, height: heightOf(disk) }))
    .sort((one, other) => other.height - one.height || one.id - other.id)
    .map(({ disk }) => disk);
}
