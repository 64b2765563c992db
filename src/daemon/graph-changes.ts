import type { DiskDescriptor } from '../block/disk.js';
import type { Changed } from '../block/live-changes.js';
import type { NodeDescriptor, Qcow2Descriptor } from '../block/node.js';
import type { Preallocation } from '../block/qcow2/index.js';
import type { Links } from '../block/relink.js';
import type { DiskHandle } from '../engine/disk.js';
import { DrainedSection } from '../engine/drained-section.js';
import type { Engine } from '../engine/engine.js';
import { StillframeError } from '../errors.js';
import { QmpError } from '../qmp/errors.js';
import { numberIn } from '../qmp/types.js';
import { whileClaimed } from './file-locks.js';
import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';
import { lengthenerOf } from './image-files.js';
import { traitsOf } from './traits.js';

/** Changes of a graph whose nodes are in use: guests wait while one is made, and see nothing else of it. */
export class GraphChanges {
  readonly #engine: Engine;
  readonly #graph: Graph;
  /** Called when what was on one node is on another one now. */
  readonly #moved: (from: GraphNode, to: GraphNode) => void;

  constructor(engine: Engine, graph: Graph, moved: (from: GraphNode, to: GraphNode) => void) {
    this.#engine = engine;
    this.#graph = graph;
    this.#moved = moved;
  }

