import { resolve } from 'node:path';
import { combineNames, fileIdentity, IMAGE_FORMATS, type ImageFormat, imagePath } from '../block/graph.js';
import type { HeaderOptions, LayerHeader } from '../block/layers.js';
import { leaveNbd } from '../block/nbd/control.js';
import type { LiveDescriptor } from '../block/node.js';
import type { Links } from '../block/relink.js';
import { WRITE_MARKS_BYTES, WriteMarks } from '../block/write-marks.js';
import type { DiskHandle } from '../engine/disk.js';
import type { Engine } from '../engine/engine.js';
import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import type { GraphUser } from './block-graph.js';
import { type Attach, Drivers, type Inherited } from './drivers.js';
import { FileLocks, type Release } from './file-locks.js';
import { filenameOf } from './filenames.js';
import { type Child, type GraphNode, type Held, type JobFilter, PASSING, type User } from './graph-node.js';
import type { Objects } from './objects.js';
import { checkRemovable, isHeld } from './permissions.js';
import { inheritedCache, traitsOf } from './traits.js';

/** What a child of each role is to a node's own descriptor. */
const LINKS = { file: 'file', image: 'file', backing: 'backing', 'data-file': 'dataFile' } as const;

const NODE_NAME = /^[A-Za-z][A-Za-z0-9\-._]{0,30}$/;

/** The nodes of a daemon by their names. */
export class Graph {
  /** Of the files of its nodes. */
  readonly locks: FileLocks;
  readonly #engine: Engine;
  readonly #objects: Objects;
  readonly #nodes = new Map<string, GraphNode>();
  readonly #drivers: Drivers;
  readonly #folders: readonly string[] | undefined;
  #nextImplicit = 0;
  #nextSequence = 0;

  /**
   * @param folders from which image headers may open files; default: each image's own
   * @param users of nodes, beside other nodes
   */
  constructor(
    engine: Engine,
    objects: Objects,
    folders: readonly string[] | undefined,
    users: () => readonly GraphUser[],
  ) {
    this.locks = new FileLocks(engine.arena, () => [...this.#nodes.values()], users);
    this.#engine = engine;
    this.#objects = objects;
    this.#folders = folders;
    this.#drivers = new Drivers(engine, objects, {
      get: (name) => this.get(name),
      lookUp: (name) => this.lookUp(name),
      disk: (node) => this.disk(node),
      live: (node) => this.#live(node),
      header: (node, format, follow) => this.header(node, format, follow),
      child: (role, wanted, inherited, attach) => this.#child(role, wanted, inherited, attach),
      image: async (path, name, format, inherited) =>
        this.#make(await this.#imageOptions(path, name, format), inherited),
      nextSequence: () => this.#nextSequence++,
    });
  }

