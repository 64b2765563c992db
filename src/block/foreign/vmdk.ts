import { inflateSync } from 'node:zlib';
import {
  checkLength,
  corrupt,
  type Locator,
  MAX_RUN,
  notOfFormat,
  type Opened,
  type OpeningImage,
  type Place,
  runLength,
  SECTOR,
  type Source,
  u64,
  unsupported,
  viewOf,
} from './contract.js';
import { TableCache } from './table-cache.js';
import {
  type ExtentLine,
  looksLikeDescriptor,
  parseDescriptor,
  readText,
  type VmdkDescriptor,
} from './vmdk-descriptor.js';

/**
 * VMDK of VMware: one or more extents, each a part of the drive, flat or in grains. All numbers are little-endian.
 *
 * Source: Virtual Disk Format 5.0, VMware; for `COWD` extents (ESXi) what QEMU and libvmdk document.
 */
export interface VmdkLayout {
  readonly format: 'vmdk';
  readonly cid: number;
  readonly parentCid: number;
  readonly createType: string;
  readonly extents: readonly VmdkExtent[];
}

export interface VmdkExtent {
  /** Of the extent in the drive, bytes. */
  readonly start: number;
  readonly length: number;
  /** Index of its file among those of the image. */
  readonly file: number;
  /** Name of its file as the descriptor has it; undefined where it is the image itself. */
  readonly name: string | undefined;
  /** As the descriptor has it; empty where the extent is the image itself. */
  readonly type: string;
  /** Place of the first byte in the file where it is flat, else how its grains are found. */
  readonly data: number | Grains;
}

export interface Grains {
  readonly grainBytes: number;
  readonly directoryOffset: number;
  /** Grains that one grain table has entries for. */
  readonly tableEntries: number;
  readonly compressed: boolean;
  /** Compressed grains begin with a marker. */
  readonly markers: boolean;
  /** Entry 1 of a grain table means a grain of zeroes. */
  readonly zeroGrains: boolean;
}

/** The letters at the start of a file. */
const SPARSE_MAGIC = 'KDMV';
const COWD_MAGIC = 'COWD';
const FLAG_ZERO_GRAINS = 1 << 2;
const FLAG_MARKERS = 1 << 17;
const DEFLATE = 1;
/** The grain directory is where the footer says. */
const DIRECTORY_AT_END = 2n ** 64n - 1n;
const MARKER_END_OF_STREAM = 0;
const MARKER_FOOTER = 3;
const MAX_VERSION = 3;
const MAX_TABLE_ENTRIES = 512;
/** Grain tables that a directory can have entries for. */
const MAX_DIRECTORY_ENTRIES = 32 * 1024 * 1024;
const MAX_GRAIN_SECTORS = 0x200000;
/** A compressed grain is held in memory; VMware's have 64 KiB. */
const MAX_COMPRESSED_GRAIN = 8 * 1024 * 1024;
const COWD_TABLE_ENTRIES = 4096;
const ZERO_GRAIN = 1;
const MARKER_BYTES = 12;
/** Types of drives whose extents a descriptor lists. */
const LISTED_TYPES: ReadonlySet<string> = new Set([
  'monolithicFlat',
  'vmfs',
  'vmfsSparse',
  'twoGbMaxExtentSparse',
  'twoGbMaxExtentFlat',
]);

function magicOf(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, 4).toString('latin1');
}

export function probeVmdk(head: Uint8Array): boolean {
  const magic = magicOf(head);
  return magic === SPARSE_MAGIC || magic === COWD_MAGIC || looksLikeDescriptor(head);
}

export function openVmdk(image: OpeningImage): Opened<VmdkLayout> {
  const { path, file } = image;
  const head = new Uint8Array(SECTOR);
  file.readBytes(0, head);
  switch (magicOf(head)) {
    case COWD_MAGIC:
      throw extentAlone(path);
    case SPARSE_MAGIC:
      return openMonolithic(image);
    default: {
      const text = readText(file, 0, file.length);
      const descriptor = parseDescriptor(path, text);
      if (descriptor.createType === '') {
        throw notOfFormat(path, 'vmdk', 'it is neither a sparse extent nor a descriptor with a createType');
      }
      return openListed(image, descriptor);
    }
  }
}

