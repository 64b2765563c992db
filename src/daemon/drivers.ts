import { type Stats, statSync } from 'node:fs';
import { BlkdebugState } from '../block/filters/blkdebug-state.js';
import { COPY_BUFFER_BYTES } from '../block/filters/copy-before-write.js';
import { combineNames, type ImageFormat } from '../block/graph.js';
import type { HeaderOptions, Layer, LayerHeader } from '../block/layers.js';
import type { LiveDescriptor, NodeDescriptor } from '../block/node.js';
import type { DiskHandle } from '../engine/disk.js';
import type { Engine } from '../engine/engine.js';
import { toStillframeError } from '../errors.js';
import { connectErrorText, openErrorText, QmpError, qmpText } from '../qmp/errors.js';
import { isObject, type JsonObject, numberIn } from '../qmp/types.js';
import { blkdebugOptions } from './blkdebug-options.js';
import { Breakpoints } from './breakpoints.js';
import { filenameOf } from './filenames.js';
import { type Child, type GraphNode, PASSING } from './graph-node.js';
import { checkImageFile, checkWhole } from './image-files.js';
import { checkNbdNames, nbdName } from './nbd-names.js';
import type { Objects } from './objects.js';
import { checkQcow2Options } from './qcow2-options.js';
import { checkTraits } from './traits.js';

/** Drivers that take compressed writes, or pass them on. */
const COMPRESSING: ReadonlySet<string> = new Set(['qcow2', 'vmdk', 'throttle', 'copy-on-read']);

/** What a node passes on to those that are made for it. */
export interface Inherited {
  readonly readOnly: boolean;
  readonly forceShare: boolean;
  /** What drivers discard goes down as far as it can, unless somebody says otherwise. */
  readonly discard: 'unmap' | undefined;
  readonly cache?: unknown;
}

/** What opening a node gives. */
export type Opened = Pick<
  GraphNode,
  'descriptor' | 'frozen' | 'held' | 'group' | 'breakpoints' | 'isLocked'
> &
  Partial<Pick<GraphNode, 'sequence'>>;

/** Takes a child of a node that is being opened. @throws QmpError where the node cannot have it */
export type Attach = (child: Child) => void;

/** The graph that nodes are opened in. */
export interface Nodes {
  get(name: string): GraphNode | undefined;
  /** @throws QmpError where there is none */
  lookUp(name: string): GraphNode;
  disk(node: GraphNode): Promise<DiskHandle>;
  /** A node as another one's child that passes requests on. */
  live(node: GraphNode): Promise<LiveDescriptor>;
  header(
    node: GraphNode,
    format: ImageFormat | undefined,
    follow: HeaderOptions['follow'],
  ): Promise<LayerHeader>;
  /** A child by its name, or made for its parent. @param attach is given it */
  child(role: Child['role'], wanted: unknown, inherited: Inherited, attach: Attach): Promise<GraphNode>;
  /** An image by its file name. */
  image(
    path: string,
    name: string,
    format: ImageFormat | undefined,
    inherited: Inherited,
  ): Promise<GraphNode>;
  nextSequence(): number;
}

const SECTOR = 512;
/** Drivers whose nodes lie on nothing. */
const BOTTOM: ReadonlySet<string> = new Set(['file', 'host_device', 'nbd', 'null-co', 'null-aio']);

/** Opens nodes, each as the driver of its name does (QAPI `BlockdevOptions`). */
export class Drivers {
  readonly #engine: Engine;
  readonly #objects: Objects;
  readonly #nodes: Nodes;

  constructor(engine: Engine, objects: Objects, nodes: Nodes) {
    this.#engine = engine;
    this.#objects = objects;
    this.#nodes = nodes;
  }

  async #layer(layer: Layer): Promise<Pick<GraphNode, 'descriptor'>> {
    return { descriptor: await this.#engine.run<NodeDescriptor>({ kind: 'open-layer', layer }) };
  }

