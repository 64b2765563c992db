/** Exports of real NBD servers as sources and targets. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { attachNbd, closeNbd, openNbd } from '#src/block/nbd/index.js';
import { type BackupOptions, createEngine, type Engine } from '#src/index.js';
import { createRuntime } from '#src/kernels/runtime.js';
import { stillframe } from '../support/cli.js';
import { firstDifference, Random } from '../support/data.js';
import { nbdkit, nbdServer, qemuNbd, type Server } from '../support/nbd.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-nbd-'));
const at = (name: string): string => join(folder, name);
const LENGTH = 8 << 20;
const content = new Random(3).bytes(LENGTH).fill(0, 2 << 20, 5 << 20);
const peers = hasPeer('qemu-nbd') && hasPeer('qemu-img') && hasPeer('nbdkit');

let engine: Engine;
const servers: Server[] = [];
/** The server is ended with the test. */
function started(server: Server): Server {
  servers.push(server);
  return server;
}
const qemu = (...args: string[]): Server => started(qemuNbd(['-f', 'raw', ...args]));
const kit = (...args: string[]): Server => started(nbdkit(args));

beforeAll(async () => {
  engine = await createEngine({ workers: 2 });
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
beforeEach(() => {
  rmSync(folder, { recursive: true });
  run('mkdir', [folder]);
  run('truncate', ['-s', String(LENGTH), at('disk')]);
  // With its hole.
  run('sh', ['-c', `dd of='${at('disk')}' bs=1M conv=notrunc,sparse status=none < '${writtenContent()}'`]);
});
afterEach(() => {
  for (const server of servers.splice(0)) server.stop();
});

function writtenContent(): string {
  writeFileSync(at('content'), content);
  return at('content');
}

const expectContent = (path: string): void => expect(firstDifference(readFileSync(path), content)).toBe(-1);
type Disk = Awaited<ReturnType<Engine['openDisk']>>;
const open = (uri: string, readOnly = true) => engine.openDisk(uri, { format: 'raw', readOnly });

describe.skipIf(!peers)('an export as the source', () => {
  it.each<[what: string, serve: () => Server]>([
    ['qemu-nbd', () => qemu('-r', '-e', '8', at('disk'))],
    ['qemu-nbd with one connection', () => qemu('-r', at('disk'))],
    ['nbdkit', () => kit('-r', 'file', at('disk'))],
  ])('is backed up from %s, without reading its holes', async (_, serve) => {
    const disk = await open(serve().uri());
    try {
      expect(disk.length).toBe(LENGTH);
      const result = await (await disk.backup({ target: at('copy'), format: 'raw', sync: 'full' })).result();
      expect(result.bytes.read).toBe(LENGTH - (3 << 20));
    } finally {
      await disk.close();
    }
    expectContent(at('copy'));
  });

  it('is read over fewer connections where the server does not take as many', async () => {
    const server = kit(
      '-r',
      '--filter=multi-conn',
      '--filter=limit',
      'file',
      at('disk'),
      'multi-conn-mode=emulate',
      'limit=1',
    );
    const disk = await open(server.uri('', '&x-timeout=2'));
    try {
      await (await disk.backup({ target: at('copy'), format: 'raw', sync: 'full' })).result();
    } finally {
      await disk.close();
    }
    expectContent(at('copy'));
  });

  it('may hold a qcow2 image', async () => {
    run('qemu-img', ['convert', '-O', 'qcow2', at('disk'), at('disk.qcow2')]);
    const disk = await engine.openDisk(qemu('-r', at('disk.qcow2')).uri(), {
      format: 'qcow2',
      readOnly: true,
    });
    try {
      await (await disk.backup({ target: at('copy'), format: 'raw', sync: 'full' })).result();
    } finally {
      await disk.close();
    }
    expectContent(at('copy'));
  });

  it('is described, mapped and compared by the tools as by qemu-img', () => {
    const uri = qemu('-r', at('disk')).uri();
    const json = (text: string): object => ({ ...JSON.parse(text), filename: undefined });
    expect(json(stillframe(['info', '--output', 'json', uri]).stdout)).toEqual(
      json(run('qemu-img', ['info', '--output=json', uri])),
    );
    expect(stillframe(['info', uri]).stdout).toContain('disk size: unavailable\n');
    expect(stillframe(['map', '--output', 'json', uri]).stdout).toBe(
      run('qemu-img', ['map', '--output=json', uri]),
    );
    expect(stillframe(['compare', '-f', 'raw', uri, at('content')]).stdout).toBe('Images are identical.\n');
  });

  it.each([
    ['nbd:unix:SOCKET', '127.0.0.1'],
    ['nbd://localhost:PORT/', '127.0.0.1'],
    ['nbd://127.0.0.1:PORT', '127.0.0.1'],
    ['nbd:127.0.0.1:PORT:exportname=', '127.0.0.1'],
    ['nbd://[::1]:PORT', '::1'],
  ])('is found as %s', (form, host) => {
    const port = String(20_000 + (process.pid % 10_000));
    const server = form.includes('SOCKET')
      ? kit('-r', 'file', at('disk'))
      : kit('-r', '--port', port, '--ipaddr', host, 'file', at('disk'));
    const name = form.replace('SOCKET', server.socket).replace('PORT', port);
    const { status, stderr } = stillframe(['compare', '-f', 'raw', name, at('content')]);
    expect([status, stderr]).toEqual([0, '']);
  });

  it('has its own name: an image header that names one is refused', () => {
    const uri = qemu('-r', at('disk')).uri();
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', uri, at('overlay.qcow2'), '8M']);
    expect(stillframe(['map', at('overlay.qcow2')]).stderr).toContain('[ERR_STILLFRAME_BACKING_FORBIDDEN]');
  });

  it('is not open for writing where the server forbids it, nor found where it is not', async () => {
    const server = qemu('-r', '-x', 'name', at('disk'));
    await expect(open(server.uri('name'), false)).rejects.toMatchObject({ code: 'ERR_STILLFRAME_READ_ONLY' });
    await expect(open(server.uri('other'))).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_REFUSED' });
    await (await open(server.uri('name'))).close();
    server.stop();
    await expect(open(server.uri('name'))).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_CONNECTION' });
    await expect(open('nbd://no-such-host.invalid/')).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_NBD_CONNECTION',
      message: expect.stringContaining('no-such-host.invalid'),
    });
  });

  it('is not to be had without the system calls for it', () => {
    const { stderr } = stillframe(['info', 'nbd://localhost/'], { env: { STILLFRAME_NO_FFI: '1' } });
    expect(stderr).toContain('[ERR_STILLFRAME_UNSUPPORTED_FEATURE]');
  });

  it('that cannot be read fails the backup with the error of the server', async () => {
    const disk = await open(
      kit('-r', '--filter=error', 'file', at('disk'), 'error-pread=EIO', 'error-pread-rate=100%').uri(),
    );
    try {
      const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full' });
      await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_IO', errno: 'EIO' });
    } finally {
      await disk.close();
    }
  });

  it('that does not answer keeps nobody from cancelling the backup', async () => {
    const server = kit('-r', '--filter=delay', 'file', at('disk'), 'delay-read=1000');
    const disk = await open(server.uri());
    try {
      const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full' });
      await new Promise((resolve) => setTimeout(resolve, 200));
      job.cancel();
      await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    } finally {
      await disk.close();
      server.kill();
    }
  });

  it('that goes away fails the backup', async () => {
    const server = qemu('-r', '-e', '8', at('disk'));
    const disk = await open(server.uri());
    try {
      const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full', speed: 1 << 20 });
      server.kill();
      await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NBD_CONNECTION' });
    } finally {
      await disk.close();
    }
  });

  it('that goes away and comes back is read on', async () => {
    const server = qemu('-r', '-e', '8', at('disk'));
    const disk = await open(server.uri('', '&x-reconnect-delay=60'));
    try {
      const job = await disk.backup({ target: at('copy'), format: 'raw', sync: 'full', speed: 8 << 20 });
      server.kill();
      started(qemuNbd(['-f', 'raw', '-r', '-e', '8', at('disk')], server.socket));
      await job.result();
    } finally {
      await disk.close();
    }
    expectContent(at('copy'));
  });

  it('that comes back as another one is refused', async () => {
    const server = qemu('-r', at('disk'));
    const disk = await open(server.uri('', '&x-reconnect-delay=60'));
    try {
      server.kill();
      run('truncate', ['-s', '+1M', at('disk')]);
      started(qemuNbd(['-f', 'raw', '-r', at('disk')], server.socket));
      await expect(disk.read(0, 512)).rejects.toMatchObject({
        message: expect.stringContaining('not the export any more'),
      });
    } finally {
      await disk.close();
    }
  });

  it('has the dirty bitmap that was asked for, and is copied by it', async () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('disk.qcow2'), String(LENGTH)]);
    run('qemu-io', ['-c', 'write -P 1 0 4M', at('disk.qcow2')]);
    run('qemu-img', ['convert', '-O', 'qcow2', at('disk.qcow2'), at('before.qcow2')]);
    run('qemu-img', ['bitmap', '--add', '-g', '4096', at('disk.qcow2'), 'b 0']);
    run('qemu-io', ['-c', 'write -P 2 1M 100k', '-c', 'write -z 3M 4k', at('disk.qcow2')]);
    const server = started(qemuNbd(['-f', 'qcow2', '-r', '-B', 'b 0', at('disk.qcow2')]));
    const uri = server.uri('', '&x-dirty-bitmap=b%200');
    const disk = await engine.openDisk(uri, { format: 'raw', readOnly: true });
    try {
      const status = { granularity: 65536, recording: false, busy: false, persistent: false };
      expect(await disk.bitmaps()).toEqual([
        { name: 'b 0', count: 3 * 65536, inconsistent: false, ...status },
      ]);
    } finally {
      await disk.close();
    }
    const { status, stderr } = stillframe([
      ...['backup', uri, at('next.qcow2'), '--sync', 'bitmap', '--bitmap', 'b 0', '--bitmap-mode', 'never'],
      ...['--format', 'qcow2', '--backing', at('before.qcow2')],
    ]);
    expect(status, stderr).toBe(0);
    run('qemu-img', ['compare', '-q', '-U', at('disk.qcow2'), at('next.qcow2')]);
    // Whoever asks for one that the server does not have would take everything for clean.
    await expect(
      engine.openDisk(server.uri('', '&x-dirty-bitmap=b1'), { format: 'raw', readOnly: true }),
    ).rejects.toMatchObject({ code: 'ERR_STILLFRAME_BITMAP_NOT_FOUND' });
  });

  it('says what is in its dirty bitmaps', () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('disk.qcow2'), '8M']);
    run('qemu-img', ['bitmap', '--add', '-g', '65536', at('disk.qcow2'), 'b0']);
    run('qemu-io', ['-c', 'write 1M 100k', '-c', 'write 4M 64k', at('disk.qcow2')]);
    const server = started(qemuNbd(['-f', 'qcow2', '-r', '-B', 'b0', at('disk.qcow2')]));
    const runtime = createRuntime(16 << 20);
    const descriptor = openNbd(runtime, server.uri('', '&x-dirty-bitmap=b0'), { readOnly: true });
    try {
      const node = attachNbd(runtime, descriptor);
      const extents: object[] = [];
      node.contextExtents('qemu:dirty-bitmap:b0', 0, 8 << 20, (extent) => extents.push(extent));
      expect(extents).toEqual([
        { length: 1 << 20, flags: 0 },
        { length: 128 << 10, flags: 1 },
        { length: (3 << 20) - (128 << 10), flags: 0 },
        { length: 64 << 10, flags: 1 },
        { length: (4 << 20) - (64 << 10), flags: 0 },
      ]);
      expect(() => node.contextExtents('qemu:dirty-bitmap:b1', 0, 512, () => undefined)).toThrow(
        expect.objectContaining({ code: 'ERR_STILLFRAME_BITMAP_NOT_FOUND' }),
      );
    } finally {
      closeNbd(runtime, descriptor);
    }
  });
});

