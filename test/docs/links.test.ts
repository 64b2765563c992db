import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));
const pages = ['README.md', ...readdirSync(join(root, 'docs')).map((name) => `docs/${name}`)];

interface Link {
  readonly text: string;
  readonly target: string;
}

function linksOf(page: string): Link[] {
  const text = readFileSync(join(root, page), 'utf8').replaceAll(/^```.*?^```/gms, '');
  return [...text.matchAll(/\[([^\]]+)\]\(([^)\s]+)\)/g)].map(([, name = '', target = '']) => ({
    text: name.replaceAll(/\s+/g, ' '),
    target,
  }));
}

/** The anchor that a heading gets. */
function anchor(heading: string): string {
  return heading
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
    .trim()
    .replaceAll(/\s/g, '-');
}

/** Links of a page that lead nowhere. */
function deadLinks(page: string): string[] {
  return linksOf(page).flatMap(({ text, target }) => {
    if (/^[a-z]+:/.test(target)) return [];
    const [path = '', fragment] = target.split('#');
    const file = path === '' ? join(root, page) : join(root, dirname(page), path);
    if (!existsSync(file)) return [`${target}: there is no such file`];
    const content = readFileSync(file, 'utf8');
    if (file.endsWith('.ts')) {
      // Names of tests may be split over lines or have escaped quotes.
      const plain = content.replaceAll("\\'", "'").replaceAll(/\s+/g, ' ');
      return plain.includes(text) ? [] : [`${target}: has no '${text}'`];
    }
    const headings = [...content.matchAll(/^#+ (.*)$/gm)].map(([, heading = '']) => anchor(heading));
    return fragment === undefined || headings.includes(fragment) ? [] : [`${target}: has no such heading`];
  });
}

describe('links of the documentation', () => {
  it.each(pages)('%s: none is dead', (page) => {
    expect(deadLinks(page)).toEqual([]);
  });

  it('each promise has its tests', () => {
    const sections = readFileSync(join(root, 'docs/guarantees.md'), 'utf8').split(/^## /m).slice(1);
    expect(sections.length).toBeGreaterThan(8);
    for (const section of sections)
      expect(section, section.split('\n')[0]).toMatch(/\]\(\.\.\/test\/.*\.ts\)/);
  });

  it('every invariant of the simulator is promised', () => {
    const oracle = readFileSync(join(root, 'test/sim/oracle.ts'), 'utf8');
    const [, list = ''] = oracle.match(/export const INVARIANTS = \{(.*?)\} as const/s) ?? [];
    const names = [...list.matchAll(/: '(.*)',/g)].map(([, name]) => name);
    expect(names.length).toBeGreaterThan(8);
    const promised = linksOf('docs/guarantees.md').map(({ text }) => text);
    for (const name of names) expect(promised).toContain(name);
  });
});
