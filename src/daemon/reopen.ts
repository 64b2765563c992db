import type { DrainedSection } from '../engine/drained-section.js';
import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import type { Release } from './file-locks.js';
import type { Graph } from './graph.js';
import type { GraphChanges } from './graph-changes.js';
import type { Child, GraphNode } from './graph-node.js';
import { checkImageFile } from './image-files.js';
import type { Objects } from './objects.js';
import { checkReopenable, FORMATS, filterOver } from './permissions.js';
import { checkQcow2Options } from './qcow2-options.js';
import { checkTraits, inheritedCache } from './traits.js';

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
  const reopenings: Reopening[] = [];
  for (const [node, options] of wanted) reopenings.push(prepare(graph, objects, node, options, reopenings));
  for (const { node, readOnly } of reopenings) {
    checkWriters(node, readOnly, reopenings);
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
  const claims: Release[] = [];
  const left: GraphNode[] = [];
  try {
    for (const { node, options, readOnly, children } of reopenings) {
      const below = node.children.flatMap((child) => (children.has(child.role as Role) ? [] : child));
      const others = [...children].flatMap(([role, one]) => (one === undefined ? [] : { role, node: one }));
      const wanted = { options, descriptor: { readOnly }, children: [...below, ...others] };
      claims.push(graph.locks.claimChange(node, wanted));
    }
    await reopenAll(changes, reopenings, nodes, left);
  } finally {
    for (const release of claims) release();
  }
  for (const node of left) await graph.closeUnused(node);
  await changes.settle(left);
}

/** @param left takes children that a node has no more */
async function reopenAll(
  changes: GraphChanges,
  reopenings: readonly Reopening[],
  nodes: readonly GraphNode[],
  left: GraphNode[],
): Promise<void> {
  await changes.change([...new Set(nodes)], async (section) => {
    const undo: (() => Promise<void>)[] = [];
    try {
      for (const { node, options, readOnly, children } of reopenings) {
        undo.unshift(undoOf(changes, section, node, [...children.keys()]));
        for (const [role, child] of children) {
          const old = childOf(node, role);
          if (old !== undefined) left.push(old);
          setChild(node, role, child);
        }
        node.options = node.owned ? options : { discard: 'unmap', ...options };
        await changes.reopen(section, node, readOnly);
      }
    } catch (error) {
      left.length = 0;
      for (const back of undo) await back();
      throw error;
    } finally {
      // Those that came first lie on what others have become after them.
      for (const { node } of reopenings.toReversed()) {
        if (node.children.length > 0) await changes.relink(section, node);
      }
    }
  });
}

/** A node with its options, and the nodes below it that have options in there. */
function nodesIn(graph: Graph, options: JsonObject): (readonly [GraphNode, JsonObject])[] {
  const name = options['node-name'];
  if (typeof name !== 'string') throw new QmpError('node-name not specified');
  const node = graph.get(name);
  if (node === undefined) throw new QmpError(`Failed to find node with node-name='${name}'`);
  return [[node, options], ...below(node, options)];
}

/** What a node writes to is for reading where the node is, and its backing file always, unless their options say otherwise. */
function below(node: GraphNode, options: JsonObject): (readonly [GraphNode, JsonObject])[] {
  return CHILDREN.flatMap((role) => {
    const given = options[role];
    const child = childOf(node, role);
    if (!isObject(given) || child === undefined) return [];
    const all = {
      ...given,
      'read-only': given['read-only'] ?? (role === 'backing' || options['read-only'] === true),
      cache: inheritedCache(options, given),
    };
    return [[child, all] as const, ...below(child, all)];
  });
}

function childOf(node: GraphNode, role: Role): GraphNode | undefined {
  return node.children.find((child) => child.role === role)?.node;
}

