import { createEngine, type ImageInfo } from '../index.js';
import { type Command, FORCE_SHARE, FORMAT, FORMATS, OUTPUT, OUTPUTS } from './command.js';
import { formatBytes } from './units.js';

function human(info: ImageInfo): string {
  const lines = [
    `image: ${info.filename}`,
    `file format: ${info.format}`,
    `virtual size: ${formatBytes(info['virtual-size'])} (${info['virtual-size']} bytes)`,
    `disk size: ${formatBytes(info['actual-size'])}`,
  ];
  if (info['cluster-size'] !== undefined) lines.push(`cluster_size: ${info['cluster-size']}`);
  const backing = info['backing-filename'];
  if (backing !== undefined) {
    const full = info['full-backing-filename'];
    lines.push(`backing file: ${backing}${full === backing ? '' : ` (actual path: ${full})`}`);
  }
  if (info['backing-filename-format'] !== undefined) {
    lines.push(`backing file format: ${info['backing-filename-format']}`);
  }
  const specific = info['format-specific']?.data;
  if (specific !== undefined) {
    lines.push('Format specific information:');
    for (const [name, value] of Object.entries(specific)) {
      lines.push(`    ${name.replaceAll('-', ' ')}: ${value}`);
    }
  }
  return lines.join('\n');
}

export const info: Command = {
  name: 'info',
  usage: '[options] FILE',
  summary: 'Describes an image. Its backing file is not opened.',
  positionals: [1, 1],
  options: [FORMAT, FORCE_SHARE, OUTPUT],
  run: async (args) => {
    const output = args.choice('output', OUTPUTS, 'human');
    const engine = await createEngine({ workers: 1 });
    try {
      const result = await engine.imageInfo(args.positionals[0] ?? '', {
        format: args.choice('format', FORMATS),
        forceShare: args.flag('force-share'),
      });
      console.log(output === 'json' ? JSON.stringify(result, null, 4) : human(result));
      return 0;
    } finally {
      await engine.close();
    }
  },
};
