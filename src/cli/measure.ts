import { createEngine } from '../index.js';
import {
  ALLOW_BACKING,
  type Command,
  FORCE_SHARE,
  FORMAT,
  OUTPUT,
  OUTPUTS,
  parseSnapshot,
  TARGET_FORMATS,
  usageError,
} from './command.js';
import { howToOpen, IMAGE_NAMES, namedImage } from './image-names.js';
import { asksForHelp, IMAGE_OPTIONS, imageOptionsHelp, parseImageOptions } from './image-options.js';

export const measure: Command = {
  name: 'measure',
  usage: '[options] --size SIZE | FILE',
  summary: 'Says how large the file of a new image will be: of SIZE bytes, or with what FILE holds.',
  positionals: [0, 1],
  options: [
    { ...FORMAT, help: 'format of FILE (looked for in its first bytes)' },
    { long: 'target-format', short: 'O', value: 'FMT', help: 'format of the new image: raw or qcow2 (raw)' },
    IMAGE_OPTIONS,
    { long: 'size', value: 'SIZE', help: 'virtual size of the new image' },
    { long: 'snapshot', short: 'l', value: 'NAME', help: 'read FILE as it is in an internal snapshot' },
    ALLOW_BACKING,
    FORCE_SHARE,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const format = args.choice('target-format', TARGET_FORMATS, 'raw');
    const lists = args.texts('options') ?? [];
    if (asksForHelp(lists)) {
      console.log(imageOptionsHelp(format));
      return 0;
    }
    const { creation, backingFile } = parseImageOptions(format, lists);
    const [file] = args.positionals;
    const size = args.size('size');
    if (file !== undefined && size !== undefined) {
      throw usageError('--size N cannot be used together with a filename.');
    }
    const ofImage = args.flag('image-opts') || (args.text('format') ?? args.text('snapshot')) !== undefined;
    if (file === undefined && ofImage) {
      throw usageError('--image-opts, -f, and -l require a filename argument.');
    }
    if (size === undefined && file === undefined)
      throw usageError('Either --size N or one filename must be specified.');
    const engine = await createEngine({ workers: 1 });
    try {
      const named = file === undefined ? undefined : await namedImage(engine, args, file);
      const result = await engine.measureImage(named?.path ?? size ?? 0, {
        format,
        creation,
        hasBacking: backingFile !== undefined,
        source: named && {
          ...howToOpen(named, args),
          snapshot: parseSnapshot(args.text('snapshot')),
        },
      });
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify(result, null, 4));
        return 0;
      }
      console.log(`required size: ${result.required}`);
      console.log(`fully allocated size: ${result['fully-allocated']}`);
      if (result.bitmaps !== undefined) console.log(`bitmaps size: ${result.bitmaps}`);
      return 0;
    } finally {
      await engine.close();
    }
  },
};
