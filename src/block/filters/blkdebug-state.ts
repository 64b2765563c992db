import type { Arena } from '../../kernels/arena.js';
import { load, waitWhile, withLock } from '../../kernels/futex.js';
import type { BlkdebugEvent } from './blkdebug-events.js';
import { BLKDEBUG_EVENTS } from './blkdebug-events.js';

export type IoType = 'read' | 'write' | 'write-zeroes' | 'discard' | 'flush' | 'block-status';

/** What happens at an event (QAPI `BlkdebugInjectErrorOptions`, `BlkdebugSetStateOptions`). */
export type BlkdebugRule =
  | {
      readonly kind: 'inject-error';
      readonly event: BlkdebugEvent;
      /** Only in this state; 0: in any. */
      readonly state: number;
      /** Undefined: all but `block-status`. */
      readonly iotype: IoType | undefined;
      /** Number of the error. 0: the request goes on, and so does every other one that the rule is for. */
      readonly errno: number;
      /** Only requests that touch the byte; undefined: all. */
      readonly offset: number | undefined;
      readonly once: boolean;
    }
  | {
      readonly kind: 'set-state';
      readonly event: BlkdebugEvent;
      readonly state: number;
      readonly newState: number;
    };

/** Breakpoints that one node can have at once. */
export const MAX_BREAKPOINTS = 64;

/**
 * Status of a breakpoint. A request that meets an armed one is suspended by it; that uses the breakpoint up.
 *
 *     free → armed → suspended → resumed → free
 *              ↓ removed
 *             free
 */
export const BREAKPOINT = { free: 0, armed: 1, suspended: 2, resumed: 3 } as const;

// In the arena, words of int32: the lock, the numbers below, for each rule whether it is gone and whether it waits for a
// request, then for each breakpoint its status and the number of its event.
const STATE = 1;
/** Breakpoints that are armed. */
const ARMED = 2;
/** Nobody is suspended any more. */
const CLOSING = 3;
/** Changes so far, and those that the last flush of this node, and of the one on top, had seen. */
const CHANGES = 4;
const FLUSHED = 5;
const FLUSHED_ABOVE = 6;
const RMW_LOCK = 7;
const RULES = 8;
const RULE_WORDS = 2;
const BREAKPOINT_WORDS = 2;

const EVENT_NUMBERS = new Map<string, number>(BLKDEBUG_EVENTS.map((name, number) => [name, number]));

export function blkdebugBytes(rules: number): number {
  return (RULES + rules * RULE_WORDS + MAX_BREAKPOINTS * BREAKPOINT_WORDS) * 4;
}

/** What all threads know of one blkdebug node. */
export class BlkdebugState {
  readonly #arena: Arena;
  readonly #rules: readonly BlkdebugRule[];
  readonly #pointer: number;
  /** Index of the first word. */
  readonly #first: number;

  /** @param pointer to {@link blkdebugBytes} zeroed bytes */
  constructor(arena: Arena, pointer: number, rules: readonly BlkdebugRule[]) {
    this.#arena = arena;
    this.#rules = rules;
    this.#pointer = pointer;
    this.#first = pointer >> 2;
  }

  /** Once, when the node is opened. */
  initialise(): void {
    this.#set(STATE, 1);
    this.event('none');
  }

  /**
   * Carries out what is to happen at an event: the state is set, and errors wait for the next requests. Those that
   * waited from an earlier event do so no more where this one has errors of its own. Breakpoints suspend the thread.
   */
  event(name: BlkdebugEvent): void {
    const armed = this.#get(ARMED) > 0;
    if (!armed && this.#rules.length === 0) return;
    const met = withLock(this.#arena, this.#pointer, () => {
      this.#applyRules(name);
      return armed ? this.#suspendAt(EVENT_NUMBERS.get(name) ?? -1) : [];
    });
    for (const index of met) this.#waitAt(index);
  }

