import { StillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import type { LockMode } from '../os/image-lock.js';
import { type ImageFormat, imagePath, openStorage, probe } from './graph.js';
import { checkQcow2, type Qcow2Check, type RepairMode } from './qcow2/index.js';
import { attachFile, closeFile } from './raw/file.js';

/**
 * What `qemu-img check --output=json` says of an image, with its field names. What is 0 is absent, as there, but for
 * the number of check errors. Offsets are bytes.
 */
export interface ImageCheck {
  /** Where the last cluster in use ends. */
  readonly 'image-end-offset'?: number;
  readonly 'compressed-clusters'?: number;
  /** Clusters the guest sees. */
  readonly 'total-clusters'?: number;
  /** Damage that is there now. */
  readonly corruptions?: number;
  readonly 'corruptions-fixed'?: number;
  /** Things that could not be looked at or written. */
  readonly 'check-errors': number;
  /** Clusters that take space in the file for nothing. */
  readonly leaks?: number;
  readonly 'leaks-fixed'?: number;
  readonly 'allocated-clusters'?: number;
  /** The name the caller gave. */
  readonly filename: string;
  readonly format: ImageFormat;
  /** Allocated clusters that are not behind their neighbour in the file. */
  readonly 'fragmented-clusters'?: number;
}

/** What a repair did before it looked again. */
export interface Repaired {
  readonly leaks: number;
  readonly corruptions: number;
}

export interface CheckImageOptions {
  /** Probed from the first bytes when absent. */
  readonly format?: ImageFormat | undefined;
  /** Default: as others may read it, or with `repair` as only we may use it. */
  readonly lock?: LockMode | undefined;
  readonly repair?: RepairMode | undefined;
  /** Takes the lines that say what is wrong or repaired, as they come. */
  readonly onMessage: (line: string) => void;
  /** Called once something was repaired; the image is checked again then. */
  readonly onRepaired: (repaired: Repaired) => void;
}

/**
 * Checks the metadata of an image, like `qemu-img check`, and repairs it where asked to. No other file is opened.
 *
 * @param filename the name the caller gave
 * @returns what is wrong still
 * @throws StillframeError ERR_STILLFRAME_CHECK_UNSUPPORTED for formats without metadata, …_CORRUPT_IMAGE where the
 *   image is too damaged to be checked or needs more repair than was asked for, and what opening it throws
 */
export function checkImage(runtime: Runtime, filename: string, options: CheckImageOptions): ImageCheck {
  const { repair, onMessage, onRepaired } = options;
  const readOnly = repair === undefined;
  const lock = options.lock ?? (readOnly ? 'read' : 'write');
  const descriptor = openStorage(runtime, imagePath(filename), { readOnly, lock });
  try {
    const file = attachFile(runtime, descriptor);
    const format = options.format ?? probe(file);
    if (format !== 'qcow2') {
      throw new StillframeError(
        'ERR_STILLFRAME_CHECK_UNSUPPORTED',
        `'${filename}' has format ${format}: This image format does not support checks`,
      );
    }
    const first = checkQcow2(runtime, file, repair, onMessage);
    if (first.leaksFixed + first.corruptionsFixed === 0) return describe(filename, first);
    onRepaired({ leaks: first.leaksFixed, corruptions: first.corruptionsFixed });
    const { leaksFixed, corruptionsFixed } = first;
    const again = checkQcow2(runtime, file, undefined, onMessage);
    return describe(filename, { ...again, leaksFixed, corruptionsFixed });
  } finally {
    closeFile(runtime, descriptor);
  }
}

function describe(filename: string, check: Qcow2Check): ImageCheck {
  const some = <Key extends string>(key: Key, value: number) =>
    value === 0 ? {} : ({ [key]: value } as { readonly [K in Key]?: number });
  return {
    ...some('image-end-offset', check.imageEndOffset),
    ...some('compressed-clusters', check.totals.compressed),
    ...some('total-clusters', check.totalClusters),
    ...some('corruptions', check.corruptions),
    ...some('corruptions-fixed', check.corruptionsFixed),
    'check-errors': check.errors,
    ...some('leaks', check.leaks),
    ...some('leaks-fixed', check.leaksFixed),
    ...some('allocated-clusters', check.totals.allocated),
    filename,
    format: 'qcow2',
    ...some('fragmented-clusters', check.totals.fragmented),
  };
}
