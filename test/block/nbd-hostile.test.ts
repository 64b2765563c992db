/** The client against servers that break the rules: a typed error each time, in bounded time and memory. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import {
  ACK,
  chunk,
  GREETING,
  handshake,
  type Manners,
  optionReply,
  type Peer,
  simpleReply,
  u16,
  u32,
  u64,
  withFakeServer,
} from '../support/fake-nbd.js';

let engine: Engine;
let usedBytes: number;
beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
  usedBytes = engine.arena.usedBytes;
});
afterAll(async () => {
  await engine.close();
});

const open = (uri: string) => engine.openDisk(uri, { format: 'raw', readOnly: true });

/** What comes of opening the export. */
function opening(script: (peer: Peer) => Promise<void>): Promise<unknown> {
  return withFakeServer(script, async (uri) => {
    try {
      await (await open(uri)).close();
    } finally {
      expect(engine.arena.usedBytes, 'memory given back').toBe(usedBytes);
    }
  });
}

const PROTOCOL = { code: 'ERR_STILLFRAME_NBD_PROTOCOL' };
const CONNECTION = { code: 'ERR_STILLFRAME_NBD_CONNECTION' };
const REFUSED = { code: 'ERR_STILLFRAME_NBD_REFUSED' };

describe('in the handshake', () => {
  it.each<[what: string, bytes: Uint8Array, error: object]>([
    ['another greeting', Buffer.from('SSH-2.0-OpenSSH_9.2p1\r\n'), PROTOCOL],
    [
      'the old style',
      Buffer.concat([Buffer.from('NBDMAGIC'), u64(0x00420281861253n), Buffer.alloc(200)]),
      {
        code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      },
    ],
    ['an unknown style', Buffer.concat([Buffer.from('NBDMAGIC'), u64(1), u16(3)]), PROTOCOL],
    ['nothing', Buffer.alloc(0), CONNECTION],
    ['half a greeting', GREETING.subarray(0, 9), CONNECTION],
  ])('%s', async (_, bytes, error) => {
    await expect(opening(async (peer) => peer.write(bytes))).rejects.toMatchObject(error);
  });

  it('a server that closes at once', async () => {
    await expect(opening(async ({ socket }) => void socket.end())).rejects.toMatchObject(CONNECTION);
  });

  const go = (...replies: Buffer[]): Manners => ({
    options: (option) => (option === 7 ? Buffer.concat(replies) : undefined),
  });
  const info = (data: Buffer) => optionReply(7, 3, data);
  const exported = (length: number | bigint) => info(Buffer.concat([u16(0), u64(length), u16(0x1ed)]));
  const blocks = (...sizes: number[]) => info(Buffer.concat([u16(3), ...sizes.map(u32)]));
  const ack = optionReply(7, ACK);
  const large = { code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE' };

  it.each<[what: string, manners: Manners, error: object]>([
    [
      'an answer with a wrong magic',
      { options: (option) => Buffer.concat([u64(1), u32(option), u32(ACK), u32(0)]) },
      PROTOCOL,
    ],
    ['an answer to another option', { options: (option) => optionReply(option + 1, ACK) }, PROTOCOL],
    [
      'an answer of 4 GiB',
      {
        options: (option) =>
          Buffer.concat([u64(0x0003e889045565a9n), u32(option), u32(ACK), u32(0xffffffff)]),
      },
      PROTOCOL,
    ],
    [
      'endless answers',
      { options: (option) => Buffer.concat(new Array(1000).fill(optionReply(option, 3, u16(9)))) },
      PROTOCOL,
    ],
    ['no size', go(ack), PROTOCOL],
    ['a short size', go(info(Buffer.concat([u16(0), u64(1)])), ack), PROTOCOL],
    ['information of one byte', go(info(Buffer.alloc(1)), ack), PROTOCOL],
    ['a size of 2^63', go(exported(2n ** 63n), ack), large],
    ['a size of 2^53', go(exported(2 ** 53), ack), large],
    ['blocks that are no power of two', go(exported(1 << 20), blocks(3, 4096, 1 << 25), ack), PROTOCOL],
    ['blocks of nothing', go(exported(1 << 20), blocks(0, 4096, 1 << 25), ack), PROTOCOL],
    ['blocks of 128 KiB', go(exported(1 << 20), blocks(1 << 17, 1 << 17, 1 << 25), ack), PROTOCOL],
    ['requests smaller than a block', go(exported(1 << 20), blocks(4096, 4096, 512), ack), PROTOCOL],
    ['a size that is not in blocks', go(exported(5000), blocks(4096, 4096, 1 << 25), ack), PROTOCOL],
    ['no such export', go(optionReply(7, 0x80000006, Buffer.from('no\x1b[31m such'))), REFUSED],
    ['TLS wanted', { options: (option) => optionReply(option, 0x80000005) }, REFUSED],
    [
      'a context twice',
      {
        options: (option) =>
          option === 10
            ? Buffer.concat([
                ...[1, 2].map((id) =>
                  optionReply(10, 4, Buffer.concat([u32(id), Buffer.from('base:allocation')])),
                ),
                optionReply(10, ACK),
              ])
            : undefined,
      },
      PROTOCOL,
    ],
  ])('%s', async (_, manners, error) => {
    const failure = opening((peer) => handshake(peer, manners));
    await expect(failure).rejects.toMatchObject(error);
    await failure.catch(({ message }: Error) => expect(message).not.toMatch(/\p{C}/u));
  });

  it('answers that drip', async () => {
    const dripping = opening(async (peer) => {
      peer.write(GREETING);
      await peer.read(4);
      const { option } = await peer.option();
      const timer = setInterval(() => {
        if (peer.socket.destroyed) clearInterval(timer);
        else peer.write(optionReply(option, 3, u16(9)));
      }, 50);
    });
    await expect(dripping).rejects.toMatchObject(CONNECTION);
  });

  it('goes on without what the server does not know', async () => {
    await opening((peer) =>
      handshake(peer, { options: (option) => (option === 7 ? undefined : optionReply(option, 0x80000001)) }),
    );
  });
});

describe('in answer to a request', () => {
  type Request = Awaited<ReturnType<Peer['request']>>;

  /** Reads 64 KiB at 64 KiB; the answer is the script's. */
  async function reading(
    answer: (request: Request, peer: Peer) => Buffer | Promise<Buffer>,
  ): Promise<Uint8Array> {
    return withFakeServer(
      async (peer) => {
        await handshake(peer);
        for (;;) {
          const request = await peer.request();
          if (request.command === 2) return;
          peer.write(await answer(request, peer));
        }
      },
      async (uri) => {
        const disk = await open(uri);
        try {
          return await disk.read(65536, 65536);
        } finally {
          await disk.close();
          expect(engine.arena.usedBytes, 'memory given back').toBeLessThan(usedBytes + (9 << 20));
        }
      },
    );
  }
  const data = (flags: number, { cookie }: Request, offset: number, length: number): Buffer =>
    chunk(flags, 1, cookie, Buffer.concat([u64(offset), Buffer.alloc(length, 5)]));
  const hole = (flags: number, { cookie }: Request, offset: number, length: number): Buffer =>
    chunk(flags, 2, cookie, Buffer.concat([u64(offset), u32(length)]));

  it('pieces in any order are put together', async () => {
    const found = await reading((request) =>
      Buffer.concat([
        data(0, request, 65536 + 40000, 25536),
        data(0, request, 65536, 1000),
        hole(0, request, 65536 + 1000, 30000),
        data(0, request, 65536 + 31000, 9000),
        chunk(1, 0, request.cookie),
      ]),
    );
    const expected = Buffer.alloc(65536, 5).fill(0, 1000, 31000);
    expect(expected.equals(found)).toBe(true);
  });

  it.each<[what: string, answer: (request: Request) => Buffer, error: object]>([
    ['a wrong magic', ({ cookie }) => Buffer.concat([u32(1), u32(0), cookie]), PROTOCOL],
    ['an unknown cookie', () => simpleReply(u64(99)), PROTOCOL],
    ['a simple answer', ({ cookie }) => simpleReply(cookie, 0, Buffer.alloc(65536)), PROTOCOL],
    ['data before the range', (request) => data(1, request, 65535, 65536), PROTOCOL],
    ['data behind the range', (request) => data(1, request, 65537, 65536), PROTOCOL],
    [
      'data at 2^64 - 1',
      ({ cookie }) => chunk(1, 1, cookie, Buffer.concat([u64(2n ** 64n - 1n), Buffer.alloc(512)])),
      PROTOCOL,
    ],
    ['too much data', (request) => data(1, request, 65536, 65537), PROTOCOL],
    ['too little data', (request) => data(1, request, 65536, 65535), PROTOCOL],
    ['no data', ({ cookie }) => chunk(1, 0, cookie), PROTOCOL],
    [
      'the same data twice',
      (request) => Buffer.concat([data(0, request, 65536, 40000), data(1, request, 65536 + 39999, 25537)]),
      PROTOCOL,
    ],
    [
      'a hole over data',
      (request) => Buffer.concat([data(0, request, 65536, 65536), hole(1, request, 65536, 1)]),
      PROTOCOL,
    ],
    ['a hole of nothing', (request) => hole(1, request, 65536, 0), PROTOCOL],
    ['a hole of 4 GiB', (request) => hole(1, request, 65536, 0xffffffff), PROTOCOL],
    [
      'a chunk of 4 GiB',
      ({ cookie }) => Buffer.concat([u32(0x668e33ef), u16(1), u16(1), cookie, u32(0xffffffff), u64(65536)]),
      PROTOCOL,
    ],
    ['a chunk without data', ({ cookie }) => chunk(1, 1, cookie, u64(65536)), PROTOCOL],
    ['an unknown chunk', ({ cookie }) => chunk(1, 77, cookie), PROTOCOL],
    [
      'block status',
      ({ cookie }) => chunk(1, 5, cookie, Buffer.concat([u32(7), u32(65536), u32(0)])),
      PROTOCOL,
    ],
    ['an error of 0', ({ cookie }) => chunk(1, 0x8001, cookie, Buffer.concat([u32(0), u16(0)])), PROTOCOL],
    ['a short error', ({ cookie }) => chunk(1, 0x8001, cookie, u32(5)), PROTOCOL],
    [
      'an error with too long a text',
      ({ cookie }) => chunk(1, 0x8001, cookie, Buffer.concat([u32(5), u16(100), Buffer.alloc(50)])),
      PROTOCOL,
    ],
    ['an error of 1 MiB', ({ cookie }) => chunk(1, 0x8001, cookie, Buffer.alloc(1 << 20)), PROTOCOL],
    [
      'an unknown error',
      ({ cookie }) => chunk(1, 0x8099, cookie, Buffer.concat([u32(5), u16(0), Buffer.alloc(9)])),
      { code: 'ERR_STILLFRAME_IO', errno: 'EIO' },
    ],
    [
      'a strange error number',
      ({ cookie }) => simpleReply(cookie, 4711),
      { code: 'ERR_STILLFRAME_IO', errno: 'EINVAL' },
    ],
    [
      'an error',
      ({ cookie }) => chunk(1, 0x8001, cookie, Buffer.concat([u32(5), u16(9), Buffer.from('bad\nblock')])),
      { code: 'ERR_STILLFRAME_IO', message: expect.stringContaining('bad block') },
    ],
    [
      'an error after data',
      (request) =>
        Buffer.concat([
          data(0, request, 65536, 65536),
          chunk(1, 0x8002, request.cookie, Buffer.concat([u32(5), u16(0), u64(65536)])),
        ]),
      { errno: 'EIO' },
    ],
    ['a server that shuts down', ({ cookie }) => simpleReply(cookie, 108), CONNECTION],
  ])('%s', async (_, answer, error) => {
    await expect(reading(answer)).rejects.toMatchObject(error);
  });

  it.each<[what: string, answer: (request: Request, peer: Peer) => Buffer]>([
    ['nothing', () => Buffer.alloc(0)],
    ['half a header', ({ cookie }) => simpleReply(cookie).subarray(0, 7)],
    ['half the data', (request) => data(1, request, 65536, 65536).subarray(0, 30_000)],
    [
      'the end',
      (_, { socket }) => {
        socket.destroy();
        return Buffer.alloc(0);
      },
    ],
    [
      'half the data, and the end',
      (request, { socket }) => {
        socket.end(data(1, request, 65536, 65536).subarray(0, 30_000));
        return Buffer.alloc(0);
      },
    ],
    [
      'an answer that drips and never ends',
      (request, peer) => {
        let at = 65536;
        const timer = setInterval(() => {
          if (peer.socket.destroyed || at === 131072) clearInterval(timer);
          else peer.write(data(0, request, at++, 1));
        }, 20);
        return Buffer.alloc(0);
      },
    ],
    [
      'errors without end',
      ({ cookie }, peer) => {
        const timer = setInterval(() => {
          if (peer.socket.destroyed) clearInterval(timer);
          else peer.write(chunk(0, 0x8001, cookie, Buffer.concat([u32(5), u16(0)])));
        }, 20);
        return Buffer.alloc(0);
      },
    ],
  ])('%s is waited for no longer than the time-out', async (_, answer) => {
    await expect(reading(answer)).rejects.toMatchObject(CONNECTION);
  });
});

describe('in answer to a question for the block status', () => {
  async function mapping(answer: (cookie: Buffer) => Buffer): Promise<number> {
    let entries = 0;
    await withFakeServer(
      async (peer) => {
        await handshake(peer);
        for (;;) {
          const { command, cookie } = await peer.request();
          if (command !== 7) return;
          peer.write(answer(cookie));
        }
      },
      (uri) =>
        engine.mapImage(
          uri,
          (batch) => {
            entries += batch.size;
          },
          { format: 'raw' },
        ),
    );
    expect(engine.arena.usedBytes).toBeLessThan(usedBytes + (9 << 20));
    return entries;
  }
  const status = (cookie: Buffer, context: number, ...extents: (readonly [number, number])[]): Buffer =>
    chunk(
      1,
      5,
      cookie,
      Buffer.concat([u32(context), ...extents.flatMap(([length, flags]) => [u32(length), u32(flags)])]),
    );

  it.each<[what: string, answer: (cookie: Buffer) => Buffer]>([
    ['an extent of nothing', (cookie) => status(cookie, 7, [0, 0])],
    ['no extent', (cookie) => status(cookie, 7)],
    ['half an extent', (cookie) => chunk(1, 5, cookie, Buffer.alloc(10))],
    ['a simple answer', (cookie) => simpleReply(cookie)],
    ['nothing', (cookie) => chunk(1, 0, cookie)],
    [
      'a context twice',
      (cookie) => Buffer.concat([status(cookie, 7, [512, 0]).fill(0, 5, 6), status(cookie, 7, [512, 0])]),
    ],
    ['data', (cookie) => chunk(1, 1, cookie, Buffer.alloc(100))],
  ])('%s', async (_, answer) => {
    await expect(mapping(answer)).rejects.toMatchObject(PROTOCOL);
  });

  it('an error, another context or an extent that is too long are no reason to give up', async () => {
    expect(await mapping((cookie) => simpleReply(cookie, 22))).toBe(1);
    expect(await mapping((cookie) => status(cookie, 8, [1 << 20, 3]))).toBe(1);
    expect(await mapping((cookie) => status(cookie, 7, [4096, 0], [0xffffffff, 3]))).toBe(2);
  });

  it('more extents than anybody wants are left out', async () => {
    const extents = Buffer.alloc(500_000 * 8);
    for (let at = 0; at < extents.length; at += 16) {
      extents[at + 3] = 2;
      extents[at + 11] = 2;
      extents[at + 15] = 3;
    }
    const entries = await mapping((cookie) => chunk(1, 5, cookie, Buffer.concat([u32(7), extents])));
    expect(entries).toBe((1 << 20) / 2);
  });
});
