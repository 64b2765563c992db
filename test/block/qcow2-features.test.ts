import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { attachNode, closeNode, openImage } from '#src/block/graph.js';
import type { MapEntry } from '#src/block/map-batch.js';
import type { BlockNode } from '#src/block/node.js';
import { firstDifference, Random } from '../support/data.js';
import { mapEntries } from '../support/map.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';

const folder = temporaryFolder();
const bench = new Workbench();
const { runtime } = bench;
const at = (name: string): string => join(folder, name);
const peers = hasPeer('qemu-img') && hasPeer('qemu-io');

function withImage<T>(path: string, readOnly: boolean, body: (node: BlockNode) => T): T {
  const descriptor = openImage(runtime, path, { format: 'qcow2', readOnly });
  try {
    return body(attachNode(runtime, descriptor));
  } finally {
    closeNode(runtime, descriptor);
  }
}

/** One random change of image and model. */
function change(node: BlockNode, model: Buffer, random: Random): void {
  const { length } = model;
  const unit = random.pick([1, 512, 2048, 16384, 65536]);
  const offset = Math.min(Math.floor(random.between(0, length - 1) / unit) * unit, length - 1);
  const wanted = Math.max(1, Math.floor(random.between(1, 200_000) / unit) * unit);
  const size = Math.min(wanted, length - offset);
  switch (random.between(0, 5)) {
    case 0:
    case 1:
      node.writeZeroes(offset, size, random.chance(0.5));
      model.fill(0, offset, offset + size);
      return;
    case 2: {
      node.discard(offset, size);
      // Reads as zeroes or as before, cluster by cluster: what it is now is part of the state.
      const now = bench.read(node, offset, size);
      for (let byte = 0; byte < size; byte++) {
        if (now[byte] !== 0 && now[byte] !== model[offset + byte]) {
          throw new Error(`discarded byte ${offset + byte} is neither old nor zero`);
        }
      }
      model.set(now, offset);
      return;
    }
    default: {
      const bytes = random.noise(size);
      bench.write(node, offset, bytes);
      model.set(bytes, offset);
    }
  }
}

function mapOf(path: string): Omit<MapEntry, 'filename' | 'compressed'>[] {
  return withImage(path, true, (node) => {
    return mapEntries(node, path).map(({ filename, compressed, ...rest }) => rest);
  });
}

function expectAlike(path: string, model: Buffer): void {
  withImage(path, true, (node) => {
    expect(firstDifference(bench.read(node, 0, model.length), model)).toBe(-1);
  });
  run('qemu-img', ['check', '-q', path]);
  writeFileSync(at('model'), model);
  run('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', 'raw', path, at('model')]);
  expect(mapOf(path)).toEqual(JSON.parse(run('qemu-img', ['map', '--output=json', path])));
}

const LENGTH = (3 << 20) + 77 * 512;

describe.skipIf(!peers)('subclusters', () => {
  it.each([
    ['16k', false, 1],
    ['64k', false, 2],
    ['64k', true, 3],
    ['128k', true, 4],
    ['2M', true, 5],
  ])('clusters of %s, backing file %s: what is written is read, by us and by QEMU', (size, backed, seed) => {
    const random = new Random(seed);
    let model: Buffer = Buffer.alloc(LENGTH);
    const path = at(`sub-${seed}.qcow2`);
    const options = ['create', '-q', '-f', 'qcow2', '-o', `extended_l2=on,cluster_size=${size}`];
    if (backed) {
      const base = at(`base-${seed}`);
      model = Buffer.from(random.noise(LENGTH));
      writeFileSync(base, model);
      run('qemu-img', [...options, '-b', base, '-F', 'raw', path]);
    } else {
      run('qemu-img', [...options, path, String(LENGTH)]);
    }
    const kept: Buffer[] = [];
    for (let phase = 0; phase < 4; phase++) {
      withImage(path, false, (node) => {
        for (let round = 0; round < 40; round++) change(node, model, random);
      });
      expectAlike(path, model);
      // What QEMU writes in between is found, and what a snapshot shares is not overwritten.
      const offset = random.between(0, 5000) * 512;
      run('qemu-io', ['-f', 'qcow2', '-c', `write -P 0x5a ${offset} 1536`, '-c', `write -z 1M 20k`, path]);
      model.fill(0x5a, offset, offset + 1536);
      model.fill(0, 1 << 20, (1 << 20) + 20480);
      run('qemu-img', ['snapshot', '-c', `s${phase}`, path]);
      kept.push(Buffer.from(model));
    }
    expectAlike(path, model);
    for (const [index, snapshot] of kept.entries()) {
      writeFileSync(at('snapshot-model'), snapshot);
      const out = at('snapshot-content');
      run('qemu-img', ['convert', '-l', `s${index}`, '-O', 'raw', path, out]);
      expect(firstDifference(readFileSync(out), snapshot)).toBe(-1);
    }
  });

  it('a small write into a large cluster copies one subcluster of the backing file, not the cluster', () => {
    const base = at('base');
    writeFileSync(base, Buffer.alloc(4 << 20, 7));
    const path = at('small.qcow2');
    const options = ['-o', 'extended_l2=on,cluster_size=2M', '-b', base, '-F', 'raw'];
    run('qemu-img', ['create', '-q', '-f', 'qcow2', ...options, path]);
    withImage(path, false, (node) => bench.write(node, 70_000, Buffer.alloc(512, 9)));
    const data = mapOf(path).filter(({ depth }) => depth === 0);
    expect(data).toMatchObject([{ start: 65536, length: 65536, data: true }]);
  });

  it('compressed clusters among subclusters are read and overwritten', () => {
    const random = new Random(9);
    const model = Buffer.alloc(1 << 20);
    for (let byte = 0; byte < model.length; byte++) model[byte] = (byte >> 9) & 0xff;
    writeFileSync(at('plain'), model);
    const path = at('compressed.qcow2');
    run('qemu-img', ['convert', '-c', '-O', 'qcow2', '-o', 'extended_l2=on', at('plain'), path]);
    withImage(path, false, (node) => {
      for (let round = 0; round < 12; round++) change(node, model, random);
    });
    expectAlike(path, model);
  });
});

