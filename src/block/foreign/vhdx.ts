import type { Arena } from '../../kernels/arena.js';
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
  type Source,
  u64,
  unsupported,
  viewOf,
} from './contract.js';
import { crc32c } from './crc32c.js';
import { TableCache } from './table-cache.js';
import { findLog, type LogPosition, ReplayedFile } from './vhdx-log.js';

/**
 * VHDX, the disk format of Hyper-V, fixed and dynamic. All numbers are little-endian.
 *
 * Source: [MS-VHDX].
 */
export interface VhdxLayout {
  readonly format: 'vhdx';
  /** The block allocation table in the file, bytes. */
  readonly tableOffset: number;
  readonly blockSize: number;
  /** After this many entries for blocks the table has one for a sector bitmap. */
  readonly chunkRatio: number;
  /** Changes that the log holds and the file does not. */
  readonly log: LogPosition | undefined;
  readonly length: number;
}

const IDENTIFIER = 'vhdxfile';
const HEADERS = [64 * 1024, 128 * 1024] as const;
const HEADER_BYTES = 4096;
const REGION_TABLES = [192 * 1024, 256 * 1024] as const;
const TABLE_BYTES = 64 * 1024;
const MIB = 1024 * 1024;
const MAX_TABLE_ENTRIES = 2047;
const NO_GUID = '0'.repeat(32);

/** GUIDs as the file has them: the first three parts are little-endian. */
const REGION_BAT = '6677c22d23f600429d64115e9bfd4a08';
const REGION_METADATA = '06a27c8b90479a4bb8fe575f050f886e';
const ITEM_FILE_PARAMETERS = '3767a1ca36fa434db3b633f0aa44e76b';
const ITEM_DISK_SIZE = '2442a52f1bcd7648b2115dbed83bf4b8';
const ITEM_LOGICAL_SECTOR_SIZE = '1dbf41816fa90947ba47f233a8faab5f';
const ITEM_PARENT_LOCATOR = '2d5fd3a80bb34d45abf7d3d84834ab0c';
/** Known, but of no importance for reading: page 83 data, physical sector size. */
const ITEM_PAGE_83 = 'ab12cabee6b2234593efc309e000c746';
const ITEM_PHYSICAL_SECTOR_SIZE = 'c748a3cd5d4471449cc9e9885251c556';

const HAS_PARENT = 2;

/** States of a block. */
const UNMAPPED = 3;
/** The number of an early version of the format. */
const UNMAPPED_0_95 = 5;
const FULLY_PRESENT = 6;

function guidAt(view: DataView, at: number): string {
  return Buffer.from(view.buffer, view.byteOffset + at, 16).toString('hex');
}

function textAt(view: DataView, at: number, length: number): string {
  return Buffer.from(view.buffer, view.byteOffset + at, length).toString('latin1');
}

export function probeVhdx(head: Uint8Array): boolean {
  return Buffer.from(head.buffer, head.byteOffset, IDENTIFIER.length).toString('latin1') === IDENTIFIER;
}

/** The structure at `offset`, or undefined where its signature or its checksum is not right. */
function checkedView(file: Source, offset: number, length: number, signature: string): DataView | undefined {
  if (offset + length > file.length) return undefined;
  const view = viewOf(file, offset, length);
  if (textAt(view, 0, signature.length) !== signature) return undefined;
  return crc32c(new Uint8Array(view.buffer), 4) === view.getUint32(4, true) ? view : undefined;
}

export function openVhdx(arena: Arena, { path, file }: OpeningImage): Opened<VhdxLayout> {
  if (textAt(viewOf(file, 0, IDENTIFIER.length), 0, IDENTIFIER.length) !== IDENTIFIER) {
    throw notOfFormat(path, 'vhdx', `it does not start with '${IDENTIFIER}'`);
  }
  const header = currentHeader(path, file);
  const log = logOf(path, file, header);
  const current = log === undefined ? file : new ReplayedFile(arena, file, log);
  const regions = readRegions(path, current);
  const { blockSize, length, sectorSize } = readMetadata(path, current, regions.metadata);
  // 2^23 sectors have their bits in one sector bitmap of 1 MiB.
  const chunkRatio = (2 ** 23 * sectorSize) / blockSize;
  const blocks = Math.ceil(length / blockSize);
  const entries = blocks + Math.max(0, Math.ceil(blocks / chunkRatio) - 1);
  if (entries * 8 > regions.bat.length) {
    throw corrupt(
      path,
      `its block allocation table has ${regions.bat.length} bytes; ${entries * 8} are needed for ${blocks} blocks`,
    );
  }
  return {
    layout: { format: 'vhdx', tableOffset: regions.bat.offset, blockSize, chunkRatio, log, length },
    length,
    clusterSize: blockSize,
  };
}

