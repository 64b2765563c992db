import { createEngine } from '../index.js';
import { type Command, FORMATS, OUTPUT, OUTPUTS, parseSize, TARGET_FORMATS, usageError } from './command.js';
import { newFile } from './image-names.js';
import {
  asksForHelp,
  formattingLine,
  IMAGE_OPTIONS,
  imageOptionsHelp,
  parseImageOptions,
} from './image-options.js';
import { printable } from './units.js';

export const create: Command = {
  name: 'create',
  usage: '[options] FILE [SIZE]',
  summary:
    'Makes an image. SIZE is in bytes or has a suffix k, M, G, T, P or E; with a backing file it is optional.',
  positionals: [0, 2],
  options: [
    { long: 'format', short: 'f', value: 'FMT', help: 'raw or qcow2 (raw)' },
    IMAGE_OPTIONS,
    { long: 'backing', short: 'b', value: 'FILE', help: 'backing file; relative to the folder of the image' },
    { long: 'backing-format', short: 'F', value: 'FMT', help: 'format of the backing file' },
    { long: 'unsafe', short: 'u', help: 'do not look whether there is such a backing file; needs SIZE' },
    { long: 'force', help: 'replace a file that is there' },
    { long: 'quiet', short: 'q', help: 'print nothing' },
    OUTPUT,
  ],
  run: async (args) => {
    const format = args.choice('format', TARGET_FORMATS, 'raw');
    const lists = args.texts('options') ?? [];
    if (asksForHelp(lists)) {
      console.log(imageOptionsHelp(format));
      return 0;
    }
    const [file, sizeText] = args.positionals;
    if (file === undefined) throw usageError("create needs a FILE; see 'stillframe create --help'");
    const { creation, given, ...parsed } = parseImageOptions(format, lists);
    if (sizeText !== undefined && parsed.size !== undefined) {
      throw usageError('the size must be given only once: as SIZE or as -o size');
    }
    const size = sizeText === undefined ? parsed.size : parseSize(sizeText, 'SIZE');
    const backingFile = args.text('backing') ?? parsed.backingFile;
    const backingFormat = args.choice('backing-format', FORMATS) ?? parsed.backingFormat;
    if (backingFile !== undefined && backingFormat === undefined) {
      throw usageError(
        'a backing file needs its format, since guessing it is unsafe: add -F raw or -F qcow2',
      );
    }
    if (backingFile === undefined && backingFormat !== undefined) {
      throw usageError('Backing format cannot be used without backing file: name it with -b');
    }
    const engine = await createEngine({ workers: 1 });
    try {
      const length = await engine.createImage(newFile(file), {
        ...creation,
        format,
        length: size,
        backingFile,
        backingFormat,
        unsafeBacking: args.flag('unsafe'),
        force: args.flag('force'),
      });
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify({ type: 'result', filename: file, format, 'virtual-size': length }));
      } else if (!args.flag('quiet')) {
        const settled = { length: size ?? length, backingFile, backingFormat };
        console.log(formattingLine(printable(file), format, given, settled));
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
