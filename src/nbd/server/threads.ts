import type { SharedRuntime } from '../../kernels/runtime.js';
import type { ListenerTls } from './tls.js';

/** What every thread of a server gets. */
interface Common {
  readonly shared: SharedRuntime;
  readonly control: number;
  readonly maxConnections: number;
  readonly poller: number;
}

export interface ListenerData extends Common {
  readonly role: 'listener';
  readonly wake: number;
  readonly listeners: readonly number[];
  readonly connected: readonly number[];
  /** Undefined: nobody speaks TLS. */
  readonly tls: ListenerTls | undefined;
  readonly handshakeMs: number;
}

export interface ConnectionData extends Common {
  readonly role: 'connection';
  /** The other end of the listener's `wake`. */
  readonly waker: number;
  readonly resident: boolean;
}

export type ThreadData = ListenerData | ConnectionData;
