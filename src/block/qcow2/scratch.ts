import type { Arena } from '../../kernels/arena.js';
import { SCRATCH_MASK, type State } from './state.js';

/** The pool of scratch buffers of an image. A thread takes one at a time and holds no lock while it waits. */
export class ScratchPool {
  readonly #arena: Arena;
  readonly #word: number;
  readonly #all: number;
  readonly #first: number;
  readonly #bytes: number;

  constructor(state: State) {
    this.#arena = state.arena;
    this.#word = (state.control + SCRATCH_MASK) >> 2;
    this.#all = 2 ** state.get('scratchCount') - 1;
    this.#first = state.get('scratch');
    this.#bytes = state.get('scratchBytes');
  }

  /** Runs `body` with a buffer of three clusters. */
  with<T>(body: (pointer: number) => T): T {
    const index = this.#take();
    try {
      return body(this.#first + index * this.#bytes);
    } finally {
      Atomics.and(this.#arena.i32, this.#word, ~(1 << index));
      Atomics.notify(this.#arena.i32, this.#word, 1);
    }
  }

  #take(): number {
    const words = this.#arena.i32;
    for (;;) {
      const used = Atomics.load(words, this.#word);
      if (used === this.#all) {
        Atomics.wait(words, this.#word, used);
        continue;
      }
      const index = 31 - Math.clz32(~used & (used + 1));
      if (Atomics.compareExchange(words, this.#word, used, used | (1 << index)) === used) return index;
    }
  }
}
