import { StillframeError } from '../../../errors.js';
import { MAX_REFCOUNT_TABLE_BYTES } from '../header.js';
import { writeRefcountStructure } from '../header-write.js';
import { storeRefcount } from '../refcount-entry.js';
import { type CheckedImage, REFCOUNT_TABLE_OFFSET_MASK } from './image.js';

/**
 * Writes a new refcount structure, which says what the counters of the image say, into clusters that nothing refers to,
 * and makes the header refer to it. The old structure stays as it is, counted, for the caller to free.
 *
 * The header, which is the commit point, is written when everything else is durable. The width of the refcounts is that
 * of the image's header as `image` has it, which need not be that of the old structure.
 *
 * @throws StillframeError ERR_STILLFRAME_NO_SPACE where a refcount table for this file would be too large
 */
export function rebuildRefcounts(image: CheckedImage): void {
  new Rebuild(image).run();
}

class Rebuild {
  readonly #image: CheckedImage;
  /** Where the block of each entry of the new table is, 0: it has none. */
  #blocks = new Float64Array(1024);
  /** Entries of the new table that are needed. */
  #entries = 0;
  /** No cluster below is free. */
  #free = 1;
  /** Clusters of the new table and where it is. */
  #tableClusters = 0;
  #tableStart = 0;

  constructor(image: CheckedImage) {
    this.#image = image;
  }

  run(): void {
    this.#keepOldBlocks();
    this.#place();
    const image = this.#image;
    const { arena } = image.runtime;
    for (let index = 0; index < this.#entries; index++) {
      if (this.#blocks[index] !== 0) this.#writeBlock(index);
    }
    const entries = (this.#tableClusters * image.clusterSize) / 8;
    const offset = this.#tableStart * image.clusterSize;
    image.replaceRefcountTable(offset, entries);
    for (let index = 0; index < this.#entries; index++) {
      arena.view.setBigUint64(image.refcountTable + index * 8, BigInt(this.#blocks[index] ?? 0));
    }
    image.write(offset, image.refcountTable, entries * 8);
    image.flush();
    writeRefcountStructure(image.runtime, image.file, {
      ...image.header,
      refcountTableOffset: offset,
      refcountTableClusters: this.#tableClusters,
    });
  }

  /** Until the header has changed, the old blocks are the ones that count, also those with a wrong entry. */
  #keepOldBlocks(): void {
    const { references, clusterSize, clusters, refcountTableEntries } = this.#image;
    for (let index = 0; index < refcountTableEntries; index++) {
      const offset = this.#image.refcountTableEntry(index) & REFCOUNT_TABLE_OFFSET_MASK;
      const cluster = Number(offset / BigInt(clusterSize));
      if (cluster > 0 && cluster < clusters && references.get(cluster) === 0) references.set(cluster, 1);
    }
  }

  /** Finds places for the table and for a block wherever a cluster is in use, the new ones included. */
  #place(): void {
    for (;;) {
      this.#placeBlocks();
      const clusters = Math.ceil((this.#entries * 8) / this.#image.clusterSize);
      if (clusters <= this.#tableClusters) return;
      if (clusters * this.#image.clusterSize > MAX_REFCOUNT_TABLE_BYTES) {
        throw new StillframeError(
          'ERR_STILLFRAME_NO_SPACE',
          `'${this.#image.path}': its refcount table would need ${this.#entries * 8} bytes, more than ${MAX_REFCOUNT_TABLE_BYTES}; copy it to an image with larger clusters`,
        );
      }
      for (let index = 0; index < this.#tableClusters; index++) this.#count(this.#tableStart + index, 0);
      this.#tableClusters = clusters;
      this.#tableStart = this.#allocate(clusters);
    }
  }

  #placeBlocks(): void {
    const { perBlock, references } = this.#image;
    // A block that lands where no block was needed so far makes another round necessary.
    for (let more = true; more; ) {
      more = false;
      for (let block = 0; block * perBlock < references.clusters; block++) {
        const has = block < this.#entries && this.#blocks[block] !== 0;
        if (has || !this.#isUsed(block)) continue;
        const cluster = this.#allocate(1);
        this.#setBlock(block, cluster * this.#image.clusterSize);
        if (Math.floor(cluster / perBlock) < block) more = true;
      }
    }
  }

  #setBlock(block: number, offset: number): void {
    if (block >= this.#blocks.length) {
      const blocks = new Float64Array(Math.max(block + 1, this.#blocks.length * 2));
      blocks.set(this.#blocks);
      this.#blocks = blocks;
    }
    this.#blocks[block] = offset;
    this.#entries = Math.max(this.#entries, block + 1);
  }

  /** Whether a cluster that the block would count is in use. */
  #isUsed(block: number): boolean {
    const { references, perBlock, runtime } = this.#image;
    const first = block * perBlock;
    let used = false;
    references.forEachPiece(first, Math.min(references.clusters, first + perBlock), (_, count, counters) => {
      if (counters.pointer === 0) return true;
      used = runtime.kernels.countersNextUsed(counters.pointer, counters.wide, 0, count) < count;
      return !used;
    });
    return used;
  }

  /** Takes the first `count` clusters in a row that nothing refers to. @returns the first of them */
  #allocate(count: number): number {
    const { references } = this.#image;
    let first = count === 1 ? this.#nextFree(this.#free) : this.#nextFree(1);
    for (let run = 1; run < count; ) {
      if (this.#isFree(first + run)) {
        run++;
      } else {
        first = this.#nextFree(first + run + 1);
        run = 1;
      }
    }
    references.grow(first + count + 1);
    for (let index = 0; index < count; index++) this.#count(first + index, 1);
    if (count === 1) this.#free = first + 1;
    return first;
  }

  #nextFree(from: number): number {
    const { references, runtime } = this.#image;
    let found = Math.max(from, references.clusters);
    references.forEachPiece(from, references.clusters, (cluster, count, counters) => {
      const free =
        counters.pointer === 0
          ? 0
          : runtime.kernels.countersNextFree(counters.pointer, counters.wide, 0, count);
      if (free === count) return true;
      found = cluster + free;
      return false;
    });
    return found;
  }

  #isFree(cluster: number): boolean {
    const { references } = this.#image;
    return cluster >= references.clusters || references.get(cluster) === 0;
  }

  #count(cluster: number, references: number): void {
    this.#image.references.set(cluster, references);
    if (references === 0) this.#free = Math.min(this.#free, cluster);
  }

  #writeBlock(block: number): void {
    const { references, perBlock, clusterSize, buffer, runtime, header } = this.#image;
    const { arena } = runtime;
    arena.u8.fill(0, buffer, buffer + clusterSize);
    const first = block * perBlock;
    references.forEachPiece(
      first,
      Math.min(references.clusters, first + perBlock),
      (cluster, count, counters) => {
        if (counters.pointer === 0) return undefined;
        const { pointer, wide } = counters;
        for (let at = 0; at < count; at++) {
          at = runtime.kernels.countersNextUsed(pointer, wide, at, count);
          if (at >= count) break;
          const value = (wide ? arena.u32[(pointer >> 2) + at] : arena.u8[pointer + at]) ?? 0;
          storeRefcount(arena, buffer, cluster - first + at, header.refcountOrder, value);
        }
        return undefined;
      },
    );
    this.#image.write(this.#blocks[block] ?? 0, buffer, clusterSize);
  }
}
