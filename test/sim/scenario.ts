import { Random } from '../support/data.js';
import type { Fault } from './files.js';
import { PRIORITY, STICKY, UNIFORM } from './world.js';

/** A drive, its writers, a job and what goes wrong: everything a run depends on but the order of its steps. */
export interface Scenario {
  readonly source: {
    readonly format: 'raw' | 'qcow2';
    /** Virtual size in bytes. */
    readonly length: number;
    readonly clusterSize: number;
    readonly version: 2 | 3;
    readonly refcountBits: number;
    /** Virtual sizes in bytes of the images below, the nearest first; the last one is raw. */
    readonly backing: readonly number[];
  };
  /** Ranges that are written before anything else, of the images from the bottom up. */
  readonly fill: readonly Range[];
  readonly writers: readonly (readonly GuestOp[])[];
  /** A dirty bitmap that records since the backup before the first job's, or before all. */
  readonly bitmap?: Bitmap | undefined;
  readonly job: Job;
  /** The first job is a mirror; of what a backup has {@link job} says what both have. */
  readonly mirror?: Mirroring | undefined;
  /** The first job makes the backing chain of the drive shorter; with {@link mirror} it commits the drive's own image. */
  readonly chain?: Chaining | undefined;
  /** A second job, with an instant of its own. */
  readonly second?: Job | undefined;
  readonly verbs: readonly Verb[];
  /** `verbs`: the host only gives the verbs; `keeper`: it also sees to it that the job ends; none: there is no host. */
  readonly host: 'none' | 'verbs' | 'keeper';
  readonly faults: readonly Fault[];
  /**
   * The world ends at this step, before this sync of a file is done, or else once nothing is left to do: by a power cut, or by
   * the death of the process.
   */
  readonly end: { readonly step?: number; readonly sync?: number; readonly by: 'power' | 'kill' } | undefined;
  readonly strategy: number;
}

export interface Bitmap {
  /** Bytes. */
  readonly granularity: number;
  /** The image keeps it. */
  readonly persistent: boolean;
  /** What has changed since the backup before, at the beginning. */
  readonly dirty: readonly Pick<Range, 'offset' | 'length'>[];
}

export interface Job {
  readonly sync: 'full' | 'top' | 'none' | 'incremental' | 'bitmap';
  /** Of the scenario's bitmap, which the job goes by, or makes anew; none: it has nothing to do with it. */
  readonly bitmapMode?: 'on-success' | 'never' | 'always' | undefined;
  readonly format: 'raw' | 'qcow2';
  readonly targetClusterSize: number;
  /** Clusters are compressed. */
  readonly compress?: boolean;
  /** Guests save to a scratch file. */
  readonly fleece?: boolean;
  readonly target: 'new' | 'existing' | 'replace';
  /** Threads besides the job's own. */
  readonly helpers: number;
  readonly onCbwError: 'break-guest-write' | 'break-snapshot';
  readonly onSourceError: 'report' | 'ignore' | 'enospc' | 'stop' | 'auto';
  readonly onTargetError: 'report' | 'ignore' | 'enospc' | 'stop' | 'auto';
  readonly autoFinalize: boolean;
  readonly speed: number;
}

/** What is said of a mirror beside what it has in common with a backup. */
export interface Mirroring {
  readonly copyMode: 'background' | 'write-blocking';
  /** Bytes. */
  readonly granularity: number;
  readonly unmap: boolean;
  readonly targetReadsZero: boolean;
  /** What discards do to the target. */
  readonly discard: 'unmap' | 'ignore';
  /** What the host tells it to do once it is ready; `pivot`: to complete, and its target takes the place of the drive. */
  readonly end: 'complete' | 'pivot' | 'cancel';
}

/** A part of a backing chain, whose images are counted from the drive's own down, which is 0. */
export interface Chaining {
  /** What images from `top` on to the one before `base` hold goes into `base`, or into the drive's own. */
  readonly type: 'commit' | 'stream';
  readonly top: number;
  /** With `stream` it may be none. */
  readonly base: number;
}