describe.skipIf(!peers)('external data files', () => {
  it.each([
    ['data_file_raw=off', 1],
    ['data_file_raw=on', 2],
    ['data_file_raw=off,extended_l2=on', 3],
    ['data_file_raw=on,extended_l2=on,cluster_size=16k', 4],
    ['data_file_raw=off,cluster_size=512', 5],
  ])('%s: what is written is read, by us and by QEMU', (options, seed) => {
    const random = new Random(seed);
    const model = Buffer.alloc(LENGTH);
    const path = at(`external-${seed}.qcow2`);
    const data = at(`external-${seed}.data`);
    run('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-o',
      `data_file=${data},${options}`,
      path,
      String(LENGTH),
    ]);
    for (let phase = 0; phase < 4; phase++) {
      withImage(path, false, (node) => {
        for (let round = 0; round < 40; round++) change(node, model, random);
      });
      expectAlike(path, model);
      if (options.includes('raw=on')) {
        expect(firstDifference(readFileSync(data).subarray(0, LENGTH), model)).toBe(-1);
      }
      const offset = random.between(0, 5000) * 512;
      run('qemu-io', ['-f', 'qcow2', '-c', `write -P 0x5a ${offset} 1536`, '-c', `write -z 1M 20k`, path]);
      model.fill(0x5a, offset, offset + 1536);
      model.fill(0, 1 << 20, (1 << 20) + 20480);
    }
    expectAlike(path, model);
    expect(readFileSync(path).length).toBeLessThan(2 << 20);
  });

  it('are opened only where the caller allows it', () => {
    const path = at('elsewhere.qcow2');
    const data = join(temporaryFolder(), 'data');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `data_file=${data}`, path, '1M']);
    const refused = expect.objectContaining({ code: 'ERR_STILLFRAME_BACKING_FORBIDDEN' });
    expect(() => withImage(path, true, () => undefined)).toThrow(refused);
    const closed = openImage(runtime, path, { readOnly: true, backing: false });
    const node = attachNode(runtime, closed);
    expect(node.status(0, 1 << 20)).toMatchObject({ flags: 0 });
    closeNode(runtime, closed);
  });

  it('an entry that puts data elsewhere than at the guest offset is damage', () => {
    const path = at('moved.qcow2');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `data_file=${at('moved.data')}`, path, '1M']);
    run('qemu-io', ['-f', 'qcow2', '-c', 'write 0 128k', path]);
    const bytes = readFileSync(path);
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0x00fffffffffffe00n);
    bytes.writeBigUInt64BE(0x8000000000020000n, l2 + 8);
    writeFileSync(path, bytes);
    const damaged = expect.objectContaining({ code: 'ERR_STILLFRAME_CORRUPT_IMAGE' });
    expect(() => withImage(path, true, (node) => bench.read(node, 65536, 512))).toThrow(damaged);
  });

  it('an image that is its own data file is refused', () => {
    const path = at('self.qcow2');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', `data_file=${at('self.data')}`, path, '1M']);
    const bytes = readFileSync(path);
    const name = bytes.indexOf(at('self.data'));
    bytes.write('self.qcow2'.padStart(at('self.data').length, './'), name);
    writeFileSync(path, bytes);
    const cycle = expect.objectContaining({ code: 'ERR_STILLFRAME_BACKING_CYCLE' });
    expect(() => withImage(path, true, () => undefined)).toThrow(cycle);
  });
});
