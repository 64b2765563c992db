import type { Qcow2Descriptor } from '../block/node.js';
import { QmpError } from '../qmp/errors.js';
import { type JsonObject, numberIn } from '../qmp/types.js';

/** Seconds; QEMU keeps them in 32 bits. */
const MAX_INTERVAL = 2 ** 32 - 1;

/**
 * Options of a `qcow2` node that depend on each other and on its image, in the order in which QEMU looks at them. The sizes
 * of its caches have no use here, and are what they would have to be all the same.
 *
 * @throws QmpError where QEMU would not open the image with them
 */
export function checkQcow2Options(
  options: JsonObject,
  { clusterBits, version }: Pick<Qcow2Descriptor, 'clusterBits' | 'version'>,
): void {
  const number = (name: string): number | undefined => numberIn(options, name);
  const [all, l2, refcounts] = [number('cache-size'), number('l2-cache-size'), number('refcount-cache-size')];
  if (all !== undefined) {
    if (l2 !== undefined && refcounts !== undefined) {
      throw new QmpError('cache-size, l2-cache-size and refcount-cache-size may not be set at the same time');
    }
    if ((l2 ?? 0) > all) throw new QmpError('l2-cache-size may not exceed cache-size');
    if ((refcounts ?? 0) > all) throw new QmpError('refcount-cache-size may not exceed cache-size');
  }
  const clusterSize = 2 ** clusterBits;
  const entry = number('l2-cache-entry-size');
  if (entry !== undefined && (entry < 512 || entry > clusterSize || !Number.isInteger(Math.log2(entry)))) {
    throw new QmpError(
      `L2 cache entry size must be a power of two between 512 and the cluster size (${clusterSize})`,
    );
  }
  const interval = number('cache-clean-interval') ?? 0;
  if (interval < 0 || interval > MAX_INTERVAL) throw new QmpError('Cache clean interval too big');
  if (options['lazy-refcounts'] === true && version < 3) {
    throw new QmpError('Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level');
  }
}
