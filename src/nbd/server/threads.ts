import type { MessagePort } from 'node:worker_threads';
import type { SharedRuntime } from '../../kernels/runtime.js';
import type { RelaySecrets } from './tls.js';

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
  /** To the threads that speak TLS; none: nobody does. */
  readonly relays: readonly MessagePort[];
  readonly handshakeMs: number;
}

export interface ConnectionData extends Common {
  readonly role: 'connection';
  /** The other end of the listener's `wake`. */
  readonly waker: number;
  readonly resident: boolean;
}

export type ThreadData = ListenerData | ConnectionData;

/** What a thread that speaks TLS gets. */
export interface RelayData {
  readonly secrets: RelaySecrets;
  /** Where connections come from. */
  readonly port: MessagePort;
}

/** A connection for it: descriptors of the client and of our side in plain text, both its own from then on. */
export interface RelayMessage {
  readonly remote: number;
  readonly local: number;
}
