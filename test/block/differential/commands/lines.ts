import type { Random } from '../../../support/data.js';
import { type Actor, BITMAPS, below, type Cast, enter, SNAPSHOTS } from './cast.js';

/** A command in pieces, an option with its value in one. */
export type Command = readonly string[];

/** Makes a command. */
type Line = (random: Random, cast: Cast) => Command;

/** The words that were chosen, in a row. */
function words(...list: readonly (string | false)[]): Command {
  return list.filter((word): word is string => word !== false && word !== '');
}

function anyOf(random: Random, cast: Cast): Actor {
  const { actors } = cast;
  const actor = actors[random.between(0, actors.length - 1)];
  if (actor === undefined) throw new Error('a story has an image');
  return actor;
}

/** An image with others below it where there is one: what most commands are for. */
function overlayOf(random: Random, cast: Cast): Actor {
  const overlays = cast.actors.filter(({ backing }) => backing !== undefined);
  return overlays.length === 0 || random.chance(0.1)
    ? anyOf(random, cast)
    : (overlays[random.between(0, overlays.length - 1)] ?? anyOf(random, cast));
}

function qcow2Of(random: Random, cast: Cast): Actor {
  const images = cast.actors.filter(({ format }) => format === 'qcow2');
  return images[random.between(0, images.length - 1)] ?? anyOf(random, cast);
}

/** A size near one that is there, sectors, clusters or bytes more or less. */
function sizeNear(random: Random, { length, shape }: Actor): number {
  const unit = random.pick([1, 512, 512, 4096, shape.clusterSize]);
  const size = Math.floor((length * random.pick([1, 0.3, 0.5, 0.9, 1, 1.2, 2])) / unit) * unit;
  return Math.max(512, size + (random.chance(0.3) ? random.between(-3, 3) * 512 : 0));
}

const commit: Line = (random, cast) => {
  const image = overlayOf(random, cast);
  const chain = below(image);
  // QEMU does not put their refcounts right before it writes to them, and writes over data.
  if (chain.some(({ unclosed }) => unclosed)) return check(random, cast);
  const base = random.chance(0.4) ? chain[random.between(0, chain.length - 1)] : undefined;
  return words(
    'commit',
    '-q',
    random.chance(0.3) && '-d',
    random.chance(0.2) && '-r 512M',
    base !== undefined && `-b ${base.name}`,
    random.chance(0.5) && `-f ${image.format}`,
    image.name,
  );
};

const rebase: Line = (random, cast) => {
  const image = overlayOf(random, cast);
  // An image that is on this one would make a circle.
  const candidates = cast.actors.filter((actor) => actor !== image && !below(actor).includes(image));
  const backing = random.chance(0.25) ? undefined : candidates[random.between(0, candidates.length - 1)];
  const named = backing === undefined || random.chance(0.95);
  if (named && image.format === 'qcow2' && image.shape.dataFile !== 'raw') image.backing = backing;
  return words(
    'rebase',
    '-q',
    random.chance(0.2) && '-u',
    random.chance(0.3) && `-f ${image.format}`,
    backing === undefined ? "-b ''" : `-b ${backing.name}`,
    backing !== undefined && named && `-F ${backing.format}`,
    image.name,
  );
};

const resize: Line = (random, cast) => {
  const image = anyOf(random, cast);
  return words(
    'resize',
    '-q',
    `-f ${image.format}`,
    random.chance(0.6) && '--shrink',
    random.chance(0.3) && `--preallocation=${random.pick(['off', 'metadata', 'falloc', 'full'])}`,
    image.name,
    random.chance(0.2)
      ? `${random.pick(['+', '+', '-'])}${random.between(1, 300) * 512}`
      : String(sizeNear(random, image)),
  );
};

const snapshot: Line = (random, cast) => {
  const image = qcow2Of(random, cast);
  return words('snapshot', '-q', `${random.pick(['-c', '-a', '-d'])} ${random.pick(SNAPSHOTS)}`, image.name);
};

const bitmap: Line = (random, cast) => {
  const image = qcow2Of(random, cast);
  const actions = Array.from({ length: random.pick([1, 1, 2, 3]) }, () =>
    random.pick([
      '--add',
      '--add',
      '--remove',
      '--clear',
      '--enable',
      '--disable',
      '--merge b1',
      '--merge b2',
    ]),
  );
  const source = random.chance(0.2) ? qcow2Of(random, cast) : undefined;
  return words(
    'bitmap',
    ...actions,
    actions.includes('--add') && random.chance(0.5) && `-g ${random.pick(['512', '4k', '32k', '1M'])}`,
    source !== undefined &&
      actions.some((action) => action.startsWith('--merge')) &&
      `-b ${source.name} -F ${source.format}`,
    random.chance(0.3) && `-f ${image.format}`,
    image.name,
    random.pick(BITMAPS),
  );
};

