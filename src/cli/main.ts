#!/usr/bin/env node
import { readFileSync } from 'node:fs';
import { type StillframeError, toStillframeError } from '../errors.js';
import { backup } from './backup.js';
import { type Command, helpOf, parseArguments, usageError } from './command.js';
import { compare } from './compare.js';
import { create } from './create.js';
import { info } from './info.js';
import { map } from './map.js';

const demo: Command = {
  name: 'demo',
  usage: '',
  summary: 'Takes a backup in each sync mode while two writers change the drive, and proves each one.',
  positionals: [0, 0],
  options: [],
  run: async () => (await import('./demo.js')).demo(),
};

const commands: readonly Command[] = [create, info, map, compare, backup, demo];

function overview(): string {
  const lines = commands.map(({ name, summary }) => `  ${name.padEnd(9)}${summary.split(/[.\n]/)[0]}`);
  return (
    'usage: stillframe COMMAND [options]\n\nPoint-in-time backups of disk images.\n\n' +
    `${lines.join('\n')}\n\n'stillframe COMMAND --help' explains a command; 'stillframe --version' prints the version.\n`
  );
}

function version(): string {
  const path = new URL('../../package.json', import.meta.url);
  const { version: text }: { version: string } = JSON.parse(readFileSync(path, 'utf8'));
  return text;
}

/** The error where people look for it, and with `--output json` as the last line of stdout as well. */
function report(error: StillframeError, argv: readonly string[]): void {
  process.stderr.write(`stillframe: ${error.message} [${error.code}]\n`);
  if (error.code === 'ERR_STILLFRAME_INTERNAL') process.stderr.write(`${error.stack}\n`);
  const output = argv.indexOf('--output');
  if (argv.includes('--output=json') || (output >= 0 && argv[output + 1] === 'json')) {
    console.log(JSON.stringify({ type: 'error', code: error.code, message: error.message }));
  }
}

async function main(argv: readonly string[]): Promise<number> {
  const [name, ...rest] = argv;
  if (name === undefined) {
    process.stderr.write(overview());
    return 1;
  }
  if (name === '--help' || name === '-h' || name === 'help') {
    console.log(overview().trimEnd());
    return 0;
  }
  if (name === '--version' || name === '-V') {
    console.log(`stillframe ${version()}`);
    return 0;
  }
  const command = commands.find((candidate) => candidate.name === name);
  try {
    if (command === undefined) throw usageError(`there is no command '${name}'; see 'stillframe --help'`);
    const end = rest.indexOf('--');
    if ((end < 0 ? rest : rest.slice(0, end)).some((word) => word === '--help' || word === '-h')) {
      console.log(helpOf(command).trimEnd());
      return 0;
    }
    return await command.run(parseArguments(command, rest));
  } catch (error) {
    const known = toStillframeError(error);
    report(known, rest);
    return command?.failure?.(known) ?? 1;
  }
}

// A reader that has seen enough (`stillframe map … | head`) is no reason for a stack trace.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  process.exit(error.code === 'EPIPE' ? 0 : 1);
});
process.exitCode = await main(process.argv.slice(2));
