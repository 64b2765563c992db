/**
 * Cuts the power under random traces, and kills processes that write, for as long as wanted:
 *
 *     npm run kill -- --minutes N [--seed S]
 *
 * After each cut and each kill QEMU's check finds no corruption and every flushed byte is there. Prints the seeds at
 * which that is not so; exit status 1 then.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { randomTrace } from '../differential/trace.js';
import { Killed } from './killed.js';
import { Story } from './story.js';

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '1' },
    seed: { type: 'string', default: '1' },
  },
});

function numberOf(name: 'minutes' | 'seed'): number {
  const value = Number(values[name]);
  if (!(value >= 0)) throw new Error(`--${name} takes a number, not '${values[name]}'`);
  return value;
}

/** Kills of one image. */
const KILLS = 4;
/** Traces under power cuts for each image whose writers are killed. */
const STORIES = 20;

const deadline = performance.now() + numberOf('minutes') * 60_000;
const first = numberOf('seed');
const folder = mkdtempSync(join(tmpdir(), 'stillframe-kill-'));
let seed = first;
let cuts = 0;
let kills = 0;

async function attempt(what: string, body: () => Promise<void> | void): Promise<void> {
  try {
    await body();
  } catch (error) {
    console.log(`seed ${seed}, ${what}: ${error instanceof Error ? error.stack : String(error)}`);
    process.exitCode = 1;
  }
}

try {
  const story = new Story(folder);
  const killed = new Killed(folder);
  for (; performance.now() < deadline; seed++) {
    const end = seed % 2 === 0 ? 'commit' : 'rebase';
    await attempt('power cuts', () => {
      cuts += story.run(randomTrace(seed), seed, { chance: 0.1, end });
    });
    if (seed % STORIES !== 0) continue;
    await attempt('kills', () => killed.run(seed, KILLS));
    kills += KILLS;
  }
  console.log(`${seed - first} traces from seed ${first} on, ${cuts} power cuts, ${kills} killed processes`);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
