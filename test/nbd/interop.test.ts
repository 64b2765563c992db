/** The NBD server with the clients that people use. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { createEngine, type Disk, type Engine, type NbdServer } from '#src/index.js';
import { firstDifference, Random } from '../support/data.js';
import { tool } from '../support/nbd-client.js';
import { hasPeer, run } from '../support/peers.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-interop-'));
const at = (name: string): string => join(folder, name);
const uri = (name = ''): string => `nbd+unix:///${name}?socket=${at('socket')}`;
const LENGTH = 24 << 20;
const content = new Random(23)
  .bytes(LENGTH)
  .fill(0, 3 << 20, 9 << 20)
  .fill(0, (20 << 20) + 4096, 21 << 20);

let engine: Engine;
let server: NbdServer | undefined;
const disks: Disk[] = [];

beforeAll(async () => {
  engine = await createEngine({ workers: 1 });
  writeFileSync(at('content'), content);
});
afterAll(async () => {
  await engine.close();
  rmSync(folder, { recursive: true });
});
afterEach(async () => {
  await server?.close();
  for (const disk of disks.splice(0)) await disk.close();
});

const FORMATS = ['raw', 'qcow2'] as const;
type Format = (typeof FORMATS)[number];

async function open(name: string, format: Format, readOnly = false): Promise<Disk> {
  const disk = await engine.openDisk(at(name), { format, readOnly });
  disks.push(disk);
  return disk;
}

/** Serves an empty image, or one with the content. */
async function serve(format: Format, full: boolean): Promise<Disk> {
  rmSync(at('disk'), { force: true });
  if (full) run('qemu-img', ['convert', '-f', 'raw', '-O', format, at('content'), at('disk')]);
  else run('qemu-img', ['create', '-q', '-f', format, at('disk'), String(LENGTH)]);
  const disk = await open('disk', format);
  server = await engine.serveNbd({ listen: `unix:${at('socket')}`, exports: [{ disk }] });
  return disk;
}

const expectContent = (path: string): void => expect(firstDifference(readFileSync(path), content)).toBe(-1);

/** What the image holds once nobody serves it any more. */
async function served(format: Format): Promise<Buffer> {
  await server?.close();
  for (const disk of disks.splice(0)) await disk.close();
  run('qemu-img', ['convert', '-f', format, '-O', 'raw', at('disk'), at('served')]);
  return readFileSync(at('served'));
}

describe.skipIf(!hasPeer('nbdcopy') || !hasPeer('qemu-img'))('nbdcopy', () => {
  it.each(FORMATS.flatMap((format) => [1, 4, 8].map((connections) => [format, connections] as const)))(
    'copies a %s image out over %i connections',
    async (format, connections) => {
      await serve(format, true);
      await tool('nbdcopy', '-C', `${connections}`, '-T', `${connections}`, uri(), at('copy'));
      expectContent(at('copy'));
    },
  );

  it.each(FORMATS.flatMap((format) => [1, 4, 8].map((connections) => [format, connections] as const)))(
    'copies into a %s image over %i connections',
    async (format, connections) => {
      await serve(format, false);
      await tool('nbdcopy', '--flush', '-C', `${connections}`, '-T', `${connections}`, at('content'), uri());
      expect(firstDifference(await served(format), content)).toBe(-1);
      if (format === 'qcow2') run('qemu-img', ['check', '-q', at('disk')]);
    },
  );

  it('copies from one export into another of the same server, one request at a time', async () => {
    run('qemu-img', ['create', '-q', '-f', 'raw', at('disk'), String(LENGTH)]);
    const [from, to] = [await open('content', 'raw', true), await open('disk', 'raw')];
    server = await engine.serveNbd({
      listen: `unix:${at('socket')}`,
      exports: [
        { disk: from, name: 'from' },
        { disk: to, name: 'to' },
      ],
    });
    await tool('nbdcopy', '--synchronous', uri('from'), uri('to'));
    expect(firstDifference(await served('raw'), content)).toBe(-1);
  });
});

