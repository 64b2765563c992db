/** Lines that are handed on; a file made to have endless errors must not flood whoever reads them. */
const MOST_LINES = 2 ** 20;

/** What a check has found so far, and where its lines go. */
export class Report {
  corruptions = 0;
  leaks = 0;
  corruptionsFixed = 0;
  leaksFixed = 0;
  /** Things that could not be looked at or written. */
  errors = 0;
  readonly #onMessage: (line: string) => void;
  #lines = 0;

  constructor(onMessage: (line: string) => void) {
    this.#onMessage = onMessage;
  }

  say(line: string): void {
    this.#lines++;
    if (this.#lines < MOST_LINES) this.#onMessage(line);
    else if (this.#lines === MOST_LINES) this.#onMessage('Further messages are left out');
  }

  corrupt(line: string): void {
    this.corruptions++;
    this.say(line);
  }

  /** Something wrong that is put right in the same breath. */
  fixed(line: string): void {
    this.corruptionsFixed++;
    this.say(line);
  }
}

/** `%lx` */
export function hex(value: number | bigint): string {
  return value.toString(16);
}

/** `%#lx`, which has no prefix for zero. */
export function prefixedHex(value: number | bigint): string {
  return `${BigInt(value) === 0n ? '' : '0x'}${value.toString(16)}`;
}
