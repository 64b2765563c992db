import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { temporaryFolder } from '../block/qcow2-support.js';
import { lastObject, startStillframe, stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const content = Buffer.alloc(6 << 20);
content.set(new Random(1).noise(100_000), 1 << 20);
content.fill('stillframe ', 3 << 20, (3 << 20) + 500_000);

const inFolder = (words: readonly string[]): string[] =>
  words.map((word) => (/^(source|out\d?|base|snap|nosuch)\b/.test(word) ? at(word) : word));

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('stillframe convert', () => {
  beforeAll(() => {
    writeFileSync(at('source.raw'), content);
    run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', at('source.raw'), at('source.qcow2')]);
    run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', at('source.raw'), at('snap.qcow2')]);
    run('qemu-img', ['snapshot', '-c', 'before', at('snap.qcow2')]);
    run('qemu-io', ['-f', 'qcow2', '-c', 'write -P 1 0 6M', at('snap.qcow2')]);
  });

  it.each([
    [['source.qcow2'], 'raw'],
    [['-f', 'raw', '-O', 'qcow2', 'source.raw'], 'qcow2'],
    [['-f', 'raw', '-O', 'qcow2', '-c', '-o', 'compression_type=zstd', 'source.raw'], 'qcow2'],
    [['-O', 'qcow2', '-o', 'cluster_size=4k,compat=0.10', '-o', 'refcount_bits=16', 'source.qcow2'], 'qcow2'],
    [['-l', 'before', 'snap.qcow2'], 'raw'],
    [['-l', 'snapshot.name=before', '-O', 'qcow2', 'snap.qcow2'], 'qcow2'],
    [['-S', '0', '-m', '1', '-W', '-t', 'none', '-T', 'none', 'source.qcow2'], 'raw'],
    [['-C', '-U', '-q', 'source.qcow2'], 'raw'],
  ] as const)('%j', (words, format) => {
    const done = stillframe(['convert', ...inFolder(words), at('out')]);
    expect(done).toEqual({ status: 0, stdout: '', stderr: '' });
    run('qemu-img', ['convert', '-f', format, '-O', 'raw', at('out'), at('content')]);
    expect(firstDifference(readFileSync(at('content')), content)).toBe(-1);
  });

  it('shows progress, and tells the result as JSON', () => {
    const args = ['convert', '-p', '--output', 'json', '-O', 'qcow2', at('source.qcow2'), at('out')];
    const done = stillframe(args);
    expect(done.stderr).toMatch(/\(100\.00\/100%\)\n$/);
    expect(lastObject(done.stdout)).toEqual({ type: 'result', filename: at('out'), format: 'qcow2' });
  });

  it('lists the options of a format', () => {
    const done = stillframe(['convert', '-O', 'qcow2', '-o', 'help', 'a', 'b']);
    expect(done.stdout).toBe(stillframe(['create', '-f', 'qcow2', '-o', 'help']).stdout);
  });

  it.each<[string[], string]>([
    [['-c', 'source.qcow2', 'out2'], 'Compression not supported for this file format'],
    [['-O', 'qcow2', '-c', '-o', 'preallocation=metadata', 'source.qcow2', 'out2'], 'at the same time'],
    [
      ['-B', 'base', '-O', 'qcow2', 'source.qcow2', 'out2'],
      'Use of backing file requires explicit backing format',
    ],
    [
      ['-B', 'base', '-F', 'raw', '-O', 'qcow2', 'source.qcow2', 'source.qcow2', 'out2'],
      'makes no sense when',
    ],
    [
      ['-B', 'source.raw', '-F', 'raw', 'source.qcow2', 'out2'],
      "Backing file not supported for file format 'raw'",
    ],
    [['-n', 'source.qcow2', 'out2'], 'no such file or directory'],
    [['-n', '-o', 'compat=1.1', 'source.qcow2', 'out2'], '-o has no effect when skipping image creation'],
    [['source.qcow2'], 'Must specify image file name'],
    [['--target-is-zero', 'source.qcow2', 'out2'], '--target-is-zero requires use of -n flag'],
    [['-S', '1000', 'source.qcow2', 'out2'], 'Invalid buffer size for sparse output specified'],
    [['-m', '20', 'source.qcow2', 'out2'], 'Invalid number of coroutines'],
    [['-l', 'nosuch', 'source.qcow2', 'out2'], 'snapshot'],
    [['-O', 'bogus', 'source.qcow2', 'out2'], 'bogus'],
    [['-o', 'cluster_size=4k', 'source.qcow2', 'out2'], "Invalid parameter 'cluster_size'"],
    [['-C', '-S', '4k', 'source.qcow2', 'out2'], 'Cannot enable copy offloading when -S is used'],
    [['-c', '-C', 'source.qcow2', 'out2'], 'Cannot enable copy offloading when -c is used'],
    [['--salvage', '-C', 'source.qcow2', 'out2'], 'Cannot use copy offloading in salvaging mode'],
    [['--skip-broken-bitmaps', 'source.qcow2', 'out2'], 'Use of --skip-broken-bitmaps requires --bitmaps'],
    [['--bitmaps', 'source.qcow2', 'out2'], "Format driver 'raw' does not support bitmaps"],
    [['--bitmaps', '-O', 'qcow2', '-o', 'compat=0.10', 'source.qcow2', 'out2'], 'does not support bitmaps'],
    [['--bitmaps', '-f', 'raw', '-O', 'qcow2', 'source.raw', 'out2'], 'Source lacks bitmap support'],
    [['nosuch.qcow2', 'out2'], 'no such file or directory'],
  ])('fails as qemu-img does: %j', (words, message) => {
    const args = ['convert', ...inFolder(words)];
    const ours = stillframe(args);
    expect(ours.status).toBe(1);
    expect(ours.stderr).toContain(message);
    expect(existsSync(at('out2'))).toBe(false);
    expect(readdirSync(folder).filter((name) => name.endsWith('.partial'))).toEqual([]);
    expect(spawnSync('qemu-img', args).status).toBe(1);
    rmSync(at('out2'), { force: true });
  });

  it('ends with 130 and leaves nothing behind when it is interrupted', async () => {
    const args = ['convert', '-r', '1M', '-p', '-f', 'raw', at('source.raw'), at('out3')];
    const { child, finished } = startStillframe(args);
    await new Promise<void>((resolve) => {
      child.stderr?.on('data', (data) => {
        if (/\([1-9]/.test(String(data))) resolve();
      });
    });
    child.kill('SIGINT');
    const { status, stderr } = await finished;
    expect(status).toBe(130);
    expect(stderr).toContain('interrupted; nothing was left behind [ERR_STILLFRAME_JOB_CANCELLED]');
    expect(readdirSync(folder).filter((name) => name.startsWith('out3'))).toEqual([]);
  });
});
