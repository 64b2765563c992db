import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { constants, inflateRawSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { checkCompression } from '#src/block/compression.js';
import { createImage } from '#src/block/create.js';
import { editBitmap } from '#src/block/edit-bitmap.js';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import { STATUS_COMPRESSED } from '#src/block/node.js';
import { readBitmap } from '#src/block/qcow2/index.js';
import { HostFile } from '#src/block/raw/file.js';
import { StillframeError } from '#src/errors.js';
import { areasOf } from '../support/bitmaps.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { COMPRESSED, Qcow2Bytes } from '../support/qcow2-bytes.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';
import { hostFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
const peers = hasPeer('qemu-img');

function expectPeersToSee(path: string, model: Buffer): void {
  const raw = join(folder, 'model.raw');
  writeFileSync(raw, model);
  run('qemu-img', ['check', path]);
  run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', raw, path]);
}

interface Shape {
  readonly clusterBits: number;
  readonly refcountBits: number;
  readonly compressionType: number;
  readonly extendedL2: boolean;
  readonly version: 2 | 3;
}

const shapes: Shape[] = [];
for (const compressionType of [0, 1]) {
  for (const [clusterBits, refcountBits] of [
    [9, 1],
    [9, 16],
    [9, 64],
    [12, 2],
    [14, 8],
    [16, 1],
    [16, 2],
    [16, 16],
    [16, 64],
    [18, 4],
    [21, 16],
    [21, 32],
  ] as const) {
    shapes.push({ clusterBits, refcountBits, compressionType, extendedL2: false, version: 3 });
  }
  for (const clusterBits of [14, 16, 21]) {
    shapes.push({ clusterBits, refcountBits: 16, compressionType, extendedL2: true, version: 3 });
  }
}
shapes.push({ clusterBits: 16, refcountBits: 16, compressionType: 0, extendedL2: false, version: 2 });

const nameOf = (shape: Shape): string =>
  `${2 ** shape.clusterBits} byte clusters, refcounts of ${shape.refcountBits} bits, ` +
  `${shape.compressionType === 1 ? 'zstd' : 'deflate'}${shape.extendedL2 ? ', subclusters' : ''}, version ${shape.version}`;

describe.skipIf(!peers)('compressed clusters', () => {
  it.each(shapes.map((shape) => [nameOf(shape), shape] as const))(
    'are written, replaced and given up with %s',
    (name, shape) => {
      const random = new Random(shape.clusterBits * 1000 + shape.refcountBits * 10 + shape.compressionType);
      const clusterSize = 2 ** shape.clusterBits;
      const clusters = shape.clusterBits >= 18 ? 12 : shape.clusterBits >= 16 ? 60 : 150;
      // The drive ends inside of a cluster.
      const length = clusters * clusterSize - (clusterSize > 512 ? 512 : 0);
      const path = join(folder, `${name}.qcow2`);
      bench.create(path, { length, ...shape });
      const model = Buffer.alloc(length);
      const image = bench.open(path, false);
      const steps = shape.clusterBits >= 18 ? 30 : 60;
      for (let step = 0; step < steps; step++) {
        const first = random.between(0, clusters - 1);
        const most = Math.min(Math.max(1, (1 << 20) / clusterSize), 20);
        const offset = first * clusterSize;
        const size = Math.min(length - offset, random.between(1, most) * clusterSize);
        switch (step < 10 ? 0 : random.between(0, 6)) {
          case 4: {
            const start = random.between(0, length - 2);
            const bytes = Buffer.from(
              random.noise(random.between(1, Math.min(length - start, 3 * clusterSize))),
            );
            bench.write(image.node, start, bytes.subarray(0, 1 << 20));
            bytes.subarray(0, 1 << 20).copy(model, start);
            break;
          }
          case 5:
            image.node.discard(offset, size);
            bench.read(image.node, offset, size).copy(model, offset);
            break;
          case 6:
            if (random.chance(0.5)) image.node.flush();
            image.node.writeZeroes(offset, size, random.chance(0.5));
            model.fill(0, offset, offset + size);
            break;
          default: {
            const bytes = random.mixture(size, clusterSize);
            bench.writeCompressed(image.node, offset, bytes);
            bytes.copy(model, offset);
          }
        }
        if (step % 15 === 14) expect(firstDifference(bench.read(image.node, 0, length), model)).toBe(-1);
      }
      image.close();
      expectPeersToSee(path, model);
    },
  );
});

const CLUSTER = 65536;

/** A new image of 64 clusters of 64 KiB. */
function newImage(name: string, options: { refcountBits?: number; compressionType?: number } = {}): string {
  const path = join(folder, name);
  bench.create(path, { length: 64 * CLUSTER, clusterBits: 16, ...options });
  return path;
}

/** Clusters that become about a quarter as large. */
function quarters(random: Random, count: number): Buffer {
  const bytes = Buffer.alloc(count * CLUSTER);
  for (let cluster = 0; cluster < count; cluster++) {
    bytes.set(random.noise(CLUSTER / 4), cluster * CLUSTER);
  }
  return bytes;
}

function compressedEntries(path: string): bigint[] {
  const image = Qcow2Bytes.read(path);
  const entries = Array.from({ length: 64 }, (_, index) => image.u64(image.l2() + index * 8));
  return entries.filter((entry) => (entry & COMPRESSED) !== 0n);
}

/** Host clusters that the data of compressed entries begins in. */
const hostClusters = (path: string): Set<bigint> =>
  new Set(compressedEntries(path).map((entry) => (entry & ((1n << 54n) - 1n)) / BigInt(CLUSTER)));

describe('compressed data', () => {
  it('shares host clusters as far as refcounts can tell', () => {
    for (const refcountBits of [1, 2, 16]) {
      const path = newImage(`shared-${refcountBits}.qcow2`, { refcountBits });
      const image = bench.open(path, false);
      const bytes = quarters(new Random(5), 32);
      bench.writeCompressed(image.node, 0, bytes);
      expect(image.node.status(0, CLUSTER).flags & STATUS_COMPRESSED).not.toBe(0);
      image.close();
      expect(compressedEntries(path)).toHaveLength(32);
      const hosts = hostClusters(path).size;
      if (refcountBits === 1) expect(hosts).toBe(32);
      else if (refcountBits === 2) expect(hosts).toBeLessThan(16);
      else expect(hosts).toBeLessThan(10);
      if (peers) run('qemu-img', ['check', path]);
    }
  });

  it('fills what room is left in clusters where no more fitted in', () => {
    const path = newImage('room.qcow2');
    const image = bench.open(path, false);
    const random = new Random(11);
    const large = Buffer.alloc(CLUSTER);
    large.set(random.noise(60_000));
    bench.writeCompressed(image.node, 0, quarters(random, 1));
    bench.write(image.node, 8 * CLUSTER, random.noise(CLUSTER));
    for (const cluster of [1, 2]) bench.writeCompressed(image.node, cluster * CLUSTER, large);
    for (const cluster of [3, 4]) bench.writeCompressed(image.node, cluster * CLUSTER, quarters(random, 1));
    image.close();
    const place = (entry: bigint | undefined) => ((entry ?? 0n) & ((1n << 54n) - 1n)) / BigInt(CLUSTER);
    const [first, ...more] = compressedEntries(path).map(place);
    expect(more.map((host) => host - (first ?? 0n))).toEqual([2n, 2n, 0n, 0n]);
    if (peers) run('qemu-img', ['check', path]);
  });

  it('is stored as it is where it does not get smaller', () => {
    for (const compressionType of [0, 1]) {
      const path = newImage(`noise-${compressionType}.qcow2`, { compressionType });
      const image = bench.open(path, false);
      const bytes = Buffer.from(new Random(6).noise(4 * CLUSTER));
      bytes.fill(1, CLUSTER, 2 * CLUSTER);
      bench.writeCompressed(image.node, 0, bytes);
      const kinds = [0, 1, 2, 3].map((cluster) => image.node.status(cluster * CLUSTER, CLUSTER).flags);
      expect(kinds.map((flags) => (flags & STATUS_COMPRESSED) !== 0)).toEqual([false, true, false, false]);
      expect(firstDifference(bench.read(image.node, 0, bytes.length), bytes)).toBe(-1);
      image.close();
      if (peers) run('qemu-img', ['check', path]);
    }
  });

  it('of a cluster that the drive ends in is padded with zeroes', () => {
    const path = join(folder, 'tail.qcow2');
    bench.create(path, { length: 3 * CLUSTER + 512, clusterBits: 16 });
    const image = bench.open(path, false);
    // Old data is in the memory that clusters are filled up in.
    bench.write(image.node, 0, Buffer.alloc(2 * CLUSTER, 1));
    bench.writeCompressed(image.node, 2 * CLUSTER, Buffer.alloc(CLUSTER, 2));
    bench.write(image.node, 2 * CLUSTER + 512, Buffer.alloc(512, 3));
    bench.writeCompressed(image.node, 3 * CLUSTER, Buffer.alloc(512, 4));
    image.close();
    const file = Qcow2Bytes.read(path);
    const place = Number(file.u64(file.l2() + 3 * 8) & ((1n << 54n) - 1n));
    const cluster = inflateRawSync(file.bytes.subarray(place), { finishFlush: constants.Z_SYNC_FLUSH });
    expect(firstDifference(cluster, Buffer.alloc(CLUSTER).fill(4, 0, 512))).toBe(-1);
  });

  it('does not go on in a cluster that was given up meanwhile', () => {
    const path = newImage('given-up.qcow2');
    const image = bench.open(path, false);
    const random = new Random(7);
    bench.writeCompressed(image.node, 0, quarters(random, 1));
    image.node.flush();
    image.node.discard(0, CLUSTER);
    image.node.flush();
    image.node.flush();
    const plain = Buffer.from(random.noise(4 * CLUSTER));
    bench.write(image.node, 8 * CLUSTER, plain);
    const packed = quarters(random, 8);
    bench.writeCompressed(image.node, 16 * CLUSTER, packed);
    expect(firstDifference(bench.read(image.node, 8 * CLUSTER, plain.length), plain)).toBe(-1);
    expect(firstDifference(bench.read(image.node, 16 * CLUSTER, packed.length), packed)).toBe(-1);
    image.close();
    if (peers) run('qemu-img', ['check', path]);
  });

  it('that could not be written leaves nothing behind', () => {
    const path = newImage('failed.qcow2');
    let failing = false;
    class FailingFile extends HostFile {
      override write(offset: number, pointer: number, length: number): void {
        if (failing) throw new StillframeError('ERR_STILLFRAME_NO_SPACE', 'full');
        super.write(offset, pointer, length);
      }
    }
    const image = bench.open(
      path,
      false,
      undefined,
      (file) => new FailingFile(bench.runtime.arena, hostFile(file)),
    );
    const random = new Random(8);
    const first = quarters(random, 3);
    bench.writeCompressed(image.node, 0, first);
    failing = true;
    expect(() => bench.writeCompressed(image.node, 8 * CLUSTER, quarters(random, 8))).toThrow('full');
    failing = false;
    const second = quarters(random, 8);
    bench.writeCompressed(image.node, 16 * CLUSTER, second);
    expect(firstDifference(bench.read(image.node, 0, first.length), first)).toBe(-1);
    expect(firstDifference(bench.read(image.node, 16 * CLUSTER, second.length), second)).toBe(-1);
    expect(image.node.status(8 * CLUSTER, CLUSTER).flags).toBe(0);
    image.close();
    if (peers) run('qemu-img', ['check', path]);
  });

  it('is recorded by dirty bitmaps', () => {
    const path = newImage('recorded.qcow2');
    editBitmap(bench.runtime, path, 'b', [{ action: 'add', granularity: CLUSTER }], {});
    const image = bench.open(path, false);
    bench.writeCompressed(image.node, 3 * CLUSTER, quarters(new Random(9), 2));
    image.close();
    const again = bench.open(path, true);
    const bitmap = readBitmap(bench.runtime, again.file, 'b');
    expect(areasOf(bitmap)).toEqual([{ offset: 3 * CLUSTER, length: 2 * CLUSTER }]);
    bitmap.free();
    again.close();
  });

  it('is refused where there is none, and for parts of clusters', () => {
    const image = bench.open(newImage('refused.qcow2'), false);
    expect(() => bench.writeCompressed(image.node, 512, Buffer.alloc(CLUSTER))).toThrow(RangeError);
    expect(() => bench.writeCompressed(image.node, 0, Buffer.alloc(CLUSTER + 512))).toThrow(RangeError);
    image.close();
    const path = join(folder, 'outside.qcow2');
    createImage(bench.runtime, path, { format: 'qcow2', length: CLUSTER, dataFile: 'outside.raw' });
    const outside = openImage(bench.runtime, path, { readOnly: false });
    const message =
      /^cannot write compressed clusters into '.*': Operation not supported with an external data file/;
    expect(() => checkCompression(outside)).toThrow(message);
    const node = attachNode(bench.runtime, outside);
    expect(() => bench.writeCompressed(node, 0, Buffer.alloc(CLUSTER))).toThrow(message);
    closeNode(bench.runtime, outside);
  });

  it.each([0, 1])('is written by several threads at once (compression type %i)', async (compressionType) => {
    const path = newImage(`threads-${compressionType}.qcow2`, { compressionType });
    const image = bench.open(path, false);
    const { shared } = bench.runtime;
    const bytes = new Random(10).mixture(64 * CLUSTER, 10_000);
    const url = (name: string): string => new URL(`../../dist/${name}`, import.meta.url).href;
    // Each takes every third cluster, twice, so that what the one replaces lies between what the others write.
    const script = `
      const { workerData: { shared, descriptor, bytes, first } } = require('node:worker_threads');
      (async () => {
        const { attachRuntime } = await import('${url('kernels/runtime.js')}');
        const { attachNode } = await import('${url('block/graph.js')}');
        const runtime = attachRuntime(shared);
        const node = attachNode(runtime, descriptor);
        const buffer = runtime.arena.alloc(${CLUSTER}, 'buffer');
        for (let round = 0; round < 2; round++) {
          for (let cluster = first; cluster < 64; cluster += 3) {
            const at = cluster * ${CLUSTER};
            runtime.arena.u8.set(bytes.subarray(at, at + ${CLUSTER}), buffer);
            node.writeCompressed(at, buffer, ${CLUSTER});
          }
        }
      })();`;
    await Promise.all(
      [0, 1, 2].map(
        (first) =>
          new Promise<void>((resolve, reject) => {
            const workerData = { shared, descriptor: image.descriptor, bytes, first };
            const worker = new Worker(script, { eval: true, workerData });
            worker.once('error', reject);
            worker.once('exit', () => resolve());
          }),
      ),
    );
    expect(firstDifference(bench.read(image.node, 0, bytes.length), bytes)).toBe(-1);
    image.close();
    if (peers) expectPeersToSee(path, bytes);
  });
});
