import type { FuzzFormat } from './formats.js';
import type { Recipe } from './fuzzer.js';

/** Executions that once failed, made small. */
export const regressions: readonly {
  readonly format: FuzzFormat;
  readonly what: string;
  readonly recipe: Recipe;
}[] = [
  {
    format: 'qcow2',
    what: 'the L1 table of a snapshot is the active one, which was written to after a repair',
    recipe: {
      base: 'terabyte',
      mutations: [
        [
          {
            at: 12582912,
            hex: '000000000060000000000001000100020000000000000000000000000000000000000000000000020707307330000000',
          },
          { at: 60, hex: '000000010000000000c00000' },
        ],
      ],
      actions: 2,
    },
  },
  {
    format: 'qcow2',
    what: 'an L1 entry refers to the L1 table, which was written to after a repair',
    recipe: {
      base: 'bitmaps-512',
      mutations: [[{ at: 1600, hex: '8000000000000600' }]],
      actions: 2,
    },
  },
  {
    format: 'qcow2',
    what: 'a compressed cluster of sequences that go nowhere takes seconds',
    recipe: { base: 'zstd-512', mutations: [[{ at: 3269, hex: 'c7adbc87284421' }]], actions: 50217905 },
  },
];
