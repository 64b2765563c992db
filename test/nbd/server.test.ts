/** The NBD server, looked at from the wire. */
import {
  closeSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type NbdServer } from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { u16, u32, u64 } from '../support/fake-nbd.js';
import { counted, EXTENDED, RawClient, SIMPLE, STRUCTURED } from '../support/nbd-client.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-serve-'));
const at = (name: string): string => join(folder, name);
const socket = at('socket');
const LENGTH = 4 << 20;
const content = new Random(11).bytes(LENGTH).fill(0, 1 << 20, 2 << 20);
const HOLE = { offset: 1 << 20, length: 1 << 20 };

let engine: Engine;
let disk: Disk;
let server: NbdServer;
const clients: RawClient[] = [];

beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
beforeEach(async () => {
  writeFileSync(at('disk'), content.subarray(0, HOLE.offset));
  const after = HOLE.offset + HOLE.length;
  const fd = openSync(at('disk'), 'r+');
  writeSync(fd, content, after, LENGTH - after, after);
  closeSync(fd);
  disk = await engine.openDisk(at('disk'), { format: 'raw' });
  server = await engine.serveNbd({
    listen: `unix:${socket}`,
    exports: [
      { disk, name: '' },
      { disk, name: 'ro', readOnly: true, description: 'to look at' },
    ],
  });
});
afterEach(async () => {
  for (const client of clients.splice(0)) client.destroy();
  await server.close();
  await disk.close();
});

async function client(
  ...args: Parameters<typeof RawClient.to> extends [string, ...infer Rest] ? Rest : never
) {
  const made = await RawClient.to(socket, ...args);
  clients.push(made);
  return made;
}

const simple = () => client({ options: [] });
const extended = (contexts: readonly string[] = []) => client({ options: [11], contexts });

