/** How the world is before a run: the arena, the files, the drive. */
import { createImage } from '#src/block/create.js';
import { DISK_CONTROL_BYTES, type DiskDescriptor } from '#src/block/disk.js';
import { editDiskBitmap, findBitmap } from '#src/block/disk-bitmaps.js';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { relinkNode } from '#src/block/relink.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import { ARENA_BASE } from '#src/kernels/arena.js';
import { arena, buffer, files, oracle, runtime, type Setup, TARGETS, world } from './context.js';
import { FOLDER, type SavedFiles } from './files.js';
import { dataOf } from './oracle.js';
import { type Bitmap, isPlanned, type Job, jobsOf, type Scenario } from './scenario.js';

/** The bitmap of a scenario, and the backup that it has recorded since. */
export const BITMAP = 'b';
export const PREVIOUS = `${FOLDER}/previous`;
export const OLD_TARGET = new Uint8Array(1536).fill(0x6f);

/** Bytes of the arena in use when only the threads' buffers are taken from it. */
export const EMPTY_USED = arena.usedBytes;
// The arena as it is when only the threads' buffers are taken from it.
const HEADER = 64;
const highWaterWord = (ARENA_BASE + 8) >> 2;
const emptyHighWater = arena.u32[highWaterWord] ?? 0;
const emptyBase = arena.u8.slice(ARENA_BASE, ARENA_BASE + HEADER);
const emptyRest = arena.u8.slice(emptyHighWater - HEADER, emptyHighWater);

export function emptyArena(): void {
  arena.u8.fill(0, emptyHighWater - HEADER, arena.u32[highWaterWord] ?? 0);
  arena.u8.set(emptyBase, ARENA_BASE);
  arena.u8.set(emptyRest, emptyHighWater - HEADER);
}

export function layerPath(scenario: Pick<Scenario, 'source'>, layer: number): string {
  const top = scenario.source.backing.length;
  if (layer === top) return `${FOLDER}/source`;
  return `${FOLDER}/layer${layer}`;
}

/** Where a job that is no backup writes to. */
export function targetPath(scenario: Scenario): string {
  const { source, chain } = scenario;
  if (chain === undefined) return TARGET;
  return layerPath(scenario, source.backing.length - (chain.type === 'stream' ? 0 : chain.base));
}

/** The format of that. */
export function targetFormat({ source, job, chain }: Scenario): 'raw' | 'qcow2' {
  if (chain === undefined) return job.format;
  return chain.type === 'commit' && chain.base === source.backing.length ? 'raw' : 'qcow2';
}

function writeFile(path: string, bytes: Uint8Array): void {
  const fd = files.openSync(path, 0o102);
  files.writeSync(fd, bytes, 0, bytes.length, 0);
  files.closeSync(fd);
}

function makeSource(scenario: Scenario): void {
  const { source } = scenario;
  const top = source.backing.length;
  for (let layer = 0; layer <= top; layer++) {
    const path = layerPath(scenario, layer);
    const format = layer === top ? source.format : layer === 0 ? 'raw' : 'qcow2';
    const length = layer === top ? source.length : (source.backing[top - 1 - layer] ?? 0);
    createImage(runtime, path, {
      format,
      length,
      ...(format === 'raw'
        ? {}
        : {
            clusterSize: source.clusterSize,
            version: source.version,
            refcountBits: source.version === 2 ? 16 : source.refcountBits,
            ...(layer === 0
              ? {}
              : {
                  backingFile: layerPath(scenario, layer - 1),
                  backingFormat: layer === 1 ? 'raw' : 'qcow2',
                }),
          }),
    });
    const ranges = scenario.fill.filter((range) => range.layer === layer);
    if (ranges.length === 0) continue;
    const descriptor = openImage(runtime, path, { format, readOnly: false });
    const node = attachNode(runtime, descriptor);
    ranges.forEach(({ offset, length: bytes }, index) => {
      arena.u8.set(dataOf(1000 + layer * 20 + index, offset, bytes), buffer);
      if (index % 5 === 4) node.writeZeroes(offset, bytes, true);
      else node.write(offset, buffer, bytes);
    });
    closeNode(runtime, descriptor);
  }
}

