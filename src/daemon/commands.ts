import type { Preallocation } from '../block/qcow2/index.js';
import type { BackupHandle } from '../engine/backup.js';
import type { DiskHandle } from '../engine/disk.js';
import type { Engine, TransactionItem } from '../engine/engine.js';
import type { FrozenDisk } from '../engine/frozen-disk.js';
import type { JobHandle } from '../engine/job.js';
import { ALL_PERMISSIONS, CONSISTENT_READ, RESIZE, WRITE } from '../os/image-lock.js';
import { QmpError, qmpText } from '../qmp/errors.js';
import type { Handlers, QmpEvent } from '../qmp/monitor.js';
import type { ArgumentsOf, ArgumentsOfAction } from '../qmp/schema.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import { Backups, checkTops, distinct, type Prepared, targetError } from './backups.js';
import { checkTaken, checkUnshared } from './block-graph.js';
import { ChainJobs } from './chain-jobs.js';
import { Chardevs } from './chardevs.js';
import { Commits } from './commits.js';
import { Exports } from './exports.js';
import { type Release, whileClaimed } from './file-locks.js';
import { Graph } from './graph.js';
import { GraphChanges } from './graph-changes.js';
import type { GraphNode } from './graph-node.js';
import { humanMonitorCommand } from './human-monitor.js';
import { createFile, createQcow2 } from './image-creation.js';
import { checkWhole, lengthenerOf } from './image-files.js';
import { InternalSnapshots } from './internal-snapshots.js';
import { Jobs } from './jobs.js';
import { Mirrors } from './mirrors.js';
import { Objects } from './objects.js';
import { checkResizable, filterOver } from './permissions.js';
import { QemuIo } from './qemu-io.js';
import { listProperties, listTypes, Qom } from './qom.js';
import { Queries } from './query.js';
import { reopenNodes } from './reopen.js';
import { Snapshots } from './snapshots.js';
import { WriteThresholds } from './write-thresholds.js';

/** How a daemon is set up. */
export interface DaemonOptions {
  /** Takes an event to every monitor. */
  readonly tell: (event: QmpEvent) => void;
  /** Ends the program, a little later. */
  readonly quit: () => void;
  /** Folders from which image headers may open files; default: each image's own. */
  readonly allowBacking?: readonly string[] | undefined;
  /** Backup jobs end as QEMU's do where ours are stricter. Default false. */
  readonly qemuCompat?: boolean | undefined;
}

/** What monitors control: nodes, jobs, bitmaps, exports and objects, with QEMU's commands. */
export class Daemon {
  readonly graph: Graph;
  readonly jobs: Jobs;
  readonly exports: Exports;
  readonly objects: Objects;
  readonly chardevs = new Chardevs();
  readonly handlers: Handlers;
  readonly #engine: Engine;
  readonly #queries: Queries;
  readonly #backups: Backups;
  readonly #changes: GraphChanges;
  readonly #snapshots: Snapshots;
  readonly #internal: InternalSnapshots;
  readonly #mirrors: Mirrors;
  readonly #chains: ChainJobs;
  readonly #commits: Commits;
  readonly #tell: (event: QmpEvent) => void;
  readonly #frozen = new Map<string, { readonly frozen: FrozenDisk; readonly release: Release }>();
  #status: 'running' | 'paused' = 'running';

