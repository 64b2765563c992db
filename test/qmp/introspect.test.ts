import { describe, expect, it } from 'vitest';
import { introspect } from '#src/qmp/introspect.js';
import { COMMANDS } from '#src/qmp/schema.js';

interface Entity {
  readonly name: string;
  readonly 'meta-type': string;
  readonly [key: string]: unknown;
}
const entities = introspect() as Entity[];
const byName = new Map(entities.map((entity) => [entity.name, entity]));

/** Every type that an entity names. */
function* namesIn(value: unknown): Generator<string> {
  if (Array.isArray(value)) for (const one of value) yield* namesIn(one);
  else if (typeof value === 'object' && value !== null) {
    for (const [key, one] of Object.entries(value)) {
      if (['type', 'arg-type', 'ret-type', 'element-type'].includes(key) && typeof one === 'string')
        yield one;
      else yield* namesIn(one);
    }
  }
}

describe('query-qmp-schema', () => {
  it('has every command and names no type that is not there, and none twice', () => {
    const commands = entities.filter((entity) => entity['meta-type'] === 'command').map(({ name }) => name);
    expect(commands).toEqual(Object.keys(COMMANDS));
    expect(byName.size).toBe(entities.length);
    for (const name of namesIn(entities)) expect(byName.has(name), name).toBe(true);
  });

  it('says what arguments a command has', () => {
    const type = byName.get('blockdev-backup')?.['arg-type'];
    const members = byName.get(String(type))?.['members'] as { name: string; type: string; default?: null }[];
    const sync = members.find(({ name }) => name === 'sync');
    expect(byName.get(sync?.type ?? '')).toMatchObject({
      'meta-type': 'enum',
      values: ['top', 'full', 'none', 'incremental', 'bitmap'],
    });
    expect(sync).not.toHaveProperty('default');
    expect(members.find(({ name }) => name === 'job-id')).toMatchObject({ type: 'str', default: null });
  });

  it('says what drivers there are', () => {
    const type = byName.get('blockdev-add')?.['arg-type'];
    const union = byName.get(String(type)) as { tag?: string; variants?: { case: string }[] };
    expect(union.tag).toBe('driver');
    expect(union.variants?.map((variant) => variant.case)).toContain('copy-before-write');
  });
});
