import { QmpError } from '../qmp/errors.js';
import type { QmpEvent } from '../qmp/monitor.js';
import type { ArgumentsOf } from '../qmp/schema.js';
import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';

/** QMP `block-set-write-threshold`: monitors are told, once, when a write to a node ends beyond an offset. */
export class WriteThresholds {
  readonly #graph: Graph;
  readonly #tell: (event: QmpEvent) => void;
  /** How much of each node was told; those are watched. */
  readonly #watched = new Map<GraphNode, number>();

  constructor(graph: Graph, tell: (event: QmpEvent) => void) {
    this.#graph = graph;
    this.#tell = tell;
  }

  /** @throws QmpError where there is no such node */
  set({ 'node-name': name, 'write-threshold': threshold }: ArgumentsOf<'block-set-write-threshold'>): void {
    const node = this.#graph.get(name);
    if (node?.marks === undefined) throw new QmpError(`Device '${name}' not found`);
    // What the old one has to say would be lost.
    this.#tellOf(node);
    const isWatched = this.#watched.has(node);
    if (!isWatched) this.#watched.set(node, node.marks.told);
    node.marks.threshold = threshold;
    if (!isWatched) void this.#watch(node);
  }

  async #watch(node: GraphNode): Promise<void> {
    for (;;) {
      await node.marks?.next(this.#watched.get(node) ?? 0);
      if (this.#graph.get(node.name) !== node) break;
      this.#tellOf(node);
    }
    this.#watched.delete(node);
  }

  #tellOf(node: GraphNode): void {
    const told = this.#watched.get(node);
    const { marks } = node;
    if (told === undefined || marks === undefined || marks.told === told) return;
    this.#watched.set(node, marks.told);
    const { threshold, excess } = marks.passed;
    this.#tell({
      event: 'BLOCK_WRITE_THRESHOLD',
      data: { 'node-name': node.name, 'write-threshold': threshold, 'amount-exceeded': excess },
    });
  }
}
