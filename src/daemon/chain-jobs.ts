import { isAbsolute, resolve } from 'node:path';
import type { ChainJobOptions } from '../backup/chain-job.js';
import type { MirrorDescriptor } from '../block/filters/mirror.js';
import { combineNames } from '../block/graph.js';
import { type ChainWork, startChainJob } from '../engine/chain-job.js';
import type { DrainedSection } from '../engine/drained-section.js';
import type { Engine } from '../engine/engine.js';
import type { JobHandle } from '../engine/job.js';
import { type PlainError, StillframeError, toStillframeError } from '../errors.js';
import { jobErrorText, QmpError } from '../qmp/errors.js';
import type { ArgumentsOf } from '../qmp/schema.js';
import { backingOf, below, chainOf, findBackingImage, isFilter, overlayIn, unfiltered } from './chain.js';
import type { Exports } from './exports.js';
import { filenameOf } from './filenames.js';
import type { Graph } from './graph.js';
import type { GraphChanges } from './graph-changes.js';
import type { GraphNode, JobFilter, Use, User } from './graph-node.js';
import { checkSpeed, jobIdOf, listOptions, type RunOptions, runOptions } from './job-arguments.js';
import type { Jobs } from './jobs.js';
import { busyError, jobOf } from './permissions.js';

/** What `block-stream` and `block-commit` have in common. */
type Given = ArgumentsOf<'block-stream'> | ArgumentsOf<'block-commit'>;

/** A job that is about to start. */
interface Wanted {
  readonly id: string;
  readonly given: Given;
  readonly user: User;
  readonly uses: ReadonlyMap<GraphNode, Use>;
  /** It is written to while the job runs. */
  readonly written: GraphNode;
  /** The node that the job's filter lies on, and its driver. */
  readonly covered: GraphNode;
  readonly driver: JobFilter['driver'];
  /** Once it can be. */
  readonly launch: () => Promise<JobHandle>;
  /** What is not as it was before once the job is over. */
  readonly became: {
    /** Nobody may want it any more. */
    left?: GraphNode | undefined;
    /** What is written to stays so. */
    isKept?: boolean;
    /** Before all that is on the covered node moves. */
    uncover?: () => void;
  };
}

/** QMP `block-stream` and the `block-commit` of images in the middle of a chain: backing chains become shorter. */
export class ChainJobs {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #changes: GraphChanges;
  readonly #exports: Exports;
  readonly #jobs: Jobs;

  constructor(engine: Engine, graph: Graph, changes: GraphChanges, exports: Exports, jobs: Jobs) {
    this.#engine = engine;
    this.#graph = graph;
    this.#changes = changes;
    this.#exports = exports;
    this.#jobs = jobs;
  }

