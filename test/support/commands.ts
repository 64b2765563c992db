import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { beforeAll } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));

/**
 * A command of the package's scripts, built once for the tests of a file and not anew for each run of it.
 *
 * @param path of its program, as the scripts name it
 */
export function command(
  path: string,
): (...args: readonly string[]) => { readonly status: number | null; readonly output: string } {
  beforeAll(() => {
    const built = spawnSync('npm', ['run', '--silent', 'build:bench'], { cwd: root, encoding: 'utf8' });
    if (built.status !== 0) throw new Error(`cannot build '${path}': ${built.stdout}${built.stderr}`);
  }, 300_000);
  return (...args) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, [path, ...args], {
      cwd: root,
      encoding: 'utf8',
      maxBuffer: 1 << 26,
    });
    return { status, output: stdout + stderr };
  };
}
