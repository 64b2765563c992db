import { StillframeError } from '../../errors.js';
import {
  L2_COMPRESSED,
  L2_DATA,
  L2_FEATURE_DATA_FILE,
  L2_FEATURE_SUBCLUSTERS,
  L2_FEATURE_ZERO_FLAG,
  L2_INVALID,
  L2_UNALLOCATED,
  L2_UNALLOCATED_PLACE,
  L2_ZERO_ALLOCATED,
  L2_ZERO_PLAIN,
} from '../../kernels/kernels.js';
import type { Runtime } from '../../kernels/runtime.js';
import { checkCompression } from '../compression.js';
import {
  type BlockNode,
  type Extent,
  type Qcow2Descriptor,
  STATUS_ALLOCATED,
  STATUS_COMPRESSED,
  STATUS_DATA,
  STATUS_ZERO,
} from '../node.js';
import type { FileNode } from '../raw/file.js';
import { chainStatus } from '../status.js';
import { compressCluster } from './compress.js';
import { decompressCluster } from './decompress.js';
import { type HostRun, Metadata } from './metadata.js';
import { looksPreallocated } from './preallocation.js';
import { ScratchPool } from './scratch.js';
import { PREALLOCATED, RELIEVING } from './state.js';

/** What the tables say of a range: subclusters of one kind, with a host place contiguous in the file. */
interface Lookup {
  /** One of the `L2_*` kinds. */
  readonly kind: number;
  /** Place of the first byte asked for (compressed: of the compressed data), bytes. */
  readonly hostOffset: number;
  /** Bytes from the offset asked for. */
  readonly length: number;
  readonly copied: boolean;
  readonly compressedLength: number;
}

/** How a first part of a write is carried out. Offsets and lengths are bytes. */
interface WritePlan {
  /** Where its first cluster is in the file; in place: its first byte. */
  readonly host: number;
  /** Of the guest's data. */
  readonly length: number;
  /** What of the drive has to be written along with it; undefined: it is written in place. */
  readonly part: { readonly start: number; readonly end: number } | undefined;
  /** Newly allocated clusters. */
  readonly run: HostRun | undefined;
  /** The clusters read as zeroes so far. */
  readonly blank: boolean;
}

/** How a change treats one cluster. */
type Change =
  | 'keep'
  /** Reads as zeroes from now on; the host cluster is given up. */
  | 'zero'
  /** Reads as zeroes from now on; the host cluster stays ours. */
  | 'zero-keep'
  /** Unallocated from now on. */
  | 'clear'
  /** Zeroes have to be written. */
  | 'write';

/** A compressed cluster on its way into the file. */
interface CompressedPiece {
  readonly cluster: number;
  /** Where it is in the buffer. */
  readonly at: number;
  /** Bytes. */
  readonly length: number;
  /** Its place in the file, -1: none yet. */
  host: number;
}

/** The smallest part of the file that others look at. */
const SECTOR = 512;
/** Clusters that are compressed before the first of them is written, at most: as many frees as surely have room. */
const COMPRESSED_STEP_CLUSTERS = 512;
/** Slices that one status call looks at, at most. */
const STATUS_SLICES = 64;
/** How long a mutation waits for reads in flight, so that frees can be applied. */
const RELIEF_WAIT_MS = 1000;
/** Bytes of decompressed clusters a thread remembers. */
const DECOMPRESSED_CACHE_BYTES = 4 * 1024 * 1024;

interface Decompressed {
  readonly hostOffset: number;
  readonly generation: number;
  readonly bytes: Uint8Array;
}

/** Driver `qcow2`, versions 2 and 3: one thread's facade. */
export class Qcow2Node implements BlockNode {
  readonly descriptor: Qcow2Descriptor;
  readonly length: number;
  readonly readOnly: boolean;
  readonly clusterSize: number;
  readonly backing: BlockNode | undefined;
  readonly #runtime: Runtime;
  readonly #file: FileNode;
  /** Where the guest's data is: the image's file or its external data file. */
  readonly #data: FileNode;
  readonly #meta: Metadata;
  /** `L2_FEATURE_*` bits. */
  readonly #features: number;
  /** What of a cluster has a state of its own, bytes: a subcluster, or the whole cluster. */
  readonly #subclusterSize: number;
  readonly #scratch: ScratchPool;
  readonly #hasZeroFlag: boolean;
  /** Unallocated is not zero: there is, or the header says there is, a backing file. */
  readonly #hasBacking: boolean;
  /** Most recently used last. */
  #decompressed: Decompressed[] = [];

  constructor(
    runtime: Runtime,
    descriptor: Qcow2Descriptor,
    file: FileNode,
    dataFile: FileNode | undefined,
    backing: BlockNode | undefined,
  ) {
    this.descriptor = descriptor;
    this.length = descriptor.length;
    this.readOnly = descriptor.readOnly;
    this.clusterSize = 2 ** descriptor.clusterBits;
    this.backing = backing;
    this.#runtime = runtime;
    this.#file = file;
    this.#data = dataFile ?? file;
    this.#meta = new Metadata(runtime, descriptor, file, dataFile);
    this.#subclusterSize = this.clusterSize / this.#meta.subclusters;
    this.#features =
      (descriptor.version >= 3 ? L2_FEATURE_ZERO_FLAG : 0) |
      (descriptor.extendedL2 ? L2_FEATURE_SUBCLUSTERS : 0) |
      (descriptor.hasDataFile ? L2_FEATURE_DATA_FILE : 0);
    this.#scratch = new ScratchPool(this.#meta.state);
    this.#hasZeroFlag = descriptor.version >= 3;
    this.#hasBacking = backing !== undefined || descriptor.backingFile !== undefined;
  }

  // ---- Reading ------------------------------------------------------------------------------------------------

  read(offset: number, pointer: number, length: number): void {
    this.#check('read', offset, length);
    this.#read(offset, pointer, length, -1);
  }

