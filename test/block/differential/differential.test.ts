import { describe, expect, it } from 'vitest';
import { hasPeer } from '../../support/peers.js';
import { temporaryFolder } from '../qcow2-support.js';
import { CommandReplay } from './commands/replay.js';
import { randomStory } from './commands/story.js';
import { shorten } from './minimise.js';
import { regressions } from './regressions.js';
import { Replay } from './replay.js';
import { randomTrace } from './trace.js';

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('one trace, told to us and to QEMU', () => {
  const replay = new Replay(temporaryFolder());

  it.each(regressions)('makes images alike where it once did not: $what', ({ trace }) => {
    expect(replay.run(trace)).toBeUndefined();
  });

  it.each(Array.from({ length: 20 }, (_, index) => 500_001 + index))(
    'makes images alike: seed %i',
    (seed) => {
      expect(replay.run(randomTrace(seed))).toBeUndefined();
    },
  );
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io') || !hasPeer('nbdinfo'))(
  'commands, told to us and to qemu-img',
  () => {
    const replay = new CommandReplay(temporaryFolder());

    it.each(Array.from({ length: 8 }, (_, index) => 600_001 + index))(
      'leave chains alike: seed %i',
      (seed) => {
        expect(replay.run(randomStory(seed))).toBeUndefined();
      },
    );
  },
);

it('a failing list is made as short as it gets', () => {
  const items = Array.from({ length: 50 }, (_, index) => index);
  const fails = (list: readonly number[]): boolean => list.includes(7) && list.indexOf(7) < list.indexOf(31);
  expect(shorten(items, fails)).toEqual([7, 31]);
  expect(shorten(items, () => true)).toEqual([]);
});
