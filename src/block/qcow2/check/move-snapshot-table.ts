import { StillframeError } from '../../../errors.js';
import { FIELD } from '../header.js';
import { storeRefcount } from '../refcount-entry.js';
import { type CheckedImage, REFCOUNT_TABLE_OFFSET_MASK } from './image.js';
import type { SnapshotTable } from './snapshot-table.js';

/**
 * Writes the repaired snapshot table to a new place and frees the old one. The counters of the image hold the refcounts
 * of the file, and are right.
 *
 * The header refers to the new table when that is durable, with a refcount; until then the old one counts.
 *
 * @throws StillframeError ERR_STILLFRAME_NO_SPACE
 */
export function moveSnapshotTable(image: CheckedImage, snapshots: SnapshotTable): void {
  const { clusterSize, runtime } = image;
  const { view } = runtime.arena;
  const clusters = Math.ceil(snapshots.rewrittenBytes / clusterSize);
  const old = snapshots.offset / clusterSize;
  const oldEnd = Math.ceil((snapshots.offset + snapshots.bytes) / clusterSize);
  const first = clusters === 0 ? 0 : allocate(image, clusters, old, oldEnd);
  setRefcounts(image, first, clusters, 1);
  let at = first * clusterSize;
  snapshots.rewrite((pointer, length) => {
    image.write(at, pointer, length);
    at += length;
  });
  image.flush();
  view.setUint32(image.buffer, snapshots.count);
  view.setBigUint64(image.buffer + 4, BigInt(first * clusterSize));
  image.write(FIELD.snapshotCount, image.buffer, 12);
  image.flush();
  // A table that goes beyond the end of the file was not counted.
  if (oldEnd > image.clusters) return;
  for (let cluster = old; cluster < oldEnd; cluster++) {
    const refcount = image.references.get(cluster);
    if (refcount > 0) setRefcounts(image, cluster, 1, refcount - 1);
  }
}

/**
 * The first `count` clusters in a row without refcount, where refcount blocks are and outside of the old table, the
 * clusters [old, oldEnd).
 */
function allocate(image: CheckedImage, count: number, old: number, oldEnd: number): number {
  const { references, perBlock } = image;
  // Behind it nothing is taken, and damaged tables go on for long there.
  const known = Math.max(references.clusters, oldEnd);
  let run = 0;
  for (let cluster = 1; ; ) {
    const block = Math.floor(cluster / perBlock);
    const end = (block + 1) * perBlock;
    if (block >= image.refcountTableEntries) break;
    if (image.refcountTableEntry(block) === 0n) {
      run = 0;
      cluster = end;
      continue;
    }
    if (cluster >= known) {
      const step = Math.min(count - run, end - cluster);
      run += step;
      cluster += step;
    } else {
      const taken = cluster >= old && cluster < oldEnd;
      const free = !taken && (cluster >= references.clusters || references.get(cluster) === 0);
      run = free ? run + 1 : 0;
      cluster++;
    }
    if (run < count) continue;
    references.grow(cluster + 1);
    return cluster - count;
  }
  throw new StillframeError(
    'ERR_STILLFRAME_NO_SPACE',
    `'${image.path}' has no room for a repaired snapshot table of ${count} clusters; copy it to another image`,
  );
}

/** Writes the refcounts of clusters, one after the other: there are never many. */
function setRefcounts(image: CheckedImage, first: number, count: number, value: number): void {
  const { perBlock, references, runtime, header, buffer } = image;
  for (let cluster = first; cluster < first + count; cluster++) {
    const block = Number(
      image.refcountTableEntry(Math.floor(cluster / perBlock)) & REFCOUNT_TABLE_OFFSET_MASK,
    );
    const bit = (cluster % perBlock) * header.refcountBits;
    const place = block + Math.floor(bit / 64) * 8;
    image.file.read(place, buffer, 8);
    storeRefcount(runtime.arena, buffer, (bit % 64) / header.refcountBits, header.refcountOrder, value);
    image.write(place, buffer, 8);
    references.set(cluster, value);
  }
}
