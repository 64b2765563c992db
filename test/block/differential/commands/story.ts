import { Random } from '../../../support/data.js';
import type { Operation } from '../../../support/qcow2/operation.js';
import { type Cast, randomCast } from './cast.js';
import { randomCommand } from './lines.js';
import type { Command } from './words.js';

/** What is done to the images before they are copied: arguments of `qemu-img`, or changes by `qemu-io`. */
export type Preparation =
  | string
  | {
      readonly image: string;
      readonly format: 'raw' | 'qcow2';
      readonly operations: readonly Operation[];
      /** `qemu-io` does not live to close the image. */
      readonly killed?: boolean;
    };

/** Images that QEMU makes, and the commands that both sides are told about their copies of them. */
export interface Story {
  readonly preparations: readonly Preparation[];
  /** Without the name of the program, in the words of the shell. */
  readonly commands: readonly Command[];
}

/** The story of a seed. */
export function randomStory(seed: number): Story {
  const random = new Random(seed);
  const cast: Cast = randomCast(random);
  const count = random.between(1, 4);
  return {
    preparations: cast.preparations,
    commands: Array.from({ length: count }, () => randomCommand(random, cast)),
  };
}
