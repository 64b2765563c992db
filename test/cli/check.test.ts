import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createEngine } from '#src/index.js';
import { stillframe } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';
import { Qcow2Bytes } from '../support/qcow2-bytes.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-check-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const path = (name: string): string => join(folder, name);

interface Printed {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

function qemuImg(...args: string[]): Printed {
  const { status, stdout, stderr } = spawnSync('qemu-img', ['check', ...args], {
    cwd: folder,
    encoding: 'utf8',
  });
  return { status, stdout, stderr: stderr.replace(/^qemu-img: /gm, 'stillframe: ') };
}

function own(...args: string[]): Printed {
  return stillframe(['check', ...args], { cwd: folder });
}

function damage(name: string, from: string, change: (image: Qcow2Bytes) => unknown): void {
  const image = Qcow2Bytes.read(path(from));
  change(image);
  image.save(path(name));
}

function setRefcount(image: Qcow2Bytes, cluster: number, value: number): void {
  image.bytes.writeUInt16BE(value, image.refcountBlock() + cluster * 2);
}

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('stillframe check', () => {
  beforeAll(() => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', path('sound.qcow2'), '30M']);
    const writes = ['-c', 'write 0 1M', '-c', 'write 20M 300k', '-c', 'write 10M 1M'];
    run('qemu-io', [...writes, '-c', 'write -c 25M 64k', path('sound.qcow2')]);
    run('qemu-img', ['create', '-q', '-f', 'qcow2', path('empty.qcow2'), '0']);
    damage('leaks.qcow2', 'sound.qcow2', (image) => image.put64(image.l2() + 8, 1));
    damage('corrupt.qcow2', 'sound.qcow2', (image) => image.put64(image.l2() + 80, 0x80000000000a0200n));
    damage('both.qcow2', 'sound.qcow2', (image) => {
      setRefcount(image, 10, 0);
      setRefcount(image, 11, 7);
    });
    damage('internal.qcow2', 'sound.qcow2', (image) =>
      image.put64(image.refcountTable, image.refcountBlock() + 512),
    );
    writeFileSync(path('raw.raw'), 'raw');
  });

  const images = [
    'sound.qcow2',
    'empty.qcow2',
    'leaks.qcow2',
    'corrupt.qcow2',
    'both.qcow2',
    'internal.qcow2',
  ];

  it.each(images)('says of %s what qemu-img says', (image) => {
    expect(own(image)).toEqual(qemuImg(image));
    expect(own('--output', 'json', image)).toEqual(qemuImg('--output=json', image));
  });

  it.each(['leaks.qcow2', 'corrupt.qcow2', 'both.qcow2'])('repairs %s as qemu-img does', (image) => {
    const both = (args: string[]): void => {
      copyFileSync(path(image), path('repaired.qcow2'));
      const theirs = qemuImg(...args, 'repaired.qcow2');
      copyFileSync(path(image), path('repaired.qcow2'));
      expect(own(...args, 'repaired.qcow2')).toEqual(theirs);
    };
    both(['-r', 'all']);
    both(['-f', 'qcow2', '-q', '-r', 'all']);
    both(['-r', 'all', '--output=json']);
  });

  it('tells by its exit status how bad it is', () => {
    expect(images.map((image) => own('-q', image).status)).toEqual([0, 0, 3, 2, 2, 1]);
    copyFileSync(path('both.qcow2'), path('repaired.qcow2'));
    expect(own('--repair', 'leaks', 'repaired.qcow2')).toMatchObject({
      status: 1,
      stdout: '',
      stderr: expect.stringContaining('ERROR need to rebuild refcount structures'),
    });
  });

  it('with --quiet prints what is wrong alone', () => {
    expect(own('-q', 'both.qcow2')).toEqual(qemuImg('-q', 'both.qcow2'));
    expect(own('-q', 'sound.qcow2')).toEqual({ status: 0, stdout: '', stderr: '' });
  });

  it('ends with 63 for a format without metadata, with 1 where it cannot begin', () => {
    expect(own('raw.raw')).toMatchObject({ status: 63, stdout: '' });
    expect(own('raw.raw').stderr).toContain('This image format does not support checks');
    expect(own('-f', 'raw', 'sound.qcow2').status).toBe(63);
    expect(own('-f', 'qcow2', 'raw.raw').status).toBe(1);
    expect(own('missing.qcow2').status).toBe(1);
    expect(own('-r', 'some', 'sound.qcow2').status).toBe(1);
    expect(own('sound.qcow2', 'empty.qcow2').status).toBe(1);
    damage('encrypted.qcow2', 'sound.qcow2', (image) => image.put32(32, 2));
    expect(own('encrypted.qcow2')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('LUKS encryption'),
    });
  });

  it('does not repair what others may be writing', () => {
    expect(own('-U', '-r', 'all', 'sound.qcow2')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('force-share'),
    });
  });

  it('looks at an image in use with --force-share only, and repairs none', async () => {
    await using engine = await createEngine({ workers: 1 });
    const disk = await engine.openDisk(path('sound.qcow2'), { format: 'qcow2' });
    expect(own('sound.qcow2')).toMatchObject({ status: 1, stderr: expect.stringContaining('LOCKED') });
    expect(own('-r', 'all', 'sound.qcow2')).toMatchObject({ status: 1 });
    expect(own('-U', 'sound.qcow2').status).toBe(0);
    await disk.close();
  });
});

describe('Engine.checkImage', () => {
  it('ends with its engine', async () => {
    const engine = await createEngine({ workers: 1 });
    await engine.createImage(path('new.qcow2'), { format: 'qcow2', length: 1 << 20 });
    expect(await engine.checkImage(path('new.qcow2'))).toMatchObject({
      'check-errors': 0,
      'total-clusters': 16,
    });
    await engine.close();
    await expect(engine.checkImage(path('new.qcow2'))).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_CLOSED',
    });
  });
});
