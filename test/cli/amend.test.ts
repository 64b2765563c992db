import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { parseAmendOptions } from '#src/cli/image-options.js';
import { createEngine } from '#src/index.js';
import { temporaryFolder } from '../block/qcow2-support.js';
import { stillframe } from '../support/cli.js';
import { firstDifference } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = temporaryFolder();
const at = (name: string): string => join(folder, name);
const engine = await createEngine({ workers: 1 });
afterAll(() => engine.close());
for (const side of ['ours', 'theirs']) mkdirSync(at(side));

/** What can be seen of an image: what `info` says of it but for its file, and the contents of drive and snapshots. */
function seen(name: string): { readonly told: unknown; readonly contents: readonly Buffer[] } {
  // Data files are looked for where qemu-img is.
  const folder = dirname(at(name));
  const info = JSON.parse(run('qemu-img', ['info', '--output=json', at(name)], [0], folder));
  const { 'virtual-size': size, snapshots = [], 'format-specific': specific } = info;
  const contents = [undefined, ...snapshots.map(({ id }: { id: string }) => id)].map((id) => {
    const selector = id === undefined ? [] : ['-l', `snapshot.id=${id}`];
    run('qemu-img', ['convert', ...selector, '-O', 'raw', at(name), at('content')], [0], folder);
    return readFileSync(at('content'));
  });
  return { told: { size, snapshots, specific: specific.data }, contents };
}

/** Makes the image in two folders by the same commands. */
function make(...commands: readonly (readonly [tool: string, ...args: string[]])[]): void {
  for (const side of ['ours', 'theirs']) {
    for (const [tool, ...args] of commands) {
      const { status, stderr } = spawnSync(tool, args, { cwd: at(side), encoding: 'utf8', input: '' });
      if (status !== 0) throw new Error(`${tool} ${args.join(' ')}: ${stderr}`);
    }
  }
  // Dates of snapshots.
  copyFileSync(at('theirs/image'), at('ours/image'));
}

/** Has the image changed by qemu-img and by us. @returns whether both did it */
async function amendBoth(options: string): Promise<boolean> {
  const theirs = spawnSync('qemu-img', ['amend', '-o', options, 'image'], {
    cwd: at('theirs'),
    encoding: 'utf8',
  });
  let error: unknown;
  try {
    const { creation, size, backingFile, backingFormat } = parseAmendOptions([options]);
    await engine.amendImage(at('ours/image'), { ...creation, length: size, backingFile, backingFormat });
  } catch (thrown) {
    error = thrown;
  }
  expect(error === undefined, `${options}: ${error} ${theirs.stderr}`).toBe(theirs.status === 0);
  return error === undefined;
}

function same(options: string): void {
  const [ours, theirs] = [seen('ours/image'), seen('theirs/image')];
  expect(ours.told, options).toEqual(theirs.told);
  sameContents(ours.contents, theirs.contents, options);
  // Nothing wrong and nothing leaked.
  run('qemu-img', ['check', '-q', 'image'], [0], at('ours'));
}

function sameContents(some: readonly Buffer[], others: readonly Buffer[], what: string): void {
  expect(some.length, what).toBe(others.length);
  for (const [index, content] of some.entries()) {
    expect(firstDifference(content, others[index] ?? Buffer.alloc(0)), what).toBe(-1);
  }
}