/** What it is a part of, and what it is to be read on top of, nobody can tell. */
function extentAlone(path: string): Error {
  return unsupported(
    path,
    'it is one extent of a drive in several files and has no descriptor',
    'name the descriptor file instead, the small .vmdk that lists the extents',
  );
}

function finish(
  path: string,
  text: Omit<VmdkDescriptor, 'extents'>,
  extents: readonly VmdkExtent[],
): Opened<VmdkLayout> {
  const last = extents.at(-1);
  const length = last === undefined ? 0 : last.start + last.length;
  checkLength(path, length);
  const { cid, parentCid, createType } = text;
  // As qemu-img has it: none unless all extents are of one kind.
  const kinds = new Set(extents.map(({ data }) => (typeof data === 'number' ? 0 : data.grainBytes)));
  const [grainBytes = 0] = kinds;
  return {
    layout: { format: 'vmdk', cid, parentCid, createType, extents },
    length,
    clusterSize: kinds.size === 1 && grainBytes > 0 ? grainBytes : undefined,
    backingFile: text.parent,
  };
}

/** One sparse file with its descriptor inside. */
function openMonolithic(image: OpeningImage): Opened<VmdkLayout> {
  const { path, file } = image;
  const head = viewOf(file, 0, SECTOR);
  const descriptorOffset = u64(head, 28, true) * SECTOR;
  if (descriptorOffset === 0) throw extentAlone(path);
  const text = readText(file, descriptorOffset, u64(head, 36, true) * SECTOR);
  const descriptor = parseDescriptor(path, text);
  const empty = u64(head, 12, true) === 0;
  // Without a capacity the header is only there to hold the descriptor of other files.
  if (empty && LISTED_TYPES.has(descriptor.createType)) return openListed(image, descriptor);
  const { length, grains } = openSparse(path, file);
  const createType = grains.compressed ? 'streamOptimized' : 'monolithicSparse';
  return finish(
    path,
    { ...descriptor, createType },
    empty ? [] : [{ start: 0, length, file: 0, name: undefined, type: '', data: grains }],
  );
}

/** The extents that a descriptor lists. */
function openListed(image: OpeningImage, descriptor: VmdkDescriptor): Opened<VmdkLayout> {
  const { path } = image;
  if (!LISTED_TYPES.has(descriptor.createType)) {
    throw unsupported(
      path,
      `Unsupported image type '${descriptor.createType}'`,
      `in several files ${[...LISTED_TYPES].join(', ')} are supported`,
    );
  }
  const extents: VmdkExtent[] = [];
  let start = 0;
  for (const line of descriptor.extents) {
    const extent = openExtent(image, line, start);
    extents.push(extent);
    start += extent.length;
  }
  return finish(path, descriptor, extents);
}

function openExtent(image: OpeningImage, line: ExtentLine, start: number): VmdkExtent {
  const { index, file } = image.openExtent(line.name);
  const { path } = file.descriptor;
  const common = { start, file: index, name: line.name, type: line.type };
  if (line.type === 'FLAT' || line.type === 'VMFS') {
    const offset = line.offset ?? 0;
    if (offset + line.length > file.length) {
      throw corrupt(
        path,
        `it is cut off: '${image.path}' has ${line.length} bytes of the drive at its offset ${offset}, but it has ${file.length}`,
      );
    }
    return { ...common, length: line.length, data: offset };
  }
  const head = new Uint8Array(SECTOR);
  file.readBytes(0, head);
  const magic = magicOf(head);
  if (magic !== SPARSE_MAGIC && magic !== COWD_MAGIC) {
    throw corrupt(path, `it is an extent of '${image.path}', but does not start with '${SPARSE_MAGIC}'`);
  }
  const { length, grains } = magic === COWD_MAGIC ? openCowd(path, file) : openSparse(path, file);
  return { ...common, length, data: grains };
}

