/**
 * The production code in a simulated world:
 *
 *     npm run sim -- --seeds N [--seed S]     N seeds from S on (default 1); with --every K each Kth one
 *     npm run sim -- --seed S                 one seed, with what happened
 *     npm run sim -- --scope [--mode MODE]    every interleaving of the small scope; --runs N stops each part after N,
 *                                             --wide also has two guests and two copiers where something fails
 *
 * A seed that fails is made smaller; the command that repeats what is left is printed. Exit status 1 on a violation.
 */
import { spawn, spawnSync } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { regressions } from './regressions.js';
import { runScopeTask, scopeTasks } from './scope.js';
import { type Failure, replay, runSeeds, type Tally } from './seeds.js';
import { Simulator } from './simulator.js';

const { values } = parseArgs({
  options: {
    seeds: { type: 'string' },
    every: { type: 'string' },
    seed: { type: 'string' },
    schedule: { type: 'string' },
    drop: { type: 'string' },
    scope: { type: 'boolean', default: false },
    mode: { type: 'string' },
    wide: { type: 'boolean', default: false },
    runs: { type: 'string' },
    regressions: { type: 'boolean', default: false },
    // Which part of the work this process does: `index/count`.
    part: { type: 'string' },
  },
});

type Message =
  | { readonly type: 'progress'; readonly done: number; readonly steps: number }
  | { readonly type: 'tally'; readonly tally: Tally }
  | { readonly type: 'scope'; readonly part: ScopeLine };

interface ScopeLine {
  readonly name: string;
  readonly runs: number;
  readonly states: number;
  readonly steps: number;
  readonly complete: boolean;
  readonly violation: string | undefined;
  readonly seconds: number;
}

const send = (message: Message): void => {
  process.stdout.write(`${JSON.stringify(message)}\n`);
};

function numberOf(name: 'seeds' | 'seed' | 'every' | 'schedule' | 'runs', otherwise: number): number {
  const text = values[name];
  const value = text === undefined ? otherwise : Number(text);
  if (!Number.isSafeInteger(value) || value < 0)
    throw new Error(`--${name} takes a whole number, not '${text}'`);
  return value;
}

// ---- One process of several -----------------------------------------------------------------------------------

async function work(part: string): Promise<void> {
  const [index = 0, count = 1] = part.split('/').map(Number);
  const simulator = await Simulator.create();
  if (values.scope) {
    const modes = (['full', 'top', 'none'] as const).filter(
      (mode) => values.mode === undefined || values.mode === mode,
    );
    const tasks = modes.flatMap((mode) => scopeTasks(mode, values.wide));
    for (const [number, task] of tasks.entries()) {
      if (number % count !== index) continue;
      const started = performance.now();
      const { runs, states, steps, complete, violation } = runScopeTask(
        simulator,
        task,
        numberOf('runs', 1e9),
      );
      const seconds = (performance.now() - started) / 1000;
      const what =
        violation === undefined ? undefined : `${violation.what}; choices ${violation.choices.join(' ')}`;
      send({
        type: 'scope',
        part: { name: task.name, runs, states, steps, complete, violation: what, seconds },
      });
    }
  } else {
    const seeds = numberOf('seeds', 1000);
    const share = Math.ceil(seeds / count);
    const every = numberOf('every', 1);
    const first = numberOf('seed', 1) + index * share * every;
    const mine = Math.max(0, Math.min(share, seeds - index * share));
    const tally = runSeeds(simulator, first, mine, every, (done, steps) =>
      send({ type: 'progress', done, steps }),
    );
    send({ type: 'tally', tally });
  }
  await simulator.close();
}

// ---- The process that was called ------------------------------------------------------------------------------

/** Runs this program in a process for each processor and hands on what they say. */
async function inParts(onMessage: (part: number, message: Message) => void): Promise<void> {
  const count = availableParallelism();
  // Threads that take turns do so fastest on one processor.
  const pins = spawnSync('taskset', ['-c', '0', 'true']).status === 0;
  const program = fileURLToPath(import.meta.url);
  await Promise.all(
    Array.from({ length: count }, async (_, index) => {
      const command = [process.execPath, program, ...process.argv.slice(2), '--part', `${index}/${count}`];
      const [file = '', ...args] = pins ? ['taskset', '-c', String(index), ...command] : command;
      const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'inherit'] });
      const ended = new Promise<number | null>((resolve) => child.once('exit', resolve));
      for await (const line of createInterface({ input: child.stdout })) onMessage(index, JSON.parse(line));
      const status = await ended;
      if (status !== 0) throw new Error(`a process of the simulator ended with status ${status}`);
    }),
  );
}