  /**
   * Runs `body`, which changes these nodes, while nobody uses them, and makes those that lie on them see it.
   *
   * @throws QmpError where an instant of a disk above one of them is held
   */
  async change<T>(nodes: readonly GraphNode[], body: (section: DrainedSection) => Promise<T>): Promise<T> {
    for (const node of nodes) await this.#graph.disk(node);
    // Files may be opened anew as well.
    const touched = (): GraphNode[] => withAncestors([...nodes, ...nodes.flatMap(filesBelow)]);
    const disks: DiskDescriptor[] = [];
    for (const node of touched()) {
      if (node.frozen !== undefined) {
        throw new QmpError(`Node '${node.name}' holds an instant of what is below it`);
      }
      const disk = await node.disk;
      if (disk !== undefined) disks.push(disk.descriptor);
    }
    return await DrainedSection.run(this.#engine, disks, true, async (section) => {
      try {
        return await body(section);
      } finally {
        // The ones below first: those above are on what these have become.
        for (const node of touched().reverse()) {
          if (!nodes.includes(node)) await this.relink(section, node);
          await this.#reroot(section, node);
          followBelow(node);
        }
      }
    });
  }

  /** Lets a node be on its children as they are now. */
  async relink(section: DrainedSection, node: GraphNode): Promise<void> {
    const links = await this.#graph.linksOf(node);
    if (PASS_ONLY.has(node.driver)) node.descriptor = links.file ?? node.descriptor;
    else
      node.descriptor = await section.run<NodeDescriptor>({ kind: 'relink', node: node.descriptor, links });
  }

  /** Every thread sees from now on what the node has become. */
  async #reroot(section: DrainedSection, node: GraphNode): Promise<void> {
    const disk = await node.disk;
    if (disk === undefined) return;
    const root = await section.run<NodeDescriptor>({ kind: 'as-drive', node: node.descriptor });
    const { discard } = traitsOf(node.options);
    const { readOnly } = root;
    const length = await section.run<number>({ kind: 'length', node: root });
    disk.changed(
      await section.run<DiskDescriptor>({
        kind: 'change-root',
        disk: disk.descriptor,
        root: { node: root, length, readOnly, discard },
      }),
    );
  }

  /** The nodes that an image or a filter writes to. */
  static nodesBelow(node: GraphNode | undefined): GraphNode[] {
    return node === undefined ? [] : filesBelow(node);
  }

  /** Lets nodes be as long as images on them have made them that are gone. */
  async settle(nodes: readonly GraphNode[]): Promise<void> {
    const changed: GraphNode[] = [];
    for (const node of nodes) {
      const disk = await node.disk;
      if (disk === undefined || this.#graph.get(node.name) !== node || lengthenerOf(node) !== undefined)
        continue;
      const root = await this.#engine.run<NodeDescriptor>({ kind: 'as-drive', node: node.descriptor });
      const length = await this.#engine.run<number>({ kind: 'length', node: root });
      if (length !== disk.length) changed.push(node);
    }
    // Where an instant is held the node stays as long as it was in that.
    if (changed.length === 0 || withAncestors(changed).some(({ frozen }) => frozen !== undefined)) return;
    await this.change(changed, () => Promise.resolve());
  }

  /** Takes what became of a node, and says what went wrong. */
  static settle(node: GraphNode, { node: descriptor, failure }: Changed): void {
    node.descriptor = descriptor;
    if (failure !== undefined) throw StillframeError.fromPlain(failure);
  }

  /**
   * All that is on `node` is on `by` from now on, but for `by` itself. Within {@link change} of both.
   */
  async replace(section: DrainedSection, node: GraphNode, by: GraphNode): Promise<void> {
    const [own, others] = [await this.#graph.disk(node), await this.#graph.disk(by)];
    await whileClaimed(this.#graph.locks.claimMoved(node, by), () =>
      this.#swap(section, node, by, own, others),
    );
  }

  async #swap(
    section: DrainedSection,
    node: GraphNode,
    by: GraphNode,
    own: DiskHandle,
    others: DiskHandle,
  ): Promise<void> {
    await section.run({ kind: 'swap-bitmaps', one: own.descriptor, other: others.descriptor });
    node.disk = Promise.resolve(others);
    by.disk = Promise.resolve(own);
    for (const parent of [...node.parents]) {
      if (parent === by) continue;
      node.parents.delete(parent);
      by.parents.add(parent);
      parent.children = parent.children.map((child) =>
        child.node === node ? { ...child, node: by } : child,
      );
    }
    for (const [key, use] of [...node.users]) {
      if (use !== 'export') continue;
      node.users.delete(key);
      by.users.set(key, use);
    }
    by.device ??= node.device;
    node.device = undefined;
    this.#moved(node, by);
  }

  /**
   * Opens a node, and what was made for it, for reading or for writing. Within {@link change} of the node.
   *
   * @throws StillframeError what opening a file or an image throws; the node is what it was then
   */
  async setReadOnly(section: DrainedSection, node: GraphNode, readOnly: boolean): Promise<void> {
    if (node.descriptor.readOnly === readOnly) return;
    const { options } = node;
    node.options = { ...options, 'read-only': readOnly };
    try {
      await this.reopen(section, node, readOnly);
    } catch (error) {
      node.options = options;
      throw error;
    }
  }

  /** Opens a node anew, on the children and with the options that it has now. Otherwise as {@link setReadOnly}. */
  async reopen(section: DrainedSection, node: GraphNode, readOnly: boolean): Promise<void> {
    const below = node.children.filter(
      ({ role, node: child }) => !child.owned && (role === 'file' || role === 'data-file'),
    );
    const files = async (): Promise<void> => {
      for (const { node: child } of below) await this.setReadOnly(section, child, readOnly);
    };
    // An image that was written to is put in order while its file can be written to.
    if (!readOnly) await files();
    await whileClaimed(this.#graph.locks.claimChange(node, { descriptor: { readOnly } }), () =>
      this.#open(section, node, readOnly),
    );
    if (!readOnly || below.length === 0) return;
    await files();
    await this.relink(section, node);
  }

  async #open(section: DrainedSection, node: GraphNode, readOnly: boolean): Promise<void> {
    const { descriptor } = node;
    switch (descriptor.driver) {
      case 'file': {
        if (descriptor.readOnly === readOnly) return;
        const opened = await section.run<NodeDescriptor>({ kind: 'reopen-file', node: descriptor, readOnly });
        let left = descriptor.fd;
        try {
          if (opened.driver !== 'file') throw new TypeError('a file stays one');
          left = opened.fd;
          this.#graph.locks.move(node, opened.fd);
          node.descriptor = opened;
          left = descriptor.fd;
        } finally {
          await section.run<void>({ kind: 'close-descriptor', fd: left });
        }
        return;
      }
      case 'qcow2': {
        const links = await this.#graph.linksOf(node);
        if (!readOnly && links.file?.readOnly === true) throw new QmpError('Block node is read-only');
        if (descriptor.readOnly === readOnly && isOnSameFiles(descriptor, links)) {
          // It stays open: jobs and exports may rely on its bitmaps.
          await this.relink(section, node);
          return;
        }
        const { descriptor: disk } = await this.#graph.disk(node);
        const options = { ...links, readOnly };
        GraphChanges.settle(
          node,
          await section.run<Changed>({ kind: 'reopen-image', disk, node: descriptor, options }),
        );
        return;
      }
      case 'raw': {
        const { file } = await this.#graph.linksOf(node);
        if (file === undefined) throw new TypeError('a raw image lies on a file');
        const layer = {
          driver: 'raw',
          file,
          readOnly,
          offset: numberIn(node.options, 'offset'),
          size: numberIn(node.options, 'size'),
        } as const;
        node.descriptor = await section.run<NodeDescriptor>({ kind: 'open-layer', layer });
        return;
      }
      case 'throttle': {
        node.descriptor = { ...descriptor, ...this.#graph.takeGroup(node) };
        await this.relink(section, node);
        return;
      }
      default:
        node.descriptor = { ...descriptor, readOnly };
        await this.relink(section, node);
    }
  }

  /**
   * Makes a node larger or smaller. Within {@link change} of the node.
   *
   * @param length bytes
   * @param preallocation of what is new
   */
  async resize(
    section: DrainedSection,
    node: GraphNode,
    length: number,
    preallocation: Preallocation = 'off',
  ): Promise<void> {
    const { descriptor: disk } = await this.#graph.disk(node);
    const from = await section.run<NodeDescriptor>({ kind: 'as-drive', node: node.descriptor });
    const resize = { kind: 'resize-node', disk, node: from, length, preallocation } as const;
    const changed = await section.run<Changed>(resize);
    // What lies on a file itself is not a node of its own.
    if (from.driver === node.descriptor.driver) GraphChanges.settle(node, changed);
    else if (changed.failure !== undefined) throw StillframeError.fromPlain(changed.failure);
  }

  /** Puts another backing file under an image, or none. Within {@link change} of the image. */
  async setBacking(section: DrainedSection, node: GraphNode, backing: GraphNode | undefined): Promise<void> {
    const old = node.children.find(({ role }) => role === 'backing')?.node;
    old?.parents.delete(node);
    const others = node.children.filter(({ role }) => role !== 'backing');
    node.children = backing === undefined ? others : [...others, { role: 'backing', node: backing }];
    backing?.parents.add(node);
    await this.relink(section, node);
  }

  /**
   * Makes the header of a writable image name another backing file, or none; what the image lies on stays as it is. Within
   * {@link change} of the image.
   */
  async nameBacking(
    section: DrainedSection,
    node: GraphNode,
    backing: { readonly name: string; readonly format: string } | undefined,
  ): Promise<void> {
    const { descriptor } = node;
    if (descriptor.driver !== 'qcow2') {
      throw new QmpError(`Image format '${node.driver}' has no backing files`);
    }
    const { descriptor: disk } = await this.#graph.disk(node);
    // What the other backing file does not show is in the image before its header says so.
    await section.run<void>({ kind: 'request', disk, request: { op: 'flush' } });
    await section.run<void>({ kind: 'change-backing', node: descriptor, backing });
    node.descriptor = { ...descriptor, backingFile: backing?.name, backingFormat: backing?.format };
  }
}

