/** What comes in on a monitor: JSON values one after the other, with nothing in particular between them. */

/** Bytes of one value that are kept while its end has not come. */
const MAX_VALUE_LENGTH = 1 << 20;
const MAX_NESTING = 1024;

/** A value, or why there is none. */
export type Input = { readonly value: unknown } | { readonly error: string };

/**
 * Takes a stream apart into JSON values. Strings may be in single quotes as well, as QEMU has it. Input that is no JSON is
 * told of once, and what follows is read on.
 */
export class InputReader {
  #text = '';
  /** Where the value under way has been looked at up to. */
  #at = 0;
  #closers: string[] = [];
  #quote = '';

  *push(chunk: string): Generator<Input, void, undefined> {
    this.#text += chunk;
    for (;;) {
      const end = this.#end();
      if (end === undefined) break;
      const text = this.#text.slice(0, end);
      const tooDeep = this.#closers.length > MAX_NESTING;
      this.#reset(end);
      yield tooDeep ? { error: 'JSON nesting depth limit exceeded' } : parse(text);
    }
    if (this.#text.length > MAX_VALUE_LENGTH) {
      this.#reset(this.#text.length);
      yield { error: 'JSON token size limit exceeded' };
    }
  }

  #reset(end: number): void {
    this.#text = this.#text.slice(end);
    this.#at = 0;
    this.#closers = [];
    this.#quote = '';
  }

  /** The end of the first value, of what is wrong, or undefined where it has not come. */
  #end(): number | undefined {
    if (this.#at === 0) this.#text = this.#text.trimStart();
    for (; this.#at < this.#text.length; this.#at++) {
      const character = this.#text.charAt(this.#at);
      if (this.#quote !== '') {
        // No string has these, so that one whose end is missing does not swallow the commands behind it.
        if (character < ' ') return this.#at + 1;
        if (character === '\\') this.#at++;
        else if (character === this.#quote) {
          this.#quote = '';
          if (this.#closers.length === 0) return this.#at + 1;
        }
        continue;
      }
      // What no value has outside of strings puts an end to one: so a client gets back into step.
      if (character < ' ' && !/\s/.test(character)) return this.#at + 1;
      const outermost = this.#closers.length === 0;
      if (character === '"' || character === "'") {
        if (outermost && this.#at > 0) return this.#at;
        this.#quote = character;
      } else if (character === '{' || character === '[') {
        if (outermost && this.#at > 0) return this.#at;
        this.#closers.push(character === '{' ? '}' : ']');
        if (this.#closers.length > MAX_NESTING) return this.#at + 1;
      } else if (character === '}' || character === ']') {
        if (this.#closers.pop() !== character || outermost || this.#closers.length === 0) return this.#at + 1;
      } else if (outermost && /\s/.test(character)) return this.#at;
    }
    return undefined;
  }
}

const KEYWORDS = new Set(['true', 'false', 'null']);

function parse(text: string): Input {
  try {
    return { value: JSON.parse(text) };
  } catch {
    // Perhaps it is in single quotes.
  }
  // Strings apart from the rest.
  const pieces = text.match(/"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^"']+|["']/gs) ?? [];
  const plain = pieces.map((piece) =>
    piece.length > 1 && piece.startsWith("'") ? doubleQuoted(piece.slice(1, -1)) : piece,
  );
  try {
    return { value: JSON.parse(plain.join('')) };
  } catch {
    const words = plain.flatMap((piece) => (/^["']/.test(piece) ? [] : (piece.match(/[a-z]+/gi) ?? [])));
    const wrong = words.find((word) => !KEYWORDS.has(word));
    return {
      error: `JSON parse error, ${wrong === undefined ? 'expecting value' : `invalid keyword '${wrong}'`}`,
    };
  }
}

function doubleQuoted(content: string): string {
  return `"${content.replaceAll("\\'", "'").replaceAll(/(?<!\\)"/g, '\\"')}"`;
}
