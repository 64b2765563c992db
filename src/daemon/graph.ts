import { resolve } from 'node:path';
import type { DiskDescriptor } from '../block/disk.js';
import { BlkdebugState } from '../block/filters/blkdebug-state.js';
import { COPY_BUFFER_BYTES, type HeldCounts } from '../block/filters/copy-before-write.js';
import { combineNames, IMAGE_FORMATS, type ImageFormat, imagePath } from '../block/graph.js';
import type { HeaderOptions, Layer, LayerHeader } from '../block/layers.js';
import { leaveNbd } from '../block/nbd/control.js';
import type { LiveDescriptor, NodeDescriptor } from '../block/node.js';
import type { Links } from '../block/relink.js';
import type { DiskHandle } from '../engine/disk.js';
import type { Engine } from '../engine/engine.js';
import type { FrozenDisk } from '../engine/frozen-disk.js';
import type { JobType } from '../engine/job.js';
import { connectErrorText, openErrorText, QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import { blkdebugOptions } from './blkdebug-options.js';
import { Breakpoints } from './breakpoints.js';
import type { DaemonObject, Objects } from './objects.js';
import { checkRemovable, isHeld } from './permissions.js';

/** A node of a daemon's graph. */
export interface GraphNode {
  /** Nodes that nobody gave a name have one that begins with `#`. */
  readonly name: string;
  readonly driver: string;
  options: JsonObject;
  descriptor: NodeDescriptor;
  children: readonly Child[];
  /** Nodes that lie on it. */
  readonly parents: Set<GraphNode>;
  /** It was made by its name, and goes by it; the others go with their parents. */
  readonly owned: boolean;
  /** Name of the device that it is, if any. */
  device: string | undefined;
  /** Of a filter that a job has put there. */
  readonly job?: JobFilter | undefined;
  /** Of a filter that holds an instant: what it has to say of itself in queries. */
  readonly held?: Held | undefined;
  /** Of the filter of a job: what it has been put on, below overlays that came later. */
  readonly origin?: GraphNode | undefined;
  /** Who else relies on it: exports and jobs, with what it is to them. */
  readonly users: Map<User, Use>;
  /** Nodes are listed by it. */
  readonly sequence: number;
  /** Of a `copy-before-write` node: the instant it holds. */
  readonly frozen?: FrozenDisk | undefined;
  group?: DaemonObject | undefined;
  /** Of a `blkdebug` node. */
  readonly breakpoints?: Breakpoints | undefined;
  disk?: Promise<DiskHandle> | undefined;
  /** Somebody else has opened it and will close it. */
  readonly adopted?: true;
}

/** What a node is to somebody else; `chain`: one of those that a job within a backing chain rests on. */
export type Use = 'export' | 'source' | 'target' | 'chain' | 'intermediate';

/** The filter node of a job (QEMU's `copy-before-write` and `mirror_top` nodes of jobs). */
export interface JobFilter {
  readonly type: 'backup' | 'mirror';
  /** It goes by what the node below it has itself, and not by what that shows (a backup with sync mode `top`). */
  readonly isTop?: boolean | undefined;
}

/** What a filter that holds an instant has to tell (QEMU's `copy-before-write`). */
export interface Held {
  /** Bytes of one cluster. */
  readonly granularity: number;
  /** Bytes of the drive in whole clusters. */
  readonly length: number;
  readonly counts: () => HeldCounts;
}

/** An export, or a job of a type. */
export interface User {
  readonly job?: JobType | undefined;
  readonly id?: string | undefined;
  /** It changes the length of its target. */
  readonly resizes?: boolean | undefined;
  /** The image that it commits. */
  readonly top?: GraphNode | undefined;
  /** Exports of this node are above the job. */
  readonly covered?: GraphNode | undefined;
}

export interface Child {
  readonly role: 'file' | 'backing' | 'data-file' | 'image' | 'target';
  readonly node: GraphNode;
}

/** What a node passes on to those that are made for it. */
interface Inherited {
  readonly readOnly: boolean;
  readonly forceShare: boolean;
  readonly discard: unknown;
}

/** Drivers that pass requests on to a node that others use as well, with all that its jobs and bitmaps want to see. */
const PASSING: ReadonlySet<string> = new Set([
  'throttle',
  'compress',
  'preallocate',
  'copy-on-read',
  'copy-before-write',
]);

/** What opening a node gives. */
type Opened = Pick<GraphNode, 'descriptor' | 'frozen' | 'held' | 'group' | 'breakpoints'> &
  Partial<Pick<GraphNode, 'sequence'>>;

/**
 * The name by which people know a node and can open it again: that of the file at its bottom, as it was given; `json:` and
 * options where that alone would open something else.
 */
export function filenameOf(node: GraphNode): string {
  const { filename } = node.options;
  if (typeof filename === 'string') return filename;
  const [child] = node.children;
  if (child === undefined) return node.descriptor.path;
  const plain = filenameOf(child.node);
  if (node.driver === 'copy-before-write' || node.driver === 'mirror_top') return plain;
  return needsOptions(node, plain) ? `json:${spacedJson(optionsToOpen(node))}` : plain;
}

/** @param filename of the node below */
function needsOptions(node: GraphNode, filename: string): boolean {
  if (filename.startsWith('json:')) return true;
  switch (node.driver) {
    case 'raw':
      return node.options['offset'] !== undefined || node.options['size'] !== undefined;
    case 'throttle':
    case 'copy-on-read':
      return true;
    default:
      return hasOtherBacking(node, filename);
  }
}

/** What QEMU calls an overridden backing file. @param filename of the node's own file */
export function hasOtherBacking({ descriptor, children }: GraphNode, filename: string): boolean {
  if (descriptor.driver !== 'qcow2') return false;
  const { backingFile: named } = descriptor;
  const backing = children.find(({ role }) => role === 'backing')?.node;
  if (named === undefined || backing === undefined) return (named === undefined) !== (backing === undefined);
  const name = filenameOf(backing);
  return name !== named && name !== combineNames(filename, named);
}

/** Members in the order in which QEMU has them. */
function optionsToOpen(node: GraphNode): JsonObject {
  const { driver, children, options } = node;
  const [child] = children;
  if (child === undefined) return { driver, filename: options['filename'] ?? node.descriptor.path };
  const file = optionsToOpen(child.node);
  const backing = children.find(({ role }) => role === 'backing')?.node;
  const { offset, size, 'throttle-group': group } = options;
  const all = {
    'throttle-group': driver === 'throttle' ? group : undefined,
    offset: driver === 'raw' ? offset : undefined,
    backing: hasOtherBacking(node, filenameOf(child.node))
      ? backing === undefined
        ? null
        : optionsToOpen(backing)
      : undefined,
    driver,
    size: driver === 'raw' ? size : undefined,
    file,
  };
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));
}

