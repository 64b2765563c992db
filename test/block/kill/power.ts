import { readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { HostFile } from '#src/block/raw/file.js';
import type { Arena } from '#src/kernels/arena.js';

const SECTOR = 512;

/** What reached a file: bytes (undefined: zeroes) at `offset`, or another length of the file. */
export type Change = { readonly path: string } & (
  | {
      readonly kind: 'bytes';
      readonly offset: number;
      readonly length: number;
      readonly bytes: Uint8Array | undefined;
    }
  | { readonly kind: 'length'; readonly length: number }
);

interface Watched {
  /** What a power cut cannot take any more. */
  durable: Buffer;
  /** Since the last sync. */
  pending: Change[];
}

/**
 * Which changes reach the disk although they were not synced: a part of all sectors, in percent; the last change
 * alone; or all but one. The disk keeps no order.
 */
export type Survival =
  | { readonly kind: 'part'; readonly percent: number }
  | { readonly kind: 'last' }
  | { readonly kind: 'all-but'; readonly lost: number };

/** Stands between the driver and files, whoever opens them, and knows what a power cut would leave of them. */
export class Power {
  readonly #arena: Arena;
  readonly #files = new Map<string, Watched>();
  /** Called after every change: the moments at which the power may fail. */
  afterChange: (change: Change) => void = () => undefined;

  /** @param arena of the runtime that changes the files */
  constructor(arena: Arena) {
    this.#arena = arena;
  }

  /** Watches these files, which are durable as they are, instead of those before. */
  watch(paths: readonly string[]): void {
    this.#files.clear();
    for (const path of paths) this.#files.set(path, { durable: readFileSync(path), pending: [] });
  }

  /** Changes in all files since they were synced last. */
  get pending(): number {
    let count = 0;
    for (const { pending } of this.#files.values()) count += pending.length;
    return count;
  }

  /** Puts into `folder` what a cut leaves of each file, under its name. */
  cut(folder: string, survival: Survival, below: (limit: number) => number): void {
    const all = [...this.#files.values()].flatMap(({ pending }) => pending);
    const last = this.#last;
    const survives = (change: Change): boolean => {
      if (survival.kind === 'last') return change === last;
      if (survival.kind === 'all-but') return change !== all[survival.lost];
      return below(100) < survival.percent;
    };
    for (const [path, { durable, pending }] of this.#files) {
      writeFileSync(join(folder, basename(path)), left(durable, pending, survives));
    }
  }

  #last: Change | undefined;

  #changed(change: Change): void {
    this.#last = change;
    this.#files.get(change.path)?.pending.push(change);
    this.afterChange(change);
  }

  /** Calls `body` while the driver's files are watched. */
  during<T>(body: () => T): T {
    const driver = HostFile.prototype;
    const { write, writeZeroes, discard, preallocate, truncate, extend, flush } = driver;
    const watched = (file: HostFile): boolean => this.#files.has(file.descriptor.path);
    const arena = this.#arena;
    const bytes = (file: HostFile, offset: number, length: number, content?: Uint8Array): void => {
      if (length <= 0 || !watched(file)) return;
      this.#changed({ kind: 'bytes', path: file.descriptor.path, offset, length, bytes: content });
    };
    const lengthOf = (file: HostFile, before: number): void => {
      const { length } = file;
      if (length !== before && watched(file)) {
        this.#changed({ kind: 'length', path: file.descriptor.path, length });
      }
    };
    driver.write = function (this: HostFile, offset, pointer, length) {
      write.call(this, offset, pointer, length);
      bytes(this, offset, length, arena.copyOut(pointer, length));
    };
    driver.writeZeroes = function (this: HostFile, offset, length, mayUnmap) {
      writeZeroes.call(this, offset, length, mayUnmap);
      bytes(this, offset, length);
    };
    driver.discard = function (this: HostFile, offset, length) {
      discard.call(this, offset, length);
      bytes(this, offset, Math.min(length, this.length - offset));
    };
    driver.preallocate = function (this: HostFile, offset, length, mode) {
      preallocate.call(this, offset, length, mode);
      bytes(this, offset, length);
    };
    driver.truncate = function (this: HostFile, length) {
      const before = this.length;
      truncate.call(this, length);
      lengthOf(this, before);
    };
    driver.extend = function (this: HostFile, length) {
      const before = this.length;
      extend.call(this, length);
      lengthOf(this, before);
    };
    const synced = (file: HostFile): void => {
      const state = this.#files.get(file.descriptor.path);
      if (state === undefined) {
        flush.call(file);
        return;
      }
      // No need to bother the disk.
      state.durable = left(state.durable, state.pending, () => true);
      state.pending = [];
    };
    driver.flush = function (this: HostFile) {
      synced(this);
    };
    try {
      return body();
    } finally {
      Object.assign(driver, { write, writeZeroes, discard, preallocate, truncate, extend, flush });
    }
  }
}

/** A file after those sectors of the changes that survive have reached the disk. */
function left(durable: Buffer, changes: readonly Change[], survives: (change: Change) => boolean): Buffer {
  const ends = changes.map((change) => (change.kind === 'bytes' ? change.offset : 0) + change.length);
  const bytes = Buffer.alloc(Math.max(durable.length, ...ends));
  durable.copy(bytes);
  let length = durable.length;
  for (const change of changes) {
    if (change.kind === 'length') {
      if (!survives(change)) continue;
      bytes.fill(0, Math.min(length, change.length));
      length = change.length;
      continue;
    }
    const end = change.offset + change.length;
    for (let at = change.offset; at < end; ) {
      const stop = Math.min(end, at - (at % SECTOR) + SECTOR);
      if (survives(change)) {
        if (change.bytes) bytes.set(change.bytes.subarray(at - change.offset, stop - change.offset), at);
        else bytes.fill(0, at, stop);
        length = Math.max(length, stop);
      }
      at = stop;
    }
  }
  return bytes.subarray(0, length);
}
