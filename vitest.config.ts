import { availableParallelism } from 'node:os';
import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    globalSetup: ['test/support/commands-setup.ts'],
    pool: 'forks',
    // Many tests wait for other programs: two files at once keep two processors busy.
    maxWorkers: Math.max(2, availableParallelism() - 1),
    // It ends what hangs.
    testTimeout: 180_000,
    hookTimeout: 180_000,
    // The suite runs the built package, natively loaded: the very code that ships, workers included.
    server: { deps: { external: [/\/dist\//] } },
  },
});
