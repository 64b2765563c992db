/** In which order one thread keeps others from several disks: a request of a guest must come to its end. */
import { afterEach, describe, expect, it } from 'vitest';
import { DISK_CONTROL_BYTES, type Disk, type DiskDescriptor } from '#src/block/disk.js';
import { drainOrder } from '#src/block/drain-order.js';
import { FRAME_CONTROL_BYTES } from '#src/block/filters/copy-before-write.js';
import { forgetDisk, liveDisk } from '#src/block/graph.js';
import type { NodeDescriptor } from '#src/block/node.js';
import { createRuntime } from '#src/kernels/runtime.js';

const { arena, kernels } = createRuntime(64 << 20);
const runtime = { arena, kernels };
const common = { path: 'null', readOnly: false, length: 1 << 20 };
const NOTHING: NodeDescriptor = { driver: 'null-co', ...common, readsZero: true, latencyMs: 0 };
const made: number[] = [];

function disk(id: number, node: NodeDescriptor = NOTHING): DiskDescriptor {
  made.push(id);
  const control = arena.alloc(DISK_CONTROL_BYTES, 'disk');
  return { id, control, node, length: common.length, readOnly: false, discard: 'unmap' };
}
const live = (on: DiskDescriptor): NodeDescriptor => ({ driver: 'live', ...common, disk: on });
const attach = (descriptor: DiskDescriptor): Disk => liveDisk(runtime, descriptor);
const order = (...descriptors: readonly DiskDescriptor[]): number[] =>
  drainOrder(runtime, descriptors.map(attach)).map(({ descriptor }) => descriptor.id);

/** Old data of a disk is saved to a node. */
function freeze(source: DiskDescriptor, target: NodeDescriptor): void {
  attach(source).addFrame({
    id: 1000 + source.id,
    control: arena.alloc(FRAME_CONTROL_BYTES, 'frame'),
    states: arena.alloc(64, 'states'),
    target,
    length: common.length,
    clusterSize: 65536,
    clusters: 16,
    targetReadsZero: false,
    skipUnallocated: false,
    compress: false,
    onCbwError: 'break-guest-write',
    owner: arena.alloc(4, 'word of an owner'),
  });
}

afterEach(() => {
  for (const id of made.splice(0)) forgetDisk(runtime, id);
});

describe('disks are drained', () => {
  it('by their numbers where no request goes on from one to another', () => {
    expect(order(disk(3), disk(1), disk(2))).toEqual([1, 2, 3]);
  });

  it('those that lie on others before these, whatever is between them', () => {
    const low = disk(1);
    const middle = disk(3, live(low));
    const high = disk(2, live(middle));
    expect(order(low, middle, high)).toEqual([2, 3, 1]);
    expect(order(low, high)).toEqual([2, 1]);
  });

  it('those whose old data is saved to others before these', () => {
    const target = disk(1);
    const source = disk(2);
    const above = disk(3, live(source));
    freeze(source, live(target));
    expect(order(target, source)).toEqual([2, 1]);
    expect(order(target, source, above)).toEqual([3, 2, 1]);
  });

  it('also by who keeps others from them already, and where an image lies on the source of what is saved to it', () => {
    const source = disk(1);
    const other = disk(2, live(source));
    freeze(source, live(source));
    expect(attach(source).drained(() => order(source, other))).toEqual([2, 1]);
  });
});
