/**
 * Randomised rounds of backups under concurrent writers, and the scenarios of the simulator, with real threads on real
 * files for as long as wanted: `npm run soak -- --minutes N [--seed S] [--one-core] [--contention] [--stops]`. Stops
 * at the first mismatch with the seed that repeats it.
 *
 * `--rounds N` ends it after so many instead.
 *
 * `--nbd` has four NBD clients write over each other instead, 32 requests under way each; `--graph` as well, to a drive
 * of a daemon that changes its graph meanwhile.
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
import { createEngine, type Engine } from '#src/index.js';
import { Random } from '../support/data.js';
import { runGraphRound } from '../support/graph-rounds.js';
import { type RoundServer, runNbdRound, serveRounds } from '../support/nbd-rounds.js';
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
    graph: { type: 'boolean', default: false },
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

interface Totals {
  readonly [what: string]: number;
}

/** Rounds, one after the other, until it is enough. @param round what it counts, by its kind */
async function soak(
  round: (engine: Engine, folder: string, seed: number) => Promise<Readonly<Record<string, Totals>>>,
): Promise<void> {
  const first = values.seed === undefined ? Date.now() % 1_000_000_000 : Number(values.seed);
  const most = Number(values.rounds ?? Number.POSITIVE_INFINITY);
  const deadline = performance.now() + minutes * 60_000;
  const folder = mkdtempSync(join(values.folder, 'stillframe-soak-'));
  const totals = new Map<string, Map<string, number>>();
  const engine = await createEngine();
  let rounds = 0;
  try {
    console.log(`first seed ${first}`);
    for (; performance.now() < deadline && rounds < most && !interrupted; rounds++) {
      for (const [kind, counts] of Object.entries(await round(engine, folder, first + rounds))) {
        const total = totals.get(kind) ?? new Map<string, number>();
        totals.set(kind, total);
        for (const [what, count] of Object.entries({ times: 1, ...counts })) {
          total.set(what, (total.get(what) ?? 0) + count);
        }
      }
      if (rounds % 100 === 99)
        console.log(`${rounds + 1} rounds, arena in use ${engine.arena.usedBytes} bytes`);
    }
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true, force: true });
  }
  console.log(`${rounds} rounds, seeds ${first} to ${first + rounds - 1}, no mismatch`);
  console.table(Object.fromEntries([...totals].map(([kind, total]) => [kind, Object.fromEntries(total)])));
}

/** Backups under requests of this process, and a scenario of the simulator. */
async function plainRound(engine: Engine, folder: string, seed: number): Promise<Record<string, Totals>> {
  const { mode, cancelled, requests, cbw } = await runRound(engine, folder, seed);
  const scenario = await runScenarioRound(engine, folder, seed);
  return { [mode]: { cancelled: Number(cancelled), requests, cbw }, [`scenario: ${scenario}`]: {} };
}

/** A server serves for so many rounds. */
const ROUNDS_OF_SERVER = 50;

/** The same with four clients of an NBD server. */
function nbdRounds(): typeof plainRound {
  let served: RoundServer | undefined;
  let count = 0;
  return async (engine, folder, seed) => {
    if (count++ % ROUNDS_OF_SERVER === 0) {
      await served?.server.close();
      served = await serveRounds(engine, folder);
    }
    if (served === undefined) throw new Error('no server');
    const { kind, requests } = await runNbdRound(engine, served, folder, seed);
    return { [kind]: { requests } };
  };
}

/** The same while the graph changes. */
async function graphRound(engine: Engine, folder: string, seed: number): Promise<Record<string, Totals>> {
  const { done, requests } = await runGraphRound(engine, folder, seed);
  const counts: Record<string, { times: number }> = {};
  for (const one of done) counts[one] = { times: (counts[one]?.times ?? 0) + 1 };
  return { 'all rounds': { requests }, ...counts };
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
const round = values.graph ? graphRound : values.nbd ? nbdRounds() : plainRound;
await (alone ? soak(round) : harassed());