/** As QEMU writes it. */
function spacedJson(value: unknown): string {
  if (!isObject(value)) return JSON.stringify(value);
  const members = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${spacedJson(one)}`);
  return `{${members.join(', ')}}`;
}

/** What a child of each role is to a node's own descriptor. */
const LINKS = { file: 'file', image: 'file', backing: 'backing', 'data-file': 'dataFile' } as const;

const NODE_NAME = /^[A-Za-z][A-Za-z0-9\-._]{0,30}$/;
const SECTOR = 512;

/** The nodes of a daemon by their names. */
export class Graph {
  readonly #engine: Engine;
  readonly #objects: Objects;
  readonly #nodes = new Map<string, GraphNode>();
  readonly #folders: readonly string[] | undefined;
  #nextImplicit = 0;
  #nextSequence = 0;

  /** @param folders from which image headers may open files; default: each image's own */
  constructor(engine: Engine, objects: Objects, folders: readonly string[] | undefined) {
    this.#engine = engine;
    this.#objects = objects;
    this.#folders = folders;
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

  /** A device by one name, or a node by the other. @throws QmpError where there is none */
  findEither(device = '', nodeName = ''): GraphNode {
    const found =
      this.all().find((node) => device !== '' && node.device === device) ?? this.#nodes.get(nodeName);
    if (found !== undefined) return found;
    throw new QmpError(`Cannot find device='${device}' nor node-name='${nodeName}'`);
  }

  /** How requests are carried out on a node. */
  diskOptions(node: GraphNode): Pick<DiskDescriptor, 'discard' | 'detectZeroes'> {
    const { discard = 'ignore', 'detect-zeroes': detect = 'off' } = node.options;
    return {
      discard: discard === 'unmap' ? 'unmap' : 'ignore',
      detectZeroes: detect === 'on' || detect === 'unmap' ? detect : undefined,
    };
  }

  /** The live disk on a node; made when it is first wanted. */
  disk(node: GraphNode): Promise<DiskHandle> {
    node.disk ??= this.#engine.diskOn(node.descriptor, this.diskOptions(node));
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
    const inherited = { readOnly: true, forceShare: false, discard: undefined };
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
      driver: job.type === 'mirror' ? 'mirror_top' : 'copy-before-write',
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
      job,
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

  /** The filter of a job that lies on a node, if any: nobody may write past it. */
  filterOver(node: GraphNode): GraphNode | undefined {
    return [...node.parents].find(({ job }) => job !== undefined);
  }

  /** QMP `blockdev-del` */
  async remove(name: string): Promise<void> {
    const node = this.#nodes.get(name);
    if (node === undefined) throw new QmpError(`Failed to find node with node-name='${name}'`);
    const uses = [...node.users.values()];
    const isCovered = [...node.users.keys()].some(({ covered }) => covered === node);
    if (uses.includes('export') && !isCovered) throw new QmpError(`Node ${name} is in use`);
    if (isHeld(node)) throw new QmpError(`Node ${name} is in use`);
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
    made: Child[],
  ): Promise<GraphNode> {
    let node: GraphNode;
    if (typeof wanted === 'string') {
      node = this.lookUp(wanted);
    } else {
      if (!isObject(wanted)) throw new TypeError('the schema was not looked at');
      node = await this.#make(wanted, inherited);
    }
    made.push({ role, node });
    return node;
  }

  async #make(options: JsonObject, inherited: Inherited | undefined): Promise<GraphNode> {
    const name = this.#nameOf(options);
    const device = options['x-device'];
    if (typeof device === 'string' && this.find(device) !== undefined) {
      throw new QmpError(`Device with id '${device}' already exists`);
    }
    const children: Child[] = [];
    try {
      const opened = await this.#open(options, inherited, children);
      const node: GraphNode = {
        name,
        driver: String(options['driver']),
        options: { discard: inherited?.discard, ...options },
        children,
        parents: new Set(),
        owned: options['node-name'] !== undefined && inherited === undefined,
        device: typeof device === 'string' ? device : undefined,
        users: new Map(),
        sequence: this.#nextSequence++,
        ...opened,
      };
      for (const child of children) child.node.parents.add(node);
      this.#nodes.set(name, node);
      return node;
    } catch (error) {
      await this.#release(undefined, children);
      throw error;
    }
  }

  async #layer(layer: Layer): Promise<Pick<GraphNode, 'descriptor'>> {
    return { descriptor: await this.#engine.run<NodeDescriptor>({ kind: 'open-layer', layer }) };
  }

  /** Opens what the options say on nodes that it makes or finds. @param made takes these */
  async #open(options: JsonObject, inherited: Inherited | undefined, made: Child[]): Promise<Opened> {
    const driver = String(options['driver']);
    const readOnly = (options['read-only'] ?? inherited?.readOnly ?? false) === true;
    const forceShare = (options['force-share'] ?? inherited?.forceShare ?? false) === true;
    const pass: Inherited = { readOnly, forceShare, discard: options['discard'] ?? inherited?.discard };
    if (forceShare && !readOnly) {
      throw new QmpError('force-share=on can only be used with read-only images');
    }
    const child = (role: Child['role'], key: string = role): Promise<GraphNode> =>
      this.#child(role, options[key], pass, made);
    switch (driver) {
      case 'file':
      case 'host_device':
        return await this.#openFile(options, readOnly, forceShare);
      case 'nbd':
        return await this.#openNbd(options, readOnly);
      case 'null-co':
      case 'null-aio':
        return await this.#layer({
          driver: 'null-co',
          readOnly,
          length: Math.ceil(Number(options['size'] ?? 2 ** 30) / SECTOR) * SECTOR,
          readsZero: options['read-zeroes'] === true,
          latencyMs: Number(options['latency-ns'] ?? 0) / 1e6,
        });
      case 'raw': {
        const { descriptor: file } = await child('file');
        const { offset, size } = options;
        return await this.#layer({
          driver,
          file,
          readOnly,
          offset: offset === undefined ? undefined : Number(offset),
          size: size === undefined ? undefined : Number(size),
        });
      }
      case 'qcow2':
        return await this.#openQcow2(options, pass, made);
      case 'throttle': {
        const { object, ...membership } = this.#objects.takeGroup(String(options['throttle-group']));
        try {
          const below = await this.#live(await child('file'));
          return { ...(await this.#layer({ driver, child: below, ...membership })), group: object };
        } catch (error) {
          object.users--;
          throw error;
        }
      }
      case 'compress':
        return await this.#layer({ driver, child: await this.#live(await child('file')) });
      case 'preallocate':
        return { descriptor: await this.#live(await child('file')) };
      case 'copy-on-read': {
        const below = await child('file');
        const depth = this.#depthOf(below, options['bottom']);
        return await this.#layer({ driver, child: await this.#live(below), depth });
      }
      case 'blkdebug': {
        const rules = blkdebugOptions(options);
        const { descriptor: below } = await child('image');
        const opened = await this.#layer({ driver, child: below, ...rules });
        return { ...opened, breakpoints: this.#breakpoints(opened.descriptor) };
      }
      case 'copy-before-write':
        return await this.#openCopyBeforeWrite(options, await child('file'), await child('target'));
      case 'snapshot-access': {
        const below = await child('file');
        if (below.frozen === undefined) {
          throw new QmpError(`Node '${below.name}' holds no instant: it is no copy-before-write node`);
        }
        const { disk, descriptor } = below.frozen;
        return await this.#layer({ driver, disk: disk.descriptor, frame: descriptor.frame });
      }
      case 'vmdk':
      case 'vhdx':
      case 'vpc':
      case 'vdi': {
        if (!readOnly) throw new QmpError(`Block format '${driver}' is only read: set read-only=on`);
        return await this.#layer({ driver, file: (await child('file')).descriptor });
      }
      default:
        throw new QmpError(`Unknown driver '${driver}'`);
    }
  }

  /** How many layers below an image there are down to the one of that name. */
  #depthOf(top: GraphNode, bottom: unknown): number | undefined {
    if (typeof bottom !== 'string') return undefined;
    const wanted = this.#nodes.get(bottom);
    if (wanted === undefined) throw new QmpError(`Bottom node '${bottom}' not found`);
    let depth = 0;
    for (let node: GraphNode | undefined = top; node !== undefined; ) {
      if (node === wanted) return depth;
      const backing: Child | undefined = node.children.find(({ role }) => role === 'backing');
      const below: Child | undefined = PASSING.has(node.driver) ? node.children[0] : backing;
      if (below === backing) depth++;
      node = below?.node;
    }
    throw new QmpError(`Bottom node '${bottom}' is not in the backing chain of '${top.name}'`);
  }

  #breakpoints(descriptor: NodeDescriptor): Breakpoints | undefined {
    if (descriptor.driver !== 'blkdebug') return undefined;
    return new Breakpoints(new BlkdebugState(this.#engine.arena, descriptor.state, descriptor.rules));
  }

  async #openFile(
    options: JsonObject,
    readOnly: boolean,
    forceShare: boolean,
  ): Promise<Pick<GraphNode, 'descriptor'>> {
    const filename = String(options['filename']);
    const noLock = forceShare || options['locking'] === 'off';
    const open = (asReadOnly: boolean): Promise<Pick<GraphNode, 'descriptor'>> =>
      this.#layer({
        driver: 'file',
        path: filename.replace(/^file:/, ''),
        readOnly: asReadOnly,
        lock: noLock ? 'none' : asReadOnly ? 'read' : 'write',
      });
    try {
      return await open(readOnly);
    } catch (error) {
      const mayFall = !readOnly && options['auto-read-only'] === true && isReadOnlyError(error);
      if (mayFall) return await open(true);
      throw new QmpError(openErrorText(error, filename));
    }
  }

  async #openNbd(options: JsonObject, readOnly: boolean): Promise<Pick<GraphNode, 'descriptor'>> {
    const name = nbdName(options, this.#objects);
    const { server } = options;
    try {
      return await this.#layer({ driver: 'nbd', name, readOnly });
    } catch (error) {
      if (!isObject(server)) throw error;
      const place = server['path'] ?? `${String(server['host'])}:${String(server['port'])}`;
      throw new QmpError(connectErrorText(error, String(place)));
    }
  }

  async #openQcow2(options: JsonObject, pass: Inherited, made: Child[]): Promise<Opened> {
    const file = await this.#child('file', options['file'], pass, made);
    // Before its backing files, as QEMU lists them.
    const sequence = this.#nextSequence++;
    const { backing: wanted, 'data-file': wantedData } = options;
    const header = await this.header(file, 'qcow2', {
      backing: wanted === undefined,
      dataFile: wantedData === undefined,
    });
    const data = wantedData ?? (header.dataFile && { driver: 'file', filename: header.dataFile });
    const dataFile = data === undefined ? undefined : await this.#child('data-file', data, pass, made);
    const below = { ...pass, readOnly: true };
    let backing: GraphNode | undefined;
    if (wanted === undefined) {
      const named = header.backing;
      if (named !== undefined) {
        const name = combineNames(filenameOf(file), named.name);
        backing = await this.#make(await this.#imageOptions(named.path, name, named.format), below);
        made.push({ role: 'backing', node: backing });
      }
    } else if (wanted !== null) backing = await this.#child('backing', wanted, below, made);
    const opened = await this.#layer({
      driver: 'qcow2',
      file: file.descriptor,
      readOnly: pass.readOnly,
      backing: backing && (backing.descriptor.readOnly ? backing.descriptor : await this.#live(backing)),
      dataFile: dataFile?.descriptor,
    });
    return { ...opened, sequence };
  }

  async #openCopyBeforeWrite(
    options: JsonObject,
    file: GraphNode,
    target: GraphNode,
  ): Promise<Pick<GraphNode, 'descriptor' | 'frozen' | 'held'>> {
    const { bitmap, 'min-cluster-size': cluster } = options;
    checkMinClusterSize(cluster === undefined ? undefined : Number(cluster));
    let name: string | undefined;
    if (isObject(bitmap)) {
      if (this.lookUp(String(bitmap['node'])) !== file) {
        throw new QmpError(`the bitmap must be one of the node '${file.name}'`);
      }
      name = String(bitmap['name']);
    }
    const disk = await this.disk(file);
    const frozen = await disk.hold({
      targetNode: target.descriptor,
      bitmap: name,
      onCbwError: options['on-cbw-error'] === 'break-snapshot' ? 'break-snapshot' : 'break-guest-write',
      cbwTimeoutMs: Number(options['cbw-timeout'] ?? 0) * 1000,
      minClusterSize: cluster === undefined ? undefined : Number(cluster),
    });
    const held = { ...frozen.held, counts: () => frozen.heldCounts() };
    return { descriptor: await this.#live(file), frozen, held };
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

/** @param bytes as commands have it, for copying at least so much at once @throws QmpError where it cannot be that */
export function checkMinClusterSize(bytes: number | undefined): void {
  if (bytes === undefined) return;
  if (bytes === 0 || !Number.isInteger(Math.log2(bytes))) {
    throw new QmpError('Cannot create block-copy-state: min-cluster-size needs to be a power of 2');
  }
  if (bytes <= COPY_BUFFER_BYTES) return;
  throw new QmpError(
    `Cannot create block-copy-state: min-cluster-size too large: ${bytes} > ${COPY_BUFFER_BYTES}`,
  );
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

function isReadOnlyError(error: unknown): boolean {
  if (!(error instanceof Error) || !('code' in error)) return false;
  return error.code === 'ERR_STILLFRAME_PERMISSION' || error.code === 'ERR_STILLFRAME_READ_ONLY';
}

/** The URI of an export, from the options of its node. */
function nbdName(options: JsonObject, objects: Objects): string {
  const uri = options['x-uri'];
  if (typeof uri === 'string') return uri;
  const { server, export: name = '', 'tls-creds': creds } = options;
  if (!isObject(server)) throw new TypeError('the schema was not looked at');
  const parameters = typeof creds === 'string' ? objects.clientTlsOf(creds) : new URLSearchParams();
  const set = (key: string, value: unknown): void => {
    if (value !== undefined) parameters.set(key, String(value));
  };
  set('x-reconnect-delay', options['reconnect-delay']);
  // Who waits for a server to come back takes it as it comes.
  if (Number(options['reconnect-delay'] ?? 0) > 0) set('x-trusted', 1);
  set('x-open-timeout', options['open-timeout']);
  set('x-dirty-bitmap', options['x-dirty-bitmap']);
  set('tls-hostname', options['tls-hostname']);
  const scheme = typeof creds === 'string' ? 'nbds' : 'nbd';
  const path = encodeURIComponent(String(name));
  if (server['type'] === 'unix') {
    set('socket', server['path']);
    return `${scheme}+unix:///${path}?${parameters}`;
  }
  if (server['type'] !== 'inet') {
    throw new QmpError(
      `an NBD server of type '${String(server['type'])}' is not supported; use inet or unix`,
    );
  }
  const host = String(server['host']);
  const place = host.includes(':') ? `[${host}]` : host;
  const query = parameters.size === 0 ? '' : `?${parameters}`;
  return `${scheme}://${place}:${String(server['port'])}/${path}${query}`;
}
