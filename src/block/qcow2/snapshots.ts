import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { Qcow2Descriptor } from '../node.js';
import { attachFile, type FileNode } from '../raw/file.js';
import { bitmapsOf } from './bitmaps.js';
import { COMPRESSED, COPIED, OFFSET_MASK } from './entries.js';
import { FIELD, MAX_L1_BYTES, MAX_SNAPSHOTS, type Qcow2Header, readHeader } from './header.js';
import { type Layout, writeLayout } from './header-write.js';
import {
  headerOfSnapshot,
  MAX_TABLE_BYTES,
  NO_ICOUNT,
  readSnapshotTable,
  SNAPSHOT_BYTES,
  type Snapshot,
  type SnapshotInfo,
  type SnapshotSelector,
} from './listings.js';
import { type HostRun, Metadata } from './metadata.js';
import { closeQcow2, openQcow2 } from './open.js';
import { placesOfSnapshots } from './places.js';
import { replacePlaces } from './state.js';

/** What a new snapshot is called, and when it is taken. */
export interface NewSnapshot {
  readonly name: string;
  /** Seconds since 1970, and nanoseconds. */
  readonly 'date-sec': number;
  readonly 'date-nsec': number;
  /** What the clock of the guest says, in nanoseconds. */
  readonly 'vm-clock-nsec': bigint;
  /** Instructions that the guest has executed; absent: nobody counts them. */
  readonly icount?: bigint | undefined;
}

/** State of the machine (64 bits), length of the drive, instruction count. */
const EXTRA_BYTES = 24;
/** Version 3 has the first two of them in every entry. */
const LEAST_EXTRA_BYTES = 16;
/** Where an entry says how many it has. */
const EXTRA_SIZE_AT = 36;

/**
 * Makes an internal snapshot of an open, writable image that nobody uses meanwhile. The snapshot is there once the header
 * says so, with one write, when all that it relies on is durable; an interruption before leaves leaked clusters and wrong
 * flags at worst, which a check puts right. Facades of the image are to be made anew.
 *
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE (an external data file), …_INVALID_ARGUMENT (too many
 *   snapshots, a cluster that cannot be counted once more), …_NO_SPACE, …_CORRUPT_IMAGE, …_IO
 */
export function createSnapshot(
  runtime: Runtime,
  image: Qcow2Descriptor,
  wanted: NewSnapshot,
  file = attachFile(runtime, image.file),
): void {
  edit(runtime, image, file, (editor) => editor.create(wanted));
}

/**
 * Takes an internal snapshot out of an image. Otherwise as {@link createSnapshot}.
 *
 * @param id which one
 */
export function deleteSnapshot(
  runtime: Runtime,
  image: Qcow2Descriptor,
  id: string,
  file = attachFile(runtime, image.file),
): void {
  edit(runtime, image, file, (editor) => editor.delete(id));
}

/** Gives every entry of the snapshot table what version 3 asks for and version 2 does not. Otherwise as {@link createSnapshot}. */
export function completeSnapshots(runtime: Runtime, image: Qcow2Descriptor, file: FileNode): void {
  edit(runtime, image, file, (editor) => editor.complete());
}

/** Marks what the drive alone has as its own, where refcounts have become lower, and nothing else. */
export function correctCopiedFlags(runtime: Runtime, image: Qcow2Descriptor, file: FileNode): void {
  edit(runtime, image, file, (editor) => editor.correctFlags());
}

/**
 * Makes the drive of an open, writable image, which nobody uses meanwhile, what an internal snapshot has, its size
 * included; the snapshot stays. The header changes with one write, once everything it relies on is durable: before it
 * the drive is what it was, after it what the snapshot has. An interruption leaves leaked clusters at worst.
 *
 * The state of the descriptor is used up, whatever happens; its files stay open.
 *
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE (an external data file), …_BITMAP_BUSY (it has dirty
 *   bitmaps, which would have to say what differs), …_NOT_FOUND, …_INVALID_ARGUMENT (a cluster that cannot be counted
 *   once more), …_NO_SPACE, …_CORRUPT_IMAGE, …_IO
 */
