import { type CompareResult, createEngine } from '../index.js';
import {
  ALLOW_BACKING,
  type Command,
  FORCE_SHARE,
  FORMAT,
  OUTPUT,
  OUTPUTS,
  PROGRESS,
  parseSnapshot,
  QUIET,
  SNAPSHOT,
} from './command.js';
import { howToOpen, IMAGE_NAMES, namedImage } from './image-names.js';
import { ProgressLine, toolProgress } from './progress.js';

/** qemu-img names the sector. */
const SECTOR = 512;

function human(result: CompareResult): string[] {
  // Like qemu-img, which looks at what both have first.
  const warned = result.sizesDiffer && (result.identical || result.beyondEnd === true);
  const warning = warned ? ['Warning: Image size mismatch!'] : [];
  switch (result.reason) {
    case 'size':
      return ['Strict mode: Image size mismatch!'];
    case 'allocation':
      return [...warning, `Strict mode: Offset ${result.offset} block status mismatch!`];
    case 'content':
      return [
        ...warning,
        `Content mismatch at offset ${Math.floor((result.offset ?? 0) / SECTOR) * SECTOR}!`,
      ];
    default:
      return [...warning, 'Images are identical.'];
  }
}

export const compare: Command = {
  name: 'compare',
  usage: '[options] FILE1 FILE2',
  summary:
    'Compares what two images read as. Exit status: 0 the same, 1 different, 2 an image cannot be opened,\n' +
    '3 no allocation status, 4 an image cannot be read.',
  positionals: [2, 2],
  options: [
    { ...FORMAT, help: 'format of the first image' },
    { long: 'second-format', short: 'F', value: 'FMT', help: 'format of the second image' },
    { long: 'strict', short: 's', help: 'sizes and allocation must agree too' },
    { ...SNAPSHOT, help: `${SNAPSHOT.help} (of the first image)` },
    PROGRESS,
    QUIET,
    ALLOW_BACKING,
    FORCE_SHARE,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  failure: (error) => (error.code === 'ERR_STILLFRAME_IO' ? 4 : 2),
  run: async (args) => {
    const [first = '', second = ''] = args.positionals;
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const line = new ProgressLine(process.stderr);
    const engine = await createEngine();
    try {
      const [one, other] = [
        await namedImage(engine, args, first),
        await namedImage(engine, args, second, { format: 'second-format' }),
      ];
      const result = await engine.compareImages(one.path, other.path, {
        strict: args.flag('strict'),
        first: { ...howToOpen(one, args), snapshot: parseSnapshot(args.text('snapshot')) },
        second: howToOpen(other, args),
        onProgress: toolProgress(line, args),
      });
      line.clear();
      if (json) console.log(JSON.stringify({ type: 'result', ...result }));
      else if (!args.flag('quiet')) for (const text of human(result)) console.log(text);
      return result.identical ? 0 : 1;
    } finally {
      await engine.close();
    }
  },
};
