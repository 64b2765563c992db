import { createEngine, type ImageInfo } from '../index.js';
import { type Command, FORCE_SHARE, FORMAT, FORMATS, OUTPUT, OUTPUTS, usageError } from './command.js';
import { formatBytes, printable } from './units.js';

/** The table of internal snapshots that `qemu-img snapshot -l` and `info` print. */
export function snapshotTable(snapshots: NonNullable<ImageInfo['snapshots']>): string[] {
  const two = (value: number): string => String(value).padStart(2, '0');
  const row = (id: string, tag: string, size: string, date: string, clock: string, icount: string): string =>
    `${id.padEnd(9)} ${tag.padEnd(16)} ${size.padStart(8)}${date.padStart(20)}${clock.padStart(13)}${icount.padStart(11)}`;
  return [
    'Snapshot list:',
    row('ID', 'TAG', 'VM SIZE', 'DATE', 'VM CLOCK', 'ICOUNT'),
    ...snapshots.map((snapshot) => {
      const date = new Date(snapshot['date-sec'] * 1000);
      const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
      const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
      const seconds = snapshot['vm-clock-sec'];
      const ms = Math.floor(snapshot['vm-clock-nsec'] / 1_000_000);
      const clock = `${two(Math.floor(seconds / 3600))}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}.${String(ms).padStart(3, '0')}`;
      const size = formatBytes(snapshot['vm-state-size']);
      return row(snapshot.id, snapshot.name, size, `${day} ${time}`, clock, String(snapshot.icount ?? ''));
    }),
  ];
}

export const snapshot: Command = {
  name: 'snapshot',
  usage: '-l [options] FILE',
  summary: 'Lists the internal snapshots of an image.',
  positionals: [1, 1],
  options: [
    { long: 'list', short: 'l', help: 'list the snapshots' },
    FORMAT,
    FORCE_SHARE,
    { long: 'quiet', short: 'q', help: 'print nothing but errors' },
    OUTPUT,
  ],
  run: async (args) => {
    if (!args.flag('list')) throw usageError("snapshot needs -l; see 'stillframe snapshot --help'");
    const engine = await createEngine({ workers: 1 });
    try {
      const { snapshots } = await engine.imageInfo(args.positionals[0] ?? '', {
        format: args.choice('format', FORMATS),
        forceShare: args.flag('force-share'),
      });
      if (args.choice('output', OUTPUTS, 'human') === 'json')
        console.log(JSON.stringify(snapshots ?? [], null, 4));
      else if (snapshots !== undefined && !args.flag('quiet')) {
        for (const line of snapshotTable(snapshots)) console.log(printable(line));
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
