/** Sync modes that a dirty bitmap steers, and what becomes of the bitmap. Semantics: QMP `blockdev-backup`. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import {
  type BackupJob,
  type BackupOptions,
  type BitmapMode,
  type BitmapStatus,
  createEngine,
  type Disk,
  type Engine,
} from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const MiB = 1 << 20;
const KiB64 = 65536;
const LENGTH = 4 * MiB;

let engine: Engine;
let folder: string;
let disk: Disk;
const at = (name: string): string => join(folder, name);
const content = new Random(5).noise(LENGTH);

beforeAll(async () => {
  engine = await createEngine({ workers: 2 });
});
afterAll(() => engine.close());
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-bitmap-modes-'));
});
afterEach(async () => {
  await disk.close();
  rmSync(folder, { recursive: true, force: true });
});

const FORMATS = ['raw', 'qcow2'] as const;
type Format = (typeof FORMATS)[number];

async function open(format: Format, name = 'disk'): Promise<Disk> {
  await engine.createImage(at(name), { format, length: LENGTH });
  const opened = await engine.openDisk(at(name), { format });
  await opened.write(0, content);
  return opened;
}

async function bitmapOf(name: string, of = disk): Promise<BitmapStatus | undefined> {
  return (await of.bitmaps()).find((bitmap) => bitmap.name === name);
}

const dirtyBytes = async (name = 'b'): Promise<number | undefined> => (await bitmapOf(name))?.count;

/** Dirties three clusters, far from each other. */
async function dirtyThree(): Promise<void> {
  for (const offset of [0, MiB + 5, 3 * MiB]) await disk.write(offset, new Uint8Array(100).fill(7));
}

const add = (persistent = false): Promise<void> => disk.editBitmap({ action: 'add', name: 'b', persistent });

/** Changes the whole content and returns it. */
async function now(): Promise<Uint8Array> {
  return await disk.read(0, LENGTH);
}

async function image(path: string, format: Format): Promise<Uint8Array> {
  const opened = await engine.openDisk(path, { format, readOnly: true });
  try {
    return await opened.read(0, LENGTH);
  } finally {
    await opened.close();
  }
}

