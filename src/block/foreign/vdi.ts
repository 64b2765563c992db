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
 * Virtual Disk Image of VirtualBox, version 1.1. All numbers are little-endian.
 *
 * Source: the structure VDIHEADER1 as VirtualBox and QEMU document it.
 */
export interface VdiLayout {
  readonly format: 'vdi';
  readonly tableOffset: number;
  readonly dataOffset: number;
  readonly blockSize: number;
  readonly preallocated: boolean;
  readonly length: number;
}

const SIGNATURE = 0xbeda107f;
const VERSION = 0x00010001;
const HEADER_BYTES = 512;
const STATIC = 2;
/** Block numbers from here on mean that the block is not in the file: discarded, and never written. */
const DISCARDED = 0xfffffffe;
const MAX_BLOCK_BYTES = 256 * 1024 * 1024;

export function probeVdi(head: Uint8Array): boolean {
  return new DataView(head.buffer, head.byteOffset).getUint32(0x40, true) === SIGNATURE;
}

export function openVdi({ path, file }: OpeningImage): Opened<VdiLayout> {
  const header = viewOf(file, 0, HEADER_BYTES);
  const field = (at: number): number => header.getUint32(at, true);
  if (field(0x40) !== SIGNATURE) {
    throw notOfFormat(path, 'vdi', `there is no signature 0x${SIGNATURE.toString(16)} at offset 64`);
  }
  if (field(0x44) !== VERSION) {
    const version = `${field(0x44) >>> 16}.${field(0x44) & 0xffff}`;
    throw unsupported(path, `it is a VDI of version ${version}`, 'version 1.1 is supported');
  }
  for (const at of [0x1a8, 0x1b8]) {
    if ([0, 4, 8, 12].some((part) => field(at + part) !== 0)) {
      throw unsupported(
        path,
        'it is a differencing VDI (its header names a parent), which holds the changes to another image alone',
        "merge it with 'VBoxManage clonemedium'",
      );
    }
  }
  const type = field(0x4c);
  if (type !== 1 && type !== STATIC) {
    throw unsupported(path, `it is a VDI of type ${type}`, 'dynamic (1) and static (2) are supported');
  }
  const [tableOffset, dataOffset] = [field(0x154), field(0x158)];
  if (tableOffset % SECTOR !== 0 || dataOffset % SECTOR !== 0) {
    throw corrupt(
      path,
      `its block map at offset ${tableOffset} or its data at offset ${dataOffset} does not begin at a multiple of ${SECTOR}`,
    );
  }
  if (field(0x168) !== SECTOR) {
    throw unsupported(path, `its sectors have ${field(0x168)} bytes`, `sectors of ${SECTOR} are supported`);
  }
  const blockSize = field(0x178);
  if (blockSize < SECTOR || blockSize > MAX_BLOCK_BYTES || (blockSize & (blockSize - 1)) !== 0) {
    throw corrupt(
      path,
      `its block size is ${blockSize}, which is not a power of two from ${SECTOR} to ${MAX_BLOCK_BYTES}`,
    );
  }
  if (field(0x17c) !== 0) {
    throw unsupported(
      path,
      `its blocks carry ${field(0x17c)} bytes of extra data each`,
      "make another image of it with 'VBoxManage clonemedium'",
    );
  }
  // Sizes that are no multiple of a sector were made long ago.
  const length = Math.ceil(u64(header, 0x170, true) / SECTOR) * SECTOR;
  const blocks = field(0x180);
  if (length > blocks * blockSize) {
    throw corrupt(
      path,
      `the drive has ${length} bytes, but its block map has room for ${blocks * blockSize}`,
    );
  }
  checkLength(path, length);
  if (tableOffset + blocks * 4 > file.length) {
    throw corrupt(
      path,
      `its block map of ${blocks} entries at offset ${tableOffset} ends beyond the end of the file`,
    );
  }
  const preallocated = type === STATIC;
  return {
    layout: { format: 'vdi', tableOffset, dataOffset, blockSize, preallocated, length },
    length,
    clusterSize: blockSize,
  };
}

export class VdiLocator implements Locator {
  readonly #layout: VdiLayout;
  readonly #file: Source;
  readonly #table: TableCache;

  constructor(layout: VdiLayout, file: Source) {
    this.#layout = layout;
    this.#file = file;
    this.#table = new TableCache([file], true);
  }

  locate(offset: number, length: number): Place {
    const { tableOffset, dataOffset, blockSize, preallocated } = this.#layout;
    const index = Math.floor(offset / blockSize);
    const within = offset % blockSize;
    const entryAt = (block: number): number => this.#table.u32(0, tableOffset + block * 4);
    const first = entryAt(index);
    const absent = first >= DISCARDED;
    const most = Math.min(MAX_RUN, Math.ceil((within + length) / blockSize));
    const count = runLength(most, (distance) => {
      const entry = entryAt(index + distance);
      return absent ? entry >= DISCARDED : entry === first + distance && entry < DISCARDED;
    });
    const bytes = Math.min(length, count * blockSize - within);
    if (absent) return { kind: 'zero', length: bytes };
    const start = dataOffset + first * blockSize;
    const used = Math.min(count * blockSize, this.#layout.length - index * blockSize);
    if (start + used > this.#file.length) {
      throw corrupt(
        this.#file.descriptor.path,
        `an entry of its block map, from number ${index} on, leads beyond the end of the file`,
      );
    }
    return { kind: 'data', length: bytes, file: 0, hostOffset: start + within, preallocated };
  }
}