function tell(failure: Failure): void {
  const { seed, schedule, dropped, violation, scenario, trace } = failure;
  const drop = dropped.length === 0 ? '' : ` --drop ${dropped.join(',')}`;
  console.log(`\nseed ${seed} violates: ${violation}\n`);
  console.log(JSON.stringify(scenario));
  console.log(`\n${trace.join('\n')}\n`);
  console.log(`again: npm run sim -- --seed ${seed} --schedule ${schedule}${drop}`);
}

async function seeds(): Promise<boolean> {
  const started = performance.now();
  const progress = new Map<number, { done: number; steps: number }>();
  const outcomes = new Map<string, number>();
  const failures: Failure[] = [];
  let done = 0;
  let steps = 0;
  await inParts((part, message) => {
    if (message.type === 'progress') {
      progress.set(part, message);
      if (process.stderr.isTTY) {
        const sum = [...progress.values()].reduce((total, value) => total + value.done, 0);
        process.stderr.write(`\r${sum} seeds`);
      }
    } else if (message.type === 'tally') {
      done += message.tally.seeds;
      steps += message.tally.steps;
      for (const [name, count] of Object.entries(message.tally.outcomes)) {
        outcomes.set(name, (outcomes.get(name) ?? 0) + count);
      }
      if (message.tally.failure !== undefined) failures.push(message.tally.failure);
    }
  });
  for (const failure of failures) tell(failure);
  const kinds = [...outcomes].map(([name, count]) => `${count} ${name}`).join(', ');
  const seconds = ((performance.now() - started) / 1000).toFixed(0);
  const first = numberOf('seed', 1);
  console.log(
    `${done} seeds from ${first} on, ${steps} steps in ${seconds} s; jobs: ${kinds}; ${failures.length} violations`,
  );
  return failures.length === 0;
}

async function scope(): Promise<boolean> {
  const lines: ScopeLine[] = [];
  await inParts((_, message) => {
    if (message.type !== 'scope') return;
    lines.push(message.part);
    const { name, runs, states, complete, violation, seconds } = message.part;
    const end = violation ?? (complete ? 'complete' : 'stopped');
    console.log(`${name}: ${states} states, ${runs} runs, ${seconds.toFixed(1)} s, ${end}`);
  });
  const sum = (of: (line: ScopeLine) => number): number => lines.reduce((total, line) => total + of(line), 0);
  const stopped = lines.filter(({ complete, violation }) => !complete && violation === undefined).length;
  const violations = lines.filter(({ violation }) => violation !== undefined).length;
  const totals = `${sum(({ states }) => states)} states in ${sum(({ runs }) => runs)} runs of ${sum(({ steps }) => steps)} steps`;
  console.log(
    `${lines.length} explorations: ${totals}; ${stopped} stopped before they were complete; ${violations} violations`,
  );
  return violations === 0;
}

async function one(): Promise<boolean> {
  const seed = numberOf('seed', 1);
  const schedule = numberOf('schedule', seed);
  const simulator = await Simulator.create();
  const { result, trace } = replay(simulator, seed, schedule, values.drop?.split(',') ?? []);
  console.log(trace.join('\n'));
  console.log(`${result.steps} steps, outcome ${result.outcome}; ${result.violation ?? 'no violation'}`);
  await simulator.close();
  return result.violation === undefined;
}

/** Scenarios that failed once. */
async function again(): Promise<boolean> {
  const simulator = await Simulator.create();
  let failed = 0;
  for (const { what, scenario, schedules } of regressions) {
    const found = schedules.map((schedule) => simulator.run(scenario, { schedule }).violation);
    const violation = found.find((text) => text !== undefined);
    if (violation !== undefined) failed++;
    console.log(`${what}: ${violation ?? 'no violation'}`);
  }
  await simulator.close();
  return failed === 0;
}

if (values.part !== undefined) await work(values.part);
else {
  const sound = values.regressions
    ? await again()
    : values.scope
      ? await scope()
      : values.seed !== undefined && values.seeds === undefined
        ? await one()
        : await seeds();
  process.exitCode = sound ? 0 : 1;
}