export function applySnapshot(
  runtime: Runtime,
  image: Qcow2Descriptor,
  selector: SnapshotSelector,
  file = attachFile(runtime, image.file),
): void {
  const reopened = <T>(layout: Layout | undefined, body: (editor: Editor) => T): T => {
    const options = { readOnly: false, layout, recordDirty: false };
    const descriptor = openQcow2(runtime, image.file, undefined, options);
    try {
      return edit(runtime, descriptor, file, body);
    } finally {
      closeQcow2(runtime, descriptor, file);
    }
  };
  let copy: Layout;
  try {
    if (bitmapsOf(runtime, image).all().length > 0) {
      throw new StillframeError('ERR_STILLFRAME_BITMAP_BUSY', 'Device has active dirty bitmaps');
    }
    copy = edit(runtime, image, file, (editor) => editor.copy(selector));
  } finally {
    closeQcow2(runtime, image, file);
  }
  const old = readHeader(runtime, file);
  try {
    // With the new tables in use already: what is wrong with them is seen before they are the image's.
    reopened(copy, (editor) => editor.use(copy, old));
  } catch (error) {
    if (readHeader(runtime, file).l1TableOffset !== copy.l1TableOffset) {
      try {
        reopened(undefined, (editor) => editor.giveUp(copy));
      } catch {
        // It is leaked. What went wrong first is what matters.
      }
    }
    throw error;
  }
}

function edit<T>(runtime: Runtime, image: Qcow2Descriptor, file: FileNode, body: (editor: Editor) => T): T {
  const editor = new Editor(runtime, image, file);
  try {
    return body(editor);
  } finally {
    editor.free();
  }
}

/** An entry of the snapshot table, and its bytes. */
interface Entry extends Snapshot {
  readonly raw: Buffer;
}

class Editor {
  readonly #runtime: Runtime;
  readonly #image: Qcow2Descriptor;
  readonly #file: FileNode;
  readonly #metadata: Metadata;
  readonly #entryBytes: number;
  /** One L2 table. */
  readonly #table: number;

  constructor(runtime: Runtime, image: Qcow2Descriptor, file: FileNode) {
    this.#runtime = runtime;
    this.#image = image;
    this.#file = file;
    const dataFile = image.dataFile && attachFile(runtime, image.dataFile);
    this.#metadata = new Metadata(runtime, image, file, dataFile);
    this.#entryBytes = image.extendedL2 ? 16 : 8;
    this.#table = runtime.arena.alloc(this.#metadata.clusterSize, 'an L2 table');
  }

  free(): void {
    this.#runtime.arena.free(this.#table);
  }