  /** @param input two clusters of memory for compressed data, -1: taken from the pool where needed */
  #read(offset: number, pointer: number, length: number, input: number): void {
    const meta = this.#meta;
    const { u8 } = this.#runtime.arena;
    let epoch = -1;
    try {
      while (length > 0) {
        let generation = 0;
        const found = meta.state.withLock(() => {
          // Counted before the look-up: what it finds is not reused until the count is taken back.
          if (epoch < 0) epoch = meta.enterReader();
          generation = meta.state.get('generation');
          return this.#lookup(offset, length);
        });
        const bytes = found.length;
        switch (found.kind) {
          case L2_DATA:
            this.#checkDataFileOpen();
            this.#file.event?.('read_aio');
            this.#data.read(found.hostOffset, pointer, bytes);
            break;
          case L2_COMPRESSED: {
            const cluster = this.#decompress(found, offset, generation, input);
            const within = offset % this.clusterSize;
            u8.set(cluster.subarray(within, within + bytes), pointer);
            break;
          }
          case L2_UNALLOCATED:
          case L2_UNALLOCATED_PLACE:
            this.#readBacking(offset, pointer, bytes);
            break;
          default:
            u8.fill(0, pointer, pointer + bytes);
        }
        offset += bytes;
        pointer += bytes;
        length -= bytes;
      }
    } finally {
      if (epoch >= 0) meta.leaveReader(epoch);
    }
  }

  #readBacking(offset: number, pointer: number, length: number): void {
    const { backing } = this;
    const inside = backing === undefined ? 0 : Math.max(0, Math.min(length, backing.length - offset));
    if (inside > 0) {
      this.#file.event?.('read_backing_aio');
      backing?.read(offset, pointer, inside);
    }
    if (inside < length) this.#runtime.arena.u8.fill(0, pointer + inside, pointer + length);
  }

  /** The cluster whose compressed data `found` tells of. The caller is a counted reader. */
  #decompress(found: Lookup, offset: number, generation: number, input: number): Uint8Array {
    // The bytes at a host offset change only after they were freed, and then the generation has moved on.
    const cache = this.#decompressed;
    const known = cache.findIndex(
      (entry) => entry.hostOffset === found.hostOffset && entry.generation === generation,
    );
    if (known >= 0) {
      const [entry] = cache.splice(known, 1);
      if (entry !== undefined) {
        cache.push(entry);
        return entry.bytes;
      }
    }
    const load = (pointer: number): Uint8Array => {
      this.#file.event?.('read_compressed');
      this.#file.read(found.hostOffset, pointer, found.compressedLength);
      return this.#runtime.arena.copyOut(pointer, found.compressedLength);
    };
    const compressed = input >= 0 ? load(input) : this.#scratch.with(load);
    const bytes = decompressCluster(compressed, this.descriptor.compressionType, this.clusterSize);
    if (bytes === undefined) {
      throw this.#meta.damaged(
        `the compressed cluster at guest offset ${offset - (offset % this.clusterSize)} (file offset ${found.hostOffset}) does not decompress to ${this.clusterSize} bytes`,
      );
    }
    const most = Math.max(1, Math.min(16, DECOMPRESSED_CACHE_BYTES / this.clusterSize));
    if (cache.length >= most) cache.shift();
    cache.push({ hostOffset: found.hostOffset, generation, bytes });
    return bytes;
  }

  /** What the tables say of the range, up to the end of a slice. Under the lock. */
  #lookup(offset: number, length: number): Lookup {
    const meta = this.#meta;
    const { clusterSize } = this;
    const cluster = Math.floor(offset / clusterSize);
    const within = offset % clusterSize;
    const l1Index = Math.floor(cluster / meta.l2Entries);
    const l2Index = cluster % meta.l2Entries;
    const slot = meta.l2Slice(l1Index, l2Index);
    if (slot < 0) {
      const bytes = Math.min(length, (meta.l2Entries - l2Index) * clusterSize - within);
      return { kind: L2_UNALLOCATED, hostOffset: -1, length: bytes, copied: false, compressedLength: 0 };
    }
    const { kernels } = this.#runtime;
    const { subclusters } = meta;
    const size = this.#subclusterSize;
    const index = (l2Index % meta.sliceEntries) * subclusters + Math.floor(within / size);
    const inside = within % size;
    const most = Math.min(meta.sliceEntries * subclusters - index, Math.ceil((inside + length) / size));
    const slice = meta.l2.pointer(slot);
    const count = kernels.l2Extent(slice, index, most, this.descriptor.clusterBits, this.#features);
    const kind = kernels.l2Kind;
    const host = kernels.l2HostOffset;
    const compressed = kind === L2_COMPRESSED;
    const placed = kind === L2_DATA || kind === L2_ZERO_ALLOCATED || kind === L2_UNALLOCATED_PLACE;
    if (
      kind === L2_INVALID ||
      (compressed && host >= this.#file.length) ||
      (placed && this.descriptor.hasDataFile && host !== cluster * clusterSize) ||
      !Number.isSafeInteger(host + within + length)
    ) {
      const entry = meta.entry(cluster);
      throw meta.corrupt(
        `entry ${l2Index} of the L2 table at offset ${meta.l2TableOffset(l1Index)} (guest offset ${cluster * clusterSize}) is invalid: 0x${entry.toString(16)}`,
      );
    }
    return {
      kind,
      hostOffset: compressed ? host : host + within,
      length: Math.min(length, count * size - inside),
      copied: kernels.l2Copied,
      compressedLength: compressed ? kernels.l2CompressedLength : 0,
    };
  }

  /** The guest's data is in a file that we were told not to open. */
  #checkDataFileOpen(): void {
    if (this.descriptor.hasDataFile && this.descriptor.dataFile === undefined) {
      throw new StillframeError(
        'ERR_STILLFRAME_BACKING_MISSING',
        `the data of '${this.descriptor.path}' is in the external data file '${this.descriptor.dataFileName ?? ''}', which is not open`,
      );
    }
  }

  status(offset: number, length: number): Extent {
    this.#check('look at', offset, length);
    const extent = this.#meta.state.withLock(() => {
      const first = this.#extentOf(this.#lookup(offset, length));
      let total = first.length;
      for (let slices = 1; total < length && slices < STATUS_SLICES; slices++) {
        const next = this.#extentOf(this.#lookup(offset + total, length - total));
        const adjacent = next.hostOffset === (first.hostOffset < 0 ? -1 : first.hostOffset + total);
        if (next.flags !== first.flags || !adjacent) break;
        total += next.length;
      }
      return { ...first, length: total };
    });
    if (!(extent.flags & STATUS_DATA) || extent.hostOffset < 0 || !this.#preallocated) return extent;
    const inFile = this.#data.status(extent.hostOffset, extent.length);
    return { ...extent, length: inFile.length, flags: extent.flags | (inFile.flags & STATUS_ZERO) };
  }

  /** Found out once for all threads. */
  get #preallocated(): boolean {
    const { i32 } = this.#runtime.arena;
    const { state } = this.#meta;
    const word = (state.control + PREALLOCATED) >> 2;
    let known = Atomics.load(i32, word);
    if (known === 0) {
      const { refcountBits } = this.descriptor;
      known = looksPreallocated(this.#runtime, this.#file, state, this.clusterSize, refcountBits) ? 2 : 1;
      Atomics.store(i32, word, known);
    }
    return known === 2;
  }

  #extentOf(found: Lookup): Extent {
    const { length, hostOffset } = found;
    switch (found.kind) {
      case L2_DATA:
        return { length, flags: STATUS_DATA | STATUS_ALLOCATED, hostOffset };
      case L2_COMPRESSED:
        return { length, flags: STATUS_DATA | STATUS_ALLOCATED | STATUS_COMPRESSED, hostOffset: -1 };
      case L2_UNALLOCATED:
        return { length, flags: 0, hostOffset: -1 };
      case L2_UNALLOCATED_PLACE:
        return { length, flags: 0, hostOffset };
      default: {
        const place = found.kind === L2_ZERO_ALLOCATED ? hostOffset : -1;
        return { length, flags: STATUS_ZERO | STATUS_ALLOCATED, hostOffset: place };
      }
    }
  }

  // ---- Writing ------------------------------------------------------------------------------------------------

  write(offset: number, pointer: number, length: number): void {
    this.#beginMutation('write', offset, length);
    while (length > 0) {
      const done = this.#writeStep(offset, pointer, length);
      offset += done;
      pointer += done;
      length -= done;
    }
  }

  /** Writes a first part of the range. Returns its bytes. */
  #writeStep(offset: number, pointer: number, length: number): number {
    const meta = this.#meta;
    const { clusterSize } = this;
    const cluster = Math.floor(offset / clusterSize);
    const plan = this.#withRoomForFrees(meta.sliceEntries, (): WritePlan => {
      const found = this.#lookup(offset, length);
      if (found.kind === L2_DATA && found.copied) {
        const start = found.hostOffset - (found.hostOffset % clusterSize);
        this.#checkPlace(start, found.hostOffset + found.length - start);
        return {
          part: undefined,
          host: found.hostOffset,
          length: found.length,
          run: undefined,
          blank: false,
        };
      }
      meta.prepareL2(Math.floor(cluster / meta.l2Entries));
      if (isEmptyPlace(found)) {
        const host = found.hostOffset - (offset % clusterSize);
        this.#checkPlace(host, found.length + (offset % clusterSize));
        const part = this.#partOf(offset, found.length, true);
        return { part, host, length: found.length, run: undefined, blank: false };
      }
      const wanted = this.#clustersToAllocate(offset, length);
      const { hasDataFile } = this.descriptor;
      const run = hasDataFile ? undefined : meta.allocate(wanted);
      const { offset: host, clusters } = run ?? { offset: cluster * clusterSize, clusters: wanted };
      // What lies behind the end of the file was never written and reads as zeroes.
      const blank = run !== undefined && run.offset >= this.#file.length;
      const bytes = Math.min(length, clusters * clusterSize - (offset % clusterSize));
      const part = this.#partOf(offset, bytes, false);
      return { part, host, length: bytes, run, blank };
    });
    const { part } = plan;
    if (part === undefined) {
      this.#file.event?.('write_aio');
      this.#data.write(plan.host, pointer, plan.length);
      return plan.length;
    }
    let mapped = 0;
    try {
      this.#writeClusters(offset, pointer, plan.length, plan.host, part, plan.blank);
      if (plan.run !== undefined) this.#file.extend(plan.host + plan.run.clusters * clusterSize);
      meta.state.withLock(() => {
        const size = this.#subclusterSize;
        const first = cluster * clusterSize;
        const clusters = Math.ceil((part.end - first) / clusterSize);
        const last = first + (clusters - 1) * clusterSize;
        const to = Math.ceil((part.end - last) / size);
        meta.mapData(cluster, clusters, plan.host, (part.start - first) / size, to);
        mapped = clusters;
      });
    } finally {
      this.#releaseUnmapped(plan.run, mapped);
    }
    this.#relieveIfCrowded();
    return plan.length;
  }

  /** Data written in place must not destroy metadata. Under the lock. */
  #checkPlace(host: number, length: number): void {
    if (this.descriptor.hasDataFile) return;
    const { clusterSize } = this;
    this.#meta.checkOverlap(host, Math.ceil(length / clusterSize) * clusterSize, 'data of the guest');
  }

  /** How many clusters from `offset` on need a new place, up to the end of the slice. Under the lock. */
  #clustersToAllocate(offset: number, length: number): number {
    const meta = this.#meta;
    const first = Math.floor(offset / this.clusterSize);
    const sliceEnd = (Math.floor(first / meta.sliceEntries) + 1) * meta.sliceEntries * this.clusterSize;
    const end = Math.min(offset + length, sliceEnd);
    let at = offset;
    while (at < end) {
      const found = this.#lookup(at, end - at);
      // Only the first cluster may begin in its middle: where a later one has a place, it has it from its start on.
      if (found.copied && (found.kind === L2_DATA || isEmptyPlace(found))) break;
      at += found.length;
    }
    return Math.ceil(at / this.clusterSize) - first;
  }

  /**
   * What has to be written so that the bytes [offset, offset + length) can be: whole subclusters, and in clusters
   * that get a new place (not `inPlace`) all that has data so far. Bytes of the drive, the end rounded up to its
   * subcluster. Under the lock.
   */
  #partOf(offset: number, length: number, inPlace: boolean): { start: number; end: number } {
    const { clusterSize } = this;
    const size = this.#subclusterSize;
    const end = offset + length;
    let start = offset - (offset % size);
    let stop = Math.ceil(end / size) * size;
    if (!inPlace) {
      const firstCluster = offset - (offset % clusterSize);
      const lastCluster = end - 1 - ((end - 1) % clusterSize);
      start = Math.min(start, firstCluster + this.#dataIn(firstCluster / clusterSize).from * size);
      stop = Math.max(stop, lastCluster + this.#dataIn(lastCluster / clusterSize).to * size);
    }
    // A data file is as long as the drive.
    return { start, end: this.descriptor.hasDataFile ? Math.min(stop, this.length) : stop };
  }

  /** The subclusters [from, to) that hold all data of a cluster; nothing where `to` is 0. Under the lock. */
  #dataIn(cluster: number): { from: number; to: number } {
    const all = this.#meta.subclusters;
    const { kind } = this.#lookup(cluster * this.clusterSize, 1);
    if (kind === L2_COMPRESSED) return { from: 0, to: all };
    if (all === 1) return kind === L2_DATA ? { from: 0, to: 1 } : { from: 1, to: 0 };
    const allocated = this.#meta.allocatedSubclusters(cluster);
    if (allocated === 0) return { from: all, to: 0 };
    return { from: 31 - Math.clz32(allocated & -allocated), to: 32 - Math.clz32(allocated) };
  }

  /**
   * Writes the range into host clusters, the first of them at `host`. What the range leaves of `part` is filled up
   * with what the guest sees there now; `blank`: the host clusters read as zeroes so far.
   */
  #writeClusters(
    offset: number,
    pointer: number,
    length: number,
    host: number,
    part: { start: number; end: number },
    blank: boolean,
  ): void {
    const { clusterSize } = this;
    const end = offset + length;
    const firstStart = offset - (offset % clusterSize);
    let at = offset;
    while (at < end) {
      const start = at - (at % clusterSize);
      const lead = Math.max(start, part.start);
      const whole = Math.floor((end - at) / clusterSize) * clusterSize;
      const target = host + (start - firstStart);
      if (at === start && whole > 0) {
        this.#file.event?.('write_aio');
        this.#data.write(target, pointer + (at - offset), whole);
        at += whole;
        continue;
      }
      const stop = Math.min(end, start + clusterSize);
      const tail = Math.min(part.end, start + clusterSize);
      const complete = at === lead && stop === tail;
      const zeroAround = !complete && blank && this.#readsZero(lead, at) && this.#readsZero(stop, tail);
      if (complete || zeroAround) {
        if (zeroAround) this.#file.event?.('cluster_alloc_space');
        this.#file.event?.('write_aio');
        this.#data.write(target + (at - start), pointer + (at - offset), stop - at);
      } else {
        this.#writeFilledUp(
          { start: lead, end: tail },
          at,
          stop,
          pointer + (at - offset),
          target + (lead - start),
        );
      }
      at = stop;
    }
  }

  /** Whether the bytes [from, to) of one cluster are known to read as zeroes. */
  #readsZero(from: number, to: number): boolean {
    const { backing } = this;
    const end = Math.min(to, this.length);
    return this.#meta.state.withLock(() => {
      for (let at = from; at < end; ) {
        const { kind, length } = this.#lookup(at, end - at);
        const beyondBacking = !this.#hasBacking || (backing !== undefined && at >= backing.length);
        if (!isZero(kind) && !(isUnallocated(kind) && beyondBacking)) return false;
        at += length;
      }
      return true;
    });
  }

  /** Writes a part of one cluster to `host`: new bytes [from, to), old ones around them. */
  #writeFilledUp(
    part: { start: number; end: number },
    from: number,
    to: number,
    pointer: number,
    host: number,
  ): void {
    const { start, end } = part;
    const { u8 } = this.#runtime.arena;
    this.#scratch.with((scratch) => {
      const input = scratch + this.clusterSize;
      const fill = (begin: number, stop: number): void => {
        const visible = Math.max(begin, Math.min(stop, this.length));
        if (visible > begin) {
          this.#checkBackingOpen(begin, visible - begin);
          this.#file.event?.('cow_read');
          this.#read(begin, scratch + (begin - start), visible - begin, input);
        }
        u8.fill(0, scratch + (visible - start), scratch + (stop - start));
      };
      fill(start, from);
      fill(to, end);
      u8.copyWithin(scratch + (from - start), pointer, pointer + (to - from));
      this.#file.event?.('write_aio');
      this.#file.event?.('cow_write');
      this.#data.write(host, scratch, end - start);
    });
  }

  /** Old content that is in a backing file we were told not to open is not zeroes. */
  #checkBackingOpen(offset: number, length: number): void {
    if (this.backing !== undefined || !this.#hasBacking) return;
    const unknown = this.#meta.state.withLock(() => {
      for (let at = offset; at < offset + length; ) {
        const found = this.#lookup(at, offset + length - at);
        if (isUnallocated(found.kind)) return true;
        at += found.length;
      }
      return false;
    });
    if (!unknown) return;
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `cannot write a part of the cluster at ${offset - (offset % this.#subclusterSize)} of '${this.descriptor.path}': the rest of it is in the backing file '${this.descriptor.backingFile}', which is not open; write whole clusters or open the backing file`,
    );
  }

  writeUnits(offset: number, pointer: number, length: number, unit: number, skip: number): void {
    this.#beginMutation('write', offset, length);
    if (length === 0) return;
    if (unit % this.clusterSize !== 0 || offset % unit !== 0) {
      throw new RangeError(
        `units of ${unit} bytes at ${offset} are not whole clusters of ${this.clusterSize}`,
      );
    }
    const units = Math.ceil(length / unit);
    const runs: { first: number; end: number }[] = [];
    const { kernels } = this.#runtime;
    for (let at = kernels.bitmapNextClear(skip, 0, units); at >= 0; ) {
      const next = kernels.bitmapNextSet(skip, at, units);
      const end = next < 0 ? units : next;
      runs.push({ first: at, end });
      at = end < units ? kernels.bitmapNextClear(skip, end, units) : -1;
    }
    const bulk = this.#canWriteBulk(offset, length, unit, runs);
    if (!bulk) {
      for (const run of runs) {
        const start = run.first * unit;
        this.write(offset + start, pointer + start, Math.min(run.end * unit, length) - start);
      }
      return;
    }
    const bytes = kernels.compactUnits(pointer, length, unit, skip);
    this.#writeBulk(offset, pointer, bytes, unit, runs);
  }

  writeCompressed(offset: number, pointer: number, length: number): void {
    const { clusterSize } = this;
    this.#beginMutation('write', offset, length);
    checkCompression(this.descriptor);
    const end = offset + length;
    if (offset % clusterSize !== 0 || (end % clusterSize !== 0 && end !== this.length)) {
      throw new RangeError(`${length} bytes at ${offset} are not whole clusters of ${clusterSize}`);
    }
    const step = COMPRESSED_STEP_CLUSTERS * clusterSize;
    for (let done = 0; done < length; done += step) {
      this.#writeCompressedStep(offset + done, pointer + done, Math.min(step, length - done));
    }
  }

  /**
   * Compresses whole clusters and writes them. The compressed data moves together in the buffer; clusters that do not
   * compress stay where they are, and are written last so that they do not part the compressed ones in the file:
   *
   *     | cluster 0 | cluster 1 | cluster 2 | cluster 3 |      becomes, where 1 does not compress,
   *     | 0 | -     | cluster 1 | 2 | 3 | -             |
   */
  #writeCompressedStep(offset: number, pointer: number, length: number): void {
    const { clusterSize } = this;
    const { u8 } = this.#runtime.arena;
    const pieces: CompressedPiece[] = [];
    const plain: { offset: number; length: number }[] = [];
    let packed = 0;
    for (let at = 0; at < length; at += clusterSize) {
      const bytes = Math.min(clusterSize, length - at);
      const compressed = this.#compress(pointer + at, bytes);
      if (compressed === undefined) {
        const last = plain.at(-1);
        if (last !== undefined && last.offset + last.length === at) last.length += bytes;
        else plain.push({ offset: at, length: bytes });
        packed = at + bytes;
        continue;
      }
      u8.set(compressed, pointer + packed);
      pieces.push({ cluster: (offset + at) / clusterSize, at: packed, length: compressed.length, host: -1 });
      packed += compressed.length;
    }
    if (pieces.length > 0) this.#writePieces(pointer, pieces);
    for (const run of plain) this.write(offset + run.offset, pointer + run.offset, run.length);
    this.#relieveIfCrowded();
  }

  /** @param bytes a cluster, or what the drive has of its last one */
  #compress(pointer: number, bytes: number): Uint8Array | undefined {
    const { clusterSize } = this;
    const { u8 } = this.#runtime.arena;
    const { compressionType } = this.descriptor;
    if (bytes === clusterSize) return compressCluster(u8.subarray(pointer, pointer + bytes), compressionType);
    return this.#scratch.with((scratch) => {
      u8.copyWithin(scratch, pointer, pointer + bytes);
      u8.fill(0, scratch + bytes, scratch + clusterSize);
      return compressCluster(u8.subarray(scratch, scratch + clusterSize), compressionType);
    });
  }

  /** Takes space for compressed clusters, which are one behind the other in the buffer, writes and maps them. */
  #writePieces(pointer: number, pieces: readonly CompressedPiece[]): void {
    const meta = this.#meta;
    let mapped = 0;
    try {
      meta.state.withLock(() => {
        // The tables first, so that none of them comes to lie behind data that could go on there.
        for (const { cluster } of pieces) meta.prepareL2(Math.floor(cluster / meta.l2Entries));
        for (const piece of pieces) {
          piece.host = meta.allocateBytes(piece.length);
          this.#file.event?.('l2_update_compressed');
        }
      });
      for (let first = 0; first < pieces.length; ) {
        const run = contiguous(pieces, first);
        // Whoever reads a compressed cluster reads whole sectors.
        this.#file.extend(Math.ceil((run.host + run.length) / SECTOR) * SECTOR);
        this.#file.event?.('write_compressed');
        this.#file.write(run.host, pointer + run.at, run.length);
        first = run.end;
      }
      this.#withRoomForFrees(pieces.length, () => {
        for (const { cluster, host, length } of pieces) {
          meta.prepareL2(Math.floor(cluster / meta.l2Entries));
          meta.mapCompressed(cluster, host, length);
          mapped++;
        }
      });
    } finally {
      const unused = pieces.slice(mapped).filter((piece) => piece.host >= 0);
      if (unused.length > 0) {
        meta.state.withLock(() => {
          for (const { host, length } of unused) meta.releaseBytes(host, length);
        });
      }
    }
  }

  /** Whether every unit to write is of whole clusters without a host cluster so far. */
  #canWriteBulk(
    offset: number,
    length: number,
    unit: number,
    runs: readonly { first: number; end: number }[],
  ) {
    if (this.descriptor.hasDataFile) return false;
    if ((offset + length) % this.clusterSize !== 0 && offset + length !== this.length) return false;
    return this.#meta.state.withLock(() =>
      runs.every((run) => {
        const end = Math.min(offset + run.end * unit, offset + length);
        for (let at = offset + run.first * unit; at < end; ) {
          const found = this.#lookup(at, end - at);
          if (found.kind !== L2_UNALLOCATED && found.kind !== L2_ZERO_PLAIN) return false;
          at += found.length;
        }
        return true;
      }),
    );
  }

  /** Writes `bytes` bytes of compacted units, the unit runs say where to, into as few host runs as possible. */
  #writeBulk(
    offset: number,
    pointer: number,
    bytes: number,
    unit: number,
    runs: readonly { first: number; end: number }[],
  ): void {
    const meta = this.#meta;
    const { clusterSize } = this;
    const perUnit = unit / clusterSize;
    const total = Math.ceil(bytes / clusterSize);
    // The guest clusters of the compacted buffer, in order.
    const guest: { first: number; count: number }[] = [];
    let left = total;
    for (const run of runs) {
      const count = Math.min(left, (run.end - run.first) * perUnit);
      guest.push({ first: offset / clusterSize + run.first * perUnit, count });
      left -= count;
    }
    let done = 0;
    while (done < total) {
      const run = meta.state.withLock(() => {
        for (const { first, count } of guest) {
          const last = Math.floor((first + count - 1) / meta.l2Entries);
          for (let l1 = Math.floor(first / meta.l2Entries); l1 <= last; l1++) meta.prepareL2(l1);
        }
        return meta.allocate(total - done);
      });
      let mapped = 0;
      try {
        const from = done * clusterSize;
        const size = Math.min(bytes - from, run.clusters * clusterSize);
        this.#file.event?.('write_aio');
        this.#file.write(run.offset, pointer + from, size);
        const rest = run.clusters * clusterSize - size;
        // The drive ends inside of the last cluster.
        if (rest > 0) this.#writeZeroBytes(run.offset + size, rest);
        meta.state.withLock(() => {
          for (const part of this.#partsOf(guest, done, run)) {
            meta.mapData(part.cluster, part.count, run.offset + mapped * clusterSize);
            mapped += part.count;
          }
        });
      } finally {
        this.#releaseUnmapped(run, mapped);
      }
      done += run.clusters;
      this.#relieveIfCrowded();
    }
  }

  /** The guest clusters number `from` and following that the host run holds, in parts of one slice. */
  *#partsOf(guest: readonly { first: number; count: number }[], from: number, run: HostRun) {
    const { sliceEntries } = this.#meta;
    let skipped = 0;
    let left = run.clusters;
    for (const { first, count } of guest) {
      for (let at = Math.max(0, from - skipped); at < count && left > 0; ) {
        const cluster = first + at;
        const n = Math.min(sliceEntries - (cluster % sliceEntries), count - at, left);
        yield { cluster, count: n };
        at += n;
        left -= n;
      }
      skipped += count;
    }
  }

  /** Writes zeroes into the file. */
  #writeZeroBytes(host: number, length: number): void {
    const { state } = this.#meta;
    const step = state.get('zeroBytes');
    for (let done = 0; done < length; done += step) {
      this.#file.write(host + done, state.get('zeroes'), Math.min(step, length - done));
    }
  }

  /** Gives back what was allocated and, since something failed, is not referred to. */
  #releaseUnmapped(run: HostRun | undefined, mapped: number): void {
    if (run === undefined || mapped === run.clusters) return;
    const rest = { offset: run.offset + mapped * this.clusterSize, clusters: run.clusters - mapped };
    this.#meta.state.withLock(() => this.#meta.release(rest));
  }

  /** Writes metadata back where much of it is waiting. */
  #relieveIfCrowded(): void {
    if (this.#meta.state.withLock(() => this.#meta.l2.crowded)) this.#relieve();
  }

  /** Writes metadata back, unless another thread is at it. */
  #relieve(): void {
    const { i32 } = this.#runtime.arena;
    const word = (this.#meta.state.control + RELIEVING) >> 2;
    if (Atomics.compareExchange(i32, word, 0, 1) !== 0) return;
    try {
      this.#meta.relieve();
    } finally {
      Atomics.store(i32, word, 0);
    }
  }

  /** Runs `body` under the lock once the list of frees has room for `count` more. */
  #withRoomForFrees<T>(count: number, body: () => T): T {
    const meta = this.#meta;
    const { state } = meta;
    for (let attempt = 0; ; attempt++) {
      state.lock();
      try {
        if (meta.hasRoomForFrees(count)) return body();
        meta.reap();
        // Reads that never end must not stop writes; the list still has its other half.
        if (meta.hasRoomForFrees(count) || attempt > RELIEF_WAIT_MS) return body();
      } finally {
        state.unlock();
      }
      if (attempt % 100 === 0) this.#relieve();
      else this.#sleep(1);
    }
  }

  #sleep(ms: number): void {
    const { i32 } = this.#runtime.arena;
    const word = (this.#meta.state.control + RELIEVING) >> 2;
    Atomics.wait(i32, word, Atomics.load(i32, word), ms);
  }

  // ---- Zeroes and discards ------------------------------------------------------------------------------------

  /**
   * The layer itself says zero afterwards, even where it would read as zeroes anyway: an image may be given another
   * backing file. Version 2 has no way to say so but data, which only an image with a backing file is worth.
   */
  writeZeroes(offset: number, length: number, mayUnmap: boolean): void {
    this.#beginMutation('write zeroes', offset, length);
    if (this.descriptor.dataFileRaw) this.#data.writeZeroes(offset, length, mayUnmap);
    const { clusterSize } = this;
    const end = offset + length;
    const wholeStart = Math.ceil(offset / clusterSize) * clusterSize;
    const wholeEnd = this.#zeroedEnd(end);
    if (wholeStart >= wholeEnd) {
      this.#zeroPart(offset, Math.min(end, wholeStart) - offset, mayUnmap);
      if (end > wholeStart) this.#zeroPart(wholeStart, end - wholeStart, mayUnmap);
      return;
    }
    this.#zeroPart(offset, wholeStart - offset, mayUnmap);
    this.#zeroClusters(wholeStart / clusterSize, Math.ceil(wholeEnd / clusterSize), mayUnmap);
    this.#zeroPart(wholeEnd, end - wholeEnd, mayUnmap);
  }

  /** Whole clusters of images that have a flag for zeroes. */
  writeZeroesFast(offset: number, length: number, mayUnmap: boolean): boolean {
    const end = offset + length;
    const whole = offset % this.clusterSize === 0 && this.#zeroedEnd(end) === end;
    if (!whole || !this.#hasZeroFlag || this.descriptor.dataFileRaw) return false;
    this.writeZeroes(offset, length, mayUnmap);
    return true;
  }

  #zeroClusters(first: number, end: number, mayUnmap: boolean): void {
    this.#changeClusters(first, end, (kind) => {
      if (!this.#hasZeroFlag) {
        if (this.#hasBacking) return 'write';
        return kind === L2_UNALLOCATED ? 'keep' : 'clear';
      }
      if (kind === L2_ZERO_PLAIN) return 'keep';
      if (kind === L2_ZERO_ALLOCATED) return mayUnmap ? 'zero' : 'keep';
      return kind === L2_UNALLOCATED || kind === L2_COMPRESSED || mayUnmap ? 'zero' : 'zero-keep';
    });
  }

  discard(offset: number, length: number): void {
    this.#beginMutation('discard', offset, length);
    // Without a zero flag the backing file's old data would come back to light.
    if (!this.#hasZeroFlag && this.#hasBacking) return;
    const { clusterSize } = this;
    const first = Math.ceil(offset / clusterSize);
    const end = Math.ceil(this.#wholeEnd(offset + length) / clusterSize);
    this.#changeClusters(first, end, (kind, cluster) => {
      // Subclusters without a place read as zeroes, flagged or not, where nothing is below.
      const empty = !this.#hasBacking && this.#meta.entry(cluster) === 0n;
      if (kind === L2_ZERO_PLAIN || empty) return 'keep';
      return this.#hasZeroFlag ? 'zero' : 'clear';
    });
  }

  /** Makes whatever lies behind the first `length` bytes unallocated, and drops the tables nobody needs then. */
  cutTo(length: number): void {
    this.#beginMutation('cut', length, 0);
    const first = Math.ceil(length / this.clusterSize);
    const end = Math.ceil(this.length / this.clusterSize);
    this.#changeClusters(first, end, (kind) => (kind === L2_UNALLOCATED ? 'keep' : 'clear'));
    this.flush();
    const meta = this.#meta;
    for (let l1 = Math.ceil(first / meta.l2Entries); l1 < meta.l1Entries; l1++) {
      this.#withRoomForFrees(1, () => meta.dropL2(l1));
    }
    this.flush();
  }

  /**
   * Gives unallocated clusters from `offset` on a place in the file, read as zeroes, and the cluster around `offset`
   * one, too; it reads as before in front of `offset`.
   *
   * @param mode what is made sure of their space, see `Preallocation`
   */
  preallocate(offset: number, mode: 'metadata' | 'falloc' | 'full'): void {
    this.#beginMutation('preallocate', offset, this.length - offset);
    const meta = this.#meta;
    const { clusterSize } = this;
    const end = Math.ceil(this.length / clusterSize);
    let cluster = Math.ceil(offset / clusterSize);
    const inside = Math.min(cluster * clusterSize, this.length) - offset;
    if (inside > 0) {
      if (meta.subclusters === 1) this.#writeZeroRange(offset, inside);
      else if (meta.state.withLock(() => meta.entry(cluster - 1)) === 0n) cluster--;
    }
    while (cluster < end) {
      const inSlice = meta.sliceEntries - (cluster % meta.sliceEntries);
      const wanted = Math.min(inSlice, end - cluster);
      const run = meta.state.withLock(() => {
        meta.prepareL2(Math.floor(cluster / meta.l2Entries));
        if (this.descriptor.hasDataFile) return { offset: cluster * clusterSize, clusters: wanted };
        return meta.allocate(wanted);
      });
      const bytes = run.clusters * clusterSize;
      const inFile = this.descriptor.hasDataFile ? Math.min(bytes, this.length - run.offset) : bytes;
      // A place that was used before.
      if (mode !== 'full' && run.offset < this.#data.length) this.#data.writeZeroes(run.offset, inFile, true);
      if (mode !== 'metadata') this.#data.preallocate(run.offset, inFile, mode);
      else this.#data.extend(run.offset + inFile);
      meta.state.withLock(() => {
        if (meta.subclusters === 1) {
          meta.mapData(cluster, run.clusters, run.offset);
          return;
        }
        // Subclusters can be unallocated and have a place.
        for (let index = 0; index < run.clusters; index++) {
          meta.mapData(cluster + index, 1, run.offset + index * clusterSize, 0, 0);
        }
      });
      cluster += run.clusters;
      this.#relieveIfCrowded();
    }
    this.flush();
  }

  /** Makes every cluster unallocated, so that the backing file shows through (QEMU's `bdrv_make_empty`). */
  makeEmpty(): void {
    this.#beginMutation('empty', 0, 0);
    const clusters = Math.ceil(this.length / this.clusterSize);
    this.#changeClusters(0, clusters, (kind) => (kind === L2_UNALLOCATED ? 'keep' : 'clear'));
    if (!this.descriptor.hasDataFile) return;
    this.flush();
    this.#freeData(0, clusters);
  }

  /** Where the last whole cluster before `end` ends; the last cluster of the drive is whole where the drive ends. */
  #wholeEnd(end: number): number {
    return end === this.length ? end : end - (end % this.clusterSize);
  }

  /**
   * The same for zeroes. Where the drive ends inside of a subcluster, QEMU flags the subclusters of the last cluster
   * one by one; those behind the end are then left as they are, for a drive that grows.
   */
  #zeroedEnd(end: number): number {
    const inCluster = end % this.clusterSize;
    const size = this.#subclusterSize;
    return inCluster > size && inCluster % size !== 0 ? end - inCluster : this.#wholeEnd(end);
  }

  /** Zeroes a part of one cluster. */
  #zeroPart(offset: number, length: number, mayUnmap: boolean): void {
    if (length <= 0) return;
    const size = this.#subclusterSize;
    const end = offset + length;
    const from = Math.min(end, Math.ceil(offset / size) * size);
    const to = Math.max(from, end === this.length ? end : end - (end % size));
    this.#zeroBytes(offset, from - offset, mayUnmap);
    if (from < to && !this.#zeroSubclusters(from, to)) this.#writeZeroRange(from, to - from);
    this.#zeroBytes(to, end - to, mayUnmap);
  }

  /** Flags subclusters of one cluster as zero. False, with nothing done, where it is compressed. */
  #zeroSubclusters(start: number, end: number): boolean {
    const meta = this.#meta;
    const cluster = Math.floor(start / this.clusterSize);
    const first = cluster * this.clusterSize;
    return this.#withRoomForFrees(1, () => {
      const { kind, length } = this.#lookup(start, end - start);
      if (kind === L2_COMPRESSED) return false;
      if (isZero(kind) && length === end - start) return true;
      meta.prepareL2(Math.floor(cluster / meta.l2Entries));
      const size = this.#subclusterSize;
      meta.zeroInPlace(cluster, (start - first) / size, Math.ceil((end - first) / size));
      return true;
    });
  }

  /** Zeroes a part of one subcluster: all of it where the rest is zero anyway, else by writing the bytes. */
  #zeroBytes(offset: number, length: number, mayUnmap: boolean): void {
    if (length <= 0) return;
    const size = this.#subclusterSize;
    const start = offset - (offset % size);
    const end = Math.min(start + size, this.length);
    const { kind } = this.#meta.state.withLock(() => this.#lookup(start, end - start));
    if (!this.#hasZeroFlag) {
      if (kind !== L2_UNALLOCATED || this.#hasBacking) this.#writeZeroRange(offset, length);
      return;
    }
    const restIsZero =
      isZero(kind) ||
      (isUnallocated(kind) && this.#isZeroBelow(start, offset) && this.#isZeroBelow(offset + length, end));
    if (!restIsZero) this.#writeZeroRange(offset, length);
    else if (size < this.clusterSize) this.#zeroSubclusters(start, end);
    else this.#zeroClusters(start / size, start / size + 1, mayUnmap);
  }

  /** Whether [from, to) reads as zeroes where this layer has nothing, as far as block status can tell. */
  #isZeroBelow(from: number, to: number): boolean {
    const { backing } = this;
    if (backing === undefined) return !this.#hasBacking || from >= to;
    const end = Math.min(to, backing.length);
    for (let at = from; at < end; ) {
      const { flags, length } = chainStatus(backing, at, end - at);
      if (!(flags & STATUS_ZERO)) return false;
      at += length;
    }
    return true;
  }

  /**
   * Changes the entries of the clusters [first, end), slice by slice. A cluster of several kinds counts as data. What
   * becomes unallocated leaves its data in an external data file, which the entries on the disk still refer to.
   */
  #changeClusters(first: number, end: number, decide: (kind: number, cluster: number) => Change): void {
    const meta = this.#meta;
    const { clusterSize } = this;
    for (let cluster = first; cluster < end; ) {
      const sliceEnd = (Math.floor(cluster / meta.sliceEntries) + 1) * meta.sliceEntries;
      const stop = Math.min(end, sliceEnd);
      const toWrite: { offset: number; length: number }[] = [];
      const freed: { first: number; count: number }[] = [];
      let next = stop;
      this.#withRoomForFrees(meta.sliceEntries, () => {
        for (let at = cluster; at < stop; ) {
          const wanted = (end - at) * clusterSize;
          const found = this.#lookup(at * clusterSize, wanted);
          const mixed = found.length < clusterSize;
          const count = mixed ? 1 : Math.floor(found.length / clusterSize);
          const change = decide(mixed ? L2_DATA : found.kind, at);
          if (change === 'keep') {
            // Where there is no table, nothing is in the rest of its range.
            if (at + count > stop) next = at + count;
          } else if (change === 'write') {
            const offset = at * clusterSize;
            const bytes = Math.min(stop * clusterSize, offset + found.length, this.length) - offset;
            toWrite.push({ offset, length: bytes });
          } else {
            meta.prepareL2(Math.floor(at / meta.l2Entries));
            const until = Math.min(at + count, stop);
            for (let index = at; index < until; index++) this.#change(index, change);
            if (change === 'zero') freed.push({ first: at, count: until - at });
          }
          at += count;
        }
      });
      for (const range of toWrite) this.#writeZeroRange(range.offset, range.length);
      if (this.descriptor.hasDataFile) for (const run of freed) this.#freeData(run.first, run.count);
      this.#relieveIfCrowded();
      cluster = next;
    }
  }

  #change(cluster: number, change: 'zero' | 'zero-keep' | 'clear'): void {
    if (change === 'zero-keep') this.#meta.zeroInPlace(cluster);
    else this.#meta.clearEntry(cluster, change === 'zero');
  }

  /** Gives the space of clusters in an external data file back. */
  #freeData(cluster: number, count: number): void {
    const offset = cluster * this.clusterSize;
    const length = Math.min(count * this.clusterSize, this.length - offset);
    if (this.descriptor.dataFileRaw) this.#data.writeZeroes(offset, length, true);
    else this.#data.discard(offset, length);
  }

  #writeZeroRange(offset: number, length: number): void {
    const { state } = this.#meta;
    const step = state.get('zeroBytes');
    for (let done = 0; done < length; done += step) {
      this.write(offset + done, state.get('zeroes'), Math.min(step, length - done));
    }
  }

  flush(): void {
    this.#file.event?.('flush_to_os');
    if (!this.readOnly) this.#meta.flush();
  }

  #beginMutation(what: string, offset: number, length: number): void {
    this.#check(what, offset, length);
    if (this.readOnly) {
      throw new StillframeError(
        'ERR_STILLFRAME_READ_ONLY',
        `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' is open read-only; open it with readOnly: false`,
      );
    }
    this.#meta.state.checkHealth();
    this.#meta.state.checkUndamaged();
    this.#checkDataFileOpen();
    this.#meta.firstMutation();
  }

  #check(what: string, offset: number, length: number): void {
    const valid = Number.isSafeInteger(offset) && Number.isSafeInteger(length) && offset >= 0 && length >= 0;
    if (valid && offset + length <= this.length) return;
    throw new StillframeError(
      'ERR_STILLFRAME_OUT_OF_RANGE',
      `cannot ${what} ${length} bytes at ${offset}: '${this.descriptor.path}' has ${this.length} bytes`,
    );
  }
}

/** The pieces from `first` on that lie in a row both in the buffer and in the file. */
function contiguous(pieces: readonly CompressedPiece[], first: number) {
  const { at = 0, host = 0 } = pieces[first] ?? {};
  let end = first;
  let length = 0;
  for (let next = pieces[end]; next?.host === host + length && next.at === at + length; next = pieces[end]) {
    length += next.length;
    end++;
  }
  return { at, host, length, end };
}

function isZero(kind: number): boolean {
  return kind === L2_ZERO_PLAIN || kind === L2_ZERO_ALLOCATED;
}

function isUnallocated(kind: number): boolean {
  return kind === L2_UNALLOCATED || kind === L2_UNALLOCATED_PLACE;
}

/** A place in the file that is ours and holds no data. */
function isEmptyPlace(found: Lookup): boolean {
  return found.copied && (found.kind === L2_ZERO_ALLOCATED || found.kind === L2_UNALLOCATED_PLACE);
}
