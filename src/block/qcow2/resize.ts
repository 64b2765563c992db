import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, Qcow2Descriptor } from '../node.js';
import { attachFile, type FileNode } from '../raw/file.js';
import { resizeBitmaps } from './bitmaps.js';
import type { Preallocation } from './create.js';
import { MAX_L1_BYTES, type Qcow2Header, readHeader } from './header.js';
import { type Layout, writeLayout } from './header-write.js';
import { Metadata } from './metadata.js';
import { bareNode, closeQcow2, openQcow2 } from './open.js';

export interface ResizeQcow2Options {
  /** Virtual size in bytes, a multiple of 512. */
  readonly length: number;
  /** Of what is new, where the image grows. */
  readonly preallocation: Preallocation;
}

/**
 * Resizes an open, writable image that nobody else uses; what is new reads as zeroes. The size in the header changes
 * with one write, once everything it relies on is durable: before it the image is what it was, after it what it is
 * to be. An interruption leaves leaked clusters at worst, and dirty bitmaps that are inconsistent.
 *
 * The state of the descriptor is used up, whatever happens; its files stay open.
 *
 * Semantics: QEMU's `qcow2_co_truncate`.
 *
 * @throws StillframeError ERR_STILLFRAME_UNSUPPORTED_FEATURE (snapshots of version 2), …_BITMAP_INCONSISTENT,
 *   …_INVALID_ARGUMENT (a size the cluster size does not allow), …_NO_SPACE, …_IO, …_CORRUPT_IMAGE
 */
export function resizeQcow2(
  runtime: Runtime,
  image: Qcow2Descriptor,
  backing: BlockNode | undefined,
  options: ResizeQcow2Options,
): void {
  const resizer = new Resizer(runtime, image, backing, options.length);
  if (options.length < image.length) resizer.shrink();
  else resizer.grow(options.preallocation);
}

class Resizer {
  readonly #runtime: Runtime;
  readonly #image: Qcow2Descriptor;
  readonly #backing: BlockNode | undefined;
  readonly #length: number;
  readonly #file: FileNode;
  readonly #dataFile: FileNode | undefined;
  #open: Qcow2Descriptor | undefined;

  constructor(runtime: Runtime, image: Qcow2Descriptor, backing: BlockNode | undefined, length: number) {
    this.#runtime = runtime;
    this.#image = image;
    this.#backing = backing;
    this.#length = length;
    this.#file = attachFile(runtime, image.file);
    this.#dataFile = image.dataFile && attachFile(runtime, image.dataFile);
    this.#open = image;
  }