  /** All nodes, those that were made last first. */
  all(): GraphNode[] {
    return [...this.#nodes.values()].sort((one, other) => other.sequence - one.sequence);
  }

  get(name: string): GraphNode | undefined {
    return this.#nodes.get(name);
  }

  /** A node by its own name or that of its device. */
  find(name: string): GraphNode | undefined {
    const device = name === '' ? undefined : this.all().find((node) => node.device === name);
    return device ?? this.#nodes.get(name);
  }

  /** @throws QmpError where there is none */
  lookUp(name: string): GraphNode {
    const node = this.find(name);
    if (node !== undefined) return node;
    throw new QmpError(`Cannot find device='${name}' nor node-name='${name}'`);
  }

  /**
   * Files that are not locked may be parts of nodes all the same.
   *
   * @throws QmpError where a file that is about to be made anew is a node's that somebody has something on
   */
  checkUnused(filename: string): void {
    const identity = fileIdentity(imagePath(filename));
    const isUsed = [...this.#nodes.values()].some(
      ({ descriptor, parents, users }) =>
        descriptor.driver === 'file' &&
        descriptor.identity === identity &&
        (parents.size > 0 || users.size > 0),
    );
    if (isUsed) throw new QmpError('Failed to get "write" lock');
  }

  /** A device by one name, or a node by the other. @throws QmpError where there is none */
  findEither(device = '', nodeName = ''): GraphNode {
    const found =
      this.all().find((node) => device !== '' && node.device === device) ?? this.#nodes.get(nodeName);
    if (found !== undefined) return found;
    throw new QmpError(`Cannot find device='${device}' nor node-name='${nodeName}'`);
  }

  /** The live disk on a node; made when it is first wanted. */
  disk(node: GraphNode): Promise<DiskHandle> {
    node.disk ??= this.#engine.diskOn(node.descriptor, { discard: traitsOf(node.options).discard });
    return node.disk;
  }

  /** Takes a disk that somebody else has opened, and will close, as a node. */
  adopt(disk: DiskHandle, name: string, device: string): GraphNode {
    const { node } = disk.descriptor;
    const adopted: GraphNode = {
      name,
      driver: node.driver,
      options: { driver: node.driver, 'node-name': name },
      descriptor: node,
      children: [],
      parents: new Set(),
      owned: false,
      device,
      users: new Map(),
      disk: Promise.resolve(disk),
      sequence: this.#nextSequence++,
      adopted: true,
    };
    this.#nodes.set(name, adopted);
    return adopted;
  }

  /**
   * QMP `blockdev-add`.
   *
   * @param options as the schema has them
   */
  async add(options: JsonObject): Promise<GraphNode> {
    if (options['node-name'] === undefined) {
      throw new QmpError("'node-name' must be specified for the root node");
    }
    return await this.#make(options, undefined);
  }

  /**
   * A drive as QEMU's `-drive` has it: a device on an image.
   *
   * @param options of the node but for its driver, which is looked for in the first bytes where it is missing
   */
  async addDrive(options: JsonObject): Promise<GraphNode> {
    const { driver, file } = options;
    if (driver !== undefined || !isObject(file)) return await this.make(options);
    const probed = await this.#make(file, { readOnly: true, forceShare: true, discard: undefined });
    let format: ImageFormat;
    try {
      ({ format } = await this.header(probed, undefined, { backing: false, dataFile: false }));
    } finally {
      await this.#close(probed);
    }
    return await this.make({ ...options, driver: format });
  }

  /** The nodes below one, as its descriptor has them. */
  async linksOf(node: GraphNode): Promise<Links> {
    const links: { -readonly [Name in keyof Links]: Links[Name] } = {};
    for (const { role, node: child } of node.children) {
      if (role === 'target') continue;
      const live = role === 'backing' ? !child.descriptor.readOnly : PASSING.has(node.driver);
      links[LINKS[role]] = live ? await this.#live(child) : child.descriptor;
    }
    return links;
  }

  /** Puts a throttle node into the group that its options name. */
  takeGroup(node: GraphNode): { readonly group: number; readonly member: number } {
    const { object, ...membership } = this.#objects.takeGroup(String(node.options['throttle-group']));
    if (node.group !== undefined) node.group.users--;
    node.group = object;
    return membership;
  }

  /** An image by its file name, and not what it lies on. @param format looked for in the first bytes where it is missing */
  async makeImage(
    filename: string,
    format: ImageFormat | undefined,
    options: JsonObject,
  ): Promise<GraphNode> {
    const image = await this.#imageOptions(imagePath(filename), filename, format);
    const backing = image['driver'] === 'qcow2' ? { backing: null } : {};
    const inherited = { readOnly: false, forceShare: false, discard: undefined };
    return await this.#make({ ...image, ...backing, ...options }, inherited);
  }

  /**
   * Opens the backing file that the header of an image names, for an image that was opened without it.
   *
   * @returns undefined where there is none, or the format has none
   */
  async openNamedBacking(image: GraphNode): Promise<{ readonly node: GraphNode } | undefined> {
    const [file] = image.children;
    if (image.driver !== 'qcow2' || file === undefined) return undefined;
    const { backing } = await this.header(file.node, 'qcow2', { backing: true, dataFile: false });
    if (backing === undefined) return undefined;
    const name = combineNames(filenameOf(file.node), backing.name);
    const options = await this.#imageOptions(backing.path, name, backing.format);
    const inherited = { readOnly: true, forceShare: false, discard: 'unmap' } as const;
    return { node: await this.#make(options, inherited) };
  }

  /** Closes a node that nobody wants any more, and what was made for it. */
  async closeUnused(node: GraphNode): Promise<void> {
    await this.#release(undefined, [{ role: 'file', node }]);
  }

  /** A node that is made for a command and that nobody has given a name. */
  async make(options: JsonObject): Promise<GraphNode> {
    return await this.#make(options, { readOnly: false, forceShare: false, discard: undefined });
  }

  /**
   * Puts the filter of a job over a node. What has used the node so far uses the filter: exports and the device are its
   * from now on.
   *
   * @param name default: one that nobody chose
   * @param key stands for the job among the users of nodes
   */
  insertFilter(
    node: GraphNode,
    target: GraphNode | undefined,
    {
      name,
      key,
      job,
      held,
    }: {
      readonly name: string | undefined;
      readonly key: User;
      readonly job: JobFilter;
      readonly held?: Held | undefined;
    },
  ): GraphNode {
    const filter: GraphNode = {
      name: this.#nameOf(name === undefined ? {} : { 'node-name': name }),
      driver: job.driver,
      options: {},
      descriptor: node.descriptor,
      children: [
        { role: 'file', node },
        ...(target === undefined ? [] : [{ role: 'target', node: target } as const]),
      ],
      parents: new Set(),
      owned: false,
      device: node.device,
      users: new Map([[key, 'source'] as const]),
      disk: this.disk(node),
      sequence: this.#nextSequence++,
      adopted: true,
      job: { ...job, isUnnamed: name === undefined },
      held,
      origin: node,
    };
    node.device = undefined;
    moveExports(node, filter);
    // One that is there already lies above this one.
    for (const parent of node.parents) {
      if (parent.job !== undefined) replaceChild(parent, node, filter);
    }
    node.parents.add(filter);
    this.#nodes.set(filter.name, filter);
    return filter;
  }

  /** Takes the filter of a job away again. @returns the node below it */
  removeFilter(filter: GraphNode): GraphNode {
    const below = filter.children[0]?.node;
    if (below === undefined) throw new Error('invariant: a filter lies on a node');
    this.#nodes.delete(filter.name);
    below.parents.delete(filter);
    below.device ??= filter.device;
    moveExports(filter, below);
    for (const parent of filter.parents) replaceChild(parent, filter, below);
    return below;
  }

  /** QMP `blockdev-del` */
  async remove(name: string): Promise<void> {
    const node = this.#nodes.get(name);
    if (node === undefined) throw new QmpError(`Failed to find node with node-name='${name}'`);
    const uses = [...node.users.values()];
    if (uses.includes('export')) throw new QmpError(`Node ${name} is in use`);
    if (isHeld(node) || node.job?.type === 'stream') throw new QmpError(`Node ${name} is in use`);
    checkRemovable(node);
    if (!node.owned) throw new QmpError(`Node ${name} is not owned by the monitor`);
    if (node.parents.size > 0) throw new QmpError(`Block device ${name} is in use`);
    await this.#close(node);
  }

  /** Closes every node that nobody else uses, those on top first. */
  async close(): Promise<void> {
    this.resumeAll();
    let failure: unknown;
    for (;;) {
      const node = this.all().find(({ parents, users }) => parents.size === 0 && users.size === 0);
      if (node === undefined) break;
      try {
        await this.#close(node);
      } catch (error) {
        failure ??= error;
      }
    }
    if (failure !== undefined) throw failure;
  }

  /** Lets everybody go on whom breakpoints have suspended, and suspends nobody any more. */
  resumeAll(): void {
    for (const { breakpoints } of this.all()) breakpoints?.close();
  }

  async #close(node: GraphNode): Promise<void> {
    this.#nodes.delete(node.name);
    resumeBelow(node);
    if (node.adopted === true) return;
    if (node.descriptor.driver === 'nbd') leaveNbd(this.#engine.arena, node.descriptor);
    try {
      await node.frozen?.close();
      const disk = await node.disk;
      await disk?.close();
      await this.#engine.run<void>({ kind: 'close-layer', node: node.descriptor });
    } catch (error) {
      // A server that is gone does not keep its node: whoever wrote there was told.
      if (node.driver !== 'nbd') throw error;
    } finally {
      node.marks?.close();
      if (node.group !== undefined) node.group.users--;
      await this.#release(node, node.children);
    }
  }

  /** The children of a node that is gone; those that were made for it go as well. */
  async #release(parent: GraphNode | undefined, children: readonly Child[]): Promise<void> {
    for (const { node } of children) {
      if (parent !== undefined) node.parents.delete(parent);
      const wanted = node.owned || node.device !== undefined || node.parents.size > 0 || node.users.size > 0;
      if (!wanted && this.#nodes.has(node.name)) await this.#close(node);
    }
  }

  #nameOf(options: JsonObject): string {
    const name = options['node-name'];
    if (typeof name !== 'string') {
      const implicit = this.nextImplicitName;
      this.#nextImplicit++;
      return implicit;
    }
    this.checkName(name);
    return name;
  }

  /** The name of the next node that nobody gives one. */
  get nextImplicitName(): string {
    return `#block${String(this.#nextImplicit + 1).padStart(3, '0')}`;
  }

  /** @throws QmpError where a new node cannot have that name */
  checkName(name: string): void {
    if (name.length > 31) throw new QmpError('Node name too long');
    if (!NODE_NAME.test(name)) throw new QmpError(`Invalid node-name: '${name}'`);
    if (this.#nodes.has(name)) throw new QmpError(`Duplicate nodes with node-name='${name}'`);
    if (this.all().some(({ device }) => device === name)) {
      throw new QmpError(`node-name=${name} is conflicting with a device id`);
    }
  }

  /** A child by its name, or made for its parent. */
  async #child(
    role: Child['role'],
    wanted: unknown,
    inherited: Inherited,
    attach: Attach,
  ): Promise<GraphNode> {
    let node: GraphNode;
    if (typeof wanted === 'string') {
      node = this.lookUp(wanted);
    } else {
      if (!isObject(wanted)) throw new TypeError('the schema was not looked at');
      node = await this.#make(wanted, inherited);
    }
    attach({ role, node });
    return node;
  }

  async #make(options: JsonObject, inherited: Inherited | undefined): Promise<GraphNode> {
    const name = this.#nameOf(options);
    const device = options['x-device'];
    if (typeof device === 'string' && this.find(device) !== undefined) {
      throw new QmpError(`Device with id '${device}' already exists`);
    }
    const children: Child[] = [];
    const cache = inheritedCache({ cache: inherited?.cache }, options);
    const all = { discard: inherited?.discard, ...options, ...(cache === undefined ? {} : { cache }) };
    const driver = String(options['driver']);
    const claims: Release[] = [];
    const isReadOnly = (options['read-only'] ?? inherited?.readOnly ?? false) === true;
    const nobody = { size: 0 };
    const draft = {
      ...{ driver, options: all, children, parents: nobody, users: nobody },
      descriptor: { readOnly: isReadOnly },
    };
    const attach: Attach = (child) => {
      children.push(child);
      claims.push(this.locks.claimChild(draft, child));
    };
    let node: GraphNode;
    try {
      const opened = await this.#drivers.open(name, all, inherited, attach);
      const { arena } = this.#engine;
      const marks = arena.alloc(WRITE_MARKS_BYTES, `marks of node '${name}'`);
      let { descriptor } = opened;
      node = {
        name,
        driver,
        options: all,
        children,
        parents: new Set(),
        owned: options['node-name'] !== undefined && inherited === undefined,
        device: typeof device === 'string' ? device : undefined,
        users: new Map(),
        sequence: this.#nextSequence++,
        ...opened,
        marks: new WriteMarks(arena, marks),
        get descriptor() {
          return { ...descriptor, traits: { marks, ...traitsOf(node.options) } };
        },
        set descriptor(changed) {
          descriptor = changed;
        },
      };
      for (const child of children) child.node.parents.add(node);
      this.#nodes.set(name, node);
    } catch (error) {
      for (const release of claims) release();
      await this.#release(undefined, children);
      throw error;
    }
    for (const release of claims) release();
    try {
      this.locks.settle();
    } catch (error) {
      await this.#close(node);
      throw error;
    }
    return node;
  }