describe.skipIf(!hasPeer('nbdinfo') || !hasPeer('qemu-img'))('nbdinfo', () => {
  it('sees what there is', async () => {
    run('qemu-img', ['create', '-q', '-f', 'qcow2', at('disk'), String(LENGTH)]);
    run('qemu-img', ['bitmap', '--add', at('disk'), 'monday']);
    const [writable, readOnly] = [await open('disk', 'qcow2'), await open('content', 'raw', true)];
    server = await engine.serveNbd({
      listen: `unix:${at('socket')}`,
      exports: [
        { disk: writable, name: 'disk', description: 'a drive' },
        { disk: readOnly, name: 'ö /%' },
      ],
    });
    const list = JSON.parse(await tool('nbdinfo', '--json', '--list', uri()));
    expect(list).toMatchObject({
      protocol: 'newstyle-fixed',
      TLS: false,
      structured: true,
      exports: [
        {
          'export-name': 'disk',
          description: 'a drive',
          'export-size': LENGTH,
          is_read_only: false,
          can_multi_conn: true,
          can_fua: true,
          can_flush: true,
          can_trim: true,
          can_zero: true,
          can_fast_zero: true,
          can_df: true,
          can_cache: true,
          contexts: ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:monday'],
          block_size_minimum: 1,
          block_size_preferred: 4096,
          block_size_maximum: 32 << 20,
        },
        { 'export-name': 'ö /%', is_read_only: true, can_multi_conn: true, can_trim: false },
      ],
    });
  });

  it('sees holes and data', async () => {
    await serve('raw', true);
    const map = JSON.parse(await tool('nbdinfo', '--json', '--map', uri()));
    const own = JSON.parse(run('qemu-img', ['map', '-f', 'raw', '-U', '--output', 'json', at('disk')]));
    expect(map.map(({ offset, length, type }: never) => [offset, length, type === 3])).toEqual(
      own.map(({ start, length, zero }: { start: number; length: number; zero: boolean }) => [
        start,
        length,
        zero,
      ]),
    );
  });

  it.each([true, false])('sees dirty bitmaps and depths (read-only: %s)', async (readOnly) => {
    rmSync(at('disk'), { force: true });
    run('qemu-img', ['create', '-q', '-f', 'raw', at('base'), String(LENGTH)]);
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', at('base'), '-F', 'raw', at('disk')]);
    run('qemu-img', ['bitmap', '--add', '-g', '64k', at('disk'), 'monday']);
    run('qemu-io', ['-f', 'qcow2', '-c', 'write 1M 128k', '-c', 'write 9M 64k', at('disk')]);
    run('qemu-img', ['bitmap', '--disable', at('disk'), 'monday']);
    const disk = await open('disk', 'qcow2', readOnly);
    server = await engine.serveNbd({ listen: `unix:${at('socket')}`, exports: [{ disk }] });
    const lines = async (context: string) =>
      (await tool('nbdinfo', `--map=${context}`, uri()))
        .trim()
        .split('\n')
        .map((line) => line.trim().split(/\s+/).slice(0, 3).map(Number));
    const places = [1 << 20, 128 << 10, 9 << 20, 64 << 10] as const;
    const [first, firstLength, second, secondLength] = places;
    const expected = (clean: number, dirty: number) => [
      [0, first, clean],
      [first, firstLength, dirty],
      [first + firstLength, second - first - firstLength, clean],
      [second, secondLength, dirty],
      [second + secondLength, LENGTH - second - secondLength, clean],
    ];
    expect(await lines('qemu:dirty-bitmap:monday')).toEqual(expected(0, 1));
    expect(await lines('qemu:allocation-depth')).toEqual(expected(2, 1));
  });
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))("QEMU's tools", () => {
  it.each(FORMATS)('convert from and to a %s image', async (format) => {
    await serve(format, true);
    await tool('qemu-img', 'convert', '-f', 'raw', '-O', 'qcow2', uri(), at('converted'));
    await tool('qemu-img', 'compare', '-f', 'raw', '-F', 'qcow2', at('content'), at('converted'));
    await tool('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', at('content'), uri());
    await server?.close();
    for (const disk of disks.splice(0)) await disk.close();
    await serve(format, false);
    await tool('qemu-img', 'convert', '-n', '-W', '-f', 'raw', '-O', 'raw', at('content'), uri());
    expect(firstDifference(await served(format), content)).toBe(-1);
  });

  it.each(FORMATS)('write, zero and discard on a %s image', async (format) => {
    await serve(format, true);
    const steps = [
      'write -P 17 12345 70001',
      'write -z 1M 65536',
      'write -z -u 1114112 65536',
      'write -z -n 12M 65536',
      'discard 2M 65536',
      'write -f -P 3 2M 512',
      'aio_write -P 4 5M 1M',
      'aio_write -P 5 6M 1M',
      'aio_flush',
      'flush',
      'read -P 17 12345 70001',
      'read -P 0 1M 131072',
      'read -P 4 5M 1M',
      'read -P 5 6M 1M',
    ];
    const said = await tool('qemu-io', '-f', 'raw', ...steps.flatMap((step) => ['-c', step]), uri());
    expect(said).not.toMatch(/fail|error/i);
    const expected = Buffer.from(content);
    expected
      .fill(17, 12345, 12345 + 70001)
      .fill(0, 1 << 20, (1 << 20) + 131072)
      .fill(0, 12 << 20, (12 << 20) + 65536);
    expected.fill(0, 2 << 20, (2 << 20) + 65536).fill(3, 2 << 20, (2 << 20) + 512);
    expected.fill(4, 5 << 20, 6 << 20).fill(5, 6 << 20, 7 << 20);
    expect(firstDifference(await served(format), expected)).toBe(-1);
  });
});

