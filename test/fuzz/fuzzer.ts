import { spawnSync } from 'node:child_process';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  linkSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  rmSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createRuntime } from '#src/kernels/runtime.js';
import { Random } from '../support/data.js';
import { loadCorpus, type SparseFile } from './corpus.js';
import { Exercise } from './exercise.js';
import { FORMATS, type FuzzFormat } from './formats.js';
import { Guard } from './guard.js';
import { anyOf, type Base, type Edit, makeBase, mutate } from './mutation.js';
import { qemuCheck, qemuContent, qemuFindings, qemuRepair, snapshotCount } from './qemu.js';

/** Most of the time of an error goes into its stack: there is one only where an execution is repeated for it. */
const STACK = 12;
Error.stackTraceLimit = 0;

/** What a check counts. */
const FINDINGS = ['corruptions', 'leaks', 'check-errors', 'image-end-offset', 'allocated-clusters'] as const;

/** Part of the images that are repaired. */
const REPAIRED = 0.2;

/** One execution, as it can be repeated. */
export interface Recipe {
  readonly base: string;
  readonly mutations: readonly (readonly Edit[])[];
  /** Seed of what is done with the image. */
  readonly actions: number;
  /** Sums over what was damaged are made right again. */
  readonly sealed?: boolean;
}

export interface Found {
  readonly seed: number;
  readonly what: string;
  readonly recipe: Recipe;
}

/** What many executions came to. */
export interface Tally {
  executions: number;
  /** Images all of which could be read. */
  read: number;
  /** Images that were changed without an error. */
  changed: number;
  /** Images that a repair has made sound, and changed ones that were so already. */
  repaired: number;
  compared: number;
  /** How often each kind of thing happened, and the first seed that made it. */
  readonly events: Record<string, { times: number; readonly seed: number }>;
}

export function newTally(): Tally {
  return { executions: 0, read: 0, changed: 0, repaired: 0, compared: 0, events: {} };
}

/** Numbers and names taken out of a message, so that those of a kind are counted together. */
function kindOf(message: string): string {
  return message
    .replace(/'[^']*'/g, "'…'")
    .replace(/0x[0-9a-f]+|\d+/g, 'N')
    .slice(0, 160);
}

function describeError(error: unknown): string {
  return error instanceof Error ? (error.stack ?? error.message) : String(error);
}

/** Of the arena that executions use in time. */
const ARENA_BYTES = 320 << 20;

/** Runs executions, one after the other, in a folder of its own. */
export class Fuzzer {
  readonly tally = newTally();
  readonly #root: string;
  readonly #folder: string;
  readonly #path: string;
  readonly #format: FuzzFormat;
  readonly #bases: readonly Base[];
  readonly #common: readonly SparseFile[];
  readonly #exercise: Exercise;
  readonly #guard: Guard;

  constructor(format: FuzzFormat) {
    this.#format = format;
    const memory = '/dev/shm';
    this.#root = mkdtempSync(join(existsSync(memory) ? memory : tmpdir(), 'stillframe-fuzz-'));
    this.#folder = join(this.#root, 'images');
    this.#path = join(this.#folder, `image.${format}`);
    this.#bases = loadCorpus(format).map((file) => makeBase(file, FORMATS[format].layout(file.bytes)));
    this.#common = loadCorpus('common');
    const names = this.#furnish();
    const runtime = createRuntime();
    // What the arena comes to use is not to be taken for memory that gets more and more.
    const pages = runtime.arena.alloc(ARENA_BYTES, 'pages of the arena');
    runtime.arena.u8.fill(0, pages, pages + ARENA_BYTES);
    runtime.arena.free(pages);
    this.#exercise = new Exercise(runtime, this.#path, format, FORMATS[format].mostContent);
    this.#guard = new Guard(runtime.arena, new Set(names.map((name) => join(this.#folder, name))));
  }