describe.skipIf(!peers)('an export as the target', () => {
  beforeEach(() => writeFileSync(at('target'), new Uint8Array(LENGTH).fill(0xee)));

  it.each<[what: string, serve: () => Server]>([
    ['qemu-nbd', () => qemu('-e', '8', '--discard=unmap', at('target'))],
    ['qemu-nbd with one connection', () => qemu(at('target'))],
    ['nbdkit', () => kit('file', at('target'))],
    ['nbdkit without zeroes', () => kit('--filter=nozero', 'file', at('target'))],
    ['nbdkit with FUA instead of flush', () => kit('--filter=fua', 'file', at('target'), 'fuamode=force')],
    [
      'nbdkit with large blocks',
      () =>
        kit(
          '--filter=blocksize-policy',
          'file',
          at('target'),
          'blocksize-minimum=65536',
          'blocksize-preferred=65536',
          'blocksize-maximum=65536',
          'blocksize-error-policy=error',
        ),
    ],
  ])('takes a backup, to %s', (_, serve) => {
    const { status, stderr } = stillframe([
      'backup',
      '-f',
      'raw',
      at('disk'),
      serve().uri(),
      '--sync',
      'full',
      '-q',
    ]);
    expect([status, stderr]).toEqual([0, '']);
    for (const server of servers.splice(0)) server.stop();
    expectContent(at('target'));
  });

  it('is copied to from an export', () => {
    const [source, target] = [kit('-r', 'file', at('disk')), qemu(at('target'))];
    const { status, stderr } = stillframe([
      'backup',
      '-f',
      'raw',
      source.uri(),
      target.uri(),
      '--sync',
      'full',
      '-q',
    ]);
    expect([status, stderr]).toEqual([0, '']);
    expectContent(at('target'));
  });

  it('may hold a qcow2 image', () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('target'), String(LENGTH)]);
    run('truncate', ['-s', '16M', at('target')]);
    const { status, stderr } = stillframe([
      ...[
        'backup',
        '-f',
        'raw',
        at('disk'),
        qemu(at('target')).uri(),
        '--sync',
        'full',
        '-q',
        '--format',
        'qcow2',
      ],
    ]);
    expect([status, stderr]).toEqual([0, '']);
    for (const server of servers.splice(0)) server.stop();
    run('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', at('disk'), at('target')]);
  });

  it('cannot be the source as well', async () => {
    const server = kit('file', at('disk'));
    const disk = await open(server.uri());
    try {
      await expect(disk.backup({ target: `nbd:unix:${server.socket}`, sync: 'full' })).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_SAME_NODE',
      });
      writeFileSync(at('small'), new Uint8Array(512));
      await expect(
        disk.backup({ target: kit('file', at('small')).uri(), sync: 'full' }),
      ).rejects.toMatchObject({
        code: 'ERR_STILLFRAME_SIZE_MISMATCH',
      });
    } finally {
      await disk.close();
    }
  });

  it('that is full fails the backup with that', async () => {
    const disk = await open(at('disk'));
    try {
      const target = kit(
        '--filter=error',
        'file',
        at('target'),
        'error-pwrite=ENOSPC',
        'error-pwrite-rate=100%',
      ).uri();
      const job = await disk.backup({ target, sync: 'full' });
      await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_NO_SPACE' });
    } finally {
      await disk.close();
    }
  });

  it('that does not answer keeps nobody from cancelling the backup', async () => {
    const disk = await open(at('disk'));
    const server = kit('--filter=delay', 'file', at('target'), 'delay-write=1000');
    try {
      const job = await disk.backup({ target: server.uri(), sync: 'full' });
      await new Promise((resolve) => setTimeout(resolve, 200));
      job.cancel();
      await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
    } finally {
      await disk.close();
      server.kill();
    }
  });

  it.each([0, 60_000])("that is full fails a guest's write with that (time-out %i)", async (cbwTimeoutMs) => {
    const errors = ['error-pwrite=ENOSPC', 'error-pwrite-rate=100%'];
    const disk = await open(at('disk'), false);
    try {
      const target = kit('--filter=error', 'file', at('target'), ...errors).uri();
      const job = await disk.backup({ target, sync: 'none', cbwTimeoutMs });
      const refused = { code: 'ERR_STILLFRAME_NO_SPACE', errno: 'ENOSPC' };
      await expect(disk.write(0, block(1))).rejects.toMatchObject(refused);
      expect(await same(disk, 0, content.subarray(0, 512))).toBe(true);
      job.cancel();
      await job.result();
    } finally {
      await disk.close();
    }
  });

  /** A backup that has copied the beginning, and whose own threads then copy nothing for a long time. */
  const slowly = async (disk: Disk, options: Partial<BackupOptions>, target: string) => {
    const job = await disk.backup({ target, sync: 'full', speed: 1, workers: 1, ...options });
    while (job.snapshot().offset === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    return job;
  };
  const END = LENGTH - 65536;
  const block = (byte: number) => new Uint8Array(512).fill(byte);
  const same = async (disk: Disk, offset: number, bytes: Uint8Array) =>
    Buffer.from(await disk.read(offset, bytes.length)).equals(bytes);

  it.each([
    ['the backup', false],
    ['the scratch file of a backup', true],
  ])(
    'that hangs fails a write of a guest in its time, and is the instant all the same: %s',
    async (_, fleece) => {
      const server = qemu('-e', '8', at('target'));
      const disk = await open(at('disk'), false);
      try {
        const job = await slowly(disk, { cbwTimeoutMs: 300, fleece }, server.uri());
        server.pause();
        // What is saved already, or saved elsewhere, needs nobody.
        await disk.write(0, block(1));
        if (fleece) await disk.write(END, block(2));
        else {
          // As often as there are threads that copy for guests, and once more.
          for (const offset of [END, END, END - 65536, END - 2 * 65536]) {
            const late = { code: 'ERR_STILLFRAME_CBW_TIMEOUT' };
            await expect(disk.write(offset, block(2))).rejects.toMatchObject(late);
            expect(await same(disk, offset, content.subarray(offset, offset + 512))).toBe(true);
          }
          server.resume();
          // The copies that went on without the guest come to their end, and there is room for others.
          for (const offset of [END, END - 65536, END - 2 * 65536, END - 3 * 65536]) {
            while (!(await written(disk, offset)));
          }
        }
        server.resume();
        job.setSpeed(0);
        const result = await job.result();
        expect(result.clusters.cbw).toBe(fleece ? 1 : 4);
        expect(result.clusters.copied + result.clusters.zero).toBe(result.clusters.total);
        expect(await same(disk, END, block(2))).toBe(true);
      } finally {
        await disk.close();
      }
      server.stop();
      expectContent(at('target'));
    },
  );
  /** A write of a guest; false: it came too late. */
  const written = async (disk: Disk, offset: number): Promise<boolean> => {
    try {
      await disk.write(offset, block(2));
      return true;
    } catch (error) {
      expect(error).toMatchObject({ code: 'ERR_STILLFRAME_CBW_TIMEOUT' });
      return false;
    }
  };

  it('that hangs lets a guest go on where the snapshot may break, and is no backup then', async () => {
    const server = qemu('-e', '8', at('target'));
    const disk = await open(at('disk'), false);
    try {
      const options = { cbwTimeoutMs: 300, onCbwError: 'break-snapshot' } as const;
      const job = await slowly(disk, options, server.uri());
      server.pause();
      await disk.write(END, block(2));
      await disk.write(END - 65536, block(3));
      server.resume();
      await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_BROKEN_FRAME' });
      expect(await same(disk, END, block(2))).toBe(true);
    } finally {
      await disk.close();
    }
  });

  it.each([0, 60_000])(
    'that hangs fails no write of a guest when the backup is cancelled (time-out %i)',
    async (cbwTimeoutMs) => {
      const server = qemu('-e', '8', at('target'));
      const disk = await open(at('disk'), false);
      try {
        const job = await slowly(disk, { cbwTimeoutMs }, server.uri());
        server.pause();
        const writing = disk.write(END, block(2));
        // It is waiting by then, or will do without.
        await new Promise((resolve) => setTimeout(resolve, 100));
        job.cancel();
        await writing;
        await expect(job.result()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_JOB_CANCELLED' });
        expect(await same(disk, END, block(2))).toBe(true);
      } finally {
        server.resume();
        await disk.close();
      }
    },
  );

  it('that is lost with writes that were not flushed takes no more, though it comes back', async () => {
    const server = qemu(at('target'));
    const disk = await open(server.uri('', '&x-reconnect-delay=60'), false);
    const again = () => {
      servers.at(-1)?.kill();
      started(qemuNbd(['-f', 'raw', at('target')], server.socket));
    };
    try {
      await disk.write(0, new Uint8Array(512).fill(1));
      await disk.flush();
      again();
      // Nothing was lost so far.
      await disk.write(512, new Uint8Array(512).fill(2));
      again();
      const lost = { code: 'ERR_STILLFRAME_IO', message: expect.stringContaining('not flushed') };
      await expect(disk.flush()).rejects.toMatchObject(lost);
      await expect(disk.write(1024, new Uint8Array(512))).rejects.toMatchObject(lost);
      expect(Buffer.from(await disk.read(0, 512)).equals(Buffer.alloc(512, 1))).toBe(true);
    } finally {
      await disk.close().catch(() => undefined);
    }
  });
});