describe('requests', () => {
  it('reads, in simple replies without holes', async () => {
    const one = await simple();
    one.request(0, 7, HOLE.offset - 100, 1000);
    const { magic, error, cookie, data } = await one.answer(1000);
    expect([magic, error, cookie]).toEqual([SIMPLE, 0, 7n]);
    expect(data).toEqual(Buffer.from(content.subarray(HOLE.offset - 100, HOLE.offset + 900)));
  });

  it('reads in parts that leave the holes out, or in one where that is wanted', async () => {
    const one = await client();
    one.request(0, 7, HOLE.offset - 4096, 8192 + HOLE.length);
    const parts = await one.answers();
    expect(parts.map(({ magic, type, flags, data }) => [magic, type, flags, data.length])).toEqual([
      [STRUCTURED, 1, 0, 8 + 4096],
      [STRUCTURED, 2, 0, 12],
      [STRUCTURED, 1, 1, 8 + 4096],
    ]);
    expect(parts[1]?.data.readUInt32BE(8)).toBe(HOLE.length);
    one.request(0, 8, HOLE.offset - 4096, 8192 + HOLE.length, 4);
    const [whole, end] = await one.answers();
    expect(whole?.data.length).toBe(8 + 8192 + HOLE.length);
    expect(whole?.data.subarray(8)).toEqual(
      Buffer.from(content.subarray(HOLE.offset - 4096, HOLE.offset + HOLE.length + 4096)),
    );
    expect(end?.flags ?? 1).toBe(1);
  });

  it('reads large pieces wherever they begin, from holes and from beyond the end of a file that was cut', async () => {
    const [plain, parts] = [await simple(), await client()];
    const read = async (offset: number, length: number): Promise<Buffer> => {
      plain.request(0, 1, offset, length);
      const { data } = await plain.answer(length);
      parts.request(0, 2, offset, length, 4);
      const [first] = await parts.answers();
      expect(first?.data.subarray(8).equals(data)).toBe(true);
      return data;
    };
    for (const [offset, length] of [
      [0, 1 << 20],
      [12345, 1 << 20],
      [HOLE.offset - 70_001, 140_003],
      [2 << 20, 32 * 1024],
      [LENGTH - (1 << 20), 1 << 20],
    ] as const) {
      expect((await read(offset, length)).equals(content.subarray(offset, offset + length))).toBe(true);
    }
    truncateSync(at('disk'), 3 << 20);
    const cut = await read((3 << 20) - 100_000, 200_000);
    expect(cut.subarray(0, 100_000).equals(content.subarray((3 << 20) - 100_000, 3 << 20))).toBe(true);
    expect(cut.subarray(100_000).equals(Buffer.alloc(100_000))).toBe(true);
    expect((await read(0, 1 << 20)).equals(content.subarray(0, 1 << 20))).toBe(true);
  });

  it('reads nothing', async () => {
    const [plain, parts] = [await simple(), await client()];
    plain.request(0, 1, LENGTH, 0);
    expect(await plain.answer()).toMatchObject({ magic: SIMPLE, error: 0 });
    parts.request(0, 1, 0, 0);
    expect(await parts.answers()).toMatchObject([{ magic: STRUCTURED, type: 0, flags: 1 }]);
  });

  it.each([1, 4095, 70_000, 1 << 20, (1 << 20) + 1, 3 << 20])(
    'writes %i bytes at an odd place',
    async (length) => {
      const data = new Random(length).bytes(length);
      const one = await client();
      one.request(1, 1, 513, length, 0, data);
      one.request(3, 2, 0, 0);
      expect([(await one.answer()).cookie, (await one.answer()).cookie].sort()).toEqual([1n, 2n]);
      one.request(0, 3, 513, length, 4);
      const [whole] = await one.answers();
      expect(firstDifference(whole?.data.subarray(8) ?? Buffer.alloc(0), data)).toBe(-1);
      expect(firstDifference(readFileSync(at('disk')).subarray(513, 513 + length), data)).toBe(-1);
    },
  );

  it('zeroes, frees, hints and makes durable', async () => {
    const one = await client();
    const blocks = () => statSync(at('disk')).blocks;
    const before = blocks();
    one.request(6, 1, 0, 65536, 1 | 2);
    expect(await one.answer()).toMatchObject({ magic: SIMPLE, error: 0 });
    expect(blocks()).toBe(before);
    one.request(6, 2, 65536, 65536, 16);
    expect((await one.answer()).error).toBe(0);
    expect(blocks()).toBeLessThan(before);
    one.request(4, 3, 131072, 65536, 1);
    expect((await one.answer()).error).toBe(0);
    one.request(5, 4, 0, LENGTH);
    expect((await one.answer()).error).toBe(0);
    expect(
      readFileSync(at('disk'))
        .subarray(0, 196608)
        .every((byte) => byte === 0),
    ).toBe(true);
  });

  it('refuses what is wrong with it and goes on', async () => {
    const one = await client();
    const errorOf = async (...request: Parameters<RawClient['request']>) => {
      one.request(...request);
      return (await one.answers()).at(-1)?.error;
    };
    expect(await errorOf(0, 1, LENGTH - 1, 2)).toBe(22);
    expect(await errorOf(0, 1, 2n ** 64n - 1n, 2)).toBe(22);
    expect(await errorOf(1, 1, LENGTH - 1, 2, 0, Buffer.alloc(2))).toBe(28);
    expect(await errorOf(6, 1, LENGTH, 1)).toBe(28);
    expect(await errorOf(4, 1, LENGTH, 1)).toBe(22);
    expect(await errorOf(99, 1, 0, 0)).toBe(22);
    expect(await errorOf(0, 1, 0, 1, 64)).toBe(22);
    expect(await errorOf(7, 1, 0, 512)).toBe(22);
    expect(await errorOf(1, 1, 0, 1, 64, Buffer.alloc(1))).toBe(22);
    one.request(0, 9, 0, 512);
    expect((await one.answers())[0]?.data.subarray(8)).toEqual(Buffer.from(content.subarray(0, 512)));
  });

  it('says in words what is wrong', async () => {
    const one = await client();
    one.request(0, 1, LENGTH, 512);
    const { data } = await one.answer();
    expect(data.toString('utf8', 6)).toBe(`the drive has ${LENGTH} bytes`);
  });

  it('takes writes of more than it advertises, and reads those it refuses to their end', async () => {
    const one = await client();
    one.request(1, 1, 0, (64 << 20) + 512, 0, Buffer.alloc((64 << 20) + 512));
    expect((await one.answer()).error).toBe(22);
    one.request(1, 2, 0, 40 << 20, 0, Buffer.alloc(40 << 20));
    expect((await one.answer()).error).toBe(28);
    one.request(0, 3, 0, 512);
    expect((await one.answers()).at(-1)?.error).toBe(0);
  });

  it('puts out who wants to send far too much, and who sends no requests', async () => {
    const much = await client();
    much.request(1, 1, 0, 0xffffffff);
    await much.closed();
    const odd = await client();
    odd.send(Buffer.alloc(28, 1));
    await odd.closed();
    expect((await client()).request(2, 0, 0, 0)).toBeUndefined();
  });

  it('lets nobody write to a read-only export, and takes the data of whoever tries', async () => {
    const one = await client({ exportName: 'ro' });
    one.request(1, 1, 0, 4096, 0, Buffer.alloc(4096, 1));
    expect((await one.answer()).error).toBe(1);
    one.request(6, 2, 0, 4096);
    expect((await one.answer()).error).toBe(1);
    one.request(4, 3, 0, 4096);
    expect((await one.answer()).error).toBe(1);
    one.request(3, 4, 0, 0);
    expect((await one.answer()).error).toBe(0);
    expect(firstDifference(readFileSync(at('disk')), content)).toBe(-1);
  });

  it('answers everything before the leave', async () => {
    const one = await client({ options: [] });
    for (let index = 0; index < 100; index++) one.request(0, index, index * 512, 512);
    one.request(2, 999, 0, 0);
    const cookies = new Set<bigint>();
    for (let index = 0; index < 100; index++) cookies.add((await one.answer(512)).cookie);
    expect(cookies.size).toBe(100);
    await one.closed();
  });

  it('answers everything before the end of what a client sends', async () => {
    const one = await client({ options: [] });
    for (let index = 0; index < 100; index++) one.request(0, index, index * 512, 512);
    one.end();
    for (let index = 0; index < 100; index++) expect((await one.answer(512)).error).toBe(0);
    await one.closed();
  });

  it('understands requests that come byte by byte', async () => {
    const one = await client({ options: [] });
    const bytes = Buffer.concat([
      u32(0x25609513),
      u16(0),
      u16(1),
      u64(5),
      u64(100),
      u32(10),
      Buffer.alloc(10, 9),
      u32(0x25609513),
      u16(0),
      u16(0),
      u64(6),
      u64(95),
      u32(20),
    ]);
    for (const byte of bytes) {
      one.send(Uint8Array.of(byte));
      await new Promise((resolve) => setImmediate(resolve));
    }
    expect(await one.answer()).toMatchObject({ cookie: 5n, error: 0 });
    const { data } = await one.answer(20);
    expect(data.subarray(5, 15)).toEqual(Buffer.alloc(10, 9));
  });
});

