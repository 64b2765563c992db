/** Extended headers, against a server of the test's own: those that are packaged do not have them yet. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { Random } from '../support/data.js';
import {
  ACK,
  chunk,
  extendedChunk,
  handshake,
  optionReply,
  type Peer,
  u32,
  u64,
  withFakeServer,
} from '../support/fake-nbd.js';

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
});
afterAll(async () => {
  await engine.close();
});

const LENGTH = 1 << 20;

/** Serves a drive of one MiB, the first half of which is data. */
async function serve(peer: Peer, drive: Buffer, log: string[]): Promise<void> {
  const options: number[] = [];
  await handshake(peer, {
    length: LENGTH,
    options: (option) => {
      options.push(option);
      return option === 11 ? optionReply(option, ACK) : undefined;
    },
  });
  log.push(`options ${options}`);
  for (;;) {
    const { command, flags, cookie, offset, length } = await peer.extendedRequest();
    log.push(`${command} ${flags} ${offset} ${length}`);
    if (command === 0) {
      peer.write(
        extendedChunk(0, 1, cookie, Buffer.concat([u64(offset), drive.subarray(offset, offset + length)])),
      );
      peer.write(extendedChunk(1, 0, cookie));
    } else if (command === 1) {
      drive.set(await peer.read(length), offset);
      peer.write(extendedChunk(1, 0, cookie));
    } else if (command === 7) {
      const extents = [LENGTH / 2, 0, 2 ** 40, 3].map(u64);
      peer.write(extendedChunk(1, 6, cookie, Buffer.concat([u32(7), u32(2), ...extents])));
    } else if (command === 2) return;
    else peer.write(extendedChunk(1, 0, cookie));
  }
}

it('are asked for first and used for everything', async () => {
  const drive = Buffer.from(new Random(1).noise(LENGTH));
  const log: string[] = [];
  await withFakeServer(
    (peer) => serve(peer, drive, log),
    async (uri) => {
      const disk = await engine.openDisk(uri, { format: 'raw' });
      await disk.write(512, new Uint8Array(1024).fill(9));
      await disk.writeZeroes(4096, 4096);
      await disk.flush();
      expect(Buffer.from(await disk.read(0, 2048)).equals(drive.subarray(0, 2048))).toBe(true);
      await disk.close();
      const sizes: number[] = [];
      await engine.mapImage(
        uri,
        (batch) => {
          for (let index = 0; index < batch.size; index++) sizes.push(batch.lengthOf(index));
        },
        { format: 'raw' },
      );
      expect(sizes).toEqual([LENGTH / 2, LENGTH / 2]);
    },
  );
  expect(drive.subarray(512, 1536).every((byte) => byte === 9)).toBe(true);
  expect(log.slice(0, 5)).toEqual([
    'options 11,10,7',
    '1 32 512 1024',
    '6 2 4096 4096',
    '3 0 0 0',
    '0 0 0 2048',
  ]);
});

it('are what every answer has then', async () => {
  const outcome = withFakeServer(
    async (peer) => {
      await handshake(peer, { options: (option) => (option === 11 ? optionReply(option, ACK) : undefined) });
      const { cookie } = await peer.extendedRequest();
      peer.write(chunk(1, 0, cookie, Buffer.alloc(64)));
    },
    async (uri) => {
      const disk = await engine.openDisk(uri, { format: 'raw', readOnly: true });
      try {
        await disk.read(0, 512);
      } finally {
        await disk.close();
      }
    },
  );
  await expect(outcome).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_PROTOCOL' });
});
