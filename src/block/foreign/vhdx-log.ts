import type { Arena } from '../../kernels/arena.js';
import type { StorageDescriptor } from '../node.js';
import { corrupt, type Source, u64, unsupported } from './contract.js';
import { crc32c } from './crc32c.js';

/**
 * The log of a VHDX: changes to the file that are complete in the log, but perhaps not in their place. They are
 * shown as if they were, and the file is left as it is.
 *
 * Source: [MS-VHDX], section 2.3 (log) and 2.3.3 (replay).
 */
export interface LogPosition {
  /** Of the log in the file, bytes. */
  readonly offset: number;
  readonly length: number;
  /** Where the entries to be replayed begin in the log, oldest first. */
  readonly entries: readonly number[];
  /** Bytes the file has at least after the replay. */
  readonly fileLength: number;
}

const SECTOR = 4096;
const MIB = 1024 * 1024;
const ENTRY_HEADER_BYTES = 64;
const DESCRIPTOR_BYTES = 32;
/** Logs are 1 MiB as programs make them. */
const MAX_LOG_BYTES = 16 * 1024 * 1024;
const MAX_DESCRIPTORS = 65536;

interface Entry {
  readonly position: number;
  readonly length: number;
  readonly tail: number;
  readonly sequence: bigint;
  readonly flushedFileOffset: number;
  readonly lastFileOffset: number;
}

/** The log as a ring of bytes, in memory. */
class Ring {
  readonly bytes: Uint8Array;

  constructor(file: Source, offset: number, length: number) {
    this.bytes = new Uint8Array(length);
    file.readBytes(offset, this.bytes);
  }

  /** `length` bytes from `position` on, around the end where needed. */
  view(position: number, length: number): DataView {
    const start = position % this.bytes.length;
    const bytes = this.bytes.subarray(start, start + length);
    if (bytes.length === length) return new DataView(bytes.buffer, bytes.byteOffset, length);
    const whole = new Uint8Array(length);
    whole.set(bytes);
    whole.set(this.bytes.subarray(0, length - bytes.length), bytes.length);
    return new DataView(whole.buffer);
  }
}

function signatureOf(view: DataView, at = 0): string {
  return Buffer.from(view.buffer, view.byteOffset + at, 4).toString('latin1');
}

/**
 * Looks for the entries that have to be replayed: of the entries that are whole, the sequence with the highest
 * number whose oldest entry is where its newest one says.
 *
 * @param guid of the log, from the header; entries of another one are old
 * @returns undefined where nothing has to be replayed
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE
 */
export function findLog(file: Source, offset: number, length: number, guid: string): LogPosition | undefined {
  const { path } = file.descriptor;
  if (length > MAX_LOG_BYTES) {
    throw unsupported(
      path,
      `it has a log of ${length} bytes that may have to be replayed; ${MAX_LOG_BYTES} at most are supported`,
      "replay it with 'qemu-img check -r all', or attach the image once in Windows",
    );
  }
  const ring = new Ring(file, offset, length);
  const entries = new Map<number, Entry>();
  // Entries do not overlap in a log that a program wrote; where a file says otherwise, time is bounded all the same.
  let budget = 4 * length;
  for (let position = 0; position < length; position += SECTOR) {
    const entry = headerOf(ring, position, guid);
    if (entry === undefined) continue;
    budget -= entry.length;
    if (budget < 0) throw corrupt(path, `the entries of its log, at offset ${offset}, overlap each other`);
    const view = ring.view(position, entry.length);
    const bytes = new Uint8Array(view.buffer, view.byteOffset, entry.length);
    if (crc32c(bytes, 4) === view.getUint32(4, true)) entries.set(position, entry);
  }
  const newestFirst = [...entries.values()].sort((a, b) =>
    a.sequence === b.sequence ? 0 : a.sequence > b.sequence ? -1 : 1,
  );
  for (const head of newestFirst) {
    const chain = chainTo(entries, head, length);
    if (chain === undefined) continue;
    if (head.flushedFileOffset > file.length) {
      throw corrupt(
        path,
        `it is cut off: its log says that the file has ${head.flushedFileOffset} bytes at least, but it has ${file.length}`,
      );
    }
    // Files have whole MiB; a sum beyond all files is only a limit.
    const fileLength = Math.max(file.length, Math.ceil(head.lastFileOffset / MIB) * MIB);
    return { offset, length, entries: chain, fileLength };
  }
  if (entries.size > 0) {
    throw corrupt(path, `its log, at offset ${offset}, has entries to replay, but not all of them`);
  }
  return undefined;
}

