import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const peers = hasPeer('qemu-img') && hasPeer('qemu-io');
const engine = await createEngine({ workers: 1 });
afterAll(() => engine.close());

/** An image with snapshots `1` (id 1), `two` (id 2) of different content, the disk larger in the second. */
function withSnapshots(name: string, options: string): string {
  const path = at(name);
  run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, '2M']);
  const random = new Random(name.length);
  for (const [index, tag] of ['two', '1', 'three'].entries()) {
    for (let request = 0; request < 6; request++) {
      const offset = random.between(0, 3000) * 512;
      run('qemu-io', ['-f', 'qcow2', '-c', `write -P ${random.between(1, 255)} ${offset} 30k`, path]);
    }
    run('qemu-img', ['snapshot', '-c', tag, path]);
    if (index === 1) run('qemu-img', ['resize', '-q', path, '3M']);
  }
  run('qemu-io', ['-f', 'qcow2', '-c', 'write -P 7 0 3M', path]);
  return path;
}

function byQemu(path: string, selector: string): Buffer {
  run('qemu-img', ['convert', '-l', selector, '-O', 'raw', path, at('theirs')]);
  return readFileSync(at('theirs'));
}

describe.skipIf(!peers)('internal snapshots', () => {
  it.each(['cluster_size=64k', 'cluster_size=512', 'extended_l2=on', 'compression_type=zstd'])(
    'are read as sources (%s)',
    async (options) => {
      const path = withSnapshots(`of-${options}.qcow2`, options);
      // An id goes before a name, as in qemu-img.
      for (const selector of ['1', '2', 'three', 'snapshot.name=1', 'snapshot.id=1,snapshot.name=two']) {
        const target = at('ours');
        const done = stillframe([
          ...['backup', path, target, '--sync', 'full', '--format', 'raw', '--force', '--progress', 'none'],
          ...['--snapshot', selector],
        ]);
        expect(done).toMatchObject({ status: 0 });
        // The drive had this size then; qemu-img makes it as large as it is now.
        const ours = readFileSync(target);
        expect(ours.length).toBe(selector === 'three' ? 3 << 20 : 2 << 20);
        expect(firstDifference(ours, byQemu(path, selector).subarray(0, ours.length))).toBe(-1);
      }
      writeFileSync(at('plain'), byQemu(path, '1').subarray(0, 2 << 20));
      const same = stillframe(['compare', '--snapshot', '1', '-F', 'raw', path, at('plain')]);
      expect(same).toMatchObject({ status: 0, stdout: 'Images are identical.\n' });
      const other = stillframe(['compare', '-F', 'raw', path, at('plain')]);
      expect(other.status).toBe(1);
    },
  );

  it('are listed as qemu-img lists them', () => {
    const path = withSnapshots('listed.qcow2', 'cluster_size=64k');
    run('qemu-img', ['snapshot', '-c', 'a name that is longer than its column', path]);
    const list = (...args: string[]) => stillframe(['snapshot', '-l', ...args]).stdout;
    expect(list(path)).toBe(run('qemu-img', ['snapshot', '-l', path]));
    const { snapshots } = JSON.parse(run('qemu-img', ['info', '--output=json', path]));
    expect(JSON.parse(list('--output', 'json', path))).toEqual(snapshots);
    writeFileSync(at('plain.raw'), 'x');
    expect(list('-f', 'raw', at('plain.raw'))).toBe('');
  });

  it('that are not there, or cannot be had that way, are one clear error', async () => {
    const path = withSnapshots('refused.qcow2', 'cluster_size=64k');
    const code = (name: string) => expect.objectContaining({ code: `ERR_STILLFRAME_${name}` });
    await expect(engine.openDisk(path, { snapshot: 'nope', readOnly: true })).rejects.toThrow(
      code('NOT_FOUND'),
    );
    await expect(engine.openDisk(path, { snapshot: '1' })).rejects.toThrow(code('INVALID_ARGUMENT'));
    const raw = { format: 'raw', snapshot: '1', readOnly: true } as const;
    await expect(engine.openDisk(path, raw)).rejects.toThrow(code('INVALID_ARGUMENT'));
    const disk = await engine.openDisk(path, { snapshot: '1', readOnly: true });
    await expect(disk.backup({ target: at('none.qcow2'), sync: 'none' })).rejects.toThrow(
      code('BACKING_UNSUPPORTED'),
    );
    await disk.close();
  });

  it.each([
    ['an unaligned L1 table', 0, 8, 0x50200n],
    ['an L1 table beyond the end', 0, 8, 1n << 40n],
    ['no L1 table', 0, 8, 0n],
    ['a huge L1 table', 8, 4, 0x7fffffffn],
    ['too small an L1 table', 8, 4, 0n],
    ['a disk larger than its table', 40 + 8, 8, 1n << 40n],
    ['a disk beyond 2^53', 40 + 8, 8, 1n << 60n],
  ] as const)('with %s are refused, and the image is not', async (_, offset, width, value) => {
    const path = withSnapshots('hostile.qcow2', 'cluster_size=64k');
    const bytes = readFileSync(path);
    const entry = Number(bytes.readBigUInt64BE(64)) + offset;
    if (width === 8) bytes.writeBigUInt64BE(value, entry);
    else bytes.writeUInt32BE(Number(value), entry);
    writeFileSync(path, bytes);
    await expect(engine.openDisk(path, { snapshot: '1', readOnly: true })).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_CORRUPT_IMAGE' }),
    );
    const disk = await engine.openDisk(path, { readOnly: true });
    await disk.close();
  });
});
