/** Exports of an instant of a disk that goes on being written to. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type NbdServer } from '#src/index.js';
import { startStillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { RawClient, tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-freeze-'));
const at = (name: string): string => join(folder, name);
const socket = at('socket');
const uri = (name = ''): string => `nbd+unix:///${name}?socket=${socket}`;
const LENGTH = 8 << 20;
const content = new Random(31).bytes(LENGTH).fill(0, 2 << 20, 3 << 20);

let engine: Engine;
let disk: Disk;
let server: NbdServer;
const clients: RawClient[] = [];

beforeAll(async () => {
  mkdirSync(at('images'));
  engine = await createEngine({ workers: 1 });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
afterEach(async () => {
  for (const client of clients.splice(0)) client.destroy();
  await server.close();
  await disk.close();
});

async function serve(format: 'raw' | 'qcow2'): Promise<void> {
  writeFileSync(at('content'), content);
  run('qemu-img', ['convert', '-f', 'raw', '-O', format, at('content'), at('images/disk')]);
  disk = await engine.openDisk(at('images/disk'), { format });
  server = await engine.serveNbd({ listen: `unix:${socket}`, exports: [{ disk }] });
}

async function client(exportName = ''): Promise<RawClient> {
  const made = await RawClient.to(socket, { options: [], exportName });
  clients.push(made);
  return made;
}

/** Writes, zeroes and frees at random until it is told to stop. */
async function scribble(seed: number, going: () => boolean): Promise<number> {
  const one = await client();
  const random = new Random(seed);
  let requests = 0;
  for (; going(); requests++) {
    const length = random.between(1, 100_000);
    const offset = random.between(0, LENGTH - length);
    const kind = random.between(0, 9);
    if (kind === 0) one.request(4, requests, offset, length);
    else if (kind === 1) one.request(6, requests, offset, length);
    else one.request(1, requests, offset, length, 0, random.bytes(length));
    expect((await one.answer()).error).toBe(0);
  }
  return requests;
}

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('nbdcopy'))('a frozen export', () => {
  it.each(['raw', 'qcow2'] as const)(
    'is the drive at its instant, whatever is written (%s)',
    async (format) => {
      await serve(format);
      let going = true;
      const writers = [1, 2, 3, 4].map((seed) => scribble(seed, () => going));
      await new Promise((resolve) => setTimeout(resolve, 50));
      for (let round = 0; round < 3; round++) {
        const frozen = await disk.freeze();
        await server.addExport({ disk: frozen, name: 'still' });
        await tool('nbdcopy', '-C', '2', uri('still'), at('first'));
        await tool('nbdcopy', '--synchronous', uri('still'), at('second'));
        const again = await client('still');
        for (const offset of [0, 12345, 2 << 20, LENGTH - 70_000]) {
          again.request(0, 1, offset, 70_000);
          const { data } = await again.answer(70_000);
          expect(data.equals(readFileSync(at('first')).subarray(offset, offset + 70_000))).toBe(true);
        }
        expect(firstDifference(readFileSync(at('second')), readFileSync(at('first')))).toBe(-1);
        expect(frozen.savedBytes).toBeGreaterThan(0);
        await frozen.close();
        await again.closed();
      }
      going = false;
      for (const requests of await Promise.all(writers)) expect(requests).toBeGreaterThan(10);
    },
  );

  it('has exactly what was written before it, and tells its holes', async () => {
    await serve('raw');
    const writer = await client();
    writer.request(1, 1, 100, 3, 0, Buffer.from('old'));
    await writer.answer();
    const frozen = await disk.freeze({ scratch: folder });
    expect(readdirSync(folder).filter((name) => name.includes('frozen'))).toEqual([]);
    await server.addExport({ disk: frozen, name: 'still' });
    writer.request(1, 2, 100, 3, 0, Buffer.from('new'));
    await writer.answer();
    writer.request(6, 3, 4 << 20, 1 << 20);
    await writer.answer();
    writer.request(1, 4, 2 << 20, 65536, 0, Buffer.alloc(65536, 1));
    await writer.answer();
    const expected = Buffer.from(content);
    expected.write('old', 100);
    await tool('nbdcopy', uri('still'), at('copy'));
    expect(firstDifference(readFileSync(at('copy')), expected)).toBe(-1);
    const map = JSON.parse(await tool('nbdinfo', '--json', '--map', uri('still')));
    expect(map.filter(({ type }: { type: number }) => type === 3)).toEqual(
      expect.arrayContaining([expect.objectContaining({ offset: 2 << 20, length: 1 << 20 })]),
    );
    const info = JSON.parse(await tool('nbdinfo', '--json', uri('still')));
    expect(info.exports[0]).toMatchObject({ is_read_only: true, can_multi_conn: true });
    const job = await (await engine.openDisk(uri('still'), { format: 'raw', readOnly: true })).backup({
      target: at('backup'),
      format: 'raw',
      sync: 'full',
      force: true,
    });
    await job.result();
    expect(firstDifference(readFileSync(at('backup')), expected)).toBe(-1);
  });

  it('stays as it is while its data is on the way', async () => {
    await serve('raw');
    await server.addExport({ disk: await disk.freeze(), name: 'still' });
    const reader = await client('still');
    reader.pause();
    for (const offset of [0, 128 << 10, 256 << 10]) reader.request(0, offset, offset, 128 << 10);
    await new Promise((resolve) => setTimeout(resolve, 200));
    const writer = await client();
    writer.request(1, 1, 0, 1 << 20, 0, Buffer.alloc(1 << 20, 7));
    expect((await writer.answer()).error).toBe(0);
    reader.resume();
    for (const offset of [0, 128 << 10, 256 << 10]) {
      const { data } = await reader.answer(128 << 10);
      expect(data.equals(content.subarray(offset, offset + (128 << 10)))).toBe(true);
    }
  });

  it('takes no writes', async () => {
    await serve('raw');
    await server.addExport({ disk: await disk.freeze(), name: 'still' });
    const one = await client('still');
    one.request(1, 1, 0, 512, 0, Buffer.alloc(512));
    expect((await one.answer()).error).toBe(1);
  });

  it('leaves nothing behind', async () => {
    await serve('raw');
    // Threads take memory for good: the server's when it starts, and has it once it answers; the pool's for the first one.
    const one = await client();
    one.request(0, 1, 0, 512);
    await one.answer(512);
    await (await disk.freeze()).close();
    const before = engine.arena.usedBytes;
    for (let round = 0; round < 12; round++) await (await disk.freeze()).close();
    expect(engine.arena.usedBytes).toBe(before);
    expect(readdirSync(at('images'))).toEqual(['disk']);
  });

  it('ends with its instant, and its name can be used again', async () => {
    await serve('raw');
    const frozen = await disk.freeze();
    await server.addExport({ disk: frozen, name: 'still' });
    await expect(server.addExport({ disk, name: 'still' })).rejects.toThrow(
      "two exports have the name 'still'",
    );
    const one = await client('still');
    await frozen.close();
    await one.closed();
    await expect(client('still')).rejects.toThrow('no export');
    await server.addExport({ disk, name: 'still' });
    const other = await client('still');
    other.request(0, 1, 0, 512);
    expect((await other.answer(512)).data).toEqual(Buffer.from(content.subarray(0, 512)));
  });
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('nbdcopy'))('serve --freeze', () => {
  beforeEach(() => serve('raw'));

  it('exports the instant beside the live disk', async () => {
    await server.close();
    await disk.close();
    const args = ['serve', at('images/disk'), '-f', 'raw', '--nbd', `unix:${socket}`, '--freeze', 'still'];
    const { child, finished } = startStillframe(args);
    await new Promise<void>((resolve) => {
      let text = '';
      child.stdout?.on('data', (data) => {
        text += String(data);
        if (text.includes('/still?')) resolve();
      });
    });
    const writer = await client();
    writer.request(1, 1, 0, 1 << 20, 0, Buffer.alloc(1 << 20, 7));
    expect((await writer.answer()).error).toBe(0);
    await tool('nbdcopy', uri('still'), at('still'));
    expect(firstDifference(readFileSync(at('still')), content)).toBe(-1);
    child.kill('SIGTERM');
    expect((await finished).status).toBe(0);
    expect(readFileSync(at('images/disk')).subarray(0, 1 << 20)).toEqual(Buffer.alloc(1 << 20, 7));
  });
});
