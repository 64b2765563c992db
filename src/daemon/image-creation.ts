import type { CreateImageOptions } from '../block/create.js';
import type { Engine } from '../engine/engine.js';
import { toStillframeError } from '../errors.js';
import { ALL_PERMISSIONS, CONSISTENT_READ, RESIZE, WRITE } from '../os/image-lock.js';
import { QmpError, qmpText, strerror } from '../qmp/errors.js';
import { isObject, type JsonObject, numberIn } from '../qmp/types.js';
import type { FileLocks, Release } from './file-locks.js';
import { filenameOf } from './filenames.js';
import type { Graph } from './graph.js';
import type { GraphNode } from './graph-node.js';
import { asChild, asRoot, conflict, FORMATS, roleOf } from './permissions.js';

const KiB = 1024;
/** Bytes that the L1 table of an image may have. */
const MAX_L1_BYTES = 32 * KiB * KiB;

/** QMP `blockdev-create` of a file. @throws QmpError in QEMU's words */
export async function createFile(engine: Engine, graph: Graph, options: JsonObject): Promise<void> {
  const path = String(options['filename']);
  const preallocation = preallocationOf(options);
  if (preallocation === 'metadata') throw new QmpError('Unsupported preallocation mode: metadata');
  const length = Number(options['size']);
  graph.checkUnused(path);
  try {
    await engine.createImage(path, { format: 'raw', length, exact: true, force: true, preallocation });
  } catch (error) {
    const words = strerror(toStillframeError(error));
    throw new QmpError(words === undefined ? qmpText(error) : `Could not create '${path}': ${words}`);
  }
}

/** QMP `blockdev-create` of a qcow2 image, on nodes that are there or are made for it. @throws QmpError in QEMU's words */
export async function createQcow2(engine: Engine, graph: Graph, options: JsonObject): Promise<void> {
  const made: GraphNode[] = [];
  const claims: Release[] = [];
  const open = async (wanted: unknown): Promise<GraphNode> => {
    if (!isObject(wanted)) return graph.lookUp(String(wanted));
    const node = await graph.make(wanted);
    made.push(node);
    return node;
  };
  try {
    const file = await open(options['file']);
    checkOptions(options);
    const data = options['data-file'] === undefined ? undefined : await open(options['data-file']);
    if (data === file) {
      const image = graph.nextImplicitName;
      throw conflict(file, 'resize', asChild(image, file, 'data-file'), asChild(image, file));
    }
    const nodes = data === undefined ? [file] : [file, data];
    for (const node of nodes) checkFree(node);
    for (const node of nodes) claims.push(claim(graph.locks, node));
    await engine.run({
      kind: 'format',
      node: file.descriptor,
      dataFile: data?.descriptor,
      length: Number(options['size']),
      options: imageOptions(options, data),
    });
  } finally {
    for (const release of claims) release();
    for (const node of made) await graph.closeUnused(node);
  }
}

/** @throws QmpError where the file of a node cannot be locked for an image that is made in it, and opened then */
function claim(locks: FileLocks, node: GraphNode): Release {
  const changes = WRITE | RESIZE;
  return locks.claimInTurn(
    [{ node, role: 'root', needed: changes, shared: ALL_PERMISSIONS }],
    [{ node, role: 'root', needed: CONSISTENT_READ | changes, shared: ALL_PERMISSIONS & ~changes }],
  );
}

function imageOptions(options: JsonObject, data: GraphNode | undefined): CreateImageOptions {
  const number = (name: string): number | undefined => numberIn(options, name);
  const text = (name: string): string | undefined => {
    const value = options[name];
    return typeof value === 'string' ? value : undefined;
  };
  return {
    format: 'qcow2',
    preallocation: preallocationOf(options),
    version: options['version'] === 'v2' ? 2 : 3,
    clusterSize: number('cluster-size'),
    refcountBits: number('refcount-bits'),
    lazyRefcounts: options['lazy-refcounts'] === true,
    extendedL2: options['extended-l2'] === true,
    compressionType: options['compression-type'] === 'zstd' ? 'zstd' : 'zlib',
    backingFile: text('backing-file'),
    backingFormat: text('backing-fmt') as CreateImageOptions['backingFormat'],
    dataFile: data && filenameOf(data),
    dataFileRaw: options['data-file-raw'] === true,
  };
}

function preallocationOf(options: JsonObject): CreateImageOptions['preallocation'] {
  return options['preallocation'] as CreateImageOptions['preallocation'];
}

/** What is wrong with options, in the order in which QEMU looks at them. */
function checkOptions(options: JsonObject): void {
  const refuse = (wrong: boolean, text: string): void => {
    if (wrong) throw new QmpError(text);
  };
  const given = (name: string): boolean => options[name] !== undefined;
  const isOld = options['version'] === 'v2';
  const onlyNew = (what: string, verb: string): string =>
    `${what} ${verb} compatibility level 1.1 and above (use version=v3 or greater)`;
  const size = Number(options['size']);
  const cluster = Number(options['cluster-size'] ?? 64 * KiB);
  const isSubclustered = options['extended-l2'] === true;
  refuse(size % 512 !== 0, 'Image size must be a multiple of 512 bytes');
  const isCluster = cluster >= 512 && cluster <= 2048 * KiB && (cluster & (cluster - 1)) === 0;
  refuse(!isCluster, 'Cluster size must be a power of two between 512 and 2048k');
  if (isSubclustered) {
    refuse(isOld, onlyNew('Extended L2 entries', 'are only supported with'));
    const least = 'Extended L2 entries are only supported with cluster sizes of at least 16384 bytes';
    refuse(cluster < 16 * KiB, least);
  }
  refuse(
    given('backing-file') && (options['preallocation'] ?? 'off') !== 'off' && !isSubclustered,
    'Backing file and preallocation can only be used at the same time if extended_l2 is on',
  );
  refuse(
    given('backing-fmt') && !given('backing-file'),
    'Backing format cannot be used without backing file',
  );
  refuse(isOld && options['lazy-refcounts'] === true, onlyNew('Lazy refcounts', 'only supported with'));
  const bits = Number(options['refcount-bits'] ?? 16);
  refuse(
    bits < 1 || bits > 64 || (bits & (bits - 1)) !== 0,
    'Refcount width must be a power of two and may not exceed 64 bits',
  );
  refuse(
    isOld && bits !== 16,
    'Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)',
  );
  const isRaw = options['data-file-raw'] === true;
  refuse(isRaw && !given('data-file'), 'data-file-raw requires data-file');
  refuse(isRaw && given('backing-file'), 'Backing file and data-file-raw cannot be used at the same time');
  refuse(isOld && given('data-file'), onlyNew('External data files', 'are only supported with'));
  refuse(
    isOld && (options['compression-type'] ?? 'zlib') !== 'zlib',
    onlyNew('Non-zlib compression type', 'is only supported with'),
  );
  const perTable = cluster / (isSubclustered ? 16 : 8);
  refuse(
    Math.ceil(size / (cluster * perTable)) * 8 > MAX_L1_BYTES,
    'Could not resize image: Failed to grow the L1 table: File too large',
  );
}

/** @throws QmpError where somebody has the node who does not want it overwritten */
function checkFree(node: GraphNode): void {
  for (const parent of node.parents) {
    if (!FORMATS.has(parent.driver)) continue;
    throw conflict(node, 'write, resize', asChild(parent.name, node, roleOf(parent, node)));
  }
  if (node.users.size > 0) throw conflict(node, 'resize', asRoot(node));
}
