import { combineNames, type ImageLayers } from './graph.js';
import { FIELDS, type MapRange, type PackedMap } from './map-batch.js';
import type { BlockNode, NodeDescriptor } from './node.js';
import { chainStatus, shownStatus } from './status.js';

/** How much of an image one look-up covers, in bytes: bounds the time without progress. */
const LOOK_UP_BYTES = 2 ** 40;

const BATCH_EXTENTS = 4096;

/**
 * Walks the whole chain and hands out its extents in order, neighbours of one kind merged. For each depth: the names of
 * the files that places are in, see {@link mapFiles}.
 */
export function mapNode(node: BlockNode, range: MapRange, onBatch: (batch: PackedMap) => void): void {
  const first = range.start ?? 0;
  const end = Math.min(node.length, first + (range.length ?? node.length));
  let batch: PackedMap = new Float64Array(BATCH_EXTENTS * FIELDS);
  let used = 0;
  const add = (start: number, length: number, place: number, code: number): void => {
    batch[used] = start;
    batch[used + 1] = length;
    batch[used + 2] = place;
    batch[used + 3] = code;
    used += FIELDS;
    if (used < batch.length) return;
    onBatch(batch);
    batch = new Float64Array(BATCH_EXTENTS * FIELDS);
    used = 0;
  };
  // qemu-img has a line for nothing, too.
  if (first >= end) add(first, 0, -1, 0);
  let start = first;
  let [length, place, code] = [0, -1, 0];
  for (let at = first; at < end; ) {
    const extent = shownStatus(chainStatus(node, at, Math.min(end - at, LOOK_UP_BYTES)));
    const found = extent.flags + extent.depth * 2 ** 8 + (extent.file ?? 0) * 2 ** 24;
    if (length > 0 && found === code && extent.hostOffset === (place < 0 ? -1 : place + length)) {
      length += extent.length;
    } else {
      if (length > 0) add(start, length, place, code);
      [start, length, place, code] = [at, extent.length, extent.hostOffset, found];
    }
    at += extent.length;
  }
  if (length > 0) add(start, length, place, code);
  if (used > 0) onBatch(batch.slice(0, used));
}

/**
 * Names of the files that data is in, for each image of the chain, top first.
 *
 * @param filename the name the caller gave
 * @param layers what the caller has the image lie on instead
 */
export function mapFiles(node: BlockNode, filename: string, layers?: ImageLayers): string[][] {
  const names: string[][] = [];
  let name = filename;
  let named = layers;
  for (let layer: BlockNode | undefined = node; layer !== undefined; layer = layer.backing) {
    const { descriptor } = layer;
    names.push(named?.dataFile === undefined ? filesOfLayer(descriptor, name) : [named.dataFile]);
    const { backing } = named ?? {};
    if (backing) name = backing.path;
    else if ('backingFile' in descriptor) name = combineNames(name, descriptor.backingFile ?? '');
    named = backing?.layers;
  }
  return names;
}

/** By the number that extents have for them. */
function filesOfLayer(descriptor: NodeDescriptor, name: string): string[] {
  if (descriptor.driver === 'qcow2' && descriptor.hasDataFile) {
    return [combineNames(name, descriptor.dataFileName ?? '')];
  }
  if (!('layout' in descriptor)) return [name];
  const names = [name];
  if (descriptor.layout.format !== 'vmdk') return names;
  for (const extent of descriptor.layout.extents) {
    if (extent.name !== undefined) names[extent.file] = combineNames(name, extent.name);
  }
  return names;
}
