import { type BlockNode, STATUS_ALLOCATED, STATUS_ZERO } from './node.js';

/** What some layers say of a range that starts at a place. */
export interface LayeredExtent {
  /** Bytes. */
  readonly length: number;
  /** The layer that has data there, or `zero`; undefined where none of them has anything. */
  readonly from: BlockNode | 'zero' | undefined;
}

/** The extent at `at`, seen through layers that lie on each other, the first one on top (QEMU: `bdrv_is_allocated_above`). */
export function findAbove(layers: readonly BlockNode[], at: number, length: number): LayeredExtent {
  let most = length;
  for (const layer of layers) {
    // What a shorter image cuts off reads as zeroes, whatever is below.
    if (at >= layer.length) return { length: most, from: 'zero' };
    const extent = layer.status(at, Math.min(most, layer.length - at));
    most = extent.length;
    if ((extent.flags & STATUS_ALLOCATED) === 0) continue;
    return { length: most, from: (extent.flags & STATUS_ZERO) !== 0 ? 'zero' : layer };
  }
  return { length: most, from: undefined };
}

/** An image and those below it. @param count how many at most */
export function layersOf(top: BlockNode, count: number): BlockNode[] {
  const layers: BlockNode[] = [];
  for (let layer: BlockNode | undefined = top; layer !== undefined && layers.length < count; ) {
    layers.push(layer);
    layer = layer.backing;
  }
  return layers;
}
