import type { Answered } from './guest-memory.js';

/** Nobody's request was answered for so long, though some waited, in milliseconds: the guest stands still. */
const STALL_MS = 10;

/** A time span, by `clockMs`. */
export interface Span {
  readonly from: number;
  readonly to: number;
}

/** What a guest feels: latencies in microseconds. */
export interface GuestFigures {
  readonly requests: number;
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
  readonly p999: number;
  readonly max: number;
  /** Milliseconds in which requests waited and none was answered for 10 ms and more. */
  readonly stalledMs: number;
}

/** Figures of the requests that were made within the spans. */
export function guestFigures({ starts, latencies }: Answered, spans: readonly Span[]): GuestFigures {
  const requests = [...starts]
    .map((start, index) => ({ start, end: start + (latencies[index] ?? 0) }))
    .filter(({ start }) => spans.some(({ from, to }) => start >= from && start < to));
  const sorted = Float64Array.from(requests, ({ start, end }) => (end - start) * 1000).sort();
  const at = (part: number): number =>
    sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * part))] ?? Number.NaN;
  return {
    requests: requests.length,
    p50: at(0.5),
    p90: at(0.9),
    p99: at(0.99),
    p999: at(0.999),
    max: at(1),
    stalledMs: stalledMs(requests),
  };
}

function stalledMs(requests: readonly { readonly start: number; readonly end: number }[]): number {
  const answers = requests.toSorted((one, other) => one.end - other.end);
  // When the first was made of those that are answered from here on.
  const waiting = new Float64Array(answers.length + 1).fill(Number.POSITIVE_INFINITY);
  for (let index = answers.length - 1; index >= 0; index--) {
    waiting[index] = Math.min(answers[index]?.start ?? 0, waiting[index + 1] ?? 0);
  }
  let stalled = 0;
  let before = Number.NEGATIVE_INFINITY;
  answers.forEach(({ end }, index) => {
    const gap = end - Math.max(before, waiting[index] ?? end);
    if (gap >= STALL_MS) stalled += gap;
    before = end;
  });
  return stalled;
}

export function median(numbers: readonly number[]): number | undefined {
  return numbers.toSorted((one, other) => one - other)[Math.floor(numbers.length / 2)];
}
