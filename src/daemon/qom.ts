import { namedLimits, UNLIMITED } from '../block/filters/throttle-limits.js';
import { OBJECT } from '../qmp/blockdev-schema.js';
import { QmpError } from '../qmp/errors.js';
import type { JsonObject, Kind } from '../qmp/types.js';
import { isObject, wrongValue } from '../qmp/types.js';
import type { DaemonObject, Objects } from './objects.js';

interface Property {
  readonly name: string;
  readonly type: string;
}

const property = (name: string, type = 'string'): Property => ({ name, type });
const numbers = (...names: readonly string[]): Property[] => names.map((name) => property(name, 'int'));
const TYPE = property('type');
const ENDPOINT = property('endpoint', 'QCryptoTLSCredsEndpoint');
const TLS = [ENDPOINT, property('dir'), property('verify-peer', 'bool'), property('priority')];
const LOADED = property('loaded', 'bool');

/** Properties of the types that there are, in QEMU's order. */
const PROPERTIES: Readonly<Record<string, readonly Property[]>> = {
  container: [TYPE],
  'throttle-group': [
    TYPE,
    ...numbers('x-bps-write-max-length', 'x-iops-total-max-length', 'x-iops-size'),
    property('limits', 'ThrottleLimits'),
    ...numbers(
      ...['x-bps-total', 'x-iops-read-max-length', 'x-bps-write', 'x-iops-write-max-length'],
      ...['x-bps-read-max', 'x-iops-read-max', 'x-bps-total-max', 'x-bps-read-max-length', 'x-iops-read'],
      ...['x-bps-read', 'x-bps-write-max', 'x-iops-total-max', 'x-iops-total', 'x-iops-write'],
      ...['x-bps-total-max-length', 'x-iops-write-max'],
    ),
  ],
  iothread: [
    TYPE,
    ...numbers(
      'thread-pool-min',
      'aio-max-batch',
      'thread-pool-max',
      'poll-max-ns',
      'poll-grow',
      'poll-shrink',
    ),
  ],
  secret: [
    TYPE,
    ...[property('iv'), property('keyid'), LOADED, property('format', 'QCryptoSecretFormat')],
    ...[property('file'), property('data')],
  ],
  'tls-creds-x509': [TYPE, ...TLS, property('sanity-check', 'bool'), property('passwordid'), LOADED],
  'tls-creds-psk': [TYPE, ...TLS, property('username'), LOADED],
};

const PARENTS: Readonly<Record<string, string>> = {
  container: 'object',
  iothread: 'event-loop-base',
  secret: 'secret_common',
  'tls-creds-psk': 'tls-creds',
  'tls-creds-x509': 'tls-creds',
  'throttle-group': 'object',
};
const ABSTRACT: Readonly<Record<string, string>> = {
  'event-loop-base': 'object',
  secret_common: 'object',
  'tls-creds': 'object',
};

const IOTHREAD: Readonly<Record<string, number>> = {
  'thread-pool-min': 0,
  'thread-pool-max': 64,
  'aio-max-batch': 0,
  'poll-max-ns': 32768,
  'poll-grow': 0,
  'poll-shrink': 0,
};

const DEFAULTS: Readonly<Record<string, unknown>> = {
  'verify-peer': true,
  'sanity-check': true,
  endpoint: 'client',
  format: 'raw',
  loaded: true,
};

const NO_TYPE = (name: string): QmpError => new QmpError(`Class '${name}' not found`, 'DeviceNotFound');

/** The tree of objects that monitors can look at and change (QMP `qom-list`, `qom-get`, `qom-set`). */
export class Qom {
  readonly #objects: Objects;
  readonly #chardevs: () => readonly Property[];

  /** @param chardevs what is listed under `/chardevs` */
  constructor(objects: Objects, chardevs: () => readonly Property[]) {
    this.#objects = objects;
    this.#chardevs = chardevs;
  }

