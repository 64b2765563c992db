import { realpathSync } from 'node:fs';
import { combineNames } from '../block/graph.js';
import { filenameOf, hasOtherBacking } from './filenames.js';
import type { GraphNode } from './graph-node.js';

/** Drivers that show what the node below them has. */
const FILTERS: ReadonlySet<string> = new Set([
  'throttle',
  'compress',
  'preallocate',
  'copy-on-read',
  'copy-before-write',
  'blkdebug',
  'mirror_top',
  'commit_top',
]);

export function isFilter({ driver }: GraphNode): boolean {
  return FILTERS.has(driver);
}

export function backingOf(node: GraphNode): GraphNode | undefined {
  return node.children.find(({ role }) => role === 'backing')?.node;
}

/** What a filter passes requests on to, or an image has as its backing file. */
export function below(node: GraphNode): GraphNode | undefined {
  return isFilter(node) ? node.children[0]?.node : backingOf(node);
}

/** What a node shows, itself where it is no filter. */
export function unfiltered(node: GraphNode): GraphNode {
  const [child] = node.children;
  return child !== undefined && isFilter(node) ? unfiltered(child.node) : node;
}

/** A node and those below it, down to where the chain ends or `stop` (which is left out) begins. */
export function chainOf(node: GraphNode, stop?: GraphNode): GraphNode[] {
  const chain: GraphNode[] = [];
  for (let at: GraphNode | undefined = node; at !== undefined && at !== stop; at = below(at)) chain.push(at);
  return chain;
}

/** The image above that has `node` as its backing file, seen from `top`; without a node, the image at the bottom. */
export function overlayIn(top: GraphNode, node: GraphNode | undefined): GraphNode | undefined {
  return chainOf(top, node).findLast((one) => !isFilter(one));
}

/** The image below `node` that a command means by a file name. It is not looked for anywhere but in the chain. */
export function findBackingImage(node: GraphNode, name: string): GraphNode | undefined {
  for (let overlay = unfiltered(node); ; ) {
    const backing = backingOf(overlay);
    if (backing === undefined) return undefined;
    const image = unfiltered(backing);
    if (isNamed(overlay, image, name)) return image;
    overlay = image;
  }
}

/** Whether that is the name of the backing file of an image: relative ones are relative to the image. */
function isNamed(overlay: GraphNode, image: GraphNode, name: string): boolean {
  const { descriptor } = overlay;
  const own = filenameOf(unnamed(overlay));
  const named = 'backingFile' in descriptor ? descriptor.backingFile : undefined;
  if (named === undefined || hasOtherBacking(overlay, own)) return name === filenameOf(image);
  const full = combineNames(own, named);
  if (name === named || name === full) return true;
  const wanted = resolved(combineNames(own, name));
  return wanted !== undefined && wanted === resolved(full);
}

/** The node with an image's own file: it has the name that those of other files are relative to. */
function unnamed(image: GraphNode): GraphNode {
  return image.children.find(({ role }) => role === 'file')?.node ?? image;
}

function resolved(path: string): string | undefined {
  try {
    return realpathSync(path);
  } catch {
    return undefined;
  }
}
