import type { Random } from '../../../support/data.js';
import type { Actor, Cast } from './cast.js';

/** A command in pieces, an option with its value in one. */
export type Command = readonly string[];

/** Makes a command. */
export type Line = (random: Random, cast: Cast) => Command;

/** The words that were chosen, in a row. */
export function words(...list: readonly (string | false)[]): Command {
  return list.filter((word): word is string => word !== false && word !== '');
}

export function anyOf(random: Random, cast: Cast): Actor {
  const { actors } = cast;
  const actor = actors[random.between(0, actors.length - 1)];
  if (actor === undefined) throw new Error('a story has an image');
  return actor;
}

/** An image with others below it where there is one: what most commands are for. */
export function overlayOf(random: Random, cast: Cast): Actor {
  const overlays = cast.actors.filter(({ backing }) => backing !== undefined);
  return overlays.length === 0 || random.chance(0.1)
    ? anyOf(random, cast)
    : (overlays[random.between(0, overlays.length - 1)] ?? anyOf(random, cast));
}

export function qcow2Of(random: Random, cast: Cast): Actor {
  const images = cast.actors.filter(({ format }) => format === 'qcow2');
  return images[random.between(0, images.length - 1)] ?? anyOf(random, cast);
}

/** A size near one that is there, sectors, clusters or bytes more or less. */
export function sizeNear(random: Random, { length, shape }: Actor): number {
  const unit = random.pick([1, 512, 512, 4096, shape.clusterSize]);
  const size = Math.floor((length * random.pick([1, 0.3, 0.5, 0.9, 1, 1.2, 2])) / unit) * unit;
  return Math.max(512, size + (random.chance(0.3) ? random.between(-3, 3) * 512 : 0));
}