const repair: Line = (random, cast) => {
  const image = anyOf(random, cast);
  // With 'leaks' QEMU takes the mark away that their refcounts are wrong, and leaves them wrong.
  const mode = image.unclosed ? 'all' : random.pick(['leaks', 'all']);
  return words('check', '-q', `-r ${mode}`, image.name);
};

const check: Line = (random, cast) =>
  words('check', random.chance(0.7) && '--output=json', anyOf(random, cast).name);

const info: Line = (random, cast) =>
  words(
    'info',
    random.chance(0.7) && '--output=json',
    random.chance(0.5) && '--backing-chain',
    random.chance(0.2) && '-U',
    anyOf(random, cast).name,
  );

const map: Line = (random, cast) => {
  const image = anyOf(random, cast);
  return words(
    'map',
    random.chance(0.8) && '--output=json',
    random.chance(0.3) && `--start-offset=${random.between(0, image.length)}`,
    random.chance(0.3) && `--max-length=${random.between(1, image.length)}`,
    random.chance(0.3) && `-f ${image.format}`,
    image.name,
  );
};

const compare: Line = (random, cast) => {
  const [a, b] = [anyOf(random, cast), anyOf(random, cast)];
  return words(
    'compare',
    random.chance(0.3) && '-s',
    random.chance(0.3) && `-f ${a.format} -F ${b.format}`,
    random.chance(0.2) && '-U',
    a.name,
    b.name,
  );
};

/** Options of a new qcow2 image, `-o` and all; a few go together with nothing. */
function creation(random: Random, name: string): string {
  const mixed = random.chance(0.05);
  const old = !mixed && random.chance(0.15);
  const clusterSize = random.pick([512, 1024, 4096, 16384, 65536, 65536, 131072, 1 << 21]);
  const subclusters = random.chance(0.2) && (mixed || (!old && clusterSize >= 16384));
  const dataFile = random.chance(0.1) && (mixed || !old);
  const options = [
    (subclusters || random.chance(0.6)) && `cluster_size=${clusterSize}`,
    (old || random.chance(0.2)) && `compat=${old || (mixed && random.chance(0.5)) ? '0.10' : '1.1'}`,
    !old && random.chance(0.2) && `refcount_bits=${random.pick([1, 2, 4, 8, 16, 32, 64])}`,
    subclusters && 'extended_l2=on',
    !old && random.chance(0.2) && `compression_type=${random.pick(['zlib', 'zstd'])}`,
    !old && random.chance(0.15) && 'lazy_refcounts=on',
    random.chance(0.2) && `preallocation=${random.pick(['off', 'metadata', 'falloc', 'full'])}`,
    dataFile && `data_file=${name}.data`,
    dataFile && random.chance(0.5) && 'data_file_raw=on',
  ].filter((option) => option !== false);
  return options.length === 0 ? '' : `-o ${options.join()}`;
}

const measure: Line = (random, cast) => {
  const image = anyOf(random, cast);
  const format = random.pick(['raw', 'qcow2', 'qcow2']);
  return words(
    'measure',
    '--output=json',
    `-O ${format}`,
    format === 'qcow2' && creation(random, 'new'),
    random.chance(0.1) && `-l ${random.pick(SNAPSHOTS)}`,
    random.chance(0.2) ? `--size ${sizeNear(random, image)}` : image.name,
  );
};

const create: Line = (random, cast) => {
  const format = random.pick<'raw' | 'qcow2'>(['raw', 'qcow2', 'qcow2', 'qcow2']);
  const name = `new.${format}`;
  const image = anyOf(random, cast);
  const cycle = [image, ...below(image)].some((actor) => actor.name === name);
  const backing = format === 'qcow2' && !cycle && random.chance(0.6) ? image : undefined;
  const size = sizeNear(random, image);
  enter(cast, { name, format, shape: image.shape, length: size, unclosed: false, backing });
  return words(
    'create',
    '-q',
    `-f ${format}`,
    format === 'qcow2' ? creation(random, name) : random.chance(0.3) && '-o preallocation=falloc',
    backing !== undefined && `-b ${backing.name} -F ${backing.format}`,
    name,
    (backing === undefined || random.chance(0.5)) && String(size),
  );
};

