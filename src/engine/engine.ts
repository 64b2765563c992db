import { availableParallelism } from 'node:os';
import {
  MessageChannel,
  type MessagePort,
  receiveMessageOnPort,
  type Transferable,
} from 'node:worker_threads';
import { Piscina } from 'piscina';
import type { ConvertOptions } from '../backup/convert.js';
import type { AmendOptions } from '../block/amend.js';
import type { ImageCheck, Repaired } from '../block/check.js';
import type { ImageChecksum } from '../block/checksum.js';
import type { CommitOptions } from '../block/commit.js';
import { type CompareResult, compareResult, type Finding } from '../block/comparison.js';
import type { CreateImageOptions } from '../block/create.js';
import type { DiskDescriptor } from '../block/disk.js';
import type { BitmapAction } from '../block/edit-bitmap.js';
import type { SnapshotAction } from '../block/edit-snapshots.js';
import { interruptNode } from '../block/files.js';
import type { ImageFormat, ImageLayers, NamedImage } from '../block/graph.js';
import type { ImageInfo } from '../block/info.js';
import { MapBatch, type MapRange, type PackedMap } from '../block/map-batch.js';
import type { Measure, MeasureOptions } from '../block/measure.js';
import type { NodeDescriptor } from '../block/node.js';
import type { RepairMode, SnapshotSelector } from '../block/qcow2/index.js';
import type { RebaseOptions } from '../block/rebase.js';
import type { ResizeOptions } from '../block/resize.js';
import { closedError, StillframeError } from '../errors.js';
import { Team, type TeamMemory } from '../job/team.js';
import type { Arena } from '../kernels/arena.js';
import { createRuntime, type Runtime, type SharedRuntime } from '../kernels/runtime.js';
import { type BackupHandle, type InstantSection, startBackups } from './backup.js';
import { type BackupOptions, type DiskBitmapEdit, DiskHandle, plainEdit } from './disk.js';
import { NbdServer, type NbdServerOptions } from './nbd-server.js';
import type { Answer, Compared, ImageTask, Task, TeamMessage, ToolProgress } from './tasks.js';

export interface EngineOptions {
  /**
   * Size of the shared memory in bytes: the budget of everything that is in flight, cached or tracked.
   * Address space, not resident memory. Default 512 MiB.
   */
  readonly arenaBytes?: number;
  /** Threads a job copies with unless it says otherwise. Default: the processors, at most 4. */
  readonly workers?: number;
  /** Threads that serve requests on live disks. Default 4. */
  readonly requestThreads?: number;
}

/** How a tool or a disk opens an image. */
export interface ImageOptions {
  /** Probed from the first bytes when absent; a disk opened for writing must say `raw`. */
  readonly format?: ImageFormat | undefined;
  /** Folders from which image headers may open backing files. Default: the image's own folder. */
  readonly allowBacking?: readonly string[] | undefined;
  /** Read a qcow2 image as it is in one of its internal snapshots, named by id or name; only read-only. */
  readonly snapshot?: SnapshotSelector | undefined;
  /** Open although another program has the image open for writing (qemu-img's `-U`). Default false. */
  readonly forceShare?: boolean | undefined;
  /** What the image lies on where that is not what its name and its header say. */
  readonly layers?: ImageLayers | undefined;
}

export interface OpenDiskOptions extends Omit<ImageOptions, 'layers'> {
  /** Default false: the disk takes writes and keeps other writers out. */
  readonly readOnly?: boolean | undefined;
  /** Whether discards are passed down or dropped. Default `unmap`. */
  readonly discard?: 'unmap' | 'ignore' | undefined;
}

/** One action of {@link Engine.transaction}. */
export type TransactionItem =
  | { readonly type: 'backup'; readonly disk: DiskHandle; readonly options: BackupOptions }
  | { readonly type: 'bitmap'; readonly disk: DiskHandle; readonly edit: DiskBitmapEdit }
  /** Fails, and everything with it. @param why text of the error; default: that it was there to fail */
  | { readonly type: 'abort'; readonly why?: string | undefined };

