/** Whatever is left of an image whose options are changed: it has the old ones or the new ones, and reads the same. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { checkImage, type ImageCheck } from '#src/block/check.js';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import type { ImageDescriptor } from '#src/block/node.js';
import { type AmendQcow2Options, amendQcow2, readHeader, readSnapshots } from '#src/block/qcow2/index.js';
import { attachFile, closeFile } from '#src/block/raw/file.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';
import { applied } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
/** Looks at what is left after a cut: the other one is in the middle of something. */
const inspector = new Workbench(64 * 1024 * 1024);

const LENGTH = 1_000_448;

/** What may be left after one write. */
const ROUNDS = 5;

function check(path: string): ImageCheck {
  const onMessage = (): void => undefined;
  return checkImage(inspector.runtime, path, { format: 'qcow2', onMessage, onRepaired: onMessage });
}

interface Seen {
  readonly words: string;
  /** Of the drive and of every snapshot. */
  readonly contents: readonly Buffer[];
}

function seen(path: string): Seen {
  const { runtime } = inspector;
  const look = <T>(snapshot: string | undefined, body: (image: ImageDescriptor) => T): T => {
    const image = openImage(runtime, path, { readOnly: true, snapshot });
    try {
      return body(image);
    } finally {
      closeNode(runtime, image);
    }
  };
  const content = (image: ImageDescriptor): Buffer => inspector.read(attachNode(runtime, image), 0, LENGTH);
  return look(undefined, (image) => {
    if (image.driver !== 'qcow2') throw new TypeError(`'${path}' is no qcow2 image`);
    const file = attachFile(runtime, image.file);
    const snapshots = readSnapshots(runtime, file, readHeader(runtime, file));
    const { version, refcountBits, lazyRefcounts, backingFile, backingFormat } = image;
    return {
      words: [version, refcountBits, lazyRefcounts, backingFile, backingFormat].join(' '),
      contents: [content(image), ...snapshots.map(({ info }) => look(info.id, content))],
    };
  });
}

const STEPS: readonly AmendQcow2Options[] = [
  { refcountBits: 2 },
  { refcountBits: 64, lazyRefcounts: true },
  { refcountBits: 8 },
  { refcountBits: 16, lazyRefcounts: false },
  { version: 2 },
  { version: 3 },
  { version: 2 },
  { version: 3, refcountBits: 32 },
];

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))(
  'an image that is amended, through power cuts',
  () => {
    it.each([
      ['64 KiB clusters', '64k', []],
      ['512-byte clusters', '512', []],
      ['a backing file', '4k', ['-b', 'a name that is not short.raw', '-F', 'raw']],
      ['a short name of one', '1k', ['-b', 'base', '-F', 'raw']],
    ])('%s', (_, clusterSize, backing) => {
      const random = new Random(clusterSize.length);
      const path = join(folder, 'image.qcow2');
      if (backing.length > 0) writeFileSync(join(folder, backing[1] ?? ''), Buffer.alloc(LENGTH, 9));
      const cutPath = join(folder, 'cut.qcow2');
      run('qemu-img', [
        ...[
          'create',
          '-q',
          '-u',
          '-f',
          'qcow2',
          '-o',
          `cluster_size=${clusterSize}`,
          ...backing,
          path,
          String(LENGTH),
        ],
      ]);
      const { runtime } = bench;
      const write = (...commands: string[]): void => {
        run('qemu-io', [...commands.flatMap((command) => ['-c', command]), path]);
      };
      write('write -P 1 0 300k', 'write -z 100k 140k', `write -c -P 2 512k ${clusterSize}`);
      run('qemu-img', ['snapshot', '-c', 'one', path]);
      run('qemu-img', ['snapshot', '-c', 'two', path]);
      write('write -P 3 200k 40k', 'write -z 0 70k', 'write -z 700k 100k');
      const before = seen(path);
      let cuts = 0;
      for (const step of STEPS) {
        const old = seen(path).words;
        const image = bench.openVolatile(path);
        const { file } = image;
        const words = new Set<string>();
        let writes = 0;
        file.afterWrite = () => {
          // Every one of few writes, some of many.
          if (++writes > 4 && !random.chance(4 / writes)) return;
          for (let round = 0; round < ROUNDS; round++) {
            cuts++;
            const chance = random.pick([0, 50, 90, 100]);
            writeFileSync(
              cutPath,
              applied(file.durable, file.pending, () => random.between(0, 99) < chance),
            );
            const after = seen(cutPath);
            words.add(after.words);
            for (const [index, content] of after.contents.entries()) {
              expect(firstDifference(content, before.contents[index] ?? Buffer.alloc(0))).toBe(-1);
            }
            const { corruptions, 'check-errors': errors } = check(cutPath);
            expect([corruptions, errors]).toEqual([undefined, 0]);
            if (round > 0) continue;
            run('qemu-img', ['check', '-q', cutPath], [0, 3]);
            run('qemu-img', ['check', '-q', '-r', 'all', cutPath]);
          }
        };
        amendQcow2(runtime, image.descriptor, undefined, step, file);
        file.afterWrite = () => undefined;
        closeFile(runtime, image.descriptor.file);
        const now = seen(path);
        const { version, refcountBits, lazyRefcounts } = step;
        const [oldVersion, oldBits, oldLazy] = old.split(' ');
        const wanted = [version ?? oldVersion, refcountBits ?? oldBits, lazyRefcounts ?? oldLazy].join(' ');
        expect(now.words.startsWith(`${wanted} `)).toBe(true);
        // With more than one change some of them may be made.
        const between = [old, now.words];
        if (Object.keys(step).length === 1) expect(between).toEqual(expect.arrayContaining([...words]));
        for (const [index, content] of now.contents.entries()) {
          expect(firstDifference(content, before.contents[index] ?? Buffer.alloc(0))).toBe(-1);
        }
        run('qemu-img', ['check', '-q', path]);
      }
      expect(cuts).toBeGreaterThan(30);
    });
  },
);
