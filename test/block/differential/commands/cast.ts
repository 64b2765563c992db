import type { Random } from '../../../support/data.js';
import { randomOperations } from '../../../support/qcow2/operation.js';
import { allShapes, creationOptions, type Shape } from '../../../support/qcow2/shape.js';
import type { Preparation } from './story.js';

/** An image that commands can name. */
export interface Actor {
  readonly name: string;
  readonly format: 'raw' | 'qcow2';
  readonly shape: Shape;
  /** Bytes; commands may have changed it. */
  readonly length: number;
  /** It has lazy refcounts that were not brought up to date. */
  readonly unclosed: boolean;
  /** What it is on, as far as is known. */
  backing: Actor | undefined;
}

/** Puts an image that a command makes in place of one that it made before. */
export function enter(cast: Cast, actor: Actor): void {
  const others = cast.actors.filter(({ name }) => name !== actor.name);
  cast.actors.splice(0, cast.actors.length, ...others, actor);
}

/** The images below one, its backing file first. */
export function below(actor: Actor): Actor[] {
  return actor.backing === undefined ? [] : [actor.backing, ...below(actor.backing)];
}

/** The images of a story. */
export interface Cast {
  readonly preparations: Preparation[];
  readonly actors: Actor[];
}

/** Names that internal snapshots and bitmaps have; not every image has each. */
export const SNAPSHOTS = ['s1', 's2', 's3'] as const;
export const BITMAPS = ['b1', 'b2', 'b3'] as const;

const shapes = allShapes();

function multipleOf512(bytes: number): number {
  return Math.max(512, Math.ceil(bytes / 512) * 512);
}

/** A chain of one to four images, and now and then one more that nobody is on. */
export function randomCast(random: Random): Cast {
  const cast: Cast = { preparations: [], actors: [] };
  // Large clusters are slow and small ones show more; most images are of the usual kind.
  const most = random.pick([4096, 65536, 65536, 2 << 20]);
  const count = random.between(1, 4);
  const unit = random.pick([512, 4096, 65536, 65536]);
  const length = multipleOf512(
    random.between(1, 40) * unit + (random.chance(0.4) ? random.between(1, 70_000) : 0),
  );
  const lengths = (): number => multipleOf512(length * random.pick([1, 1, 1, 0.5, 0.9, 1.1, 1.5]));
  for (let index = 0; index < count; index++) {
    const backing = cast.actors.at(-1);
    const format = index === 0 && random.chance(0.3) ? 'raw' : 'qcow2';
    add(random, cast, { name: `i${index}.${format}`, format, length: lengths(), most, backing });
  }
  if (random.chance(0.5)) {
    const format = random.pick<'raw' | 'qcow2'>(['raw', 'qcow2', 'qcow2']);
    add(random, cast, { name: `other.${format}`, format, length: lengths(), most, backing: undefined });
  }
  return cast;
}

interface Wanted {
  readonly name: string;
  readonly format: 'raw' | 'qcow2';
  readonly length: number;
  /** The largest clusters. */
  readonly most: number;
  readonly backing: Actor | undefined;
}

function add(random: Random, cast: Cast, wanted: Wanted): void {
  const { name, format, length, most, backing } = wanted;
  // Each as often as it is interesting, and not as it goes together with others.
  const version = random.chance(0.25) ? 2 : 3;
  const external = version === 3 && random.chance(0.2);
  const candidates = shapes.filter(
    (shape) =>
      shape.clusterSize <= most &&
      shape.depth > 0 === (backing !== undefined) &&
      shape.version === version &&
      (shape.dataFile !== 'none') === external,
  );
  const shape = candidates[random.between(0, candidates.length - 1)];
  if (shape === undefined) throw new Error('there is no shape to choose');
  const { preparations } = cast;
  const lazy = shape.version === 3 && random.chance(0.15);
  preparations.push(createLine(random, wanted, shape, lazy));
  const filled: Shape = format === 'raw' ? { ...shape, compression: 'none' } : shape;
  const fill = (): void => {
    const operations = randomOperations(random, filled, length, random.between(0, 6));
    if (operations.length > 0) preparations.push({ image: name, format, operations });
  };
  fill();
  if (format === 'raw' && random.chance(0.2)) {
    preparations.push(`resize -q -f raw --shrink ${name} ${Math.max(1, length - random.between(1, 511))}`);
  }
  if (format === 'qcow2') {
    // A cluster of compressed data is counted by everything in it and, once more each, by every snapshot.
    const enough = shape.dataFile === 'none' && shape.refcountBits >= (shape.compression === 'none' ? 4 : 16);
    if (enough && random.chance(0.25)) {
      preparations.push(`snapshot -c ${random.pick(SNAPSHOTS)} ${name}`);
      fill();
    }
    if (shape.version === 3 && random.chance(0.3)) {
      for (const bitmap of BITMAPS.slice(0, random.between(1, 2))) {
        const granularity = random.chance(0.5) ? `-g ${random.pick(['512', '4k', '64k', '1M'])} ` : '';
        preparations.push(
          `bitmap --add ${random.chance(0.2) ? '--disable ' : ''}${granularity}${name} ${bitmap}`,
        );
        fill();
      }
    }
  }
  // Leaves leaked clusters, bitmaps in use, and refcounts of later.
  const killed = format === 'qcow2' && random.chance(0.15);
  if (killed) {
    const plain: Shape = { ...shape, compression: 'none' };
    const operations = randomOperations(random, plain, length, random.between(1, 4));
    preparations.push({ image: name, format, operations, killed: true });
  }
  cast.actors.push({ name, format, shape, length, unclosed: killed && lazy, backing });
}

function createLine(random: Random, wanted: Wanted, shape: Shape, lazy: boolean): string {
  const { name, format, length, backing } = wanted;
  if (format === 'raw') {
    const preallocation = random.chance(0.1) ? `-o preallocation=${random.pick(['falloc', 'full'])} ` : '';
    return `create -q -f raw ${preallocation}${name} ${length}`;
  }
  const options = [creationOptions(shape, `${name}.data`)];
  if (lazy) options.push('lazy_refcounts=on');
  // QEMU takes both only where there are subclusters to say what is whose.
  if ((backing === undefined || shape.subclusters) && random.chance(0.15)) {
    options.push(`preallocation=${random.pick(['metadata', 'metadata', 'falloc', 'full'])}`);
  }
  const over = backing === undefined ? '' : `-b ${backing.name} -F ${backing.format} `;
  return `create -q -f qcow2 -o ${options.join()} ${over}${name} ${length}`;
}
