import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { amendImage } from '#src/block/amend.js';
import { checkImage, type ImageCheck } from '#src/block/check.js';
import { type BitmapAction, editBitmap } from '#src/block/edit-bitmap.js';
import { isImage } from '#src/block/files.js';
import {
  attachNode,
  closeNode,
  type ImageFormat,
  type OpenImageOptions,
  openImage,
} from '#src/block/graph.js';
import { imageInfo } from '#src/block/info.js';
import { mapNode } from '#src/block/map.js';
import { MapBatch } from '#src/block/map-batch.js';
import {
  type BlockNode,
  type ImageDescriptor,
  STATUS_COMPRESSED,
  STATUS_DATA,
  STATUS_ZERO,
} from '#src/block/node.js';
import type { RepairMode } from '#src/block/qcow2/index.js';
import { resizeImage } from '#src/block/resize.js';
import { chainStatus } from '#src/block/status.js';
import { StillframeError } from '#src/errors.js';
import type { Runtime } from '#src/kernels/runtime.js';
import type { Random } from '../support/data.js';
import { EXTENSION, HEADER } from '../support/qcow2-bytes.js';

/** What became of an image. */
export interface Outcome {
  /** The drive as it was read, where all of it could be. */
  readonly content: Buffer | undefined;
  /** The drive after changes that all went well. */
  readonly changed: Buffer | undefined;
  /** Every error there was. */
  readonly errors: readonly StillframeError[];
}

/** Something that must never be. */
export class Defect extends Error {}

class Enough extends Error {}

const BUFFER_BYTES = 256 * 1024;
const MOST_EXTENTS = 300;

/** Names that the bitmaps of the corpus have, and one that is new. */
const BITMAPS = ['b', 'fine', 'coarse', 'disabled', 'b0', 'new'] as const;

/** Errors after which nothing is half done. */
const HARMLESS: ReadonlySet<string> = new Set([
  'ERR_STILLFRAME_BITMAP_NOT_FOUND',
  'ERR_STILLFRAME_BITMAP_EXISTS',
  'ERR_STILLFRAME_BITMAP_INCONSISTENT',
  'ERR_STILLFRAME_INVALID_ARGUMENT',
]);

/** What a repair came to. */
export interface Repaired {
  /** What was found before it, or undefined where the image cannot be checked. */
  readonly found: ImageCheck | undefined;
  /** It says that nothing is wrong any more. */
  readonly sound: boolean;
  /** Offset of the first byte that reads differently, -1 where there is none. */
  readonly lost: number;
}

/** The largest L1 table there may be. */
const MOST_TABLE_BYTES = 32 << 20;

/** Everything that is wrong. */
function wrongs(check: ImageCheck): number {
  return check['check-errors'] + (check.corruptions ?? 0) + (check.leaks ?? 0);
}

/** Reads a file whose own numbers say what to read: what it does not have is zero, and no more than it may have is read. */
function reader(fd: number): (at: number, bytes: number) => Buffer {
  return (at, bytes) => {
    const buffer = Buffer.alloc(Math.min(bytes, MOST_TABLE_BYTES));
    if (at < Number.MAX_SAFE_INTEGER) readSync(fd, buffer, 0, buffer.length, at);
    return buffer;
  };
}

/**
 * Whether a snapshot of a sound image takes the active L1 table or the refcount table for one of its L2 tables, or a
 * bitmap takes it for its table.
 */
