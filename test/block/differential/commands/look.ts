import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Area, dirtyInQemu } from '../../../support/bitmaps.js';
import { run } from '../../../support/peers.js';
import type { MapLine } from '../../../support/qcow2/qemu.js';

interface Bitmap {
  readonly name: string;
  readonly flags: readonly string[];
}

interface Snapshot {
  readonly id: string;
  readonly name: string;
  readonly 'vm-state-size': number;
  readonly icount?: number;
}

interface SpecificInfo {
  readonly compat?: string;
  readonly bitmaps?: readonly Bitmap[];
  readonly 'data-file'?: string;
  readonly 'data-file-raw'?: boolean;
}

/** What `qemu-img info` says of an image, in the parts that are looked at here. */
export interface Info {
  readonly format: string;
  readonly 'virtual-size': number;
  readonly 'dirty-flag'?: boolean;
  readonly 'backing-filename'?: string;
  readonly snapshots?: readonly Snapshot[];
  readonly 'format-specific'?: { readonly data: SpecificInfo };
}

/** An image of one side as QEMU sees it. */
export class Look {
  readonly #folder: string;
  readonly #name: string;
  readonly info: Info;

  /** @param folder of the side, against which names are relative */
  constructor(folder: string, name: string) {
    this.#folder = folder;
    this.#name = name;
    const format = name.endsWith('.raw') ? 'raw' : 'qcow2';
    this.info = JSON.parse(this.#qemuImg(['info', '--output=json', '-f', format, name]));
  }

  /**
   * What is told of the image and does not depend on when it was made, and where. Not whether refcounts are to be put
   * right: QEMU does it before it refuses something, and we then leave the image alone.
   */
  description(): unknown {
    const { snapshots, ...rest } = this.info;
    const named = snapshots?.map(({ id, name, 'vm-state-size': size }) => ({ id, name, size }));
    return {
      ...rest,
      filename: '',
      'actual-size': 0,
      'dirty-flag': false,
      ...(named === undefined ? {} : { snapshots: named }),
    };
  }

  check(): Record<string, number> {
    // 3: leaked clusters, 2: damage, which are told with the rest.
    return JSON.parse(this.#qemuImg(['check', '--output=json', '-f', 'qcow2', this.#name], [0, 2, 3]));
  }

  map(): MapLine[] {
    return JSON.parse(this.#qemuImg(['map', '--output=json', '-f', this.info.format, this.#name]));
  }

  snapshots(): string[] {
    return (this.info.snapshots ?? []).map(({ name }) => name);
  }

  /** The path of its data file, where that is to be a raw image of the same content. */
  rawDataFile(): string | undefined {
    const { 'data-file': file, 'data-file-raw': isRaw } = this.info['format-specific']?.data ?? {};
    return isRaw === true && file !== undefined ? join(this.#folder, file) : undefined;
  }

  /** The dirty areas of every bitmap that can be read, by name. */
  bitmaps(): Map<string, Area[]> {
    const bitmaps = this.info['format-specific']?.data.bitmaps ?? [];
    const path = join(this.#folder, this.#name);
    return new Map(
      bitmaps.flatMap(({ name, flags }) =>
        flags.includes('in-use') ? [] : [[name, dirtyInQemu(path, name)]],
      ),
    );
  }

  /** What the image, or an internal snapshot of it, shows to a guest. @param scratch a file for it */
  content(scratch: string, snapshot?: string): Buffer {
    const options = snapshot === undefined ? [] : ['-l', snapshot];
    this.#qemuImg(['convert', '-f', this.info.format, '-O', 'raw', ...options, this.#name, scratch]);
    return readFileSync(scratch);
  }

  #qemuImg(args: readonly string[], allowed?: readonly number[]): string {
    return run('qemu-img', args, allowed, this.#folder);
  }
}
