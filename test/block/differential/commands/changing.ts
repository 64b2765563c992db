import { BITMAPS, below, SNAPSHOTS } from './cast.js';
import { check } from './reading.js';
import { anyOf, type Line, overlayOf, qcow2Of, sizeNear, words } from './words.js';

export const commit: Line = (random, cast) => {
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

export const rebase: Line = (random, cast) => {
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

export const resize: Line = (random, cast) => {
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

export const amend: Line = (random, cast) => {
  const image = qcow2Of(random, cast);
  const options = [
    random.chance(0.3) && `compat=${random.pick(['0.10', '1.1'])}`,
    // With large clusters QEMU takes minutes.
    image.shape.clusterSize <= 65536 &&
      random.chance(0.3) &&
      `refcount_bits=${random.pick([1, 2, 4, 8, 16, 32, 64])}`,
    random.chance(0.3) && `lazy_refcounts=${random.pick(['on', 'off'])}`,
    random.chance(0.3) && `size=${sizeNear(random, image)}`,
  ].filter((option) => option !== false);
  return words('amend', '-q', options.length > 0 && `-o ${options.join()}`, image.name);
};

export const snapshot: Line = (random, cast) => {
  const image = qcow2Of(random, cast);
  return words('snapshot', '-q', `${random.pick(['-c', '-a', '-d'])} ${random.pick(SNAPSHOTS)}`, image.name);
};

export const bitmap: Line = (random, cast) => {
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
    // QEMU cannot open an image twice.
    source !== undefined &&
      source !== image &&
      actions.some((action) => action.startsWith('--merge')) &&
      `-b ${source.name} -F ${source.format}`,
    random.chance(0.3) && `-f ${image.format}`,
    image.name,
    random.pick(BITMAPS),
  );
};

export const repair: Line = (random, cast) => {
  const image = anyOf(random, cast);
  // With 'leaks' QEMU takes the mark away that their refcounts are wrong, and leaves them wrong.
  const mode = image.unclosed ? 'all' : random.pick(['leaks', 'all']);
  return words('check', '-q', `-r ${mode}`, image.name);
};
