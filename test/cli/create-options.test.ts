import { spawnSync } from 'node:child_process';
import { linkSync, mkdtempSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, it } from 'vitest';
import { parseSize } from '#src/cli/command.js';
import { asksForHelp, parseImageOptions } from '#src/cli/image-options.js';
import { stillframe } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-create-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const at = (name: string): string => join(folder, name);

/** What is to be seen of an image: everything qemu-img says but the space it takes. */
function described(format: string, withData: boolean): unknown {
  const info: Record<string, unknown> = JSON.parse(
    run('qemu-img', ['info', '-f', format, '--output=json', at('x.img')]),
  );
  if (format === 'qcow2') run('qemu-img', ['check', '-q', at('x.img')]);
  const map: unknown = JSON.parse(run('qemu-img', ['map', '-f', format, '--output=json', at('x.img')]));
  return { ...info, 'actual-size': 0, map: withData ? map : undefined };
}

describe.skipIf(!hasPeer('qemu-img'))('create -o', () => {
  beforeEach(() => {
    for (const name of ['x.img', 'data.raw']) rmSync(at(name), { force: true });
    writeFileSync(at('base.raw'), 'x');
    truncateSync(at('base.raw'), 3 << 20);
  });

  const data = `data_file=${at('data.raw')}`;
  const base = `backing_file=${at('base.raw')},backing_fmt=raw`;

  it.each([
    ['qcow2', 'compat=0.10', '5000000'],
    ['qcow2', 'compat=v2,lazy_refcounts=off', '5M'],
    ['qcow2', 'compat=v3,cluster_size=4k,refcount_bits=1', '5M'],
    ['qcow2', 'lazy_refcounts', '5M'],
    ['qcow2', 'lazy_refcounts=yes,compression_type=zstd', '5M'],
    ['qcow2', 'cluster_size=4k,cluster_size=8k', '5M'],
    ['qcow2', 'extended_l2=on', '5M'],
    ['qcow2', 'extended_l2=on,cluster_size=16k,refcount_bits=64', '3000000000'],
    ['qcow2', `${base},compat=1.1`, ''],
    ['qcow2', `${base},size=9M`, ''],
    ['qcow2', 'size=0', ''],
    ['qcow2', 'preallocation=off', '5M'],
    ['qcow2', 'preallocation=falloc', '5M'],
    ['qcow2', 'preallocation=full', '5000000'],
    ['qcow2', 'preallocation=full,cluster_size=512,refcount_bits=8', '3M'],
    ['qcow2', 'preallocation=falloc,cluster_size=2M,compat=0.10', '9M'],
    ['qcow2', 'preallocation=full,extended_l2=on', '5M'],
    ['qcow2', `preallocation=metadata,extended_l2=on,${base}`, ''],
    ['qcow2', 'preallocation=metadata', '0'],
    ['qcow2', data, '5M'],
    ['qcow2', `${data},extended_l2=on`, '5000000'],
    ['qcow2', `${data},data_file_raw=on`, '5M'],
    ['qcow2', `${data},data_file_raw,extended_l2=on,preallocation=off`, '5M'],
    ['qcow2', `${data},data_file_raw=off,preallocation=metadata`, '5M'],
    ['qcow2', `${data},preallocation=falloc,cluster_size=4k`, '5M'],
    ['qcow2', `${data},data_file_raw=on,preallocation=full,compression_type=zstd`, '5M'],
    ['raw', 'preallocation=off', '5M'],
    ['raw', 'preallocation=falloc', '5000000'],
    ['raw', 'preallocation=full,size=777', ''],
  ])('%s with %s, %s: prints and makes what qemu-img does', (format, options, size) => {
    const args = ['create', '-f', format, '-o', options, 'x.img', ...(size === '' ? [] : [size])];
    const own = stillframe(args, { cwd: folder });
    expect(own).toMatchObject({ status: 0, stderr: '' });
    // qemu-img spreads the tables of small clusters over the file, and writes a first block of zeroes to a raw one.
    const alike = !options.includes('=512,') && (format === 'qcow2' || options.includes('=full'));
    const ours = described(format, alike);
    const lengths = ['x.img', 'data.raw'].map((name) => statSync(at(name), { throwIfNoEntry: false })?.size);
    if (options.includes('=full') || options.includes('=falloc')) {
      const place = options.includes('data_file') ? 'data.raw' : 'x.img';
      const { blocks, size: bytes } = statSync(at(place));
      expect(blocks * 512).toBeGreaterThanOrEqual(bytes * 0.8);
    }
    for (const name of ['x.img', 'data.raw']) rmSync(at(name), { force: true });
    const theirs = run('sh', ['-c', `cd ${folder} && qemu-img ${args.join(' ')}`]);
    expect(own.stdout).toBe(theirs);
    expect(ours).toEqual(described(format, alike));
    if (options.includes('data_file')) {
      const virtual: { 'virtual-size': number } = JSON.parse(
        run('qemu-img', ['info', '--output=json', at('x.img')]),
      );
      expect(lengths[1]).toBe(virtual['virtual-size']);
    }
  });

  it.each([
    ['', '5000000'],
    ['cluster_size=512,refcount_bits=1,', '5M'],
    ['cluster_size=2M,', '5M'],
    ['extended_l2=on,refcount_bits=64,', '70M'],
  ])(
    'preallocation=metadata with %s, %s: every cluster has its place, in the same order',
    (options, size) => {
      const args = ['-f', 'qcow2', '-o', `${options}preallocation=metadata`, 'x.img', size];
      expect(stillframe(['create', '-q', ...args], { cwd: folder }).status).toBe(0);
      const ours = described('qcow2', false);
      const places = () =>
        run('qemu-io', ['-f', 'qcow2', '-r', '-c', 'map', at('x.img')]).replaceAll(/ +\n/g, '\n');
      const own = places();
      const { size: length, blocks } = statSync(at('x.img'));
      run('sh', ['-c', `cd ${folder} && qemu-img create -q ${args.join(' ')}`]);
      expect(ours).toEqual(described('qcow2', false));
      expect(own).toBe(places());
      expect(length).toBeLessThanOrEqual(statSync(at('x.img')).size);
      expect(blocks).toBeLessThanOrEqual(statSync(at('x.img')).blocks);
    },
  );

  it('writes into preallocated images and data files of ours are clean and read back', () => {
    for (const options of [
      'preallocation=metadata',
      'preallocation=falloc,extended_l2=on',
      `${data},data_file_raw=on`,
      `${data},extended_l2=on`,
    ]) {
      const args = ['create', '-q', '--force', '-f', 'qcow2', '-o', options, 'x.img', '5M'];
      expect(stillframe(args, { cwd: folder })).toMatchObject({ status: 0, stderr: '' });
      run('qemu-io', ['-c', 'write -P 7 100k 1M', '-c', 'write -z 300k 100k', at('x.img')]);
      run('qemu-img', ['check', '-q', at('x.img')]);
      run('qemu-io', ['-c', 'read -P 7 100k 200k', '-c', 'read -P 0 300k 100k', at('x.img')]);
      const model = Buffer.alloc(5 << 20);
      model.fill(7, 100 << 10, 1124 << 10).fill(0, 300 << 10, 400 << 10);
      writeFileSync(at('model.raw'), model);
      expect(stillframe(['compare', 'x.img', 'model.raw'], { cwd: folder })).toMatchObject({ status: 0 });
      if (options.includes('_raw')) expect(readFileSync(at('data.raw')).equals(model)).toBe(true);
    }
  });

  it('takes several -o and doubled commas', () => {
    writeFileSync(at('a,b.raw'), Buffer.alloc(1 << 20));
    const options = ['-o', 'backing_file=a,,b.raw', '-o', 'backing_fmt=raw,cluster_size=4k'];
    const { status, stdout } = stillframe(['create', '-f', 'qcow2', ...options, 'x.img'], { cwd: folder });
    expect(status).toBe(0);
    expect(stdout).toContain('cluster_size=4096 extended_l2=off compression_type=zlib size=1048576');
    expect(stdout).toContain('backing_file=a,,b.raw backing_fmt=raw');
    const info: unknown = JSON.parse(run('qemu-img', ['info', '--output=json', at('x.img')]));
    expect(info).toMatchObject({ 'backing-filename': 'a,b.raw', 'cluster-size': 4096 });
  });

  it.each(['raw', 'qcow2'])('lists the options of %s that qemu-img lists, but for encryption', (format) => {
    const names = (text: string) => text.match(/^ {2}[a-z_.-]+=<[^>]+>(?= +- )/gm);
    const ours = stillframe(['create', '-f', format, '-o', 'help']).stdout;
    const theirs = run('qemu-img', ['create', '-f', format, '-o', 'help', 'x.img']);
    const skipped = /encrypt|extent_size_hint|nocow/;
    expect(names(ours)).toEqual(names(theirs)?.filter((name) => !skipped.test(name)));
  });
});

