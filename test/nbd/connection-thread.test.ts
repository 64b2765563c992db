/** What a thread that serves clients does with a connection, on the thread of the test. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { tryLock, unlock } from '#src/kernels/futex.js';
import { ConnectionThread } from '#src/nbd/server/connection-thread.js';
import type { ExportDescriptor } from '#src/nbd/server/exports.js';
import { Listener, tagOf } from '#src/nbd/server/listener.js';
import { PHASE_OF, ServerState } from '#src/nbd/server/state.js';
import { serverSockets } from '#src/os/server-sockets.js';
import { sockets } from '#src/os/sockets.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-connection-'));
afterAll(() => rmSync(folder, { recursive: true }));

const [plain, server] = [sockets(), serverSockets()];

describe.skipIf(plain === undefined || server === undefined)('a connection without requests', () => {
  it('is free for others before it is left to the poller, who may wake them at once', async () => {
    if (plain === undefined || server === undefined) throw new Error('no sockets');
    const engine = await createEngine();
    try {
      const { arena, kernels } = engine;
      const path = join(folder, 'disk');
      await engine.createImage(path, { format: 'raw', length: 65536 });
      const disk = await engine.openDisk(path, { format: 'raw' });
      const exported = await engine.run<ExportDescriptor>({
        kind: 'export',
        disk: disk.descriptor,
        frozen: undefined,
        options: {},
      });
      const state = new ServerState(arena, ServerState.allocate(arena, 1), 1);
      state.exports = [exported];
      const [fd, client] = plain.pair();
      server.setReceiveTimeout(fd, 1);
      const agreement = { offer: exported.offer, headers: 'simple', contexts: [], flags: 1 } as const;
      const connection = state.openConnection(fd, 0, agreement, undefined);
      if (connection === undefined) throw new Error('no connection');
      const free: boolean[] = [];
      const thread = new ConnectionThread({
        runtime: { arena, kernels },
        state,
        sockets: {
          ...plain,
          ...server,
          rewatch: () => {
            const taken = tryLock(arena, connection.receiving);
            free.push(taken);
            if (taken) unlock(arena, connection.receiving);
            state.phase = PHASE_OF.gone;
          },
        },
        poller: -1,
        tagOf,
        ended: () => undefined,
        post: () => undefined,
        resident: false,
      });
      state.countThread(1);
      state.enqueue(connection, false);
      thread.run();
      expect(free).toEqual([true]);
      for (const one of [fd, client]) plain.close(one);
      state.free();
    } finally {
      await engine.close();
    }
  });
});

describe.skipIf(plain === undefined || server === undefined)('the thread that lets clients in', () => {
  it('leaves the listening sockets alone before it says that they may be closed', async () => {
    if (plain === undefined || server === undefined) throw new Error('no sockets');
    const engine = await createEngine();
    const state = new ServerState(engine.arena, ServerState.allocate(engine.arena, 1), 1);
    const done: string[] = [];
    const sockets = {
      ...plain,
      ...server,
      watch: (_: number, fd: number) => done.push(`watch ${fd}`),
      unwatch: (_: number, fd: number) => done.push(`unwatch ${fd}`),
      // It is told to close while it waits for clients, and that it may end when it waits for the last of them.
      wait: () => {
        state.phase = state.phase === PHASE_OF.serving ? PHASE_OF.closing : PHASE_OF.gone;
        return [];
      },
    };
    new Listener({
      state,
      sockets,
      poller: -1,
      wake: 5,
      listeners: [6, 7],
      connected: [],
      tls: undefined,
      handshakeMs: 1000,
      more: () => undefined,
      stoppedListening: () => done.push('stopped listening'),
      finished: () => undefined,
    }).run();
    expect(done).toEqual([
      ...['watch 5', 'watch 6', 'watch 7', 'unwatch 6', 'unwatch 7', 'stopped listening'],
    ]);
    state.free();
    await engine.close();
  });

  it('has a server close without error that has just begun', async () => {
    const engine = await createEngine();
    try {
      for (let waitMs = 0; waitMs < 120; waitMs += 10) {
        const listen = `unix:${join(folder, `socket-${waitMs}`)}`;
        const served = await engine.serveNbd({ listen, exports: [] });
        await new Promise((resolve) => setTimeout(resolve, waitMs));
        await served.close();
      }
    } finally {
      await engine.close();
    }
  });
});

describe('the queue of connections that something can be done for', () => {
  it('has a place for every one of them', async () => {
    const engine = await createEngine();
    const most = 3000;
    const state = new ServerState(engine.arena, ServerState.allocate(engine.arena, most), most);
    for (let index = 0; index < most; index++) {
      const connection = state.connection(index);
      // As one that is served.
      connection.set(0, 1);
      state.enqueue(connection, false);
    }
    const found = Array.from({ length: most }, () => state.dequeue(0)?.index);
    expect(found).toEqual(Array.from({ length: most }, (_, index) => index));
    state.free();
    await engine.close();
  });
});
