import { statSync } from 'node:fs';
import { basename } from 'node:path';
import { isNbdName } from '../block/nbd/uri.js';
import type { BackupHandle } from '../engine/backup.js';
import type { BackupOptions } from '../engine/disk.js';
import type { Engine, TransactionItem } from '../engine/engine.js';
import { StillframeError } from '../errors.js';
import { ALL_PERMISSIONS, RESIZE, WRITE } from '../os/image-lock.js';
import { QmpError, qmpText, strerror } from '../qmp/errors.js';
import type { ArgumentsOf } from '../qmp/schema.js';
import { checkMinClusterSize } from './drivers.js';
import type { Exports } from './exports.js';
import type { Release } from './file-locks.js';
import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';
import { checkUsableBelow, checkWhole } from './image-files.js';
import type { InternalSnapshot } from './internal-snapshots.js';
import { checkSpeed, jobIdOf, listOptions, runOptions } from './job-arguments.js';
import type { JobOptions, Jobs } from './jobs.js';
import { busyError, jobOf } from './permissions.js';
import type { PreparedSnapshot } from './snapshots.js';

/** An action of a transaction before it is carried out, with what becomes of a backup. */
export interface Prepared {
  readonly item?: TransactionItem | undefined;
  readonly snapshot?: PreparedSnapshot | undefined;
  readonly internal?: InternalSnapshot | undefined;
  readonly job?: PreparedJob | undefined;
}

interface PreparedJob {
  readonly id: string;
  readonly options: JobOptions;
  readonly node: GraphNode;
  /** It copies what the node has itself, and not what that shows. */
  readonly isTop: boolean;
  /** Puts the job's filter over its source, or over what that has become in the same transaction. */
  readonly begun: (handle: BackupHandle, node: GraphNode) => void;
  /** Why it goes again as soon as it is there. */
  readonly refused: string | undefined;
}

type Arguments = ArgumentsOf<'drive-backup'> | ArgumentsOf<'blockdev-backup'>;

/** The backup jobs that monitors ask for (QMP `drive-backup`, `blockdev-backup`). */
export class Backups {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #jobs: Jobs;
  readonly #exports: Exports;
  readonly #asQemu: boolean;

  /** @param asQemu jobs end as QEMU's where ours are stricter */
  constructor(engine: Engine, graph: Graph, jobs: Jobs, exports: Exports, asQemu: boolean) {
    this.#engine = engine;
    this.#graph = graph;
    this.#jobs = jobs;
    this.#exports = exports;
    this.#asQemu = asQemu;
  }

