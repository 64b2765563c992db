import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { FileNode } from '../raw/file.js';
import {
  AUTOCLEAR_BITMAPS,
  EXTENSION_BITMAPS,
  EXTENSION_FEATURE_TABLE,
  EXTENSION_HEAD_BYTES,
  FIELD,
  findExtension,
  type HeaderExtension,
  type Qcow2Header,
  readHeader,
  SECTOR_BYTES,
} from './header.js';
import type { State } from './state.js';

/** Bytes of the extension's data: count uint32, reserved uint32, length uint64, offset uint64. */
export const EXTENSION_BITMAPS_BYTES = 24;
/** The extension with its head, and the one that ends the list behind it. */
const WHOLE_BYTES = EXTENSION_HEAD_BYTES + EXTENSION_BITMAPS_BYTES + EXTENSION_HEAD_BYTES;

/** What the extension says. */
export interface BitmapsFields {
  readonly count: number;
  /** Of the directory, bytes. */
  readonly length: number;
  readonly offset: number;
}

/** The extension of an open image, about to be changed; the directory that it tells of is the caller's business. */
export class BitmapsExtension {
  readonly #runtime: Runtime;
  readonly #file: FileNode;
  readonly #state: State;
  readonly #buffer: number;
  #header: Qcow2Header;

  constructor(runtime: Runtime, file: FileNode, state: State, header: Qcow2Header) {
    this.#runtime = runtime;
    this.#file = file;
    this.#state = state;
    this.#buffer = state.get('metaBuffer');
    this.#header = header;
  }

  /**
   * Sees to it that there is room for the extension, before anything is written that it is going to tell of.
   *
   * @throws StillframeError ERR_STILLFRAME_NO_SPACE
   */
  makeRoom(): void {
    if (this.#usable !== undefined) return;
    this.#state.withLock(() => {
      this.#removeAll();
      if (this.#clear(this.#end + WHOLE_BYTES)) return;
      // The names of features are a courtesy.
      this.#remove(EXTENSION_FEATURE_TABLE);
      if (this.#clear(this.#end + WHOLE_BYTES)) return;
      throw new StillframeError(
        'ERR_STILLFRAME_NO_SPACE',
        `'${this.#file.descriptor.path}' cannot hold bitmaps: its header has no room for them in a cluster of ${this.#header.clusterSize} bytes; copy it to an image with larger clusters`,
      );
    });
  }

  /**
   * Makes a directory that is durable the image's, or none, by one write that happens whole or not at all. Returns
   * when that is durable. {@link makeRoom} comes first.
   *
   * Where the extension is in place and in one sector it is that write. Else the autoclear bit is: without it the
   * extension does not count, and may be changed, made or removed.
   */
  commit(fields: BitmapsFields | undefined): void {
    this.#state.withLock(() => {
      const usable = this.#usable;
      const counts = (this.#header.autoclearFeatures & AUTOCLEAR_BITMAPS) !== 0n;
      if (fields !== undefined && usable !== undefined && counts && inOneSector(usable)) {
        this.#write(usable.offset, encode(fields));
        return;
      }
      if (counts) this.#setBit(false);
      if (fields === undefined) {
        this.#removeAll();
        return;
      }
      if (usable !== undefined) this.#write(usable.offset, encode(fields));
      else this.#append(encode(fields));
      this.#setBit(true);
    });
  }

