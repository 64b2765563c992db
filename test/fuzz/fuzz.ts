/**
 * Images damaged at random, read, described and written by the production code:
 *
 *     npm run fuzz -- FORMAT --minutes N [--seed S] [--executions N] [--compare N]
 *     npm run fuzz -- qcow2 --seed S [--drop 0,2]      one execution, with what is done
 *     npm run fuzz -- qcow2 --regressions              what once failed
 *     npm run fuzz -- nbd --executions N [--seed S]    damaged sessions of clients of the NBD server
 *
 * FORMAT is qcow2, vmdk, vhdx, vpc or vdi. One qcow2 image in five is repaired as well. Every N-th image (`--compare`, default 200, 0 none) is read by QEMU as well, and what both can read must be the same.
 * No execution may end in anything but errors with a code, take more than 5 s or 256 MiB, open a file that the image
 * is not allowed, or leave memory taken or files open. Exit status 1 when one does; what is left of it when everything
 * it does not need is dropped is printed.
 */
import { spawn } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { hasPeer } from '../support/peers.js';
import { FORMAT_NAMES, type FuzzFormat } from './formats.js';
import { type Found, Fuzzer, type Tally } from './fuzzer.js';
import { regressions } from './regressions.js';

/** Time on a processor that an execution may take; on a busy machine far more passes. */
const HANG_MS = 5000;
/** An execution that takes this long waits for something. */
const STUCK_MS = 60_000;
/** What a thread may keep beside the arena, in MiB. */
const HEAP_MIB = 256;

type Message =
  | { readonly type: 'tally'; readonly tally: Tally }
  | { readonly type: 'found'; readonly found: Found };

/** What the thread of a part is to do, and the words it shares with its watchdog: the seed under way, a counter. */
interface Work {
  readonly format: FuzzFormat;
  readonly first: number;
  readonly step: number;
  readonly count: number;
  readonly minutes: number;
  readonly compare: number;
  readonly words: SharedArrayBuffer;
}

// ---- The thread that does it ----------------------------------------------------------------------------------

function work({ format, first, step, count, minutes, compare, words }: Work): void {
  const shared = new Int32Array(words);
  const post = (message: Message): void => parentPort?.postMessage(message);
  const fuzzer = new Fuzzer(format);
  const end = performance.now() + minutes * 60_000;
  let told = performance.now();
  try {
    for (let index = 0; index < count; index++) {
      const seed = first + index * step;
      Atomics.store(shared, 0, seed);
      Atomics.add(shared, 1, 1);
      const recipe = fuzzer.recipe(seed);
      const compared = compare > 0 && seed % compare === 0;
      const what = fuzzer.execute(recipe, compared);
      if (what !== undefined) {
        const smallest = fuzzer.minimise(recipe, compared);
        post({
          type: 'found',
          found: { seed, what: fuzzer.explain(smallest, compared) ?? what, recipe: smallest },
        });
      }
      if (performance.now() - told < 500) continue;
      told = performance.now();
      post({ type: 'tally', tally: fuzzer.tally });
      if (told > end) break;
    }
    post({ type: 'tally', tally: fuzzer.tally });
  } finally {
    fuzzer.close();
  }
}

// ---- The process of a part, with the watchdog -----------------------------------------------------------------

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    minutes: { type: 'string' },
    seed: { type: 'string' },
    executions: { type: 'string' },
    compare: { type: 'string' },
    drop: { type: 'string' },
    regressions: { type: 'boolean', default: false },
    // Which part of the work this process does, and the file that says where it is: `index/count/path`.
    part: { type: 'string' },
  },
});

function numberOf(name: 'minutes' | 'seed' | 'executions' | 'compare', otherwise: number): number {
  const text = values[name];
  const value = text === undefined ? otherwise : Number(text);
  if (!(value >= 0)) throw new Error(`--${name} takes a number, not '${text}'`);
  return value;
}

function formatOf(): FuzzFormat {
  const format = FORMAT_NAMES.find((name) => name === positionals[0]);
  if (format !== undefined) return format;
  throw new Error(
    `there is no fuzzer for '${positionals[0] ?? ''}'; there is one for ${FORMAT_NAMES.join(', ')}`,
  );
}

