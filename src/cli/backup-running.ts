import {
  type BackupJob,
  type BackupProgress,
  backupRunning,
  createEngine,
  StillframeError,
} from '../index.js';
import { describeResult } from './backup-result.js';
import {
  type Arguments,
  COMPRESSION,
  type Option,
  POLICIES,
  parseSize,
  TARGET_FORMATS,
  usageError,
} from './command.js';
import { PROGRESS_STYLES, showProgress } from './progress.js';
import { cancelOnSignal, tellInterrupted } from './signals.js';

const MODES = ['full', 'incremental', 'bitmap'] as const;
const BITMAP_MODES = ['on-success', 'never'] as const;

/** Options of `backup` that are about a running QEMU. */
export const RUNNING_OPTIONS: readonly Option[] = [
  {
    long: 'qmp',
    value: 'SOCKET',
    help: 'back up drives of a running QEMU, with nothing but its QMP socket; its guest goes on',
  },
  {
    long: 'device',
    value: 'NAME[=TARGET]',
    multiple: true,
    help: 'with --qmp: a drive, by its device or its node, and its target; several are backed up at one instant, all or none',
  },
  {
    long: 'scratch',
    value: 'DIR',
    help: 'with --qmp: folder for old data, which that QEMU can write to (that of the image)',
  },
  {
    long: 'nbd',
    value: 'ADDRESS',
    help: 'with --qmp: where its NBD server listens, if it has one already: unix:PATH or HOST:PORT',
  },
  {
    long: 'guest-agent',
    value: 'SOCKET',
    help: "with --qmp: freeze the guest's file systems for the moment of the instant, by its guest agent",
  },
  {
    long: 'guest-agent-timeout',
    value: 'SECONDS',
    help: 'how long the guest agent may take for an answer before the backup is given up (30)',
  },
  {
    long: 'allow-iothreads',
    help: 'with --qmp: of a QEMU before 9.0 too that has iothreads, although it may end itself when this is killed',
  },
];

interface Wanted {
  readonly device: string;
  readonly target: string;
  readonly backing: string | undefined;
}

/** The drives, with their targets and the backups before. */
function wantedDisks(args: Arguments): Wanted[] {
  const devices = args.texts('device') ?? [];
  const [positional, ...more] = args.positionals;
  const [only] = devices;
  if (more.length > 0)
    throw usageError(`'${more[0]}' is one target too many; see 'stillframe backup --help'`);
  if (only === undefined) {
    throw usageError(
      'with --qmp SOCKET say which drive and where to: --device NAME TARGET, or --device NAME=TARGET',
    );
  }
  let named: readonly Omit<Wanted, 'backing'>[];
  if (positional === undefined) named = devices.map(splitDevice);
  else if (devices.length === 1 && !only.includes('=')) named = [{ device: only, target: positional }];
  else
    throw usageError(
      `say with each drive where it goes: --device NAME=TARGET, and not '${positional}' as well`,
    );
  for (const [index, { target }] of named.entries()) {
    if (named.findIndex((other) => other.target === target) !== index) {
      throw usageError(`'${target}' cannot be the target of two drives`);
    }
  }
  const backings = backingsOf(args.texts('backing') ?? [], named);
  return named.map((one) => ({ ...one, backing: backings.get(one.device) }));
}

function splitDevice(text: string): Omit<Wanted, 'backing'> {
  const at = text.indexOf('=');
  if (at > 0 && at < text.length - 1) return { device: text.slice(0, at), target: text.slice(at + 1) };
  throw usageError(`say where the drive goes: --device ${text.replace(/=.*/s, '')}=TARGET`);
}

function backingsOf(
  texts: readonly string[],
  named: readonly Omit<Wanted, 'backing'>[],
): ReadonlyMap<string, string> {
  const backings = new Map<string, string>();
  for (const text of texts) {
    const owner = named.find(({ device }) => text.startsWith(`${device}=`))?.device;
    const [only, ...others] = named;
    if (owner !== undefined) backings.set(owner, text.slice(owner.length + 1));
    else if (only !== undefined && others.length === 0) backings.set(only.device, text);
    else throw usageError(`say which drive's backup is meant: --backing NAME=${text}`);
  }
  return backings;
}

