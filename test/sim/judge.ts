/** What is wrong with a run that is over. */
import { BackupJob, beginBackup } from '#src/backup/backup-job.js';
import { Disk, type DiskDescriptor, freeRoot } from '#src/block/disk.js';
import { closeDiskBitmaps, findBitmap, openDiskBitmaps } from '#src/block/disk-bitmaps.js';
import { type FrameDescriptor, freeFrame } from '#src/block/filters/copy-before-write.js';
import { closeLayer, closeNode, liveDisk, openImage } from '#src/block/graph.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import type { JobMessage } from '#src/job/job.js';
import { arena, buffer, copyBuffer, files, oracle, runtime, type Setup, TARGETS, world } from './context.js';
import type { JobRecord } from './job-record.js';
import { INVARIANTS } from './oracle.js';
import { checkQcow2 } from './qcow2-check.js';
import { isHopeless, isLive, type Job, jobsOf, mayFail, type Range, type Scenario } from './scenario.js';
import {
  BITMAP,
  DRIVE_DISK,
  diskOn,
  EMPTY_USED,
  emptyArena,
  layerPath,
  OLD_TARGET,
  previousOf,
  readImage,
  targetFormat,
  targetPath,
} from './stage.js';
import { POWER_CUT, REDUNDANT, VIOLATED } from './world.js';

interface Ended {
  readonly outcome: 'completed' | 'cancelled' | 'failed';
  readonly error: { readonly code: string; readonly message: string } | undefined;
}

/** A job with what the oracle knows of it. */
interface Case {
  readonly scenario: Scenario;
  readonly job: Job;
  readonly record: JobRecord;
  readonly target: string;
  readonly ended: Ended | undefined;
  /** The host, or the explorer, may have cancelled it. */
  readonly mayBeCancelled: boolean;
  /** It may have failed through no fault of its own. */
  readonly faulty: boolean;
  /** It is no backup. */
  readonly isLive: boolean;
}

function casesOf(scenario: Scenario): Case[] {
  const hopeless = isHopeless(scenario);
  const faulty = world.faulty || mayFail(scenario);
  // A mirror that is not ready any more is cancelled where it should end as it is.
  const cancels =
    scenario.verbs.some(({ verb }) => verb === 'cancel' || verb === 'cancel-soft') ||
    scenario.mirror?.end === 'cancel';
  return jobsOf(scenario).flatMap((job, which) => {
    const [record, target] = [oracle.jobs[which], TARGETS[which]];
    if (record === undefined || target === undefined) return [];
    const mayBeCancelled = hopeless || faulty || (which === 0 && cancels);
    const live = which === 0 && isLive(scenario);
    return [{ scenario, job, record, target, ended: endedOf(record), mayBeCancelled, faulty, isLive: live }];
  });
}

/** The first flaw that `look` finds in a job. */
function firstFlaw(cases: readonly Case[], look: (one: Case) => string | undefined): string | undefined {
  for (const one of cases) {
    const flaw = look(one);
    if (flaw !== undefined) return cases.length === 1 ? flaw : `${flaw} (job ${cases.indexOf(one) + 1})`;
  }
  return undefined;
}

