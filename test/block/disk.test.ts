/** A live disk with several threads: what the instant waits for, and what waits for the instant. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Worker } from 'node:worker_threads';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BITMAP_SET_BYTES } from '#src/bitmap/bitmap-set.js';
import { DISK_BITMAPS, DISK_CONTROL_BYTES, type DiskDescriptor } from '#src/block/disk.js';
import { FRAME_CONTROL_BYTES, type FrameDescriptor } from '#src/block/filters/copy-before-write.js';
import { closeNode, openImage } from '#src/block/graph.js';
import type { RawDescriptor } from '#src/block/node.js';
import { createRuntime } from '#src/kernels/runtime.js';

const { shared, arena, kernels } = createRuntime(128 << 20);
const runtime = { arena, kernels };
const CLUSTER = 65536;
const CLUSTERS = 8;
let folder: string;
let source: RawDescriptor;
let target: RawDescriptor;
let disk: DiskDescriptor;
let frame: FrameDescriptor;
let threads: Thread[] = [];
/** Words threads wait on: 0 closed, 1 open. */
let gates: number;

/** A thread with its own facades, told what to do by a snippet that sees `disk`, `frame` and `pass(gate)`. */
class Thread {
  readonly #worker: Worker;
  readonly events: string[] = [];
  #failure: unknown;

  constructor(body: string) {
    const url = (path: string): string => new URL(`../../dist/${path}`, import.meta.url).href;
    const script = `
      const { parentPort, workerData } = require('node:worker_threads');
      const say = (event) => parentPort.postMessage(event);
      (async () => {
        const { attachRuntime } = await import('${url('kernels/runtime.js')}');
        const { Disk } = await import('${url('block/disk.js')}');
        const { SnapshotAccess } = await import('${url('block/filters/snapshot-access.js')}');
        const { CopyBuffer } = await import('${url('block/filters/copy-before-write.js')}');
        const runtime = attachRuntime(workerData.shared);
        const { arena } = runtime;
        const { frame, gates } = workerData;
        const buffer = new CopyBuffer(runtime);
        const disk = new Disk(runtime, workerData.disk, () => buffer);
        const pass = (gate) => { Atomics.wait(arena.i32, (gates >> 2) + gate, 0); };
        const data = arena.alloc(${CLUSTER}, 'data of a guest');
        const fill = (value) => { arena.u8.fill(value, data, data + ${CLUSTER}); return data; };
        ${body}
        say('end');
      })();`;
    this.#worker = new Worker(script, { eval: true, workerData: { shared, disk, frame, gates } });
    this.#worker.on('message', (event: string) => this.events.push(event));
    this.#worker.on('error', (error) => {
      this.#failure = error;
    });
    threads.push(this);
  }

  async said(event: string): Promise<void> {
    for (let tries = 0; !this.events.includes(event); tries++) {
      if (this.#failure !== undefined) throw this.#failure;
      if (tries > 2000) throw new Error(`a thread never said '${event}', only ${this.events.join(', ')}`);
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
  }

  /** Lets it come to its end: what it was in the middle of, a lock that others need included, nobody would give back. */
  async stop(): Promise<void> {
    for (
      let tries = 0;
      tries < 2000 && !this.events.includes('end') && this.#failure === undefined;
      tries++
    ) {
      await new Promise((resolve) => setTimeout(resolve, 2));
    }
    await this.#worker.terminate();
  }
}

const open = (gate: number): void => {
  Atomics.store(arena.i32, (gates >> 2) + gate, 1);
  Atomics.notify(arena.i32, (gates >> 2) + gate);
};
/** A drain has begun: new requests wait from here on. */
const drained = async (): Promise<void> => {
  while (Atomics.load(arena.i32, (disk.control + 12) >> 2) === 0) {
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
};
const aWhile = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 60));

