/**
 * Randomised rounds of backups under concurrent writers, for as long as wanted:
 * `npm run soak -- --minutes N [--seed S]`. Stops at the first mismatch with the seed that repeats it.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { createEngine } from '#src/index.js';
import { runRound } from '../support/rounds.js';

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '1' },
    seed: { type: 'string' },
    rounds: { type: 'string' },
    folder: { type: 'string', default: tmpdir() },
  },
});
const first = values.seed === undefined ? Date.now() % 1_000_000_000 : Number(values.seed);
const most = Number(values.rounds ?? Number.POSITIVE_INFINITY);
const deadline = performance.now() + Number(values.minutes) * 60_000;
const folder = mkdtempSync(join(values.folder, 'stillframe-soak-'));
const totals = new Map<string, { rounds: number; cancelled: number; requests: number; cbw: number }>();
const engine = await createEngine();
let rounds = 0;
try {
  console.log(`first seed ${first}`);
  for (; performance.now() < deadline && rounds < most; rounds++) {
    const report = await runRound(engine, folder, first + rounds);
    const total = totals.get(report.mode) ?? { rounds: 0, cancelled: 0, requests: 0, cbw: 0 };
    totals.set(report.mode, {
      rounds: total.rounds + 1,
      cancelled: total.cancelled + Number(report.cancelled),
      requests: total.requests + report.requests,
      cbw: total.cbw + report.cbw,
    });
    if (rounds % 100 === 99)
      console.log(`${rounds + 1} rounds, arena in use ${engine.arena.usedBytes} bytes`);
  }
} finally {
  await engine.close();
  rmSync(folder, { recursive: true, force: true });
}
console.log(`${rounds} rounds, seeds ${first} to ${first + rounds - 1}, no mismatch`);
console.table(Object.fromEntries(totals));
