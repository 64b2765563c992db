import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import { CheckedImage, REFCOUNT_TABLE_OFFSET_MASK } from './check/image.js';
import { rebuildRefcounts } from './check/rebuild.js';
import { type Qcow2Header, readHeader } from './header.js';
import type { HostRun } from './metadata.js';
import { loadRefcount } from './refcount-entry.js';

/**
 * Writes the refcounts of an image of version 3 anew, in entries of another width, beside the old ones. The header,
 * which is the commit point, changes with one write of its first sector when all else is durable. Nobody has the image
 * open meanwhile; it was opened for writing before, so that its tables are known to be apart.
 *
 * Memory of the arena: as for a check.
 *
 * @param bits a power of two from 1 to 64
 * @returns the clusters of the old structure, which are still counted
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT (a refcount that does not fit, with nothing written),
 *   …_NO_SPACE, …_ARENA_EXHAUSTED, …_CORRUPT_IMAGE, …_IO
 */
export function changeRefcountWidth(runtime: Runtime, file: FileNode, bits: number): HostRun[] {
  const header = readHeader(runtime, file);
  // Where its counters are to go, with the table that it has.
  const wanted = { ...header, refcountBits: bits, refcountOrder: Math.log2(bits) };
  const image = new CheckedImage(runtime, file, wanted);
  try {
    const old = [{ offset: header.refcountTableOffset, clusters: header.refcountTableClusters }];
    for (let index = 0; index < image.refcountTableEntries; index++) {
      const offset = Number(image.refcountTableEntry(index) & REFCOUNT_TABLE_OFFSET_MASK);
      if (offset === 0) continue;
      countBlock(image, header, index, offset);
      old.push({ offset, clusters: 1 });
    }
    rebuildRefcounts(image);
    return old;
  } finally {
    image.dispose();
  }
}

/** Takes the refcounts of one block over. */
function countBlock(image: CheckedImage, header: Qcow2Header, index: number, offset: number): void {
  const { clusterSize, buffer, references, mostReferences, runtime } = image;
  if (!image.read(offset, buffer, clusterSize)) return;
  const perBlock = (clusterSize * 8) / header.refcountBits;
  for (let entry = 0; entry < perBlock; entry++) {
    const count = loadRefcount(runtime.arena, buffer, entry, header.refcountOrder);
    if (count === 0) continue;
    const cluster = index * perBlock + entry;
    if (count > mostReferences) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `cannot make the refcounts of '${image.path}' ${image.header.refcountBits} bits wide: the cluster at offset ${cluster * clusterSize} has a refcount of ${count}`,
      );
    }
    references.grow(cluster + 1);
    references.set(cluster, count);
  }
}