  create(wanted: NewSnapshot): void {
    const header = this.#begin();
    const entries = this.#entries(header);
    if (entries.length >= MAX_SNAPSHOTS)
      throw this.#invalid(`it has ${MAX_SNAPSHOTS} snapshots, which is the most`);
    const state = this.#metadata.state;
    const l1 = state.get('l1');
    const size = this.#metadata.l1Entries;
    this.#countingOnceMore(l1, size, (taken) => {
      this.#metadata.flush();
      const l1TableOffset = this.#writeL1(l1, size, taken);
      const info = { ...wanted, id: nextId(entries) };
      const entry = encode(info, { l1TableOffset, l1Size: size, length: header.length });
      const table = this.#writeTable([...entries.map(({ raw }) => raw), entry], taken);
      this.#correctFlags();
      this.#metadata.flush();
      this.#commit(entries.length + 1, table);
    });
    this.#lowerTable(header, entries);
    this.#finish();
  }

  delete(id: string): void {
    const header = this.#begin();
    const entries = this.#entries(header);
    const gone = entries.find(({ info }) => info.id === id);
    if (gone === undefined) throw this.#invalid(`it has no snapshot with ID ${id}`);
    const kept = entries.filter((entry) => entry !== gone);
    this.#replaceTable(kept.map(({ raw }) => raw));
    this.#lowerSnapshot(gone);
    this.#metadata.flush();
    this.#correctFlags();
    this.#lowerTable(header, entries);
    this.#finish();
  }

  complete(): void {
    const header = this.#begin();
    const entries = this.#entries(header);
    if (entries.every(({ raw }) => raw.readUInt32BE(EXTRA_SIZE_AT) >= LEAST_EXTRA_BYTES)) return;
    this.#replaceTable(entries.map((entry) => completed(entry)));
    this.#lowerTable(header, entries);
    this.#finish();
  }

  correctFlags(): void {
    this.#metadata.finish();
    this.#correctFlags();
    this.#metadata.finish();
  }

  /** Makes the header refer to another table; the caller gives the old one up. */
  #replaceTable(rows: readonly Buffer[]): void {
    const taken: HostRun[] = [];
    try {
      const table = this.#writeTable(rows, taken);
      this.#metadata.flush();
      this.#commit(rows.length, table);
    } catch (error) {
      for (const run of taken) this.#locked(() => this.#metadata.release(run));
      throw error;
    }
  }

  /** Counts all that a snapshot has once more. @returns its layout, with an L1 table of its own */
  copy(selector: SnapshotSelector): Layout {
    const header = this.#begin();
    const { l1TableOffset, l1Size, length } = headerOfSnapshot(this.#runtime, this.#file, header, selector);
    return this.#withL1(l1TableOffset, l1Size, (l1) =>
      this.#countingOnceMore(l1, l1Size, (taken) => {
        this.#clearFlags(l1, l1Size);
        const layout = { length, l1Size, l1TableOffset: this.#writeL1(l1, l1Size, taken) };
        this.#metadata.flush();
        return layout;
      }),
    );
  }

  /** Counts all that an L1 table in memory refers to once more; no longer where `body` fails, nor what that has taken. */
  #countingOnceMore<T>(l1: number, entries: number, body: (taken: HostRun[]) => T): T {
    let raised = 0;
    const taken: HostRun[] = [];
    try {
      this.#walk(l1, entries, (run) => {
        this.#metadata.raise(run);
        raised++;
      });
      return body(taken);
    } catch (error) {
      this.#undo(l1, entries, raised, taken);
      throw error;
    }
  }

  /** Makes the header say that this is the drive, and gives up what it was before. */
  use(layout: Layout, before: Layout): void {
    writeLayout(this.#runtime, this.#file, layout);
    this.giveUp(before);
  }

  /** Gives up all that an L1 table refers to, and the table. */
  giveUp({ l1TableOffset, l1Size }: Layout): void {
    this.#withL1(l1TableOffset, l1Size, (l1) => this.#walk(l1, l1Size, (run) => this.#lowerOne(run)));
    this.#lower(l1TableOffset, l1Size * 8);
  }

  /** Runs something with an L1 table of the file in memory. */
  #withL1<T>(offset: number, entries: number, body: (l1: number) => T): T {
    const { arena } = this.#runtime;
    const l1 = arena.alloc(Math.max(8, entries * 8), 'L1 table of a snapshot');
    try {
      this.#file.read(offset, l1, entries * 8);
      return body(l1);
    } finally {
      arena.free(l1);
    }
  }

  /** No entry in the L2 tables of a snapshot says that what it refers to is the drive's alone. */
  #clearFlags(l1: number, entries: number): void {
    const { view } = this.#runtime.arena;
    const { clusterSize } = this.#metadata;
    for (let index = 0; index < entries; index++) {
      const offset = Number(view.getBigUint64(l1 + index * 8) & OFFSET_MASK);
      if (offset === 0) continue;
      this.#file.read(offset, this.#table, clusterSize);
      let changed = false;
      for (let at = this.#table; at < this.#table + clusterSize; at += this.#entryBytes) {
        const entry = view.getBigUint64(at);
        if ((entry & COMPRESSED) !== 0n || (entry & COPIED) === 0n) continue;
        view.setBigUint64(at, entry & ~COPIED);
        changed = true;
      }
      if (!changed) continue;
      // Tables that the drive has as well have none of these flags.
      const problem = this.#locked(() => this.#metadata.overlap(offset, clusterSize));
      if (problem !== undefined) {
        throw this.#metadata.damaged(
          `the L2 table of a snapshot at offset ${offset} ${problem}, and has flags of one that is not shared`,
        );
      }
      this.#file.write(offset, this.#table, clusterSize);
    }
  }

  /** From now on nothing is written where snapshots have their tables. */
  #finish(): void {
    const header = readHeader(this.#runtime, this.#file);
    const places =
      header.snapshotCount === 0
        ? new Float64Array()
        : placesOfSnapshots(readSnapshotTable(this.#runtime, this.#file, header));
    this.#locked(() => replacePlaces(this.#runtime, this.#metadata.state, places));
    this.#metadata.finish();
  }

  /** Everything is in the file, and every free is done. */
  #begin(): Qcow2Header {
    const header = readHeader(this.#runtime, this.#file);
    if (this.#image.hasDataFile) {
      throw new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        `'${this.#image.path}' cannot have internal snapshots: its data is in another file`,
        { errno: 'ENOTSUP' },
      );
    }
    this.#locked(() => this.#metadata.clearAutoclear());
    this.#metadata.finish();
    return header;
  }

  #entries(header: Qcow2Header): Entry[] {
    const { snapshots, places } = readSnapshotTable(this.#runtime, this.#file, header);
    return snapshots.map((snapshot, index) => {
      const { offset, length } = places[index] ?? { offset: 0, length: 0 };
      const raw = Buffer.alloc(Math.ceil(length / 8) * 8);
      this.#file.readBytes(offset, raw.subarray(0, length));
      return { ...snapshot, raw };
    });
  }

  /**
   * Calls `visit`, under the lock, with all that an L1 table in memory refers to: what each L2 table refers to, and then
   * the table, which may be gone after that.
   */
  #walk(l1: number, entries: number, visit: (run: HostRun) => void): void {
    const { view } = this.#runtime.arena;
    const { clusterSize, state } = this.#metadata;
    for (let index = 0; index < entries; index++) {
      const entry = view.getBigUint64(l1 + index * 8);
      const offset = state.withLock(() => this.#offsetOf(entry, `L1 entry ${index}`));
      if (offset === 0) continue;
      this.#file.read(offset, this.#table, clusterSize);
      // As a whole: nobody else wants the lock.
      state.withLock(() => {
        this.#walkTable(visit);
        visit({ offset, clusters: 1 });
      });
    }
  }

  #walkTable(visit: (run: HostRun) => void): void {
    const { view, u32 } = this.#runtime.arena;
    for (let at = this.#table; at < this.#table + this.#metadata.clusterSize; at += this.#entryBytes) {
      if (u32[at >> 2] === 0 && u32[(at >> 2) + 1] === 0) continue;
      const entry = view.getBigUint64(at);
      if ((entry & COMPRESSED) !== 0n) {
        visit(this.#metadata.compressedClusters(entry));
        continue;
      }
      const offset = this.#offsetOf(entry, 'L2 entry');
      if (offset !== 0) visit({ offset, clusters: 1 });
    }
  }

  /** Under the lock. */
  #offsetOf(entry: bigint, what: string): number {
    const offset = Number(entry & OFFSET_MASK);
    if (offset % this.#metadata.clusterSize === 0) return offset;
    throw this.#metadata.corrupt(`${what} (0x${entry.toString(16)}) refers to no whole cluster`);
  }

  /** Exactly what is counted once is marked so in the active tables. */
  #correctFlags(): void {
    const { arena } = this.#runtime;
    const { clusterSize, state } = this.#metadata;
    const l1 = state.get('l1');
    let changedL1 = false;
    for (let index = 0; index < this.#metadata.l1Entries; index++) {
      const at = l1 + index * 8;
      const table = Number(arena.view.getBigUint64(at) & OFFSET_MASK);
      if (table === 0) continue;
      this.#file.read(table, this.#table, clusterSize);
      const [ofTable, ofEntries] = state.withLock(() => [this.#correct(at, false), this.#correctTable()]);
      changedL1 ||= ofTable === true;
      if (ofEntries === true) this.#file.write(table, this.#table, clusterSize);
      // What is cached has the old flags.
      state.withLock(() => this.#metadata.l2.forget(table, table + clusterSize));
    }
    if (changedL1) this.#file.write(state.get('l1Offset'), l1, this.#metadata.l1Entries * 8);
  }

  #correctTable(): boolean {
    let changed = false;
    for (let at = this.#table; at < this.#table + this.#metadata.clusterSize; at += this.#entryBytes) {
      if (this.#correct(at, true)) changed = true;
    }
    return changed;
  }

  /** @param mayBeCompressed it is an L2 entry @returns whether the entry was changed */
  #correct(at: number, mayBeCompressed: boolean): boolean {
    const { view } = this.#runtime.arena;
    const entry = view.getBigUint64(at);
    const isCompressed = mayBeCompressed && (entry & COMPRESSED) !== 0n;
    const offset = Number(entry & OFFSET_MASK);
    if (isCompressed || offset === 0) return false;
    const flag = this.#metadata.refcountAt(offset) === 1 ? COPIED : 0n;
    if ((entry & COPIED) === flag) return false;
    view.setBigUint64(at, (entry & ~COPIED) | flag);
    return true;
  }

  /** A copy of the L1 table, whose tables are nobody's alone. @param taken takes its place */
  #writeL1(l1: number, entries: number, taken: HostRun[]): number {
    const bytes = Buffer.from(this.#runtime.arena.copyOut(l1, entries * 8));
    for (let at = 0; at < bytes.length; at += 8) {
      bytes.writeBigUInt64BE(bytes.readBigUInt64BE(at) & ~COPIED, at);
    }
    return this.#writeRow(bytes, taken);
  }

  /** @returns where it is, 0 where it is empty */
  #writeTable(entries: readonly Buffer[], taken: HostRun[]): number {
    const bytes = Buffer.concat(entries);
    if (bytes.length > MAX_TABLE_BYTES) {
      throw this.#invalid(`its snapshots take ${bytes.length} bytes, more than ${MAX_TABLE_BYTES}`);
    }
    return this.#writeRow(bytes, taken);
  }

  /** Writes bytes into new clusters in a row, the rest of which are zeroes. @returns where, 0 where there are none */
  #writeRow(bytes: Buffer, taken: HostRun[]): number {
    if (bytes.length === 0) return 0;
    const { arena } = this.#runtime;
    const { clusterSize } = this.#metadata;
    const clusters = Math.ceil(bytes.length / clusterSize);
    const offset = this.#locked(() => this.#metadata.allocateRow(clusters));
    taken.push({ offset, clusters });
    const pointer = arena.alloc(clusters * clusterSize, 'a table of a snapshot');
    try {
      arena.u8.set(bytes, pointer);
      this.#file.write(offset, pointer, clusters * clusterSize);
    } finally {
      arena.free(pointer);
    }
    return offset;
  }

  /** The header refers to another table: 12 bytes of its first sector. */
  #commit(count: number, offset: number): void {
    const { arena } = this.#runtime;
    const pointer = arena.alloc(12, 'qcow2 header');
    try {
      arena.view.setUint32(pointer, count);
      arena.view.setBigUint64(pointer + 4, BigInt(offset));
      this.#file.write(FIELD.snapshotCount, pointer, 12);
      this.#file.flush();
    } finally {
      arena.free(pointer);
    }
  }

  /** Gives the old table up. */
  #lowerTable({ snapshotsOffset }: Qcow2Header, entries: readonly Entry[]): void {
    this.#lower(
      snapshotsOffset,
      entries.reduce((sum, { raw }) => sum + raw.length, 0),
    );
  }

  /** Gives up what only the snapshot has. */
  #lowerSnapshot({ info, l1TableOffset, l1Size, length }: Entry): void {
    if (l1Size === 0) return;
    const { clusterSize } = this.#metadata;
    const bytes = l1Size * 8;
    const isPlace = l1TableOffset % clusterSize === 0 && l1TableOffset > 0;
    if (!isPlace || bytes > MAX_L1_BYTES || l1TableOffset + bytes > this.#file.length) {
      throw this.#locked(() =>
        this.#metadata.corrupt(`the L1 table of snapshot '${info.name}' is at no place for one`),
      );
    }
    this.giveUp({ l1TableOffset, l1Size, length });
  }

  /** Gives up a table: that it is apart from those of the image as it is now was seen when the image was opened. */
  #lower(offset: number, bytes: number): void {
    if (bytes === 0) return;
    const clusters = Math.ceil(bytes / this.#metadata.clusterSize);
    this.#locked(() => this.#metadata.lower({ offset, clusters }));
  }

  /** What nobody else counts is not given up where the image as it is now has it as its own. */
  #lowerOne(run: HostRun): void {
    const { clusterSize } = this.#metadata;
    for (let index = 0; index < run.clusters; index++) {
      const offset = run.offset + index * clusterSize;
      if (this.#metadata.refcountAt(offset) !== 1) continue;
      const problem = this.#metadata.overlap(offset, clusterSize);
      if (problem === undefined) continue;
      throw this.#metadata.corrupt(`what a snapshot has at offset ${offset} ${problem}; it was not given up`);
    }
    this.#metadata.lower(run);
  }

  /** Makes refcounts what they were. What cannot be undone is leaked. */
  #undo(l1: number, entries: number, raised: number, taken: readonly HostRun[]): void {
    try {
      let left = raised;
      this.#walk(l1, entries, (run) => {
        if (left > 0) this.#metadata.lower(run);
        left--;
      });
      for (const run of taken) this.#locked(() => this.#metadata.release(run));
      this.#correctFlags();
    } catch {
      // What went wrong first is what matters.
    }
  }

  #locked<T>(body: () => T): T {
    return this.#metadata.state.withLock(body);
  }

  #invalid(what: string): StillframeError {
    return new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', `'${this.#image.path}': ${what}`);
  }
}

