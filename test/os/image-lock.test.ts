import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { createEngine, type Engine } from '#src/index.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-locks-'));
let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});

const formats = ['raw', 'qcow2'] as const;
const locked = { code: 'ERR_STILLFRAME_LOCKED', message: expect.stringContaining('--force-share') };

describe('our own locks', () => {
  it.each(formats)('keep a second writer and a reader out of a %s disk that is written', async (format) => {
    const path = join(folder, `own.${format}`);
    await engine.createImage(path, { format, length: 1 << 20, force: true });
    const disk = await engine.openDisk(path, { format });
    await expect(engine.openDisk(path, { format })).rejects.toMatchObject(locked);
    await expect(engine.openDisk(path, { format, readOnly: true })).rejects.toMatchObject(locked);
    await expect(engine.imageInfo(path)).rejects.toMatchObject(locked);
    const info = await engine.imageInfo(path, { format, forceShare: true });
    expect(info.format).toBe(format);
    await disk.close();
    const again = await engine.openDisk(path, { format });
    await again.close();
  });

  it.each(formats)('let readers of a %s disk share it', async (format) => {
    const path = join(folder, `shared.${format}`);
    await engine.createImage(path, { format, length: 1 << 20, force: true });
    const one = await engine.openDisk(path, { format, readOnly: true });
    const two = await engine.openDisk(path, { format, readOnly: true });
    await expect(engine.openDisk(path, { format })).rejects.toMatchObject(locked);
    await one.close();
    await two.close();
    await (await engine.openDisk(path, { format })).close();
  });

  it('are given back when opening fails later', async () => {
    const path = join(folder, 'half.raw');
    await engine.createImage(path, { format: 'raw', length: 1 << 20, force: true });
    await expect(engine.openDisk(path, { format: 'qcow2' })).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_FORMAT',
    });
    await (await engine.openDisk(path, { format: 'raw' })).close();
  });
});

describe('our own locks', () => {
  it('are given back by a close, whoever else has the descriptor', async () => {
    const path = join(folder, 'inherited.raw');
    await engine.createImage(path, { format: 'raw', length: 1 << 20, force: true });
    const disk = await engine.openDisk(path, { format: 'raw' });
    const { node } = disk.descriptor;
    const file = node.driver === 'raw' ? node.file : node;
    const fd = file.driver === 'file' ? file.fd : -1;
    // As a program that is being started has it, but for longer.
    const child = spawn('sleep', ['60'], { stdio: ['ignore', 'ignore', 'ignore', fd] });
    try {
      await disk.close();
      const again = await engine.openDisk(path, { format: 'raw' });
      await again.close();
    } finally {
      child.kill();
    }
  });
});

/** A running qemu-io that has opened an image. */
class QemuIo {
  readonly #child: ChildProcess;
  #output = '';

  constructor(args: readonly string[]) {
    this.#child = spawn('qemu-io', args, { stdio: ['pipe', 'pipe', 'inherit'] });
    this.#child.stdout?.on('data', (data) => {
      this.#output += String(data);
    });
  }

  async opened(): Promise<void> {
    this.#child.stdin?.write('read 0 512\n');
    while (!this.#output.includes('read 512/512')) {
      if (this.#child.exitCode !== null) throw new Error(`qemu-io ended: ${this.#output}`);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }

  async end(): Promise<void> {
    const over = new Promise((resolve) => this.#child.once('close', resolve));
    this.#child.stdin?.end('quit\n');
    await over;
  }
}

describe.skipIf(!hasPeer('qemu-io') || !hasPeer('qemu-img'))('locks beside a running QEMU', () => {
  let path: string;
  let tests = 0;
  beforeEach(() => {
    path = join(folder, `peer${tests++}.img`);
  });

  it.each(formats)('qemu-io writes: we neither write nor read (%s)', async (format) => {
    run('qemu-img', ['create', '-q', '-f', format, path, '1M']);
    const writer = new QemuIo(['-f', format, path]);
    await writer.opened();
    await expect(engine.openDisk(path, { format })).rejects.toMatchObject(locked);
    await expect(engine.openDisk(path, { format, readOnly: true })).rejects.toMatchObject(locked);
    const forced = await engine.openDisk(path, { format, readOnly: true, forceShare: true });
    await forced.close();
    await writer.end();
    await (await engine.openDisk(path, { format })).close();
  });

  it.each(formats)('qemu-io reads: we read but do not write (%s)', async (format) => {
    run('qemu-img', ['create', '-q', '-f', format, path, '1M']);
    const reader = new QemuIo(['-r', '-f', format, path]);
    await reader.opened();
    const shared = await engine.openDisk(path, { format, readOnly: true });
    await expect(engine.openDisk(path, { format })).rejects.toMatchObject(locked);
    await shared.close();
    await reader.end();
  });

  /** What qemu-io complains of; its exit status says nothing of an image that it could not open. */
  const io = (format: string, ...args: string[]): string =>
    spawnSync('qemu-io', ['-f', format, ...args, path], { encoding: 'utf8' }).stderr;
  const refused = /Failed to get .*lock/;

  it.each(formats)('we write: QEMU neither writes nor reads (%s)', async (format) => {
    run('qemu-img', ['create', '-q', '-f', format, path, '1M']);
    const disk = await engine.openDisk(path, { format });
    expect(io(format, '-c', 'write 0 512')).toMatch(refused);
    // Without metadata to keep consistent QEMU's readers let anybody write.
    if (format === 'qcow2') expect(io(format, '-r', '-c', 'read 0 512')).toMatch(refused);
    expect(io(format, '-r', '-U', '-c', 'read 0 512')).toBe('');
    await disk.close();
    expect(io(format, '-c', 'write 0 512')).toBe('');
  });

  it.each(formats)('we read: QEMU reads but does not write (%s)', async (format) => {
    run('qemu-img', ['create', '-q', '-f', format, path, '1M']);
    const disk = await engine.openDisk(path, { format, readOnly: true });
    expect(io(format, '-r', '-c', 'read 0 512')).toBe('');
    expect(io(format, '-c', 'write 0 512')).toContain('Failed to get "write" lock');
    await disk.close();
  });

  it('a backing file is shared for reading and kept from writers', async () => {
    run('qemu-img', ['create', '-q', '-f', 'raw', path, '1M']);
    const overlay = join(folder, 'overlay.qcow2');
    await engine.createImage(overlay, {
      format: 'qcow2',
      backingFile: path,
      backingFormat: 'raw',
      force: true,
    });
    const disk = await engine.openDisk(overlay);
    expect(io('raw', '-r', '-c', 'read 0 512')).toBe('');
    expect(io('raw', '-c', 'write 0 512')).toMatch(refused);
    await disk.close();
    expect(io('raw', '-c', 'write 0 512')).toBe('');
  });

  it('the target of a running backup is kept from everybody', async () => {
    run('qemu-img', ['create', '-q', '-f', 'raw', path, '8M']);
    run('qemu-io', ['-f', 'raw', '-c', 'write -P 7 0 8M', path]);
    const disk = await engine.openDisk(path, { format: 'raw', readOnly: true });
    const target = join(folder, 'target.qcow2');
    const job = await disk.backup({ target, format: 'qcow2', sync: 'full', speed: 65536, force: true });
    const reader = spawnSync('qemu-io', ['-r', '-f', 'qcow2', '-c', 'read 0 512', job.path], {
      encoding: 'utf8',
    });
    expect(reader.stderr).toMatch(/Failed to get .*lock/);
    job.cancel();
    await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    await disk.close();
  });
});
