import { combineNames } from '../block/graph.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import type { GraphNode } from './graph-node.js';
import { nbdFilename } from './nbd-names.js';

/**
 * The name by which people know a node and can open it again: that of the file at its bottom, as it was given; `json:` and
 * options where that alone would open something else.
 */
export function filenameOf(node: GraphNode): string {
  const { filename } = node.options;
  if (typeof filename === 'string') return filename;
  const [child] = node.children;
  const plain =
    child === undefined
      ? (nbdFilename(node.options) ?? withoutSettings(node.descriptor.path))
      : filenameOf(child.node);
  if (NAMED_AS_BELOW.has(node.driver) || node.job?.isUnnamed === true) return plain;
  return needsOptions(node, plain) ? `json:${spacedJson(optionsToOpen(node))}` : plain;
}

/** Filters that go by the name of what is below them. */
const NAMED_AS_BELOW: ReadonlySet<string> = new Set(['copy-before-write', 'mirror_top', 'commit_top']);

const NULL: ReadonlySet<string> = new Set(['null-co', 'null-aio']);

/** @param filename of the node below, or of the node itself where nothing is below it */
function needsOptions(node: GraphNode, filename: string): boolean {
  if (filename.startsWith('json:')) return true;
  if (NULL.has(node.driver))
    return node.options['size'] !== undefined || node.options['read-zeroes'] !== undefined;
  switch (node.driver) {
    case 'raw':
      return node.options['offset'] !== undefined || node.options['size'] !== undefined;
    case 'throttle':
    case 'copy-on-read':
      return true;
    default:
      return hasOtherBacking(node, filename);
  }
}

/** What QEMU calls an overridden backing file. @param filename of the node's own file */
export function hasOtherBacking({ driver, descriptor, children }: GraphNode, filename: string): boolean {
  if (driver !== 'qcow2' || descriptor.driver !== 'qcow2') return false;
  const { backingFile: named } = descriptor;
  const backing = children.find(({ role }) => role === 'backing')?.node;
  if (named === undefined || backing === undefined) return (named === undefined) !== (backing === undefined);
  const name = filenameOf(backing);
  return name !== named && name !== combineNames(filename, named);
}

/** Members in the order in which QEMU has them. */
function optionsToOpen(node: GraphNode): JsonObject {
  const { driver, children, options } = node;
  const [child] = children;
  if (child === undefined && NULL.has(driver)) {
    const { size, 'read-zeroes': zeroes } = options;
    return defined({ 'read-zeroes': zeroes, driver, size });
  }
  if (child === undefined)
    return { driver, filename: options['filename'] ?? withoutSettings(node.descriptor.path) };
  const file = optionsToOpen(child.node);
  const backing = children.find(({ role }) => role === 'backing')?.node;
  const { offset, size, 'throttle-group': group } = options;
  return defined({
    'throttle-group': driver === 'throttle' ? group : undefined,
    offset: driver === 'raw' ? offset : undefined,
    backing: hasOtherBacking(node, filenameOf(child.node))
      ? backing === undefined
        ? null
        : optionsToOpen(backing)
      : undefined,
    driver,
    size: driver === 'raw' ? size : undefined,
    file,
  });
}

function defined(options: JsonObject): JsonObject {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}

/** An NBD URI as far as it says what is opened, and not how. */
function withoutSettings(path: string): string {
  const at = path.indexOf('?');
  if (at < 0 || !path.startsWith('nbd')) return path;
  const kept = path
    .slice(at + 1)
    .split('&')
    .filter((one) => !one.startsWith('x-'));
  return kept.length === 0 ? path.slice(0, at) : `${path.slice(0, at)}?${kept.join('&')}`;
}

/** As QEMU writes it. */
function spacedJson(value: unknown): string {
  if (!isObject(value)) return JSON.stringify(value);
  const members = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${spacedJson(one)}`);
  return `{${members.join(', ')}}`;
}
