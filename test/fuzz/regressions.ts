import type { FuzzFormat } from './formats.js';
import type { Recipe } from './fuzzer.js';

/** Executions that once failed, made small. */
export const regressions: readonly {
  readonly format: FuzzFormat;
  readonly what: string;
  readonly recipe: Recipe;
}[] = [];
