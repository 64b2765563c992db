import { connect, type Socket } from 'node:net';

export type Message = Readonly<Record<string, unknown>>;

/** A client that keeps everything it is told. */
export class QmpClient {
  readonly messages: Message[] = [];
  readonly #socket: Socket;
  #text = '';

  constructor(socket: Socket) {
    this.#socket = socket;
    this.#socket.on('data', (data) => {
      const lines = (this.#text + String(data)).split('\r\n');
      this.#text = lines.pop() ?? '';
      for (const line of lines) this.messages.push(JSON.parse(line));
    });
  }

  /** Waits until somebody listens there, and for the greeting. @param gone nobody will listen there any more */
  static async connect(path: string, gone: () => unknown = () => undefined): Promise<QmpClient> {
    // The socket has its name before anybody listens.
    let socket: Socket | undefined;
    while (socket === undefined) {
      const why = gone();
      if (why !== undefined) throw new Error(`nobody listens at ${path}: ${String(why)}`);
      socket = await new Promise<Socket | undefined>((resolve) => {
        const made = connect(path);
        made.once('connect', () => resolve(made));
        made.once('error', () => setTimeout(resolve, 5, undefined));
      });
    }
    const made = new QmpClient(socket);
    while (made.messages.length === 0) await new Promise((resolve) => setTimeout(resolve, 2));
    return made;
  }

  /** Sends a line, and waits for the answer to it. */
  async send(line: string): Promise<Message> {
    const answers = (): Message[] => this.messages.filter((one) => 'return' in one || 'error' in one);
    const before = answers().length;
    this.#socket.write(`${line}\n`);
    for (;;) {
      const answer = answers()[before];
      if (answer !== undefined) return answer;
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  }

  async execute(command: string, given?: Message): Promise<unknown> {
    const answer = await this.send(JSON.stringify({ execute: command, arguments: given }));
    if ('error' in answer) throw new Error(JSON.stringify(answer['error']));
    return answer['return'];
  }

  /** Waits for an event (with `data` like that). */
  async event(name: string, data: Message = {}): Promise<Message> {
    for (;;) {
      const found = this.messages.find(({ event, data: told }) => {
        const same = Object.entries(data).every(
          ([key, value]) => (told as Message | undefined)?.[key] === value,
        );
        return event === name && same;
      });
      if (found !== undefined) return found['data'] as Message;
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  }

  /** Everything since a moment, without what differs from run to run. */
  since(count: number): Message[] {
    return this.messages.slice(count).map(({ timestamp: _, ...message }) => message);
  }

  /** Forgets what it was told so far. */
  forget(): void {
    this.messages.splice(0);
  }

  close(): void {
    this.#socket.destroy();
  }
}
