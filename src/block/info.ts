import { fstatSync } from 'node:fs';
import type { Runtime } from '../kernels/runtime.js';
import { combineNames } from './graph.js';
import type { NodeDescriptor, Qcow2Descriptor } from './node.js';
import { type BitmapInfo, readBitmaps, readHeader, readSnapshots, type SnapshotInfo } from './qcow2/index.js';
import { attachFile } from './raw/file.js';

/** What `qemu-img info --output=json` says of one image, with its field names. Sizes are bytes. */
export interface ImageInfo {
  /** Internal snapshots; absent where there are none. */
  readonly snapshots?: readonly SnapshotInfo[];
  readonly 'virtual-size': number;
  /** The name the caller gave. */
  readonly filename: string;
  readonly format: 'raw' | 'qcow2';
  /** Space the file takes on its file system. */
  readonly 'actual-size': number;
  readonly 'cluster-size'?: number;
  readonly 'dirty-flag': boolean;
  readonly 'backing-filename'?: string;
  readonly 'full-backing-filename'?: string;
  readonly 'backing-filename-format'?: string;
  readonly 'format-specific'?: {
    readonly type: 'qcow2';
    readonly data: {
      readonly compat: '0.10' | '1.1';
      readonly 'compression-type': 'zlib' | 'zstd';
      readonly 'lazy-refcounts'?: boolean;
      /** Persistent dirty bitmaps; absent where there are none. */
      readonly bitmaps?: readonly BitmapInfo[];
      readonly 'refcount-bits': number;
      readonly corrupt?: boolean;
      readonly 'extended-l2'?: boolean;
    };
  };
}

/**
 * Describes an open image; its backing file is not looked at.
 *
 * @param filename the name the caller gave, for the answer and as the place relative backing names start from
 */
export function imageInfo(runtime: Runtime, descriptor: NodeDescriptor, filename: string): ImageInfo {
  if (descriptor.driver === 'file') throw new TypeError('a file is not an image');
  const common = {
    'virtual-size': descriptor.length,
    filename,
    format: descriptor.driver,
    'actual-size': fstatSync(descriptor.file.fd).blocks * 512,
  };
  if (descriptor.driver === 'raw') return { ...common, 'dirty-flag': false };
  const file = attachFile(runtime, descriptor.file);
  const header = readHeader(runtime, file);
  const snapshots = readSnapshots(runtime, file, header);
  const bitmaps = readBitmaps(runtime, file, header);
  return {
    ...(snapshots.length === 0 ? {} : { snapshots }),
    ...common,
    'cluster-size': 2 ** descriptor.clusterBits,
    'dirty-flag': descriptor.dirty,
    ...backingInfo(descriptor, filename),
    'format-specific': {
      type: 'qcow2',
      data: {
        compat: descriptor.version === 2 ? '0.10' : '1.1',
        'compression-type': descriptor.compressionType === 1 ? 'zstd' : 'zlib',
        ...(descriptor.version === 2 ? {} : { 'lazy-refcounts': descriptor.lazyRefcounts }),
        ...(bitmaps.length === 0 ? {} : { bitmaps }),
        'refcount-bits': descriptor.refcountBits,
        ...(descriptor.version === 2
          ? {}
          : { corrupt: descriptor.corrupt, 'extended-l2': descriptor.extendedL2 }),
      },
    },
  };
}

function backingInfo(descriptor: Qcow2Descriptor, filename: string): Partial<ImageInfo> {
  const { backingFile, backingFormat } = descriptor;
  if (backingFile === undefined) return {};
  return {
    'backing-filename': backingFile,
    'full-backing-filename': combineNames(filename, backingFile),
    ...(backingFormat === undefined ? {} : { 'backing-filename-format': backingFormat }),
  };
}