/** The world has come to its end: what is wrong with it? */
export function judge(scenario: Scenario, setup: Setup): string | undefined {
  if (world.aborted === VIOLATED) return world.note;
  if (world.aborted === REDUNDANT) return undefined;
  if (world.aborted === POWER_CUT || isCutAtEnd(scenario)) return judgeAfterCut(scenario);
  const path = layerPath(scenario, scenario.source.backing.length);
  const cases = casesOf(scenario);
  const others = setup.chain?.slice(1) ?? (setup.target === undefined ? [] : [setup.target]);
  const faulty = cases.some((one) => one.faulty);
  const disk = new Disk(runtime, setup.disk, () => copyBuffer);
  const unnoticed = firstFlaw(cases, ({ record, ended, isLive }) => {
    if (isLive && record.frameText !== '') arena.free(JSON.parse(record.frameText).control);
    if (ended === undefined || isLive) return undefined;
    const frame: FrameDescriptor = JSON.parse(record.frameText);
    const broken = [frame, frame.holder].some(
      (one) => one !== undefined && arena.i32[one.control >> 2] !== 0,
    );
    freeFrame(runtime, frame);
    if (!broken || ended.outcome === 'failed') return undefined;
    return `${INVARIANTS.brokenNeverCompletes}: the job's outcome is '${ended.outcome}'`;
  });
  if (unnoticed !== undefined) return unnoticed;
  const [first] = cases;
  const lost = first && judgeBitmap(first, setup.disk);
  if (lost !== undefined) return `${INVARIANTS.bitmap}: ${lost}`;
  closeDiskBitmaps(runtime, setup.disk);
  for (const disk of others) closeDiskBitmaps(runtime, disk);
  for (const control of setup.controls) arena.free(control);
  arena.free(setup.words);
  const live = readNode(disk);
  const wrong = live === undefined ? undefined : oracle.difference(live);
  if (wrong !== undefined) return `${INVARIANTS.source}: ${wrong}`;
  let closed = true;
  try {
    disk.node.flush();
  } catch {
    closed = false;
  }
  const close = setup.chain === undefined ? closeWhole : closeAlone;
  for (const one of [setup.disk, ...others]) {
    try {
      close(one);
    } catch {
      closed = false;
    }
    freeRoot(runtime, one.control);
    arena.free(one.control);
  }
  if (!closed && !faulty) return `${INVARIANTS.errors}: the drive cannot be closed`;
  if (files.openFiles !== 0) return `${INVARIANTS.memory}: ${files.openFiles} files are left open`;
  if (arena.usedBytes !== EMPTY_USED)
    return `${INVARIANTS.memory}: ${arena.usedBytes - EMPTY_USED} bytes are not given back`;
  if (closed) {
    const stored = oracle.difference(readDrive(scenario));
    if (stored !== undefined) return `${INVARIANTS.source}: once closed, ${stored}`;
    const forgotten = withStoredBitmap(scenario, (kept) => first && judgeBitmap(first, kept));
    if (forgotten !== undefined) return `${INVARIANTS.bitmap}: once closed, ${forgotten}`;
  }
  const image = scenario.source.format === 'qcow2' ? checkQcow2(files.content(path)) : undefined;
  if (image !== undefined && image.errors.length > 0)
    return `${INVARIANTS.format}: source: ${image.errors[0]}`;
  if (image !== undefined && image.leaks > 0 && !faulty)
    return `${INVARIANTS.format}: source: ${image.leaks} clusters leak`;
  return firstFlaw(cases, judgeTarget);
}

/** Whether the world ends by a cut where all have done what they had to. */
function isCutAtEnd({ end }: Scenario): boolean {
  return end !== undefined && end.step === undefined && end.sync === undefined;
}

function closeWhole({ node }: DiskDescriptor): void {
  closeNode(runtime, node);
}

/** Closes an image of a chain and nothing that it lies on. */
function closeAlone(disk: DiskDescriptor): void {
  const { node, id, readOnly } = disk;
  if (node.driver !== 'qcow2') {
    closeNode(runtime, node);
    return;
  }
  // What others are committed into may have been opened anew, or could not be.
  const now = readOnly || id === DRIVE_DISK ? node : liveDisk(runtime, disk).descriptor.node;
  if (now.driver === 'qcow2') {
    closeNode(runtime, { ...now, backing: undefined });
    return;
  }
  closeLayer(runtime, now);
  closeNode(runtime, node.file);
}

/** A byte for each granule of the scenario's bitmap: whether it is dirty. */
function bitsOf(scenario: Scenario, disk: DiskDescriptor): Buffer | undefined {
  if (scenario.bitmap === undefined) return undefined;
  const bitmap = findBitmap(runtime, disk, BITMAP, ['busy', 'inconsistent']);
  const bits = Buffer.alloc(bitmap.bits);
  for (let granule = 0; granule < bits.length; granule++) {
    bits[granule] = bitmap.test(granule * bitmap.granularity) ? 1 : 0;
  }
  return bits;
}

