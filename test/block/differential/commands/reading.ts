import { anyOf, type Line, words } from './words.js';

export const check: Line = (random, cast) =>
  words('check', random.chance(0.7) && '--output=json', anyOf(random, cast).name);

export const info: Line = (random, cast) =>
  words(
    'info',
    random.chance(0.7) && '--output=json',
    random.chance(0.5) && '--backing-chain',
    random.chance(0.2) && '-U',
    anyOf(random, cast).name,
  );

export const map: Line = (random, cast) => {
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

export const compare: Line = (random, cast) => {
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