  close(): void {
    rmSync(this.#root, { recursive: true });
  }

  /** Files beside the image, and what it must not open outside. Returns what may be opened. */
  #furnish(): string[] {
    mkdirSync(join(this.#folder, 'inner'), { recursive: true });
    writeFileSync(join(this.#root, 'secret.raw'), Buffer.alloc(65536, 'secret '));
    for (const file of this.#common) writeFileSync(join(this.#folder, file.name), file.bytes);
    symlinkSync('base.raw', join(this.#folder, 'alias.raw'));
    symlinkSync('../secret.raw', join(this.#folder, 'way-out.raw'));
    symlinkSync('..', join(this.#folder, 'folder-out'));
    symlinkSync('ring.raw', join(this.#folder, 'ring.raw'));
    spawnSync('mkfifo', [join(this.#folder, 'fifo')]);
    writeFileSync(this.#path, '');
    linkSync(this.#path, join(this.#folder, 'hard.qcow2'));
    return [`image.${this.#format}`, 'alias.raw', ...this.#common.map(({ name }) => name)];
  }

  recipe(seed: number): Recipe {
    const dice = new Random(seed);
    let base = anyOf(dice, this.#bases);
    // Large clusters take long: rarely.
    if (this.#format === 'qcow2' && base.layout.unit > 32768 && dice.chance(0.8)) {
      base = anyOf(dice, this.#bases);
    }
    const { mutators, seal } = FORMATS[this.#format];
    const mutations = mutate(dice, base, mutators);
    const sealed = seal === undefined ? {} : { sealed: dice.chance(0.85) };
    return { base: base.file.name, mutations, actions: seed, ...sealed };
  }

  #write(recipe: Recipe): void {
    const base = this.#bases.find(({ file }) => file.name === recipe.base);
    if (base === undefined) throw new Error(`there is no image '${recipe.base}' in the corpus`);
    const fd = openSync(this.#path, 'r+');
    try {
      ftruncateSync(fd, 0);
      ftruncateSync(fd, base.file.length);
      for (const { at, bytes } of base.file.extents) writeSync(fd, bytes, 0, bytes.length, at);
      for (const edit of recipe.mutations.flat()) {
        if ('length' in edit) {
          ftruncateSync(fd, edit.length);
        } else {
          const bytes = Buffer.from(edit.hex, 'hex');
          writeSync(fd, bytes, 0, bytes.length, edit.at);
        }
      }
    } finally {
      closeSync(fd);
    }
    if (recipe.sealed === true) FORMATS[this.#format].seal?.(this.#path);
    // The only other file that is ever written.
    const data = this.#common.find(({ name }) => name === 'data.raw');
    if (data !== undefined && /data/.test(recipe.base))
      writeFileSync(join(this.#folder, data.name), data.bytes);
  }

  /** One execution. Returns what must not be, or undefined. */
  execute(recipe: Recipe, compare: boolean): string | undefined {
    const found = this.#execute(recipe, compare) ?? this.#repair(recipe, compare);
    this.#content = undefined;
    if (found === undefined) this.tally.executions++;
    return found;
  }

  /** What is read of the image as it is, kept for the repair. */
  #content: Buffer | undefined;

  #execute(recipe: Recipe, compare: boolean): string | undefined {
    this.#write(recipe);
    const { tally } = this;
    let sound = false;
    let difference: string | undefined;
    const outcome = this.#attempt(() =>
      this.#exercise.run(new Random(recipe.actions ^ 0x5bd1e995), (content, errors) => {
        if (!compare) return;
        this.#guard.unwatched(() => {
          difference = this.#compare(recipe, content, 'as it was', errors.at(-1)?.message);
          sound =
            this.#format === 'qcow2' && content !== undefined && qemuCheck(this.#path, this.#format) === 0;
        });
      }),
    );
    if (typeof outcome === 'string') return outcome;
    if (difference !== undefined) return difference;
    const { content, changed, errors } = outcome;
    this.#content = content;
    if (content !== undefined) tally.read++;
    if (changed !== undefined) tally.changed++;
    for (const { code } of errors) this.#count(code, recipe);
    if (!compare || changed === undefined || !sound) return undefined;
    const status = this.#guard.unwatched(() => qemuCheck(this.#path, this.#format));
    // Refcounts behind the end of the file, which no check looks at, are leaks once it is longer.
    if (status === 3) this.#count('leaks in what we wrote into a sound image, as QEMU says', recipe);
    else if (status !== 0) return `qemu-img check says ${status} of what we wrote into a sound image`;
    return this.#guard.unwatched(() => this.#compare(recipe, changed, 'after changes'));
  }

  /** What the code under test does, or what of it must not be. */
  #attempt<T>(body: () => T): T | string {
    try {
      const result = body();
      return this.#guard.offence() ?? result;
    } catch (error) {
      this.#guard.offence();
      return describeError(error);
    }
  }

  /** The image once more, repaired. */
  #repair(recipe: Recipe, compare: boolean): string | undefined {
    const dice = new Random(recipe.actions ^ 0x1b873593);
    if (this.#format !== 'qcow2' || !dice.chance(REPAIRED)) return undefined;
    this.#write(recipe);
    const theirs = compare ? this.#guard.unwatched(() => qemuFindings(this.#path, this.#format)) : undefined;
    const outcome = this.#attempt(() => this.#exercise.repair(dice, this.#content));
    if (typeof outcome === 'string') return outcome;
    const { found, sound, lost } = outcome;
    const ours: Record<string, unknown> = { ...found };
    for (const name of theirs === undefined || found === undefined ? [] : FINDINGS) {
      if (ours[name] !== theirs?.[name]) this.#count(`a check finds other ${name} than QEMU's`, recipe);
    }
    if (!sound) return undefined;
    this.tally.repaired++;
    if (compare) {
      const status = this.#guard.unwatched(() => qemuCheck(this.#path, this.#format));
      if (status === 2 || status === 3) return `qemu-img check says ${status} of what we have repaired`;
      if (status !== 0) this.#count(`status ${status} of qemu-img check after a repair`, recipe);
    }
    const damage = this.#attempt(() => this.#exercise.changeSound(dice));
    if (typeof damage === 'string') return damage;
    return lost < 0 ? undefined : this.#guard.unwatched(() => this.#judgeLoss(recipe, lost));
  }

  /** Where tables and data share a cluster no repair can keep both: QEMU's cannot either then. */
  #judgeLoss(recipe: Recipe, lost: number): string | undefined {
    const content = this.#content;
    this.#write(recipe);
    const snapshots = snapshotCount(this.#path);
    const theirs = qemuRepair(this.#path, this.#format) ? qemuContent(this.#path, this.#format) : '';
    // Of an image with bitmaps it takes the snapshots out of the header before it looks at them.
    if (snapshots > snapshotCount(this.#path)) {
      this.#count('read differently after a repair, where QEMU loses the snapshots', recipe);
      return undefined;
    }
    if (content === undefined || typeof theirs === 'string' || !theirs.equals(content)) {
      this.#count('read differently after a repair, by QEMU as well', recipe);
      return undefined;
    }
    return `at ${lost} something else is read after the repair, but not after QEMU's`;
  }

  #count(event: string, { actions }: Recipe): void {
    const { events } = this.tally;
    events[event] ??= { times: 0, seed: actions };
    events[event].times++;
  }

  /** How the drive as we read it differs from what QEMU reads. */
  #compare(recipe: Recipe, content: Buffer | undefined, when: string, refusal = ''): string | undefined {
    const { tally } = this;
    // What is larger is read in samples.
    if (content === undefined && refusal === '') return undefined;
    const theirs = qemuContent(this.#path, this.#format);
    if (content === undefined) {
      if (typeof theirs !== 'string') this.#count(`read by QEMU, not by us: ${kindOf(refusal)}`, recipe);
      return undefined;
    }
    if (typeof theirs === 'string') {
      this.#count(`read by us, not by QEMU: ${kindOf(theirs)}`, recipe);
      return undefined;
    }
    tally.compared++;
    if (theirs.equals(content)) return undefined;
    // QEMU leaves out what is no whole sector at the end.
    if (theirs.length === content.length - (content.length % 512)) {
      content = content.subarray(0, theirs.length);
      if (theirs.equals(content)) return undefined;
    }
    if (theirs.length !== content.length) {
      return `QEMU reads ${theirs.length} bytes, we read ${content.length} (${when})`;
    }
    const at = content.findIndex((byte, index) => byte !== theirs[index]);
    return `at ${at} QEMU reads ${theirs[at]}, we read ${content[at]} (${when})`;
  }

  /** What goes wrong, with the stack of an error. */
  explain(recipe: Recipe, compare: boolean): string | undefined {
    Error.stackTraceLimit = STACK;
    try {
      return this.execute(recipe, compare);
    } finally {
      Error.stackTraceLimit = 0;
    }
  }

  /** Leaves out what the failure does not need. */
  minimise(recipe: Recipe, compare: boolean): Recipe {
    let smallest = recipe;
    const tryOut = (mutations: readonly (readonly Edit[])[]): void => {
      const smaller = { ...smallest, mutations };
      if (this.execute(smaller, compare) !== undefined) smallest = smaller;
    };
    for (let index = smallest.mutations.length - 1; index >= 0; index--) {
      tryOut(smallest.mutations.filter((_, other) => other !== index));
    }
    for (let index = smallest.mutations.length - 1; index >= 0; index--) {
      for (let edit = (smallest.mutations[index]?.length ?? 0) - 1; edit >= 0; edit--) {
        const at = index;
        tryOut(
          smallest.mutations.map((edits, other) =>
            other === at ? edits.filter((_, number) => number !== edit) : edits,
          ),
        );
      }
    }
    return smallest;
  }
}