  /** A node as another one's child that passes requests on: they go through what its jobs and bitmaps want to see. */
  async #live(node: GraphNode): Promise<LiveDescriptor> {
    const { descriptor } = await this.disk(node);
    const { path, readOnly } = node.descriptor;
    return { driver: 'live', path, readOnly, length: descriptor.length, disk: descriptor };
  }

  /** What the header of an image says. @param format looked for in the first bytes where it is missing */
  header(
    node: GraphNode,
    format: ImageFormat | undefined,
    follow: HeaderOptions['follow'],
  ): Promise<LayerHeader> {
    return this.#engine.run<LayerHeader>({
      kind: 'header',
      node: node.descriptor,
      options: { format, folders: this.#folders, follow },
    });
  }

  /** Options of an image by its file name, as headers and commands from before nodes had names have it. */
  async #imageOptions(path: string, name: string, format: ImageFormat | undefined): Promise<JsonObject> {
    const filename = resolve(name) === path ? name : path;
    const file = isNbd(path) ? { driver: 'nbd', 'x-uri': path } : { driver: 'file', filename };
    if (format !== undefined) return { driver: format, file };
    const probed = await this.#make(file, { readOnly: true, forceShare: true, discard: undefined });
    try {
      const header = await this.header(probed, undefined, { backing: false, dataFile: false });
      return { driver: header.format, file };
    } finally {
      await this.#close(probed);
    }
  }
}

function moveExports(from: GraphNode, to: GraphNode): void {
  for (const [key, use] of from.users) {
    if (use !== 'export') continue;
    from.users.delete(key);
    to.users.set(key, use);
  }
}

/** @param parent the filter of a job */
function replaceChild(parent: GraphNode, from: GraphNode, to: GraphNode): void {
  parent.children = parent.children.map((child) => (child.node === from ? { ...child, node: to } : child));
  from.parents.delete(parent);
  to.parents.add(parent);
}

/** Lets requests go on that breakpoints have suspended: a node above them is to be closed, and waits for their end. */
function resumeBelow({ breakpoints, children }: GraphNode): void {
  breakpoints?.release();
  for (const { node } of children) resumeBelow(node);
}

export function isFormat(name: string): name is ImageFormat {
  return IMAGE_FORMATS.some((format) => format === name);
}

function isNbd(path: string): boolean {
  return /^nbds?(\+[a-z]+)?:/i.test(path);
}
