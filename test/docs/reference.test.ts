/** The reference of commands is made from the schema: `npx vitest run test/docs -u` writes it anew. */
import { expect, it } from 'vitest';
import { ACTIONS, COMMANDS } from '#src/qmp/schema.js';
import { isEnumeration, type Kind, type Members, type UnionKind } from '#src/qmp/types.js';

function nameOf(kind: Kind): string {
  if (typeof kind === 'string') return kind;
  if (isEnumeration(kind)) return kind.map((word) => `\`${word}\``).join(', ');
  if ('lazy' in kind) return 'a node by its name, or its options';
  if ('list' in kind) return `list of ${nameOf(kind.list)}`;
  if ('alternate' in kind) return kind.alternate.map(nameOf).join(' or ');
  if ('struct' in kind) return `{ ${Object.keys(kind.struct).join(', ')} }`;
  return `by \`${kind.union}\`: ${Object.keys(kind.variants).join(', ')}`;
}

function rows(members: Members): string[] {
  return Object.entries(members).map(
    ([name, { kind, optional }]) => `- \`${name}\`${optional === true ? ' (optional)' : ''}: ${nameOf(kind)}`,
  );
}

function argumentsOf(of: Members | UnionKind): string[] {
  const isUnion = (one: Members | UnionKind): one is UnionKind => typeof one['union'] === 'string';
  if (!isUnion(of)) return rows(of);
  return [
    ...rows(of.members),
    ...Object.entries(of.variants).flatMap(([word, variant]) => [
      '',
      `With \`${of.union}\` \`${word}\`:`,
      '',
      ...rows(variant),
    ]),
  ];
}

it('is the schema', async () => {
  const text = [
    '# QMP commands of the daemon',
    '',
    'Made from the schema by which arguments are checked. What the commands do is told by QEMU’s own reference; what is',
    'different here by [daemon.md](daemon.md). Commands and arguments that begin with `x-` and are not in QEMU are ours.',
    ...Object.entries(COMMANDS).flatMap(([name, members]) => ['', `## ${name}`, '', ...argumentsOf(members)]),
    '',
    '# Actions of transactions',
    ...Object.entries(ACTIONS).flatMap(([name, members]) => [
      '',
      `## ${name} (action)`,
      '',
      ...rows(members),
    ]),
    '',
  ].join('\n');
  await expect(text.replaceAll(/\n{3,}/g, '\n\n')).toMatchFileSnapshot('../../docs/qmp.md');
});