  /** QMP `block-stream`. Order of what is looked at: as in QEMU. */
  async stream(given: ArgumentsOf<'block-stream'>): Promise<void> {
    const { base: baseName, 'base-node': baseNode, bottom: bottomName, 'backing-file': backingFile } = given;
    exclude('base', baseName, 'base-node', baseNode);
    exclude('base', baseName, 'bottom', bottomName);
    exclude('bottom', bottomName, 'base-node', baseNode);
    const node = this.#graph.lookUp(given.device);
    const chain = chainOf(node);
    let base = baseName === undefined ? undefined : findBackingImage(node, baseName);
    if (baseName !== undefined && base === undefined) {
      throw new QmpError(`Can't find '${baseName}' in the backing chain`);
    }
    if (baseNode !== undefined) {
      base = this.#graph.findEither('', baseNode);
      if (base === node || !chain.includes(base)) {
        throw new QmpError(`Node '${baseNode}' is not a backing image of '${given.device}'`);
      }
    }
    let bottom: GraphNode | undefined;
    if (bottomName !== undefined) {
      bottom = this.#graph.findEither('', bottomName);
      if (isFilter(bottom)) {
        throw new QmpError(`Node '${bottomName}' is a filter, use a non-filter node as 'bottom'`);
      }
      if (!chain.includes(bottom)) {
        throw new QmpError(`Node '${bottomName}' is not in a chain starting from '${given.device}'`);
      }
    }
    const blocked = chainOf(node, bottom === undefined ? base : below(bottom));
    for (const one of blocked) checkNoJob(one);
    if (base === undefined && backingFile !== undefined) {
      throw new QmpError('backing file specified, but streaming the entire chain');
    }
    const top = unfiltered(node);
    const lowest = bottom ?? overlayIn(node, base) ?? top;
    const filter = given['filter-node-name'];
    if (top.descriptor.readOnly) checkReopen(top);
    if (filter !== undefined) {
      try {
        this.#graph.checkName(filter);
      } catch (error) {
        throw error instanceof QmpError ? new QmpError(`Could not create node: ${error.message}`) : error;
      }
    }
    const id = this.#checkId(given, node);
    this.#checkStart(id, given);
    const layers = chainOf(top, lowest).filter((one) => !isFilter(one)).length;
    const aboveBase = blocked.at(-1) ?? node;
    const became: Wanted['became'] = {};
    const commit = async (): Promise<void> => {
      const old = backingOf(top);
      if (old === undefined) return;
      // Other jobs may have changed what is below.
      const next = below(aboveBase);
      await this.#changes.change([top], async (section) => {
        await this.#nameBacking(section, top, next && unfiltered(next), backingFile);
        await this.#changes.setBacking(section, top, next);
      });
      if (old !== next) became.left = old;
    };
    await this.#start({
      id,
      given,
      user: { job: 'stream', id },
      covered: node,
      driver: 'copy-on-read',
      uses: new Map(blocked.map((one) => [one, 'chain'] as const)),
      written: top,
      launch: async () => {
        const { descriptor: disk } = await this.#graph.disk(topmostLive(node));
        const run = runOptions(id, given);
        return this.#launch(run, { type: 'stream', disk, options: { ...policyOf(run), layers } }, commit);
      },
      became,
    });
  }

  /** QMP `block-commit` of an image that nobody writes to. */
  async commit(
    given: ArgumentsOf<'block-commit'>,
    node: GraphNode,
    top: GraphNode,
    base: GraphNode,
  ): Promise<void> {
    const overlay = overlayIn(node, top);
    if (overlay !== undefined) checkNoJob(overlay);
    if (unfiltered(top) === unfiltered(base)) {
      throw new QmpError('Invalid files for merge: top and base are the same');
    }
    const id = this.#checkId(given, node);
    this.#checkStart(id, given);
    const [topDisk, baseDisk] = [await this.#graph.disk(top), await this.#graph.disk(base)];
    const resizes = baseDisk.length < topDisk.length;
    const filter = given['filter-node-name'];
    const image = unfiltered(base);
    try {
      if (image.descriptor.readOnly) checkReopen(image);
      if (filter !== undefined) this.#graph.checkName(filter);
    } catch (error) {
      this.#jobs.refused(id);
      throw error;
    }
    const between = chainOf(top, base);
    const layers = between.filter((one) => !isFilter(one)).length;
    const became: Wanted['became'] = {};
    const commit = async (): Promise<void> => {
      became.uncover?.();
      const above = [...top.parents].filter((one) => backingOf(one) === top);
      await this.#changes.change([...above, top, base], async (section) => {
        for (const one of above) await this.#nameBacking(section, one, image, given['backing-file']);
        await this.#replace(section, top, base, between);
      });
      became.left = top;
    };
    await this.#start({
      id,
      given,
      user: { job: 'commit', id, resizes, top },
      covered: top,
      driver: 'commit_top',
      uses: usesOf(node, between, base),
      written: image,
      launch: async () => {
        const failure = resizes ? await this.#grow(image, topDisk.length) : undefined;
        const { descriptor: from } = await this.#graph.disk(top);
        const { descriptor: to } = await this.#graph.disk(base);
        const run = runOptions(id, given);
        const options = { ...policyOf(run), layers, shown: await this.#shown(top), failure };
        return this.#launch(run, { type: 'commit', top: from, base: to, options }, commit);
      },
      became,
    });
  }

  /** QMP `block-commit` of an image that is written to: a mirror into what is below it, which takes its place. */
  async commitActive(
    given: ArgumentsOf<'block-commit'>,
    node: GraphNode,
    top: GraphNode,
    base: GraphNode,
  ): Promise<void> {
    const image = unfiltered(base);
    if (image.descriptor.readOnly) checkReopen(image);
    const filter = given['filter-node-name'];
    if (filter !== undefined) this.#graph.checkName(filter);
    const id = this.#checkId(given, node);
    this.#checkStart(id, given);
    const [topDisk, baseDisk] = [await this.#graph.disk(top), await this.#graph.disk(base)];
    const resizes = baseDisk.length < topDisk.length;
    const between = chainOf(top, base);
    const layers = between.filter((one) => !isFilter(one)).length;
    // As with QEMU, also where the job comes to nothing.
    const became: Wanted['became'] = { isKept: true };
    const pivot = async (mirror: MirrorDescriptor): Promise<void> => {
      became.uncover?.();
      const wasReadOnly = top.descriptor.readOnly;
      await this.#changes.change([top, base], async (section) => {
        const { descriptor: disk } = await this.#graph.disk(topmostLive(top));
        await section.run<void>({ kind: 'finish-mirror', disk, mirror });
        await this.#replace(section, top, base, between);
      });
      became.left = top;
      became.isKept = !wasReadOnly;
    };
    await this.#start({
      id,
      given,
      user: { job: 'commit', id, resizes },
      covered: top,
      driver: 'mirror_top',
      uses: usesOf(node, between, base),
      written: image,
      launch: async () => {
        const failure = resizes ? await this.#grow(image, topDisk.length) : undefined;
        const disk = await this.#graph.disk(topmostLive(top));
        return await disk.mirror(await this.#graph.disk(base), {
          ...runOptions(id, given),
          sync: 'top',
          pivot,
          commit: { layers, failure },
        });
      },
      became,
    });
  }

  /** All that is on the top of a part of a chain is on what is below that part. Within a change of both. */
  async #replace(
    section: DrainedSection,
    top: GraphNode,
    base: GraphNode,
    between: readonly GraphNode[],
  ): Promise<void> {
    const above = [...top.parents];
    await this.#changes.replace(section, top, base);
    // The disk on the base is another one now: all that are on the base lie on that.
    for (const one of [...between.toReversed(), ...above]) await this.#changes.relink(section, one);
  }

  #launch(
    { jobId: id, speed, autoDismiss }: RunOptions,
    work: ChainWork,
    commit: () => Promise<void>,
  ): JobHandle {
    return startChainJob(this.#engine, work, { id, speed, autoDismiss }, commit);
  }

  /** QMP `change-backing-file`: only what the header says. Order of what is looked at: as in QEMU. */
  async changeBackingFile(given: ArgumentsOf<'change-backing-file'>): Promise<void> {
    const { device, 'image-node-name': imageName, 'backing-file': name } = given;
    const node = this.#graph.lookUp(device);
    if (node.parents.size > 0 || jobOf(node) !== undefined) throw new QmpError('Need a root block node');
    const image = this.#graph.findEither('', imageName);
    const backing = backingOf(image);
    if (overlayIn(image, undefined) === image || backing === undefined) {
      throw new QmpError('not allowing backing file change on an image without a backing file');
    }
    if (!chainOf(node).includes(image)) {
      throw new QmpError(`'${device}' and image file are not in the same chain`);
    }
    try {
      await this.#changes.change([image], (section) =>
        this.#nameBacking(section, image, unfiltered(backing), name),
      );
    } catch (error) {
      const words = error instanceof QmpError ? error.message : jobErrorText(error);
      throw new QmpError(`Could not change backing file to '${name}': ${words}`);
    }
  }

  /** @throws QmpError where no job can have the name that it would have */
  #checkId(given: Given, node: GraphNode): string {
    const id = jobIdOf(given, node);
    this.#jobs.checkFree(id);
    return id;
  }

  /** What is looked at when the job is there already. */
  #checkStart(id: string, { speed }: Given): void {
    try {
      checkSpeed(speed);
    } catch (error) {
      this.#jobs.refused(id);
      throw error;
    }
  }

  async #start({ id, given, user, uses, covered, driver, written, launch, became }: Wanted): Promise<void> {
    for (const [node, use] of uses) node.users.set(user, use);
    let isReopened = false;
    let filter: GraphNode | undefined;
    became.uncover = () => {
      if (filter !== undefined) this.#exports.moved(filter, this.#graph.removeFilter(filter));
      filter = undefined;
    };
    const release = async (): Promise<void> => {
      became.uncover?.();
      for (const node of uses.keys()) node.users.delete(user);
      if (isReopened && became.isKept !== true) await this.#reopen(written, true);
    };
    const onEnd = async (): Promise<void> => {
      await release();
      if (became.left !== undefined) await this.#graph.closeUnused(became.left);
    };
    try {
      if (written.descriptor.readOnly) {
        try {
          await this.#reopen(written, false);
        } catch (error) {
          // A commit in the middle of a chain is there before its base can be written to.
          if (driver === 'commit_top') this.#jobs.refused(id);
          throw error;
        }
        isReopened = true;
      }
      try {
        this.#graph.locks.settle();
      } catch (error) {
        this.#jobs.refused(id);
        throw error;
      }
      const handle = await launch();
      const type = user.job ?? 'commit';
      const name = given['filter-node-name'];
      try {
        filter = this.#graph.insertFilter(covered, undefined, { name, key: user, job: { type, driver } });
      } catch (error) {
        // Somebody else has taken its name meanwhile.
        await handle.stop();
        throw error;
      }
      this.#exports.moved(covered, filter);
      await this.#jobs.add([{ handle, options: listOptions(given, onEnd) }]);
    } catch (error) {
      await release();
      throw error;
    }
  }

  async #reopen(node: GraphNode, readOnly: boolean): Promise<void> {
    await this.#changes.change([node], (section) => this.#changes.setReadOnly(section, node, readOnly));
  }

  /** Bytes of an image that the longest one of those on it shows. */
  async #shown(image: GraphNode): Promise<number> {
    const lengths = [...image.parents].map(async (one) => {
      if (isFilter(one)) return await this.#shown(one);
      return backingOf(one) === image ? (await this.#graph.disk(one)).length : 0;
    });
    return Math.max(0, ...(await Promise.all(lengths)));
  }

  /** Makes the base of a job as long as its top. @returns why it cannot */
  async #grow(image: GraphNode, length: number): Promise<PlainError | undefined> {
    const files = image.children.flatMap(({ role, node }) => (role === 'file' ? node : []));
    try {
      await this.#changes.change([image, ...files], (section) =>
        this.#changes.resize(section, image, length),
      );
      return undefined;
    } catch (error) {
      return toStillframeError(error).toPlain();
    }
  }

  /** Writes into the header of an image what its backing file is; nobody uses the image meanwhile. */
  async #nameBacking(
    section: DrainedSection,
    overlay: GraphNode,
    backing: GraphNode | undefined,
    name: string | undefined,
  ): Promise<void> {
    const wasReadOnly = overlay.descriptor.readOnly;
    if (wasReadOnly) await this.#changes.setReadOnly(section, overlay, false);
    try {
      await this.#changes.nameBacking(
        section,
        overlay,
        backing && { name: name ?? nameFor(overlay, backing), format: backing.driver },
      );
    } catch (error) {
      throw error instanceof StillframeError && error.code === 'ERR_STILLFRAME_INVALID_ARGUMENT'
        ? new QmpError('Invalid argument')
        : error;
    } finally {
      if (wasReadOnly) await this.#changes.setReadOnly(section, overlay, true);
    }
  }
}

