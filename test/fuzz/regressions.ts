import type { Recipe } from './fuzzer.js';

/** Executions that once failed, made small. */
export const regressions: readonly { readonly what: string; readonly recipe: Recipe }[] = [];
