/** A mirror on one thread, with guests that write at the worst moments. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, expect, it } from 'vitest';
import { beginMirror, type MirrorJobOptions } from '#src/backup/mirror-job.js';
import { DirtyBitmap } from '#src/bitmap/dirty-bitmap.js';
import { DISK_CONTROL_BYTES, Disk } from '#src/block/disk.js';
import { CopyBuffer, type CopyError } from '#src/block/filters/copy-before-write.js';
import type { Mirror, MirrorWorker } from '#src/block/filters/mirror.js';
import { closeNode, openImage } from '#src/block/graph.js';
import { createRuntime } from '#src/kernels/runtime.js';

const runtime = createRuntime(64 << 20);
const { arena } = runtime;
const buffer = new CopyBuffer(runtime);
const UNIT = 65536;
const LENGTH = 4 * UNIT;
const data = arena.alloc(UNIT, 'data of a guest');
let folder: string;
let disks: Disk[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-mirror-'));
});
afterEach(() => {
  for (const disk of disks) closeNode(runtime, disk.descriptor.node);
  disks = [];
  rmSync(folder, { recursive: true, force: true });
});
afterAll(() => arena.free(data));

function open(name: string, byte: number): Disk {
  writeFileSync(join(folder, name), new Uint8Array(LENGTH).fill(byte));
  const node = openImage(runtime, join(folder, name), { format: 'raw', readOnly: false });
  if (node.driver !== 'raw') throw new Error('not raw');
  const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
  const id = 100 + disks.length + Math.floor(control / 8);
  const disk = new Disk(
    runtime,
    { id, control, node, length: node.length, readOnly: false, discard: 'unmap' },
    () => buffer,
  );
  disks.push(disk);
  return disk;
}

const OPTIONS: MirrorJobOptions = {
  sync: 'full',
  copyMode: 'background',
  granularity: UNIT,
  unmap: true,
  targetReadsZero: false,
  pivots: false,
  onSourceError: 'report',
  onTargetError: 'report',
  autoFinalize: true,
};

function start(source: Disk, target: Disk): { readonly mirror: Mirror; readonly bitmap: DirtyBitmap } {
  const { mirror } = beginMirror(runtime, source, target, OPTIONS, 7);
  return { mirror: source.attachMirror(mirror), bitmap: new DirtyBitmap(runtime, mirror.bitmap) };
}

const content = (name: string): number[] => {
  const bytes = readFileSync(join(folder, name));
  return Array.from({ length: LENGTH / UNIT }, (_, index) => bytes[index * UNIT] ?? -1);
};

function write(disk: Disk, byte: number, offset: number): void {
  arena.u8.fill(byte, data, data + UNIT);
  disk.write(offset, data, UNIT);
}

const worker: MirrorWorker = {
  interrupted: false,
  failed: (error: CopyError) => {
    throw error;
  },
};

it('copies what was written while it was copied', () => {
  const [source, target] = [open('source', 1), open('target', 2)];
  const { mirror, bitmap } = start(source, target);
  mirror.mark(0, UNIT);
  const read = source.read.bind(source);
  source.read = (offset, pointer, length) => {
    read(offset, pointer, length);
    source.read = read;
    write(source, 3, 0);
  };
  mirror.copyNext(worker);
  expect(content('target')).toEqual([1, 2, 2, 2]);
  expect(bitmap.test(0)).toBe(true);
  mirror.finish();
  expect(content('target')).toEqual([3, 2, 2, 2]);
  expect(bitmap.count).toBe(0);
});

it('does not take for a hole what was one before', () => {
  const [source, target] = [open('source', 1), open('target', 2)];
  const { mirror } = start(source, target);
  source.writeZeroes(0, UNIT, true);
  const status = source.status.bind(source);
  source.status = (offset, length) => {
    const extent = status(offset, length);
    source.status = status;
    write(source, 3, 0);
    return extent;
  };
  mirror.copyNext(worker);
  mirror.finish();
  expect(content('target')).toEqual([3, 2, 2, 2]);
});

it('is dirty where it could not be copied', () => {
  const [source, target] = [open('source', 1), open('target', 2)];
  const { mirror, bitmap } = start(source, target);
  mirror.mark(UNIT, UNIT);
  const { changeAlone } = Disk.prototype;
  Disk.prototype.changeAlone = () => {
    throw new Error('broken');
  };
  try {
    expect(() => mirror.copyNext(worker)).toThrowError(expect.objectContaining({ operation: 'write' }));
  } finally {
    Disk.prototype.changeAlone = changeAlone;
  }
  expect(bitmap.test(UNIT)).toBe(true);
  mirror.finish();
  expect(content('target')).toEqual([2, 1, 2, 2]);
});

it('has what a guest has written before the guest is answered', () => {
  const [source, target] = [open('source', 1), open('target', 2)];
  const { mirror, bitmap } = start(source, target);
  source.setMirror(mirror.descriptor);
  write(source, 5, 2 * UNIT);
  expect(content('target')).toEqual([2, 2, 5, 2]);
  expect(bitmap.count).toBe(0);
  source.setMirror(undefined);
  write(source, 6, 2 * UNIT);
  expect(content('target')).toEqual([2, 2, 5, 2]);
  expect(bitmap.count).toBe(UNIT);
});
