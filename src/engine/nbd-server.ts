import { closedError, StillframeError } from '../errors.js';
import type { Runtime, SharedRuntime } from '../kernels/runtime.js';
import { type ListenAddress, parseListenAddress } from '../nbd/server/address.js';
import type { ExportDescriptor } from '../nbd/server/exports.js';
import type { ExportOptions } from '../nbd/server/offer.js';
import { Server, type ServerOptions } from '../nbd/server/server.js';
import type { DiskHandle } from './disk.js';
import type { Engine } from './engine.js';
import { FrozenDisk } from './frozen-disk.js';

/** A disk under a name. */
export interface NbdExport extends ExportOptions {
  /** A live disk, or one at an instant: {@link DiskHandle.freeze}. */
  readonly disk: DiskHandle | FrozenDisk;
}

/** What {@link Engine.serveNbd} serves, and where. */
export interface NbdServerOptions extends ServerOptions {
  /**
   * Where to listen: `unix:PATH`, `HOST:PORT` (port 0: a free one), `fd:N` (a socket that listens, or is connected to a
   * client), or an NBD URI.
   */
  readonly listen: string | readonly (string | ListenAddress)[];
  readonly exports: readonly NbdExport[];
}

interface Entry {
  readonly exported: ExportDescriptor;
  readonly source: DiskHandle | FrozenDisk;
}

/** A running NBD server. Closing the engine, or a disk that it exports, closes it. */
export class NbdServer {
  readonly #engine: Engine;
  readonly #server: Server;
  readonly #entries = new Map<string, Entry>();
  readonly #onEnd: () => void;
  readonly #scheme: 'nbd' | 'nbds';
  #closing: Promise<void> | undefined;

  private constructor(engine: Engine, server: Server, entries: readonly Entry[], onEnd: () => void) {
    this.#engine = engine;
    this.#server = server;
    this.#onEnd = onEnd;
    this.#scheme = server.secure ? 'nbds' : 'nbd';
    for (const entry of entries) this.#enter(entry);
  }

  /** @internal Use {@link Engine.serveNbd}. */
  static async start(
    engine: Engine,
    runtime: Runtime & { readonly shared: SharedRuntime },
    options: NbdServerOptions,
    onEnd: (server: NbdServer) => void,
  ): Promise<NbdServer> {
    const { listen, exports: wanted, ...rest } = options;
    const list: readonly (string | ListenAddress)[] = typeof listen === 'string' ? [listen] : listen;
    const addresses = list.map((one) => (typeof one === 'string' ? parseListenAddress(one).address : one));
    const names = wanted.map(({ name = '' }) => name);
    const twice = names.find((name, index) => names.indexOf(name) !== index);
    if (twice !== undefined) throw nameTaken(twice);
    const entries: Entry[] = [];
    try {
      for (const one of wanted) entries.push(await prepare(engine, one));
      const exports = entries.map(({ exported }) => exported);
      const server: NbdServer = new NbdServer(
        engine,
        new Server(runtime, addresses, exports, rest),
        entries,
        () => onEnd(server),
      );
      return server;
    } catch (error) {
      for (const { exported } of entries) await engine.run<void>({ kind: 'end-export', exported });
      throw error;
    }
  }

  #enter(entry: Entry): void {
    const { name } = entry.exported.offer;
    const { source } = entry;
    this.#entries.set(name, entry);
    liveDisk(source).servers.add(this);
    if (source instanceof FrozenDisk) source.exports.set(this, name);
  }

  /** Where it listens, with the port that was chosen. */
  get addresses(): readonly ListenAddress[] {
    return this.#server.listening.places;
  }

  /** A URI for each export at each address that has one. */
  get uris(): readonly string[] {
    return [...this.#entries.keys()].flatMap((name) =>
      this.addresses.flatMap((address) => uriOf(address, name, this.#scheme) ?? []),
    );
  }

  /** Names of its exports. */
  get exportNames(): readonly string[] {
    return [...this.#entries.keys()];
  }

  /** Clients that have chosen an export. */
  get connections(): number {
    return this.#server.connections;
  }

  /** Clients that have chosen this export; 0 where there is none of that name. */
  connectionsTo(name: string): number {
    return this.#server.connectionsTo(name);
  }

  /** Threads that serve them. */
  get threads(): number {
    return this.#server.threads;
  }

  /** Resolves when nobody can come any more: it was closed, or had no more than connections, and they have ended. */
  get finished(): Promise<void> {
    return this.#server.finished;
  }

  /**
   * Exports one more disk. When this resolves, clients can choose it.
   *
   * @throws StillframeError as {@link Engine.serveNbd}
   */
  async addExport(one: NbdExport): Promise<void> {
    const name = one.name ?? '';
    if (this.#entries.has(name)) throw nameTaken(name);
    const entry = await prepare(this.#engine, one);
    try {
      if (this.#closing !== undefined) throw closedError('the server');
      if (this.#entries.has(name)) throw nameTaken(name);
      this.#server.add(entry.exported);
    } catch (error) {
      await this.#engine.run<void>({ kind: 'end-export', exported: entry.exported });
      throw error;
    }
    this.#enter(entry);
  }

  /** Ends an export, with the connections of those who use it. There may be none of that name. */
  async removeExport(name: string): Promise<void> {
    if (this.#closing !== undefined) return this.#closing;
    const entry = this.#entries.get(name);
    if (entry === undefined) return;
    await this.#server.remove(name);
    await this.#leave(name, entry);
  }

  async #leave(name: string, { exported, source }: Entry): Promise<void> {
    if (!this.#entries.delete(name)) return;
    if (source instanceof FrozenDisk) source.exports.delete(this);
    const disk = liveDisk(source);
    if (![...this.#entries.values()].some((other) => liveDisk(other.source) === disk)) {
      disk.servers.delete(this);
    }
    await this.#engine.run<void>({ kind: 'end-export', exported });
  }

  /**
   * Lets nobody in any more, answers what is under way, for 5 seconds at most, and refuses the rest. The disks stay
   * open.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #close(): Promise<void> {
    try {
      await this.#server.close();
    } finally {
      for (const [name, entry] of [...this.#entries]) await this.#leave(name, entry);
      this.#onEnd();
    }
  }
}

function liveDisk(source: DiskHandle | FrozenDisk): DiskHandle {
  return source instanceof FrozenDisk ? source.disk : source;
}

async function prepare(engine: Engine, { disk: source, ...options }: NbdExport): Promise<Entry> {
  const frozen = source instanceof FrozenDisk ? source.descriptor : undefined;
  const exported = await engine.run<ExportDescriptor>({
    kind: 'export',
    disk: liveDisk(source).descriptor,
    frozen,
    options,
  });
  return { exported, source };
}

function nameTaken(name: string): StillframeError {
  return new StillframeError(
    'ERR_STILLFRAME_INVALID_ARGUMENT',
    `two exports have the name '${name}'; give each its own`,
  );
}

function uriOf(address: ListenAddress, exportName: string, scheme: 'nbd' | 'nbds'): string | undefined {
  const path = encodeURIComponent(exportName);
  switch (address.type) {
    case 'unix': {
      const socket = encodeURIComponent(address.path).replaceAll('%2F', '/');
      return `${scheme}+unix:///${path}?socket=${socket}`;
    }
    case 'tcp': {
      const host = address.host.includes(':') ? `[${address.host}]` : address.host;
      return `${scheme}://${host}:${address.port}/${path}`;
    }
    case 'fd':
      return undefined;
  }
}
