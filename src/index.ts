/**
 * Stillframe: point-in-time block backups of live drives.
 *
 * @packageDocumentation
 */

export type { FreezeOptions } from './backup/freeze.js';
export type { MirrorCopyMode, MirrorSyncMode } from './backup/mirror-job.js';
export type { BitmapMode, SyncMode } from './backup/modes.js';
export type { CompressionType } from './backup/target.js';
export type { AmendOptions } from './block/amend.js';
export type { ImageCheck, Repaired } from './block/check.js';
export type { ImageChecksum } from './block/checksum.js';
export type { CommitOptions } from './block/commit.js';
export type { CompareResult } from './block/comparison.js';
export type { CreateImageOptions, CreationOptions } from './block/create.js';
export type { BitmapStatus } from './block/disk-bitmaps.js';
export type { BitmapAction, BitmapSource } from './block/edit-bitmap.js';
export type { SnapshotAction } from './block/edit-snapshots.js';
export type { OnCbwError } from './block/filters/copy-before-write.js';
export type { ImageFormat, ImageLayers, NamedImage, TargetFormat } from './block/graph.js';
export type { ImageInfo } from './block/info.js';
export type { MapBatch, MapEntry } from './block/map-batch.js';
export type { Measure, MeasureOptions } from './block/measure.js';
export type { Preallocation, RepairMode, SnapshotSelector } from './block/qcow2/index.js';
export type { RebaseOptions } from './block/rebase.js';
export type { ResizeOptions } from './block/resize.js';
export type {
  BackupCounts,
  BackupHandle as BackupJob,
  BackupProgress,
  BackupResult,
} from './engine/backup.js';
export type { BackupOptions, DiskBitmapEdit, DiskHandle as Disk } from './engine/disk.js';
export {
  type CheckOptions,
  type ChecksumOptions,
  type CompareOptions,
  type ConvertImageOptions,
  createEngine,
  type Engine,
  type EngineOptions,
  type ImageOptions,
  type MapOptions,
  type OnProgress,
  type OpenDiskOptions,
  type TransactionItem,
} from './engine/engine.js';
export type { FrozenDisk } from './engine/frozen-disk.js';
export type { JobEvents, JobProgress } from './engine/job.js';
export type { MirrorHandle as MirrorJob, MirrorOptions } from './engine/mirror.js';
export type { NbdExport, NbdServer, NbdServerOptions } from './engine/nbd-server.js';
export { type ErrorCode, StillframeError } from './errors.js';
export { backupRunning, type HotBackupDisk, type HotBackupOptions } from './hot-backup/backup-running.js';
export type { HotBitmapMode, HotSyncMode } from './hot-backup/bitmap-plan.js';
export type { OnError } from './job/job.js';
export type { JobStatus } from './job/status.js';
export type { ListenAddress } from './nbd/server/address.js';
export type { TlsOptions } from './nbd/server/tls.js';
export { QmpClient, type ServerEvent } from './qmp/client.js';
