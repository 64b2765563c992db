/** What the two sides do not agree on. */
export interface Divergence {
  /** In one word or a few; a shorter trace with the same one fails for the same reason. */
  readonly kind: string;
  readonly what: string;
}

/** Why a replay stops: thrown by its parts, returned by the whole. */
export class Diverged extends Error {
  readonly divergence: Divergence;

  constructor(kind: string, what: string) {
    super(what);
    this.divergence = { kind, what };
  }
}

/** What a replay stopped with. */
export function divergenceOf(error: unknown): Divergence {
  if (error instanceof Diverged) return error.divergence;
  return { kind: 'error', what: error instanceof Error ? (error.stack ?? error.message) : String(error) };
}

/** The kind of a trace that could not be told at all; a shorter one would fail for other reasons. */
export const PREPARATION = 'preparation';
