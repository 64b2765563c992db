import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { CLI, stillframe } from '../support/cli.js';
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

describe.skipIf(!peers)('stillframe snapshot beside qemu-img snapshot', () => {
  interface Outcome {
    readonly status: number | null;
    readonly said: string;
  }

  function both(args: readonly string[]): { readonly ours: Outcome; readonly theirs: Outcome } {
    const outcome = (folder: string, command: string, before: readonly string[]): Outcome => {
      const { status, stdout, stderr } = spawnSync(command, [...before, 'snapshot', ...args], {
        cwd: at(folder),
        encoding: 'utf8',
        input: '',
      });
      const line = stderr.split('\n').find((text) => /^(stillframe|qemu-img): /.test(text)) ?? '';
      const said = line.replace(/^[a-z-]+: /, '').replace(/ \[ERR_[A-Z_]+\]$/, '');
      return { status, said: stdout.replace(/\d{4}-\d\d-\d\d \d\d:\d\d:\d\d/g, 'DATE') + said };
    };
    return { ours: outcome('by-us', process.execPath, [CLI]), theirs: outcome('by-qemu', 'qemu-img', []) };
  }

  /** The same in both folders: what the drive and each snapshot have, and that nothing is wrong or leaked. */
  function same(image: string): void {
    const seen = ['by-us', 'by-qemu'].map((folder) => {
      const path = at(join(folder, image));
      run('qemu-img', ['check', '-q', path]);
      const info = JSON.parse(run('qemu-img', ['info', '--output=json', path]));
      run('qemu-img', ['convert', '-O', 'raw', path, at('content')]);
      const contents: Buffer[] = [readFileSync(at('content'))];
      for (const { id } of info.snapshots ?? []) contents.push(byQemu(path, `snapshot.id=${id}`));
      const named = (info.snapshots ?? []).map((one: Record<string, unknown>) => ({
        ...one,
        'date-sec': 0,
        'date-nsec': 0,
      }));
      return { size: info['virtual-size'], named, contents };
    });
    expect(seen[0]?.named).toEqual(seen[1]?.named);
    expect(seen[0]?.size).toBe(seen[1]?.size);
    for (const [index, content] of (seen[0]?.contents ?? []).entries()) {
      expect(firstDifference(content, seen[1]?.contents[index] ?? Buffer.alloc(0))).toBe(-1);
    }
  }

  function inBoth(tool: string, ...args: string[]): void {
    for (const folder of ['by-us', 'by-qemu']) {
      const { status, stderr } = spawnSync(tool, args, { cwd: at(folder), encoding: 'utf8', input: '' });
      if (status !== 0) throw new Error(`${tool} ${args.join(' ')}: ${stderr}`);
    }
  }

  beforeAll(() => {
    for (const folder of ['by-us', 'by-qemu']) mkdirSync(at(folder));
  });

  it.each(['compat=0.10,cluster_size=4k', 'extended_l2=on,refcount_bits=64'])(
    'makes, applies and deletes them with the same result (%s)',
    async (options) => {
      const image = 'image.qcow2';
      inBoth('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', options, image, '3000320');
      const write = (...commands: string[]): void =>
        inBoth('qemu-io', ...commands.flatMap((command) => ['-c', command]), image);
      const step = async (action: 'create' | 'apply' | 'delete', name: string): Promise<void> => {
        run('qemu-img', ['snapshot', `-${action.charAt(0)}`, name, at(join('by-qemu', image))]);
        await engine.snapshot(at(join('by-us', image)), { action, name });
      };
      write('write -P 1 0 100k', 'write -c -P 2 1M 64k', 'write -z 1536k 64k');
      await step('create', 'one');
      write('write -P 3 30k 60k', 'write -P 4 2M 128k');
      // A name that is there already is no reason not to.
      await step('create', 'one');
      if (!options.startsWith('compat=0.10')) inBoth('qemu-img', 'resize', '-q', image, '8M');
      await step('create', '3');
      write('write -P 5 2900k 30k');
      await step('apply', 'one');
      same(image);
      write('write -P 6 0 200k', 'write -P 7 1M 64k', 'discard 2M 128k');
      await step('apply', '3');
      same(image);
      await step('apply', '2');
      await step('delete', 'one');
      await step('delete', '3');
      same(image);
      write('write -P 8 0 2900k');
      await step('apply', 'one');
      await step('delete', 'one');
      same(image);
    },
    60_000,
  );

  it('says the same of what cannot be', () => {
    for (const folder of ['by-us', 'by-qemu']) {
      const make = (...args: string[]) => {
        expect(spawnSync('qemu-img', args, { cwd: at(folder) }).status).toBe(0);
      };
      make('create', '-q', '-f', 'qcow2', 'plain.qcow2', '4M');
      make('snapshot', '-c', 'name', 'plain.qcow2');
      make('snapshot', '-c', '', 'plain.qcow2');
      make('create', '-q', '-f', 'qcow2', '-o', 'data_file=data', 'external.qcow2', '4M');
      make('create', '-q', '-f', 'qcow2', 'marked.qcow2', '4M');
      make('snapshot', '-c', 'name', 'marked.qcow2');
      make('bitmap', '--add', 'marked.qcow2', 'bitmap');
    }
    const long = 'x'.repeat(300);
    const refused: readonly (readonly string[])[] = [
      ['-c', 'name'],
      ['-c', 'name', '-l', 'plain.qcow2'],
      // An id is no name.
      ['-d', '1', 'plain.qcow2'],
      ['-a', 'none', 'plain.qcow2'],
      ['-a', long, 'plain.qcow2'],
      ['-U', '-c', 'name', 'plain.qcow2'],
      ['-c', 'name', 'external.qcow2'],
      ['-a', 'name', 'external.qcow2'],
      ['-d', 'name', 'external.qcow2'],
      ['-a', 'name', 'marked.qcow2'],
    ];
    for (const args of refused) {
      const { ours, theirs } = both(args);
      expect(ours, args.join(' ')).toEqual(theirs);
      expect(ours.status).toBe(1);
    }
    for (const args of [
      ['-a', '', 'plain.qcow2'],
      ['-d', '', 'plain.qcow2'],
      ['-c', long, 'plain.qcow2'],
      ['-q', '-l', 'plain.qcow2'],
      ['-c', 'further', 'marked.qcow2'],
      ['-d', 'name', 'marked.qcow2'],
    ]) {
      const { ours, theirs } = both(args);
      expect(ours, args.join(' ')).toEqual(theirs);
      expect(ours.status).toBe(0);
    }
    for (const image of ['plain.qcow2', 'marked.qcow2']) same(image);
    const bitmaps = ['by-us', 'by-qemu'].map(
      (folder) =>
        JSON.parse(run('qemu-img', ['info', '--output=json', at(join(folder, 'marked.qcow2'))]))[
          'format-specific'
        ].data.bitmaps,
    );
    expect(bitmaps[0]).toEqual(bitmaps[1]);
  });

  it('have the length of bytes that fits, in whole characters', async () => {
    const path = at('named.qcow2');
    await engine.createImage(path, { format: 'qcow2', length: 1 << 20 });
    await engine.snapshot(path, { action: 'create', name: `${'x'.repeat(254)}é` });
    const { snapshots } = await engine.imageInfo(path);
    expect(snapshots?.map(({ name }) => name)).toEqual(['x'.repeat(254)]);
    writeFileSync(at('plain.raw'), Buffer.alloc(4096));
    for (const action of ['create', 'apply', 'delete'] as const) {
      await expect(
        engine.snapshot(at('plain.raw'), { action, name: 'x' }, { format: 'raw' }),
      ).rejects.toThrow(
        {
          create: "Could not create snapshot 'x': -95 (Operation not supported)",
          apply: "Could not apply snapshot 'x': Block driver does not support snapshots",
          delete: "Could not delete snapshot 'x': snapshot not found",
        }[action],
      );
    }
  });

  it.each([
    ['the header', 0n],
    ['the refcount table', 0x10000n],
  ])('does not go back to a snapshot whose tables are %s', async (_, place) => {
    const path = withSnapshots('mixed.qcow2', 'cluster_size=64k');
    const before = byQemu(path, 'snapshot.name=1');
    const bytes = readFileSync(path);
    const l1 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(64))));
    // Within a cluster of the header as well: offset 0 would be no table at all.
    bytes.writeBigUInt64BE(place === 0n ? 0x200n : place, l1);
    writeFileSync(path, bytes);
    run('qemu-img', ['convert', '-O', 'raw', path, at('drive')]);
    await expect(engine.snapshot(path, { action: 'apply', name: 'two' })).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_CORRUPT_IMAGE' }),
    );
    run('qemu-img', ['compare', '-q', '-U', path, at('drive')]);
    expect(firstDifference(byQemu(path, 'snapshot.name=1'), before)).toBe(-1);
  });
});
