import type { Random } from '../support/data.js';
import { anyOf, GENERAL, type Mutator, put, type Weighted } from './mutation.js';
import { damageStream, NAMES } from './qcow2-mutators.js';

const TYPES = [
  'monolithicSparse',
  'streamOptimized',
  'monolithicFlat',
  'twoGbMaxExtentSparse',
  'twoGbMaxExtentFlat',
  'vmfs',
  'vmfsSparse',
  'fullDevice',
  '',
] as const;
const FILES = ['part.vmdk', 'part-cowd.vmdk', 'base.raw', 'base.vmdk', 'image.vmdk', ...NAMES] as const;
const KINDS = ['SPARSE', 'FLAT', 'VMFS', 'VMFSSPARSE', 'ZERO', 'SESPARSE', 'flat', ''] as const;

function anyNumber(dice: Random): string {
  return anyOf(dice, [
    () => dice.between(0, 200),
    () => 64,
    () => -1,
    () => 2 ** dice.between(8, 64),
  ])().toString();
}

function extentLine(dice: Random): string {
  const access = anyOf(dice, ['RW', 'RW', 'RW', 'RDONLY', 'NOACCESS', '']);
  const kind = dice.chance(0.7) ? anyOf(dice, ['SPARSE', 'FLAT'] as const) : anyOf(dice, KINDS);
  const name = dice.chance(0.6)
    ? anyOf(dice, ['part.vmdk', 'base.raw', 'part-cowd.vmdk'] as const)
    : anyOf(dice, FILES);
  const offset = kind === 'FLAT' || dice.chance(0.1) ? ` ${dice.chance(0.7) ? 0 : anyNumber(dice)}` : '';
  return `${access} ${anyNumber(dice)} ${kind} "${name}"${offset}`;
}

/** Another descriptor. What it names that is not in the image's folder must never be opened, see guard.ts. */
const descriptor: Mutator = (dice, base) => {
  const region = base.regions.get('descriptor')?.[0];
  if (region === undefined) return [];
  const parent = dice.chance(0.3);
  const lines = [
    '# Disk DescriptorFile',
    'version=1',
    `CID=${dice.chance(0.8) ? '12345678' : anyNumber(dice)}`,
    `parentCID=${parent ? anyOf(dice, ['12345678', 'fffffffe', 'x']) : 'ffffffff'}`,
    `createType="${anyOf(dice, TYPES)}"`,
    ...(parent ? [`parentFileNameHint="${anyOf(dice, FILES)}"`] : []),
    ...Array.from({ length: dice.between(0, 4) }, () => extentLine(dice)),
    ...(dice.chance(0.1) ? [Buffer.from(dice.noise(30)).toString('latin1')] : []),
  ].filter(() => dice.chance(0.97));
  const text = Buffer.from(`${lines.join('\n')}\n\0`, 'latin1');
  // A descriptor file ends where its text does.
  return region.at === 0 ? [{ length: 0 }, put(0, text.subarray(0, -1))] : [put(region.at, text)];
};

/** One line of the descriptor with another value. */
const descriptorValue: Mutator = (dice, base) => {
  const region = base.regions.get('descriptor')?.[0];
  if (region === undefined) return [];
  const text = base.file.bytes.toString('latin1', region.at, region.at + region.length);
  const words = [...text.matchAll(/"[^"]*"|[0-9a-f]+/g)];
  if (words.length === 0) return [];
  const word = anyOf(dice, words);
  const value = word[0].startsWith('"') ? `"${anyOf(dice, [...FILES, ...TYPES])}"` : anyNumber(dice);
  const changed = text.slice(0, word.index) + value + text.slice(word.index + word[0].length);
  return [put(region.at, Buffer.from(changed, 'latin1'))];
};

/** A reference to any place, or what another one says. */
const redirect: Mutator = (dice, base) => {
  const found = ['directory', 'grain', 'block', 'region'].flatMap((kind) => base.fields.get(kind) ?? []);
  if (found.length === 0) return [];
  const [from, to] = [anyOf(dice, found), anyOf(dice, found)];
  return from.width === to.width ? [put(to.at, base.file.bytes.subarray(from.at, from.at + from.width))] : [];
};

export const FOREIGN_MUTATORS: readonly Weighted[] = [
  ...GENERAL,
  [3, redirect],
  [4, descriptor],
  [3, descriptorValue],
  [3, damageStream],
];
