import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import {
  EXTENSION_BACKING_FORMAT,
  EXTENSION_BITMAPS,
  EXTENSION_DATA_FILE,
  EXTENSION_FEATURE_TABLE,
  EXTENSION_HEAD_BYTES,
  FIELD,
  featureTable,
  HEADER_LENGTH_V2,
  type Qcow2Header,
  readHeader,
  SECTOR_BYTES,
  WRITTEN_HEADER_LENGTH,
} from './header.js';

/** What a header says of a backing file. */
export interface BackingReference {
  readonly name: string;
  readonly format: string | undefined;
}

/** Size of a drive in bytes and the L1 table that maps it. */
export type Layout = Pick<Qcow2Header, 'length' | 'l1Size' | 'l1TableOffset'>;

/** What of a header can be made something else; all tables stay where they are. */
export type Wording = Pick<
  Qcow2Header,
  | 'version'
  | 'incompatibleFeatures'
  | 'compatibleFeatures'
  | 'autoclearFeatures'
  | 'compressionType'
  | 'backingFile'
  | 'backingFormat'
  | 'dataFile'
>;

function padded(length: number): number {
  return Math.ceil(length / 8) * 8;
}

/**
 * Makes the header name another backing file, or none: see {@link rewriteHeader}.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT where the name or the format is too long, before anything
 *   is written
 */
export function rewriteBacking(
  runtime: Runtime,
  file: FileNode,
  backing: BackingReference | undefined,
): void {
  rewriteHeader(runtime, file, { backingFile: backing?.name, backingFormat: backing?.format });
}

/**
 * Makes the header say something else. All else in it stays as it is, extensions that nobody knows included; version 2
 * has neither features nor the bitmaps that need one. The change happens by the write of one sector, whole or not at
 * all, and is durable afterwards: a new name is put beside the old one first. Only where the cluster has no room for
 * both, or its first sector none for the extensions, it is written over.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT where a name or the format is too long, before anything is
 *   written
 */
export function rewriteHeader(runtime: Runtime, file: FileNode, words: Partial<Wording>): void {
  const { arena } = runtime;
  const header = readHeader(runtime, file);
  const { clusterSize } = header;
  const buffer = arena.alloc(clusterSize, 'qcow2 header');
  try {
    file.read(0, buffer, clusterSize);
    const current = Buffer.from(arena.copyOut(buffer, clusterSize));
    const change = new HeaderChange(file.descriptor.path, header, current, { ...header, ...words });
    const put = (from: number, to: number, bytes: Buffer): void => {
      if (bytes.compare(current, from, to, from, to) === 0) return;
      arena.u8.set(bytes.subarray(from, to), buffer);
      file.write(from, buffer, to - from);
      file.flush();
      bytes.copy(current, from, from, to);
    };
    const { whole, short } = change;
    if (!change.apart) {
      put(0, clusterSize, whole);
      return;
    }
    // What nobody looks at yet, the first sector that tells of it, and at last what nobody looks at any more.
    put(SECTOR_BYTES, clusterSize, change.withName(current));
    if (short !== undefined) {
      put(0, SECTOR_BYTES, short);
      put(SECTOR_BYTES, clusterSize, whole);
    }
    put(0, SECTOR_BYTES, whole);
    put(SECTOR_BYTES, clusterSize, whole);
  } finally {
    arena.free(buffer);
  }
}

/** Writes size and L1 table into the header, 24 bytes of its first sector, and makes them durable. */
export function writeLayout(
  runtime: Runtime,
  file: FileNode,
  { length, l1Size, l1TableOffset }: Layout,
): void {
  const { arena } = runtime;
  const bytes = Buffer.alloc(24);
  file.readBytes(FIELD.size, bytes);
  bytes.writeBigUInt64BE(BigInt(length), 0);
  bytes.writeUInt32BE(l1Size, FIELD.l1Size - FIELD.size);
  bytes.writeBigUInt64BE(BigInt(l1TableOffset), FIELD.l1TableOffset - FIELD.size);
  const pointer = arena.alloc(bytes.length, 'qcow2 header');
  try {
    arena.u8.set(bytes, pointer);
    file.write(FIELD.size, pointer, bytes.length);
    file.flush();
  } finally {
    arena.free(pointer);
  }
}

/** Where the refcount table is and how many clusters it has, and the width of the refcounts that it leads to. */
export type RefcountStructure = Pick<
  Qcow2Header,
  'version' | 'refcountTableOffset' | 'refcountTableClusters' | 'refcountOrder'