function headerOf(ring: Ring, position: number, guid: string): Entry | undefined {
  const view = ring.view(position, ENTRY_HEADER_BYTES);
  if (signatureOf(view) !== 'loge') return undefined;
  if (Buffer.from(view.buffer, view.byteOffset + 32, 16).toString('hex') !== guid) return undefined;
  const length = view.getUint32(8, true);
  const tail = view.getUint32(12, true);
  const limit = ring.bytes.length;
  if (length === 0 || length % SECTOR !== 0 || length > limit) return undefined;
  if (tail % SECTOR !== 0 || tail >= limit) return undefined;
  return {
    position,
    length,
    tail,
    sequence: view.getBigUint64(16, true),
    flushedFileOffset: u64(view, 48, true),
    lastFileOffset: u64(view, 56, true),
  };
}

/** The positions of the entries from the tail of `head` to itself, or undefined where they are not all there. */
function chainTo(entries: ReadonlyMap<number, Entry>, head: Entry, length: number): number[] | undefined {
  const chain: number[] = [];
  let entry = entries.get(head.tail);
  while (entry !== undefined && chain.length < entries.size) {
    chain.push(entry.position);
    if (entry === head) return chain;
    const next = entries.get((entry.position + entry.length) % length);
    if (next?.sequence !== entry.sequence + 1n) return undefined;
    entry = next;
  }
  return undefined;
}

/** Bytes [start, end) of the file as the log has them. */
interface Patch {
  readonly start: number;
  readonly end: number;
  /** The data, or undefined: zeroes. */
  readonly data: { readonly logOffset: number; readonly ends: Uint8Array } | undefined;
}

/** A file as it reads after the replay of its log. */
export class ReplayedFile implements Source {
  readonly descriptor: StorageDescriptor;
  readonly length: number;
  readonly #file: Source;
  readonly #arena: Arena;
  /** In order, without overlaps. */
  readonly #patches: Patch[] = [];

  /** @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE */
  constructor(arena: Arena, file: Source, log: LogPosition) {
    this.descriptor = file.descriptor;
    this.length = log.fileLength;
    this.#arena = arena;
    this.#file = file;
    const ring = new Ring(file, log.offset, log.length);
    let descriptors = 0;
    for (const position of log.entries) {
      const header = ring.view(position, ENTRY_HEADER_BYTES);
      const count = header.getUint32(24, true);
      descriptors += count;
      if (descriptors > MAX_DESCRIPTORS) {
        throw unsupported(
          file.descriptor.path,
          `its log has more than ${MAX_DESCRIPTORS} changes to replay`,
          "replay it with 'qemu-img check -r all', or attach the image once in Windows",
        );
      }
      this.#addEntry(ring, log, position, header.getUint32(8, true), header.getBigUint64(16, true), count);
    }
  }

