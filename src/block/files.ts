import type { Arena } from '../kernels/arena.js';
import type { DiskDescriptor } from './disk.js';
import { interruptNbd } from './nbd/control.js';
import type {
  CopyOnReadDescriptor,
  FilterDescriptor,
  ImageDescriptor,
  LiveDescriptor,
  NodeDescriptor,
  NullDescriptor,
  SnapshotAccessDescriptor,
  StorageDescriptor,
} from './node.js';

/** Nodes that have no files of their own: what they lie on belongs to somebody else. */
type OverlaidDescriptor =
  | LiveDescriptor
  | CopyOnReadDescriptor
  | NullDescriptor
  | SnapshotAccessDescriptor
  | FilterDescriptor;

/** Whether a node has no files of its own. */
export function isOverlaid(descriptor: NodeDescriptor): descriptor is OverlaidDescriptor {
  switch (descriptor.driver) {
    case 'live':
    case 'copy-on-read':
    case 'null-co':
    case 'snapshot-access':
    case 'throttle':
    case 'blkdebug':
    case 'compress':
    case 'preallocate':
      return true;
    default:
      return false;
  }
}

/** Whether a node is what images lie on, and no image. */
export function isStorage(descriptor: NodeDescriptor): descriptor is StorageDescriptor {
  const { driver } = descriptor;
  return driver === 'file' || driver === 'nbd' || driver === 'nested';
}

/** Whether a node has a format. */
export function isImage(descriptor: NodeDescriptor): descriptor is ImageDescriptor {
  return !isStorage(descriptor) && !isOverlaid(descriptor);
}

/** The files of one layer: the image's own one first. */
export function ownFilesOf(descriptor: ImageDescriptor): StorageDescriptor[] {
  switch (descriptor.driver) {
    case 'raw':
      return [descriptor.file];
    case 'qcow2':
      return descriptor.dataFile === undefined ? [descriptor.file] : [descriptor.file, descriptor.dataFile];
    default:
      return [descriptor.file, ...descriptor.extents];
  }
}

/** What the chain goes on with, if anything. */
export function backingOf(descriptor: ImageDescriptor): NodeDescriptor | undefined {
  return descriptor.driver === 'raw' ? undefined : descriptor.backing;
}

/**
 * Ends what threads wait for on the servers of a node's chain, at once. For the host thread.
 *
 * @param mark of the owner whose requests are ended; without it everybody's are, and the node can only be closed then
 */
export function interruptNode(arena: Arena, descriptor: NodeDescriptor, mark?: number): void {
  for (const file of filesOf(descriptor)) if (file.driver === 'nbd') interruptNbd(arena, file, mark);
}

/** The live disks that requests on a node go on to, without those that these lie on. */
export function livesOf(descriptor: NodeDescriptor): DiskDescriptor[] {
  switch (descriptor.driver) {
    case 'live':
    case 'copy-on-read':
    case 'snapshot-access':
      return [descriptor.disk];
    case 'nested':
      return livesOf(descriptor.node);
    case 'throttle':
    case 'blkdebug':
    case 'compress':
    case 'preallocate':
      return livesOf(descriptor.child);
    case 'file':
    case 'nbd':
    case 'null-co':
      return [];
  }
  const backing = backingOf(descriptor);
  return [...ownFilesOf(descriptor), ...(backing === undefined ? [] : [backing])].flatMap(livesOf);
}

/** The files of a node's chain, top first. */
export function filesOf(descriptor: NodeDescriptor): StorageDescriptor[] {
  switch (descriptor.driver) {
    case 'nested':
      return filesOf(descriptor.node);
    case 'file':
    case 'nbd':
      return [descriptor];
    case 'live':
    case 'copy-on-read':
    case 'snapshot-access':
      return filesOf(descriptor.disk.node);
    case 'throttle':
    case 'blkdebug':
    case 'compress':
    case 'preallocate':
      return filesOf(descriptor.child);
    case 'null-co':
      return [];
  }
  const backing = backingOf(descriptor);
  return [...ownFilesOf(descriptor), ...(backing === undefined ? [] : filesOf(backing))];
}
