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

/**
 * Virtual Hard Disk (`.vhd`) of Virtual PC, Hyper-V, XenServer and Azure; qemu-img calls it `vpc`. All numbers are
 * big-endian.
 *
 * Source: Virtual Hard Disk Image Format Specification, version 1.0.
 */
export interface VpcLayout {
  readonly format: 'vpc';
  /** Undefined where the image is fixed: the drive's bytes from the start of the file on. */
  readonly blocks:
    | {
        readonly blockSize: number;
        /** Bytes of the sector bitmap before the data of each block. */
        readonly bitmapBytes: number;
        readonly tableOffset: number;
        readonly tableEntries: number;
      }
    | undefined;
  readonly length: number;
}

const COOKIE = 'conectix';
const DYNAMIC_COOKIE = 'cxsparse';
const FOOTER_BYTES = 512;
const DYNAMIC_HEADER_BYTES = 1024;
const FIXED = 2;
const DYNAMIC = 3;
const DIFFERENCING = 4;
const NOT_ALLOCATED = 0xffffffff;
/** Cylinders, heads and sectors that stand for every drive that is too large to have any. */
const MAX_GEOMETRY = 65535 * 16 * 255;
/** 2040 GiB. */
const MAX_SECTORS = 0xff000000;
/** Programs that mean the size in the footer; all others mean the geometry. */
const CREATORS_OF_SIZES: ReadonlySet<string> = new Set(['win ', 'qem2', 'd2v ', 'tap\0', 'CTXS', 'wa\0\0']);

function textAt(view: DataView, at: number, length: number): string {
  return Buffer.from(view.buffer, view.byteOffset + at, length).toString('latin1');
}

/** A fixed image has its only footer at its end; it is not looked for there, as what a guest wrote could be there. */
export function probeVpc(head: Uint8Array): boolean {
  return Buffer.from(head.buffer, head.byteOffset, COOKIE.length).toString('latin1') === COOKIE;
}

export function openVpc({ path, file }: OpeningImage): Opened<VpcLayout> {
  // What was cut to a few bytes, or written in 511, is filled up with zeroes.
  const end = Math.ceil(file.length / SECTOR) * SECTOR;
  const head = viewOf(file, 0, FOOTER_BYTES);
  let footer = head;
  if (textAt(head, 0, COOKIE.length) !== COOKIE || head.getUint32(60) === FIXED) {
    if (end < FOOTER_BYTES) throw notOfFormat(path, 'vpc', 'it is too short for a footer');
    footer = viewOf(file, end - FOOTER_BYTES, FOOTER_BYTES);
    if (textAt(footer, 0, COOKIE.length) !== COOKIE || footer.getUint32(60) !== FIXED) {
      const where = 'at its start, and no footer of a fixed image at its end';
      throw notOfFormat(path, 'vpc', `there is no '${COOKIE}' ${where}`);
    }
  }
  checkSum(path, footer, 64, 'footer');
  const version = footer.getUint32(12);
  if (version >>> 16 !== 1) {
    const text = `${version >>> 16}.${version & 0xffff}`;
    throw unsupported(path, `it is a VHD of version ${text}`, 'version 1 is supported');
  }
  const length = lengthOf(path, footer);
  const type = footer.getUint32(60);
  switch (type) {
    case FIXED:
      if (length > end - FOOTER_BYTES) {
        throw corrupt(
          path,
          `it is cut off: the drive has ${length} bytes, but only ${end - FOOTER_BYTES} come before the footer`,
        );
      }
      return { layout: { format: 'vpc', blocks: undefined, length }, length, clusterSize: undefined };
    case DYNAMIC:
      return openDynamic(path, file, footer, length);
    case DIFFERENCING:
      throw unsupported(
        path,
        'it is a differencing VHD, which holds the changes to another image alone',
        'merge it into its parent with the program that made it',
      );
    default:
      throw unsupported(path, `it is a VHD of type ${type}`, 'fixed (2) and dynamic (3) are supported');
  }
}

function checkSum(path: string, view: DataView, field: number, what: string): void {
  let sum = 0;
  for (let at = 0; at < view.byteLength; at++) {
    if (at < field || at >= field + 4) sum += view.getUint8(at);
  }
  const wanted = view.getUint32(field);
  const found = ~sum >>> 0;
  if (found !== wanted) {
    throw corrupt(
      path,
      `the checksum of its ${what} is 0x${wanted.toString(16)}, but that of the bytes is 0x${found.toString(16)}`,
    );
  }
}