export interface Range {
  /** The image: 0 is the lowest. */
  readonly layer: number;
  readonly offset: number;
  readonly length: number;
}

export interface GuestOp {
  /** Names the data: unique within the scenario. */
  readonly id: number;
  readonly kind: 'write' | 'zeroes' | 'unmap' | 'discard' | 'read' | 'flush';
  readonly offset: number;
  readonly length: number;
}

export interface Verb {
  readonly verb: 'pause' | 'resume' | 'cancel' | 'cancel-soft' | 'complete' | 'finalize' | 'set-speed';
  /** The host waits until the job is ready, as it does before `cancel-soft` and `complete`. */
  readonly atReady?: boolean;
  /** Virtual milliseconds to wait first. */
  readonly afterMs: number;
  readonly speed: number;
}

const KIB = 1024;

/** The scenario of a seed. */
export function makeScenario(seed: number): Scenario {
  const scenario = makeCopies(seed);
  if (seed % 16 === 0) return withChainJob(scenario, seed);
  if (seed % 8 === 0) return withMirror(scenario, seed);
  return seed % 4 === 3 && scenario.job.sync !== 'none' ? withBitmap(scenario, seed) : scenario;
}

/** The same with a dirty bitmap for the first job. */
function withBitmap(scenario: Scenario, seed: number): Scenario {
  const random = new Random(seed + 2 ** 30);
  const { job, source } = scenario;
  const sync = random.pick<Job['sync']>(['incremental', 'incremental', 'bitmap', 'bitmap', job.sync]);
  const planned = isPlanned(sync);
  const target = planned ? random.pick<Job['target']>(['new', 'new', 'existing']) : job.target;
  const mode = random.pick<Job['bitmapMode']>(
    sync === 'bitmap' ? ['on-success', 'never', 'always'] : ['on-success', 'always'],
  );
  return {
    ...scenario,
    bitmap: makeBitmap(random, source),
    job: {
      ...job,
      sync,
      target,
      format: planned && target === 'new' ? 'qcow2' : job.format,
      bitmapMode: sync === 'incremental' ? 'on-success' : mode,
    },
  };
}

/** The same with a mirror for the first job. */
function withMirror(scenario: Scenario, seed: number): Scenario {
  const random = new Random(seed + 2 ** 29);
  const { job, source, verbs, second } = scenario;
  const sync = random.pick<Job['sync']>(
    source.backing.length > 0 ? ['full', 'full', 'top', 'none'] : ['full', 'full', 'full', 'none'],
  );
  const format = sync === 'top' ? 'qcow2' : random.pick<Job['format']>(['raw', 'qcow2']);
  const target = sync === 'full' ? random.pick<Job['target']>(['new', 'existing']) : 'new';
  const pivots = sync !== 'none' || format === 'qcow2';
  const end = random.pick<Mirroring['end']>(['complete', pivots ? 'pivot' : 'complete', 'pivot', 'cancel']);
  const wait = (): number => random.pick([0, 0.1, 1, 5, 50]) * random.next();
  const given = verbs.filter(({ verb }) => verb !== 'cancel' || random.chance(0.3));
  if (random.chance(0.5)) {
    const verb = random.pick<Verb['verb']>(['complete', 'complete', 'cancel-soft', 'cancel', 'pause']);
    given.push({ verb, afterMs: wait(), speed: 0, atReady: true });
    if (verb === 'pause') given.push({ verb: 'resume', afterMs: wait(), speed: 0 });
  }
  const isPivot = end === 'pivot' && pivots;
  const step = random.between(20, random.pick([300, 1500, 4000]));
  const cut = random.pick<Scenario['end']>([
    { step, by: 'power' },
    { step, by: 'kill' },
    { by: 'power' },
    { sync: random.between(1, 16), by: 'power' },
  ]);
  return {
    ...scenario,
    job: { ...job, sync, format, target, compress: false, fleece: false },
    mirror: {
      copyMode: random.pick<Mirroring['copyMode']>(['background', 'write-blocking']),
      granularity: 2 ** random.between(9, 17),
      unmap: random.chance(0.7),
      targetReadsZero: target === 'new' && random.chance(0.5),
      discard: random.pick<Mirroring['discard']>(['unmap', 'ignore']),
      end: isPivot ? 'pivot' : end === 'pivot' ? 'complete' : end,
    },
    second: isPivot ? undefined : second,
    verbs: given,
    end: random.chance(0.3) ? cut : undefined,
  };
}

