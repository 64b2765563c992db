import { copyFileSync, cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';
import { temporaryFolder } from './qcow2-support.js';

const folder = temporaryFolder();
const peers = hasPeer('qemu-img') && hasPeer('qemu-io');
const engine = await createEngine({ workers: 1 });
afterAll(() => engine.close());

const LENGTH = 3 << 20;

/** Random writes, zeroes and discards by QEMU. */
function scribble(path: string, random: Random, length: number, requests: number): void {
  const commands: string[] = [];
  for (let request = 0; request < requests; request++) {
    const unit = random.pick([512, 4096, 65536]);
    const offset = Math.floor(random.between(0, length - 1) / unit) * unit;
    const size = Math.min(length - offset, unit * random.between(1, 5));
    const how = random.pick([`write -P ${random.between(1, 255)}`, 'write -z', 'write -z -u', 'discard']);
    commands.push('-c', `${how} ${offset} ${size}`);
  }
  run('qemu-io', ['-f', path.endsWith('.raw') ? 'raw' : 'qcow2', ...commands, path]);
}

/** What an image reads as, by QEMU, through its whole chain. */
function contentOf(path: string): Buffer {
  const out = join(folder, 'content');
  run('qemu-img', ['convert', '-f', path.endsWith('.raw') ? 'raw' : 'qcow2', '-O', 'raw', path, out]);
  return readFileSync(out);
}

function backingOf(path: string): unknown {
  const info = JSON.parse(run('qemu-img', ['info', '--output=json', path]));
  return [info['backing-filename'], info['backing-filename-format']];
}

/** A folder with base.raw, other.qcow2 and base.raw <- mid.qcow2 <- top.qcow2, and a copy of it for QEMU. */
function chain(
  name: string,
  seed: number,
  options: string,
  lengths = { base: LENGTH, other: LENGTH, mid: LENGTH },
) {
  const random = new Random(seed);
  const ours = join(folder, name);
  mkdirSync(ours);
  const at = (file: string): string => join(ours, file);
  writeFileSync(at('base.raw'), random.noise(lengths.base));
  run('qemu-img', ['create', '-q', '-f', 'qcow2', at('other.qcow2'), String(lengths.other)]);
  const over = (file: string, backing: string, format: string, length: number, more: string): void => {
    const sized = ['-F', format, '-b', backing, at(file), String(length)];
    run('qemu-img', ['create', '-q', '-f', 'qcow2', ...(more === '' ? [] : ['-o', more]), ...sized]);
  };
  over('mid.qcow2', 'base.raw', 'raw', lengths.mid, '');
  over('top.qcow2', 'mid.qcow2', 'qcow2', LENGTH, options);
  scribble(at('other.qcow2'), random, lengths.other, 30);
  scribble(at('mid.qcow2'), random, lengths.mid, 15);
  scribble(at('top.qcow2'), random, LENGTH, 15);
  const theirs = join(folder, `${name}-qemu`);
  cpSync(ours, theirs, { recursive: true });
  return { at, theirs: (file: string): string => join(theirs, file) };
}

describe.skipIf(!peers)('rebase', () => {
  it.each([
    ['onto another image', 'other.qcow2', 'qcow2', '', undefined],
    ['onto the base of the chain', 'base.raw', 'raw', '', undefined],
    ['onto nothing', undefined, undefined, '', undefined],
    ['with subclusters', 'other.qcow2', 'qcow2', 'extended_l2=on', undefined],
    ['with small clusters', 'base.raw', 'raw', 'cluster_size=512', undefined],
    ['version 2', 'other.qcow2', 'qcow2', 'compat=0.10', undefined],
    [
      'images of different sizes',
      'other.qcow2',
      'qcow2',
      '',
      { base: LENGTH - (1 << 20), other: LENGTH + (1 << 20), mid: LENGTH - (1 << 19) },
    ],
    ['a shorter new one', 'base.raw', 'raw', '', { base: 1 << 20, other: LENGTH, mid: LENGTH }],
  ] as const)('%s: the image reads as before', async (name, backing, format, options, lengths) => {
    const { at } = chain(`rebase ${name}`, name.length, options, lengths);
    const before = contentOf(at('top.qcow2'));
    await engine.rebaseImage(at('top.qcow2'), { backing, backingFormat: format, unsafe: false });
    expect(backingOf(at('top.qcow2'))).toEqual([backing, format]);
    run('qemu-img', ['check', '-q', at('top.qcow2')]);
    expect(firstDifference(contentOf(at('top.qcow2')), before)).toBe(-1);
  });

  it.each(['compat=0.10', 'compat=0.10,cluster_size=512', 'compat=1.1', 'extended_l2=on'])(
    'an image that was on nothing reads as before: %s',
    async (options) => {
      const { at } = chain(`rebase from nothing ${options}`, 9, '');
      const path = at('alone.qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, String(LENGTH)]);
      run('qemu-io', ['-c', 'write -q -P 7 300k 10k', path]);
      const before = contentOf(path);
      await engine.rebaseImage(path, { backing: 'base.raw', backingFormat: 'raw', unsafe: false });
      run('qemu-img', ['check', '-q', path]);
      expect(firstDifference(contentOf(path), before)).toBe(-1);
    },
  );

  it.each(['cluster_size=2M', 'cluster_size=2M,extended_l2=on'])(
    'looks at large clusters to their ends: %s',
    async (options) => {
      const { at } = chain(`rebase ${options}`, 10, '');
      copyFileSync(at('base.raw'), at('like.raw'));
      run('qemu-io', ['-f', 'raw', '-c', 'write -q -P 9 1500k 64k', at('like.raw')]);
      const path = at('empty.qcow2');
      run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, '-b', 'base.raw', '-F', 'raw', path]);
      const before = contentOf(path);
      await engine.rebaseImage(path, { backing: 'like.raw', backingFormat: 'raw', unsafe: false });
      expect(firstDifference(contentOf(path), before)).toBe(-1);
    },
  );

  it('leaves the names of features out where there is no room for them and a backing file', async () => {
    const { at } = chain('rebase names', 12, '');
    const path = at('alone.qcow2');
    await engine.createImage(path, { format: 'qcow2', clusterSize: 512, length: LENGTH });
    await engine.rebaseImage(path, { backing: 'base.raw', backingFormat: 'raw', unsafe: false });
    expect(backingOf(path)).toEqual(['base.raw', 'raw']);
    run('qemu-img', ['check', '-q', path]);
    expect(contentOf(path).every((byte) => byte === 0)).toBe(true);
  });

  it('copies what the same backing file shows in another format', async () => {
    const { at } = chain('rebase format', 11, '');
    const path = at('mid over.qcow2');
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'mid.qcow2', '-F', 'qcow2', path]);
    const before = contentOf(path);
    await engine.rebaseImage(path, { backing: 'mid.qcow2', backingFormat: 'raw', unsafe: false });
    expect(backingOf(path)).toEqual(['mid.qcow2', 'raw']);
    expect(firstDifference(contentOf(path), before)).toBe(-1);
  });

  it('writes nothing that the new backing file has already', async () => {
    const { at } = chain('rebase sparse', 4, '');
    copyFileSync(at('base.raw'), at('same.raw'));
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', at('empty.qcow2')]);
    await engine.rebaseImage(at('empty.qcow2'), { backing: 'same.raw', backingFormat: 'raw', unsafe: false });
    const map = JSON.parse(run('qemu-img', ['map', '--output=json', at('empty.qcow2')]));
    expect(map.every(({ depth }: { depth: number }) => depth === 1)).toBe(true);
  });

  it('unsafe: changes the header and nothing else, and keeps what it does not know', async () => {
    const { at, theirs } = chain('rebase unsafe', 5, '');
    const path = at('top.qcow2');
    const bytes = readFileSync(path);
    // An extension that nobody knows, in front of the others.
    const length = bytes.readUInt32BE(100);
    const area = Buffer.from(bytes.subarray(length, 1000));
    bytes.writeUInt32BE(0x12345678, length);
    bytes.writeUInt32BE(5, length + 4);
    bytes.write('hello\0\0\0', length + 8, 'latin1');
    area.copy(bytes, length + 16);
    bytes.writeBigUInt64BE(bytes.readBigUInt64BE(8) + 16n, 8);
    writeFileSync(path, bytes);
    await engine.rebaseImage(path, { backing: 'not/there.raw', backingFormat: 'raw', unsafe: true });
    expect(backingOf(path)).toEqual(['not/there.raw', 'raw']);
    const after = readFileSync(path);
    expect(after.subarray(65536).equals(bytes.subarray(65536))).toBe(true);
    expect(after.includes('hello')).toBe(true);
    await engine.rebaseImage(path, { backing: undefined, backingFormat: undefined, unsafe: true });
    run('qemu-img', ['rebase', '-u', '-b', '', theirs('top.qcow2')]);
    expect(backingOf(path)).toEqual(backingOf(theirs('top.qcow2')));
    expect(firstDifference(contentOf(path), contentOf(theirs('top.qcow2')))).toBe(-1);
  });

  it.each([false, true])('refuses a backing file below a raw data file, unsafe: %s', async (unsafe) => {
    const path = join(folder, `raw data file ${unsafe}`);
    const options = `data_file=${path}.data,data_file_raw=on`;
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, path, '64k']);
    run('qemu-img', ['create', '-q', '-f', 'raw', `${path}.raw`, '64k']);
    const backing = `${path}.raw`;
    const args = ['rebase', ...(unsafe ? ['-u'] : []), '-b', backing, '-F', 'raw', path];
    run('qemu-img', args, [1]);
    await expect(engine.rebaseImage(path, { backing, backingFormat: 'raw', unsafe })).rejects.toThrow(
      expect.objectContaining({ code: 'ERR_STILLFRAME_UNSUPPORTED_FEATURE' }),
    );
    expect(backingOf(path)).toEqual([undefined, undefined]);
  });

  it('refuses what would not be a chain, with the image as it was', async () => {
    const { at } = chain('rebase refused', 6, '');
    const before = readFileSync(at('mid.qcow2'));
    const code = (name: string) => expect.objectContaining({ code: `ERR_STILLFRAME_${name}` });
    const to = (backing: string, backingFormat?: 'raw' | 'qcow2') =>
      engine.rebaseImage(at('mid.qcow2'), { backing, backingFormat, unsafe: false });
    await expect(to('mid.qcow2', 'qcow2')).rejects.toThrow(code('BACKING_CYCLE'));
    await expect(to('top.qcow2', 'qcow2')).rejects.toThrow(code('BACKING_CYCLE'));
    await expect(to('missing.raw', 'raw')).rejects.toThrow(code('NOT_FOUND'));
    await expect(to('base.raw')).rejects.toThrow(/backing format must be specified/);
    await expect(
      engine.rebaseImage(at('mid.qcow2'), {
        backing: `${'x'.repeat(1100)}`,
        backingFormat: 'raw',
        unsafe: true,
      }),
    ).rejects.toThrow(code('INVALID_ARGUMENT'));
    await expect(
      engine.rebaseImage(at('base.raw'), {
        format: 'raw',
        backing: undefined,
        backingFormat: undefined,
        unsafe: true,
      }),
    ).rejects.toThrow(code('UNSUPPORTED_FEATURE'));
    expect(readFileSync(at('mid.qcow2')).equals(before)).toBe(true);
  });
});

