import type { DiskDescriptor } from './disk.js';
import type { BlkdebugLimits } from './filters/blkdebug.js';
import type { BlkdebugEvent } from './filters/blkdebug-events.js';
import type { BlkdebugRule } from './filters/blkdebug-state.js';
import type { FrameDescriptor } from './filters/copy-before-write.js';
import type { VdiLayout } from './foreign/vdi.js';
import type { VhdxLayout } from './foreign/vhdx.js';
import type { VmdkLayout } from './foreign/vmdk.js';
import type { VpcLayout } from './foreign/vpc.js';
import type { NbdTarget } from './nbd/uri.js';
import type { NodeTraits } from './traits.js';

/**
 * The contract of a node of the block graph.
 *
 * A node lives in three forms: a **descriptor** (plain data that any thread may hold), its **shared state** in
 * the arena (pointed to by the descriptor) and, per thread, a thin **facade** that implements
 * {@link BlockNode} with blocking calls. `driver.open` makes the first two, `attachNode` the third,
 * `closeNode` ends all of them.
 *
 * Data is always in the arena: `pointer` is a byte offset into it. Offsets and lengths are bytes.
 *
 * Concurrency: any number of threads may call any method at once. The caller keeps *mutations* of one cluster
 * apart (a live disk by its tracked requests, a job's target by cluster claims); everything else, metadata
 * above all, the node keeps consistent itself. A read that overlaps a concurrent write returns old or new
 * bytes, never bytes of another place.
 */
export interface BlockNode {
  readonly descriptor: NodeDescriptor;
  /** Virtual size in bytes: what a guest sees. Multiple of 512 for format drivers. */
  readonly length: number;
  readonly readOnly: boolean;
  /** Allocation granularity in bytes, undefined when the driver has none (raw, file). */
  readonly clusterSize: number | undefined;
  /** The node that unallocated ranges read from. */
  readonly backing: BlockNode | undefined;

  /**
   * Reads through the whole backing chain. Throws StillframeError: ERR_STILLFRAME_IO, …_CORRUPT_IMAGE,
   * …_OUT_OF_RANGE (beyond {@link length}).
   */
  read(offset: number, pointer: number, length: number): void;

  /** Writes; allocates and copies from the backing chain where needed. …_NO_SPACE, …_IO, …_READ_ONLY. */
  write(offset: number, pointer: number, length: number): void;

  /**
   * Bulk write of a fresh target: the buffer at `pointer` holds `length` bytes for `offset`, in units of
   * `unit` bytes (a power of two, multiple of {@link clusterSize}; `offset` is aligned to it; the last unit may
   * be short). Units whose bit is set in `skip` (uint32 words in the arena, bit i of word i/32 is unit i) are
   * left alone; the others are written. The driver may allocate for all of them at once and may rearrange the
   * buffer.
   */
  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void;

  /**
   * Writes whole clusters (`offset` is aligned to {@link clusterSize}; the range may end with the drive), each of them
   * compressed where that takes less than a cluster; whatever they were before is replaced. The memory of the buffer is
   * used for the compressed data: what it holds afterwards is undefined. Compressing is done without any lock held, so
   * that threads that write different clusters at once share the work.
   *
   * Only where clusters can be compressed at all: see `checkCompression`, which says why not.
   *
   * @throws StillframeError as {@link write}, and ERR_STILLFRAME_UNSUPPORTED_FEATURE
   */
  writeCompressed?(offset: number, pointer: number, length: number): void;

  /** The range reads as zeroes afterwards. `mayUnmap`: the driver may free space. */
  writeZeroes(offset: number, length: number, mayUnmap: boolean): void;

  /**
   * As {@link writeZeroes}, but only where that takes no writing of data.
   *
   * @returns false where it does; nothing was changed then. A driver without this method never knows.
   */
  writeZeroesFast?(offset: number, length: number, mayUnmap: boolean): boolean;

  /** A hint: the content of the range no longer matters. Afterwards it reads as old data or as zeroes. */
  discard(offset: number, length: number): void;

