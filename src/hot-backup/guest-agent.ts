import { randomInt } from 'node:crypto';
import { connect, type Socket } from 'node:net';
import { StillframeError, systemError } from '../errors.js';
import { isObject, type JsonObject } from '../qmp/types.js';

/** What the agent begins an answer with that follows something it could not make sense of. */
const SENTINEL = 0xff;
const NEWLINE = 0x0a;
/** Bytes of an answer that are kept while its end has not come. */
const MAX_LINE_BYTES = 1 << 20;

/** A connection to the QEMU guest agent, which freezes the guest's file systems for the moment of an instant. */
export class GuestAgent {
  readonly #path: string;
  readonly #socket: Socket;
  readonly #timeoutMs: number;
  readonly #answers = new Set<(answer: JsonObject | StillframeError) => void>();
  #input = Buffer.alloc(0);
  #failure: StillframeError | undefined;

  private constructor(path: string, socket: Socket, timeoutMs: number) {
    this.#path = path;
    this.#socket = socket;
    this.#timeoutMs = timeoutMs;
    socket.on('data', (data) => this.#take(data));
    socket.on('error', (error) => this.#fail(`the connection broke: ${error.message}`));
    socket.on('close', () => this.#fail('the connection was closed'));
  }

  /**
   * Connects and makes sure that somebody answers.
   *
   * @param path of the unix socket
   * @param timeoutMs how long one answer may take
   * @throws StillframeError ERR_STILLFRAME_GUEST_AGENT, …_NOT_FOUND, …_PERMISSION, …_IO
   */
  static async connect(path: string, timeoutMs: number, signal?: AbortSignal): Promise<GuestAgent> {
    const socket = connect(path);
    try {
      await new Promise<void>((resolve, reject) => {
        socket.once('connect', resolve);
        socket.once('error', reject);
      });
    } catch (error) {
      throw systemError(`cannot connect to the socket of the guest agent '${path}'`, error);
    }
    const agent = new GuestAgent(path, socket, timeoutMs);
    try {
      await agent.#synchronize(signal);
      return agent;
    } catch (error) {
      agent.close();
      throw error;
    }
  }

  /**
   * Runs `body` while the guest's file systems are frozen. They are thawed again whatever happens.
   *
   * @param signal ends the wait for the guest to freeze; thawing it is never cut short
   * @throws StillframeError ERR_STILLFRAME_GUEST_AGENT where they were not frozen all the time, or cannot be thawed
   */
  async whileFrozen<T>(body: () => Promise<T>, signal?: AbortSignal): Promise<T> {
    let result: T;
    try {
      await this.#execute('guest-fsfreeze-freeze', signal);
      result = await body();
      // A guest may not stay frozen for as long as it is told to.
      if (!(await this.isFrozen())) throw this.#error('the guest thawed before the instant was taken');
    } catch (error) {
      await this.#thawSurely(error);
      throw error;
    }
    await this.#thawSurely(undefined);
    return result;
  }

  async isFrozen(): Promise<boolean> {
    return (await this.#execute('guest-fsfreeze-status')) === 'frozen';
  }

  /** @throws StillframeError ERR_STILLFRAME_GUEST_AGENT */
  async thaw(): Promise<void> {
    // An answer that came too late is not to be taken for the one to this.
    await this.#synchronize();
    await this.#execute('guest-fsfreeze-thaw');
  }

  /** Thaws, by another connection where this one is broken. @param before what went wrong before */
  async #thawSurely(before: unknown): Promise<void> {
    try {
      await this.thaw().catch(async () => {
        const again = await GuestAgent.connect(this.#path, this.#timeoutMs);
        await again.thaw().finally(() => again.close());
      });
    } catch (error) {
      const text = (one: unknown): string => (one instanceof Error ? one.message : String(one));
      const advice = 'thaw it with guest-fsfreeze-thaw, or with fsfreeze -u in the guest';
      const earlier = before === undefined ? '' : `. Before that: ${text(before)}`;
      throw new StillframeError(
        'ERR_STILLFRAME_GUEST_AGENT',
        `the guest may be frozen still, since it could not be thawed: ${text(error)}; ${advice}${earlier}`,
        { cause: before ?? error },
      );
    }
  }

  close(): void {
    this.#failure ??= this.#error('the connection is closed');
    this.#socket.destroy();
  }

  /** Until the agent answers to this and nothing else. */
  async #synchronize(signal?: AbortSignal): Promise<void> {
    const id = randomInt(1, 2 ** 31);
    const given = { execute: 'guest-sync-delimited', arguments: { id } };
    const message = Buffer.concat([Buffer.of(SENTINEL), Buffer.from(`${JSON.stringify(given)}\n`)]);
    await this.#ask('guest-sync-delimited', message, (answer) => answer['return'] === id, signal);
  }

  async #execute(command: string, signal?: AbortSignal): Promise<unknown> {
    const message = Buffer.from(`${JSON.stringify({ execute: command })}\n`);
    const { error, return: value } = await this.#ask(command, message, () => true, signal);
    if (error === undefined) return value;
    throw new StillframeError(
      'ERR_STILLFRAME_GUEST_AGENT',
      `guest agent command '${command}': ${isObject(error) ? String(error['desc']) : String(error)}`,
      { qmpClass: isObject(error) ? String(error['class']) : undefined },
    );
  }

  #ask(
    command: string,
    message: Uint8Array,
    isAnswer: (answer: JsonObject) => boolean,
    signal: AbortSignal | undefined,
  ): Promise<JsonObject> {
    const abort = new AbortController();
    return new Promise<JsonObject>((resolve, reject) => {
      if (this.#failure !== undefined) throw this.#failure;
      signal?.throwIfAborted();
      const take = (answer: JsonObject | StillframeError): void => {
        if (answer instanceof StillframeError) reject(answer);
        else if (isAnswer(answer)) resolve(answer);
      };
      this.#answers.add(take);
      signal?.addEventListener('abort', () => reject(signal.reason), { signal: abort.signal });
      const seconds = this.#timeoutMs / 1000;
      const timer = setTimeout(() => {
        const advice = 'is qemu-guest-agent running in the guest, and has nobody else this socket?';
        reject(this.#error(`no answer to '${command}' within ${seconds} s; ${advice}`));
      }, this.#timeoutMs);
      abort.signal.addEventListener('abort', () => {
        clearTimeout(timer);
        this.#answers.delete(take);
      });
      this.#socket.write(message);
    }).finally(() => abort.abort());
  }

  #take(data: Buffer): void {
    this.#input = Buffer.concat([this.#input, data]);
    for (;;) {
      const end = this.#input.indexOf(NEWLINE);
      if (end < 0) break;
      const line = this.#input.subarray(0, end);
      this.#input = this.#input.subarray(end + 1);
      this.#answer(line.subarray(line.lastIndexOf(SENTINEL) + 1).toString('utf8'));
    }
    if (this.#input.length > MAX_LINE_BYTES) this.#fail('it sends what no guest agent does');
  }

  #answer(text: string): void {
    let answer: unknown;
    try {
      answer = JSON.parse(text);
    } catch {
      // The rest of an answer to somebody who had the socket before.
      return;
    }
    if (isObject(answer)) for (const take of [...this.#answers]) take(answer);
  }

  #fail(what: string): void {
    if (this.#failure !== undefined) return;
    this.#failure = this.#error(what);
    this.#socket.destroy();
    for (const take of [...this.#answers]) take(this.#failure);
  }

  #error(what: string): StillframeError {
    return new StillframeError('ERR_STILLFRAME_GUEST_AGENT', `guest agent at '${this.#path}': ${what}`);
  }
}