function nextId(entries: readonly Entry[]): string {
  const numbers = entries.map(({ info: { id } }) => Number(/^\d+/.exec(id)?.[0] ?? 0));
  return String(Math.max(0, ...numbers) + 1);
}

function encode(
  info: NewSnapshot & Pick<SnapshotInfo, 'id'>,
  { l1TableOffset, l1Size, length }: Pick<Snapshot, 'l1TableOffset' | 'l1Size' | 'length'>,
): Buffer {
  const [id, name] = [Buffer.from(info.id), Buffer.from(info.name)];
  const text = SNAPSHOT_BYTES + EXTRA_BYTES;
  const entry = Buffer.alloc(Math.ceil((text + id.length + name.length) / 8) * 8);
  entry.writeBigUInt64BE(BigInt(l1TableOffset), 0);
  entry.writeUInt32BE(l1Size, 8);
  entry.writeUInt16BE(id.length, 12);
  entry.writeUInt16BE(name.length, 14);
  entry.writeUInt32BE(info['date-sec'], 16);
  entry.writeUInt32BE(info['date-nsec'], 20);
  entry.writeBigUInt64BE(info['vm-clock-nsec'], 24);
  entry.writeUInt32BE(EXTRA_BYTES, EXTRA_SIZE_AT);
  entry.writeBigUInt64BE(BigInt(length), SNAPSHOT_BYTES + 8);
  entry.writeBigUInt64BE(info.icount ?? NO_ICOUNT, SNAPSHOT_BYTES + 16);
  id.copy(entry, text);
  name.copy(entry, text + id.length);
  return entry;
}

/** An entry with all of the extra data that is known. */
function completed({ info, length, raw }: Entry): Buffer {
  const extraBytes = raw.readUInt32BE(EXTRA_SIZE_AT);
  if (extraBytes >= LEAST_EXTRA_BYTES) return raw;
  const extra = Buffer.alloc(EXTRA_BYTES);
  extra.writeBigUInt64BE(BigInt(info['vm-state-size']), 0);
  extra.writeBigUInt64BE(BigInt(length), 8);
  extra.writeBigUInt64BE(NO_ICOUNT, 16);
  const texts = raw.subarray(SNAPSHOT_BYTES + extraBytes);
  const entry = Buffer.concat([raw.subarray(0, SNAPSHOT_BYTES), extra, texts, Buffer.alloc(7)]);
  entry.writeUInt32BE(EXTRA_BYTES, EXTRA_SIZE_AT);
  const bytes = SNAPSHOT_BYTES + EXTRA_BYTES + raw.readUInt16BE(12) + raw.readUInt16BE(14);
  return entry.subarray(0, Math.ceil(bytes / 8) * 8);
}
