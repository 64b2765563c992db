import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { stillframe } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-incremental-'));
afterAll(() => rmSync(folder, { recursive: true }));
const at = (name: string): string => join(folder, name);

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('stillframe backup with a dirty bitmap', () => {
  const backup = (...words: readonly string[]) =>
    stillframe(['backup', at('drive.qcow2'), ...words, '--output', 'json']);
  const planned = (stdout: string): unknown =>
    JSON.parse(stdout.trim().split('\n').at(-1) ?? '').clusters?.planned;
  const bitmaps = (): unknown =>
    JSON.parse(run('qemu-img', ['info', '--output', 'json', at('drive.qcow2')]))['format-specific'].data
      .bitmaps;

  it('makes incremental backups on top of each other', () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('drive.qcow2'), '16M']);
    run('qemu-img', ['bitmap', '--add', at('drive.qcow2'), 'daily']);
    run('qemu-io', ['-c', 'write -P 5 0 2M', at('drive.qcow2')]);
    const daily = ['--bitmap', 'daily'];
    const full = backup(at('0.qcow2'), '--sync', 'full', ...daily, '--bitmap-mode', 'on-success');
    expect(full.status, full.stderr).toBe(0);
    for (const index of [1, 2]) {
      run('qemu-io', ['-c', `write -P ${index} ${index}M 1M`, '-c', 'write -z 0 64k', at('drive.qcow2')]);
      const target = at(`${index}.qcow2`);
      const { status, stdout, stderr } = backup(
        ...[target, '--sync', 'incremental', ...daily, '--backing', `${index - 1}.qcow2`],
      );
      expect(status, stderr).toBe(0);
      expect(planned(stdout)).toBe(17);
      run('qemu-img', ['compare', '-q', at('drive.qcow2'), target]);
      run('qemu-img', ['check', '-q', target]);
    }
    const again = backup(at('3.qcow2'), '--sync', 'bitmap', ...daily, '--bitmap-mode', 'never');
    expect(planned(again.stdout)).toBe(0);
    expect(bitmaps()).toEqual([{ flags: ['auto'], name: 'daily', granularity: 65536 }]);
    run('qemu-img', ['check', '-q', at('drive.qcow2')]);
  });

  it.each([
    [['--sync', 'incremental'], /valid bitmap name/],
    [['--sync', 'incremental', '--bitmap', 'nope'], /Bitmap 'nope' could not be found/],
    [['--sync', 'full', '--backing', '0.qcow2'], /says itself what the target lies on/],
    [['--sync', 'incremental', '--bitmap', 'daily', '--backing', 'nothing.qcow2'], /nothing\.qcow2/],
    [
      ['--sync', 'incremental', '--bitmap', 'daily', '--format', 'raw', '--backing', '0.qcow2'],
      /no backing files/,
    ],
    [['--sync', 'full', '--bitmap', 'daily', '--bitmap-mode', 'sometimes'], /--bitmap-mode takes/],
  ])('refuses %j', (words, message) => {
    const { status, stderr } = backup(at('no.qcow2'), ...words);
    expect(status).toBe(1);
    expect(stderr).toMatch(message);
    expect(() => run('ls', [at('no.qcow2.partial')])).toThrow();
  });
});