const CREATE = ['qemu-img', 'create', '-q', '-f', 'qcow2'] as const;
const io = (...commands: string[]): readonly [string, ...string[]] => [
  'qemu-io',
  ...commands.flatMap((command) => ['-c', command]),
  'image',
];

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('stillframe amend beside qemu-img amend', () => {
  it('changes refcounts, flags, size and version to and fro', async () => {
    make(
      [...CREATE, '-o', 'cluster_size=4k', 'image', '5M'],
      io('write -P 1 0 300k', 'write -z 1M 100k', 'write -P 2 2M 8k'),
      ['qemu-img', 'snapshot', '-c', 'one', 'image'],
      io('write -P 3 100k 1M', 'write -z -u 0 40k', 'discard 2M 4k', 'write -P 5 4M 12k'),
    );
    for (const options of [
      'refcount_bits=2,lazy_refcounts=on',
      'refcount_bits=1',
      'refcount_bits=64',
      'lazy_refcounts=off,refcount_bits=8',
      'refcount_bits=32,size=0',
      'refcount_bits=16,compat=v2',
      'size=6M',
      'compat=v3,size=6M',
      'compat=0.10',
      'compat=0.10,size=5M',
      'compat=1.1,refcount_bits=4,lazy_refcounts=on',
      'size=3M',
      'compat=0.10,refcount_bits=16,size=5M,lazy_refcounts=off',
    ]) {
      await amendBoth(options);
      same(options);
    }
  });

  it.each([
    ['with a backing file', ['-b', 'base', '-F', 'raw']],
    ['without one', []],
  ])('expands zeroes of drive and snapshots %s', async (_, backing) => {
    make(
      ['qemu-img', 'create', '-q', '-f', 'raw', 'base', '4M'],
      ['qemu-io', '-f', 'raw', '-c', 'write -P 9 0 4M', 'base'],
      [...CREATE, ...backing, 'image', '4M'],
      io('write -P 1 0 256k', 'write -z 64k 128k', 'write -z -u 1M 640k'),
      ['qemu-img', 'snapshot', '-c', 'one', 'image'],
      ['qemu-img', 'snapshot', '-c', 'two', 'image'],
      io('write -P 2 1M 64k', 'write -z -u 0 64k', 'write -P 4 3M 64k'),
      ['qemu-img', 'snapshot', '-c', 'three', 'image'],
      io('write -z 2M 64k', 'write -P 5 2176k 64k', 'write -z 2176k 64k'),
    );
    const before = seen('ours/image').contents;
    await amendBoth('compat=0.10');
    same('compat=0.10');
    sameContents(seen('ours/image').contents, before, 'compat=0.10');
    // And what a guest writes then.
    const write = ['-c', 'write -P 6 64k 64k', '-c', 'write -P 7 1100k 10k', at('ours/image')];
    run('qemu-io', write);
    run('qemu-img', ['check', '-q', at('ours/image')]);
    sameContents(seen('ours/image').contents.slice(1), before.slice(1), 'written');
  });

  it('keeps what a snapshot has in a cluster that the drive says is zero', async () => {
    // The drive keeps the cluster it shares with the snapshot, flagged as zero. QEMU 7.2 writes zeroes into it.
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('shared'), '1M']);
    run('qemu-io', ['-c', 'write -P 1 0 64k', at('shared')]);
    run('qemu-img', ['snapshot', '-c', 'one', at('shared')]);
    run('qemu-io', ['-c', 'write -z 0 64k', at('shared')]);
    const before = seen('shared').contents;
    await engine.amendImage(at('shared'), { version: 2 });
    sameContents(seen('shared').contents, before, 'shared');
    run('qemu-img', ['check', '-q', at('shared')]);
  });

  it('gives the snapshots of an old program what version 3 wants of them', async () => {
    make([...CREATE, '-o', 'compat=0.10', 'image', '1M'], io('write -P 1 0 64k'), [
      'qemu-img',
      'snapshot',
      '-c',
      'a name',
      'image',
    ]);
    const bytes = readFileSync(at('ours/image'));
    const entry = Number(bytes.readBigUInt64BE(64));
    // Without extra data, which QEMU has had since 2011.
    bytes.writeUInt32BE(0, entry + 36);
    bytes.copyWithin(entry + 40, entry + 64, entry + 128);
    for (const side of ['ours', 'theirs']) writeFileSync(at(`${side}/image`), bytes);
    await amendBoth('compat=1.1');
    same('compat=1.1');
  });

  it('does not make version 3 of a header that has no room for it', async () => {
    const path = at('full');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'compat=0.10,cluster_size=512', path, '64k']);
    const bytes = readFileSync(path);
    // An extension that nobody knows.
    bytes.writeUInt32BE(0x12345678, 72);
    bytes.writeUInt32BE(400, 76);
    writeFileSync(path, bytes);
    await expect(engine.amendImage(path, { version: 3 })).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_INVALID_ARGUMENT' }),
    );
    expect(readFileSync(path).equals(bytes)).toBe(true);
    bytes.writeUInt32BE(384, 76);
    writeFileSync(path, bytes);
    await engine.amendImage(path, { version: 3 });
    const header = readFileSync(path);
    expect(header.readUInt32BE(4)).toBe(3);
    expect(header.subarray(112, 512 - 8).equals(bytes.subarray(72, 72 + 392))).toBe(true);
    run('qemu-img', ['check', '-q', path]);
  });

  it('keeps bitmaps through changes that leave them, and loses them where version 2 has none', async () => {
    make(
      [...CREATE, 'image', '4M'],
      ['qemu-img', 'bitmap', '--add', '-g', '64k', 'image', 'bitmap'],
      io('write -P 1 0 64k'),
    );
    for (const options of ['refcount_bits=8,lazy_refcounts=on', 'size=8M', 'refcount_bits=16']) {
      await amendBoth(options);
      same(options);
    }
    const disk = await engine.openDisk(at('ours/image'), { readOnly: true });
    expect(await disk.bitmaps()).toMatchObject([{ name: 'bitmap', count: 65536 }]);
    await disk.close();
    copyFileSync(at('ours/image'), at('told'));
    const done = stillframe(['amend', '-o', 'compat=0.10', at('told')]);
    expect(done).toEqual({
      status: 0,
      stdout: '',
      stderr: "stillframe: warning: compat=0.10 has no dirty bitmaps: 'bitmap' is gone\n",
    });
    await amendBoth('compat=0.10');
    same('compat=0.10');
    await amendBoth('compat=1.1');
    same('compat=1.1');
  });

  it('refuses what qemu-img refuses, and leaves the image as it was', async () => {
    const refused = async (options: string): Promise<void> => {
      const before = readFileSync(at('ours/image'));
      expect(await amendBoth(options), options).toBe(false);
      expect(readFileSync(at('ours/image')).equals(before), options).toBe(true);
    };
    make([...CREATE, 'image', '4M'], io('write -P 1 0 128k'));
    for (const options of [
      ...['compat=foo', 'compat', 'cluster_size=4k', 'foo=1', 'preallocation=full', 'extended_l2=off', ''],
      ...['refcount_bits=3', 'refcount_bits=128', 'refcount_bits=0', 'refcount_bits=x', 'encryption=on'],
      ...['compat=0.10,refcount_bits=8', 'compat=0.10,lazy_refcounts=on', 'lazy_refcounts=maybe'],
      ...['size=1000', 'size=8X', 'size=-1', 'backing_file=b.qcow2', 'backing_fmt=qcow2', 'backing_file='],
      ...['data_file=x', 'data_file_raw=on'],
    ]) {
      await refused(options);
    }
    make(
      [...CREATE, 'image', '4M'],
      io('write -P 1 0 128k'),
      ['qemu-img', 'snapshot', '-c', 'one', 'image'],
      ['qemu-img', 'snapshot', '-c', 'two', 'image'],
      ['qemu-img', 'resize', '-q', 'image', '8M'],
    );
    for (const options of ['refcount_bits=1', 'compat=0.10']) await refused(options);
    make([...CREATE, '-o', 'compat=0.10', 'image', '4M'], ['qemu-img', 'snapshot', '-c', 'one', 'image']);
    for (const options of ['lazy_refcounts=on', 'refcount_bits=8', 'size=8M']) await refused(options);
    make([...CREATE, '-o', 'extended_l2=on', 'image', '4M']);
    await refused('compat=0.10');
    make([...CREATE, '-o', 'refcount_bits=32', 'image', '4M']);
    await refused('compat=0.10');
    make([...CREATE, '-o', 'compression_type=zstd', 'image', '4M'], io('write -c -P 1 0 64k'));
    await refused('compat=0.10');
    // Only what is compressed prevents it.
    make([...CREATE, '-o', 'compression_type=zstd', 'image', '4M'], io('write -P 1 0 64k'));
    await amendBoth('compat=0.10');
    same('compat=0.10');
  });

  it('renames the data file, and gives up that it is a raw image', async () => {
    make([...CREATE, '-o', 'data_file=data,data_file_raw=on', 'image', '1M'], io('write -P 3 0 64k'), [
      'cp',
      'data',
      'other',
    ]);
    expect(await amendBoth('compat=0.10')).toBe(false);
    for (const options of ['data_file=other', 'data_file_raw=on', 'data_file_raw=off', 'lazy_refcounts=on']) {
      await amendBoth(options);
      same(options);
    }
    expect(await amendBoth('data_file_raw=on')).toBe(false);
    await amendBoth('data_file=');
    const named = ['ours', 'theirs'].map((side) => {
      const info = JSON.parse(run('qemu-img', ['info', '--output=json', at(`${side}/image`)]));
      return info['format-specific'];
    });
    expect(named[0]).toEqual(named[1]);
    // What qemu-img cannot open any more can be given its data file again.
    expect(stillframe(['amend', '-o', 'data_file=other', at('ours/image')]).status).toBe(0);
    expect(seen('ours/image').contents[0]?.[0]).toBe(3);
  });

  it('says what can be changed, and takes no half of a command line', () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('plain'), '4M']);
    writeFileSync(at('raw'), Buffer.alloc(512));
    const names = (help: string): (string | undefined)[] =>
      help.split('\n').flatMap((line) => /^ {2}(\w+)=/.exec(line)?.[1] ?? []);
    for (const args of [
      ['-f', 'qcow2', '-o', 'help'],
      ['-o', 'help', at('plain')],
    ]) {
      const ours = stillframe(['amend', ...args]);
      expect(ours.status).toBe(0);
      expect(names(ours.stdout)).toEqual(names(run('qemu-img', ['amend', ...args])));
    }
    for (const args of [
      [at('plain')],
      ['-o', 'help'],
      ['-o', 'compat=1.1'],
      ['-o', 'compat=1.1', at('plain'), at('raw')],
      ['-o', 'compat=1.1', at('missing')],
      ['-f', 'raw', '-o', 'size=4M', at('raw')],
      ['-f', 'raw', '-o', 'help', at('raw')],
    ]) {
      const theirs = spawnSync('qemu-img', ['amend', ...args]);
      expect(stillframe(['amend', ...args]).status, args.join(' ')).toBe(1);
      expect(theirs.status).toBe(1);
    }
    const shown = ['amend', '-p', '--force', '-o', 'compat=0.10,compat=1.1', at('plain')];
    const { status, stderr } = stillframe(shown);
    expect({ status, last: stderr.trimEnd().split('\r').at(-1)?.trim() }).toEqual({
      status: 0,
      last: '(100.00/100%)',
    });
    expect(stillframe(['amend', '-q', '-p', '-o', 'size=8M', at('plain')]).stderr).toBe('');
  });
});