  /** Returns when everything written before is durable: data, then metadata in a safe order. */
  flush(): void;

  /**
   * Where the bytes of a range lie one after the other in a file of the host, and stay as long as the node is open: what
   * is there later is what was written to the same range later, never bytes of another place.
   *
   * @returns undefined where they do not; a driver without this method has no such places
   */
  hostRange?(offset: number, length: number): HostRange | undefined;

  /** The node without what records its changes; undefined where nothing does. What is written there must change nothing. */
  readonly unrecorded?: BlockNode | undefined;

  /**
   * Tells the node where the driver that lies on it is in its work, before it does what the event is named for. Only
   * nodes that can fail or stop it there want to know.
   *
   * @throws StillframeError never: what is to fail is the next request
   */
  event?(name: BlkdebugEvent): void;

  /**
   * What this layer alone says of the range that starts at `offset`: one extent that starts there, at least 1
   * and at most `length` bytes. Neighbours with equal flags (and adjacent host offsets) are merged as far as the
   * driver can see cheaply. Semantics: QEMU's `bdrv_block_status`.
   */
  status(offset: number, length: number): Extent;
}

/** The layer holds data here; with `STATUS_ZERO` as well in a cluster that was preallocated and never written. */
export const STATUS_DATA = 1;
/** The range reads as zeroes. */
export const STATUS_ZERO = 2;
/** The layer itself determines the content: it does not come from the backing node. */
export const STATUS_ALLOCATED = 4;
/** The data is compressed; it has no usable host offset. */
export const STATUS_COMPRESSED = 8;

export interface Extent {
  /** Bytes from the offset asked for. */
  readonly length: number;
  /** `STATUS_*` bits; 0 is unallocated: the backing node answers, or zeroes where there is none. */
  readonly flags: number;
  /** Where the data starts in the file of this layer, in bytes; -1 when there is no such place. */
  readonly hostOffset: number;
  /** Which file of this layer, where it has several that it counts; default the first. */
  readonly file?: number;
}

/** A part of a file of the host. */
export interface HostRange {
  readonly fd: number;
  /** Bytes. */
  readonly offset: number;
}

/** State shared by all drivers' descriptors. */
interface DescriptorBase {
  /** Absolute path of the file, or the name of an NBD export as it was given. */
  readonly path: string;
  readonly readOnly: boolean;
  /** Of a node that somebody has put together with options: what it does besides what its driver does. */
  readonly traits?: NodeTraits | undefined;
}

/** A file or block device of the host: the bottom of every graph. Its length may change. */
export interface FileDescriptor extends DescriptorBase {
  readonly driver: 'file';
  /** Process-wide descriptor number, owned by this node. */
  readonly fd: number;
  readonly blockDevice: boolean;
  /** Arena pointer to shared state: float64 length in bytes at +0. */
  readonly control: number;
  /** The same for every link to the file, and for every device node of a device. */
  readonly identity: string;
  /** Large writes go on to the disk at once, so that a flush at the end finds little left to do. */
  readonly writeBehind: boolean;
}

/** An export of an NBD server: the bottom of a graph, as a file is. Its length never changes. */
export interface NbdDescriptor extends DescriptorBase {
  readonly driver: 'nbd';
  /** What `path`, the name that the caller gave, means. */
  readonly target: NbdTarget;
  /** Bytes. */
  readonly length: number;
  /** What the server wants offsets and lengths of reads and writes to be multiples of; a power of two. */
  readonly minBlock: number;
  /** Most bytes of one read or write; a multiple of `minBlock`. */
  readonly maxBlock: number;
  /** Transmission flags of the export: `EXPORT` in `nbd/protocol/numbers.ts`. */
  readonly flags: number;
  /** Whether the server has each of the contexts that were asked for, the status of allocation first. */
  readonly contexts: readonly boolean[];
  /** Arena pointer to the shared state: see `nbd/connections.ts`. */
  readonly control: number;
  /** The same for every name of one export. */
  readonly identity: string;
}

