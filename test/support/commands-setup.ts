import { spawnSync } from 'node:child_process';

/** Builds the commands that tests run (`npm run sim`, …), once for all of them. What is wrong with types, the check tells. */
export default function setup(): void {
  const { error } = spawnSync('npm', ['run', '--silent', 'build:bench'], { stdio: 'ignore' });
  if (error !== undefined) throw error;
}
