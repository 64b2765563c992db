import { checkGranularity, MIRROR_SYNC_MODES, type MirrorSyncMode } from '../backup/mirror-job.js';
import type { MirrorDescriptor } from '../block/filters/mirror.js';
import type { TargetFormat } from '../block/graph.js';
import type { Engine } from '../engine/engine.js';
import { ALL_PERMISSIONS, CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED } from '../os/image-lock.js';
import { openErrorText, QmpError } from '../qmp/errors.js';
import type { ArgumentsOf } from '../qmp/schema.js';
import { backingOf, isFilter, unfiltered } from './chain.js';
import type { Exports } from './exports.js';
import { filenameOf } from './filenames.js';
import type { Graph } from './graph.js';
import type { GraphChanges } from './graph-changes.js';
import type { GraphNode } from './graph-node.js';
import { checkUsableBelow } from './image-files.js';
import { checkSpeed, jobIdOf, listOptions, runOptions } from './job-arguments.js';
import type { Jobs } from './jobs.js';
import { checkMirrorTarget, checkUnblocked, jobOf } from './permissions.js';

type Given = ArgumentsOf<'blockdev-mirror'> | ArgumentsOf<'drive-mirror'>;

/** What is said about a mirror beside its arguments. */
interface Wanted {
  readonly node: GraphNode;
  readonly target: GraphNode;
  readonly sync: MirrorSyncMode;
  /** The target reads as zeroes wherever nothing was written. */
  readonly targetReadsZero: boolean;
  /** Zeroes may become holes of the target. */
  readonly unmap: boolean;
  /**
   * What the target lies on once it takes the place of what it replaces: `named` what its header says; undefined leaves
   * that as it is.
   */
  readonly backing?: { readonly node: GraphNode | undefined } | 'named' | undefined;
}

/** QMP `blockdev-mirror` and `drive-mirror`: a node becomes a copy of another one, and may take its place. */
export class Mirrors {
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