function isTableShared(path: string): boolean {
  const fd = openSync(path, 'r');
  try {
    const read = reader(fd);
    const header = read(0, 104);
    const place = (bytes: Buffer, at: number): number =>
      Number(bytes.readBigUInt64BE(at) & 0x00fffffffffffe00n);
    const clusterSize = 2 ** header.readUInt32BE(HEADER.clusterBits);
    const tables = [
      [place(header, HEADER.l1TableOffset), header.readUInt32BE(HEADER.l1Size) * 8],
      [
        place(header, HEADER.refcountTableOffset),
        header.readUInt32BE(HEADER.refcountTableClusters) * clusterSize,
      ],
    ] as const;
    const isShared = (table: number): boolean =>
      tables.some(([start, bytes]) => table < start + bytes && start < table + clusterSize);
    const directory = bitmapDirectoryOf(read);
    for (let entry = 0; directory !== undefined && entry + 24 <= directory.length; ) {
      if (isShared(place(directory, entry))) return true;
      const length = 24 + directory.readUInt16BE(entry + 18) + directory.readUInt32BE(entry + 20);
      entry += Math.ceil(length / 8) * 8;
    }
    let at = place(header, HEADER.snapshotsOffset);
    for (let left = header.readUInt32BE(HEADER.snapshotCount); left > 0; left--) {
      const entry = read(at, 40);
      const l1 = read(place(entry, 0), Math.min(entry.readUInt32BE(8), 4096) * 8);
      for (let index = 0; index < l1.length; index += 8) {
        if (isShared(place(l1, index))) return true;
      }
      const length = 40 + entry.readUInt32BE(36) + entry.readUInt16BE(12) + entry.readUInt16BE(14);
      at += Math.ceil(length / 8) * 8;
    }
    return false;
  } finally {
    closeSync(fd);
  }
}

