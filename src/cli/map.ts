import { StillframeError } from '../errors.js';
import { createEngine, type MapEntry } from '../index.js';
import {
  ALLOW_BACKING,
  type Command,
  FORCE_SHARE,
  FORMAT,
  FORMATS,
  OUTPUT,
  OUTPUTS,
  parseSnapshot,
  SNAPSHOT,
} from './command.js';
import { printable } from './units.js';

/** The line of qemu-img's JSON map; the list is printed piece by piece, since it can be very long. */
function jsonLine({ start, length, depth, present, zero, data, offset }: MapEntry): string {
  const place = offset === undefined ? '' : `, "offset": ${offset}`;
  return (
    `{ "start": ${start}, "length": ${length}, "depth": ${depth}, "present": ${present}, ` +
    `"zero": ${zero}, "data": ${data}${place}}`
  );
}

function humanLine(entry: MapEntry): string | undefined {
  if (!entry.data || entry.zero) return undefined;
  if (entry.offset === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      'the image has compressed clusters, which have no place to print; use --output json',
    );
  }
  const hex = (value: number): string => (value === 0 ? '0' : `0x${value.toString(16)}`);
  return `${hex(entry.start).padEnd(16)}${hex(entry.length).padEnd(16)}${hex(entry.offset).padEnd(16)}${printable(entry.filename ?? '')}`;
}

export const map: Command = {
  name: 'map',
  usage: '[options] FILE',
  summary: 'Lists the extents of an image and its backing chain.',
  positionals: [1, 1],
  options: [
    FORMAT,
    { long: 'start-offset', short: 's', value: 'SIZE', help: 'where to begin (0)' },
    { long: 'max-length', short: 'l', value: 'SIZE', help: 'how much to map (to the end)' },
    SNAPSHOT,
    ALLOW_BACKING,
    FORCE_SHARE,
    OUTPUT,
  ],
  run: async (args) => {
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const file = args.positionals[0] ?? '';
    const engine = await createEngine({ workers: 1 });
    let failure: unknown;
    let lines = 0;
    try {
      if (!json) console.log('Offset          Length          Mapped to       File');
      const print = (entries: readonly MapEntry[]): void => {
        if (failure !== undefined) return;
        try {
          const printed: string[] = [];
          for (const entry of entries) {
            const line = json ? jsonLine(entry) : humanLine(entry);
            if (line === undefined) continue;
            printed.push(json ? `${lines++ === 0 ? '[' : ',\n'}${line}` : `${line}\n`);
          }
          process.stdout.write(printed.join(''));
        } catch (error) {
          failure = error;
        }
      };
      await engine.mapImage(file, print, {
        start: args.size('start-offset'),
        length: args.size('max-length'),
        format: args.choice('format', FORMATS),
        snapshot: parseSnapshot(args.text('snapshot')),
        allowBacking: args.texts('allow-backing'),
        forceShare: args.flag('force-share'),
      });
      if (failure !== undefined) throw failure;
      if (json) console.log(lines === 0 ? '[]' : ']');
      return 0;
    } finally {
      await engine.close();
    }
  },
};