/** The next backup that goes by the bitmap copies all that it has to, and no more than what may have changed. */
function judgeBitmap(
  { scenario, job, record, target, ended }: Case,
  disk: DiskDescriptor,
): string | undefined {
  const { bitmap, source, writers } = scenario;
  const bits = bitsOf(scenario, disk);
  if (bitmap === undefined || bits === undefined) return undefined;
  if (!disk.readOnly && !findBitmap(runtime, disk, BITMAP, []).enabled) return 'it does not record any more';
  const settles = ended !== undefined && job.bitmapMode !== undefined && job.bitmapMode !== 'never';
  const isRenewed = settles && ended.outcome === 'completed';
  const isPartial = settles && ended.outcome !== 'completed' && job.bitmapMode === 'always';
  const initial = oracle.initial.subarray(0, source.length);
  const before = isRenewed
    ? record.frozen
    : isPartial && job.target === 'existing'
      ? readImage(target, job.format)
      : previousOf(initial, bitmap);
  const since = isRenewed || isPartial ? record.frozenAt : 0;
  const changes = writers.flat().filter(({ kind }) => kind !== 'read' && kind !== 'flush');
  for (const [granule, isDirty] of bits.entries()) {
    const low = granule * bitmap.granularity;
    const high = Math.min(low + bitmap.granularity, source.length);
    const within = ({ offset, length }: Pick<Range, 'offset' | 'length'>): boolean =>
      offset < high && low < offset + length;
    const changed = changes.filter((op) => within(op) && oracle.changedSince(op, since));
    if (isDirty === 0) {
      const missed = changed.find((op) => op.kind !== 'discard' && oracle.isDone(op));
      if (missed !== undefined) return `${missed.kind} ${missed.id} has left the granule at ${low} clean`;
      const flaw = oracle.differenceFrom(before, low, high, isRenewed ? record : undefined);
      if (flaw !== undefined) return `the granule at ${low} is clean, but ${flaw}`;
    } else if (!isPartial && changed.length === 0 && (isRenewed || !bitmap.dirty.some(within))) {
      return `the granule at ${low} is dirty, where nothing was changed`;
    }
  }
  return undefined;
}

/** Looks at what the image of the drive has of the bitmap, where it keeps one. */
function withStoredBitmap<T>(scenario: Scenario, look: (disk: DiskDescriptor) => T): T | undefined {
  const { source, bitmap } = scenario;
  if (bitmap?.persistent !== true) return undefined;
  const node = openImage(runtime, layerPath(scenario, source.backing.length), {
    format: 'qcow2',
    readOnly: true,
    lock: 'none',
  });
  const disk = diskOn(3, node, source.length, true);
  try {
    openDiskBitmaps(runtime, disk);
    return look(disk);
  } finally {
    closeDiskBitmaps(runtime, disk);
    arena.free(disk.control);
    closeNode(runtime, node);
  }
}

/** What is wrong with the bitmap in the image after a cut, unless it says itself that it does not count. */
function judgeBitmapAfterCut(scenario: Scenario, drive: Uint8Array): string | undefined {
  const { bitmap } = scenario;
  return withStoredBitmap(scenario, (disk) => {
    if (bitmap === undefined || findBitmap(runtime, disk, BITMAP, []).inconsistent) return undefined;
    const previous = previousOf(oracle.initial.subarray(0, drive.length), bitmap);
    for (const [granule, isDirty] of (bitsOf(scenario, disk) ?? []).entries()) {
      const [low, high] = [granule * bitmap.granularity, (granule + 1) * bitmap.granularity];
      if (isDirty === 1 || Buffer.compare(drive.subarray(low, high), previous.subarray(low, high)) === 0)
        continue;
      return `the granule at ${low} is clean after the cut, but changed`;
    }
    return undefined;
  });
}

function readNode(disk: Disk): Uint8Array | undefined {
  try {
    disk.node.read(0, buffer, disk.descriptor.length);
  } catch {
    return undefined;
  }
  return arena.copyOut(buffer, disk.descriptor.length);
}

/** What is in the image of the drive, which is the target of a mirror once that has taken its place. */
function readDrive(scenario: Scenario): Uint8Array {
  const { source, mirror } = scenario;
  const isMoved = mirror !== undefined && (oracle.jobs[0]?.movedAt ?? 0) > 0;
  if (isMoved) return readTarget(scenario);
  return readImage(layerPath(scenario, source.backing.length), source.format);
}

function readTarget(scenario: Scenario): Uint8Array {
  return readImage(targetPath(scenario), targetFormat(scenario));
}

function judgeLive({ scenario, record, ended, mayBeCancelled, faulty }: Case): string | undefined {
  if (ended === undefined && record.frameText !== '') return `${INVARIANTS.errors}: the mirror never ended`;
  const isWhole = ended?.outcome === 'completed';
  if (ended?.outcome === 'failed' && !faulty)
    return `${INVARIANTS.errors}: the mirror failed: ${ended.error?.code}: ${ended.error?.message}`;
  if (ended?.outcome === 'cancelled' && !mayBeCancelled)
    return `${INVARIANTS.errors}: the mirror says it was cancelled, but nobody did`;
  if (record.movedAt > 0 && !faulty && scenario.chain === undefined) {
    const left = readImage(layerPath(scenario, scenario.source.backing.length), scenario.source.format);
    const flaw = oracle.difference(left, record);
    if (flaw !== undefined) return `${INVARIANTS.source}: where the mirror has taken its place, ${flaw}`;
    if (!isWhole) return `${INVARIANTS.errors}: the mirror took the place of the drive and ${ended?.outcome}`;
  } else if (isWhole) {
    const flaw = judgeCopy(scenario);
    if (flaw !== undefined) return flaw;
  }
  return judgeFormat(scenario, targetFormat(scenario), targetPath(scenario));
}

