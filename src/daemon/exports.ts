import { setTimeout } from 'node:timers/promises';
import type { DiskDescriptor } from '../block/disk.js';
import { toStillframeError } from '../errors.js';
import type { Engine, NbdServer } from '../index.js';
import { MAX_STRING_BYTES } from '../nbd/protocol/numbers.js';
import type { ListenAddress } from '../nbd/server/address.js';
import { ALL_PERMISSIONS, CONSISTENT_READ, WRITE } from '../os/image-lock.js';
import { QmpError, strerror, unresolvedText } from '../qmp/errors.js';
import type { QmpEvent } from '../qmp/monitor.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import { checkUnshared, exportUser } from './block-graph.js';
import { type Release, whileClaimed } from './file-locks.js';
import type { Graph } from './graph.js';
import type { GraphNode, User } from './graph-node.js';
import { checkSameLength, checkUsableBelow, lengthenerOf } from './image-files.js';
import { unixName } from './nbd-names.js';
import type { Objects } from './objects.js';
import { asChild, asRoot, checkExportable, conflict, FORMATS, filterOver, roleOf } from './permissions.js';

interface Export {
  readonly id: string;
  readonly name: string;
  node: GraphNode;
  readonly writable: boolean;
}

/** Drivers that pass requests on to what they lie on. */
const FILTERS = new Set([
  'blkdebug',
  'compress',
  'copy-before-write',
  'copy-on-read',
  'preallocate',
  'throttle',
]);
/** How long clients may take to be gone, and how often it is looked at, in milliseconds. */
const LEAVING_MS = 200;
const LEAVING_STEP_MS = 5;
const DEFAULT_CONNECTIONS = 100;
const MAX_CONNECTIONS = 10_000;

/** The NBD server of a daemon and what it exports (QMP `nbd-server-*`, `block-export-*`). */
export class Exports {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #objects: Objects;
  readonly #tell: (event: QmpEvent) => void;
  readonly #exports = new Map<string, Export>();
  #server: NbdServer | undefined;

  constructor(engine: Engine, graph: Graph, objects: Objects, tell: (event: QmpEvent) => void) {
    this.#engine = engine;
    this.#graph = graph;
    this.#objects = objects;
    this.#tell = tell;
  }

  /** Takes a server that somebody else has started, and what it exports, as the daemon's. */
  adopt(server: NbdServer, exported: readonly { readonly name: string; readonly node: GraphNode }[]): void {
    this.#server = server;
    for (const { name, node } of exported) {
      this.#exports.set(name, { id: name, name, node, writable: false });
      node.users.set(this.#key(name), 'export');
    }
  }

  get server(): NbdServer | undefined {
    return this.#server;
  }

  /** @param options address, with its members beside its type, and what the server is to be like */
  async start(address: JsonObject, options: JsonObject): Promise<void> {
    if (this.#server !== undefined) throw new QmpError('NBD server already running');
    const creds = options['tls-creds'];
    const tls = typeof creds === 'string' ? this.#objects.tlsOf(creds) : undefined;
    if (tls !== undefined && options['tls-authz'] !== undefined) {
      // Whoever asks for it counts on others being kept out.
      throw new QmpError("'tls-authz' is not supported: whoever the credentials let in is served");
    }
    const wanted = Number(options['max-connections'] ?? DEFAULT_CONNECTIONS);
    const listen = listenAddress(address);
    try {
      this.#server = await this.#engine.serveNbd({
        listen: [listen],
        exports: [],
        tls,
        maxConnections: wanted === 0 ? MAX_CONNECTIONS : Math.min(wanted, MAX_CONNECTIONS),
      });
    } catch (error) {
      throw new QmpError(listenErrorText(error, address));
    }
  }

