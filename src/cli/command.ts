import { type ParseArgsConfig, parseArgs } from 'node:util';
import { StillframeError } from '../errors.js';
import type { SnapshotSelector } from '../index.js';

/** One option of a command, as the parser and the help both read it. */
export interface Option {
  readonly long: string;
  readonly short?: string;
  /** What stands for the value in the help; absent for a switch. */
  readonly value?: string;
  /** Words of which one may follow as the value; without one the value is empty. */
  readonly optional?: readonly string[];
  readonly multiple?: boolean;
  readonly help: string;
}

/** What the parser makes of a command line. */
export class Arguments {
  readonly positionals: readonly string[];
  /** Every option with its value as it was given, for commands that do things in that order. */
  readonly given: readonly { readonly name: string; readonly value: string | undefined }[];
  readonly #values: Readonly<Record<string, string | boolean | (string | boolean)[] | undefined>>;

  constructor(positionals: readonly string[], values: Arguments['values'], given: Arguments['given']) {
    this.positionals = positionals;
    this.#values = values;
    this.given = given;
  }

  get values(): Readonly<Record<string, string | boolean | (string | boolean)[] | undefined>> {
    return this.#values;
  }

  flag(name: string): boolean {
    return this.#values[name] === true;
  }

  text(name: string): string | undefined {
    const value = this.#values[name];
    return typeof value === 'string' ? value : undefined;
  }

  texts(name: string): string[] | undefined {
    const value = this.#values[name];
    return Array.isArray(value) ? value.map(String) : undefined;
  }

  /** The value of an option that takes one of a few words. */
  choice<T extends string>(name: string, choices: readonly T[], fallback: T): T;
  choice<T extends string>(name: string, choices: readonly T[]): T | undefined;
  choice<T extends string>(name: string, choices: readonly T[], fallback?: T): T | undefined {
    const value = this.text(name);
    if (value === undefined) return fallback;
    const found = choices.find((choice) => choice === value);
    if (found === undefined) throw usageError(`--${name} takes ${choices.join(', ')}, not '${value}'`);
    return found;
  }

  /** A size in bytes with an optional suffix k, M, G, T, P or E (powers of 1024). */
  size(name: string): number | undefined {
    const value = this.text(name);
    return value === undefined ? undefined : parseSize(value, `--${name}`);
  }
}

export interface Command {
  readonly name: string;
  /** The line after `stillframe NAME`. */
  readonly usage: string;
  readonly summary: string;
  readonly options: readonly Option[];
  /** How many positional arguments it takes. */
  readonly positionals: readonly [least: number, most: number];
  /** The last one is a number that may have a sign. */
  readonly signed?: true;
  /** Exit status of errors; default 1. */
  readonly failure?: (error: StillframeError) => number;
  readonly run: (args: Arguments) => Promise<number>;
}

export const OUTPUT: Option = {
  long: 'output',
  value: 'human|json',
  help: 'how to print the result (human)',
};
export const FORMAT: Option = {
  long: 'format',
  short: 'f',
  value: 'FMT',
  help: 'format of the image: raw, qcow2, vmdk, vhdx, vpc or vdi (looked for in its first bytes)',
};
export const FORCE_SHARE: Option = {
  long: 'force-share',
  short: 'U',
  help: 'open images although another program writes to them',
};
export const ALLOW_BACKING: Option = {
  long: 'allow-backing',
  value: 'DIR',
  multiple: true,
  help: "folder from which backing files may be opened, any number of times (the image's own folder)",
};
/** Formats that are written. */
export const TARGET_FORMATS = ['raw', 'qcow2'] as const;
/** Formats that are read. */
export const FORMATS = [...TARGET_FORMATS, 'vmdk', 'vhdx', 'vpc', 'vdi'] as const;
export const SNAPSHOT: Option = {
  long: 'snapshot',
  value: 'NAME',
  help: 'read the image as it is in an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME',
};
/** Types of compression of qcow2. */
export const COMPRESSION = ['zlib', 'zstd'] as const;
/** What to do about an I/O error. */
export const POLICIES = ['report', 'ignore', 'enospc', 'stop', 'auto'] as const;
export const OUTPUTS = ['human', 'json'] as const;
export const PROGRESS: Option = { long: 'progress', short: 'p', help: 'show progress on stderr' };
export const QUIET: Option = { long: 'quiet', short: 'q', help: 'print nothing but errors' };

export function usageError(message: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_INVALID_ARGUMENT', message);
}

