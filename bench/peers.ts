/**
 * Stillframe beside QEMU's own tools on the same files:
 * `npm run bench:peers -- [--folder DIR] [--runs N] [--gib N] [--only PART,PART]`. Parts: see below.
 *
 * Contestants run in turn (A B C A B C …) on the same source, page cache warm; medians and ratios of medians are
 * printed. Raw targets of backups exist already and are overwritten; images that a contestant makes are removed
 * before its next run, so that all of them start from the same place. Stillframe computes its checksums throughout
 * and makes its target durable; qemu-img runs with `-t writeback`, which flushes, too.
 *
 * Whole processes compare with whole processes (their start counts), jobs of running programs with each other.
 */
import { rmSync } from 'node:fs';
import { availableParallelism, totalmem } from 'node:os';
import { folder, ONLY } from './harness.js';
import { images } from './images.js';
import { jobs } from './jobs.js';

const parts = new Map<string, () => Promise<void>>([['jobs', jobs], ...images]);

try {
  console.log(
    `node ${process.version}, ${availableParallelism()} processors, ${(totalmem() / 2 ** 30).toFixed(0)} GiB, files in ${folder}`,
  );
  const unknown = ONLY?.find((name) => !parts.has(name));
  if (unknown !== undefined) {
    throw new Error(`there is no part '${unknown}'; parts are ${[...parts.keys()].join(', ')}`);
  }
  for (const [name, run] of parts) if (ONLY?.includes(name) ?? true) await run();
} finally {
  rmSync(folder, { recursive: true, force: true });
}
