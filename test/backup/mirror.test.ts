/** A disk becomes a copy of another one that guests write to. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type MirrorCopyMode, type MirrorJob } from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';

const MiB = 1 << 20;
const LENGTH = 8 * MiB + 512;

let engine: Engine;
let folder: string;
const at = (name: string): string => join(folder, name);

beforeAll(async () => {
  engine = await createEngine({ arenaBytes: 128 * MiB, workers: 3 });
});
afterAll(() => engine.close());
const open: Disk[] = [];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-mirror-'));
});
afterEach(async () => {
  await Promise.all(open.splice(0).map((disk) => disk.close()));
  rmSync(folder, { recursive: true, force: true });
});

type Format = 'raw' | 'qcow2';

async function make(name: string, format: Format, content?: Uint8Array): Promise<Disk> {
  if (format === 'raw') writeFileSync(at(name), content ?? new Uint8Array(LENGTH));
  else await engine.createImage(at(name), { format, length: LENGTH });
  const disk = await engine.openDisk(at(name), { format });
  open.push(disk);
  if (format === 'qcow2' && content !== undefined) await disk.write(0, content);
  return disk;
}

/** Content with holes and zeroes. */
function content(seed: number): Uint8Array {
  const random = new Random(seed);
  const bytes = random.bytes(LENGTH);
  for (let index = 0; index < 12; index++) {
    const from = random.between(0, LENGTH - 1);
    bytes.fill(0, from, from + random.between(0, MiB - 1));
  }
  return bytes;
}

const ready = (job: MirrorJob): Promise<void> => new Promise((resolve) => job.once('ready', () => resolve()));

async function expectSame(one: Disk, other: Disk): Promise<void> {
  expect(firstDifference(await one.read(0, LENGTH), await other.read(0, LENGTH))).toBe(-1);
}

/** Writes, zeroes and discards all over the disk, some at once, until it is told to stop. */
class Guest {
  readonly #disk: Disk;
  readonly #random: Random;
  #stopped = false;
  readonly #done: Promise<void>[];
  writes = 0;

  constructor(disk: Disk, seed: number) {
    this.#disk = disk;
    this.#random = new Random(seed);
    this.#done = Array.from({ length: 4 }, () => this.#run());
  }

  async stop(): Promise<void> {
    this.#stopped = true;
    await Promise.all(this.#done);
  }

  async #run(): Promise<void> {
    while (!this.#stopped) {
      const random = this.#random;
      const offset = random.between(0, LENGTH / 512 - 1) * 512;
      const length = Math.min(LENGTH - offset, (1 + random.between(0, 256 - 1)) * 512);
      const kind = random.between(0, 8 - 1);
      if (kind === 0) await this.#disk.writeZeroes(offset, length, { unmap: true });
      else if (kind === 1) await this.#disk.discard(offset, length);
      else await this.#disk.write(offset, random.bytes(length));
      this.writes++;
    }
  }
}

describe.each([
  ['raw', 'raw'],
  ['raw', 'qcow2'],
  ['qcow2', 'raw'],
  ['qcow2', 'qcow2'],
] as const)('a mirror from %s to %s', (from, to) => {
  it.each<[MirrorCopyMode, number]>([
    ['background', 65536],
    ['background', 4096],
    ['background', 4 * MiB],
    ['write-blocking', 65536],
    ['write-blocking', 512],
  ])(
    'is the same once it is complete, copying %s with a granularity of %i',
    async (copyMode, granularity) => {
      const source = await make('source', from, content(1));
      const target = await make('target', to, content(2));
      const guest = new Guest(source, 3);
      const job = await source.mirror(target, { sync: 'full', copyMode, granularity });
      await ready(job);
      const before = guest.writes;
      while (guest.writes < before + 50) await new Promise((resolve) => setTimeout(resolve, 5));
      await guest.stop();
      if (copyMode === 'write-blocking') await expectSame(source, target);
      job.complete();
      await job.result();
      await expectSame(source, target);
      const { offset, length } = job.snapshot();
      expect(offset).toBe(length);
      expect(await source.bitmaps()).toEqual([]);
    },
  );
});
