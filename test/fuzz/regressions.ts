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
  {
    format: 'qcow2',
    what: 'the repair of a snapshot table looks at every cluster that a damaged refcount table could count',
    recipe: {
      base: 'empty',
      mutations: [
        [
          {
            at: 1536,
            hex: '000000000000000000000001000100020000000000000000000000000000000000000000000000130707070707070707070707070707070707070730733000000000000000000400000000010001000200000000000000000000000000000000000000000000000b070707070707070707070731733100000000000000000400000000010001000200000000000000000000000000000000000000000000001b0707070707070707070707070707070707070707070707070707073273320000',
          },
          { at: 60, hex: '93be4f4f0000000000000600' },
        ],
        [{ at: 96, hex: '00000000' }],
        [
          { at: 891, hex: '40' },
          { at: 763, hex: 'c6' },
        ],
      ],
      actions: 60089715,
    },
  },
  {
    format: 'qcow2',
    what: 'an image that becomes shorter looks for its last cluster in use behind all that is counted',
    recipe: { base: 'over-raw-v2', mutations: [[{ length: 70368744177664 }]], actions: 70606127 },
  },
  {
    format: 'vmdk',
    what: 'a header without a grain directory, which was read from the one that is kept in reserve',
    recipe: {
      base: 'sparse-zeroes',
      mutations: [[{ at: 56, hex: '0000000000000000' }]],
      actions: 1004000,
    },
  },
];
