import { QmpError, qmpText } from './errors.js';
import { type Input, InputReader } from './input.js';
import { introspect } from './introspect.js';
import { type ArgumentsOf, COMMANDS, type CommandName, isCommand, wrongArguments } from './schema.js';
import { isObject } from './types.js';

/** What carries commands out. */
export type Handlers = {
  readonly [C in Exclude<
    CommandName,
    'qmp_capabilities' | 'query-commands' | 'query-version' | 'query-qmp-schema'
  >]: (given: ArgumentsOf<C>) => unknown;
};

/** Something that has happened, for every monitor. */
export interface QmpEvent {
  readonly event: string;
  readonly data?: object | undefined;
}

/** Commands that wait for their turn at most; a client that sends more is read on later. */
export const MAX_QUEUED = 8;

const MEMBERS = ['execute', 'arguments', 'id'];

/** Version numbers from those of a package. */
function versionOf(text: string): object {
  const [major = 0, minor = 0, micro = 0] = text.split('.').map(Number);
  return { qemu: { micro, minor, major }, package: `stillframe ${text}` };
}

/**
 * One client's conversation, without its socket (QMP: docs/interop/qmp-spec). Commands are carried out one after the
 * other; events come between answers, and only once capabilities were negotiated.
 */
export class Monitor {
  readonly #handlers: Handlers;
  readonly #version: string;
  readonly #send: (line: string) => void;
  readonly #reader = new InputReader();
  readonly #queue: Input[] = [];
  #working = false;
  #negotiated = false;
  #outOfBand = false;

  /** @param send takes one line, with its end */
  constructor(handlers: Handlers, version: string, send: (line: string) => void) {
    this.#handlers = handlers;
    this.#version = version;
    this.#send = send;
    this.#say({ QMP: { version: versionOf(version), capabilities: ['oob'] } });
  }

  /** Takes what the client has sent. Resolves when it may send more. */
  async take(chunk: string): Promise<void> {
    this.#queue.push(...this.#reader.push(chunk));
    if (this.#working) return;
    this.#working = true;
    try {
      for (;;) {
        const input = this.#queue.shift();
        if (input === undefined) break;
        this.#say(await this.#answer(input));
      }
    } finally {
      this.#working = false;
    }
  }

  /** Commands that wait. */
  get queued(): number {
    return this.#queue.length;
  }

  tell({ event, data }: QmpEvent): void {
    if (!this.#negotiated) return;
    const now = performance.timeOrigin + performance.now();
    const seconds = Math.floor(now / 1000);
    const microseconds = Math.floor((now - seconds * 1000) * 1000);
    this.#say({ timestamp: { seconds, microseconds }, event, ...(data === undefined ? {} : { data }) });
  }

  #say(message: object): void {
    this.#send(`${JSON.stringify(message)}\r\n`);
  }

  async #answer(input: Input): Promise<object> {
    const id =
      'value' in input && isObject(input.value) && 'id' in input.value ? { id: input.value['id'] } : {};
    try {
      const found = await this.#execute(input);
      return { return: found ?? {}, ...id };
    } catch (error) {
      const errorClass = error instanceof QmpError ? error.class : 'GenericError';
      return { ...id, error: { class: errorClass, desc: qmpText(error) } };
    }
  }

  async #execute(input: Input): Promise<unknown> {
    if ('error' in input) throw new QmpError(input.error);
    const { value } = input;
    if (!isObject(value)) throw new QmpError('QMP input must be a JSON object');
    const members = this.#outOfBand ? [...MEMBERS, 'exec-oob'] : MEMBERS;
    const unexpected = Object.keys(value).find((member) => !members.includes(member));
    if (unexpected !== undefined) throw new QmpError(`QMP input member '${unexpected}' is unexpected`);
    const { execute, 'exec-oob': outOfBand, arguments: given = {} } = value;
    if (execute !== undefined && outOfBand !== undefined) {
      throw new QmpError("QMP input member 'execute' clashes with 'exec-oob'");
    }
    const name = execute === undefined ? outOfBand : execute;
    if (name === undefined) throw new QmpError("QMP input lacks member 'execute'");
    if (typeof name !== 'string') {
      const member = execute === undefined ? 'exec-oob' : 'execute';
      throw new QmpError(`QMP input member '${member}' must be a string`);
    }
    if (!isObject(given)) throw new QmpError("QMP input member 'arguments' must be an object");
    if (!this.#negotiated && name !== 'qmp_capabilities') {
      throw new QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", 'CommandNotFound');
    }
    if (!isCommand(name)) throw new QmpError(`The command ${name} has not been found`, 'CommandNotFound');
    // No command may overtake others.
    if (outOfBand !== undefined) throw new QmpError(`The command ${name} does not support OOB`);
    if (name === 'qmp_capabilities') return this.#negotiate(given);
    const wrong = wrongArguments(name, given);
    if (wrong !== undefined) throw new QmpError(wrong);
    if (name === 'query-version') return versionOf(this.#version);
    if (name === 'query-commands') return Object.keys(COMMANDS).map((command) => ({ name: command }));
    if (name === 'query-qmp-schema') return introspect();
    // The schema has just said that these are this command's arguments.
    const handler = this.#handlers[name] as (given: Readonly<Record<string, unknown>>) => unknown;
    return await handler(given);
  }

  #negotiate(given: Readonly<Record<string, unknown>>): void {
    const wrong = wrongArguments('qmp_capabilities', given);
    if (wrong !== undefined) throw new QmpError(wrong);
    if (this.#negotiated) {
      throw new QmpError('Capabilities negotiation is already complete, command ignored', 'CommandNotFound');
    }
    const { enable } = given;
    this.#outOfBand = Array.isArray(enable) && enable.includes('oob');
    this.#negotiated = true;
  }
}
