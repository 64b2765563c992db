import { StillframeError } from '../errors.js';
import type { QmpClient } from '../qmp/client.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import { list } from './qemu.js';

/** A drive of a running QEMU. */
export interface Drive {
  /** As whoever asked for it calls it. */
  readonly device: string;
  /** The node that holds its data, below filters. */
  readonly node: string;
  /** Bytes. */
  readonly length: number;
  readonly filename: string;
  readonly readOnly: boolean;
  /** Its image can keep dirty bitmaps. */
  readonly keepsBitmaps: boolean;
  readonly bitmaps: readonly DriveBitmap[];
}

/** A dirty bitmap as QEMU tells of it (QAPI `BlockDirtyInfo`). */
export interface DriveBitmap {
  readonly name: string;
  /** Bytes. */
  readonly granularity: number;
  readonly recording: boolean;
  readonly busy: boolean;
  readonly persistent: boolean;
  readonly inconsistent: boolean;
}

/** Drivers that only pass requests on, with the names of the child they pass them on to. */
const FILTERS: Readonly<Record<string, string>> = {
  blkdebug: 'image',
  blklogwrites: 'file',
  commit_top: 'backing',
  compress: 'file',
  'copy-before-write': 'file',
  'copy-on-read': 'file',
  mirror_top: 'backing',
  preallocate: 'file',
  throttle: 'file',
};

/**
 * Finds drives by the names of their devices, by the ids of their devices in the guest, or by the names of their nodes.
 *
 * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_INVALID_ARGUMENT (the same drive twice, or none), …_QMP
 */
export async function findDrives(client: QmpClient, names: readonly string[]): Promise<Drive[]> {
  if (names.includes('')) {
    throw new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', 'say which drive: its name is empty');
  }
  const devices = await list(client, 'query-block');
  const nodes = await list(client, 'query-named-block-nodes', { flat: true });
  const below = await childrenOf(client, nodes);
  const drives = names.map((name) => findDrive(devices, nodes, below, name));
  for (const [index, { device, node }] of drives.entries()) {
    const first = drives.findIndex((other) => other.node === node);
    if (first !== index) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `'${drives[first]?.device}' and '${device}' are the same drive; name it once`,
      );
    }
  }
  return drives;
}

type Children = (node: string, child: string) => string | undefined;

function findDrive(
  devices: readonly JsonObject[],
  nodes: readonly JsonObject[],
  below: Children,
  device: string,
): Drive {
  const notFound = (what: string): StillframeError => new StillframeError('ERR_STILLFRAME_NOT_FOUND', what);
  // A device without an id of its own is told of by its path, below that of the one with the id.
  const path = `/machine/peripheral/${device}`;
  const found = devices.find(
    ({ device: name, qdev }) =>
      name === device || qdev === device || qdev === path || String(qdev).startsWith(`${path}/`),
  );
  const inserted = found?.['inserted'];
  if (found !== undefined && !isObject(inserted)) throw notFound(`the drive '${device}' has no medium`);
  const top = find(nodes, isObject(inserted) ? inserted['node-name'] : device);
  if (top === undefined) {
    const known = [...devices.map((one) => one['device']), ...nodes.map((one) => one['node-name'])].filter(
      (name) => typeof name === 'string' && name !== '' && !name.startsWith('#'),
    );
    throw notFound(
      `the QEMU has no drive '${device}'; it has ${known.length === 0 ? 'none' : known.join(', ')}`,
    );
  }
  const node = belowFilters(nodes, below, top);
  const image = isObject(node['image']) ? node['image'] : {};
  const bitmaps = node['dirty-bitmaps'];
  return {
    device,
    node: String(node['node-name']),
    length: Number(image['virtual-size']),
    filename: String(image['filename']),
    readOnly: node['ro'] === true,
    keepsBitmaps: node['drv'] === 'qcow2' && compatOf(image) !== '0.10' && node['ro'] !== true,
    bitmaps: Array.isArray(bitmaps) ? bitmaps.filter(isObject).map(bitmapOf) : [],
  };
}

/** A filter keeps no bitmap, and one that limits what the guest does would limit the backup as well. */
function belowFilters(nodes: readonly JsonObject[], below: Children, top: JsonObject): JsonObject {
  const child = FILTERS[String(top['drv'])];
  const lower = child === undefined ? undefined : find(nodes, below(String(top['node-name']), child));
  return lower === undefined ? top : belowFilters(nodes, below, lower);
}

function find(nodes: readonly JsonObject[], name: unknown): JsonObject | undefined {
  return name === undefined ? undefined : nodes.find((one) => one['node-name'] === name);
}

function compatOf(image: JsonObject): unknown {
  const specific = image['format-specific'];
  const data = isObject(specific) ? specific['data'] : undefined;
  return isObject(data) ? data['compat'] : undefined;
}

function bitmapOf(info: JsonObject): DriveBitmap {
  return {
    name: String(info['name'] ?? ''),
    granularity: Number(info['granularity']),
    recording: info['recording'] === true,
    busy: info['busy'] === true,
    persistent: info['persistent'] === true,
    inconsistent: info['inconsistent'] === true,
  };
}

/** What lies below nodes, as QEMU tells it: with them from 10.1 on, by a command for debugging before. */
async function childrenOf(client: QmpClient, nodes: readonly JsonObject[]): Promise<Children> {
  if (nodes.some((node) => Array.isArray(node['children']))) {
    return (name, child) => {
      const children = find(nodes, name)?.['children'];
      const edge = Array.isArray(children)
        ? children.filter(isObject).find((one) => one['child'] === child)
        : undefined;
      return typeof edge?.['node-name'] === 'string' ? edge['node-name'] : undefined;
    };
  }
  const graph = nodes.some((node) => FILTERS[String(node['drv'])] !== undefined)
    ? await client.execute('x-debug-query-block-graph').catch(ignoreMissingCommand)
    : undefined;
  const listOf = (key: string): JsonObject[] => {
    const found = isObject(graph) ? graph[key] : undefined;
    return Array.isArray(found) ? found.filter(isObject) : [];
  };
  const known = listOf('nodes');
  const edges = listOf('edges');
  return (name, child) => {
    const parent = known.find((one) => one['name'] === name && one['type'] === 'block-driver');
    const edge = edges.find((one) => one['parent'] === parent?.['id'] && one['name'] === child);
    const lower = known.find((one) => one['id'] === edge?.['child'])?.['name'];
    return typeof lower === 'string' ? lower : undefined;
  };
}

function ignoreMissingCommand(error: unknown): undefined {
  if (!(error instanceof StillframeError) || error.qmpClass !== 'CommandNotFound') throw error;
}
