/**
 * Backups beside QEMU's own tools on the same files: `npm run bench:peers -- [--folder DIR] [--runs N] [--gib N]`.
 *
 * Contestants run in turn (A B C A B C …), each on the same source with its own target file that exists already,
 * page cache warm; medians and the ratio of medians are printed. Stillframe computes its checksums throughout.
 * "durable" rows flush the target before they end (Stillframe always does; qemu-img with `-t writeback`; QEMU's
 * job is given a flush afterwards by closing the node); on a file system in memory a flush costs nothing, so
 * there the rows compare the copying alone.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { createConnection, type Socket } from 'node:net';
import { availableParallelism, tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { createEngine } from '#src/index.js';

const { values } = parseArgs({
  options: {
    folder: { type: 'string', default: existsSync('/dev/shm') ? '/dev/shm' : tmpdir() },
    runs: { type: 'string', default: '5' },
    gib: { type: 'string', default: '2' },
  },
});
const RUNS = Number(values.runs);
const BYTES = Number(values.gib) * 2 ** 30;
const CLI = fileURLToPath(new URL('../../../dist/cli/main.js', import.meta.url));
const folder = mkdtempSync(join(values.folder, 'stillframe-bench-'));
const MiB = 1024 * 1024;

interface Sample {
  readonly seconds: number;
  /** Peak resident memory in bytes; undefined where the contestant is part of a longer process. */
  readonly peakRss: number | undefined;
}

interface Contestant {
  readonly name: string;
  readonly run: () => Promise<Sample>;
}

function median(numbers: readonly number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN;
}