  async stop(): Promise<void> {
    if (this.#server === undefined) throw new QmpError('NBD server not running');
    for (const id of [...this.#exports.keys()].reverse()) await this.remove(id);
    await this.#close();
  }

  async #close(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    await server?.close();
  }

  /** QMP `block-export-add` */
  async add(options: JsonObject): Promise<void> {
    const id = String(options['id']);
    checkId(id);
    if (this.#exports.has(id)) throw new QmpError(`Block export id '${id}' is already in use`);
    const nodeName = String(options['node-name']);
    const node = this.#graph.get(nodeName);
    if (node === undefined) throw new QmpError(`Cannot find device='' nor node-name='${nodeName}'`);
    if (options['writable'] === true && node.descriptor.readOnly) {
      throw new QmpError('Cannot export read-only node as writable');
    }
    const thread = options['iothread'];
    if (typeof thread === 'string' && this.#objects.get(thread)?.type !== 'iothread') {
      throw new QmpError(`iothread "${thread}" not found`);
    }
    await this.#add(id, node, options);
  }

  /** QMP `nbd-server-add` */
  async addDevice(options: JsonObject): Promise<void> {
    const device = String(options['device']);
    const name = String(options['name'] ?? device);
    const node = this.#graph.lookUp(device);
    const { bitmap, writable = false, description } = options;
    checkId(name);
    if (this.#exports.has(name)) throw new QmpError(`Block export id '${name}' is already in use`);
    await this.#add(name, node, {
      name,
      description,
      // As QEMU has it: of what is read-only the export is as well.
      writable: writable === true && !node.descriptor.readOnly,
      bitmaps: bitmap === undefined ? undefined : [bitmap],
    });
  }

  async #add(id: string, node: GraphNode, options: JsonObject): Promise<void> {
    const writable = options['writable'] === true;
    checkExportable(node, writable);
    checkUnshared(node, ['consistent-read', ...(writable ? (['write'] as const) : [])]);
    const server = this.#server;
    if (server === undefined) throw new QmpError('NBD server not running');
    const { description } = options;
    const name = String(options['name'] ?? node.name);
    for (const [what, text] of [
      ['export name', name],
      ['description', description],
    ]) {
      if (typeof text === 'string' && Buffer.byteLength(text) > MAX_STRING_BYTES) {
        throw new QmpError(`${what} '${text}' too long`);
      }
    }
    if (server.exportNames.includes(name)) {
      throw new QmpError(`NBD server already has export named '${name}'`);
    }
    this.checkWritable(node, writable);
    if (!writable) checkSameLength(node, asRoot(node));
    checkUsableBelow(node, writable);
    await whileClaimed(this.#claim(node, writable), () => this.#serve(server, id, node, name, options));
  }

  /** As QEMU does, first for what it needs, and then for what it keeps others from. @throws QmpError */
  #claim(node: GraphNode, writable: boolean): Release {
    const needed = CONSISTENT_READ | (writable ? WRITE : 0);
    return this.#graph.locks.claimInTurn(
      [{ node, role: 'root', needed, shared: ALL_PERMISSIONS }],
      exportUser(node, writable).uses,
    );
  }

