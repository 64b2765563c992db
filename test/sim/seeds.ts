import { makeScenario, partsOf, type Scenario, without } from './scenario.js';
import type { RunResult, Simulator } from './simulator.js';
import { formatTrace } from './trace.js';

export interface Tally {
  readonly seeds: number;
  readonly steps: number;
  readonly outcomes: Readonly<Record<string, number>>;
  readonly failure: Failure | undefined;
}

export interface Failure {
  readonly seed: number;
  readonly schedule: number;
  /** Parts of the seed's scenario that the failure does not need. */
  readonly dropped: readonly string[];
  readonly violation: string;
  readonly scenario: Scenario;
  readonly trace: readonly string[];
}

/** How many schedules a smaller scenario gets to show the same violation. */
const SCHEDULES = 25;
const TRACE_LINES = 70;
/** Every so many seeds one is run twice: a run that cannot be repeated proves nothing. */
const REPEAT = 500;

/** Runs seeds until one fails; makes the failure small. */
export function runSeeds(
  simulator: Simulator,
  first: number,
  count: number,
  every: number,
  onProgress: (done: number, steps: number) => void,
): Tally {
  const outcomes: Record<string, number> = {};
  let steps = 0;
  for (let done = 1, seed = first; done <= count; done++, seed += every) {
    const scenario = makeScenario(seed);
    const result = simulator.run(scenario, { schedule: seed });
    steps += result.steps;
    for (const outcome of result.outcome.split('+')) outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
    const violation =
      result.violation ?? (seed % REPEAT === 0 ? repeated(simulator, scenario, seed, result) : undefined);
    if (violation !== undefined) {
      return {
        seeds: done,
        steps,
        outcomes,
        failure: shrink(simulator, seed, seed, scenario, violation),
      };
    }
    if (done % 200 === 0) onProgress(done, steps);
  }
  return { seeds: count, steps, outcomes, failure: undefined };
}

function repeated(
  simulator: Simulator,
  scenario: Scenario,
  schedule: number,
  before: RunResult,
): string | undefined {
  const again = simulator.run(scenario, { schedule });
  if (again.hash === before.hash && again.steps === before.steps) return undefined;
  return `determinism: two runs of the seed differ (${before.steps} and ${again.steps} steps)`;
}

/** One run of a seed, or of what is left of it. */
export function replay(
  simulator: Simulator,
  seed: number,
  schedule: number,
  dropped: readonly string[],
): { readonly result: RunResult; readonly trace: readonly string[] } {
  const scenario = without(makeScenario(seed), new Set(dropped));
  const result = simulator.run(scenario, { schedule });
  return { result, trace: formatTrace(simulator.trace(), scenario, result.places, TRACE_LINES) };
}

/** Leaves out part after part of the scenario while the same invariant is still violated. */
function shrink(
  simulator: Simulator,
  seed: number,
  schedule: number,
  full: Scenario,
  violation: string,
): Failure {
  const invariant = violation.split(':')[0];
  const dropped = new Set<string>();
  const found = { schedule, violation };
  const fails = (scenario: Scenario): boolean => {
    for (let index = 0; index < SCHEDULES; index++) {
      const tried = index === 0 ? found.schedule : seed + index;
      const now = simulator.run(scenario, { schedule: tried }).violation;
      if (now === undefined || now.split(':')[0] !== invariant) continue;
      found.schedule = tried;
      found.violation = now;
      return true;
    }
    return false;
  };
  for (let smaller = true; smaller; ) {
    smaller = false;
    for (const part of partsOf(full)) {
      if (dropped.has(part)) continue;
      dropped.add(part);
      if (fails(without(full, dropped))) smaller = true;
      else dropped.delete(part);
    }
  }
  const scenario = without(full, dropped);
  const result = simulator.run(scenario, { schedule: found.schedule });
  return {
    seed,
    schedule: found.schedule,
    dropped: [...dropped],
    violation: result.violation ?? found.violation,
    scenario,
    trace: formatTrace(simulator.trace(), scenario, result.places, TRACE_LINES),
  };
}