/** Of the two headers, one of which may be half-written, the newer one. */
function currentHeader(path: string, file: Source): DataView {
  const [first, second] = HEADERS.map((offset) => checkedView(file, offset, HEADER_BYTES, 'head'));
  if (first === undefined && second === undefined) {
    throw corrupt(path, `neither of its headers, at offsets ${HEADERS.join(' and ')}, is whole`);
  }
  const sequenceOf = (header: DataView | undefined): bigint => header?.getBigUint64(8, true) ?? -1n;
  const newer = sequenceOf(second) > sequenceOf(first) ? second : first;
  if (newer === undefined) throw new Error('invariant: one of the headers is whole');
  if (first !== undefined && second !== undefined && sequenceOf(first) === sequenceOf(second)) {
    if (Buffer.compare(new Uint8Array(first.buffer), new Uint8Array(second.buffer)) !== 0) {
      throw corrupt(path, `its headers have the same sequence number, ${sequenceOf(first)}, but differ`);
    }
  }
  const version = newer.getUint16(66, true);
  if (version !== 1) throw unsupported(path, `it is a VHDX of version ${version}`, 'version 1 is supported');
  return newer;
}

function logOf(path: string, file: Source, header: DataView): LogPosition | undefined {
  const guid = guidAt(header, 48);
  if (guid === NO_GUID) return undefined;
  const version = header.getUint16(64, true);
  if (version !== 0) {
    throw unsupported(path, `it has a log of version ${version}`, 'version 0 is supported');
  }
  const [offset, length] = [u64(header, 72, true), header.getUint32(68, true)];
  if (offset < MIB || offset % MIB !== 0 || length === 0 || length % MIB !== 0) {
    throw corrupt(
      path,
      `its log, ${length} bytes at offset ${offset}, is not made of whole MiB behind the first`,
    );
  }
  if (offset + length > file.length) {
    throw corrupt(path, `its log, ${length} bytes at offset ${offset}, ends beyond the end of the file`);
  }
  return findLog(file, offset, length, guid);
}

interface Region {
  readonly offset: number;
  readonly length: number;
}

function readRegions(path: string, file: Source): { readonly bat: Region; readonly metadata: Region } {
  const [first, second] = REGION_TABLES.map((offset) => checkedView(file, offset, TABLE_BYTES, 'regi'));
  const table = first ?? second;
  if (table === undefined) {
    throw corrupt(path, `neither of its region tables, at offsets ${REGION_TABLES.join(' and ')}, is whole`);
  }
  const count = table.getUint32(8, true);
  if (count > MAX_TABLE_ENTRIES) throw corrupt(path, `its region table names ${count} regions`);
  const regions = new Map<string, Region>();
  for (let index = 0; index < count; index++) {
    const at = 16 + index * 32;
    const guid = guidAt(table, at);
    const region = { offset: u64(table, at + 16, true), length: table.getUint32(at + 24, true) };
    if (guid !== REGION_BAT && guid !== REGION_METADATA) {
      if ((table.getUint32(at + 28, true) & 1) === 0) continue;
      throw unsupported(
        path,
        `it needs the region ${guid}, which nobody here knows`,
        'convert it in Windows',
      );
    }
    if (regions.has(guid)) throw corrupt(path, `its region table names the region ${guid} twice`);
    if (region.offset < MIB || region.offset % MIB !== 0 || region.offset + region.length > file.length) {
      throw corrupt(
        path,
        `its region ${guid}, ${region.length} bytes at offset ${region.offset}, does not lie in the file at a multiple of 1 MiB`,
      );
    }
    regions.set(guid, region);
  }
  const bat = regions.get(REGION_BAT);
  const metadata = regions.get(REGION_METADATA);
  if (bat === undefined || metadata === undefined) {
    throw corrupt(path, 'its region table names no block allocation table, or no metadata');
  }
  return { bat, metadata };
}

