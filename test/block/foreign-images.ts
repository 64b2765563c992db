/**
 * Images that QEMU's tools cannot make, byte by byte after the specifications, and changes to those it can.
 */
import { deflateSync } from 'node:zlib';
import { crc32c } from '#src/block/foreign/crc32c.js';

const SECTOR = 512;
const GRAIN_SECTORS = 128;
const GRAIN = GRAIN_SECTORS * SECTOR;
const TABLE_ENTRIES = 512;

function isZero(bytes: Uint8Array): boolean {
  return bytes.every((byte) => byte === 0);
}

function padded(bytes: Uint8Array): Buffer {
  return Buffer.concat([bytes, Buffer.alloc((SECTOR - (bytes.length % SECTOR)) % SECTOR)]);
}

/** Grains of the drive; the last one may be short. */
function grainsOf(data: Uint8Array): { readonly index: number; readonly bytes: Uint8Array }[] {
  const grains: { index: number; bytes: Uint8Array }[] = [];
  for (let index = 0; index * GRAIN < data.length; index++) {
    const bytes = data.subarray(index * GRAIN, (index + 1) * GRAIN);
    if (!isZero(bytes)) grains.push({ index, bytes });
  }
  return grains;
}

function descriptorText(createType: string, sectors: number): Buffer {
  const text =
    `# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="${createType}"\n` +
    `# Extent description\nRW ${sectors} SPARSE "x.vmdk"\n`;
  return Buffer.from(text.padEnd(20 * SECTOR, '\0'));
}

/**
 * A `streamOptimized` VMDK as VMware's export tools write it, front to back: the grain directory at the end, found
 * through a footer.
 */
export function streamOptimized(data: Uint8Array): Buffer {
  const parts: Buffer[] = [];
  let sectors = 0;
  const put = (bytes: Uint8Array): number => {
    const at = sectors;
    const whole = padded(bytes);
    parts.push(whole);
    sectors += whole.length / SECTOR;
    return at;
  };
  const header = (directory: bigint): Buffer => {
    const bytes = Buffer.alloc(SECTOR);
    bytes.write('KDMV', 0, 'latin1');
    bytes.writeUInt32LE(3, 4);
    bytes.writeUInt32LE(0x30001, 8);
    bytes.writeBigUInt64LE(BigInt(data.length / SECTOR), 12);
    bytes.writeBigUInt64LE(BigInt(GRAIN_SECTORS), 20);
    bytes.writeBigUInt64LE(1n, 28);
    bytes.writeBigUInt64LE(20n, 36);
    bytes.writeUInt32LE(TABLE_ENTRIES, 44);
    bytes.writeBigUInt64LE(directory, 56);
    bytes.writeBigUInt64LE(128n, 64);
    bytes.write('\n \r\n', 73, 'latin1');
    bytes.writeUInt16LE(1, 77);
    return bytes;
  };
  const marker = (length: number, type: number): Buffer => {
    const bytes = Buffer.alloc(SECTOR);
    bytes.writeBigUInt64LE(BigInt(length), 0);
    bytes.writeUInt32LE(type, 12);
    return bytes;
  };
  put(header(2n ** 64n - 1n));
  put(descriptorText('streamOptimized', data.length / SECTOR));
  put(Buffer.alloc((128 - sectors) * SECTOR));
  const tables = Math.ceil(data.length / (GRAIN * TABLE_ENTRIES));
  const directory = Buffer.alloc(tables * 4);
  const grains = grainsOf(data);
  for (let table = 0; table < tables; table++) {
    const entries = Buffer.alloc(TABLE_ENTRIES * 4);
    for (const { index, bytes } of grains) {
      if (Math.floor(index / TABLE_ENTRIES) !== table) continue;
      const whole = Buffer.concat([bytes, Buffer.alloc(GRAIN - bytes.length)]);
      const compressed = deflateSync(whole);
      const head = Buffer.alloc(12);
      head.writeBigUInt64LE(BigInt(index * GRAIN_SECTORS), 0);
      head.writeUInt32LE(compressed.length, 8);
      entries.writeUInt32LE(put(Buffer.concat([head, compressed])), (index % TABLE_ENTRIES) * 4);
    }
    if (isZero(entries)) continue;
    put(marker(4, 1));
    directory.writeUInt32LE(put(entries), table * 4);
  }
  put(marker(Math.ceil(directory.length / SECTOR), 2));
  const directoryAt = put(directory);
  put(marker(1, 3));
  put(header(BigInt(directoryAt)));
  put(marker(0, 0));
  return Buffer.concat(parts);
}

