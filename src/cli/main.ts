#!/usr/bin/env node
import { type StillframeError, toStillframeError } from '../errors.js';
import { type Arguments, type Command, helpOf, parseArguments, usageError } from './command.js';
import { printable } from './units.js';
import { version } from './version.js';

/** Loaded when asked for: a command starts without the others' code. */
const commands = new Map<string, () => Promise<Command>>([
  ['create', async () => (await import('./create.js')).create],
  ['info', async () => (await import('./info.js')).info],
  ['map', async () => (await import('./map.js')).map],
  ['check', async () => (await import('./check.js')).check],
  ['compare', async () => (await import('./compare.js')).compare],
  ['checksum', async () => (await import('./checksum.js')).checksum],
  ['convert', async () => (await import('./convert.js')).convert],
  ['dd', async () => (await import('./dd.js')).dd],
  ['measure', async () => (await import('./measure.js')).measure],
  ['resize', async () => (await import('./resize.js')).resize],
  ['rebase', async () => (await import('./rebase.js')).rebase],
  ['amend', async () => (await import('./amend.js')).amend],
  ['commit', async () => (await import('./commit.js')).commit],
  ['snapshot', async () => (await import('./snapshot.js')).snapshot],
  ['bitmap', async () => (await import('./bitmap.js')).bitmap],
  ['backup', async () => (await import('./backup.js')).backup],
  ['serve', async () => (await import('./serve.js')).serve],
  ['daemon', async () => (await import('./daemon.js')).daemon],
  ['benchmark', async () => (await import('./benchmark.js')).benchmark],
  ['demo', async () => (await import('./demo.js')).demo],
]);

async function overview(): Promise<string> {
  const all = await Promise.all([...commands.values()].map((load) => load()));
  const lines = all.map(({ name, summary }) => `  ${name.padEnd(10)}${summary.split(/[.\n]/)[0]}`);
  return (
    'usage: stillframe COMMAND [options]\n\nPoint-in-time backups of disk images.\n\n' +
    `${lines.join('\n')}\n\n'stillframe COMMAND --help' explains a command; 'stillframe --version' prints the version.\n`
  );
}

/** The error where people look for it, and with `--output json` as the last line of stdout as well. */
function report(error: StillframeError, argv: readonly string[]): void {
  process.stderr.write(`stillframe: ${printable(error.message)} [${error.code}]\n`);
  if (error.code === 'ERR_STILLFRAME_INTERNAL') process.stderr.write(`${error.stack}\n`);
  const output = argv.indexOf('--output');
  if (argv.includes('--output=json') || (output >= 0 && argv[output + 1] === 'json')) {
    console.log(JSON.stringify({ type: 'error', code: error.code, message: error.message }));
  }
}

async function main(argv: readonly string[]): Promise<number> {
  const [name, ...rest] = argv;
  if (name === undefined) {
    process.stderr.write(await overview());
    return 1;
  }
  if (name === '--help' || name === '-h' || name === 'help') {
    console.log((await overview()).trimEnd());
    return 0;
  }
  if (name === '--version' || name === '-V') {
    console.log(`stillframe ${version()}`);
    return 0;
  }
  let command: Command | undefined;
  let args: Arguments | undefined;
  try {
    command = await commands.get(name)?.();
    if (command === undefined) throw usageError(`there is no command '${name}'; see 'stillframe --help'`);
    const end = rest.indexOf('--');
    if ((end < 0 ? rest : rest.slice(0, end)).some((word) => word === '--help' || word === '-h')) {
      console.log(helpOf(command).trimEnd());
      return 0;
    }
    args = parseArguments(command, rest);
    return await command.run(args);
  } catch (error) {
    const known = toStillframeError(error);
    report(known, rest);
    // A command line that makes no sense is 1 for every command.
    return (args && command?.failure?.(known)) ?? 1;
  }
}

// A reader that has seen enough (`stillframe map … | head`) is no reason for a stack trace.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  process.exit(error.code === 'EPIPE' ? 0 : 1);
});
process.exitCode = await main(process.argv.slice(2));