function readMetadata(
  path: string,
  file: Source,
  region: Region,
): { readonly blockSize: number; readonly length: number; readonly sectorSize: number } {
  if (region.length < TABLE_BYTES) throw corrupt(path, `its metadata has only ${region.length} bytes`);
  const table = viewOf(file, region.offset, TABLE_BYTES);
  if (textAt(table, 0, 8) !== 'metadata') {
    throw corrupt(
      path,
      `there is no 'metadata' at offset ${region.offset}, where its region table says it is`,
    );
  }
  const count = table.getUint16(10, true);
  if (count > MAX_TABLE_ENTRIES) throw corrupt(path, `its metadata table names ${count} items`);
  const items = new Map<string, DataView>();
  for (let index = 0; index < count; index++) {
    const at = 32 + index * 32;
    const guid = guidAt(table, at);
    const [offset, length] = [table.getUint32(at + 16, true), table.getUint32(at + 20, true)];
    const needed = { [ITEM_FILE_PARAMETERS]: 8, [ITEM_DISK_SIZE]: 8, [ITEM_LOGICAL_SECTOR_SIZE]: 4 }[guid];
    if (needed === undefined) {
      const known = [ITEM_PARENT_LOCATOR, ITEM_PAGE_83, ITEM_PHYSICAL_SECTOR_SIZE].includes(guid);
      if (known || (table.getUint32(at + 24, true) & 4) === 0) continue;
      throw unsupported(
        path,
        `it needs the metadata ${guid}, which nobody here knows`,
        'convert it in Windows',
      );
    }
    if (offset + length > region.length || length < needed) {
      throw corrupt(path, `its metadata item ${guid}, ${length} bytes at ${offset}, is not in the metadata`);
    }
    items.set(guid, viewOf(file, region.offset + offset, needed));
  }
  const parameters = items.get(ITEM_FILE_PARAMETERS);
  const size = items.get(ITEM_DISK_SIZE);
  const sector = items.get(ITEM_LOGICAL_SECTOR_SIZE);
  if (parameters === undefined || size === undefined || sector === undefined) {
    throw corrupt(path, 'its metadata lack the block size, the size of the drive or the sector size');
  }
  if ((parameters.getUint32(4, true) & HAS_PARENT) !== 0) {
    throw unsupported(
      path,
      'it is a differencing VHDX, which holds the changes to another image alone',
      'merge it into its parent in Windows (Merge-VHD)',
    );
  }
  const blockSize = parameters.getUint32(0, true);
  if (blockSize < MIB || blockSize > 256 * MIB || (blockSize & (blockSize - 1)) !== 0) {
    throw corrupt(path, `its block size is ${blockSize}, which is not a power of two from 1 MiB to 256 MiB`);
  }
  const sectorSize = sector.getUint32(0, true);
  if (sectorSize !== 512 && sectorSize !== 4096) {
    throw corrupt(path, `its sectors have ${sectorSize} bytes, neither 512 nor 4096`);
  }
  const length = u64(size, 0, true);
  checkLength(path, length);
  if (length % sectorSize !== 0) {
    throw corrupt(
      path,
      `the size of the drive, ${length}, is not a multiple of its sectors of ${sectorSize}`,
    );
  }
  return { blockSize, length, sectorSize };
}

export class VhdxLocator implements Locator {
  readonly #layout: VhdxLayout;
  readonly #file: Source;
  readonly #table: TableCache;

  /** @param file with the changes of its log, as {@link vhdxSource} makes it */
  constructor(layout: VhdxLayout, file: Source) {
    this.#layout = layout;
    this.#file = file;
    this.#table = new TableCache([file], true);
  }

  locate(offset: number, length: number): Place {
    const { blockSize } = this.#layout;
    const index = Math.floor(offset / blockSize);
    const within = offset % blockSize;
    const host = this.#hostOffset(index);
    const most = Math.min(MAX_RUN, Math.ceil((within + length) / blockSize));
    const count = runLength(most, (distance) => {
      const next = this.#hostOffset(index + distance);
      return host < 0 ? next < 0 : next === host + distance * blockSize;
    });
    const bytes = Math.min(length, count * blockSize - within);
    if (host < 0) return { kind: 'zero', length: bytes };
    return { kind: 'data', length: bytes, file: 0, hostOffset: host + within, preallocated: false };
  }

  /** Where a block is in the file; -1: it is zero. */
  #hostOffset(block: number): number {
    const { tableOffset, chunkRatio, blockSize } = this.#layout;
    const at = tableOffset + (block + Math.floor(block / chunkRatio)) * 8;
    const low = this.#table.u32(0, at);
    const state = low & 7;
    if (state <= UNMAPPED || state === UNMAPPED_0_95) return -1;
    const { path } = this.#file.descriptor;
    if (state !== FULLY_PRESENT) {
      throw corrupt(path, `entry ${block} of its block allocation table has the state ${state}`);
    }
    const host = (this.#table.u32(0, at + 4) * 4096 + (low >>> 20)) * MIB;
    const used = Math.min(blockSize, this.#layout.length - block * blockSize);
    if (host < MIB || host + used > this.#file.length) {
      throw corrupt(
        path,
        `entry ${block} of its block allocation table leads to offset ${host}, which is not in the file`,
      );
    }
    return host;
  }
}

/** What the image reads through: its file, with the changes that its log holds. */
export function vhdxSource(arena: Arena, layout: VhdxLayout, file: Source): Source {
  return layout.log === undefined ? file : new ReplayedFile(arena, file, layout.log);
}
