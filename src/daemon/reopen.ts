import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import type { Graph, GraphNode } from './graph.js';
import type { GraphChanges } from './graph-changes.js';

export async function reopenNodes(
  graph: Graph,
  changes: GraphChanges,
  list: readonly JsonObject[],
): Promise<void> {
  void graph;
  void changes;
  void list;
  void QmpError;
  void isObject;
  const node: GraphNode | undefined = undefined;
  void node;
}