  grow(preallocation: Preallocation): void {
    const length = this.#length;
    const header = this.#with(undefined, (_, metadata) => {
      const header = this.#begin(metadata);
      const entries = l1EntriesOf(header, length);
      return entries > header.l1Size ? this.#moveL1(metadata, header, entries) : header;
    });
    const layout = { ...layoutOf(header), length };
    if (this.#dataFile?.fixedLength === false) {
      // What somebody may have put behind the end is not part of the drive.
      this.#dataFile.truncate(header.length);
      this.#dataFile.truncate(length);
    }
    this.#with(layout, (descriptor, metadata) => {
      resizeBitmaps(this.#runtime, descriptor, this.#file, metadata, length, () => {
        const node = bareNode(this.#runtime, descriptor, this.#backing);
        const lastEnd = Math.ceil(header.length / header.clusterSize) * header.clusterSize;
        // Whoever reads a raw data file alone takes each of its clusters for one of the drive.
        const mode = header.dataFileRaw && preallocation === 'off' ? 'metadata' : preallocation;
        if (mode !== 'off') node.preallocate(header.length, mode);
        const below = this.#backing?.length ?? 0;
        if (below > header.length) {
          // All that is new hides the longer backing file, as with QEMU; version 2 can do that only by data.
          const end = header.version === 2 ? Math.min(length, below) : length;
          node.writeZeroes(header.length, end - header.length, false);
        } else {
          this.#zeroTail(node, header.length, Math.min(length, lastEnd));
        }
        node.flush();
        writeLayout(this.#runtime, this.#file, layout);
      });
    });
  }

  /** Zeroes what is behind the end of the drive in its last cluster, left there when the drive became shorter. */
  #zeroTail(node: BlockNode, from: number, to: number): void {
    if (from >= to) return;
    const { arena, kernels } = this.#runtime;
    const pointer = arena.alloc(to - from, 'end of the drive');
    try {
      node.read(from, pointer, to - from);
      if (!kernels.isZero(pointer, to - from)) node.writeZeroes(from, to - from, false);
    } finally {
      arena.free(pointer);
    }
  }

  shrink(): void {
    const length = this.#length;
    this.#with(undefined, (descriptor, metadata) => {
      const header = this.#begin(metadata);
      resizeBitmaps(this.#runtime, descriptor, this.#file, metadata, length, () => {
        bareNode(this.#runtime, descriptor, this.#backing).cutTo(length);
        writeLayout(this.#runtime, this.#file, { ...layoutOf(header), length });
      });
    });
    if (this.#dataFile?.fixedLength === false) this.#dataFile.truncate(length);
    const end = this.#with(undefined, (_, metadata) => metadata.state.withLock(() => metadata.usedEnd()));
    if (!this.#file.fixedLength && end < this.#file.length) this.#file.truncate(end);
  }

  /** Runs something on the image, opened with this layout instead of the header's, and closes it. */
  #with<T>(layout: Layout | undefined, body: (descriptor: Qcow2Descriptor, metadata: Metadata) => T): T {
    const { file, backing, dataFile } = this.#image;
    const options = { readOnly: false, dataFile, layout, recordDirty: false };
    const descriptor = this.#open ?? openQcow2(this.#runtime, file, backing, options);
    this.#open = undefined;
    try {
      return body(descriptor, new Metadata(this.#runtime, descriptor, this.#file, this.#dataFile));
    } finally {
      closeQcow2(this.#runtime, descriptor, this.#file);
    }
  }

  /** The header, once it is known that the image can be resized. */
  #begin(metadata: Metadata): Qcow2Header {
    const header = readHeader(this.#runtime, this.#file);
    const no = (code: 'UNSUPPORTED_FEATURE' | 'INVALID_ARGUMENT', what: string): StillframeError =>
      new StillframeError(`ERR_STILLFRAME_${code}`, `cannot resize '${this.#image.path}': ${what}`);
    if (this.#length % 512 !== 0) throw no('INVALID_ARGUMENT', 'The new size must be a multiple of 512');
    if (header.snapshotCount > 0 && header.version === 2) {
      throw no('UNSUPPORTED_FEATURE', "Can't resize a v2 image which has snapshots");
    }
    if (l1EntriesOf(header, this.#length) * 8 > MAX_L1_BYTES) {
      const clusters = `clusters of ${header.clusterSize} bytes`;
      throw no(
        'INVALID_ARGUMENT',
        `${this.#length} bytes are too many for ${clusters}; copy it to an image with larger ones`,
      );
    }
    metadata.state.withLock(() => metadata.clearAutoclear());
    return header;
  }

  /**
   * Gives the drive as it is a larger L1 table in another place. The state, which knows the old one, must not change it
   * any more.
   */
  #moveL1(metadata: Metadata, header: Qcow2Header, l1Size: number): Qcow2Header {
    const { arena } = this.#runtime;
    const clusters = Math.ceil((l1Size * 8) / header.clusterSize);
    const l1TableOffset = metadata.state.withLock(() => metadata.allocateRow(clusters));
    const bytes = clusters * header.clusterSize;
    const pointer = arena.alloc(bytes, 'L1 table');
    try {
      this.#file.read(header.l1TableOffset, pointer, header.l1Size * 8);
      arena.u8.fill(0, pointer + header.l1Size * 8, pointer + bytes);
      this.#file.write(l1TableOffset, pointer, bytes);
    } finally {
      arena.free(pointer);
    }
    metadata.flush();
    const moved = { ...header, l1Size, l1TableOffset };
    writeLayout(this.#runtime, this.#file, moved);
    metadata.state.withLock(() =>
      metadata.lower({
        offset: header.l1TableOffset,
        clusters: Math.ceil((header.l1Size * 8) / header.clusterSize),
      }),
    );
    return moved;
  }
}

function layoutOf({ length, l1Size, l1TableOffset }: Qcow2Header): Layout {
  return { length, l1Size, l1TableOffset };
}

/** Entries of the L1 table that a drive of `length` bytes needs. */
function l1EntriesOf(header: Qcow2Header, length: number): number {
  const perTable = header.clusterSize / (header.extendedL2 ? 16 : 8);
  return Math.ceil(length / header.clusterSize / perTable);
}
