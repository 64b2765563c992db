/**
 * Random traces of requests, told to an image of ours and to one of QEMU's, which have to be alike at the end:
 *
 *     npm run differ -- --traces N [--seed S]     N traces, of the seeds from S on (default 1)
 *     npm run differ -- --commands --traces N     of commands on chains of images, told to our CLI and to qemu-img
 *
 * A trace on which they differ is made as short as it gets and printed, ready for the list of regressions. Exit status
 * 1 after a difference.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { minimiseStory } from './commands/minimise.js';
import { CommandReplay } from './commands/replay.js';
import { randomStory, type Story } from './commands/story.js';
import { type Divergence, PREPARATION } from './divergence.js';
import { minimise } from './minimise.js';
import { Replay } from './replay.js';
import { randomTrace } from './trace.js';

const { values } = parseArgs({
  options: {
    traces: { type: 'string', default: '100' },
    seed: { type: 'string', default: '1' },
    commands: { type: 'boolean', default: false },
    /** Which part of the work this process does: `index/count`. */
    part: { type: 'string' },
  },
});

function numberOf(name: 'traces' | 'seed'): number {
  const value = Number(values[name]);
  if (!Number.isSafeInteger(value) || value < 0) {
    throw new Error(`--${name} takes a whole number, not '${values[name]}'`);
  }
  return value;
}

/** What is told: where it comes from, how it is told, and how it becomes shorter. */
interface Kind<T> {
  readonly random: (seed: number) => T;
  readonly replay: (told: T) => Divergence | undefined;
  readonly minimise: (told: T, fails: (told: T) => boolean) => T;
}

/** Replays every `count`th trace. False: some differ. */
function work<T>(index: number, count: number, { random, replay, minimise }: Kind<T>): boolean {
  const first = numberOf('seed');
  const end = first + numberOf('traces');
  let alike = true;
  for (let seed = first + index; seed < end; seed += count) {
    const trace = random(seed);
    const divergence = replay(trace);
    if (divergence === undefined) continue;
    const { kind } = divergence;
    const shortest =
      kind === PREPARATION ? trace : minimise(trace, (shorter) => replay(shorter)?.kind === kind);
    console.log(`seed ${seed}: ${replay(shortest)?.what}\n${JSON.stringify(shortest)}`);
    alike = false;
  }
  return alike;
}

function workIn(folder: string, index: number, count: number): boolean {
  if (values.commands) {
    const replay = new CommandReplay(folder);
    const run = (story: Story) => replay.run(story);
    return work(index, count, { random: randomStory, replay: run, minimise: minimiseStory });
  }
  const replay = new Replay(folder);
  return work(index, count, { random: randomTrace, replay: (trace) => replay.run(trace), minimise });
}

async function inParts(): Promise<boolean> {
  const started = performance.now();
  const count = availableParallelism();
  const program = fileURLToPath(import.meta.url);
  const statuses = await Promise.all(
    Array.from({ length: count }, (_, index) => {
      const args = [program, ...process.argv.slice(2), '--part', `${index}/${count}`];
      const child = spawn(process.execPath, args, { stdio: 'inherit' });
      return new Promise<number | null>((resolve) => child.once('exit', resolve));
    }),
  );
  const alike = statuses.every((status) => status === 0);
  const seconds = ((performance.now() - started) / 1000).toFixed(0);
  const traces = `traces of the seeds from ${values.seed} on`;
  console.log(
    alike ? `${values.traces} ${traces} are alike, ${seconds} s` : `${traces} differ, ${seconds} s`,
  );
  return alike;
}

const [index = 0, count = 1] = (values.part ?? '').split('/').map(Number);
let alike: boolean;
if (values.part === undefined) alike = await inParts();
else {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-differ-'));
  try {
    alike = workIn(folder, index, count);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
process.exitCode = alike ? 0 : 1;
