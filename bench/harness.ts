/** What the benchmarks against peers share: contestants that run in turn, their times and peak memory. */
import { type ChildProcess, spawn } from 'node:child_process';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const { values } = parseArgs({
  options: {
    folder: { type: 'string', default: existsSync('/dev/shm') ? '/dev/shm' : tmpdir() },
    runs: { type: 'string', default: '5' },
    gib: { type: 'string', default: '2' },
    only: { type: 'string' },
  },
});
export const RUNS = Number(values.runs);
/** Bytes of random data that backups and conversions move. */
export const BYTES = Number(values.gib) * 2 ** 30;
/** Parts of the benchmark to run; undefined: all. */
export const ONLY: readonly string[] | undefined = values.only?.split(',');
export const CLI = fileURLToPath(new URL('../../../dist/cli/main.js', import.meta.url));
export const folder = mkdtempSync(join(values.folder, 'stillframe-bench-'));
export const MiB = 1024 * 1024;

export interface Sample {
  readonly seconds: number;
  /** Peak resident memory in bytes; undefined where the contestant is part of a longer process. */
  readonly peakRss: number | undefined;
}

export interface Contestant {
  readonly name: string;
  /** Timed with the start of its process. */
  readonly process: boolean;
  /** What comes before every run and is not timed. */
  readonly prepare: () => void;
  readonly run: () => Promise<Sample>;
}

export function median(numbers: readonly number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}

export function fillRandom(fd: number, offset: number, bytes: number): void {
  const block = new Uint8Array(MiB);
  const words = new Uint32Array(block.buffer);
  let state = (offset ^ 0x9e3779b9) >>> 0 || 1;
  for (let done = 0; done < bytes; done += MiB) {
    for (let index = 0; index < words.length; index++) {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      words[index] = state;
    }
    writeSync(fd, block, 0, Math.min(MiB, bytes - done), offset + done);
  }
}

export function makeFile(name: string, length: number, fill: (fd: number) => void): string {
  const path = join(folder, name);
  const fd = openSync(path, 'w');
  ftruncateSync(fd, length);
  fill(fd);
  closeSync(fd);
  return path;
}

function peakRssOf(child: ChildProcess): () => number {
  let peak = 0;
  const look = (): void => {
    try {
      const line = /VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${child.pid}/status`, 'utf8'));
      peak = Math.max(peak, Number(line?.[1] ?? 0) * 1024);
    } catch {
      // Gone already.
    }
  };
  const timer = setInterval(look, 10);
  return () => {
    clearInterval(timer);
    return peak;
  };
}

/** Times a whole process, its start included. */
export async function time(command: string, args: readonly string[]): Promise<Sample> {
  const start = performance.now();
  const child = spawn(command, args, { stdio: ['ignore', 'ignore', 'pipe'] });
  const stopLooking = peakRssOf(child);
  let stderr = '';
  child.stderr.on('data', (data) => {
    stderr += String(data);
  });
  const status = await new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  const seconds = (performance.now() - start) / 1000;
  const peakRss = stopLooking();
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${String(status)}: ${stderr}`);
  return { seconds, peakRss };
}

export async function compare(
  title: string,
  bytes: number,
  contestants: readonly Contestant[],
): Promise<void> {
  const samples = new Map<string, Sample[]>(contestants.map(({ name }) => [name, []]));
  for (let run = 0; run <= RUNS; run++) {
    for (const { name, prepare: ready, run: once } of contestants) {
      ready();
      const sample = await once();
      // The first run of each only warms up.
      if (run > 0) samples.get(name)?.push(sample);
    }
  }
  const medianOf = (name: string): number => median((samples.get(name) ?? []).map(({ seconds }) => seconds));
  const ratio = (own: string | undefined, other: Contestant): string =>
    other.name.startsWith('stillframe') || own === undefined
      ? ''
      : `${(medianOf(other.name) / medianOf(own)).toFixed(2)}×`;
  const ownName = (process: boolean): string | undefined =>
    contestants.find((one) => one.name.startsWith('stillframe') && one.process === process)?.name;
  const [ownProcess, ownJob] = [ownName(true), ownName(false)];
  console.log(`\n${title} (medians of ${RUNS}, interleaved)`);
  console.table(
    Object.fromEntries(
      contestants.map((contestant) => {
        const list = samples.get(contestant.name) ?? [];
        const seconds = list.map((sample) => sample.seconds);
        const rss = list.map((sample) => sample.peakRss ?? 0);
        return [
          contestant.name,
          {
            'median s': medianOf(contestant.name).toFixed(3),
            'min s': Math.min(...seconds).toFixed(3),
            'max s': Math.max(...seconds).toFixed(3),
            'GB/s': (bytes / medianOf(contestant.name) / 1e9).toFixed(2),
            'process is': contestant.process ? ratio(ownProcess, contestant) : '',
            'job is': ratio(ownJob, contestant),
            'peak RSS MiB': Math.max(...rss) > 0 ? (Math.max(...rss) / MiB).toFixed(0) : '',
          },
        ];
      }),
    ),
  );
}