  #applyRules(name: BlkdebugEvent): void {
    const state = this.#get(STATE);
    let next: number | undefined;
    let injected = false;
    this.#rules.forEach((rule, index) => {
      if (rule.event !== name || this.#get(this.#gone(index)) !== 0) return;
      if (rule.state !== 0 && rule.state !== state) return;
      if (rule.kind === 'set-state') {
        // Of several it is the first that counts.
        next ??= rule.newState;
        return;
      }
      if (!injected)
        for (let other = 0; other < this.#rules.length; other++) this.#set(this.#waits(other), 0);
      injected = true;
      this.#set(this.#waits(index), 1);
    });
    if (next !== undefined) this.#set(STATE, next);
  }

  /** Numbers of the breakpoints that suspend the caller. Under the lock. */
  #suspendAt(event: number): number[] {
    const met: number[] = [];
    if (this.#get(CLOSING) !== 0) return met;
    for (let index = 0; index < MAX_BREAKPOINTS; index++) {
      const at = this.#breakpoint(index);
      if (this.#get(at) !== BREAKPOINT.armed || this.#get(at + 1) !== event) continue;
      this.#set(at, BREAKPOINT.suspended);
      this.#add(ARMED, -1);
      met.push(index);
    }
    // Whoever is woken sees all of them.
    for (const index of met) Atomics.notify(this.#arena.i32, this.#first + this.#breakpoint(index));
    return met;
  }

  #waitAt(index: number): void {
    const pointer = this.#pointer + this.#breakpoint(index) * 4;
    while (load(this.#arena, pointer) === BREAKPOINT.suspended) {
      waitWhile(this.#arena, pointer, BREAKPOINT.suspended);
    }
    this.#set(this.#breakpoint(index), BREAKPOINT.free);
  }

  /**
   * The error that a request meets, if any: of the first of those that wait which is for it.
   *
   * @returns number of the error, 0 none
   */
  strike(type: IoType, offset: number, length: number): number {
    if (this.#rules.length === 0) return 0;
    return withLock(this.#arena, this.#pointer, () => {
      for (const [index, rule] of this.#rules.entries()) {
        if (rule.kind !== 'inject-error' || this.#get(this.#waits(index)) === 0) continue;
        const { iotype, offset: at } = rule;
        if (iotype === undefined ? type === 'block-status' : iotype !== type) continue;
        if (at !== undefined && (at < offset || at >= offset + length)) continue;
        if (rule.errno !== 0 && rule.once) {
          this.#set(this.#waits(index), 0);
          this.#set(this.#gone(index), 1);
        }
        return rule.errno;
      }
      return 0;
    });
  }

  /** Something was, or may have been, written. */
  changed(): void {
    this.#add(CHANGES, 1);
  }

  /** Changes so far, where the last flush did not see all of them; to be given to {@link flushed}. */
  get unflushed(): number | undefined {
    const changes = this.#get(CHANGES);
    return changes === this.#get(FLUSHED) ? undefined : changes;
  }

  flushed(changes: number): void {
    this.#set(FLUSHED, changes);
  }

  /** Whether anything was written since this was asked last. */
  takeChangesAbove(): boolean {
    const changes = this.#get(CHANGES);
    if (changes === this.#get(FLUSHED_ABOVE)) return false;
    this.#set(FLUSHED_ABOVE, changes);
    return true;
  }

  /** Runs `body` while nobody else reads, changes and writes a block. */
  exclusively(body: () => void): void {
    withLock(this.#arena, this.#pointer + RMW_LOCK * 4, body);
  }

  // ---- For the host thread ------------------------------------------------------------------------------------

  /** Arms a breakpoint. @returns its number; undefined where there are too many */
  arm(event: BlkdebugEvent): number | undefined {
    return withLock(this.#arena, this.#pointer, () => {
      for (let index = 0; index < MAX_BREAKPOINTS; index++) {
        const at = this.#breakpoint(index);
        if (this.#get(at) !== BREAKPOINT.free) continue;
        this.#set(at + 1, EVENT_NUMBERS.get(event) ?? -1);
        this.#set(at, BREAKPOINT.armed);
        this.#add(ARMED, 1);
        return index;
      }
      return undefined;
    });
  }

  statusOf(index: number): number {
    return this.#get(this.#breakpoint(index));
  }

  /** Moves a breakpoint on: an armed one is free then, and a suspended request goes on. */
  release(index: number): void {
    const at = this.#breakpoint(index);
    withLock(this.#arena, this.#pointer, () => {
      const status = this.#get(at);
      if (status === BREAKPOINT.armed) {
        this.#set(at, BREAKPOINT.free);
        this.#add(ARMED, -1);
      } else if (status === BREAKPOINT.suspended) this.#set(at, BREAKPOINT.resumed);
    });
    Atomics.notify(this.#arena.i32, this.#first + at);
  }

  /** Resolves when a breakpoint is not armed any more. */
  async whileArmed(index: number): Promise<void> {
    const word = this.#first + this.#breakpoint(index);
    while (Atomics.load(this.#arena.i32, word) === BREAKPOINT.armed) {
      await Atomics.waitAsync(this.#arena.i32, word, BREAKPOINT.armed).value;
    }
  }

  /** Nobody is suspended from now on. */
  close(): void {
    withLock(this.#arena, this.#pointer, () => this.#set(CLOSING, 1));
  }

  #gone(rule: number): number {
    return RULES + rule * RULE_WORDS;
  }

  #waits(rule: number): number {
    return RULES + rule * RULE_WORDS + 1;
  }

  #breakpoint(index: number): number {
    return RULES + this.#rules.length * RULE_WORDS + index * BREAKPOINT_WORDS;
  }

  #get(word: number): number {
    return Atomics.load(this.#arena.i32, this.#first + word);
  }

  #set(word: number, value: number): void {
    Atomics.store(this.#arena.i32, this.#first + word, value);
  }

  #add(word: number, value: number): void {
    Atomics.add(this.#arena.i32, this.#first + word, value);
  }
}