describe.skipIf(!peers)('commit', () => {
  it.each([
    ['into the backing file', {}, '', undefined],
    ['and keeps the image', { keep: true }, '', undefined],
    ['into the base', { base: 'base.raw' }, '', undefined],
    ['with subclusters', {}, 'extended_l2=on', undefined],
    ['with small clusters', {}, 'cluster_size=512', undefined],
    ['version 2', {}, 'compat=0.10', undefined],
    [
      'a shorter image in between',
      { base: 'base.raw' },
      '',
      { base: LENGTH, other: 512, mid: LENGTH - (1 << 19) },
    ],
    ['into a shorter base', { base: 'base.raw' }, '', { base: 1 << 20, other: 512, mid: LENGTH }],
    ['into a shorter qcow2 image', {}, '', { base: 1 << 19, other: 512, mid: 1 << 20 }],
    ['into one over a longer one', {}, '', { base: LENGTH, other: 512, mid: 1 << 20 }],
  ] as const)('%s: the images are those that QEMU leaves', async (name, options, more, lengths) => {
    const { at, theirs } = chain(`commit ${name}`, name.length + 100, more, lengths);
    const whole = contentOf(at('top.qcow2'));
    const base = 'base' in options ? options.base : undefined;
    await engine.commitImage(at('top.qcow2'), {
      keep: 'keep' in options,
      ...(base === undefined ? {} : { base: at(base) }),
    });
    const args = [...('keep' in options ? ['-d'] : []), ...(base === undefined ? [] : ['-b', base])];
    // QEMU finds the base by the name that the header has.
    run('qemu-img', ['commit', '-q', ...args, theirs('top.qcow2')]);
    expect(firstDifference(contentOf(at('top.qcow2')), whole)).toBe(-1);
    const into = base ?? 'mid.qcow2';
    expect(firstDifference(contentOf(at(into)), whole)).toBe(-1);
    for (const file of ['base.raw', 'mid.qcow2', 'top.qcow2']) {
      expect(firstDifference(contentOf(at(file)), contentOf(theirs(file)))).toBe(-1);
      if (file !== 'base.raw') run('qemu-img', ['check', '-q', at(file)]);
    }
    const map = JSON.parse(run('qemu-img', ['map', '--output=json', at('top.qcow2')]));
    const emptied = map.every(({ depth }: { depth: number }) => depth > 0);
    expect(emptied).toBe(!('keep' in options) && base === undefined);
  });

  it('an image with a snapshot keeps what the snapshot has', async () => {
    const { at } = chain('commit snapshot', 7, '');
    const before = contentOf(at('top.qcow2'));
    run('qemu-img', ['snapshot', '-c', 'kept', at('top.qcow2')]);
    await engine.commitImage(at('top.qcow2'), { keep: false });
    run('qemu-img', ['check', '-q', at('top.qcow2')]);
    run('qemu-img', ['snapshot', '-a', 'kept', at('top.qcow2')]);
    expect(firstDifference(contentOf(at('top.qcow2')), before)).toBe(-1);
  });

  it('refuses what has no base, with the images as they were', async () => {
    const { at } = chain('commit refused', 8, '');
    const before = readFileSync(at('top.qcow2'));
    await expect(engine.commitImage(at('base.raw'), { format: 'raw', keep: false })).rejects.toThrow(
      'Image does not have a backing file',
    );
    await expect(
      engine.commitImage(at('top.qcow2'), { keep: false, base: at('other.qcow2') }),
    ).rejects.toThrow('Did not find');
    await expect(
      engine.commitImage(at('top.qcow2'), { keep: false, allowBacking: [join(folder, 'elsewhere')] }),
    ).rejects.toThrow(expect.objectContaining({ code: 'ERR_STILLFRAME_BACKING_FORBIDDEN' }));
    expect(readFileSync(at('top.qcow2')).equals(before)).toBe(true);
  });
});
