import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  applySnapshot,
  attachQcow2,
  closeQcow2,
  createSnapshot,
  deleteSnapshot,
  openQcow2,
  readHeader,
  readSnapshots,
} from '#src/block/qcow2/index.js';
import { attachFile, closeFile, openFile } from '#src/block/raw/file.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';
import { applied, type VolatileFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
/** Looks at what is left after a cut: the other one is in the middle of something. */
const inspector = new Workbench(64 * 1024 * 1024);

const LENGTH = 1_000_448;

/** The drive as it is, or as a snapshot has it. */
function contentOf(path: string, snapshot?: string): Buffer {
  const { runtime } = inspector;
  const opened = openFile(runtime, path, { readOnly: true, lock: 'read' });
  try {
    const file = attachFile(runtime, opened);
    const descriptor = openQcow2(runtime, opened, undefined, { readOnly: true, snapshot });
    try {
      return inspector.read(attachQcow2(runtime, descriptor, file, undefined), 0, LENGTH);
    } finally {
      closeQcow2(runtime, descriptor, file);
    }
  } finally {
    closeFile(runtime, opened);
  }
}

function snapshotsOf(path: string): { readonly id: string; readonly name: string }[] {
  const { runtime } = inspector;
  const opened = openFile(runtime, path, { readOnly: true, lock: 'read' });
  try {
    const file = attachFile(runtime, opened);
    return readSnapshots(runtime, file, readHeader(runtime, file)).map(({ info }) => info);
  } finally {
    closeFile(runtime, opened);
  }
}

describe.skipIf(!hasPeer('qemu-img'))('internal snapshots through power cuts', () => {
  it.each([
    { name: '64 KiB clusters', clusterBits: 16 },
    { name: '512-byte clusters', clusterBits: 9 },
    { name: 'refcounts of 64 bits', clusterBits: 12, refcountBits: 64 },
  ])('$name', ({ clusterBits, refcountBits }) => {
    const random = new Random(clusterBits);
    const path = join(folder, `snapshots-${clusterBits}.qcow2`);
    const cutPath = join(folder, 'cut.qcow2');
    bench.create(path, { length: LENGTH, clusterBits, refcountBits });
    const model = Buffer.alloc(LENGTH);
    /** What the drive is to be: a cut finds this or the model. */
    let next: Buffer = model;
    const kept = new Map<string, Buffer>();
    /** Names that a cut may find. */
    let allowed: readonly (readonly string[])[] = [];
    let cuts = 0;

    const look = (at: string): void => {
      const content = contentOf(at);
      if (!content.equals(next)) expect(firstDifference(content, model)).toBe(-1);
      const names = snapshotsOf(at).map(({ name }) => name);
      expect(allowed).toContainEqual(names);
      for (const name of names) {
        expect(firstDifference(contentOf(at, name), kept.get(name) ?? Buffer.alloc(0))).toBe(-1);
      }
    };
    const cut = (file: VolatileFile): void => {
      cuts++;
      const chance = random.pick([0, 50, 90, 100]);
      const left = applied(file.durable, file.pending, () => random.between(0, 99) < chance);
      writeFileSync(cutPath, left);
      look(cutPath);
      // Flags and counts may be wrong, and can be put right.
      if (next !== model) run('qemu-img', ['check', '-q', cutPath], [0, 3]);
      run('qemu-img', ['check', '-q', '-r', 'all', cutPath], [0, 3]);
      run('qemu-img', ['check', '-q', cutPath]);
      look(cutPath);
    };
    const write = (): void => {
      const image = bench.open(path, false);
      for (let round = 0; round < 5; round++) {
        const offset = random.between(0, LENGTH - 1);
        const bytes = random.between(1, Math.min(LENGTH - offset, 60_000));
        const data = random.noise(bytes);
        bench.write(image.node, offset, data);
        model.set(data, offset);
      }
      image.close();
    };
    const change = (name: string, before: readonly string[], after: readonly string[]): void => {
      allowed = [before, after];
      const id = snapshotsOf(path).find((one) => one.name === name)?.id ?? '';
      const image = bench.openVolatile(path);
      const { file } = image;
      let writes = 0;
      file.afterWrite = () => {
        if (++writes % 9 === 0 || writes < 4) cut(file);
      };
      if (after.length > before.length) {
        kept.set(name, Buffer.from(model));
        const wanted = { name, 'date-sec': 1, 'date-nsec': 2, 'vm-clock-nsec': 3n };
        createSnapshot(bench.runtime, image.descriptor, wanted, image.file);
      } else {
        deleteSnapshot(bench.runtime, image.descriptor, id, image.file);
      }
      image.close();
      allowed = [after];
      look(path);
      run('qemu-img', ['check', '-q', path]);
    };

    const apply = (name: string): void => {
      allowed = [snapshotsOf(path).map((one) => one.name)];
      next = kept.get(name) ?? Buffer.alloc(0);
      expect(next.equals(model)).toBe(false);
      const image = bench.openVolatile(path);
      const { file } = image;
      let writes = 0;
      file.afterWrite = () => {
        // Every one of few writes, some of many.
        if (++writes <= 3 || random.chance(4 / writes)) cut(file);
      };
      applySnapshot(bench.runtime, image.descriptor, name, image.file);
      closeFile(bench.runtime, image.descriptor.file);
      next.copy(model);
      next = model;
      look(path);
      run('qemu-img', ['check', '-q', path]);
    };

    write();
    change('one', [], ['one']);
    write();
    change('two', ['one'], ['one', 'two']);
    write();
    write();
    apply('one');
    apply('two');
    write();
    change('one', ['one', 'two'], ['two']);
    change('three', ['two'], ['two', 'three']);
    change('two', ['two', 'three'], ['three']);
    change('three', ['three'], []);
    expect(cuts).toBeGreaterThan(20);
  });
});
