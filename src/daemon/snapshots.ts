import type { ImageFormat } from '../block/graph.js';
import type { DrainedSection } from '../engine/drained-section.js';
import type { Engine } from '../engine/engine.js';
import { StillframeError } from '../errors.js';
import { openErrorText, QmpError } from '../qmp/errors.js';
import type { ArgumentsOfAction } from '../qmp/schema.js';
import { filenameOf } from './filenames.js';
import { type Graph, isFormat } from './graph.js';
import type { GraphChanges } from './graph-changes.js';
import type { GraphNode } from './graph-node.js';
import { checkCoverable, filterOver } from './permissions.js';

/** An overlay that is ready to be put on a node. */
export interface PreparedSnapshot {
  readonly node: GraphNode;
  readonly overlay: GraphNode;
  /** It was opened for this, and goes if this comes to nothing. */
  readonly made: boolean;
}

/** QMP `blockdev-snapshot` and `blockdev-snapshot-sync`: what is written to a node goes to an overlay from then on. */
export class Snapshots {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #changes: GraphChanges;

  constructor(engine: Engine, graph: Graph, changes: GraphChanges) {
    this.#engine = engine;
    this.#graph = graph;
    this.#changes = changes;
  }

  /** QMP `blockdev-snapshot` */
  async prepare({
    node: name,
    overlay: overlayName,
  }: ArgumentsOfAction<'blockdev-snapshot'>): Promise<PreparedSnapshot> {
    const node = this.#graph.lookUp(name);
    checkCoverable(node);
    const overlay = this.#graph.lookUp(overlayName);
    checkOverlay(overlay);
    await this.#checkLength(node, overlay);
    return { node, overlay, made: false };
  }

  /** QMP `blockdev-snapshot-sync` */
  async prepareFile(given: ArgumentsOfAction<'blockdev-snapshot-sync'>): Promise<PreparedSnapshot> {
    const { device, 'node-name': nodeName, mode = 'absolute-paths', format = 'qcow2' } = given;
    const { 'snapshot-file': filename, 'snapshot-node-name': overlayName } = given;
    const node = this.#graph.findEither(device, nodeName);
    checkCoverable(node);
    if (nodeName !== undefined && overlayName === undefined)
      throw new QmpError('New overlay node-name missing');
    if (overlayName !== undefined && this.#graph.find(overlayName) !== undefined) {
      throw new QmpError('New overlay node-name already in use');
    }
    if (!isFormat(format)) throw new QmpError(`Unknown file format '${format}'`);
    if (mode === 'absolute-paths') await this.#create(filename, format, node);
    let overlay: GraphNode;
    try {
      overlay = await this.#graph.make({
        driver: format,
        file: { driver: 'file', filename },
        ...(format === 'qcow2' ? { backing: null } : {}),
        ...(overlayName === undefined ? {} : { 'node-name': overlayName }),
        discard: node.options['discard'],
        'detect-zeroes': node.options['detect-zeroes'],
      });
    } catch (error) {
      throw error instanceof QmpError ? error : new QmpError(openErrorText(error, filename));
    }
    try {
      checkOverlay(overlay);
      await this.#checkLength(node, overlay);
    } catch (error) {
      await this.#graph.closeUnused(overlay);
      throw error;
    }
    return { node, overlay, made: true };
  }

  /** @throws QmpError where a job would not find in the overlay what it copies from the node */
  async #checkLength(node: GraphNode, overlay: GraphNode): Promise<void> {
    if (filterOver(node) === undefined) return;
    const [own, others] = [await this.#graph.disk(node), await this.#graph.disk(overlay)];
    if (own.length === others.length) return;
    throw new QmpError(`The overlay is not as long as '${node.name}', which a job copies from`);
  }

  async #create(filename: string, format: ImageFormat, node: GraphNode): Promise<void> {
    if (format !== 'qcow2') throw new QmpError(`Backing file not supported for file format '${format}'`);
    this.#graph.checkUnused(filename);
    const { length } = await this.#graph.disk(node);
    const { driver } = node;
    try {
      await this.#engine.createImage(filename, {
        format,
        length,
        force: true,
        backingFile: filenameOf(node),
        backingFormat: isFormat(driver) ? driver : 'raw',
        unsafeBacking: true,
      });
    } catch (error) {
      throw new QmpError(openErrorText(error, filename).replace(/^Could not open/, 'Could not create'));
    }
  }

  /** Gives up what was prepared. */
  async abandon({ overlay, made }: PreparedSnapshot): Promise<void> {
    if (made) await this.#graph.closeUnused(overlay);
  }

  /** Nodes that the section has to keep others from. */
  static nodesOf(prepared: readonly PreparedSnapshot[]): GraphNode[] {
    return prepared.flatMap(({ node, overlay }) => [node, overlay]);
  }

  /** Within a change of the nodes. */
  async commit(section: DrainedSection, { node, overlay }: PreparedSnapshot): Promise<void> {
    await this.#changes.replace(section, node, overlay);
    try {
      await this.#changes.setReadOnly(section, node, true);
    } catch (error) {
      // As QEMU has it, the overlay is in place all the same. What is at work on bitmaps goes on to write them.
      if (!isBusy(error)) throw error;
    }
    await this.#changes.setBacking(section, overlay, node);
  }
}

function isBusy(error: unknown): boolean {
  return error instanceof StillframeError && error.code === 'ERR_STILLFRAME_BITMAP_BUSY';
}

/** @throws QmpError where somebody has something on the overlay already */
function checkOverlay(overlay: GraphNode): void {
  if (overlay.device !== undefined || overlay.users.size > 0 || overlay.parents.size > 0) {
    throw new QmpError('The overlay is already in use');
  }
  if (overlay.children.some(({ role }) => role === 'backing')) {
    throw new QmpError('The overlay already has a backing image');
  }
  if (overlay.driver !== 'qcow2') throw new QmpError('The overlay does not support backing images');
}