/** The same with a longer chain, which the first job makes shorter. */
function withChainJob(scenario: Scenario, seed: number): Scenario {
  const random = new Random(seed + 2 ** 28);
  const { length } = scenario.source;
  const images = random.between(1, 3);
  const kinds = ['stream', 'commit-active', ...(images > 1 ? ['commit', 'commit'] : [])] as const;
  const kind = random.pick(kinds);
  const top = kind === 'commit' ? 1 : 0;
  const base =
    kind === 'stream'
      ? random.pick([images + 1, random.between(2, images + 1)])
      : random.between(top + 1, images);
  const backing = Array.from({ length: images }, () =>
    random.chance(0.5) ? length : 512 * random.between(1, length / 512),
  );
  const fill: Range[] = [];
  for (let layer = 0; layer <= images; layer++) {
    const size = layer === images ? length : (backing[images - 1 - layer] ?? length);
    for (let index = random.between(0, 4); index > 0; index--)
      fill.push({ layer, ...range(random, size, 128 * KIB) });
  }
  const source: Scenario['source'] = { ...scenario.source, format: 'qcow2', backing };
  const { mirror, ...rest } = withMirror({ ...scenario, source, fill }, seed);
  const job: Job = { ...rest.job, sync: 'top', target: 'new', format: base === images ? 'raw' : 'qcow2' };
  const chain: Chaining = { type: kind === 'stream' ? 'stream' : 'commit', top, base };
  if (kind !== 'commit-active') {
    const bitmap = random.chance(0.4) ? makeBitmap(random, source) : undefined;
    return { ...rest, source, fill, bitmap, job: { ...job, helpers: 0 }, chain, second: undefined };
  }
  return {
    ...rest,
    source,
    fill,
    job,
    chain,
    second: undefined,
    mirror: mirror && {
      ...mirror,
      targetReadsZero: false,
      unmap: true,
      end: mirror.end === 'cancel' ? 'cancel' : 'pivot',
    },
  };
}

/** Whether a bitmap says what is copied. */
export function isPlanned(sync: Job['sync']): boolean {
  return sync === 'incremental' || sync === 'bitmap';
}