describe.skipIf(!hasPeer('nbdsh') || !hasPeer('qemu-img'))('nbdsh without its own checks', () => {
  const script = `
import errno, nbd
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri("URI")
size = h.get_size()
def refused(call, *wanted):
    try:
        call()
    except nbd.Error as e:
        assert e.errnum in wanted, e.string
        return
    raise AssertionError("not refused")
h.pwrite(b"x" * 1000, 5, nbd.CMD_FLAG_FUA)
assert h.pread(1002, 4)[1:1001] == b"x" * 1000
refused(lambda: h.pread(2, size - 1), errno.EINVAL)
refused(lambda: h.pwrite(b"xx", size - 1), errno.ENOSPC)
refused(lambda: h.zero(2, size - 1), errno.ENOSPC)
refused(lambda: h.trim(2, size - 1), errno.EINVAL)
refused(lambda: h.cache(2, size - 1), errno.EINVAL)
refused(lambda: h.block_status(0, 0, lambda *args: 0), errno.EINVAL)
refused(lambda: h.pread(512, 0, nbd.CMD_FLAG_NO_HOLE), errno.EINVAL)
refused(lambda: h.pwrite(b"x", 0, nbd.CMD_FLAG_DF), errno.EINVAL)
refused(lambda: h.flush(nbd.CMD_FLAG_REQ_ONE), errno.EINVAL)
h.pread(512, 0, nbd.CMD_FLAG_FUA)
h.flush(nbd.CMD_FLAG_FUA)
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
try:
    h.zero(65536, 131072, nbd.CMD_FLAG_FAST_ZERO)
except nbd.Error as e:
    assert e.errnum == errno.ENOTSUP
pieces = []
def chunk(data, offset, status, err):
    pieces.append((offset, len(data), status))
h.pread_structured(4 << 20, 1 << 20, chunk)
assert (3 << 20, 2 << 20, nbd.READ_HOLE) in pieces and sum(p[1] for p in pieces) == 4 << 20, pieces
pieces.clear()
h.pread_structured(4 << 20, 1 << 20, chunk, nbd.CMD_FLAG_DF)
assert [p[:2] for p in pieces if p[2] == nbd.READ_DATA] == [(1 << 20, 4 << 20)], pieces
extents = []
h.block_status(size - 1, 1, lambda c, o, e, err: extents.append((c, o, e)), nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 1 and len(extents[0][2]) == 2, extents
h.shutdown()
`;
  it.each(FORMATS)('agrees with a %s image', async (format) => {
    await serve(format, true);
    // The system's Python has the library, whatever else there is.
    await tool('env', 'PATH=/usr/bin:/bin', 'nbdsh', '-c', script.replace('URI', uri()));
    await server?.close();
  });
});

describe.skipIf(!hasPeer('fio'))('fio', () => {
  it.each(FORMATS)('finds what it has written to a %s image', async (format) => {
    await serve(format, false);
    await tool(
      'fio',
      '--name=verify',
      '--ioengine=nbd',
      `--uri=${uri()}`,
      '--rw=randrw',
      '--bsrange=512-64k',
      '--bs_unaligned',
      '--iodepth=32',
      `--size=${LENGTH}`,
      '--verify=crc32c',
      '--verify_fatal=1',
      '--verify_state_save=0',
      '--randseed=7',
      '--fsync=64',
      '--minimal',
    );
    await served(format);
    if (format === 'qcow2') run('qemu-img', ['check', '-q', at('disk')]);
  });
});

describe('our own client', () => {
  it('reads dirty bitmaps, writes, and speaks extended headers', async () => {
    run('qemu-img', ['create', '-q', '-f', 'raw', at('disk'), String(LENGTH)]);
    await serve('raw', false);
    const mirror = await engine.openDisk(uri(), { format: 'raw' });
    try {
      for (let done = 0; done < LENGTH; done += 1 << 20) {
        await mirror.write(done, content.subarray(done, done + (1 << 20)));
      }
      await mirror.writeZeroes(3 << 20, 1 << 20, { unmap: true });
      await mirror.flush();
      expect(firstDifference(await mirror.read(0, LENGTH), content)).toBe(-1);
      expect(server?.connections).toBeGreaterThan(0);
    } finally {
      await mirror.close();
    }
    const source = await engine.openDisk(uri(), { format: 'raw', readOnly: true });
    try {
      const job = await source.backup({ target: at('backup'), format: 'qcow2', sync: 'full' });
      await job.result();
    } finally {
      await source.close();
    }
    run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', at('content'), at('backup')]);
  });
});
