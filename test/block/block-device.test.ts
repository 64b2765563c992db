/** Raw disks on block devices: loop devices, where this machine lets us make them. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { lastObject, stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-device-'));
const at = (name: string): string => join(folder, name);
const devices: string[] = [];
const LENGTH = (5 << 20) + 512;

/** A loop device over a new file with this content, undefined where that is not allowed. */
function loopDevice(name: string, content: Uint8Array): string | undefined {
  writeFileSync(at(name), content);
  const { status, stdout } = spawnSync('losetup', ['-f', '--show', at(name)], { encoding: 'utf8' });
  if (status !== 0) return undefined;
  devices.push(stdout.trim());
  return stdout.trim();
}

const probe = loopDevice('probe', new Uint8Array(4096));
if (probe === undefined)
  console.warn('SKIPPED: block devices; losetup (apt-get install mount) and root are needed');

describe.skipIf(probe === undefined)('a block device', () => {
  const content = new Random(11).bytes(LENGTH).fill(0, 1 << 20, 2 << 20);
  let engine: Engine;
  let source: string;
  let target: string;
  beforeAll(async () => {
    engine = await createEngine();
  });
  afterAll(async () => {
    await engine.close();
    for (const device of devices) run('losetup', ['-d', device]);
    rmSync(folder, { recursive: true });
  });
  beforeEach(() => {
    const pair = [loopDevice('source', content), loopDevice('target', new Uint8Array(LENGTH).fill(0xee))];
    [source = '', target = ''] = pair.map((device) => device ?? '');
  });

  const backing = (name: string): Buffer => {
    run('sync', []);
    return readFileSync(at(name));
  };

  it('is described and mapped as qemu-img does', () => {
    const info = JSON.parse(stillframe(['info', '--output', 'json', source]).stdout);
    expect(info).toMatchObject({ 'virtual-size': LENGTH, format: 'raw' });
    const slow = stillframe(['info', '--output', 'json', source], { env: { STILLFRAME_NO_FFI: '1' } });
    expect(JSON.parse(slow.stdout)).toEqual(info);
    if (!hasPeer('qemu-img')) return;
    expect(info).toEqual(JSON.parse(run('qemu-img', ['info', '--output=json', source])));
    const map = stillframe(['map', '--output', 'json', source]).stdout;
    expect(map).toBe(run('qemu-img', ['map', '--output=json', source]));
  });

  it('is backed up live, to an image and to another device', async () => {
    const disk = await engine.openDisk(source, { format: 'raw' });
    expect(disk.length).toBe(LENGTH);
    const jobs = [
      await disk.backup({
        target: at('copy.qcow2'),
        format: 'qcow2',
        sync: 'full',
        force: true,
        speed: 8 << 20,
      }),
      await disk.backup({ target, format: 'raw', sync: 'full', existing: true, speed: 8 << 20 }),
    ];
    await disk.write(100, new Uint8Array(5000).fill(1));
    await disk.writeZeroes(3 << 20, 100_000);
    await disk.discard(4 << 20, 65536);
    await disk.write(LENGTH - 512, new Uint8Array(512).fill(9));
    for (const job of jobs) await job.result();
    await disk.close();
    expect(firstDifference(backing('target'), content)).toBe(-1);
    const copy = await engine.openDisk(at('copy.qcow2'), { readOnly: true });
    expect(firstDifference(await copy.read(0, LENGTH), content)).toBe(-1);
    await copy.close();
    const now = backing('source');
    expect(now.subarray(100, 5100).every((byte) => byte === 1)).toBe(true);
    expect(now.subarray(3 << 20, (3 << 20) + 100_000).every((byte) => byte === 0)).toBe(true);
    expect(now.subarray(LENGTH - 512).every((byte) => byte === 9)).toBe(true);
  });

  it('is the target of the command line, as it is there', () => {
    const args = ['backup', source, target, '--sync', 'full', '--format', 'raw', '--output', 'json'];
    for (const flags of [[], ['--force']]) {
      const refused = stillframe([...args, ...flags]);
      expect(lastObject(refused.stdout)).toMatchObject({
        type: 'error',
        code: 'ERR_STILLFRAME_TARGET_EXISTS',
      });
    }
    expect(stillframe([...args, '--existing']).status).toBe(0);
    expect(firstDifference(backing('target'), content)).toBe(-1);
  });

  it('is the same device under every name', () => {
    symlinkSync(source, at('link'));
    const numbers = run('stat', ['-c', '%Hr %Lr', source]).trim().split(' ');
    run('mknod', [at('twin'), 'b', ...numbers]);
    for (const name of [source, at('link'), at('twin')]) {
      const args = [
        'backup',
        source,
        name,
        '--sync',
        'full',
        '--format',
        'raw',
        '--existing',
        '--output',
        'json',
      ];
      expect(lastObject(stillframe(args).stdout)).toMatchObject({ code: 'ERR_STILLFRAME_SAME_NODE' });
    }
    expect(firstDifference(backing('source'), content)).toBe(-1);
  });

  it('of another size is refused, and so is one that is read-only', () => {
    const args = ['backup', source, probe ?? '', '--sync', 'full', '--format', 'raw', '--existing'];
    expect(stillframe(args).stderr).toContain('ERR_STILLFRAME_SIZE_MISMATCH');
    run('losetup', ['-d', devices.pop() ?? '']);
    const device = run('losetup', ['-r', '-f', '--show', at('target')]).trim();
    devices.push(device);
    const refused = stillframe(['backup', source, device, '--sync', 'full', '--format', 'raw', '--existing']);
    expect(refused.stderr).toMatch(/ERR_STILLFRAME_(PERMISSION|READ_ONLY)/);
  });
});
