import { readFileSync, writeFileSync } from 'node:fs';

/** Offsets of fields of the header, in bytes. */
export const HEADER = {
  version: 4,
  backingFileOffset: 8,
  backingFileSize: 16,
  clusterBits: 20,
  size: 24,
  cryptMethod: 32,
  l1Size: 36,
  l1TableOffset: 40,
  refcountTableOffset: 48,
  refcountTableClusters: 56,
  snapshotCount: 60,
  snapshotsOffset: 64,
  incompatibleFeatures: 72,
  compatibleFeatures: 80,
  autoclearFeatures: 88,
  refcountOrder: 96,
  headerLength: 100,
  compressionType: 104,
} as const;

export const EXTENSION = {
  backingFormat: 0xe2792aca,
  features: 0x6803f857,
  bitmaps: 0x23852875,
  encryption: 0x0537be77,
  dataFile: 0x44415441,
} as const;

export const COPIED = 1n << 63n;
export const COMPRESSED = 1n << 62n;
const OFFSET_MASK = 0x00fffffffffffe00n;

/**
 * A qcow2 image as bytes, for tests that look at it or damage it. Written from the specification, apart from the
 * driver. Offsets are bytes in the file; it trusts the image.
 */
export class Qcow2Bytes {
  bytes: Buffer;

  constructor(bytes: Buffer) {
    this.bytes = bytes;
  }

  static read(path: string): Qcow2Bytes {
    return new Qcow2Bytes(readFileSync(path));
  }

  copy(): Qcow2Bytes {
    return new Qcow2Bytes(Buffer.from(this.bytes));
  }

  save(path: string): void {
    writeFileSync(path, this.bytes);
  }

  u32(offset: number): number {
    return this.bytes.readUInt32BE(offset);
  }

  u64(offset: number): bigint {
    return this.bytes.readBigUInt64BE(offset);
  }

  /** A field of 64 bits that is an offset; flags are dropped. */
  place(offset: number): number {
    return Number(this.u64(offset) & OFFSET_MASK);
  }

  put32(offset: number, value: number): this {
    this.bytes.writeUInt32BE(value, offset);
    return this;
  }

  put64(offset: number, value: number | bigint): this {
    this.bytes.writeBigUInt64BE(BigInt(value), offset);
    return this;
  }

  putBytes(offset: number, bytes: Uint8Array): this {
    this.bytes.set(bytes, offset);
    return this;
  }

  get version(): number {
    return this.u32(HEADER.version);
  }

  get clusterBits(): number {
    return this.u32(HEADER.clusterBits);
  }

  get clusterSize(): number {
    return 2 ** this.clusterBits;
  }

  get headerLength(): number {
    return this.version === 2 ? 72 : this.u32(HEADER.headerLength);
  }

  get l1(): number {
    return this.place(HEADER.l1TableOffset);
  }

  get refcountTable(): number {
    return this.place(HEADER.refcountTableOffset);
  }

  /** Where the L2 table of an L1 entry is, 0 where there is none. */
  l2(index = 0): number {
    return this.place(this.l1 + index * 8);
  }

  /** Where a refcount block is, 0 where there is none. */
  refcountBlock(index = 0): number {
    return this.place(this.refcountTable + index * 8);
  }

  /** The header extensions, without the one that ends them: where each starts, its type and length of data. */
  extensions(): { at: number; type: number; length: number }[] {
    const found: { at: number; type: number; length: number }[] = [];
    const backing = Number(this.u64(HEADER.backingFileOffset));
    const end = backing === 0 ? this.clusterSize : backing;
    for (let at = this.headerLength; at + 8 <= end && this.u32(at) !== 0; ) {
      const length = this.u32(at + 4);
      found.push({ at, type: this.u32(at), length });
      at += 8 + Math.ceil(length / 8) * 8;
    }
    return found;
  }

