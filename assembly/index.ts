export {
  bitmapClear,
  bitmapCoarsen,
  bitmapCount,
  bitmapMerge,
  bitmapNextClear,
  bitmapNextSet,
  bitmapSet,
  bitmapTest,
  bitmapTestAndClear,
} from './bitmap';
export {
  checkAllocated,
  checkBeginTable,
  checkCompressed,
  checkCopiedFlags,
  checkCountEntries,
  checkFragmented,
  checkNoteCompressed,
  checkNoteData,
  checkRefcounts,
  checkResetTotals,
  checkSetup,
  checkShared,
  checkUncopied,
  countersLastUsed,
  countersNextFree,
  countersNextUsed,
} from './check';
export {
  claimedCount,
  clusterState,
  clustersClaimAt,
  clustersClaimNext,
  clustersCount,
  clustersFill,
  clustersNext,
  clustersNextPending,
  clustersTransition,
  offendingCluster,
} from './clusters';
export { firstDifference } from './compare';
export { compactUnits } from './copy';
export { digestUnits, xxh3, zeroLeaves, zeroUnits } from './hash';
export { INFLATE_WORKSPACE, inflate } from './inflate';
export { l2CompressedLength, l2Copied, l2Extent, l2HostOffset, l2Kind } from './l2';
export { refcountFindFree, refcountFreeRun } from './refcount';
export { isZero, zeroMask } from './zero';
