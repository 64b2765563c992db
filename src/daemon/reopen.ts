import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import type { Graph } from './graph.js';
import type { GraphChanges } from './graph-changes.js';
import type { Child, GraphNode } from './graph-node.js';
import { checkImageFile } from './image-files.js';
import type { Objects } from './objects.js';
import { checkReopenable, FORMATS } from './permissions.js';
import { checkTraits } from './traits.js';

/** Options of every node that can change, and go back to what they are by default. */
const COMMON: ReadonlySet<string> = new Set([
  'node-name',
  'discard',
  'cache',
  'read-only',
  'auto-read-only',
  'detect-zeroes',
]);

/** Likewise, of one driver. */
const OWN: Readonly<Record<string, readonly string[]>> = {
  file: ['x-check-cache-dropped'],
  host_device: ['x-check-cache-dropped'],
  raw: ['offset', 'size'],
  throttle: ['throttle-group'],
  qcow2: [
    'lazy-refcounts',
    'pass-discard-request',
    'pass-discard-snapshot',
    'pass-discard-other',
    'overlap-check',
    'cache-size',
    'l2-cache-size',
    'l2-cache-entry-size',
    'refcount-cache-size',
    'cache-clean-interval',
  ],
};

/** Options that name nodes. */
const CHILDREN = ['file', 'image', 'backing', 'target', 'data-file'] as const;
type Role = (typeof CHILDREN)[number];

/** What is to become of a node, once it is known that it can. */
interface Reopening {
  readonly node: GraphNode;
  readonly options: JsonObject;
  readonly readOnly: boolean;
  /** Other children than it has now; undefined in place of one: none from then on. */
  readonly children: ReadonlyMap<Role, GraphNode | undefined>;
}

/**
 * QMP `blockdev-reopen`: opens nodes with other options, all of them or none, while whoever uses them goes on.
 *
 * @param list options of each node, as `blockdev-add` would have them
 * @throws QmpError in QEMU's words
 */
export async function reopenNodes(
  graph: Graph,
  objects: Objects,
  changes: GraphChanges,
  list: readonly JsonObject[],
): Promise<void> {
  const wanted = list.flatMap((options) => nodesIn(graph, options));
  const reopenings = wanted.map(([node, options]) => prepare(graph, objects, node, options));
  for (const { node, readOnly } of reopenings) {
    checkWriters(node, readOnly);
    checkReopenable(node);
  }
  for (const { node, readOnly, children } of reopenings) {
    const file = children.get('file') ?? childOf(node, 'file');
    const moves = children.has('file') || (node.descriptor.readOnly && !readOnly);
    if (FORMATS.has(node.driver) && file !== undefined && moves) {
      await checkImageFile(node.name, file, readOnly);
    }
  }
  if (reopenings.length === 0) return;
  const nodes = reopenings.flatMap(({ node, children }) => [
    node,
    ...[...children.values()].flatMap((child) => child ?? []),
  ]);
  const left: GraphNode[] = [];
  await changes.change([...new Set(nodes)], async (section) => {
    for (const { node, options, readOnly, children } of reopenings) {
      for (const [role, child] of children) {
        const old = node.children.find((one) => one.role === role)?.node;
        if (old !== undefined) left.push(old);
        setChild(node, role, child);
      }
      node.options = node.owned ? options : { discard: 'unmap', ...options };
      await changes.reopen(section, node, readOnly);
    }
  });
  for (const node of left) await graph.closeUnused(node);
  await changes.settle(left);
}

/** A node with its options, and the nodes below it that have options in there. */
function nodesIn(graph: Graph, options: JsonObject): (readonly [GraphNode, JsonObject])[] {
  const name = options['node-name'];
  if (typeof name !== 'string') throw new QmpError('node-name not specified');
  const node = graph.get(name);
  if (node === undefined) throw new QmpError(`Failed to find node with node-name='${name}'`);
  return [[node, options], ...below(node, options)];
}

function below(node: GraphNode, options: JsonObject): (readonly [GraphNode, JsonObject])[] {
  return CHILDREN.flatMap((role) => {
    const given = options[role];
    const child = childOf(node, role);
    if (!isObject(given) || child === undefined) return [];
    return [[child, given] as const, ...below(child, given)];
  });
}

