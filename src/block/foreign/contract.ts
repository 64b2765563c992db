import { StillframeError } from '../../errors.js';
import type { ForeignName, StorageDescriptor } from '../node.js';

/**
 * The contract of a format that is only read. A format has three functions in its file:
 *
 * - `probe(head)`: whether the first {@link PROBE_BYTES} bytes of a file are of the format;
 * - `open(image)`: reads and checks the headers and gives plain data, its layout;
 * - a class that implements {@link Locator} from a layout: where in its files a byte of the drive is.
 *
 * Everything else (reading, block status, backing, refusing to write) is ForeignNode's, for all of them.
 */

/** Bytes of the start of a file that a format is told by, as QEMU does. */
export const PROBE_BYTES = 512;
export const SECTOR = 512;

/** What a format reads its headers, tables and data through: a file, perhaps with changes that its log holds. */
export interface Source {
  readonly descriptor: StorageDescriptor;
  /** Bytes. */
  readonly length: number;
  /** Reads into the arena; what lies beyond the end is zero. */
  read(offset: number, pointer: number, length: number): void;
  /** Reads into memory of this thread; what lies beyond the end is zero. */
  readBytes(offset: number, bytes: Uint8Array): void;
}

/** An image as its format opens it. */
export interface OpeningImage {
  readonly path: string;
  readonly file: Source;
  /**
   * Opens a file that the header names, where the caller allows it.
   *
   * @returns its index among the files of the image, of which the image itself is 0, and the open file
   */
  openExtent(name: string): { readonly index: number; readonly file: Source };
}

/** What opening gives. `L` is plain data. */
export interface Opened<L> {
  readonly layout: L;
  /** Virtual size in bytes. */
  readonly length: number;
  /** Bytes of the blocks that the image is allocated in, as `info` shows them; undefined where there are none. */
  readonly clusterSize: number | undefined;
  /** Name of the parent as the header has it; it has the same format. */
  readonly backingFile?: string | undefined;
}

interface PlaceBase {
  /** Bytes from the offset asked for; at least 1. */
  readonly length: number;
}

/** Where the bytes of a range are. */
export type Place =
  | (PlaceBase & {
      readonly kind: 'data';
      /** Index of the file among the files of the image. */
      readonly file: number;
      /** Of the first byte asked for. */
      readonly hostOffset: number;
      /** The file was allocated ahead: its holes say which ranges are zero. */
      readonly preallocated: boolean;
    })
  | (PlaceBase & { readonly kind: 'zero' })
  /** The parent answers; zeroes where there is none. */
  | (PlaceBase & { readonly kind: 'unallocated' })
  | (PlaceBase & {
      readonly kind: 'compressed';
      /** The same for all places of one block. */
      readonly key: number;
      /** Of the first byte asked for, in the unpacked block. */
      readonly within: number;
      /** The content of the block. It may end early, but not before the range. */
      readonly unpack: () => Uint8Array;
    });

export interface Locator {
  /**
   * Where the bytes of the range are: one place that starts at `offset`. The range is not empty and lies within the
   * image. Neighbours are merged as far as is cheap.
   *
   * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE, …_IO
   */
  locate(offset: number, length: number): Place;
}

/** A damaged image. `what` is a sentence's end without its full stop. */
export function corrupt(path: string, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_CORRUPT_IMAGE',
    `'${path}': ${what}; fetch the image once more from where it came from`,
  );
}

/** @param advice what to do instead */
export function unsupported(path: string, what: string, advice: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_UNSUPPORTED_FEATURE', `'${path}': ${what}; ${advice}`);
}

export function notOfFormat(path: string, format: ForeignName, what: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_FORMAT',
    `'${path}' is not a ${format} image: ${what}; say another format`,
  );
}

/** A view of `length` bytes of a source. */
export function viewOf(source: Source, offset: number, length: number): DataView {
  const bytes = new Uint8Array(length);
  source.readBytes(offset, bytes);
  return new DataView(bytes.buffer);
}

/**
 * A 64-bit number of a header. Beyond 2^53 it is not exact, but still beyond everything it is compared with: lengths
 * of files, and sizes of drives.
 */
export function u64(view: DataView, at: number, littleEndian: boolean): number {
  return Number(view.getBigUint64(at, littleEndian));
}

/** @throws StillframeError where the drive is larger than offsets can be exact */
export function checkLength(path: string, length: number): void {
  // Half of what is exact, so that sums of two offsets are, too.
  if (length <= 2 ** 52) return;
  throw corrupt(path, `its header says that the drive has ${length} bytes, more than ${2 ** 52}`);
}

/**
 * Counts table entries that go on from one: `follows(i)` says whether the i-th entry after the first continues it.
 *
 * @returns 1 to `most`
 */
export function runLength(most: number, follows: (distance: number) => boolean): number {
  let count = 1;
  while (count < most && follows(count)) count++;
  return count;
}

/** Entries one call of {@link Locator.locate} looks at, at most: bounds its time. */
export const MAX_RUN = 16384;
