export { type AmendQcow2Options, amendQcow2 } from './amend.js';
export {
  type BitmapInfo,
  bitmapsOf,
  listBitmaps,
  loadBitmap,
  noBitmapsInVersion2,
  readBitmap,
  readBitmaps,
} from './bitmaps.js';
export { checkQcow2, type Qcow2Check, type RepairMode } from './check/check.js';
export { type CreateQcow2Options, checkQcow2Options, createQcow2, type Preallocation } from './create.js';
export { probeQcow2, type Qcow2Header, readHeader } from './header.js';
export { planLayout } from './layout.js';
export { readSnapshots, type SnapshotInfo, type SnapshotSelector } from './listings.js';
export { attachQcow2, changeBacking, claimBitmap, closeQcow2, emptyQcow2, openQcow2 } from './open.js';
export { resizeQcow2 } from './resize.js';
export { applySnapshot, createSnapshot, deleteSnapshot, type NewSnapshot } from './snapshots.js';
