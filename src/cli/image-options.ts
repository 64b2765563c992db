import type { CreateImageOptions, CreationOptions, ImageFormat, TargetFormat } from '../index.js';
import { FORMATS, type Option, parseSize, usageError } from './command.js';

/** The option of every command that makes images. */
export const IMAGE_OPTIONS: Option = {
  long: 'options',
  short: 'o',
  value: 'K=V,…',
  multiple: true,
  help: "options of the new image's format; 'help' lists them",
};

/** The options of `-o`, as all commands that make images take them. */
export interface ImageOptions {
  readonly creation: CreationOptions;
  /** Virtual size in bytes. */
  readonly size: number | undefined;
  readonly backingFile: string | undefined;
  readonly backingFormat: ImageFormat | undefined;
  /** What was given, by its name, as qemu-img prints it. */
  readonly given: ReadonlyMap<string, string>;
}

interface OptionKind {
  readonly type: 'str' | 'size' | 'num' | 'bool (on/off)';
  readonly help: string;
  readonly choices?: readonly string[];
}

const COMPAT = ['0.10', 'v2', '1.1', 'v3'] as const;
const COMPRESSION = ['zlib', 'zstd'] as const;
const PREALLOCATION = ['off', 'metadata', 'falloc', 'full'] as const;
const RAW_PREALLOCATION = ['off', 'falloc', 'full'] as const;

const SIZE: OptionKind = { type: 'size', help: 'virtual size' };

/** In the order in which qemu-img prints them. */
const kinds: Readonly<Record<TargetFormat, Readonly<Record<string, OptionKind>>>> = {
  qcow2: {
    cluster_size: { type: 'size', help: 'cluster size, a power of two from 512 to 2M (64k)' },
    extended_l2: { type: 'bool (on/off)', help: 'divide clusters into 32 subclusters (off)' },
    preallocation: {
      type: 'str',
      help: 'space to take at once: off, metadata, falloc or full (off)',
      choices: PREALLOCATION,
    },
    compression_type: {
      type: 'str',
      help: 'how compressed clusters are compressed: zlib or zstd (zlib)',
      choices: COMPRESSION,
    },
    size: SIZE,
    compat: { type: 'str', help: 'version of the format: v2 (0.10) or v3 (1.1, default)', choices: COMPAT },
    backing_file: { type: 'str', help: 'backing file; relative to the folder of the image' },
    backing_fmt: { type: 'str', help: 'format of the backing file', choices: FORMATS },
    data_file: { type: 'str', help: 'external data file; relative to the folder of the image' },
    data_file_raw: { type: 'bool (on/off)', help: 'keep the data file valid as a raw image (off)' },
    lazy_refcounts: { type: 'bool (on/off)', help: 'refcounts may be brought up to date late (off)' },
    refcount_bits: { type: 'num', help: 'width of a refcount, a power of two from 1 to 64 (16)' },
  },
  raw: {
    size: SIZE,
    preallocation: {
      type: 'str',
      help: 'space to take at once: off, falloc or full (off)',
      choices: RAW_PREALLOCATION,
    },
  },
};

/** What of an image can be changed later. */
const AMENDABLE = [
  'backing_file',
  'backing_fmt',
  'compat',
  'data_file',
  'data_file_raw',
  'lazy_refcounts',
  'refcount_bits',
  'size',
];

/** What `-o help` prints where images are made. */
export function imageOptionsHelp(format: TargetFormat): string {
  return `Supported ${format} options:\n${rowsOf(Object.entries(kinds[format]))}`;
}

/** What `-o help` of `amend` prints. */
export function amendOptionsHelp(): string {
  const rows = Object.entries(kinds.qcow2).filter(([name]) => AMENDABLE.includes(name));
  return `Amend options for 'qcow2':\n${rowsOf(rows)}`;
}

function rowsOf(options: readonly (readonly [string, OptionKind])[]): string {
  return options
    .toSorted(([a], [b]) => (a < b ? -1 : 1))
    .map(([name, { type, help }]) => `  ${`${name}=<${type}>`.padEnd(22)} - ${help}`)
    .join('\n');
}

/** Whether the lists ask for help. */
export function asksForHelp(lists: readonly string[]): boolean {
  return lists.some((list) => pairsOf(list).some((pair) => pair === 'help' || pair === '?'));
}

/** Splits at commas; two of them stand for one in a value. @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT */
function pairsOf(list: string): string[] {
  const [leading = '', trailing = ''] = [/^,*/, /,*$/].map((commas) => commas.exec(list)?.[0]);
  if (/^,*$/.test(list) || leading.length % 2 === 1 || trailing.length % 2 === 1) {
    throw usageError(`Invalid option list: ${list}`);
  }
  const pairs = [''];
  for (const part of list.match(/,,|,|[^,]+/g) ?? []) {
    if (part === ',') pairs.push('');
    else pairs.push(`${pairs.pop() ?? ''}${part === ',,' ? ',' : part}`);
  }
  return pairs.filter((pair) => pair !== '');
}