describe.skipIf(!hasPeer('qemu-img'))('words, beside qemu-img', () => {
  const measure = (args: readonly string[]) =>
    spawnSync('qemu-img', ['measure', '-O', 'qcow2', ...args], { encoding: 'utf8' });

  it.each(['', ',', ',,', 'cluster_size=4k,', ',cluster_size=4k', 'cluster_size=4k,,,', 'help,'])(
    "'%s' is no list of options",
    (list) => {
      const message = `Invalid option list: ${list}`;
      expect(measure(['-o', list, '--size', '1M']).stderr).toContain(`${message}\n`);
      for (const parse of [() => parseImageOptions('qcow2', [list]), () => asksForHelp([list])]) {
        expect(parse).toThrow(message);
      }
    },
  );

  it.each([
    '7',
    '1b',
    '1k',
    '1.5K',
    '3M',
    '2g',
    '1T',
    '0.001P',
    '0.000001E',
    '0.0000001e',
    '0x1e',
    '0x1B',
    '010',
  ])('%s is a size', (text) => {
    // The size is rounded up to whole sectors in there.
    const planned = (size: string): unknown => {
      const { status, stdout } = measure(['-o', 'cluster_size=2M', '--size', size, '--output', 'json']);
      return status === 0 ? JSON.parse(stdout) : undefined;
    };
    expect(planned(text)).toBeDefined();
    expect(planned(String(parseSize(text, 'size')))).toEqual(planned(text));
  });

  it.each(['', '0x', '1Q', '1kb', '1KiB', '8P', '1E', '-1', 'k'])('%s is none', (text) => {
    expect(() => parseSize(text, 'size')).toThrow(`size: '${text}' is not a size`);
  });
});

