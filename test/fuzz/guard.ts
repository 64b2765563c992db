import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { resolve } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { zstd } from '#src/block/qcow2/zstd.js';
import type { Arena } from '#src/kernels/arena.js';

setFlagsFromString('--expose-gc');
const collect: () => void = runInNewContext('gc');

/** Most memory an execution may take at once, in bytes. */
export const MOST_BYTES = 256 * 1024 * 1024;
/** The bits of two dirty bitmaps, while they are merged, may be that many; the tables of the image come on top. */
const MOST_HELD = 2 * MOST_BYTES + 64 * 1024 * 1024;

/**
 * Watches what the code under test opens and how much memory it takes, in this thread. Whatever it does that it
 * must not do is kept as a text until it is asked for.
 */
export class Guard {
  readonly #arena: Arena;
  readonly #allowed: ReadonlySet<string>;
  readonly #sizes = new Map<number, number>();
  #used: number;
  readonly #first = process.memoryUsage.rss();
  #last = this.#first;
  #calls = 0;
  #held = 0;
  #open = 0;
  #watching = true;
  #offence: string | undefined;

  /** @param allowed absolute paths that may be opened */
  constructor(arena: Arena, allowed: ReadonlySet<string>) {
    this.#arena = arena;
    this.#allowed = allowed;
    this.#used = arena.usedBytes;
    // It reads its own code when it is first needed.
    zstd();
    this.#watchFiles();
    this.#watchArena();
  }

  #watchFiles(): void {
    const { openSync, closeSync } = fs;
    fs.openSync = (path, ...rest) => {
      if (!this.#watching) return openSync(path, ...rest);
      if (!this.#allowed.has(resolve(String(path)))) this.#offence ??= `opened '${String(path)}'`;
      const fd = openSync(path, ...rest);
      this.#open++;
      return fd;
    };
    fs.closeSync = (fd) => {
      closeSync(fd);
      if (this.#watching) this.#open--;
    };
    syncBuiltinESMExports();
  }

  #watchArena(): void {
    const arena = this.#arena;
    const alloc = arena.alloc.bind(arena);
    const free = arena.free.bind(arena);
    arena.alloc = (bytes, purpose) => {
      if (bytes > MOST_BYTES || bytes + this.#held > MOST_HELD) {
        this.#offence ??= `asked for ${bytes} bytes of ${purpose}, with ${this.#held} bytes taken already`;
      }
      const pointer = alloc(bytes, purpose);
      this.#held += bytes;
      this.#sizes.set(pointer, bytes);
      return pointer;
    };
    arena.free = (pointer) => {
      free(pointer);
      this.#held -= this.#sizes.get(pointer) ?? 0;
      this.#sizes.delete(pointer);
    };
  }

  /** Runs what is not under test. */
  unwatched<T>(body: () => T): T {
    this.#watching = false;
    try {
      return body();
    } finally {
      this.#watching = true;
    }
  }

  /** What was wrong since the last call, when nothing of the code under test is open any more. */
  offence(): string | undefined {
    const found =
      this.#offence ??
      (this.#open === 0 ? undefined : `left ${this.#open} files open`) ??
      (this.#arena.usedBytes === this.#used
        ? undefined
        : `left ${this.#arena.usedBytes - this.#used} bytes taken`) ??
      this.#resident();
    this.#offence = undefined;
    this.#open = 0;
    this.#used = this.#arena.usedBytes;
    return found;
  }

  #resident(): string | undefined {
    if (++this.#calls % 4 !== 0) return undefined;
    const last = this.#last;
    this.#last = process.memoryUsage.rss();
    if (this.#last - last > MOST_BYTES) return `the process grew by ${this.#last - last} bytes at once`;
    if (this.#last - this.#first <= MOST_BYTES) return undefined;
    // Much of it may be waiting to be collected.
    collect();
    this.#last = process.memoryUsage.rss();
    return this.#last - this.#first > 2 * MOST_BYTES
      ? `the process has grown by ${this.#last - this.#first} bytes`
      : undefined;
  }
}
