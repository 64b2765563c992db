import { parentPort, workerData } from 'node:worker_threads';
import { attachRuntime } from '../../kernels/runtime.js';
import { serverSockets } from '../../os/server-sockets.js';
import { sockets } from '../../os/sockets.js';
import { ConnectionThread, type ThreadMessage } from './connection-thread.js';
import { Listener, tagOf } from './listener.js';
import { ServerState } from './state.js';
import type { RelayMessage, ThreadData } from './threads.js';

/** Plain text between a thread that speaks TLS and one that serves, in each direction. */
const RELAY_BUFFER_BYTES = 1024 * 1024;

const data: ThreadData = workerData;
const runtime = attachRuntime(data.shared);
const state = new ServerState(runtime.arena, data.control, data.maxConnections);
const [plain, server] = [sockets(), serverSockets()];
if (plain === undefined || server === undefined) throw new Error('invariant: there are sockets');
const both = { ...plain, ...server };
const post = (message: ThreadMessage): void => parentPort?.postMessage(message);

if (data.role === 'listener') {
  const { poller, wake, listeners, connected, relays, handshakeMs } = data;
  let next = 0;
  new Listener({
    state,
    sockets: both,
    poller,
    wake,
    listeners,
    connected,
    tls: relays.length > 0 ? 'required' : 'none',
    handshakeMs,
    more: () => post('more'),
    finished: () => post('finished'),
    startTls: (remote) => {
      const [ours, local] = both.pair();
      // The relay does everything in turn: what it cannot hand on at once keeps it from all its other clients.
      for (const fd of [ours, local]) both.setSendBuffer(fd, RELAY_BUFFER_BYTES);
      relays[next++ % relays.length]?.postMessage({ remote, local } satisfies RelayMessage);
      return ours;
    },
  }).run();
} else {
  const { poller, waker, resident } = data;
  const byte = Uint8Array.of(1);
  new ConnectionThread({
    runtime,
    state,
    sockets: both,
    poller,
    tagOf,
    ended: () => both.send(waker, byte),
    post,
    resident,
  }).run();
}
