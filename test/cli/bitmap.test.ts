import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { DirtyModel, dirtyInQemu } from '../support/bitmaps.js';
import { stillframe } from '../support/cli.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-bitmap-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

function qemuImg(...args: string[]) {
  const { status, stdout, stderr } = spawnSync('qemu-img', args, { cwd: folder, encoding: 'utf8' });
  return { status, stdout, stderr };
}

function make(...args: string[]): void {
  const { status, stderr } = qemuImg(...args);
  if (status !== 0) throw new Error(`qemu-img ${args.join(' ')}: ${stderr}`);
}

/** Name, flags and granularity of every bitmap, as qemu-img lists them. */
function bitmapsOf(image: string): unknown {
  const info = JSON.parse(qemuImg('info', '-U', '--output=json', image).stdout);
  return info['format-specific'].data.bitmaps ?? [];
}

const peers = ['qemu-img', 'qemu-io', 'qemu-nbd', 'nbdinfo'].every(hasPeer);

describe.skipIf(!peers)('stillframe bitmap beside qemu-img bitmap', () => {
  beforeAll(() => {
    // 'start' has two bitmaps with something in them and one in use; 'other' has one of the same drive size.
    make('create', '-q', '-f', 'qcow2', 'start.qcow2', '3000320');
    make('bitmap', '--add', 'start.qcow2', 'b0');
    make('bitmap', '--add', '-g', '512', 'start.qcow2', 'fine');
    make('bitmap', '--add', 'start.qcow2', 'broken');
    run('qemu-io', ['-c', 'write 100k 3k', '-c', 'write 2999808 512', at('start.qcow2')]);
    make('bitmap', '--disable', 'start.qcow2', 'fine');
    run('qemu-io', ['-c', 'write 1M 70k', at('start.qcow2')]);
    const bytes = readFileSync(at('start.qcow2'));
    const extension = bytes.indexOf(Buffer.from('2385287500000018', 'hex')) + 8;
    const entry = bytes.indexOf('broken', Number(bytes.readBigUInt64BE(extension + 16))) - 24;
    bytes.writeUInt32BE(3, entry + 12);
    writeFileSync(at('start.qcow2'), bytes);
    make('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=4k', 'other.qcow2', '3000320');
    make('bitmap', '--add', '-g', '1M', 'other.qcow2', 'coarse');
    make('bitmap', '--add', '-g', '1k', 'other.qcow2', 'b0');
    run('qemu-io', ['-c', 'write 0 10k', '-c', 'write 2M 64k', at('other.qcow2')]);
    make('create', '-q', '-f', 'qcow2', 'longer.qcow2', '4M');
    make('bitmap', '--add', 'longer.qcow2', 'b0');
    make('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', 'v2.qcow2', '4M');
    make('create', '-q', '-f', 'raw', 'plain.raw', '4M');
  });

  it.each<string[]>([
    ['--add', 'IMAGE', 'new'],
    ['--add', '-g', '4k', 'IMAGE', 'new'],
    ['--add', '-g', '2G', 'IMAGE', 'new'],
    ['--add', '-g', '0', 'IMAGE', 'new'],
    ['--add', '--disable', '--merge', 'fine', '-f', 'qcow2', 'IMAGE', 'new'],
    ['--add', '--merge', 'fine', '-g', '1M', 'IMAGE', 'new'],
    ['--add', '--merge=b0', '--merge=fine', '-g', '512', 'IMAGE', 'new'],
    ['--remove', 'IMAGE', 'b0'],
    ['--remove', 'IMAGE', 'broken'],
    ['--remove', '--add', 'IMAGE', 'broken'],
    ['--add', '--remove', '--add', '--disable', 'IMAGE', 'new'],
    ['--clear', 'IMAGE', 'b0'],
    ['--clear', '--merge', 'fine', 'IMAGE', 'b0'],
    ['--merge', 'fine', '--clear', 'IMAGE', 'b0'],
    ['--merge', 'b0', 'IMAGE', 'b0'],
    ['--enable', 'IMAGE', 'fine'],
    ['--disable', '--enable', '--disable', 'IMAGE', 'b0'],
    ['--merge', 'b0', 'IMAGE', 'fine'],
    ['--merge', 'fine', 'IMAGE', 'b0'],
    ['--merge', 'coarse', '-b', 'other.qcow2', '-F', 'qcow2', 'IMAGE', 'fine'],
    ['--merge', 'coarse', '-b', 'other.qcow2', 'IMAGE', 'b0'],
    ['--merge', 'b0', '--merge', 'coarse', '-b', 'other.qcow2', '--clear', 'IMAGE', 'b0'],
    ['--add', '--merge', 'b0', '-b', 'other.qcow2', '-g', '16k', 'IMAGE', 'new'],
    // What fails, and what was done before it.
    [],
    ['IMAGE'],
    ['IMAGE', 'b0'],
    ['--add', 'IMAGE'],
    ['--add', 'IMAGE', 'a', 'b'],
    ['--add', 'IMAGE', 'b0'],
    ['--add', 'IMAGE', 'broken'],
    ['--add', 'IMAGE', ''],
    ['--add', '--merge', 'nope', 'IMAGE', 'new'],
    ['--add', '--add', 'IMAGE', 'new'],
    ['--clear', '--remove', '--enable', 'IMAGE', 'b0'],
    ['--remove', 'IMAGE', 'nope'],
    ['--clear', 'IMAGE', 'nope'],
    ['--enable', 'IMAGE', 'nope'],
    ['--disable', 'IMAGE', 'nope'],
    ['--merge', 'nope', 'IMAGE', 'b0'],
    ['--merge', 'b0', 'IMAGE', 'nope'],
    ['--clear', 'IMAGE', 'broken'],
    ['--enable', 'IMAGE', 'broken'],
    ['--disable', 'IMAGE', 'broken'],
    ['--merge', 'b0', 'IMAGE', 'broken'],
    ['--merge', 'broken', 'IMAGE', 'b0'],
    ['--merge', 'nope', '-b', 'other.qcow2', 'IMAGE', 'b0'],
    ['--merge', 'b0', '-b', 'longer.qcow2', 'IMAGE', 'b0'],
    ['--merge', 'b0', '-b', 'plain.raw', '-F', 'raw', 'IMAGE', 'b0'],
    ['--add', '-g', '1000', 'IMAGE', 'new'],
    ['--add', '-g', '256', 'IMAGE', 'new'],
    ['--add', '-g', '4G', 'IMAGE', 'new'],
    ['-g', '64k', '--clear', 'IMAGE', 'b0'],
    ['-b', 'other.qcow2', '--clear', 'IMAGE', 'b0'],
    ['-F', 'qcow2', '--merge', 'fine', 'IMAGE', 'b0'],
    ['--add', 'v2.qcow2', 'b0'],
    ['--remove', 'v2.qcow2', 'b0'],
    ['--add', '-f', 'raw', 'plain.raw', 'b0'],
    ['--remove', '-f', 'raw', 'plain.raw', 'b0'],
  ])('%s %s %s %s %s %s', (...words) => {
    copyFileSync(at('start.qcow2'), at('ours.qcow2'));
    copyFileSync(at('start.qcow2'), at('theirs.qcow2'));
    const args = (image: string) => words.map((word) => (word === 'IMAGE' ? image : word));
    const theirs = qemuImg('bitmap', ...args('theirs.qcow2'));
    const ours = stillframe(['bitmap', ...args('ours.qcow2')], { cwd: folder });
    expect(ours.status, `${ours.stderr} ${theirs.stderr}`).toBe(theirs.status);
    expect(ours.stdout).toBe(theirs.stdout);
    if (theirs.status !== 0) {
      // The words up to where theirs name a node by a number, or ours go on to say what to do.
      const [line = ''] = theirs.stderr.replace('qemu-img: ', '').split('\n');
      const reason = line.replace(/ in '#block.*| to #block.*/, '').replace(/Can't make.*/, '');
      expect(ours.stderr).toContain(reason);
      expect(ours.stderr).toMatch(/^stillframe: .*\[ERR_STILLFRAME_[A-Z_]+\]\n$/);
      expect(ours.stderr).not.toContain('INTERNAL');
    }
    expect(bitmapsOf('ours.qcow2')).toEqual(bitmapsOf('theirs.qcow2'));
    make('check', '-q', 'ours.qcow2');
    const info = stillframe(['info', '--output', 'json', 'ours.qcow2'], { cwd: folder });
    expect(JSON.parse(info.stdout)).toEqual(
      JSON.parse(qemuImg('info', '--output=json', 'ours.qcow2').stdout),
    );
    for (const name of ['b0', 'fine', 'new']) {
      if (!JSON.stringify(bitmapsOf('ours.qcow2')).includes(`"${name}"`)) continue;
      expect(dirtyInQemu(at('ours.qcow2'), name), name).toEqual(dirtyInQemu(at('theirs.qcow2'), name));
    }
  });

  it('shows what is in use as qemu-img does', () => {
    const own = stillframe(['info', 'start.qcow2'], { cwd: folder });
    expect(own.stdout).toContain('[0]: in-use');
    expect(own.stdout).toBe(qemuImg('info', 'start.qcow2').stdout);
  });
});

