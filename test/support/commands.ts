import { spawnSync } from 'node:child_process';

/** Runs a command of the package's scripts, which was built when the tests began. @param path of its program */
export function command(
  path: string,
): (...args: readonly string[]) => { readonly status: number | null; readonly output: string } {
  return (...args) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, [path, ...args], {
      encoding: 'utf8',
      maxBuffer: 1 << 26,
    });
    return { status, output: stdout + stderr };
  };
}
