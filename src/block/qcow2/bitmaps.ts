import { BitmapSet, bitmapNotFound } from '../../bitmap/bitmap-set.js';
import {
  bitsOf,
  DirtyBitmap,
  MAX_GRANULARITY,
  MAX_NAME_BYTES,
  MIN_GRANULARITY,
} from '../../bitmap/dirty-bitmap.js';
import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { Qcow2Descriptor } from '../node.js';
import type { FileNode } from '../raw/file.js';
import { BitmapsExtension, EXTENSION_BITMAPS_BYTES } from './bitmaps-extension.js';
import { AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, type Qcow2Header, readHeader } from './header.js';
import type { HostRun, Metadata } from './metadata.js';
import { BITMAPS, type State } from './state.js';

/**
 * The persistent dirty bitmaps of an image.
 *
 *     header extension → directory, one entry per bitmap → table per bitmap → clusters of bits
 *
 * Clusters, tables and directory are never changed where they are but for one flag: what is stored goes to new
 * clusters, is made durable, and one write into the header then puts it in the place of the old.
 *
 * A bitmap that records is marked in-use in the directory before the first change of the drive is made, and stored when
 * the image is closed. Where that never happens it stays in-use, which everybody reads as inconsistent. An image that is
 * opened for writing and not changed is not written to.
 *
 * Source: the qcow2 specification, sections "Bitmaps extension" and "Bitmaps".
 */

/** A persistent dirty bitmap, with the field names of QAPI `Qcow2BitmapInfo`. */
export interface BitmapInfo {
  readonly name: string;
  /** Bytes that one bit stands for. */
  readonly granularity: number;
  readonly flags: readonly ('in-use' | 'auto')[];
}

/** Limits, as QEMU has them. */
export const MAX_BITMAPS = 65535;
export const MAX_DIRECTORY_BYTES = 65535 * 1024;
const MAX_TABLE_ENTRIES = 0x8000000;
/** Memory that the bitmaps of one image may take, bytes. */
const MAX_MEMORY_BYTES = 256 * 1024 * 1024;

const ENTRY_BYTES = 24;
const FLAG_IN_USE = 1;
const FLAG_AUTO = 2;
const FLAGS_KNOWN = FLAG_IN_USE | FLAG_AUTO;
const FLAGS_AT = 12;
const TYPE_DIRTY_TRACKING = 1;
/** Bits 9 to 55 of an entry of a table. */
const TABLE_OFFSET_MASK = 0x00fffffffffffe00n;
const TABLE_ALL_ONES = 1n;
/** Bytes of a table that are read at once. */
const CHUNK_BYTES = 65536;

/** An entry of the directory, valid as far as it can be without a look at the table. */
interface StoredBitmap {
  /** Of the entry, in the file. */
  readonly place: number;
  /** The whole entry, with its padding. */
  readonly raw: Buffer;
  readonly name: string;
  readonly flags: number;
  readonly granularity: number;
  readonly tableOffset: number;
  readonly tableEntries: number;
}

export interface BitmapDirectory {
  /** Bytes. */
  readonly offset: number;
  /** Bytes. */
  readonly length: number;
  readonly bitmaps: readonly StoredBitmap[];
}

function corrupt(file: FileNode, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_CORRUPT_IMAGE',
    `'${file.descriptor.path}' is damaged: ${what}; check it with 'stillframe check'`,
  );
}

function unsupported(file: FileNode, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `'${file.descriptor.path}': ${what}, which is not supported; remove the bitmap with the program that made it`,
  );
}

function readBytes(file: FileNode, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  file.readBytes(offset, bytes);
  return bytes;
}

/**
 * Reads and validates the bitmap directory; undefined where there are no bitmaps, or where a program that knows nothing
 * of them has changed the image since, as the autoclear feature bit shows.
 *
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE, …_IO
 */
