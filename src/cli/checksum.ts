import { createEngine } from '../index.js';
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
  usageError,
} from './command.js';
import { howToOpen, IMAGE_NAMES, namedImage } from './image-names.js';
import { ProgressLine, toolProgress } from './progress.js';

export const checksum: Command = {
  name: 'checksum',
  usage: '[options] FILE',
  summary:
    'Prints the checksum of what an image reads as, which a backup of it with --sync full has as well.\n' +
    'With --expect: exit status 0 the same, 1 another one.',
  positionals: [1, 1],
  options: [
    FORMAT,
    { long: 'expect', value: 'HEX', help: 'compare with this one, as a backup printed it' },
    {
      long: 'cluster-size',
      value: 'SIZE',
      help: 'granularity of the backup, which it prints as well: a power of two up to 2M (64k)',
    },
    SNAPSHOT,
    PROGRESS,
    QUIET,
    ALLOW_BACKING,
    FORCE_SHARE,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  failure: () => 2,
  run: async (args) => {
    const [file = ''] = args.positionals;
    const expected = args.text('expect')?.toLowerCase();
    if (expected !== undefined && !/^[\da-f]{16}$/.test(expected)) {
      throw usageError(`--expect takes the 16 hexadecimal digits of a checksum, not '${expected}'`);
    }
    const line = new ProgressLine(process.stderr);
    const engine = await createEngine();
    try {
      const named = await namedImage(engine, args, file);
      const result = await engine.imageChecksum(named.path, {
        ...howToOpen(named, args),
        snapshot: parseSnapshot(args.text('snapshot')),
        clusterSize: args.size('cluster-size'),
        onProgress: toolProgress(line, args),
      });
      line.clear();
      const agrees = expected === undefined || expected === result.root;
      const json = args.choice('output', OUTPUTS, 'human') === 'json';
      if (json) {
        console.log(
          JSON.stringify({
            ...{ type: 'result', filename: file, ...result },
            ...(expected === undefined ? {} : { agrees }),
          }),
        );
      } else if (!args.flag('quiet')) {
        const verdict = agrees ? '' : `: not ${expected}, with clusters of ${result.clusterSize} bytes`;
        console.log(`${result.algorithm} ${result.root}${verdict}`);
      }
      return agrees ? 0 : 1;
    } finally {
      await engine.close();
    }
  },
};
