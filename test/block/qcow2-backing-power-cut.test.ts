/** Whatever is left of a header whose backing file is changed: it names the old one or the new one, with its own format. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { EXTENSION_BACKING_FORMAT, type Qcow2Header, readHeader } from '#src/block/qcow2/header.js';
import { rewriteBacking } from '#src/block/qcow2/header-write.js';
import { attachFile, closeFile, openFile } from '#src/block/raw/file.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';
import { applied, VolatileFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
const inspector = new Workbench(16 * 1024 * 1024);

function headerOf(path: string): Qcow2Header {
  const { runtime } = inspector;
  const opened = openFile(runtime, path, { readOnly: true, lock: 'read' });
  try {
    return readHeader(runtime, attachFile(runtime, opened));
  } finally {
    closeFile(runtime, opened);
  }
}

function backingOf(path: string): string {
  const { backingFile, backingFormat } = headerOf(path);
  return `${backingFile} (${backingFormat})`;
}

/** Types and lengths of the other extensions. */
function extensionsOf(path: string): string[] {
  return headerOf(path).extensions.flatMap(({ type, length }) =>
    type === EXTENSION_BACKING_FORMAT ? [] : [`${type.toString(16)}: ${length}`],
  );
}

const SHORT = { name: 'base.raw', format: 'raw' };
const LONG = { name: `${'x'.repeat(150)}.qcow2`, format: 'qcow2' };
const CHANGES = [
  SHORT,
  LONG,
  { ...SHORT, format: undefined },
  { name: `${'y'.repeat(150)}.raw`, format: 'raw' },
  undefined,
  LONG,
  { ...LONG, format: undefined },
  undefined,
  { ...SHORT, format: undefined },
  SHORT,
  undefined,
  SHORT,
];

describe.skipIf(!hasPeer('qemu-img'))('a backing file that is changed, through power cuts', () => {
  it.each([
    ['64 KiB clusters', 'cluster_size=64k'],
    ['1 KiB clusters', 'cluster_size=1k'],
    ['512-byte clusters', 'cluster_size=512'],
    ['the old version', 'cluster_size=1k,compat=0.10'],
  ])('%s', (_, options) => {
    const random = new Random(options.length);
    const path = join(folder, 'image.qcow2');
    const cutPath = join(folder, 'cut.qcow2');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, '1M']);
    // Those of features, which QEMU puts there.
    const extensions = extensionsOf(path);
    let cuts = 0;
    for (const backing of CHANGES) {
      if (options === 'cluster_size=512' && (backing?.name.length ?? 0) > 100) continue;
      const wanted = backing === undefined ? 'undefined (undefined)' : `${backing.name} (${backing.format})`;
      const allowed = [backingOf(path), wanted];
      const opened = openFile(bench.runtime, path, { readOnly: false, lock: 'write' });
      const file = new VolatileFile(bench.runtime.arena, attachFile(bench.runtime, opened));
      file.afterWrite = () => {
        for (let round = 0; round < 12; round++) {
          writeFileSync(
            cutPath,
            applied(file.durable, file.pending, () => random.chance(0.5)),
          );
          expect(allowed).toContain(backingOf(cutPath));
          cuts++;
        }
      };
      rewriteBacking(bench.runtime, file, backing);
      closeFile(bench.runtime, opened);
      expect(backingOf(path)).toBe(wanted);
      expect(extensionsOf(path)).toEqual(extensions);
      const told: { 'backing-filename'?: string; 'backing-filename-format'?: string } = JSON.parse(
        run('qemu-img', ['info', '--output=json', path]),
      );
      expect(told['backing-filename']).toBe(backing?.name);
      expect(told['backing-filename-format']).toBe(backing?.format);
    }
    expect(cuts).toBeGreaterThan(50);
  });
});
