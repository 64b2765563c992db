/**
 * Puts the simulated world beneath the production code of a thread: the atomic accesses of JavaScript and of the
 * WebAssembly kernels, and the clock. To be imported before any production module.
 */
import { ADD, ARENA, mix, NOTIFY, READ, STATES, WAIT, type World, WRITE } from './world.js';

const native = Atomics;
const NativeInstance: unknown = Reflect.get(Reflect.get(globalThis, 'WebAssembly'), 'Instance');

let world: World | undefined;
let arena: ArrayBufferLike | undefined;

/** From now on accesses to `memory` are steps of the world. */
export function connectAtomics(to: World, memory: ArrayBufferLike): void {
  world = to;
  arena = memory;
}

type Words = Int32Array | BigUint64Array | BigInt64Array;

/** The world, where the access is to the arena and a run is under way. */
function watching(words: Words): World | undefined {
  return world?.running === true && words.buffer === arena ? world : undefined;
}

function step(kind: number, words: Words, index: number): World | undefined {
  const to = watching(words);
  if (to === undefined) return undefined;
  const address = words.byteOffset + index * words.BYTES_PER_ELEMENT;
  to.step(kind, ARENA, address, address + words.BYTES_PER_ELEMENT);
  return to;
}

/** What an add returns may not be used: the explorer takes adds to commute. */
const unused = {
  [Symbol.toPrimitive](): never {
    throw new Error('the result of an atomic addition is used; the simulator takes additions to commute');
  },
};

const simulated = {
  load(words: Int32Array, index: number): number {
    const to = step(READ, words, index);
    const found = native.load(words, index);
    to?.observe(words.byteOffset + index * 4, found);
    return found;
  },
  store(words: Int32Array, index: number, value: number): number {
    step(WRITE, words, index);
    return native.store(words, index, value);
  },
  add(words: Int32Array, index: number, value: number): unknown {
    const to = step(ADD, words, index);
    const before = native.add(words, index, value);
    return to === undefined ? before : unused;
  },
  sub(words: Int32Array, index: number, value: number): unknown {
    const to = step(ADD, words, index);
    const before = native.sub(words, index, value);
    return to === undefined ? before : unused;
  },
  and(words: Int32Array, index: number, value: number): number {
    step(WRITE, words, index);
    return native.and(words, index, value);
  },
  or(words: Int32Array, index: number, value: number): number {
    step(WRITE, words, index);
    return native.or(words, index, value);
  },
  exchange(words: Int32Array, index: number, value: number): number {
    const to = step(WRITE, words, index);
    const before = native.exchange(words, index, value);
    to?.observe(words.byteOffset + index * 4, before);
    if (value === 0) to?.lockGiven(words.byteOffset + index * 4);
    else if (before === 0) to?.lockTaken(words.byteOffset + index * 4);
    return before;
  },
  compareExchange(words: Int32Array, index: number, expected: number, value: number): number {
    const to = step(WRITE, words, index);
    const found = native.compareExchange(words, index, expected, value);
    to?.observe(words.byteOffset + index * 4, found);
    if (found !== expected) to?.refine(READ);
    else if (expected === 0 && value === 1) to?.lockTaken(words.byteOffset + index * 4);
    return found;
  },
  wait(words: Int32Array, index: number, value: number, timeoutMs = Infinity): string {
    if (world?.running !== true) return native.wait(words, index, value, timeoutMs);
    if (words.buffer !== arena) return world.sleep(-1, timeoutMs) ? 'ok' : 'timed-out';
    const address = words.byteOffset + index * 4;
    world.step(WAIT, ARENA, address, address + 4);
    if (native.load(words, index) !== value) {
      world.refine(READ);
      return 'not-equal';
    }
    return world.sleep(address, timeoutMs) ? 'ok' : 'timed-out';
  },
  notify(words: Int32Array, index: number, count = Infinity): number {
    const to = watching(words);
    if (to === undefined) return native.notify(words, index, count);
    const address = words.byteOffset + index * 4;
    to.step(NOTIFY, ARENA, address, address + 4);
    return to.wake(address, count);
  },
};

Object.defineProperty(globalThis, 'Atomics', { value: simulated });

/** What an instrumented kernel calls before an atomic access; gives the address back. */
function kernelStep(address: number, offset: number, kind: number, bytes: number): number {
  if (world?.running === true && !world.exploring) {
    const at = (address >>> 0) + offset;
    world.step(kind, ARENA, at, at + bytes);
  }
  return address;
}

type Kernel = (...args: readonly number[]) => number;
type Exports = Readonly<Record<string, Kernel>>;

/** For the explorer a kernel that works on cluster states is one step on the clusters it looks at or changes. */
function wholeSteps(exports: Exports): Record<string, Kernel> {
  const call = (name: string): Kernel => exports[name] ?? (() => 0);
  const step = (kind: number, low: number, high: number): World | undefined => {
    if (world?.running !== true || !world.exploring) return undefined;
    world.step(kind, STATES, low, high);
    return world;
  };
  /** At the head of a loop: all a thread knows is what it asks for. */
  const stepOfLoop = (kind: number, low: number, high: number): World | undefined => {
    if (world?.running !== true || !world.exploring) return undefined;
    world.forgetSeen();
    world.observe(-5, mix(low, high));
    return step(kind, low, high);
  };
  const claimed = call('claimedCount');
  return {
    clusterState(states = 0, index = 0) {
      const to = step(READ, index, index + 1);
      const state = call('clusterState')(states, index);
      to?.observe(-1, state);
      return state;
    },
    clustersNextPending(states = 0, from = 0, end = 0) {
      const to = stepOfLoop(READ, from, end);
      const found = call('clustersNextPending')(states, from, end);
      to?.refine(READ, from, found < 0 ? end : found + 1);
      to?.observe(-2, found);
      return found;
    },
    clustersClaimAt(states = 0, index = 0, end = 0) {
      const to = step(WRITE, index, end);
      const count = call('clustersClaimAt')(states, index, end);
      to?.refine(count === 0 ? READ : WRITE, index, Math.min(end, index + count + 1));
      to?.observe(-3, mix(index, count));
      return count;
    },
    clustersClaimNext(states = 0, from = 0, end = 0, most = 0) {
      const to = stepOfLoop(WRITE, from, end);
      const first = call('clustersClaimNext')(states, from, end, most);
      to?.refine(first < 0 ? READ : WRITE, from, first < 0 ? end : Math.min(end, first + claimed() + 1));
      to?.observe(-4, mix(first, claimed()));
      return first;
    },
    clustersTransition(states = 0, start = 0, count = 0, before = 0, after = 0) {
      step(WRITE, start, start + count);
      return call('clustersTransition')(states, start, count, before, after);
    },
  };
}

class Instance {
  constructor(module: unknown, imports: { readonly env: object }) {
    if (typeof NativeInstance !== 'function') throw new Error('there is no WebAssembly');
    const env = { ...imports.env, step: kernelStep };
    const instance: { readonly exports: Exports } = Reflect.construct(NativeInstance, [
      module,
      { ...imports, env },
    ]);
    // biome-ignore lint/correctness/noConstructorReturn: stands in for a constructor of the platform
    return { exports: { ...instance.exports, ...wholeSteps(instance.exports) } };
  }
}
Reflect.set(Reflect.get(globalThis, 'WebAssembly'), 'Instance', Instance);

const trueTime = process.hrtime.bigint.bind(process.hrtime);
process.hrtime.bigint = () => (world?.running === true ? BigInt(Math.round(world.now * 1e6)) : trueTime());
