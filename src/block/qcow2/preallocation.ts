import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import type { State } from './state.js';

/** Most bytes of refcounts that are read for the answer, so that no table can make it take long. */
const BUDGET_BYTES = 64 * 1024 * 1024;

/**
 * Whether clusters of the image are in use in much larger number than its file takes space: then they were
 * preallocated (`preallocation=metadata`) and the holes of the file tell which of them are zero.
 *
 * The rule, more than a ninth and at least two clusters more, is the one by which `qemu-img map` decides.
 */
export function looksPreallocated(
  runtime: Runtime,
  file: FileNode,
  state: State,
  clusterSize: number,
  refcountBits: number,
): boolean {
  const allocated = file.allocatedBytes();
  if (allocated === undefined) return false;
  const space = Math.floor(allocated / clusterSize);
  const clusters = Math.ceil(file.length / clusterSize);
  const least = Math.max(Math.floor((space * 10) / 9), space + 2);
  if (clusters < least) return false;
  const { arena, kernels } = runtime;
  const order = Math.log2(refcountBits);
  const perBlock = (clusterSize * 8) / refcountBits;
  const blocks = Math.min(state.get('refcountTableEntries'), Math.ceil(clusters / perBlock));
  if (blocks * clusterSize > BUDGET_BYTES) return false;
  const buffer = arena.alloc(clusterSize + 8, 'refcounts');
  const entry = buffer + clusterSize;
  try {
    let used = 0;
    for (let block = 0; block < blocks && used < least; block++) {
      file.read(state.get('refcountTableOffset') + block * 8, entry, 8);
      const offset = Number(arena.view.getBigUint64(entry));
      if (offset === 0 || offset >= file.length) continue;
      file.read(offset, buffer, clusterSize);
      const entries = Math.min(perBlock, clusters - block * perBlock);
      for (let index = 0; index < entries; ) {
        const free = kernels.refcountFindFree(buffer, index, entries, order);
        const end = free < 0 ? entries : free;
        used += end - index;
        index = end + (free < 0 ? 0 : kernels.refcountFreeRun(buffer, free, entries, order, entries));
      }
    }
    return used >= least;
  } finally {
    arena.free(buffer);
  }
}
