import { StillframeError } from '../errors.js';
import { createEngine, type MapBatch, type MapEntry } from '../index.js';
import {
  ALLOW_BACKING,
  type Command,
  FORCE_SHARE,
  FORMAT,
  OUTPUT,
  OUTPUTS,
  parseSnapshot,
  SNAPSHOT,
} from './command.js';
import { howToOpen, IMAGE_NAMES, namedImage } from './image-names.js';
import { printable } from './units.js';

/**
 * Writes qemu-img's JSON map. A fragmented image has millions of lines, so their digits are put into a buffer one by one:
 * numbers of this size are slow to make strings of.
 */
class JsonLines {
  #bytes = Buffer.alloc(0);
  #used = 0;
  #lines = 0;
  /** What follows an extent's length, and what its offset, by its kind. */
  readonly #middles = new Map<number, Buffer>();

  lines(batch: MapBatch): Buffer {
    this.#bytes = Buffer.allocUnsafe(batch.size * LONGEST_LINE);
    this.#used = 0;
    for (let index = 0; index < batch.size; index++) {
      this.#text(this.#lines++ === 0 ? FIRST : NEXT);
      this.#number(batch.startOf(index));
      this.#text(LENGTH);
      this.#number(batch.lengthOf(index));
      const offset = batch.offsetOf(index);
      this.#text(this.#middle(batch, index, offset < 0));
      if (offset < 0) continue;
      this.#number(offset);
      this.#text(END);
    }
    return this.#bytes.subarray(0, this.#used);
  }

  end(): string {
    return this.#lines === 0 ? '[]\n' : ']\n';
  }

  #middle(batch: MapBatch, index: number, ends: boolean): Buffer {
    const key = batch.kindOf(index) * 2 + (ends ? 1 : 0);
    let middle = this.#middles.get(key);
    if (middle === undefined) {
      const { depth, present, zero, data } = batch.entry(index);
      const flags = `, "depth": ${depth}, "present": ${present}, "zero": ${zero}, "data": ${data}`;
      middle = Buffer.from(ends ? `${flags}}` : `${flags}, "offset": `);
      this.#middles.set(key, middle);
    }
    return middle;
  }

  #text(text: Buffer): void {
    for (let at = 0; at < text.length; at++) this.#bytes[this.#used + at] = text[at] ?? 0;
    this.#used += text.length;
  }

  /** @param value an integer from 0 to 2^53 */
  #number(value: number): void {
    let high = Math.floor(value / 1e8);
    let low = value - high * 1e8;
    let digits = 1;
    for (let more = value; more >= 10; more /= 10) digits++;
    const end = this.#used + digits;
    let at = end;
    for (let count = Math.min(digits, 8); count > 0; count--) {
      const rest = Math.floor(low / 10);
      this.#bytes[--at] = 48 + low - rest * 10;
      low = rest;
    }
    while (at > this.#used) {
      const rest = Math.floor(high / 10);
      this.#bytes[--at] = 48 + high - rest * 10;
      high = rest;
    }
    this.#used = end;
  }
}

const FIRST = Buffer.from('[{ "start": ');
const NEXT = Buffer.from(',\n{ "start": ');
const LENGTH = Buffer.from(', "length": ');
const END = Buffer.from('}');
/** Bytes: three numbers of 16 digits, and the words. */
const LONGEST_LINE = 192;

function humanLine(entry: MapEntry): string | undefined {
  if (!entry.data || entry.zero) return undefined;
  if (entry.offset === undefined) {
    throw new StillframeError(
      'ERR_STILLFRAME_UNSUPPORTED_FEATURE',
      'the image has compressed clusters, which have no place to print; use --output json',
    );
  }
  const hex = (value: number): string => (value === 0 ? '0' : `0x${value.toString(16)}`);
  return `${hex(entry.start).padEnd(16)}${hex(entry.length).padEnd(16)}${hex(entry.offset).padEnd(16)}${printable(entry.filename ?? '')}`;
}

export const map: Command = {
  name: 'map',
  usage: '[options] FILE',
  summary: 'Lists the extents of an image and its backing chain.',
  positionals: [1, 1],
  options: [
    FORMAT,
    { long: 'start-offset', short: 's', value: 'SIZE', help: 'where to begin (0)' },
    { long: 'max-length', short: 'l', value: 'SIZE', help: 'how much to map (to the end)' },
    SNAPSHOT,
    ALLOW_BACKING,
    FORCE_SHARE,
    ...IMAGE_NAMES,
    OUTPUT,
  ],
  run: async (args) => {
    const json = args.choice('output', OUTPUTS, 'human') === 'json';
    const engine = await createEngine({ workers: 1 });
    let failure: unknown;
    const lines = new JsonLines();
    try {
      // Printed once the image is open, with what is found first.
      let heading = json ? '' : 'Offset          Length          Mapped to       File\n';
      const print = (batch: MapBatch): void => {
        if (failure !== undefined) return;
        try {
          if (json) {
            process.stdout.write(lines.lines(batch));
            return;
          }
          process.stdout.write(heading);
          heading = '';
          const printed: string[] = [];
          for (const entry of batch) {
            const line = humanLine(entry);
            if (line !== undefined) printed.push(`${line}\n`);
          }
          process.stdout.write(printed.join(''));
        } catch (error) {
          failure = error;
        }
      };
      const named = await namedImage(engine, args, args.positionals[0] ?? '');
      await engine.mapImage(named.path, print, {
        ...howToOpen(named, args),
        start: args.size('start-offset'),
        length: args.size('max-length'),
        snapshot: parseSnapshot(args.text('snapshot')),
      });
      if (failure !== undefined) throw failure;
      process.stdout.write(heading);
      if (json) process.stdout.write(lines.end());
      return 0;
    } finally {
      await engine.close();
    }
  },
};
