import { createEngine } from '../index.js';
import {
  type Command,
  FORMATS,
  type Option,
  OUTPUT,
  OUTPUTS,
  parseSize,
  TARGET_FORMATS,
  usageError,
} from './command.js';

const imageOptions = {
  cluster_size: 'cluster size in bytes, a power of two from 512 to 2M (64k)',
  compat: '1.1 (default) or 0.10 for version 2',
  refcount_bits: 'width of a reference count in bits, a power of two from 1 to 64 (16)',
  lazy_refcounts: 'on or off (off)',
  compression_type: 'zlib (default) or zstd',
  backing_file: 'as -b',
  backing_fmt: 'as -F',
  size: 'virtual size',
} as const;

type ImageOption = keyof typeof imageOptions;

function isImageOption(name: string): name is ImageOption {
  return name in imageOptions;
}

function parseImageOptions(list: readonly string[]): Partial<Record<ImageOption, string>> {
  const options: Partial<Record<ImageOption, string>> = {};
  for (const pair of list.flatMap((text) => text.split(','))) {
    const [name = '', ...rest] = pair.split('=');
    if (!isImageOption(name) || rest.length === 0) {
      throw usageError(
        `-o ${pair}: options are ${Object.keys(imageOptions).join(', ')}; '-o help' explains them`,
      );
    }
    options[name] = rest.join('=');
  }
  return options;
}

function oneOf<T extends string>(
  name: ImageOption,
  value: string | undefined,
  choices: readonly T[],
): T | undefined {
  if (value === undefined) return undefined;
  const found = choices.find((choice) => choice === value);
  if (found === undefined) throw usageError(`-o ${name} takes ${choices.join(' or ')}, not '${value}'`);
  return found;
}

const formatOption: Option = { long: 'format', short: 'f', value: 'FMT', help: 'raw or qcow2 (raw)' };

export const create: Command = {
  name: 'create',
  usage: '[options] FILE [SIZE]',
  summary:
    'Makes an image. SIZE is in bytes or has a suffix k, M, G or T; with a backing file it is optional.',
  positionals: [0, 2],
  options: [
    formatOption,
    {
      long: 'options',
      short: 'o',
      value: 'K=V,…',
      multiple: true,
      help: "options of format qcow2; 'help' lists them",
    },
    { long: 'backing', short: 'b', value: 'FILE', help: 'backing file; relative to the folder of the image' },
    { long: 'backing-format', short: 'F', value: 'FMT', help: 'format of the backing file' },
    { long: 'force', help: 'replace a file that is there' },
    { long: 'quiet', short: 'q', help: 'print nothing' },
    OUTPUT,
  ],
  run: async (args) => {
    if (args.texts('options')?.includes('help')) {
      for (const [name, help] of Object.entries(imageOptions)) console.log(`  ${name.padEnd(18)}${help}`);
      return 0;
    }
    const [file, size] = args.positionals;
    if (file === undefined) throw usageError("create needs a FILE; see 'stillframe create --help'");
    const options = parseImageOptions(args.texts('options') ?? []);
    const format = args.choice('format', TARGET_FORMATS, 'raw');
    const backingFile = args.text('backing') ?? options.backing_file;
    const backingFormat =
      args.choice('backing-format', FORMATS) ?? oneOf('backing_fmt', options.backing_fmt, FORMATS);
    if (backingFile !== undefined && backingFormat === undefined) {
      throw usageError(
        'a backing file needs its format, since guessing it is unsafe: add -F raw or -F qcow2',
      );
    }
    const compat = oneOf('compat', options.compat, ['1.1', 'v3', '0.10', 'v2']);
    const sizeText = size ?? options.size;
    const engine = await createEngine({ workers: 1 });
    try {
      const length = await engine.createImage(file, {
        format,
        length: sizeText === undefined ? undefined : parseSize(sizeText, 'SIZE'),
        backingFile,
        backingFormat,
        clusterSize:
          options.cluster_size === undefined ? undefined : parseSize(options.cluster_size, '-o cluster_size'),
        version: compat === undefined ? undefined : compat === '0.10' || compat === 'v2' ? 2 : 3,
        refcountBits:
          options.refcount_bits === undefined
            ? undefined
            : parseSize(options.refcount_bits, '-o refcount_bits'),
        lazyRefcounts:
          options.lazy_refcounts === undefined
            ? undefined
            : oneOf('lazy_refcounts', options.lazy_refcounts, ['on', 'off']) === 'on',
        compressionType: oneOf('compression_type', options.compression_type, ['zlib', 'zstd']),
        force: args.flag('force'),
      });
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify({ type: 'result', filename: file, format, 'virtual-size': length }));
      } else if (!args.flag('quiet')) {
        console.log(`Formatted '${file}', format ${format}, ${length} bytes`);
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