describe('extended headers', () => {
  it('reads and writes', async () => {
    const one = await extended();
    one.extended(1, 1, 512, 8, 32, Buffer.alloc(8, 3));
    expect(await one.answers()).toMatchObject([{ magic: EXTENDED, type: 0, flags: 1, cookie: 1n }]);
    one.extended(0, 2, 510, 12);
    const [{ data } = { data: Buffer.alloc(0) }] = await one.answers();
    expect(data.readBigUInt64BE(0)).toBe(510n);
    expect(data.subarray(10, 18)).toEqual(Buffer.alloc(8, 3));
  });

  it('reads the data of whatever has some', async () => {
    const one = await extended();
    one.extended(1, 1, 0, 512);
    expect((await one.answer()).error).toBe(22);
    one.extended(3, 2, 0, 512, 32, Buffer.alloc(512));
    expect((await one.answer()).error).toBe(22);
    one.extended(3, 3, 0, 0);
    expect((await one.answer()).error).toBe(0);
    one.extended(0, 4, 0, 2n ** 63n);
    expect((await one.answer()).error).toBe(22);
  });

  it('has the status of chosen contexts for questions with data', async () => {
    const one = await extended(['base:allocation', 'qemu:allocation-depth']);
    one.extended(7, 1, 0, LENGTH);
    const both = await one.answers();
    expect(both.map(({ type, data }) => [type, data.readUInt32BE(0), data.readUInt32BE(4)])).toEqual([
      [6, 1, 3],
      [6, 2, 1],
    ]);
    expect(both[0]?.data.subarray(8).toString('hex')).toBe(
      Buffer.concat(
        [HOLE.offset, 0, HOLE.length, 3, LENGTH - HOLE.offset - HOLE.length, 0].map(u64),
      ).toString('hex'),
    );
    one.extended(7, 2, 0, 12, 32, Buffer.concat([u64(LENGTH), u32(2)]));
    expect((await one.answers()).map(({ data }) => data.readUInt32BE(0))).toEqual([2]);
    for (const data of [
      Buffer.concat([u64(LENGTH), u32(3)]),
      Buffer.concat([u64(LENGTH), u32(1), u32(1)]),
      Buffer.concat([u64(LENGTH + 1), u32(1)]),
      Buffer.concat([u64(0), u32(1)]),
      u64(LENGTH),
      Buffer.alloc(3),
      Buffer.alloc(0),
      Buffer.alloc(2 << 20),
    ]) {
      one.extended(7, 3, 0, data.length, 32, data);
      expect((await one.answers()).map(({ error }) => error)).toEqual([22]);
    }
  });
});

