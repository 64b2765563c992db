/** `stillframe checksum` and `engine.imageChecksum`: the checksum of a backup, found again from the backup. */
import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine, type ImageOptions } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { lastObject, stillframe } from '../support/cli.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { xxh3 } from '../support/reference.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const engine = await createEngine({ workers: 3 });
afterAll(() => engine.close());

const KiB = 1024;
const MiB = 1024 * KiB;

/** Leaf by leaf, by the words of the documentation. */
function reference(content: Uint8Array, clusterSize: number): string {
  let sum = 0n;
  for (let index = 0; index * clusterSize < content.length; index++) {
    const leaf = Buffer.alloc(16);
    leaf.writeBigUInt64LE(xxh3(content.subarray(index * clusterSize, (index + 1) * clusterSize)), 0);
    leaf.writeBigUInt64LE(BigInt(index), 8);
    sum += xxh3(leaf);
  }
  return BigInt.asUintN(64, sum).toString(16).padStart(16, '0');
}

const random = new Random(77);
// Data, a hole that ends within a cluster, data again, zeroes that are written, and a short last cluster.
const content = Buffer.alloc(20 * MiB + 512);
content.set(random.bytes(MiB + 1000), 0);
content.set(random.bytes(300 * KiB), 12 * MiB + 512);
content.set(random.bytes(1000), content.length - 1000);
writeFileSync(at('full.raw'), content);
writeFileSync(at('sparse.raw'), content.subarray(0, MiB + 1000));
truncateSync(at('sparse.raw'), 20 * MiB);

describe('the checksum of an image', () => {
  it.each([512, 4 * KiB, 64 * KiB, 2 * MiB])(
    'with clusters of %i bytes is that of its clusters',
    async (clusterSize) => {
      const root = reference(content, clusterSize);
      for (const workers of [1, 3]) {
        expect(await engine.imageChecksum(at('full.raw'), { format: 'raw', clusterSize, workers })).toEqual({
          algorithm: 'xxh3-64',
          root,
          clusterSize,
          virtualSize: content.length,
        });
      }
    },
  );

  it('is that of a backup which was taken while a guest wrote, and of what it copied', async () => {
    writeFileSync(at('disk.raw'), content);
    const disk = await engine.openDisk(at('disk.raw'), { format: 'raw' });
    const job = await disk.backup({
      target: at('backup.qcow2'),
      format: 'qcow2',
      sync: 'full',
      speed: 30 * MiB,
    });
    for (let write = 0; write < 50; write++) {
      await disk.write(random.between(0, 40 * 1024) * 512, random.bytes(512 * random.between(1, 200)));
    }
    const { checksum, clusterSize } = await job.result();
    await disk.close();
    expect(checksum.root).toBe(reference(content, clusterSize));
    expect(await engine.imageChecksum(at('backup.qcow2'), { clusterSize })).toMatchObject(checksum);
    expect((await engine.imageChecksum(at('disk.raw'), { format: 'raw', clusterSize })).root).not.toBe(
      checksum.root,
    );
  });

  it('changes with every byte, and where clusters change places', async () => {
    const roots = new Set<string>();
    for (const change of [
      () => undefined,
      (bytes: Buffer) => bytes.writeUInt8(bytes.readUInt8(5) ^ 1, 5),
      (bytes: Buffer) => bytes.writeUInt8(1, 9 * MiB),
      (bytes: Buffer) => bytes.writeUInt8(bytes.readUInt8(content.length - 1) ^ 128, content.length - 1),
      (bytes: Buffer) => bytes.set(content.subarray(0, 64 * KiB), 64 * KiB),
    ]) {
      const bytes = Buffer.from(content);
      change(bytes);
      writeFileSync(at('changed.raw'), bytes);
      roots.add((await engine.imageChecksum(at('changed.raw'), { format: 'raw' })).root);
    }
    expect(roots.size).toBe(5);
  });

  it.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))(
    'is that of the whole chain, whatever the formats, clusters and holes',
    async () => {
      const same = async (path: string, options: ImageOptions = {}): Promise<void> => {
        run('qemu-img', ['convert', '-O', 'raw', path, at('all.raw')]);
        const [one, other] = [
          await engine.imageChecksum(path, options),
          await engine.imageChecksum(at('all.raw'), { format: 'raw' }),
        ];
        expect(one).toEqual(other);
      };
      for (const options of ['cluster_size=512', 'cluster_size=2M', 'extended_l2=on', 'compat=0.10']) {
        run('qemu-img', [
          ...['create', '-q', '-f', 'qcow2', '-b', at('sparse.raw'), '-F', 'raw', '-o', options],
          ...[at('top.qcow2'), '33M'],
        ]);
        const writes = ['write -P 3 100k 200k', 'write -z 900k 300k', 'write -P 0 20M 90k', 'discard 15M 3M'];
        run('qemu-io', [
          ...['-f', 'qcow2', ...writes.flatMap((command) => ['-c', command])],
          ...['-c', 'write -P 9 21M 777k', at('top.qcow2')],
        ]);
        await same(at('top.qcow2'));
      }
      // Nothing but a hole, larger than what is looked at in one step.
      run('qemu-img', ['create', '-q', '-f', 'qcow2', at('huge.qcow2'), '3T']);
      run('qemu-io', ['-f', 'qcow2', '-c', 'write -P 1 2T 4k', at('huge.qcow2')]);
      const clusterSize = 2 * MiB;
      const { root } = await engine.imageChecksum(at('huge.qcow2'), { clusterSize, workers: 3 });
      expect((await engine.imageChecksum(at('huge.qcow2'), { clusterSize, workers: 1 })).root).toBe(root);
    },
  );

  it.each([0, 256, 3 * 64 * KiB, 4 * MiB, Number.NaN])('has no clusters of %d bytes', async (clusterSize) => {
    await expect(engine.imageChecksum(at('full.raw'), { clusterSize })).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_INVALID_ARGUMENT',
    });
  });
});