/** The geometry is the size a guest saw, unless it cannot tell, or the program that made the image did otherwise. */
function lengthOf(path: string, footer: DataView): number {
  const geometry = footer.getUint16(56) * footer.getUint8(58) * footer.getUint8(59);
  const bySize = geometry === MAX_GEOMETRY || CREATORS_OF_SIZES.has(textAt(footer, 28, 4));
  const sectors = bySize ? Math.floor(u64(footer, 48, false) / SECTOR) : geometry;
  if (sectors > MAX_SECTORS) {
    throw corrupt(
      path,
      `its footer says that the drive has ${sectors} sectors; a VHD has ${MAX_SECTORS} at most`,
    );
  }
  return sectors * SECTOR;
}

function openDynamic(path: string, file: Source, footer: DataView, length: number): Opened<VpcLayout> {
  const offset = u64(footer, 16, false);
  if (offset + DYNAMIC_HEADER_BYTES > file.length) {
    throw corrupt(path, `its dynamic disk header, at offset ${offset}, lies beyond the end of the file`);
  }
  const header = viewOf(file, offset, DYNAMIC_HEADER_BYTES);
  if (textAt(header, 0, DYNAMIC_COOKIE.length) !== DYNAMIC_COOKIE) {
    throw corrupt(path, `there is no '${DYNAMIC_COOKIE}' at offset ${offset}, where its footer says it is`);
  }
  checkSum(path, header, 36, 'dynamic disk header');
  const blockSize = header.getUint32(32);
  if (blockSize < SECTOR || (blockSize & (blockSize - 1)) !== 0) {
    throw corrupt(path, `its block size is ${blockSize}, which is not a power of two from ${SECTOR} on`);
  }
  const tableOffset = u64(header, 16, false);
  const tableEntries = header.getUint32(28);
  if (tableEntries * blockSize < length) {
    throw corrupt(
      path,
      `its block table has ${tableEntries} entries; ${Math.ceil(length / blockSize)} are needed`,
    );
  }
  if (tableOffset % SECTOR !== 0 || tableOffset + tableEntries * 4 > file.length) {
    throw corrupt(
      path,
      `its block table of ${tableEntries} entries at offset ${tableOffset} does not lie in the file at a multiple of ${SECTOR}`,
    );
  }
  checkLength(path, length);
  const bitmapBytes = Math.ceil(blockSize / (8 * SECTOR) / SECTOR) * SECTOR;
  return {
    layout: {
      format: 'vpc',
      blocks: { blockSize, bitmapBytes, tableOffset, tableEntries },
      length,
    },
    length,
    clusterSize: blockSize,
  };
}

export class VpcLocator implements Locator {
  readonly #layout: VpcLayout;
  readonly #file: Source;
  readonly #table: TableCache;

  constructor(layout: VpcLayout, file: Source) {
    this.#layout = layout;
    this.#file = file;
    this.#table = new TableCache([file], false);
  }

  locate(offset: number, length: number): Place {
    const { blocks } = this.#layout;
    if (blocks === undefined)
      return { kind: 'data', length, file: 0, hostOffset: offset, preallocated: true };
    const { blockSize, bitmapBytes, tableOffset } = blocks;
    const index = Math.floor(offset / blockSize);
    const within = offset % blockSize;
    const entryAt = (block: number): number => this.#table.u32(0, tableOffset + block * 4);
    const first = entryAt(index);
    if (first === NOT_ALLOCATED) {
      const most = Math.min(MAX_RUN, Math.ceil((within + length) / blockSize));
      const count = runLength(most, (distance) => entryAt(index + distance) === NOT_ALLOCATED);
      return { kind: 'zero', length: Math.min(length, count * blockSize - within) };
    }
    // The bitmap says which sectors were written; the others were made zero with the block.
    const start = first * SECTOR + bitmapBytes;
    const used = Math.min(blockSize, this.#layout.length - index * blockSize);
    if (start + used > this.#file.length) {
      throw corrupt(
        this.#file.descriptor.path,
        `entry ${index} of its block table leads to offset ${first * SECTOR}, beyond the end of the file`,
      );
    }
    const bytes = Math.min(length, blockSize - within);
    return { kind: 'data', length: bytes, file: 0, hostOffset: start + within, preallocated: false };
  }
}