/** Drivers that are what they pass requests on to. */
const PASS_ONLY: ReadonlySet<string> = new Set(['copy-before-write']);

/** Whether an image lies on the same files as before, however they are open. */
function isOnSameFiles({ file, dataFile }: Qcow2Descriptor, links: Links): boolean {
  return (
    (links.file === undefined || identityOf(links.file) === identityOf(file)) &&
    (links.dataFile === undefined || identityOf(links.dataFile) === dataFile?.identity)
  );
}

function identityOf(descriptor: NodeDescriptor): string | undefined {
  return 'identity' in descriptor ? descriptor.identity : undefined;
}

/** The filters of jobs on a node are what it is. */
function followBelow(node: GraphNode): void {
  for (const parent of node.parents) {
    if (parent.job === undefined || parent.children[0]?.node !== node) continue;
    parent.descriptor = node.descriptor;
    followBelow(parent);
  }
}

function filesBelow(node: GraphNode): GraphNode[] {
  return node.children.flatMap(({ role, node: child }) =>
    role === 'file' || role === 'data-file' ? [child, ...filesBelow(child)] : [],
  );
}

/** Nodes and all that lie on them, those that lie on others first. The filters of jobs are what is below them. */
function withAncestors(nodes: readonly GraphNode[]): GraphNode[] {
  const order: GraphNode[] = [];
  const visit = (node: GraphNode): void => {
    if (order.includes(node)) return;
    for (const parent of node.parents) visit(parent);
    if (node.job === undefined) order.push(node);
  };
  for (const node of nodes) visit(node);
  return order;
}
