import { MessageChannel, type MessagePort, receiveMessageOnPort } from 'node:worker_threads';
import type { Disk, DiskDescriptor } from '../block/disk.js';
import { StillframeError } from '../errors.js';
import type { Engine } from './engine.js';
import type { Answer, Task } from './tasks.js';

/** How the host thread and the one that keeps others away talk. */
export interface SectionChannel {
  readonly port: MessagePort;
  /** Messages that the host thread has sent; it notifies. */
  readonly sent: Int32Array;
}

/** What the host thread hears: first that nobody is there any more, then an answer to each task. */
type SectionMessage = 'entered' | Answer;

/**
 * Part of a program in which nobody changes some disks, or (exclusive) uses them at all: what is below them can be
 * changed then, and several instants are one (QEMU: a drained section). Guests wait for its end.
 */
export class DrainedSection {
  readonly #channel: SectionChannel;
  readonly #host: MessagePort;
  readonly #answers: ((answer: Answer) => void)[] = [];

  private constructor() {
    const { port1, port2 } = new MessageChannel();
    this.#host = port1;
    this.#channel = { port: port2, sent: new Int32Array(new SharedArrayBuffer(4)) };
  }

  /**
   * Runs `body` in such a section.
   *
   * @param exclusive nobody reads or flushes either
   */
  static async run<T>(
    engine: Engine,
    disks: readonly DiskDescriptor[],
    exclusive: boolean,
    body: (section: DrainedSection) => Promise<T>,
  ): Promise<T> {
    const section = new DrainedSection();
    const { port, sent } = section.#channel;
    const entered = new Promise<void>((resolve) => {
      section.#host.on('message', (message: SectionMessage) => {
        if (message === 'entered') resolve();
        else section.#answers.shift()?.(message);
      });
    });
    const held = engine.run<void>({ kind: 'hold', disks, exclusive, channel: { port, sent } }, [port]);
    try {
      await Promise.race([entered, held]);
      return await body(section);
    } finally {
      section.#send('end');
      try {
        await held;
      } finally {
        section.#host.close();
      }
    }
  }

  /** Carries a task out within the section, on the thread that keeps others away. */
  async run<T>(task: Task): Promise<T> {
    const answer = await new Promise<Answer>((resolve) => {
      this.#answers.push(resolve);
      this.#send(task);
    });
    if ('error' in answer) throw StillframeError.fromPlain(answer.error);
    // The task's kind fixes the type of its value; it crossed a thread as plain data.
    return answer.value as T;
  }

  #send(message: Task | 'end'): void {
    this.#host.postMessage(message);
    Atomics.add(this.#channel.sent, 0, 1);
    Atomics.notify(this.#channel.sent, 0);
  }
}

/** Keeps others away from disks and carries out what the host thread says, until it says that it is over. */
export function holdDisks(
  disks: readonly Disk[],
  exclusive: boolean,
  { port, sent }: SectionChannel,
  carryOut: (task: Task) => Answer,
): void {
  const enter = (left: readonly Disk[]): void => {
    const [disk, ...rest] = left;
    if (disk !== undefined) {
      if (exclusive) disk.exclusive(() => enter(rest));
      else disk.drained(() => enter(rest));
      return;
    }
    port.postMessage('entered' satisfies SectionMessage);
    for (let taken = 0; ; taken++) {
      while (Atomics.load(sent, 0) === taken) Atomics.wait(sent, 0, taken);
      const task: Task | 'end' = receiveMessageOnPort(port)?.message;
      if (task === 'end') return;
      port.postMessage(carryOut(task) satisfies SectionMessage);
    }
  };
  try {
    enter(disks);
  } finally {
    port.close();
  }
}
