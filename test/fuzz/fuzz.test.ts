import { describe, expect, it } from 'vitest';
import { FOREIGN_NAMES } from '#src/block/foreign/index.js';
import { command } from '../support/commands.js';

const fuzz = command('bench/dist/test/fuzz/fuzz.js');

describe('images damaged at random', { timeout: 600_000 }, () => {
  it('make nothing but errors with a code, open nothing, take no memory, and read as QEMU reads them', () => {
    const { status, output } = fuzz('qcow2', '--executions', '600', '--compare', '60');
    expect(output).toMatch(/^600 executions .* 0 failures$/m);
    // A fuzzer whose images nobody can open finds nothing.
    const [, read = 0, changed = 0] = /(\d+) images read, (\d+) changed/.exec(output)?.map(Number) ?? [];
    expect(read).toBeGreaterThan(150);
    expect(changed).toBeGreaterThan(60);
    expect(status).toBe(0);
  });

  it.each([...FOREIGN_NAMES])('do so in %s, too', (format) => {
    const { status, output } = fuzz(format, '--executions', '150', '--compare', '30');
    expect(output).toMatch(/^150 executions .* 0 failures$/m);
    const [, read = 0] = /(\d+) images read/.exec(output)?.map(Number) ?? [];
    expect(read).toBeGreaterThan(40);
    expect(status).toBe(0);
  });

  it('that once did worse do so no more', () => {
    const { status, output } = fuzz('qcow2', '--regressions');
    expect(output.split('\n').filter((line) => line !== '' && !line.endsWith(': no failure'))).toEqual([]);
    expect(status).toBe(0);
  });
});
