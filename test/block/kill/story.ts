import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { commitImage } from '#src/block/commit.js';
import { createImage } from '#src/block/create.js';
import { rebaseImage } from '#src/block/rebase.js';
import { resizeImage } from '#src/block/resize.js';
import { Random } from '../../support/data.js';
import { run } from '../../support/peers.js';
import { follow } from '../../support/qcow2/matrix.js';
import { type Operation, Patterns } from '../../support/qcow2/operation.js';
import { type OpenImage, Ours } from '../../support/qcow2/ours.js';
import { imageOptions } from '../../support/qcow2/shape.js';
import { clip, type Trace } from '../differential/trace.js';
import { type Change, Power, type Survival } from './power.js';

/** What a drive must read as after a cut. */
interface Promised {
  /** Bytes it may have. */
  lengths: readonly number[];
  content: Buffer;
  /** Where requests that were not flushed leave it open what is read: 1 for each such byte. */
  open: Uint8Array;
}

export interface StoryOptions {
  /** Of a cut after a change of a file. */
  readonly chance: number;
  /** What is done to an image with a backing file in the end. */
  readonly end?: 'commit' | 'rebase' | undefined;
  /** Called after every change besides: true cuts the power then, with that change alone on the disk. */
  readonly cutAlone?: ((change: Change, path: string) => boolean) | undefined;
}

const NAME = 'image';

/**
 * Plays traces on an image of ours while the power may fail at any moment. After each cut QEMU's check finds no
 * corruption, every flushed byte is there, and the image can be written to again.
 */
export class Story {
  readonly #folder: string;
  readonly #cutFolder: string;
  readonly #patterns: Patterns;
  readonly #ours = new Ours();
  /** Looks at what is left: the other one is in the middle of a request. */
  readonly #inspector = new Ours(96 << 20);
  readonly #power: Power;
  #random = new Random(0);
  #promised: Promised = { lengths: [], content: Buffer.alloc(0), open: new Uint8Array() };
  #cuts = 0;
  #chance = 0;

