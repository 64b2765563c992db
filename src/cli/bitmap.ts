import { type BitmapAction, createEngine } from '../index.js';
import { type Command, FORMAT, FORMATS, usageError } from './command.js';
import { editedImage, IMAGE_NAMES } from './image-names.js';

const ACTIONS = ['add', 'remove', 'clear', 'enable', 'disable', 'merge'] as const;

export const bitmap: Command = {
  name: 'bitmap',
  usage: '(--merge SOURCE | --add | --remove | --clear | --enable | --disable)… [options] FILE BITMAP',
  summary:
    'Changes the persistent dirty bitmap BITMAP of an image, one action after the other.\nA new bitmap is enabled: it records what is written from then on.',
  positionals: [0, Infinity],
  options: [
    { long: 'add', help: 'make it' },
    { long: 'remove', help: 'delete it' },
    { long: 'clear', help: 'mark everything clean' },
    { long: 'enable', help: 'record writes from now on' },
    { long: 'disable', help: 'record no writes from now on' },
    {
      long: 'merge',
      value: 'SOURCE',
      multiple: true,
      help: 'mark dirty what is dirty in the bitmap SOURCE, too',
    },
    {
      long: 'source-file',
      short: 'b',
      value: 'FILE',
      help: 'image that has the bitmap SOURCE (FILE itself)',
    },
    { long: 'source-format', short: 'F', value: 'FMT', help: 'format of that image' },
    {
      long: 'granularity',
      short: 'g',
      value: 'SIZE',
      help: 'bytes a bit of a new bitmap stands for, 512 to 2G (the cluster size, but 4k to 64k)',
    },
    FORMAT,
    ...IMAGE_NAMES,
  ],
  run: async (args) => {
    const asked = args.given.flatMap(({ name, value }) => {
      const action = ACTIONS.find((known) => known === name);
      return action === undefined ? [] : [{ action, value }];
    });
    if (asked.length === 0) {
      throw usageError('Need at least one of --add, --remove, --clear, --enable, --disable, or --merge');
    }
    const has = (action: (typeof ACTIONS)[number]) => asked.some((one) => one.action === action);
    const granularity = args.size('granularity');
    const sourcePath = args.text('source-file');
    const sourceFormat = args.choice('source-format', FORMATS);
    if (granularity !== undefined && !has('add')) throw usageError('granularity only supported with --add');
    if (sourcePath !== undefined && !has('merge')) {
      throw usageError('Merge bitmap source file only supported with --merge');
    }
    if (sourceFormat !== undefined && sourcePath === undefined) throw usageError('-F only supported with -b');
    const [file, name, ...more] = args.positionals;
    if (file === undefined || name === undefined || more.length > 0) {
      throw usageError('Expecting filename and bitmap name');
    }
    const from = sourcePath === undefined ? undefined : { path: sourcePath, format: sourceFormat };
    const actions = asked.map(({ action, value }): BitmapAction => {
      if (action === 'merge') return { action, source: value ?? '', from };
      return action === 'add' ? { action, granularity: granularity || undefined } : { action };
    });
    const engine = await createEngine({ workers: 1 });
    try {
      const { path, format } = await editedImage(engine, args, file);
      await engine.bitmap(path, name, actions, { format });
      return 0;
    } finally {
      await engine.close();
    }
  },
};