interface SparseExtent {
  readonly length: number;
  readonly grains: Grains;
}

function openSparse(path: string, file: Source): SparseExtent {
  const header = sparseHeader(path, file);
  const version = header.getUint32(4, true);
  if (version > MAX_VERSION) {
    throw unsupported(path, `VMDK version ${version} not supported`, `versions 1 to ${MAX_VERSION} are`);
  }
  const flags = header.getUint32(8, true);
  const capacity = u64(header, 12, true);
  const grainSectors = u64(header, 20, true);
  const tableEntries = header.getUint32(44, true);
  const compression = header.getUint16(77, true);
  if (tableEntries === 0 || tableEntries > MAX_TABLE_ENTRIES) {
    throw corrupt(
      path,
      `L2 table size too big, or zero: its grain tables have ${tableEntries} entries, ${MAX_TABLE_ENTRIES} at most are right`,
    );
  }
  if (compression > DEFLATE) {
    throw unsupported(path, `its grains are compressed by method ${compression}`, 'deflate (1) is supported');
  }
  const directoryOffset = u64(header, 56, true) * SECTOR;
  if (directoryOffset === 0) throw corrupt(path, 'its header names no grain directory');
  const grains = {
    grainBytes: grainSectors * SECTOR,
    directoryOffset,
    tableEntries,
    compressed: compression === DEFLATE,
    markers: (flags & FLAG_MARKERS) !== 0,
    zeroGrains: (flags & FLAG_ZERO_GRAINS) !== 0,
  };
  checkGrains(path, file, grains, capacity * SECTOR);
  if (grains.compressed && grains.grainBytes > MAX_COMPRESSED_GRAIN) {
    throw unsupported(
      path,
      `its compressed grains have ${grains.grainBytes} bytes`,
      `${MAX_COMPRESSED_GRAIN} at most are supported`,
    );
  }
  const dataStart = u64(header, 64, true) * SECTOR;
  if (dataStart > file.length) {
    throw corrupt(path, `File truncated, expecting at least ${dataStart} bytes`);
  }
  return { length: capacity * SECTOR, grains };
}

/** The header; where it says that the grain directory is at the end, the copy of it there. */
function sparseHeader(path: string, file: Source): DataView {
  const header = viewOf(file, 0, SECTOR);
  if (header.getBigUint64(56, true) !== DIRECTORY_AT_END) return header;
  // Marker, footer, end of stream: one sector each.
  const end = Math.ceil(file.length / SECTOR) * SECTOR;
  const offset = end - 3 * SECTOR;
  const tail = viewOf(file, Math.max(0, offset), 3 * SECTOR);
  const footer = new DataView(tail.buffer, SECTOR, SECTOR);
  const valid =
    offset > 0 &&
    tail.getUint32(8, true) === 0 &&
    tail.getUint32(12, true) === MARKER_FOOTER &&
    magicOf(new Uint8Array(footer.buffer, footer.byteOffset, 4)) === SPARSE_MAGIC &&
    footer.getBigUint64(56, true) !== DIRECTORY_AT_END &&
    u64(tail, 2 * SECTOR, true) === 0 &&
    tail.getUint32(2 * SECTOR + 8, true) === 0 &&
    tail.getUint32(2 * SECTOR + 12, true) === MARKER_END_OF_STREAM;
  if (!valid) {
    throw corrupt(path, 'it is cut off: its header says that a footer is at its end, but there is none');
  }
  return footer;
}

