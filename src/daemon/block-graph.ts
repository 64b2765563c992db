import { ALL_PERMISSIONS, CONSISTENT_READ, RESIZE, WRITE, WRITE_UNCHANGED } from '../os/image-lock.js';
import { chainOf } from './chain.js';
import type { Child, GraphNode, Use, User } from './graph-node.js';
import { asUser, conflict, FORMATS, filterOver } from './permissions.js';

/*
 * QMP `x-debug-query-block-graph`: who uses which node, what each needs to be allowed to do with it, and what it allows
 * others. Permissions are those that QEMU's drivers ask for.
 */

const READ = CONSISTENT_READ;
const UNCHANGED = WRITE_UNCHANGED;
const ALL = ALL_PERMISSIONS;
/** Of who works by a filter, or by a backend of its own. */
const NONE = { needed: 0, shared: ALL } as const;
const NAMES = ['consistent-read', 'write', 'write-unchanged', 'resize'] as const;

export type PermissionName = (typeof NAMES)[number];

/** Bits of {@link NAMES}. */
export interface Permissions {
  readonly needed: number;
  readonly shared: number;
}

/** Something outside of the graph that uses nodes of it. */
export interface GraphUser {
  readonly type: 'block-backend' | 'block-job';
  /** Empty where it has none. */
  readonly name: string;
  readonly uses: readonly (Permissions & { readonly node: GraphNode; readonly role: string })[];
  /** It is a job, or works for one. */
  readonly ofJob?: true;
}

/** A node, or one that is still to be. */
export type Taker = Pick<GraphNode, 'driver' | 'options' | 'children' | 'job'> & {
  readonly descriptor: { readonly readOnly: boolean };
  readonly parents: { readonly size: number };
  readonly users: { readonly size: number };
};

interface Edge extends Permissions {
  readonly parent: GraphUser | GraphNode;
  readonly node: GraphNode;
  readonly role: string;
}

/** A drive of a device: as long as no guest has it, nobody writes there. */
export function deviceUser(name: string, node: GraphNode): GraphUser {
  return { type: 'block-backend', name, uses: [{ node, role: 'root', needed: READ, shared: ALL }] };
}

export function exportUser(node: GraphNode, writable: boolean): GraphUser {
  const needed = READ | (writable ? WRITE : 0);
  return {
    type: 'block-backend',
    name: '',
    uses: [{ node, role: 'root', needed, shared: ALL & ~RESIZE }],
  };
}