  #addEntry(
    ring: Ring,
    log: LogPosition,
    position: number,
    length: number,
    sequence: bigint,
    count: number,
  ): void {
    const bad = (what: string): Error =>
      corrupt(
        this.descriptor.path,
        `the entry at offset ${position} of its log, at offset ${log.offset}, ${what}`,
      );
    let data = Math.ceil((ENTRY_HEADER_BYTES + count * DESCRIPTOR_BYTES) / SECTOR) * SECTOR;
    if (data > length) throw bad(`has ${length} bytes, too few for ${count} changes`);
    for (let index = 0; index < count; index++) {
      const at = ENTRY_HEADER_BYTES + index * DESCRIPTOR_BYTES;
      const descriptor = ring.view(position + at, DESCRIPTOR_BYTES);
      const kind = signatureOf(descriptor);
      const start = u64(descriptor, 16, true);
      const zeroes = kind === 'zero' ? u64(descriptor, 8, true) : SECTOR;
      const valid =
        (kind === 'zero' || kind === 'desc') &&
        descriptor.getBigUint64(24, true) === sequence &&
        start % SECTOR === 0 &&
        zeroes % SECTOR === 0 &&
        start + zeroes <= 2 ** 52;
      if (!valid) throw bad(`has a change, number ${index}, that is none`);
      if (kind === 'zero') {
        if (zeroes > 0) this.#put({ start, end: start + zeroes, data: undefined });
        continue;
      }
      if (data + SECTOR > length) throw bad(`has ${length} bytes, too few for its data`);
      const sector = ring.view(position + data, SECTOR);
      const high = BigInt(sector.getUint32(4, true)) << 32n;
      if (
        signatureOf(sector) !== 'data' ||
        (high | BigInt(sector.getUint32(SECTOR - 4, true))) !== sequence
      ) {
        throw bad(`has data, for change number ${index}, that belong to another entry`);
      }
      // The descriptor keeps the bytes whose place in the sector the marks take: 8 at its start, 4 at its end.
      const ends = new Uint8Array(12);
      ends.set(new Uint8Array(descriptor.buffer, descriptor.byteOffset + 8, 8));
      ends.set(new Uint8Array(descriptor.buffer, descriptor.byteOffset + 4, 4), 8);
      const logOffset = log.offset + ((position + data) % log.length);
      this.#put({ start, end: start + SECTOR, data: { logOffset, ends } });
      data += SECTOR;
    }
  }

  /** Index of the first patch that ends after `offset`. */
  #firstAfter(offset: number): number {
    let [low, high] = [0, this.#patches.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((this.#patches[middle]?.end ?? Infinity) > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** Newer patches take the place of older ones. Data patches have one size and place: they are never cut. */
  #put(patch: Patch): void {
    const from = this.#firstAfter(patch.start);
    let to = from;
    while ((this.#patches[to]?.start ?? Infinity) < patch.end) to++;
    const left = this.#patches[from];
    const right = this.#patches[to - 1];
    const replaced: Patch[] = [];
    if (to > from && left !== undefined && left.start < patch.start) {
      replaced.push({ ...left, end: patch.start });
    }
    replaced.push(patch);
    if (to > from && right !== undefined && right.end > patch.end) {
      replaced.push({ ...right, start: patch.end });
    }
    this.#patches.splice(from, to - from, ...replaced);
  }

  read(offset: number, pointer: number, length: number): void {
    this.#file.read(offset, pointer, length);
    this.#patch(offset, this.#arena.u8.subarray(pointer, pointer + length));
  }

  readBytes(offset: number, bytes: Uint8Array): void {
    this.#file.readBytes(offset, bytes);
    this.#patch(offset, bytes);
  }

  #patch(offset: number, bytes: Uint8Array): void {
    const stop = offset + bytes.length;
    for (let index = this.#firstAfter(offset); ; index++) {
      const patch = this.#patches[index];
      if (patch === undefined || patch.start >= stop) return;
      const from = Math.max(patch.start, offset);
      const to = Math.min(patch.end, stop);
      if (patch.data === undefined) {
        bytes.fill(0, from - offset, to - offset);
        continue;
      }
      const sector = new Uint8Array(SECTOR);
      this.#file.readBytes(patch.data.logOffset, sector);
      sector.set(patch.data.ends.subarray(0, 8));
      sector.set(patch.data.ends.subarray(8), SECTOR - 4);
      bytes.set(sector.subarray(from - patch.start, to - patch.start), from - offset);
    }
  }
}
