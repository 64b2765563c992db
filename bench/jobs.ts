/** Backup jobs and `stillframe backup` beside `qemu-img convert` and QEMU's own backup job. */
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, rmSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { createEngine, type Engine } from '#src/index.js';
import {
  BYTES,
  CLI,
  type Contestant,
  compare,
  fillRandom,
  folder,
  MiB,
  makeFile,
  median,
  RUNS,
  type Sample,
  time,
} from './harness.js';
import { Qmp } from './qmp.js';

interface Target {
  readonly path: string;
  readonly format: 'raw' | 'qcow2';
  /** The file is there and is overwritten; otherwise the contestant makes it. */
  readonly existing: boolean;
}

function prepare(target: Target): void {
  if (!target.existing) rmSync(target.path, { force: true });
}

function stillframeProcess(source: string, target: Target): Contestant {
  const args = ['backup', source, target.path, '--sync', 'full', '--progress', 'none', '-f', 'raw'];
  args.push('--format', target.format, ...(target.existing ? ['--existing'] : []));
  return {
    name: 'stillframe backup',
    process: true,
    prepare: () => prepare(target),
    run: () => time(process.execPath, [CLI, ...args]),
  };
}

/** A backup in a running engine, from the call to its result. */
function stillframeJob(engine: Engine, source: string, target: Target): Contestant {
  const { path, format, existing } = target;
  return {
    name: 'stillframe job',
    process: false,
    prepare: () => prepare(target),
    run: async () => {
      const disk = await engine.openDisk(source, { format: 'raw', readOnly: true });
      const start = performance.now();
      const job = await disk.backup({ target: path, format, existing, sync: 'full' });
      await job.result();
      const seconds = (performance.now() - start) / 1000;
      await disk.close();
      return { seconds, peakRss: undefined };
    },
  };
}

function qemuImg(source: string, target: Target, args: readonly string[]): Contestant {
  const all = [...args, '-t', 'writeback', '-f', 'raw', '-O', target.format];
  return {
    name: `qemu-img convert ${args.join(' ')}`,
    process: true,
    prepare: () => prepare(target),
    run: () => time('qemu-img', ['convert', ...all, source, target.path]),
  };
}

/** QEMU's own backup job, from the command to BLOCK_JOB_COMPLETED, in a storage daemon of its own. */
function qemuJob(source: string, target: Target, length: number): Contestant {
  const { format } = target;
  const run = async (): Promise<Sample> => {
    const path = join(folder, 'qmp.sock');
    rmSync(path, { force: true });
    const child = spawn(
      'qemu-storage-daemon',
      [
        ...['--chardev', `socket,id=m,path=${path},server=on,wait=off`, '--monitor', 'chardev=m'],
        ...['--blockdev', `driver=raw,node-name=src,file.driver=file,file.filename=${source}`],
        ...['--blockdev', `driver=${format},node-name=dst,file.driver=file,file.filename=${target.path}`],
      ],
      { stdio: ['ignore', 'ignore', 'inherit'] },
    );
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
      child.kill();
      await new Promise((resolve) =>
        child.exitCode === null ? child.once('close', resolve) : resolve(undefined),
      );
    }
  };
  return {
    name: 'qemu-storage-daemon blockdev-backup',
    process: false,
    prepare: () => {
      prepare(target);
      if (target.existing) return;
      const made = spawnSync('qemu-img', ['create', '-q', '-f', format, target.path, String(length)]);
      if (made.status !== 0) throw new Error(`qemu-img create: ${String(made.stderr)}`);
    },
    run,
  };
}

async function eventLoop(engine: Engine, source: string, target: string): Promise<void> {
  const disk = await engine.openDisk(source, { format: 'raw', readOnly: true });
  const delays: number[] = [];
  for (let run = 0; run < RUNS; run++) {
    const histogram = monitorEventLoopDelay({ resolution: 1 });
    const job = await disk.backup({ target, sync: 'full', format: 'raw', existing: true });
    histogram.enable();
    await job.result();
    histogram.disable();
    delays.push(histogram.percentile(99) / 1e6);
  }
  await disk.close();
  console.log(
    `\nEvent loop delay of the host thread during a raw to raw backup: p99 ${median(delays).toFixed(2)} ms (median of ${RUNS} runs, a timer of 1 ms included)`,
  );
}

/** Backups of random data and of a large sparse drive. */
export async function jobs(): Promise<void> {
  const engine = await createEngine();
  try {
    const gib = `${(BYTES / 2 ** 30).toFixed(0)} GiB random`;
    const source = makeFile('source.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
    const old = (name: string): Target => {
      const path = makeFile(name, BYTES, (fd) => fillRandom(fd, 0, BYTES));
      return { path, format: 'raw', existing: true };
    };
    const fresh = (name: string, format: 'raw' | 'qcow2'): Target => ({
      path: join(folder, name),
      format,
      existing: false,
    });
    // Each pair of ways of one program shares a target.
    const [own, theirs] = [old('stillframe.raw'), old('qemu.raw')];
    await compare(`raw to raw, ${gib}`, BYTES, [
      stillframeProcess(source, own),
      qemuImg(source, theirs, ['-n']),
      qemuImg(source, theirs, ['-n', '-W', '-m', '16']),
      stillframeJob(engine, source, own),
      qemuJob(source, theirs, BYTES),
    ]);
    await eventLoop(engine, source, own.path);
    for (const { path } of [own, theirs]) rmSync(path);
    // A new image is removed before the next contestant makes its own: every one finds the same memory free.
    const image = fresh('image.qcow2', 'qcow2');
    await compare(`raw to qcow2, ${gib}`, BYTES, [
      stillframeProcess(source, image),
      qemuImg(source, image, ['-W']),
      qemuImg(source, image, ['-W', '-m', '16']),
      stillframeJob(engine, source, image),
      qemuJob(source, image, BYTES),
    ]);
    for (const path of [source, image.path]) rmSync(path, { force: true });
    const sparseBytes = 100 * 2 ** 30;
    const places = 1000;
    const each = Math.floor((256 * MiB) / places / 4096) * 4096;
    const sparse = makeFile('sparse.raw', sparseBytes, (fd) => {
      for (let index = 0; index < places; index++) {
        fillRandom(fd, Math.floor(((index + 0.5) * sparseBytes) / places / 4096) * 4096, each);
      }
    });
    const copy = fresh('sparse-copy.raw', 'raw');
    await compare('100 GiB sparse raw to raw, 256 MiB of data in 1,000 places', places * each, [
      stillframeProcess(sparse, copy),
      qemuImg(sparse, copy, []),
      qemuImg(sparse, copy, ['-W', '-m', '16']),
      stillframeJob(engine, sparse, copy),
    ]);
  } finally {
    await engine.close();
  }
}