describe('block status', () => {
  const extents = (data: Buffer | undefined): number[] =>
    data === undefined
      ? []
      : [...Array((data.length - 4) / 4).keys()].map((index) => data.readUInt32BE(4 + 4 * index));

  it('says where holes are', async () => {
    const one = await client({ contexts: ['base:allocation'] });
    one.request(7, 1, 512, LENGTH - 512);
    const [answer, ...rest] = await one.answers();
    expect(rest).toEqual([]);
    expect(answer).toMatchObject({ type: 5, flags: 1 });
    expect(extents(answer?.data)).toEqual([
      HOLE.offset - 512,
      0,
      HOLE.length,
      3,
      LENGTH - HOLE.offset - HOLE.length,
      0,
    ]);
    one.request(7, 2, 512, LENGTH - 512, 8);
    expect(extents((await one.answer()).data)).toEqual([HOLE.offset - 512, 0]);
    one.request(7, 3, HOLE.offset + 1, 7, 8);
    expect(extents((await one.answer()).data)).toEqual([7, 3]);
  });

  it('has no contexts for an export they were not chosen for', async () => {
    const one = new RawClient(socket);
    clients.push(one);
    await one.greet();
    await one.option(8);
    await one.option(10, counted('ro'), u32(1), counted('base:allocation'));
    await one.option(7, counted(''), u16(0));
    one.request(7, 1, 0, 512);
    expect((await one.answer()).error).toBe(22);
  });
});

describe('many at once', () => {
  it('keeps what several clients write apart and durable for each other', async () => {
    const many = await Promise.all(Array.from({ length: 8 }, () => simple()));
    const each = LENGTH / 8;
    const random = new Random(5);
    const expected = Buffer.from(content);
    for (let round = 0; round < 20; round++) {
      for (const [index, one] of many.entries()) {
        const data = random.bytes(random.between(1, 5000));
        const offset = index * each + random.between(0, each - data.length);
        expected.set(data, offset);
        one.request(1, round, offset, data.length, 0, data);
        await one.answer();
      }
    }
    many[0]?.request(3, 1, 0, 0);
    expect((await many[0]?.answer())?.error).toBe(0);
    many[1]?.request(0, 1, 0, LENGTH);
    expect(firstDifference((await many[1]?.answer(LENGTH))?.data ?? Buffer.alloc(0), expected)).toBe(-1);
  });

  it('takes an instant between the writes of its clients', async () => {
    const [one, two] = [await simple(), await simple()];
    let stop = false;
    const write = async (who: RawClient, value: number) => {
      for (let round = 0; !stop; round++) {
        who.request(1, round, (round % 64) * 65536, 65536, 0, Buffer.alloc(65536, value));
        await who.answer();
      }
    };
    const before = readFileSync(at('disk'));
    const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full' });
    const writing = [write(one, 1), write(two, 2)];
    await job.result();
    stop = true;
    await Promise.all(writing);
    expect(firstDifference(readFileSync(at('copy')), before)).toBe(-1);
  });
});

describe('the end', () => {
  it('refuses new requests, answers those under way, and leaves no socket', async () => {
    const one = await simple();
    one.request(1, 1, 0, 4096, 0, Buffer.alloc(4096, 5));
    expect((await one.answer()).error).toBe(0);
    await server.close();
    await one.closed();
    expect(() => statSync(socket)).toThrow();
    expect(readFileSync(at('disk')).subarray(0, 4096)).toEqual(Buffer.alloc(4096, 5));
    await disk.write(0, new Uint8Array(512));
  });

  it('comes with that of a disk', async () => {
    const one = await simple();
    await disk.close();
    await one.closed();
    expect(server.connections).toBe(0);
  });

  it('gives all memory back', async () => {
    await server.close();
    const before = engine.arena.usedBytes;
    for (let round = 0; round < 3; round++) {
      server = await engine.serveNbd({ listen: `unix:${socket}`, exports: [{ disk }] });
      const one = await simple();
      one.request(0, 1, 0, 4096);
      await one.answer(4096);
      await server.close();
    }
    expect(engine.arena.usedBytes).toBe(before);
  });
});
