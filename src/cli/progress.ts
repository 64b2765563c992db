import type { BackupProgress, OnProgress } from '../index.js';
import type { Arguments } from './command.js';
import { formatBytes } from './units.js';

/** One line of a terminal that is written again and again. */
export class ProgressLine {
  readonly #stream: NodeJS.WriteStream;
  #shown = 0;

  constructor(stream: NodeJS.WriteStream) {
    this.#stream = stream;
  }

  show(text: string): void {
    const columns = this.#stream.columns ?? 80;
    const line = text.length >= columns ? text.slice(0, columns - 1) : text;
    this.#stream.write(`\r${line.padEnd(this.#shown)}`);
    this.#shown = line.length;
  }

  clear(): void {
    if (this.#shown > 0) this.#stream.write(`\r${' '.repeat(this.#shown)}\r`);
    this.#shown = 0;
  }

  /** Leaves what is shown and goes to the next line. */
  end(): void {
    if (this.#shown > 0) this.#stream.write('\n');
    this.#shown = 0;
  }
}

/** What a tool's `--progress` shows: the line qemu-img has. Without it, or with `--quiet`, nothing. */
export function toolProgress(line: ProgressLine, args: Arguments): OnProgress | undefined {
  if (!args.flag('progress') || args.flag('quiet')) return undefined;
  return ({ done, total }) =>
    line.show(`    (${(total === 0 ? 100 : (done / total) * 100).toFixed(2)}/100%)`);
}

const EIGHTHS = ['', '▏', '▎', '▍', '▌', '▋', '▊', '▉'] as const;
const PLAIN_MS = 10_000;

/** A bar of `width` columns; `fraction` is from 0 to 1. */
export function bar(fraction: number, width: number): string {
  const eighths = Math.round(Math.min(1, Math.max(0, fraction)) * width * 8);
  const whole = '█'.repeat(Math.floor(eighths / 8));
  return `▕${(whole + (EIGHTHS[eighths % 8] ?? '')).padEnd(width)}▏`;
}

function fractionOf({ offset, length, status }: BackupProgress): number {
  if (length === 0) return status === 'concluded' || status === 'null' ? 1 : 0;
  return Math.min(1, offset / length);
}

function duration(seconds: number): string {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

/** The facts of one moment, most important first; those that do not fit `columns` are left out. */
export function describe(progress: BackupProgress, columns: number): string {
  const fraction = fractionOf(progress);
  const { clusters, bytes, offset, length, elapsedMs } = progress;
  const perSecond = elapsedMs > 0 ? (offset / elapsedMs) * 1000 : 0;
  const eta = perSecond > 0 && fraction < 1 ? duration((length - offset) / perSecond) : undefined;
  const done = clusters.copied + clusters.zero;
  const parts = [
    `${Math.floor(fraction * 100)} %`,
    `${formatBytes(offset)} of ${formatBytes(length)}`,
    `${formatBytes(elapsedMs > 0 ? (bytes.read / elapsedMs) * 1000 : 0)}/s`,
    eta === undefined ? undefined : `ETA ${eta}`,
    progress.status === 'paused' ? 'paused' : undefined,
    `cbw ${clusters.cbw}`,
    done > 0 ? `zero ${Math.round((clusters.zero / done) * 100)} %` : undefined,
  ].filter((part) => part !== undefined);
  let text = parts.shift() ?? '';
  for (const part of parts) {
    if (text.length + 2 + part.length > columns) break;
    text += `  ${part}`;
  }
  return text;
}

export type ProgressStyle = 'auto' | 'bar' | 'plain' | 'json' | 'none';
export const PROGRESS_STYLES = ['auto', 'bar', 'plain', 'json', 'none'] as const;

/** Shows a job's progress on stderr until it is over. */
export async function showProgress(
  states: AsyncIterable<BackupProgress>,
  style: ProgressStyle,
  stream: NodeJS.WriteStream = process.stderr,
): Promise<void> {
  const chosen = style === 'auto' ? (stream.isTTY ? 'bar' : 'plain') : style;
  if (chosen === 'none') return;
  const line = new ProgressLine(stream);
  let last: BackupProgress | undefined;
  let printedAt = performance.now();
  let printed = false;
  for await (const state of states) {
    last = state;
    if (chosen === 'json') {
      stream.write(`${JSON.stringify({ type: 'progress', ...state })}\n`);
    } else if (chosen === 'bar') {
      const columns = stream.columns ?? 80;
      const width = Math.min(40, Math.max(0, columns - 45));
      const shape = width >= 8 ? `${bar(fractionOf(state), width)} ` : '';
      line.show(shape + describe(state, columns - shape.length - 1));
    } else if (performance.now() - printedAt >= PLAIN_MS) {
      printedAt = performance.now();
      printed = true;
      stream.write(`${describe(state, 200)}\n`);
    }
  }
  line.end();
  // Short jobs need no word of progress where nobody watches.
  if (chosen === 'plain' && printed && last !== undefined) stream.write(`${describe(last, 200)}\n`);
}