export function readBitmapDirectory(file: FileNode, header: Qcow2Header): BitmapDirectory | undefined {
  const [extension, ...more] = header.extensions.filter(({ type }) => type === EXTENSION_BITMAPS);
  if (extension === undefined || (header.autoclearFeatures & AUTOCLEAR_BITMAPS) === 0n) return undefined;
  const bad = (what: string) => corrupt(file, `the bitmaps extension at offset ${extension.offset} ${what}`);
  if (more.length > 0) throw bad('is not the only one');
  if (extension.length !== EXTENSION_BITMAPS_BYTES) {
    throw bad(`has ${extension.length} bytes instead of ${EXTENSION_BITMAPS_BYTES}`);
  }
  const fields = readBytes(file, extension.offset, EXTENSION_BITMAPS_BYTES);
  const count = fields.readUInt32BE(0);
  const length = fields.readBigUInt64BE(8);
  const offset = fields.readBigUInt64BE(16);
  if (count === 0) throw bad('says that there are 0 bitmaps');
  if (count > MAX_BITMAPS) throw bad(`says that there are ${count} bitmaps, more than ${MAX_BITMAPS}`);
  if (fields.readUInt32BE(4) !== 0) throw bad('has a reserved field that is not zero');
  if (length > MAX_DIRECTORY_BYTES) {
    throw bad(`says that the bitmap directory has ${length} bytes, more than ${MAX_DIRECTORY_BYTES}`);
  }
  if (offset === 0n || offset % BigInt(header.clusterSize) !== 0n) {
    throw bad(`puts the bitmap directory at offset ${offset}, which is not the start of a cluster`);
  }
  if (offset + length > file.length) {
    throw bad(
      `puts the bitmap directory of ${length} bytes at offset ${offset}, beyond the end of the file at ${file.length}`,
    );
  }
  const directory = { offset: Number(offset), length: Number(length) };
  const bitmaps = readEntries(file, header, directory, count);
  return { ...directory, bitmaps };
}

function readEntries(
  file: FileNode,
  header: Qcow2Header,
  directory: { readonly offset: number; readonly length: number },
  count: number,
): StoredBitmap[] {
  const bytes = readBytes(file, directory.offset, directory.length);
  const bitmaps: StoredBitmap[] = [];
  const names = new Set<string>();
  let at = 0;
  for (let index = 0; index < count; index++) {
    const what = `entry ${index} of the bitmap directory, at offset ${directory.offset + at},`;
    if (at + ENTRY_BYTES > bytes.length) {
      throw corrupt(
        file,
        `the bitmap directory of ${bytes.length} bytes at offset ${directory.offset} ends before entry ${index} of ${count}`,
      );
    }
    const extraBytes = bytes.readUInt32BE(at + 20);
    const nameBytes = bytes.readUInt16BE(at + 18);
    const end = at + Math.ceil((ENTRY_BYTES + extraBytes + nameBytes) / 8) * 8;
    if (end > bytes.length) {
      throw corrupt(file, `${what} ends beyond the end of the directory of ${bytes.length} bytes`);
    }
    const entry = readEntry(file, header, bytes.subarray(at, end), directory.offset + at, what);
    // By its bytes: what is not UTF-8 may look the same and be something else.
    const key = bytes.toString('latin1', at + ENTRY_BYTES, at + ENTRY_BYTES + nameBytes);
    if (names.has(key)) throw corrupt(file, `${what} has a name that another bitmap has, too`);
    names.add(key);
    bitmaps.push(entry);
    at = end;
  }
  if (at !== bytes.length) {
    throw corrupt(
      file,
      `the bitmap directory at offset ${directory.offset} has ${bytes.length} bytes, but its ${count} entries have ${at}`,
    );
  }
  return bitmaps;
}

