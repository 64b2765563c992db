import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import { MAX_L1_BYTES, type Qcow2Header } from './header.js';

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

/** An internal snapshot: what is said of it, and the drive as it was. */
export interface Snapshot {
  readonly info: SnapshotInfo;
  readonly l1TableOffset: number;
  /** Entries. */
  readonly l1Size: number;
  /** Virtual size in bytes. */
  readonly length: number;
}

/** Names one snapshot of an image: its id or, where no id fits, its name; or what of both has to fit. */
export type SnapshotSelector =
  | string
  | { readonly id?: string | undefined; readonly name?: string | undefined };

/** Most bytes a snapshot table may have. */
export const MAX_TABLE_BYTES = 64 * 1024 * 1024;
/** Bytes of an entry of the snapshot table before its texts and extra data. */
export const SNAPSHOT_BYTES = 40;
const MAX_SNAPSHOT_EXTRA_BYTES = 1024;
/** There is no instruction count. */
export const NO_ICOUNT = 2n ** 64n - 1n;

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

/** A snapshot table: its entries in their order, and where it is in the file. */
export interface SnapshotTable {
  readonly snapshots: readonly Snapshot[];
  /** Where the entries are, without what fills them up to a multiple of 8 bytes. */
  readonly places: readonly { readonly offset: number; readonly length: number }[];
  /** Bytes. */
  readonly offset: number;
  readonly length: number;
}

/** The internal snapshots of an image. @throws StillframeError what {@link readSnapshotTable} throws */
export function readSnapshots(runtime: Runtime, file: FileNode, header: Qcow2Header): readonly Snapshot[] {
  return readSnapshotTable(runtime, file, header).snapshots;
}

/**
 * Source: the qcow2 specification, section "Snapshots".
 *
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_IO
 */
export function readSnapshotTable(runtime: Runtime, file: FileNode, header: Qcow2Header): SnapshotTable {
  const offset = header.snapshotsOffset;
  const table = new TableReader(runtime, file, 'snapshot table', offset, MAX_TABLE_BYTES);
  const snapshots: Snapshot[] = [];
  const places: { offset: number; length: number }[] = [];
  for (let index = 0; index < header.snapshotCount; index++) {
    const start = table.offset;
    const fixed = table.take(SNAPSHOT_BYTES);
    const extraBytes = fixed.getUint32(36);
    if (extraBytes > MAX_SNAPSHOT_EXTRA_BYTES) {
      throw table.corrupt(`has ${extraBytes} bytes of extra data in entry ${index}`);
    }
    const extra = table.take(extraBytes);
    const id = table.text(fixed.getUint16(12));
    const name = table.text(fixed.getUint16(14));
    places.push({ offset: start, length: table.offset - start });
    table.align();
    const clock = fixed.getBigUint64(24);
    const icount = extraBytes >= 24 ? extra.getBigUint64(16) : NO_ICOUNT;
    const info: SnapshotInfo = {
      ...(icount === NO_ICOUNT ? {} : { icount: Number(icount) }),
      'vm-clock-nsec': Number(clock % 1_000_000_000n),
      name,
      'date-sec': fixed.getUint32(16),
      'date-nsec': fixed.getUint32(20),
      'vm-clock-sec': Number(clock / 1_000_000_000n),
      id,
      'vm-state-size': extraBytes >= 8 ? Number(extra.getBigUint64(0)) : fixed.getUint32(32),
    };
    snapshots.push({
      info,
      l1TableOffset: Number(fixed.getBigUint64(0)),
      l1Size: fixed.getUint32(8),
      length: extraBytes >= 16 ? Number(extra.getBigUint64(8)) : header.length,
    });
  }
  return { snapshots, places, offset, length: table.offset - offset };
}

/**
 * The header by which an image is read as one of its snapshots has it.
 *
 * Source: QEMU's `qemu-img convert -l`; the qcow2 specification, section "Snapshots".
 *
 * @throws StillframeError ERR_STILLFRAME_NOT_FOUND (no such snapshot), …_CORRUPT_IMAGE, …_IO
 */
export function headerOfSnapshot(
  runtime: Runtime,
  file: FileNode,
  header: Qcow2Header,
  selector: SnapshotSelector,
): Qcow2Header {
  const { path } = file.descriptor;
  const snapshot = select(readSnapshots(runtime, file, header), selector);
  if (snapshot === undefined) {
    const wanted = typeof selector === 'string' ? selector : (selector.name ?? selector.id ?? '');
    throw new StillframeError(
      'ERR_STILLFRAME_NOT_FOUND',
      `'${path}' has no snapshot '${wanted}'; 'stillframe snapshot -l' lists those it has`,
    );
  }
  const { l1TableOffset, l1Size, length } = snapshot;
  const damaged = (what: string): StillframeError =>
    new StillframeError(
      'ERR_STILLFRAME_CORRUPT_IMAGE',
      `'${path}': snapshot '${snapshot.info.name}' ${what}; check the image with 'stillframe check'`,
    );
  const { clusterSize } = header;
  if (!Number.isSafeInteger(length)) throw damaged(`has a disk of ${length} bytes, more than 2^53`);
  if (l1Size * 8 > MAX_L1_BYTES)
    throw damaged(`has an L1 table of ${l1Size} entries, more than ${MAX_L1_BYTES} bytes`);
  const perTable = clusterSize / (header.extendedL2 ? 16 : 8);
  if (l1Size < Math.ceil(length / clusterSize / perTable)) {
    throw damaged(`has an L1 table of ${l1Size} entries, too few for its disk of ${length} bytes`);
  }
  const isPlace = l1TableOffset > 0 && l1TableOffset + l1Size * 8 <= file.length;
  // A drive of 0 bytes needs no table.
  if (l1TableOffset % clusterSize !== 0 || (l1Size > 0 && !isPlace)) {
    throw damaged(
      `says that its L1 table is at offset ${l1TableOffset}, which is no place for it in the file`,
    );
  }
  return { ...header, l1TableOffset, l1Size, length };
}

function select(snapshots: readonly Snapshot[], selector: SnapshotSelector): Snapshot | undefined {
  if (typeof selector === 'string') {
    return (
      snapshots.find(({ info }) => info.id === selector) ??
      snapshots.find(({ info }) => info.name === selector)
    );
  }
  const { id, name } = selector;
  return snapshots.find(
    ({ info }) => (id === undefined || info.id === id) && (name === undefined || info.name === name),
  );
}