function fillRandom(fd: number, offset: number, bytes: number): void {
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

function makeFile(name: string, length: number, fill: (fd: number) => void): string {
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
async function time(command: string, args: readonly string[]): Promise<Sample> {
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

function stillframe(source: string, target: string, extra: readonly string[]): Contestant {
  const args = ['backup', source, target, '--sync', 'full', '--progress', 'none', ...extra];
  return { name: 'stillframe', run: () => time(process.execPath, [CLI, ...args]) };
}

function qemuImg(label: string, args: readonly string[]): Contestant {
  return { name: `qemu-img convert ${label}`, run: () => time('qemu-img', ['convert', ...args]) };
}

/** Just enough of a QMP client to time one job. */
class Qmp {
  readonly #socket: Socket;
  readonly #waiting: {
    want: (message: Record<string, unknown>) => boolean;
    resolve: (m: Record<string, unknown>) => void;
  }[] = [];
  #rest = '';

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on('data', (data) => {
      this.#rest += String(data);
      const lines = this.#rest.split('\n');
      this.#rest = lines.pop() ?? '';
      for (const line of lines) {
        const message: Record<string, unknown> = JSON.parse(line);
        const index = this.#waiting.findIndex(({ want }) => want(message));
        if (index >= 0) this.#waiting.splice(index, 1)[0]?.resolve(message);
      }
    });
  }

  wait(want: (message: Record<string, unknown>) => boolean): Promise<Record<string, unknown>> {
    return new Promise((resolve) => this.#waiting.push({ want, resolve }));
  }

  async command(execute: string, parameters: Record<string, unknown> = {}): Promise<void> {
    const reply = this.wait((message) => 'return' in message || 'error' in message);
    this.#socket.write(JSON.stringify({ execute, arguments: parameters }));
    const message = await reply;
    if ('error' in message) throw new Error(`${execute}: ${JSON.stringify(message['error'])}`);
  }
}

/** QEMU's own backup job, from the command to BLOCK_JOB_COMPLETED, in a storage daemon of its own. */
function qemuJob(source: string, target: string, format: 'raw' | 'qcow2', noFlush: boolean): Contestant {
  const run = async (): Promise<Sample> => {
    const path = join(folder, 'qmp.sock');
    rmSync(path, { force: true });
    const cache = `cache.direct=off,cache.no-flush=${noFlush ? 'on' : 'off'}`;
    const child = spawn(
      'qemu-storage-daemon',
      [
        ...['--chardev', `socket,id=m,path=${path},server=on,wait=off`, '--monitor', 'chardev=m'],
        ...['--blockdev', `driver=raw,node-name=src,file.driver=file,file.filename=${source}`],
        ...['--blockdev', `driver=${format},node-name=dst,file.driver=file,file.filename=${target},${cache}`],
      ],
      { stdio: ['ignore', 'ignore', 'inherit'] },
    );
    const stopLooking = peakRssOf(child);
    try {
      while (!existsSync(path)) await new Promise((resolve) => setTimeout(resolve, 10));
      const socket = createConnection(path);
      const qmp = new Qmp(socket);
      await qmp.wait((message) => 'QMP' in message);
      await qmp.command('qmp_capabilities');
      const start = performance.now();
      const over = qmp.wait((message) => message['event'] === 'BLOCK_JOB_COMPLETED');
      await qmp.command('blockdev-backup', { 'job-id': 'j', device: 'src', target: 'dst', sync: 'full' });
      const event = await over;
      if (JSON.stringify(event).includes('"error"')) throw new Error(JSON.stringify(event));
      const seconds = (performance.now() - start) / 1000;
      await qmp.command('quit');
      socket.destroy();
      return { seconds, peakRss: undefined };
    } finally {
      stopLooking();
      child.kill();
      await new Promise((resolve) =>
        child.exitCode === null ? child.once('close', resolve) : resolve(undefined),
      );
    }
  };
  return { name: 'qemu-storage-daemon blockdev-backup', run };
}

async function compare(title: string, bytes: number, contestants: readonly Contestant[]): Promise<void> {
  const samples = new Map<string, Sample[]>(contestants.map(({ name }) => [name, []]));
  for (let run = 0; run <= RUNS; run++) {
    for (const { name, run: once } of contestants) {
      const sample = await once();
      // The first run of each only warms up.
      if (run > 0) samples.get(name)?.push(sample);
    }
  }
  const medianOf = (name: string): number => median((samples.get(name) ?? []).map(({ seconds }) => seconds));
  const own = medianOf('stillframe');
  console.log(`\n${title} (medians of ${RUNS}, interleaved)`);
  console.table(
    Object.fromEntries(
      contestants.map(({ name }) => {
        const list = samples.get(name) ?? [];
        const seconds = list.map((sample) => sample.seconds);
        const rss = list.map((sample) => sample.peakRss ?? 0);
        return [
          name,
          {
            'median s': medianOf(name).toFixed(3),
            'min s': Math.min(...seconds).toFixed(3),
            'max s': Math.max(...seconds).toFixed(3),
            'GB/s': (bytes / medianOf(name) / 1e9).toFixed(2),
            'stillframe is': name === 'stillframe' ? '' : `${(medianOf(name) / own).toFixed(2)}×`,
            'peak RSS MiB': Math.max(...rss) > 0 ? (Math.max(...rss) / MiB).toFixed(0) : '',
          },
        ];
      }),
    ),
  );
}

async function eventLoop(source: string, target: string): Promise<void> {
  const engine = await createEngine();
  const disk = await engine.openDisk(source, { format: 'raw', readOnly: true });
  const histogram = monitorEventLoopDelay({ resolution: 1 });
  const job = await disk.backup({ target, sync: 'full', format: 'raw', existing: true });
  histogram.enable();
  await job.result();
  histogram.disable();
  await engine.close();
  const p99 = histogram.percentile(99) / 1e6;
  console.log(
    `\nEvent loop delay of the host thread during a raw to raw backup: p99 ${p99.toFixed(2)} ms (a timer of 1 ms included)`,
  );
}

try {
  console.log(
    `node ${process.version}, ${availableParallelism()} processors, ${(totalmem() / 2 ** 30).toFixed(0)} GiB, files in ${folder}`,
  );
  const gib = `${(BYTES / 2 ** 30).toFixed(0)} GiB random`;
  const source = makeFile('source.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
  const targets = ['a.raw', 'b.raw', 'c.raw', 'd.raw'].map((name) =>
    makeFile(name, BYTES, (fd) => fillRandom(fd, 0, BYTES)),
  );
  const [a = '', b = '', c = '', d = ''] = targets;
  await compare(`raw to raw, ${gib}`, BYTES, [
    stillframe(source, a, ['-f', 'raw', '--format', 'raw', '--existing']),
    qemuImg('-n', ['-n', '-t', 'writeback', '-f', 'raw', '-O', 'raw', source, b]),
    qemuImg('-n -W -m 16', ['-n', '-W', '-m', '16', '-t', 'writeback', '-f', 'raw', '-O', 'raw', source, c]),
    qemuJob(source, d, 'raw', false),
  ]);
  await eventLoop(source, a);
  for (const path of targets) rmSync(path);
  // For qcow2 every contestant makes or remakes its image; the job writes into one made anew each time.
  const q = ['a.qcow2', 'b.qcow2', 'c.qcow2'].map((name) => join(folder, name));
  const [qa = '', qb = '', qc = ''] = q;
  const job = qemuJob(source, qc, 'qcow2', false);
  await compare(`raw to qcow2, ${gib}`, BYTES, [
    stillframe(source, qa, ['-f', 'raw', '--format', 'qcow2', '--force']),
    qemuImg('-W -O qcow2', ['-W', '-t', 'writeback', '-f', 'raw', '-O', 'qcow2', source, qb]),
    {
      name: job.name,
      run: async () => {
        await time('qemu-img', ['create', '-q', '-f', 'qcow2', qc, String(BYTES)]);
        return job.run();
      },
    },
  ]);
  for (const path of [source, ...q]) rmSync(path, { force: true });
  const sparseBytes = 100 * 2 ** 30;
  const places = 1000;
  const each = Math.floor((256 * MiB) / places / 4096) * 4096;
  const sparse = makeFile('sparse.raw', sparseBytes, (fd) => {
    for (let index = 0; index < places; index++) {
      fillRandom(fd, Math.floor(((index + 0.5) * sparseBytes) / places / 4096) * 4096, each);
    }
  });
  const sa = join(folder, 'sparse-a.raw');
  const sb = join(folder, 'sparse-b.raw');
  await compare('100 GiB sparse raw to raw, 256 MiB of data in 1,000 places', places * each, [
    stillframe(sparse, sa, ['-f', 'raw', '--format', 'raw', '--force']),
    qemuImg('', ['-t', 'writeback', '-f', 'raw', '-O', 'raw', sparse, sb]),
  ]);
} finally {
  rmSync(folder, { recursive: true, force: true });
}
