import type { Random } from '../../../support/data.js';
import type { Cast } from './cast.js';
import { amend, bitmap, commit, rebase, repair, resize, snapshot } from './changing.js';
import { convert, create, dd, measure } from './making.js';
import { check, compare, info, map } from './reading.js';
import type { Command, Line } from './words.js';

/** How often each is chosen, beside the others. */
const WEIGHTS: readonly (readonly [Line, number])[] = [
  [commit, 4],
  [rebase, 4],
  [convert, 5],
  [resize, 3],
  [amend, 2],
  [snapshot, 2],
  [bitmap, 2],
  [repair, 1],
  [create, 1],
  [dd, 1],
  [check, 1],
  [info, 1],
  [map, 1],
  [compare, 1],
  [measure, 1],
];
const LINES = WEIGHTS.flatMap(([line, weight]) => Array.from({ length: weight }, () => line));

/** A command with options, about images of the story. */
export function randomCommand(random: Random, cast: Cast): Command {
  return (LINES[random.between(0, LINES.length - 1)] ?? info)(random, cast);
}
