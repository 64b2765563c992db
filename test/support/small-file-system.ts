import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const namespace = process.getuid?.() === 0 ? '-m' : '-rm';
const MOUNT = 'mount -t tmpfs -o "size=$1" none "$2" && cd "$2" && shift 2';

/**
 * Runs a command in a file system of `size` (as mount takes it, `6m`) that exists for as long as the command runs;
 * it is the current folder. Undefined where this machine does not allow that.
 */
export function runInSmallFileSystem(
  size: string,
  command: readonly string[],
): { readonly stdout: string; readonly stderr: string } | undefined {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-small-'));
  const shell = (script: string, args: readonly string[]) =>
    spawnSync('unshare', [namespace, 'sh', '-c', `${MOUNT} && ${script}`, 'sh', size, folder, ...args], {
      encoding: 'utf8',
      timeout: 60_000,
    });
  try {
    if (shell('true', []).status !== 0) {
      if (process.env['CI'] === 'true')
        throw new Error('a mount namespace is needed: unshare and mount must work');
      return undefined;
    }
    const { stdout, stderr } = shell('"$@"; echo "status $?"; ls -A', command);
    return { stdout, stderr };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

export const SMALL_FILE_SYSTEM_NEEDED =
  'needs a small file system: unshare and mount (apt-get install util-linux mount) and the right to use them';
