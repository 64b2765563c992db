import { connect, type Socket } from 'node:net';
import { StringDecoder } from 'node:string_decoder';
import { StillframeError, systemError } from '../errors.js';
import { InputReader } from './input.js';
import { isObject, type JsonObject } from './types.js';

/** An event of the server, without its time. */
export interface ServerEvent {
  readonly event: string;
  readonly data: JsonObject;
}

interface Waiting {
  readonly command: string;
  readonly resolve: (value: unknown) => void;
  readonly reject: (error: StillframeError) => void;
}

/** How long a server may take for its greeting, in milliseconds. */
const GREETING_MS = 10_000;

/** A connection to the QMP socket of a QEMU, or of a daemon of ours. Commands may be sent before others are answered. */
export class QmpClient {
  readonly #socket: Socket;
  readonly #waiting: Waiting[] = [];
  readonly #listeners = new Set<(event: ServerEvent) => void>();
  readonly #onEnd = new Set<(reason: StillframeError) => void>();
  #failure: StillframeError | undefined;
  #greeted: (() => void) | undefined;

  private constructor(socket: Socket) {
    this.#socket = socket;
    const decoder = new StringDecoder('utf8');
    const reader = new InputReader();
    socket.on('data', (data) => {
      for (const input of reader.push(decoder.write(data))) {
        if ('error' in input) this.#fail(protocolError(input.error));
        else this.#take(input.value);
      }
    });
    socket.on('error', (error) => this.#fail(connectionError(`the QMP connection broke: ${error.message}`)));
    socket.on('close', () => this.#fail(connectionError('the QMP server has closed the connection')));
  }

  /**
   * Connects and negotiates.
   *
   * @param path of a unix socket
   * @throws StillframeError ERR_STILLFRAME_NOT_FOUND, …_PERMISSION, …_IO (nobody listens), …_QMP_CONNECTION (nobody
   *   answers), …_QMP (it is no QMP)
   */
  static async connect(path: string): Promise<QmpClient> {
    const socket = connect(path);
    try {
      await new Promise<void>((resolve, reject) => {
        socket.once('connect', resolve);
        socket.once('error', reject);
      });
    } catch (error) {
      throw systemError(`cannot connect to the QMP socket '${path}'`, error);
    }
    const client = new QmpClient(socket);
    try {
      await client.#greeting(path);
      await client.execute('qmp_capabilities');
    } catch (error) {
      client.close();
      throw error;
    }
    return client;
  }

  async #greeting(path: string): Promise<void> {
    let timer: NodeJS.Timeout | undefined;
    await new Promise<void>((resolve, reject) => {
      this.#greeted = resolve;
      this.#waiting.push({ command: 'the greeting', resolve: () => undefined, reject });
      timer = setTimeout(() => {
        reject(
          connectionError(
            `'${path}' does not greet as QMP does within ${GREETING_MS / 1000} s; perhaps another client has it, or it is no QMP socket`,
          ),
        );
      }, GREETING_MS);
    }).finally(() => clearTimeout(timer));
    this.#waiting.length = 0;
  }

  /**
   * Carries a command out.
   *
   * @throws StillframeError ERR_STILLFRAME_QMP with what the server says, and its class as `qmpClass`;
   *   …_QMP_CONNECTION where it has gone away
   */
  execute(command: string, given: JsonObject = {}): Promise<unknown> {
    if (this.#failure !== undefined) return Promise.reject(this.#failure);
    return new Promise((resolve, reject) => {
      this.#waiting.push({ command, resolve, reject });
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: given })}\n`);
    });
  }

  /** Calls `listener` for every event from now on. @returns what ends that */
  onEvent(listener: (event: ServerEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Calls `listener` when the server goes away, or has gone. @returns what ends that */
  onEnd(listener: (reason: StillframeError) => void): () => void {
    if (this.#failure !== undefined) listener(this.#failure);
    this.#onEnd.add(listener);
    return () => this.#onEnd.delete(listener);
  }

  close(): void {
    this.#onEnd.clear();
    this.#failure ??= connectionError('the QMP connection is closed');
    this.#socket.destroy();
  }

  #take(message: unknown): void {
    if (!isObject(message)) {
      this.#fail(protocolError('a message is no object'));
      return;
    }
    const { event, data } = message;
    if (message['QMP'] !== undefined) this.#greeted?.();
    else if (typeof event === 'string') {
      for (const listener of this.#listeners) listener({ event, data: isObject(data) ? data : {} });
    } else this.#answer(message);
  }

  #answer({ error, return: value }: JsonObject): void {
    const waiting = this.#waiting.shift();
    if (waiting === undefined) {
      this.#fail(protocolError('an answer that nothing was asked for'));
      return;
    }
    if (error === undefined) {
      waiting.resolve(value);
      return;
    }
    const [text, qmpClass] = isObject(error) ? [String(error['desc']), error['class']] : [String(error)];
    waiting.reject(
      new StillframeError('ERR_STILLFRAME_QMP', `QMP command '${waiting.command}': ${text}`, {
        qmpClass: typeof qmpClass === 'string' ? qmpClass : undefined,
      }),
    );
  }

  #fail(error: StillframeError): void {
    if (this.#failure !== undefined) return;
    this.#failure = error;
    this.#socket.destroy();
    for (const { reject } of this.#waiting.splice(0)) reject(error);
    for (const listener of this.#onEnd) listener(error);
  }
}

function protocolError(what: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_QMP', `the server does not speak QMP: ${what}`);
}

function connectionError(what: string): StillframeError {
  return new StillframeError('ERR_STILLFRAME_QMP_CONNECTION', what);
}