  /** QMP `drive-backup`. @throws QmpError where it names no node, or no format of ours */
  async drive(given: ArgumentsOf<'drive-backup'>): Promise<Prepared> {
    const node = this.#graph.lookUp(given.device);
    const { format, mode = 'absolute-paths', target } = given;
    if (format !== undefined && format !== 'raw' && format !== 'qcow2') {
      throw new QmpError(`Unknown file format '${format}'`);
    }
    checkName(target, mode === 'existing' ? 'open' : 'create');
    if (mode !== 'existing') this.#graph.checkUnused(target);
    return await this.#prepare(given, node, undefined, {
      target,
      format,
      existing: mode === 'existing',
      // As QEMU does with what it makes.
      force: true,
    });
  }

  /** QMP `blockdev-backup`. @throws QmpError where it names no node */
  async blockdev(given: ArgumentsOf<'blockdev-backup'>): Promise<Prepared> {
    const node = this.#graph.lookUp(given.device);
    const target = this.#graph.lookUp(given.target);
    const disk = await this.#graph.disk(target);
    const { path, readOnly } = target.descriptor;
    const targetNode =
      disk.descriptor.node.driver === 'qcow2'
        ? disk.descriptor.node
        : ({ driver: 'live', path, readOnly, length: disk.length, disk: disk.descriptor } as const);
    return await this.#prepare(given, node, target, { target: target.name, targetNode });
  }

  async #prepare(
    given: Arguments,
    node: GraphNode,
    target: GraphNode | undefined,
    targetOptions: Pick<BackupOptions, 'target' | 'targetNode' | 'format' | 'existing' | 'force'>,
  ): Promise<Prepared> {
    const disk = await this.#graph.disk(node);
    const { speed = 0, 'x-perf': perf } = given;
    const id = jobIdOf(given, node);
    const fits = target === undefined || (await this.#graph.disk(target)).length === disk.length;
    const claims: Release[] = [];
    const unclaim = (): void => {
      for (const release of claims) release();
    };
    const nodes = told(() => this.#checkNodes(given, node, target, fits, claims));
    const taken = told(() => this.#jobs.checkFree(id));
    const refused = taken === undefined ? told(() => this.#checkJob(speed, node, claims)) : undefined;
    const job = taken ?? refused;
    let filter: GraphNode | undefined;
    const key = { job: 'backup', id, filter: () => filter?.name } as const;
    if (nodes === undefined && target !== undefined) target.users.set(key, 'target');
    const maxWorkers = perf?.['max-workers'] ?? 0;
    const options: BackupOptions = {
      ...targetOptions,
      ...runOptions(id, given),
      jobId: job === undefined ? id : undefined,
      sync: given.sync,
      bitmap: given.bitmap,
      bitmapMode: given['bitmap-mode'],
      compress: given.compress,
      workers: maxWorkers < 1 ? undefined : Math.min(maxWorkers, this.#engine.workers),
      onCbwError: given['on-cbw-error'],
      cbwTimeoutMs: (given['x-cbw-timeout'] ?? 0) * 1000,
      fleece: (given['x-fleece'] ?? given['x-scratch'] !== undefined) && (given['x-scratch'] ?? true),
      internal: {
        minClusterSize: perf?.['min-cluster-size'],
        maxChunk: perf?.['max-chunk'],
        paceZeroes: true,
        discardSource: given['discard-source'],
        asQemu: this.#asQemu,
        refusals: { nodes, job },
      },
    };
    const isTop = given.sync === 'top';
    const begun = (handle: BackupHandle, source: GraphNode): void => {
      const { kernels } = this.#engine;
      filter = this.#graph.insertFilter(source, target, {
        name: given['filter-node-name'],
        key,
        job: { type: 'backup', driver: 'copy-before-write', isTop },
        held: { ...handle.held, counts: () => handle.heldCounts(kernels) },
      });
      this.#exports.moved(source, filter);
      unclaim();
    };
    const onEnd = (): void => {
      unclaim();
      target?.users.delete(key);
      if (filter !== undefined) this.#exports.moved(filter, this.#graph.removeFilter(filter));
      filter = undefined;
    };
    if (nodes !== undefined || job !== undefined) unclaim();
    return {
      item: { type: 'backup', disk, options },
      job: { id, node, isTop, options: listOptions(given, onEnd), begun, refused },
    };
  }

  /** What QEMU looks at before and while it puts its filter over the source, in its order. @param claims takes the target's */
  #checkNodes(
    given: Arguments,
    node: GraphNode,
    target: GraphNode | undefined,
    fits: boolean,
    claims: Release[],
  ): void {
    const { 'x-perf': perf, 'filter-node-name': filter } = given;
    if (node === target) throw new QmpError('Source and target cannot be the same');
    if (given.compress === true && target !== undefined && target.driver !== 'qcow2') {
      throw new QmpError(`Compression is not supported for this drive ${target.device ?? ''}`);
    }
    const isOfJob = (of: GraphNode): boolean => [...of.users.values()].some((use) => use !== 'export');
    checkWhole(node);
    for (const busy of [node, target]) {
      if (busy === undefined || !isOfJob(busy)) continue;
      throw busyError(busy.device ?? busy.name, jobOf(busy) ?? 'backup');
    }
    const { 'max-workers': workers = 64, 'max-chunk': chunk = 0, 'min-cluster-size': cluster } = perf ?? {};
    if (workers < 1 || workers > 2 ** 31 - 1) {
      throw new QmpError('max-workers must be between 1 and 2147483647');
    }
    if (chunk < 0) throw new QmpError('max-chunk must be zero (which means no limit) or positive');
    if (!fits) throw new QmpError('Source and target image have different sizes');
    try {
      if (filter !== undefined) this.#graph.checkName(filter);
      if (target !== undefined) {
        this.#checkTarget(target, filter);
        const shared = ALL_PERMISSIONS & ~RESIZE;
        claims.push(this.#graph.locks.claim([{ node: target, role: 'target', needed: WRITE, shared }]));
      }
    } catch (error) {
      throw new QmpError(`Could not create node: ${qmpText(error)}`);
    }
    checkMinClusterSize(cluster);
    if (given['discard-source'] === true && node.driver !== 'snapshot-access') {
      throw new QmpError(
        `'discard-source' is for nodes of the driver snapshot-access: nothing is discarded on '${node.name}'`,
      );
    }
  }

  #checkTarget(target: GraphNode, filter: string | undefined): void {
    if (target.descriptor.readOnly) throw new QmpError('Block node is read-only');
    const name = filter ?? this.#graph.nextImplicitName;
    this.#exports.checkWritable(target, true, name);
    checkUsableBelow(target, true);
  }

  /** Likewise, once the job is there. @param claims takes the source's */
  #checkJob(speed: number, node: GraphNode, claims: Release[]): void {
    const shared = ALL_PERMISSIONS & ~(WRITE | RESIZE);
    claims.push(this.#graph.locks.claim([{ node, role: 'file', needed: 0, shared }]));
    checkSpeed(speed);
  }

  /** Tells of jobs that were made before something else of their transaction failed. */
  tellOfRefused(prepared: readonly Prepared[], error: unknown): void {
    if (!(error instanceof StillframeError) || error.action === undefined) return;
    const { action } = error;
    const carriedOut = prepared.filter(({ item }) => item !== undefined);
    this.#jobs.neverStarted(carriedOut.slice(0, action).flatMap(({ job }) => job?.id ?? []));
    const failed = carriedOut[action]?.job;
    const why = failed?.refused;
    if (failed !== undefined && why !== undefined && error.message.includes(why))
      this.#jobs.refused(failed.id);
  }
}

/** @throws QmpError where no image can have that name, in QEMU's words */
function checkName(target: string, verb: 'open' | 'create'): void {
  const [, protocol] = /^([a-z][a-z0-9+.-]*):/i.exec(target) ?? [];
  if (protocol !== undefined && protocol !== 'file' && !isNbdName(target)) {
    throw new QmpError(`Unknown protocol '${protocol}'`);
  }
  const isFolder = statSync(target, { throwIfNoEntry: false })?.isDirectory() === true;
  if (target !== '' && !isFolder) return;
  const why = isFolder ? 'Is a directory' : 'No such file or directory';
  throw new QmpError(`Could not ${verb} '${target}': ${why}`);
}

/** What `body` throws, as monitors are told. */
function told(body: () => void): string | undefined {
  try {
    body();
    return undefined;
  } catch (error) {
    return qmpText(error);
  }
}

/** @throws QmpError where an overlay would be taken for what a backup of the same transaction copies */
export function checkTops(prepared: readonly Prepared[]): void {
  for (const { job } of prepared) {
    if (job?.isTop !== true || prepared.every(({ snapshot }) => snapshot?.node !== job.node)) continue;
    throw busyError(job.node.name, 'backup');
  }
}

/** No two jobs of a transaction have one name. */
export function distinct(prepared: readonly Prepared[]): readonly Prepared[] {
  const ids = new Set<string>();
  return prepared.map((one): Prepared => {
    const { item, job } = one;
    if (job === undefined || item?.type !== 'backup' || !ids.has(job.id)) {
      if (job !== undefined) ids.add(job.id);
      return one;
    }
    const { internal } = item.options;
    const refusals = { ...internal?.refusals, job: `Job ID '${job.id}' already in use` };
    return {
      job,
      item: {
        ...item,
        options: { ...item.options, jobId: undefined, internal: { ...internal, refusals } },
      },
    };
  });
}

/** An error of making or opening the target of `drive-backup`, in QEMU's words. */
export function targetError(error: unknown, item: TransactionItem): unknown {
  if (item.type !== 'backup' || !(error instanceof StillframeError)) return error;
  const { target, existing, targetNode } = item.options;
  if (error.code === 'ERR_STILLFRAME_SAME_NODE' && targetNode === undefined) {
    return new QmpError('Failed to get "write" lock');
  }
  const words = strerror(error);
  if (words === undefined || targetNode !== undefined || !error.message.includes(basename(target)))
    return error;
  return new QmpError(`Could not ${existing === true ? 'open' : 'create'} '${target}': ${words}`);
}
