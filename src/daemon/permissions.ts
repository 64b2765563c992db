import type { JobType } from '../engine/job.js';
import { QmpError } from '../qmp/errors.js';
import type { Child, GraphNode } from './graph-node.js';

/*
 * What QEMU's permissions and operation blockers keep from happening, in its words. Who has something on a node says what
 * others may do with it: an image with its file, an export and a job with their drives.
 */

const ANONYMOUS = 'an unnamed block device';

/** @param by who does not share it @param user who wants it */
export function conflict(node: GraphNode, permission: string, by: string, user = asRoot(node)): QmpError {
  return new QmpError(
    `Permission conflict on node '${node.name}': permissions '${permission}' are both required by ${user} and unshared by ${by}.`,
  );
}

/** Whoever uses a node, as QEMU says it. */
export function asUser(who: string, node: GraphNode, role: string): string {
  return `${who} (uses node '${node.name}' as '${role}' child)`;
}

/** A node that lies on another one. */
export function asChild(name: string, node: GraphNode, role = 'file'): string {
  return asUser(`node '${name}'`, node, role);
}

/** An export or a job that uses a node. */
export function asRoot(node: GraphNode): string {
  return asUser(ANONYMOUS, node, 'root');
}

/** What a node is to one that lies on it. */
export function roleOf(parent: GraphNode, node: GraphNode): Child['role'] {
  return parent.children.find((child) => child.node === node)?.role ?? 'file';
}

/** The filter of a job that lies on a node, if any: nobody may write past it. */
export function filterOver(node: GraphNode): GraphNode | undefined {
  return [...node.parents].find(({ job }) => job !== undefined);
}

/** The target of a mirror is nobody else's. @throws QmpError @param exported whether it is exported, to be written to or read */
export function checkMirrorTarget(node: GraphNode, exported: 'writable' | 'readable' | undefined): void {
  if (exported !== undefined) throw exportConflict(node, exported === 'writable');
  for (const parent of node.parents) {
    const role = roleOf(parent, node);
    const isRead = role === 'backing' || (FORMATS.has(parent.driver) && parent.descriptor.readOnly);
    const permissions = isRead ? 'consistent read' : 'consistent read, write, resize';
    throw conflict(node, permissions, asRoot(node), asChild(parent.name, node, role));
  }
}

/** @throws QmpError where the node is the target of a mirror, or a commit job has it for itself */
export function checkExportable(node: GraphNode, writable: boolean): void {
  for (const [{ job, id, resizes }, use] of node.users) {
    if (job === 'mirror' && use === 'target') throw exportConflict(node, writable);
    if (job !== 'commit') continue;
    if (use === 'target' && (writable || resizes === true)) {
      throw conflict(node, writable ? 'write' : 'resize', asRoot(node));
    }
    if (use !== 'intermediate') continue;
    if (writable && node.descriptor.readOnly) throw new QmpError('Cannot export read-only node as writable');
    const by = asUser(`commit job '${id}'`, node, 'intermediate node');
    throw conflict(node, writable ? 'consistent read, write' : 'consistent read', by);
  }
}

function exportConflict(node: GraphNode, writable: boolean): QmpError {
  return conflict(node, writable ? 'consistent read, write' : 'consistent read', asRoot(node));
}

/** Formats whose files are theirs alone. */
export const FORMATS: ReadonlySet<string> = new Set(['qcow2', 'vmdk', 'vhdx', 'vpc', 'vdi']);

/** The node that has this one as its backing file; of several the one that has had it for the shortest time. */
function overlayOf(node: GraphNode): GraphNode | undefined {
  return [...node.parents].findLast(({ children }) =>
    children.some((child) => child.node === node && child.role === 'backing'),
  );
}

/** The type of a job that uses a node itself. */
function ownJobOf(node: GraphNode): JobType | undefined {
  return [...node.users.keys()].find(({ job }) => job !== undefined)?.job;
}

