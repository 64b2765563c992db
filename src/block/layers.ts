import type { Runtime } from '../kernels/runtime.js';
import type { LockMode } from '../os/image-lock.js';
import type { DiskDescriptor } from './disk.js';
import { fileBelow, nestedOver } from './file-below.js';
import { isStorage } from './files.js';
import type { BlkdebugLimits } from './filters/blkdebug.js';
import { type BlkdebugRule, BlkdebugState, blkdebugBytes } from './filters/blkdebug-state.js';
import type { FrameDescriptor } from './filters/copy-before-write.js';
import { openPreallocate } from './filters/preallocate.js';
import { checkParent, foreignDescriptor, openForeign } from './foreign/index.js';
import {
  allowedFolders,
  attachNode,
  formatOfBacking,
  type ImageFormat,
  pathFromHeader,
  probe,
} from './graph.js';
import { openNbd } from './nbd/index.js';
import type {
  FileDescriptor,
  ForeignName,
  LiveDescriptor,
  NodeDescriptor,
  StorageDescriptor,
} from './node.js';
import { openQcow2, readHeader } from './qcow2/index.js';
import { attachFile, openFile } from './raw/file.js';
import { openRaw } from './raw/raw.js';

/**
 * One node of a graph that is put together node by node, each by the driver of its name and on the open nodes below it
 * (QMP `blockdev-add`). Offsets and lengths are bytes.
 */
export type Layer =
  | { readonly driver: 'file'; readonly path: string; readonly readOnly: boolean; readonly lock: LockMode }
  | {
      readonly driver: 'nbd';
      readonly name: string;
      readonly readOnly: boolean;
      /** What the key of the client's certificate is encrypted with. */
      readonly passphrase?: string | undefined;
    }
  | {
      readonly driver: 'null-co';
      readonly length: number;
      readonly readOnly: boolean;
      readonly readsZero: boolean;
      readonly latencyMs: number;
    }
  | {
      readonly driver: 'raw';
      readonly file: NodeDescriptor;
      readonly readOnly: boolean;
      readonly offset?: number | undefined;
      readonly size?: number | undefined;
    }
  | {
      readonly driver: 'qcow2';
      readonly file: NodeDescriptor;
      readonly readOnly: boolean;
      readonly backing: NodeDescriptor | undefined;
      readonly dataFile: NodeDescriptor | undefined;
    }
  | { readonly driver: ForeignName; readonly file: NodeDescriptor }
  | {
      readonly driver: 'throttle';
      readonly child: NodeDescriptor;
      readonly group: number;
      readonly member: number;
    }
  | {
      readonly driver: 'blkdebug';
      readonly child: NodeDescriptor;
      readonly rules: readonly BlkdebugRule[];
      readonly limits: BlkdebugLimits;
    }
  | { readonly driver: 'copy-on-read'; readonly child: LiveDescriptor; readonly depth: number | undefined }
  | { readonly driver: 'compress'; readonly child: NodeDescriptor }
  | {
      readonly driver: 'preallocate';
      readonly child: NodeDescriptor;
      /** Default: as QEMU's. */
      readonly size: number | undefined;
      readonly align: number | undefined;
    }
  | {
      readonly driver: 'snapshot-access';
      readonly disk: DiskDescriptor;
      readonly frame: FrameDescriptor;
      readonly readOnly: boolean;
    };

/** What the header of an image says of the nodes below it. */
export interface LayerHeader {
  /** As it was asked for, or found in the first bytes. */
  readonly format: ImageFormat;
  readonly backing:
    | {
        /** As the header has it. */
        readonly name: string;
        readonly path: string;
        readonly format: ImageFormat | undefined;
      }
    | undefined;
  /** Name of the backing file as the header has it, looked for or not. */
  readonly backingName: string | undefined;
  /** Path of the external data file. */
  readonly dataFile: string | undefined;
  /** Its name as the header has it, looked for or not. */
  readonly dataFileName: string | undefined;
}

