import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { stillframe } from '../support/cli.js';
import { Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-cli-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const random = new Random(99);

function qemuImg(args: readonly string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync('qemu-img', args, { cwd: folder, encoding: 'utf8' });
}

function make(...args: string[]): void {
  const { status, stderr } = qemuImg(args);
  if (status !== 0) throw new Error(`qemu-img ${args.join(' ')}: ${stderr}`);
}

function io(image: string, ...commands: string[]): void {
  const format = image.endsWith('.raw') ? ['-f', 'raw'] : [];
  run('qemu-io', [...format, ...commands.flatMap((command) => ['-c', command]), join(folder, image)]);
}

const images = [
  'base.raw',
  'overlay.qcow2',
  'chain.qcow2',
  'deep.qcow2',
  'v2.qcow2',
  'small-clusters.qcow2',
  'large-clusters.qcow2',
  'zlib.qcow2',
  'zstd.qcow2',
  'lazy.qcow2',
  'absolute.qcow2',
  'sub/relative.qcow2',
  'odd.raw',
  'half.raw',
  'empty.raw',
  'empty.qcow2',
  'written.qcow2',
  'snapshots.qcow2',
  'snapshots-v2.qcow2',
  'preallocated.qcow2',
  'preallocated-written.qcow2',
  'preallocated-small.qcow2',
  'fallocated.qcow2',
  'fallocated.raw',
  'data-file.qcow2',
  'data-file-raw.qcow2',
  'subclusters.qcow2',
];

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('beside qemu-img', () => {
  beforeAll(() => {
    mkdirSync(join(folder, 'sub'));
    make('create', '-q', '-f', 'raw', 'base.raw', '10M');
    make('create', '-q', '-f', 'qcow2', '-o', `data_file=${join(folder, 'data')}`, 'data-file.qcow2', '3M');
    make(
      'create',
      '-q',
      '-f',
      'qcow2',
      '-o',
      `data_file=${join(folder, 'raw-data')},data_file_raw=on`,
      'data-file-raw.qcow2',
      '3M',
    );
    make('create', '-q', '-f', 'qcow2', '-o', 'extended_l2=on', 'subclusters.qcow2', '3M');
    for (const image of ['data-file.qcow2', 'subclusters.qcow2'])
      io(image, 'write -P 5 1M 70k', 'write -z 2M 3k');
    io('base.raw', 'write -P 5 1M 2M', 'write -P 7 9M 100k');
    make('create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'overlay.qcow2');
    io('overlay.qcow2', 'write -P 6 2M 1M', 'write -z 5M 1M', 'write -P 3 6M 1M', 'discard 6M 1M');
    make('create', '-q', '-f', 'qcow2', '-b', 'overlay.qcow2', '-F', 'qcow2', 'chain.qcow2', '20M');
    io('chain.qcow2', 'write -P 1 100 10', 'write -z 12M 1M');
    make('create', '-q', '-f', 'qcow2', '-b', 'chain.qcow2', '-F', 'qcow2', 'deep.qcow2', '30M');
    make('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10,cluster_size=4k', 'v2.qcow2', '3M');
    io('v2.qcow2', 'write -P 9 10k 300k', 'write -z 50k 64k');
    make('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=512', 'small-clusters.qcow2', '3M');
    io('small-clusters.qcow2', 'write -P 9 10k 300k', 'write -z 50k 64k');
    make('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=2M', 'large-clusters.qcow2', '9M');
    io('large-clusters.qcow2', 'write -P 9 3M 300k');
    for (const type of ['zlib', 'zstd']) {
      make(
        'convert',
        '-c',
        '-o',
        `compression_type=${type}`,
        '-O',
        'qcow2',
        'overlay.qcow2',
        `${type}.qcow2`,
      );
    }
    const lazy = ['-o', 'lazy_refcounts=on,refcount_bits=1'];
    make('create', '-q', '-f', 'qcow2', ...lazy, 'lazy.qcow2', '5G');
    make('create', '-q', '-f', 'qcow2', '-b', join(folder, 'base.raw'), '-F', 'raw', 'absolute.qcow2');
    make('create', '-q', '-f', 'qcow2', '-b', '../overlay.qcow2', '-F', 'qcow2', 'sub/relative.qcow2');
    writeFileSync(join(folder, 'odd.raw'), random.bytes(777));
    // 640.5 KiB.
    make('create', '-q', '-f', 'raw', 'half.raw', '655872');
    writeFileSync(join(folder, 'empty.raw'), '');
    make('create', '-q', '-f', 'qcow2', 'empty.qcow2', '0');
    const metadata = 'preallocation=metadata';
    make('create', '-q', '-f', 'qcow2', '-o', metadata, 'preallocated.qcow2', '30M');
    make('create', '-q', '-f', 'qcow2', '-o', metadata, 'preallocated-written.qcow2', '30M');
    io(
      'preallocated-written.qcow2',
      'write -P 8 1000k 3M',
      'write -P 8 9M 1k',
      'write -z 12M 1M',
      'discard 20M 2M',
    );
    const small = `${metadata},cluster_size=1k,refcount_bits=1`;
    make('create', '-q', '-f', 'qcow2', '-o', small, 'preallocated-small.qcow2', '9M');
    io('preallocated-small.qcow2', 'write -P 8 100k 1M');
    make('create', '-q', '-f', 'qcow2', '-o', 'preallocation=falloc', 'fallocated.qcow2', '5M');
    make('create', '-q', '-f', 'raw', '-o', 'preallocation=falloc', 'fallocated.raw', '5M');
    make('create', '-q', '-f', 'qcow2', 'snapshots.qcow2', '4M');
    io('snapshots.qcow2', 'write -P 4 0 1M');
    for (const name of ['first', 'one with a name that is longer than its column']) {
      make('snapshot', '-c', name, 'snapshots.qcow2');
      io('snapshots.qcow2', 'write -P 5 512k 1M');
    }
    make('bitmap', '--add', 'snapshots.qcow2', 'b0');
    make('bitmap', '--add', '--disable', '-g', '128k', 'snapshots.qcow2', 'b1');
    make('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', 'snapshots-v2.qcow2', '4M');
    make('snapshot', '-c', 'old', 'snapshots-v2.qcow2');
    expect(stillframe(['create', '-f', 'qcow2', 'written.qcow2', '3000000000'], { cwd: folder }).status).toBe(
      0,
    );
  });

  describe.each(images)('%s', (image) => {
    const allow = ['--allow-backing', folder];

    it('is described alike as JSON', () => {
      const own = stillframe(['info', '--output', 'json', image], { cwd: folder });
      expect(own.stderr).toBe('');
      expect(own.status).toBe(0);
      expect(JSON.parse(own.stdout)).toEqual(JSON.parse(qemuImg(['info', '--output=json', image]).stdout));
    });

    it('is described alike for people', () => {
      expect(stillframe(['info', image], { cwd: folder }).stdout).toBe(qemuImg(['info', image]).stdout);
    });

    it('is mapped alike as JSON', () => {
      const own = stillframe(['map', '--output', 'json', ...allow, image], { cwd: folder });
      expect(own.stderr).toBe('');
      expect(own.stdout).toBe(qemuImg(['map', '--output=json', image]).stdout);
    });

    it('is mapped alike for people', () => {
      const own = stillframe(['map', ...allow, image], { cwd: folder });
      const theirs = qemuImg(['map', image]);
      expect(own.status).toBe(theirs.status);
      expect(own.stdout).toBe(theirs.stdout);
    });

    it('reads alike', () => {
      const own = stillframe(['compare', ...allow, image, `sub/../${image}`], { cwd: folder });
      expect(own.stdout).toBe('Images are identical.\n');
      make('convert', '-O', 'raw', image, 'converted.raw');
      const args = ['compare', '-F', 'raw', ...allow, image, 'converted.raw'];
      const { status, stdout, stderr } = stillframe(args, { cwd: folder });
      expect({ status, stdout, stderr }).toEqual({
        status: 0,
        stdout: 'Images are identical.\n',
        stderr: '',
      });
    });
  });

  describe('info of a chain', () => {
    const chains = ['deep.qcow2', 'chain.qcow2', 'sub/relative.qcow2', 'v2.qcow2', 'base.raw', 'zstd.qcow2'];
    const folders = ['--allow-backing', folder];

    it.each(chains)('describes every image alike: %s', (image) => {
      const args = ['info', '--backing-chain', image];
      expect(stillframe([...args, ...folders], { cwd: folder }).stdout).toBe(qemuImg(args).stdout);
      const ours = stillframe([...args, '--output', 'json', ...folders], { cwd: folder });
      expect(JSON.parse(ours.stdout)).toEqual(JSON.parse(qemuImg([...args, '--output=json']).stdout));
    });

    it('opens no image of it that is not allowed', () => {
      const done = stillframe(['info', '--backing-chain', 'sub/relative.qcow2'], { cwd: folder });
      expect(done.status).toBe(1);
      expect(done.stderr).toContain('ERR_STILLFRAME_BACKING_FORBIDDEN');
    });
  });

  describe('map of a part', () => {
    it.each([
      ['--start-offset=1000', '--max-length=3M'],
      ['--start-offset=100M'],
      ['--start-offset=10M'],
      ['--start-offset=9000000', '--max-length=1G'],
      ['--max-length=0'],
      ['--max-length=1'],
    ])('%s %s', (...options) => {
      for (const output of ['human', 'json']) {
        const args = [
          'map',
          ...options.filter((option) => option !== undefined),
          `--output=${output}`,
          'overlay.qcow2',
        ];
        expect(stillframe(args, { cwd: folder }).stdout).toBe(qemuImg(args).stdout);
      }
    });
  });

  it.each(['human', 'json'])('map of what is not there prints nothing but the error (%s)', (output) => {
    const args = ['map', `--output=${output}`, 'nowhere.qcow2'];
    const [own, theirs] = [stillframe(args, { cwd: folder }), qemuImg(args)];
    expect(own.status).toBe(theirs.status);
    if (output === 'human') expect(own.stdout).toBe(theirs.stdout);
  });

  describe('compare', () => {
    beforeAll(() => {
      const data = random.noise(1 << 20);
      const put = (name: string, bytes: Uint8Array) => writeFileSync(join(folder, name), bytes);
      put('one.raw', data);
      put('same.raw', data);
      put('first-byte.raw', Uint8Array.from(data).fill((data[0] ?? 0) ^ 1, 0, 1));
      put('last-byte.raw', Uint8Array.from(data).fill((data.at(-1) ?? 0) ^ 1, data.length - 1));
      put('longer-zero.raw', Buffer.concat([data, Buffer.alloc(4096)]));
      put('longer-data.raw', Buffer.concat([data, Buffer.alloc(4096), Buffer.from([1])]));
      make('convert', '-O', 'qcow2', 'one.raw', 'one.qcow2');
      make('create', '-q', '-f', 'qcow2', 'nothing.qcow2', '1M');
      make('create', '-q', '-f', 'qcow2', 'zeroes.qcow2', '1M');
      io('zeroes.qcow2', 'write -z 0 1M');
      make('create', '-q', '-f', 'raw', 'hole.raw', '1M');
    });

    const others = [
      'same.raw',
      'first-byte.raw',
      'last-byte.raw',
      'longer-zero.raw',
      'longer-data.raw',
      'one.qcow2',
      'nothing.qcow2',
      'missing.raw',
    ];
    const pairs = [
      ...others.map((name) => ['one.raw', name] as const),
      ['longer-data.raw', 'one.raw'],
      ['first-byte.raw', 'longer-zero.raw'],
      ['nothing.qcow2', 'zeroes.qcow2'],
      ['nothing.qcow2', 'hole.raw'],
      ['zeroes.qcow2', 'hole.raw'],
    ] as const;

    it.each(pairs.flatMap(([a, b]) => [[a, b, ''] as const, [a, b, '-s'] as const]))(
      '%s with %s %s ends alike',
      (a, b, strict) => {
        const args = ['compare', ...(strict === '' ? [] : [strict]), a, b];
        const own = stillframe(args, { cwd: folder });
        const theirs = qemuImg(args);
        expect(own.status).toBe(theirs.status);
        // Ours names the first byte that differs, qemu-img the start of its 512-byte sector.
        const sector = (text: string) =>
          text.replace(
            /mismatch at offset (\d+)/,
            (_, at) => `mismatch at offset ${Number(at) - (Number(at) % 512)}`,
          );
        expect(sector(own.stdout)).toBe(theirs.stdout);
      },
    );

    it.each([[['one.raw']], [['-Z', 'one.raw', 'same.raw']]])(
      'a wrong command line ends alike: %j',
      (words) => {
        const args = ['compare', ...words];
        expect(qemuImg(args).status).toBe(1);
        expect(stillframe(args, { cwd: folder })).toMatchObject({ status: 1, stdout: '' });
      },
    );

    it('reports one object with --output json', () => {
      const args = ['compare', '--output', 'json', 'one.raw', 'last-byte.raw'];
      const { status, stdout } = stillframe(args, { cwd: folder });
      expect(status).toBe(1);
      expect(JSON.parse(stdout)).toEqual({
        type: 'result',
        identical: false,
        sizesDiffer: false,
        reason: 'content',
        offset: (1 << 20) - 1,
      });
    });
  });

  describe('create', () => {
    it.each<[string, string[]]>([
      ['plain', ['-f', 'qcow2', 'IMAGE', '1G']],
      ['of an odd size', ['-f', 'qcow2', 'IMAGE', '1000001']],
      ['version 2', ['-f', 'qcow2', '-o', 'compat=0.10', 'IMAGE', '64M']],
      ['512-byte clusters', ['-f', 'qcow2', '-o', 'cluster_size=512', 'IMAGE', '64M']],
      ['2 MiB clusters', ['-f', 'qcow2', '-o', 'cluster_size=2M', 'IMAGE', '1T']],
      ['64-bit refcounts', ['-f', 'qcow2', '-o', 'refcount_bits=64', 'IMAGE', '64M']],
      ['1-bit refcounts', ['-f', 'qcow2', '-o', 'refcount_bits=1', 'IMAGE', '64M']],
      ['zstd', ['-f', 'qcow2', '-o', 'compression_type=zstd', 'IMAGE', '64M']],
      ['lazy refcounts', ['-f', 'qcow2', '-o', 'lazy_refcounts=on', 'IMAGE', '64M']],
      ['a backing file', ['-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'IMAGE']],
      ['a backing file and a size', ['-f', 'qcow2', '-b', 'overlay.qcow2', '-F', 'qcow2', 'IMAGE', '70M']],
      ['raw', ['-f', 'raw', 'IMAGE', '5M']],
      ['raw of 777 bytes', ['-f', 'raw', 'IMAGE', '777']],
    ])('makes the image qemu-img makes: %s', (_, args) => {
      const named = (name: string) => args.map((word) => (word === 'IMAGE' ? name : word));
      rmSync(join(folder, 'made.img'), { force: true });
      const own = stillframe(['create', '-q', ...named('made.img')], { cwd: folder });
      expect(own).toEqual({ status: 0, stdout: '', stderr: '' });
      const described = qemuImg(['info', '--output=json', 'made.img']).stdout;
      const format = args[1] ?? '';
      if (format === 'qcow2') make('check', '-q', 'made.img');
      rmSync(join(folder, 'made.img'));
      make('create', '-q', ...named('made.img'));
      const theirs: Record<string, unknown> = JSON.parse(
        qemuImg(['info', '--output=json', 'made.img']).stdout,
      );
      expect({ ...JSON.parse(described), 'actual-size': 0 }).toEqual({ ...theirs, 'actual-size': 0 });
    });

    it('refuses to replace a file unasked', () => {
      writeFileSync(join(folder, 'precious.img'), 'precious');
      const args = ['create', '-f', 'qcow2', 'precious.img', '1M'];
      const refused = stillframe(args, { cwd: folder });
      expect(refused.status).toBe(1);
      expect(refused.stderr).toContain('ERR_STILLFRAME_TARGET_EXISTS');
      expect(readFileSync(join(folder, 'precious.img'), 'utf8')).toBe('precious');
      expect(stillframe([...args, '--force'], { cwd: folder }).status).toBe(0);
      make('check', '-q', 'precious.img');
    });

    it.each([
      ['no size', ['-f', 'qcow2', 'x.img']],
      ['a bad size', ['-f', 'qcow2', 'x.img', '12Q']],
      ['a negative size', ['-f', 'qcow2', '--', 'x.img', '-5']],
      ['a bad cluster size', ['-f', 'qcow2', '-o', 'cluster_size=1000', 'x.img', '1M']],
      ['too large clusters', ['-f', 'qcow2', '-o', 'cluster_size=4M', 'x.img', '1M']],
      ['bad refcounts', ['-f', 'qcow2', '-o', 'refcount_bits=3', 'x.img', '1M']],
      ['refcounts of version 2', ['-f', 'qcow2', '-o', 'compat=0.10,refcount_bits=8', 'x.img', '1M']],
      ['an unknown option', ['-f', 'qcow2', '-o', 'colour=red', 'x.img', '1M']],
      ['a format of the backing file left out', ['-f', 'qcow2', '-b', 'base.raw', 'x.img']],
      ['a missing backing file', ['-f', 'qcow2', '-b', 'gone.raw', '-F', 'raw', 'x.img']],
      ['a backing file of a raw image', ['-f', 'raw', '-b', 'base.raw', '-F', 'raw', 'x.img']],
      ['an impossible size', ['-f', 'qcow2', '-o', 'cluster_size=512', 'x.img', '8P']],
      ['a folder that is not there', ['-f', 'qcow2', 'nowhere/x.img', '1M']],
    ])('refuses %s and makes nothing', (_, args) => {
      const { status, stdout, stderr } = stillframe(['create', ...args], { cwd: folder });
      expect(status).toBe(1);
      expect(stdout).toBe('');
      expect(stderr).toMatch(/^stillframe: .+ \[ERR_STILLFRAME_[A-Z_]+\]\n$/);
      expect(stderr).not.toContain('INTERNAL');
      expect(stillframe(['info', 'x.img'], { cwd: folder }).stderr).toContain('ERR_STILLFRAME_NOT_FOUND');
    });
  });
});
