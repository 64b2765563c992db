/**
 * A file system in the simulated world, put beneath the production code in place of `node:fs` and the system
 * calls: every call is a step, what was not synced may be lost, torn or reordered by a power cut, and calls fail,
 * fall short or are slow as the scenario says.
 */
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { syscalls } from '#src/os/index.js';
import { FILE, NAMES, READ, type World, WRITE } from './world.js';

/** Every simulated file is in this folder. */
export const FOLDER = '/simulated';

const INODES = 12;
/** Bytes a file may have. */
const CAPACITY = 12 << 20;
const PAGE = 4096;
const PAGES = CAPACITY / PAGE;
const SECTOR = 512;
const FDS = 64;
const FIRST_FD = 1 << 20;
const FOLDER_INODE = -2;
const LOG_ENTRIES = 16384;
const LOG_BYTES = 24 << 20;
const NAMES_BYTES = 65536;

// Words of the shared memory, then the areas behind them.
const FD_AT = 0;
const LOG_COUNT = FDS * 2;
const LOG_USED = LOG_COUNT + 1;
const NAMES_LENGTH = LOG_COUNT + 2;
const SYNCS = LOG_COUNT + 3;
const COUNTS = LOG_COUNT + 4;
const INODE_AT = 256;
const INODE_WORDS = 8;
const LOG_AT = 512;
const LOG_WORDS = 4;
const PAGES_AT = (LOG_AT + LOG_ENTRIES * LOG_WORDS) * 4;
const NAMES_AT = PAGES_AT + INODES * PAGES;
const LOG_DATA_AT = NAMES_AT + NAMES_BYTES;
const CONTENT_AT = LOG_DATA_AT + LOG_BYTES;
const FILES_BYTES = CONTENT_AT + INODES * 2 * CAPACITY;

const Inode = { Used: 0, Length: 1, DurableLength: 2, Dirty: 3, HighWater: 4, Target: 5 } as const;

export type FaultClass =
  | 'source-read'
  | 'source-write'
  | 'source-sync'
  | 'target-read'
  | 'target-write'
  | 'target-sync'
  | 'names';

const CLASSES: readonly FaultClass[] = [
  'source-read',
  'source-write',
  'source-sync',
  'target-read',
  'target-write',
  'target-sync',
  'names',
];

export interface Fault {
  readonly on: FaultClass;
  /** The first call of the class that fails, counted from 0. */
  readonly nth: number;
  /** How many fail from there on. */
  readonly count: number;
  readonly code: 'EIO' | 'ENOSPC' | 'short' | 'slow';
}

export interface SavedFiles {
  readonly words: Int32Array;
  readonly names: string;
  readonly pages: readonly {
    readonly inode: number;
    readonly page: number;
    readonly state: number;
    readonly content: Uint8Array;
    readonly durable: Uint8Array;
  }[];
}

interface Names {
  /** The folder as it is. */
  now: Record<string, number>;
  /** The folder after each change since its last sync, the synced one first. */
  history: Record<string, number>[];
}

const ERRNO = { EIO: -5, ENOENT: -2, EEXIST: -17, ENOSPC: -28, EBADF: -9, ENXIO: -6 } as const;

function systemError(code: keyof typeof ERRNO, syscall: string): Error {
  return Object.assign(new Error(`${code}: simulated, ${syscall}`), { code, errno: ERRNO[code], syscall });
}

export function makeFilesMemory(): SharedArrayBuffer {
  return new SharedArrayBuffer(FILES_BYTES);
}

export class Files {
  faults: readonly Fault[] = [];
  /** The world ends before this sync is done, counted from 1; 0: it does not. */
  endAtSync = 0;
  readonly #world: World;
  readonly #words: Int32Array;
  readonly #bytes: Uint8Array;
  /** Called when a name comes to stand for another file, with both paths. */
  onRename: (from: string, to: string) => void = () => undefined;

  /** Called with what a read gave, while a run is explored. */
  onRead: (inode: number, buffer: Uint8Array, offset: number, length: number) => void = () => undefined;

  constructor(memory: SharedArrayBuffer, world: World) {
    this.#world = world;
    this.#words = new Int32Array(memory, 0, PAGES_AT / 4);
    this.#bytes = new Uint8Array(memory);
  }

  /** Takes everything away. */
  clear(): void {
    for (let inode = 0; inode < INODES; inode++) this.#forget(inode);
    this.#words.fill(0, 0, LOG_AT);
    this.#setNames({ now: {}, history: [{}] });
  }