/** The type of a job that works on a node. */
export function jobOf(node: GraphNode): JobType | undefined {
  return ownJobOf(node) ?? node.job?.type ?? filterOver(node)?.job?.type;
}

/** Whether a job reads or writes the node as nothing but a part of its work. */
export function isHeld(node: GraphNode): boolean {
  return [...node.users].some(
    ([{ job, top }, use]) =>
      (job === 'mirror' && use === 'target') || (job === 'commit' && (use === 'target' || top === node)),
  );
}

/** @throws QmpError where a job works on the node, or an image lies on it */
export function checkUnblocked(node: GraphNode): void {
  const [below] = node.children;
  if (node.job?.driver === 'commit_top' && below !== undefined) checkNoOverlay(node, below.node);
  const job = jobOf(node);
  if (job !== undefined) throw busyError(node.name, job);
  checkNoOverlay(node);
}

/** @param covered what overlays of the node have as their backing file */
function checkNoOverlay(node: GraphNode, covered = node): void {
  const overlay = overlayOf(covered);
  if (overlay === undefined) return;
  throw new QmpError(`Node '${node.name}' is busy: node is used as backing hd of '${overlay.name}'`);
}

/** @throws QmpError where the node cannot be removed. What a backup copies from is in its way as any child is, and no more */
export function checkRemovable(node: GraphNode): void {
  const over = filterOver(node)?.job?.type;
  const isSource =
    over === 'backup' && node.job === undefined && ![...node.users.values()].includes('target');
  if (isSource) checkNoOverlay(node);
  else checkUnblocked(node);
}

/**
 * @throws QmpError where nothing is to be put between the node and what lies on it. What a backup copies is the same
 *   through an overlay, but for one that goes by what the node has itself
 */
export function checkCoverable(node: GraphNode): void {
  const filters = [...node.parents].flatMap(({ job }) => job ?? []);
  const isCopied = filters.some(({ type }) => type === 'backup') && node.job === undefined;
  if (!isCopied) checkUnblocked(node);
  for (const { type, isTop } of filters) {
    if (type !== 'backup' || isTop === true) throw busyError(node.name, type);
  }
  const own = ownJobOf(node);
  if (own !== undefined) throw busyError(node.name, own);
  checkNoOverlay(node);
}

/**
 * A job's threads have its target, and what that lies on, open as they are.
 *
 * @throws QmpError where the node, or one that lies on it, is the target of a job
 */
export function checkReopenable(node: GraphNode): void {
  if ([...node.users.values()].includes('target')) throw busyError(node.name, jobOf(node) ?? 'backup');
  for (const parent of node.parents) checkReopenable(parent);
}

/** A job of that type works on the node. @param name of the node, or of the device that it is */
export function busyError(name: string, job: JobType): QmpError {
  return new QmpError(`Node '${name}' is busy: block device is in use by block job: ${job}`);
}

/**
 * @param device as the command names it
 * @param filter name of the filter of a job that copies from the node
 * @param lengthener name of the node through which an image makes it longer
 * @throws QmpError where the size of the node is not to be changed
 */
export function checkResizable(
  node: GraphNode,
  device: string | undefined,
  filter: string | undefined,
  lengthener: string | undefined,
): void {
  const uses = [...node.users.values()];
  const job = jobOf(node);
  const hasOwner = node.job !== undefined || (job !== undefined && job !== 'backup');
  if (overlayOf(node) !== undefined || uses.includes('target') || hasOwner)
    throw new QmpError(`Device '${device ?? '(null)'}' is in use`);
  if (node.descriptor.readOnly) throw new QmpError('Image is read-only');
  for (const parent of node.parents) {
    if (!FORMATS.has(parent.driver) && parent.name !== lengthener) continue;
    throw conflict(node, 'resize', asChild(parent.name, node, roleOf(parent, node)));
  }
  if (filter !== undefined || uses.includes('source')) {
    throw conflict(node, 'resize', asChild(filter ?? '#block', node));
  }
  if (uses.includes('export')) {
    throw conflict(node, 'resize', asRoot(node));
  }
}
