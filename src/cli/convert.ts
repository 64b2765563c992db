import { createEngine, type Engine } from '../index.js';
import {
  ALLOW_BACKING,
  type Arguments,
  type Command,
  FORCE_SHARE,
  FORMAT,
  FORMATS,
  OUTPUT,
  OUTPUTS,
  PROGRESS,
  parseSize,
  parseSnapshot,
  QUIET,
  TARGET_FORMATS,
  usageError,
} from './command.js';
import { editedImage, IMAGE_NAMES, namedImage, newFile } from './image-names.js';
import { asksForHelp, IMAGE_OPTIONS, imageOptionsHelp, parseImageOptions } from './image-options.js';
import { ProgressLine, toolProgress } from './progress.js';
import { cancelOnSignal, tellInterrupted } from './signals.js';

const MOST_COROUTINES = 16;

/** The image that is there to be written into. @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
async function existingTarget(engine: Engine, args: Arguments, target: string) {
  const manner = {
    format: 'target-format',
    imageOptions: 'target-image-opts',
    forceShare: undefined,
  } as const;
  const { path, format } = await editedImage(engine, args, target, manner);
  if (format === undefined && path !== target) throw usageError(`'${target}': say its driver`);
  const known = TARGET_FORMATS.find((one) => one === format);
  if (format === undefined || known !== undefined) return { path, format: known };
  throw usageError(`'${target}': images of format ${format} are not written to`);
}

export const convert: Command = {
  name: 'convert',
  usage: '[options] FILE [FILE2…] TARGET',
  summary:
    'Converts an image into another; of several, one follows the other. TARGET is TARGET.partial until all of it is\n' +
    'durable; then it replaces what has its name.',
  positionals: [0, 1000],
  options: [
    { ...FORMAT, help: 'format of the sources (looked for in their first bytes)' },
    { long: 'target-format', short: 'O', value: 'FMT', help: 'format of the target: raw or qcow2 (raw)' },
    IMAGE_OPTIONS,
    { long: 'compress', short: 'c', help: 'compress the clusters of a qcow2 target' },
    {
      long: 'backing',
      short: 'B',
      value: 'FILE',
      help: "backing file of the target, with the content of the source's own; copies the top image alone",
    },
    { long: 'backing-format', short: 'F', value: 'FMT', help: 'format of the backing file' },
    { long: 'snapshot', short: 'l', value: 'NAME', help: 'read the source as it is in an internal snapshot' },
    {
      long: 'sparse-size',
      short: 'S',
      value: 'SIZE',
      help: 'smallest run of zeroes that becomes a hole; 0 writes all of it (4k)',
    },
    { long: 'no-create', short: 'n', help: 'write into the image that is there' },
    { long: 'target-is-zero', help: 'with -n: all of the target reads as zeroes' },
    { long: 'bitmaps', help: 'copy the persistent dirty bitmaps of the source' },
    { long: 'skip-broken-bitmaps', help: 'with --bitmaps: leave inconsistent ones out' },
    { long: 'salvage', help: 'what cannot be read becomes zeroes, with a warning' },
    { long: 'rate', short: 'r', value: 'SIZE', help: 'read at most so many bytes in a second' },
    {
      long: 'coroutines',
      short: 'm',
      value: 'N',
      help: 'threads that copy, 1 to 16 (the processors, at most 4)',
    },
    { long: 'out-of-order', short: 'W', help: 'threads write where they are: always so' },
    {
      long: 'copy-offloading',
      short: 'C',
      help: 'taken for the sake of scripts; the data is always looked at',
    },
    { long: 'cache', short: 't', value: 'MODE', help: 'likewise: the target is always durable at the end' },
    { long: 'source-cache', short: 'T', value: 'MODE', help: 'likewise' },
    PROGRESS,
    QUIET,
    ALLOW_BACKING,
    FORCE_SHARE,
    ...IMAGE_NAMES,
    { long: 'target-image-opts', help: 'with -n: TARGET is named like that' },
    OUTPUT,
  ],
  run: async (args) => {
    const targetFormat = args.choice('target-format', TARGET_FORMATS);
    const lists = args.texts('options') ?? [];
    if (asksForHelp(lists)) {
      console.log(imageOptionsHelp(targetFormat ?? 'raw'));
      return 0;
    }
    const sources = args.positionals.slice(0, -1);
    const target = args.positionals.at(-1);
    if (target === undefined || sources.length === 0) throw usageError('Must specify image file name');
    const existing = args.flag('no-create');
    if (existing && lists.length > 0) throw usageError('-o has no effect when skipping image creation');
    if (!existing && args.flag('target-image-opts')) {
      throw usageError('--target-image-opts requires use of -n flag');
    }
    const { creation, size, ...parsed } = parseImageOptions(targetFormat ?? 'raw', lists);
    if (size !== undefined) throw usageError('-o size: the target has the size of the sources');
    const backingFile = args.text('backing') ?? parsed.backingFile;
    const backingFormat = args.choice('backing-format', FORMATS) ?? parsed.backingFormat;
    if (backingFile !== undefined && backingFormat === undefined && !existing) {
      throw usageError('Use of backing file requires explicit backing format: add -F raw or -F qcow2');
    }
    if (args.flag('copy-offloading')) {
      const not = (what: string) => usageError(`Cannot enable copy offloading when ${what} is used`);
      if (args.text('sparse-size') !== undefined) throw not('-S');
      if (args.flag('compress')) throw not('-c');
      if (args.flag('salvage')) throw usageError('Cannot use copy offloading in salvaging mode');
    }
    const workers = args.text('coroutines') === undefined ? undefined : Number(args.text('coroutines'));
    if (workers !== undefined && !(Number.isInteger(workers) && workers >= 1 && workers <= MOST_COROUTINES)) {
      throw usageError(
        `Invalid number of coroutines. Allowed number of coroutines is between 1 and ${MOST_COROUTINES}`,
      );
    }
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const rate = args.text('rate');
    const line = new ProgressLine(process.stderr);
    const engine = await createEngine(workers === undefined ? {} : { workers });
    const ending = new AbortController();
    const signals = cancelOnSignal(() => ending.abort());
    try {
      const named = await Promise.all(sources.map((source) => namedImage(engine, args, source)));
      const { path, format = 'raw' } = existing
        ? await existingTarget(engine, args, target)
        : { path: newFile(target), format: targetFormat };
      await engine.convertImage(named, path, {
        source: {
          snapshot: parseSnapshot(args.text('snapshot')),
          allowBacking: args.texts('allow-backing'),
          forceShare: named.some(({ forceShare }) => forceShare),
        },
        format,
        creation,
        backingFile,
        backingFormat,
        compress: args.flag('compress'),
        existing,
        targetIsZero: args.flag('target-is-zero'),
        sparseSize: args.size('sparse-size'),
        salvage: args.flag('salvage'),
        bitmaps: args.flag('bitmaps'),
        skipBrokenBitmaps: args.flag('skip-broken-bitmaps'),
        bytesPerSecond: rate === undefined ? undefined : parseSize(rate, '--rate'),
        allowTargetBacking: args.texts('allow-backing'),
        signal: ending.signal,
        onProgress: toolProgress(line, args),
        onMessage: (text) => {
          if (!args.flag('quiet')) process.stderr.write(`stillframe: ${text}\n`);
        },
      });
      line.end();
      if (json) console.log(JSON.stringify({ type: 'result', filename: target, format }));
      return 0;
    } catch (error) {
      line.end();
      if (!signals.interrupted()) throw error;
      return tellInterrupted(json);
    } finally {
      signals.stop();
      await engine.close();
    }
  },
};