const TRUE = ['on', 'yes', 'true', 'y'];
const FALSE = ['off', 'no', 'false', 'n'];

/**
 * Parses what was given to `-o` of `amend`, see {@link parseImageOptions}.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT also for options of new images only
 */
export function parseAmendOptions(lists: readonly string[]): ImageOptions {
  const parsed = parseImageOptions('qcow2', lists);
  const fixed = [...parsed.given.keys()].find((name) => !AMENDABLE.includes(name));
  if (fixed === undefined) return parsed;
  throw usageError(`-o: Invalid parameter '${fixed}': it can be chosen when an image is made only`);
}

/**
 * Parses what was given to `-o`, any number of times; the last word counts.
 *
 * @throws StillframeError ERR_STILLFRAME_INVALID_ARGUMENT
 */
export function parseImageOptions(format: TargetFormat, lists: readonly string[]): ImageOptions {
  const given = new Map<string, string>();
  for (const pair of lists.flatMap(pairsOf)) {
    const equals = pair.indexOf('=');
    const name = equals < 0 ? pair : pair.slice(0, equals);
    const kind = kinds[format][name];
    if (kind === undefined) {
      if (/^encrypt(ion$|\.)/.test(name)) throw usageError(`-o ${name}: encryption is not supported`);
      throw usageError(`-o: Invalid parameter '${name}' for format ${format}; '-o help' lists them`);
    }
    if (equals < 0 && kind.type !== 'bool (on/off)') throw usageError(`-o ${name} needs a value: ${name}=…`);
    given.set(name, checked(name, kind, equals < 0 ? 'on' : pair.slice(equals + 1)));
  }
  const number = (name: string) => {
    const text = given.get(name);
    return text === undefined ? undefined : Number(text);
  };
  const flag = (name: string) => {
    const text = given.get(name);
    return text === undefined ? undefined : TRUE.includes(text);
  };
  const choice = <T extends string>(name: string, choices: readonly T[]) =>
    choices.find((each) => each === given.get(name));
  const compat = choice('compat', COMPAT);
  return {
    creation: {
      clusterSize: number('cluster_size'),
      version: compat === undefined ? undefined : compat === '0.10' || compat === 'v2' ? 2 : 3,
      refcountBits: number('refcount_bits'),
      lazyRefcounts: flag('lazy_refcounts'),
      compressionType: choice('compression_type', COMPRESSION),
      extendedL2: flag('extended_l2'),
      dataFile: given.get('data_file'),
      dataFileRaw: flag('data_file_raw'),
      preallocation: choice('preallocation', PREALLOCATION),
    },
    size: number('size'),
    backingFile: given.get('backing_file'),
    backingFormat: choice('backing_fmt', FORMATS),
    given,
  };
}

/** The value as it is printed. */
function checked(name: string, { type, choices }: OptionKind, value: string): string {
  switch (type) {
    case 'size':
      return String(parseSize(value, `-o ${name}`));
    case 'num':
      if (!/^\d{1,9}$/.test(value)) throw usageError(`-o ${name} takes a number, not '${value}'`);
      return value;
    case 'bool (on/off)':
      if (TRUE.includes(value) || FALSE.includes(value)) return value;
      throw usageError(`-o ${name} takes on or off, not '${value}'`);
    default:
      if (choices !== undefined && !choices.includes(value)) {
        throw usageError(`-o ${name} takes ${choices.join(', ')}, not '${value}'`);
      }
      return value;
  }
}

/** What qemu-img prints of an image it makes. */
export function formattingLine(
  file: string,
  format: TargetFormat,
  given: ReadonlyMap<string, string>,
  settled: Pick<CreateImageOptions, 'length' | 'backingFile' | 'backingFormat'>,
): string {
  const values = new Map<string, string | undefined>([
    ...(format === 'qcow2' ? DEFAULTS : []),
    ...given,
    ['size', String(settled.length)],
    ['backing_file', settled.backingFile],
    ['backing_fmt', settled.backingFormat],
  ]);
  const words = Object.keys(kinds[format]).flatMap((name) => {
    const value = values.get(name);
    return value === undefined ? [] : [`${name}=${value.replaceAll(',', ',,')}`];
  });
  return `Formatting '${file}', fmt=${format} ${words.join(' ')}`;
}

/** What is printed although it was not given. */
const DEFAULTS: readonly (readonly [string, string])[] = [
  ['cluster_size', '65536'],
  ['extended_l2', 'off'],
  ['compression_type', 'zlib'],
  ['lazy_refcounts', 'off'],
  ['refcount_bits', '16'],
];
