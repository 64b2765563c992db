import type { Step, Trace } from './trace.js';

/**
 * The shortest list that still fails and is left of `items` when parts of it are taken out (delta debugging: halves
 * first, then smaller and smaller parts).
 */
export function shorten<T>(items: readonly T[], fails: (items: readonly T[]) => boolean): readonly T[] {
  let list = items;
  for (let size = Math.ceil(list.length / 2); size >= 1; ) {
    let shorter: readonly T[] | undefined;
    for (let at = 0; at < list.length && shorter === undefined; at += size) {
      const rest = [...list.slice(0, at), ...list.slice(at + size)];
      if (fails(rest)) shorter = rest;
    }
    if (shorter !== undefined) list = shorter;
    else if (size === 1) break;
    else size = Math.ceil(size / 2);
    size = Math.min(size, Math.max(1, list.length));
    if (list.length === 0) break;
  }
  return list;
}

function plainResize(step: Step): Step {
  return step.kind === 'resize' ? { kind: step.kind, length: step.length } : step;
}

/** The shortest and plainest trace that still fails. */
export function minimise(trace: Trace, fails: (trace: Trace) => boolean): Trace {
  let best = trace;
  const attempt = (simpler: Trace): void => {
    if (JSON.stringify(simpler) !== JSON.stringify(best) && fails(simpler)) best = simpler;
  };
  const shortenSteps = (): void => {
    best = { ...best, steps: shorten(best.steps, (steps) => fails({ ...best, steps })) };
  };
  shortenSteps();
  attempt({ ...best, lazyRefcounts: false });
  attempt({ ...best, preallocated: false });
  attempt({ ...best, steps: best.steps.map(plainResize) });
  for (let count = 0; count < trace.bases.length; count++) attempt({ ...best, bases: best.bases.slice(1) });
  for (const [index, base] of best.bases.entries()) {
    const withOperations = (operations: typeof base.operations): Trace => ({
      ...best,
      bases: best.bases.with(index, { ...base, operations }),
    });
    best = withOperations(shorten(base.operations, (shorter) => fails(withOperations(shorter))));
  }
  const { shape } = best;
  attempt({ ...best, shape: { ...best.shape, subclusters: false } });
  attempt({ ...best, shape: { ...best.shape, dataFile: 'none' } });
  attempt({ ...best, shape: { ...best.shape, compression: 'none' } });
  attempt({ ...best, shape: { ...best.shape, refcountBits: 16 } });
  if (shape.version === 2) attempt({ ...best, shape: { ...best.shape, version: 3 } });
  shortenSteps();
  return best;
}