function seconds(args: Arguments, name: string): number | undefined {
  const text = args.text(name);
  if (text === undefined) return undefined;
  const value = Number(text);
  if (/^\d+(\.\d+)?$/.test(text) && value > 0 && value <= 86_400) return value;
  throw usageError(`--${name} takes a number of seconds, not '${text}'`);
}

/** Of several jobs as if they were one. */
async function* progressOf(jobs: readonly BackupJob[]): AsyncGenerator<BackupProgress, void, undefined> {
  for (const job of jobs) {
    for await (const _ of job.progress()) yield jobs.map((one) => one.snapshot()).reduce(sum);
  }
}

function sum(one: BackupProgress, other: BackupProgress): BackupProgress {
  return {
    status: one.status,
    offset: one.offset + other.offset,
    length: one.length + other.length,
    elapsedMs: Math.max(one.elapsedMs, other.elapsedMs),
    clusters: {
      total: one.clusters.total + other.clusters.total,
      planned: one.clusters.planned + other.clusters.planned,
      copied: one.clusters.copied + other.clusters.copied,
      zero: one.clusters.zero + other.clusters.zero,
      cbw: one.clusters.cbw + other.clusters.cbw,
    },
    bytes: {
      read: one.bytes.read + other.bytes.read,
      written: one.bytes.written + other.bytes.written,
    },
  };
}

/** `backup --qmp` */
export async function backupOfRunning(qmp: string, args: Arguments, json: boolean): Promise<number> {
  const wanted = wantedDisks(args);
  const style = args.flag('quiet') ? 'none' : args.choice('progress', PROGRESS_STYLES, 'auto');
  const workers = args.text('workers');
  const common = {
    sync: args.choice('sync', MODES, 'full'),
    bitmap: args.text('bitmap'),
    bitmapMode: args.choice('bitmap-mode', BITMAP_MODES),
    format: args.choice('format', TARGET_FORMATS),
    existing: args.flag('existing'),
    force: args.flag('force'),
    targetClusterSize: args.size('cluster-size'),
    compress: args.text('compress') === '' || args.choice('compress', COMPRESSION),
    speed: args.size('speed'),
    workers: workers === undefined ? undefined : parseSize(workers, '--workers'),
    onSourceError: args.choice('on-source-error', POLICIES, 'report'),
    onTargetError: args.choice('on-target-error', POLICIES, 'report'),
  };
  const timeout = seconds(args, 'guest-agent-timeout');
  const engine = await createEngine();
  const abort = new AbortController();
  const signals = cancelOnSignal(() =>
    abort.abort(new StillframeError('ERR_STILLFRAME_JOB_CANCELLED', 'interrupted')),
  );
  let shown: Promise<void> | undefined;
  try {
    const results = await backupRunning(engine, {
      ...{ qmp, scratch: args.text('scratch'), nbd: args.text('nbd'), guestAgent: args.text('guest-agent') },
      allowIothreads: args.flag('allow-iothreads'),
      guestAgentTimeoutMs: timeout === undefined ? undefined : timeout * 1000,
      disks: wanted.map((one) => ({ ...common, ...one })),
      signal: abort.signal,
      onJobs: (jobs) => {
        shown = showProgress(progressOf(jobs), style);
      },
      onWarning: (message) => process.stderr.write(`stillframe: warning: ${message}\n`),
    });
    await shown;
    const told = results.map(({ outcome: _, target: __, ...counts }) => counts);
    if (json) {
      const disks = told.map((counts, index) => ({ device: wanted[index]?.device, ...counts }));
      console.log(JSON.stringify({ type: 'result', ...(told.length === 1 ? told[0] : { disks }) }));
    } else if (!args.flag('quiet')) {
      const texts = results.map(
        (one, index) => `device:    ${wanted[index]?.device}\n${describeResult(one)}`,
      );
      console.log(texts.join('\n\n'));
    }
    return 0;
  } catch (error) {
    // What is worse than having been interrupted is told.
    const cancelled = error instanceof StillframeError && error.code === 'ERR_STILLFRAME_JOB_CANCELLED';
    if (!signals.interrupted() || !cancelled) throw error;
    return tellInterrupted(json);
  } finally {
    signals.stop();
    await engine.close();
  }
}
