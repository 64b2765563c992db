import { Random } from '../../support/data.js';
import { type Operation, randomOperations } from '../../support/qcow2/operation.js';
import { allShapes, type Shape } from '../../support/qcow2/shape.js';

/** What happens to the image, one after the other. Lengths and offsets are bytes. */
export type Step =
  | Operation
  /** Closes the image and opens it again. */
  | { readonly kind: 'reopen' }
  | { readonly kind: 'resize'; readonly length: number; readonly preallocation?: 'metadata' }
  /** Takes, goes back to, deletes an internal snapshot. */
  | { readonly kind: 'snapshot' | 'revert' | 'delete'; readonly name: string };

/** An image below the one under test. QEMU makes it; both sides only read it. */
export interface Base {
  readonly format: 'raw' | 'qcow2';
  readonly shape: Shape;
  readonly length: number;
  readonly operations: readonly Operation[];
}

/** One story, told twice: to an image of ours and to one of QEMU's. */
export interface Trace {
  /** Its `depth` says nothing here: `bases` are what is below. */
  readonly shape: Shape;
  readonly length: number;
  readonly lazyRefcounts: boolean;
  /** All clusters have their place from the start (`preallocation=metadata`). */
  readonly preallocated: boolean;
  /** Lowest first. */
  readonly bases: readonly Base[];
  readonly steps: readonly Step[];
}

const shapes = allShapes();

function randomLength(random: Random, clusterSize: number): number {
  const clusters = clusterSize <= 4096 ? 200 : clusterSize <= 65536 ? 40 : 8;
  const tail = random.chance(0.4) ? 512 * random.between(1, 100) : 0;
  return random.between(1, clusters) * clusterSize + tail;
}

/** The trace of a seed. */
export function randomTrace(seed: number): Trace {
  const random = new Random(seed);
  // Large clusters are slow and small ones show more; most images are of the usual kind.
  const most = random.pick([4096, 65536, 65536, 2 << 20]);
  const candidates = shapes.filter((shape) => shape.clusterSize <= most);
  const shape = candidates[random.between(0, candidates.length - 1)];
  if (shape === undefined) throw new Error('there is no shape to choose');
  const length = randomLength(random, shape.clusterSize);
  const bases = Array.from({ length: shape.depth }, (_, index): Base => {
    const below = candidates.filter(({ depth, dataFile }) => depth === index && dataFile === 'none');
    const own = below[random.between(0, below.length - 1)] ?? shape;
    const bytes = Math.ceil((length * random.pick([1, 1, 0.5, 1.5])) / 512) * 512;
    const format = index === 0 && random.chance(0.3) ? 'raw' : 'qcow2';
    const filled = format === 'raw' ? { ...own, compression: 'none' as const } : own;
    return {
      format,
      shape: own,
      length: bytes,
      operations: randomOperations(random, filled, bytes, random.between(0, 8)),
    };
  });
  const steps: Step[] = [];
  // A cluster of compressed data is counted by everything in it and, once more each, by every snapshot.
  const leastBits = shape.compression === 'none' ? 2 : 16;
  const snapshots = shape.dataFile === 'none' && shape.refcountBits >= leastBits;
  // A cluster is in use by the image and by all snapshots at once, and twice by one that is gone back to.
  const mostSnapshots = Math.min(3, 2 ** Math.min(shape.refcountBits, 8) - 3);
  let current = length;
  for (let left = random.between(3, 40); left > 0; left--) {
    const kind = random.next();
    if (kind < 0.08) steps.push({ kind: 'reopen' });
    else if (kind < 0.12) {
      current = Math.max(512, Math.ceil((current * random.pick([0.5, 0.9, 1.1, 2])) / 512) * 512);
      // QEMU shows what compressed data left behind in the places that it takes.
      const metadata = random.chance(0.2) && shape.compression === 'none';
      steps.push({ kind: 'resize', length: current, ...(metadata ? { preallocation: 'metadata' } : {}) });
    } else if (kind < 0.18 && snapshots) {
      const action = random.pick<'snapshot' | 'revert' | 'delete'>([
        'snapshot',
        'snapshot',
        'revert',
        'delete',
      ]);
      steps.push({ kind: action, name: `s${random.between(1, mostSnapshots)}` });
    } else steps.push(...randomOperations(random, shape, current, 1));
  }
  const preallocated = shape.depth === 0 && random.chance(0.15);
  return {
    shape,
    length,
    lazyRefcounts: shape.version === 3 && random.chance(0.2),
    preallocated,
    bases,
    steps,
  };
}

/** The part of an operation that is inside of an image of `length` bytes; undefined: nothing, or no whole cluster. */
export function clip(operation: Operation, length: number, clusterSize: number): Operation | undefined {
  if (operation.kind === 'flush') return operation;
  const { kind, offset } = operation;
  const bytes = Math.min(operation.length, length - offset);
  if (bytes <= 0) return undefined;
  if (kind === 'compressed' && bytes % clusterSize !== 0 && offset + bytes !== length) return undefined;
  return { ...operation, length: bytes };
}
