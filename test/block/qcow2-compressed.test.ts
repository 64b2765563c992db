import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { type OpenImage, temporaryFolder, Workbench } from './qcow2-support.js';

const folder = temporaryFolder();
const bench = new Workbench();
const peers = hasPeer('qemu-img');

/** Bytes of which some compress well, some a little and some not at all, in pieces of about `unit` bytes. */
function mixedBytes(random: Random, length: number, unit: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let at = 0; at < length; ) {
    const size = Math.min(length - at, random.between(1, unit * 2));
    const noise = Buffer.from(random.noise(size));
    switch (random.between(0, 3)) {
      case 0:
        noise.copy(bytes, at);
        break;
      case 1:
        for (let index = 0; index < size; index++) bytes[at + index] = (noise[index] ?? 0) & 0x0f;
        break;
      case 2:
        bytes.fill(noise.subarray(0, Math.min(size, 16)), at, at + size);
        break;
      default:
    }
    at += size;
  }
  return bytes;
}

function writeCompressed(image: OpenImage, offset: number, bytes: Uint8Array): void {
  bench.runtime.arena.u8.set(bytes, bench.buffer);
  image.node.writeCompressed?.(offset, bench.buffer, bytes.length);
}

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
      const clusters = shape.clusterBits >= 18 ? 24 : 150;
      // The drive ends inside of a cluster.
      const length = clusters * clusterSize - (clusterSize > 512 ? 512 : 0);
      const path = join(folder, `${name}.qcow2`);
      bench.create(path, { length, ...shape });
      const model = Buffer.alloc(length);
      const image = bench.open(path, false);
      for (let step = 0; step < 60; step++) {
        const first = random.between(0, clusters - 1);
        const most = Math.min(Math.max(1, (1 << 20) / clusterSize), 20);
        const offset = first * clusterSize;
        const size = Math.min(length - offset, random.between(1, most) * clusterSize);
        switch (step < 15 ? 0 : random.between(0, 6)) {
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
            const bytes = mixedBytes(random, size, clusterSize);
            writeCompressed(image, offset, bytes);
            bytes.copy(model, offset);
          }
        }
        if (step % 10 === 9) expect(firstDifference(bench.read(image.node, 0, length), model)).toBe(-1);
      }
      image.close();
      expectPeersToSee(path, model);
    },
  );
});
