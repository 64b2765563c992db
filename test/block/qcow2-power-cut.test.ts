import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';
import { applied, VolatileFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
/** Looks at what is left after a cut: the other one is in the middle of a request. */
const inspector = new Workbench(64 * 1024 * 1024);

interface Case {
  readonly name: string;
  readonly clusterBits: number;
  readonly version: 2 | 3;
  readonly refcountBits: number;
  readonly length: number;
  readonly operations: number;
  /** Writes between two cuts; default: a fourteenth of the operations. */
  readonly every?: number;
  readonly most: number;
  readonly snapshot: boolean;
  /** A part of the writes is compressed, 0 by deflate, 1 by zstd. */
  readonly compressed: 0 | 1 | undefined;
}

const cases: readonly Case[] = [
  {
    name: '64 KiB clusters',
    clusterBits: 16,
    version: 3,
    refcountBits: 16,
    length: 24 << 20,
    operations: 700,
    most: 200_000,
    snapshot: false,
    compressed: undefined,
  },
  {
    name: '512-byte clusters: tables and refcounts grow',
    clusterBits: 9,
    version: 3,
    refcountBits: 16,
    length: 4 << 20,
    operations: 900,
    most: 20_000,
    snapshot: false,
    compressed: undefined,
  },
  {
    name: '512-byte clusters with 1-bit refcounts, version 3',
    clusterBits: 9,
    version: 3,
    refcountBits: 1,
    length: 6 << 20,
    operations: 900,
    most: 20_000,
    snapshot: false,
    compressed: undefined,
  },
  {
    name: '4 KiB clusters, version 2',
    clusterBits: 12,
    version: 2,
    refcountBits: 16,
    length: 16 << 20,
    operations: 900,
    most: 60_000,
    snapshot: false,
    compressed: undefined,
  },
  {
    name: '4 KiB clusters over an internal snapshot',
    clusterBits: 12,
    version: 3,
    refcountBits: 16,
    length: 16 << 20,
    operations: 900,
    most: 60_000,
    snapshot: true,
    compressed: undefined,
  },
  {
    name: 'more L2 slices than the cache has',
    clusterBits: 9,
    version: 3,
    refcountBits: 16,
    length: 100 << 20,
    operations: 6000,
    // Looking at so large an image takes a second.
    every: 1000,
    most: 600,
    snapshot: false,
    compressed: undefined,
  },
  {
    name: 'compressed clusters of 4 KiB over an internal snapshot, deflate',
    clusterBits: 12,
    version: 3,
    refcountBits: 16,
    length: 4 << 20,
    operations: 900,
    most: 60_000,
    snapshot: true,
    compressed: 0,
  },
  {
    name: 'compressed clusters of 64 KiB with 2-bit refcounts, zstd',
    clusterBits: 16,
    version: 3,
    refcountBits: 2,
    length: 6 << 20,
    operations: 500,
    most: 300_000,
    snapshot: false,
    compressed: 1,
  },
  {
    name: 'compressed clusters of 512 bytes with 4-bit refcounts, zstd',
    clusterBits: 9,
    version: 3,
    refcountBits: 4,
    length: 2 << 20,
    operations: 900,
    most: 10_000,
    snapshot: false,
    compressed: 1,
  },
];

describe.skipIf(!hasPeer('qemu-img'))(
  'qcow2 through power cuts that lose any part of the unsynced writes',
  () => {
    it.each(cases)('$name', (test) => {
      const seed = 20250 + test.clusterBits * 7 + test.refcountBits + test.operations;
      const random = new Random(seed);
      const below = (limit: number): number => random.between(0, limit - 1);
      const randomBytes = (length: number): Buffer => Buffer.from(random.noise(length));
      const path = join(folder, `cut-${seed}-${test.snapshot}-${test.compressed}.qcow2`);
      const { version, length, clusterBits, refcountBits } = test;
      const compressionType = test.compressed ?? 0;
      bench.create(path, { length, clusterBits, version, refcountBits, compressionType });
      const model = Buffer.alloc(length);
      if (test.snapshot) {
        const first = bench.open(path, false);
        for (let at = 0; at < length; at += 1 << 20) {
          const bytes = randomBytes(1 << 19);
          bench.write(first.node, at, bytes);
          bytes.copy(model, at);
        }
        first.close();
        run('qemu-img', ['snapshot', '-c', 'before', path]);
      }
      const flushed = Buffer.from(model);
      // What was touched since the last flush has no promise.
      const touched: { readonly from: number; readonly to: number }[] = [];

      const image = bench.openVolatile(path);
      const cutPath = join(folder, 'cut.qcow2');
      let writes = 0;
      let cuts = 0;
      const cut = (file: VolatileFile): void => {
        const chance = [0, 30, 50, 80, 97, 100][below(6)] ?? 50;
        writeFileSync(
          cutPath,
          applied(file.durable, file.pending, () => below(100) < chance),
        );
        run('qemu-img', ['check', '-q', cutPath], [0, 3]);
        const after = inspector.open(cutPath, true);
        const found = inspector.read(after.node, 0, length);
        after.close();
        for (const { from, to } of touched) flushed.copy(found, from, from, to);
        expect(firstDifference(found, flushed), `flushed data after cut ${cuts}, seed ${seed}`).toBe(-1);
        cuts++;
      };
      const { file } = image;
      const every = test.every ?? Math.floor(test.operations / 14);
      file.afterWrite = () => {
        writes++;
        if (writes % (every + 7) === 0) cut(file);
      };
      const touch = (offset: number, bytes: number) => touched.push({ from: offset, to: offset + bytes });
      for (let operation = 0; operation < test.operations; operation++) {
        const offset = below(length);
        const bytes = Math.min(length - offset, 1 + below(test.most));
        const kind = below(20);
        if (test.compressed !== undefined && kind < 8) {
          const clusterSize = 2 ** clusterBits;
          const start = offset - (offset % clusterSize);
          const end = Math.ceil((offset + bytes) / clusterSize) * clusterSize;
          touch(start, end - start);
          const data = random.mixture(end - start, clusterSize);
          bench.writeCompressed(image.node, start, data);
          data.copy(model, start);
        } else if (kind < 11) {
          touch(offset, bytes);
          const data = randomBytes(bytes);
          bench.write(image.node, offset, data);
          data.copy(model, offset);
        } else if (kind < 15) {
          touch(offset, bytes);
          image.node.writeZeroes(offset, bytes, kind % 2 === 0);
          model.fill(0, offset, offset + bytes);
        } else if (kind < 19) {
          touch(offset, bytes);
          image.node.discard(offset, bytes);
          bench.read(image.node, offset, bytes).copy(model, offset);
        } else if (below(3) === 0) {
          image.node.flush();
          for (const { from, to } of touched) model.copy(flushed, from, from, to);
          touched.splice(0);
        }
      }
      file.afterWrite = () => undefined;
      expect(cuts).toBeGreaterThan(10);
      expect(firstDifference(bench.read(image.node, 0, length), model)).toBe(-1);
      image.close();
      run('qemu-img', ['check', path]);
    });

    it.each(['plain', 'compressed'] as const)(
      'and syncs that a %s write falls into do not make it durable without its refcounts',
      (kind) => {
        const path = join(folder, `during-${kind}.qcow2`);
        bench.create(path, { length: 8 << 20, clusterBits: 16 });
        let write: (() => void) | undefined;
        class BusyFile extends VolatileFile {
          override flush(): void {
            super.flush();
            const now = write;
            write = undefined;
            now?.();
          }
        }
        let file: VolatileFile | undefined;
        const image = bench.open(path, false, undefined, (plain) => {
          file = new BusyFile(bench.runtime.arena, plain);
          return file;
        });
        const put = (cluster: number): void => {
          const bytes = Buffer.alloc(65536).fill(cluster + 1, 0, 32768);
          if (kind === 'plain') bench.write(image.node, cluster * 65536, bytes);
          else bench.writeCompressed(image.node, cluster * 65536, bytes);
        };
        for (let cluster = 0; cluster < 20; cluster++) {
          put(cluster);
          write = () => put(40 + cluster);
          image.node.flush();
          const cutPath = join(folder, 'cut.qcow2');
          writeFileSync(cutPath, file?.durable ?? '');
          run('qemu-img', ['check', '-q', cutPath], [0, 3]);
        }
        image.close();
        run('qemu-img', ['check', path]);
      },
    );
  },
);