export function readImage(path: string, format: 'raw' | 'qcow2'): Uint8Array {
  const descriptor = openImage(runtime, path, { format, readOnly: true, lock: 'none' });
  try {
    const node = attachNode(runtime, descriptor);
    node.read(0, buffer, node.length);
    return arena.copyOut(buffer, node.length);
  } finally {
    closeNode(runtime, descriptor);
  }
}

/** A disk on an open image. */
export function diskOn(id: number, node: NodeDescriptor, length: number, readOnly: boolean): DiskDescriptor {
  const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
  return { id, control, node, length, readOnly, discard: 'unmap' };
}

/** Whether what a job copies comes to lie on the backup before. */
export function isOnPrevious({ sync, target }: Job): boolean {
  return isPlanned(sync) && target === 'new';
}

/** The backup before: the drive as it was before what its bitmap says was changed. */
export function previousOf(drive: Uint8Array, { dirty }: Bitmap): Uint8Array {
  const previous = drive.slice();
  dirty.forEach(({ offset, length }, index) => {
    previous.set(dataOf(900 + index, offset, length), offset);
  });
  return previous;
}

function addBitmap(disk: DiskDescriptor, { granularity, persistent, dirty }: Bitmap): void {
  editDiskBitmap(runtime, disk, { action: 'add', name: BITMAP, granularity, persistent }).keep();
  const bitmap = findBitmap(runtime, disk, BITMAP, []);
  for (const { offset, length } of dirty) bitmap.set(offset, length);
}

/** The image keeps the bitmap before anybody opens it. */
function storeBitmap(path: string, length: number, bitmap: Bitmap): void {
  const node = openImage(runtime, path, { format: 'qcow2', readOnly: false });
  addBitmap(diskOn(0, node, length, false), bitmap);
  closeNode(runtime, node);
}

/** The world as it was when a scenario had been set up, for the next run of the same one. */
interface Still {
  readonly scenario: string;
  readonly setup: Setup;
  readonly files: SavedFiles;
  readonly drive: Uint8Array;
  readonly unit: number;
  readonly base: Uint8Array;
  /** Pieces of the arena that are not zero. */
  readonly pieces: readonly { readonly at: number; readonly bytes: Uint8Array }[];
}

const [TARGET] = TARGETS;
/** Number of the drive's disk. */
export const DRIVE_DISK = 1;
/** Numbers of the disks below the drive, or on the target of a mirror. */
export const TARGET_DISK = 2;
export const LAST_DISK = 4;
const PIECE = 1024;
let still: Still | undefined;

/** Sets the world up for a run of the scenario. */
export function setUp(scenario: Scenario): Setup {
  const text = JSON.stringify(scenario);
  if (still?.scenario === text) return restore(still);
  emptyArena();
  files.clear();
  makeSource(scenario);
  const { format, length } = scenario.source;
  const path = layerPath(scenario, scenario.source.backing.length);
  const drive = readImage(path, format);
  oracle.drive.set(drive);
  const { bitmap } = scenario;
  const previous = bitmap && previousOf(drive, bitmap);
  if (previous !== undefined) writeFile(PREVIOUS, previous);
  makeTarget(scenario, previous);
  if (bitmap?.persistent === true) storeBitmap(path, length, bitmap);
  // What follows gets memory that nobody had before.
  emptyArena();
  const chain = scenario.chain && openChain(scenario);
  const disk =
    chain?.[0] ?? diskOn(DRIVE_DISK, openImage(runtime, path, { format, readOnly: false }), length, false);
  const target = scenario.chain === undefined ? openTarget(scenario) : chain?.[scenario.chain.base];
  const unit = Math.max(unitOf(disk.node), target === undefined ? 1 : unitOf(target.node));
  oracle.begin(length, unit);
  const controls = jobsOf(scenario).map(({ speed }) => {
    const job = new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job'));
    job.transition('created');
    job.speed = speed;
    return job.pointer;
  });
  files.settle();
  if (bitmap?.persistent === false) addBitmap(disk, bitmap);
  const setup: Setup = { disk, target, chain, controls, words: arena.alloc(64, 'simulator') };
  oracle.diskText = JSON.stringify(setup);
  if (world.exploring) still = save(text, setup, drive, unit);
  return setup;
}

