import { createEngine, type ImageInfo } from '../index.js';
import { type Command, FORCE_SHARE, FORMAT, OUTPUT, OUTPUTS, QUIET, usageError } from './command.js';
import { editedImage, howToOpen, IMAGE_NAMES, namedImage } from './image-names.js';
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

const ACTIONS = ['create', 'apply', 'delete'] as const;

export const snapshot: Command = {
  name: 'snapshot',
  usage: '[-l | -c NAME | -a NAME | -d NAME] [options] FILE',
  summary: 'Lists the internal snapshots of an image, makes one, goes back to one, or deletes one.',
  positionals: [0, Infinity],
  options: [
    { long: 'list', short: 'l', help: 'list the snapshots' },
    {
      long: 'create',
      short: 'c',
      value: 'NAME',
      multiple: true,
      help: 'make a snapshot of what the image is now',
    },
    {
      long: 'apply',
      short: 'a',
      value: 'NAME',
      multiple: true,
      help: 'make the image what it was in a snapshot, named by its id or name; what was written since is lost',
    },
    {
      long: 'delete',
      short: 'd',
      value: 'NAME',
      multiple: true,
      help: 'delete the first snapshot of that name',
    },
    FORMAT,
    FORCE_SHARE,
    QUIET,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const wanted = args.given.flatMap(({ name, value }) => {
      const action = ACTIONS.find((known) => known === name);
      return action !== undefined ? [{ action, name: value ?? '' }] : name === 'list' ? [undefined] : [];
    });
    if (wanted.length > 1) throw usageError("Cannot mix '-l', '-a', '-c', '-d'");
    const [file, ...more] = args.positionals;
    if (file === undefined || more.length > 0) throw usageError('Expecting one image file name');
    const [action] = wanted;
    const engine = await createEngine({ workers: 1 });
    try {
      if (action !== undefined || wanted.length === 0) {
        const { path, format } = await editedImage(engine, args, file);
        if (action !== undefined) await engine.snapshot(path, action, { format });
        // Like qemu-img, which opens the image and finds nothing to do.
        else await engine.imageInfo(path, { format });
        return 0;
      }
      const named = await namedImage(engine, args, file);
      const { snapshots } = await engine.imageInfo(named.path, howToOpen(named, args));
      if (args.choice('output', OUTPUTS, 'human') === 'json')
        console.log(JSON.stringify(snapshots ?? [], null, 4));
      else if (snapshots !== undefined) {
        for (const line of snapshotTable(snapshots)) console.log(printable(line));
      }
      return 0;
    } finally {
      await engine.close();
    }
  },
};
