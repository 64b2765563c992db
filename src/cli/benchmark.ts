import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Contestant } from '../benchmark/contestant.js';
import { PATTERNS } from '../benchmark/guest-memory.js';
import { Images } from '../benchmark/images.js';
import { type LoadOptions, MODES, measure, type Outcome, type Scenario } from '../benchmark/scenario.js';
import { createEngine } from '../index.js';
import { columns } from './columns.js';
import { type Arguments, type Command, OUTPUT, OUTPUTS, parseSize, usageError } from './command.js';
import { cancelOnSignal, tellInterrupted } from './signals.js';
import { formatBytes } from './units.js';
import { version } from './version.js';

const MiB = 1024 * 1024;
const MAX_BLOCK_BYTES = MiB;

/** The words of a list, each of which is one of `choices`; all of them where it is not given. */
function choices<T extends string>(args: Arguments, name: string, all: readonly T[], fallback: readonly T[]) {
  const text = args.text(name);
  if (text === undefined) return fallback;
  return text.split(',').map((word) => {
    const found = all.find((one) => one === word);
    if (found === undefined) throw usageError(`--${name} takes some of ${all.join(',')}, not '${word}'`);
    return found;
  });
}

function speeds(args: Arguments): (number | undefined)[] {
  return (args.text('target-speeds') ?? 'unlimited').split(',').map((word) => {
    if (word === 'unlimited') return undefined;
    const bytes = parseSize(word, '--target-speeds');
    if (bytes === 0) throw usageError('--target-speeds: a target that takes nothing is never done');
    return bytes;
  });
}

function number(args: Arguments, name: string, fallback: number, least: number, most: number): number {
  const text = args.text(name) ?? String(fallback);
  const value = /^\d+(\.\d+)?$/.test(text) ? Number(text) : Number.NaN;
  if (value >= least && value <= most) return value;
  throw usageError(`--${name} takes a number from ${least} to ${most}, not '${text}'`);
}

/**
 * Every mode with every pattern and target; the guest alone with each pattern first, and once. Nothing would ever empty
 * the scratch file of `none`: its target is one.
 */
function scenariosOf(args: Arguments): Scenario[] {
  const modes = choices(args, 'modes', MODES, MODES);
  const fleecing = choices(args, 'fleece', ['off', 'on'], ['off', 'on']).map((word) => word === 'on');
  const scenarios = choices(args, 'patterns', PATTERNS, ['random']).flatMap((pattern): Scenario[] => [
    ...(modes.includes('off')
      ? [{ mode: 'off', pattern, targetSpeed: undefined, fleece: false } as const]
      : []),
    ...speeds(args).flatMap((targetSpeed) =>
      modes.flatMap((mode) =>
        fleecing
          .filter((fleece) => mode !== 'off' && !(mode === 'none' && fleece))
          .map((fleece) => ({ mode, pattern, targetSpeed, fleece })),
      ),
    ),
  ]);
  if (scenarios.length === 0)
    throw usageError("sync mode 'none' has no fleecing, so there is nothing to measure");
  return scenarios;
}

function loadOf(args: Arguments): LoadOptions {
  const blockBytes = args.size('block-size') ?? 4096;
  if (blockBytes === 0 || blockBytes % 512 !== 0 || blockBytes > MAX_BLOCK_BYTES) {
    throw usageError(`--block-size takes multiples of 512 up to ${MAX_BLOCK_BYTES} bytes`);
  }
  return {
    seconds: number(args, 'seconds', 5, 0.1, 3600),
    warmUp: number(args, 'warm-up', 2, 0, 3600),
    rate: number(args, 'rate', 2000, 1, 1_000_000),
    blockBytes,
  };
}

const microseconds = (value: number): string =>
  Number.isNaN(value) ? '' : value >= 10_000 ? `${(value / 1000).toFixed(0)} ms` : `${value.toFixed(0)} µs`;

function table(outcomes: readonly Outcome[]): string {
  const head = 'program,mode,writes,target,fleecing,backups,each,target holds,p50,p90,p99,p99.9,max,stalled';
  return columns([
    head.split(','),
    ...outcomes.map(({ contestant, mode, pattern, targetSpeed, fleece, backups, guest, ...of }) => {
      const isOn = mode !== 'off';
      return [
        ...[contestant, isOn ? mode : 'no backup', pattern],
        isOn ? (targetSpeed === undefined ? 'unlimited' : `${formatBytes(targetSpeed)}/s`) : '',
        isOn ? (fleece ? 'on' : 'off') : '',
        isOn && mode !== 'none' ? String(backups) : '',
        of.seconds === undefined ? '' : `${of.seconds.toFixed(2)} s`,
        of.targetBytes === undefined ? '' : formatBytes(of.targetBytes),
        ...[guest.p50, guest.p90, guest.p99, guest.p999, guest.max].map(microseconds),
        `${guest.stalledMs.toFixed(0)} ms`,
      ];
    }),
  ]);
}