/** The jobs that work on nodes. */
export function jobUsers(nodes: readonly GraphNode[]): GraphUser[] {
  const jobs = new Map<User, [GraphNode, Use][]>();
  for (const node of nodes) {
    for (const [user, use] of node.users) {
      if (user.job === undefined) continue;
      jobs.set(user, [...(jobs.get(user) ?? []), [node, use]]);
    }
  }
  return [...jobs].reverse().flatMap(([{ id = '', job, resizes, top }, uses]) => {
    const user = (list: GraphUser['uses']): GraphUser => ({
      type: 'block-job',
      name: id,
      uses: list,
      ofJob: true,
    });
    const backend = (list: GraphUser['uses']): GraphUser[] =>
      list.length === 0 ? [] : [{ type: 'block-backend', name: '', uses: list, ofJob: true }];
    const of = (use: Use): GraphNode[] => uses.flatMap(([node, as]) => (as === use ? node : []));
    const filter = of('source').find((node) => node.job !== undefined);
    const targets = of('target').map((node) => ({ node, role: 'target', ...NONE }));
    // Those at the bottom first.
    const between = (list: readonly GraphNode[], shared: number): GraphUser['uses'] =>
      [...list]
        .sort((one, other) => chainOf(one).length - chainOf(other).length)
        .map((node) => ({ node, role: 'intermediate node', needed: 0, shared }));
    const roots = (needed: number, shared: number): GraphUser['uses'] =>
      targets.map(({ node }) => ({ node, role: 'root', needed, shared }));
    const main = filter === undefined ? [] : [{ node: filter, role: 'main node', ...NONE }];
    const covered = filter?.children[0]?.node;
    const source = (role: string): GraphUser['uses'] =>
      covered === undefined ? [] : [{ node: covered, role, needed: 0, shared: ALL & ~RESIZE }];
    switch (job) {
      case 'stream': {
        const root = main.map(({ node }) => ({ node, role: 'root', needed: READ, shared: ALL & ~RESIZE }));
        const chain = between(
          of('chain').filter((node) => node !== covered),
          READ | UNCHANGED,
        );
        return [...backend(root), user([...chain, ...source('active node'), ...main])];
      }
      case 'commit': {
        const resizing = resizes === true ? RESIZE : 0;
        if (top !== undefined) {
          const base = targets.map((use) => ({ ...use, role: 'base' }));
          const below = between(of('intermediate'), WRITE | UNCHANGED);
          const onTop = of('chain').map((node) => ({ node, role: 'main node', ...NONE }));
          return [
            ...backend(roots(READ | WRITE | resizing, READ | UNCHANGED)),
            ...backend([{ node: top, role: 'root', ...NONE }]),
            user([...base, ...below, ...onTop]),
          ];
        }
        const shared = ALL & ~RESIZE;
        const active = main.map((use) => ({ ...use, needed: READ, shared }));
        const below = between(
          of('intermediate').filter((node) => node !== covered),
          WRITE | UNCHANGED,
        );
        return [
          ...backend(roots(WRITE | resizing, shared)),
          user([...below, ...targets, ...source('source'), ...active]),
        ];
      }
      case 'mirror': {
        const shared = ALL & ~RESIZE;
        const sources = of('source').flatMap((node) =>
          node === filter ? [] : { node, role: 'source', needed: 0, shared },
        );
        const active = main.map((use) => ({ ...use, needed: READ, shared }));
        return [...backend(roots(WRITE, UNCHANGED)), user([...targets, ...sources, ...active])];
      }
      default:
        return user([...targets, ...main]);
    }
  });
}

/** @param nodes all of them, in the order in which they were made */
export function describeGraph(users: readonly GraphUser[], nodes: readonly GraphNode[]): object {
  return new Description(users).of(nodes);
}

class Description {
  readonly #users: readonly GraphUser[];
  readonly #numbers = new Map<GraphUser | GraphNode, number>();
  readonly #needs = new Map<GraphNode, Permissions>();

  constructor(users: readonly GraphUser[]) {
    this.#users = users;
  }