function unitOf(node: NodeDescriptor): number {
  return node.driver === 'qcow2' ? 2 ** node.clusterBits : 1;
}

/** The images of the drive's chain from the drive's own down, as the daemon has them. */
function openChain({ source, mirror, chain }: Scenario): DiskDescriptor[] {
  const disks: DiskDescriptor[] = [];
  const lowest = source.backing.length;
  let below: DiskDescriptor | undefined;
  for (let index = lowest; index >= 0; index--) {
    const readOnly = index > 0 && (chain?.type === 'stream' || index !== chain?.base);
    const format = index === lowest ? 'raw' : 'qcow2';
    const path = layerPath({ source }, lowest - index);
    const node = openImage(runtime, path, { format, readOnly, chain: false });
    const length = index === 0 ? source.length : (source.backing[index - 1] ?? 0);
    const linked = relinkNode(runtime, node, { backing: below && asBacking(below) });
    below = { ...diskOn(DRIVE_DISK + index, linked, length, readOnly), discard: mirror?.discard ?? 'unmap' };
    disks.unshift(index === 0 ? { ...below, discard: 'unmap' } : below);
  }
  return disks;
}

/** An image as what another one lies on: what is written to it is seen there. */
export function asBacking(disk: DiskDescriptor): NodeDescriptor {
  const { node, length, readOnly } = disk;
  return readOnly ? node : { driver: 'live', path: node.path, readOnly, length, disk };
}

/** The target of a mirror, which is there before the job. */
function openTarget({ job, mirror, source }: Scenario): DiskDescriptor | undefined {
  if (mirror === undefined) return undefined;
  const node = openImage(runtime, TARGET, { format: job.format, readOnly: false, chain: false });
  return { ...diskOn(TARGET_DISK, node, source.length, false), discard: mirror.discard };
}

/** @param previous what an existing target holds; default: nothing of the drive */
function makeTarget(scenario: Scenario, previous: Uint8Array | undefined): void {
  const { source, job, mirror } = scenario;
  const { length } = source;
  if (scenario.chain !== undefined) return;
  if (mirror !== undefined && job.target === 'new') {
    const { format, sync, targetClusterSize: clusterSize } = job;
    const top = source.backing.length;
    const below =
      sync === 'none'
        ? { backingFile: layerPath(scenario, top), backingFormat: source.format }
        : {
            backingFile: layerPath(scenario, top - 1),
            backingFormat: top === 1 ? ('raw' as const) : ('qcow2' as const),
          };
    createImage(runtime, TARGET, {
      format,
      length,
      ...(format === 'qcow2' ? { clusterSize, ...(sync === 'full' ? {} : below) } : {}),
    });
    return;
  }
  if (job.target === 'replace') writeFile(TARGET, OLD_TARGET);
  if (job.target !== 'existing') return;
  const { format, targetClusterSize: clusterSize } = job;
  createImage(runtime, TARGET, { format, length, ...(format === 'qcow2' ? { clusterSize } : {}) });
  const descriptor = openImage(runtime, TARGET, { format, readOnly: false });
  arena.u8.set(previous ?? new Uint8Array(length).fill(0x65), buffer);
  attachNode(runtime, descriptor).write(0, buffer, length);
  closeNode(runtime, descriptor);
}

function save(scenario: string, setup: Setup, drive: Uint8Array, unit: number): Still {
  const pieces: Still['pieces'][number][] = [];
  const end = arena.u32[highWaterWord] ?? 0;
  for (let at = emptyHighWater - HEADER; at < end; at += PIECE) {
    const bytes = arena.u8.slice(at, Math.min(end, at + PIECE));
    if (bytes.some((byte) => byte !== 0)) pieces.push({ at, bytes });
  }
  const base = arena.u8.slice(ARENA_BASE, ARENA_BASE + HEADER);
  return { scenario, setup, files: files.save(), drive, unit, base, pieces };
}

function restore({ setup, files: saved, drive, unit, base, pieces }: Still): Setup {
  emptyArena();
  for (const { at, bytes } of pieces) arena.u8.set(bytes, at);
  arena.u8.set(base, ARENA_BASE);
  files.restore(saved);
  oracle.drive.set(drive);
  oracle.begin(drive.length, unit);
  oracle.diskText = JSON.stringify(setup);
  return setup;
}
