import { createEngine } from '../index.js';
import { ALLOW_BACKING, type Command, FORMAT, OUTPUT, OUTPUTS, parseSize, QUIET } from './command.js';
import { editedImage, IMAGE_NAMES } from './image-names.js';

export const resize: Command = {
  name: 'resize',
  usage: '[options] FILE [+|-]SIZE',
  summary: 'Makes an image larger or smaller; what is new reads as zeroes.',
  signed: true,
  positionals: [2, 2],
  options: [
    FORMAT,
    { long: 'shrink', help: 'the image may become smaller: what is behind its new end is lost' },
    {
      long: 'preallocation',
      value: 'MODE',
      help: 'of what is new: off, metadata (qcow2: a place for every cluster), falloc (also its space), full (zeroes written)',
    },
    QUIET,
    ALLOW_BACKING,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const [file = '', text = ''] = args.positionals;
    const [, sign, digits] = /^([+-]?)(.*)$/s.exec(text) ?? [];
    const size = parseSize(digits ?? '', 'SIZE');
    const engine = await createEngine({ workers: 1 });
    try {
      const { path, format } = await editedImage(engine, args, file);
      const length = await engine.resizeImage(path, {
        format,
        size: sign === '-' ? -size : size,
        relative: sign !== '',
        shrink: args.flag('shrink'),
        preallocation: args.choice('preallocation', ['off', 'metadata', 'falloc', 'full']),
        allowBacking: args.texts('allow-backing'),
      });
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify({ type: 'result', filename: file, 'virtual-size': length }));
      } else if (!args.flag('quiet')) {
        console.log('Image resized.');
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
