import { readSync, writeSync } from 'node:fs';
import { Duplex } from 'node:stream';
import { setImmediate as turn } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { PlainSide } from '#src/block/nbd/forward.js';
import { sockets } from '#src/os/sockets.js';

/** The other side of a relay: takes what it is given one after the other, when it is told to. */
class SlowSide extends Duplex {
  readonly taken: Buffer[] = [];
  readonly #pending: (() => void)[] = [];
  ended = false;

  constructor() {
    super({ highWaterMark: 1 });
  }

  override _read(): void {
    // Nothing comes from here.
  }

  override _write(bytes: Buffer, _: string, done: () => void): void {
    // Looked at only when it is taken: whoever reads to the same memory too early is found out.
    this.#pending.push(() => {
      this.taken.push(Buffer.from(bytes));
      done();
    });
  }

  override _final(done: () => void): void {
    this.ended = true;
    done();
  }

  takeOne(): boolean {
    const take = this.#pending.shift();
    take?.();
    return take !== undefined;
  }

  get bytes(): number {
    return this.taken.reduce((sum, { length }) => sum + length, 0);
  }
}

const calls = sockets();

test.skipIf(calls === undefined)(
  'hands plain text on in order, and reads no more than it can hold',
  async () => {
    if (calls === undefined) return;
    const [far, near] = calls.pair();
    const side = new PlainSide(near);
    const slow = new SlowSide();
    const data = Buffer.from(Array.from({ length: 100_000 }, (_, index) => (index * 7) ^ (index >> 8)));
    // What is there before anybody wants it waits.
    writeSync(far, data);
    for (let round = 0; round < 20; round++) await turn();
    expect(slow.bytes).toBe(0);
    side.forwardTo(slow);
    let sent = 1;
    for (let round = 0; round < 40; round++) {
      // Nothing more than three buffers is out of the pair, however long nobody takes it.
      await turn();
      if (round % 3 === 0) slow.takeOne();
      if (slow.bytes + 100_000 >= sent * data.length && sent < 12) {
        writeSync(far, data);
        sent++;
      }
    }
    while (slow.bytes < sent * data.length) {
      slow.takeOne();
      await turn();
    }
    expect(Buffer.concat(slow.taken).equals(Buffer.concat(Array.from({ length: sent }, () => data)))).toBe(
      true,
    );
    calls.finish(far);
    while (!slow.ended) {
      slow.takeOne();
      await turn();
    }
    side.socket.write('back');
    const back = Buffer.alloc(4);
    await turn();
    expect(readSync(far, back)).toBe(4);
    expect(back.toString()).toBe('back');
    const closed = new Promise((resolve) => side.socket.once('close', resolve));
    side.socket.destroy();
    await closed;
    calls.close(far);
  },
);

test.skipIf(calls === undefined)('leaves in the pair what the other side does not take', async () => {
  if (calls === undefined) return;
  const [far, near] = calls.pair();
  calls.setTimeout(far, 1);
  const side = new PlainSide(near);
  const slow = new SlowSide();
  side.forwardTo(slow);
  const data = Buffer.alloc(64 * 1024);
  let sent = 0;
  let full = 0;
  // Until nothing was taken for many turns of the event loop.
  while (full < 50) {
    try {
      sent += writeSync(far, data);
      full = 0;
    } catch {
      full++;
    }
    await turn();
    expect(sent).toBeLessThan(16 * 1024 * 1024);
  }
  while (slow.bytes < sent) {
    slow.takeOne();
    await turn();
  }
  expect(slow.bytes).toBe(sent);
  const closed = new Promise((resolve) => side.socket.once('close', resolve));
  side.socket.destroy();
  await closed;
  calls.close(far);
});
