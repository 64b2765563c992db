/**
 * Every interleaving of a small scenario: a depth-first search that sees each state once, with partial-order reduction by
 * sleep sets and by critical sections and other steps that nobody can tell from one step (see `visibleTo` in thread.ts).
 *
 * A run is repeated from its start with another list of choices for each branch: the code under test is not a model
 * whose state could be saved.
 */
import type { Scenario } from './scenario.js';
import type { RunResult, Simulator } from './simulator.js';
import { type Access, dependent, type Step } from './world.js';

/** The steps of one choice: one step, or a critical section. */
interface Event {
  readonly thread: number;
  readonly steps: readonly Step[];
  /** The event that woke the thread: -1 none, -2 all before. */
  readonly cause: number;
}

interface Node {
  /** The thread whose event was taken from here last. */
  chosen: number;
  /** Threads that are still to be explored from here, a bit each. */
  rest: number;
  /** Events that need not be run from here: what follows from them was explored before. */
  sleep: Event[];
}

export interface Exploration {
  readonly runs: number;
  /** Runs that were given up since they would only have repeated others. */
  readonly redundant: number;
  readonly steps: number;
  /** Different states seen. */
  readonly states: number;
  /** Nothing is left to explore. */
  readonly complete: boolean;
  readonly outcomes: Readonly<Record<string, number>>;
  readonly violation:
    | { readonly what: string; readonly choices: readonly number[]; readonly result: RunResult }
    | undefined;
}

function overlap(a: Access, b: Access): boolean {
  return a.place === b.place && a.low < b.high && b.low < a.high && dependent(a.kind, b.kind);
}

/** Whether two events of different threads may not be swapped. */
function disturbs(a: Event, b: Event): boolean {
  return a.steps.some((left) => b.steps.some((right) => overlap(left.announced, right.announced)));
}

function eventsOf(trace: readonly Step[]): Event[] {
  const events: { thread: number; steps: Step[]; cause: number }[] = [];
  const eventOf: number[] = [];
  for (const step of trace) {
    if (!step.continued) {
      events.push({
        thread: step.thread,
        steps: [],
        cause: step.cause < 0 ? step.cause : (eventOf[step.cause] ?? -1),
      });
    }
    events.at(-1)?.steps.push(step);
    eventOf.push(events.length - 1);
  }
  return events;
}

export function explore(
  simulator: Simulator,
  scenario: Scenario,
  options: {
    readonly fault?: { readonly thread: number; readonly index: number } | undefined;
    readonly maxRuns: number;
  },
): Exploration {
  const nodes: Node[] = [];
  const outcomes: Record<string, number> = {};
  let runs = 0;
  let redundant = 0;
  let steps = 0;
  const report = (complete: boolean, violation: Exploration['violation']): Exploration => ({
    runs,
    redundant,
    steps,
    states: simulator.seenStates,
    complete,
    outcomes,
    violation,
  });
  for (;;) {
    const prefix = nodes.map(({ chosen }) => chosen);
    const sleepers = (nodes.at(-1)?.sleep ?? []).map(({ thread, steps: accesses }) => ({
      thread,
      accesses: accesses.map(({ announced }) => announced),
    }));
    const result = simulator.run(scenario, {
      schedule: 1,
      explore: { prefix, sleepers },
      ...(options.fault === undefined ? {} : { fault: options.fault }),
    });
    runs++;
    steps += result.steps;
    const events = eventsOf(simulator.trace());
    if (result.redundant) redundant++;
    else outcomes[result.outcome] = (outcomes[result.outcome] ?? 0) + 1;
    if (result.violation !== undefined) {
      return report(false, { what: result.violation, choices: events.map(({ thread }) => thread), result });
    }
    for (let index = nodes.length; index < events.length; index++) {
      const before = nodes[index - 1];
      const event = events[index];
      const last = events[index - 1];
      if (event === undefined) break;
      const sleeping =
        before === undefined || last === undefined
          ? []
          : before.sleep.filter((sleeper) => !disturbs(last, sleeper));
      nodes.push({
        chosen: event.thread,
        rest: simulator.openAt(index) & ~(1 << event.thread),
        sleep: sleeping,
      });
    }
    // Back to the last place with something left to try.
    let more = false;
    while (nodes.length > 0) {
      const index = nodes.length - 1;
      const node = nodes[index];
      const event = events[index];
      if (node === undefined || event === undefined) throw new Error('the trace and the tree do not fit');
      node.sleep.push(event);
      if (node.rest !== 0) {
        node.chosen = 31 - Math.clz32(node.rest & -node.rest);
        node.rest &= ~(1 << node.chosen);
        more = true;
        break;
      }
      nodes.pop();
    }
    if (!more) return report(true, undefined);
    if (runs >= options.maxRuns) return report(false, undefined);
  }
}
