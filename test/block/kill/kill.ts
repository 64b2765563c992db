/**
 * Cuts the power under random traces, and kills processes that write, for as long as wanted:
 *
 *     npm run kill -- --minutes N [--seed S]
 *
 * After each cut and each kill QEMU's check finds no corruption and every flushed byte is there. Stops at the first
 * seed at which that is not so; exit status 1 then.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { randomTrace } from '../differential/trace.js';
import { Story } from './story.js';

const { values } = parseArgs({
  options: {
    minutes: { type: 'string', default: '1' },
    seed: { type: 'string', default: '1' },
    stories: { type: 'string' },
  },
});

const deadline = performance.now() + Number(values.minutes) * 60_000;
const most = Number(values.stories ?? Number.POSITIVE_INFINITY);
const first = Number(values.seed);
const folder = mkdtempSync(join(tmpdir(), 'stillframe-kill-'));
let cuts = 0;
let seed = first;
try {
  const story = new Story(folder);
  for (; performance.now() < deadline && seed < first + most; seed++) {
    try {
      cuts += story.run(randomTrace(seed), seed, { chance: 0.1, end: seed % 2 === 0 ? 'commit' : 'rebase' });
    } catch (error) {
      console.log(`seed ${seed}: ${error instanceof Error ? error.stack : String(error)}`);
      process.exitCode = 1;
    }
  }
  console.log(`${seed - first} traces from seed ${first} on, ${cuts} power cuts`);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
