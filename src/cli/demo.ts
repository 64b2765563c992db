import { execFile } from 'node:child_process';
import { constants, copyFile, mkdir, mkdtemp, open, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { createEngine, type Disk, type Engine, type SyncMode } from '../index.js';
import { columns } from './columns.js';
import type { Command } from './command.js';

const MiB = 1024 * 1024;
const DISK_BYTES = 256 * MiB;
const FILE_SYSTEM_BYTES = 128 * MiB;
const FILE_BYTES = 64 * MiB;
/** Slow enough that the writers meet the copy all the time, fast enough for a minute in all. */
const BYTES_PER_SECOND = 64 * MiB;
const NONE_MS = 3000;
const WRITERS = 2;

const exec = promisify(execFile);

interface Range {
  readonly start: number;
  readonly end: number;
}

/** Runs a tool; undefined when it is not installed. Throws when it says that something is wrong. */
async function tool(name: string, args: readonly string[]): Promise<string | undefined> {
  try {
    return (await exec(name, args, { maxBuffer: 64 * MiB })).stdout;
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined;
    throw error;
  }
}

/** Small and fast and good enough to scribble with; seeded, so that a run can be repeated. */
function randomSource(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function randomBytes(random: () => number, length: number): Uint8Array {
  const data = new Uint8Array(length);
  const words = new Uint32Array(data.buffer, 0, length >>> 2);
  for (let index = 0; index < words.length; index++) words[index] = random() * 4294967296;
  return data;
}

/**
 * Makes the first drive: an ext4 file system where that is possible, random data elsewhere.
 *
 * @returns the ranges that may be overwritten without hurting the file system
 */
async function makeDrive(folder: string, path: string): Promise<{ ranges: Range[]; fileSystem: boolean }> {
  const random = randomSource(1);
  const content = join(folder, 'content');
  await mkdir(content);
  const chunk = (): Uint8Array => randomBytes(random, MiB);
  const data = await open(join(content, 'data.bin'), 'w');
  for (let done = 0; done < FILE_BYTES; done += MiB) await data.write(chunk());
  await data.close();
  for (let index = 0; index < 200; index++) {
    await writeFile(join(content, `note-${index}.txt`), `still frame number ${index}\n`.repeat(50 + index));
  }
  const drive = await open(path, 'w');
  await drive.truncate(DISK_BYTES);
  const beyond: Range = { start: FILE_SYSTEM_BYTES, end: DISK_BYTES };
  // Every other 8 MiB behind the file system has data, the rest is a hole.
  for (let offset = beyond.start; offset < beyond.end; offset += 16 * MiB) {
    for (let done = 0; done < 8 * MiB; done += MiB) await drive.write(chunk(), 0, MiB, offset + done);
  }
  await drive.close();
  const blocks = `${FILE_SYSTEM_BYTES / 4096}`;
  const made = await tool('mkfs.ext4', ['-q', '-F', '-b', '4096', '-d', content, path, blocks]);
  await rm(content, { recursive: true });
  if (made === undefined) return { ranges: [{ start: 0, end: DISK_BYTES }], fileSystem: false };
  const extents = (await tool('debugfs', ['-R', 'dump_extents -l /data.bin', path])) ?? '';
  const inFile = [...extents.matchAll(/^\s*\d+\/\s*\d+\s+\d+\/\s*\d+\s+\d+\s*-\s*\d+\s+(\d+)\s*-\s*(\d+)/gm)];
  const ranges = inFile.map(([, first, last]) => ({
    start: Number(first) * 4096,
    end: (Number(last) + 1) * 4096,
  }));
  return { ranges: [...ranges, beyond], fileSystem: true };
}

/** Guests that scribble on the drive until they are stopped, and can be held for a moment. */
class Writers {
  requests = 0;
  readonly #disk: Disk;
  readonly #ranges: readonly Range[];
  readonly #running: Promise<void>[] = [];
  #stopped = false;
  #hold: Promise<void> | undefined;
  #release: () => void = () => undefined;
  #inFlight = 0;

  constructor(disk: Disk, ranges: readonly Range[]) {
    this.#disk = disk;
    this.#ranges = ranges;
    for (let index = 0; index < WRITERS; index++) this.#running.push(this.#write(randomSource(100 + index)));
  }

  /** Returns when no request is in flight; none is made until {@link go}. */
  async hold(): Promise<void> {
    this.#hold = new Promise((resolve) => {
      this.#release = resolve;
    });
    while (this.#inFlight > 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }

  go(): void {
    this.#hold = undefined;
    this.#release();
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    this.go();
    await Promise.all(this.#running);
  }

  async #write(random: () => number): Promise<void> {
    while (!this.#stopped) {
      // No turn of the event loop between this look and the count: whoever holds must not miss a request.
      while (this.#hold !== undefined) await this.#hold;
      if (this.#stopped) return;
      this.#inFlight++;
      try {
        await this.#scribble(random);
        this.requests++;
      } finally {
        this.#inFlight--;
      }
    }
  }

  async #scribble(random: () => number): Promise<void> {
    const range = this.#ranges[Math.floor(random() * this.#ranges.length)];
    if (range === undefined) return;
    const offset = range.start + Math.floor(random() * (range.end - range.start));
    const length = Math.min(range.end - offset, 1 + Math.floor(random() * 128 * 1024));
    const kind = random();
    if (kind < 0.6) await this.#disk.write(offset, randomBytes(random, length));
    else if (kind < 0.8) await this.#disk.writeZeroes(offset, length, { unmap: kind < 0.7 });
    else await this.#disk.discard(offset, length);
  }
}

interface Row {
  readonly mode: SyncMode;
  readonly seconds: number;
  readonly copied: number;
  readonly saved: number;
  readonly verdict: string;
}

/** Proves that an image is the drive at its instant; throws where it is not. */
async function prove(
  engine: Engine,
  folder: string,
  target: string,
  truth: string,
  fileSystem: boolean,
): Promise<string> {
  const share = { forceShare: true };
  const compared = await engine.compareImages(target, truth, { first: share, second: share });
  if (!compared.identical) throw new Error(`'${target}' differs from the drive at its instant`);
  const proofs = ['identical'];
  const check = await tool('qemu-img', ['check', '-q', '-U', target]);
  if (check !== undefined) {
    await tool('qemu-img', ['compare', '-q', '-U', target, truth]);
    proofs.push('qemu-img check and compare');
  }
  if (fileSystem) {
    const raw = join(folder, 'proof.raw');
    const disk = await engine.openDisk(target, { readOnly: true, ...share });
    const job = await disk.backup({ target: raw, format: 'raw', sync: 'full', force: true });
    await job.result();
    await disk.close();
    if ((await tool('e2fsck', ['-fn', raw])) !== undefined) proofs.push('e2fsck');
    await rm(raw);
  }
  return proofs.join(', ');
}

async function takeBackup(
  engine: Engine,
  folder: string,
  disk: Disk,
  writers: Writers,
  mode: SyncMode,
  fileSystem: boolean,
): Promise<Row> {
  const target = join(folder, `${mode}.qcow2`);
  const truth = join(folder, `truth-${mode}.qcow2`);
  // Hold the writers just long enough for a copy that owes nothing to copy-before-write.
  await writers.hold();
  await disk.flush();
  await copyFile(disk.path, truth, constants.COPYFILE_EXCL);
  const start = performance.now();
  const job = await disk.backup({ target, sync: mode, format: 'qcow2', speed: BYTES_PER_SECOND });
  writers.go();
  if (mode === 'none') {
    await new Promise((resolve) => setTimeout(resolve, NONE_MS));
    // Target and source together are the instant only while the source is protected or at rest.
    await writers.hold();
    job.cancel();
  }
  const result = await job.result();
  const seconds = (performance.now() - start) / 1000;
  if (mode === 'none') await disk.flush();
  const verdict = await prove(engine, folder, target, truth, fileSystem);
  writers.go();
  return { mode, seconds, copied: result.bytes.written, saved: result.clusters.cbw, verdict };
}

function table(rows: readonly Row[]): string {
  const cells = [
    [
      'mode',
      'time',
      'bytes copied',
      'clusters saved by copy-before-write',
      'the backup is the drive at its instant',
    ],
    ...rows.map((row) => [
      row.mode,
      `${row.seconds.toFixed(1)} s`,
      `${(row.copied / MiB).toFixed(1)} MiB`,
      String(row.saved),
      `yes: ${row.verdict}`,
    ]),
  ];
  return columns(cells);
}

/** `stillframe demo`: three backups of a drive that two writers keep changing, each one proved. */
async function runDemo(): Promise<number> {
  const say = (line: string): void => void process.stderr.write(`${line}\n`);
  const folder = await mkdtemp(join(tmpdir(), 'stillframe-demo-'));
  const engine = await createEngine();
  try {
    say('Making a drive: a base image and an overlay …');
    const drive = join(folder, 'drive.raw');
    const { ranges, fileSystem } = await makeDrive(folder, drive);
    if (!fileSystem)
      say('mkfs.ext4 is missing (apt-get install e2fsprogs): the drive holds random data only');
    const raw = await engine.openDisk(drive, { format: 'raw', readOnly: true });
    const base = join(folder, 'base.qcow2');
    await (await raw.backup({ target: base, format: 'qcow2', sync: 'full' })).result();
    await raw.close();
    await rm(drive);
    const overlay = join(folder, 'overlay.qcow2');
    await engine.createImage(overlay, { format: 'qcow2', backingFile: 'base.qcow2', backingFormat: 'qcow2' });

    const disk = await engine.openDisk(overlay);
    const writers = new Writers(disk, ranges);
    const rows: Row[] = [];
    try {
      for (const mode of ['full', 'top', 'none'] as const) {
        say(`Backing up with sync mode '${mode}' while ${WRITERS} writers write, zero and discard …`);
        rows.push(await takeBackup(engine, folder, disk, writers, mode, fileSystem));
      }
    } finally {
      await writers.stop();
    }
    await disk.close();
    process.stdout.write(
      `\n${table(rows)}\n\n${writers.requests} requests of the writers went on meanwhile.\n`,
    );
    return 0;
  } finally {
    await engine.close();
    await rm(folder, { recursive: true, force: true });
  }
}

export const demo: Command = {
  name: 'demo',
  usage: '',
  summary: 'Takes a backup in each sync mode while two writers change the drive, and proves each one.',
  positionals: [0, 0],
  options: [],
  run: runDemo,
};
