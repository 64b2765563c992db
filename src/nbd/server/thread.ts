import { parentPort, workerData } from 'node:worker_threads';
import { attachRuntime } from '../../kernels/runtime.js';
import { serverSockets } from '../../os/server-sockets.js';
import { sockets } from '../../os/sockets.js';
import { ConnectionThread, type ThreadMessage } from './connection-thread.js';
import { Listener, tagOf } from './listener.js';
import { ServerState } from './state.js';
import type { ThreadData } from './threads.js';
import { attachTls } from './tls.js';

const data: ThreadData = workerData;
const runtime = attachRuntime(data.shared);
const state = new ServerState(runtime.arena, data.control, data.maxConnections);
const [plain, server] = [sockets(), serverSockets()];
if (plain === undefined || server === undefined) throw new Error('invariant: there are sockets');
const both = { ...plain, ...server };
const post = (message: ThreadMessage): void => parentPort?.postMessage(message);

if (data.role === 'listener') {
  const { poller, wake, listeners, connected, tls, handshakeMs } = data;
  const handshakes = tls && attachTls(tls);
  new Listener({
    state,
    sockets: both,
    poller,
    wake,
    listeners,
    connected,
    tls: handshakes,
    handshakeMs,
    more: () => post('more'),
    stoppedListening: () => post('stopped-listening'),
    finished: () => post('finished'),
  }).run();
  handshakes?.end();
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