  /** QMP `blockdev-mirror` */
  async blockdev(given: ArgumentsOf<'blockdev-mirror'>): Promise<void> {
    const node = this.#root(given.device);
    const target = this.#graph.lookUp(given.target);
    await this.#start(given, {
      node,
      target,
      sync: syncOf(given.sync, node),
      targetReadsZero: false,
      unmap: true,
    });
  }

  /** QMP `drive-mirror` */
  async drive(given: ArgumentsOf<'drive-mirror'>): Promise<void> {
    const node = this.#root(given.device);
    const { target: filename, mode = 'absolute-paths', unmap = true, replaces } = given;
    const nodeName = given['node-name'];
    const isNew = mode === 'absolute-paths';
    const format = given.format ?? (isNew ? node.driver : undefined);
    if (format !== undefined && format !== 'raw' && format !== 'qcow2') {
      throw new QmpError(`Unknown file format '${format}'`);
    }
    const backing = backingOf(node);
    const below = given.sync === 'none' ? node : backing;
    if (replaces !== undefined && nodeName === undefined) {
      throw new QmpError('a node-name must be provided when replacing a named node of the graph');
    }
    const onBelow = given.sync !== 'full' && below !== undefined;
    if (isNew) await this.#create(filename, format ?? 'raw', node, onBelow ? below : undefined);
    let target: GraphNode;
    try {
      target = await this.#graph.makeImage(filename, format, {
        ...(nodeName === undefined ? {} : { 'node-name': nodeName }),
        discard: node.options['discard'],
      });
    } catch (error) {
      throw error instanceof QmpError ? error : new QmpError(openErrorText(error, filename));
    }
    try {
      await this.#start(given, {
        node,
        target,
        sync: syncOf(given.sync, node),
        targetReadsZero: isNew,
        unmap,
        backing: given.sync === 'full' ? undefined : isNew ? { node: below } : 'named',
      });
    } catch (error) {
      await this.#graph.closeUnused(target);
      throw error;
    }
  }

  /** Makes the file of a target. */
  async #create(
    filename: string,
    format: TargetFormat,
    node: GraphNode,
    backing: GraphNode | undefined,
  ): Promise<void> {
    if (backing !== undefined && format === 'raw') {
      throw new QmpError("Backing file not supported for file format 'raw'");
    }
    const { length } = await this.#graph.disk(node);
    this.#graph.checkUnused(filename);
    const onBacking =
      backing === undefined
        ? {}
        : ({
            backingFile: filenameOf(backing),
            backingFormat: backing.driver === 'qcow2' ? 'qcow2' : 'raw',
            unsafeBacking: true,
          } as const);
    try {
      await this.#engine.createImage(filename, { format, length, force: true, ...onBacking });
    } catch (error) {
      throw new QmpError(openErrorText(error, filename).replace('Could not open', 'Could not create'));
    }
  }

  /** A node that nothing lies on. */
  #root(name: string): GraphNode {
    const node = this.#graph.lookUp(name);
    if (node.parents.size > 0 || jobOf(node) !== undefined) throw new QmpError('Need a root block node');
    return node;
  }

  /** Order of what is looked at: as in QEMU. */
  async #start(given: Given, wanted: Wanted): Promise<void> {
    const { node, target } = wanted;
    const { granularity = 0, replaces } = given;
    if (granularity !== 0) checkGranularity(granularity);
    checkUnblocked(target);
    const replaced = replaces === undefined ? node : await this.#replaced(node, replaces);
    if (!MIRROR_SYNC_MODES.includes(wanted.sync))
      throw new QmpError(`Sync mode '${given.sync}' not supported`);
    if ((given['buf-size'] ?? 0) < 0) throw new QmpError("Invalid parameter 'buf-size'");
    if (unfiltered(node) === unfiltered(target)) throw new QmpError("Can't mirror node into itself");
    if ('filter-node-name' in given && given['filter-node-name'] !== undefined) {
      this.#graph.checkName(given['filter-node-name']);
    }
    const id = jobIdOf(given, node);
    this.#jobs.checkFree(id);
    let unclaim: () => void;
    try {
      checkSpeed(given.speed);
      if (target.descriptor.readOnly) throw new QmpError('Block node is read-only');
      checkMirrorTarget(target, this.#exports.useOf(target));
      checkUsableBelow(target, true);
      unclaim = this.#graph.locks.claim([
        { node, role: 'main node', needed: CONSISTENT_READ, shared: ALL_PERMISSIONS & ~RESIZE },
        { node: target, role: 'root', needed: WRITE, shared: WRITE_UNCHANGED },
      ]);
    } catch (error) {
      this.#jobs.refused(id);
      throw error;
    }
    const key = { job: 'mirror', id } as const;
    node.users.set(key, 'source');
    target.users.set(key, 'target');
    let filter: GraphNode | undefined;
    const uncover = (): void => {
      if (filter !== undefined) this.#exports.moved(filter, this.#graph.removeFilter(filter));
      filter = undefined;
    };
    const release = async (): Promise<void> => {
      uncover();
      for (const used of [node, target]) used.users.delete(key);
      for (const used of [target, node, replaced]) await this.#graph.closeUnused(used);
    };
    try {
      const disk = await this.#graph.disk(node);
      const handle = await disk.mirror(await this.#graph.disk(target), {
        ...runOptions(id, given),
        sync: wanted.sync,
        copyMode: given['copy-mode'],
        granularity: granularity === 0 ? undefined : granularity,
        unmap: wanted.unmap,
        targetReadsZero: wanted.targetReadsZero,
        pivot: (mirror) => {
          uncover();
          return this.#pivot(wanted, replaced, mirror);
        },
      });
      const name = 'filter-node-name' in given ? given['filter-node-name'] : undefined;
      filter = this.#graph.insertFilter(node, target, {
        name,
        key,
        job: { type: 'mirror', driver: 'mirror_top' },
      });
      this.#exports.moved(node, filter);
      unclaim();
      await this.#jobs.add([{ handle, options: listOptions(given, release) }]);
    } catch (error) {
      for (const used of [node, target]) used.users.delete(key);
      unclaim();
      throw error;
    }
  }

  /** What `replaces` names: the node itself, or what it shows through filters. */
  async #replaced(node: GraphNode, name: string): Promise<GraphNode> {
    const wanted = this.#graph.get(name);
    if (wanted === undefined) throw new QmpError(`Failed to find node with node-name='${name}'`);
    let shown = node;
    while (shown !== wanted) {
      const [below] = shown.children;
      if (below === undefined || !isFilter(shown)) {
        throw new QmpError(
          `Cannot replace '${name}' by a node mirrored from '${node.name}', because it cannot be guaranteed that doing so would not lead to an abrupt change of visible data`,
        );
      }
      shown = below.node;
    }
    const [own, theirs] = [await this.#graph.disk(node), await this.#graph.disk(wanted)];
    if (own.length !== theirs.length) {
      throw new QmpError('cannot replace image with a mirror image of different size');
    }
    return wanted;
  }

  /** The target takes the place of a node: nobody uses either of them meanwhile. */
  async #pivot(
    { node, target, backing }: Wanted,
    replaced: GraphNode,
    mirror: MirrorDescriptor,
  ): Promise<void> {
    const below = backing === 'named' ? await this.#graph.openNamedBacking(target) : backing;
    await this.#changes.change([replaced, target], async (section) => {
      const { descriptor: disk } = await this.#graph.disk(node);
      await section.run<void>({ kind: 'finish-mirror', disk, mirror });
      await this.#changes.replace(section, replaced, target);
      if (below !== undefined) await this.#changes.setBacking(section, target, below.node);
    });
  }
}

/** What an image on nothing holds is everything. */
function syncOf(sync: Given['sync'], node: GraphNode): MirrorSyncMode {
  return (sync === 'top' && backingOf(unfiltered(node)) === undefined ? 'full' : sync) as MirrorSyncMode;
}
