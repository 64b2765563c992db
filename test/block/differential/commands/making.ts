import type { Random } from '../../../support/data.js';
import { below, enter, SNAPSHOTS } from './cast.js';
import { map } from './reading.js';
import { anyOf, type Line, overlayOf, sizeNear, words } from './words.js';

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

export const measure: Line = (random, cast) => {
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

export const create: Line = (random, cast) => {
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

export const convert: Line = (random, cast) => {
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

export const dd: Line = (random, cast) => {
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