  of(nodes: readonly GraphNode[]): object {
    const found: object[] = [];
    const edges: object[] = [];
    const add = (one: GraphUser | GraphNode, type: string, name: string, below: readonly Edge[]): void => {
      found.push({ name, type, id: this.#number(one) });
      for (const edge of below) {
        const parent = this.#number(edge.parent);
        edges.push({
          name: edge.role,
          parent,
          'shared-perm': namesOf(edge.shared),
          child: this.#number(edge.node),
          perm: namesOf(edge.needed),
        });
      }
    };
    for (const user of this.#users) {
      const below = user.uses.map((use) => ({ ...use, parent: user }));
      add(user, user.type, user.name, below);
    }
    for (const node of nodes) add(node, 'block-driver', node.name, this.#below(node));
    return { nodes: found.reverse(), edges: edges.reverse() };
  }

  /** Numbers are given in the order in which somebody is first spoken of. */
  #number(one: GraphUser | GraphNode): number {
    const known = this.#numbers.get(one);
    if (known !== undefined) return known;
    const next = this.#numbers.size + 1;
    this.#numbers.set(one, next);
    return next;
  }

  #below(node: GraphNode): Edge[] {
    const above = this.needs(node);
    return childrenOf(node).map((child) => ({
      parent: node,
      node: coverOf(child.node, node),
      role: child.role,
      ...permissionsOn(node, child, above),
    }));
  }

  /** What all that use a node need of it and share. */
  needs(node: GraphNode): Permissions {
    const known = this.#needs.get(node);
    if (known !== undefined) return known;
    let all: Permissions = { needed: 0, shared: ALL };
    for (const { needed, shared } of this.edgesTo(node)) {
      all = { needed: all.needed | needed, shared: all.shared & shared };
    }
    this.#needs.set(node, all);
    return all;
  }

  /** Who uses a node. */
  edgesTo(node: GraphNode): Edge[] {
    const roots = this.#users.flatMap((parent) => parent.uses.map((use) => ({ ...use, parent })));
    const parents = new Set([...parentsOf(node), ...this.#copyingTo(node)]);
    // Nothing is asked about those above others that turn out to be on something else.
    const onIt = [...parents].filter((parent) =>
      childrenOf(parent).some((child) => coverOf(child.node, parent) === node),
    );
    return [...roots, ...onIt.flatMap((parent) => this.#below(parent))].filter((edge) => edge.node === node);
  }

  /** The filters of jobs whose target the node is. */
  #copyingTo(node: GraphNode): GraphNode[] {
    const filters = this.#users.flatMap(({ uses }) => uses.map((use) => use.node));
    return filters.filter(({ job, children }) => {
      return (
        job !== undefined && children.some(({ role, node: child }) => role === 'target' && child === node)
      );
    });
  }
}

/** @returns says what all that use a node, or lie on it, need of it and share */
export function needsBy(users: readonly GraphUser[]): (node: GraphNode) => Permissions {
  const description = new Description(users);
  return (node) => description.needs(node);
}

/** What a node needs of its children. @param above what is needed of itself, and shared */
export function usesOf(node: Taker, above: Permissions = NONE, children = node.children): GraphUser['uses'] {
  return children.map((child) => ({
    node: child.node,
    role: child.role,
    ...permissionsOn(node, child, above),
  }));
}

function bitsOf(names: unknown): number {
  const list: readonly unknown[] = Array.isArray(names) ? names : [];
  return NAMES.reduce((bits, name, index) => (list.includes(name) ? bits | (1 << index) : bits), 0);
}

/**
 * What blkdebug nodes below and in a new one, and who uses their nodes already, do not let each other do.
 *
 * @throws QmpError in QEMU's words
 */
export function checkTaken(added: GraphNode, users: readonly GraphUser[]): void {
  for (const { node } of added.children) checkTaken(node, users);
  if (added.driver !== 'blkdebug') return;
  const description = new Description(users);
  for (const { node } of added.children) {
    const all = description.edgesTo(node);
    const own = all.find(({ parent }) => parent === added);
    if (own === undefined) continue;
    for (const other of all) {
      if (other === own) continue;
      for (const [one, two] of [
        [other, own],
        [own, other],
      ] as const) {
        checkPair(node, one, two);
      }
    }
  }
}

/** @throws QmpError where blkdebug nodes on a node keep whoever is there to use it from something */
export function checkUnshared(node: GraphNode, wanted: readonly PermissionName[]): void {
  const user = { parent: exportUser(node, false), node, role: 'root', needed: bitsOf(wanted), shared: ALL };
  for (const parent of node.parents) {
    if (parent.driver !== 'blkdebug') continue;
    const shared = ALL & ~bitsOf(parent.options['unshare-child-perms']);
    checkPair(node, user, { parent, node, role: 'image', needed: 0, shared });
  }
}

function checkPair(node: GraphNode, one: Edge, two: Edge): void {
  const denied = one.needed & ~two.shared;
  if (denied === 0) return;
  const names = NAMES.filter((_, index) => (denied & (1 << index)) !== 0).map((name) =>
    name.replace('-', ' '),
  );
  throw conflict(node, names.join(', '), saidOf(two), saidOf(one));
}

function saidOf({ parent, node, role }: Edge): string {
  const who =
    'driver' in parent
      ? `node '${parent.name}'`
      : parent.name === ''
        ? 'an unnamed block device'
        : parent.type === 'block-job'
          ? `job '${parent.name}'`
          : `block device '${parent.name}'`;
  return asUser(who, node, role);
}

/** The last one first. What a mirror or a commit has below its filter is a backing file to QEMU. */
function childrenOf({ driver, children }: GraphNode): { readonly node: GraphNode; readonly role: string }[] {
  if (driver !== 'mirror_top' && driver !== 'commit_top') return [...children].reverse();
  return children.flatMap(({ node, role }) => (role === 'file' ? { node, role: 'backing' } : []));
}

/** Whoever lies on a node lies on the filter that a job has put over it, but for those that the filter itself is on. */
function coverOf(node: GraphNode, parent: GraphNode): GraphNode {
  const filter = filterOver(node);
  return filter === undefined || isOn(filter, parent) ? node : coverOf(filter, parent);
}

/** Whether a node is on another one, directly or not, or is it. */
function isOn(node: GraphNode, other: GraphNode): boolean {
  return node === other || node.children.some((child) => isOn(child.node, other));
}

function parentsOf(node: GraphNode): GraphNode[] {
  const covered = node.job === undefined ? undefined : node.children[0]?.node;
  return [
    ...node.parents,
    ...(covered === undefined ? [] : parentsOf(covered).filter((one) => one !== node)),
  ];
}

function namesOf(bits: number): PermissionName[] {
  return NAMES.filter((_, index) => (bits & (1 << index)) !== 0).reverse();
}

/** @param above what is needed of the node itself, and shared */
function permissionsOn(
  node: Taker,
  child: Pick<Child, 'node'> & { readonly role: string },
  above: Permissions,
): Permissions {
  const passed = { needed: above.needed, shared: above.shared | UNCHANGED };
  if (node.driver === 'commit_top') return NONE;
  if (node.driver === 'mirror_top') {
    // What a commit lies on may change as the job goes on.
    return node.job?.type === 'commit'
      ? { needed: passed.needed & ~READ, shared: passed.shared | WRITE }
      : passed;
  }
  if (child.role === 'backing') {
    const others = (above.shared & WRITE) !== 0 ? WRITE | RESIZE : 0;
    return { needed: above.needed & READ, shared: others | READ | UNCHANGED };
  }
  if (child.role === 'target') return { needed: WRITE, shared: ALL & ~RESIZE };
  switch (node.driver) {
    case 'raw': {
      const isPart = node.options['offset'] !== undefined || node.options['size'] !== undefined;
      if (!isPart) return passed;
      const { needed, shared } = ofData(passed);
      const changes = WRITE | RESIZE;
      return { needed: (needed & ~changes) | (above.needed & changes), shared };
    }
    case 'blkdebug':
      return {
        needed: passed.needed | bitsOf(node.options['take-child-perms']),
        shared: passed.shared & ~bitsOf(node.options['unshare-child-perms']),
      };
    case 'copy-before-write':
      return {
        needed: passed.needed | ((passed.needed & WRITE) === 0 ? 0 : READ),
        shared: node.parents.size + node.users.size === 0 ? passed.shared : passed.shared & ~(WRITE | RESIZE),
      };
    case 'snapshot-access':
      return { needed: 0, shared: ALL };
    case 'copy-on-read':
      return { ...passed, needed: passed.needed | UNCHANGED };
    case 'preallocate':
      return (above.needed & (WRITE | RESIZE)) === 0
        ? passed
        : { needed: passed.needed | WRITE | RESIZE, shared: passed.shared & ~(WRITE | RESIZE) };
    default:
      return FORMATS.has(node.driver) ? ofImage(node, child, passed) : passed;
  }
}

/** Of what has the tables of an image, or its data. */
function ofImage(node: Taker, { role }: { readonly role: string }, passed: Permissions): Permissions {
  if (role === 'data-file') return ofData(passed);
  const changes = node.descriptor.readOnly ? 0 : WRITE | RESIZE;
  const tables = { needed: passed.needed | changes | READ, shared: passed.shared & ~(WRITE | RESIZE) };
  return node.children.some((child) => child.role === 'data-file') ? tables : ofData(tables);
}

function ofData({ needed, shared }: Permissions): Permissions {
  const written = (needed & UNCHANGED) === 0 ? needed : needed | WRITE;
  return { needed: (written & WRITE) === 0 ? written : written | RESIZE, shared: shared & ~RESIZE };
}
