/** Clients that misbehave: whatever they do, the server goes on, for others as well, and keeps its memory. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type NbdServer } from '#src/index.js';
import { playDamagedSessions, wholeSession } from '../fuzz/nbd-sessions.js';
import { Random } from '../support/data.js';
import { u32 } from '../support/fake-nbd.js';
import { RawClient } from '../support/nbd-client.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-hostile-'));
const socket = join(folder, 'socket');
const LENGTH = 8 << 20;
const content = new Random(3).bytes(LENGTH);
const HANDSHAKE_MS = 400;
/** Sessions that are damaged at random; `npm run fuzz -- nbd` goes on with them. */
const DAMAGED = 300;

let engine: Engine;
let disk: Disk;
let server: NbdServer;
const clients: RawClient[] = [];

beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
  writeFileSync(join(folder, 'disk'), content);
  disk = await engine.openDisk(join(folder, 'disk'), { format: 'raw' });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
afterEach(async () => {
  for (const client of clients.splice(0)) client.destroy();
  await server.close();
});

async function serve(options: { maxConnections?: number } = {}): Promise<void> {
  server = await engine.serveNbd({
    listen: `unix:${socket}`,
    exports: [{ disk }],
    handshakeTimeoutMs: HANDSHAKE_MS,
    ...options,
  });
}

function unknown(): RawClient {
  const client = new RawClient(socket);
  clients.push(client);
  return client;
}

async function client(
  ...options: Parameters<typeof RawClient.to> extends [string, ...infer Rest] ? Rest : never
) {
  const made = await RawClient.to(socket, ...options);
  clients.push(made);
  return made;
}

/** Somebody with good manners is served. */
async function expectService(): Promise<void> {
  const good = await client({ options: [] });
  good.request(0, 1, 4096, 512);
  const { data } = await good.answer(512);
  expect(data).toEqual(Buffer.from(content.subarray(4096, 4608)));
  good.request(2, 2, 0, 0);
  await good.closed();
}

async function until(condition: () => boolean): Promise<void> {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 2));
}

describe('who never gets to the point', () => {
  it('has to go when the time for it is over, and takes nobody else’s place for longer', async () => {
    await serve({ maxConnections: 4 });
    const silent = unknown();
    const slow = unknown();
    await slow.greet();
    const talking = unknown();
    await talking.greet();
    const half = unknown();
    await half.greet();
    half.send(Buffer.from('IHAVEOPT'), u32(7), u32(100), Buffer.alloc(50));
    const chatter = (async () => {
      for (;;) await talking.option(3);
    })();
    chatter.catch(() => undefined);
    // All four places are taken: this one waits in the queue until one of them is put out.
    await expectService();
    await expect(chatter).rejects.toThrow();
    await Promise.all([silent, slow, half].map((one) => one.closed()));
  });

  it('does not read answers: it has to go as well', async () => {
    await serve();
    const deaf = unknown();
    await deaf.greet();
    deaf.pause();
    const list = Buffer.concat([Buffer.from('IHAVEOPT'), u32(3), u32(0)]);
    deaf.send(...Array.from({ length: 50_000 }, () => list));
    await expectService();
    await new Promise((resolve) => setTimeout(resolve, HANDSHAKE_MS * 1.5));
    deaf.resume();
    await deaf.closed();
  });

  it('waits until somebody leaves where all places are taken', async () => {
    await serve({ maxConnections: 2 });
    const [first] = [await client(), await client()];
    const third = unknown();
    let greeted = false;
    const greeting = third.peer.read(18).then(() => {
      greeted = true;
    });
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(greeted).toBe(false);
    first?.destroy();
    await greeting;
  });
});

