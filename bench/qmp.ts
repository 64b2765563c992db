import type { Socket } from 'node:net';

/** Just enough of a QMP client to time jobs. */
export class Qmp {
  readonly #socket: Socket;
  readonly #waiting: {
    want: (message: Record<string, unknown>) => boolean;
    resolve: (m: Record<string, unknown>) => void;
  }[] = [];
  #rest = '';

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on('data', (data) => {
      this.#rest += String(data);
      const lines = this.#rest.split('\n');
      this.#rest = lines.pop() ?? '';
      for (const line of lines) {
        const message: Record<string, unknown> = JSON.parse(line);
        const index = this.#waiting.findIndex(({ want }) => want(message));
        if (index >= 0) this.#waiting.splice(index, 1)[0]?.resolve(message);
      }
    });
  }

  wait(want: (message: Record<string, unknown>) => boolean): Promise<Record<string, unknown>> {
    return new Promise((resolve) => this.#waiting.push({ want, resolve }));
  }

  async command(execute: string, parameters: Record<string, unknown> = {}): Promise<void> {
    const reply = this.wait((message) => 'return' in message || 'error' in message);
    this.#socket.write(JSON.stringify({ execute, arguments: parameters }));
    const message = await reply;
    if ('error' in message) throw new Error(`${execute}: ${JSON.stringify(message['error'])}`);
  }
}
