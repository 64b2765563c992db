import { createEngine } from '../index.js';
import {
  ALLOW_BACKING,
  type Command,
  FORMAT,
  FORMATS,
  OUTPUT,
  OUTPUTS,
  PROGRESS,
  QUIET,
  usageError,
} from './command.js';
import { editedImage, IMAGE_NAMES } from './image-names.js';
import { ProgressLine, toolProgress } from './progress.js';

export const rebase: Command = {
  name: 'rebase',
  usage: '[options] -b BACKING -F FMT FILE',
  summary:
    'Gives an image another backing file; it reads as before. What the new backing file does not have is copied into\n' +
    "the image first. '-b ''' makes it stand alone.",
  positionals: [1, 1],
  options: [
    FORMAT,
    {
      long: 'backing',
      short: 'b',
      value: 'FILE',
      help: 'new backing file; relative to the folder of the image',
    },
    { long: 'backing-format', short: 'F', value: 'FMT', help: 'format of the new backing file' },
    {
      long: 'unsafe',
      short: 'u',
      help: 'change the header only: the new backing file must read as the old one; without -b there is none',
    },
    PROGRESS,
    QUIET,
    ALLOW_BACKING,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const file = args.positionals[0] ?? '';
    const unsafe = args.flag('unsafe');
    const named = args.text('backing');
    if (named === undefined && !unsafe)
      throw usageError('Must specify backing file (-b) or use unsafe mode (-u)');
    const backing = named === '' ? undefined : named;
    const line = new ProgressLine(process.stderr);
    const engine = await createEngine({ workers: 1 });
    try {
      const { path, format } = await editedImage(engine, args, file);
      await engine.rebaseImage(
        path,
        {
          format,
          backing,
          backingFormat: args.choice('backing-format', FORMATS),
          unsafe,
          allowBacking: args.texts('allow-backing'),
        },
        toolProgress(line, args),
      );
      line.end();
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify({ type: 'result', filename: file, 'backing-filename': backing ?? null }));
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