>;

/** Writes the refcount structure into the header, in its first sector: all of it or nothing. */
export function writeRefcountStructure(
  runtime: Runtime,
  file: FileNode,
  { version, refcountTableOffset, refcountTableClusters, refcountOrder }: RefcountStructure,
): void {
  const { arena } = runtime;
  const start = FIELD.refcountTableOffset;
  const bytes = Buffer.alloc((version === 2 ? FIELD.snapshotCount : FIELD.headerLength) - start);
  file.readBytes(start, bytes);
  bytes.writeBigUInt64BE(BigInt(refcountTableOffset), 0);
  bytes.writeUInt32BE(refcountTableClusters, FIELD.refcountTableClusters - start);
  // In version 2 extensions are there, and the width is fixed.
  if (version === 3) bytes.writeUInt32BE(refcountOrder, FIELD.refcountOrder - start);
  const pointer = arena.alloc(bytes.length, 'qcow2 header');
  try {
    arena.u8.set(bytes, pointer);
    file.write(start, pointer, bytes.length);
    file.flush();
  } finally {
    arena.free(pointer);
  }
}

interface Extension {
  readonly type: number;
  readonly data: Uint8Array;
}

/** How a header's cluster becomes one that says something else. */
class HeaderChange {
  /** Everything in its place. */
  readonly whole: Buffer;
  /**
   * The same without the names of features, with its extensions in the first sector alone; undefined where what is
   * beyond that sector of them stays as it is.
   */
  readonly short: Buffer | undefined;
  /** The old name and extensions are not touched before the first sector is written. */
  readonly apart: boolean;
  readonly #path: string;
  readonly #old: Buffer;
  /** What is in front of the extensions. */
  readonly #fields: Buffer;
  readonly #name: Buffer;
  readonly #nameAt: number;

