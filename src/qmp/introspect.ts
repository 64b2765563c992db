import { COMMANDS } from './schema.js';
import { isEnumeration, type Kind, type Members, type UnionKind } from './types.js';

/** Events that monitors are told of, with their members. Source: qapi/job.json, qapi/block-core.json, qapi/block-export.json. */
const EVENTS: Readonly<Record<string, Members>> = {
  BLOCK_EXPORT_DELETED: { id: { kind: 'str' } },
  BLOCK_JOB_CANCELLED: {
    type: { kind: ['backup'] },
    device: { kind: 'str' },
    len: { kind: 'int' },
    offset: { kind: 'int' },
    speed: { kind: 'int' },
  },
  BLOCK_JOB_COMPLETED: {
    type: { kind: ['backup'] },
    device: { kind: 'str' },
    len: { kind: 'int' },
    offset: { kind: 'int' },
    speed: { kind: 'int' },
    error: { kind: 'str', optional: true },
  },
  BLOCK_JOB_ERROR: {
    device: { kind: 'str' },
    operation: { kind: ['read', 'write'] },
    action: { kind: ['ignore', 'report', 'stop'] },
  },
  BLOCK_JOB_PENDING: { type: { kind: ['backup'] }, id: { kind: 'str' } },
  JOB_STATUS_CHANGE: { id: { kind: 'str' }, status: { kind: 'str' } },
  RESUME: {},
  STOP: {},
};

/** Names of types, as long as they are made; complete types that are equal share one. */
class Types {
  readonly entities: object[] = [];
  readonly #byText = new Map<string, string>();
  readonly #lazy = new Map<Kind, string>();

  #add(key: string, make: (name: string) => object): string {
    const known = this.#byText.get(key);
    if (known !== undefined) return known;
    const name = String(this.#byText.size);
    this.#byText.set(key, name);
    this.entities.push(make(name));
    return name;
  }

  nameOf(kind: Kind): string {
    if (typeof kind === 'string') return this.#builtIn(kind);
    if (isEnumeration(kind)) {
      const values = kind;
      return this.#add(`enum ${values.join()}`, (name) => ({
        name,
        'meta-type': 'enum',
        members: values.map((value) => ({ name: value })),
        values,
      }));
    }
    if ('lazy' in kind) {
      // A type that contains itself has its name before its members do.
      const inner = kind.lazy();
      const known = this.#lazy.get(inner);
      return known ?? this.nameOf(inner);
    }
    if ('list' in kind) {
      const element = this.nameOf(kind.list);
      const name = `[${element}]`;
      this.#add(name, () => ({ name, 'meta-type': 'array', 'element-type': element }));
      return name;
    }
    if ('alternate' in kind) {
      const alternate: { name: string; 'meta-type': string; members: object[] } = {
        name: this.#reserve(kind),
        'meta-type': 'alternate',
        members: [],
      };
      this.entities.push(alternate);
      alternate.members = kind.alternate.map((one) => ({ type: this.nameOf(one) }));
      return alternate.name;
    }
    return this.object('struct' in kind ? kind.struct : kind, kind);
  }

  #builtIn(kind: string): string {
    const json = kind === 'str' ? 'string' : kind === 'bool' ? 'boolean' : kind === 'any' ? 'value' : kind;
    const name = kind.startsWith('uint') ? 'int' : kind;
    this.#add(name, () => ({
      name,
      'meta-type': 'builtin',
      'json-type': json.startsWith('uint') ? 'int' : json,
    }));
    return name;
  }

  #reserve(kind: Kind): string {
    const name = String(this.#byText.size);
    this.#byText.set(`reserved ${name}`, name);
    this.#lazy.set(kind, name);
    return name;
  }

  object(of: Members | UnionKind, key: Kind | undefined = undefined): string {
    const known = key === undefined ? undefined : this.#lazy.get(key);
    if (known !== undefined) return known;
    const name = this.#reserve(key ?? { struct: {} });
    const entity: Record<string, unknown> = { name, 'meta-type': 'object' };
    this.entities.push(entity);
    const isUnion = (one: Members | UnionKind): one is UnionKind => typeof one['union'] === 'string';
    const members = isUnion(of) ? of.members : of;
    entity['members'] = Object.entries(members).map(([member, { kind, optional }]) => ({
      name: member,
      type: this.nameOf(kind),
      ...(optional === true ? { default: null } : {}),
    }));
    if (isUnion(of)) {
      entity['tag'] = of.union;
      entity['variants'] = Object.entries(of.variants).map(([word, variant]) => ({
        case: word,
        type: this.object(variant),
      }));
    }
    return name;
  }
}

let made: object[] | undefined;

/** The answer to `query-qmp-schema` (QAPI `SchemaInfo`), from what commands are checked by. */
export function introspect(): object[] {
  if (made !== undefined) return made;
  const types = new Types();
  const empty = types.object({});
  const commands = Object.entries(COMMANDS).map(([name, members]) => ({
    name,
    'meta-type': 'command',
    'arg-type': 'variants' in members ? types.nameOf(members) : types.object(members),
    'ret-type': empty,
    'allow-oob': false,
  }));
  const events = Object.entries(EVENTS).map(([name, members]) => ({
    name,
    'meta-type': 'event',
    'arg-type': types.object(members),
  }));
  made = [...commands, ...events, ...types.entities];
  return made;
}
