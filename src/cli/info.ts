import { createEngine, type ImageInfo } from '../index.js';
import { ALLOW_BACKING, type Command, FORCE_SHARE, FORMAT, OUTPUT, OUTPUTS, usageError } from './command.js';
import { howToOpen, IMAGE_NAMES, namedImage } from './image-names.js';
import { snapshotTable } from './snapshot.js';
import { formatBytes, printable } from './units.js';

/** Nested values as qemu-img prints them: names with spaces, list entries by number, four blanks a level. */
function indented(value: object, level: number): string[] {
  const blanks = ' '.repeat(level * 4);
  return Object.entries(value).flatMap(([key, entry]: [string, unknown]) => {
    const name = Array.isArray(value) ? `[${key}]` : key.replaceAll('-', ' ');
    if (typeof entry !== 'object' || entry === null) return [`${blanks}${name}: ${String(entry)}`];
    return [`${blanks}${name}:`, ...indented(entry, level + 1)];
  });
}

function human(info: ImageInfo): string {
  const lines = [
    `image: ${info.filename}`,
    `file format: ${info.format}`,
    `virtual size: ${formatBytes(info['virtual-size'])} (${info['virtual-size']} bytes)`,
    `disk size: ${info['actual-size'] === undefined ? 'unavailable' : formatBytes(info['actual-size'])}`,
  ];
  if (info['cluster-size'] !== undefined) lines.push(`cluster_size: ${info['cluster-size']}`);
  if (info['dirty-flag']) lines.push('cleanly shut down: no');
  const backing = info['backing-filename'];
  if (backing !== undefined) {
    const full = info['full-backing-filename'];
    lines.push(`backing file: ${backing}${full === backing ? '' : ` (actual path: ${full})`}`);
  }
  if (info['backing-filename-format'] !== undefined) {
    lines.push(`backing file format: ${info['backing-filename-format']}`);
  }
  if (info.snapshots !== undefined) lines.push(...snapshotTable(info.snapshots));
  const specific = info['format-specific']?.data;
  if (specific !== undefined) {
    lines.push('Format specific information:', ...indented(specific, 1));
  }
  return lines.map(printable).join('\n');
}

export const info: Command = {
  name: 'info',
  usage: '[options] FILE',
  summary: 'Describes an image. Its backing file is opened with --backing-chain only.',
  positionals: [1, 1],
  options: [
    FORMAT,
    { long: 'backing-chain', help: 'describe all images of the backing chain' },
    ALLOW_BACKING,
    FORCE_SHARE,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const output = args.choice('output', OUTPUTS, 'human');
    const engine = await createEngine({ workers: 1 });
    try {
      const named = await namedImage(engine, args, args.positionals[0] ?? '');
      if (named.layers?.backing) {
        throw usageError('info tells what the header names: leave out what the backing file is');
      }
      const options = howToOpen(named, args);
      const chain = args.flag('backing-chain');
      const infos = chain
        ? await engine.chainInfo(named.path, options)
        : [await engine.imageInfo(named.path, options)];
      if (output === 'json') console.log(JSON.stringify(chain ? infos : infos[0], null, 4));
      else console.log(infos.map(human).join('\n\n'));
      return 0;
    } finally {
      await engine.close();
    }
  },
};