function openCowd(path: string, file: Source): SparseExtent {
  const header = viewOf(file, 0, SECTOR);
  const capacity = header.getUint32(12, true);
  const grains = {
    grainBytes: header.getUint32(16, true) * SECTOR,
    directoryOffset: header.getUint32(20, true) * SECTOR,
    tableEntries: COWD_TABLE_ENTRIES,
    compressed: false,
    markers: false,
    zeroGrains: false,
  };
  checkGrains(path, file, grains, capacity * SECTOR);
  const needed = Math.ceil((capacity * SECTOR) / (grains.grainBytes * COWD_TABLE_ENTRIES));
  if (header.getUint32(24, true) < needed) {
    throw corrupt(
      path,
      `its grain directory has ${header.getUint32(24, true)} entries; ${needed} are needed for ${capacity} sectors`,
    );
  }
  return { length: capacity * SECTOR, grains };
}

function checkGrains(path: string, file: Source, grains: Grains, length: number): void {
  const { grainBytes, tableEntries, directoryOffset } = grains;
  if (grainBytes === 0 || grainBytes > MAX_GRAIN_SECTORS * SECTOR) {
    throw corrupt(path, `Invalid granularity, image may be corrupt: grains of ${grainBytes} bytes`);
  }
  const tables = Math.ceil(length / (grainBytes * tableEntries));
  if (tables > MAX_DIRECTORY_ENTRIES) {
    throw corrupt(path, `L1 size too big: its grain directory has ${tables} entries`);
  }
  if (directoryOffset + tables * 4 > file.length) {
    throw corrupt(
      path,
      `its grain directory of ${tables} entries at offset ${directoryOffset} ends beyond the end of the file`,
    );
  }
}

interface LocatedExtent {
  readonly extent: VmdkExtent;
  /** Undefined where it is flat. */
  readonly grains: GrainLocator | undefined;
}

export class VmdkLocator implements Locator {
  readonly #extents: readonly LocatedExtent[];
  #hint = 0;

  /** @param files of the image, as the extents count them */
  constructor(layout: VmdkLayout, files: readonly Source[]) {
    const table = new TableCache(files, true);
    this.#extents = layout.extents.map((extent) => {
      const file = files[extent.file];
      if (file === undefined) throw new Error('invariant: every extent has its file');
      const { data } = extent;
      return {
        extent,
        grains: typeof data === 'number' ? undefined : new GrainLocator(extent, data, file, table),
      };
    });
  }

  locate(offset: number, length: number): Place {
    const { extent, grains } = this.#at(offset);
    const within = offset - extent.start;
    const bytes = Math.min(length, extent.length - within);
    if (grains !== undefined) return grains.locate(within, bytes);
    const start = typeof extent.data === 'number' ? extent.data : 0;
    return {
      kind: 'data',
      length: bytes,
      file: extent.file,
      hostOffset: start + within,
      preallocated: true,
    };
  }

  /** The extent that has the offset: the last one, or found by halving. */
  #at(offset: number): LocatedExtent {
    const known = this.#extents[this.#hint];
    if (known !== undefined && offset >= known.extent.start) {
      if (offset < known.extent.start + known.extent.length) return known;
    }
    let [low, high] = [0, this.#extents.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if ((this.#extents[middle]?.extent.start ?? Infinity) <= offset) low = middle;
      else high = middle - 1;
    }
    const found = this.#extents[low];
    if (found === undefined) throw new Error('invariant: an image with a length has an extent');
    this.#hint = low;
    return found;
  }
}

/** Offsets are those in the extent. */
class GrainLocator {
  readonly #extent: VmdkExtent;
  readonly #grains: Grains;
  readonly #file: Source;
  readonly #table: TableCache;

  constructor(extent: VmdkExtent, grains: Grains, file: Source, table: TableCache) {
    this.#extent = extent;
    this.#grains = grains;
    this.#file = file;
    this.#table = table;
  }