export interface TransactionOptions {
  /** Backups succeed or fail together. Default false. */
  readonly grouped?: boolean | undefined;
  /** @internal It is a part of this section: its instant is that of what else is done there. */
  readonly section?: InstantSection | undefined;
}

type Started = Extract<TeamMessage, { readonly started: unknown }>['started'];

/** Of a checksum, in bytes: that of most backups, and the largest that there is. */
const DEFAULT_CLUSTER_SIZE = 64 * 1024;
const MAX_CLUSTER_SIZE = 2 * 1024 * 1024;

/** Called now and then with bytes done and bytes in all. */
export type OnProgress = (progress: ToolProgress) => void;

export interface CompareOptions {
  /** Sizes and allocation must agree too. Default false. */
  readonly strict?: boolean;
  readonly first?: ImageOptions;
  readonly second?: ImageOptions;
  /** Threads that compare. Default: those of the engine. */
  readonly workers?: number | undefined;
  /** Called now and then with bytes compared and bytes in all. */
  readonly onProgress?: OnProgress | undefined;
}

/** How {@link Engine.imageChecksum} reads an image. */
export interface ChecksumOptions extends ImageOptions {
  /** Bytes of a cluster: a power of two from 512 to 2 MiB. Default 65536, which backups have where their target has no larger ones. */
  readonly clusterSize?: number | undefined;
  /** Threads that read. Default: those of the engine. */
  readonly workers?: number | undefined;
  readonly onProgress?: OnProgress | undefined;
}

/** How {@link Engine.convertImage} reads its sources and what it makes of them. */
export interface ConvertImageOptions extends ConvertOptions {
  /** How the sources are opened. */
  readonly source?: ImageOptions | undefined;
  /** Threads that copy. Default: those of the engine. */
  readonly workers?: number | undefined;
  /** Ends the conversion; nothing is left of the target then. */
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: OnProgress | undefined;
  /** Takes a line for each thing that is worth a warning. */
  readonly onMessage?: ((line: string) => void) | undefined;
}

export interface CheckOptions extends Omit<ImageOptions, 'allowBacking' | 'layers'> {
  /**
   * What is put right: `leaks`, clusters that take space for nothing; `all`, whatever can be. Default: nothing, and the
   * image is only read. With it the image is opened for writing, also where it is marked corrupt.
   */
  readonly repair?: RepairMode | undefined;
  /** Takes the lines in which `qemu-img check` says what is wrong, as they are found. */
  readonly onMessage?: (line: string) => void;
  /** Called when something was repaired, before the image is checked again. */
  readonly onRepaired?: (repaired: Repaired) => void;
}

/** How {@link Engine.mapImage} opens an image, and which part of it it maps. */
export interface MapOptions extends ImageOptions, MapRange {}

/** Messages that have come to a port and that nobody has been told of. */
function takeLeft<T>(port: MessagePort): T[] {
  const left: T[] = [];
  for (;;) {
    const received: { readonly message: T } | undefined = receiveMessageOnPort(port);
    if (received === undefined) return left;
    left.push(received.message);
  }
}

/** Threads that jobs and tools may use at once. */
const MAX_JOB_THREADS = 64;
/** Threads that copy for guests with a time-out: two for every instant that has one. */
const MAX_GUEST_COPIES = 4096;
/** How long those without work stay, in milliseconds. */
const STAY_MS = 10_000;

/** What a team has opened for itself. */
function nodesOf(started: Started): readonly NodeDescriptor[] {
  if ('image' in started) return [started.image];
  return 'target' in started ? [...started.sources, started.target] : [started.first, started.second];
}

function imageTask(options: ImageOptions | undefined): ImageTask {
  return {
    format: options?.format,
    backing: options?.allowBacking,
    snapshot: options?.snapshot,
    layers: options?.layers,
    ...(options?.forceShare === true ? { lock: 'none' as const } : {}),
  };
}

/**
 * The threads and the shared memory that do the work. One per process is enough. The host thread only starts
 * work and looks at counters; it never moves data.
 */