async function run(args: Arguments): Promise<number> {
  const scenarios = scenariosOf(args);
  const options = loadOf(args);
  const length = args.size('size') ?? 1024 * MiB;
  if (length === 0 || length % MiB !== 0) throw usageError('--size takes whole MiB');
  const isJson = args.choice('output', OUTPUTS, 'human') === 'json';
  const peer = args.text('peer');
  const main = fileURLToPath(new URL('./main.js', import.meta.url));
  const programs = [
    { name: 'stillframe', command: [process.execPath, main, 'daemon'], fleeces: true },
    ...(peer === undefined ? [] : [{ name: 'peer', command: [peer], fleeces: false }]),
  ];
  const abort = new AbortController();
  const signals = cancelOnSignal(() => abort.abort());
  const folder = await mkdtemp(join(args.text('folder') ?? tmpdir(), 'stillframe-benchmark-'));
  const engine = await createEngine({ workers: 1 });
  const outcomes: Outcome[] = [];
  try {
    process.stderr.write(`Making a drive of ${formatBytes(length)} in ${folder} …\n`);
    const images = await Images.make(engine, folder, length);
    for (const { name, command, fleeces } of programs) {
      const contestant = await Contestant.start(name, command, folder);
      try {
        for (const scenario of scenarios) {
          if (scenario.fleece && !fleeces) continue;
          abort.signal.throwIfAborted();
          outcomes.push(await measure(contestant, images, scenario, options, abort.signal));
          process.stderr.write(`${name}: ${outcomes.length} done\n`);
        }
      } finally {
        await contestant.stop();
      }
    }
  } catch (error) {
    if (!signals.interrupted()) throw error;
    return tellInterrupted(isJson);
  } finally {
    signals.stop();
    await engine.close();
    await rm(folder, { recursive: true, force: true });
  }
  if (isJson) {
    const { seconds, warmUp, rate, blockBytes } = options;
    const method = { length, seconds, warmUp, rate, blockBytes, processors: availableParallelism() };
    const programsUsed = { stillframe: version(), node: process.version, peer };
    console.log(JSON.stringify({ type: 'result', method, programs: programsUsed, scenarios: outcomes }));
  } else {
    console.log(table(outcomes));
  }
  return 0;
}

export const benchmark: Command = {
  name: 'benchmark',
  usage: '[options]',
  summary:
    'Measures what a guest feels of backups in each sync mode: latencies of its writes, and how long it stood still.\n' +
    'A drive of its own is made for it, with data everywhere and a quarter of that in its top image. The load is open:\n' +
    'requests come at random times at a fixed rate, whether those before them were answered or not.',
  positionals: [0, 0],
  options: [
    { long: 'modes', value: 'LIST', help: `some of ${MODES.join(',')} (all); off: the guest alone` },
    {
      long: 'patterns',
      value: 'LIST',
      help: `where the guest writes: some of ${PATTERNS.join(',')} (random)`,
    },
    {
      long: 'target-speeds',
      value: 'LIST',
      help: 'bytes that the target takes in a second, with k, M, G, or unlimited (unlimited)',
    },
    { long: 'fleece', value: 'LIST', help: 'whether old data goes to a scratch file first: off,on (both)' },
    { long: 'seconds', value: 'N', help: 'how long each is measured: one backup after the other (5)' },
    {
      long: 'warm-up',
      value: 'N',
      help: 'seconds in which the guest writes before, and between increments (2)',
    },
    { long: 'rate', value: 'N', help: 'writes of the guest in a second (2000)' },
    { long: 'block-size', value: 'SIZE', help: 'bytes of each (4k)' },
    {
      long: 'size',
      value: 'SIZE',
      help: 'size of the drive (1G); there has to be room for two and a half of it',
    },
    {
      long: 'folder',
      value: 'DIR',
      help: "where the drive and its backups are made (the system's for temporary files)",
    },
    {
      long: 'peer',
      value: 'PROGRAM',
      help: 'a storage daemon that is told the same, without fleecing: qemu-storage-daemon',
    },
    OUTPUT,
  ],
  run,
};