  constructor(engine: Engine, { tell, quit, allowBacking, qemuCompat = false }: DaemonOptions) {
    this.#engine = engine;
    this.#tell = tell;
    this.objects = new Objects(engine);
    this.graph = new Graph(engine, this.objects, allowBacking, () => this.#queries.users());
    this.jobs = new Jobs(tell, () => this.graph.locks.settle());
    this.exports = new Exports(engine, this.graph, this.objects, tell);
    this.#queries = new Queries(engine, this.graph, this.exports);
    this.#backups = new Backups(engine, this.graph, this.jobs, this.exports, qemuCompat);
    this.#changes = new GraphChanges(engine, this.graph, (from, to) => this.exports.moved(from, to));
    this.#snapshots = new Snapshots(engine, this.graph, this.#changes);
    this.#internal = new InternalSnapshots(engine, this.graph, this.#changes);
    this.#mirrors = new Mirrors(engine, this.graph, this.#changes, this.exports, this.jobs);
    this.#chains = new ChainJobs(engine, this.graph, this.#changes, this.exports, this.jobs);
    this.#commits = new Commits(this.graph, this.exports, this.#chains);
    const { graph, jobs, exports, objects, chardevs } = this;
    const thresholds = new WriteThresholds(graph, tell);
    const qom = new Qom(objects, () => chardevs.types());
    const io = new QemuIo(
      engine,
      graph,
      { out: (text) => process.stdout.write(text), errors: (text) => process.stderr.write(text) },
      {
        resize: (node, size, mode) => this.#resize({ 'node-name': node.name, size }, mode),
        reopen: (options) => reopenNodes(graph, objects, this.#changes, [options]),
      },
    );
    const edit = (node: string, action: Parameters<DiskHandle['editBitmap']>[0]): Promise<void> =>
      this.#editBitmap(node, action);
    const handlers: Handlers = {
      'query-status': () => ({
        status: this.#status,
        singlestep: false,
        running: this.#status === 'running',
      }),
      'query-jobs': () => jobs.list(),
      'query-block-jobs': () => jobs.listBlockJobs(),
      'query-block': () => this.#queries.devices(),
      'query-blockstats': (given) => this.#queries.statistics(given['query-nodes'] ?? false),
      'query-named-block-nodes': ({ flat = false }) => this.#queries.nodes(flat),
      'query-block-exports': () => exports.list(),
      stop: () => {
        this.#status = 'paused';
        tell({ event: 'STOP' });
      },
      cont: () => {
        this.#status = 'running';
        tell({ event: 'RESUME' });
      },
      quit: () => {
        quit();
      },
      'blockdev-add': async (given) => {
        const added = await graph.add(given);
        try {
          checkTaken(added, this.#queries.users());
        } catch (error) {
          await graph.remove(added.name);
          throw error;
        }
      },
      'blockdev-del': async ({ 'node-name': name }) => {
        const below = GraphChanges.nodesBelow(graph.get(name));
        await graph.remove(name);
        await this.#changes.settle(below);
      },
      'blockdev-reopen': ({ options }) => reopenNodes(graph, objects, this.#changes, options),
      'blockdev-snapshot': async (given) =>
        this.#start([{ snapshot: await this.#snapshots.prepare(given) }], false),
      'blockdev-snapshot-sync': async (given) =>
        this.#start([{ snapshot: await this.#snapshots.prepareFile(given) }], false),
      'blockdev-snapshot-internal-sync': async (given) =>
        this.#start([{ internal: await this.#internal.prepare(given) }], false),
      'blockdev-snapshot-delete-internal-sync': (given) => this.#internal.delete(given),
      'blockdev-create': (given) => this.#create(given),
      block_resize: (given) => this.#resize(given),
      'block-set-write-threshold': (given) => thresholds.set(given),
      'x-debug-query-block-graph': () => this.#queries.blockGraph(),
      'chardev-add': ({ id, backend }) => {
        chardevs.add(id, backend);
        return {};
      },
      'chardev-change': ({ id, backend }) => {
        chardevs.change(id, backend);
        return {};
      },
      'chardev-remove': ({ id }) => chardevs.remove(id),
      'chardev-send-break': ({ id }) => chardevs.sendBreak(id),
      'query-chardev': () => chardevs.query(),
      'query-chardev-backends': () => ['null', 'ringbuf', 'memory'].map((name) => ({ name })),
      'ringbuf-write': (given) => chardevs.writeRing(given.device, given.data, given.format ?? 'utf8'),
      'ringbuf-read': (given) => chardevs.readRing(given.device, given.size, given.format ?? 'utf8'),
      'x-blockdev-set-iothread': (given) => this.#setIothread(given['node-name'], given.iothread),
      'object-add': (given) => objects.add(given),
      'object-del': (given) => objects.remove(given.id),
      'qom-list': ({ path }) => qom.list(path),
      'qom-get': ({ path, property }) => qom.get(path, property),
      'qom-set': ({ path, property, value }) => qom.set(path, property, value),
      'qom-list-types': (given) => listTypes(given.implements, given.abstract ?? false),
      'qom-list-properties': ({ typename }) => listProperties(typename),
      'nbd-server-start': (given) => this.#startServer(given),
      'nbd-server-stop': () => exports.stop(),
      'nbd-server-add': (given) => exports.addDevice(given),
      'nbd-server-remove': ({ name, mode = 'safe' }) => exports.remove(name, mode === 'safe'),
      'block-export-add': (given) => exports.add(given),
      'block-export-del': (given) => exports.remove(given.id, (given.mode ?? 'safe') === 'safe'),
      'block-dirty-bitmap-add': ({ node, ...rest }) => edit(node, { action: 'add', ...rest }),
      'block-dirty-bitmap-remove': ({ node, name }) => edit(node, { action: 'remove', name }),
      'block-dirty-bitmap-clear': ({ node, name }) => edit(node, { action: 'clear', name }),
      'block-dirty-bitmap-enable': ({ node, name }) => edit(node, { action: 'enable', name }),
      'block-dirty-bitmap-disable': ({ node, name }) => edit(node, { action: 'disable', name }),
      'block-dirty-bitmap-merge': async (given) => {
        const { disk, edit: action } = await this.#merge(given);
        await disk.editBitmap(action);
      },
      'x-debug-block-dirty-bitmap-sha256': async ({ node, name }) => {
        const disk = await this.#diskOfBitmap(node);
        const sha256 = await engine.run<string>({ kind: 'bitmap-sha256', disk: disk.descriptor, name });
        return { sha256 };
      },
      transaction: (given) => this.#transaction(given),
      'drive-backup': async (given) => this.#start([await this.#backups.drive(given)], false),
      'blockdev-backup': async (given) => this.#start([await this.#backups.blockdev(given)], false),
      'drive-mirror': (given) => this.#mirrors.drive(given),
      'blockdev-mirror': (given) => this.#mirrors.blockdev(given),
      'block-stream': (given) => this.#chains.stream(given),
      'block-commit': (given) => this.#commits.start(given),
      'change-backing-file': (given) => this.#chains.changeBackingFile(given),
      'job-pause': ({ id }) => this.#pause(jobs.job(id, 'pause')),
      'job-resume': ({ id }) => this.#resume(jobs.job(id, 'resume')),
      'job-cancel': ({ id }) => this.#cancel(jobs.job(id, 'cancel')),
      'job-complete': ({ id }) => jobs.job(id, 'complete').complete(),
      'job-finalize': ({ id }) => this.#finalize(jobs.job(id, 'finalize')),
      'job-dismiss': ({ id }) => jobs.dismiss(id),
      'block-job-pause': ({ device }) => this.#pause(jobs.blockJob(device)),
      'block-job-resume': ({ device }) => this.#resume(jobs.blockJob(device)),
      'block-job-cancel': ({ device, force = false }) => this.#cancel(jobs.blockJob(device), force),
      'block-job-complete': ({ device }) => jobs.blockJob(device).complete(),
      'block-job-set-speed': ({ device, speed }) => jobs.setSpeed(device, speed),
      'block-job-finalize': ({ id }) => this.#finalize(jobs.blockJob(id)),
      'block-job-dismiss': ({ id }) => {
        jobs.blockJob(id);
        jobs.dismiss(id);
      },
      'human-monitor-command': (given) => humanMonitorCommand(graph, io, given['command-line']),
      'x-freeze': (given) => this.#freeze(given),
      'x-thaw': (given) => this.#thaw(given),
    };
    this.handlers = each(handlers, () => graph.locks.settle());
  }

  /** Ends everything: jobs, exports, nodes, objects. */
  async close(): Promise<void> {
    // Nobody could end what a breakpoint has suspended.
    this.graph.resumeAll();
    this.objects.unlimit();
    await this.jobs.close();
    try {
      // What is no export may be a client of one: it takes its leave first.
      await this.graph.close();
    } finally {
      for (const { frozen } of this.#frozen.values()) await frozen.close();
      await this.exports.close();
      try {
        await this.graph.close();
      } finally {
        this.objects.close();
      }
    }
  }

  /** A node by its name or that of its device, for a bitmap that is to be made. */
  async #bitmapDisk(
    name: string,
    {
      name: bitmap,
      persistent = false,
    }: { readonly name: string; readonly persistent?: boolean | undefined },
  ): Promise<DiskHandle> {
    const node = this.graph.lookUp(name);
    checkWhole(node);
    const disk = await this.graph.disk(node);
    const image = disk.descriptor.node;
    if (persistent && image.driver !== 'qcow2') {
      throw new QmpError(
        `Can't store persistent bitmaps to ${node.device ?? node.name}: Operation not supported`,
      );
    }
    if (persistent && image.driver === 'qcow2' && image.version === 2) {
      const why = 'Cannot store dirty bitmaps in qcow2 v2 files';
      throw new QmpError(`Can't make bitmap '${bitmap}' persistent in '${node.device ?? node.name}': ${why}`);
    }
    return disk;
  }

  /** The same for one that is there. */
  async #diskOfBitmap(name: string): Promise<DiskHandle> {
    const node = this.graph.find(name);
    if (node === undefined) throw new QmpError(`Node '${name}' not found`);
    return await this.graph.disk(node);
  }

  async #editBitmap(node: string, action: Parameters<DiskHandle['editBitmap']>[0]): Promise<void> {
    const disk =
      action.action === 'add' ? await this.#bitmapDisk(node, action) : await this.#diskOfBitmap(node);
    await disk.editBitmap(action);
  }

  async #merge({
    node,
    target,
    bitmaps,
  }: ArgumentsOfAction<'block-dirty-bitmap-merge'>): Promise<Extract<TransactionItem, { type: 'bitmap' }>> {
    const disk = await this.#diskOfBitmap(node);
    const sources = await Promise.all(
      bitmaps.map(async (source) =>
        typeof source === 'string'
          ? source
          : { disk: await this.#diskOfBitmap(source.node), name: source.name },
      ),
    );
    return { type: 'bitmap', disk, edit: { action: 'merge', name: target, sources } };
  }

  async #startServer(given: ArgumentsOf<'nbd-server-start'>): Promise<void> {
    const { addr, ...options } = given;
    const { type, data } = addr;
    await this.exports.start({ type, ...(isObject(data) ? data : {}) }, options);
  }

