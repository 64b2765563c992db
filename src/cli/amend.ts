import { createEngine, type ImageInfo } from '../index.js';
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
import { amendOptionsHelp, asksForHelp, parseAmendOptions } from './image-options.js';
import { ProgressLine, toolProgress } from './progress.js';
import { printable } from './units.js';

function bitmapsOf({ 'format-specific': specific }: ImageInfo): readonly { readonly name: string }[] {
  return specific?.type === 'qcow2' ? (specific.data.bitmaps ?? []) : [];
}

export const amend: Command = {
  name: 'amend',
  usage: '[options] -o K=V,… FILE',
  summary:
    'Changes options of a qcow2 image. With compat=0.10 it loses its dirty bitmaps, which that version does not have.',
  positionals: [0, Infinity],
  options: [
    {
      long: 'options',
      short: 'o',
      value: 'K=V,…',
      multiple: true,
      help: "what is to be changed; 'help' lists what can be",
    },
    FORMAT,
    { long: 'force', help: 'changes nothing: no option that there is needs it' },
    PROGRESS,
    QUIET,
    ALLOW_BACKING,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const lists = args.texts('options');
    if (lists === undefined) throw usageError('Must specify options (-o)');
    const [file, ...more] = args.positionals;
    const format = args.choice('format', FORMATS);
    const help = asksForHelp(lists);
    if (help && format === 'qcow2') {
      console.log(amendOptionsHelp());
      return 0;
    }
    if (file === undefined || more.length > 0) throw usageError('Expecting one image file name');
    const line = new ProgressLine(process.stderr);
    const engine = await createEngine({ workers: 1 });
    try {
      const { path, ...named } = await editedImage(engine, args, file);
      const before = await engine.imageInfo(path, named);
      const found = before.format;
      if (found !== 'qcow2')
        throw usageError(`images of format ${found} have no options that can be amended`);
      if (help) {
        console.log(amendOptionsHelp());
        return 0;
      }
      const { creation, size, backingFile, backingFormat } = parseAmendOptions(lists);
      const { version, dataFile, dataFileRaw, lazyRefcounts, refcountBits } = creation;
      await engine.amendImage(
        path,
        {
          ...{ format: found, allowBacking: args.texts('allow-backing') },
          ...{ version, length: size, backingFile, backingFormat },
          ...{ dataFile, dataFileRaw, lazyRefcounts, refcountBits },
        },
        toolProgress(line, args),
      );
      line.end();
      if (version === 2 && !args.flag('quiet')) {
        for (const { name } of bitmapsOf(before)) {
          process.stderr.write(
            `stillframe: warning: compat=0.10 has no dirty bitmaps: '${printable(name)}' is gone\n`,
          );
        }
      }
      if (args.choice('output', OUTPUTS, 'human') === 'json') {
        console.log(JSON.stringify({ type: 'result', filename: file }));
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