describe('the command', () => {
  const root = reference(content, 64 * KiB);

  it('prints it', () => {
    expect(stillframe(['checksum', '-f', 'raw', at('full.raw')])).toMatchObject({
      status: 0,
      stdout: `xxh3-64 ${root}\n`,
    });
    const { stdout } = stillframe(['checksum', '--cluster-size', '2M', '--output', 'json', at('full.raw')]);
    expect(lastObject(stdout)).toEqual({
      ...{ type: 'result', filename: at('full.raw'), algorithm: 'xxh3-64' },
      ...{ root: reference(content, 2 * MiB), clusterSize: 2 * MiB, virtualSize: content.length },
    });
  });

  it('compares it', () => {
    expect(stillframe(['checksum', '--expect', root.toUpperCase(), at('full.raw')]).status).toBe(0);
    const other = stillframe(['checksum', '--expect', '00000000000000ff', at('full.raw')]);
    expect(other.status).toBe(1);
    expect(other.stdout).toBe(`xxh3-64 ${root}: not 00000000000000ff, with clusters of 65536 bytes\n`);
    const quiet = ['checksum', '--quiet', '--output', 'json', '--expect', root, at('full.raw')];
    expect(lastObject(stillframe(quiet).stdout)).toMatchObject({ root, agrees: true });
  });

  it('is what a backup printed', () => {
    const { stdout } = stillframe([
      'backup',
      at('full.raw'),
      at('copy.qcow2'),
      '-f',
      'raw',
      '--sync',
      'full',
    ]);
    const [, printed = ''] = /^checksum: +xxh3-64 ([\da-f]{16})$/m.exec(stdout) ?? [];
    expect(stillframe(['checksum', '--expect', printed, at('copy.qcow2')]).status).toBe(0);
  });

  it.each([
    [['--expect', 'xyz', 'full.raw'], 2, /--expect/],
    [['--cluster-size', '3k', 'full.raw'], 2, /no power of two/],
    [['missing.raw'], 2, /missing\.raw/],
    [[], 1, /usage/],
  ])('refuses %j', (args, status, text) => {
    const ended = stillframe(['checksum', ...args.map((arg) => (arg.endsWith('.raw') ? at(arg) : arg))]);
    expect(ended.stderr).toMatch(text);
    expect(ended.status).toBe(status);
  });
});
