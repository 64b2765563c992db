/** What a thread that serves clients does with a connection, on the thread of the test. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { tryLock, unlock } from '#src/kernels/futex.js';
import { ConnectionThread } from '#src/nbd/server/connection-thread.js';
import type { ExportDescriptor } from '#src/nbd/server/exports.js';
import { tagOf } from '#src/nbd/server/listener.js';
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