/** The target of a mirror that has completed, which nobody else has written to. */
function judgeCopy(scenario: Scenario): string | undefined {
  const { job, mirror, writers } = scenario;
  const [record] = oracle.jobs;
  if (record === undefined || mirror === undefined) return undefined;
  if (record.movedAt > 0) return undefined;
  const copy = readTarget(scenario);
  if (job.sync === 'none') {
    // What it has not copied is not there, or shines through from a drive that has changed since.
    const sectors = new Uint8Array(record.unknown.length).fill(1);
    for (const op of writers
      .flat()
      .filter((one) => oracle.changedBetween(one, record.begunAt, record.frozenAt)))
      sectors.fill(0, op.offset / 512, (op.offset + op.length) / 512);
    const flaw = oracle.difference(copy, record, sectors);
    return flaw === undefined ? undefined : `${INVARIANTS.mirror}: ${flaw}`;
  }
  const flaw = oracle.difference(copy, record);
  return flaw === undefined ? undefined : `${INVARIANTS.mirror}: ${flaw}`;
}

function judgeFormat({ faults }: Scenario, format: Job['format'], target: string): string | undefined {
  if (format !== 'qcow2') return undefined;
  const { errors, leaks } = checkQcow2(files.content(target));
  if (errors.length > 0) return `${INVARIANTS.format}: target: ${errors[0]}`;
  if (leaks > 0 && faults.length === 0 && !world.faulty)
    return `${INVARIANTS.format}: target: ${leaks} clusters leak`;
  return undefined;
}

function judgeTarget(one: Case): string | undefined {
  if (one.isLive) return judgeLive(one);
  const { scenario, job, record, target, ended, mayBeCancelled, faulty } = one;
  const names = files.names();
  const kept = ended?.outcome === 'completed' || (ended?.outcome === 'cancelled' && job.sync === 'none');
  if (ended === undefined && record.hasInstant)
    return `${INVARIANTS.errors}: the job took its instant and never ended`;
  if (ended?.outcome === 'failed') {
    if (!faulty) return `${INVARIANTS.errors}: the job failed: ${ended.error?.code}: ${ended.error?.message}`;
    if (ended.error === undefined) return `${INVARIANTS.errors}: the job failed without an error`;
  }
  if (ended?.outcome === 'cancelled' && job.sync !== 'none' && !mayBeCancelled) {
    return `${INVARIANTS.errors}: the job says it was cancelled, but nobody did`;
  }
  const namesFail = faulty && (world.faulty || scenario.faults.some(({ on }) => on === 'names'));
  if (names.includes(`${target}.partial`) && !namesFail)
    return `${INVARIANTS.unfinished}: the partial file is left`;
  if (!kept) {
    if (job.target === 'new' && names.includes(target) && !namesFail)
      return `${INVARIANTS.unfinished}: there is a target of a job that ${ended?.outcome ?? 'was refused'}`;
    if (job.target === 'replace' && Buffer.compare(files.content(target), OLD_TARGET) !== 0 && !namesFail) {
      return `${INVARIANTS.unfinished}: the old target was replaced by one that ${ended?.outcome ?? 'was refused'}`;
    }
    return undefined;
  }
  if (!files.isDurable(target)) return `${INVARIANTS.durable}: the target is not on the disk`;
  return judgeBackup(one);
}

/** The finished backup: the drive at its instant, in an image without a flaw. */
function judgeBackup({ scenario, job, record, target }: Case): string | undefined {
  const copy = readImage(target, job.format);
  if (copy.length !== scenario.source.length) return `${INVARIANTS.instant}: it has ${copy.length} bytes`;
  // A target of sync mode none is the instant for as long as it is on its source.
  const stale = job.sync === 'none' && oracle.changedSinceThaw(scenario, record);
  const wrong = stale ? undefined : oracle.difference(copy, record);
  if (wrong !== undefined) return `${INVARIANTS.instant}: ${wrong}`;
  return judgeFormat(scenario, job.format, target);
}

