import { StillframeError } from '../../../errors.js';
import { FIELD, MAX_SNAPSHOTS } from '../header.js';
import type { CheckedImage } from './image.js';
import type { Report } from './report.js';

/** Most bytes of a snapshot table. */
const MOST_BYTES = 1024 * MAX_SNAPSHOTS;
const MOST_EXTRA_BYTES = 1024;
/** Extra data that is known: size of the machine's state (64 bits), size of the disk, instruction count. */
const KNOWN_EXTRA_BYTES = 24;
/** Bytes of the file that are looked at at a time: more than an identifier or name can have. */
const WINDOW_BYTES = 256 * 1024;
/** Extra data every entry of version 3 must have: all but the instruction count. */
const LEAST_EXTRA_BYTES = 16;
/** Offsets in an entry. */
const ENTRY = { l1Offset: 0, l1Size: 8, idSize: 12, nameSize: 14, stateSize: 32, extraSize: 36, bytes: 40 };

/** Entries of the snapshot table, by number and without an object each. */
export class SnapshotTable {
  count: number;
  /** What the entries take in the file. */
  bytes = 0;
  /** Wrong in the table itself and still to be written anew. */
  toRepair = 0;
  readonly offset: number;
  readonly #image: CheckedImage;
  readonly #buffer: number;
  readonly #l1Offsets: BigUint64Array;
  readonly #l1Sizes: Uint32Array;
  /** Where the entries are in the file. */
  readonly #places: Float64Array;
  readonly #extraSizes: Uint32Array;
  /** Part of the file that is in the buffer. */
  #windowStart = 0;
  #windowEnd = 0;

