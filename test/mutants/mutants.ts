/**
 * Deliberate mistakes, put into the real code one at a time; the suite must catch each:
 * `npm run mutants [-- --only NAME]`. Prints a table of what caught what; exit status 1 when one survives.
 */
import { spawnSync } from 'node:child_process';
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { type Mutant, mutants } from './list.js';

const { values } = parseArgs({ options: { only: { type: 'string' } } });
const root = fileURLToPath(new URL('../../../..', import.meta.url));
const folder = mkdtempSync(join(tmpdir(), 'stillframe-mutants-'));

function run(command: string, args: readonly string[]): { status: number | null; output: string } {
  const { status, stdout, stderr } = spawnSync(command, args, {
    cwd: folder,
    encoding: 'utf8',
    timeout: 300_000,
    maxBuffer: 1 << 28,
  });
  return { status, output: stdout + stderr };
}

function build(): void {
  for (const script of ['build:wasm', 'build:js']) {
    const { status, output } = run('npm', ['run', '--silent', script]);
    // A type error is no reason not to run: the compiler has written the program all the same.
    if (status !== 0 && script === 'build:wasm') throw new Error(output);
  }
}

/** The test that failed first, or undefined. */
function failure(tests: readonly string[]): string | undefined {
  const { status, output } = run('npx', ['vitest', 'run', '--bail', '1', '--reporter', 'json', ...tests]);
  if (status === 0) return undefined;
  const names = [...output.matchAll(/"fullName":"((?:[^"\\]|\\.)*)","status":"failed"/g)].map(
    ([, name]) => name,
  );
  return names[0] ?? (status === null ? 'a test that never ended' : 'the process ended');
}

function attempt({ file, find, replace, tests }: Mutant): string | undefined {
  const path = join(folder, file);
  const original = readFileSync(path, 'utf8');
  const places = original.split(find).length - 1;
  if (places !== 1)
    throw new Error(`${file}: the text to replace is there ${places} times, not once:\n${find}`);
  writeFileSync(
    path,
    original.replace(find, () => replace),
  );
  try {
    build();
    return failure(tests);
  } finally {
    writeFileSync(path, original);
  }
}

let survivors = 0;
try {
  for (const name of [
    'src',
    'assembly',
    'test',
    'package.json',
    'tsconfig.json',
    'asconfig.json',
    'vitest.config.ts',
  ]) {
    cpSync(join(root, name), join(folder, name), { recursive: true });
  }
  symlinkSync(join(root, 'node_modules'), join(folder, 'node_modules'));
  const chosen = mutants.filter(({ name }) => values.only === undefined || name === values.only);
  if (chosen.length === 0) throw new Error(`there is no mutant '${values.only}'`);
  build();
  const broken = failure([...new Set(chosen.flatMap(({ tests }) => tests))]);
  if (broken !== undefined) throw new Error(`the suite fails without any mistake: ${broken}`);
  console.log('| mistake | what it does | caught by |\n| --- | --- | --- |');
  for (const mutant of chosen) {
    const caught = attempt(mutant);
    if (caught === undefined) survivors++;
    console.log(`| ${mutant.name} | ${mutant.what} | ${caught ?? '**nothing**'} |`);
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
console.log(`\n${survivors} survived`);
process.exitCode = survivors === 0 ? 0 : 1;