function makeCopies(seed: number): Scenario {
  const random = new Random(seed);
  const sync = random.pick<Job['sync']>(['full', 'full', 'top', 'none']);
  const sourceFormat = sync === 'top' ? 'qcow2' : random.pick<'raw' | 'qcow2'>(['raw', 'qcow2']);
  const second = random.pick<Job['sync']>(
    sourceFormat === 'qcow2' ? ['full', 'top', 'none'] : ['full', 'none'],
  );
  // Now and then a drive of more clusters than are claimed at once.
  const times = seed % 16 === 5 ? 5 : 1;
  const length = times * 512 * random.between(1, random.pick([200, 700, 1400]));
  const end = random.chance(0.2) ? makeEnd(random, seed) : undefined;
  const backing: number[] = [];
  if (sourceFormat === 'qcow2') {
    const depth = sync === 'top' ? random.between(1, 2) : random.between(0, 2);
    for (let index = 0; index < depth; index++) {
      backing.push(random.chance(0.5) ? length : 512 * random.between(1, length / 512));
    }
  }
  const layers = backing.length + 1;
  const fill: Range[] = [];
  for (let layer = 0; layer < layers; layer++) {
    const size = layer === layers - 1 ? length : (backing[backing.length - 1 - layer] ?? length);
    for (let index = random.between(0, layer === 0 ? 5 : 3); index > 0; index--) {
      fill.push({ layer, ...range(random, size, 128 * KIB) });
    }
  }
  const writers: GuestOp[][] = [];
  let id = 1;
  const heavy = random.chance(0.2);
  for (let writer = random.between(1, 3); writer > 0; writer--) {
    const ops: GuestOp[] = [];
    for (let index = random.between(1, heavy ? 20 : 6); index > 0; index--) {
      const kind = random.pick<GuestOp['kind']>([
        'write',
        'write',
        'write',
        'write',
        'zeroes',
        'unmap',
        'discard',
        'read',
        'flush',
      ]);
      const most = random.pick([512, 4096, 20 * KIB, 100 * KIB]);
      ops.push({
        id: id++,
        kind,
        ...(kind === 'flush' ? { offset: 0, length: 0 } : range(random, length, most)),
      });
    }
    writers.push(ops);
  }
  const wrong = random.next();
  const faults: Fault[] = [];
  if (wrong < 0.4) {
    for (let index = random.between(1, 2); index > 0; index--) {
      faults.push({
        on: random.pick<Fault['on']>([
          'source-read',
          'source-write',
          'source-sync',
          'target-read',
          'target-write',
          'target-write',
          'target-sync',
          'names',
        ]),
        nth: random.between(0, random.pick([2, 12])),
        count: random.pick([1, 1, 2, 1000]),
        code: random.pick<Fault['code']>(['EIO', 'ENOSPC', 'short', 'slow']),
      });
    }
  }
  const verbs: Verb[] = [];
  const wait = (): number => random.pick([0, 0.1, 1, 5, 50, 300]) * random.next();
  if (random.chance(0.4)) {
    for (let index = random.between(1, 3); index > 0; index--) {
      const verb = random.pick<Verb['verb']>(['pause', 'set-speed', 'cancel', 'pause']);
      verbs.push({ verb, afterMs: wait(), speed: random.pick([0, 1 << 20, 64 << 20]) });
      if (verb === 'pause') verbs.push({ verb: 'resume', afterMs: wait(), speed: 0 });
    }
  }
  return {
    source: {
      format: sourceFormat,
      length,
      clusterSize: 2 ** random.between(9, 16),
      version: random.pick<2 | 3>([2, 3, 3]),
      refcountBits: random.pick([16, 16, 16, 1, 8, 64]),
      backing,
    },
    fill,
    writers,
    job: { ...makeJob(random, sync, seed % 3 === 1), fleece: sync !== 'none' && seed % 5 === 2 },
    ...(random.chance(0.25)
      ? {
          second: {
            ...makeJob(random, second, seed % 3 === 2),
            fleece: second !== 'none' && seed % 7 === 3,
            target: 'new' as const,
            helpers: 0,
          },
        }
      : {}),
    verbs,
    host: 'keeper',
    faults,
    end,
    strategy: random.pick([UNIFORM, STICKY, STICKY, PRIORITY]),
  };
}

function makeEnd(random: Random, seed: number): Scenario['end'] {
  const step = random.between(20, random.pick([200, 1500]));
  const by = random.pick<'power' | 'kill'>(['power', 'power', 'kill']);
  // Never is more at risk than before a sync.
  return seed % 2 === 0 ? { sync: 1 + (step % 14), by: 'power' } : { step, by };
}

