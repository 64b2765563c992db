/** What the daemon's options print, and the character devices that they name. */
import { spawnSync } from 'node:child_process';
import { appendFileSync, closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { startStillframe, stillframe } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';

let folder = '';
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-command-line-'));
});
afterEach(() => {
  rmSync(folder, { recursive: true, force: true });
});
const at = (name: string): string => join(folder, name);

/** What QEMU's daemon says, without its name. */
function peer(options: readonly string[]): { readonly status: number | null; readonly said: string } {
  const { status, stdout, stderr } = spawnSync('qemu-storage-daemon', options, {
    encoding: 'utf8',
    timeout: 20_000,
    cwd: folder,
  });
  return { status, said: `${stdout}${stderr}`.replace('qemu-storage-daemon: ', '') };
}

function ours(options: readonly string[]): { readonly status: number | null; readonly said: string } {
  const { status, stdout, stderr } = stillframe(['daemon', ...options], { cwd: folder });
  return { status, said: `${stdout}${stderr}`.replace('stillframe: ', '').replace(/ \[ERR_[A-Z_]+\]/, '') };
}

describe.skipIf(!hasPeer('qemu-storage-daemon'))('options, beside QEMU', () => {
  it.each([
    ['--object', 'secret,help'],
    ['--object', 'throttle-group,help'],
    ['--object', 'tls-creds-x509,help'],
    ...['blockdev', 'export', 'monitor', 'nbd-server'].map((name) => [`--${name}`, 'help']),
    ['--chardev', 'nope,id=c'],
    ['--chardev', 'socket'],
    ['--chardev', 'file,id=c'],
    ['--chardev', 'file,id=c,path=nope/x'],
    ['--chardev', 'pipe,id=c,path=nope'],
    ['--chardev', 'null,id=c', '--monitor', 'c,mode=readline'],
    ['--monitor', 'c,foo=1'],
  ])('%s %s %s %s', (...options) => {
    expect(ours(options)).toEqual(peer(options));
  });
});

describe('options', () => {
  it('list what there is', () => {
    expect(ours(['--object', 'help']).said).toContain('List of user creatable objects:\n  iothread\n');
    expect(ours(['--chardev', 'help']).said).toContain('Available chardev backend types: \n  file\n');
    expect(ours(['--chardev', 'file,help']).said).toContain('  path=<str>\n');
    expect(ours(['--version']).said).toMatch(/^stillframe daemon version \d/);
  });

  it('put monitors on files and pipes', async () => {
    run('mkfifo', [at('p.in'), at('p.out')]);
    const { child, finished } = startStillframe([
      ...['daemon', '--chardev', `file,id=f,path=${at('log')}`, '--monitor', 'f'],
      ...['--chardev', `pipe,id=p,path=${at('p')}`, '--monitor', 'p', '--pidfile', at('pid')],
    ]);
    let reader: number | undefined;
    try {
      await expect.poll(() => existsSync(at('pid')), { timeout: 30_000 }).toBe(true);
      // Whoever reads comes first: what is in a pipe is gone with the daemon where nobody else has it open.
      reader = openSync(at('p.out'), 'r');
      for (const execute of ['qmp_capabilities', 'query-status', 'quit']) {
        appendFileSync(at('p.in'), `${JSON.stringify({ execute })}\n`);
      }
      expect((await finished).status).toBe(0);
      const lines = readFileSync(reader, 'utf8').trim().split('\n');
      expect(lines[0]).toContain('"QMP"');
      expect(lines[2]).toContain('"running"');
      expect(lines).toHaveLength(4);
      expect(readFileSync(at('log'), 'utf8')).toContain('"QMP"');
    } finally {
      child.kill('SIGKILL');
      if (reader !== undefined) closeSync(reader);
    }
  });
});