/** Opens one node. Nodes below it stay their owners'. @throws StillframeError what the driver throws */
export function openNodeLayer(runtime: Runtime, layer: Layer): NodeDescriptor {
  switch (layer.driver) {
    case 'file':
      return openFile(runtime, layer.path, { readOnly: layer.readOnly, lock: layer.lock });
    case 'nbd':
      return openNbd(runtime, layer.name, layer);
    case 'null-co':
      return { ...layer, path: 'null-co://' };
    case 'raw':
      return openRaw(runtime, storageOf(runtime, layer.file), layer);
    case 'qcow2': {
      const { file, backing, dataFile, readOnly } = layer;
      return openQcow2(runtime, storageOf(runtime, file), backing, {
        readOnly,
        // Only files of the host hold data of other images.
        dataFile: dataFile?.driver === 'file' ? dataFile : undefined,
      });
    }
    case 'throttle': {
      const { child, group, member } = layer;
      return { ...filterOf(runtime, child), driver: 'throttle', child, group, member };
    }
    case 'copy-on-read': {
      const { child, depth } = layer;
      return { ...child, driver: 'copy-on-read', depth };
    }
    case 'compress': {
      const { child } = layer;
      return { ...filterOf(runtime, child), driver: 'compress', child };
    }
    case 'preallocate': {
      const { child, size, align } = layer;
      return openPreallocate(runtime, { ...filterOf(runtime, child), child }, { size, align });
    }
    case 'blkdebug': {
      const { child, rules, limits } = layer;
      const state = runtime.arena.alloc(blkdebugBytes(rules.length), 'state of a blkdebug node');
      new BlkdebugState(runtime.arena, state, rules).initialise();
      return { ...filterOf(runtime, child), driver: 'blkdebug', child, rules, limits, state };
    }
    case 'snapshot-access': {
      const { disk, frame, readOnly } = layer;
      const { path } = disk.node;
      return { driver: 'snapshot-access', path, readOnly, length: disk.length, disk, frame };
    }
    default:
      return openForeignLayer(runtime, layer.driver, storageOf(runtime, layer.file));
  }
}

/** An image of a foreign format that is in one file, without a parent. */
function openForeignLayer(runtime: Runtime, format: ForeignName, file: StorageDescriptor): NodeDescriptor {
  const opened = openForeign(runtime, format, file, (name) => {
    throw new TypeError(`'${file.path}' names another file, '${name}'; convert it first`);
  });
  checkParent(file.path, opened, undefined);
  const extents: FileDescriptor[] = [];
  return foreignDescriptor(opened, file, extents, undefined);
}

/**
 * @param folders from which headers may open files; default: the image's own
 * @throws StillframeError what reading a header throws, ERR_STILLFRAME_BACKING_FORBIDDEN, …_BACKING_MISSING
 */
export function readLayerHeader(
  runtime: Runtime,
  node: NodeDescriptor,
  { format, folders, follow }: HeaderOptions,
): LayerHeader {
  const file = attachFile(runtime, storageOf(runtime, node));
  const found = format ?? probe(file);
  if (found !== 'qcow2') {
    return {
      format: found,
      backing: undefined,
      backingName: undefined,
      dataFile: undefined,
      dataFileName: undefined,
    };
  }
  const header = readHeader(runtime, file);
  const { path } = node;
  const allowed = allowedFolders(path, folders);
  const { backingFile, backingFormat, dataFile } = header;
  return {
    format: found,
    backingName: backingFile,
    dataFileName: dataFile,
    backing:
      backingFile === undefined || !follow.backing
        ? undefined
        : {
            name: backingFile,
            path: pathFromHeader(path, 'backing file', backingFile, allowed),
            format: formatOfBacking(path, backingFormat),
          },
    dataFile:
      dataFile === undefined || !follow.dataFile
        ? undefined
        : pathFromHeader(path, 'external data file', dataFile, allowed),
  };
}

/** How a header is read. */
export interface HeaderOptions {
  /** Undefined: looked for in the first bytes. */
  readonly format: ImageFormat | undefined;
  readonly folders: readonly string[] | undefined;
  /** Which names of the header are wanted. */
  readonly follow: { readonly backing: boolean; readonly dataFile: boolean };
}

function filterOf(
  runtime: Runtime,
  child: NodeDescriptor,
): { readonly path: string; readonly readOnly: boolean; readonly length: number } {
  const { path, readOnly } = child;
  return { path, readOnly, length: attachNode(runtime, child).length };
}

/** A node as what an image lies on. */
export function storageOf(runtime: Runtime, node: NodeDescriptor): StorageDescriptor {
  if (isStorage(node)) return node;
  const file = fileBelow(node.driver === 'preallocate' ? node.child : node);
  return nestedOver(node, file, attachNode(runtime, node).length);
}
