import { createEngine } from '../index.js';
import { describeResult } from './backup-result.js';
import { backupOfRunning, RUNNING_OPTIONS } from './backup-running.js';
import {
  ALLOW_BACKING,
  COMPRESSION,
  type Command,
  FORCE_SHARE,
  FORMATS,
  OUTPUT,
  OUTPUTS,
  POLICIES,
  parseSize,
  parseSnapshot,
  SNAPSHOT,
  TARGET_FORMATS,
  usageError,
} from './command.js';
import { PROGRESS_STYLES, showProgress } from './progress.js';
import { cancelOnSignal, tellInterrupted } from './signals.js';

const MODES = ['full', 'top', 'none', 'incremental', 'bitmap'] as const;
const BITMAP_MODES = ['on-success', 'never', 'always'] as const;

export const backup: Command = {
  name: 'backup',
  usage:
    'SOURCE TARGET --sync full|top|none|incremental|bitmap [options]\n' +
    '       stillframe backup --qmp SOCKET --device NAME=TARGET... [--sync full|incremental|bitmap] [options]',
  summary:
    'Backs up an image. TARGET is TARGET.partial until everything is durable. Nobody can write to SOURCE through\n' +
    'this command, so with --sync none the target is complete at once: an empty image on top of SOURCE.',
  positionals: [0, 2],
  options: [
    ...RUNNING_OPTIONS,
    { long: 'sync', value: 'MODE', help: 'full, top, none, incremental or bitmap' },
    {
      long: 'bitmap',
      short: 'B',
      value: 'NAME',
      help: 'dirty bitmap of SOURCE (with --qmp: in that QEMU) that says what incremental and bitmap copy; full and top bring it up to date (with --qmp: make it as well)',
    },
    {
      long: 'bitmap-mode',
      value: 'MODE',
      help: 'when what was copied is taken off the bitmap: on-success, never or always (incremental: on-success)',
    },
    {
      long: 'backing',
      short: 'b',
      value: '[NAME=]FILE',
      multiple: true,
      help: 'with incremental and bitmap: the backup before, which a new qcow2 target lies on (of the drive NAME, where there are several)',
    },
    { long: 'format', value: 'FMT', help: "format of the target: raw or qcow2 (the source's)" },
    {
      long: 'source-format',
      short: 'f',
      value: 'FMT',
      help: 'format of the source (looked for in its first bytes)',
    },
    SNAPSHOT,
    { long: 'cluster-size', value: 'SIZE', help: 'cluster size of a new qcow2 target (64k)' },
    {
      long: 'compress',
      value: '[zlib|zstd]',
      optional: COMPRESSION,
      help: 'compress the clusters of a qcow2 target (zlib, or the type of an existing one)',
    },
    {
      long: 'fleece',
      value: '[=DIR]',
      optional: [],
      help: 'save old data to a scratch file in DIR (the folder of SOURCE) where somebody writes meanwhile',
    },
    {
      long: 'speed',
      short: 'r',
      value: 'RATE',
      help: 'limit in bytes per second, with k, M, G or T; 0 is none (0)',
    },
    { long: 'workers', short: 'm', value: 'N', help: 'threads that copy (the processors, at most 4)' },
    { long: 'force', help: 'replace a file that is there, once the backup is complete' },
    { long: 'existing', short: 'n', help: 'write into the image that is there' },
    { long: 'on-source-error', value: 'POLICY', help: 'report, ignore, enospc, stop or auto (report)' },
    { long: 'on-target-error', value: 'POLICY', help: 'likewise' },
    {
      long: 'progress',
      short: 'p',
      value: 'STYLE',
      help: 'auto, bar, plain, json or none, on stderr (auto)',
    },
    { long: 'quiet', short: 'q', help: 'no progress, and no result but its JSON' },
    ALLOW_BACKING,
    FORCE_SHARE,
    OUTPUT,
  ],
  run: async (args) => {
    const [source = '', target = ''] = args.positionals;
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const qmp = args.text('qmp');
    if (qmp !== undefined) return await backupOfRunning(qmp, args, json);
    const [alone] = RUNNING_OPTIONS.filter(({ long }) => args.values[long] !== undefined);
    if (alone !== undefined) throw usageError(`--${alone.long} goes with --qmp SOCKET`);
    if (args.positionals.length < 2) throw usageError('say what to back up and where to: SOURCE TARGET');
    const sync = args.choice('sync', MODES);
    if (sync === undefined)
      throw usageError(`say which: --sync ${MODES.join(', --sync ')}; see 'stillframe backup --help'`);
    const workers = args.text('workers');
    const style = args.flag('quiet') ? 'none' : args.choice('progress', PROGRESS_STYLES, 'auto');
    const options = {
      target,
      sync,
      format: args.choice('format', TARGET_FORMATS),
      bitmap: args.text('bitmap'),
      bitmapMode: args.choice('bitmap-mode', BITMAP_MODES),
      backing: args.texts('backing')?.at(-1),
      existing: args.flag('existing'),
      force: args.flag('force'),
      targetClusterSize: args.size('cluster-size'),
      compress: args.text('compress') === '' || args.choice('compress', COMPRESSION),
      fleece: args.text('fleece') === '' ? true : args.text('fleece'),
      speed: args.size('speed'),
      workers: workers === undefined ? undefined : parseSize(workers, '--workers'),
      onSourceError: args.choice('on-source-error', POLICIES, 'report'),
      onTargetError: args.choice('on-target-error', POLICIES, 'report'),
    };
    const sourceFormat = args.choice('source-format', FORMATS);
    const engine = await createEngine(options.workers === undefined ? {} : { workers: options.workers });
    try {
      const disk = await engine.openDisk(source, {
        snapshot: parseSnapshot(args.text('snapshot')),
        format: sourceFormat,
        // The bitmap is brought up to date in the image.
        readOnly: options.bitmap === undefined || options.bitmapMode === 'never',
        allowBacking: args.texts('allow-backing'),
        forceShare: args.flag('force-share'),
      });
      const job = await disk.backup(options);
      const signals = cancelOnSignal(() => job.cancel());
      try {
        if (job.sync === 'none') job.cancel();
        const shown = showProgress(job.progress(), style);
        const result = await job.result();
        await shown;
        const { outcome: _, target: __, ...counts } = result;
        if (json) console.log(JSON.stringify({ type: 'result', ...counts }));
        else if (!args.flag('quiet')) console.log(describeResult(result));
        return 0;
      } catch (error) {
        if (!signals.interrupted()) throw error;
        return tellInterrupted(json);
      } finally {
        signals.stop();
      }
    } finally {
      await engine.close();
    }
  },
};