const send = (message: Message): void => {
  process.stdout.write(`${JSON.stringify(message)}\n`);
};

/** Runs the thread until its work is done; goes on behind a seed that hangs. */
async function watch(part: string): Promise<void> {
  const [index = 0, count = 1] = part.split('/').map(Number);
  const progress = part.split('/').slice(2).join('/');
  const share = Math.ceil(numberOf('executions', Number.MAX_SAFE_INTEGER) / count);
  const started = performance.now();
  let done = 0;
  while (done < share) {
    const words = new SharedArrayBuffer(8);
    const shared = new Int32Array(words);
    const first = numberOf('seed', 1) + index + done * count;
    const minutes = numberOf('minutes', 1e6) - (performance.now() - started) / 60_000;
    if (minutes <= 0) return;
    const data: Work = {
      format: formatOf(),
      first,
      step: count,
      count: share - done,
      minutes,
      compare: hasPeer('qemu-img') ? numberOf('compare', 200) : 0,
      words,
    };
    const worker = new Worker(fileURLToPath(import.meta.url), {
      workerData: data,
      resourceLimits: { maxOldGenerationSizeMb: HEAP_MIB },
    });
    worker.on('message', send);
    const what = await watchOne(worker, shared, progress);
    const seed = Atomics.load(shared, 0);
    if (what === undefined) return;
    send({ type: 'found', found: { seed, what, recipe: { base: '', mutations: [], actions: seed } } });
    done += Math.floor((seed - first) / count) + 1;
  }
}

/** Resolves with what went wrong, or undefined when the thread is done. */
function watchOne(worker: Worker, shared: Int32Array, progress: string): Promise<string | undefined> {
  return new Promise((resolve) => {
    let seen = -1;
    let since = 0;
    let busySince = 0;
    const timer = setInterval(() => {
      writeFileSync(progress, String(Atomics.load(shared, 0)));
      const counter = Atomics.load(shared, 1);
      const { user, system } = process.cpuUsage();
      const busy = (user + system) / 1000;
      if (counter !== seen) {
        seen = counter;
        since = performance.now();
        busySince = busy;
      } else if (counter > 0 && (busy - busySince > HANG_MS || performance.now() - since > STUCK_MS)) {
        end(`does not end within ${HANG_MS} ms`);
        void worker.terminate();
      }
    }, 200);
    const end = (what: string | undefined): void => {
      clearInterval(timer);
      resolve(what);
    };
    worker.once('error', (error) => end(error.stack ?? error.message));
    worker.once('exit', () => end(undefined));
  });
}

// ---- The process that was called ------------------------------------------------------------------------------

/** Runs this program in a process for each processor. @returns whether all went well */
async function all(): Promise<boolean> {
  const started = performance.now();
  const count = Math.min(availableParallelism(), numberOf('executions', Number.MAX_SAFE_INTEGER));
  const tallies = new Map<number, Tally>();
  let found = 0;
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-fuzz-'));
  const program = fileURLToPath(import.meta.url);
  try {
    await Promise.all(
      Array.from({ length: count }, async (_, index) => {
        const progress = join(folder, String(index));
        writeFileSync(progress, '');
        const args = [program, ...process.argv.slice(2), '--part', `${index}/${count}/${progress}`];
        const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
        const ended = new Promise<number | string>((resolve) =>
          child.once('exit', (status, signal) => resolve(status ?? String(signal))),
        );
        for await (const line of createInterface({ input: child.stdout })) {
          const message: Message = JSON.parse(line);
          if (message.type === 'tally') tallies.set(index, message.tally);
          else {
            found++;
            tell(message.found);
          }
        }
        const status = await ended;
        if (status === 0) return;
        found++;
        console.log(
          `a process ended with ${status}, at seed ${readFileSync(progress, 'utf8')} or shortly after it`,
        );
      }),
    );
  } finally {
    rmSync(folder, { recursive: true });
  }
  summarise([...tallies.values()], found, (performance.now() - started) / 1000);
  return found === 0;
}

function tell({ seed, what, recipe }: Found): void {
  console.log(`\nseed ${seed}: ${what}`);
  if (recipe.base !== '') console.log(JSON.stringify(recipe));
  console.log(`again: npm run fuzz -- ${formatOf()} --seed ${seed}`);
}

