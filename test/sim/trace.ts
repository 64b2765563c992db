import type { Scenario } from './scenario.js';
import { threadName } from './simulator.js';
import type { Verdict } from './thread.js';
import {
  ADD,
  ARENA,
  CHANGE,
  FILE,
  LOCAL,
  NAMES,
  NOTIFY,
  READ,
  STATES,
  type Step,
  WAIT,
  WRITE,
} from './world.js';

const KINDS: Readonly<Record<number, string>> = {
  [LOCAL]: 'goes on',
  [READ]: 'reads',
  [WRITE]: 'changes',
  [ADD]: 'adds to',
  [WAIT]: 'waits on',
  [NOTIFY]: 'wakes',
};

/** The last `most` steps of a run that tell what happened, a line each; steps in a row on one place are one line. */
export function formatTrace(
  trace: readonly Step[],
  scenario: Scenario,
  places: Verdict['places'],
  most: number,
): string[] {
  const lines: string[] = [];
  let last = '';
  trace.forEach((step, index) => {
    const where = placeName(step, places);
    if (where === undefined) return;
    const line = `${threadName(scenario, step.thread).padEnd(9)} ${(KINDS[step.kind] ?? '').padEnd(8)} ${where}`;
    if (line === last) return;
    last = line;
    lines.push(`${String(index).padStart(6)} ${line}`);
  });
  const left = lines.length - most;
  return left > 0 ? [`       … ${left} lines before`, ...lines.slice(-most)] : lines;
}

function placeName({ kind, place, low, high }: Step, places: Verdict['places']): string | undefined {
  if (kind === LOCAL && place !== CHANGE) return 'after its sleep';
  if (place === CHANGE) return 'with its change of the drive';
  if (place === NAMES) return 'the names of files';
  if (place === STATES) return `states of clusters [${low}, ${high})`;
  if (place >= FILE) return `file ${place - FILE} [${low}, ${high})`;
  const found = places.find(({ from, bytes }) => place === ARENA && low >= from && low < from + bytes);
  if (found === undefined || found.name === 'arena' || found.name === 'simulator') return undefined;
  return `${found.name}+${low - found.from}`;
}