export class Engine {
  readonly arena: Arena;
  /** Threads a job copies with by default. */
  readonly workers: number;
  readonly #jobs: Piscina<Task, Answer>;
  readonly #requests: Piscina<Task, Answer>;
  readonly #guestCopies: Piscina<Task, Answer>;
  readonly #disks = new Set<DiskHandle>();
  readonly #servers = new Set<NbdServer>();
  readonly #runtime: Runtime & { readonly shared: SharedRuntime };
  #nextId = 1;
  #closed = false;
  #closing: Promise<void> | undefined;

  /** @internal Use {@link createEngine}. */
  constructor(options: EngineOptions = {}) {
    const runtime = createRuntime(options.arenaBytes);
    this.#runtime = runtime;
    this.arena = runtime.arena;
    this.workers = options.workers ?? Math.min(4, availableParallelism());
    const common = {
      filename: new URL('./worker.js', import.meta.url).href,
      workerData: runtime.shared,
      // Threads keep their facades and buffers; the pool is bounded and ends with the engine.
      idleTimeout: Number.POSITIVE_INFINITY,
      recordTiming: false,
      // Files are closed by whichever thread comes by; one that ends would close others' by the same number.
      trackUnmanagedFds: false,
    };
    this.#jobs = new Piscina({ ...common, minThreads: this.workers, maxThreads: MAX_JOB_THREADS });
    this.#requests = new Piscina({ ...common, minThreads: 0, maxThreads: options.requestThreads ?? 4 });
    this.#guestCopies = new Piscina({
      ...common,
      minThreads: 0,
      maxThreads: MAX_GUEST_COPIES,
      idleTimeout: STAY_MS,
    });
  }

  /** @internal */
  get kernels(): Runtime['kernels'] {
    return this.#runtime.kernels;
  }

  /** @internal A number never used before in this engine. */
  nextId(): number {
    return this.#nextId++;
  }

  /** @internal Runs a task on a thread for jobs, or for requests on live disks. */
  async run<T>(task: Task, transfer: readonly Transferable[] = []): Promise<T> {
    if (this.#closed) throw closedError('the engine');
    const pool = this.#poolFor(task);
    const answer = await pool.run(task, transfer.length === 0 ? {} : { transferList: [...transfer] });
    if ('error' in answer) throw StillframeError.fromPlain(answer.error);
    // The task's kind fixes the type of its value; it crossed a thread as plain data.
    return answer.value as T;
  }

  #poolFor({ kind }: Task): Piscina<Task, Answer> {
    if (kind === 'request') return this.#requests;
    return kind === 'copy-for-guests' ? this.#guestCopies : this.#jobs;
  }

  /**
   * Opens an image as a live disk.
   *
   * @param path of the image, or name of an NBD export: `nbd://HOST/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`, with TLS
   *   `nbds://HOST/EXPORT`; every method that takes the path of an image takes those as well
   * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_LOCKED, …_FORMAT, …_CORRUPT_IMAGE,
   *   …_UNSUPPORTED_FEATURE, …_BACKING_FORBIDDEN, …_BACKING_MISSING, …_BACKING_CYCLE, …_BACKING_DEPTH,
   *   …_NBD_CONNECTION, …_NBD_REFUSED, …_NBD_PROTOCOL, …_ARENA_EXHAUSTED
   */
  async openDisk(path: string, options: OpenDiskOptions = {}): Promise<DiskHandle> {
    const descriptor = await this.run<DiskDescriptor>({
      kind: 'open',
      path,
      id: this.nextId(),
      options: {
        ...imageTask(options),
        readOnly: options.readOnly ?? false,
        discard: options.discard ?? 'unmap',
      },
    });
    const disk = new DiskHandle(this, descriptor, () => this.#disks.delete(disk));
    this.#disks.add(disk);
    return disk;
  }

  /**
   * @internal A live disk on an open node, which stays its owner's. It has to be closed before the node is.
   *
   * @throws StillframeError ERR_STILLFRAME_ARENA_EXHAUSTED
   */
  async diskOn(node: NodeDescriptor, options: Pick<DiskDescriptor, 'discard'>): Promise<DiskHandle> {
    const descriptor = await this.run<DiskDescriptor>({ kind: 'open-on', node, id: this.nextId(), options });
    const disk = new DiskHandle(this, descriptor, () => this.#disks.delete(disk));
    this.#disks.add(disk);
    return disk;
  }

  /**
   * Carries actions out on several disks at one instant, all of them or none, and starts the backups among them. With
   * `grouped` these succeed or fail together: none commits before all have come so far, and where one fails or is
   * cancelled so are the others. Semantics: QMP `transaction`.
   *
   * @returns the jobs of the backups, in order
   * @throws StillframeError the error of the action that failed; nothing has happened then
   */
  async transaction(
    items: readonly TransactionItem[],
    options: TransactionOptions = {},
  ): Promise<BackupHandle[]> {
    const plain = items.map((item) => {
      if (item.type === 'abort') return item;
      const disk = item.disk.descriptor;
      return item.type === 'bitmap'
        ? { type: item.type, disk, edit: plainEdit(item.edit) }
        : { type: item.type, disk, options: item.options };
    });
    const jobs = await startBackups(this, plain, options.grouped, options.section);
    const owners = items.flatMap((item) => (item.type === 'backup' ? item.disk : []));
    await Promise.all(jobs.map((job, index) => owners[index]?.own(job)));
    return jobs;
  }

  /**
   * Serves disks over NBD. When this resolves, clients can connect.
   *
   * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT (an address, a name, two exports of one name),
   *   …_NBD_CONNECTION (the address is taken), …_READ_ONLY, …_BITMAP_NOT_FOUND, …_BITMAP_INCONSISTENT,
   *   …_ARENA_EXHAUSTED, …_UNSUPPORTED_FEATURE (no FFI on this platform)
   */
  async serveNbd(options: NbdServerOptions): Promise<NbdServer> {
    const server = await NbdServer.start(this, this.#runtime, options, (ended) =>
      this.#servers.delete(ended),
    );
    this.#servers.add(server);
    if (this.#closing !== undefined) await server.close();
    return server;
  }

  /** Makes a new image, like `qemu-img create`. @returns its virtual size in bytes */
  createImage(path: string, options: CreateImageOptions): Promise<number> {
    return this.run({ kind: 'create', path, options });
  }

  /**
   * Carries actions out, in order, on the persistent dirty bitmap `name` of an image, like `qemu-img bitmap`. They reach
   * the disk together; where one fails, those before it still do.
   *
   * @throws StillframeError ERR_STILLFRAME_BITMAP_NOT_FOUND, …_BITMAP_EXISTS, …_BITMAP_INCONSISTENT,
   *   …_INVALID_ARGUMENT, …_SIZE_MISMATCH, …_UNSUPPORTED_FEATURE, …_NO_SPACE and what opening an image throws
   */
  bitmap(
    path: string,
    name: string,
    actions: readonly BitmapAction[],
    options: Pick<ImageOptions, 'format'> = {},
  ): Promise<void> {
    return this.run({ kind: 'bitmap', path, name, actions, options: { format: options.format } });
  }

  /**
   * Makes, applies or deletes an internal snapshot of an image that nobody else uses, like `qemu-img snapshot`.
   *
   * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_UNSUPPORTED_FEATURE, …_BITMAP_BUSY, …_INVALID_ARGUMENT,
   *   …_NO_SPACE and what opening an image throws
   */
  snapshot(path: string, action: SnapshotAction, options: Pick<ImageOptions, 'format'> = {}): Promise<void> {
    return this.run({ kind: 'edit-snapshots', path, action, options: { format: options.format } });
  }

  /** What `qemu-img info --output=json` says, with its field names. Backing files are not opened. */
  imageInfo(path: string, options?: ImageOptions): Promise<ImageInfo> {
    return this.run({ kind: 'info', path, options: imageTask(options) });
  }

  /** What `qemu-img info --backing-chain` says: of the image and all of its backing chain, which is opened. */
  chainInfo(path: string, options?: ImageOptions): Promise<ImageInfo[]> {
    return this.run({ kind: 'chain-info', path, options: imageTask(options) });
  }

  /**
   * How large the file of a new image will be, like `qemu-img measure`.
   *
   * @param measured virtual size in bytes, or the path of an image whose content is to go into it
   */
  measureImage(
    measured: number | string,
    options: MeasureOptions & { readonly source?: ImageOptions | undefined } = {},
  ): Promise<Measure> {
    const { source, ...how } = options;
    const what =
      typeof measured === 'number' ? { length: measured } : { path: measured, options: imageTask(source) };
    return this.run({ kind: 'measure', measured: what, options: how });
  }

  /** The extents `qemu-img map --output=json` lists, in order, as they are found. */
  async mapImage(
    path: string,
    onEntries: (entries: MapBatch) => void,
    options: MapOptions = {},
  ): Promise<void> {
    const { port1, port2 } = new MessageChannel();
    const taken = new Int32Array(new SharedArrayBuffer(4));
    // The last batch may be on its way still when the task has ended.
    const drained = new Promise<void>((resolve) => {
      let files: readonly (readonly string[])[] = [];
      port1.on('message', (message: PackedMap | typeof files | null) => {
        if (message === null) return resolve();
        if (!(message instanceof Float64Array)) {
          files = message;
          return;
        }
        try {
          onEntries(new MapBatch(message, files));
        } finally {
          Atomics.add(taken, 0, 1);
          Atomics.notify(taken, 0);
        }
      });
    });
    try {
      const { start, length } = options;
      const range = { start, length };
      const task = { kind: 'map', path, options: imageTask(options), range, port: port2, taken } as const;
      await this.run(task, [port2]);
      await drained;
    } finally {
      port1.close();
    }
  }

  /**
   * Checks the metadata of an image, like `qemu-img check`, and repairs it where asked to. Resolves with what is wrong
   * still: an image is sound where `corruptions`, `leaks` and `check-errors` are absent or 0. No other file is opened.
   *
   * @throws StillframeError ERR_STILLFRAME_CHECK_UNSUPPORTED (a raw image has nothing to check), …_CORRUPT_IMAGE (too
   *   damaged to be checked, or in need of `repair: 'all'`), …_UNSUPPORTED_FEATURE, …_LOCKED, …_IO
   */
  async checkImage(path: string, options: CheckOptions = {}): Promise<ImageCheck> {
    const { repair, onMessage, onRepaired } = options;
    if (repair !== undefined && options.forceShare === true) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        'an image that others may be writing (force-share) cannot be repaired; leave one of the two out',
      );
    }
    const { port1, port2 } = new MessageChannel();
    // The last lines may be on their way still when the task has ended, well or not.
    const drained = new Promise<void>((resolve) => {
      port1.on('message', (message: readonly string[] | Repaired | null) => {
        if (message === null) resolve();
        else if ('leaks' in message) onRepaired?.(message);
        else if (onMessage !== undefined) for (const line of message) onMessage(line);
      });
      port1.on('close', resolve);
    });
    try {
      return await this.run<ImageCheck>(
        { kind: 'check', path, options: imageTask(options), repair, port: port2 },
        [port2],
      );
    } finally {
      // Where it never got to its thread nobody else does.
      port2.close();
      await drained;
      port1.close();
    }
  }

  /** Resizes an image, like `qemu-img resize`. @returns its new virtual size in bytes */
  resizeImage(path: string, options: ResizeOptions): Promise<number> {
    return this.run({ kind: 'resize', path, options });
  }

  /** Gives an image another backing file, like `qemu-img rebase`. */
  rebaseImage(path: string, options: RebaseOptions, onProgress?: OnProgress): Promise<void> {
    return this.#withProgress(onProgress, (port) => ({ kind: 'rebase', path, options, port }));
  }

  /**
   * Changes the version of an image, the width of its refcounts and the like, like `qemu-img amend`. An interruption
   * leaves an image with some of the changes, and leaked clusters at worst.
   *
   * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT, …_UNSUPPORTED_FEATURE (the format, or features that the
   *   wanted version does not have), …_NO_SPACE and what opening an image throws
   */
  amendImage(path: string, options: AmendOptions, onProgress?: OnProgress): Promise<void> {
    return this.#withProgress(onProgress, (port) => ({ kind: 'amend', path, options, port }));
  }

  /** Writes what an image holds into its backing file, like `qemu-img commit`. */
  commitImage(path: string, options: CommitOptions, onProgress?: OnProgress): Promise<void> {
    return this.#withProgress(onProgress, (port) => ({ kind: 'commit', path, options, port }));
  }

  /** Runs a tool that tells how far it is. */
  async #withProgress<T>(onProgress: OnProgress | undefined, task: (port: MessagePort) => Task): Promise<T> {
    const { port1, port2 } = new MessageChannel();
    if (onProgress !== undefined) port1.on('message', onProgress);
    port1.unref();
    try {
      return await this.run<T>(task(port2), [port2]);
    } finally {
      for (const message of takeLeft<ToolProgress>(port1)) onProgress?.(message);
      port1.close();
    }
  }

  /**
   * Converts an image into another one, like `qemu-img convert`; of several the second follows the first and so on. The
   * target is `TARGET.partial` until it is complete and durable, and replaces what has its name then.
   *
   * @param sources with formats and layers of their own, or all of those of `options.source`
   */
  async convertImage(
    sources: string | readonly (string | NamedImage)[],
    target: string,
    options: ConvertImageOptions = {},
  ): Promise<void> {
    const { source, workers = this.workers, signal, onProgress, onMessage, ...how } = options;
    signal?.throwIfAborted();
    const list = typeof sources === 'string' ? [sources] : sources;
    const from = list.map((image) => {
      if (typeof image === 'string') return { path: image, options: imageTask(source) };
      const { path, format, layers } = image;
      return { path, options: imageTask({ ...source, format, layers }) };
    });
    const { result } = await this.#runTeam<boolean, void>(
      (team, port) => ({ kind: 'convert', sources: from, target, options: how, team, port }),
      (started, team, port) =>
        'target' in started ? { kind: 'help-convert', conversion: started, team, port } : undefined,
      { workers, signal, onProgress, onMessage },
    );
    if (!result) signal?.throwIfAborted();
  }

  /** Compares two images, like `qemu-img compare`. */
  async compareImages(first: string, second: string, options: CompareOptions = {}): Promise<CompareResult> {
    const { strict = false, workers = this.workers, onProgress } = options;
    const images = [imageTask(options.first), imageTask(options.second)] as const;
    const { result, helped } = await this.#runTeam<Compared, Finding | undefined>(
      (team, port) => ({ kind: 'compare', paths: [first, second], options: images, strict, team, port }),
      (started, team, port) =>
        'first' in started ? { kind: 'help-compare', comparison: started, team, port } : undefined,
      { workers, onProgress },
    );
    return compareResult(result.comparison, [result.finding, ...helped]);
  }

  /**
   * The checksum of what an image reads as, its backing chain included: that of a backup with `sync: full` that copied this
   * (`result.checksum` and `result.clusterSize` of a job).
   *
   * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT (the size of clusters), …_IO and what opening an image throws
   */
  async imageChecksum(path: string, options: ChecksumOptions = {}): Promise<ImageChecksum> {
    const { clusterSize = DEFAULT_CLUSTER_SIZE, workers = this.workers, onProgress, ...how } = options;
    if (clusterSize < 512 || clusterSize > MAX_CLUSTER_SIZE || !Number.isInteger(Math.log2(clusterSize))) {
      throw new StillframeError(
        'ERR_STILLFRAME_INVALID_ARGUMENT',
        `the cluster size ${clusterSize} is no power of two from 512 to ${MAX_CLUSTER_SIZE} bytes`,
      );
    }
    const { result, helped } = await this.#runTeam<
      { readonly sum: bigint; readonly virtualSize: number },
      bigint | undefined
    >(
      (team, port) => ({ kind: 'checksum', path, options: imageTask(how), clusterSize, team, port }),
      (started, team, port) =>
        'image' in started ? { kind: 'help-checksum', checksummed: started, team, port } : undefined,
      { workers, onProgress },
    );
    const sum = helped.reduce<bigint>((all, part) => all + (part ?? 0n), result.sum);
    const root = BigInt.asUintN(64, sum).toString(16).padStart(16, '0');
    return { algorithm: 'xxh3-64', root, clusterSize, virtualSize: result.virtualSize };
  }

  /** Runs a tool whose threads share the work: one leads, the others help once it has opened everything. */
  async #runTeam<Result, Helped>(
    lead: (team: TeamMemory, port: MessagePort) => Task,
    help: (started: Started, team: TeamMemory, port: MessagePort) => Task | undefined,
    options: Pick<ConvertImageOptions, 'signal' | 'onProgress' | 'onMessage'> & { readonly workers: number },
  ): Promise<{ readonly result: Result; readonly helped: Helped[] }> {
    const { workers, signal, onProgress, onMessage } = options;
    const memory = Team.memory();
    let nodes: readonly NodeDescriptor[] = [];
    const stop = (): void => {
      new Team(memory).stop();
      for (const node of nodes) interruptNode(this.arena, node);
    };
    const helpers: Promise<Helped>[] = [];
    const ports: MessagePort[] = [];
    const channel = (): MessagePort => {
      const { port1, port2 } = new MessageChannel();
      port1.on('message', (message: TeamMessage) => {
        if ('started' in message) callHelp(message.started);
        else tell(message);
      });
      port1.unref();
      ports.push(port1);
      return port2;
    };
    const tell = (message: Exclude<TeamMessage, { started: unknown }>): void => {
      if ('line' in message) onMessage?.(message.line);
      else onProgress?.(message);
    };
    const callHelp = (started: Started): void => {
      nodes = nodesOf(started);
      if (signal?.aborted) stop();
      for (let index = 1; index < workers; index++) {
        const port = channel();
        const task = help(started, memory, port);
        if (task === undefined) throw new TypeError('a team does one kind of work');
        const helper = this.run<Helped>(task, [port]);
        // It is looked at when the lead has ended.
        helper.catch(() => undefined);
        helpers.push(helper);
      }
    };
    signal?.addEventListener('abort', stop);
    try {
      const port = channel();
      const result = await this.run<Result>(lead(memory, port), [port]).finally(() =>
        Promise.allSettled(helpers),
      );
      // One that failed tells why.
      return { result, helped: await Promise.all(helpers) };
    } catch (error) {
      signal?.throwIfAborted();
      throw error;
    } finally {
      signal?.removeEventListener('abort', stop);
      for (const port of ports) {
        // The last ones may be on their way still; there is nothing to help with any more.
        for (const message of takeLeft<TeamMessage>(port)) if (!('started' in message)) tell(message);
        port.close();
      }
    }
  }

  /** Closes what is still open and ends the threads. Jobs are cancelled. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    try {
      await Promise.all([...this.#servers].map((server) => server.close()));
      await Promise.all([...this.#disks].map((disk) => disk.close()));
    } finally {
      this.#closed = true;
      const pools = [this.#jobs, this.#requests, this.#guestCopies];
      // Node aborts the process when a thread is ended while it still loads its modules.
      await Promise.all(pools.flatMap((pool) => pool.threads.map(() => pool.run({ kind: 'ready' }))));
      await Promise.all(pools.map((pool) => pool.destroy()));
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** Starts an engine. @throws RangeError when `arenaBytes` is outside 256 KiB to 4 GiB - 64 KiB */
export async function createEngine(options?: EngineOptions): Promise<Engine> {
  return new Engine(options);
}
