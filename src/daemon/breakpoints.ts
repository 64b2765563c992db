import type { BlkdebugEvent } from '../block/filters/blkdebug-events.js';
import { type BlkdebugState, BREAKPOINT } from '../block/filters/blkdebug-state.js';

interface Breakpoint {
  readonly index: number;
  readonly tag: string;
  readonly say: (text: string) => void;
  /** It was told that a request is suspended. */
  told: boolean;
}

/** The breakpoints of one blkdebug node, by their tags: several may have the same one. */
export class Breakpoints {
  readonly #state: BlkdebugState;
  /** Those that are armed or have suspended a request, the newest first. */
  #list: Breakpoint[] = [];
  #waiting: { readonly tag: string; readonly resolve: () => void }[] = [];

  constructor(state: BlkdebugState) {
    this.#state = state;
  }

  /**
   * The next request that comes to the event waits there.
   *
   * @param say takes the lines that tell of it
   * @returns false where there are too many breakpoints
   */
  set(event: BlkdebugEvent, tag: string, say: (text: string) => void): boolean {
    const index = this.#state.arm(event);
    if (index === undefined) return false;
    const breakpoint = { index, tag, say, told: false };
    this.#list.unshift(breakpoint);
    void this.#state.whileArmed(index).then(() => this.#tellAll());
    return true;
  }

  /** Removes all breakpoints of a tag, and lets the requests go on that are suspended by it. @returns whether there were any */
  remove(tag: string): boolean {
    const found = this.#list.filter((one) => one.tag === tag);
    for (const one of found) this.#release(one);
    return found.length > 0;
  }

  /** Lets the request go on that was suspended last under a tag. @returns whether there was one */
  resume(tag: string): boolean {
    const found = this.#list.find((one) => one.tag === tag && this.#isSuspended(one));
    if (found !== undefined) this.#release(found);
    return found !== undefined;
  }

  /** Resolves when a request is suspended under the tag, or nobody will be any more. */
  async suspended(tag: string): Promise<void> {
    if (this.#list.some((one) => one.tag === tag && one.told)) return;
    await new Promise<void>((resolve) => this.#waiting.push({ tag, resolve }));
  }

  /** Lets everybody go on. */
  release(): void {
    for (const one of [...this.#list]) if (this.#isSuspended(one)) this.#release(one);
  }

  /** Lets everybody go on, and suspends nobody any more. */
  close(): void {
    this.#state.close();
    for (const one of [...this.#list]) this.#release(one);
    for (const { resolve } of this.#waiting) resolve();
    this.#waiting = [];
  }

  #isSuspended({ index }: Breakpoint): boolean {
    return this.#state.statusOf(index) === BREAKPOINT.suspended;
  }

  /** A request that several breakpoints suspend is told of by all of them, the newest first. */
  #tellAll(): void {
    for (const one of this.#list) if (this.#isSuspended(one)) this.#tell(one);
  }

  #tell(one: Breakpoint): void {
    if (one.told) return;
    one.told = true;
    one.say(`blkdebug: Suspended request '${one.tag}'\n`);
    const [woken, others] = [true, false].map((mine) =>
      this.#waiting.filter(({ tag }) => (tag === one.tag) === mine),
    );
    this.#waiting = others ?? [];
    for (const { resolve } of woken ?? []) resolve();
  }

  #release(one: Breakpoint): void {
    if (this.#isSuspended(one)) {
      this.#tell(one);
      one.say(`blkdebug: Resuming request '${one.tag}'\n`);
    }
    this.#list = this.#list.filter((other) => other !== one);
    this.#state.release(one.index);
  }
}
