/** Sync modes of a backup (QAPI `MirrorSyncMode`). */
export const SYNC_MODES = ['full', 'top', 'none', 'incremental', 'bitmap'] as const;
export type SyncMode = (typeof SYNC_MODES)[number];

/** When a backup takes what it has copied off its dirty bitmap (QAPI `BitmapSyncMode`). */
export const BITMAP_MODES = ['on-success', 'never', 'always'] as const;
export type BitmapMode = (typeof BITMAP_MODES)[number];
