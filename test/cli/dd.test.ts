import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const engine = await createEngine({ workers: 2 });
afterAll(() => engine.close());

const LENGTH = 1_000_003;

function contentOf(name: string, format: string): Buffer {
  run('qemu-img', ['convert', '-f', format, '-O', 'raw', at(name), at('content')]);
  return readFileSync(at('content'));
}

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('stillframe dd beside qemu-img dd', () => {
  beforeAll(() => {
    const data = new Random(1).noise(LENGTH);
    data.fill(0, 200_000, 500_000);
    writeFileSync(at('raw'), data);
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'raw', '-F', 'raw', at('qcow2')]);
    run('qemu-io', ['-c', 'write -P 1 64k 10k', '-c', 'write -z 700000 50000', at('qcow2')]);
  });

  it.each([
    ['raw', 'raw', []],
    ['qcow2', 'raw', ['bs=64k']],
    ['raw', 'qcow2', ['bs=1000', 'count=3']],
    ['raw', 'raw', ['bs=1000', 'skip=2', 'count=300']],
    ['qcow2', 'qcow2', ['bs=1k', 'skip=100']],
    ['qcow2', 'raw', ['bs=77', 'skip=911', 'count=11688']],
    ['raw', 'raw', ['bs=1M', 'count=1k', 'skip=0']],
    ['raw', 'raw', ['bs=4k', 'count=0']],
    ['raw', 'raw', ['bs=1.5k', 'count=0x10', 'bs=512']],
    ['raw', 'raw', ['bs=4k', 'skip=1000']],
    ['qcow2', 'raw', ['count=2', 'skip=2']],
    ['raw', 'qcow2', ['count=1', 'skip=2']],
    ['raw', 'raw', ['bs=2147483647', 'skip=1P']],
  ] as const)('from %s to %s, %j', (from, to, operands) => {
    const copy = (of: string) => ['dd', '-f', from, '-O', to, ...operands, `if=${at(from)}`, `of=${at(of)}`];
    // Whatever was there before.
    for (const name of ['ours', 'theirs']) writeFileSync(at(name), Buffer.alloc(2_000_000, 5));
    const theirs = spawnSync('qemu-img', copy('theirs'), { encoding: 'utf8' });
    const ours = stillframe(copy('ours'));
    expect(theirs.status).toBe(0);
    expect(ours).toMatchObject({ status: 0, stdout: '' });
    expect(ours.stderr.includes('cannot skip')).toBe(theirs.stderr.includes('cannot skip'));
    const [one, other] = [contentOf('ours', to), contentOf('theirs', to)];
    expect(one.length).toBe(other.length);
    expect(firstDifference(one, other)).toBe(-1);
  });

  it('takes no command line that qemu-img does not take, and makes nothing then', () => {
    rmSync(at('none'), { force: true });
    for (const operands of [
      ...[['bs=0'], ['bs=-1'], ['bs=x'], ['bs=3G'], ['bs='], ['count=x'], ['skip=x'], ['foo=1'], ['foo']],
      ...[['seek=1'], ['conv=notrunc'], ['-O', 'nosuch'], ['-f', 'qcow2'], ['-n'], ['if=nosuch']],
    ]) {
      const args = ['dd', `if=${at('raw')}`, `of=${at('none')}`, ...operands];
      expect(spawnSync('qemu-img', args).status, operands.join(' ')).toBe(1);
      expect(stillframe(args).status, operands.join(' ')).toBe(1);
      expect(existsSync(at('none')), operands.join(' ')).toBe(false);
    }
    for (const args of [['dd'], ['dd', `if=${at('raw')}`], ['dd', `of=${at('none')}`]]) {
      expect(spawnSync('qemu-img', args).status).toBe(1);
      expect(stillframe(args).status).toBe(1);
    }
  });

  it('never writes over the image that it reads', () => {
    const before = readFileSync(at('raw'));
    const done = stillframe(['dd', `if=${at('raw')}`, `of=${at('raw')}`, 'count=1']);
    expect(done.status).toBe(1);
    expect(done.stderr).toContain('ERR_STILLFRAME_SAME_NODE');
    expect(readFileSync(at('raw')).equals(before)).toBe(true);
  });

  it.each([
    [[at('raw'), at('qcow2')], { skip: 0, end: 1 }],
    [[at('raw')], { skip: -1, end: 1 }],
    [[at('raw')], { skip: 0.5, end: 1 }],
    [[at('raw')], { skip: 0, end: Number.NaN }],
  ])('a part that is none is one clear error (%#)', async (sources, range) => {
    await expect(engine.convertImage(sources, at('none'), { range })).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
    );
  });
});
