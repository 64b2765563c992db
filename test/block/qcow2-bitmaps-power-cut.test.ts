import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { BitmapSet } from '#src/bitmap/bitmap-set.js';
import { bitmapsOf, loadBitmap, readBitmap, readBitmaps, readHeader } from '#src/block/qcow2/index.js';
import { type Area, areasOf, DirtyModel } from '../support/bitmaps.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { type OpenImage, temporaryFolder, Workbench } from './qcow2-support.js';
import { applied, type VolatileFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
/** Looks at what is left after a cut: the other one is in the middle of something. */
const inspector = new Workbench(64 * 1024 * 1024);

const LENGTH = 2_000_384;
const GRANULARITY = 4096;

interface Case {
  readonly name: string;
  readonly clusterBits: number;
  /** Bytes of an unknown header extension, which moves that of the bitmaps. */
  readonly unknown?: number;
  readonly backingFile?: string;
}

const cases: readonly Case[] = [
  { name: '64 KiB clusters', clusterBits: 16 },
  { name: '512-byte clusters', clusterBits: 9 },
  { name: 'a header extension across two sectors', clusterBits: 12, unknown: 480 },
  { name: 'a backing file whose name is in the way', clusterBits: 12, backingFile: `${'x'.repeat(70)}.raw` },
];

/** What the file says after a cut; undefined for a bitmap that is not there. */
interface Found {
  readonly content: Buffer;
  readonly bitmaps: ReadonlyMap<string, Area[] | 'in-use'>;
  readonly backing: string | undefined;
}

function look(path: string): Found {
  const image = inspector.open(path, true);
  try {
    const { runtime } = inspector;
    const header = readHeader(runtime, image.file);
    const bitmaps = new Map<string, Area[] | 'in-use'>();
    for (const { name, flags } of readBitmaps(image.file, header)) {
      if (flags.includes('in-use')) {
        bitmaps.set(name, 'in-use');
        continue;
      }
      const bitmap = readBitmap(runtime, image.file, name);
      bitmaps.set(name, areasOf(bitmap));
      bitmap.free();
    }
    return { content: inspector.read(image.node, 0, LENGTH), bitmaps, backing: header.backingFile };
  } finally {
    image.close();
  }
}

/** What happens between opening and closing the image. */
type Session = 'write' | 'clear' | 'toggle' | 'add' | 'remove';

describe.skipIf(!hasPeer('qemu-img'))('dirty bitmaps through power cuts', () => {
  it.each(cases)('$name', ({ clusterBits, unknown, backingFile }) => {
    const seed = clusterBits * 31 + (unknown ?? 0);
    const random = new Random(seed);
    const path = join(folder, `bitmaps-${seed}.qcow2`);
    const cutPath = join(folder, 'cut.qcow2');
    bench.create(path, {
      length: LENGTH,
      clusterBits,
      ...(backingFile ? { backingFile, backingFormat: 'raw' } : {}),
    });
    if (backingFile)
      run('qemu-img', ['create', '-q', '-f', 'raw', join(folder, backingFile), String(LENGTH)]);
    if (unknown !== undefined) {
      const image = readFileSync(path);
      const list = Buffer.from(image.subarray(112, 2048));
      image.writeUInt32BE(0x12345678, 112);
      image.writeUInt32BE(unknown, 116);
      list.copy(image, 120 + unknown);
      writeFileSync(path, image);
    }

    const model = Buffer.alloc(LENGTH);
    let recorded = new DirtyModel(LENGTH, GRANULARITY);
    /** The drive when `rec` was made or cleared last. */
    let reference = Buffer.from(model);
    /** What each bitmap may say, be it before or after the session. */
    let allowed = new Map<string, (Area[] | undefined)[]>();
    let commits = false;
    let cuts = 0;
    const states = new Set<string>();

    const cut = (file: VolatileFile): void => {
      const chance = random.pick([0, 50, 90, 100]);
      writeFileSync(
        cutPath,
        applied(file.durable, file.pending, () => random.between(0, 99) < chance),
      );
      run('qemu-img', ['check', '-q', cutPath], [0, 3]);
      const found = look(cutPath);
      expect(found.backing).toBe(backingFile);
      for (const [name, choices] of allowed) {
        const areas = found.bitmaps.get(name);
        states.add(areas === undefined ? 'absent' : areas === 'in-use' ? 'in-use' : 'valid');
        if (areas === 'in-use') {
          expect(name, 'only what records is ever in use').toBe('rec');
          continue;
        }
        // While the extension cannot be changed by one write, a cut may lose all of them.
        if (areas === undefined && commits && unknown !== undefined) continue;
        expect(choices, `${name} after cut ${cuts}, seed ${seed}`).toContainEqual(areas);
        if (name !== 'rec' || areas === undefined) continue;
        // Whatever it calls clean is as it was.
        let clean = 0;
        for (const { offset, length } of [...areas, { offset: LENGTH, length: 0 }]) {
          const part = [found.content, reference].map((bytes) => bytes.subarray(clean, offset));
          const [now = Buffer.of(), then = Buffer.of()] = part;
          expect(firstDifference(now, then), `clean at ${clean}, cut ${cuts}, seed ${seed}`).toBe(-1);
          clean = offset + length;
        }
      }
      cuts++;
    };

    const guest = (image: OpenImage): void => {
      for (let round = 0; round < 6; round++) {
        let offset = random.between(0, LENGTH - 1);
        let bytes = random.between(1, Math.min(LENGTH - offset, 30_000));
        if (backingFile !== undefined) {
          // What is around parts of clusters would come from the backing file.
          offset = Math.floor(offset / GRANULARITY) * GRANULARITY;
          bytes = Math.min(LENGTH - offset, Math.ceil(bytes / GRANULARITY) * GRANULARITY);
        }
        recorded.mark(offset, bytes);
        if (random.chance(0.3)) {
          image.node.writeZeroes(offset, bytes, true);
          model.fill(0, offset, offset + bytes);
        } else {
          const data = random.noise(bytes);
          bench.write(image.node, offset, data);
          model.set(data, offset);
        }
        if (random.chance(0.2)) image.node.flush();
      }
    };

    const edit = (session: Session, set: BitmapSet, file: VolatileFile): void => {
      const options = { granularity: GRANULARITY, length: LENGTH, persistent: true };
      const names = set.all().map(({ name }) => name);
      if (session === 'add' && !names.includes('rec')) {
        set.add({ ...options, name: 'rec', enabled: true }).makeBits();
      } else if (session === 'add') {
        const bitmap = set.add({ ...options, name: `other${names.length}`, enabled: false });
        bitmap.makeBits();
        bitmap.set(random.between(0, LENGTH), 100_000);
      } else if (session === 'remove') {
        for (const bitmap of set.all()) set.remove(bitmap);
      } else if (session === 'clear') {
        const bitmap = set.get('rec');
        bitmap.clear(0, LENGTH);
        bitmap.changed = true;
      } else {
        for (const bitmap of set.all()) {
          if (bitmap.name === 'rec') continue;
          loadBitmap(bench.runtime, file, bitmap);
          bitmap.set(random.between(0, LENGTH), 5000);
          bitmap.changed = true;
        }
      }
    };

    const sessions: Session[] = [
      'add',
      'write',
      'add',
      'write',
      'clear',
      'write',
      'toggle',
      'add',
      'write',
      'remove',
    ];
    for (const session of sessions) {
      if (session === 'clear') reference = Buffer.from(model);
      const before = look(path).bitmaps;
      const image = bench.openVolatile(path);
      const { file } = image;
      allowed = new Map([...before].map(([name, areas]) => [name, areas === 'in-use' ? [] : [areas]]));
      commits = false;
      let writes = 0;
      file.afterWrite = () => {
        if (++writes % 3 === 0 || commits) cut(file);
      };
      if (session === 'write') guest(image);
      const set = bitmapsOf(bench.runtime, image.descriptor);
      if (session !== 'write') edit(session, set, file);
      // The stored ones after this: what is in memory, and for what is not there what was before.
      const after = new Map<string, Area[] | undefined>([...before.keys()].map((name) => [name, undefined]));
      for (const bitmap of set.all()) {
        const known = before.get(bitmap.name);
        if (bitmap.loaded) after.set(bitmap.name, areasOf(bitmap));
        else if (known !== 'in-use') after.set(bitmap.name, known);
      }
      if (session === 'write') expect(after.get('rec')).toEqual(recorded.areas());
      for (const [name, areas] of after) allowed.set(name, [...(allowed.get(name) ?? [undefined]), areas]);
      commits = true;
      image.close();
      if (session === 'clear' || session === 'remove') recorded = new DirtyModel(LENGTH, GRANULARITY);
      if (session === 'remove') reference = Buffer.from(model);
      run('qemu-img', ['check', '-q', path]);
      const { bitmaps, content } = look(path);
      expect(firstDifference(content, model)).toBe(-1);
      expect(bitmaps).toEqual(new Map([...after].filter(([, areas]) => areas !== undefined)));
    }
    expect(cuts).toBeGreaterThan(70);
    expect([...states].sort()).toEqual(['absent', 'in-use', 'valid']);
  });
});