describe.each(FORMATS)('a bitmap of a %s disk', (format) => {
  beforeEach(async () => {
    disk = await open(format);
  });

  it('makes a chain of incremental backups, each on the one before', async () => {
    await add(format === 'qcow2');
    const full = await disk.backup({ target: at('0.qcow2'), format: 'qcow2', sync: 'full' });
    await full.result();
    const instants: Uint8Array[] = [];
    for (const index of [1, 2, 3]) {
      const random = new Random(index);
      for (let step = 0; step < 10; step++) {
        const length = random.between(1, 100_000);
        const offset = random.between(0, LENGTH - length);
        if (random.chance(0.3)) await disk.writeZeroes(offset, length, { unmap: true });
        else await disk.write(offset, random.noise(length));
      }
      const planned = await dirtyBytes();
      instants.push(await now());
      const job = await disk.backup({
        target: at(`${index}.qcow2`),
        format: 'qcow2',
        sync: 'incremental',
        bitmap: 'b',
        backing: `${index - 1}.qcow2`,
        speed: 2 * MiB,
      });
      // What guests write meanwhile is for the next one.
      await disk.write(random.between(0, 20) * KiB64, random.noise(3 * KiB64));
      job.setSpeed(0);
      const result = await job.result();
      expect(result.clusters.planned * result.clusterSize).toBe(planned);
      expect(await dirtyBytes()).toBeLessThanOrEqual(4 * KiB64);
      expect(await dirtyBytes()).toBeGreaterThanOrEqual(3 * KiB64);
    }
    for (const [index, instant] of instants.entries()) {
      expect(firstDifference(await image(at(`${index + 1}.qcow2`), 'qcow2'), instant)).toBe(-1);
    }
  });

  it.each<[BitmapMode, number, number]>([
    ['on-success', 1, 4],
    ['never', 4, 4],
    ['always', 1, 4],
  ])(
    'under %s, with 3 clusters dirty before and another one written meanwhile',
    async (bitmapMode, ok, failed) => {
      await add();
      for (const success of [true, false]) {
        await disk.editBitmap({ action: 'clear', name: 'b' });
        await dirtyThree();
        const job = await disk.backup({
          target: at('target'),
          format: 'raw',
          force: true,
          sync: 'bitmap',
          bitmap: 'b',
          bitmapMode,
          autoFinalize: false,
        });
        while (job.status !== 'pending') await new Promise((resolve) => setTimeout(resolve, 2));
        await disk.write(2 * MiB, new Uint8Array(10).fill(1));
        const frozen = await disk.bitmaps();
        expect(frozen.find(({ name }) => name === 'b')).toMatchObject({
          busy: true,
          recording: true,
          count: 3 * KiB64,
        });
        expect(frozen.find(({ name }) => name === '')).toMatchObject({ recording: true, count: KiB64 });
        if (success) job.finalize();
        else job.cancel();
        await job.result().catch(() => undefined);
        // A new target that was not to be is removed: nothing of it was saved.
        expect(await dirtyBytes()).toBe((success ? ok : failed) * KiB64);
        expect(await disk.bitmaps()).toHaveLength(1);
        expect(await bitmapOf('b')).toMatchObject({ busy: false, recording: true });
      }
    },
  );

  it("keeps what was not copied into a target that stays, under 'always'", async () => {
    await add();
    writeFileSync(at('target'), new Uint8Array(LENGTH));
    const source = await now();
    const job = await disk.backup({
      target: at('target'),
      format: 'raw',
      existing: true,
      sync: 'full',
      bitmap: 'b',
      bitmapMode: 'always',
      speed: 4 * MiB,
      workers: 1,
    });
    while (job.snapshot().offset === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    job.cancel();
    await job.result().catch(() => undefined);
    const target = readFileSync(at('target'));
    let missing = 0;
    for (let offset = 0; offset < LENGTH; offset += KiB64) {
      const [want, have] = [source, target].map((bytes) =>
        Buffer.from(bytes.subarray(offset, offset + KiB64)),
      );
      if (want === undefined || have?.equals(want) !== true) missing++;
    }
    expect(missing).toBeGreaterThan(0);
    expect(missing).toBeLessThan(LENGTH / KiB64);
    expect(await dirtyBytes()).toBe(missing * KiB64);
    // What is left is what makes the target whole.
    const rest = await disk.backup({
      target: at('target'),
      format: 'raw',
      existing: true,
      sync: 'incremental',
      bitmap: 'b',
    });
    await rest.result();
    expect(firstDifference(readFileSync(at('target')), source)).toBe(-1);
    expect(await dirtyBytes()).toBe(0);
  });

  it('is brought up to date by a full backup', async () => {
    await add();
    await dirtyThree();
    const job = await disk.backup({
      target: at('target'),
      format: 'qcow2',
      sync: 'full',
      bitmap: 'b',
      bitmapMode: 'on-success',
    });
    expect((await job.result()).clusters.planned).toBe(LENGTH / KiB64);
    expect(await dirtyBytes()).toBe(0);
  });

  it('with finer granules than clusters copies whole clusters', async () => {
    await disk.editBitmap({ action: 'add', name: 'b', granularity: 512 });
    await disk.write(3 * KiB64 - 1, new Uint8Array(2).fill(3));
    await disk.writeZeroes(8 * KiB64, 512);
    expect(await dirtyBytes()).toBe(3 * 512);
    const job = await disk.backup({ target: at('t'), format: 'qcow2', sync: 'incremental', bitmap: 'b' });
    expect((await job.result()).clusters.planned).toBe(3);
  });

  it('leaves no memory behind', async () => {
    await add();
    const rounds = async (): Promise<void> => {
      for (const cancel of [true, false]) {
        await dirtyThree();
        const options = { target: at('t'), format: 'raw', force: true, fleece: true } as const;
        const job = await disk.backup({
          ...options,
          sync: 'incremental',
          bitmap: 'b',
          autoFinalize: !cancel,
        });
        if (cancel) job.cancel();
        await job.result().catch(() => undefined);
        await disk.editBitmap({ action: 'add', name: 'c' });
        await disk.editBitmap({ action: 'merge', name: 'c', sources: ['b'] });
        await disk.editBitmap({ action: 'remove', name: 'c' });
      }
    };
    await rounds();
    const before = engine.arena.usedBytes;
    await rounds();
    expect(engine.arena.usedBytes).toBe(before);
  });

  it.each<[Partial<BackupOptions>, string]>([
    [{ sync: 'incremental' }, "must provide a valid bitmap name for 'incremental' sync mode"],
    [{ sync: 'bitmap' }, "must provide a valid bitmap name for 'bitmap' sync mode"],
    [
      { sync: 'incremental', bitmap: 'b', bitmapMode: 'never' },
      "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    ],
    [{ sync: 'bitmap', bitmap: 'x', bitmapMode: 'never' }, "Bitmap 'x' could not be found"],
    [{ sync: 'bitmap', bitmap: 'b' }, 'Bitmap sync mode must be given when providing a bitmap'],
    [{ sync: 'full', bitmapMode: 'always' }, 'Cannot specify bitmap sync mode without a bitmap'],
    [
      { sync: 'none', bitmap: 'b', bitmapMode: 'always' },
      "sync mode 'none' does not produce meaningful bitmap outputs",
    ],
    [
      { sync: 'full', bitmap: 'b', bitmapMode: 'never' },
      "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
    ],
  ])('is refused for %o', async (options, message) => {
    await add();
    const before = engine.arena.usedBytes;
    const starting = disk.backup({ target: at('t'), format: 'qcow2', sync: 'full', ...options });
    await expect(starting).rejects.toMatchObject({ message });
    expect(engine.arena.usedBytes).toBe(before);
    expect(await bitmapOf('b')).toMatchObject({ busy: false, recording: true });
  });

  it('serves one job at a time', async () => {
    await add();
    const options = { format: 'raw', sync: 'incremental', bitmap: 'b' } as const;
    const job = await disk.backup({ ...options, target: at('one'), autoFinalize: false });
    const busy = {
      code: 'ERR_STILLFRAME_BITMAP_BUSY',
      message: "Bitmap 'b' is currently in use by another operation and cannot be used",
    };
    await expect(disk.backup({ ...options, target: at('two') })).rejects.toMatchObject(busy);
    for (const action of ['remove', 'clear', 'enable', 'disable'] as const) {
      await expect(disk.editBitmap({ action, name: 'b' })).rejects.toMatchObject(busy);
    }
    job.cancel();
    await job.result().catch(() => undefined);
    await disk.editBitmap({ action: 'remove', name: 'b' });
  });
});

describe('a disk', () => {
  beforeEach(async () => {
    disk = await open('raw');
  });

  it('says what is wrong with actions on bitmaps', async () => {
    const rejects = (edit: Parameters<Disk['editBitmap']>[0], message: string): Promise<void> =>
      expect(disk.editBitmap(edit)).rejects.toMatchObject({ message: expect.stringContaining(message) });
    await add();
    await rejects({ action: 'add', name: 'b' }, 'Bitmap already exists: b');
    await rejects({ action: 'add', name: '' }, 'Bitmap name cannot be empty');
    await rejects({ action: 'add', name: 'c', granularity: 513 }, 'Granularity must be power of 2');
    await rejects({ action: 'add', name: 'c', persistent: true }, "Can't make bitmap 'c' persistent");
    await rejects({ action: 'clear', name: 'c' }, "Dirty bitmap 'c' not found");
    await rejects({ action: 'merge', name: 'b', sources: ['c'] }, "Dirty bitmap 'c' not found");
    expect(await disk.bitmaps()).toHaveLength(1);
  });

  it('records only into enabled bitmaps, and merges', async () => {
    await disk.editBitmap({ action: 'add', name: 'b', disabled: true });
    await dirtyThree();
    expect(await dirtyBytes()).toBe(0);
    await disk.editBitmap({ action: 'enable', name: 'b' });
    await dirtyThree();
    await disk.discard(2 * MiB, KiB64);
    expect(await dirtyBytes()).toBe(4 * KiB64);
    await disk.editBitmap({ action: 'add', name: 'c', granularity: 4096, disabled: true });
    await disk.editBitmap({ action: 'merge', name: 'c', sources: ['b'] });
    expect(await dirtyBytes('c')).toBe(4 * KiB64);
    expect(await bitmapOf('c')).toMatchObject({ recording: false, granularity: 4096 });
    await disk.editBitmap({ action: 'disable', name: 'b' });
    await disk.write(5 * KiB64, new Uint8Array(1).fill(9));
    expect(await dirtyBytes()).toBe(4 * KiB64);
  });
});

describe('a transaction', () => {
  let other: Disk;
  beforeEach(async () => {
    disk = await open('qcow2');
    other = await open('raw', 'other');
  });
  afterEach(() => other.close());

  const backupOf = (of: Disk, name: string, more: Partial<BackupOptions> = {}) =>
    ({
      type: 'backup',
      disk: of,
      options: { target: at(name), format: 'raw', sync: 'full', ...more },
    }) as const;
  const settle = (jobs: readonly BackupJob[]): Promise<PromiseSettledResult<unknown>[]> =>
    Promise.allSettled(jobs.map((job) => job.result()));

  it('is one instant of several disks', async () => {
    for (const one of [disk, other]) await one.write(0, new Uint8Array(512));
    // Both disks get the same numbers, one after the other: no instant has the second one ahead of the first.
    let stop = false;
    const writer = (async () => {
      for (let number = 1; !stop; number++) {
        const block = new Uint8Array(512);
        new DataView(block.buffer).setUint32(0, number);
        await disk.write(0, block);
        await other.write(0, block);
      }
    })();
    try {
      for (let round = 0; round < 20; round++) {
        const jobs = await engine.transaction([
          backupOf(disk, 'a', { force: true }),
          backupOf(other, 'b', { force: true }),
        ]);
        await settle(jobs);
        const [first = 0, second = 0] = ['a', 'b'].map((name) => readFileSync(at(name)).readUInt32BE(0));
        expect(first - second === 0 || first - second === 1, `${first} and ${second}`).toBe(true);
      }
    } finally {
      stop = true;
      await writer;
    }
  });

  it('does everything or nothing', async () => {
    await add(true);
    await dirtyThree();
    const before = engine.arena.usedBytes;
    await expect(
      engine.transaction([
        { type: 'bitmap', disk, edit: { action: 'clear', name: 'b' } },
        { type: 'bitmap', disk, edit: { action: 'disable', name: 'b' } },
        { type: 'bitmap', disk, edit: { action: 'add', name: 'c' } },
        { type: 'bitmap', disk, edit: { action: 'merge', name: 'c', sources: ['b'] } },
        backupOf(other, 'a'),
        { type: 'bitmap', disk: other, edit: { action: 'add', name: 'd' } },
        { type: 'abort' },
      ]),
    ).rejects.toMatchObject({ message: 'Transaction aborted using Abort action' });
    expect(engine.arena.usedBytes).toBe(before);
    expect(await disk.bitmaps()).toMatchObject([
      { name: 'b', count: 3 * KiB64, recording: true, busy: false },
    ]);
    expect(await other.bitmaps()).toEqual([]);
    const [job] = await engine.transaction([
      { type: 'bitmap', disk, edit: { action: 'remove', name: 'b' } },
      { type: 'bitmap', disk, edit: { action: 'add', name: 'c' } },
      backupOf(disk, 'a', { sync: 'incremental', bitmap: 'c' }),
    ]);
    expect((await job?.result())?.clusters.planned).toBe(0);
    expect(await disk.bitmaps()).toMatchObject([{ name: 'c' }]);
  });

  it('that is grouped fails as a whole', async () => {
    const jobs = await engine.transaction([backupOf(disk, 'a'), backupOf(other, 'b', { speed: 65536 })], {
      grouped: true,
    });
    const [first, second] = jobs;
    while (first?.status === 'created' || first?.status === 'running')
      await new Promise((resolve) => setTimeout(resolve, 2));
    second?.cancel();
    const results = await settle(jobs);
    expect(results.map(({ status }) => status)).toEqual(['rejected', 'rejected']);
    for (const name of ['a', 'b']) expect(() => readFileSync(at(name))).toThrow('ENOENT');
  });

  it('that is grouped commits as a whole, where one waits for that', async () => {
    const jobs = await engine.transaction(
      [backupOf(disk, 'a', { autoFinalize: false }), backupOf(other, 'b')],
      { grouped: true },
    );
    const [first, second] = jobs;
    const pending: number[] = [];
    for (const [index, job] of jobs.entries()) job.on('pending', () => pending.push(index));
    while (first?.status !== 'pending' || second?.status !== 'pending') {
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
    expect(pending).toEqual([0]);
    first.finalize();
    const results = await settle(jobs);
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'fulfilled']);
  });
});

describe.skipIf(!hasPeer('qemu-img'))('a persistent bitmap', () => {
  const info = (name = 'disk'): unknown =>
    JSON.parse(run('qemu-img', ['info', '-U', '--output', 'json', at(name)]))['format-specific'].data.bitmaps;

  it('is in use while a job relies on it, and is stored when the disk is closed', async () => {
    disk = await open('qcow2');
    await add(true);
    await dirtyThree();
    await disk.close();
    disk = await engine.openDisk(at('disk'), { format: 'qcow2' });
    // Nobody has written to it yet.
    expect(info()).toEqual([{ flags: ['auto'], name: 'b', granularity: KiB64 }]);
    const options = { format: 'qcow2', sync: 'incremental', bitmap: 'b' } as const;
    const job = await disk.backup({ ...options, target: at('t'), autoFinalize: false });
    expect(info()).toEqual([{ flags: ['in-use', 'auto'], name: 'b', granularity: KiB64 }]);
    while (job.status !== 'pending') await new Promise((resolve) => setTimeout(resolve, 2));
    await disk.write(2 * MiB, new Uint8Array(1));
    job.finalize();
    await job.result();
    await disk.close();
    expect(info()).toEqual([{ flags: ['auto'], name: 'b', granularity: KiB64 }]);
    run('qemu-img', ['check', '-q', at('disk')]);
    disk = await engine.openDisk(at('disk'), { format: 'qcow2', readOnly: true });
    expect(await bitmapOf('b')).toMatchObject({ count: KiB64, persistent: true });
  });

  it('of a read-only image is copied by and stays as it is', async () => {
    disk = await open('qcow2');
    await add(true);
    await dirtyThree();
    await disk.close();
    const before = readFileSync(at('disk'));
    disk = await engine.openDisk(at('disk'), { format: 'qcow2', readOnly: true });
    const options = { target: at('t'), format: 'qcow2', sync: 'bitmap', bitmap: 'b' } as const;
    await expect(disk.backup({ ...options, bitmapMode: 'on-success' })).rejects.toMatchObject({
      message: "Bitmap 'b' is readonly and cannot be modified",
    });
    const job = await disk.backup({ ...options, bitmapMode: 'never' });
    expect((await job.result()).clusters.planned).toBe(3);
    await disk.close();
    expect(Buffer.compare(readFileSync(at('disk')), before)).toBe(0);
  });
});