function childOf(node: GraphNode, role: Role): GraphNode | undefined {
  return node.children.find((child) => child.role === role)?.node;
}

function setChild(node: GraphNode, role: Role, child: GraphNode | undefined): void {
  const others: Child[] = [];
  for (const one of node.children) {
    if (one.role !== role) others.push(one);
    else if (node.children.every(({ node: other, role: as }) => other !== one.node || as === role)) {
      one.node.parents.delete(node);
    }
  }
  if (child === undefined) {
    node.children = others;
    return;
  }
  child.parents.add(node);
  const added = { role, node: child };
  // The first one is what gives a node its name.
  node.children = role === 'backing' ? [...others, added] : [added, ...others];
}

function prepare(graph: Graph, objects: Objects, node: GraphNode, options: JsonObject): Reopening {
  const { driver } = node;
  if (childOf(node, 'backing') !== undefined && options['backing'] === undefined) {
    throw new QmpError(`backing is missing for '${node.name}'`);
  }
  checkTraits(options);
  const own = OWN[driver] ?? [];
  const isOwn = (name: string): boolean => COMMON.has(name) || own.includes(name);
  const isChild = (name: string): boolean => CHILDREN.some((role) => role === name);
  for (const [name, value] of Object.entries(node.options)) {
    if (value === undefined || name === 'driver' || isOwn(name) || isChild(name)) continue;
    if (options[name] === undefined && name !== 'x-device') {
      throw new QmpError(`Option '${name}' cannot be reset to its default value`);
    }
  }
  const group = options['throttle-group'];
  if (driver === 'throttle' && typeof group === 'string' && objects.get(group)?.group === undefined) {
    throw new QmpError(`Throttle group '${group}' does not exist`);
  }
  const children = new Map<Role, GraphNode | undefined>();
  for (const role of CHILDREN) prepareChild(graph, node, role, options[role], children);
  for (const [name, value] of Object.entries(options)) {
    if (isOwn(name) || isChild(name)) continue;
    if (JSON.stringify(value) !== JSON.stringify(name === 'driver' ? driver : node.options[name])) {
      throw new QmpError(`Cannot change the option '${name}'`);
    }
  }
  const device = node.options['x-device'];
  return {
    node,
    options: device === undefined ? options : { ...options, 'x-device': device },
    readOnly: options['read-only'] === true,
    children,
  };
}

/** @param found takes another child than the node has */
function prepareChild(
  graph: Graph,
  node: GraphNode,
  role: Role,
  wanted: unknown,
  found: Map<Role, GraphNode | undefined>,
): void {
  if (wanted === undefined) return;
  const old = childOf(node, role);
  if (isObject(wanted)) {
    // Options of the child that is there.
    if (old === undefined || (wanted['driver'] !== undefined && wanted['driver'] !== old.driver)) {
      throw new QmpError(`Cannot change the option '${role}.driver'`);
    }
    return;
  }
  if (wanted === null) {
    if (old !== undefined) found.set(role, undefined);
    return;
  }
  const name = String(wanted);
  const child = graph.find(name);
  if (child === undefined) throw new QmpError(`Cannot find device='' nor node-name='${name}'`);
  if (child === old) return;
  if (isAbove(node, child)) {
    throw new QmpError(`Making '${child.name}' a ${role} child of '${node.name}' would create a cycle`);
  }
  if (role !== 'file' && role !== 'backing') throw new QmpError(`Cannot change the option '${role}'`);
  found.set(role, child);
}

/** Whether a node lies on `node`, or is it. */
function isAbove(node: GraphNode, other: GraphNode): boolean {
  return node === other || other.children.some(({ node: child }) => isAbove(node, child));
}

/** Whoever writes has to be able to go on. */
function checkWriters(node: GraphNode, readOnly: boolean): void {
  if (!readOnly || node.descriptor.readOnly) return;
  const written =
    [...node.users.values()].length > 0 ||
    [...node.parents].some((parent) => !parent.descriptor.readOnly && childOf(parent, 'backing') !== node);
  if (written) throw new QmpError(`Read-only block node '${node.name}' cannot support read-write users`);
}