function openRaw(name: string, byte: number): RawDescriptor {
  writeFileSync(join(folder, name), new Uint8Array(CLUSTER * CLUSTERS).fill(byte));
  const node = openImage(runtime, join(folder, name), { format: 'raw', readOnly: false });
  if (node.driver !== 'raw') throw new Error('not raw');
  return node;
}

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'stillframe-disk-'));
  source = openRaw('source', 1);
  target = openRaw('target', 0);
  const length = CLUSTER * CLUSTERS;
  const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
  disk = { id: 1, control, node: source, length, readOnly: false, discard: 'unmap' };
  gates = arena.alloc(64, 'gates');
  frame = {
    id: 2,
    control: arena.alloc(FRAME_CONTROL_BYTES, 'frame'),
    states: arena.alloc(64, 'states'),
    target,
    length,
    clusterSize: CLUSTER,
    clusters: CLUSTERS,
    targetReadsZero: true,
    skipUnallocated: false,
    compress: false,
    onCbwError: 'break-guest-write',
    owner: arena.alloc(64, 'owner'),
  };
});
afterEach(async () => {
  for (let gate = 0; gate < 8; gate++) open(gate);
  await Promise.all(threads.map((thread) => thread.stop()));
  threads = [];
  closeNode(runtime, source);
  closeNode(runtime, target);
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const firstBytes = (name: string): number[] => {
  const bytes = readFileSync(join(folder, name));
  return Array.from({ length: CLUSTERS }, (_, cluster) => bytes[cluster * CLUSTER] ?? -1);
};
const slowWrite = (what: string) => `
  const ${what} = disk.node.${what}.bind(disk.node);
  disk.node.${what} = (...args) => { say('in'); pass(0); ${what}(...args); };`;

describe('an instant', () => {
  it.each([
    ['write', `disk.write(${CLUSTER}, fill(2), ${CLUSTER});`],
    ['writeZeroes', `disk.writeZeroes(${CLUSTER}, ${CLUSTER}, false);`],
    ['discard', `disk.discard(${CLUSTER}, ${CLUSTER});`],
  ])('comes after the requests in flight: %s', async (what, request) => {
    const guest = new Thread(`${slowWrite(what)} ${request}`);
    await guest.said('in');
    const job = new Thread(`disk.addFrame(frame); say('armed'); pass(1);`);
    await aWhile();
    expect(job.events).toEqual([]);
    open(0);
    await guest.said('end');
    await job.said('armed');
    // It was over before the instant: nothing of it was saved.
    expect(firstBytes('target')).toEqual(new Array(CLUSTERS).fill(0));
    expect(firstBytes('source')[1]).not.toBe(1);
  });

  it('comes before the requests made while it waits: they are saved from', async () => {
    const guest = new Thread(`${slowWrite('write')} disk.write(0, fill(2), 512);`);
    await guest.said('in');
    const job = new Thread(`disk.addFrame(frame); say('armed'); pass(1);`);
    await drained();
    const late = new Thread(`say('ready'); disk.write(${3 * CLUSTER + 5}, fill(3), 10); say('written');`);
    await late.said('ready');
    await aWhile();
    expect(late.events).toEqual(['ready']);
    open(0);
    await job.said('armed');
    await late.said('written');
    expect(firstBytes('target')).toEqual([0, 0, 0, 1, 0, 0, 0, 0]);
    expect(readFileSync(join(folder, 'source'))[3 * CLUSTER + 5]).toBe(3);
  });
});

it('does not keep whoever holds the others off from the disk itself', async () => {
  const holder = new Thread(`
    disk.drained(() => {
      disk.undisturbed(0, 512, (node) => node.read(0, data, 512));
      say('read ' + arena.u8[data]);
      disk.write(${CLUSTER}, fill(2), ${CLUSTER});
    });`);
  await holder.said('end');
  expect(holder.events).toEqual(['read 1', 'end']);
  expect(firstBytes('source')).toEqual([1, 2, 1, 1, 1, 1, 1, 1]);
});

describe('a change of what a disk lies on', () => {
  const changed = '{ ...disk.descriptor, node: frame.target }';
  /** A thread that puts the disk on the target once nobody uses it, and not before a gate is open. */
  const changer = (gate: number): Thread =>
    new Thread(
      `say('asks'); disk.exclusive(() => { say('alone'); pass(${gate}); disk.changeRoot(${changed}); });`,
    );
  /** Somebody has begun to make one: whoever comes later has to wait. */
  const begun = async (): Promise<void> => {
    const word = disk.control + DISK_BITMAPS + BITMAP_SET_BYTES + 4;
    while (Atomics.load(arena.i32, word >> 2) === 0) await new Promise((resolve) => setTimeout(resolve, 2));
    await aWhile();
  };

  it('waits for those who read', async () => {
    const reader = new Thread(`
      const read = disk.node.read.bind(disk.node);
      disk.node.read = (...args) => { say('in'); pass(0); read(...args); };
      disk.read(0, data, 512); say('read ' + arena.u8[data]);`);
    await reader.said('in');
    const change = changer(1);
    await begun();
    expect(change.events).toEqual(['asks']);
    open(0);
    await change.said('alone');
    expect(reader.events).toContain('read 1');
  });

  it('waits for writes in flight; those that come later are on what it lies on then', async () => {
    const writer = new Thread(`${slowWrite('write')} disk.write(${CLUSTER}, fill(2), ${CLUSTER});`);
    await writer.said('in');
    const change = changer(1);
    await begun();
    expect(change.events).toEqual(['asks']);
    open(0);
    await change.said('alone');
    const late = new Thread(`say('asks'); disk.write(${2 * CLUSTER}, fill(3), ${CLUSTER});`);
    await late.said('asks');
    await aWhile();
    expect(late.events).toEqual(['asks']);
    open(1);
    await late.said('end');
    expect(firstBytes('source')).toEqual([1, 2, 1, 1, 1, 1, 1, 1]);
    expect(firstBytes('target')).toEqual([0, 0, 3, 0, 0, 0, 0, 0]);
  });

  it('keeps readers out until it is made; they see the other node then', async () => {
    const reader = new Thread(`
      const show = (when) => { disk.read(0, data, 512); say(when + ' ' + arena.u8[data]); };
      show('before'); pass(0); say('asks'); show('after');`);
    await reader.said('before 1');
    const change = changer(1);
    await change.said('alone');
    open(0);
    await reader.said('asks');
    await aWhile();
    expect(reader.events).toEqual(['before 1', 'asks']);
    open(1);
    await reader.said('after 0');
  });

  it('is made by one thread after the other', async () => {
    const first = changer(0);
    await first.said('alone');
    const second = changer(1);
    await second.said('asks');
    await aWhile();
    expect(second.events).toEqual(['asks']);
    open(0);
    await second.said('alone');
    await first.said('end');
    // The end of the first one is none of the second one.
    const reader = new Thread(`say('asks'); disk.read(0, data, 512); say('read');`);
    await reader.said('asks');
    await aWhile();
    expect(reader.events).toEqual(['asks']);
    open(1);
    await reader.said('read');
  });

  it('lets the thread that makes it use the disk', async () => {
    const change = new Thread(`
      disk.exclusive(() => {
        disk.read(0, data, 512); say('read ' + arena.u8[data]);
        disk.changeRoot(${changed});
        disk.read(0, data, 512); say('read ' + arena.u8[data]);
      });`);
    await change.said('end');
    expect(change.events).toEqual(['read 1', 'read 0', 'end']);
  });
});

describe('copy-before-write', () => {
  it('has saved every cluster a request touches before the request reaches the source', async () => {
    const job = new Thread(`disk.addFrame(frame); say('armed'); pass(1);`);
    await job.said('armed');
    for (const [index, request] of [
      `disk.write(${CLUSTER - 1}, fill(2), 2);`,
      `disk.writeZeroes(${3 * CLUSTER + 100}, ${CLUSTER}, true);`,
      `disk.discard(${6 * CLUSTER}, ${2 * CLUSTER});`,
    ].entries()) {
      const what = ['write', 'writeZeroes', 'discard'][index] ?? '';
      Atomics.store(arena.i32, gates >> 2, 0);
      const guest = new Thread(`${slowWrite(what)} ${request}`);
      await guest.said('in');
      // Saved already, and the source is untouched still.
      const saved = [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 1, 1],
      ];
      expect(firstBytes('target')).toEqual(saved[index]);
      const source = readFileSync(join(folder, 'source'));
      const place = [CLUSTER - 1, 3 * CLUSTER + 100, 6 * CLUSTER][index] ?? 0;
      expect(source[place]).toBe(1);
      open(0);
      await guest.said('end');
      expect(readFileSync(join(folder, 'source'))[place]).not.toBe(1);
    }
  });

  it('waits for a cluster that another thread is copying, and only for that one', async () => {
    const job = new Thread(`
      disk.addFrame(frame);
      const bulk = disk.attachFrame(frame);
      const read = disk.node.read.bind(disk.node);
      disk.node.read = (offset, pointer, length) => { say('copying'); pass(0); read(offset, pointer, length); };
      say('armed');
      pass(1);
      bulk.beforeWrite(2 * ${CLUSTER}, ${CLUSTER});`);
    await job.said('armed');
    open(1);
    await job.said('copying');
    const same = new Thread(`say('ready'); disk.write(${2 * CLUSTER + 9}, fill(4), 9); say('written');`);
    const other = new Thread(`disk.write(${5 * CLUSTER}, fill(5), 9); say('written');`);
    await other.said('written');
    await same.said('ready');
    await aWhile();
    expect(same.events).toEqual(['ready']);
    open(0);
    await same.said('written');
    await job.said('end');
    expect(firstBytes('target')).toEqual([0, 0, 1, 0, 0, 1, 0, 0]);
    expect(readFileSync(join(folder, 'target'))[2 * CLUSTER + 9]).toBe(1);
  });

  it.each([
    ['break-guest-write', 'ERR_STILLFRAME_CBW_TIMEOUT', false],
    ['break-snapshot', 'written', true],
  ])('waits no longer than it may, and then does what %s says', async (onCbwError, event, broken) => {
    const job = new Thread(`
      disk.addFrame({ ...frame, cbwTimeoutMs: 60, onCbwError: '${onCbwError}' });
      const bulk = disk.attachFrame(frame);
      const read = disk.node.read.bind(disk.node);
      disk.node.read = (offset, pointer, length) => { say('copying'); pass(0); read(offset, pointer, length); };
      bulk.beforeWrite(0, ${CLUSTER});
      say(bulk.broken ? 'broken' : 'whole');`);
    await job.said('copying');
    const guest = new Thread(`
      try { disk.write(9, fill(4), 9); say('written'); } catch (error) { say(error.code); }
      disk.write(${5 * CLUSTER}, fill(5), 9);`);
    await guest.said(event);
    await guest.said('end');
    open(0);
    await job.said(broken ? 'broken' : 'whole');
    await job.said('end');
    expect(readFileSync(join(folder, 'source'))[9]).toBe(broken ? 4 : 1);
  });

  it('ends when the frame is taken off the disk', async () => {
    const job = new Thread(`disk.addFrame(frame); say('armed'); pass(1); disk.removeFrame(frame.id);`);
    await job.said('armed');
    open(1);
    await job.said('end');
    const guest = new Thread(`disk.write(0, fill(6), 9);`);
    await guest.said('end');
    expect(firstBytes('target')).toEqual(new Array(CLUSTERS).fill(0));
  });
});

describe('the instant', () => {
  it.each([
    ['read', '(offset, pointer, length)', `still.read(0, data, ${CLUSTER});`],
    ['status', '(offset, length)', `still.status(0, ${CLUSTER});`],
  ])('is not changed while its %s is taken from the live disk', async (method, parameters, look) => {
    const reader = new Thread(`
      disk.addFrame(frame);
      const still = new SnapshotAccess(runtime, disk, disk.attachFrame(frame));
      const before = disk.node.${method}.bind(disk.node);
      disk.node.${method} = ${parameters} => { say('looking'); pass(0); return before${parameters}; };
      ${look}
      say(String(data && arena.u8[data]));`);
    await reader.said('looking');
    const guest = new Thread(`say('ready'); disk.discard(0, ${CLUSTER}); say('freed');`);
    const other = new Thread(`disk.discard(${2 * CLUSTER}, ${CLUSTER}); say('freed');`);
    await other.said('freed');
    await guest.said('ready');
    await aWhile();
    expect(guest.events).toEqual(['ready']);
    open(0);
    await guest.said('freed');
    await reader.said('end');
    if (method === 'read') expect(reader.events).toContain('1');
  });
});

describe('overlapping requests', () => {
  it('run one after the other, others side by side', async () => {
    const first = new Thread(`${slowWrite('write')} disk.write(1000, fill(2), 1000); say('written');`);
    await first.said('in');
    const overlapping = new Thread(`say('ready'); disk.write(1999, fill(3), 10); say('written');`);
    const beside = new Thread(`disk.write(2020, fill(4), 10); say('written');`);
    await beside.said('written');
    await overlapping.said('ready');
    await aWhile();
    expect(overlapping.events).toEqual(['ready']);
    open(0);
    await overlapping.said('written');
    expect(readFileSync(join(folder, 'source'))[1999]).toBe(3);
  });
});
