/** `stillframe benchmark`: what it measures is there; how large it is depends on the machine. */
import { mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { temporaryFolder } from '../block/qcow2-support.js';
import { lastObject, startStillframe, stillframe } from '../support/cli.js';
import { hasPeer } from '../support/peers.js';

const MiB = 1024 * 1024;
const folder = join(temporaryFolder(), 'here');
mkdirSync(folder);
const SHORT = ['--size', '16M', '--seconds', '0.4', '--warm-up', '0.3', '--rate', '500', '--folder', folder];

interface Outcome {
  readonly contestant: string;
  readonly mode: string;
  readonly pattern: string;
  readonly fleece: boolean;
  readonly targetSpeed?: number;
  readonly backups: number;
  readonly seconds?: number;
  readonly targetBytes?: number;
  readonly guest: Readonly<Record<'requests' | 'p50' | 'p90' | 'p99' | 'p999' | 'max' | 'stalledMs', number>>;
}

function measured(...args: readonly string[]): Outcome[] {
  const { status, stdout, stderr } = stillframe(['benchmark', ...SHORT, '--output', 'json', ...args]);
  expect(status, stderr).toBe(0);
  expect(readdirSync(folder)).toEqual([]);
  const { scenarios } = lastObject(stdout) as { readonly scenarios?: Outcome[] };
  return scenarios ?? [];
}

const names = (outcomes: readonly Outcome[]): string[] =>
  outcomes.map(({ mode, fleece }) => `${mode}${fleece ? ' fleecing' : ''}`);

describe('a benchmark', () => {
  it('measures every mode, with and without fleecing, and the guest alone', () => {
    const outcomes = measured();
    expect(names(outcomes)).toEqual([
      ...['off', 'full', 'full fleecing', 'top', 'top fleecing', 'none'],
      ...['incremental', 'incremental fleecing'],
    ]);
    for (const { mode, backups, seconds, targetBytes = 0, guest } of outcomes) {
      expect(guest.requests, mode).toBeGreaterThan(0);
      const { p50, p90, p99, p999, max } = guest;
      expect([p50, p90, p99, p999, max]).toEqual([p50, p90, p99, p999, max].toSorted((a, b) => a - b));
      expect(p50).toBeGreaterThan(0);
      const completes = mode !== 'off' && mode !== 'none';
      expect(backups > 0, mode).toBe(completes);
      expect(seconds !== undefined).toBe(completes);
      if (mode === 'full') expect(targetBytes).toBeGreaterThanOrEqual(16 * MiB);
      // A quarter, and what the guest has written before; each 64 KiB, few of them twice.
      if (mode === 'top') expect(targetBytes).toBeGreaterThanOrEqual(4 * MiB);
      if (mode === 'none') expect(targetBytes).toBeGreaterThan(0);
    }
  });

  it('limits the target, and the guest waits for it without fleecing', () => {
    const [limited, fleecing] = measured('--modes', 'full', '--target-speeds', '1M', '--fleece', 'off,on');
    expect(limited).toMatchObject({ mode: 'full', fleece: false, targetSpeed: MiB, backups: 0 });
    expect(fleecing).toMatchObject({ mode: 'full', fleece: true, targetSpeed: MiB, backups: 0 });
    expect(limited?.targetBytes).toBeLessThan(8 * MiB);
    expect(limited?.guest.stalledMs).toBeGreaterThan(fleecing?.guest.stalledMs ?? Number.POSITIVE_INFINITY);
  });

  it.skipIf(!hasPeer('qemu-storage-daemon'))('tells another storage daemon the same', () => {
    const outcomes = measured('--peer', 'qemu-storage-daemon', '--modes', 'top,none', '--patterns', 'hot');
    expect(
      outcomes.map(({ contestant, ...of }) => `${contestant}: ${names([{ contestant, ...of }])}`),
    ).toEqual([
      ...['stillframe: top', 'stillframe: top fleecing', 'stillframe: none'],
      ...['peer: top', 'peer: none'],
    ]);
    for (const { guest, pattern } of outcomes) {
      expect(guest.requests).toBeGreaterThan(0);
      expect(pattern).toBe('hot');
    }
  });

  it('prints a table', () => {
    const { stdout } = stillframe(['benchmark', ...SHORT, '--modes', 'off', '--patterns', 'sequential']);
    expect(stdout).toMatch(/^program +mode .* p50 +p90 +p99 +p99\.9 +max +stalled$/m);
    expect(stdout).toMatch(/^stillframe +no backup +sequential .* µs .* ms$/m);
  });

  it('leaves nothing behind when it is interrupted', async () => {
    const { child, finished } = startStillframe(['benchmark', ...SHORT, '--seconds', '600']);
    await new Promise<void>((resolve) => {
      child.stderr?.on('data', (data) => {
        if (String(data).includes('Making')) setTimeout(resolve, 1500);
      });
    });
    child.kill('SIGINT');
    expect((await finished).status).toBe(130);
    expect(readdirSync(folder)).toEqual([]);
  });

  it.each([
    ['--modes full,all', /--modes takes some of off,full/],
    ['--modes none --fleece on', /has no fleecing/],
    ['--patterns odd', /--patterns takes/],
    ['--fleece maybe', /--fleece takes/],
    ['--target-speeds fast', /--target-speeds/],
    ['--target-speeds 0', /--target-speeds/],
    ['--block-size 100', /--block-size/],
    ['--size 100k', /--size/],
    ['--rate 0', /--rate takes a number/],
    ['--seconds x', /--seconds takes a number/],
    ['--peer /nowhere/daemon', /'\/nowhere\/daemon' cannot be started/],
    ['--peer false', /ended with 1/],
  ])('refuses %s', (args, text) => {
    const { status, stderr } = stillframe(['benchmark', ...SHORT, '--modes', 'off', ...args.split(' ')]);
    expect(stderr).toMatch(text);
    expect(status).toBe(1);
    expect(readdirSync(folder)).toEqual([]);
  });
});