function summarise(tallies: readonly Tally[], found: number, seconds: number): void {
  const sum = (of: (tally: Tally) => number): number =>
    tallies.reduce((total, tally) => total + of(tally), 0);
  const events = new Map<string, { times: number; seed: number }>();
  for (const [event, { times, seed }] of tallies.flatMap((tally) => Object.entries(tally.events))) {
    const known = events.get(event);
    events.set(event, { times: (known?.times ?? 0) + times, seed: known?.seed ?? seed });
  }
  const sorted = [...events].sort(([, a], [, b]) => b.times - a.times);
  for (const [event, { times, seed }] of sorted) console.log(`${times} × ${event} (first with seed ${seed})`);
  const executions = sum((tally) => tally.executions);
  console.log(
    `${executions} executions in ${seconds.toFixed(0)} s (${(executions / seconds).toFixed(0)} a second): ` +
      `${sum((tally) => tally.read)} images read, ${sum((tally) => tally.changed)} changed, ` +
      `${sum((tally) => tally.repaired)} repaired, ` +
      `${sum((tally) => tally.compared)} compared with QEMU; ${found} failures`,
  );
}

/** One seed, or everything that once failed, in this process. */
function replay(): boolean {
  const fuzzer = new Fuzzer(formatOf());
  const compare = hasPeer('qemu-img') && numberOf('compare', 1) > 0;
  try {
    if (values.regressions) {
      const ours = regressions.filter(({ format }) => format === formatOf());
      const failed = ours.filter(({ what, recipe }) => {
        const found = fuzzer.explain(recipe, compare);
        console.log(`${what}: ${found ?? 'no failure'}`);
        return found !== undefined;
      });
      return failed.length === 0;
    }
    const dropped = new Set((values.drop ?? '').split(',').map((text) => (text === '' ? -1 : Number(text))));
    const whole = fuzzer.recipe(numberOf('seed', 1));
    const recipe = { ...whole, mutations: whole.mutations.filter((_, index) => !dropped.has(index)) };
    console.log(JSON.stringify(recipe));
    const found = fuzzer.explain(recipe, compare);
    for (const [event, { times }] of Object.entries(fuzzer.tally.events)) console.log(`${times} × ${event}`);
    console.log(found ?? 'no failure');
    return found === undefined;
  } finally {
    fuzzer.close();
  }
}

/** Damaged sessions instead of images. The library is loaded for them alone: the other fuzzers guard what is opened. */
async function nbdSessions(): Promise<void> {
  const { createEngine } = await import('#src/index.js');
  const { damagedSession, playDamagedSessions } = await import('./nbd-sessions.js');
  const first = numberOf('seed', Date.now() % 1_000_000_000);
  const count = numberOf('executions', values.seed === undefined ? 10_000 : 1);
  if (count === 1) console.log(JSON.stringify({ ...damagedSession(first), bytes: undefined }));
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-fuzz-'));
  const engine = await createEngine();
  const started = performance.now();
  console.log(`first seed ${first}`);
  try {
    const onProgress = (done: number): void => console.log(`${done} sessions`);
    const report = await playDamagedSessions(engine, folder, { first, count, onProgress });
    const seconds = (performance.now() - started) / 1000;
    const mib = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`;
    console.log(
      `${report.sessions} sessions in ${seconds.toFixed(0)} s, ${report.served} came as far as reading, ${mib(report.answerBytes)} of answers; at most ` +
        `${mib(report.mostArenaBytes)} of the arena and ${report.mostThreads} threads; the process grew by ` +
        `${mib(report.rssGrowthBytes)} after the first tenth; ${report.exchanges} exchanges of the witness, ` +
        `the slowest ${report.slowestMs.toFixed(0)} ms; no failure`,
    );
  } finally {
    await engine.close();
    rmSync(folder, { recursive: true, force: true });
  }
}

if (!isMainThread) {
  const data: Work = workerData;
  work(data);
} else if (positionals[0] === 'nbd') {
  await nbdSessions();
} else if (values.part !== undefined) {
  await watch(values.part);
} else {
  const single = values.seed !== undefined && values.executions === undefined && values.minutes === undefined;
  const sound = values.regressions || single ? replay() : await all();
  process.exitCode = sound ? 0 : 1;
}
