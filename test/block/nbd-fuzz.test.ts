/** The client against servers whose answers are damaged at random: it ends with data or a typed error, and soon. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { Random } from '../support/data.js';
import { chunk, handshake, type Peer, simpleReply, u32, u64, withFakeServer } from '../support/fake-nbd.js';

const SESSIONS = Number(process.env['STILLFRAME_NBD_SESSIONS'] ?? 240);
const AT_ONCE = 8;
const LENGTH = 1 << 20;

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ workers: AT_ONCE, requestThreads: AT_ONCE });
});
afterAll(async () => {
  await engine.close();
});

/** A peer that damages some of what the server says. */
function damaging(peer: Peer, random: Random): Peer {
  const write = peer.write.bind(peer);
  peer.write = (...parts) => {
    const bytes = Buffer.concat(parts);
    if (random.chance(0.25)) {
      const at = random.between(0, Math.min(bytes.length, 64) - 1);
      const kind = random.next();
      if (kind < 0.4) bytes[at] = random.between(0, 255);
      else if (kind < 0.6) bytes[at] = random.pick([0, 1, 0x7f, 0x80, 0xff]);
      else if (kind < 0.7) return write(bytes.subarray(0, at));
      else if (kind < 0.8) return write(bytes, bytes.subarray(at));
      else if (kind < 0.9) return write(random.bytes(at + 1), bytes);
      else if (kind < 0.95) bytes.fill(0xff, at, at + 4);
      else peer.socket.end();
    }
    return write(bytes);
  };
  return peer;
}

async function serve(peer: Peer): Promise<void> {
  await handshake(peer, { length: LENGTH });
  for (;;) {
    const { command, cookie, offset, length } = await peer.request();
    if (command === 0) {
      const half = Math.ceil(length / 2);
      peer.write(chunk(0, 1, cookie, Buffer.concat([u64(offset), Buffer.alloc(half, 5)])));
      if (length > half)
        peer.write(chunk(0, 2, cookie, Buffer.concat([u64(offset + half), u32(length - half)])));
      peer.write(chunk(1, 0, cookie));
    } else if (command === 1) {
      await peer.read(length);
      peer.write(simpleReply(cookie));
    } else if (command === 7) {
      peer.write(chunk(1, 5, cookie, Buffer.concat([u32(7), ...[LENGTH / 2, 0, LENGTH / 2, 3].map(u32)])));
    } else if (command === 2) return;
    else peer.write(simpleReply(cookie));
  }
}

const EXPECTED = [
  'ERR_STILLFRAME_NBD_CONNECTION',
  'ERR_STILLFRAME_NBD_PROTOCOL',
  'ERR_STILLFRAME_NBD_REFUSED',
  // Errors of requests, sizes and flags that damage made.
  'ERR_STILLFRAME_IO',
  'ERR_STILLFRAME_NO_SPACE',
  'ERR_STILLFRAME_OUT_OF_RANGE',
  'ERR_STILLFRAME_PERMISSION',
  'ERR_STILLFRAME_READ_ONLY',
  'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
];

async function session(seed: number): Promise<string> {
  const random = new Random(seed);
  try {
    await withFakeServer(
      (peer) => serve(damaging(peer, random)),
      async (uri) => {
        const name = uri.replace('x-timeout=0.5', 'x-timeout=0.1');
        const disk = await engine.openDisk(name, { format: 'raw' });
        try {
          await disk.read(0, 65536);
          await disk.write(512, new Uint8Array(512));
          await disk.writeZeroes(4096, 4096);
          await disk.flush();
          await disk.read(LENGTH - 512, 512);
        } finally {
          await disk.close();
        }
        await engine.mapImage(name, () => undefined, { format: 'raw' });
      },
    );
    return 'ended well';
  } catch (error) {
    const code = String(error instanceof Error && 'code' in error ? error.code : error);
    return EXPECTED.includes(code) ? code : `seed ${seed}: ${error}`;
  }
}

it(`${SESSIONS} damaged sessions end as they should`, async () => {
  const used = engine.arena.usedBytes;
  const outcomes = new Map<string, number>();
  for (let first = 0; first < SESSIONS; first += AT_ONCE) {
    const seeds = Array.from({ length: AT_ONCE }, (_, index) => first + index);
    for (const outcome of await Promise.all(seeds.map(session))) {
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
    }
  }
  const unexpected = [...outcomes.keys()].filter((outcome) => outcome.startsWith('seed'));
  expect(unexpected).toEqual([]);
  for (const outcome of ['ended well', ...EXPECTED.slice(0, 2)])
    expect(outcomes.has(outcome), outcome).toBe(true);
  expect(engine.arena.usedBytes, 'memory given back').toBe(used);
});