  /** Opens what the options say on nodes that it makes or finds. @param attach is given these */
  async open(
    name: string,
    options: JsonObject,
    inherited: Inherited | undefined,
    attach: Attach,
  ): Promise<Opened> {
    const driver = String(options['driver']);
    const readOnly = (options['read-only'] ?? inherited?.readOnly ?? false) === true;
    const forceShare = (options['force-share'] ?? inherited?.forceShare ?? false) === true;
    const pass: Inherited = { readOnly, forceShare, discard: 'unmap', cache: options['cache'] };
    if (forceShare && !readOnly) {
      throw new QmpError('force-share=on can only be used with read-only images');
    }
    const child = async (role: Child['role'], key: string = role): Promise<GraphNode> => {
      const node = await this.#nodes.child(role, options[key], pass, attach);
      checkTraits(options);
      return node;
    };
    if (BOTTOM.has(driver)) checkTraits(options);
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
        return await this.#openQcow2(name, options, pass, attach);
      case 'throttle': {
        const { object, ...membership } = this.#objects.takeGroup(String(options['throttle-group']));
        try {
          const below = await this.#nodes.live(await child('file'));
          return { ...(await this.#layer({ driver, child: below, ...membership })), group: object };
        } catch (error) {
          object.users--;
          throw error;
        }
      }
      case 'compress': {
        const below = await child('file');
        if (!COMPRESSING.has(below.driver)) {
          throw new QmpError(`Compression is not supported for underlying format: ${below.driver}`);
        }
        return await this.#layer({ driver, child: await this.#nodes.live(below) });
      }
      case 'preallocate':
        return await this.#openPreallocate(options, await child('file'));
      case 'copy-on-read': {
        const below = await child('file');
        const depth = this.#depthOf(below, options['bottom']);
        return await this.#layer({ driver, child: await this.#nodes.live(below), depth });
      }
      case 'blkdebug': {
        const rules = blkdebugOptions(options);
        // Before what is below it, as QEMU lists them.
        const sequence = this.#nodes.nextSequence();
        const { descriptor: below } = await child('image');
        const opened = await this.#layer({ driver, child: below, ...rules });
        return { ...opened, breakpoints: this.#breakpoints(opened.descriptor), sequence };
      }
      case 'copy-before-write':
        return await this.#openCopyBeforeWrite(options, await child('file'), await child('target'));
      case 'snapshot-access': {
        const below = await child('file');
        if (below.frozen === undefined) {
          throw new QmpError(`Node '${below.name}' holds no instant: it is no copy-before-write node`);
        }
        const { disk, descriptor } = below.frozen;
        return await this.#layer({ driver, disk: disk.descriptor, frame: descriptor.frame, readOnly });
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
  ): Promise<Pick<GraphNode, 'descriptor' | 'isLocked'>> {
    const filename = String(options['filename']);
    const path = filename.replace(/^file:/, '');
    checkKindOfFile(String(options['driver']), path, readOnly);
    const isLocked = !forceShare && options['locking'] !== 'off';
    // Those who come to use it lock it.
    const open = async (asReadOnly: boolean): Promise<Pick<GraphNode, 'descriptor' | 'isLocked'>> => ({
      ...(await this.#layer({ driver: 'file', path, readOnly: asReadOnly, lock: 'none' })),
      isLocked,
    });
    try {
      return await openAsMayBe(open, readOnly, options);
    } catch (error) {
      throw new QmpError(openErrorText(error, filename));
    }
  }

  async #openNbd(options: JsonObject, readOnly: boolean): Promise<Pick<GraphNode, 'descriptor'>> {
    checkNbdNames(options);
    const name = nbdName(options, this.#objects);
    const { server } = options;
    const passphrase = this.#objects.passphraseOf(options['tls-creds']);
    const open = (reading: boolean): Promise<Pick<GraphNode, 'descriptor'>> =>
      this.#layer({ driver: 'nbd', name, readOnly: reading, passphrase });
    try {
      return await openAsMayBe(open, readOnly, options);
    } catch (error) {
      if (!isObject(server)) throw error;
      const place = server['path'] ?? `${String(server['host'])}:${String(server['port'])}`;
      throw new QmpError(connectErrorText(error, String(place)));
    }
  }

  async #openQcow2(name: string, options: JsonObject, pass: Inherited, attach: Attach): Promise<Opened> {
    const file = await this.#nodes.child('file', options['file'], pass, attach);
    checkTraits(options);
    await checkImageFile(name, file, pass.readOnly);
    if (file.descriptor.readOnly && !pass.readOnly) throw new QmpError('Block node is read-only');
    // Before its backing files, as QEMU lists them.
    const sequence = this.#nodes.nextSequence();
    const { backing: wanted, 'data-file': wantedData } = options;
    const follow = { backing: wanted === undefined, dataFile: wantedData === undefined };
    const header = await this.#header(file, follow);
    const data = wantedData ?? (header.dataFile && { driver: 'file', filename: header.dataFile });
    const dataFile =
      data === undefined ? undefined : await this.#nodes.child('data-file', data, pass, attach);
    const below = { ...pass, readOnly: true };
    let backing: GraphNode | undefined;
    if (wanted === undefined) {
      const named = header.backing;
      if (named !== undefined) {
        const called = combineNames(filenameOf(file), named.name);
        try {
          backing = await this.#nodes.image(named.path, called, named.format, below);
        } catch (error) {
          throw new QmpError(`Could not open backing file: ${qmpText(error)}`);
        }
        attach({ role: 'backing', node: backing });
      }
    } else if (wanted !== null) backing = await this.#nodes.child('backing', wanted, below, attach);
    const opened = await this.#layer({
      driver: 'qcow2',
      file: file.descriptor,
      readOnly: pass.readOnly,
      backing:
        backing && (backing.descriptor.readOnly ? backing.descriptor : await this.#nodes.live(backing)),
      dataFile: dataFile?.descriptor,
    });
    const { descriptor } = opened;
    if (descriptor.driver === 'qcow2') {
      try {
        checkQcow2Options(options, descriptor);
        if (wantedData !== undefined && !descriptor.hasDataFile) {
          throw new QmpError("'data-file' can only be set for images with an external data file");
        }
        if (dataFile === undefined && descriptor.hasDataFile) {
          throw new QmpError("'data-file' is required for this image");
        }
      } catch (error) {
        await this.#engine.run<void>({ kind: 'close-layer', node: descriptor });
        throw error;
      }
    }
    return { ...opened, sequence };
  }

  async #header(file: GraphNode, follow: HeaderOptions['follow']): Promise<LayerHeader> {
    const read = (which: HeaderOptions['follow']) => this.#nodes.header(file, 'qcow2', which);
    try {
      return await read(follow);
    } catch (error) {
      if (toStillframeError(error).code !== 'ERR_STILLFRAME_BACKING_MISSING') throw error;
      const { backingName, dataFileName } = await read({ backing: false, dataFile: false });
      const noData = await read({ ...follow, backing: false }).then(
        () => false,
        () => true,
      );
      const name = noData ? dataFileName : backingName;
      if (name === undefined) throw error;
      const which = noData ? '' : 'Could not open backing file: ';
      const path = combineNames(filenameOf(file), name);
      throw new QmpError(`${which}Could not open '${path}': No such file or directory`);
    }
  }

  async #openPreallocate(options: JsonObject, file: GraphNode): Promise<Pick<GraphNode, 'descriptor'>> {
    const number = (name: string): number | undefined => {
      const value = numberIn(options, name);
      if (value === undefined || value >= 0) return value;
      throw new QmpError(`Parameter '${name}' expects a non-negative number below 2^64`);
    };
    const [align, size] = [number('prealloc-align'), number('prealloc-size')];
    if (align !== undefined && align % SECTOR !== 0) {
      throw new QmpError(`prealloc-align parameter of preallocate filter is not aligned to ${SECTOR}`);
    }
    return await this.#layer({ driver: 'preallocate', child: await this.#nodes.live(file), size, align });
  }

  async #openCopyBeforeWrite(
    options: JsonObject,
    file: GraphNode,
    target: GraphNode,
  ): Promise<Pick<GraphNode, 'descriptor' | 'frozen' | 'held'>> {
    checkWhole(file);
    const { bitmap, 'min-cluster-size': cluster } = options;
    checkMinClusterSize(cluster === undefined ? undefined : Number(cluster));
    let name: string | undefined;
    if (isObject(bitmap)) {
      if (this.#nodes.lookUp(String(bitmap['node'])) !== file) {
        throw new QmpError(`the bitmap must be one of the node '${file.name}'`);
      }
      name = String(bitmap['name']);
    }
    const disk = await this.#nodes.disk(file);
    const frozen = await disk.hold({
      targetNode: target.descriptor,
      bitmap: name,
      onCbwError: options['on-cbw-error'] === 'break-snapshot' ? 'break-snapshot' : 'break-guest-write',
      cbwTimeoutMs: Number(options['cbw-timeout'] ?? 0) * 1000,
      minClusterSize: cluster === undefined ? undefined : Number(cluster),
    });
    const held = { ...frozen.held, counts: () => frozen.heldCounts() };
    return { descriptor: await this.#nodes.live(file), frozen, held };
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

/**
 * A device may be a `file` as well: whoever names one by its file name means that.
 *
 * @throws QmpError where QEMU's driver would not take what is there
 */
function checkKindOfFile(driver: string, path: string, readOnly: boolean): void {
  if (path === '') throw new QmpError(`The '${driver}' block driver requires a file name`);
  let found: Stats | undefined;
  try {
    found = statSync(path, { throwIfNoEntry: false });
  } catch {
    // Opening it says why.
  }
  if (found === undefined) return;
  if (found.isDirectory() && !readOnly) throw new QmpError(`Could not open '${path}': Is a directory`);
  if (driver === 'file' && !found.isFile() && !found.isBlockDevice()) {
    throw new QmpError(`'file' driver requires '${path}' to be a regular file`);
  }
  if (driver === 'host_device' && !found.isBlockDevice() && !found.isCharacterDevice()) {
    throw new QmpError(`'host_device' driver requires '${path}' to be either a character or block device`);
  }
}

/** Opens for reading where it cannot be written to, and that will do. */
async function openAsMayBe<T>(
  open: (readOnly: boolean) => Promise<T>,
  readOnly: boolean,
  options: JsonObject,
): Promise<T> {
  try {
    return await open(readOnly);
  } catch (error) {
    if (readOnly || options['auto-read-only'] !== true || !isReadOnlyError(error)) throw error;
    return await open(true);
  }
}

function isReadOnlyError(error: unknown): boolean {
  if (!(error instanceof Error) || !('code' in error)) return false;
  return error.code === 'ERR_STILLFRAME_PERMISSION' || error.code === 'ERR_STILLFRAME_READ_ONLY';
}
