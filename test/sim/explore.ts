/**
 * Every interleaving of a small scenario: a depth-first search that sees each state once, with partial-order reduction by
 * sleep sets and by critical sections and other steps that nobody can tell from one step (see `visibleTo` in thread.ts).
 *
 * A run is repeated from its start with another list of choices for each branch: the code under test is not a model
 * whose state could be saved.
 */
import type { Scenario } from './scenario.js';
import type { RunResult, Simulator } from './simulator.js';
import { type Access, dependent, IO_SUCCEEDS } from './world.js';

/** A thread that need not go on from a state, since what follows was explored before: what it would do next. */
interface Sleeper {
  readonly thread: number;
  readonly accesses: readonly Access[];
}

/** A choice on the way to where the search is. */
interface Node {
  chosen: number;
  /** What is still to be tried here, a bit each as in {@link Choice.open}. */
  rest: number;
  /** Steps before the choice. */
  readonly trace: number;
  readonly sleep: Sleeper[];
  /** What the chosen thread did in ways of going on that were explored before. */
  done: Access[];
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

const isThread = ({ chosen }: { readonly chosen: number }): boolean => chosen < IO_SUCCEEDS;

export function explore(
  simulator: Simulator,
  scenario: Scenario,
  options: { readonly fault: boolean; readonly maxRuns: number },
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
    const sleepers = nodes.at(-1)?.sleep ?? [];
    const result = simulator.run(scenario, {
      schedule: 1,
      explore: { prefix, sleepers, fault: options.fault },
    });
    runs++;
    steps += result.steps;
    if (result.redundant) redundant++;
    else outcomes[result.outcome] = (outcomes[result.outcome] ?? 0) + 1;
    const choices = simulator.choices();
    if (result.violation !== undefined) {
      return report(false, { what: result.violation, choices: choices.map(({ chosen }) => chosen), result });
    }
    const trace = simulator.trace();
    const accesses = (from: number, to = trace.length): Access[] =>
      trace.slice(from, to).map(({ announced }) => announced);
    for (let index = nodes.length; index < choices.length; index++) {
      const choice = choices[index];
      const before = nodes[index - 1];
      if (choice === undefined) break;
      const between = before === undefined ? [] : accesses(before.trace, choice.trace);
      const sleep = (before?.sleep ?? []).filter((sleeper) => !disturbs(between, sleeper));
      const base = isThread(choice) ? 0 : IO_SUCCEEDS;
      const rest = choice.open & ~(1 << (choice.chosen - base));
      nodes.push({ chosen: choice.chosen, rest, trace: choice.trace, sleep, done: [] });
    }
    if (!backtrack(nodes, accesses)) return report(true, undefined);
    if (runs >= options.maxRuns) return report(false, undefined);
  }
}

/** Goes back to the last choice with something left to try, and chooses that. @returns false where nothing is left */
function backtrack(nodes: Node[], accesses: (from: number, to?: number) => Access[]): boolean {
  // Where what the thread of a node did ends: at the next choice of a thread.
  let end: number | undefined;
  for (;;) {
    const node = nodes.at(-1);
    if (node === undefined) return false;
    if (isThread(node)) {
      // Others may go first from now on; this one need not, until something disturbs what it does.
      node.sleep.push({ thread: node.chosen, accesses: [...node.done, ...accesses(node.trace, end)] });
      node.done = [];
      end = node.trace;
    }
    if (node.rest !== 0) {
      const base = isThread(node) ? 0 : IO_SUCCEEDS;
      node.chosen = base + 31 - Math.clz32(node.rest & -node.rest);
      node.rest &= ~(1 << (node.chosen - base));
      if (base !== 0) {
        const owner = nodes.findLast(isThread);
        owner?.done.push(...accesses(owner.trace, end));
      }
      return true;
    }
    nodes.pop();
  }
}

/** Whether something that was done and what a sleeper would do may not be swapped. */
function disturbs(done: readonly Access[], { accesses }: Sleeper): boolean {
  return done.some((a) =>
    accesses.some(
      (b) => a.place === b.place && a.low < b.high && b.low < a.high && dependent(a.kind, b.kind),
    ),
  );
}
