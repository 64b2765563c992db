import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { command } from '../support/commands.js';
import { withFolder } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { checkQcow2 } from './qcow2-check.js';

const simulate = command('bench/dist/test/sim/sim.js');

describe('the production code in a simulated world', { timeout: 600_000 }, () => {
  it('violates nothing under random schedules, faults and power cuts', () => {
    const { status, output } = simulate('--seeds', '1200');
    expect(output).toMatch(/^1200 seeds from 1 on, \d{6,} steps .* 0 violations$/m);
    expect(status).toBe(0);
  });

  it('violates nothing in the small scope, as far as a bounded search goes', () => {
    const { status, output } = simulate('--scope', '--runs', '250');
    expect(output).toMatch(/^full, 2 guests, 2 copiers: \d+ states/m);
    expect(output).toMatch(/ 0 violations$/m);
    expect(status).toBe(0);
  });

  it('does not fall back into what it once violated', () => {
    const { status, output } = simulate('--regressions');
    expect(output.split('\n').filter((line) => line !== '' && !line.endsWith(': no violation'))).toEqual([]);
    expect(status).toBe(0);
  });

  it('says the same of a seed every time, and how it went', () => {
    const [first, second] = [simulate('--seed', '5'), simulate('--seed', '5')];
    expect(first).toEqual(second);
    expect(first.output).toMatch(/job +reads +frame/);
    expect(first.output).toMatch(/\d+ steps, outcome \w+; no violation/);
  });
});

describe.runIf(hasPeer('qemu-img'))('the judge of images', () => {
  const image = (folder: string): string => {
    const path = join(folder, 'image.qcow2');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4096', path, '1M']);
    run('qemu-io', ['-c', 'write -P 7 0 64k', '-c', 'write -z 256k 64k', '-c', 'write -P 9 900k 8k', path]);
    return path;
  };

  it('finds nothing wrong with what QEMU wrote', () =>
    withFolder((folder) => {
      expect(checkQcow2(readFileSync(image(folder)))).toEqual({ errors: [], leaks: 0 });
    }));

  it('sees a refcount that is too low, one that is too high, a lost flag and an entry that leads nowhere', () =>
    withFolder((folder) => {
      const path = image(folder);
      const intact = readFileSync(path);
      const table = Number(intact.readBigUInt64BE(48));
      const block = Number(intact.readBigUInt64BE(table));
      const l1 = Number(intact.readBigUInt64BE(40));
      const l2 = Number(intact.readBigUInt64BE(l1) & 0xfffffffffffe00n);
      const data = Number(intact.readBigUInt64BE(l2) & 0xfffffffffffe00n);
      const damaged = (change: (bytes: Buffer) => void): ReturnType<typeof checkQcow2> => {
        const bytes = Buffer.from(intact);
        change(bytes);
        writeFileSync(path, bytes);
        return checkQcow2(bytes);
      };
      const entry = block + (data / 4096) * 2;
      expect(damaged((bytes) => bytes.writeUInt16BE(0, entry)).errors[0]).toMatch(
        /used 1 times but its refcount is 0/,
      );
      expect(damaged((bytes) => bytes.writeUInt16BE(2, entry)).leaks).toBe(1);
      expect(damaged((bytes) => bytes.writeUInt8(0, l2)).errors[0]).toMatch(/the copied flag is false/);
      expect(damaged((bytes) => bytes.writeUInt8(8, l2 + 3)).errors[0]).toMatch(/beyond the end of the file/);
    }));
});
