import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import { AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, findExtension, type Qcow2Header } from './header.js';

/** An internal snapshot, with the field names of QAPI `SnapshotInfo`. */
export interface SnapshotInfo {
  readonly id: string;
  readonly name: string;
  /** Bytes of the machine's state, 0 where it has none. */
  readonly 'vm-state-size': number;
  readonly 'date-sec': number;
  readonly 'date-nsec': number;
  readonly 'vm-clock-sec': number;
  readonly 'vm-clock-nsec': number;
  /** Instructions executed; absent where the snapshot does not say. */
  readonly icount?: number;
}

/** A persistent dirty bitmap, with the field names of QAPI `Qcow2BitmapInfo`. */
export interface BitmapInfo {
  readonly name: string;
  /** Bytes that one bit stands for. */
  readonly granularity: number;
  readonly flags: readonly ('in-use' | 'auto')[];
}

/** Most bytes a snapshot table or a bitmap directory may have. */
const MAX_TABLE_BYTES = 64 * 1024 * 1024;
const MAX_BITMAPS = 65535;
const SNAPSHOT_BYTES = 40;
const MAX_SNAPSHOT_EXTRA_BYTES = 1024;
const BITMAP_BYTES = 24;
const NO_ICOUNT = 2n ** 64n - 1n;

/** Reads a table of entries of different lengths one after the other. */
class TableReader {
  readonly #runtime: Runtime;
  readonly #file: FileNode;
  readonly #what: string;
  readonly #start: number;
  readonly #end: number;
  offset: number;

  constructor(runtime: Runtime, file: FileNode, what: string, offset: number, bytes: number) {
    this.#runtime = runtime;
    this.#file = file;
    this.#what = what;
    this.#start = offset;
    this.#end = Math.min(offset + bytes, file.length);
    this.offset = offset;
  }

  /** The next `length` bytes. */
  take(length: number): DataView {
    if (this.offset + length > this.#end) throw this.corrupt('ends in the middle of an entry');
    const { arena } = this.#runtime;
    const pointer = arena.alloc(length, `${this.#what} of '${this.#file.descriptor.path}'`);
    try {
      this.#file.read(this.offset, pointer, length);
      this.offset += length;
      const bytes = arena.copyOut(pointer, length);
      return new DataView(bytes.buffer, bytes.byteOffset, length);
    } finally {
      arena.free(pointer);
    }
  }

  text(length: number): string {
    const { buffer, byteOffset } = this.take(length);
    return Buffer.from(buffer, byteOffset, length).toString('utf8');
  }

  /** Goes on at the next multiple of 8 bytes from the start of the table. */
  align(): void {
    this.offset = this.#start + Math.ceil((this.offset - this.#start) / 8) * 8;
  }

  corrupt(what: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${this.#file.descriptor.path}': the ${this.#what} at offset ${this.#start} ${what}; check the image with 'qemu-img check'`,
    );
  }
}

/**
 * The internal snapshots of an image, in the order of its table.
 *
 * Source: the qcow2 specification, section "Snapshots".
 *
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_IO
 */
export function readSnapshots(runtime: Runtime, file: FileNode, header: Qcow2Header): SnapshotInfo[] {
  const table = new TableReader(runtime, file, 'snapshot table', header.snapshotsOffset, MAX_TABLE_BYTES);
  const snapshots: SnapshotInfo[] = [];
  for (let index = 0; index < header.snapshotCount; index++) {
    const fixed = table.take(SNAPSHOT_BYTES);
    const extraBytes = fixed.getUint32(36);
    if (extraBytes > MAX_SNAPSHOT_EXTRA_BYTES) {
      throw table.corrupt(`has ${extraBytes} bytes of extra data in entry ${index}`);
    }
    const extra = table.take(extraBytes);
    const id = table.text(fixed.getUint16(12));
    const name = table.text(fixed.getUint16(14));
    table.align();
    const clock = fixed.getBigUint64(24);
    const icount = extraBytes >= 24 ? extra.getBigUint64(16) : NO_ICOUNT;
    snapshots.push({
      ...(icount === NO_ICOUNT ? {} : { icount: Number(icount) }),
      'vm-clock-nsec': Number(clock % 1_000_000_000n),
      name,
      'date-sec': fixed.getUint32(16),
      'date-nsec': fixed.getUint32(20),
      'vm-clock-sec': Number(clock / 1_000_000_000n),
      id,
      'vm-state-size': extraBytes >= 8 ? Number(extra.getBigUint64(0)) : fixed.getUint32(32),
    });
  }
  return snapshots;
}

/**
 * The persistent bitmaps of an image; none where a program without bitmap support has changed it since, as the
 * autoclear feature bit shows.
 *
 * Source: the qcow2 specification, sections "Bitmaps extension" and "Bitmap directory".
 *
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_IO
 */
export function readBitmaps(runtime: Runtime, file: FileNode, header: Qcow2Header): BitmapInfo[] {
  const extension = findExtension(header.extensions, EXTENSION_BITMAPS);
  if (extension === undefined || (header.autoclearFeatures & AUTOCLEAR_BITMAPS) === 0n) return [];
  const head = new TableReader(runtime, file, 'bitmaps extension', extension.offset, extension.length);
  const fields = head.take(24);
  const count = fields.getUint32(0);
  const bytes = fields.getBigUint64(8);
  const offset = fields.getBigUint64(16);
  if (count > MAX_BITMAPS || bytes > MAX_TABLE_BYTES || offset > file.length) {
    throw head.corrupt(`names ${count} bitmaps in ${bytes} bytes at offset ${offset}`);
  }
  const directory = new TableReader(runtime, file, 'bitmap directory', Number(offset), Number(bytes));
  const bitmaps: BitmapInfo[] = [];
  for (let index = 0; index < count; index++) {
    const fixed = directory.take(BITMAP_BYTES);
    const flags = fixed.getUint32(12);
    const granularityBits = fixed.getUint8(17);
    if (granularityBits < 9 || granularityBits > 31) {
      throw directory.corrupt(`has ${granularityBits} granularity bits in entry ${index}`);
    }
    directory.take(fixed.getUint32(20));
    const name = directory.text(fixed.getUint16(18));
    directory.align();
    const set: BitmapInfo['flags'][number][] = [];
    if ((flags & 1) !== 0) set.push('in-use');
    if ((flags & 2) !== 0) set.push('auto');
    bitmaps.push({ flags: set, name, granularity: 2 ** granularityBits });
  }
  return bitmaps;
}