function readEntry(
  file: FileNode,
  header: Qcow2Header,
  raw: Buffer,
  place: number,
  what: string,
): StoredBitmap {
  const tableOffset = raw.readBigUInt64BE(0);
  const tableEntries = raw.readUInt32BE(8);
  const flags = raw.readUInt32BE(FLAGS_AT);
  const type = raw.readUInt8(16);
  const granularityBits = raw.readUInt8(17);
  const nameBytes = raw.readUInt16BE(18);
  const extraBytes = raw.readUInt32BE(20);
  if (extraBytes !== 0) throw unsupported(file, `${what} has ${extraBytes} bytes of extra data`);
  if ((flags & ~FLAGS_KNOWN) !== 0) {
    throw unsupported(file, `${what} has flags 0x${(flags >>> 0).toString(16)}`);
  }
  if (type !== TYPE_DIRTY_TRACKING) throw unsupported(file, `${what} has type ${type}`);
  const granularity = 2 ** granularityBits;
  if (granularity < MIN_GRANULARITY || granularity > MAX_GRANULARITY) {
    throw corrupt(file, `${what} has ${granularityBits} granularity bits, not 9 to 31`);
  }
  if (nameBytes === 0) throw corrupt(file, `${what} has no name`);
  if (nameBytes > MAX_NAME_BYTES) {
    throw unsupported(file, `${what} has a name of ${nameBytes} bytes, more than ${MAX_NAME_BYTES}`);
  }
  const name = raw.toString('utf8', ENTRY_BYTES, ENTRY_BYTES + nameBytes);
  if (name.includes('\0')) throw corrupt(file, `${what} has a name with a zero byte`);

  const { clusterSize } = header;
  if (tableOffset === 0n || tableOffset % BigInt(clusterSize) !== 0n) {
    throw corrupt(
      file,
      `${what} has its table at offset ${tableOffset}, which is not the start of a cluster`,
    );
  }
  if (tableEntries === 0 || tableEntries > MAX_TABLE_ENTRIES) {
    throw corrupt(file, `${what} has a table of ${tableEntries} entries, not 1 to ${MAX_TABLE_ENTRIES}`);
  }
  if (tableOffset + BigInt(tableEntries * 8) > file.length) {
    throw corrupt(
      file,
      `${what} has its table of ${tableEntries} entries at offset ${tableOffset}, beyond the end of the file at ${file.length}`,
    );
  }
  // The drive may have been resized while the bitmap was in use.
  if ((flags & FLAG_IN_USE) === 0) {
    const needed = tableEntriesOf(header.length, granularity, clusterSize);
    if (tableEntries !== needed) {
      throw corrupt(
        file,
        `${what} has a table of ${tableEntries} entries; a drive of ${header.length} bytes needs ${needed}`,
      );
    }
  }
  return {
    place,
    raw: Buffer.from(raw),
    name,
    flags,
    granularity,
    tableOffset: Number(tableOffset),
    tableEntries,
  };
}

function tableEntriesOf(length: number, granularity: number, clusterSize: number): number {
  return Math.ceil(Math.ceil(bitsOf(length, granularity) / 8) / clusterSize);
}

/** The persistent bitmaps of an image, as `info` lists them. Throws what {@link readBitmapDirectory} throws. */
export function readBitmaps(file: FileNode, header: Qcow2Header): BitmapInfo[] {
  const directory = readBitmapDirectory(file, header);
  return (directory?.bitmaps ?? []).map(({ flags, name, granularity }) => ({
    flags: [
      ...((flags & FLAG_IN_USE) !== 0 ? (['in-use'] as const) : []),
      ...((flags & FLAG_AUTO) !== 0 ? (['auto'] as const) : []),
    ],
    name,
    granularity,
  }));
}

