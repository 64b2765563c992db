import { mapFiles, mapNode } from '#src/block/map.js';
import { MapBatch, type MapEntry } from '#src/block/map-batch.js';
import type { BlockNode } from '#src/block/node.js';

/** Every extent of a node, in this thread. */
export function mapEntries(node: BlockNode, filename: string): MapEntry[] {
  const entries: MapEntry[] = [];
  const files = mapFiles(node, filename);
  mapNode(node, {}, (batch) => {
    for (const entry of new MapBatch(batch, files)) entries.push(entry);
  });
  return entries;
}