describe('create -o refuses', () => {
  it.each([
    ['encryption=on', 'encryption is not supported'],
    ['encrypt.format=luks', 'encryption is not supported'],
    ['colour=red', "Invalid parameter 'colour'"],
    ['cluster_size', 'needs a value'],
    ['cluster_size=3k', 'power of two from 512 bytes to 2 MiB'],
    ['compat=2', 'takes 0.10, v2, 1.1, v3'],
    ['compression_type=lz4', 'takes zlib, zstd'],
    ['preallocation=some', 'takes off, metadata, falloc, full'],
    ['lazy_refcounts=1', 'takes on or off'],
    ['refcount_bits=8k', 'takes a number'],
    ['refcount_bits=128', 'power of two from 1 to 64'],
    ['extended_l2=on,cluster_size=8k', 'at least 16 KiB'],
    ['compat=v2,extended_l2=on', 'version 2 knows no subclusters'],
    ['compat=v2,data_file=d.raw', 'version 2 knows no external data files'],
    ['compat=v2,compression_type=zstd', 'version 2 knows no zstd'],
    ['data_file_raw=on', 'needs a data_file'],
    ['data_file=json:{}', 'is a protocol'],
    ['data_file=precious.img', 'the data file'],
    ['data_file=x.img', 'is the image itself'],
    ['data_file=d.raw,data_file_raw=on,backing_file=precious.img,backing_fmt=raw', 'exclude each other'],
    ['preallocation=full,backing_file=precious.img,backing_fmt=raw', 'exclude each other'],
    ['size=2M', 'only once'],
    ['backing_fmt=raw', 'without backing file'],
  ])('%s', (options, message) => {
    writeFileSync(at('precious.img'), 'precious');
    const args = ['create', '-f', 'qcow2', '-o', options, 'x.img', '1M'];
    const { status, stdout, stderr } = stillframe(args, { cwd: folder });
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' });
    expect(stderr).toMatch(/^stillframe: .+ \[ERR_STILLFRAME_[A-Z_]+\]\n$/);
    expect(stderr).toContain(message);
    for (const name of ['x.img', 'd.raw'])
      expect(statSync(at(name), { throwIfNoEntry: false })).toBe(undefined);
    expect(readFileSync(at('precious.img'), 'utf8')).toBe('precious');
  });

  it('wrong options before anything is replaced', () => {
    writeFileSync(at('precious.img'), 'precious');
    const args = ['create', '--force', '-f', 'qcow2', '-o', 'cluster_size=3k', 'precious.img', '1M'];
    expect(stillframe(args, { cwd: folder }).status).toBe(1);
    const raw = ['create', '--force', '-f', 'raw', '-o', 'preallocation=metadata', 'precious.img', '1M'];
    expect(stillframe(raw, { cwd: folder }).status).toBe(1);
    expect(readFileSync(at('precious.img'), 'utf8')).toBe('precious');
  });

  it.each([[['-b', 'link.img', '-F', 'raw']], [['-o', 'data_file=./precious.img']]])(
    'to replace, with %j, a file that the image needs',
    (options) => {
      writeFileSync(at('precious.img'), 'precious');
      rmSync(at('link.img'), { force: true });
      linkSync(at('precious.img'), at('link.img'));
      const args = ['create', '--force', '-f', 'qcow2', ...options, 'precious.img', '1M'];
      expect(stillframe(args, { cwd: folder }).stderr).toContain('[ERR_STILLFRAME_SAME_NODE]');
      expect(readFileSync(at('precious.img'), 'utf8')).toBe('precious');
    },
  );

  it('a backing file that is not there, unless told not to look', () => {
    const args = ['create', '-f', 'qcow2', '-b', 'gone.img', '-F', 'raw', 'x.img', '1M'];
    expect(stillframe(args, { cwd: folder }).stderr).toContain('ERR_STILLFRAME_NOT_FOUND');
    expect(stillframe([...args, '-u'], { cwd: folder }).status).toBe(0);
    rmSync(at('x.img'));
  });
});