/** One entry of a table: where its cluster is, or -1, and what an entry without a cluster reads as. */
function* tableOf(
  file: FileNode,
  clusterSize: number,
  stored: StoredBitmap,
): Generator<{ readonly offset: number; readonly ones: boolean }> {
  const perChunk = CHUNK_BYTES / 8;
  for (let first = 0; first < stored.tableEntries; first += perChunk) {
    const count = Math.min(perChunk, stored.tableEntries - first);
    const bytes = readBytes(file, stored.tableOffset + first * 8, count * 8);
    for (let index = 0; index < count; index++) {
      const entry = bytes.readBigUInt64BE(index * 8);
      const offset = entry & TABLE_OFFSET_MASK;
      const ones = offset === 0n && (entry & TABLE_ALL_ONES) !== 0n;
      const valid = (ones ? entry & ~TABLE_ALL_ONES : entry) === offset;
      if (!valid || offset % BigInt(clusterSize) !== 0n || offset >= file.length) {
        const problem = !valid
          ? 'has reserved bits set'
          : offset >= file.length
            ? `is beyond the end of the file at ${file.length}`
            : 'is not the start of a cluster';
        throw corrupt(
          file,
          `entry ${first + index} of the table of bitmap '${stored.name}' at offset ${stored.tableOffset} ${problem} (0x${entry.toString(16)})`,
        );
      }
      yield { offset: offset === 0n ? -1 : Number(offset), ones };
    }
  }
}

/** Reads the bits of a stored bitmap into memory. */
function readBits(
  runtime: Runtime,
  file: FileNode,
  clusterSize: number,
  stored: StoredBitmap,
  bitmap: DirtyBitmap,
): void {
  const { bitBytes } = bitmap;
  if (bitBytes >= MAX_MEMORY_BYTES) {
    throw unsupported(
      file,
      `bitmap '${stored.name}' has ${bitmap.bits} bits, as many as ${MAX_MEMORY_BYTES} bytes or more`,
    );
  }
  bitmap.makeBits();
  const { bitsPointer } = bitmap;
  let at = 0;
  for (const { offset, ones } of tableOf(file, clusterSize, stored)) {
    const count = Math.min(clusterSize, bitBytes - at);
    if (offset >= 0) file.read(offset, bitsPointer + at, count);
    else if (ones) runtime.arena.u8.fill(0xff, bitsPointer + at, bitsPointer + at + count);
    at += count;
  }
  bitmap.clearTail();
}

/** The clusters that belong to a stored bitmap: those of its bits and its table. */
function clustersOf(file: FileNode, clusterSize: number, stored: StoredBitmap): HostRun[] {
  const table = { offset: stored.tableOffset, clusters: Math.ceil((stored.tableEntries * 8) / clusterSize) };
  const runs: HostRun[] = [];
  try {
    for (const { offset } of tableOf(file, clusterSize, stored)) {
      if (offset >= 0) addRun(runs, { offset, clusters: 1 }, clusterSize);
    }
  } catch (error) {
    // A table that says nonsense says nothing of what belongs to the bitmap: that leaks.
    if (!(error instanceof StillframeError) || error.code !== 'ERR_STILLFRAME_CORRUPT_IMAGE') throw error;
    return [table];
  }
  addRun(runs, table, clusterSize);
  return runs;
}

function addRun(runs: HostRun[], run: HostRun, clusterSize: number): void {
  const last = runs.at(-1);
  if (last !== undefined && last.offset + last.clusters * clusterSize === run.offset) {
    runs[runs.length - 1] = { offset: last.offset, clusters: last.clusters + run.clusters };
  } else {
    runs.push(run);
  }
}

/** The dirty bitmaps of an image that is open for writing. */
export function bitmapsOf(runtime: Runtime, descriptor: Qcow2Descriptor): BitmapSet {
  return new BitmapSet(runtime, descriptor.control + BITMAPS);
}

/**
 * Puts the persistent bitmaps of an image that is opened for writing into its set. With `load` those that record have
 * their bits from then on, the others when {@link loadBitmap} is called.
 */
