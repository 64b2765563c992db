import { QmpError } from '../qmp/errors.js';
import type { GraphNode } from './graph-node.js';
import { asChild, asRoot, asUser, conflict, FORMATS, roleOf } from './permissions.js';

/*
 * The nodes below an image that is written to are its own (QEMU: it has 'write' and 'resize' on its child 'file', and so
 * has every filter in between): it writes there past what others would see, and makes them longer.
 */

type Used = 'written' | 'read';

/** The nodes that lie on one and write to it: no overlays, and no filters of jobs. */
function writersOf(node: GraphNode): GraphNode[] {
  return [...node.parents].filter((parent) => {
    const role = roleOf(parent, node);
    return parent.job === undefined && role !== 'backing' && role !== 'target';
  });
}

/** What a node that is no image passes requests on to. */
function passedTo(node: GraphNode): GraphNode | undefined {
  if (FORMATS.has(node.driver)) return undefined;
  return node.children.find(({ role }) => role === 'file' || role === 'image')?.node;
}

/** The node on this one through which an image that is written to makes it longer. */
export function lengthenerOf(node: GraphNode): GraphNode | undefined {
  return writersOf(node).find((parent) =>
    FORMATS.has(parent.driver) ? !parent.descriptor.readOnly : lengthenerOf(parent) !== undefined,
  );
}

/** @throws QmpError where a job, a bitmap or an instant on the node would not see all that an image writes to it */
export function checkWhole(node: GraphNode): void {
  const image = lengthenerOf(node);
  if (image === undefined) return;
  throw new QmpError(
    `Node '${node.name}' belongs to an image on '${image.name}' that is written to: use the node of the image`,
  );
}

/**
 * @param user who wants it, and as what, as QEMU says it
 * @throws QmpError where the node is below an image, whose length must not change under who exports it
 */
export function checkSameLength(node: GraphNode, user: string): void {
  const image = lengthenerOf(node);
  if (image !== undefined)
    throw conflict(node, 'resize', user, asChild(image.name, node, roleOf(image, node)));
}

/** @throws QmpError where what a node that is about to be exported, or written to by a job, passes requests on to is below an image */
export function checkUsableBelow(exported: GraphNode, writable: boolean): void {
  for (let above = exported; ; ) {
    const node = passedTo(above);
    if (node === undefined) return;
    const image = writersOf(node).find((one) => one !== above && isOrLeadsToImage(one));
    if (image !== undefined) {
      const [own, other] = [asChild(above.name, node), asChild(image.name, node, roleOf(image, node))];
      if (writable) throw conflict(node, 'write', other, own);
      if (image === lengthenerOf(node)) throw conflict(node, 'resize', own, other);
    }
    above = node;
  }
}

function isOrLeadsToImage(node: GraphNode): boolean {
  return FORMATS.has(node.driver) || lengthenerOf(node) !== undefined;
}

/**
 * @param name of the image that is to lie on the node
 * @throws QmpError where somebody keeps it from having the node, and what is below it, for itself
 */
export async function checkImageFile(name: string, file: GraphNode, readOnly: boolean): Promise<void> {
  let user = name;
  for (let node: GraphNode | undefined = file; node !== undefined; node = passedTo(node)) {
    const own = asChild(user, node);
    const direct = node === file;
    if (direct) checkNobodyWrites(node, own, user);
    checkNoOtherImage(node, own, user, readOnly);
    if (!readOnly) {
      checkNobodyHolds(node, own, user, direct);
      await checkNoBitmaps(node);
    }
    user = node.name;
  }
}

async function checkNoBitmaps(node: GraphNode): Promise<void> {
  const bitmaps = await (await node.disk)?.bitmaps();
  if (FORMATS.has(node.driver) || bitmaps === undefined || bitmaps.length === 0) return;
  throw new QmpError(
    `Node '${node.name}' has dirty bitmaps, which do not see all that an image on it writes: remove them first`,
  );
}

function checkNobodyWrites(node: GraphNode, own: string, user: string): void {
  for (const [{ job, filter, writable }, use] of node.users) {
    const isMirrored = job === 'mirror' && use === 'target';
    if (isMirrored || writable === true) throw conflict(node, 'write', own, asRoot(node));
    if (job !== 'backup' || use !== 'target') continue;
    throw conflict(node, 'write', own, asChild(filter?.() ?? '', node, 'target'));
  }
  for (const parent of node.parents) {
    if (parent.name === user || FORMATS.has(parent.driver)) continue;
    if (usedThrough(parent) === 'written') throw conflict(node, 'write', own, asChild(parent.name, node));
  }
}

/** Two images may share a node where neither of them is written to. Who came last is who does not share, to QEMU. */
function checkNoOtherImage(node: GraphNode, own: string, user: string, readOnly: boolean): void {
  const between = [...node.parents].find(({ name }) => name === user);
  for (const parent of writersOf(node)) {
    const use = parent.name === user ? undefined : imageUse(parent);
    if (use === undefined) continue;
    const other = asChild(parent.name, node, roleOf(parent, node));
    const isOlder = between === undefined || between.sequence > parent.sequence;
    if (use === 'written' && (isOlder || readOnly)) throw conflict(node, 'write, resize', own, other);
    if (!readOnly) throw conflict(node, 'write, resize', other, own);
  }
}

/** What a node that is an image, or that images lie on, does with what is below it. */
function imageUse(node: GraphNode): Used | undefined {
  if (FORMATS.has(node.driver)) return node.descriptor.readOnly ? 'read' : 'written';
  const uses = writersOf(node).map(imageUse);
  return uses.find((use) => use === 'written') ?? uses.find((use) => use === 'read');
}

function checkNobodyHolds(node: GraphNode, own: string, user: string, direct: boolean): void {
  const wanted = (by: string, permissions = 'resize'): QmpError => conflict(node, permissions, by, own);
  for (const [{ job, id, filter }, use] of node.users) {
    if (use === 'export') throw wanted(asRoot(node));
    if (job === 'backup' && use === 'target') throw wanted(asChild(filter?.() ?? '', node, 'target'));
    if (job !== 'mirror') continue;
    if (use === 'target') throw wanted(asRoot(node), 'consistent read, write, resize');
    throw wanted(asUser(`mirror job '${id ?? ''}'`, node, 'source'));
  }
  for (const parent of node.parents) {
    if (parent.name === user) continue;
    const role = roleOf(parent, node);
    const by = asChild(parent.name, node, role);
    if (parent.job !== undefined) {
      if (direct && parent.job.type === 'backup') throw wanted(by, 'write, resize');
    } else if (role !== 'backing') {
      if (parent.frozen !== undefined && direct) {
        throw new QmpError(`Node '${parent.name}' holds an instant of '${node.name}'`);
      }
      if (usedThrough(parent) !== undefined) throw wanted(by, isCopied(parent) ? 'write, resize' : 'resize');
      if (lengthenerOf(node) === parent) throw conflict(node, 'write, resize', own, by);
    }
  }
}

/** By exports and jobs of a node, and of those that pass requests on to it. */
function usedThrough(node: GraphNode): Used | undefined {
  const uses = [...node.users];
  const above = FORMATS.has(node.driver) ? [] : writersOf(node).map(usedThrough);
  const isWritten = uses.some(([{ writable }, use]) => writable === true || use === 'target');
  if (isWritten || above.includes('written')) return 'written';
  return uses.length > 0 || isCopied(node) || above.includes('read') ? 'read' : undefined;
}

/** Whether a backup copies from the node. */
function isCopied(node: GraphNode): boolean {
  return [...node.parents].some(({ job }) => job?.type === 'backup');
}
