/** Thread of the benchmark: requests at one distance after the other, as `qemu-img bench -S` makes them. */
import { parentPort, workerData } from 'node:worker_threads';
import { attachNode } from '#src/block/graph.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { attachRuntime, type SharedRuntime } from '#src/kernels/runtime.js';

export interface RandomRequests {
  readonly shared: SharedRuntime;
  readonly node: NodeDescriptor;
  readonly operation: 'read' | 'write';
  readonly count: number;
  /** Bytes of a request. */
  readonly bytes: number;
  /** Bytes from the start of one request to that of the next; at the end of the drive it goes on from the start. */
  readonly step: number;
}

const order: RandomRequests = workerData;
const { operation, count, bytes, step } = order;
const runtime = attachRuntime(order.shared);
const node = attachNode(runtime, order.node);
const buffer = runtime.arena.alloc(bytes, 'requests');
runtime.arena.u8.fill(0x5a, buffer, buffer + bytes);
const start = performance.now();
let offset = 0;
for (let request = 0; request < count; request++) {
  if (offset + bytes > node.length) offset = 0;
  if (operation === 'read') node.read(offset, buffer, bytes);
  else node.write(offset, buffer, bytes);
  offset = (offset + step) % node.length;
}
if (operation === 'write') node.flush();
const seconds = (performance.now() - start) / 1000;
runtime.arena.free(buffer);
parentPort?.postMessage(seconds);