export function openBitmaps(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  file: FileNode,
  header: Qcow2Header,
  metadata: Metadata,
  load: boolean,
): void {
  const directory = readBitmapDirectory(file, header);
  if (directory === undefined) return;
  // Flags are going to be changed in there.
  const problem = metadata.overlap(directory.offset, directory.length);
  if (problem !== undefined)
    throw corrupt(file, `the bitmap directory at offset ${directory.offset} ${problem}`);
  metadata.state.set('bitmapsOffset', directory.offset);
  metadata.state.set('bitmapsBytes', directory.length);
  const set = bitmapsOf(runtime, descriptor);
  let memory = 0;
  for (const stored of directory.bitmaps) {
    const inUse = (stored.flags & FLAG_IN_USE) !== 0;
    const enabled = (stored.flags & FLAG_AUTO) !== 0;
    const { name, granularity, place } = stored;
    const bitmap = set.add({
      name,
      granularity,
      length: header.length,
      enabled,
      persistent: true,
      inconsistent: inUse,
      place,
    });
    if (!load || !enabled || inUse) continue;
    memory += bitmap.bitBytes;
    if (memory >= MAX_MEMORY_BYTES) {
      throw unsupported(file, `its bitmaps record into ${MAX_MEMORY_BYTES} bytes or more`);
    }
    readBits(runtime, file, header.clusterSize, stored, bitmap);
  }
}

/**
 * Sees to it that the bits of a bitmap are in memory.
 *
 * @throws StillframeError ERR_STILLFRAME_BITMAP_INCONSISTENT, …_CORRUPT_IMAGE, …_ARENA_EXHAUSTED, …_IO
 */
export function loadBitmap(runtime: Runtime, file: FileNode, bitmap: DirtyBitmap): void {
  if (bitmap.inconsistent) throw inconsistent(bitmap.name);
  if (bitmap.loaded) return;
  const header = readHeader(runtime, file);
  const stored = readBitmapDirectory(file, header)?.bitmaps.find(({ place }) => place === bitmap.place);
  if (stored === undefined) throw new Error(`bitmap invariant: '${bitmap.name}' is not where it was stored`);
  readBits(runtime, file, header.clusterSize, stored, bitmap);
}

function inconsistent(name: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_BITMAP_INCONSISTENT',
    `Bitmap '${name}' is inconsistent and cannot be used: the program that recorded into it never came to store it; remove it`,
  );
}

/**
 * A bitmap of an image that is open in whatever way, as the file has it. In no set: the caller frees it.
 *
 * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND and what {@link loadBitmap} throws
 */
export function readBitmap(runtime: Runtime, file: FileNode, name: string): DirtyBitmap {
  const header = readHeader(runtime, file);
  const stored = readBitmapDirectory(file, header)?.bitmaps.find((bitmap) => bitmap.name === name);
  if (stored === undefined) throw bitmapNotFound(name);
  if ((stored.flags & FLAG_IN_USE) !== 0) throw inconsistent(name);
  const { granularity, flags } = stored;
  const enabled = (flags & FLAG_AUTO) !== 0;
  const bitmap = DirtyBitmap.create(runtime, {
    name,
    granularity,
    length: header.length,
    enabled,
    persistent: true,
  });
  try {
    readBits(runtime, file, header.clusterSize, stored, bitmap);
    return bitmap;
  } catch (error) {
    bitmap.free();
    throw error;
  }
}

/**
 * The drive is about to change: marks the bitmaps that record as in-use in the file, durably. Those whose bits are not
 * in memory are inconsistent from then on. Under the state's lock.
 */
export function beginRecording(runtime: Runtime, file: FileNode, state: State): void {
  const set = new BitmapSet(runtime, state.control + BITMAPS);
  const recording = set.all().filter((bitmap) => bitmap.recording);
  markInUse(runtime, file, state, recording);
  for (const bitmap of recording) if (!bitmap.loaded) bitmap.inconsistent = true;
}

/** From then on what the file has of these bitmaps does not count. Under the state's lock. */
function markInUse(runtime: Runtime, file: FileNode, state: State, bitmaps: readonly DirtyBitmap[]): void {
  const buffer = state.get('metaBuffer');
  const valid = bitmaps.filter(({ changed }) => !changed);
  let marked = false;
  for (const { place, enabled } of valid) {
    if (place < 0) continue;
    // Entries start at multiples of eight: no power cut leaves half of the flags.
    runtime.arena.view.setUint32(buffer, FLAG_IN_USE | (enabled ? FLAG_AUTO : 0));
    file.write(place + FLAGS_AT, buffer, 4);
    marked = true;
  }
  if (marked) state.sync(() => file.flush(), true);
  for (const bitmap of valid) bitmap.changed = true;
}