  /** Carries out what was prepared, all of it or nothing. */
  async #start(prepared: readonly Prepared[], grouped: boolean): Promise<void> {
    const wanted = prepared.flatMap(({ job }) => job ?? []);
    let told: Promise<void> = Promise.resolve();
    // At once: nothing of what they say is missed.
    const follow = (handles: readonly BackupHandle[]): void => {
      const jobs = handles.flatMap((handle, index) => {
        const job = wanted[index];
        if (job === undefined) return [];
        const over = prepared.find(({ snapshot }) => snapshot?.node === job.node)?.snapshot?.overlay;
        job.begun(handle, over ?? job.node);
        return { handle, options: job.options };
      });
      if (jobs.length > 0) told = this.jobs.add(jobs);
    };
    try {
      await this.#carryOut(prepared, grouped, follow);
    } catch (error) {
      await this.#giveUp(prepared);
      this.#backups.tellOfRefused(prepared, error);
      const [first] = prepared;
      throw prepared.length === 1 && first?.item !== undefined ? targetError(error, first.item) : error;
    }
    await told;
  }

  /** At one instant of all disks. @param follow is given the jobs when they are started */
  async #carryOut(
    prepared: readonly Prepared[],
    grouped: boolean,
    follow: (handles: readonly BackupHandle[]) => void,
  ): Promise<void> {
    const items = distinct(prepared).flatMap(({ item }) => item ?? []);
    const snapshots = prepared.flatMap(({ snapshot }) => snapshot ?? []);
    const internal = prepared.flatMap((one) => one.internal ?? []);
    if (snapshots.length === 0 && internal.length === 0) {
      follow(await this.#engine.transaction(items, { grouped }));
      return;
    }
    const nodes = new Set([...internal.map(({ node }) => node), ...Snapshots.nodesOf(snapshots)]);
    await this.#changes.change([...nodes], async (section) => {
      const rest = async (): Promise<void> => {
        for (const snapshot of snapshots) await this.#snapshots.commit(section, snapshot);
      };
      const within = { run: section.run.bind(section), rest };
      await this.#internal.during(section, internal, async () => {
        follow(await this.#engine.transaction(items, { grouped, section: within }));
      });
    });
    // An overlay that was made for what nobody uses is of no use to anybody.
    for (const snapshot of snapshots) await this.#snapshots.abandon(snapshot);
  }

  async #giveUp(prepared: readonly Prepared[]): Promise<void> {
    for (const { job, snapshot } of prepared) {
      await job?.options.onEnd?.();
      if (snapshot !== undefined) await this.#snapshots.abandon(snapshot);
    }
  }

  async #transaction({ actions, properties }: ArgumentsOf<'transaction'>): Promise<void> {
    const grouped = properties?.['completion-mode'] === 'grouped';
    const prepared: Prepared[] = [];
    for (const action of actions) {
      const type = String(action['type']);
      const data: JsonObject = isObject(action['data']) ? action['data'] : {};
      try {
        if (grouped && type !== 'drive-backup' && type !== 'blockdev-backup' && type !== 'abort') {
          throw new QmpError(
            `Action '${type}' does not support Transaction property completion-mode = grouped`,
          );
        }
        prepared.push(await this.#action(type, data));
        checkTops(prepared);
      } catch (error) {
        // Whatever is wrong with those before it comes first.
        prepared.push({ item: { type: 'abort', why: qmpText(error) } });
        break;
      }
    }
    await this.#start(prepared, grouped);
  }

  async #action(type: string, data: JsonObject): Promise<Prepared> {
    // The schema has said what the arguments of each are.
    const bitmap = async (action: 'remove' | 'clear' | 'enable' | 'disable'): Promise<Prepared> => {
      const { node, name } = data as ArgumentsOfAction<'block-dirty-bitmap-remove'>;
      return { item: { type: 'bitmap', disk: await this.#diskOfBitmap(node), edit: { action, name } } };
    };
    switch (type) {
      case 'abort':
        return { item: { type: 'abort' } };
      case 'block-dirty-bitmap-add': {
        const { node, ...rest } = data as ArgumentsOfAction<'block-dirty-bitmap-add'>;
        const disk = await this.#bitmapDisk(node, rest);
        return { item: { type: 'bitmap', disk, edit: { action: 'add', ...rest } } };
      }
      case 'block-dirty-bitmap-remove':
        return await bitmap('remove');
      case 'block-dirty-bitmap-clear':
        return await bitmap('clear');
      case 'block-dirty-bitmap-enable':
        return await bitmap('enable');
      case 'block-dirty-bitmap-disable':
        return await bitmap('disable');
      case 'block-dirty-bitmap-merge':
        return { item: await this.#merge(data as ArgumentsOfAction<'block-dirty-bitmap-merge'>) };
      case 'blockdev-snapshot':
        return { snapshot: await this.#snapshots.prepare(data as ArgumentsOfAction<'blockdev-snapshot'>) };
      case 'blockdev-snapshot-sync': {
        const given = data as ArgumentsOfAction<'blockdev-snapshot-sync'>;
        return { snapshot: await this.#snapshots.prepareFile(given) };
      }
      case 'blockdev-snapshot-internal-sync': {
        const given = data as ArgumentsOfAction<'blockdev-snapshot-internal-sync'>;
        return { internal: await this.#internal.prepare(given) };
      }
      case 'drive-backup':
        return await this.#backups.drive(data as ArgumentsOfAction<'drive-backup'>);
      case 'blockdev-backup':
        return await this.#backups.blockdev(data as ArgumentsOfAction<'blockdev-backup'>);
      default:
        throw new QmpError(`Parameter 'type' does not accept value '${type}'`);
    }
  }

  async #pause(job: JobHandle): Promise<void> {
    await this.jobs.settle(job, () => job.pause(), job.status === 'ready' ? 'standby' : 'paused');
  }

  async #resume(job: JobHandle): Promise<void> {
    await this.jobs.settle(job, () => job.resume(), job.status === 'standby' ? 'ready' : 'running');
  }

  async #finalize(job: JobHandle): Promise<void> {
    await this.jobs.settle(job, () => job.finalize(), this.jobs.lastStatus(job));
  }

  async #cancel(job: JobHandle, force = true): Promise<void> {
    if (job.paused && !force) {
      throw new QmpError(`The block job for device '${job.id}' is currently paused`);
    }
    const cancel = (): void => (force ? job.cancel() : job.cancelSoftly());
    // Any other one that runs answers before it ends.
    const atOnce = job.type === 'backup' || job.status === 'pending' || job.status === 'waiting';
    if (atOnce) await this.jobs.settle(job, cancel, this.jobs.lastStatus(job));
    else cancel();
  }

  /** QMP `blockdev-create` */
  #create(given: ArgumentsOf<'blockdev-create'>): void {
    const { 'job-id': id, options } = given;
    if (options['driver'] !== 'file' && options['driver'] !== 'qcow2') {
      throw new QmpError('Driver does not support blockdev-create');
    }
    this.jobs.checkFree(id);
    this.jobs.create(id, () =>
      options['driver'] === 'file'
        ? createFile(this.#engine, this.graph, options)
        : createQcow2(this.#engine, this.graph, options),
    );
  }

  /** Threads are shared out otherwise: a thread is only looked for. */
  #setIothread(name: string, thread: string | null): void {
    if (this.graph.get(name) === undefined)
      throw new QmpError(`Failed to find node with node-name='${name}'`);
    if (thread === null || this.objects.get(thread)?.type === 'iothread') return;
    throw new QmpError(`Cannot find iothread ${thread}`);
  }

  /** QMP `block_resize` */
  async #resize(given: ArgumentsOf<'block_resize'>, preallocation: Preallocation = 'off'): Promise<void> {
    const { size, device, 'node-name': nodeName } = given;
    const node = this.graph.findEither(device, nodeName);
    if (size < 0) throw new QmpError("Parameter 'size' expects a >0 size");
    checkResizable(node, device, filterOver(node)?.name, lengthenerOf(node)?.name);
    checkUnshared(node, ['resize']);
    if (node.driver === 'qcow2' && size % 512 !== 0) {
      throw new QmpError('The new size must be a multiple of 512');
    }
    await this.#checkPreallocation(node, size, preallocation);
    const [file] = node.driver === 'raw' ? node.children : [{ node }];
    if (file?.node.driver === 'nbd') {
      // An export stays as long as it is, and who wants less of it has that.
      if (size > (await this.graph.disk(node)).length) throw new QmpError('Cannot grow NBD nodes');
      return;
    }
    // Whoever looks at the file itself sees it as well.
    const nodes = [node, ...node.children.flatMap(({ role, node: child }) => (role === 'file' ? child : []))];
    const uses = [{ node, role: 'root', needed: RESIZE, shared: ALL_PERMISSIONS }];
    await whileClaimed(this.graph.locks.claim(uses), () =>
      this.#changes.change(nodes, (section) => this.#changes.resize(section, node, size, preallocation)),
    );
  }

  /** @throws QmpError where a node cannot have space ahead like that */
  async #checkPreallocation(node: GraphNode, size: number, preallocation: Preallocation): Promise<void> {
    if (preallocation === 'off') return;
    const isImage = node.driver === 'qcow2';
    if (!isImage && preallocation === 'metadata') {
      throw new QmpError('Unsupported preallocation mode: metadata');
    }
    if (size >= (await this.graph.disk(node)).length) return;
    throw new QmpError(
      isImage
        ? "Preallocation can't be used for shrinking an image"
        : 'Cannot use preallocation for shrinking files',
    );
  }

  async #freeze(given: ArgumentsOf<'x-freeze'>): Promise<void> {
    const { server } = this.exports;
    if (server === undefined) throw new QmpError('NBD server not running');
    const node = this.graph.lookUp(given.device);
    const disk = await this.graph.disk(node);
    const name = given.export;
    const shared = ALL_PERMISSIONS & ~(WRITE | RESIZE);
    // Nobody writes past it.
    const release = this.graph.locks.claim([{ node, role: 'root', needed: CONSISTENT_READ, shared }]);
    try {
      const frozen = await disk.freeze({
        scratch: given.scratch,
        onCbwError: given['on-cbw-error'],
        cbwTimeoutMs: (given['cbw-timeout'] ?? 0) * 1000,
      });
      try {
        await server.addExport({ disk: frozen, name });
      } catch (error) {
        await frozen.close();
        throw error;
      }
      this.#frozen.set(name, { frozen, release });
    } catch (error) {
      release();
      throw error;
    }
    this.exports.addFrozen(name, node);
  }

  async #thaw({ export: name }: ArgumentsOf<'x-thaw'>): Promise<void> {
    const held = this.#frozen.get(name);
    if (held === undefined) throw new QmpError(`no instant is exported as '${name}'`);
    this.#frozen.delete(name);
    this.exports.removeFrozen(name);
    await held.frozen.close();
    held.release();
    this.#tell({ event: 'BLOCK_EXPORT_DELETED', data: { id: name } });
  }
}

/** The same commands, each with `after` when it is over. */
function each(handlers: Handlers, after: () => void): Handlers {
  const all = Object.entries(handlers).map(([name, handler]) => {
    // Arguments are those of the command, whichever it is.
    const run = handler as (given: JsonObject) => unknown;
    return [
      name,
      async (given: JsonObject) => {
        try {
          return await run(given);
        } finally {
          after();
        }
      },
    ] as const;
  });
  return { ...handlers, ...Object.fromEntries(all) };
}