function makeJob(random: Random, sync: Job['sync'], compress: boolean): Job {
  const policy = (): Job['onSourceError'] =>
    random.pick<Job['onSourceError']>(['report', 'report', 'ignore', 'stop', 'enospc', 'auto']);
  const format = sync === 'full' ? random.pick<'raw' | 'qcow2'>(['raw', 'qcow2']) : 'qcow2';
  return {
    sync,
    format,
    compress: compress && format === 'qcow2',
    targetClusterSize: 2 ** random.between(9, 17),
    target:
      sync === 'full' ? random.pick<Job['target']>(['new', 'new', 'new', 'existing', 'replace']) : 'new',
    helpers: random.between(0, 2),
    onCbwError: random.pick<Job['onCbwError']>(['break-guest-write', 'break-snapshot']),
    onSourceError: policy(),
    onTargetError: policy(),
    autoFinalize: random.chance(0.8),
    speed: random.chance(0.15) ? random.pick([1 << 20, 16 << 20]) : 0,
  };
}

function range(random: Random, size: number, most: number): { offset: number; length: number } {
  const sectors = size / 512;
  const offset = 512 * random.between(0, sectors - 1);
  const length = 512 * random.between(1, Math.max(1, Math.min((size - offset) / 512, most / 512)));
  return { offset, length };
}

/** Whether requests and jobs may fail. */
export function mayFail({ faults }: Scenario): boolean {
  return faults.some(({ code }) => code === 'EIO' || code === 'ENOSPC');
}

function makeBitmap(random: Random, source: Scenario['source']): Bitmap {
  const dirty = Array.from({ length: random.between(0, 4) }, () => range(random, source.length, 100 * KIB));
  return {
    granularity: 2 ** random.between(9, 17),
    persistent: source.format === 'qcow2' && source.version === 3 && random.chance(0.7),
    dirty,
  };
}

/** Whether the first job changes what it works on in place. */
export function isLive({ mirror, chain }: Scenario): boolean {
  return mirror !== undefined || chain !== undefined;
}

/**
 * Whether a job may try for ever: an error never ends under a policy that never gives up, or an image that could not be
 * synced once, which a mirror has to do before it is ready, takes nothing more.
 */
export function isHopeless(scenario: Scenario): boolean {
  return scenario.faults.some(({ count }) => count > 100) || (isLive(scenario) && mayFail(scenario));
}

/** The jobs of a scenario. */
export function jobsOf({ job, second }: Scenario): readonly Job[] {
  return second === undefined ? [job] : [job, second];
}

/** The parts a scenario can do without, for making a failing one smaller. */
export function partsOf(scenario: Scenario): readonly string[] {
  const parts: string[] = [];
  scenario.writers.forEach((ops, writer) => {
    for (const op of ops) parts.push(`w${writer}.${op.id}`);
  });
  scenario.verbs.forEach((_, index) => {
    parts.push(`v${index}`);
  });
  scenario.faults.forEach((_, index) => {
    parts.push(`f${index}`);
  });
  scenario.fill.forEach((_, index) => {
    parts.push(`d${index}`);
  });
  scenario.bitmap?.dirty.forEach((_, index) => {
    parts.push(`b${index}`);
  });
  for (let helper = 0; helper < scenario.job.helpers; helper++) parts.push(`h${helper}`);
  if (scenario.second !== undefined) parts.push('s');
  return parts;
}

/** The scenario without some of its parts. */
export function without(scenario: Scenario, dropped: ReadonlySet<string>): Scenario {
  const kept = (name: string): boolean => !dropped.has(name);
  return {
    ...scenario,
    writers: scenario.writers.map((ops, writer) => ops.filter((op) => kept(`w${writer}.${op.id}`))),
    verbs: scenario.verbs.filter((_, index) => kept(`v${index}`)),
    faults: scenario.faults.filter((_, index) => kept(`f${index}`)),
    fill: scenario.fill.filter((_, index) => kept(`d${index}`)),
    second: kept('s') ? scenario.second : undefined,
    bitmap: scenario.bitmap && {
      ...scenario.bitmap,
      dirty: scenario.bitmap.dirty.filter((_, index) => kept(`b${index}`)),
    },
    job: {
      ...scenario.job,
      helpers: Array.from({ length: scenario.job.helpers }, (_, helper) => `h${helper}`).filter(kept).length,
    },
  };
}