describe('who goes away', () => {
  it.each([false, true])('at any byte of a session (extended headers: %s)', async (extended) => {
    await serve();
    const written = Buffer.from(content.subarray(1 << 20, (1 << 20) + 4096));
    const bytes = Buffer.concat(wholeSession(extended, written));
    const random = new Random(7);
    const ends = new Set([0, 4, ...Array.from({ length: 120 }, () => random.between(1, bytes.length - 1))]);
    for (const end of ends) {
      const gone = new RawClient(socket);
      gone.send(bytes.subarray(0, end));
      if (end % 2 === 0) gone.end();
      if (end % 3 === 0) await gone.peer.read(18);
      gone.destroy();
    }
    await expectService();
    await until(() => server.connections === 0);
  });

  it('in the middle of the data of a write changes nothing', async () => {
    await serve();
    for (const length of [8192, 1 << 20, 6 << 20]) {
      const gone = await client({ options: [] });
      gone.request(1, 1, 0, length, 0, Buffer.alloc(length / 2));
      gone.end();
      await gone.closed();
    }
    await until(() => server.connections === 0);
    expect(Buffer.from(await disk.read(0, LENGTH)).equals(content)).toBe(true);
  });

  it('with a thousand requests under way', async () => {
    await serve();
    for (let round = 0; round < 10; round++) {
      const gone = await client();
      for (let index = 0; index < 1000; index++) gone.request(0, index, 0, 65536);
      await gone.answers();
      gone.destroy();
    }
    await expectService();
    await until(() => server.connections === 0);
  });
});

describe('who asks for everything and takes nothing', () => {
  it('is not read on, takes little memory, and disturbs nobody', async () => {
    await serve();
    const used = engine.arena.usedBytes;
    const greedy: RawClient[] = [];
    for (let index = 0; index < 6; index++) {
      const one = await client();
      one.pause();
      for (let request = 0; request < 4000; request++) one.request(0, request, 0, 1 << 20);
      greedy.push(one);
    }
    for (let round = 0; round < 5; round++) await expectService();
    expect(server.threads).toBeLessThan(40);
    expect(engine.arena.usedBytes - used).toBeLessThan(128 << 20);
    for (const one of greedy) one.destroy();
    await until(() => server.connections === 0);
  });

  it('takes no thread from others, however long its answers', async () => {
    await serve({ maxConnections: 8 });
    for (let index = 0; index < 6; index++) {
      const one = await client({ options: [] });
      one.pause();
      for (let request = 0; request < 200; request++) one.request(0, request, 0, 2 << 20);
    }
    // As many as one connection for itself could want have come.
    await until(() => server.threads > 16);
    await new Promise((resolve) => setTimeout(resolve, 300));
    for (let round = 0; round < 3; round++) await expectService();
    expect(server.threads).toBeLessThanOrEqual(8 + 16);
  });

  it('keeps a server from closing for a moment only', async () => {
    await serve();
    const deaf = await client();
    deaf.pause();
    for (let request = 0; request < 100; request++) deaf.request(0, request, 0, 1 << 20);
    await until(() => server.connections === 1);
    await server.close();
  }, 20_000);

  it('announces large writes and does not send them', async () => {
    await serve();
    const used = engine.arena.usedBytes;
    for (let index = 0; index < 8; index++) {
      const one = await client({ options: [] });
      one.request(1, 1, 0, 60 << 20, 0, Buffer.alloc(1000));
    }
    const writer = await client({ options: [] });
    const data = Buffer.from(content.subarray(0, 5 << 20));
    writer.request(1, 1, 0, data.length, 0, data);
    expect((await writer.answer()).error).toBe(0);
    expect(engine.arena.usedBytes - used).toBeLessThan(200 << 20);
  });
});

describe('who talks nonsense', () => {
  it(`in $DAMAGEDsessions that were damaged at random`, async () => {
    const report = await playDamagedSessions(engine, folder, { first: 1, count: DAMAGED });
    expect(report.sessions).toBe(DAMAGED);
    expect(report.served).toBeGreaterThan(DAMAGED / 4);
    expect(report.exchanges).toBeGreaterThan(0);
  }, 60_000);
});
