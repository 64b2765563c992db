import { readFileSync } from 'node:fs';
import { Worker } from 'node:worker_threads';
import { CopyBuffer } from '#src/block/filters/copy-before-write.js';
import { createRuntime, type SharedRuntime } from '#src/kernels/runtime.js';
import type { ThreadData } from './context.js';
import { makeFilesMemory } from './files.js';
import { instrumentKernels } from './instrument.js';
import { DRIVE_BYTES, makeOracleMemory } from './oracle.js';
import { jobsOf, type Scenario } from './scenario.js';
import type { Verdict } from './thread.js';
import {
  type Choice,
  type ExploreOptions,
  MAX_THREADS,
  makeWorldMemory,
  REDUNDANT,
  type Step,
  World,
} from './world.js';

const ARENA_BYTES = 192 << 20;
/** True time a run may take; one of some thousand steps takes a few milliseconds. */
const RUN_TIMEOUT_MS = 120_000;
const STEP_LIMIT = 300_000;

export interface RunOptions {
  /** Draws the order of steps. */
  readonly schedule: number;
  readonly explore?: ExploreOptions;
}

export interface RunResult extends Verdict {
  readonly steps: number;
  /** Digest of every step: equal for equal runs. */
  readonly hash: number;
  readonly redundant: boolean;
}

/** Threads of a scenario: the job, the guests, those that copy along, the host, the second job. */
export function threadsOf(scenario: Scenario): number {
  return (
    jobsOf(scenario).length +
    scenario.writers.length +
    scenario.job.helpers +
    (scenario.host === 'none' ? 0 : 1)
  );
}

export function threadName(scenario: Scenario, thread: number): string {
  const writers = scenario.writers.length;
  if (thread === 0) return 'job';
  if (thread <= writers) return `guest ${thread}`;
  const { helpers } = scenario.job;
  if (thread <= writers + helpers) return `copier ${thread - writers + 1}`;
  return thread === writers + helpers + 1 && scenario.host !== 'none' ? 'host' : 'job 2';
}

/** A simulated world and its threads, for one run after the other. */
export class Simulator {
  readonly #world: World;
  readonly #workers: readonly Worker[];

  private constructor(world: World, workers: readonly Worker[]) {
    this.#world = world;
    this.#workers = workers;
  }

  static async create(): Promise<Simulator> {
    const runtime = createRuntime(ARENA_BYTES);
    const shipped = readFileSync(
      new URL(import.meta.resolve('#src/kernels/runtime.js')).pathname.replace('runtime.js', 'kernels.wasm'),
    );
    const instrumented = instrumentKernels(shipped);
    const Module: new (bytes: Uint8Array) => SharedRuntime['module'] = Reflect.get(
      Reflect.get(globalThis, 'WebAssembly'),
      'Module',
    );
    const memory = makeWorldMemory();
    const common = {
      world: memory,
      files: makeFilesMemory(),
      oracle: makeOracleMemory(),
      runtime: { memory: runtime.shared.memory, module: new Module(instrumented) },
      shared: runtime.arena.alloc(4096, 'digests'),
      buffers: Array.from({ length: MAX_THREADS }, () => runtime.arena.alloc(DRIVE_BYTES, 'buffer')),
      copyBuffers: Array.from({ length: MAX_THREADS }, () => ({ ...new CopyBuffer(runtime) })),
    };
    const workers = Array.from({ length: MAX_THREADS }, (_, thread) => {
      const workerData: ThreadData = { ...common, thread };
      const worker = new Worker(new URL('./thread.js', import.meta.url), { workerData });
      worker.on('error', (error) => {
        console.error(error);
        process.exit(3);
      });
      return worker;
    });
    // Each says so once its modules are loaded, which look at the arena.
    await Promise.all(workers.map((worker) => new Promise((resolve) => worker.once('message', resolve))));
    return new Simulator(new World(memory, -1), workers);
  }

  run(scenario: Scenario, options: RunOptions): RunResult {
    const world = this.#world;
    world.start({
      threads: threadsOf(scenario),
      text: JSON.stringify(scenario),
      seed: options.schedule,
      strategy: scenario.strategy,
      stepLimit: STEP_LIMIT,
      stopAt: scenario.end?.step ?? -1,
      ...(options.explore === undefined ? {} : { explore: options.explore }),
    });
    const text = world.finish(RUN_TIMEOUT_MS);
    if (text === undefined) throw new Error(`a run does not end: ${JSON.stringify({ scenario, options })}`);
    const verdict: Verdict = JSON.parse(text);
    const redundant = world.aborted === REDUNDANT;
    return {
      ...verdict,
      violation: redundant ? undefined : verdict.violation,
      steps: world.steps,
      hash: world.hash,
      redundant,
    };
  }

  /** To be called before a scenario is explored, and followed by some runs that are not explored. */
  forget(): void {
    this.#world.forget();
  }

  get seenStates(): number {
    return this.#world.seenStates;
  }

  /** The choices of the last run. */
  choices(): Choice[] {
    return this.#world.choices();
  }

  /** The steps of the last run. */
  trace(): Step[] {
    return this.#world.trace();
  }

  async close(): Promise<void> {
    await Promise.all(this.#workers.map((worker) => worker.terminate()));
  }
}