/** Some other node that an image lies on. Where it is a filter of a file, that file's length can change. */
export interface NestedDescriptor extends DescriptorBase {
  readonly driver: 'nested';
  readonly node: NodeDescriptor;
  /** Bytes, when it was made. */
  readonly length: number;
  /** The file at the bottom, where all that is above it are filters. */
  readonly file: StorageDescriptor | undefined;
  readonly control: number;
  readonly identity: string;
}

/** What images lie on: a file, a device, an NBD export, or some other node. */
export type StorageDescriptor = FileDescriptor | NbdDescriptor | NestedDescriptor;

/**
 * What an image lies on. Reads beyond the end give zeroes. Only a file can be made longer or shorter; devices and
 * exports refuse it with ERR_STILLFRAME_NO_SPACE.
 */
export interface FileNode extends BlockNode {
  readonly descriptor: StorageDescriptor;
  /** It is a device or an export: its length cannot be changed. */
  readonly fixedLength: boolean;
  /** As {@link BlockNode.read}, into memory of this thread. */
  readBytes(offset: number, bytes: Uint8Array): void;
  /** Takes the space of a range that reads as zeroes: `falloc` from the file system, `full` by writing zeroes. */
  preallocate(offset: number, length: number, mode: 'falloc' | 'full'): void;
  /** Makes the file `length` bytes long. */
  truncate(length: number): void;
  /** Makes the file at least `length` bytes long. */
  extend(length: number): void;
  /**
   * Takes space behind the end of the file up to `end`, which becomes its end, from the file system.
   *
   * @returns false where it has none or cannot; the file is as long as before then
   */
  reserve?(end: number): boolean;
  /** Gives back space behind the end of the data that was taken for writes to come. */
  giveBack?(): void;
  /** Bytes of space that the file takes; undefined where nobody can say. */
  allocatedBytes(): number | undefined;
}

/** A raw image: the bytes of its file, padded with zeroes to 512. */
export interface RawDescriptor extends DescriptorBase {
  readonly driver: 'raw';
  readonly file: StorageDescriptor;
  /** Bytes of the file before the first one of the drive. Default 0. */
  readonly offset?: number | undefined;
  /** Bytes that were asked for; otherwise it is as long as its file. */
  readonly size?: number | undefined;
  /** Virtual size in bytes. */
  readonly length: number;
}

export interface Qcow2Descriptor extends DescriptorBase {
  readonly driver: 'qcow2';
  readonly file: StorageDescriptor;
  readonly backing: NodeDescriptor | undefined;
  readonly length: number;
  readonly clusterBits: number;
  readonly version: 2 | 3;
  readonly refcountBits: number;
  /** 0 deflate, 1 zstd. */
  readonly compressionType: number;
  /** Backing file name exactly as the header has it. */
  readonly backingFile: string | undefined;
  /** Format name from the backing format header extension. */
  readonly backingFormat: string | undefined;
  /** The external data file, open; undefined where the image has none, or it was not to be opened. */
  readonly dataFile: FileDescriptor | undefined;
  /** The image keeps its data in an external data file, open or not. */
  readonly hasDataFile: boolean;
  /** Name of the data file as the header has it. */
  readonly dataFileName: string | undefined;
  /** The data file alone is to be a valid raw image. */
  readonly dataFileRaw: boolean;
  /** Extended L2 entries: clusters have 32 subclusters. */
  readonly extendedL2: boolean;
  /** It is read as it is in an internal snapshot. */
  readonly ofSnapshot: boolean;
  readonly lazyRefcounts: boolean;
  readonly dirty: boolean;
  readonly corrupt: boolean;
  /** Arena pointer to the shared state: lock, L1 and refcount tables, caches, allocator. */
  readonly control: number;
}

/** Formats that are read and not written, by the names that `-f` has for them. */
export type ForeignName = 'vmdk' | 'vhdx' | 'vpc' | 'vdi';

