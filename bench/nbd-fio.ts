/** fio against NBD servers. */
import { BYTES } from './harness.js';
import { output } from './nbd-servers.js';

/** Seconds of one run of fio. */
const FIO_SECONDS = 3;

interface FioReport {
  readonly jobs: readonly Readonly<Record<'read' | 'write', FioSide>>[];
}

interface FioSide {
  readonly iops: number;
  readonly total_ios: number;
  readonly clat_ns: { readonly percentile?: Readonly<Record<string, number>> };
}

export interface FioFigures extends Record<string, number> {
  /** Requests that were answered. */
  readonly operations: number;
}

/** Requests of 4 KiB at random places. @param args further options of fio */
export async function runFio(
  uri: string,
  direction: 'read' | 'write',
  depth: number,
  args: readonly string[] = [],
): Promise<FioFigures> {
  const text = await output('fio', [
    ...['--name=bench', '--ioengine=nbd', `--uri=${uri}`, `--rw=rand${direction}`, '--bs=4k'],
    ...[`--iodepth=${depth}`, `--size=${BYTES}`, `--runtime=${FIO_SECONDS}`, '--time_based'],
    ...['--output-format=json', ...args],
  ]);
  const report: FioReport = JSON.parse(text.slice(text.indexOf('{')));
  const side = report.jobs[0]?.[direction];
  const percentile = (name: string): number => (side?.clat_ns.percentile?.[name] ?? Number.NaN) / 1000;
  return {
    IOPS: side?.iops ?? Number.NaN,
    'p50 µs': percentile('50.000000'),
    'p99 µs': percentile('99.000000'),
    'p99.9 µs': percentile('99.900000'),
    operations: side?.total_ios ?? Number.NaN,
  };
}
