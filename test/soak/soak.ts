/**
 * Randomised rounds of backups under concurrent writers, and the scenarios of the simulator, with real threads on real
 * files for as long as wanted: `npm run soak -- --minutes N [--seed S] [--one-core] [--contention] [--stops]`. Stops
 * at the first mismatch with the seed that repeats it.
 *
 * `--rounds N` ends it after so many instead.
 *
 * `--nbd` has four NBD clients write over each other instead, 32 requests under way each.
 *
 * `--one-core` keeps all threads on one processor, `--contention` lets busy loops fight them for every processor,
 * `--stops` stops and continues the process at random moments.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { createEngine } from '#src/index.js';
import { Random } from '../support/data.js';
import { runNbdRound } from '../support/nbd-rounds.js';
import { runRound } from '../support/rounds.js';
import { runScenarioRound } from './scenario-round.js';

const { values } = parseArgs({
  options: {
    minutes: { type: 'string' },
    seed: { type: 'string' },
    rounds: { type: 'string' },
    folder: { type: 'string', default: tmpdir() },
    'one-core': { type: 'boolean', default: false },
    contention: { type: 'boolean', default: false },
    stops: { type: 'boolean', default: false },
    nbd: { type: 'boolean', default: false },
  },
});

/** A minute, if nothing is said; as long as it takes where rounds are counted. */
const minutes = Number(values.minutes ?? (values.rounds === undefined ? 1 : Number.POSITIVE_INFINITY));
/** Whoever interrupts it is told of the rounds so far, once the one that is under way has ended. */
let interrupted = false;
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => {
    interrupted = true;
  });
}

async function soak(): Promise<void> {
  const first = values.seed === undefined ? Date.now() % 1_000_000_000 : Number(values.seed);
  const most = Number(values.rounds ?? Number.POSITIVE_INFINITY);
  const deadline = performance.now() + minutes * 60_000;
  const folder = mkdtempSync(join(values.folder, 'stillframe-soak-'));
  const totals = new Map<string, { rounds: number; cancelled: number; requests: number; cbw: number }>();
  const scenarios = new Map<string, number>();
  const engine = await createEngine();
  let rounds = 0;
  try {
    console.log(`first seed ${first}`);
    for (; performance.now() < deadline && rounds < most && !interrupted; rounds++) {
      const report = await runRound(engine, folder, first + rounds);
      const total = totals.get(report.mode) ?? { rounds: 0, cancelled: 0, requests: 0, cbw: 0 };
      totals.set(report.mode, {
        rounds: total.rounds + 1,
        cancelled: total.cancelled + Number(report.cancelled),
        requests: total.requests + report.requests,
        cbw: total.cbw + report.cbw,
      });
      const mode = await runScenarioRound(engine, folder, first + rounds);
      scenarios.set(mode, (scenarios.get(mode) ?? 0) + 1);
      if (rounds % 100 === 99)
        console.log(`${rounds + 1} rounds, arena in use ${engine.arena.usedBytes} bytes`);
    }
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true, force: true });
  }
  const kinds = [...scenarios].map(([mode, count]) => `${count} ${mode}`).join(', ');
  console.log(
    `${rounds} rounds and as many scenarios (${kinds}), seeds ${first} to ${first + rounds - 1}, no mismatch`,
  );
  console.table(Object.fromEntries(totals));
}

/** The same with four clients of an NBD server. */
async function soakNbd(): Promise<void> {
  const first = values.seed === undefined ? Date.now() % 1_000_000_000 : Number(values.seed);
  const most = Number(values.rounds ?? Number.POSITIVE_INFINITY);
  const deadline = performance.now() + minutes * 60_000;
  const folder = mkdtempSync(join(values.folder, 'stillframe-soak-'));
  const kinds = new Map<string, { rounds: number; requests: number }>();
  const engine = await createEngine();
  let rounds = 0;
  try {
    console.log(`first seed ${first}`);
    for (; performance.now() < deadline && rounds < most && !interrupted; rounds++) {
      const { kind, requests } = await runNbdRound(engine, folder, first + rounds);
      const total = kinds.get(kind) ?? { rounds: 0, requests: 0 };
      kinds.set(kind, { rounds: total.rounds + 1, requests: total.requests + requests });
      if (rounds % 100 === 99)
        console.log(`${rounds + 1} rounds, arena in use ${engine.arena.usedBytes} bytes`);
    }
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true, force: true });
  }
  console.log(`${rounds} rounds, seeds ${first} to ${first + rounds - 1}, no mismatch`);
  console.table(Object.fromEntries(kinds));
}

const BURN = 'for (;;) Math.sqrt(Math.random());';

/** Runs the soak in a process of its own, under the conditions asked for. */
async function harassed(): Promise<void> {
  const kept = process.argv
    .slice(2)
    .filter((arg) => !['--one-core', '--contention', '--stops'].includes(arg));
  const command = [process.execPath, fileURLToPath(import.meta.url), ...kept];
  const [file = '', ...args] = values['one-core'] ? ['taskset', '-c', '0', ...command] : command;
  const child = spawn(file, args, { stdio: 'inherit' });
  const burners = Array.from({ length: values.contention ? availableParallelism() * 2 : 0 }, () =>
    spawn(process.execPath, ['-e', BURN], { stdio: 'ignore' }),
  );
  const random = new Random(Date.now());
  let stops = 0;
  let status: number | null | undefined;
  const ended = new Promise<void>((resolve, reject) => {
    child.once('error', reject);
    child.once('exit', (code) => {
      status = code;
      resolve();
    });
  });
  while (values.stops && status === undefined) {
    await Promise.race([ended, sleep(random.between(1, 150))]);
    if (status !== undefined) break;
    child.kill('SIGSTOP');
    await sleep(random.between(1, random.pick([5, 50, 300])));
    child.kill('SIGCONT');
    stops++;
  }
  await ended;
  for (const burner of burners) burner.kill('SIGKILL');
  const how = [
    ...(values['one-core'] ? ['on one core'] : []),
    ...(burners.length > 0 ? [`against ${burners.length} busy processes`] : []),
    ...(values.stops ? [`stopped ${stops} times`] : []),
  ];
  console.log(`${how.join(', ')}: exit status ${status}`);
  process.exitCode = status ?? 1;
}

const alone = !(values['one-core'] || values.contention || values.stops);
await (alone ? (values.nbd ? soakNbd() : soak()) : harassed());