function judgeAfterCut(scenario: Scenario): string | undefined {
  emptyArena();
  files.closeAll();
  if (scenario.end?.by !== 'kill') files.cutPower(() => world.random());
  const path = layerPath(scenario, scenario.source.backing.length);
  const { format } = scenario.source;
  if (format === 'qcow2') {
    const { errors } = checkQcow2(files.content(path));
    if (errors.length > 0) return `${INVARIANTS.format}: source after the cut: ${errors[0]}`;
  }
  if (isLive(scenario) && targetFormat(scenario) === 'qcow2') {
    const { errors } = checkQcow2(files.content(targetPath(scenario)));
    if (errors.length > 0) return `${INVARIANTS.format}: target after the cut: ${errors[0]}`;
  }
  const drive = readDrive(scenario);
  const wrong = oracle.differenceAfterCut(drive, scenario, oracle.jobs[0]?.movedAt);
  if (wrong !== undefined) return `${INVARIANTS.source}: after the cut ${wrong}`;
  const lost = judgeBitmapAfterCut(scenario, drive);
  if (lost !== undefined) return `${INVARIANTS.bitmap}: ${lost}`;
  const flaw = firstFlaw(casesOf(scenario), judgeTargetAfterCut);
  return flaw ?? (isLive(scenario) ? undefined : backupAgain(scenario, drive));
}

function judgeTargetAfterCut(one: Case): string | undefined {
  const { job, target, ended } = one;
  if (one.isLive) return ended?.outcome === 'completed' ? judgeCopy(one.scenario) : undefined;
  const finished = ended?.outcome === 'completed' || (ended?.outcome === 'cancelled' && job.sync === 'none');
  const there = files.names().includes(target);
  if (finished && !there) return `${INVARIANTS.durable}: the finished target is gone after the cut`;
  if (!there || job.target === 'existing') {
    return finished && job.sync !== 'none' ? judgeBackup(one) : undefined;
  }
  const old = job.target === 'replace' && Buffer.compare(files.content(target), OLD_TARGET) === 0;
  if (old) return finished ? `${INVARIANTS.durable}: the old target is back after the cut` : undefined;
  // What a target of sync mode none does not hold itself is in the source, which guests went on to change.
  if (job.sync === 'none') {
    const { errors } = checkQcow2(files.content(target));
    return errors.length > 0 ? `${INVARIANTS.unfinished}: after the cut: ${errors[0]}` : undefined;
  }
  const flaw = judgeBackup(one);
  return flaw === undefined
    ? undefined
    : `${INVARIANTS.unfinished}: after the cut the target is there, but ${flaw}`;
}

/** Whatever the cut has left: the next backup to the same place works. */
function backupAgain({ source, job }: Scenario, drive: Uint8Array): string | undefined {
  emptyArena();
  files.closeAll();
  files.faults = [];
  files.endAtSync = 0;
  const path = layerPath({ source }, source.backing.length);
  const node = openImage(runtime, path, { format: source.format, readOnly: true });
  const disk = new Disk(runtime, diskOn(2, node, source.length, true), () => copyBuffer);
  const jobControl = new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job'));
  jobControl.transition('created');
  let outcome = '';
  const port = {
    postMessage(message: JobMessage): void {
      if (message.type === 'ended') outcome = message.outcome;
    },
  };
  const begun = beginBackup(
    runtime,
    disk,
    jobControl,
    {
      target: TARGETS[0],
      sync: 'full',
      format: job.format,
      force: true,
      targetClusterSize: job.targetClusterSize,
      compress: job.compress,
      onSourceError: 'report',
      onTargetError: 'report',
      onCbwError: 'break-guest-write',
      autoFinalize: true,
    },
    3,
  );
  BackupJob.run(runtime, disk, jobControl, port as unknown as Parameters<typeof BackupJob.run>[3], begun);
  closeNode(runtime, node);
  if (outcome !== 'completed') return `${INVARIANTS.errors}: the backup after the cut is '${outcome}'`;
  const copy = readImage(TARGETS[0], job.format);
  if (Buffer.compare(copy, drive) !== 0)
    return `${INVARIANTS.instant}: the backup after the cut is not the drive`;
  return undefined;
}

/** What a job said at its end; undefined where it has not come to it. */
function endedOf({ endedText }: JobRecord): Ended | undefined {
  return endedText === '' ? undefined : JSON.parse(endedText);
}

/** How the jobs of a run ended, in a word or two. */
export function outcomeOf(scenario: Scenario): string {
  if (world.aborted === POWER_CUT) return 'cut';
  return casesOf(scenario)
    .map(({ scenario: { mirror, chain }, ended, isLive }) => {
      const what = !isLive
        ? ''
        : chain === undefined
          ? 'mirror '
          : `${mirror === undefined ? '' : 'active '}${chain.type} `;
      return `${what}${ended?.outcome ?? 'refused'}`;
    })
    .join('+');
}