/** Opens a disk, writes to it and dies without a word, after `before` was flushed. */
const DYING = `
  const { createEngine } = await import(process.argv[1]);
  const engine = await createEngine({ workers: 1 });
  const disk = await engine.openDisk(process.argv[2], { format: 'qcow2' });
  await disk.write(1 << 20, new Uint8Array(1000).fill(7));
  if (process.argv[3] === 'flushed') await disk.flush();
  process.kill(process.pid, 'SIGKILL');
`;

describe.skipIf(!peers)('a live disk with dirty bitmaps', () => {
  it('records every kind of change from all threads, and stores it when it is closed', async () => {
    const path = at('live.qcow2');
    const length = 20_000_256;
    make('create', '-q', '-f', 'qcow2', 'live.qcow2', String(length));
    const engine = await createEngine();
    try {
      await engine.bitmap(path, 'b0', [{ action: 'add' }]);
      await engine.bitmap(path, 'fine', [{ action: 'add', granularity: 512 }]);
      await engine.bitmap(path, 'off', [{ action: 'add' }, { action: 'disable' }]);
      const models = [new DirtyModel(length, 65536), new DirtyModel(length, 512)];
      const random = new Random(4);
      for (let session = 0; session < 2; session++) {
        const disk = await engine.openDisk(path, { format: 'qcow2' });
        const requests: Promise<void>[] = [];
        for (let request = 0; request < 60; request++) {
          const offset = random.between(0, length - 1);
          const bytes = random.between(1, Math.min(length - offset, random.pick([100, 70_000, 2_500_000])));
          const kind = random.between(0, 3);
          if (kind === 0) requests.push(disk.writeZeroes(offset, bytes, { unmap: random.chance(0.5) }));
          else if (kind === 1) requests.push(disk.discard(offset, bytes));
          else requests.push(disk.write(offset, random.noise(bytes)));
          for (const model of models) model.mark(offset, bytes);
        }
        await Promise.all(requests);
        await disk.close();
        make('check', '-q', 'live.qcow2');
        expect(dirtyInQemu(path, 'b0')).toEqual(models[0]?.areas());
        expect(dirtyInQemu(path, 'fine')).toEqual(models[1]?.areas());
        expect(dirtyInQemu(path, 'off')).toEqual([]);
        for (const name of ['b0', 'fine']) await engine.bitmap(path, name, [{ action: 'clear' }]);
        models.splice(0, 2, new DirtyModel(length, 65536), new DirtyModel(length, 512));
      }
      // A discard that is dropped changes nothing.
      const disk = await engine.openDisk(path, { format: 'qcow2', discard: 'ignore' });
      await disk.discard(0, length);
      await disk.close();
      expect(dirtyInQemu(path, 'b0')).toEqual([]);
    } finally {
      await engine.close();
    }
  });

  it.each(['flushed', 'unflushed'])(
    'of a process that is killed with its write %s is inconsistent',
    (how) => {
      make('create', '-q', '-f', 'qcow2', 'dying.qcow2', '8M');
      make('bitmap', '--add', 'dying.qcow2', 'b0');
      const library = new URL('../../dist/index.js', import.meta.url).href;
      const script = ['--input-type=module', '-e', DYING, library, at('dying.qcow2'), how];
      const { signal, stderr } = spawnSync(process.execPath, script, { encoding: 'utf8' });
      expect(signal, stderr).toBe('SIGKILL');
      const { stdout } = stillframe(['info', 'dying.qcow2'], { cwd: folder });
      expect(stdout).toContain('[0]: in-use');
      expect(stdout).toBe(qemuImg('info', 'dying.qcow2').stdout);
      const refused = stillframe(['bitmap', '--clear', 'dying.qcow2', 'b0'], { cwd: folder });
      expect(refused.status).toBe(1);
      expect(refused.stderr).toContain("Bitmap 'b0' is inconsistent and cannot be used");
      expect(refused.stderr).toContain('ERR_STILLFRAME_BITMAP_INCONSISTENT');
      expect(stillframe(['bitmap', '--remove', 'dying.qcow2', 'b0'], { cwd: folder }).status).toBe(0);
      run('qemu-img', ['check', '-q', at('dying.qcow2')], [0, 3]);
    },
  );
});
