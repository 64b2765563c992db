import type { Runtime } from '../kernels/runtime.js';
import { attachPreallocate } from './graph.js';
import { storageOf } from './layers.js';
import type { FileDescriptor, NodeDescriptor } from './node.js';
import { openRaw } from './raw/raw.js';

/** The nodes below another one, by what they are to it. */
export interface Links {
  /** What an image lies on, or a filter passes requests on to. */
  readonly file?: NodeDescriptor | undefined;
  readonly backing?: NodeDescriptor | undefined;
  readonly dataFile?: NodeDescriptor | undefined;
}

/**
 * A node as it is on other nodes below it, or on the same ones as they are now. Its own state stays the same, so nobody
 * may use what it was any more.
 */
export function relinkNode(runtime: Runtime, node: NodeDescriptor, links: Links): NodeDescriptor {
  const { file, backing } = links;
  switch (node.driver) {
    case 'file':
    case 'nbd':
    case 'null-co':
    case 'live':
    case 'snapshot-access':
    case 'nested':
      return node;
    case 'copy-on-read':
      return file?.driver === 'live' ? { ...file, driver: node.driver, depth: node.depth } : node;
    case 'throttle':
    case 'blkdebug':
    case 'compress':
      return { ...node, child: file ?? node.child };
    case 'preallocate': {
      const linked = { ...node, child: file ?? node.child };
      attachPreallocate(runtime, linked).refresh();
      return linked;
    }
    case 'raw':
      return openRaw(runtime, file === undefined ? node.file : storageOf(runtime, file), node);
    case 'qcow2': {
      const dataFile: FileDescriptor | undefined =
        links.dataFile?.driver === 'file' ? links.dataFile : node.dataFile;
      return { ...node, file: file === undefined ? node.file : storageOf(runtime, file), backing, dataFile };
    }
    default:
      return { ...node, file: file === undefined ? node.file : storageOf(runtime, file), backing };
  }
}