/** A `COWD` extent as ESXi keeps snapshots in: grain tables of 4096 entries. */
export function cowd(data: Uint8Array, grainSectors = 1): Buffer {
  const grain = grainSectors * SECTOR;
  const grains = Math.ceil(data.length / grain);
  const tables = Math.ceil(grains / 4096);
  const header = Buffer.alloc(4 * SECTOR);
  header.write('COWD', 0, 'latin1');
  header.writeUInt32LE(1, 4);
  header.writeUInt32LE(3, 8);
  header.writeUInt32LE(data.length / SECTOR, 12);
  header.writeUInt32LE(grainSectors, 16);
  header.writeUInt32LE(4, 20);
  header.writeUInt32LE(tables, 24);
  const directory = padded(Buffer.alloc(tables * 4));
  const parts: Buffer[] = [header, directory];
  let sectors = 4 + directory.length / SECTOR;
  for (let table = 0; table < tables; table++) {
    const entries = Buffer.alloc(4096 * 4);
    const blocks: Uint8Array[] = [];
    const first = sectors + entries.length / SECTOR;
    for (let index = 0; index < 4096; index++) {
      const at = (table * 4096 + index) * grain;
      const bytes = data.subarray(at, at + grain);
      if (bytes.length === 0 || isZero(bytes)) continue;
      entries.writeUInt32LE(first + blocks.length * grainSectors, index * 4);
      blocks.push(Buffer.concat([bytes, Buffer.alloc(grain - bytes.length)]));
    }
    if (blocks.length === 0) continue;
    directory.writeUInt32LE(sectors, table * 4);
    parts.push(entries, ...blocks.map((block) => Buffer.from(block)));
    sectors = first + blocks.length * grainSectors;
  }
  return Buffer.concat(parts);
}

/** A change that the log of a VHDX holds: 4096 bytes, or so many zeroes. */
export interface LoggedChange {
  readonly offset: number;
  readonly data: Uint8Array | number;
}

export const LOG_GUID = Buffer.from('00112233445566778899aabbccddeeff', 'hex');
const LOG_SECTOR = 4096;

/** One entry of a VHDX log. */
export function logEntry(
  sequence: bigint,
  tail: number,
  fileLength: number,
  changes: readonly LoggedChange[],
): Buffer {
  const head = Buffer.alloc(Math.ceil((64 + changes.length * 32) / LOG_SECTOR) * LOG_SECTOR);
  const sectors: Buffer[] = [];
  for (const [index, { offset, data }] of changes.entries()) {
    const at = 64 + index * 32;
    head.write(typeof data === 'number' ? 'zero' : 'desc', at, 'latin1');
    head.writeBigUInt64LE(BigInt(offset), at + 16);
    head.writeBigUInt64LE(sequence, at + 24);
    if (typeof data === 'number') {
      head.writeBigUInt64LE(BigInt(data), at + 8);
      continue;
    }
    const sector = Buffer.from(data);
    sector.copy(head, at + 8, 0, 8);
    sector.copy(head, at + 4, LOG_SECTOR - 4);
    sector.write('data', 0, 'latin1');
    sector.writeUInt32LE(Number(sequence >> 32n), 4);
    sector.writeUInt32LE(Number(sequence & 0xffffffffn), LOG_SECTOR - 4);
    sectors.push(sector);
  }
  const entry = Buffer.concat([head, ...sectors]);
  entry.write('loge', 0, 'latin1');
  entry.writeUInt32LE(entry.length, 8);
  entry.writeUInt32LE(tail, 12);
  entry.writeBigUInt64LE(sequence, 16);
  entry.writeUInt32LE(changes.length, 24);
  LOG_GUID.copy(entry, 32);
  entry.writeBigUInt64LE(BigInt(fileLength), 48);
  entry.writeBigUInt64LE(BigInt(fileLength), 56);
  return seal(entry);
}

/** Sets the CRC-32C of a structure of a VHDX, four bytes from its start. */
export function seal(structure: Buffer): Buffer {
  structure.writeUInt32LE(crc32c(structure, 4), 4);
  return structure;
}

/** The newer of the two headers of a VHDX, as a view into the image. */
export function vhdxHeader(image: Buffer): Buffer {
  const [first, second] = [image.subarray(0x10000, 0x11000), image.subarray(0x20000, 0x21000)];
  return second.readBigUInt64LE(8) > first.readBigUInt64LE(8) ? second : first;
}

/** Puts entries into the log of a VHDX, one after the other from `position` on, and says so in its header. */
export function putLog(image: Buffer, position: number, entries: readonly Buffer[]): void {
  const header = vhdxHeader(image);
  LOG_GUID.copy(header, 48);
  seal(header);
  const length = header.readUInt32LE(68);
  const offset = Number(header.readBigUInt64LE(72));
  for (const byte of Buffer.concat(entries)) {
    image[offset + (position % length)] = byte;
    position++;
  }
}

/** The checksum of a footer or a dynamic disk header of a VHD. */
export function sealVhd(structure: Buffer, field: number): Buffer {
  structure.writeUInt32BE(0, field);
  let sum = 0;
  for (const byte of structure) sum += byte;
  structure.writeUInt32BE(~sum >>> 0, field);
  return structure;
}
