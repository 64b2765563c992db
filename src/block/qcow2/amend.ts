import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type { BlockNode, Qcow2Descriptor } from '../node.js';
import { attachFile, type FileNode } from '../raw/file.js';
import { expandZeroClusters, hasCompressedClusters } from './all-tables.js';
import { bitmapsOf } from './bitmaps.js';
import {
  AUTOCLEAR_DATA_FILE_RAW,
  COMPATIBLE_LAZY_REFCOUNTS,
  type Qcow2Header,
  readHeader,
} from './header.js';
import { rewriteHeader, type Wording } from './header-write.js';
import { readSnapshots } from './listings.js';
import { Metadata } from './metadata.js';
import { closeQcow2, openQcow2 } from './open.js';
import { changeRefcountWidth } from './refcount-width.js';
import { resizeQcow2 } from './resize.js';
import { completeSnapshots } from './snapshots.js';

/** What of an image is to be something else; what is absent stays as it is. */
export interface AmendQcow2Options {
  /** Version of the format: 2 (compat 0.10) or 3 (1.1). */
  readonly version?: 2 | 3 | undefined;
  /** Virtual size in bytes, a multiple of 512; what is behind a smaller one is lost. 0: as it is. */
  readonly length?: number | undefined;
  /** The image must name it already: backing files are changed by a rebase. */
  readonly backingFile?: string | undefined;
  readonly backingFormat?: string | undefined;
  /** Name of the external data file, written into the header as it is and not opened; '' takes the name out. */
  readonly dataFile?: string | undefined;
  /** Whether the data file alone is kept valid as a raw image: it can be given up, not begun. */
  readonly dataFileRaw?: boolean | undefined;
  readonly lazyRefcounts?: boolean | undefined;
  /** Width of a refcount in bits: 1, 2, 4 … 64. */
  readonly refcountBits?: number | undefined;
}

/** Sizes of the machine's state that fit into an entry of version 2. */
const MOST_STATE_BYTES = 2 ** 32 - 1;

/**
 * Changes what can be changed of an open, writable image that nobody else uses. What cannot be done is refused before
 * anything is written, but for refcounts that do not fit, which are found when they are looked at. Each change is made by one
 * write into the header's first sector, once all that it relies on is durable: an interruption leaves an image that has
 * some of the changes, and leaked clusters at worst.
 *
 * Version 2 has no dirty bitmaps: an image loses those it has.
 *
 * The state of the descriptor is used up, whatever happens; its files stay open.
 *
 * Semantics: QEMU's `qcow2_amend_options`.
 *
 * @param backing needed where the image becomes larger
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_UNSUPPORTED_FEATURE (features that version 2 does not have),
 *   …_NO_SPACE, …_ARENA_EXHAUSTED, …_CORRUPT_IMAGE, …_IO
 */
export function amendQcow2(
  runtime: Runtime,
  image: Qcow2Descriptor,
  backing: BlockNode | undefined,
  options: AmendQcow2Options,
  file = attachFile(runtime, image.file),
): void {
  const amendment = new Amendment(runtime, image, options, file);
  try {
    amendment.check();
    amendment.upgrade();
    amendment.changeRefcounts();
    amendment.changeWords();
    amendment.resize(backing);
    amendment.downgrade();
  } finally {
    amendment.close();
  }
}

class Amendment {
  readonly #runtime: Runtime;
  readonly #image: Qcow2Descriptor;
  readonly #options: AmendQcow2Options;
  readonly #file: FileNode;
  #state: Qcow2Descriptor | undefined;

  constructor(runtime: Runtime, image: Qcow2Descriptor, options: AmendQcow2Options, file: FileNode) {
    this.#runtime = runtime;
    this.#image = image;
    this.#options = options;
    this.#file = file;
    this.#state = image;
  }

