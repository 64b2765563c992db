import type { Runtime } from '../kernels/runtime.js';
import { filesOf, isImage } from './files.js';
import { attachNode, combineNames, type ImageFormat } from './graph.js';
import type { ForeignDescriptor, ImageDescriptor, NodeDescriptor, Qcow2Descriptor } from './node.js';
import { type BitmapInfo, readBitmaps, readHeader, readSnapshots, type SnapshotInfo } from './qcow2/index.js';
import { attachFile } from './raw/file.js';

/** What `qemu-img info --output=json` says of one image, with its field names. Sizes are bytes. */
export interface ImageInfo {
  /** Internal snapshots; absent where there are none. */
  readonly snapshots?: readonly SnapshotInfo[];
  readonly 'virtual-size': number;
  /** The name the caller gave. */
  readonly filename: string;
  readonly format: ImageFormat;
  /** Space the file takes on its file system; absent where nobody can say. */
  readonly 'actual-size'?: number;
  readonly 'cluster-size'?: number;
  /** Absent where extents of different kinds make up the image. */
  readonly 'dirty-flag'?: boolean;
  readonly 'backing-filename'?: string;
  readonly 'full-backing-filename'?: string;
  readonly 'backing-filename-format'?: string;
  readonly 'format-specific'?:
    | {
        readonly type: 'qcow2';
        readonly data: {
          readonly compat: '0.10' | '1.1';
          readonly 'compression-type': 'zlib' | 'zstd';
          readonly 'lazy-refcounts'?: boolean;
          /** Persistent dirty bitmaps; absent where there are none. */
          readonly bitmaps?: readonly BitmapInfo[];
          readonly 'refcount-bits': number;
          readonly 'data-file'?: string;
          readonly 'data-file-raw'?: boolean;
          readonly corrupt?: boolean;
          readonly 'extended-l2'?: boolean;
        };
      }
    | {
        readonly type: 'vmdk';
        readonly data: {
          readonly cid: number;
          readonly 'parent-cid': number;
          readonly 'create-type': string;
          readonly extents: readonly VmdkExtentInfo[];
        };
      };
}

/** QAPI `VmdkExtentInfo`. */
export interface VmdkExtentInfo {
  /** Absent where the extent is not compressed. */
  readonly compressed?: true;
  readonly 'virtual-size': number;
  readonly filename: string;
  /** Bytes of a grain; absent where the extent is flat. */
  readonly 'cluster-size'?: number;
  /** As the descriptor has it; empty where the extent is the image itself. */
  readonly format: string;
}

/**
 * Describes an open image; its backing file is not looked at.
 *
 * @param filename the name the caller gave, for the answer and as the place relative backing names start from
 */
export function imageInfo(runtime: Runtime, descriptor: ImageDescriptor, filename: string): ImageInfo {
  const allocated = allocatedBytes(runtime, descriptor);
  const common = {
    'virtual-size': descriptor.length,
    filename,
    format: descriptor.driver,
    ...(allocated === undefined ? {} : { 'actual-size': allocated }),
  };
  if (descriptor.driver === 'raw') {
    return descriptor.file.driver === 'nbd' ? common : { ...common, 'dirty-flag': false };
  }
  if (descriptor.driver !== 'qcow2') return { ...common, ...foreignInfo(descriptor, filename) };
  const file = attachFile(runtime, descriptor.file);
  const header = readHeader(runtime, file);
  const snapshots = readSnapshots(runtime, file, header).map(({ info }) => info);
  const bitmaps = readBitmaps(file, header);
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
        ...(descriptor.hasDataFile
          ? { 'data-file': descriptor.dataFileName ?? '', 'data-file-raw': descriptor.dataFileRaw }
          : {}),
        ...(descriptor.version === 2
          ? {}
          : { corrupt: descriptor.corrupt, 'extended-l2': descriptor.extendedL2 }),
      },
    },
  };
}

/** Describes an image and every image of its backing chain, the top one first. */
export function chainInfo(runtime: Runtime, top: ImageDescriptor, filename: string): ImageInfo[] {
  const infos: ImageInfo[] = [];
  let name = filename;
  for (let image: NodeDescriptor | undefined = top; image !== undefined && isImage(image); ) {
    infos.push(imageInfo(runtime, image, name));
    if (image.driver !== 'qcow2') break;
    name = combineNames(name, image.backingFile ?? '');
    image = image.backing;
  }
  return infos;
}

/** Space that the image takes, its backing files left out. */
function allocatedBytes(runtime: Runtime, descriptor: ImageDescriptor): number | undefined {
  const files = 'extents' in descriptor ? [descriptor.file, ...descriptor.extents] : [descriptor.file];
  let sum = 0;
  for (const file of files) {
    const bytes = attachFile(runtime, file).allocatedBytes();
    if (bytes === undefined) return undefined;
    sum += bytes;
  }
  return sum;
}

function foreignInfo(descriptor: ForeignDescriptor, filename: string): Partial<ImageInfo> {
  const { layout, clusterSize } = descriptor;
  const sizes = clusterSize === undefined ? {} : { 'cluster-size': clusterSize };
  if (layout.format !== 'vmdk') return { ...sizes, 'dirty-flag': false };
  const flat = layout.extents.every(({ data }) => typeof data === 'number');
  return {
    ...sizes,
    ...(flat || clusterSize !== undefined ? { 'dirty-flag': false } : {}),
    ...backingInfo(descriptor, filename),
    'format-specific': {
      type: 'vmdk',
      data: {
        cid: layout.cid,
        'parent-cid': layout.parentCid,
        'create-type': layout.createType,
        extents: layout.extents.map(({ data, length, name, type }) => ({
          ...(typeof data === 'object' && data.compressed ? { compressed: true } : {}),
          'virtual-size': length,
          filename: name === undefined ? filename : combineNames(filename, name),
          ...(typeof data === 'object' ? { 'cluster-size': data.grainBytes } : {}),
          format: type,
        })),
      },
    },
  };
}

function backingInfo(descriptor: Qcow2Descriptor | ForeignDescriptor, filename: string): Partial<ImageInfo> {
  const { backingFile, backingFormat } = descriptor;
  if (backingFile === undefined) return {};
  return {
    'backing-filename': backingFile,
    'full-backing-filename': combineNames(filename, backingFile),
    ...(backingFormat === undefined ? {} : { 'backing-filename-format': backingFormat }),
  };
}

/** What a node of a graph is, and how large: an image, or anything else. */
export interface NodeInfo {
  readonly image: ImageInfo | undefined;
  /** Bytes. */
  readonly length: number;
  /** Space that its files take, in bytes. */
  readonly allocated: number | undefined;
  /** Bytes. */
  readonly clusterSize: number | undefined;
}

/** @param filename the name by which people know the node */
export function nodeInfo(runtime: Runtime, node: NodeDescriptor, filename: string): NodeInfo {
  const { length, clusterSize } = attachNode(runtime, node);
  if (isImage(node)) {
    const image = imageInfo(runtime, node, filename);
    return { image, length, allocated: image['actual-size'], clusterSize };
  }
  const [file] = filesOf(node);
  const allocated = file && attachFile(runtime, file).allocatedBytes();
  return { image: undefined, length, allocated, clusterSize };
}
