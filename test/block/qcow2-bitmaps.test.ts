import { spawnSync } from 'node:child_process';
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { editBitmap } from '#src/block/edit-bitmap.js';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import { bitmapsOf, readBitmap, readBitmaps, readHeader } from '#src/block/qcow2/index.js';
import { closeFile } from '#src/block/raw/file.js';
import { type Area, areasOf, DirtyModel, dirtyInQemu } from '../support/bitmaps.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { type OpenImage, temporaryFolder, Workbench } from './qcow2-support.js';
import { VolatileFile } from './volatile-file.js';

const folder = temporaryFolder();
const bench = new Workbench();
const { runtime } = bench;
const at = (name: string): string => join(folder, name);

function io(path: string, ...commands: string[]): void {
  run('qemu-io', ['-d', 'unmap', ...commands.flatMap((command) => ['-c', command]), path]);
}

/** The dirty areas of a persistent bitmap as we read it. */
function dirtyInOurs(path: string, name: string): Area[] {
  const image = bench.open(path, true);
  try {
    const bitmap = readBitmap(runtime, image.file, name);
    try {
      return areasOf(bitmap);
    } finally {
      bitmap.free();
    }
  } finally {
    image.close();
  }
}

/** Names with flags, as `info` has them. */
function listed(path: string): string[] {
  const image = bench.open(path, true);
  try {
    const bitmaps = readBitmaps(image.file, readHeader(runtime, image.file));
    return bitmaps.map(({ name, flags }) => [name, ...flags].join(' '));
  } finally {
    image.close();
  }
}

function edit(path: string, name: string, ...actions: Parameters<typeof editBitmap>[3]): void {
  editBitmap(runtime, path, name, actions, {});
}

function check(path: string): void {
  run('qemu-img', ['check', '-q', path]);
}

/** Ends the use of an image as a killed process does: nothing more is written. */
function kill(image: OpenImage): void {
  bitmapsOf(runtime, image.descriptor).free();
  runtime.arena.free(image.descriptor.control);
  closeFile(runtime, image.descriptor.file);
}

/** Random changes of a drive, the same for the image and for models of bitmaps. */
function change(random: Random, image: OpenImage, models: readonly DirtyModel[], rounds: number): void {
  const { node } = image;
  for (let round = 0; round < rounds; round++) {
    const offset = random.between(0, node.length - 1);
    const length = random.between(1, Math.min(node.length - offset, random.pick([1, 5000, 300_000])));
    const kind = random.between(0, 4);
    if (kind === 0) node.writeZeroes(offset, length, random.chance(0.5));
    else if (kind === 1) node.discard(offset, length);
    else bench.write(node, offset, random.noise(length));
    for (const model of models) model.mark(offset, length);
  }
}

const peers = ['qemu-img', 'qemu-io', 'qemu-nbd', 'nbdinfo'].every(hasPeer);