  /** Replaces all header extensions and the name of the backing file. */
  setHead(extensions: readonly (readonly [type: number, data: Uint8Array])[], backing?: Uint8Array): this {
    let at = this.headerLength;
    this.bytes.fill(0, at, this.clusterSize);
    for (const [type, data] of extensions) {
      this.put32(at, type)
        .put32(at + 4, data.length)
        .putBytes(at + 8, data);
      at += 8 + Math.ceil(data.length / 8) * 8;
    }
    if (backing === undefined) return this.put64(HEADER.backingFileOffset, 0);
    at += 8;
    this.put64(HEADER.backingFileOffset, at).put32(HEADER.backingFileSize, backing.length);
    return this.putBytes(at, backing);
  }

  /** Puts data into new clusters at the end, which the refcounts know nothing of. Returns where. */
  append(data: Uint8Array): number {
    const { clusterSize } = this;
    const at = Math.ceil(this.bytes.length / clusterSize) * clusterSize;
    const grown = Buffer.alloc(at + Math.ceil(data.length / clusterSize) * clusterSize);
    this.bytes.copy(grown);
    grown.set(data, at);
    this.bytes = grown;
    return at;
  }
}

/** An entry of a snapshot table. */
export function snapshotEntry(fields: {
  readonly id?: string;
  readonly name?: string;
  readonly l1Offset?: number | bigint;
  readonly l1Size?: number;
  readonly extra?: Uint8Array;
  /** What the entry says of the length of its extra data, id and name; by default the truth. */
  readonly extraLength?: number;
  readonly idLength?: number;
  readonly nameLength?: number;
}): Buffer {
  const { id = '1', name = 'snapshot', extra = Buffer.alloc(24) } = fields;
  const fixed = Buffer.alloc(40);
  fixed.writeBigUInt64BE(BigInt(fields.l1Offset ?? 0), 0);
  fixed.writeUInt32BE(fields.l1Size ?? 0, 8);
  fixed.writeUInt16BE(fields.idLength ?? id.length, 12);
  fixed.writeUInt16BE(fields.nameLength ?? name.length, 14);
  fixed.writeUInt32BE(fields.extraLength ?? extra.length, 36);
  const whole = Buffer.concat([fixed, extra, Buffer.from(id), Buffer.from(name)]);
  return Buffer.concat([whole, Buffer.alloc((8 - (whole.length % 8)) % 8)]);
}

/** An entry of a bitmap directory. */
export function bitmapEntry(fields: {
  readonly name?: string;
  readonly tableOffset?: number | bigint;
  readonly tableSize?: number;
  readonly flags?: number;
  readonly type?: number;
  readonly granularityBits?: number;
  readonly nameLength?: number;
  readonly extraLength?: number;
}): Buffer {
  const { name = 'bitmap' } = fields;
  const fixed = Buffer.alloc(24);
  fixed.writeBigUInt64BE(BigInt(fields.tableOffset ?? 0), 0);
  fixed.writeUInt32BE(fields.tableSize ?? 0, 8);
  fixed.writeUInt32BE(fields.flags ?? 0, 12);
  fixed[16] = fields.type ?? 1;
  fixed[17] = fields.granularityBits ?? 16;
  fixed.writeUInt16BE(fields.nameLength ?? name.length, 18);
  fixed.writeUInt32BE(fields.extraLength ?? 0, 20);
  const whole = Buffer.concat([fixed, Buffer.from(name)]);
  return Buffer.concat([whole, Buffer.alloc((8 - (whole.length % 8)) % 8)]);
}

/** The data of the bitmaps extension. */
export function bitmapsExtension(
  count: number,
  directoryBytes: number | bigint,
  offset: number | bigint,
): Buffer {
  const data = Buffer.alloc(24);
  data.writeUInt32BE(count, 0);
  data.writeBigUInt64BE(BigInt(directoryBytes), 8);
  data.writeBigUInt64BE(BigInt(offset), 16);
  return data;
}
