/**
 * What the contract of a node promises, checked for every driver with random requests against a model in memory.
 */
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type CreateImageOptions, createImage } from '#src/block/create.js';
import { DISK_CONTROL_BYTES } from '#src/block/disk.js';
import { NO_LIMITS } from '#src/block/filters/blkdebug.js';
import { setLimits, THROTTLE_GROUP_BYTES } from '#src/block/filters/throttle.js';
import { changeLimits, UNLIMITED } from '#src/block/filters/throttle-limits.js';
import { attachNode, closeLayer, closeNode, openImage } from '#src/block/graph.js';
import { openNodeLayer } from '#src/block/layers.js';
import {
  type BlockNode,
  type NodeDescriptor,
  STATUS_ALLOCATED,
  STATUS_DATA,
  STATUS_ZERO,
} from '#src/block/node.js';
import { openFile } from '#src/block/raw/file.js';
import { chainStatus } from '#src/block/status.js';
import { createRuntime } from '#src/kernels/runtime.js';
import { firstDifference, Random } from '../support/data.js';
import { nbdkit, qemuNbd, type Server } from '../support/nbd.js';
import { hasPeer, run } from '../support/peers.js';

const runtime = createRuntime(96 << 20);
const { arena } = runtime;
const BUFFER_BYTES = 4 << 20;
const buffer = arena.alloc(BUFFER_BYTES + 4096, 'test buffer');
const mask = buffer + BUFFER_BYTES;
const folder = mkdtempSync(join(tmpdir(), 'stillframe-nodes-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

interface Driver {
  readonly name: string;
  readonly length: number;
  readonly image?: Partial<CreateImageOptions> & { readonly format: 'raw' | 'qcow2' };
  /** Bytes of the backing image; none without. */
  readonly backing?: number;
  readonly backingFormat?: 'raw' | 'qcow2';
  /** Nodes on the file (made by `image`), one on the other, the last one on top. */
  readonly stack?: readonly ((below: NodeDescriptor, readOnly: boolean) => NodeDescriptor)[];
  /** Bytes of the file where they are not those of the drive. */
  readonly fileLength?: number;
  /** Serves the image over NBD: the node is the export's. */
  readonly server?: { readonly peer: 'qemu-nbd' | 'nbdkit'; readonly start: (path: string) => Server };
}

const qemu = (...args: string[]): NonNullable<Driver['server']> => ({
  peer: 'qemu-nbd',
  start: (path) => qemuNbd([...args, '-f', 'raw', '--discard=unmap', path]),
});
const kit = (args: readonly string[], ...parameters: string[]): NonNullable<Driver['server']> => ({
  peer: 'nbdkit',
  start: (path) => nbdkit([...args, 'file', path, ...parameters]),
});

type Above = NonNullable<Driver['stack']>[number];

const raw =
  (part: { readonly offset?: number; readonly size?: number } = {}): Above =>
  (file, readOnly) =>
    openNodeLayer(runtime, { driver: 'raw', file, readOnly, ...part });
const qcow2: Above = (file, readOnly) =>
  openNodeLayer(runtime, { driver: 'qcow2', file, readOnly, backing: undefined, dataFile: undefined });
const blkdebug: Above = (child) =>
  openNodeLayer(runtime, { driver: 'blkdebug', child, rules: [], limits: NO_LIMITS });
const compress: Above = (child) => openNodeLayer(runtime, { driver: 'compress', child });
const preallocate: Above = (child) =>
  openNodeLayer(runtime, { driver: 'preallocate', child, size: 300_000, align: 4096 });
/** The group and the control block are there from the beginning, so that they are no leak. */
const group = arena.alloc(THROTTLE_GROUP_BYTES, 'throttle group');
setLimits(
  runtime,
  group,
  changeLimits(UNLIMITED, (name) => (name === 'iops-total' ? 1_000_000 : undefined)),
);
const throttle: Above = (child) => openNodeLayer(runtime, { driver: 'throttle', child, group, member: 0 });
const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
let disks = 0;
const live: Above = (node, readOnly) => {
  const { path } = node;
  const { length } = attachNode(runtime, node);
  disks++;
  const disk = { id: disks, control, node, length, readOnly, discard: 'unmap' } as const;
  return { driver: 'live', path, readOnly, length, disk };
};

const drivers: readonly Driver[] = [
  { name: 'file', length: 1_000_000 },
  { name: 'raw', length: 1_000_448, image: { format: 'raw' } },
  { name: 'qcow2', length: 3 << 20, image: { format: 'qcow2' } },
  { name: 'qcow2 with an odd tail', length: (3 << 20) + 512, image: { format: 'qcow2' } },
  {
    name: 'qcow2 over raw',
    length: 3 << 20,
    image: { format: 'qcow2' },
    backing: 3 << 20,
    backingFormat: 'raw',
  },
  {
    name: 'qcow2 over a shorter qcow2',
    length: 3 << 20,
    image: { format: 'qcow2', clusterSize: 4096 },
    backing: 1_000_448,
    backingFormat: 'qcow2',
  },
  {
    name: 'qcow2 over a longer raw',
    length: 1_000_448,
    image: { format: 'qcow2' },
    backing: 3 << 20,
    backingFormat: 'raw',
  },
  {
    name: 'qcow2 with 512-byte clusters',
    length: 1 << 20,
    image: { format: 'qcow2', clusterSize: 512 },
    backing: 700_000,
    backingFormat: 'raw',
  },
  {
    name: 'qcow2 with 2 MiB clusters',
    length: 9 << 20,
    image: { format: 'qcow2', clusterSize: 2 << 20 },
    backing: 5 << 20,
    backingFormat: 'raw',
  },
  { name: 'qcow2 version 2', length: 2 << 20, image: { format: 'qcow2', version: 2, clusterSize: 8192 } },
  {
    name: 'qcow2 version 2 over raw',
    length: 2 << 20,
    image: { format: 'qcow2', version: 2 },
    backing: 1_500_160,
    backingFormat: 'raw',
  },
  ...([1, 2, 4, 8, 32, 64] as const).map(
    (refcountBits): Driver => ({
      name: `qcow2 with ${refcountBits}-bit refcounts`,
      length: 1 << 20,
      image: { format: 'qcow2', refcountBits, clusterSize: 1024 },
    }),
  ),
  { name: 'raw over qemu-nbd', length: 1_000_448, image: { format: 'raw' }, server: qemu('-e', '4') },
  { name: 'raw over qemu-nbd, one connection', length: 1_000_448, image: { format: 'raw' }, server: qemu() },
  { name: 'raw over nbdkit', length: 1_000_448, image: { format: 'raw' }, server: kit([]) },
  {
    name: 'raw over nbdkit with large blocks',
    length: 1_048_576 + 65536,
    image: { format: 'raw' },
    server: kit(
      ['--filter=blocksize-policy'],
      ...['minimum', 'preferred'].map((size) => `blocksize-${size}=65536`),
      'blocksize-maximum=128K',
      'blocksize-error-policy=error',
    ),
  },
  {
    name: 'raw over nbdkit without structured replies',
    length: 1_000_448,
    image: { format: 'raw' },
    server: kit(['--no-sr']),
  },
  {
    name: 'raw over nbdkit without zeroes and extents, one connection',
    length: 1_000_448,
    image: { format: 'raw' },
    server: kit(['--filter=nozero', '--filter=noextents', '--filter=noparallel'], 'serialize=connections'),
  },
  {
    name: 'raw over the oldest handshake',
    length: 1_000_448,
    image: { format: 'raw' },
    server: kit(['--mask-handshake=0']),
  },
  { name: 'qcow2 over qemu-nbd', length: 3 << 20, image: { format: 'qcow2' }, server: qemu('-e', '4') },
  {
    name: 'qcow2 over nbdkit with large blocks',
    length: 3 << 20,
    image: { format: 'qcow2', clusterSize: 4096 },
    server: kit(['--filter=blocksize-policy'], 'blocksize-minimum=4096', 'blocksize-error-policy=error'),
  },
  { name: 'a live disk below another node', length: 1_000_448, stack: [raw(), live] },
  {
    name: 'a live qcow2 below another node',
    length: 3 << 20,
    image: { format: 'qcow2' },
    stack: [qcow2, live],
  },
  { name: 'throttle over qcow2', length: 3 << 20, image: { format: 'qcow2' }, stack: [qcow2, throttle] },
  { name: 'qcow2 over blkdebug', length: 3 << 20, image: { format: 'qcow2' }, stack: [blkdebug, qcow2] },
  { name: 'raw over throttle over blkdebug', length: 1_000_448, stack: [blkdebug, throttle, raw()] },
  { name: 'compress over qcow2', length: 3 << 20, image: { format: 'qcow2' }, stack: [qcow2, compress] },
  {
    name: 'qcow2 over preallocate',
    length: 3 << 20,
    image: { format: 'qcow2' },
    stack: [preallocate, qcow2],
  },
  {
    name: 'qcow2 over preallocate over a live file',
    length: 3 << 20,
    image: { format: 'qcow2' },
    stack: [raw(), live, preallocate, qcow2],
  },
  {
    name: 'qcow2 over throttle over preallocate over a live file',
    length: 3 << 20,
    image: { format: 'qcow2' },
    stack: [raw(), live, preallocate, throttle, qcow2],
  },
  {
    name: 'qcow2 over throttle over a live file',
    length: 3 << 20,
    image: { format: 'qcow2' },
    stack: [raw(), live, throttle, qcow2],
  },
  {
    name: 'qcow2 over throttle over a live preallocate',
    length: 3 << 20,
    image: { format: 'qcow2' },
    stack: [preallocate, live, throttle, qcow2],
  },
  { name: 'raw over preallocate', length: 1_000_448, stack: [preallocate, raw()] },
  {
    name: 'a part of a raw file',
    length: 1_000_448,
    fileLength: 2 << 20,
    stack: [raw({ offset: 4608, size: 1_000_448 })],
  },
];
/** What a qcow2 image can take at most: an export does not grow. */
const CONTAINER_BYTES = 16 << 20;

function fail(): never {
  throw new Error('invariant: there is a node');
}

describe.each(drivers)('$name', (driver) => {
  const path = join(folder, 'image');
  let server: Server | undefined;
  let descriptor: NodeDescriptor;
  let node: BlockNode;
  let model: Buffer;

  let close = (): void => undefined;

  function open(readOnly: boolean): void {
    if (driver.stack !== undefined) {
      const nodes: NodeDescriptor[] = [
        openFile(runtime, path, { readOnly, lock: readOnly ? 'read' : 'write' }),
      ];
      for (const above of driver.stack) nodes.unshift(above(nodes[0] ?? fail(), readOnly));
      close = () => {
        for (const one of nodes) closeLayer(runtime, one);
      };
      descriptor = nodes[0] ?? fail();
      node = attachNode(runtime, descriptor);
      return;
    }
    close = () => closeNode(runtime, descriptor);
    descriptor =
      driver.image === undefined
        ? openFile(runtime, path, { readOnly, lock: readOnly ? 'read' : 'write' })
        : openImage(runtime, server?.uri() ?? path, { format: driver.image.format, readOnly });
    node = attachNode(runtime, descriptor);
  }

  function write(offset: number, bytes: Uint8Array): void {
    arena.u8.set(bytes, buffer);
    node.write(offset, buffer, bytes.length);
    model.set(bytes, offset);
  }

  function read(offset: number, length: number): Buffer {
    const parts: Uint8Array[] = [];
    for (let done = 0; done < length; done += BUFFER_BYTES) {
      const bytes = Math.min(BUFFER_BYTES, length - done);
      arena.u8.fill(0xee, buffer, buffer + bytes);
      node.read(offset + done, buffer, bytes);
      parts.push(arena.copyOut(buffer, bytes));
    }
    return Buffer.concat(parts);
  }

  const expectModel = (): void => expect(firstDifference(read(0, driver.length), model)).toBe(-1);

  let usedBefore: number;
  beforeEach((context) => {
    rmSync(folder, { recursive: true, force: true });
    run('mkdir', ['-p', folder]);
    model = Buffer.alloc(driver.length);
    usedBefore = arena.usedBytes;
    if (driver.server !== undefined && !hasPeer(driver.server.peer)) context.skip();
    if (driver.backing !== undefined) {
      const bytes = new Random(driver.backing).bytes(driver.backing);
      writeFileSync(join(folder, 'content'), bytes);
      model.set(bytes.subarray(0, driver.length));
      if (driver.backingFormat === 'qcow2') {
        createImage(runtime, join(folder, 'backing'), { format: 'qcow2', length: driver.backing });
        const below = openImage(runtime, join(folder, 'backing'), { format: 'qcow2', readOnly: false });
        arena.u8.set(bytes, buffer);
        attachNode(runtime, below).write(0, buffer, bytes.length);
        closeNode(runtime, below);
      } else {
        writeFileSync(join(folder, 'backing'), bytes);
      }
    }
    if (driver.image === undefined) {
      writeFileSync(path, new Uint8Array(driver.fileLength ?? driver.length));
    } else {
      createImage(runtime, path, {
        ...driver.image,
        length: driver.length,
        ...(driver.backing === undefined
          ? {}
          : { backingFile: 'backing', backingFormat: driver.backingFormat }),
      });
    }
    if (driver.server !== undefined) {
      if (driver.image?.format === 'qcow2') truncateSync(path, CONTAINER_BYTES);
      server = driver.server.start(path);
    }
    open(false);
    return () => server?.stop();
  });
  afterEach(() => {
    close();
    expect(arena.usedBytes, 'memory given back').toBe(usedBefore);
  });

  it('has the length of the image and reads what it holds', () => {
    expect(node.length).toBe(driver.length);
    expectModel();
  });

  it.each([1, 2, 3])('agrees with a model under random requests, seed %d', (seed) => {
    const random = new Random(seed * 1000 + driver.length);
    for (let request = 0; request < 250; request++) {
      const offset = random.between(0, driver.length - 1);
      const aligned = random.chance(0.4);
      const start = aligned ? offset - (offset % 4096) : offset;
      const most = Math.min(driver.length - start, random.pick([10, 5000, 100_000, 1_000_000]));
      const length = random.between(1, most);
      const kind = random.next();
      if (kind < 0.4) {
        write(start, random.bytes(length));
      } else if (kind < 0.6) {
        node.writeZeroes(start, length, random.chance(0.5));
        model.fill(0, start, start + length);
      } else if (kind < 0.75) {
        node.discard(start, length);
        const found = read(start, length);
        for (let at = 0; at < length; at++) {
          // Old or zero; what it became is the truth from here on.
          if (found[at] !== 0 && found[at] !== model[start + at]) {
            throw new Error(`discard made byte ${start + at} ${found[at]}`);
          }
        }
        found.copy(model, start);
      } else if (kind < 0.95) {
        expect(firstDifference(read(start, length), model.subarray(start, start + length))).toBe(-1);
      } else if (kind < 0.98) {
        node.flush();
      } else {
        close();
        open(false);
      }
    }
    expectModel();
    if (driver.image?.format === 'qcow2' && hasPeer('qemu-img')) {
      close();
      server?.stop();
      run('qemu-img', ['check', '-q', path]);
      writeFileSync(join(folder, 'model'), model);
      run('qemu-img', ['compare', '-q', '-F', 'raw', path, join(folder, 'model')]);
      server = driver.server?.start(path);
      open(true);
      expectModel();
    }
  });

  it('says the truth of every range', () => {
    const random = new Random(driver.length);
    for (let index = 0; index < 30; index++) {
      const offset = random.between(0, driver.length - 1);
      const length = random.between(1, Math.min(300_000, driver.length - offset));
      if (random.chance(0.6)) write(offset, random.bytes(length));
      else {
        node.writeZeroes(offset, length, true);
        model.fill(0, offset, offset + length);
      }
    }
    node.flush();
    const file = readFileSync(path);
    for (let offset = 0; offset < driver.length; ) {
      const wanted = Math.min(driver.length - offset, random.between(1, 1_000_000));
      const extent = chainStatus(node, offset, wanted);
      expect(extent.length).toBeGreaterThan(0);
      expect(extent.length).toBeLessThanOrEqual(wanted);
      const bytes = model.subarray(offset, offset + extent.length);
      if (extent.flags & STATUS_ZERO) expect(bytes.every((byte) => byte === 0)).toBe(true);
      if (!(extent.flags & STATUS_ALLOCATED)) expect(extent.flags).toBe(STATUS_ZERO);
      if (extent.flags & STATUS_DATA && extent.depth === 0 && extent.hostOffset >= 0) {
        const place = file.subarray(extent.hostOffset, extent.hostOffset + extent.length);
        expect(firstDifference(place, bytes)).toBe(-1);
      }
      offset += extent.length;
    }
  });

  it('writes units and leaves out those to skip', () => {
    const random = new Random(5);
    for (let round = 0; round < 30; round++) {
      const unit = Math.max(node.clusterSize ?? 512, 2 ** random.between(9, 17));
      if (unit > BUFFER_BYTES / 2) continue;
      const units = Math.ceil(driver.length / unit);
      const first = random.between(0, units - 1);
      const count = random.between(1, Math.min(units - first, BUFFER_BYTES / unit, 2000));
      const length = Math.min(count * unit, driver.length - first * unit);
      const bytes = random.noise(length);
      arena.u8.set(bytes, buffer);
      for (let index = 0; index < count; index++) {
        const skip = random.chance(0.4);
        const word = (mask >> 2) + (index >> 5);
        const bit = 1 << (index & 31);
        arena.u32[word] = skip ? (arena.u32[word] ?? 0) | bit : (arena.u32[word] ?? 0) & ~bit;
        const end = Math.min((index + 1) * unit, length);
        if (!skip) model.set(bytes.subarray(index * unit, end), first * unit + index * unit);
      }
      node.writeUnits(first * unit, buffer, length, unit, mask);
    }
    expectModel();
  });

  it.each<[string, (offset: number, length: number) => void]>([
    ['read', (offset, length) => node.read(offset, buffer, length)],
    ['write', (offset, length) => node.write(offset, buffer, length)],
    ['writeZeroes', (offset, length) => node.writeZeroes(offset, length, true)],
    ['discard', (offset, length) => node.discard(offset, length)],
  ])('%s of nothing changes nothing; beyond the end it is refused', (_, request) => {
    request(0, 0);
    request(driver.length, 0);
    if (driver.image !== undefined) {
      const refused = expect.objectContaining({ code: 'ERR_STILLFRAME_OUT_OF_RANGE' });
      expect(() => request(driver.length - 1, 2)).toThrow(refused);
      expect(() => request(driver.length + 512, 1)).toThrow(refused);
      expect(() => request(-1, 2)).toThrow(refused);
    }
    expectModel();
  });

  it('refuses changes when it is read-only', () => {
    close();
    open(true);
    expect(node.readOnly).toBe(true);
    const refused = expect.objectContaining({ code: 'ERR_STILLFRAME_READ_ONLY' });
    expect(() => node.write(0, buffer, 512)).toThrow(refused);
    expect(() => node.writeZeroes(0, 512, true)).toThrow(refused);
    expect(() => node.discard(0, 512)).toThrow(refused);
    node.flush();
    expectModel();
  });

  it('keeps what it wrote when it is opened again', () => {
    write(0, new Random(1).bytes(100_000));
    write(driver.length - 3000, new Random(2).bytes(3000));
    node.writeZeroes(50_000, 20_000, true);
    model.fill(0, 50_000, 70_000);
    close();
    open(true);
    expectModel();
  });
});