/** Makes a node again what it is now. */
function undoOf(
  changes: GraphChanges,
  section: DrainedSection,
  node: GraphNode,
  roles: readonly Role[],
): () => Promise<void> {
  const { options, descriptor } = node;
  const { readOnly } = descriptor;
  const children = roles.map((role) => [role, childOf(node, role)] as const);
  return async () => {
    for (const [role, child] of children) setChild(node, role, child);
    node.options = options;
    await changes.reopen(section, node, readOnly);
  };
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

/** @param before what becomes of others first */
function prepare(
  graph: Graph,
  objects: Objects,
  node: GraphNode,
  options: JsonObject,
  before: readonly Reopening[],
): Reopening {
  const { driver, descriptor } = node;
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
  if (descriptor.driver === 'qcow2') checkQcow2Options(options, descriptor);
  const group = options['throttle-group'];
  if (driver === 'throttle' && typeof group === 'string' && objects.get(group)?.group === undefined) {
    throw new QmpError(`Throttle group '${group}' does not exist`);
  }
  const hasBacking =
    childOf(node, 'backing') !== undefined ||
    (descriptor.driver === 'qcow2' && descriptor.backingFile !== undefined);
  if (hasBacking && options['backing'] === undefined) {
    throw new QmpError(`backing is missing for '${node.name}'`);
  }
  const children = new Map<Role, GraphNode | undefined>();
  for (const role of CHILDREN) {
    const child = wantedChild(graph, node, role, options[role], before);
    if (child !== childOf(node, role)) children.set(role, child);
  }
  if (options['node-name'] !== undefined && options['node-name'] !== node.name) {
    throw new QmpError("Cannot change the option 'node-name'");
  }
  for (const [name, value] of Object.entries(options)) {
    if (isOwn(name) || isChild(name)) continue;
    if (JSON.stringify(value) !== JSON.stringify(name === 'driver' ? driver : node.options[name])) {
      throw new QmpError(`Cannot change the option '${changedName(name, value, node.options[name])}'`);
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

/** The option that is different, or the first of its members that is. */
function changedName(name: string, value: unknown, before: unknown): string {
  if (!isObject(value) || !isObject(before)) return name;
  const changed = Object.entries(value).find(
    ([key, one]) => JSON.stringify(one) !== JSON.stringify(before[key]),
  );
  return changed === undefined ? name : changedName(`${name}.${changed[0]}`, changed[1], before[changed[0]]);
}

/** The child that a node is to have from then on; undefined for none. @param before what becomes of others first */
function wantedChild(
  graph: Graph,
  node: GraphNode,
  role: Role,
  wanted: unknown,
  before: readonly Reopening[],
): GraphNode | undefined {
  const old = childOf(node, role);
  if (wanted === undefined) return old;
  const filter = old === undefined || node.job !== undefined ? undefined : filterOver(old);
  if (isObject(wanted)) {
    // Options of the child that is there, and came with its parent.
    if (old === undefined || old.owned || filter !== undefined) {
      throw new QmpError(`Cannot change the option '${role}.driver'`);
    }
    return old;
  }
  if (role !== 'file' && role !== 'backing') {
    if (wanted === old?.name) return old;
    throw new QmpError(`Cannot change the option '${role}'`);
  }
  const child = wanted === null ? undefined : graph.find(String(wanted));
  if (child === undefined && wanted !== null) {
    throw new QmpError(`Cannot find device='' nor node-name='${String(wanted)}'`);
  }
  if (child === old) return old;
  if (child !== undefined && isAbove(node, child, before)) {
    throw new QmpError(`Making '${child.name}' a ${role} child of '${node.name}' would create a cycle`);
  }
  if (filter?.job?.isUnnamed === true) {
    throw new QmpError(`Cannot replace implicit ${role} child of ${node.name}`);
  }
  if (old !== undefined && filter === undefined && isFrozen(node, old)) {
    throw new QmpError(`Cannot change frozen '${role}' link from '${node.name}' to '${old.name}'`);
  }
  return child;
}

/** Whether a job within a backing chain rests on a node and on the child that it has. */
function isFrozen(node: GraphNode, child: GraphNode): boolean {
  return [...node.users.keys()].some(
    (user) => (user.job === 'stream' || user.job === 'commit') && child.users.has(user),
  );
}

/** Whether a node will lie on `node`, or is it. */
function isAbove(node: GraphNode, other: GraphNode, before: readonly Reopening[]): boolean {
  if (node === other) return true;
  const changed = before.findLast((one) => one.node === other)?.children ?? new Map<string, undefined>();
  const kept = other.children.flatMap(({ role, node: child }) => (changed.has(role) ? [] : child));
  const given = [...changed.values()].flatMap((child) => child ?? []);
  return [...kept, ...given].some((child) => isAbove(node, child, before));
}

/** Whoever writes has to be able to go on. */
function checkWriters(node: GraphNode, readOnly: boolean, reopenings: readonly Reopening[]): void {
  if (!readOnly) return;
  const writes = (parent: GraphNode): boolean => {
    if (childOf(parent, 'backing') === node) return false;
    const reopening = reopenings.findLast((one) => one.node === parent);
    return !(reopening?.readOnly ?? parent.descriptor.readOnly);
  };
  const isUsed = !node.descriptor.readOnly && node.users.size > 0;
  if (isUsed || [...node.parents].some(writes)) {
    throw new QmpError(`Read-only block node '${node.name}' cannot support read-write users`);
  }
}
