import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    pool: 'forks',
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // The suite runs the built package, natively loaded: the very code that ships, workers included.
    server: { deps: { external: [/\/dist\//] } },
  },
});