it.skipIf(!peers)('threads that write parts of one block lose nothing of each other', async () => {
  const policy = ['blocksize-minimum=65536', 'blocksize-preferred=65536', 'blocksize-error-policy=error'];
  const disk = await open(kit('--filter=blocksize-policy', 'file', at('disk'), ...policy).uri(), false);
  const expected = Buffer.from(content.subarray(0, 1 << 20));
  try {
    for (let round = 1; round <= 4; round++) {
      const parts = Array.from({ length: 64 }, (_, index) => index * 16384 + round * 512);
      await Promise.all(
        parts.map(async (offset, index) => {
          const bytes = new Uint8Array(9000).fill(round * 16 + (index % 16));
          if (index % 3 === 0) await disk.writeZeroes(offset, bytes.fill(0).length);
          else await disk.write(offset, bytes);
          expected.set(bytes, offset);
        }),
      );
    }
    expect(firstDifference(Buffer.from(await disk.read(0, 1 << 20)), expected)).toBe(-1);
    await disk.flush();
  } finally {
    await disk.close();
  }
  expect(firstDifference(readFileSync(at('disk')).subarray(0, 1 << 20), expected)).toBe(-1);
});

describe.skipIf(!peers)('the tools take exports', () => {
  const succeeds = (...words: string[]) => {
    const { status, stdout, stderr } = stillframe(words);
    expect([status, stderr]).toEqual([0, '']);
    return stdout;
  };

  it('to make, fill, check and list images in', () => {
    writeFileSync(at('target'), new Uint8Array(16 << 20).fill(0xee));
    const uri = qemu(at('target')).uri();
    expect(stillframe(['create', '-f', 'qcow2', uri, '8M']).stderr).toContain(
      '[ERR_STILLFRAME_TARGET_EXISTS]',
    );
    succeeds('create', '-f', 'qcow2', '--force', uri, '8M');
    succeeds('bitmap', '--add', '-f', 'qcow2', uri, 'b0');
    succeeds('convert', '-f', 'raw', '-n', '-O', 'qcow2', at('disk'), uri);
    expect(succeeds('info', '-f', 'qcow2', uri)).toContain('name: b0');
    expect(stillframe(['check', '-f', 'qcow2', uri]).status).toBe(0);
    for (const server of servers.splice(0)) server.stop();
    run('qemu-img', ['check', '-q', '-f', 'qcow2', at('target')]);
    run('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', at('disk'), at('target')]);
  });

  it('to convert from and to', () => {
    writeFileSync(at('target'), new Uint8Array(LENGTH).fill(0xee));
    const [source, target] = [qemu('-r', at('disk')).uri(), kit('file', at('target')).uri()];
    succeeds('convert', '-f', 'raw', '-O', 'raw', source, target);
    expectContent(at('target'));
    succeeds('convert', '-f', 'raw', '-O', 'qcow2', source, at('copy.qcow2'));
    run('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', at('disk'), at('copy.qcow2')]);
    expect(stillframe(['convert', '-f', 'raw', '-O', 'qcow2', source, target]).stderr).toContain(
      'cannot be made',
    );
    expect(stillframe(['convert', '-f', 'raw', target, target]).stderr).toContain(
      '[ERR_STILLFRAME_SAME_NODE]',
    );
  });

  it('and give them up at once when they are cancelled', async () => {
    const server = kit('-r', '--filter=delay', 'file', at('disk'), 'delay-read=1000');
    const abort = new AbortController();
    const conversion = engine.convertImage(server.uri(), at('copy'), {
      source: { format: 'raw' },
      signal: abort.signal,
      onProgress: () => abort.abort(new Error('enough')),
    });
    setTimeout(() => abort.abort(new Error('enough')), 500);
    await expect(conversion).rejects.toThrow('enough');
    server.kill();
  });

  it('and cannot make them larger', () => {
    expect(stillframe(['resize', '-f', 'raw', qemu(at('disk')).uri(), '16M']).stderr).toContain('NBD export');
  });
});