  list(path: string): readonly Property[] {
    const found = this.#find(path);
    if (typeof found !== 'string') return PROPERTIES[found.type] ?? [TYPE];
    switch (found) {
      case '/':
        return [TYPE, property('objects', 'child<container>'), property('chardevs', 'child<container>')];
      case '/objects':
        return [TYPE, ...this.#objects.all().map(({ id, type }) => property(id, `child<${type}>`))];
      default:
        return [TYPE, ...this.#chardevs()];
    }
  }

  get(path: string, name: string): unknown {
    const found = this.#find(path);
    const type = typeof found === 'string' ? 'container' : found.type;
    const known = PROPERTIES[type]?.some((one) => one.name === name);
    if (known !== true) throw new QmpError(`Property '${type}.${name}' not found`);
    if (name === 'type') return type;
    if (typeof found === 'string') return undefined;
    return propertyOf(found, name);
  }

  set(path: string, name: string, value: unknown): void {
    const found = this.#find(path);
    const type = typeof found === 'string' ? 'container' : found.type;
    const known = PROPERTIES[type]?.some((one) => one.name === name);
    if (known !== true) throw new QmpError(`Property '${type}.${name}' not found`);
    if (name === 'type' || typeof found === 'string') {
      throw new QmpError(`Property '${type}.${name}' is not writable`);
    }
    if (type === 'throttle-group' && name === 'limits') {
      const wrong = wrongValue(kindOf(type, name), value, name);
      if (wrong !== undefined) throw new QmpError(wrong);
      this.#objects.setLimits(found, isObject(value) ? value : {});
      return;
    }
    if (type === 'iothread') {
      const wrong = wrongValue('int', value, name);
      if (wrong !== undefined) throw new QmpError(wrong);
      if (Number(value) < 0) throw new QmpError(`${name} value must be in range [0, 9223372036854775807]`);
      found.settings?.set(name, Number(value));
      return;
    }
    throw new QmpError('Property cannot be set after initialization');
  }

  #find(path: string): DaemonObject | '/' | '/objects' | '/chardevs' {
    if (path === '/' || path === '/objects' || path === '/chardevs') return path;
    const found = this.#objects.get(path.replace(/^\/objects\//, ''));
    if (found === undefined) throw new QmpError(`Device '${path}' not found`, 'DeviceNotFound');
    return found;
  }
}

function propertyOf({ type, options, limits, settings }: DaemonObject, name: string): unknown {
  switch (type) {
    case 'throttle-group': {
      const named = namedLimits(limits ?? UNLIMITED);
      return name === 'limits' ? named : named[name.replace(/^x-/, '')];
    }
    case 'iothread':
      return settings?.get(name) ?? options[name] ?? IOTHREAD[name];
    default:
      return options[name] ?? DEFAULTS[name] ?? '';
  }
}

function kindOf(type: string, name: string): Kind {
  return OBJECT.variants[type]?.[name]?.kind ?? 'any';
}

/** QMP `qom-list-types` */
export function listTypes(implemented: string | undefined, abstract: boolean): JsonObject[] {
  const all = [
    ...Object.entries(PARENTS).map(([name, parent]) => ({ name, parent })),
    ...(abstract ? Object.entries(ABSTRACT).map(([name, parent]) => ({ abstract, name, parent })) : []),
  ];
  const parents: Readonly<Record<string, string>> = { ...ABSTRACT, ...PARENTS };
  const isA = (name: string): boolean => {
    for (let at: string | undefined = name; at !== undefined; at = parents[at])
      if (at === implemented) return true;
    return implemented === 'user-creatable' && name !== 'container' && ABSTRACT[name] === undefined;
  };
  return implemented === undefined ? all : all.filter(({ name }) => isA(name));
}

/** QMP `qom-list-properties` */
export function listProperties(type: string): readonly Property[] {
  const found = PROPERTIES[type];
  if (found === undefined) throw NO_TYPE(type);
  return found;
}