  constructor(folder: string) {
    this.#folder = join(folder, 'live');
    this.#cutFolder = join(folder, 'cut');
    mkdirSync(this.#folder);
    mkdirSync(this.#cutFolder);
    this.#patterns = new Patterns(folder);
    this.#power = new Power(this.#ours.runtime.arena);
  }

  /** Throws at the first thing that is not as it should be. Returns how often the power was cut. */
  run(trace: Trace, seed: number, options: StoryOptions): number {
    this.#random = new Random(seed);
    this.#cuts = 0;
    this.#chance = options.chance;
    this.#power.afterChange = (change) => {
      if (options.cutAlone?.(change, this.#at(NAME)) === true) this.#cut({ kind: 'last' });
      if (this.#random.chance(this.#chance)) this.#cut(this.#survival());
    };
    try {
      this.#make(trace);
      this.#power.during(() => this.#play(trace, options));
      return this.#cuts;
    } finally {
      for (const folder of [this.#folder, this.#cutFolder]) {
        for (const name of readdirSync(folder)) rmSync(join(folder, name));
      }
    }
  }

  #at(name: string): string {
    return join(this.#folder, name);
  }

  #make(trace: Trace): void {
    const { runtime } = this.#ours;
    for (const [index, { format, shape, length, operations }] of trace.bases.entries()) {
      const below = trace.bases[index - 1];
      const path = this.#at(`base-${index}`);
      createImage(runtime, path, {
        ...(format === 'raw' ? { format } : imageOptions(shape, `base-${index}.data`)),
        length,
        ...(below === undefined ? {} : { backingFile: `base-${index - 1}`, backingFormat: below.format }),
      });
      this.#ours.with(path, { readOnly: false, format }, (image) => image.apply(operations, this.#patterns));
    }
    const top = trace.bases.at(-1);
    createImage(runtime, this.#at(NAME), {
      ...imageOptions(trace.shape, `${NAME}.data`),
      length: trace.length,
      lazyRefcounts: trace.lazyRefcounts,
      preallocation: trace.preallocated ? 'metadata' : 'off',
      ...(top === undefined
        ? {}
        : { backingFile: `base-${trace.bases.length - 1}`, backingFormat: top.format }),
    });
    this.#watch();
  }

  #watch(): void {
    this.#power.watch(readdirSync(this.#folder).map((name) => this.#at(name)));
  }

  #play(trace: Trace, options: StoryOptions): void {
    const path = this.#at(NAME);
    let image = this.#ours.open(path, { readOnly: false });
    let model = image.content();
    this.#keep(model);
    const snapshots = new Set<string>();
    /** Does something to the closed image. */
    const closed = (body: () => void): void => {
      image.close();
      this.#keep(model);
      body();
      image = this.#ours.open(path, { readOnly: false });
    };
    for (const step of trace.steps) {
      switch (step.kind) {
        case 'reopen':
          closed(() => undefined);
          break;
        case 'resize': {
          const from = model.length;
          // A version 2 image has no zeroes to hide a longer backing file with, and keeps no size of a snapshot.
          const hidden = step.length > from && (trace.bases.at(-1)?.length ?? 0) > from;
          if (trace.shape.version === 2 && (snapshots.size > 0 || hidden)) break;
          closed(() => {
            this.#promised.lengths = [from, step.length];
            // What is cut off may go before the drive is shorter.
            this.#promised.open.fill(1, step.length);
            resizeImage(this.#ours.runtime, path, {
              format: 'qcow2',
              size: step.length,
              shrink: true,
              preallocation: step.length > from ? step.preallocation : 'off',
            });
            const resized = Buffer.alloc(step.length);
            model.copy(resized);
            model = resized;
            this.#keep(model);
          });
          break;
        }
        case 'snapshot':
        case 'revert':
        case 'delete':
          if (snapshots.has(step.name) === (step.kind === 'snapshot')) break;
          closed(() => {
            const letter = { snapshot: '-c', revert: '-a', delete: '-d' }[step.kind];
            run('qemu-img', ['snapshot', '-q', letter, step.name, path]);
            this.#watch();
            if (step.kind === 'snapshot') snapshots.add(step.name);
            if (step.kind === 'delete') snapshots.delete(step.name);
            model = this.#ours.with(path, { readOnly: true }, (reverted) => reverted.content());
            this.#keep(model);
          });
          break;
        default: {
          const operation = clip(step, model.length, trace.shape.clusterSize);
          if (operation !== undefined) this.#change(image, model, operation);
        }
      }
    }
    image.close();
    this.#keep(model);
    this.#finish(options.end, trace.bases.length);
    this.#ours.with(path, { readOnly: true }, (after) => expectContent(after, this.#promised, 'in the end'));
    run('qemu-img', ['check', '-q', NAME], [0], this.#folder);
  }

  #change(image: OpenImage, model: Buffer, operation: Operation): void {
    if (operation.kind !== 'flush') {
      const { offset, length } = operation;
      this.#promised.open.fill(1, offset, offset + length);
    }
    image.apply([operation], this.#patterns);
    follow(model, operation, this.#patterns, (offset, length) => image.read(offset, length));
    if (operation.kind === 'flush') this.#keep(model);
  }

  /** The drive reads the same before, during and after. */
  #finish(end: StoryOptions['end'], bases: number): void {
    const path = this.#at(NAME);
    const { runtime } = this.#ours;
    if (end === undefined || bases === 0) return;
    // Few changes, each of which matters.
    this.#chance = Math.max(0.5, this.#chance);
    if (end === 'commit') commitImage(runtime, path, { format: 'qcow2', keep: false }, () => undefined);
    else {
      const rebase = {
        format: 'qcow2',
        backing: undefined,
        backingFormat: undefined,
        unsafe: false,
      } as const;
      rebaseImage(runtime, path, rebase, () => undefined);
    }
  }

  /** All of the drive is durable. */
  #keep(model: Buffer): void {
    this.#promised = {
      lengths: [model.length],
      content: Buffer.from(model),
      open: new Uint8Array(model.length),
    };
  }

  #survival(): Survival {
    const { pending } = this.#power;
    const kind = this.#random.between(0, 9);
    if (kind < 2) return { kind: 'last' };
    if (kind < 4) return { kind: 'all-but', lost: this.#random.between(0, pending - 1) };
    return { kind: 'part', percent: this.#random.pick([0, 30, 50, 80, 97, 100]) };
  }

  #cut(survival: Survival): void {
    this.#cuts++;
    const what = `after cut ${this.#cuts} (${JSON.stringify(survival)})`;
    this.#power.cut(this.#cutFolder, survival, (limit) => this.#random.between(0, limit - 1));
    const path = join(this.#cutFolder, NAME);
    const check = (name: string): void => {
      try {
        run('qemu-img', ['check', '-q', '-f', 'qcow2', name], [0, 3], this.#cutFolder);
      } catch (error) {
        throw new Error(`${what}: ${String(error)}`);
      }
    };
    check(NAME);
    this.#inspector.with(path, { readOnly: true }, (image) => expectContent(image, this.#promised, what));
    if (!this.#random.chance(0.3)) return;
    // Life goes on.
    const random = this.#random;
    this.#inspector.with(path, { readOnly: false }, (image) => {
      const { length } = image.node;
      for (let count = 0; count < 4; count++) {
        const offset = random.between(0, length - 1);
        const bytes = Math.min(70_000, length - offset);
        image.apply([{ kind: 'write', offset, length: bytes, pattern: 2 }], this.#patterns);
      }
    });
    check(NAME);
  }
}

function expectContent(image: OpenImage, promised: Promised, what: string): void {
  const found = image.content();
  const { lengths, content, open } = promised;
  if (!lengths.includes(found.length)) {
    throw new Error(`${what} the drive has ${found.length} bytes, not ${lengths.join(' or ')}`);
  }
  for (let at = 0; at < found.length; at++) {
    const byte = content[at] ?? 0;
    if (open[at] === 1 || found[at] === byte) continue;
    throw new Error(`${what} byte ${at} of the drive is ${found[at]}, not ${byte}`);
  }
}
