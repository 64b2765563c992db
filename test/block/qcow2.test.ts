import { spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { STATUS_ALLOCATED, STATUS_COMPRESSED, STATUS_DATA } from '#src/block/node.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder, Workbench } from './qcow2-support.js';

const folder = temporaryFolder();
const bench = new Workbench();
const at = (name: string): string => join(folder, name);
const peers = hasPeer('qemu-img') && hasPeer('qemu-io');

function io(path: string, ...commands: string[]): void {
  run('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), path]);
}

function expectAlike(path: string, model: Uint8Array): void {
  run('qemu-img', ['check', '-q', path]);
  writeFileSync(at('model'), model);
  run('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', 'raw', path, at('model')]);
}

describe.skipIf(!peers)('images that QEMU made', () => {
  it.each(['zlib', 'zstd'])('compressed with %s: read, partly overwritten, discarded', (type) => {
    const random = new Random(3);
    const length = 4 << 20;
    // Compresses well, and every cluster is different.
    const model = Buffer.alloc(length);
    for (let byte = 0; byte < length; byte++) model[byte] = byte % 64 < 8 ? random.between(0, 3) : byte >> 16;
    writeFileSync(at('content'), model);
    const path = at(`${type}.qcow2`);
    run('qemu-img', ['convert', '-c', '-O', 'qcow2', '-o', `compression_type=${type}`, at('content'), path]);
    const image = bench.open(path, false);
    expect(firstDifference(bench.read(image.node, 0, length), model)).toBe(-1);
    expect(image.node.status(0, 65536)).toEqual({
      length: 65536,
      flags: STATUS_DATA | STATUS_ALLOCATED | STATUS_COMPRESSED,
      hostOffset: -1,
    });
    for (let round = 0; round < 40; round++) {
      const offset = random.between(0, length - 1);
      const bytes = random.noise(random.between(1, Math.min(100_000, length - offset)));
      bench.write(image.node, offset, bytes);
      model.set(bytes, offset);
      const zeroes = random.between(0, 60) * 65536;
      image.node.writeZeroes(zeroes, 65536, true);
      model.fill(0, zeroes, zeroes + 65536);
    }
    expect(firstDifference(bench.read(image.node, 0, length), model)).toBe(-1);
    image.close();
    expectAlike(path, model);
  });

  it('with internal snapshots: they stay what they were', () => {
    const random = new Random(4);
    const length = 6 << 20;
    for (const options of ['cluster_size=4k', 'cluster_size=64k', 'cluster_size=64k,compat=0.10']) {
      const path = at('snapshots.qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, String(length)]);
      const states: Buffer[] = [];
      const model = Buffer.alloc(length);
      for (let snapshot = 0; snapshot < 3; snapshot++) {
        const image = bench.open(path, false);
        for (let round = 0; round < 20; round++) {
          const offset = random.between(0, length - 1);
          const size = random.between(1, Math.min(300_000, length - offset));
          if (random.chance(0.3)) {
            image.node.writeZeroes(offset, size, true);
            model.fill(0, offset, offset + size);
          } else {
            const bytes = random.noise(size);
            bench.write(image.node, offset, bytes);
            model.set(bytes, offset);
          }
        }
        image.close();
        expectAlike(path, model);
        states.push(Buffer.from(model));
        run('qemu-img', ['snapshot', '-c', `s${snapshot}`, path]);
      }
      for (const [index, state] of states.entries()) {
        run('qemu-img', ['snapshot', '-a', `s${index}`, path]);
        expectAlike(path, state);
      }
      run('qemu-img', ['snapshot', '-d', 's1', path]);
      run('qemu-img', ['check', '-q', path]);
    }
  });

  it('with preallocated and shared zero clusters', () => {
    const path = at('prealloc.qcow2');
    const length = 3 << 20;
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', path, String(length)]);
    io(path, 'write -P 3 0 1M', 'write -z 512k 1M', 'discard 1536k 256k');
    const model = Buffer.alloc(length).fill(3, 0, 1 << 19);
    const image = bench.open(path, false);
    expect(firstDifference(bench.read(image.node, 0, length), model)).toBe(-1);
    const bytes = new Random(5).noise(100_000);
    for (const offset of [(1 << 19) + 777, (1 << 20) - 50_000, 1_600_000, 2_900_000]) {
      bench.write(image.node, offset, bytes);
      model.set(bytes, offset);
    }
    image.close();
    expectAlike(path, model);
  });

  it('marked corrupt: read, but not written; marked dirty: written after a look at its refcounts', () => {
    const path = at('marked.qcow2');
    const mark = (bit: bigint): void => {
      run('qemu-img', ['create', '-q', '-f', 'qcow2', path, '1M']);
      const bytes = readFileSync(path);
      bytes.writeBigUInt64BE(bit, 72);
      writeFileSync(path, bytes);
      bench.open(path, true).close();
      expect(readFileSync(path).equals(bytes)).toBe(true);
    };
    mark(2n);
    expect(() => bench.open(path, false)).toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_CORRUPT_IMAGE' }),
    );
    mark(1n);
    bench.open(path, false).close();
    expect(readFileSync(path).readBigUInt64BE(72)).toBe(0n);
  });
});

describe('growth', () => {
  it.each([
    { clusterBits: 9, refcountBits: 64, length: 24 << 20 },
    { clusterBits: 9, refcountBits: 1, length: 40 << 20 },
    { clusterBits: 12, refcountBits: 16, length: 64 << 20 },
  ])('of the refcount table: $clusterBits bits, $refcountBits-bit refcounts', (options) => {
    const path = at('growth.qcow2');
    bench.create(path, options);
    const image = bench.open(path, false);
    const random = new Random(6);
    const model = Buffer.alloc(options.length);
    for (let offset = 0; offset < options.length; offset += 1 << 20) {
      const bytes = random.noise(1 << 20);
      bench.write(image.node, offset, bytes);
      model.set(bytes, offset);
    }
    expect(firstDifference(bench.read(image.node, 0, options.length), model)).toBe(-1);
    image.close();
    if (peers) expectAlike(path, model);
  });

  it('of a huge sparse image takes what it holds', () => {
    const path = at('huge.qcow2');
    bench.create(path, { length: 2 ** 46, clusterBits: 21 });
    const image = bench.open(path, false);
    const bytes = Buffer.alloc(70_000, 9);
    for (const offset of [0, 2 ** 40 + 5, 2 ** 46 - 70_000]) bench.write(image.node, offset, bytes);
    for (const offset of [0, 2 ** 40 + 5, 2 ** 46 - 70_000]) {
      expect(bench.read(image.node, offset, 70_000).equals(bytes)).toBe(true);
    }
    image.node.writeZeroes(0, 2 ** 46, true);
    expect(bench.read(image.node, 2 ** 40, 100_000).every((byte) => byte === 0)).toBe(true);
    image.close();
    if (peers) run('qemu-img', ['check', '-q', path]);
  });

  it('gives discarded clusters to later writes', () => {
    const path = at('reuse.qcow2');
    bench.create(path, { length: 32 << 20, clusterBits: 16 });
    const image = bench.open(path, false);
    const bytes = new Random(7).noise(1 << 20);
    const sizes: number[] = [];
    for (let round = 0; round < 20; round++) {
      for (let offset = 0; offset < 8 << 20; offset += 1 << 20) bench.write(image.node, offset, bytes);
      image.node.flush();
      image.node.discard(0, 8 << 20);
      image.node.flush();
      sizes.push(readFileSync(path).length);
    }
    image.close();
    expect(Math.max(...sizes)).toBeLessThan(20 << 20);
    if (peers) run('qemu-img', ['check', '-q', path]);
  });
});

describe('a read in flight', () => {
  it('never sees what was written later into clusters that were freed under it', async () => {
    const path = at('freed.qcow2');
    bench.create(path, { length: 1 << 20, clusterBits: 16 });
    const image = bench.open(path, false);
    bench.write(image.node, 0, Buffer.alloc(65536, 1));
    image.node.flush();
    const { arena } = bench.runtime;
    const gate = arena.alloc(64, 'gate');
    const pointer = arena.alloc(65536, 'buffer of the reader');
    const url = (name: string): string => new URL(`../../dist/${name}`, import.meta.url).href;
    const script = `
      const { parentPort, workerData } = require('node:worker_threads');
      (async () => {
        const { attachRuntime } = await import('${url('kernels/runtime.js')}');
        const { attachNode } = await import('${url('block/graph.js')}');
        const { HostFile } = await import('${url('block/raw/file.js')}');
        const runtime = attachRuntime(workerData.shared);
        const node = attachNode(runtime, workerData.descriptor);
        const read = HostFile.prototype.read;
        HostFile.prototype.read = function (offset, pointer, length) {
          parentPort.postMessage('reading');
          Atomics.wait(runtime.arena.i32, workerData.gate >> 2, 0);
          read.call(this, offset, pointer, length);
        };
        node.read(0, workerData.pointer, 65536);
        parentPort.postMessage('read');
      })();`;
    const workerData = { shared: bench.runtime.shared, descriptor: image.descriptor, gate, pointer };
    const worker = new Worker(script, { eval: true, workerData });
    const said = (event: string): Promise<void> =>
      new Promise((resolve, reject) => {
        worker.once('error', reject);
        worker.on('message', (message) => message === event && resolve());
      });
    const done = said('read');
    await said('reading');
    image.node.discard(0, 65536);
    image.node.flush();
    image.node.flush();
    for (let cluster = 1; cluster < 6; cluster++) {
      bench.write(image.node, cluster * 65536, Buffer.alloc(65536, 2));
      image.node.flush();
    }
    Atomics.store(arena.i32, gate >> 2, 1);
    Atomics.notify(arena.i32, gate >> 2);
    await done;
    await worker.terminate();
    expect([...new Set(arena.copyOut(pointer, 65536))]).toEqual([1]);
    // Once it is over the place is taken again: the file does not grow by another cluster.
    image.node.flush();
    const before = readFileSync(path).length;
    bench.write(image.node, 7 * 65536, Buffer.alloc(65536, 3));
    image.node.flush();
    expect(readFileSync(path).length).toBe(before);
    image.close();
    arena.free(gate);
    arena.free(pointer);
    if (peers) run('qemu-img', ['check', '-q', path]);
  });
});

describe.skipIf(!peers)('a killed process', () => {
  it('leaves an image without errors that holds everything flushed', async () => {
    const script = `
      import { createEngine } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url).href)};
      const engine = await createEngine({ workers: 1 });
      const disk = await engine.openDisk(process.argv[1], { format: 'qcow2' });
      for (let round = 1; ; round++) {
        const writes = [];
        for (let index = 0; index < 16; index++) {
          const slot = (round * 16 + index) % 512;
          writes.push(disk.write(slot * 40_000 + 77, new Uint8Array(40_000).fill(round % 251 + 1)));
        }
        await Promise.all(writes);
        await disk.flush();
        process.stdout.write(round + '\\n');
      }`;
    for (let attempt = 0; attempt < 5; attempt++) {
      const path = at('killed.qcow2');
      bench.create(path, { length: 32 << 20, clusterBits: attempt % 2 === 0 ? 16 : 9 });
      const child = spawn(process.execPath, ['--input-type=module', '-e', script, path]);
      let output = '';
      const closed = new Promise((resolve) => child.once('close', resolve));
      child.stdout.on('data', (data) => {
        output += String(data);
        if (output.split('\n').length > 20 + attempt * 17) child.kill('SIGKILL');
      });
      await closed;
      run('qemu-img', ['check', '-q', path], [0, 3]);
      const flushed = Number(output.trimEnd().split('\n').at(-1));
      expect(flushed).toBeGreaterThan(10);
      const image = bench.open(path, true);
      // A slot comes round again after 32 rounds, so the round under way at the end touches none of these.
      for (let round = Math.max(1, flushed - 30); round <= flushed; round++) {
        for (let index = 0; index < 16; index++) {
          const slot = (round * 16 + index) % 512;
          const found = bench.read(image.node, slot * 40_000 + 77, 40_000);
          expect(found.every((byte) => byte === (round % 251) + 1)).toBe(true);
        }
      }
      image.close();
    }
  });
});
