import type { NodeInfo } from '../block/info.js';
import type { Engine } from '../index.js';
import type { JsonObject } from '../qmp/types.js';
import { isObject } from '../qmp/types.js';
import { describeGraph, deviceUser, exportUser, type GraphUser, jobUsers } from './block-graph.js';
import type { Exports } from './exports.js';
import { filenameOf } from './filenames.js';
import type { Graph } from './graph.js';
import type { GraphNode, Held } from './graph-node.js';
import { FORMATS } from './permissions.js';

const NO_LIMITS = { bps: 0, bps_rd: 0, bps_wr: 0, iops: 0, iops_rd: 0, iops_wr: 0 };

const NO_STATISTICS = {
  unmap_operations: 0,
  unmap_merged: 0,
  flush_total_time_ns: 0,
  wr_highest_offset: 0,
  wr_total_time_ns: 0,
  failed_wr_operations: 0,
  failed_rd_operations: 0,
  wr_merged: 0,
  wr_bytes: 0,
  timed_stats: [],
  failed_unmap_operations: 0,
  failed_flush_operations: 0,
  account_invalid: false,
  rd_total_time_ns: 0,
  invalid_unmap_operations: 0,
  flush_operations: 0,
  wr_operations: 0,
  unmap_bytes: 0,
  rd_merged: 0,
  rd_bytes: 0,
  unmap_total_time_ns: 0,
  invalid_flush_operations: 0,
  account_failed: false,
  rd_operations: 0,
  invalid_wr_operations: 0,
  invalid_rd_operations: 0,
};

/** Drivers whose nodes show what lies below them, and nothing of their own. */
const FILTERS = [
  ...['throttle', 'compress', 'copy-before-write', 'copy-on-read', 'preallocate', 'blkdebug'],
  ...['mirror_top', 'commit_top'],
];

/** Drivers that say nothing of how an image is kept. */
const UNTOLD = ['snapshot-access', 'nbd', 'null-co', 'null-aio'];

/** Whether it is known how the image is kept: of what passes requests on, that of what is below. */
function isTold({ driver, children: [child] }: GraphNode): boolean {
  if (UNTOLD.includes(driver)) return false;
  return child === undefined || FORMATS.has(driver) || isTold(child.node);
}

/** What a node shows where it has nothing of its own. */
function backingOf(node: GraphNode): GraphNode | undefined {
  const filtered = FILTERS.includes(node.driver);
  const child = node.children.find(({ role }) =>
    filtered ? role === 'file' || role === 'image' : role === 'backing',
  )?.node;
  return child === undefined || node.job !== undefined ? child : covered(child);
}

/** What those above a node find in its place: the filters that jobs have put there. */
function covered(node: GraphNode): GraphNode {
  const filter = [...node.parents].find(
    (parent) => parent.job !== undefined && parent.children[0]?.node === node,
  );
  return filter === undefined ? node : covered(filter);
}

/** A bitmap that a filter has for itself. */
function ofFilter({ granularity }: Held, count: number): object {
  return { count, granularity, recording: false, busy: false, persistent: false };
}

/** What monitors can ask of a graph (QAPI `BlockDeviceInfo` and others). */
export class Queries {
  readonly #engine: Engine;
  readonly #graph: Graph;
  readonly #exports: Exports;

  constructor(engine: Engine, graph: Graph, exports: Exports) {
    this.#engine = engine;
    this.#graph = graph;
    this.#exports = exports;
  }

  /** `query-named-block-nodes`. @param flat without the images of backing files in those on top */
  async nodes(flat: boolean): Promise<object[]> {
    return await Promise.all(this.#graph.all().map((node) => this.#node(node, flat)));
  }

  async #node(node: GraphNode, flat: boolean): Promise<object> {
    const { cache, 'detect-zeroes': detectZeroes = 'off' } = node.options;
    const bitmaps = await this.#bitmaps(node);
    const backing = backingOf(node);
    let depth = 0;
    for (let below = backing; below !== undefined && !flat; below = backingOf(below)) depth++;
    const flags: JsonObject = isObject(cache) ? cache : {};
    return {
      ...NO_LIMITS,
      detect_zeroes: detectZeroes,
      image: await this.#image(node, flat),
      ro: node.descriptor.readOnly,
      'node-name': node.name,
      backing_file_depth: depth,
      drv: node.driver,
      write_threshold: node.marks?.threshold ?? 0,
      ...(backing === undefined || FILTERS.includes(node.driver)
        ? {}
        : { backing_file: filenameOf(backing) }),
      ...(bitmaps.length === 0 ? {} : { 'dirty-bitmaps': bitmaps }),
      encrypted: false,
      cache: {
        'no-flush': flags['no-flush'] === true,
        direct: flags['direct'] === true,
        writeback: true,
      },
      file: filenameOf(node),
    };
  }

