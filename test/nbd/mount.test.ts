/** A file system of the kernel on a live drive: nbdfuse makes the export a file, a loop device that file a disk. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { Random } from '../support/data.js';
import { tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-mount-'));
const at = (name: string): string => join(folder, name);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Mounting is for root, where the kernel has what it takes; that is no peer that could be installed. */
function mayMount(): boolean {
  const may =
    process.getuid?.() === 0 &&
    existsSync('/dev/fuse') &&
    existsSync('/dev/loop-control') &&
    spawnSync('losetup', ['-f']).status === 0;
  if (!may) console.warn('SKIPPED: a file system on a drive; it needs root, /dev/fuse and loop devices');
  return may;
}

const LENGTH = 64 << 20;
const peers = ['nbdfuse', 'mkfs.ext4', 'e2fsck', 'debugfs'].map((peer) => hasPeer(peer)).every(Boolean);

it.skipIf(!peers || !mayMount())(
  'a mounted ext4 goes on while a backup is taken, and the backup is one of its states',
  async () => {
    const engine = await createEngine({ workers: 1 });
    let fuse: ChildProcess | undefined;
    let loop: string | undefined;
    let mounted = false;
    try {
      await engine.createImage(at('drive'), { format: 'qcow2', length: LENGTH });
      const disk = await engine.openDisk(at('drive'), { format: 'qcow2' });
      await engine.serveNbd({ listen: `unix:${at('socket')}`, exports: [{ disk }] });
      for (const name of ['fuse', 'files']) mkdirSync(at(name));
      fuse = spawn('nbdfuse', [at('fuse'), `nbd+unix:///?socket=${at('socket')}`], { stdio: 'inherit' });
      while (!existsSync(at('fuse/nbd'))) await new Promise((resolve) => setTimeout(resolve, 20));
      // Not in this thread: the kernel asks our server while they run.
      loop = (await tool('losetup', '-f', '--show', at('fuse/nbd'))).trim();
      await tool('mkfs.ext4', '-q', loop);
      await tool('mount', loop, at('files'));
      mounted = true;
      const before = new Random(1).noise(3 << 20);
      writeFileSync(at('before'), before);
      await tool('cp', at('before'), at('files/before'));
      await tool('sync', '-f', at('files'));
      const job = await disk.backup({ target: at('backup'), format: 'raw', sync: 'full', speed: 1 << 18 });
      await tool(
        'sh',
        '-c',
        `rm ${at('files/before')}; cp ${at('before')} ${at('files/after')}; sync -f ${at('files')}`,
      );
      job.setSpeed(0);
      await job.result();
      await tool('umount', at('files'));
      mounted = false;
      // What the journal holds is part of the instant.
      run('e2fsck', ['-f', '-y', at('backup')], [0, 1]);
      run('e2fsck', ['-f', '-n', at('backup')]);
      run('debugfs', ['-R', `dump /before ${at('restored')}`, at('backup')]);
      expect(Buffer.compare(readFileSync(at('restored')), before)).toBe(0);
    } finally {
      if (mounted) spawnSync('umount', ['-l', at('files')]);
      if (loop !== undefined) await tool('losetup', '-d', loop).catch(() => undefined);
      if (fuse !== undefined) {
        const ended = new Promise((resolve) => fuse?.once('exit', resolve));
        fuse.kill('SIGTERM');
        await ended;
      }
      spawnSync('umount', ['-l', at('fuse')]);
      await engine.close();
    }
  },
  60_000,
);
