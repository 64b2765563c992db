/** Members of a throttle group that wait: whose request goes next. */
import { Worker } from 'node:worker_threads';
import { afterAll, describe, expect, it } from 'vitest';
import { setLimits, THROTTLE_GROUP_BYTES } from '#src/block/filters/throttle.js';
import { changeLimits, UNLIMITED } from '#src/block/filters/throttle-limits.js';
import { THROTTLE_QUEUE_BYTES } from '#src/block/filters/throttle-queue.js';
import { createRuntime } from '#src/kernels/runtime.js';

const { shared, arena } = createRuntime(64 << 20);
const group = arena.alloc(THROTTLE_GROUP_BYTES, 'throttle group');
const joined = (): number => arena.f64[(group + THROTTLE_GROUP_BYTES - THROTTLE_QUEUE_BYTES) / 8] ?? 0;
/** One request goes through, and the next one would in some hours. */
const letOneThrough = (): void =>
  setLimits(
    { arena },
    group,
    changeLimits(UNLIMITED, (name) => (name === 'bps-total' ? 1 : undefined)),
  );
const threads: Worker[] = [];
const events: string[] = [];

/** A thread that makes one request of a member, and says its name once that is through. */
function request(name: string, member: number, direction: 'read' | 'write'): void {
  const url = (path: string): string => new URL(`../../dist/${path}`, import.meta.url).href;
  const body = `
    const { parentPort, workerData } = require('node:worker_threads');
    (async () => {
      const { attachRuntime } = await import('${url('kernels/runtime.js')}');
      const { attachNode } = await import('${url('block/graph.js')}');
      const runtime = attachRuntime(workerData.shared);
      const common = { path: 'null', readOnly: false, length: 1 << 20 };
      const child = { driver: 'null-co', ...common, readsZero: true, latencyMs: 0 };
      const { group, member } = workerData;
      const node = attachNode(runtime, { driver: 'throttle', ...common, child, group, member });
      node.${direction}(0, runtime.arena.alloc(65536, 'data'), 65536);
      parentPort.postMessage('${name}');
    })();`;
  const thread = new Worker(body, { eval: true, workerData: { shared, group, member } });
  thread.on('message', (event: string) => events.push(event));
  threads.push(thread);
}

const until = async (condition: () => boolean): Promise<void> => {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2));
};

afterAll(() => Promise.all(threads.map((thread) => thread.terminate())));

describe('requests that wait', () => {
  it('go in turns of their members, and of each member in their order, reads and writes apart', async () => {
    letOneThrough();
    request('first', 1, 'write');
    await until(() => events.length === 1);
    const waiting = ['a1', 'a2', 'a3', 'b1', 'c1', 'b2'];
    const members = { a: 1, b: 2, c: 3 };
    for (const [index, name] of waiting.entries()) {
      request(name, members[name[0] as 'a'], 'write');
      await until(() => joined() === index + 1);
    }
    expect(events).toEqual(['first']);
    for (let through = 2; through <= waiting.length + 1; through++) {
      letOneThrough();
      await until(() => events.length === through);
    }
    expect(events).toEqual(['first', 'a1', 'c1', 'b1', 'a2', 'b2', 'a3']);
    request('written', 1, 'write');
    await until(() => joined() === waiting.length + 1);
    request('read', 2, 'read');
    await until(() => joined() === waiting.length + 2);
    setLimits({ arena }, group, UNLIMITED);
    await until(() => events.length === waiting.length + 3);
    expect(events.slice(-2).sort()).toEqual(['read', 'written']);
  });
});