  /** `dirty-bitmaps` of a node, those that were added last first. */
  async #bitmaps(node: GraphNode): Promise<object[]> {
    const { held, job } = node;
    if (job !== undefined && held === undefined) return [];
    if (held !== undefined) {
      const { access, done } = held.counts();
      return [access, done].map((count) => ofFilter(held, count));
    }
    // What is still to be copied is with the node below the filter.
    const filters = this.#graph
      .all()
      .flatMap(({ held: of, origin, children: [child] }) =>
        of !== undefined && (origin ?? child?.node) === node ? of : [],
      );
    const copies = filters.map((filter) => ofFilter(filter, filter.counts().copy));
    return [...copies, ...(await this.#ownBitmaps(node))];
  }

  async #ownBitmaps(node: GraphNode): Promise<object[]> {
    // Only what a disk was made of has any, and images that keep some.
    if (node.disk === undefined && node.driver !== 'qcow2') return [];
    const disk = await this.#graph.disk(node);
    const list = (await disk.bitmaps()).reverse();
    return list.map(({ name, inconsistent, ...rest }) => ({
      ...(name === '' ? {} : { name }),
      ...rest,
      ...(inconsistent ? { inconsistent } : {}),
    }));
  }

  async #image(node: GraphNode, flat: boolean): Promise<object> {
    const filename = filenameOf(node);
    const backing = flat ? undefined : backingOf(node);
    const nested = backing === undefined ? {} : { 'backing-image': await this.#image(backing, flat) };
    const info = await this.#engine.run<NodeInfo>({ kind: 'node-info', node: node.descriptor, filename });
    const told = isTold(node) ? { 'dirty-flag': false } : {};
    if (info.image !== undefined && node.driver === info.image.format) {
      return { ...nested, ...told, ...info.image };
    }
    return {
      ...nested,
      'virtual-size': Math.ceil(info.length / 512) * 512,
      filename,
      ...(info.clusterSize === undefined ? {} : { 'cluster-size': info.clusterSize }),
      format: node.driver,
      ...(info.allocated === undefined ? {} : { 'actual-size': info.allocated }),
      ...told,
    };
  }

  /** `query-block`: the nodes that are devices. */
  async devices(): Promise<object[]> {
    const devices = this.#graph.all().filter(({ device }) => device !== undefined);
    return await Promise.all(
      devices.reverse().map(async (node) => ({
        device: node.device,
        type: 'unknown',
        // As of a drive that no guest has.
        removable: true,
        locked: false,
        inserted: await this.#node(node, false),
      })),
    );
  }

  /** `x-debug-query-block-graph` */
  blockGraph(): object {
    const nodes = this.#graph.all().reverse();
    return describeGraph(this.users(), nodes);
  }

  /** Devices, exports and jobs, that use nodes. */
  users(): GraphUser[] {
    const nodes = this.#graph.all().reverse();
    const devices = nodes.flatMap((node) => (node.device === undefined ? [] : deviceUser(node.device, node)));
    const exported = this.#exports.all().map(({ node, writable }) => exportUser(node, writable));
    return [...devices, ...exported, ...jobUsers(nodes)];
  }

  /** `query-blockstats`. @param nodes of every node, and not of devices with all that is below them */
  statistics(nodes: boolean): object[] {
    if (nodes) {
      return this.#graph
        .all()
        .reverse()
        .map((node) => statisticsOf(node, false));
    }
    const devices = this.#graph.all().filter(({ device }) => device !== undefined);
    return devices.reverse().map((node) => {
      const { stats, ...rest } = statisticsOf(node, true);
      return {
        device: node.device,
        ...rest,
        stats: { ...stats, account_failed: true, account_invalid: true },
      };
    });
  }
}

/** @param chain with what a filter passes requests on to, or the backing file */
function statisticsOf(
  node: GraphNode,
  chain: boolean,
): { readonly stats: object; readonly [member: string]: unknown } {
  const parent = node.children.find(
    ({ role }) => role === 'file' || role === 'image' || role === 'data-file',
  )?.node;
  const backing = chain ? backingOf(node) : undefined;
  return {
    'node-name': node.name,
    stats: { ...NO_STATISTICS, wr_highest_offset: node.marks?.highest ?? 0 },
    ...driverStatistics(node),
    ...(parent === undefined ? {} : { parent: statisticsOf(parent, chain) }),
    ...(backing === undefined ? {} : { backing: statisticsOf(backing, chain) }),
  };
}

function driverStatistics({ driver, marks }: GraphNode): object {
  if (marks === undefined || (driver !== 'file' && driver !== 'host_device')) return {};
  const { done, failed, bytes } = marks.discards;
  return {
    'driver-specific': {
      driver,
      'discard-bytes-ok': bytes,
      'discard-nb-ok': done,
      'discard-nb-failed': failed,
    },
  };
}
