/**
 * Deliberate mistakes, put into the real code one at a time; each must be caught, by the simulator or by a test:
 * `npm run mutants [-- --only NAME] [-- --write]`. Prints a table of what caught what, and with `--write` writes it to
 * docs/mutants.md; exit status 1 when one survives.
 */
import { spawnSync } from 'node:child_process';
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { type Mutant, mutants } from './list.js';

const { values } = parseArgs({
  options: {
    only: { type: 'string' },
    write: { type: 'boolean', default: false },
    seeds: { type: 'string', default: '6000' },
  },
});
const root = fileURLToPath(new URL('../../../..', import.meta.url));
const folder = mkdtempSync(join(tmpdir(), 'stillframe-mutants-'));

function run(command: string, args: readonly string[]): { status: number | null; output: string } {
  const { status, stdout, stderr } = spawnSync(command, args, {
    cwd: folder,
    encoding: 'utf8',
    timeout: 900_000,
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

/** What the simulator saw first, or undefined. */
function simulated(): string | undefined {
  const { status, output } = run('node', ['bench/dist/test/sim/sim.js', '--seeds', values.seeds]);
  if (status === 0) return undefined;
  const [, seed, invariant] = output.match(/^seed (\d+) violates: ([^:\n]*)/m) ?? [];
  if (invariant !== undefined) return `simulator: ${invariant} (seed ${seed})`;
  return status === null || output.includes('does not end')
    ? 'simulator: a run that never ended'
    : 'simulator: a thread that broke';
}

/** The test that failed first, or undefined. */
function failure(tests: readonly string[]): string | undefined {
  const { status, output } = run('npx', [
    'vitest',
    'run',
    '--bail',
    '1',
    '--testTimeout',
    '600000',
    '--reporter',
    'json',
    ...tests,
  ]);
  if (status === 0) return undefined;
  const names = [...output.matchAll(/"fullName":"((?:[^"\\]|\\.)*)","status":"failed"/g)].map(
    ([, name]) => name,
  );
  return `test: ${names[0] ?? (status === null ? 'one that never ended' : 'the process ended')}`;
}

function attempt({ file, find, replace, tests }: Mutant): string | undefined {
  const path = join(folder, file);
  const original = readFileSync(path, 'utf8');
  writeFileSync(
    path,
    original.replace(find, () => replace),
  );
  try {
    build();
    return simulated() ?? (tests === undefined ? undefined : failure(tests));
  } finally {
    writeFileSync(path, original);
  }
}

function checkPlaces(): void {
  for (const { name, file, find } of mutants) {
    const places = readFileSync(join(root, file), 'utf8').split(find).length - 1;
    if (places === 1) continue;
    throw new Error(
      `mutant '${name}': the text to replace is in ${file} ${places} times, not once:\n${find}`,
    );
  }
}

let survivors = 0;
const lines = ['| mistake | what it does | caught by |', '| --- | --- | --- |'];
try {
  checkPlaces();
  const copied = [
    'src',
    'assembly',
    'test',
    'bench',
    'package.json',
    'tsconfig.json',
    'asconfig.json',
    'rolldown.config.ts',
    'vitest.config.ts',
  ];
  for (const name of copied) cpSync(join(root, name), join(folder, name), { recursive: true });
  symlinkSync(join(root, 'node_modules'), join(folder, 'node_modules'));
  const chosen = mutants.filter(({ name }) => values.only === undefined || name === values.only);
  if (chosen.length === 0) throw new Error(`there is no mutant '${values.only}'`);
  build();
  const broken =
    values.only !== undefined
      ? undefined
      : (simulated() ?? failure([...new Set(chosen.flatMap(({ tests }) => tests ?? []))]));
  if (broken !== undefined) throw new Error(`the checks fail without any mistake: ${broken}`);
  console.log(lines.join('\n'));
  for (const mutant of chosen) {
    const caught = attempt(mutant);
    if (caught === undefined) survivors++;
    const line = `| ${mutant.name} | ${mutant.what} | ${caught ?? '**nothing**'} |`;
    lines.push(line);
    console.log(line);
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
console.log(`\n${survivors} survived`);
if (values.write) {
  const intro = [
    '# Deliberate mistakes, and what catches them',
    '',
    '`npm run mutants -- --write` puts each of these mistakes into the real code, one at a time, and writes this table. The',
    `simulator comes first (${values.seeds} seeds, see [simulation.md](simulation.md)); what it cannot see, a test must.`,
    '',
  ];
  writeFileSync(join(root, 'docs/mutants.md'), `${[...intro, ...lines].join('\n')}\n`);
}
process.exitCode = survivors === 0 ? 0 : 1;