/** The bitmap directory that the extensions of a header speak of. */
function bitmapDirectoryOf(read: (at: number, bytes: number) => Buffer): Buffer | undefined {
  const version = read(4, 4).readUInt32BE(0);
  for (let at = version === 2 ? 72 : read(100, 4).readUInt32BE(0); at < 65536; ) {
    const extension = read(at, 32);
    const [type, length] = [extension.readUInt32BE(0), extension.readUInt32BE(4)];
    if (type === 0) return undefined;
    if (type === EXTENSION.bitmaps) {
      const bytes = Math.min(Number(extension.readBigUInt64BE(16)), 65536);
      return read(Number(extension.readBigUInt64BE(24)), bytes);
    }
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return undefined;
}

/**
 * Whether tables hold something for clusters behind the end of the drive. Like QEMU, who makes it shorter looks at what
 * is in front of the old end only, and the rest leaks with its table.
 */
function isMappedBehindEnd(path: string): boolean {
  const fd = openSync(path, 'r');
  try {
    const read = reader(fd);
    const header = read(0, 104);
    const clusterSize = 2 ** header.readUInt32BE(HEADER.clusterBits);
    const subclusters = header.readUInt32BE(4) >= 3 && (header.readUInt32BE(76) & 16) !== 0;
    const entryBytes = subclusters ? 16 : 8;
    const perTable = clusterSize / entryBytes;
    const clusters = Math.ceil(Number(header.readBigUInt64BE(HEADER.size)) / clusterSize);
    const l1 = read(
      Number(header.readBigUInt64BE(HEADER.l1TableOffset)),
      header.readUInt32BE(HEADER.l1Size) * 8,
    );
    const last = Math.floor(clusters / perTable);
    if (l1.subarray((last + 1) * 8).some((byte) => byte !== 0)) return true;
    if (last * 8 >= l1.length) return false;
    const table = Number(l1.readBigUInt64BE(last * 8) & 0x00fffffffffffe00n);
    if (table === 0) return false;
    return read(table, clusterSize)
      .subarray((clusters % perTable) * entryBytes)
      .some((byte) => byte !== 0);
  } finally {
    closeSync(fd);
  }
}

/** Does with an image what can be done with one. */
export class Exercise {
  readonly #runtime: Runtime;
  readonly #path: string;
  readonly #format: ImageFormat;
  readonly #buffer: number;
  readonly #skip: number;
  /** What was read: first, again, after changes, after a repair. */
  readonly #contents: readonly Buffer[];
  readonly #zeroes: Buffer;
  #errors: StillframeError[] = [];

  /** @param mostContent a larger drive is read in samples, bytes */
  constructor(runtime: Runtime, path: string, format: ImageFormat, mostContent: number) {
    this.#zeroes = Buffer.alloc(mostContent);
    this.#contents = [0, 1, 2, 3].map(() => Buffer.alloc(mostContent));
    this.#runtime = runtime;
    this.#path = path;
    this.#format = format;
    this.#buffer = runtime.arena.alloc(BUFFER_BYTES, 'buffer of the fuzzer');
    this.#skip = runtime.arena.alloc(64, 'skipped units');
  }

  /** @param between called when the image was read and has not been changed yet */
  run(
    dice: Random,
    between: (content: Buffer | undefined, errors: readonly StillframeError[]) => void,
  ): Outcome {
    this.#errors = [];
    if (dice.chance(0.3)) {
      this.#with({ readOnly: true, backing: false }, (_, descriptor) => {
        this.#attempt(() => imageInfo(this.#runtime, descriptor, this.#path));
      });
    }
    let content: Buffer | undefined;
    this.#with({ readOnly: true }, (node) => {
      content = this.#read(dice, node, 0);
      this.#map(node);
      if (content !== undefined) this.#compareStatus(node, content);
    });
    between(content, this.#errors);
    if (this.#format === 'qcow2' && dice.chance(0.1)) {
      const snapshot = dice.chance(0.7) ? '1' : '2';
      this.#with({ readOnly: true, snapshot }, (node) => void this.#read(dice, node, 3));
    }
    const before = this.#errors.length;
    let changed: Buffer | undefined;
    if (dice.chance(0.7) && this.#with({ readOnly: false }, (node) => this.#change(dice, node))) {
      if (this.#format === 'qcow2' && dice.chance(0.15)) this.#maintain(dice);
      const clean = this.#errors.length === before;
      this.#with({ readOnly: true }, (node) => {
        const found = this.#read(dice, node, 2);
        if (clean) changed = found;
      });
    }
    return { content, changed, errors: this.#errors };
  }

  /**
   * Checks the image, repairs it, checks it again, reads and changes it.
   *
   * @param content what was read before, where all of it could be
   */
  repair(dice: Random, content: Buffer | undefined): Repaired {
    const found = this.#check(undefined);
    const repaired = this.#check('all');
    const again = this.#check(undefined);
    if (repaired === undefined || wrongs(repaired) > 0) return { found, sound: false, lost: -1 };
    if (again === undefined || wrongs(again) > 0) {
      throw new Defect(`the repair says that all is well, the check after it: ${JSON.stringify(again)}`);
    }
    let lost = -1;
    this.#with({ readOnly: true }, (node) => {
      const now = this.#read(dice, node, 3);
      if (content !== undefined && now?.equals(content) !== true) {
        lost = content.findIndex((byte, index) => byte !== now?.[index]);
      }
    });
    return { found, sound: true, lost };
  }

  /** Changes an image with which nothing is wrong; nothing may be wrong with it after that. */
  changeSound(dice: Random): void {
    // QEMU does not see that either.
    if (isTableShared(this.#path)) return;
    const mayLeak = isMappedBehindEnd(this.#path);
    const before = this.#errors.length;
    const end = statSync(this.#path).size;
    let cluster = 512;
    const opened = this.#with({ readOnly: false }, (node) => {
      cluster = node.clusterSize ?? cluster;
      this.#change(dice, node);
    });
    if (!opened) return;
    if (dice.chance(0.3)) this.#maintain(dice);
    const lines: string[] = [];
    const check = this.#check(undefined, lines);
    if (check === undefined || wrongs(check) === 0) return;
    const complete = this.#errors.slice(before).every(({ code }) => HARMLESS.has(code));
    const wrong = lines.filter((line) => {
      if (line.startsWith('warning: ')) return false;
      // Where two entries shared a cluster the flag does not come back when one is left.
      if (/OFLAG_COPIED .* refcount=1$/.test(line)) return false;
      // No check looks at refcounts behind the end of the file.
      const [, leaked = -1] = /^Leaked cluster (\d+) /.exec(line)?.map(Number) ?? [];
      return leaked < 0 || (complete && !mayLeak && leaked * cluster < end - (end % cluster));
    });
    if (wrong.length > 0) throw new Defect(`changes of a sound image have damaged it: ${wrong.join('; ')}`);
  }

  #check(repair: RepairMode | undefined, lines: string[] = []): ImageCheck | undefined {
    return this.#attempt(() =>
      checkImage(this.#runtime, this.#path, {
        format: 'qcow2',
        repair,
        onMessage: (line) => void lines.push(line),
        onRepaired: () => undefined,
      }),
    );
  }

  /** False where it cannot be opened. */
  #with(
    options: Omit<OpenImageOptions, 'format'>,
    body: (node: BlockNode, descriptor: ImageDescriptor) => void,
  ): boolean {
    const descriptor = this.#attempt(() =>
      openImage(this.#runtime, this.#path, { ...options, format: this.#format }),
    );
    if (descriptor === undefined) return false;
    try {
      body(attachNode(this.#runtime, descriptor), descriptor);
    } finally {
      this.#attempt(() => closeNode(this.#runtime, descriptor));
    }
    return true;
  }

  #attempt<T>(body: () => T): T | undefined {
    try {
      return body();
    } catch (error) {
      if (!(error instanceof StillframeError) || error.code === 'ERR_STILLFRAME_INTERNAL') throw error;
      this.#errors.push(error);
      return undefined;
    }
  }

  /** @param into number of the buffer for what is read */
  #read(dice: Random, node: BlockNode, into: number): Buffer | undefined {
    const { length } = node;
    if (length <= this.#zeroes.length) {
      const content = this.#pass(dice, node, into);
      const again = this.#pass(dice, node, 1);
      if (content !== undefined && again !== undefined && !content.equals(again)) {
        throw new Defect('the drive reads differently in other pieces');
      }
      return content;
    }
    const places = Array.from({ length: 8 }, () => Math.floor(dice.next() * (length - 65536)));
    for (const offset of [0, length - 65536, ...places]) {
      this.#attempt(() => node.read(offset, this.#buffer, 65536));
      const status = this.#attempt(() => chainStatus(node, offset, length - offset));
      const next = offset + (status?.length ?? 0);
      if (next < length) this.#attempt(() => node.read(next, this.#buffer, Math.min(65536, length - next)));
    }
    return undefined;
  }

  /** Reads all of the drive in pieces of any size. */
  #pass(dice: Random, node: BlockNode, into: number): Buffer | undefined {
    const { u8 } = this.#runtime.arena;
    const content = (this.#contents[into] ?? Buffer.alloc(0)).subarray(0, node.length);
    // Not too many for one cluster: a compressed one is decompressed anew where that fails.
    const least = Math.min(BUFFER_BYTES, Math.max(512, Math.floor((node.clusterSize ?? 512) / 8)));
    const most = Math.max(least, 1 << dice.between(9, 18));
    let complete = true;
    for (let offset = 0; offset < node.length; ) {
      const bytes = Math.min(
        dice.chance(0.5) ? most : dice.between(Math.floor(least / 2) + 1, most),
        node.length - offset,
      );
      const done = this.#attempt(() => {
        u8.fill(0xee, this.#buffer, this.#buffer + bytes);
        node.read(offset, this.#buffer, bytes);
        content.set(u8.subarray(this.#buffer, this.#buffer + bytes), offset);
        return true;
      });
      complete &&= done === true;
      offset += bytes;
    }
    return complete ? content : undefined;
  }

  #map(node: BlockNode): void {
    let entries = 0;
    let end = 0;
    try {
      this.#attempt(() =>
        mapNode(node, {}, (batch) => {
          for (const { start, length } of new MapBatch(batch, [])) {
            if (start !== end || (length <= 0 && node.length > 0)) {
              throw new Defect(`the map goes on at ${start} with ${length} bytes, not at ${end}`);
            }
            end = start + length;
            if (++entries > MOST_EXTENTS) throw new Enough();
          }
        }),
      );
    } catch (error) {
      if (!(error instanceof Enough)) throw error;
    }
  }

  /** What the status says must be what is read. */
  #compareStatus(node: BlockNode, content: Buffer): void {
    for (let offset = 0, left = MOST_EXTENTS; offset < node.length && left > 0; left--) {
      const extent = this.#attempt(() => chainStatus(node, offset, node.length - offset));
      if (extent === undefined) return;
      const found = content.subarray(offset, offset + extent.length);
      if ((extent.flags & STATUS_ZERO) !== 0) {
        if (!found.equals(this.#zeroes.subarray(0, found.length)))
          throw new Defect(`said to be zero, but is not: ${offset}`);
      } else if (
        (extent.flags & (STATUS_DATA | STATUS_COMPRESSED)) === STATUS_DATA &&
        extent.hostOffset >= 0
      ) {
        const descriptor = extent.node?.descriptor;
        if (descriptor === undefined || !isImage(descriptor)) throw new Defect('an extent of no image');
        // What a log holds is not in its place in the file.
        if (descriptor.driver === 'vhdx' && this.#format === 'vhdx') return;
        const files =
          descriptor.driver === 'qcow2'
            ? [descriptor.dataFile ?? descriptor.file]
            : [descriptor.file, ...('extents' in descriptor ? descriptor.extents : [])];
        const file = files[extent.file ?? 0];
        if (file?.driver !== 'file') throw new Defect('an image that is in no file');
        const there = Buffer.alloc(Math.min(extent.length, 4096));
        readSync(file.fd, there, 0, there.length, extent.hostOffset);
        if (!there.equals(found.subarray(0, there.length))) {
          throw new Defect(`what is at ${extent.hostOffset} of the file is not what is read at ${offset}`);
        }
      }
      offset += extent.length;
    }
  }

  /** Changes of what is not the drive's content. */
  #maintain(dice: Random): void {
    for (let left = dice.between(1, 3); left > 0; left--) {
      this.#attempt(() => {
        if (dice.chance(0.3)) {
          const size = dice.between(-64, 64) * (dice.chance(0.5) ? 512 : 8192);
          return resizeImage(this.#runtime, this.#path, {
            format: 'qcow2',
            size,
            relative: true,
            shrink: true,
          });
        }
        if (dice.chance(0.4)) {
          const version = dice.chance(0.5) ? undefined : dice.pick([2, 3] as const);
          const refcountBits = dice.chance(0.5) ? undefined : 2 ** dice.between(0, 6);
          const lazyRefcounts = dice.chance(0.7) ? undefined : dice.chance(0.5);
          const options = { format: 'qcow2', version, refcountBits, lazyRefcounts } as const;
          return amendImage(this.#runtime, this.#path, options, () => undefined);
        }
        const action = dice.pick<BitmapAction>([
          { action: 'add', granularity: dice.chance(0.5) ? 512 : 65536 },
          { action: 'remove' },
          { action: 'clear' },
          { action: 'enable' },
          { action: 'disable' },
          { action: 'merge', source: dice.pick(BITMAPS) },
        ]);
        return editBitmap(this.#runtime, this.#path, dice.pick(BITMAPS), [action], { format: 'qcow2' });
      });
    }
  }

  /** Some changes, and a close. */
  #change(dice: Random, node: BlockNode): void {
    const { length } = node;
    if (length === 0) return;
    const cluster = node.clusterSize ?? 512;
    const { u8 } = this.#runtime.arena;
    u8.fill(dice.between(1, 255), this.#buffer, this.#buffer + BUFFER_BYTES);
    for (let left = dice.between(1, 8); left > 0; left--) {
      const most = Math.min(length, BUFFER_BYTES, cluster * dice.between(1, 8));
      const offset = Math.floor(dice.next() * (length - most + 1));
      const bytes = dice.between(1, most);
      this.#attempt(() => {
        switch (dice.between(0, 10)) {
          case 0:
          case 1:
          case 2:
          case 3:
            return node.write(offset, this.#buffer, bytes);
          case 4:
            return node.writeZeroes(offset, bytes, dice.chance(0.5));
          case 5:
            return node.discard(offset, bytes);
          case 6: {
            if (length > 64 << 20) return undefined;
            return dice.chance(0.5) ? node.discard(0, length) : node.writeZeroes(0, length, dice.chance(0.5));
          }
          case 7: {
            const start = offset - (offset % cluster);
            this.#runtime.arena.u32[this.#skip >> 2] = dice.between(0, 255);
            const whole = Math.min(
              Math.ceil(bytes / cluster) * cluster,
              length - start,
              cluster * 16,
              BUFFER_BYTES,
            );
            return node.writeUnits(start, this.#buffer, whole, cluster, this.#skip);
          }
          case 8: {
            const start = offset - (offset % cluster);
            const whole = Math.min(cluster, length - start);
            if (whole > BUFFER_BYTES) return undefined;
            // What repeats compresses.
            return node.writeCompressed?.(start, this.#buffer, whole);
          }
          default:
            return node.flush();
        }
      });
    }
  }
}
