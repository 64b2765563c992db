import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { type CreationOptions, checkCreation } from './create.js';
import { attachNode, closeNode, type OpenImageOptions, openImage, type TargetFormat } from './graph.js';
import { type BlockNode, type NodeDescriptor, STATUS_ALLOCATED, STATUS_DATA, STATUS_ZERO } from './node.js';
import { planLayout, readBitmaps, readHeader } from './qcow2/index.js';
import { attachFile } from './raw/file.js';
import { chainStatus } from './status.js';

export interface MeasureOptions {
  /** Format of the image that is to be made. Default `raw`, as in qemu-img. */
  readonly format?: TargetFormat | undefined;
  readonly creation?: CreationOptions | undefined;
  /** It is to have a backing file: nobody knows then how much of the source goes into it. Default false. */
  readonly hasBacking?: boolean | undefined;
}

/** Sizes of files in bytes, under the names of `qemu-img measure --output=json`. */
export interface Measure {
  /** Dirty bitmaps of the source that can be copied; absent where source or new image cannot have any. */
  readonly bitmaps?: number;
  /** The new image when what the source holds is in it. */
  readonly required: number;
  /** The new image when all of it is written to. */
  readonly 'fully-allocated': number;
}

/** What is measured: a drive of so many bytes, or an image. */
export type Measured =
  | { readonly length: number }
  | { readonly path: string; readonly options: Omit<OpenImageOptions, 'readOnly'> };

const SECTOR = 512;

/**
 * How large the file of a new image will be. Semantics: `qemu-img measure`.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT and what opening an image throws
 */
export function measureImage(runtime: Runtime, measured: Measured, options: MeasureOptions): Measure {
  if ('length' in measured) return measureDrive(measured.length, undefined, options);
  const source = openImage(runtime, measured.path, { ...measured.options, readOnly: true });
  try {
    const { length } = source;
    const result = measureDrive(length, attachNode(runtime, source), options);
    const bitmaps = bitmapBytes(runtime, source, options);
    return bitmaps === undefined ? result : { bitmaps, ...result };
  } finally {
    closeNode(runtime, source);
  }
}

function roundUp(bytes: number, unit: number): number {
  return Math.ceil(bytes / unit) * unit;
}

function clusterSizeOf({ creation }: MeasureOptions): number {
  return creation?.clusterSize ?? 65536;
}

function measureDrive(bytes: number, source: BlockNode | undefined, options: MeasureOptions): Measure {
  const { format = 'raw', creation = {} } = options;
  const length = roundUp(bytes, SECTOR);
  checkCreation('the new image', length, { ...creation, format });
  if (format === 'raw') return { required: length, 'fully-allocated': length };
  const clusterSize = clusterSizeOf(options);
  const whole = roundUp(length, clusterSize);
  const { clusters } = planLayout({
    length,
    clusterSize,
    refcountBits: creation.refcountBits ?? 16,
    extendedL2: creation.extendedL2 ?? false,
    tables: true,
    data: true,
  });
  const full = clusters * clusterSize;
  if (!Number.isSafeInteger(full)) {
    throw new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      'The image size is too large (try using a larger cluster size)',
    );
  }
  const { preallocation = 'off' } = creation;
  const all = options.hasBacking === true || preallocation === 'falloc' || preallocation === 'full';
  const data = all ? whole : source === undefined ? 0 : dataBytes(source, clusterSize);
  return { required: full - whole + data, 'fully-allocated': full };
}

/** Bytes of the clusters that data would be in. */
function dataBytes(node: BlockNode, clusterSize: number): number {
  const held = STATUS_DATA | STATUS_ALLOCATED;
  let bytes = 0;
  for (let offset = 0; offset < node.length; ) {
    const { flags, length } = chainStatus(node, offset, node.length - offset);
    let end = offset + length;
    if ((flags & STATUS_ZERO) === 0 && (flags & held) === held) {
      end = roundUp(end, clusterSize);
      bytes += end - (offset - (offset % clusterSize));
    }
    offset = end;
  }
  return bytes;
}

/** What the bitmaps of the source would take in the new image. */
function bitmapBytes(runtime: Runtime, source: NodeDescriptor, options: MeasureOptions): number | undefined {
  const { format, creation } = options;
  if (format !== 'qcow2' || creation?.version === 2) return undefined;
  if (source.driver !== 'qcow2' || source.version < 3) return undefined;
  const clusterSize = clusterSizeOf(options);
  const file = attachFile(runtime, source.file);
  const header = readHeader(runtime, file);
  let bytes = 0;
  let directory = 0;
  for (const { name, granularity, flags } of readBitmaps(file, header)) {
    if (flags.includes('in-use')) continue;
    const clusters = Math.ceil(Math.ceil(Math.ceil(header.length / granularity) / 8) / clusterSize);
    bytes += clusters * clusterSize + roundUp(clusters * 8, clusterSize);
    directory += roundUp(ENTRY_BYTES + Buffer.byteLength(name), 8);
  }
  return bytes + roundUp(directory, clusterSize);
}

/** Of an entry of the bitmap directory, in front of its name. */
const ENTRY_BYTES = 24;