  /** The image has no state afterwards, and everything is in the file. */
  close(): void {
    const state = this.#state;
    this.#state = undefined;
    if (state !== undefined) closeQcow2(this.#runtime, state, this.#file);
  }

  get #opened(): Qcow2Descriptor {
    const { file, backing, dataFile } = this.#image;
    this.#state ??= openQcow2(this.#runtime, file, backing, {
      readOnly: false,
      dataFile,
      recordDirty: false,
    });
    return this.#state;
  }

  get #metadata(): Metadata {
    const { dataFile } = this.#image;
    return new Metadata(
      this.#runtime,
      this.#opened,
      this.#file,
      dataFile && attachFile(this.#runtime, dataFile),
    );
  }

  get #header(): Qcow2Header {
    return readHeader(this.#runtime, this.#file);
  }

  check(): void {
    const header = this.#header;
    const { refcountBits = header.refcountBits, length = 0, version = header.version } = this.#options;
    const { dataFile, dataFileRaw, lazyRefcounts, backingFile, backingFormat } = this.#options;
    if (![2, 3].includes(version)) throw this.#bad(`there are the versions 2 and 3, not ${version}`);
    if (![1, 2, 4, 8, 16, 32, 64].includes(refcountBits)) {
      throw this.#bad(`refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not ${refcountBits}`);
    }
    if (dataFile !== undefined && !header.hasDataFile) {
      throw this.#bad('only an image that has an external data file can be given the name of another one');
    }
    if (dataFileRaw === true && !header.dataFileRaw) {
      throw this.#bad('its data file can be promised to be a raw image (data_file_raw) when it is made only');
    }
    if (version === 2 && refcountBits !== 16) {
      throw this.#bad(`refcounts of ${refcountBits} bits need version 3 (compat=1.1)`);
    }
    if (version === 2 && lazyRefcounts === true)
      throw this.#bad('lazy refcounts need version 3 (compat=1.1)');
    const others =
      (backingFile !== undefined && backingFile !== header.backingFile) ||
      (backingFormat !== undefined && backingFormat !== header.backingFormat);
    if (others) throw this.#bad("its backing file can be changed by 'rebase' only");
    if (!Number.isSafeInteger(length) || length < 0 || length % 512 !== 0) {
      throw this.#bad('The new size must be a multiple of 512');
    }
    if (version < header.version) this.#checkDowngrade(header, length === 0 ? header.length : length);
    const metadata = this.#metadata;
    metadata.state.withLock(() => metadata.clearAutoclear());
  }

  #checkDowngrade(header: Qcow2Header, length: number): void {
    const no = (what: string): StillframeError =>
      new StillframeError(
        'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
        `'${this.#image.path}' cannot be given version 2 (compat=0.10): ${what}`,
      );
    if (header.hasDataFile) throw no('its data is in an external data file');
    if (header.extendedL2) throw no('its clusters have subclusters (extended_l2)');
    for (const { info, length: before } of readSnapshots(this.#runtime, this.#file, header)) {
      if (before !== length) {
        throw no(`snapshot '${info.name}' has a disk of ${before} bytes, not of ${length} as the image`);
      }
      if (info['vm-state-size'] > MOST_STATE_BYTES) {
        throw no(`snapshot '${info.name}' has a machine state of ${info['vm-state-size']} bytes`);
      }
    }
    if (header.compressionType !== 0 && hasCompressedClusters(this.#runtime, this.#opened, this.#file)) {
      throw no('it has clusters that are compressed by zstd');
    }
  }

  upgrade(): void {
    if ((this.#options.version ?? 2) <= this.#header.version) return;
    completeSnapshots(this.#runtime, this.#opened, this.#file);
    this.#rewrite({ version: 3 });
  }

  changeRefcounts(): void {
    const { refcountBits } = this.#options;
    if (refcountBits === undefined || refcountBits === this.#header.refcountBits) return;
    this.close();
    const old = changeRefcountWidth(this.#runtime, this.#file, refcountBits);
    const metadata = this.#metadata;
    metadata.state.withLock(() => {
      for (const run of old) metadata.lower(run);
    });
  }

  /** What is nothing but said in the header. */
  changeWords(): void {
    const { dataFile, dataFileRaw, lazyRefcounts } = this.#options;
    const { compatibleFeatures, autoclearFeatures, version, ...header } = this.#header;
    if (version === 2) return;
    const isLazy = lazyRefcounts ?? header.lazyRefcounts;
    const isRaw = dataFileRaw ?? header.dataFileRaw;
    const words = {
      dataFile: dataFile === undefined ? header.dataFile : dataFile === '' ? undefined : dataFile,
      compatibleFeatures: flagged(compatibleFeatures, COMPATIBLE_LAZY_REFCOUNTS, isLazy),
      autoclearFeatures: flagged(autoclearFeatures, AUTOCLEAR_DATA_FILE_RAW, isRaw),
    };
    const isNew =
      words.dataFile !== header.dataFile ||
      words.compatibleFeatures !== compatibleFeatures ||
      words.autoclearFeatures !== autoclearFeatures;
    if (isNew) this.#rewrite(words);
  }

  resize(backing: BlockNode | undefined): void {
    const { length = 0 } = this.#options;
    if (length === 0 || length === this.#header.length) return;
    const image = this.#opened;
    this.#state = undefined;
    resizeQcow2(this.#runtime, image, backing, { length, preallocation: 'off' });
  }

  downgrade(): void {
    const { version = 3 } = this.#options;
    if (version >= this.#header.version) return;
    bitmapsOf(this.#runtime, this.#opened).free();
    this.close();
    expandZeroClusters(this.#runtime, this.#opened, this.#file);
    this.#rewrite({ version, compressionType: 0 });
  }

  /** The state does not know of what is written. */
  #rewrite(words: Partial<Wording>): void {
    this.close();
    rewriteHeader(this.#runtime, this.#file, words);
  }

  #bad(what: string): StillframeError {
    return new StillframeError(
      'ERR_STILLFRAME_INVALID_ARGUMENT',
      `cannot amend '${this.#image.path}': ${what}`,
    );
  }
}

function flagged(features: bigint, flag: bigint, isSet: boolean): bigint {
  return isSet ? features | flag : features & ~flag;
}
