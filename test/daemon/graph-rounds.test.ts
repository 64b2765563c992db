import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { runGraphRound } from '../support/graph-rounds.js';

const ROUNDS = 4;

it(`a drive is what four clients have written to it while its graph has changed, ${ROUNDS} times over`, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-graph-'));
  const engine = await createEngine();
  try {
    const done = new Set<string>();
    for (let seed = 1; seed <= ROUNDS; seed++) {
      for (const one of (await runGraphRound(engine, folder, seed)).done) done.add(one.split(' ')[0] ?? '');
    }
    expect([...done].sort()).toEqual([
      ...[
        'backup',
        'cancel',
        'commit',
        'commit-active',
        'internal-snapshot',
        'mirror',
        'overlay',
        'reopen',
        'stream',
      ],
    ]);
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true });
  }
});
