import { expect, it } from 'vitest';
import { pairwise, product } from './pairwise.js';

/** Every pair of values of a row, as text. */
function pairs(row: readonly number[]): string[] {
  return row.flatMap((value, i) => row.slice(i + 1).map((other, j) => `${i}=${value} ${i + 1 + j}=${other}`));
}

it.each([
  { sizes: [2, 2, 2], valid: () => true, most: 4 },
  { sizes: [3, 3, 3, 3], valid: () => true, most: 13 },
  { sizes: [4, 3, 2, 5], valid: (row: readonly number[]) => row[0] !== 0 || row[3] === 1, most: 24 },
])('rows for $sizes have every pair that can be, and no row that cannot', ({ sizes, valid, most }) => {
  const rows = pairwise(sizes, valid);
  expect(rows.every(valid)).toBe(true);
  const wanted = new Set(product(sizes).filter(valid).flatMap(pairs));
  expect(new Set(rows.flatMap(pairs))).toEqual(wanted);
  expect(rows.length).toBeLessThanOrEqual(most);
  expect(pairwise(sizes, valid)).toEqual(rows);
});
