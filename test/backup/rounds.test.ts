import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { runRound } from '../support/rounds.js';

/** The soak's rounds, a fixed number of them. `npm run soak` runs as many as wanted. */
describe('backups under concurrent writers', () => {
  let engine: Engine;
  let folder: string;
  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), 'stillframe-rounds-'));
    engine = await createEngine();
  });
  afterAll(async () => {
    await engine.close();
    rmSync(folder, { recursive: true, force: true });
  });

  it('are the drive at its instant, byte for byte', { timeout: 300_000 }, async () => {
    let requests = 0;
    let saved = 0;
    for (let seed = 1; seed <= 80; seed++) {
      const report = await runRound(engine, folder, seed);
      requests += report.requests;
      saved += report.cbw;
    }
    // The rounds are worth nothing where writers and copy never met.
    expect(requests).toBeGreaterThan(1000);
    expect(saved).toBeGreaterThan(50);
  });
});
