import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { mutants } from './list.js';

const root = fileURLToPath(new URL('../..', import.meta.url));

it.each(mutants)('$name still finds its place in the code', ({ file, find, replace }) => {
  expect(readFileSync(join(root, file), 'utf8').split(find)).toHaveLength(2);
  expect(replace).not.toBe(find);
});

it('names each mistake once', () => {
  expect(new Set(mutants.map(({ name }) => name)).size).toBe(mutants.length);
});