  /**
   * Reads the table. With `repair`, snapshots that are too many are taken out of the header at once, before anything
   * is counted; what else is wrong is only noted for {@link rewrite}.
   *
   * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE where the table cannot be read to its end
   */
  constructor(image: CheckedImage, report: Report, repair: boolean) {
    this.#image = image;
    const { view } = image.runtime.arena;
    image.file.read(FIELD.snapshotCount, image.buffer, 12);
    const count = view.getUint32(image.buffer);
    const offset = view.getBigUint64(image.buffer + 4);
    this.count = count;
    const overhanging = Math.max(0, count - MAX_SNAPSHOTS);
    if (overhanging > 0 && repair) {
      report.say(`Discarding ${overhanging} overhanging snapshots`);
      this.count = MAX_SNAPSHOTS;
    }
    if (this.count > MAX_SNAPSHOTS) {
      report.say('ERROR snapshot table too large');
      throw this.#failure(
        `${count} snapshots are ${overhanging} more than there may be; remove them with 'check --repair all'`,
      );
    }
    if (offset % BigInt(image.clusterSize) !== 0n || offset > BigInt(Number.MAX_SAFE_INTEGER - MOST_BYTES)) {
      report.say('ERROR snapshot table offset invalid');
      throw this.#failure(`the snapshot table cannot be at offset ${offset}`);
    }
    this.offset = Number(offset);
    this.#l1Offsets = new BigUint64Array(this.count);
    this.#l1Sizes = new Uint32Array(this.count);
    this.#places = new Float64Array(this.count);
    this.#extraSizes = new Uint32Array(this.count);
    this.#buffer = image.runtime.arena.alloc(WINDOW_BYTES, `snapshot table of '${image.path}'`);
    try {
      this.#readEntries(report, repair);
      if (this.count < count) {
        this.#writeCount();
        report.corruptionsFixed += count - this.count;
      }
      if (image.header.version >= 3) this.#findIncomplete(report, repair);
    } catch (error) {
      this.dispose();
      throw error;
    }
  }

  dispose(): void {
    this.#image.runtime.arena.free(this.#buffer);
  }

  l1Offset(index: number): bigint {
    return this.#l1Offsets[index] ?? 0n;
  }

  l1Size(index: number): number {
    return this.#l1Sizes[index] ?? 0;
  }

  id(index: number): string {
    const at = this.#textAt(index);
    const entry = this.#place(index);
    return this.#text(at, this.#window(entry, ENTRY.bytes).getUint16(ENTRY.idSize));
  }

  name(index: number): string {
    const at = this.#textAt(index);
    const entry = this.#window(this.#place(index), ENTRY.bytes);
    const [idSize, nameSize] = [entry.getUint16(ENTRY.idSize), entry.getUint16(ENTRY.nameSize)];
    return this.#text(at + idSize, nameSize);
  }

  /**
   * The table as it should be: entries with all of the known extra data, without extra data that is too long. Calls
   * `write` with the parts of it in order, each in the arena.
   */
  rewrite(write: (pointer: number, length: number) => void): void {
    const { arena } = this.#image.runtime;
    const most = ENTRY.bytes + MOST_EXTRA_BYTES + 2 * 65536;
    const pointer = arena.alloc(most, `a snapshot table entry of '${this.#image.path}'`);
    try {
      for (let index = 0; index < this.count; index++) {
        write(pointer, this.#encode(index, pointer));
      }
    } finally {
      arena.free(pointer);
    }
  }

  /** Bytes of what {@link rewrite} writes. */
  get rewrittenBytes(): number {
    let bytes = 0;
    for (let index = 0; index < this.count; index++) {
      const entry = this.#window(this.#place(index), ENTRY.bytes);
      const text = entry.getUint16(ENTRY.idSize) + entry.getUint16(ENTRY.nameSize);
      bytes += Math.ceil((ENTRY.bytes + this.#newExtraSize(index) + text) / 8) * 8;
    }
    return bytes;
  }

  #encode(index: number, pointer: number): number {
    const { u8, view } = this.#image.runtime.arena;
    const place = this.#place(index);
    u8.set(this.#bytes(place, ENTRY.bytes), pointer);
    const oldExtra = this.#extraSizes[index] ?? 0;
    const extra = this.#newExtraSize(index);
    const text = view.getUint16(pointer + ENTRY.idSize) + view.getUint16(pointer + ENTRY.nameSize);
    const length = Math.ceil((ENTRY.bytes + extra + text) / 8) * 8;
    // Not the whole buffer: there may be 65536 entries.
    u8.fill(0, pointer + ENTRY.bytes, pointer + length);
    const kept = Math.min(oldExtra, extra);
    u8.set(this.#bytes(place + ENTRY.bytes, kept), pointer + ENTRY.bytes);
    const known = pointer + ENTRY.bytes;
    if (kept < 8) view.setBigUint64(known, BigInt(view.getUint32(pointer + ENTRY.stateSize)));
    if (kept < 16) view.setBigUint64(known + 8, BigInt(this.#image.header.length));
    if (kept < 24) view.setBigUint64(known + 16, 2n ** 64n - 1n);
    view.setUint32(pointer + ENTRY.extraSize, extra);
    let at = pointer + ENTRY.bytes + extra;
    for (let done = 0; done < text; ) {
      const part = Math.min(text - done, 65536);
      u8.set(this.#bytes(place + ENTRY.bytes + oldExtra + done, part), at);
      at += part;
      done += part;
    }
    return length;
  }

  #newExtraSize(index: number): number {
    const old = this.#extraSizes[index] ?? 0;
    return old > MOST_EXTRA_BYTES ? KNOWN_EXTRA_BYTES : Math.max(old, KNOWN_EXTRA_BYTES);
  }

  #readEntries(report: Report, repair: boolean): void {
    let at = this.offset;
    for (let index = 0; index < this.count; index++) {
      at = this.offset + Math.ceil((at - this.offset) / 8) * 8;
      const entry = this.#window(at, ENTRY.bytes);
      const extra = entry.getUint32(ENTRY.extraSize);
      if (extra > MOST_EXTRA_BYTES) {
        if (!repair) {
          report.say(
            `ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry ${index}`,
          );
          throw this.#failure(
            `entry ${index} of the snapshot table has ${extra} bytes of extra data, more than ${MOST_EXTRA_BYTES}; remove them with 'check --repair all'`,
          );
        }
        report.say(
          `Discarding too much extra metadata in snapshot table entry ${index} (${extra} > ${MOST_EXTRA_BYTES})`,
        );
        this.toRepair++;
      }
      const end = at + ENTRY.bytes + extra + entry.getUint16(ENTRY.idSize) + entry.getUint16(ENTRY.nameSize);
      if (end - this.offset > MOST_BYTES) {
        const rest = this.count - index;
        if (!repair) {
          report.say('ERROR failed to read the snapshot table: Snapshot table is too big');
          throw this.#failure(
            `the snapshot table is larger than ${MOST_BYTES} bytes; 'check --repair all' removes the last ${rest} snapshots`,
          );
        }
        report.say(`Discarding ${rest} overhanging snapshots (snapshot table is too big)`);
        this.count = index;
        break;
      }
      this.#places[index] = at;
      this.#extraSizes[index] = extra;
      this.#l1Offsets[index] = entry.getBigUint64(ENTRY.l1Offset);
      this.#l1Sizes[index] = entry.getUint32(ENTRY.l1Size);
      at = end;
      this.bytes = end - this.offset;
    }
  }

  #findIncomplete(report: Report, repair: boolean): void {
    for (let index = 0; index < this.count; index++) {
      if ((this.#extraSizes[index] ?? 0) >= LEAST_EXTRA_BYTES) continue;
      report.say(`${repair ? 'Repairing' : 'ERROR'} snapshot table entry ${index} is incomplete`);
      if (repair) this.toRepair++;
      else report.corruptions++;
    }
  }

  #writeCount(): void {
    const { buffer, runtime } = this.#image;
    runtime.arena.view.setUint32(buffer, this.count);
    this.#image.write(FIELD.snapshotCount, buffer, 4);
    this.#image.flush();
  }

  #place(index: number): number {
    return this.#places[index] ?? 0;
  }

  #textAt(index: number): number {
    return this.#place(index) + ENTRY.bytes + (this.#extraSizes[index] ?? 0);
  }

  #text(at: number, length: number): string {
    return Buffer.from(this.#bytes(at, length)).toString('utf8').split('\0', 1)[0] ?? '';
  }

  #bytes(at: number, length: number): Uint8Array {
    const { buffer, byteOffset } = this.#window(at, length);
    return new Uint8Array(buffer, byteOffset, length);
  }

  /** `length` bytes of the file, at most 64 KiB; what lies behind its end is zero. Good until the next call. */
  #window(at: number, length: number): DataView {
    const { u8 } = this.#image.runtime.arena;
    if (at < this.#windowStart || at + length > this.#windowEnd) {
      const present = this.#image.read(at, this.#buffer, WINDOW_BYTES);
      if (!present) u8.fill(0, this.#buffer, this.#buffer + WINDOW_BYTES);
      this.#windowStart = at;
      this.#windowEnd = at + WINDOW_BYTES;
    }
    return new DataView(u8.buffer, this.#buffer + (at - this.#windowStart), length);
  }

  #failure(what: string): StillframeError {
    return new StillframeError('ERR_STILLFRAME_CORRUPT_IMAGE', `'${this.#image.path}': ${what}`);
  }
}
