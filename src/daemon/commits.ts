import { QmpError } from '../qmp/errors.js';
import type { ArgumentsOf } from '../qmp/schema.js';
import { chainOf, findBackingImage, overlayIn, unfiltered } from './chain.js';
import { type ChainJobs, checkNoJob } from './chain-jobs.js';
import type { Exports } from './exports.js';
import { filenameOf } from './filenames.js';
import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';
import { jobOf } from './permissions.js';

/** QMP `block-commit`: which images it is about. */
export class Commits {
  readonly #graph: Graph;
  readonly #exports: Exports;
  readonly #chains: ChainJobs;

  constructor(graph: Graph, exports: Exports, chains: ChainJobs) {
    this.#graph = graph;
    this.#exports = exports;
    this.#chains = chains;
  }

  /** Order of what is looked at: as in QEMU. */
  async start(given: ArgumentsOf<'block-commit'>): Promise<void> {
    const node = this.#graph.find(given.device);
    if (node === undefined) throw new QmpError(`Device '${given.device}' not found`, 'DeviceNotFound');
    // A device is on the job's filter.
    if (given.device === node.device) checkNoJob(node);
    if (node.parents.size > 0 || jobOf(node) !== undefined) throw new QmpError('Need a root block node');
    const top = this.#top(given, node);
    const base = this.#base(given, top);
    for (const one of [...chainOf(top, base), base]) checkNoJob(one);
    if (top === base) throw new QmpError('cannot commit an image into itself');
    const isActive = unfiltered(top) === unfiltered(node);
    if (!isActive && this.#exports.useOf(top) !== 'writable') {
      await this.#chains.commit(given, node, top, base);
      return;
    }
    if (given['backing-file'] !== undefined) {
      throw new QmpError(
        `'backing-file' specified, but 'top' ${isActive ? 'is the active layer' : 'has a writer on it'}`,
      );
    }
    await this.#chains.commitActive(given, node, top, base);
  }

  #top(given: ArgumentsOf<'block-commit'>, node: GraphNode): GraphNode {
    const { top: name, 'top-node': nodeName } = given;
    if (name !== undefined && nodeName !== undefined) {
      throw new QmpError("'top-node' and 'top' are mutually exclusive");
    }
    if (nodeName !== undefined) {
      const top = this.#graph.findEither('', nodeName);
      if (!chainOf(node).includes(top)) throw new QmpError(`'${nodeName}' is not in this backing file chain`);
      return top;
    }
    if (name === undefined || name === filenameOf(node)) return node;
    const top = findBackingImage(node, name);
    if (top === undefined) throw new QmpError(`Top image file ${name} not found`);
    return top;
  }

  #base(given: ArgumentsOf<'block-commit'>, top: GraphNode): GraphNode {
    const { base: name, 'base-node': nodeName } = given;
    if (name !== undefined && nodeName !== undefined) {
      throw new QmpError("'base-node' and 'base' are mutually exclusive");
    }
    if (nodeName !== undefined) {
      const base = this.#graph.findEither('', nodeName);
      if (!chainOf(top).includes(base)) throw new QmpError(`'${nodeName}' is not in this backing file chain`);
      return base;
    }
    if (name === undefined) return overlayIn(top, undefined) ?? top;
    const base = findBackingImage(top, name);
    if (base === undefined) throw new QmpError(`Can't find '${name}' in the backing chain`);
    return base;
  }
}
