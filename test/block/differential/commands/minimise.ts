import { shorten } from '../minimise.js';
import type { Story } from './story.js';
import type { Command } from './words.js';

/** The shortest story that still fails. */
export function minimiseStory(story: Story, fails: (story: Story) => boolean): Story {
  let best = story;
  best = { ...best, commands: shorten(best.commands, (commands) => fails({ ...best, commands })) };
  best = {
    ...best,
    preparations: shorten(best.preparations, (preparations) => fails({ ...best, preparations })),
  };
  for (const [index, preparation] of best.preparations.entries()) {
    if (typeof preparation === 'string') continue;
    const withOperations = (operations: typeof preparation.operations): Story => ({
      ...best,
      preparations: best.preparations.with(index, { ...preparation, operations }),
    });
    best = withOperations(shorten(preparation.operations, (shorter) => fails(withOperations(shorter))));
  }
  for (const [index, command] of best.commands.entries()) {
    const withCommand = (pieces: Command): Story => ({
      ...best,
      commands: best.commands.with(index, [...command.slice(0, 1), ...pieces]),
    });
    best = withCommand(shorten(command.slice(1), (pieces) => fails(withCommand(pieces))));
  }
  return best;
}