/**
 * What the file has of a persistent bitmap of a writable image does not count from now on, durably: it is about to be
 * changed in memory.
 */
export function claimBitmap(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  file: FileNode,
  metadata: Metadata,
  bitmap: DirtyBitmap,
): void {
  loadBitmap(runtime, file, bitmap);
  if (!bitmap.persistent) return;
  if (descriptor.version === 2) throw noBitmapsInVersion2(descriptor.path);
  metadata.state.withLock(() => {
    metadata.clearAutoclear();
    markInUse(runtime, file, metadata.state, [bitmap]);
  });
}

export function noBitmapsInVersion2(path: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `Cannot store dirty bitmaps in qcow2 v2 files; make '${path}' anew with compat=1.1`,
  );
}

/**
 * Puts what a read-only image has of bitmaps into a set, without their bits: see {@link loadBitmap}. None records.
 *
 * @throws StillframeError what {@link readBitmapDirectory} throws
 */
export function listBitmaps(runtime: Runtime, file: FileNode, set: BitmapSet): void {
  const header = readHeader(runtime, file);
  for (const { flags, name, granularity, place } of readBitmapDirectory(file, header)?.bitmaps ?? []) {
    set.add({
      name,
      granularity,
      length: header.length,
      enabled: (flags & FLAG_AUTO) !== 0,
      persistent: true,
      inconsistent: (flags & FLAG_IN_USE) !== 0,
      place,
    });
  }
}

/**
 * Gives the bitmaps the length that `body` gives the drive. What is new is clean. They are in use in the file until
 * they are stored, since a table has the length of its drive. Nobody may use the image meanwhile.
 *
 * @throws StillframeError ERR_STILLFRAME_BITMAP_INCONSISTENT and what {@link loadBitmap} throws, before anything is
 *   changed; …_ARENA_EXHAUSTED, …_INVALID_ARGUMENT (too many bits), and the bitmaps are inconsistent then
 */
export function resizeBitmaps(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  file: FileNode,
  metadata: Metadata,
  length: number,
  body: () => void,
): void {
  const bitmaps = bitmapsOf(runtime, descriptor).all();
  for (const bitmap of bitmaps) loadBitmap(runtime, file, bitmap);
  const { state } = metadata;
  state.withLock(() => {
    metadata.clearAutoclear();
    markInUse(runtime, file, state, bitmaps);
  });
  try {
    for (const bitmap of bitmaps) bitmap.resize(length);
    body();
  } catch (error) {
    for (const bitmap of bitmaps) bitmap.inconsistent = true;
    throw error;
  }
}

/**
 * Makes the bitmaps in the file those in memory, none of them in use any more but the inconsistent ones. Nobody may use
 * the image meanwhile.
 *
 * @throws StillframeError ERR_STILLFRAME_NO_SPACE, …_UNSUPPORTED_FEATURE (version 2), …_IO; the file has then what it
 *   had before
 */
export function storeBitmaps(
  runtime: Runtime,
  descriptor: Qcow2Descriptor,
  file: FileNode,
  metadata: Metadata,
): void {
  const persistent = bitmapsOf(runtime, descriptor)
    .all()
    .filter((bitmap) => bitmap.persistent);
  // As QEMU stores them: those that were there in their order, then new ones, the youngest first.
  const kept = [
    ...persistent.filter(({ place }) => place >= 0).sort((one, other) => one.place - other.place),
    ...persistent.filter(({ place }) => place < 0).reverse(),
  ];
  const { state } = metadata;
  // What is in use in a damaged image stays so.
  if (state.damaged || (kept.length === 0 && state.get('bitmapsBytes') === 0)) return;
  const header = readHeader(runtime, file);
  const old = readBitmapDirectory(file, header);
  // One that became inconsistent keeps the entry that says so.
  const isNew = ({ changed, inconsistent, place }: DirtyBitmap) => !inconsistent && (changed || place < 0);
  const places = new Set(kept.filter((bitmap) => !isNew(bitmap)).map(({ place }) => place));
  const gone = (old?.bitmaps ?? []).filter(({ place }) => !places.has(place));
  if (gone.length === 0 && !kept.some(isNew)) return;
  new BitmapWriter(runtime, file, metadata).replace(header, old, gone, kept);
}