  /** The extension, where there is one, and that can be changed in its place. */
  get #usable(): HeaderExtension | undefined {
    const [found, ...more] = this.#header.extensions.filter(({ type }) => type === EXTENSION_BITMAPS);
    return found?.length === EXTENSION_BITMAPS_BYTES && more.length === 0 ? found : undefined;
  }

  #removeAll(): void {
    while (this.#find(EXTENSION_BITMAPS) !== undefined) this.#remove(EXTENSION_BITMAPS);
  }

  #find(type: number): HeaderExtension | undefined {
    return findExtension(this.#header.extensions, type);
  }

  /** Where the list of extensions ends, with the extension that says so or without. */
  get #end(): number {
    return this.#header.extensions.reduce(
      (end, extension) => Math.max(end, endOf(extension)),
      this.#header.headerLength,
    );
  }

  /** Puts the extension at the end of the list. */
  #append(data: Buffer): void {
    const end = this.#end;
    // Nobody looks behind the end of the list: the head, which moves the end, comes last.
    this.#write(end + EXTENSION_HEAD_BYTES, Buffer.concat([data, Buffer.alloc(EXTENSION_HEAD_BYTES)]));
    const head = Buffer.alloc(EXTENSION_HEAD_BYTES);
    head.writeUInt32BE(EXTENSION_BITMAPS, 0);
    head.writeUInt32BE(data.length, 4);
    this.#write(end, head);
  }

  /**
   * Sees to it that the list of extensions can reach up to `end`: the name of the backing file, which is behind it, is
   * moved out of the way.
   *
   * @returns whether there is room
   */
  #clear(end: number): boolean {
    const { clusterSize } = this.#header;
    const fields = this.#read(FIELD.backingFileOffset, 12);
    const offset = Number(fields.readBigUInt64BE(0));
    const size = fields.readUInt32BE(8);
    if (offset === 0 || offset >= end) return end <= clusterSize;
    // Behind the old one, so that either is whole at any time; else over it.
    const apart = Math.ceil(Math.max(end, offset + size) / 8) * 8;
    const place = apart + size <= clusterSize ? apart : end;
    if (place + size > clusterSize) return false;
    this.#write(place, this.#read(offset, size));
    const moved = Buffer.alloc(8);
    moved.writeBigUInt64BE(BigInt(place));
    this.#write(FIELD.backingFileOffset, moved);
    return true;
  }

  /** Takes an extension out of the list; those behind it move up. */
  #remove(type: number): void {
    const extension = this.#find(type);
    if (extension === undefined) return;
    const end = this.#end;
    const rest = this.#read(endOf(extension), end - endOf(extension));
    this.#write(
      extension.offset - EXTENSION_HEAD_BYTES,
      Buffer.concat([rest, Buffer.alloc(EXTENSION_HEAD_BYTES)]),
    );
    this.#header = readHeader(this.#runtime, this.#file);
  }

  #setBit(value: boolean): void {
    const bytes = this.#read(FIELD.autoclearFeatures, 8);
    const others = bytes.readBigUInt64BE(0) & ~AUTOCLEAR_BITMAPS;
    bytes.writeBigUInt64BE(others | (value ? AUTOCLEAR_BITMAPS : 0n), 0);
    this.#write(FIELD.autoclearFeatures, bytes);
  }

  #read(offset: number, length: number): Buffer {
    const bytes = Buffer.alloc(length);
    this.#file.readBytes(offset, bytes);
    return bytes;
  }

  /** Durably. */
  #write(offset: number, bytes: Buffer): void {
    const step = this.#state.get('metaBytes');
    for (let done = 0; done < bytes.length; done += step) {
      const part = bytes.subarray(done, done + step);
      this.#runtime.arena.u8.set(part, this.#buffer);
      this.#file.write(offset + done, this.#buffer, part.length);
    }
    this.#state.sync(() => this.#file.flush(), true);
  }
}

function endOf(extension: HeaderExtension): number {
  return extension.offset + Math.ceil(extension.length / 8) * 8;
}

function inOneSector({ offset, length }: HeaderExtension): boolean {
  return Math.floor(offset / SECTOR_BYTES) === Math.floor((offset + length - 1) / SECTOR_BYTES);
}

function encode({ count, length, offset }: BitmapsFields): Buffer {
  const bytes = Buffer.alloc(EXTENSION_BITMAPS_BYTES);
  bytes.writeUInt32BE(count, 0);
  bytes.writeBigUInt64BE(BigInt(length), 8);
  bytes.writeBigUInt64BE(BigInt(offset), 16);
  return bytes;
}