it.skipIf(!peers)('a server that is not there yet is waited for', async () => {
  const server = qemu('-r', at('disk'));
  server.kill();
  const opening = open(server.uri('', '&x-open-timeout=60'));
  started(qemuNbd(['-f', 'raw', '-r', at('disk')], server.socket));
  const disk = await opening;
  await disk.close();
});

describe.skipIf(!peers)('a node', () => {
  it('zeroes fast where the server can, and says where it cannot', () => {
    const runtime = createRuntime(16 << 20);
    const pointer = runtime.arena.alloc(4096, 'test');
    const zeroed = (server: Server): boolean => {
      const descriptor = openNbd(runtime, server.uri(), { readOnly: false });
      try {
        const node = attachNbd(runtime, descriptor);
        runtime.arena.u8.fill(7, pointer, pointer + 4096);
        node.write(8192, pointer, 4096);
        node.cache(8192, 4096);
        const done = node.tryFastZero(0, 1 << 20);
        node.read(8192, pointer, 4096);
        const byte = runtime.arena.u8[pointer];
        expect(byte).toBe(done ? 0 : 7);
        return done;
      } finally {
        closeNbd(runtime, descriptor);
      }
    };
    expect(zeroed(kit('memory', '1M'))).toBe(true);
    expect(zeroed(kit('--filter=nozero', 'memory', '1M'))).toBe(false);
    expect(zeroed(kit('--filter=nozero', 'memory', '1M', 'zeromode=notrim', 'fastzeromode=slow'))).toBe(
      false,
    );
  });
});

