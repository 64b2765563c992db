import { createEngine, type ImageCheck } from '../index.js';
import { type Command, FORCE_SHARE, FORMAT, OUTPUT, OUTPUTS, usageError } from './command.js';
import { IMAGE_NAMES, namedImage } from './image-names.js';
import { printable } from './units.js';

const REPAIRS = ['leaks', 'all'] as const;

function percent(part: number, whole: number): string {
  return `${((part * 100) / whole).toFixed(2)}%`;
}

function human(check: ImageCheck): string[] {
  const { corruptions = 0, leaks = 0, 'check-errors': errors } = check;
  const lines: string[] = [];
  if (corruptions + leaks + errors === 0) lines.push('No errors were found on the image.');
  if (corruptions > 0) {
    lines.push('', `${corruptions} errors were found on the image.`);
    lines.push('Data may be corrupted, or further writes to the image may corrupt it.');
  }
  if (leaks > 0) {
    lines.push('', `${leaks} leaked clusters were found on the image.`);
    lines.push('This means waste of disk space, but no harm to data.');
  }
  if (errors > 0) lines.push('', `${errors} internal errors have occurred during the check.`);
  const { 'total-clusters': total = 0, 'allocated-clusters': allocated = 0 } = check;
  if (total > 0 && allocated > 0) {
    const { 'fragmented-clusters': fragmented = 0, 'compressed-clusters': compressed = 0 } = check;
    lines.push(
      `${allocated}/${total} = ${percent(allocated, total)} allocated, ` +
        `${percent(fragmented, allocated)} fragmented, ${percent(compressed, allocated)} compressed clusters`,
    );
  }
  const end = check['image-end-offset'] ?? 0;
  if (end > 0) lines.push(`Image end offset: ${end}`);
  return lines;
}

export const check: Command = {
  name: 'check',
  usage: '[options] FILE',
  summary:
    'Checks the metadata of an image, and repairs it where told to. Exit status: 0 no errors (left), 1 the check\n' +
    'could not be made, 2 the image is corrupt, 3 it has leaked clusters but no errors, 63 its format has no checks.',
  positionals: [1, 1],
  options: [
    FORMAT,
    {
      long: 'repair',
      short: 'r',
      value: 'leaks|all',
      help: 'put right clusters that take space for nothing, or all that can be put right (nothing)',
    },
    { long: 'source-cache', short: 'T', value: 'MODE', help: "qemu-img's; without effect" },
    { long: 'quiet', short: 'q', help: 'print nothing but what is wrong or repaired, on stderr' },
    FORCE_SHARE,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  failure: (error) => (error.code === 'ERR_STILLFRAME_CHECK_UNSUPPORTED' ? 63 : 1),
  run: async (args) => {
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const quiet = args.flag('quiet');
    const engine = await createEngine({ workers: 1 });
    try {
      const repair = args.choice('repair', REPAIRS);
      const named = await namedImage(engine, args, args.positionals[0] ?? '');
      if (repair !== undefined && named.readOnly) throw usageError('read-only images cannot be repaired');
      const result = await engine.checkImage(named.path, {
        format: named.format,
        repair,
        forceShare: named.forceShare,
        onMessage: (line) => process.stderr.write(`${printable(line)}\n`),
        onRepaired: ({ leaks, corruptions }) => {
          if (json || quiet) return;
          console.log('The following inconsistencies were found and repaired:\n');
          console.log(`    ${leaks} leaked clusters\n    ${corruptions} corruptions\n`);
          console.log('Double checking the fixed image now...');
        },
      });
      if (!quiet) console.log(json ? JSON.stringify(result, null, 4) : human(result).join('\n'));
      if (result['check-errors'] > 0) {
        process.stderr.write('stillframe: Check failed\n');
        return 1;
      }
      if ((result.corruptions ?? 0) > 0) return 2;
      return (result.leaks ?? 0) > 0 ? 3 : 0;
    } finally {
      await engine.close();
    }
  },
};