  #forget(inode: number): void {
    const at = INODE_AT + inode * INODE_WORDS;
    const high = this.#words[at + Inode.HighWater] ?? 0;
    const content = this.#content(inode);
    const durable = this.#durable(inode);
    const pages = PAGES_AT + inode * PAGES;
    for (let page = 0; page * PAGE < high; page++) {
      if (this.#bytes[pages + page] === 0) continue;
      this.#bytes.fill(0, content + page * PAGE, content + (page + 1) * PAGE);
      this.#bytes.fill(0, durable + page * PAGE, durable + (page + 1) * PAGE);
      this.#bytes[pages + page] = 0;
    }
    this.#words.fill(0, at, at + INODE_WORDS);
  }

  // ---- Below: what the code calls -----------------------------------------------------------------------------

  openSync(path: string, flags: string | number): number {
    if (flags === 'r' && path.startsWith(FOLDER) && this.#inodeOf(path) === undefined) {
      return this.#newFd(FOLDER_INODE);
    }
    const create = typeof flags === 'number' && (flags & fs.constants.O_CREAT) !== 0;
    this.#nameStep('open', !create);
    const names = this.#names();
    let inode = names.now[path];
    if (inode !== undefined && create && (Number(flags) & fs.constants.O_EXCL) !== 0) {
      throw systemError('EEXIST', 'open');
    }
    if (inode === undefined) {
      if (!create) throw systemError('ENOENT', 'open');
      inode = this.#newInode(path);
      this.#rename(names, (now) => {
        now[path] = inode ?? 0;
      });
    }
    return this.#newFd(inode);
  }

  closeSync(fd: number): void {
    this.#fdInode(fd, 'close');
    this.#words[FD_AT + (fd - FIRST_FD)] = 0;
  }

  readSync(fd: number, buffer: Uint8Array, offset: number, length: number, position: number): number {
    const inode = this.#fdInode(fd, 'read');
    const wanted = this.#io('read', inode, READ, position, length);
    return this.#inParts(inode, READ, position, wanted, (at, bytes) => {
      const got = Math.max(0, Math.min(bytes, this.#length(inode) - at));
      const from = this.#content(inode) + at;
      buffer.set(this.#bytes.subarray(from, from + got), offset + (at - position));
      if (this.#world.exploring && this.#world.running) this.onRead(inode, buffer, offset, got);
      return got;
    });
  }

  writeSync(fd: number, buffer: Uint8Array, offset: number, length: number, position: number): number {
    const inode = this.#fdInode(fd, 'write');
    if (position + length > CAPACITY) throw systemError('ENOSPC', 'write');
    const wanted = this.#io('write', inode, WRITE, position, length);
    return this.#inParts(inode, WRITE, position, wanted, (at, bytes) => {
      const from = offset + (at - position);
      const data = buffer.subarray(from, from + bytes);
      this.#bytes.set(data, this.#content(inode) + at);
      this.#touch(inode, at, bytes, true);
      this.#log(inode, at, bytes, data);
      if (at + bytes > this.#length(inode)) this.#set(inode, Inode.Length, at + bytes);
      return bytes;
    });
  }

  ftruncateSync(fd: number, length: number): void {
    const inode = this.#fdInode(fd, 'ftruncate');
    if (length > CAPACITY) throw systemError('ENOSPC', 'ftruncate');
    this.#io('write', inode, WRITE, 0, CAPACITY);
    const old = this.#length(inode);
    if (length < old) this.#zero(inode, length, old - length, true);
    this.#set(inode, Inode.Length, length);
    this.#log(inode, length, 0, undefined);
  }

  syncSync(fd: number): void {
    const inode = this.#fdInode(fd, 'fsync');
    if (inode === FOLDER_INODE) {
      this.#nameStep('fsync', false);
      const names = this.#names();
      this.#setNames({ now: names.now, history: [names.now] });
      return;
    }
    this.#io('sync', inode, READ, 0, CAPACITY);
    this.#makeDurable(inode);
  }

  statSync(path: string, options?: { bigint?: boolean; throwIfNoEntry?: boolean }): unknown {
    this.#nameStep('stat', true);
    const inode = this.#inodeOf(path);
    if (inode === undefined && path !== FOLDER) {
      if (options?.throwIfNoEntry === false) return undefined;
      throw systemError('ENOENT', 'stat');
    }
    return this.#stat(inode ?? 0, options?.bigint === true);
  }

  fstatSync(fd: number, options?: { bigint?: boolean }): unknown {
    return this.#stat(this.#fdInode(fd, 'fstat'), options?.bigint === true);
  }

  realpathSync(path: string): string {
    if (path !== FOLDER && this.#inodeOf(path) === undefined) throw systemError('ENOENT', 'realpath');
    return path;
  }

  linkSync(from: string, to: string): void {
    this.#nameStep('link', false);
    const names = this.#names();
    const inode = names.now[from];
    if (inode === undefined) throw systemError('ENOENT', 'link');
    if (names.now[to] !== undefined) throw systemError('EEXIST', 'link');
    this.onRename(from, to);
    this.#rename(names, (now) => {
      now[to] = inode;
    });
  }

  renameSync(from: string, to: string): void {
    this.#nameStep('rename', false);
    const names = this.#names();
    const inode = names.now[from];
    if (inode === undefined) throw systemError('ENOENT', 'rename');
    this.onRename(from, to);
    this.#rename(names, (now) => {
      delete now[from];
      now[to] = inode;
    });
  }

  unlinkSync(path: string): void {
    this.#nameStep('unlink', false);
    const names = this.#names();
    if (names.now[path] === undefined) throw systemError('ENOENT', 'unlink');
    this.#rename(names, (now) => {
      delete now[path];
    });
  }

  rmSync(path: string, options?: { force?: boolean }): void {
    try {
      this.unlinkSync(path);
    } catch (error) {
      const missing = error instanceof Error && 'code' in error && error.code === 'ENOENT';
      if (!missing || options?.force !== true) throw error;
    }
  }

  seek(fd: number, offset: number, data: boolean): number | undefined {
    const inode = this.#fdInode(fd, 'lseek');
    this.#world.step(READ, FILE + inode, offset, CAPACITY);
    const end = this.#length(inode);
    const pages = PAGES_AT + inode * PAGES;
    let found = Math.min(offset, end);
    while (found < end && (this.#bytes[pages + Math.floor(found / PAGE)] === 2) !== data) {
      found = Math.min(end, (Math.floor(found / PAGE) + 1) * PAGE);
    }
    this.#world.refine(READ, offset, found + 1);
    if (found < end) return found;
    return data ? undefined : end;
  }

  punch(fd: number, offset: number, length: number): void {
    const inode = this.#fdInode(fd, 'fallocate');
    this.#io('write', inode, WRITE, offset, length);
    this.#zero(inode, offset, length, true);
  }

  zeroRange(fd: number, offset: number, length: number): void {
    const inode = this.#fdInode(fd, 'fallocate');
    this.#io('write', inode, WRITE, offset, length);
    this.#zero(inode, offset, length, false);
  }

  // ---- What only the test looks at ----------------------------------------------------------------------------

  names(): readonly string[] {
    return Object.keys(this.#names().now);
  }

  /** The bytes of a file. */
  content(path: string): Uint8Array {
    const inode = this.#inodeOf(path);
    if (inode === undefined) throw new Error(`there is no '${path}'`);
    const from = this.#content(inode);
    return this.#bytes.subarray(from, from + this.#length(inode));
  }

  save(): SavedFiles {
    const pages: SavedFiles['pages'][number][] = [];
    for (let inode = 0; inode < INODES; inode++) {
      for (let page = 0; page < PAGES; page++) {
        const state = this.#bytes[PAGES_AT + inode * PAGES + page] ?? 0;
        if (state === 0) continue;
        const at = page * PAGE;
        const piece = (from: number): Uint8Array => this.#bytes.slice(from + at, from + at + PAGE);
        pages.push({
          inode,
          page,
          state,
          content: piece(this.#content(inode)),
          durable: piece(this.#durable(inode)),
        });
      }
    }
    return { words: this.#words.slice(0, LOG_AT), names: JSON.stringify(this.#names()), pages };
  }

  restore({ words, names, pages }: SavedFiles): void {
    this.clear();
    this.#words.set(words);
    this.#setNames(JSON.parse(names));
    for (const { inode, page, state, content, durable } of pages) {
      this.#bytes[PAGES_AT + inode * PAGES + page] = state;
      this.#bytes.set(content, this.#content(inode) + page * PAGE);
      this.#bytes.set(durable, this.#durable(inode) + page * PAGE);
    }
  }

  /** Calls `look` with the places of all pages with data: of the whole memory, in bytes. */
  forEachPage(look: (inode: number, page: number, at: number, bytes: number) => void): void {
    for (let inode = 0; inode < INODES; inode++) {
      const high = this.#get(INODE_AT + inode * INODE_WORDS + Inode.HighWater);
      const pages = PAGES_AT + inode * PAGES;
      for (let page = 0; page * PAGE < high; page++) {
        if (this.#bytes[pages + page] === 2) look(inode, page, this.#content(inode) + page * PAGE, PAGE);
      }
    }
  }

  get bytes(): Uint8Array {
    return this.#bytes;
  }

  /** Names and lengths, as text. */
  describe(): string {
    const lengths = Array.from({ length: INODES }, (_, inode) =>
      this.#get(INODE_AT + inode * INODE_WORDS) === 0 ? 0 : this.#length(inode),
    );
    return JSON.stringify([this.#names().now, lengths]);
  }

  /** Whether everything of the file is on the disk. */
  isDurable(path: string): boolean {
    const inode = this.#inodeOf(path);
    if (inode === undefined) return false;
    for (let entry = 0; entry < this.#get(LOG_COUNT); entry++) {
      if (this.#get(LOG_AT + entry * LOG_WORDS) === inode + 1) return false;
    }
    return this.#length(inode) === this.#get(INODE_AT + inode * INODE_WORDS + Inode.DurableLength);
  }

  /** Makes everything durable, as after a long time. */
  settle(): void {
    for (let inode = 0; inode < INODES; inode++) {
      if (this.#get(INODE_AT + inode * INODE_WORDS) !== 0) this.#makeDurable(inode);
    }
    const names = this.#names();
    this.#setNames({ now: names.now, history: [names.now] });
    this.#words[LOG_COUNT] = 0;
    this.#words[LOG_USED] = 0;
    this.#words[SYNCS] = 0;
    this.#words.fill(0, COUNTS, COUNTS + CLASSES.length);
  }

  closeAll(): void {
    this.#words.fill(0, FD_AT, FD_AT + FDS);
  }

  get openFiles(): number {
    return this.#words.subarray(FD_AT, FD_AT + FDS).reduce((open, word) => open + (word === 0 ? 0 : 1), 0);
  }

  /**
   * The power fails: what was synced is there, of the rest any part. `tear` draws what survives: all or none, a part
   * of the writes in order, or each sector on its own.
   */
  cutPower(random: () => number): void {
    // 0: nothing of it, 1: all, 2: the first so many writes, 3: any sectors.
    const kind = [0, 1, 2, 2, 3, 3, 3, 3][random() % 8] ?? 3;
    const entries = this.#get(LOG_COUNT);
    const reached = random() % (entries + 1);
    const lengths = new Map<number, number>();
    for (let inode = 0; inode < INODES; inode++) {
      const at = INODE_AT + inode * INODE_WORDS;
      if (this.#get(at) === 0) continue;
      const durable = this.#get(at + Inode.DurableLength);
      lengths.set(
        inode,
        kind === 0 ? durable : kind === 1 || random() % 2 === 0 ? this.#length(inode) : durable,
      );
    }
    for (let entry = 0; entry < entries; entry++) {
      const at = LOG_AT + entry * LOG_WORDS;
      const inode = this.#get(at) - 1;
      if (inode < 0) continue;
      const [start, bytes, data] = [this.#get(at + 1), this.#get(at + 2), this.#get(at + 3)];
      for (let from = start; from < start + bytes; ) {
        const to = Math.min(start + bytes, from - (from % SECTOR) + SECTOR);
        const survives = kind === 1 || (kind === 2 ? entry < reached : kind === 3 && random() % 2 === 0);
        if (survives || (kind === 2 && entry === reached && random() % 2 === 0)) {
          const target = this.#durable(inode) + from;
          if (data < 0) this.#bytes.fill(0, target, target + (to - from));
          else this.#bytes.copyWithin(target, data + (from - start), data + (to - start));
        }
        from = to;
      }
    }
    for (const [inode, length] of lengths) {
      const high = this.#get(INODE_AT + inode * INODE_WORDS + Inode.HighWater);
      const [content, durable] = [this.#content(inode), this.#durable(inode)];
      this.#bytes.copyWithin(content, durable, durable + high);
      this.#set(inode, Inode.Length, length);
      if (length < high) {
        this.#bytes.fill(0, content + length, content + high);
        this.#bytes.fill(0, durable + length, durable + high);
      }
    }
    for (let inode = 0; inode < INODES; inode++) {
      // A hole may have been filled again: what is allocated is only a hint.
      const pages = PAGES_AT + inode * PAGES;
      for (let page = 0; page < PAGES; page++)
        if (this.#bytes[pages + page] === 1) this.#bytes[pages + page] = 2;
    }
    const names = this.#names();
    const now =
      names.history[kind === 0 ? 0 : kind === 1 ? names.history.length - 1 : random() % names.history.length];
    this.#setNames({ now: now ?? {}, history: [now ?? {}] });
    this.settle();
  }

  // ---- Inside -------------------------------------------------------------------------------------------------

  /** One call that may fail, fall short or be slow. @returns the bytes it shall do */
  #io(what: 'read' | 'write' | 'sync', inode: number, kind: number, offset: number, length: number): number {
    const world = this.#world;
    if (!world.running) return length;
    const target = this.#get(INODE_AT + inode * INODE_WORDS + Inode.Target) === 1;
    world.step(kind, FILE + inode, offset, offset + length);
    if (what === 'sync' && this.endAtSync !== 0) {
      this.#words[SYNCS] = this.#get(SYNCS) + 1;
      if (this.#get(SYNCS) === this.endAtSync) world.cutPower();
    }
    if (world.chooseFault()) throw systemError(what === 'write' && target ? 'ENOSPC' : 'EIO', what);
    const outcome = this.#fault(`${target ? 'target' : 'source'}-${what}`);
    if (outcome === 'short') return length > SECTOR ? Math.ceil(length / 2 / SECTOR) * SECTOR : length;
    if (outcome === 'slow') {
      world.sleep(-1, 1 + (world.random() % 500));
      world.step(kind, FILE + inode, offset, offset + length);
      return length;
    }
    if (outcome !== undefined) throw systemError(outcome, what);
    return length;
  }

  /** Large transfers are no single moment: others may come in between. */
  #inParts(
    inode: number,
    kind: number,
    position: number,
    length: number,
    part: (at: number, bytes: number) => number,
  ): number {
    const world = this.#world;
    if (!world.running || world.exploring || length <= SECTOR || world.random() % 4 !== 0) {
      return part(position, length);
    }
    const first = SECTOR * (1 + (world.random() % Math.ceil(length / SECTOR)));
    if (first >= length) return part(position, length);
    const done = part(position, first);
    if (done < first) return done;
    world.step(kind, FILE + inode, position + first, position + length);
    return done + part(position + first, length - first);
  }

  #nameStep(what: string, reads: boolean): void {
    const world = this.#world;
    if (!world.running) return;
    world.step(reads ? READ : WRITE, NAMES, 0, 1);
    if (reads) return;
    if (world.chooseFault()) throw systemError('EIO', what);
    const outcome = this.#fault('names');
    if (outcome === 'slow') world.sleep(-1, 1 + (world.random() % 500));
    else if (outcome !== undefined && outcome !== 'short') throw systemError(outcome, what);
  }

  #fault(on: FaultClass): Fault['code'] | undefined {
    const at = COUNTS + CLASSES.indexOf(on);
    const index = this.#get(at);
    this.#words[at] = index + 1;
    return this.faults.find(
      (fault) => fault.on === on && index >= fault.nth && index < fault.nth + fault.count,
    )?.code;
  }

  #touch(inode: number, offset: number, bytes: number, allocate: boolean): void {
    const pages = PAGES_AT + inode * PAGES;
    const high = this.#get(INODE_AT + inode * INODE_WORDS + Inode.HighWater);
    const end = offset + bytes;
    if (end > high) this.#set(inode, Inode.HighWater, Math.ceil(end / PAGE) * PAGE);
    for (let page = Math.floor(offset / PAGE); page * PAGE < end; page++) {
      // 2: data; 1: a hole now, but with something to clear away some day.
      if (allocate) this.#bytes[pages + page] = 2;
    }
  }

  #zero(inode: number, offset: number, length: number, hole: boolean): void {
    const end = Math.min(offset + length, this.#length(inode));
    if (end <= offset) return;
    const pages = PAGES_AT + inode * PAGES;
    const high = this.#get(INODE_AT + inode * INODE_WORDS + Inode.HighWater);
    const stop = Math.min(end, high);
    const content = this.#content(inode);
    for (let page = Math.floor(offset / PAGE); page * PAGE < stop; page++) {
      if (this.#bytes[pages + page] === 0) continue;
      const from = Math.max(offset, page * PAGE);
      const to = Math.min(stop, (page + 1) * PAGE);
      this.#bytes.fill(0, content + from, content + to);
      if (hole && to - from === PAGE) this.#bytes[pages + page] = 1;
    }
    if (!hole) this.#touch(inode, offset, end - offset, true);
    if (stop > offset) this.#log(inode, offset, stop - offset, undefined);
  }

  /** Remembers a write that is not on the disk yet; without data it is one of zeroes. */
  #log(inode: number, offset: number, bytes: number, data: Uint8Array | undefined): void {
    if (!this.#world.running) return;
    const entry = this.#get(LOG_COUNT);
    const used = this.#get(LOG_USED);
    if (entry === LOG_ENTRIES || used + bytes > LOG_BYTES)
      throw new Error('the log of the simulated disk is full');
    const at = LOG_AT + entry * LOG_WORDS;
    this.#words[at] = inode + 1;
    this.#words[at + 1] = offset;
    this.#words[at + 2] = bytes;
    this.#words[at + 3] = -1;
    if (data !== undefined) {
      this.#words[at + 3] = LOG_DATA_AT + used;
      this.#bytes.set(data, LOG_DATA_AT + used);
      this.#words[LOG_USED] = used + data.length;
    }
    this.#words[LOG_COUNT] = entry + 1;
  }

  #makeDurable(inode: number): void {
    const [content, durable] = [this.#content(inode), this.#durable(inode)];
    const entries = this.#get(LOG_COUNT);
    if (this.#world.running) {
      for (let entry = 0; entry < entries; entry++) {
        const at = LOG_AT + entry * LOG_WORDS;
        if (this.#get(at) !== inode + 1) continue;
        const [offset, bytes] = [this.#get(at + 1), this.#get(at + 2)];
        this.#bytes.copyWithin(durable + offset, content + offset, content + offset + bytes);
        this.#words[at] = 0;
      }
      if (
        this.#words
          .subarray(LOG_AT, LOG_AT + entries * LOG_WORDS)
          .every((word, index) => index % 4 !== 0 || word === 0)
      ) {
        this.#words[LOG_COUNT] = 0;
        this.#words[LOG_USED] = 0;
      }
    } else {
      const pages = PAGES_AT + inode * PAGES;
      const high = this.#get(INODE_AT + inode * INODE_WORDS + Inode.HighWater);
      for (let page = 0; page * PAGE < high; page++) {
        if (this.#bytes[pages + page] === 0) continue;
        const from = page * PAGE;
        this.#bytes.copyWithin(durable + from, content + from, content + from + PAGE);
      }
    }
    this.#set(inode, Inode.DurableLength, this.#length(inode));
  }

  #stat(inode: number, bigint: boolean): unknown {
    const length = inode < 0 ? 0 : this.#length(inode);
    return {
      isFile: () => inode >= 0,
      isBlockDevice: () => false,
      dev: bigint ? 1n : 1,
      ino: bigint ? BigInt(inode + 2) : inode + 2,
      rdev: bigint ? 0n : 0,
      size: bigint ? BigInt(length) : length,
      blocks: bigint ? BigInt(length >> 9) : length >> 9,
    };
  }

  #newInode(path: string): number {
    for (let inode = 0; inode < INODES; inode++) {
      const at = INODE_AT + inode * INODE_WORDS;
      if (this.#get(at) !== 0) continue;
      this.#words[at] = 1;
      this.#words[at + Inode.Target] = path.startsWith(`${FOLDER}/target`) ? 1 : 0;
      return inode;
    }
    throw systemError('ENOSPC', 'open');
  }

  #newFd(inode: number): number {
    const fd = this.#words.indexOf(0, FD_AT);
    if (fd < 0 || fd >= FDS) throw new Error('too many open simulated files');
    this.#words[FD_AT + fd] = inode === FOLDER_INODE ? FOLDER_INODE : inode + 1;
    return FIRST_FD + fd;
  }

  #fdInode(fd: number, what: string): number {
    const word = this.#words[FD_AT + (fd - FIRST_FD)] ?? 0;
    if (word === 0 && this.#world.running) {
      this.#world.violate(
        'descriptors are used while they are open',
        `${what} on descriptor ${fd - FIRST_FD}`,
      );
    }
    if (word === 0) throw systemError('EBADF', what);
    return word === FOLDER_INODE ? FOLDER_INODE : word - 1;
  }

  #inodeOf(path: string): number | undefined {
    return this.#names().now[path];
  }

  #rename(names: Names, change: (now: Record<string, number>) => void): void {
    const now = { ...names.now };
    change(now);
    this.#setNames({ now, history: [...names.history, now] });
  }

  #names(): Names {
    const bytes = this.#bytes.slice(NAMES_AT, NAMES_AT + this.#get(NAMES_LENGTH));
    return bytes.length === 0 ? { now: {}, history: [{}] } : JSON.parse(new TextDecoder().decode(bytes));
  }

  #setNames(names: Names): void {
    const bytes = new TextEncoder().encode(JSON.stringify(names));
    this.#bytes.set(bytes, NAMES_AT);
    this.#words[NAMES_LENGTH] = bytes.length;
  }

  #get(word: number): number {
    return this.#words[word] ?? 0;
  }

  #set(inode: number, field: number, value: number): void {
    this.#words[INODE_AT + inode * INODE_WORDS + field] = value;
  }

  #length(inode: number): number {
    return this.#get(INODE_AT + inode * INODE_WORDS + Inode.Length);
  }

  #content(inode: number): number {
    return CONTENT_AT + inode * 2 * CAPACITY;
  }

  #durable(inode: number): number {
    return this.#content(inode) + CAPACITY;
  }
}