/** An image of a format that is read and not written. */
export interface ForeignDescriptor extends DescriptorBase {
  readonly driver: ForeignName;
  readonly file: StorageDescriptor;
  /** Further files, in the order in which the layout counts them from 1 on. */
  readonly extents: readonly StorageDescriptor[];
  readonly backing: NodeDescriptor | undefined;
  /** Name of the parent exactly as the header has it. */
  readonly backingFile: string | undefined;
  readonly backingFormat: string | undefined;
  readonly length: number;
  /** Bytes of the blocks it is allocated in; undefined where there are none, or they differ. */
  readonly clusterSize: number | undefined;
  /** What the headers say of where the data is. */
  readonly layout: VmdkLayout | VhdxLayout | VpcLayout | VdiLayout;
}

/** A node below another one that is live itself: requests pass its copy-before-write. */
export interface LiveDescriptor extends DescriptorBase {
  readonly driver: 'live';
  readonly disk: DiskDescriptor;
  /** Bytes. */
  readonly length: number;
}

/** A node that holds nothing (QEMU: `null-co`). */
export interface NullDescriptor extends DescriptorBase {
  readonly driver: 'null-co';
  /** Bytes. */
  readonly length: number;
  /** Reads give zeroes, and not what the memory held before. */
  readonly readsZero: boolean;
  readonly latencyMs: number;
}

/** A live disk as a frame holds it (QEMU: `snapshot-access`). Where it is not read-only, it can be discarded. */
export interface SnapshotAccessDescriptor extends DescriptorBase {
  readonly driver: 'snapshot-access';
  readonly disk: DiskDescriptor;
  readonly frame: FrameDescriptor;
  /** Bytes. */
  readonly length: number;
}

/** A live node whose reads are copied into the image on top (QEMU: `copy-on-read`). */
export interface CopyOnReadDescriptor extends DescriptorBase {
  readonly driver: 'copy-on-read';
  readonly disk: DiskDescriptor;
  /** Bytes. */
  readonly length: number;
  /** How many layers below the top one are copied from; undefined: all of them. */
  readonly depth: number | undefined;
}

/** Limits what goes through (QEMU: `throttle`). */
export interface ThrottleDescriptor extends DescriptorBase {
  readonly driver: 'throttle';
  readonly child: NodeDescriptor;
  readonly length: number;
  /** Arena pointer to the buckets of its group: see `filters/throttle.ts`. */
  readonly group: number;
  /** Its number among the members of the group. */
  readonly member: number;
}

/** Fails requests, as rules say (QEMU: `blkdebug`). */
export interface BlkdebugDescriptor extends DescriptorBase {
  readonly driver: 'blkdebug';
  readonly child: NodeDescriptor;
  readonly length: number;
  readonly rules: readonly BlkdebugRule[];
  readonly limits: BlkdebugLimits;
  /** Arena pointer to its state: see `filters/blkdebug-state.ts`. */
  readonly state: number;
}

/** Writes whole clusters compressed (QEMU: `compress`). */
export interface CompressDescriptor extends DescriptorBase {
  readonly driver: 'compress';
  readonly child: NodeDescriptor;
  readonly length: number;
}

/** Takes space for what is written behind the end of a file (QEMU: `preallocate`). */
export interface PreallocateDescriptor extends DescriptorBase {
  readonly driver: 'preallocate';
  readonly child: NodeDescriptor;
  /** Bytes, when it was made. */
  readonly length: number;
  /** Bytes that are taken at once. */
  readonly size: number;
  /** Bytes that the length of the file is a multiple of then. */
  readonly align: number;
  /** Arena pointer to its state: see `filters/preallocate.ts`. */
  readonly state: number;
}

/** Nodes that pass requests on to the one below. */
export type FilterDescriptor =
  | ThrottleDescriptor
  | BlkdebugDescriptor
  | CompressDescriptor
  | PreallocateDescriptor;

/** A node with a format. */
export type ImageDescriptor = RawDescriptor | Qcow2Descriptor | ForeignDescriptor;

export type NodeDescriptor =
  | StorageDescriptor
  | ImageDescriptor
  | LiveDescriptor
  | CopyOnReadDescriptor
  | NullDescriptor
  | SnapshotAccessDescriptor
  | FilterDescriptor;
export type DriverName = NodeDescriptor['driver'];
