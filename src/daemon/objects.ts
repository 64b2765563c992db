import { setLimits, THROTTLE_GROUP_BYTES } from '../block/filters/throttle.js';
import { changeLimits, type ThrottleLimits, UNLIMITED } from '../block/filters/throttle-limits.js';
import type { Engine, TlsOptions } from '../index.js';
import { QmpError } from '../qmp/errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';
import { contentOf } from './secrets.js';
import { checkCredentials, DEFAULT_USERNAME, keysFile } from './tls-credentials.js';

/** An object that nodes and servers refer to (QMP `object-add`). */
export interface DaemonObject {
  readonly id: string;
  readonly type: string;
  readonly options: JsonObject;
  /** What a `throttle-group` has: pointer to its buckets, and what they hold. */
  readonly group?: number;
  limits?: ThrottleLimits;
  /** What a `secret` holds; of credentials: what their key is encrypted with. */
  readonly secret?: Buffer;
  /** What an `iothread` was told by `qom-set`. */
  readonly settings?: Map<string, number>;
  /** How many nodes use it. */
  users: number;
}

/** The objects of a daemon. */
export class Objects {
  readonly #engine: Engine;
  readonly #objects = new Map<string, DaemonObject>();
  #nextMember = 0;

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  /** @param options as the schema has them */
  add(options: JsonObject): void {
    const { id, 'qom-type': type, ...rest } = options;
    if (typeof id !== 'string' || typeof type !== 'string')
      throw new TypeError('the schema was not looked at');
    if (!/^[A-Za-z][A-Za-z0-9\-._]*$/.test(id)) throw new QmpError("Parameter 'id' expects an identifier");
    if (this.#objects.has(id)) {
      throw new QmpError(`attempt to add duplicate property '${id}' to object (type 'container')`);
    }
    const common = { id, type, options: rest, users: 0 };
    if (type !== 'throttle-group') {
      this.#objects.set(id, { ...common, ...this.#contentOf(type, rest) });
      return;
    }
    const { limits: nested, ...flat } = rest;
    const limits = limitsOf(
      limitsOf(UNLIMITED, (name) => flat[`x-${name}`]),
      (name) => (isObject(nested) ? nested[name] : undefined),
    );
    const group = this.#engine.arena.alloc(THROTTLE_GROUP_BYTES, `throttle group '${id}'`);
    setLimits(this.#engine, group, limits);
    this.#objects.set(id, { ...common, group, limits });
  }

  #contentOf(type: string, options: JsonObject): Partial<DaemonObject> {
    switch (type) {
      case 'iothread':
        return { settings: new Map() };
      case 'secret':
        return { secret: contentOf(options, (id) => this.#secret(id)) };
      case 'tls-creds-x509':
      case 'tls-creds-psk': {
        const { passwordid } = options;
        const secret = typeof passwordid === 'string' ? this.#secret(passwordid) : undefined;
        checkCredentials(type, options, secret?.toString());
        return secret === undefined ? {} : { secret };
      }
      default:
        return {};
    }
  }

  /** What a secret holds. */
  #secret(id: string): Buffer {
    const object = this.#objects.get(id);
    if (object === undefined) throw new QmpError(`No secret with id '${id}'`);
    if (object.type !== 'secret' || object.secret === undefined) {
      throw new QmpError(`Object with id '${id}' is not a secret`);
    }
    return object.secret;
  }

  remove(id: string): void {
    const object = this.#objects.get(id);
    if (object === undefined) throw new QmpError(`object '${id}' not found`);
    if (object.users > 0) throw new QmpError(`object '${id}' is in use, can not be deleted`);
    this.#objects.delete(id);
    if (object.group !== undefined) this.#engine.arena.free(object.group);
  }

  /** The group of a throttle node, which uses it from now on, as its member of that number. */
  takeGroup(id: string): { readonly object: DaemonObject; readonly group: number; readonly member: number } {
    const object = this.#objects.get(id);
    if (object?.group === undefined) throw new QmpError(`Throttle group '${id}' does not exist`);
    object.users++;
    return { object, group: object.group, member: this.#nextMember++ };
  }

  get(id: string): DaemonObject | undefined {
    return this.#objects.get(id);
  }

  /** All of them, in the order in which they were made. */
  all(): DaemonObject[] {
    return [...this.#objects.values()];
  }

  /** Gives a throttle group other limits; what is not named stays. @throws QmpError where they do not go together */
  setLimits(object: DaemonObject, given: JsonObject): void {
    if (object.group === undefined) throw new TypeError('only a throttle group has limits');
    object.limits = limitsOf(object.limits ?? UNLIMITED, (name) => given[name]);
    setLimits(this.#engine, object.group, object.limits);
  }

  /** Limits nobody any more, so that whoever waits goes on. */
  unlimit(): void {
    for (const { group } of this.all()) if (group !== undefined) setLimits(this.#engine, group, UNLIMITED);
  }

  /** TLS of a server, from credentials. */
  tlsOf(id: string): TlsOptions {
    const object = this.#credentials(id);
    const { dir, endpoint, 'verify-peer': verifyPeer = true } = object.options;
    if (endpoint !== 'server') throw new QmpError('Expecting TLS credentials with a server endpoint');
    return object.type === 'tls-creds-psk'
      ? { pskFile: keysFile(dir) }
      : { certificates: String(dir), verifyPeer: verifyPeer === true, passphrase: object.secret?.toString() };
  }

  #credentials(id: string): DaemonObject {
    const object = this.#objects.get(id);
    if (object === undefined) throw new QmpError(`No TLS credentials with id '${id}'`);
    if (object.type === 'tls-creds-x509' || object.type === 'tls-creds-psk') return object;
    throw new QmpError(`Object with id '${id}' is not TLS credentials`);
  }

  /** What the key of a client's credentials is encrypted with. */
  passphraseOf(id: unknown): string | undefined {
    return typeof id === 'string' ? this.#objects.get(id)?.secret?.toString() : undefined;
  }

  /** Parameters of an NBD URI for a client's credentials. */
  clientTlsOf(id: string): URLSearchParams {
    const object = this.#credentials(id);
    const { dir, endpoint = 'client', username = DEFAULT_USERNAME } = object.options;
    if (endpoint !== 'client') throw new QmpError('Expected TLS credentials for a client endpoint');
    const parameters = new URLSearchParams();
    if (object.type === 'tls-creds-psk') {
      parameters.set('tls-psk-file', keysFile(dir));
      parameters.set('tls-username', String(username));
    } else {
      parameters.set('tls-certificates', String(dir));
      if (object.options['verify-peer'] === false) parameters.set('tls-verify-peer', 'false');
    }
    return parameters;
  }

  close(): void {
    for (const { group } of this.#objects.values()) if (group !== undefined) this.#engine.arena.free(group);
    this.#objects.clear();
  }
}

function limitsOf(limits: ThrottleLimits, given: (name: string) => unknown): ThrottleLimits {
  try {
    return changeLimits(limits, (name) => {
      const value = given(name);
      return value === undefined ? undefined : Number(value);
    });
  } catch (error) {
    if (error instanceof RangeError) throw new QmpError(error.message);
    throw error;
  }
}