type FileCall =
  | 'openSync'
  | 'statSync'
  | 'realpathSync'
  | 'linkSync'
  | 'renameSync'
  | 'unlinkSync'
  | 'rmSync'
  | 'closeSync'
  | 'readSync'
  | 'writeSync'
  | 'ftruncateSync'
  | 'fsyncSync'
  | 'fdatasyncSync'
  | 'fstatSync';

const isSimulated = (path: unknown): boolean => typeof path === 'string' && path.startsWith(FOLDER);
const isSimulatedFd = (fd: unknown): boolean => typeof fd === 'number' && fd >= FIRST_FD;

/** Puts `files` in the place of the true ones, for paths in {@link FOLDER}; the production modules are loaded. */
export function connectFiles(files: Files): void {
  type Call = (...args: readonly never[]) => unknown;
  const replace = (name: FileCall, isOurs: (first: unknown) => boolean, ours: Call): void => {
    const native: Call = Reflect.get(fs, name);
    Reflect.set(fs, name, (...args: readonly never[]) => (isOurs(args[0]) ? ours(...args) : native(...args)));
  };
  replace('openSync', isSimulated, files.openSync.bind(files));
  replace('statSync', isSimulated, files.statSync.bind(files));
  replace('realpathSync', isSimulated, files.realpathSync.bind(files));
  replace('linkSync', isSimulated, files.linkSync.bind(files));
  replace('renameSync', isSimulated, files.renameSync.bind(files));
  replace('unlinkSync', isSimulated, files.unlinkSync.bind(files));
  replace('rmSync', isSimulated, files.rmSync.bind(files));
  replace('closeSync', isSimulatedFd, files.closeSync.bind(files));
  replace('readSync', isSimulatedFd, files.readSync.bind(files));
  replace('writeSync', isSimulatedFd, files.writeSync.bind(files));
  replace('ftruncateSync', isSimulatedFd, files.ftruncateSync.bind(files));
  replace('fsyncSync', isSimulatedFd, files.syncSync.bind(files));
  replace('fdatasyncSync', isSimulatedFd, files.syncSync.bind(files));
  replace('fstatSync', isSimulatedFd, files.fstatSync.bind(files));
  syncBuiltinESMExports();
  if (syscalls === undefined)
    throw new Error('the simulator needs the system calls: unset STILLFRAME_NO_FFI');
  Object.assign(syscalls, {
    seekData: (fd: number, offset: number) => files.seek(fd, offset, true),
    seekHole: (fd: number, offset: number) => files.seek(fd, offset, false),
    punchHole: files.punch.bind(files),
    zeroRange: files.zeroRange.bind(files),
    lockShared: () => true,
    isLocked: () => false,
    startWriteback: () => undefined,
  });
}
