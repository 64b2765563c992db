import { createEngine } from '../index.js';
import { ALLOW_BACKING, type Command, FORMAT, OUTPUT, OUTPUTS, PROGRESS, QUIET } from './command.js';
import { editedImage, IMAGE_NAMES } from './image-names.js';
import { ProgressLine, toolProgress } from './progress.js';

export const commit: Command = {
  name: 'commit',
  usage: '[options] FILE',
  summary: 'Writes what an image holds into its backing file, and empties the image.',
  positionals: [1, 1],
  options: [
    FORMAT,
    {
      long: 'base',
      short: 'b',
      value: 'FILE',
      help: 'image of the chain to commit into (the backing file); the image keeps its data then',
    },
    { long: 'keep', short: 'd', help: 'do not empty the image afterwards' },
    { long: 'rate', short: 'r', value: 'SIZE', help: 'copy at most so many bytes in a second' },
    PROGRESS,
    QUIET,
    ALLOW_BACKING,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const file = args.positionals[0] ?? '';
    const line = new ProgressLine(process.stderr);
    const engine = await createEngine({ workers: 1 });
    try {
      const { path, format } = await editedImage(engine, args, file);
      await engine.commitImage(
        path,
        {
          format,
          base: args.text('base'),
          keep: args.flag('keep'),
          bytesPerSecond: args.size('rate'),
          allowBacking: args.texts('allow-backing'),
        },
        toolProgress(line, args),
      );
      line.end();
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify({ type: 'result', filename: file }));
      } else if (!args.flag('quiet')) {
        console.log('Image committed.');
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