const convert: Line = (random, cast) => {
  const first = overlayOf(random, cast);
  const more = Array.from({ length: random.chance(0.15) ? random.between(1, 2) : 0 }, () =>
    anyOf(random, cast),
  );
  const used = [first, ...more].flatMap((source) => [source, ...below(source)]);
  const others = cast.actors.filter((actor) => !used.includes(actor) || random.chance(0.02));
  const into = random.chance(0.3) ? others[random.between(0, others.length - 1)] : undefined;
  const format = into?.format ?? random.pick<'raw' | 'qcow2'>(['raw', 'qcow2', 'qcow2']);
  const name = into?.name ?? `new.${format}`;
  // QEMU makes the new image over its own source.
  if (into === undefined && used.some((actor) => actor.name === name)) return create(random, cast);
  // Its content has to be that of the source's backing file: where it ends before, we copy on, and QEMU does not.
  const same = format === 'qcow2' && (into === undefined || into.backing === first.backing);
  const backing = same && random.chance(0.25) ? first.backing : undefined;
  if (into === undefined) {
    enter(cast, { name, format, shape: first.shape, length: first.length, unclosed: false, backing });
  }
  return words(
    'convert',
    '-q',
    `-O ${format}`,
    more.every((source) => source.format === first.format) && random.chance(0.3) && `-f ${first.format}`,
    into !== undefined
      ? '-n'
      : format === 'qcow2'
        ? creation(random, name)
        : random.chance(0.2) && '-o preallocation=falloc',
    // QEMU says that this cannot be and ends with 0.
    into !== undefined &&
      into.backing === undefined &&
      backing === undefined &&
      random.chance(0.3) &&
      '--target-is-zero',
    // We compress over data as well, and QEMU does not.
    into === undefined && random.chance(0.2) && '-c',
    random.chance(0.2) && `-S ${random.pick(['0', '512', '4k', '64k', '1M'])}`,
    backing !== undefined && `-B ${backing.name} -F ${backing.format}`,
    random.chance(0.1) && `-l ${random.pick(SNAPSHOTS)}`,
    random.chance(0.1) && '-r 1G',
    random.chance(0.2) && words('--bitmaps', random.chance(0.3) && '--skip-broken-bitmaps').join(' '),
    random.chance(0.1) && '-C',
    random.chance(0.1) && '-U',
    random.chance(0.1) && '--salvage',
    random.chance(0.2) && `-m ${random.between(1, 16)}`,
    random.chance(0.1) && '-W',
    random.chance(0.1) && `-t ${random.pick(['none', 'writeback', 'unsafe'])} -T none`,
    first.name,
    ...more.map((source) => source.name),
    name,
  );
};

const amend: Line = (random, cast) => {
  const image = qcow2Of(random, cast);
  const options = [
    random.chance(0.3) && `compat=${random.pick(['0.10', '1.1'])}`,
    random.chance(0.3) && `refcount_bits=${random.pick([1, 2, 4, 8, 16, 32, 64])}`,
    random.chance(0.3) && `lazy_refcounts=${random.pick(['on', 'off'])}`,
    random.chance(0.3) && `size=${sizeNear(random, image)}`,
  ].filter((option) => option !== false);
  return words('amend', '-q', options.length > 0 && `-o ${options.join()}`, image.name);
};

const dd: Line = (random, cast) => {
  const image = anyOf(random, cast);
  const format = random.pick<'raw' | 'qcow2'>(['raw', 'qcow2']);
  const name = `new.${format}`;
  if ([image, ...below(image)].some((actor) => actor.name === name)) return map(random, cast);
  enter(cast, { ...image, name, format, unclosed: false, backing: undefined });
  return words(
    'dd',
    random.chance(0.3) && `-f ${image.format}`,
    `-O ${format}`,
    `if=${image.name}`,
    `of=${name}`,
    random.chance(0.6) && `bs=${random.pick([1, 512, 1000, 4096, 65536, 1 << 20])}`,
    random.chance(0.4) && `count=${random.between(0, 100)}`,
    random.chance(0.4) && `skip=${random.between(0, 50)}`,
  );
};

/** How often each is chosen, beside the others. */
const WEIGHTS: readonly (readonly [Line, number])[] = [
  [commit, 4],
  [rebase, 4],
  [convert, 5],
  [resize, 3],
  [amend, 2],
  [snapshot, 2],
  [bitmap, 2],
  [repair, 1],
  [create, 1],
  [dd, 1],
  [check, 1],
  [info, 1],
  [map, 1],
  [compare, 1],
  [measure, 1],
];
const LINES = WEIGHTS.flatMap(([line, weight]) => Array.from({ length: weight }, () => line));

/** A command with options, about images of the story. */
export function randomCommand(random: Random, cast: Cast): Command {
  return (LINES[random.between(0, LINES.length - 1)] ?? info)(random, cast);
}
