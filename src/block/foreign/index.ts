import { StillframeError } from '../../errors.js';
import type { Runtime } from '../../kernels/runtime.js';
import type {
  BlockNode,
  ForeignDescriptor,
  ForeignName,
  NodeDescriptor,
  StorageDescriptor,
} from '../node.js';
import { attachFile, type FileNode } from '../raw/file.js';
import {
  corrupt,
  type Locator,
  type Opened,
  type OpeningImage,
  PROBE_BYTES,
  type Source,
} from './contract.js';
import { ForeignNode } from './node.js';
import { openVdi, probeVdi, VdiLocator } from './vdi.js';
import { openVhdx, probeVhdx, VhdxLocator, vhdxSource } from './vhdx.js';
import { openVmdk, probeVmdk, VmdkLocator } from './vmdk.js';
import { NO_PARENT } from './vmdk-descriptor.js';
import { openVpc, probeVpc, VpcLocator } from './vpc.js';

export { PROBE_BYTES } from './contract.js';
export { probeUnsupported } from './unsupported.js';

/** Formats that are read and not written, by the names that `-f` has for them. */
export const FOREIGN_NAMES: readonly ForeignName[] = ['vmdk', 'vhdx', 'vpc', 'vdi'];

/** Which format a file is of by its first {@link PROBE_BYTES} bytes (a shorter file filled up with zeroes). */
export function probeForeign(head: Uint8Array): ForeignName | undefined {
  if (head.length < PROBE_BYTES) throw new RangeError(`${head.length} bytes are too few to probe`);
  const probes = { vmdk: probeVmdk, vhdx: probeVhdx, vpc: probeVpc, vdi: probeVdi };
  return FOREIGN_NAMES.find((name) => probes[name](head));
}

/** An image whose headers are read, but whose parent is not open yet. */
export type OpenedForeign = Opened<ForeignDescriptor['layout']> & { readonly name: ForeignName };

/**
 * Reads and checks the headers of an image.
 *
 * @param openExtent opens a file that the header names, where it is allowed, and gives its index among the files of
 *   the image, of which `file` is 0
 * @throws StillframeError ERR_STILLFRAME_FORMAT (not of this format), …_CORRUPT_IMAGE, …_UNSUPPORTED_FEATURE, …_IO
 *   and what `openExtent` throws
 */
export function openForeign(
  runtime: Runtime,
  name: ForeignName,
  file: StorageDescriptor,
  openExtent: (name: string) => { readonly index: number; readonly file: StorageDescriptor },
): OpenedForeign {
  const image: OpeningImage = {
    path: file.path,
    file: attachFile(runtime, file),
    openExtent: (extent) => {
      const { index, file: opened } = openExtent(extent);
      return { index, file: attachFile(runtime, opened) };
    },
  };
  switch (name) {
    case 'vmdk':
      return { name, ...openVmdk(image) };
    case 'vhdx':
      return { name, ...openVhdx(runtime.arena, image) };
    case 'vpc':
      return { name, ...openVpc(image) };
    case 'vdi':
      return { name, ...openVdi(image) };
  }
}

/**
 * @throws StillframeError ERR_STILLFRAME_CORRUPT_IMAGE where the parent has changed since the image was made,
 *   …_BACKING_MISSING where there should be one and its name is not known
 */
export function checkParent(
  path: string,
  { layout }: OpenedForeign,
  parent: NodeDescriptor | undefined,
): void {
  if (layout.format !== 'vmdk' || layout.parentCid === NO_PARENT) return;
  const wanted = layout.parentCid.toString(16);
  if (parent === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_BACKING_MISSING',
      `'${path}' holds the changes to a parent (CID ${wanted}), but its descriptor does not name it; add parentFileNameHint="NAME" to it`,
    );
  }
  if (!('layout' in parent) || parent.layout.format !== 'vmdk' || parent.layout.cid === layout.parentCid)
    return;
  throw corrupt(
    path,
    `its parent '${parent.path}' has changed since: its CID is ${parent.layout.cid.toString(16)}, and should be ${wanted}`,
  );
}

/**
 * The node of an opened image.
 *
 * @param extents the further files it asked for, by index
 */
export function foreignDescriptor(
  opened: OpenedForeign,
  file: StorageDescriptor,
  extents: readonly StorageDescriptor[],
  backing: NodeDescriptor | undefined,
): ForeignDescriptor {
  const { name, layout, length, clusterSize, backingFile } = opened;
  return {
    driver: name,
    path: file.path,
    readOnly: true,
    file,
    extents,
    backing,
    backingFile,
    // A parent is of the same kind.
    backingFormat: backingFile === undefined ? undefined : name,
    length,
    clusterSize,
    layout,
  };
}

/** This thread's facade of an open image. */
export function attachForeign(
  runtime: Runtime,
  descriptor: ForeignDescriptor,
  backing: BlockNode | undefined,
): BlockNode {
  const nodes = [descriptor.file, ...descriptor.extents].map((file) => attachFile(runtime, file));
  const { sources, locator } = layoutOn(runtime, descriptor, nodes);
  return new ForeignNode(runtime, descriptor, nodes, sources, locator, backing);
}

function layoutOn(
  { arena }: Runtime,
  { layout }: ForeignDescriptor,
  files: readonly FileNode[],
): { readonly sources: readonly Source[]; readonly locator: Locator } {
  const [file] = files;
  if (file === undefined) throw new Error('invariant: an image has a file');
  switch (layout.format) {
    case 'vmdk':
      return { sources: files, locator: new VmdkLocator(layout, files) };
    case 'vhdx': {
      const source = vhdxSource(arena, layout, file);
      return { sources: [source], locator: new VhdxLocator(layout, source) };
    }
    case 'vpc':
      return { sources: files, locator: new VpcLocator(layout, file) };
    case 'vdi':
      return { sources: files, locator: new VdiLocator(layout, file) };
  }
}
