import type { NodeDescriptor, StorageDescriptor } from './node.js';

/**
 * What is made longer or shorter where that is asked of a node: the file at the bottom of filters and of raw images that
 * are all of their file, or the first filter on the way that keeps lengths itself.
 */
export function fileBelow(node: NodeDescriptor): StorageDescriptor | undefined {
  switch (node.driver) {
    case 'file':
    case 'nbd':
    case 'nested':
      return node;
    case 'throttle':
    case 'blkdebug':
    case 'compress':
      return fileBelow(node.child);
    case 'preallocate':
      return nestedOver(node, fileBelow(node.child), node.length);
    case 'live':
    case 'copy-on-read':
      return fileBelow(node.disk.node);
    case 'raw':
      return (node.offset ?? 0) === 0 && node.size === undefined ? fileBelow(node.file) : undefined;
    default:
      return undefined;
  }
}

/** @param file what is made longer or shorter for it, if anything can be @param length bytes that it has now */
export function nestedOver(
  node: NodeDescriptor,
  file: StorageDescriptor | undefined,
  length: number,
): StorageDescriptor {
  const { path, readOnly } = node;
  const control = file?.control ?? -1;
  const identity = file?.identity ?? `node ${path}`;
  return { driver: 'nested', path, readOnly, node, file, length, control, identity };
}