  constructor(path: string, header: Qcow2Header, old: Buffer, words: Wording) {
    this.#path = path;
    this.#old = Buffer.from(old);
    this.#fields = fieldsOf(header, this.#old, words);
    this.#name = Buffer.from(words.backingFile ?? '', 'utf8');
    const format = Buffer.from(words.backingFormat ?? '', 'utf8');
    if (this.#name.length > 1023) throw this.#badName(`has ${this.#name.length} bytes, more than 1023`);
    if (this.#name.includes(0)) throw this.#badName('contains a zero byte');
    if (format.length > 15) {
      throw this.#bad(`the format '${words.backingFormat}' of its backing file is longer than 15 bytes`);
    }
    const dataFile = Buffer.from(words.dataFile ?? '', 'utf8');
    if (dataFile.includes(0)) throw this.#bad('the name of its data file contains a zero byte');

    const isNamed = this.#name.length > 0;
    const all = header.extensions.map(({ type, offset, length }) => ({
      type,
      data: this.#old.subarray(offset, offset + length),
    }));
    const gone = [EXTENSION_BACKING_FORMAT, EXTENSION_DATA_FILE];
    if (words.version < header.version) gone.push(EXTENSION_FEATURE_TABLE, EXTENSION_BITMAPS);
    const extensions: Extension[] = all.filter(({ type }) => !gone.includes(type));
    if (dataFile.length > 0) extensions.unshift({ type: EXTENSION_DATA_FILE, data: dataFile });
    if (format.length > 0) extensions.unshift({ type: EXTENSION_BACKING_FORMAT, data: format });
    if (words.version > header.version) {
      extensions.push({ type: EXTENSION_FEATURE_TABLE, data: featureTable() });
    }
    const fullEnd = this.#endOf(this.#fields.length, extensions, isNamed);
    if (fullEnd + this.#name.length > header.clusterSize) {
      // The names of features are a courtesy.
      const table = extensions.findIndex(({ type }) => type === EXTENSION_FEATURE_TABLE);
      if (table >= 0) extensions.splice(table, 1);
    }
    const end = this.#endOf(this.#fields.length, extensions, isNamed);
    const oldEnd = this.#endOf(header.headerLength, all, header.backingFile !== undefined);
    const beside = this.#beside(Math.max(end, oldEnd));
    this.#nameAt = this.#name.length === 0 ? 0 : (beside ?? end);
    this.whole = this.#encode(extensions);
    const beyond = Math.min(header.clusterSize, Math.max(SECTOR_BYTES, end, oldEnd));
    const moved = this.whole.compare(this.#old, SECTOR_BYTES, beyond, SECTOR_BYTES, beyond) !== 0;
    const few = extensions.filter(({ type }) => type !== EXTENSION_FEATURE_TABLE);
    this.short = moved ? this.#encode(few) : undefined;
    const fewEnd = this.#endOf(this.#fields.length, few, isNamed);
    this.apart = beside !== undefined && (!moved || fewEnd <= SECTOR_BYTES);
  }

  /** The new name in a header that is otherwise `bytes`. */
  withName(bytes: Buffer): Buffer {
    const copy = Buffer.from(bytes);
    this.#name.copy(copy, this.#nameAt);
    return copy;
  }

  /** A place for the name behind `end` where it does not touch the old one beyond the first sector. */
  #beside(end: number): number | undefined {
    const clusterSize = this.#old.length;
    const oldAt = Number(this.#old.readBigUInt64BE(FIELD.backingFileOffset));
    const oldEnd = oldAt + this.#old.readUInt32BE(FIELD.backingFileSize);
    const free = (at: number): boolean =>
      Math.max(at, oldAt, SECTOR_BYTES) >= Math.min(at + this.#name.length, oldEnd);
    return [end, padded(oldEnd)].find((at) => at >= end && at + this.#name.length <= clusterSize && free(at));
  }

  /** Where a list of extensions ends, with what says so where a name is to follow. */
  #endOf(headerLength: number, extensions: readonly Extension[], isNamed: boolean): number {
    const bytes = extensions.reduce((sum, { data }) => sum + EXTENSION_HEAD_BYTES + padded(data.length), 0);
    const end = headerLength + bytes;
    // The end of the extensions is a head of zeroes; without a name behind them it may be the end of the cluster.
    if (!isNamed && end <= this.#old.length) return Math.min(end + EXTENSION_HEAD_BYTES, this.#old.length);
    return end + EXTENSION_HEAD_BYTES;
  }

  #encode(extensions: readonly Extension[]): Buffer {
    const bytes = Buffer.alloc(this.#old.length);
    const end = this.#endOf(this.#fields.length, extensions, this.#name.length > 0);
    if (Math.max(end, this.#nameAt + this.#name.length) > bytes.length) {
      throw this.#bad(
        `its names do not fit into the header's cluster of ${bytes.length} bytes; use shorter ones`,
      );
    }
    this.#fields.copy(bytes);
    let at = this.#fields.length;
    for (const { type, data } of extensions) {
      bytes.writeUInt32BE(type, at);
      bytes.writeUInt32BE(data.length, at + 4);
      bytes.set(data, at + EXTENSION_HEAD_BYTES);
      at += EXTENSION_HEAD_BYTES + padded(data.length);
    }
    this.#name.copy(bytes, this.#nameAt);
    bytes.writeBigUInt64BE(BigInt(this.#nameAt), FIELD.backingFileOffset);
    bytes.writeUInt32BE(this.#name.length, FIELD.backingFileSize);
    return bytes;
  }

  #badName(what: string): StillframeError {
    return this.#bad(`the name of its backing file ${what}`);
  }

  #bad(what: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `cannot change the header of '${this.#path}': ${what}`,
    );
  }
}

/** What is in front of the extensions, with the name of the backing file still where it was. */
function fieldsOf(header: Qcow2Header, old: Buffer, words: Wording): Buffer {
  const { version } = words;
  const upgraded = version > header.version;
  const length = version === 2 ? HEADER_LENGTH_V2 : upgraded ? WRITTEN_HEADER_LENGTH : header.headerLength;
  const fields = Buffer.alloc(length);
  old.copy(fields, 0, 0, Math.min(length, header.headerLength));
  fields.writeUInt32BE(version, 4);
  if (version === 2) return fields;
  fields.writeBigUInt64BE(words.incompatibleFeatures, FIELD.incompatibleFeatures);
  fields.writeBigUInt64BE(words.compatibleFeatures, FIELD.compatibleFeatures);
  fields.writeBigUInt64BE(words.autoclearFeatures, FIELD.autoclearFeatures);
  if (upgraded) {
    fields.writeUInt32BE(header.refcountOrder, FIELD.refcountOrder);
    fields.writeUInt32BE(length, FIELD.headerLength);
  }
  if (length > FIELD.compressionType) fields[FIELD.compressionType] = words.compressionType;
  return fields;
}
