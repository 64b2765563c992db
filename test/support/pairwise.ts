/**
 * Few combinations of choices that still have every pair: of each dimension one value is picked, given as its index,
 * and every two values of different dimensions that may go together do so in at least one row. Always the same rows
 * for the same question.
 *
 * @param sizes how many values each dimension has; their product is walked, so it should stay below a million
 * @param valid whether a combination makes sense at all
 */
export function pairwise(
  sizes: readonly number[],
  valid: (row: readonly number[]) => boolean = () => true,
): number[][] {
  const candidates = product(sizes).filter(valid);
  // Values of all dimensions numbered through: a pair is one bit of a square.
  const starts = sizes.map((_, index) => sizes.slice(0, index).reduce((sum, size) => sum + size, 0));
  const width = sizes.reduce((sum, size) => sum + size, 0);
  const pairsOf = candidates.map((row) => {
    const values = row.map((value, index) => value + (starts[index] ?? 0));
    return values.flatMap((value, index) => values.slice(index + 1).map((other) => value * width + other));
  });
  const open = new Uint8Array(width * width);
  let left = 0;
  for (const pair of pairsOf.flat()) {
    if (open[pair] === 0) left++;
    open[pair] = 1;
  }
  const rows: number[][] = [];
  while (left > 0) {
    let best = 0;
    let most = 0;
    for (const [index, pairs] of pairsOf.entries()) {
      let fresh = 0;
      for (const pair of pairs) fresh += open[pair] ?? 0;
      if (fresh <= most) continue;
      best = index;
      most = fresh;
    }
    for (const pair of pairsOf[best] ?? []) open[pair] = 0;
    rows.push(candidates[best] ?? []);
    left -= most;
  }
  return rows;
}

/** Every combination, in order. */
export function product(sizes: readonly number[]): number[][] {
  let rows: number[][] = [[]];
  for (const size of sizes) {
    rows = rows.flatMap((row) => Array.from({ length: size }, (_, value) => [...row, value]));
  }
  return rows;
}
