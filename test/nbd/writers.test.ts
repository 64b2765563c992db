import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { runNbdRound } from '../support/nbd-rounds.js';

const ROUNDS = 20;

it(`${ROUNDS} backups under four clients that write over each other, 32 requests under way each`, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-writers-'));
  const engine = await createEngine();
  try {
    const kinds = new Set<string>();
    let requests = 0;
    for (let seed = 1; seed <= ROUNDS; seed++) {
      const report = await runNbdRound(engine, folder, seed);
      kinds.add(report.kind);
      requests += report.requests;
    }
    expect(kinds.size).toBe(5);
    expect(requests).toBeGreaterThan(ROUNDS * 4 * 32);
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true });
  }
}, 60_000);