describe.skipIf(!peers || !hasPeer('nbd-server'))('an export of nbd-server', () => {
  it.each([[[]], [['flush = true', 'fua = true', 'trim = true']], [['fua = true']]])(
    'is read and written, %j',
    (lines) => {
      writeFileSync(at('target'), new Uint8Array(LENGTH).fill(0xee));
      const source = started(nbdServer(at('disk'), 'readonly = true'));
      const target = started(nbdServer(at('target'), ...lines));
      const words = ['backup', '-f', 'raw', source.uri('disk'), target.uri('disk'), '--sync', 'full', '-q'];
      const { status, stderr } = stillframe(words);
      expect([status, stderr]).toEqual([0, '']);
      expectContent(at('target'));
      expect(stillframe(['info', source.uri('other')]).stderr).toContain('[ERR_STILLFRAME_NBD_REFUSED]');
    },
  );
});

it.skipIf(!peers)('threads that share one connection do not get into each other', async () => {
  const disk = await open(qemu('-e', '4', at('disk')).uri(), false);
  const single = await open(kit('--filter=multi-conn', 'file', at('disk'), 'multi-conn-mode=disable').uri());
  try {
    const random = new Random(9);
    const reads = Array.from({ length: 200 }, () => {
      const offset = random.between(0, LENGTH - 1);
      return { offset, length: random.between(1, Math.min(300_000, LENGTH - offset)) };
    });
    await Promise.all(
      [disk, single].flatMap((one) =>
        reads.map(async ({ offset, length }) => {
          const found = await one.read(offset, length);
          expect(firstDifference(Buffer.from(found), content.subarray(offset, offset + length))).toBe(-1);
        }),
      ),
    );
  } finally {
    await disk.close();
    await single.close();
  }
});
