import { spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { checkQcow2 } from '#src/block/qcow2/index.js';
import { attachFile, closeFile, openFile } from '#src/block/raw/file.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { COMPRESSED, COPIED, HEADER, Qcow2Bytes } from '../support/qcow2-bytes.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';
import { applied, VolatileFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
const path = (name: string): string => join(folder, name);
const LENGTH = 4 << 20;

/** What the guest sees, by QEMU's reading. */
function contents(name: string): Buffer {
  run('qemu-img', ['convert', '-O', 'raw', path(name), path('contents')]);
  const raw = bench.runtime.arena;
  const file = openFile(bench.runtime, path('contents'), { readOnly: true, lock: 'none' });
  const pointer = raw.alloc(LENGTH, 'contents');
  try {
    attachFile(bench.runtime, file).read(0, pointer, LENGTH);
    return Buffer.from(raw.copyOut(pointer, LENGTH));
  } finally {
    raw.free(pointer);
    closeFile(bench.runtime, file);
  }
}

function snapshots(name: string): unknown {
  return JSON.parse(run('qemu-img', ['info', '-U', '--output=json', path(name)])).snapshots;
}

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('a repair', () => {
  beforeAll(() => {
    for (const [name, options] of [
      ['wide', 'cluster_size=64k'],
      ['small', 'cluster_size=512,refcount_bits=8'],
    ] as const) {
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path(name), String(LENGTH)]);
      run('qemu-io', ['-c', 'write -P 1 0 700k', '-c', 'write -c -P 2 1M 64k', path(name)]);
      run('qemu-img', ['snapshot', '-c', 'one', path(name)]);
      run('qemu-io', ['-c', 'write -P 3 100k 300k', '-c', 'write -z 500k 64k', path(name)]);
    }
  });

  const damages: readonly (readonly [string, (image: Qcow2Bytes) => void])[] = [
    ['of leaks', (i) => i.bytes.fill(3, i.refcountBlock() + 20, i.refcountBlock() + 30)],
    [
      'of refcounts too low and too high',
      (i) => i.bytes.fill(1, i.refcountBlock() + 20, i.refcountBlock() + 60),
    ],
    ['of lost refcounts', (i) => i.bytes.fill(0, i.refcountBlock(), i.refcountBlock() + 200)],
    ['of a lost refcount block', (i) => i.put64(i.refcountTable, 0)],
    ['of refcount table entries with reserved bits', (i) => i.put64(i.refcountTable, i.refcountBlock() + 3)],
    [
      'of flags',
      (i) => {
        for (let at = i.l2(); at < i.l2() + 480; at += 8) {
          const entry = i.u64(at);
          if ((entry & COMPRESSED) === 0n) i.put64(at, entry ^ COPIED);
        }
      },
    ],
    [
      'of the snapshot table',
      (i) => {
        const table = i.place(HEADER.snapshotsOffset);
        i.putBytes(table + 48, Buffer.from(i.bytes.subarray(table + 64, table + 68))).put32(table + 36, 8);
      },
    ],
  ];

  it.each(
    damages.flatMap(([what, damage]) =>
      (['wide', 'small'] as const).map((base) => [what, base, damage] as const),
    ),
  )('%s (%s clusters) leaves the image no worse when the power fails', (what, base, damage) => {
    const random = new Random(what.length * 7 + base.length);
    const image = Qcow2Bytes.read(path(base));
    damage(image);
    image.save(path('damaged'));
    const before = contents(base);
    const named = snapshots('damaged');
    const opened = openFile(bench.runtime, path('damaged'), { readOnly: false, lock: 'write' });
    let cuts = 0;
    let writes = 0;
    try {
      const file = new VolatileFile(bench.runtime.arena, attachFile(bench.runtime, opened));
      file.afterWrite = () => {
        // Every one of few writes, some of many.
        if (++writes > 12 && !random.chance(12 / writes)) return;
        cuts++;
        const chance = random.pick([0, 0.5, 1]);
        writeFileSync(
          path('cut'),
          applied(file.durable, file.pending, () => random.chance(chance)),
        );
        const seen = contents('cut');
        expect(firstDifference(seen, before), `what the guest sees after cut ${cuts}`).toBe(-1);
        repairAgain(named, before);
      };
      const result = checkQcow2(bench.runtime, file, 'all', () => undefined);
      expect(result.corruptionsFixed + result.leaksFixed).toBeGreaterThan(0);
    } finally {
      closeFile(bench.runtime, opened);
    }
    expect(cuts).toBeGreaterThan(0);
    run('qemu-img', ['check', '-q', path('damaged')]);
    expect(snapshots('damaged')).toEqual(named);
  });

  /** What a cut left can be repaired as the damage could. */
  function repairAgain(named: unknown, before: Buffer): void {
    copyFileSync(path('cut'), path('again'));
    const file = openFile(bench.runtime, path('again'), { readOnly: false, lock: 'write' });
    try {
      const found = checkQcow2(bench.runtime, attachFile(bench.runtime, file), 'all', () => undefined);
      expect(found).toMatchObject({ errors: 0, corruptions: 0 });
    } finally {
      closeFile(bench.runtime, file);
    }
    run('qemu-img', ['check', '-q', path('again')]);
    expect(firstDifference(contents('again'), before)).toBe(-1);
    expect(snapshots('again')).toEqual(named);
  }
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('an image that was not closed cleanly', () => {
  /** QEMU writes with lazy refcounts and is killed. */
  function abandoned(name: string): void {
    const options = ['-o', 'lazy_refcounts=on,cluster_size=4k'];
    run('qemu-img', ['create', '-q', '-f', 'qcow2', ...options, path(name), String(LENGTH)]);
    const writes = ['write -P 7 0 100k', 'write -P 8 1M 2M', 'flush'].flatMap((command) => ['-c', command]);
    spawnSync('qemu-io', [...writes, '-c', `sigraise 9`, path(name)]);
    expect(Qcow2Bytes.read(path(name)).u64(HEADER.incompatibleFeatures)).toBe(1n);
  }

  it('gets its refcounts before it is written to', () => {
    abandoned('dirty');
    run('qemu-img', ['check', '-q', path('dirty')], [2]);
    const before = contents('dirty');
    const image = bench.open(path('dirty'), false);
    // Before anything is written.
    expect(Qcow2Bytes.read(path('dirty')).u64(HEADER.incompatibleFeatures)).toBe(0n);
    run('qemu-img', ['check', '-q', '-U', path('dirty')]);
    bench.write(image.node, 200_000, new Uint8Array(50_000).fill(9));
    before.fill(9, 200_000, 250_000);
    image.close();
    run('qemu-img', ['check', '-q', path('dirty')]);
    expect(firstDifference(contents('dirty'), before)).toBe(-1);
  });

  it('is only read as it is', () => {
    abandoned('dirty');
    const bytes = Qcow2Bytes.read(path('dirty')).bytes;
    const image = bench.open(path('dirty'), true);
    expect(bench.read(image.node, 0, 10)).toEqual(Buffer.alloc(10, 7));
    image.close();
    expect(Qcow2Bytes.read(path('dirty')).bytes.equals(bytes)).toBe(true);
  });

  it('is not written to where more than its refcounts is wrong', () => {
    abandoned('dirty');
    const image = Qcow2Bytes.read(path('dirty'));
    image.put64(image.l2() + 800, 0x80ff000000000000n).save(path('dirty'));
    expect(() => bench.open(path('dirty'), false)).toThrow('1 errors besides outdated refcounts');
    expect(Qcow2Bytes.read(path('dirty')).u64(HEADER.incompatibleFeatures)).toBe(1n);
    expect(existsSync(path('dirty'))).toBe(true);
  });
});