/** Writes bitmaps into new clusters and then makes them those of the image. */
class BitmapWriter {
  readonly #runtime: Runtime;
  readonly #file: FileNode;
  readonly #metadata: Metadata;
  /** What was allocated and nothing refers to yet. */
  readonly #taken: HostRun[] = [];

  constructor(runtime: Runtime, file: FileNode, metadata: Metadata) {
    this.#runtime = runtime;
    this.#file = file;
    this.#metadata = metadata;
  }

  replace(
    header: Qcow2Header,
    old: BitmapDirectory | undefined,
    gone: readonly StoredBitmap[],
    kept: readonly DirtyBitmap[],
  ): void {
    const { state, clusterSize } = this.#metadata;
    const extension = new BitmapsExtension(this.#runtime, this.#file, state, header);
    state.withLock(() => this.#metadata.clearAutoclear());
    if (kept.length > 0) extension.makeRoom();
    const freed = gone.flatMap((stored) => clustersOf(this.#file, clusterSize, stored));
    if (old !== undefined) {
      freed.push({ offset: old.offset, clusters: Math.ceil(old.length / clusterSize) });
    }
    let directory: { offset: number; length: number } | undefined;
    const places: number[] = [];
    try {
      const byPlace = new Map(old?.bitmaps.map((stored) => [stored.place, stored]));
      const entries = kept.map((bitmap) => this.#entry(bitmap, byPlace.get(bitmap.place)));
      directory = this.#writeDirectory(entries);
      let place = directory?.offset ?? 0;
      for (const entry of entries) {
        places.push(place);
        place += entry.length;
      }
      // Bits, tables, directory and their refcounts, and with them all that was written before.
      this.#metadata.flush();
    } catch (error) {
      for (const run of this.#taken) state.withLock(() => this.#metadata.release(run));
      throw error;
    }
    extension.commit(directory && { count: kept.length, ...directory });
    kept.forEach((bitmap, index) => {
      bitmap.place = places[index] ?? -1;
      bitmap.changed = false;
    });
    state.set('bitmapsOffset', directory?.offset ?? 0);
    state.set('bitmapsBytes', directory?.length ?? 0);
    this.#free(freed);
  }

  /** Everything that can be, whatever the image says of some of it. */
  #free(runs: readonly HostRun[]): void {
    const { state, clusterSize } = this.#metadata;
    let failure: unknown;
    for (const run of runs) {
      try {
        state.withLock(() => {
          const problem = this.#metadata.overlap(run.offset, run.clusters * clusterSize);
          if (problem !== undefined) {
            throw corrupt(this.#file, `a cluster of a bitmap, at offset ${run.offset}, ${problem}`);
          }
          this.#metadata.lower(run);
        });
      } catch (error) {
        failure ??= error;
      }
    }
    if (failure !== undefined) throw failure;
  }

  /** The bitmap's entry of the directory, the rest of it written. */
  #entry(bitmap: DirtyBitmap, stored: StoredBitmap | undefined): Buffer {
    if (stored !== undefined && (!bitmap.changed || bitmap.inconsistent)) return stored.raw;
    const nameBytes = stored?.raw.readUInt16BE(18) ?? Buffer.byteLength(bitmap.name);
    const name = stored?.raw.subarray(ENTRY_BYTES, ENTRY_BYTES + nameBytes) ?? Buffer.from(bitmap.name);
    const table = this.#writeBits(bitmap);
    const entry = Buffer.alloc(Math.ceil((ENTRY_BYTES + nameBytes) / 8) * 8);
    entry.writeBigUInt64BE(BigInt(this.#writeRow(table)), 0);
    entry.writeUInt32BE(table.length / 8, 8);
    entry.writeUInt32BE(bitmap.enabled ? FLAG_AUTO : 0, FLAGS_AT);
    entry.writeUInt8(TYPE_DIRTY_TRACKING, 16);
    entry.writeUInt8(Math.log2(bitmap.granularity), 17);
    entry.writeUInt16BE(nameBytes, 18);
    name.copy(entry, ENTRY_BYTES);
    return entry;
  }

  /** Writes the clusters of a bitmap that have a bit set. Returns its table. */
  #writeBits(bitmap: DirtyBitmap): Buffer {
    const { clusterSize, state } = this.#metadata;
    const { bitsPointer, bitBytes } = bitmap;
    const { kernels } = this.#runtime;
    const clusters = Math.ceil(bitBytes / clusterSize);
    const bytesOf = (index: number) => Math.min(clusterSize, bitBytes - index * clusterSize);
    const isZero = (index: number) => kernels.isZero(bitsPointer + index * clusterSize, bytesOf(index));
    const table = Buffer.alloc(clusters * 8);
    for (let index = 0; index < clusters; ) {
      if (isZero(index)) {
        index++;
        continue;
      }
      let end = index + 1;
      while (end < clusters && !isZero(end)) end++;
      const run = state.withLock(() => this.#metadata.allocate(end - index));
      this.#taken.push(run);
      const bytes = (run.clusters - 1) * clusterSize + bytesOf(index + run.clusters - 1);
      this.#file.write(run.offset, bitsPointer + index * clusterSize, bytes);
      this.#fill(run.offset + bytes, run.clusters * clusterSize - bytes);
      for (let done = 0; done < run.clusters; done++) {
        table.writeBigUInt64BE(BigInt(run.offset + done * clusterSize), (index + done) * 8);
      }
      index += run.clusters;
    }
    return table;
  }

  #writeDirectory(entries: readonly Buffer[]): { offset: number; length: number } | undefined {
    if (entries.length === 0) return undefined;
    const bytes = Buffer.concat(entries);
    if (entries.length > MAX_BITMAPS || bytes.length > MAX_DIRECTORY_BYTES) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `'${this.#file.descriptor.path}' cannot hold ${entries.length} bitmaps in a directory of ${bytes.length} bytes: the most are ${MAX_BITMAPS} and ${MAX_DIRECTORY_BYTES} bytes; remove some`,
      );
    }
    return { offset: this.#writeRow(bytes), length: bytes.length };
  }

  /** Writes bytes into new clusters in a row. Returns their offset. */
  #writeRow(bytes: Buffer): number {
    const { clusterSize, state } = this.#metadata;
    const clusters = Math.ceil(bytes.length / clusterSize);
    const offset = state.withLock(() => this.#metadata.allocateRow(clusters));
    this.#taken.push({ offset, clusters });
    const buffer = state.get('metaBuffer');
    const step = state.get('metaBytes');
    state.withLock(() => {
      for (let done = 0; done < bytes.length; done += step) {
        const part = bytes.subarray(done, done + step);
        this.#runtime.arena.u8.set(part, buffer);
        this.#file.write(offset + done, buffer, part.length);
      }
    });
    this.#fill(offset + bytes.length, clusters * clusterSize - bytes.length);
    return offset;
  }

  /** Zeroes: no reused cluster shows what was in it. */
  #fill(offset: number, length: number): void {
    const { state } = this.#metadata;
    const step = state.get('zeroBytes');
    for (let done = 0; done < length; done += step) {
      this.#file.write(offset + done, state.get('zeroes'), Math.min(step, length - done));
    }
  }
}
