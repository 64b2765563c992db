/**
 * The NBD server beside `qemu-nbd` and `nbdkit`, all of them serving one file:
 * `npm run bench:nbd -- [--folder DIR] [--runs N] [--gib N] [--only copy,fio]`.
 *
 * Contestants run in turn (A B C A B C …), page cache warm; medians are printed, with the processor time that the
 * servers took: it does not depend on what else the machine does. The first run of each only warms up. `qemu-nbd` gets
 * the settings of its allocator with which it is fastest (without them its figures depend on what came before).
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { BYTES, CLI, fillRandom, folder, MiB, makeFile, median, ONLY, RUNS } from './harness.js';

interface Server {
  readonly name: string;
  readonly socket: string;
  readonly child: ChildProcess;
}

/** Seconds of one run of fio. */
const FIO_SECONDS = 3;
const TICKS_PER_SECOND = 100;

const file = makeFile('drive.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));

const commands: Readonly<Record<string, (socket: string) => readonly string[]>> = {
  stillframe: (socket) => [process.execPath, CLI, 'serve', file, '-f', 'raw', '--nbd', `unix:${socket}`],
  'qemu-nbd': (socket) => [
    ...['qemu-nbd', '-t', '-e', '8', '-k', socket],
    ...['--image-opts', `driver=raw,file.driver=file,file.locking=off,file.filename=${file}`],
  ],
  nbdkit: (socket) => ['nbdkit', '-f', '-U', socket, 'file', file],
};

async function start(name: string): Promise<Server> {
  const socket = join(folder, `${name}.socket`);
  const [command = '', ...args] = commands[name]?.(socket) ?? [];
  const env = { ...process.env, MALLOC_MMAP_THRESHOLD_: '67108864', MALLOC_TRIM_THRESHOLD_: '134217728' };
  const child = spawn(command, args, { stdio: 'ignore', env });
  for (let round = 0; !existsSync(socket); round++) {
    if (round === 500 || child.exitCode !== null) throw new Error(`${name} does not serve`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return { name, socket, child };
}

/** Seconds of processor time that a process has taken. */
function processorSeconds({ child }: Server): number {
  const fields = readFileSync(`/proc/${child.pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? [];
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}

async function output(command: string, args: readonly string[]): Promise<string> {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  let text = '';
  child.stdout.on('data', (data) => {
    text += String(data);
  });
  const status = await new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', resolve);
  });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with ${String(status)}`);
  return text;
}

/** Figures of one run, by their names. */
type Figures = Readonly<Record<string, number>>;

async function interleaved(
  title: string,
  servers: readonly Server[],
  run: (uri: string) => Promise<Figures & { readonly operations: number }>,
): Promise<void> {
  const samples = new Map<string, Figures[]>(servers.map(({ name }) => [name, []]));
  for (let round = 0; round <= RUNS; round++) {
    for (const server of servers) {
      const before = processorSeconds(server);
      const { operations, ...figures } = await run(`nbd+unix:///?socket=${server.socket}`);
      const cpu = ((processorSeconds(server) - before) * 1e6) / operations;
      if (round > 0) samples.get(server.name)?.push({ ...figures, 'server CPU µs': cpu });
    }
  }
  console.log(`\n${title} (medians of ${RUNS}, interleaved)`);
  console.table(
    Object.fromEntries(
      [...samples].map(([name, list]) => [
        name,
        Object.fromEntries(
          Object.keys(list[0] ?? {}).map((figure) => {
            const value = median(list.map((sample) => sample[figure] ?? Number.NaN));
            return [figure, value >= 100 ? Math.round(value) : Number(value.toFixed(1))];
          }),
        ),
      ]),
    ),
  );
}

async function copy(servers: readonly Server[]): Promise<void> {
  for (const connections of [1, 4]) {
    const how = ['-C', `${connections}`, '-T', `${Math.min(connections, availableParallelism())}`];
    for (const direction of ['read', 'write'] as const) {
      await interleaved(`nbdcopy, ${direction}, ${connections} connections`, servers, async (uri) => {
        const begin = performance.now();
        await output('nbdcopy', [...how, ...(direction === 'read' ? [uri, 'null:'] : [file, uri])]);
        return { 'MiB/s': BYTES / MiB / ((performance.now() - begin) / 1000), operations: BYTES / MiB };
      });
    }
  }
}

interface FioReport {
  readonly jobs: readonly Readonly<Record<'read' | 'write', FioSide>>[];
}

interface FioSide {
  readonly iops: number;
  readonly total_ios: number;
  readonly clat_ns: { readonly percentile?: Readonly<Record<string, number>> };
}

async function fio(servers: readonly Server[]): Promise<void> {
  for (const direction of ['read', 'write'] as const) {
    for (const depth of [1, 32]) {
      await interleaved(`fio, 4 KiB random ${direction}, depth ${depth}`, servers, async (uri) => {
        const text = await output('fio', [
          ...['--name=bench', '--ioengine=nbd', `--uri=${uri}`, `--rw=rand${direction}`, '--bs=4k'],
          ...[`--iodepth=${depth}`, `--size=${BYTES}`, `--runtime=${FIO_SECONDS}`, '--time_based'],
          '--output-format=json',
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
      });
    }
  }
}

const parts = new Map([
  ['copy', copy],
  ['fio', fio],
]);
const servers: Server[] = [];
try {
  console.log(
    `node ${process.version}, ${availableParallelism()} processors, ${BYTES / 2 ** 30} GiB in ${folder}`,
  );
  for (const name of Object.keys(commands)) servers.push(await start(name));
  for (const [name, run] of parts) if (ONLY?.includes(name) ?? true) await run(servers);
} finally {
  for (const { child } of servers) child.kill();
  await Promise.all(
    servers.map(({ child }) => child.exitCode ?? new Promise((resolve) => child.once('exit', resolve))),
  );
  rmSync(folder, { recursive: true, force: true });
}