describe.skipIf(!peers)('persistent dirty bitmaps', () => {
  describe.each<[cluster: string, granularity: number, length: number]>([
    ['512', 512, 3_000_832],
    ['512', 65536, 3_000_832],
    ['1k', 4096, 5_000_192],
    ['4k', 512, 64 << 20],
    ['64k', 65536, 20_000_256],
    ['64k', 2 ** 21, 20_000_256],
    ['2M', 4096, 40_000_000],
    ['2M', 2 ** 31, 40_000_000],
  ])('in clusters of %s, %i bytes a bit, a drive of %i bytes', (cluster, granularity, length) => {
    const random = new Random(granularity + length);
    const path = at(`${cluster}-${granularity}.qcow2`);
    const model = new DirtyModel(length, granularity);

    beforeAll(() => {
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `cluster_size=${cluster}`, path, String(length)]);
    });

    it('are read as QEMU wrote them', () => {
      run('qemu-img', ['bitmap', '--add', '-g', String(granularity), path, 'b0']);
      const commands: string[] = [];
      for (let round = 0; round < 12; round++) {
        const offset = random.between(0, length / 512 - 1) * 512;
        const bytes = random.between(1, Math.min(300, (length - offset) / 512)) * 512;
        commands.push(
          random.pick([
            `write ${offset} ${bytes}`,
            `write -z ${offset} ${bytes}`,
            `discard ${offset} ${bytes}`,
          ]),
        );
        model.mark(offset, bytes);
      }
      io(path, ...commands);
      expect(dirtyInOurs(path, 'b0')).toEqual(model.areas());
      expect(listed(path)).toEqual(['b0 auto']);
    });

    it('record what we write, and QEMU reads what we stored', () => {
      run('qemu-img', ['bitmap', '--add', '--disable', path, 'off']);
      edit(path, 'ours', { action: 'add', granularity: 4096 });
      const ours = new DirtyModel(length, 4096);
      for (let session = 0; session < 3; session++) {
        const image = bench.open(path, false);
        change(random, image, [model, ours], 15);
        image.close();
        check(path);
        expect(listed(path)).toEqual(['b0 auto', 'off', 'ours auto']);
        expect(dirtyInQemu(path, 'b0')).toEqual(model.areas());
        expect(dirtyInQemu(path, 'ours')).toEqual(ours.areas());
        expect(dirtyInQemu(path, 'off')).toEqual([]);
        expect(dirtyInOurs(path, 'b0')).toEqual(model.areas());
      }
      // QEMU goes on where we stopped.
      io(path, `write ${length - 512} 512`);
      model.mark(length - 512, 512);
      expect(dirtyInOurs(path, 'b0')).toEqual(model.areas());
    });

    it('are changed by our actions', () => {
      edit(path, 'off', { action: 'merge', source: 'b0' });
      check(path);
      const merged = new DirtyModel(length, bitmapGranularity(path, 'off'));
      merged.merge(model);
      expect(dirtyInQemu(path, 'off')).toEqual(merged.areas());
      edit(path, 'b0', { action: 'disable' }, { action: 'clear' });
      check(path);
      expect(listed(path)).toEqual(['b0', 'off', 'ours auto']);
      expect(dirtyInQemu(path, 'b0')).toEqual([]);
      edit(path, 'off', { action: 'enable' });
      edit(path, 'ours', { action: 'remove' });
      check(path);
      expect(listed(path)).toEqual(['b0', 'off auto']);
      edit(path, 'b0', { action: 'remove' });
      edit(path, 'off', { action: 'remove' });
      run('qemu-img', ['check', '-q', path]);
      expect(run('qemu-img', ['info', path])).not.toContain('bitmaps');
      expect(readFileSync(path).readBigUInt64BE(88)).toBe(0n);
    });
  });

  function bitmapGranularity(path: string, name: string): number {
    const image = bench.open(path, true);
    const bitmaps = readBitmaps(image.file, readHeader(runtime, image.file));
    image.close();
    return bitmaps.find((bitmap) => bitmap.name === name)?.granularity ?? 0;
  }

  /** An image with a bitmap that records and one that does not, both with something in them. */
  function twoBitmaps(name: string, ...options: string[]): { path: string; b0: Area[]; b1: Area[] } {
    const path = at(name);
    run('qemu-img', ['create', '-q', '-f', 'qcow2', ...options, path, '8M']);
    run('qemu-img', ['bitmap', '--add', path, 'b0']);
    run('qemu-img', ['bitmap', '--add', '-g', '512', path, 'b1']);
    io(path, 'write 1M 100k', 'write 7M 1');
    run('qemu-img', ['bitmap', '--disable', path, 'b1']);
    return { path, b0: dirtyInOurs(path, 'b0'), b1: dirtyInOurs(path, 'b1') };
  }

  describe('while an image is open for writing', () => {
    it('the file is left alone until the first change, which marks those that record as in use', () => {
      const { path, b0, b1 } = twoBitmaps('in-use.qcow2');
      const before = readFileSync(path);
      let image = bench.open(path, false);
      bench.read(image.node, 0, 1 << 20);
      image.node.flush();
      image.close();
      expect(readFileSync(path).equals(before)).toBe(true);
      image = bench.open(path, false);
      bench.write(image.node, 3 << 20, Buffer.alloc(512, 1));
      const copy = at('in-use-copy.qcow2');
      copyFileSync(path, copy);
      expect(listed(copy)).toEqual(['b0 in-use auto', 'b1']);
      expect(run('qemu-img', ['info', copy])).toContain('[0]: in-use');
      image.close();
      expect(listed(path)).toEqual(['b0 auto', 'b1']);
      check(path);
      expect(dirtyInQemu(path, 'b0')).toEqual([b0[0], { offset: 3 << 20, length: 65536 }, b0[1]]);
      expect(dirtyInQemu(path, 'b1')).toEqual(b1);
    });

    it.each(['write', 'writeZeroes', 'discard', 'writeUnits'] as const)(
      '%s is such a change',
      (operation) => {
        const { path, b0 } = twoBitmaps(`first-${operation}.qcow2`);
        const image = bench.open(path, false);
        const { node } = image;
        const skip = bench.buffer + (1 << 20);
        runtime.arena.u8.fill(1, bench.buffer, skip);
        runtime.arena.u32.set([0b1101], skip >> 2);
        const model = new DirtyModel(8 << 20, 65536);
        for (const { offset, length } of b0) model.mark(offset, length);
        if (operation === 'write') node.write(4 << 20, bench.buffer, 100);
        else if (operation === 'writeZeroes') node.writeZeroes(4 << 20, 100, true);
        else if (operation === 'discard') node.discard(4 << 20, 100);
        else node.writeUnits(4 << 20, bench.buffer, 5 * 65536 - 1, 65536, skip);
        const copy = at(`first-${operation}-copy.qcow2`);
        copyFileSync(path, copy);
        if (operation === 'writeUnits') {
          model.mark((4 << 20) + 65536, 65536);
          model.mark((4 << 20) + 4 * 65536, 65535);
        } else {
          model.mark(4 << 20, 100);
        }
        image.close();
        expect(listed(copy)).toEqual(['b0 in-use auto', 'b1']);
        expect(dirtyInQemu(path, 'b0')).toEqual(model.areas());
      },
    );

    it('a process that dies leaves what recorded inconsistent: shown so, refused, removable', () => {
      const { path, b1 } = twoBitmaps('killed.qcow2');
      const image = bench.open(path, false);
      bench.write(image.node, 3 << 20, Buffer.alloc(512, 1));
      image.node.flush();
      kill(image);
      expect(listed(path)).toEqual(['b0 in-use auto', 'b1']);
      check(path);
      const refused = { code: 'ERR_STILLFRAME_BITMAP_INCONSISTENT' };
      for (const action of ['clear', 'enable', 'disable'] as const) {
        expect(() => edit(path, 'b0', { action })).toThrow(expect.objectContaining(refused));
      }
      expect(() => edit(path, 'b0', { action: 'merge', source: 'b1' })).toThrow(
        "Operation merge on bitmap b0 failed: Bitmap 'b0' is inconsistent and cannot be used",
      );
      expect(() => edit(path, 'b1', { action: 'merge', source: 'b0' })).toThrow(
        "Operation merge on bitmap b1 failed: Bitmap 'b0' is inconsistent and cannot be used",
      );
      expect(() => edit(path, 'b0', { action: 'add' })).toThrow('Bitmap already exists: b0');
      expect(() => dirtyInOurs(path, 'b0')).toThrow(expect.objectContaining(refused));
      expect(() => edit(path, 'b1', { action: 'merge', source: 'b0', from: { path } })).toThrow();

      // Whoever writes next, we or QEMU, leaves it as it is.
      const next = bench.open(path, false);
      bench.write(next.node, 5 << 20, Buffer.alloc(512, 1));
      next.close();
      expect(listed(path)).toEqual(['b0 in-use auto', 'b1']);
      io(path, 'write 6M 512');
      expect(listed(path)).toEqual(['b0 in-use auto', 'b1']);
      edit(path, 'b0', { action: 'remove' });
      expect(listed(path)).toEqual(['b1']);
      expect(dirtyInQemu(path, 'b1')).toEqual(b1);
      check(path);
    });

    it('opened without memory for them, it makes those that record inconsistent', () => {
      const { path, b1 } = twoBitmaps('no-memory.qcow2');
      const used = runtime.arena.usedBytes;
      const opened = openImage(runtime, path, { readOnly: false, recordDirty: false });
      attachNode(runtime, opened).writeZeroes(0, 65536, true);
      closeNode(runtime, opened);
      expect(runtime.arena.usedBytes).toBe(used);
      expect(listed(path)).toEqual(['b0 in-use auto', 'b1']);
      expect(dirtyInQemu(path, 'b1')).toEqual(b1);
      check(path);
    });

    it('that takes more than 256 MiB to record, it is refused', () => {
      const path = at('too-much.qcow2');
      bench.create(path, { length: 2 ** 39, clusterBits: 21 });
      edit(path, 'b0', { action: 'add', granularity: 2048 });
      bench.open(path, true).close();
      for (let index = 1; index < 8; index++) edit(path, `b${index}`, { action: 'add', granularity: 2048 });
      const large = new Workbench(400 * 1024 * 1024);
      expect(() => large.open(path, false)).toThrow(/record into 268435456 bytes or more/);
      edit(path, 'b7', { action: 'disable' });
      large.open(path, false).close();
      const used = runtime.arena.usedBytes;
      expect(() => bench.open(path, false)).toThrow(
        expect.objectContaining({ code: 'ERR_STILLFRAME_ARENA_EXHAUSTED' }),
      );
      expect(runtime.arena.usedBytes).toBe(used);
      for (let index = 0; index < 8; index++) edit(path, `b${index}`, { action: 'remove' });
      check(path);
    });

    it.each<[string, string[]]>([
      ['extended L2 entries', ['-o', 'extended_l2=on,cluster_size=16k']],
      ['an external data file', ['-o', `data_file=${at('data.raw')}`]],
      ['a raw external data file', ['-o', `data_file=${at('data-raw.raw')},data_file_raw=on`]],
      ['64-bit refcounts', ['-o', 'refcount_bits=64']],
      ['zstd', ['-o', 'compression_type=zstd']],
    ])('with %s records as well', (name, options) => {
      const { path } = twoBitmaps(`${name}.qcow2`, ...options);
      const model = new DirtyModel(8 << 20, bitmapGranularity(path, 'b0'));
      edit(path, 'b0', { action: 'clear' });
      const opened = openImage(runtime, path, { readOnly: false });
      const node = attachNode(runtime, opened);
      const autoclear = readFileSync(path).readBigUInt64BE(88);
      bench.write(node, 123_456, Buffer.alloc(1000, 3));
      node.discard(2 << 20, 1 << 20);
      closeNode(runtime, opened);
      model.mark(123_456, 1000);
      model.mark(2 << 20, 1 << 20);
      check(path);
      expect(dirtyInQemu(path, 'b0')).toEqual(model.areas());
      expect(readFileSync(path).readBigUInt64BE(88)).toBe(autoclear);
    });

    it('those QEMU left in use are inconsistent to us as well', () => {
      const { path } = twoBitmaps('killed-qemu.qcow2');
      expect(spawnSync('qemu-io', ['-c', 'write 0 512', '-c', 'abort', path]).signal).toBe('SIGABRT');
      expect(listed(path)).toEqual(['b0 in-use auto', 'b1 in-use']);
      edit(path, 'b0', { action: 'remove' });
      expect(() => edit(path, 'b1', { action: 'clear' })).toThrow('inconsistent');
      edit(path, 'b1', { action: 'remove' }, { action: 'add' });
      expect(listed(path)).toEqual(['b1 auto']);
      check(path);
    });

    it('an image without room to store them keeps them in use, and its data', () => {
      const { path } = twoBitmaps('no-room.qcow2');
      let full = false;
      class FullFile extends VolatileFile {
        override write(offset: number, pointer: number, length: number): void {
          // The first thing that is written then is the bits, into a new cluster.
          const fails = full;
          full = false;
          if (fails) throw new Error('ENOSPC');
          super.write(offset, pointer, length);
        }
      }
      const image = bench.open(path, false, undefined, (file) => new FullFile(runtime.arena, file));
      bench.write(image.node, 3 << 20, Buffer.alloc(512, 7));
      full = true;
      expect(() => image.close()).toThrow('ENOSPC');
      expect(listed(path)).toEqual(['b0 in-use auto', 'b1']);
      run('qemu-img', ['check', '-q', path], [0, 3]);
      expect(run('qemu-io', ['-r', '-c', 'read -P 7 3M 512', path])).toContain('read 512/512');
    });
  });

  describe('the autoclear bits', () => {
    it('that we do not know are cleared before a change; that of the bitmaps is kept', () => {
      const { path } = twoBitmaps('autoclear.qcow2');
      const set = (bits: bigint) => {
        const bytes = readFileSync(path);
        bytes.writeBigUInt64BE(bits, 88);
        writeFileSync(path, bytes);
      };
      const get = () => readFileSync(path).readBigUInt64BE(88);
      set((1n << 40n) | 1n);
      let image = bench.open(path, false);
      expect(get()).toBe((1n << 40n) | 1n);
      bench.write(image.node, 0, Buffer.alloc(512, 1));
      expect(get()).toBe(1n);
      image.close();
      expect(get()).toBe(1n);
      expect(listed(path)).toEqual(['b0 auto', 'b1']);
      set((1n << 40n) | 1n);
      edit(path, 'b0', { action: 'clear' });
      expect(get()).toBe(1n);

      // Somebody who knows nothing of bitmaps was here: they are out of date.
      set(0n);
      expect(listed(path)).toEqual([]);
      image = bench.open(path, false);
      bench.write(image.node, 0, Buffer.alloc(512, 1));
      image.close();
      expect(get()).toBe(0n);
      expect(listed(path)).toEqual([]);
      expect(() => edit(path, 'b0', { action: 'clear' })).toThrow("Dirty bitmap 'b0' not found");
      edit(path, 'b0', { action: 'add' });
      expect(get()).toBe(1n);
      expect(listed(path)).toEqual(['b0 auto']);
      expect(dirtyInQemu(path, 'b0')).toEqual([]);
      // What the old ones had is lost room and nothing worse.
      run('qemu-img', ['check', '-q', path], [3]);
    });

    it('of bitmaps without any is cleared', () => {
      const path = at('no-extension.qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', path, '1M']);
      const bytes = readFileSync(path);
      bytes.writeBigUInt64BE(1n, 88);
      writeFileSync(path, bytes);
      const image = bench.open(path, false);
      bench.write(image.node, 0, Buffer.alloc(512, 1));
      image.close();
      expect(readFileSync(path).readBigUInt64BE(88)).toBe(0n);
    });
  });

  describe('the header', () => {
    /** Header extensions: types in order, and where the data of each is. */
    function extensionsOf(path: string): string[] {
      const image = bench.open(path, true);
      const { extensions } = readHeader(runtime, image.file);
      image.close();
      return extensions.map(({ type }) => type.toString(16));
    }

    it.each<[string, string[]]>([
      ['of 64 KiB', []],
      ['of 512 bytes', ['-o', 'cluster_size=512']],
      ['of 1 KiB', ['-o', 'cluster_size=1k']],
    ])('in a cluster %s has room beside the name of a backing file', (name, options) => {
      const base = at('base.raw');
      run('qemu-img', ['create', '-q', '-f', 'raw', base, '1M']);
      const path = at(`header${name}.qcow2`);
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', ...options, path]);
      const described = JSON.parse(run('qemu-img', ['info', '--output=json', path]));
      const before = extensionsOf(path);
      for (let round = 0; round < 2; round++) {
        edit(path, 'b0', { action: 'add' });
        check(path);
        expect(extensionsOf(path)).toEqual([...before, '23852875']);
        edit(path, 'b1', { action: 'add' });
        check(path);
        const now = JSON.parse(run('qemu-img', ['info', '--output=json', path]));
        expect(now['full-backing-filename']).toBe(described['full-backing-filename']);
        expect(now['backing-filename-format']).toBe('raw');
        expect(now['format-specific'].data.bitmaps).toHaveLength(2);
        edit(path, 'b0', { action: 'remove' });
        edit(path, 'b1', { action: 'remove' });
        expect(extensionsOf(path)).toEqual(before);
        check(path);
        run('qemu-img', ['compare', '-U', base, path]);
      }
    });

    it('of our own images has room, in the smallest clusters by giving up the names of features', () => {
      for (const clusterBits of [9, 10, 16]) {
        const path = at(`own-${clusterBits}.qcow2`);
        const names = clusterBits === 9 ? 'b'.repeat(100) : 'b'.repeat(400);
        bench.create(path, { length: 1 << 20, clusterBits, backingFile: names, backingFormat: 'raw' });
        edit(path, 'b0', { action: 'add' });
        const info = JSON.parse(run('qemu-img', ['info', '--output=json', path]));
        expect(info['backing-filename']).toBe(names);
        expect(info['format-specific'].data.bitmaps).toHaveLength(1);
      }
      const plain = at('own-plain.qcow2');
      bench.create(plain, { length: 1 << 20, clusterBits: 9 });
      edit(plain, 'b0', { action: 'add' });
      expect(dirtyInQemu(plain, 'b0')).toEqual([]);
    });

    it('that has no room for them is left as it is', () => {
      const path = at('full-header.qcow2');
      bench.create(path, {
        length: 1 << 20,
        clusterBits: 9,
        backingFile: 'b'.repeat(360),
        backingFormat: 'raw',
      });
      const before = readFileSync(path).subarray(0, 512);
      expect(() => edit(path, 'b0', { action: 'add' })).toThrow(
        expect.objectContaining({ code: 'ERR_STILLFRAME_NO_SPACE' }),
      );
      expect(readFileSync(path).subarray(0, 512).equals(before)).toBe(true);
    });

    it.each([0, 8, 480, 488, 496])('with unknown extensions of %i bytes around them keeps these', (bytes) => {
      const path = at(`unknown-${bytes}.qcow2`);
      run('qemu-img', ['create', '-q', '-f', 'qcow2', path, '1M']);
      const image = readFileSync(path);
      // In front, so that the extension of the bitmaps comes to lie across two sectors for some.
      const unknown = Buffer.alloc(8 + bytes, 0x5a);
      unknown.writeUInt32BE(0x12345678, 0);
      unknown.writeUInt32BE(bytes, 4);
      const list = Buffer.from(image.subarray(112, 4096));
      unknown.copy(image, 112);
      list.copy(image, 112 + unknown.length);
      writeFileSync(path, image);
      const before = extensionsOf(path);
      expect(before[0]).toBe('12345678');
      edit(path, 'b0', { action: 'add' });
      const added = readFileSync(path);
      // Now one behind.
      const image2 = bench.open(path, true);
      const last = readHeader(runtime, image2.file).extensions.at(-1);
      image2.close();
      const end = (last?.offset ?? 0) + 24;
      unknown.copy(added, end);
      added.writeUInt32BE(0x12345679, end);
      writeFileSync(path, added);
      expect(extensionsOf(path)).toEqual([...before, '23852875', '12345679']);
      for (let round = 0; round < 3; round++) {
        edit(path, `more${round}`, { action: 'add' });
        expect(extensionsOf(path)).toEqual([...before, '23852875', '12345679']);
        expect(listed(path)).toHaveLength(2 + round);
        check(path);
      }
      for (const name of ['b0', 'more0', 'more1', 'more2']) edit(path, name, { action: 'remove' });
      expect(extensionsOf(path)).toEqual([...before, '12345679']);
      const after = readFileSync(path);
      expect(after.subarray(112, 112 + unknown.length).equals(unknown)).toBe(true);
      expect(after.subarray(end - 32 + 8, end - 32 + 8 + bytes).every((byte) => byte === 0x5a)).toBe(true);
      check(path);
    });
  });

  describe('in numbers', () => {
    it('a hundred of them, some removed, in clusters of 512 bytes', () => {
      const path = at('many.qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'cluster_size=512', path, '1M']);
      const image = bench.open(path, false);
      const set = bitmapsOf(runtime, image.descriptor);
      const names = Array.from({ length: 100 }, (_, index) => `bitmap-${index}-${'x'.repeat(index * 5)}`);
      for (const name of names) {
        set.add({ name, granularity: 4096, length: 1 << 20, enabled: true, persistent: true }).makeBits();
      }
      bench.write(image.node, 12_345, Buffer.alloc(10, 1));
      image.close();
      check(path);
      // The youngest comes first, as QEMU has it.
      expect(listed(path)).toEqual(names.toReversed().map((name) => `${name} auto`));
      expect(dirtyInQemu(path, names[77] ?? '')).toEqual([{ offset: 12_288, length: 4096 }]);
      for (const name of names.slice(50, 55)) edit(path, name, { action: 'remove' });
      check(path);
      expect(listed(path)).toHaveLength(95);
      expect(() =>
        edit(path, names[0] ?? '', { action: 'remove' }, { action: 'merge', source: names[1] ?? '' }),
      ).toThrow('not found');
      // What was done before the failure is kept, as qemu-img does it.
      expect(listed(path)).toHaveLength(94);
    });

    it.each([1, 16, 64])('tables longer than what a refcount block of %i bits counts', (refcountBits) => {
      const path = at(`rows-${refcountBits}.qcow2`);
      const length = 2 ** 36;
      bench.create(path, { length, clusterBits: 9 + (refcountBits === 1 ? 3 : 2), refcountBits });
      const image = bench.open(path, false);
      const bitmap = bitmapsOf(runtime, image.descriptor).add({
        name: 'large',
        granularity: 512,
        length,
        enabled: true,
        persistent: true,
      });
      bitmap.makeBits();
      bench.write(image.node, 5 * 2 ** 30, Buffer.alloc(512, 1));
      bench.write(image.node, length - 512, Buffer.alloc(512, 1));
      image.close();
      check(path);
      expect(dirtyInQemu(path, 'large')).toEqual([
        { offset: 5 * 2 ** 30, length: 512 },
        { offset: length - 512, length: 512 },
      ]);
      edit(path, 'large', { action: 'disable' });
      check(path);
      edit(path, 'large', { action: 'remove' });
      check(path);
    });
  });

  describe('what is not possible', () => {
    it.each<[string, string, string[], string]>([
      ['version 2', 'v2.qcow2', ['-f', 'qcow2', '-o', 'compat=0.10'], 'UNSUPPORTED_FEATURE'],
      ['raw', 'plain.raw', ['-f', 'raw'], 'UNSUPPORTED_FEATURE'],
    ])('bitmaps in %s', (_, name, options, code) => {
      const path = at(name);
      run('qemu-img', ['create', '-q', ...options, path, '1M']);
      const format = options[1] === 'raw' ? 'raw' : 'qcow2';
      const before = readFileSync(path);
      expect(() => editBitmap(runtime, path, 'b0', [{ action: 'add' }], { format })).toThrow(
        expect.objectContaining({ code: `ERR_STILLFRAME_${code}` }),
      );
      expect(readFileSync(path).equals(before)).toBe(true);
    });

    it('a bitmap of nothing', () => {
      const path = at('nothing.qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', path, '0']);
      expect(() => edit(path, 'b0', { action: 'add' })).toThrow(
        expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
      );
    });
  });
});
