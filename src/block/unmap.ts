import { EXPORT } from '../nbd/protocol/numbers.js';
import type { NodeDescriptor } from './node.js';

/** Whether zeroes can be written to a node so that they take no space (QEMU: `bdrv_can_write_zeroes_with_unmap`). */
export function mayUnmapZeroes(node: NodeDescriptor): boolean {
  switch (node.driver) {
    case 'file':
    case 'qcow2':
      return true;
    case 'nbd':
      return (node.flags & EXPORT.writeZeroes) !== 0;
    case 'raw':
      return mayUnmapZeroes(node.file);
    case 'nested':
      return mayUnmapZeroes(node.node);
    case 'live':
      return mayUnmapZeroes(node.disk.node);
    case 'throttle':
    case 'blkdebug':
    case 'compress':
    case 'preallocate':
      return mayUnmapZeroes(node.child);
    default:
      return false;
  }
}