  async #serve(
    server: NbdServer,
    id: string,
    node: GraphNode,
    name: string,
    { description, 'allocation-depth': depth, writethrough, ...options }: JsonObject,
  ): Promise<void> {
    const writable = options['writable'] === true;
    const bitmaps = Array.isArray(options['bitmaps']) ? options['bitmaps'] : [];
    const found = await Promise.all(bitmaps.map((wanted) => this.#bitmap(node, wanted, writable)));
    const disk = await this.#graph.disk(node);
    await server.addExport({
      disk,
      name,
      readOnly: !writable,
      description: typeof description === 'string' ? description : undefined,
      bitmaps: found,
      holdBitmaps: true,
      allocationDepth: depth === true,
      writethrough: writethrough === true,
    });
    this.#exports.set(id, { id, name, node, writable });
    node.users.set(this.#key(id, writable), 'export');
  }

  /** Objects that stand for exports among a node's users. */
  readonly #keys = new Map<string, User>();

  #key(id: string, writable = false): User {
    const key = this.#keys.get(id) ?? { writable };
    this.#keys.set(id, key);
    return key;
  }

  /** An instant that somebody else exports. */
  addFrozen(name: string, node: GraphNode): void {
    this.#exports.set(name, { id: name, name, node, writable: false });
    node.users.set(this.#key(name), 'export');
  }

  removeFrozen(name: string): void {
    const found = this.#exports.get(name);
    this.#exports.delete(name);
    found?.node.users.delete(this.#key(name));
  }

  /** What was on one node is on another one. */
  moved(from: GraphNode, to: GraphNode): void {
    for (const exported of this.#exports.values()) if (exported.node === from) exported.node = to;
  }

  /** What is exported, in the order in which it came to be. */
  all(): readonly { readonly node: GraphNode; readonly writable: boolean }[] {
    return [...this.#exports.values()];
  }

  /** How a node is exported. */
  useOf(node: GraphNode): 'writable' | 'readable' | undefined {
    const found = [...this.#exports.values()].find((exported) => exported.node === node);
    return found && (found.writable ? 'writable' : 'readable');
  }

  /**
   * Nobody writes past the node that lies on it.
   *
   * @param target name of the filter of a job whose target the node is to be; default: it is to be exported
   */
  checkWritable(node: GraphNode, writable: boolean, target?: string): void {
    if (!writable) return;
    const wanted = target === undefined ? asRoot(node) : asChild(target, node, 'target');
    const filter = filterOver(node);
    if (filter?.job?.type === 'backup') throw conflict(node, 'write', asChild(filter.name, node), wanted);
    // A job shares what it writes to with others, but not its length.
    if (target !== undefined) checkSameLength(node, wanted);
    const lengthener = lengthenerOf(node);
    for (const parent of node.parents) {
      const role = roleOf(parent, node);
      // An overlay sees what is below it change, unless a job copies from it.
      const copies = filterOver(parent)?.job?.type;
      if (role === 'backing' && copies !== 'backup' && copies !== 'mirror') continue;
      // Only images want what they lie on for themselves.
      if (!FORMATS.has(parent.driver) && parent !== lengthener) continue;
      throw conflict(node, 'write', asChild(parent.name, node, role), wanted);
    }
  }

  /** A bitmap of the node that is to be exported, or of one that its data comes from. */
  async #bitmap(
    node: GraphNode,
    wanted: unknown,
    writable: boolean,
  ): Promise<{ readonly disk: DiskDescriptor; readonly name: string }> {
    const name = isObject(wanted) ? String(wanted['name']) : String(wanted);
    const owners = isObject(wanted) ? [this.#graph.lookUp(String(wanted['node']))] : chainOf(node);
    for (const owner of owners) {
      const disk = await this.#graph.disk(owner);
      const bitmap = (await disk.bitmaps()).find((one) => one.name === name);
      if (bitmap === undefined) continue;
      if (bitmap.busy) {
        throw new QmpError(`Bitmap '${name}' is currently in use by another operation and cannot be used`);
      }
      // QEMU does not look at those that are named with their node.
      if (!writable && !node.descriptor.readOnly && bitmap.recording && !isObject(wanted)) {
        throw new QmpError(`Enabled bitmap '${name}' incompatible with readonly export`);
      }
      return { disk: disk.descriptor, name };
    }
    throw new QmpError(`Bitmap '${name}' is not found`);
  }

  /** Whether an export has no client, or comes to: one that has said goodbye a moment ago is still being seen off. */
  async #isLeft({ name }: Export): Promise<boolean> {
    for (const end = performance.now() + LEAVING_MS; ; await setTimeout(LEAVING_STEP_MS)) {
      if ((this.#server?.connectionsTo(name) ?? 0) === 0) return true;
      if (performance.now() > end) return false;
    }
  }

  /** QMP `block-export-del`. @param safe only where nobody uses it */
  async remove(id: string, safe = false): Promise<void> {
    const found = this.#exports.get(id);
    if (found === undefined) throw new QmpError(`Export '${id}' is not found`);
    if (safe && !(await this.#isLeft(found))) throw new QmpError(`export '${id}' still in use`);
    if (this.#exports.get(id) !== found) throw new QmpError(`Export '${id}' is not found`);
    this.#exports.delete(id);
    await this.#server?.removeExport(found.name);
    found.node.users.delete(this.#key(id));
    this.#keys.delete(id);
    await this.#graph.closeUnused(found.node);
    this.#tell({ event: 'BLOCK_EXPORT_DELETED', data: { id } });
  }

  /** `query-block-exports` */
  list(): object[] {
    return [...this.#exports.values()]
      .reverse()
      .map(({ id, node }) => ({ 'node-name': node.name, 'shutting-down': false, type: 'nbd', id }));
  }

  async close(): Promise<void> {
    await this.#close();
    for (const [id, { node }] of [...this.#exports].reverse()) {
      node.users.delete(this.#key(id));
      this.#tell({ event: 'BLOCK_EXPORT_DELETED', data: { id } });
    }
    this.#exports.clear();
  }
}

function checkId(id: string): void {
  if (!/^[A-Za-z][A-Za-z0-9\-._]*$/.test(id)) throw new QmpError('Invalid block export id');
}

/** A node, and what is below it as long as that is where its data comes from. */
function chainOf(node: GraphNode): GraphNode[] {
  const roles = FILTERS.has(node.driver) ? ['file', 'image'] : ['backing'];
  const below = node.children.find(({ role }) => roles.includes(role));
  return below === undefined ? [node] : [node, ...chainOf(below.node)];
}

function placeOf(address: JsonObject): string {
  return `${String(address['host'])}:${String(address['port'])}`;
}

/** Why nothing can listen there, in QEMU's words where there are some. */
function listenErrorText(error: unknown, address: JsonObject): string {
  const known = toStillframeError(error);
  const words = strerror(known);
  if (address['type'] === 'unix') {
    const path = String(address['path']);
    if (known.errno === 'ENAMETOOLONG') return `UNIX socket path '${path}' is too long`;
    if (words !== undefined) return `Failed to bind socket to ${path}: ${words}`;
  } else if (known.message.includes(': ENOTFOUND: ')) {
    return unresolvedText(placeOf(address));
  } else if (known.errno === 'EADDRINUSE') {
    return 'Failed to find an available port: Address already in use';
  } else if (words !== undefined) {
    return `Failed to bind socket: ${words}`;
  }
  return known.message;
}

/** An address of a command as servers take it. */
export function listenAddress(address: JsonObject): ListenAddress {
  switch (address['type']) {
    case 'unix':
      return { type: 'unix', path: unixName(address) };
    case 'inet': {
      const port = Number(address['port']);
      if (!Number.isInteger(port) || port < 0 || port > 65535) {
        throw new QmpError(
          `address resolution failed for ${placeOf(address)}: Servname not supported for ai_socktype`,
        );
      }
      const host = String(address['host']);
      return { type: 'tcp', host: host === '' ? '0.0.0.0' : host, port };
    }
    case 'fd': {
      const fd = Number(address['str']);
      if (!Number.isInteger(fd) || fd < 0)
        throw new QmpError(`File descriptor named '${String(address['str'])}' has not been found`);
      return { type: 'fd', fd };
    }
    default:
      throw new QmpError(`socket addresses of type '${String(address['type'])}' are not supported`);
  }
}
