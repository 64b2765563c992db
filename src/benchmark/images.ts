import { constants, copyFile, open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import type { Engine } from '../index.js';

const MiB = 1024 * 1024;
/** One of so many MiB is in the top image. */
const TOP_PART = 4;

/** Files of the drives that are measured, in a folder of their own. */
export class Images {
  readonly base: string;
  readonly drive: string;
  readonly target: string;
  readonly length: number;
  readonly #engine: Engine;
  readonly #fresh: string;

  private constructor(engine: Engine, folder: string, length: number) {
    this.#engine = engine;
    this.length = length;
    this.base = join(folder, 'base.raw');
    this.#fresh = join(folder, 'fresh.qcow2');
    this.drive = join(folder, 'drive.qcow2');
    this.target = join(folder, 'target.qcow2');
  }

  /** A base full of data, and a top image with a quarter of it anew. @param length bytes, of whole MiB */
  static async make(engine: Engine, folder: string, length: number): Promise<Images> {
    const images = new Images(engine, folder, length);
    const base = await open(images.base, 'wx');
    try {
      for (let offset = 0; offset < length; offset += MiB) await base.write(noise(), 0, MiB, offset);
    } finally {
      await base.close();
    }
    const fresh = images.#fresh;
    await engine.createImage(fresh, { format: 'qcow2', backingFile: images.base, backingFormat: 'raw' });
    const disk = await engine.openDisk(fresh, { format: 'qcow2' });
    try {
      for (let offset = 0; offset < length; offset += TOP_PART * MiB) await disk.write(offset, noise());
    } finally {
      await disk.close();
    }
    return images;
  }

  /** The drive as it was made. */
  async renewDrive(): Promise<void> {
    await rm(this.drive, { force: true });
    await copyFile(this.#fresh, this.drive, constants.COPYFILE_FICLONE);
  }

  /** An empty target. */
  async renewTarget(): Promise<void> {
    await rm(this.target, { force: true });
    await this.#engine.createImage(this.target, { format: 'qcow2', length: this.length });
  }
}

function noise(): Uint8Array {
  const words = new Uint32Array(MiB / 4);
  let state = Math.ceil(Math.random() * 0xffffffff);
  for (let index = 0; index < words.length; index++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[index] = state;
  }
  return new Uint8Array(words.buffer);
}