  locate(offset: number, length: number): Place {
    const { grainBytes, tableEntries, directoryOffset, compressed, zeroGrains } = this.#grains;
    const tableBytes = tableEntries * grainBytes;
    const directoryIndex = Math.floor(offset / tableBytes);
    const tableAt = (index: number): number =>
      this.#table.u32(this.#extent.file, directoryOffset + index * 4) * SECTOR;
    const table = tableAt(directoryIndex);
    if (table === 0) {
      const most = Math.min(MAX_RUN, Math.ceil(((offset % tableBytes) + length) / tableBytes));
      const count = runLength(most, (distance) => tableAt(directoryIndex + distance) === 0);
      return { kind: 'unallocated', length: Math.min(length, count * tableBytes - (offset % tableBytes)) };
    }
    const index = Math.floor((offset % tableBytes) / grainBytes);
    if (table + tableEntries * 4 > this.#file.length) {
      throw this.#corrupt(
        `entry ${directoryIndex} of its grain directory leads to a grain table at ${table}`,
      );
    }
    const within = offset % grainBytes;
    const entryAt = (grain: number): number => this.#table.u32(this.#extent.file, table + grain * 4);
    const first = entryAt(index);
    const most = Math.min(tableEntries - index, Math.ceil((within + length) / grainBytes));
    const bytesOf = (grains: number): number => Math.min(length, grains * grainBytes - within);
    if (first === 0 || (zeroGrains && first === ZERO_GRAIN)) {
      const count = runLength(most, (distance) => entryAt(index + distance) === first);
      return { kind: first === 0 ? 'unallocated' : 'zero', length: bytesOf(count) };
    }
    const host = first * SECTOR;
    const grainStart = offset - within;
    if (compressed) {
      return {
        kind: 'compressed',
        key: this.#extent.file * 2 ** 32 + first,
        length: bytesOf(1),
        within,
        unpack: () => this.#unpack(host, grainStart),
      };
    }
    const step = grainBytes / SECTOR;
    const count = runLength(most, (distance) => entryAt(index + distance) === first + distance * step);
    const used = Math.min(count * grainBytes, this.#extent.length - grainStart);
    if (host + used > this.#file.length) {
      throw this.#corrupt(
        `the grains from offset ${this.#extent.start + grainStart} of the drive on, at offset ${host}, are`,
      );
    }
    return {
      kind: 'data',
      length: bytesOf(count),
      file: this.#extent.file,
      hostOffset: host + within,
      preallocated: false,
    };
  }

  #unpack(host: number, grainStart: number): Uint8Array {
    const { grainBytes, markers } = this.#grains;
    const header = markers ? MARKER_BYTES : 0;
    const bad = (what: string): Error =>
      corrupt(
        this.#file.descriptor.path,
        `the compressed grain of offset ${this.#extent.start + grainStart} of the drive, at offset ${host}, ${what}`,
      );
    if (host + header > this.#file.length) throw bad('lies beyond the end of the file');
    // Most grains are smaller than they were; what does not compress is a little larger.
    const likely = header + grainBytes + grainBytes / 256 + SECTOR;
    let bytes = new Uint8Array(Math.min(likely, this.#file.length - host));
    this.#file.readBytes(host, bytes);
    let size = bytes.length;
    if (markers) {
      size = new DataView(bytes.buffer).getUint32(8, true);
      if (size === 0 || size > 2 * grainBytes || host + header + size > this.#file.length) {
        throw bad(`has ${size} bytes, which cannot be`);
      }
      if (header + size > bytes.length) {
        bytes = new Uint8Array(header + size);
        this.#file.readBytes(host, bytes);
      }
      bytes = bytes.subarray(header, header + size);
    }
    const needed = Math.min(grainBytes, this.#extent.length - grainStart);
    let grain: Uint8Array | undefined;
    try {
      grain = inflateSync(bytes, { maxOutputLength: grainBytes });
    } catch {
      // Told below.
    }
    if (grain === undefined || grain.length < needed) {
      throw bad(`does not decompress to ${needed} bytes`);
    }
    return grain;
  }

  #corrupt(what: string): Error {
    return corrupt(this.#file.descriptor.path, `${what} beyond the end of the file`);
  }
}
