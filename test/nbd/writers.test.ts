import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { History, LENGTH, runNbdRound, serveRounds } from '../support/nbd-rounds.js';

const ROUNDS = 20;

it(`${ROUNDS} backups under four clients that write over each other, 32 requests under way each`, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-writers-'));
  const engine = await createEngine();
  try {
    const served = await serveRounds(engine, folder);
    const kinds = new Set<string>();
    let requests = 0;
    for (let seed = 1; seed <= ROUNDS; seed++) {
      const report = await runNbdRound(engine, served, folder, seed);
      kinds.add(report.kind);
      requests += report.requests;
    }
    expect(kinds.size).toBe(5);
    expect(requests).toBeGreaterThan(ROUNDS * 4 * 32);
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true });
  }
}, 180_000);

describe('the judge of those backups', () => {
  // Two requests for different places, the second one sent when the first one had been answered; the instant may be
  // before, between and behind them.
  const first = {
    offset: 0,
    end: 4096,
    stamp: Buffer.from([1, 2, 3, 5]),
    mayStay: false,
    sent: 2,
    answered: 3,
  };
  const second = {
    ...first,
    offset: 8192,
    end: 12288,
    stamp: Buffer.from([7, 8, 9, 11]),
    sent: 4,
    answered: 5,
  };
  const flaw = (...seen: readonly (typeof first)[]): number => {
    const history = new History();
    history.changes.push(first, second);
    const initial = new Uint8Array(LENGTH);
    const bytes = new Uint8Array(LENGTH);
    for (const { offset, end, stamp } of seen) {
      for (let at = offset; at < end; at++) bytes[at] = stamp[at % 4] ?? 0;
    }
    return history.flaw(bytes, initial, 1, 6);
  };

  it('takes every moment for an instant', () => {
    expect([flaw(), flaw(first), flaw(first, second)]).toEqual([-1, -1, -1]);
  });

  it('takes no two moments for one', () => {
    expect(flaw(second)).toBe(first.offset);
  });

  it('knows what nobody has written', () => {
    expect(flaw({ ...second, stamp: Buffer.from([7, 8, 9, 12]) })).toBe(second.offset + 3);
  });
});
