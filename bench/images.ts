/** The tools on images beside qemu-img's: convert, compare, check, map and random requests. */
import { spawnSync } from 'node:child_process';
import { closeSync, openSync, readSync, rmSync, statSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import { createRuntime } from '#src/kernels/runtime.js';
import {
  BYTES,
  CLI,
  type Contestant,
  compare,
  fillRandom,
  folder,
  MiB,
  makeFile,
  type Sample,
  time,
} from './harness.js';
import type { RandomRequests } from './random-requests.js';

const at = (name: string): string => join(folder, name);

function sh(command: string, ...args: string[]): void {
  const { status, stderr } = spawnSync(command, args, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${stderr}`);
}

/** `stillframe VERB` and `qemu-img VERB` with arguments that both understand. */
function pair(
  verb: string,
  ours: readonly string[],
  theirs: readonly string[],
  target?: string,
): Contestant[] {
  const prepare = (): void => {
    if (target !== undefined) rmSync(target, { force: true });
  };
  return [
    {
      name: `stillframe ${verb}`,
      process: true,
      prepare,
      run: () => time(process.execPath, [CLI, verb, ...ours]),
    },
    {
      name: `qemu-img ${verb} ${theirs.filter((word) => /^-[cWm]$/.test(word)).join(' ')}`.trimEnd(),
      process: true,
      prepare,
      run: () => time('qemu-img', [verb, ...theirs]),
    },
  ];
}

/** The same, where the peer has a faster way as well. */
function withUnordered(verb: string, common: readonly string[], target: string): Contestant[] {
  const [ours, plain] = pair(verb, common, ['-t', 'writeback', ...common], target);
  const [, unordered] = pair(verb, common, ['-t', 'writeback', '-W', '-m', '16', ...common], target);
  return [ours, plain, unordered].filter((contestant) => contestant !== undefined);
}

async function convert(): Promise<void> {
  const raw = makeFile('random.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
  const image = at('random.qcow2');
  sh('qemu-img', 'convert', '-O', 'qcow2', raw, image);
  const gib = `${(BYTES / 2 ** 30).toFixed(0)} GiB random`;
  for (const [from, to, source] of [
    ['raw', 'qcow2', raw],
    ['qcow2', 'raw', image],
    ['qcow2', 'qcow2', image],
  ] as const) {
    const target = at('converted');
    const common = ['-f', from, '-O', to, source, target];
    await compare(`convert ${from} to ${to}, ${gib}`, BYTES, withUnordered('convert', common, target));
    rmSync(target, { force: true });
  }
  rmSync(raw);
  rmSync(image);
}

/** A file system with the programs and documents of this machine: data as it is in real drives. */
function fileSystem(): { path: string; bytes: number } {
  const path = at('system.raw');
  const bytes = 1280 * MiB;
  sh('mke2fs', '-q', '-t', 'ext4', '-d', '/usr/share', path, `${bytes / MiB}M`);
  return { path, bytes: statSync(path).blocks * 512 };
}

async function compressed(): Promise<void> {
  const { path, bytes } = fileSystem();
  for (const type of ['zlib', 'zstd']) {
    const target = at('compressed.qcow2');
    const options = ['-c', '-f', 'raw', '-O', 'qcow2', '-o', `compression_type=${type}`, path, target];
    const contestants = pair('convert', options, ['-t', 'writeback', '-m', '16', ...options], target).map(
      (contestant) => ({
        ...contestant,
        run: async (): Promise<Sample> => {
          const sample = await contestant.run();
          sizes.set(contestant.name, statSync(target).size);
          return sample;
        },
      }),
    );
    const sizes = new Map<string, number>();
    await compare(`convert -c (${type}) of a file system`, bytes, contestants);
    for (const [name, size] of sizes) console.log(`${name}: ${(size / MiB).toFixed(1)} MiB`);
    const back = at('decompressed.raw');
    await compare(
      `convert of it (${type}) to raw`,
      bytes,
      withUnordered('convert', ['-f', 'qcow2', '-O', 'raw', target, back], back),
    );
    rmSync(target);
    rmSync(back);
  }
  rmSync(path);
}

async function comparing(): Promise<void> {
  const raw = makeFile('one.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
  const image = at('two.qcow2');
  sh('qemu-img', 'convert', '-O', 'qcow2', raw, image);
  const args = ['-f', 'raw', '-F', 'qcow2', raw, image];
  await compare('compare, raw with qcow2', BYTES, pair('compare', args, args));
  rmSync(raw);
  rmSync(image);
}

/**
 * A full image of 64 GiB whose clusters are all over the file: every guest cluster has a host cluster, in random
 * order. What they hold is a hole of the file, since the tools below look at tables only.
 */
function fragmented(): { path: string; tableBytes: number } {
  const path = at('fragmented.qcow2');
  sh('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', path, '64G');
  const fd = openSync(path, 'r+');
  const header = Buffer.alloc(104);
  readSync(fd, header, 0, 104, 0);
  const tables: Buffer[] = [];
  const places: number[] = [];
  const l1 = Buffer.alloc(header.readUInt32BE(36) * 8);
  readSync(fd, l1, 0, l1.length, Number(header.readBigUInt64BE(40)));
  for (let index = 0; index < l1.length; index += 8) {
    const place = Number(l1.readBigUInt64BE(index) & 0x00fffffffffffe00n);
    const table = Buffer.alloc(65536);
    readSync(fd, table, 0, table.length, place);
    tables.push(table);
    places.push(place);
  }
  const perTable = 8192;
  let state = 1;
  for (let index = tables.length * perTable - 1; index > 0; index--) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    const other = state % (index + 1);
    const [a, b] = [tables[Math.floor(index / perTable)], tables[Math.floor(other / perTable)]];
    if (a === undefined || b === undefined) continue;
    const [mine, its] = [(index % perTable) * 8, (other % perTable) * 8];
    const entry = a.readBigUInt64BE(mine);
    a.writeBigUInt64BE(b.readBigUInt64BE(its), mine);
    b.writeBigUInt64BE(entry, its);
  }
  for (const [index, table] of tables.entries()) writeSync(fd, table, 0, table.length, places[index] ?? 0);
  closeSync(fd);
  return { path, tableBytes: tables.length * 65536 };
}

async function check(): Promise<void> {
  const { path, tableBytes } = fragmented();
  const args = ['-f', 'qcow2', path];
  await compare('check of a fragmented image of 64 GiB', tableBytes, pair('check', args, args));
  rmSync(path);
}

async function map(): Promise<void> {
  const { path, tableBytes } = fragmented();
  const args = ['-f', 'qcow2', '--output=json', path];
  await compare('map of a fragmented image of 64 GiB', tableBytes, pair('map', args, args));
  rmSync(path);
}

type Order = Omit<RandomRequests, 'shared' | 'node'>;

const REQUEST_BYTES = 4096;
/** A multiple of 4 KiB without a factor in common with the number of requests a drive has. */
const STEP = 4096 * 400_009;

/** Requests by one thread with blocking calls, in a running program. */
function ownRequests(path: string, order: Order): Contestant {
  return {
    name: `stillframe, 1 thread`,
    process: false,
    prepare: () => undefined,
    run: async () => {
      const runtime = createRuntime();
      const node = openImage(runtime, path, { format: 'qcow2', readOnly: order.operation === 'read' });
      try {
        const workerData: RandomRequests = { ...order, shared: runtime.shared, node };
        const worker = new Worker(new URL('./random-requests.js', import.meta.url), { workerData });
        const seconds = await new Promise<number>((resolve, reject) => {
          worker.once('message', resolve);
          worker.once('error', reject);
        });
        await worker.terminate();
        return { seconds, peakRss: undefined };
      } finally {
        attachNode(runtime, node).flush();
        closeNode(runtime, node);
      }
    },
  };
}

/** The same requests by `qemu-img bench`, which prints how long they took. */
function theirRequests(path: string, order: Order, depth: number): Contestant {
  const { operation, count, step, bytes } = order;
  return {
    name: `qemu-img bench -d ${depth}`,
    process: false,
    prepare: () => undefined,
    run: async () => {
      const { status, stdout, stderr } = spawnSync(
        'qemu-img',
        [
          ...['bench', '-f', 'qcow2', '-t', 'writeback', '-c', String(count), '-d', String(depth)],
          ...['-s', String(bytes), '-S', String(step), ...(operation === 'write' ? ['-w'] : []), path],
        ],
        { encoding: 'utf8' },
      );
      const [, seconds] = /Run completed in ([\d.]+) seconds/.exec(stdout) ?? [];
      if (status !== 0 || seconds === undefined) throw new Error(`qemu-img bench: ${stderr}`);
      return { seconds: Number(seconds), peakRss: undefined };
    },
  };
}

async function requests(): Promise<void> {
  const raw = makeFile('one.raw', BYTES, (fd) => fillRandom(fd, 0, BYTES));
  const image = at('one.qcow2');
  sh('qemu-img', 'convert', '-O', 'qcow2', raw, image);
  rmSync(raw);
  const reads: Order = { operation: 'read', count: 200_000, bytes: REQUEST_BYTES, step: STEP };
  const bytes = reads.count * reads.bytes;
  const readers = (path: string): Contestant[] => [
    ownRequests(path, reads),
    theirRequests(path, reads, 1),
    theirRequests(path, reads, 16),
  ];
  await compare('random reads of 4 KiB', bytes, readers(image));
  rmSync(image);
  const { path } = fragmented();
  await compare('random reads of 4 KiB from a fragmented image of 64 GiB', bytes, readers(path));
  rmSync(path);

  const writes: Order = { operation: 'write', count: 50_000, bytes: REQUEST_BYTES, step: STEP };
  const fresh = at('fresh.qcow2');
  const contestants = [
    ownRequests(fresh, writes),
    theirRequests(fresh, writes, 1),
    theirRequests(fresh, writes, 16),
  ].map((contestant) => ({
    ...contestant,
    prepare: () => sh('qemu-img', 'create', '-q', '-f', 'qcow2', fresh, '64G'),
  }));
  await compare('allocating writes of 4 KiB', writes.count * writes.bytes, contestants);
  rmSync(fresh);
}

/** Parts of the benchmark by name. */
export const images: readonly (readonly [string, () => Promise<void>])[] = [
  ['convert', convert],
  ['compressed', compressed],
  ['compare', comparing],
  ['check', check],
  ['map', map],
  ['requests', requests],
];