/** These jobs have one policy for errors of all that they work on. */
function policyOf({
  onSourceError: onError,
  autoFinalize,
}: RunOptions): Pick<ChainJobOptions, 'onError' | 'autoFinalize'> {
  return { onError, autoFinalize };
}

/** What nodes are to a job that commits those between a node of a chain and a base. */
function usesOf(
  node: GraphNode,
  between: readonly GraphNode[],
  base: GraphNode,
): ReadonlyMap<GraphNode, Use> {
  return new Map<GraphNode, Use>([
    [node, 'chain'],
    ...between.map((one) => [one, one === node ? 'chain' : 'intermediate'] as const),
    [base, 'target'],
  ]);
}

function exclude(one: string, first: unknown, other: string, second: unknown): void {
  if (first === undefined || second === undefined) return;
  throw new QmpError(`'${one}' and '${other}' cannot be specified at the same time`);
}

/** @throws QmpError where a job has the node for itself */
export function checkNoJob(node: GraphNode): void {
  const job = jobOf(node);
  if (job !== undefined) throw busyError(node.device ?? node.name, job);
}

/** @throws QmpError where what the node lies on cannot be written to */
function checkReopen(node: GraphNode): void {
  if (node.driver !== 'qcow2' && node.driver !== 'raw' && node.children.length > 0) {
    throw new QmpError(`Block format '${node.driver}' is only read`);
  }
  for (const { role, node: file } of node.children) {
    if (role !== 'backing' && file.owned && file.descriptor.readOnly) {
      throw new QmpError('Block node is read-only');
    }
  }
}

/** Where requests that guests make through any node above pass: filters that have no way past them are what they are above. */
function topmostLive(node: GraphNode): GraphNode {
  const [child] = node.children;
  const passes = isFilter(node) && node.driver !== 'blkdebug';
  return passes && child !== undefined ? topmostLive(child.node) : node;
}

/** The name of a backing file, for the header of an image: relative names are relative to the image there. */
function nameFor(overlay: GraphNode, backing: GraphNode): string {
  const name = filenameOf(backing);
  if (/^[A-Za-z][A-Za-z0-9+.-]*:/.test(name) || isAbsolute(name)) return name;
  const file = overlay.children.find(({ role }) => role === 'file')?.node ?? overlay;
  return resolve(combineNames(filenameOf(file), name)) === resolve(name) ? name : resolve(name);
}
