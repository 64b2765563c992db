import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import {
  EXTENSION_BACKING_FORMAT,
  EXTENSION_FEATURE_TABLE,
  EXTENSION_HEAD_BYTES,
  FIELD,
  type Qcow2Header,
  readHeader,
  SECTOR_BYTES,
} from './header.js';

/** What a header says of a backing file. */
export interface BackingReference {
  readonly name: string;
  readonly format: string | undefined;
}

/** Size of a drive in bytes and the L1 table that maps it. */
export type Layout = Pick<Qcow2Header, 'length' | 'l1Size' | 'l1TableOffset'>;

function padded(length: number): number {
  return Math.ceil(length / 8) * 8;
}

/**
 * Makes the header name another backing file, or none. All else in it stays as it is, extensions that nobody knows
 * included. The change happens by the write of one sector, whole or not at all, and is durable afterwards: the new name
 * is put beside the old one first. Only where the cluster has no room for both it is written over.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT where the name or the format is too long, before anything
 *   is written
 */
export function rewriteBacking(
  runtime: Runtime,
  file: FileNode,
  backing: BackingReference | undefined,
): void {
  const { arena } = runtime;
  const header = readHeader(runtime, file);
  const { clusterSize } = header;
  const buffer = arena.alloc(clusterSize, 'qcow2 header');
  try {
    file.read(0, buffer, clusterSize);
    const current = Buffer.from(arena.copyOut(buffer, clusterSize));
    const change = new HeaderChange(file.descriptor.path, header, current, backing);
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

interface Extension {
  readonly type: number;
  readonly data: Uint8Array;
}

/** How a header's cluster becomes one with another backing file. */
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
  readonly #header: Qcow2Header;
  readonly #old: Buffer;
  readonly #name: Buffer;
  readonly #nameAt: number;

  constructor(path: string, header: Qcow2Header, old: Buffer, backing: BackingReference | undefined) {
    this.#path = path;
    this.#header = header;
    this.#old = Buffer.from(old);
    this.#name = Buffer.from(backing?.name ?? '', 'utf8');
    const format = Buffer.from(backing?.format ?? '', 'utf8');
    if (this.#name.length > 1023) throw this.#bad(`its name has ${this.#name.length} bytes, more than 1023`);
    if (this.#name.includes(0)) throw this.#bad('its name contains a zero byte');
    if (format.length > 15) throw this.#bad(`the format '${backing?.format}' is longer than 15 bytes`);

    const all = header.extensions.map(({ type, offset, length }) => ({
      type,
      data: this.#old.subarray(offset, offset + length),
    }));
    const extensions = all.filter(({ type }) => type !== EXTENSION_BACKING_FORMAT);
    if (format.length > 0) extensions.unshift({ type: EXTENSION_BACKING_FORMAT, data: format });
    const end = this.#endOf(extensions);
    const oldEnd = this.#endOf(all);
    const beside = this.#beside(Math.max(end, oldEnd));
    this.#nameAt = this.#name.length === 0 ? 0 : (beside ?? end);
    this.whole = this.#encode(extensions);
    const beyond = Math.min(header.clusterSize, Math.max(SECTOR_BYTES, end, oldEnd));
    const moved = this.whole.compare(this.#old, SECTOR_BYTES, beyond, SECTOR_BYTES, beyond) !== 0;
    const few = extensions.filter(({ type }) => type !== EXTENSION_FEATURE_TABLE);
    this.short = moved ? this.#encode(few) : undefined;
    this.apart = beside !== undefined && (!moved || this.#endOf(few) <= SECTOR_BYTES);
  }

  /** The new name in a header that is otherwise `bytes`. */
  withName(bytes: Buffer): Buffer {
    const copy = Buffer.from(bytes);
    this.#name.copy(copy, this.#nameAt);
    return copy;
  }

  /** A place for the name behind `end` where it does not touch the old one beyond the first sector. */
  #beside(end: number): number | undefined {
    const { clusterSize } = this.#header;
    const oldAt = Number(this.#old.readBigUInt64BE(FIELD.backingFileOffset));
    const oldEnd = oldAt + this.#old.readUInt32BE(FIELD.backingFileSize);
    const free = (at: number): boolean =>
      Math.max(at, oldAt, SECTOR_BYTES) >= Math.min(at + this.#name.length, oldEnd);
    return [end, padded(oldEnd)].find((at) => at >= end && at + this.#name.length <= clusterSize && free(at));
  }

  /** Where a list of extensions ends, with what says so where a name is to follow. */
  #endOf(extensions: readonly Extension[]): number {
    const bytes = extensions.reduce((sum, { data }) => sum + EXTENSION_HEAD_BYTES + padded(data.length), 0);
    // The end of the extensions is a head of zeroes; without a name behind them it may be the end of the cluster.
    const end = this.#header.headerLength + bytes;
    return this.#name.length === 0
      ? Math.min(end + EXTENSION_HEAD_BYTES, this.#header.clusterSize)
      : end + EXTENSION_HEAD_BYTES;
  }

  #encode(extensions: readonly Extension[]): Buffer {
    const bytes = Buffer.alloc(this.#header.clusterSize);
    if (Math.max(this.#endOf(extensions), this.#nameAt + this.#name.length) > bytes.length) {
      throw this.#bad(
        `the name does not fit into the header's cluster of ${bytes.length} bytes; use a shorter one`,
      );
    }
    this.#old.copy(bytes, 0, 0, this.#header.headerLength);
    let at = this.#header.headerLength;
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

  #bad(what: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `cannot change the backing file of '${this.#path}': ${what}`,
    );
  }
}
