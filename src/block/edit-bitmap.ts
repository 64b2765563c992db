import { type BitmapSet, bitmapNotFound } from '../bitmap/bitmap-set.js';
import { checkBitmap, type DirtyBitmap, defaultGranularity } from '../bitmap/dirty-bitmap.js';
import { StillframeError, toStillframeError } from '../errors.js';
import type { Runtime } from '../kernels/runtime.js';
import { closeNode, type OpenImageOptions, openForEditing, openImage } from './graph.js';
import type { Qcow2Descriptor } from './node.js';
import { bitmapsOf, loadBitmap, noBitmapsInVersion2, readBitmap } from './qcow2/index.js';
import { attachFile } from './raw/file.js';

/** One action of `qemu-img bitmap`. */
export type BitmapAction =
  /** A new bitmap, enabled and clean. `granularity` in bytes; default the cluster size, but from 4 KiB to 64 KiB. */
  | { readonly action: 'add'; readonly granularity?: number | undefined }
  | { readonly action: 'remove' | 'clear' | 'enable' | 'disable' }
  /** What is dirty in the bitmap `source` of the same image becomes dirty; or of another one. */
  | { readonly action: 'merge'; readonly source: string; readonly from?: BitmapSource | undefined };

/** An image a bitmap is merged from. */
export interface BitmapSource extends Pick<OpenImageOptions, 'format'> {
  readonly path: string;
}

/**
 * Carries the actions out one after the other on the bitmap `name` of an image. They reach the disk together, at the
 * end; where one fails, those before it still do.
 *
 * Semantics: `qemu-img bitmap`.
 *
 * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_EXISTS, …_BITMAP_INCONSISTENT, …_INVALID_ARGUMENT,
 *   …_SIZE_MISMATCH, …_UNSUPPORTED_FEATURE (the format has no bitmaps), …_NO_SPACE and what opening an image throws
 */
export function editBitmap(
  runtime: Runtime,
  path: string,
  name: string,
  actions: readonly BitmapAction[],
  options: Pick<OpenImageOptions, 'format'>,
): void {
  const image = openForEditing(runtime, path, options);
  try {
    for (const action of actions) {
      try {
        if (image.driver !== 'qcow2') {
          throw action.action === 'add' ? noBitmaps(path, image.driver) : bitmapNotFound(name);
        }
        new BitmapEditor(runtime, image).run(name, action);
      } catch (error) {
        const { code, message, errno } = toStillframeError(error);
        throw new StillframeError(code, `Operation ${action.action} on bitmap ${name} failed: ${message}`, {
          cause: error,
          errno,
        });
      }
    }
  } finally {
    closeNode(runtime, image);
  }
}

function noBitmaps(path: string, format: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
    `Can't store persistent bitmaps to '${path}': images of format ${format} have none; use format qcow2`,
  );
}

class BitmapEditor {
  readonly #runtime: Runtime;
  readonly #image: Qcow2Descriptor;
  readonly #bitmaps: BitmapSet;

  constructor(runtime: Runtime, image: Qcow2Descriptor) {
    this.#runtime = runtime;
    this.#image = image;
    this.#bitmaps = bitmapsOf(runtime, image);
  }

  run(name: string, action: BitmapAction): void {
    switch (action.action) {
      case 'add':
        this.#add(name, action.granularity);
        return;
      case 'remove':
        this.#bitmaps.remove(this.#bitmaps.get(name));
        return;
      case 'clear':
        this.#change(name, (bitmap) => bitmap.clear(0, bitmap.length));
        return;
      case 'enable':
      case 'disable':
        this.#change(name, (bitmap) => {
          bitmap.enabled = action.action === 'enable';
        });
        return;
      case 'merge':
        this.#change(name, (bitmap) => this.#merge(bitmap, action.source, action.from));
    }
  }

  #add(name: string, granularity = defaultGranularity(2 ** this.#image.clusterBits)): void {
    const { path, version, length } = this.#image;
    checkBitmap({ name, granularity, length });
    if (version === 2) {
      throw noBitmapsInVersion2(path);
    }
    if (length === 0) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `'${path}' has 0 bytes: there is nothing to record`,
      );
    }
    this.#bitmaps.add({ name, granularity, length, enabled: true, persistent: true }).makeBits();
  }

  #change(name: string, body: (bitmap: DirtyBitmap) => void): void {
    const bitmap = this.#bitmaps.get(name);
    this.#load(bitmap);
    body(bitmap);
    bitmap.changed = true;
  }

  #load(bitmap: DirtyBitmap): void {
    loadBitmap(this.#runtime, attachFile(this.#runtime, this.#image.file), bitmap);
  }

  #merge(bitmap: DirtyBitmap, name: string, from: BitmapSource | undefined): void {
    if (from === undefined) {
      const source = this.#bitmaps.get(name);
      this.#load(source);
      bitmap.merge(source);
      return;
    }
    const { path, format } = from;
    const image = openImage(this.#runtime, path, { format, readOnly: true, backing: false });
    try {
      if (image.driver !== 'qcow2') throw bitmapNotFound(name);
      const source = readBitmap(this.#runtime, attachFile(this.#runtime, image.file), name);
      try {
        bitmap.merge(source);
      } finally {
        source.free();
      }
    } finally {
      closeNode(this.#runtime, image);
    }
  }
}
