import type { ListenAddress } from '../nbd/server/address.js';
import type { ExportDescriptor } from '../nbd/server/exports.js';
import type { ExportOptions } from '../nbd/server/offer.js';
import type { Server, ServerOptions } from '../nbd/server/server.js';
import type { DiskHandle } from './disk.js';

/** A disk under a name. */
export interface NbdExport extends ExportOptions {
  readonly disk: DiskHandle;
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

/** A running NBD server. Closing the engine, or a disk that it exports, closes it. */
export class NbdServer {
  readonly #server: Server;
  readonly #exports: readonly ExportDescriptor[];
  readonly #end: () => Promise<void>;
  readonly #scheme: 'nbd' | 'nbds';
  #closing: Promise<void> | undefined;

  /** @internal Use {@link Engine.serveNbd}. */
  constructor(server: Server, exports: readonly ExportDescriptor[], end: () => Promise<void>) {
    this.#server = server;
    this.#exports = exports;
    this.#end = end;
    this.#scheme = server.secure ? 'nbds' : 'nbd';
  }

  /** Where it listens, with the port that was chosen. */
  get addresses(): readonly ListenAddress[] {
    return this.#server.listening.places;
  }

  /** A URI for each export at each address that has one. */
  get uris(): readonly string[] {
    return this.#exports.flatMap(({ offer }) =>
      this.addresses.flatMap((address) => uriOf(address, offer.name, this.#scheme) ?? []),
    );
  }

  /** Clients that have chosen an export. */
  get connections(): number {
    return this.#server.connections;
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
   * Lets nobody in any more, answers what is under way, for 5 seconds at most, and refuses the rest. The disks stay
   * open.
   */
  close(): Promise<void> {
    this.#closing ??= this.#server.close().finally(this.#end);
    return this.#closing;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
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
