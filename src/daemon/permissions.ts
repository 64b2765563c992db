import { QmpError } from '../qmp/errors.js';
import type { GraphNode } from './graph.js';

/*
 * What QEMU's permissions and operation blockers keep from happening, in its words. Who has something on a node says what
 * others may do with it: an image with its file, an export and a job with their drives.
 */

const ANONYMOUS = 'an unnamed block device';

/** @param by who does not share it */
function conflict(node: GraphNode, permission: string, by: string): QmpError {
  const user = `${ANONYMOUS} (uses node '${node.name}' as 'root' child)`;
  return new QmpError(
    `Permission conflict on node '${node.name}': permissions '${permission}' are both required by ${user} and unshared by ${by}.`,
  );
}

/** Formats whose files are theirs alone. */
const FORMATS: ReadonlySet<string> = new Set(['qcow2', 'vmdk', 'vhdx', 'vpc', 'vdi']);

/** The node that has this one as its backing file. */
function overlayOf(node: GraphNode): GraphNode | undefined {
  return [...node.parents].find(({ children }) =>
    children.some((child) => child.node === node && child.role === 'backing'),
  );
}

/** @throws QmpError where a job works on the node, or an image lies on it */
export function checkUnblocked(node: GraphNode): void {
  const overlay = overlayOf(node);
  if (overlay !== undefined) {
    throw new QmpError(`Node '${node.name}' is busy: node is used as backing hd of '${overlay.name}'`);
  }
  const filtered = [...node.parents].some(({ job }) => job !== undefined);
  for (const use of [...node.users.values(), ...(filtered ? ['source'] : [])]) {
    if (use !== 'export') {
      throw new QmpError(`Node '${node.name}' is busy: block device is in use by block job: backup`);
    }
  }
}

/**
 * @param device as the command names it
 * @param filter name of the filter of a job that copies from the node
 * @throws QmpError where the size of the node is not to be changed
 */
export function checkResizable(
  node: GraphNode,
  device: string | undefined,
  filter: string | undefined,
): void {
  const uses = [...node.users.values()];
  if (overlayOf(node) !== undefined || uses.includes('target') || node.job !== undefined)
    throw new QmpError(`Device '${device ?? '(null)'}' is in use`);
  if (node.descriptor.readOnly) throw new QmpError('Image is read-only');
  for (const parent of node.parents) {
    const role = parent.children.find((child) => child.node === node)?.role ?? 'file';
    if (!FORMATS.has(parent.driver)) continue;
    throw conflict(node, 'resize', `node '${parent.name}' (uses node '${node.name}' as '${role}' child)`);
  }
  if (filter !== undefined || uses.includes('source')) {
    throw conflict(node, 'resize', `node '${filter ?? '#block'}' (uses node '${node.name}' as 'file' child)`);
  }
  if (uses.includes('export')) {
    throw conflict(node, 'resize', `${ANONYMOUS} (uses node '${node.name}' as 'root' child)`);
  }
}