const SUFFIXES: Readonly<Record<string, number>> = {
  '': 1,
  b: 1,
  k: 1024,
  m: 1024 ** 2,
  g: 1024 ** 3,
  t: 1024 ** 4,
  p: 1024 ** 5,
  e: 1024 ** 6,
};

/** What `--snapshot` names, as qemu-img's `-l` does. */
export function parseSnapshot(text: string | undefined): SnapshotSelector | undefined {
  if (text === undefined || !/^snapshot\.(id|name)=/.test(text)) return text;
  const [, id] = /(?:^|,)snapshot\.id=([^,]*)/.exec(text) ?? [];
  const [, name] = /(?:^|,)snapshot\.name=([^,]*)/.exec(text) ?? [];
  return { id, name };
}

/** @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
export function parseSize(text: string, what: string): number {
  const [, digits, suffix] = /^(0x[\da-f]+|\d+(?:\.\d+)?)([bkmgtpe]?)$/i.exec(text) ?? [];
  const bytes = Math.floor(Number(digits) * (SUFFIXES[(suffix ?? '').toLowerCase()] ?? Number.NaN));
  if (digits === undefined || !Number.isSafeInteger(bytes)) {
    throw usageError(
      `${what}: '${text}' is not a size; give a number of bytes below 2^53, or one with k, M, G, T, P or E behind it`,
    );
  }
  return bytes;
}

/** @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT with a hint at the help */
export function parseArguments(command: Command, argv: readonly string[]): Arguments {
  const options: Record<string, { type: 'string' | 'boolean'; short?: string; multiple?: boolean }> = {};
  for (const { long, short, value, multiple } of command.options) {
    options[long] = {
      type: value === undefined ? 'boolean' : 'string',
      ...(short === undefined ? {} : { short }),
      ...(multiple === true ? { multiple } : {}),
    };
  }
  const hint = `see 'stillframe ${command.name} --help'`;
  let parsed: ReturnType<typeof parseWords>;
  try {
    const words = command.signed === true ? beforeSigned(argv) : argv;
    parsed = parseWords(withOptionalValues(words, command.options), options);
  } catch (error) {
    const reason = error instanceof Error ? (error.message.split('. ')[0] ?? '') : String(error);
    throw usageError(`${reason}; ${hint}`);
  }
  const [least, most] = command.positionals;
  const { positionals, values, tokens } = parsed;
  if (positionals.length < least || positionals.length > most) {
    throw usageError(`usage: stillframe ${command.name} ${command.usage}; ${hint}`);
  }
  const given = tokens.flatMap((token) =>
    token.kind === 'option' ? [{ name: token.name, value: token.value }] : [],
  );
  return new Arguments(positionals, values, given);
}

/** A last word like `-1M` is no option. */
function beforeSigned(argv: readonly string[]): readonly string[] {
  const last = argv.at(-1) ?? '';
  return /^-\d/.test(last) && !argv.includes('--') ? [...argv.slice(0, -1), '--', last] : argv;
}

/** Gives every option whose value may be left out its value. */
function withOptionalValues(argv: readonly string[], options: readonly Option[]): string[] {
  const words: string[] = [];
  for (let index = 0; index < argv.length; index++) {
    const word = argv[index] ?? '';
    if (word === '--') return [...words, ...argv.slice(index)];
    const choices = options.find(({ long }) => word === `--${long}`)?.optional;
    if (choices === undefined) {
      words.push(word);
      continue;
    }
    const given = choices.find((choice) => choice === argv[index + 1]);
    if (given !== undefined) index++;
    words.push(`${word}=${given ?? ''}`);
  }
  return words;
}

function parseWords(argv: readonly string[], options: NonNullable<ParseArgsConfig['options']>) {
  return parseArgs({ args: [...argv], options, allowPositionals: true, strict: true, tokens: true });
}

/** The help of one command. */
export function helpOf(command: Command): string {
  const rows = [...command.options, { long: 'help', short: 'h', help: 'print this' } satisfies Option].map(
    ({ long, short, value, help }: Option) => {
      const name = `${short === undefined ? '    ' : `-${short}, `}--${long}${value === undefined ? '' : ` ${value}`}`;
      return [name, help] as const;
    },
  );
  const width = Math.max(...rows.map(([name]) => name.length));
  const lines = rows.map(([name, help]) => `  ${name.padEnd(width)}  ${help}`);
  return `usage: stillframe ${command.name} ${command.usage}\n\n${command.summary}\n\n${lines.join('\n')}\n`;
}
