import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createImage } from '#src/block/create.js';
import { resizeImage } from '#src/block/resize.js';
import { firstDifference } from '../../support/data.js';
import { run } from '../../support/peers.js';
import { type Operation, Patterns } from '../../support/qcow2/operation.js';
import { type OpenImage, Ours } from '../../support/qcow2/ours.js';
import { allocationOf, differenceOf, type MapLine, qemuApply, qemuMap } from '../../support/qcow2/qemu.js';
import { creationOptions, imageOptions, type Shape, subclusterSize } from '../../support/qcow2/shape.js';
import { Diverged, type Divergence, divergenceOf } from './divergence.js';
import { type Base, clip, type Step, type Trace } from './trace.js';

/** What `qemu-img check` says of how much is allocated; it is the same for the same allocation. */
interface CheckReport {
  readonly 'total-clusters'?: number;
  readonly 'allocated-clusters'?: number;
  readonly 'compressed-clusters'?: number;
}

/** Tells a trace to both sides and compares what has become of their images. */
export class Replay {
  readonly #folder: string;
  readonly #patterns: Patterns;
  readonly #ours = new Ours();

  constructor(folder: string) {
    this.#folder = folder;
    this.#patterns = new Patterns(folder);
  }

  /** undefined: the sides agree. */
  run(trace: Trace): Divergence | undefined {
    const names = ['ours', 'theirs', ...trace.bases.map((_, index) => `base-${index}`)];
    try {
      this.#run(trace);
      return undefined;
    } catch (error) {
      return divergenceOf(error);
    } finally {
      for (const name of names) {
        rmSync(this.#at(name), { force: true });
        rmSync(`${this.#at(name)}.data`, { force: true });
      }
    }
  }

  #run(trace: Trace): void {
    for (const [index, base] of trace.bases.entries()) this.#makeBase(base, index, trace.bases[index - 1]);
    this.#makeImages(trace);
    /** With the length of the drive that they keep. */
    const snapshots = new Map<string, number>();
    let length = trace.length;
    let phase: Operation[] = [];
    const tell = (): void => {
      this.#phase(phase, trace.shape);
      phase = [];
    };
    for (const step of trace.steps) {
      switch (step.kind) {
        case 'reopen':
          tell();
          break;
        case 'resize':
          if (trace.shape.version === 2 && !canResizeVersion2(trace, length, step.length, snapshots)) break;
          tell();
          length = this.#resize(trace, length, step);
          break;
        case 'snapshot':
        case 'revert':
        case 'delete': {
          if (snapshots.has(step.name) === (step.kind === 'snapshot')) break;
          tell();
          const letter = { snapshot: '-c', revert: '-a', delete: '-d' }[step.kind];
          for (const name of ['ours', 'theirs']) {
            run('qemu-img', ['snapshot', '-q', letter, step.name, this.#at(name)]);
          }
          if (step.kind === 'snapshot') snapshots.set(step.name, length);
          if (step.kind === 'delete') snapshots.delete(step.name);
          if (step.kind === 'revert')
            length = this.#ours.with(this.#at('theirs'), { readOnly: true }, (image) => image.node.length);
          break;
        }
        default: {
          const inside = clip(step, length, trace.shape.clusterSize);
          if (inside !== undefined) phase.push(inside);
        }
      }
    }
    tell();
    this.#compare();
    for (const [name, bytes] of snapshots) this.#compareSnapshot(name, bytes);
  }

  #at(name: string): string {
    return join(this.#folder, name);
  }

  #makeBase(base: Base, index: number, below: Base | undefined): void {
    const path = this.#at(`base-${index}`);
    const options = base.format === 'raw' ? [] : ['-o', creationOptions(base.shape, `${path}.data`)];
    const over = below === undefined ? [] : ['-b', `base-${index - 1}`, '-F', below.format];
    run('qemu-img', ['create', '-q', '-f', base.format, ...options, ...over, path, String(base.length)]);
    qemuApply(path, base.operations, this.#patterns, base.format);
  }

  #makeImages(trace: Trace): void {
    const { shape, length, lazyRefcounts } = trace;
    const preallocation = trace.preallocated ? 'metadata' : 'off';
    const top = trace.bases.at(-1);
    const backing = `base-${trace.bases.length - 1}`;
    const theirs = this.#at('theirs');
    const options = [
      creationOptions(shape, `${theirs}.data`),
      `lazy_refcounts=${lazyRefcounts ? 'on' : 'off'}`,
      `preallocation=${preallocation}`,
    ].join();
    const over = top === undefined ? [] : ['-b', backing, '-F', top.format];
    run('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', options, ...over, theirs, String(length)]);
    const ours = this.#at('ours');
    createImage(this.#ours.runtime, ours, {
      ...imageOptions(shape, `${ours}.data`),
      length,
      lazyRefcounts,
      preallocation,
      ...(top === undefined ? {} : { backingFile: backing, backingFormat: top.format }),
    });
  }

  /** @returns the new length */
  #resize(trace: Trace, from: number, step: Step & { readonly kind: 'resize' }): number {
    const { shape } = trace;
    const unit = subclusterSize(shape);
    // Where a longer drive ends inside of a subcluster over a backing file, QEMU flags its whole last cluster and we
    // the subclusters up to the end.
    const to = trace.bases.length > 0 ? Math.ceil(step.length / unit) * unit : step.length;
    const zeroes = (offset: number, most: number): void => {
      const length = most - offset;
      if (length > 0) this.#phase([{ kind: 'write', offset, length, pattern: -1 }], shape);
    };
    // A drive that shrinks and grows inside of a cluster shows QEMU's users the old bytes again, and ours zeroes.
    if (to < from) zeroes(to, Math.min(from, Math.ceil(to / shape.clusterSize) * shape.clusterSize));
    const preallocation = to > from ? (step.preallocation ?? 'off') : 'off';
    const grow = to > from ? [`--preallocation=${preallocation}`] : ['--shrink'];
    run('qemu-img', ['resize', '-q', ...grow, '-f', 'qcow2', this.#at('theirs'), String(to)]);
    resizeImage(this.#ours.runtime, this.#at('ours'), {
      format: 'qcow2',
      size: to,
      shrink: to < from,
      preallocation,
    });
    // Where it hides a longer backing file, QEMU writes zeroes up to the next subcluster, even where they could be
    // flagged.
    if ((trace.bases.at(-1)?.length ?? 0) > from) zeroes(from, Math.min(to, Math.ceil(from / unit) * unit));
    return to;
  }

  /** What happens while the images are open once. */
  #phase(operations: readonly Operation[], shape: Shape): void {
    // Where a request for zeroes is about a part of a compressed cluster, QEMU writes all of it as data; we write that
    // part, and flag the subclusters of the others. Cluster by cluster it is the same.
    const split = shape.subclusters && shape.compression !== 'none';
    if (split) operations = operations.flatMap((operation) => byClusters(operation, shape.clusterSize));
    // We write compressed data over data too; what QEMU refuses is left out with both.
    const done = qemuApply(this.#at('theirs'), operations, this.#patterns);
    this.#ours.with(this.#at('ours'), { readOnly: false }, (image) => image.apply(done, this.#patterns));
  }

  #compare(): void {
    const [ours, theirs] = [this.#look('ours'), this.#look('theirs')];
    expectSameBytes('the images', ours.content, theirs.content);
    const different = differenceOf(allocationOf(ours.map), allocationOf(theirs.map));
    if (different !== undefined) throw new Diverged('map', different);
    for (const key of ['total-clusters', 'allocated-clusters', 'compressed-clusters'] as const) {
      if (ours.check[key] === theirs.check[key]) continue;
      throw new Diverged('check', `${key} is ${ours.check[key]} with us, ${theirs.check[key]} with QEMU`);
    }
  }

  /** What we read of an image, which QEMU has to confirm. */
  #look(name: string): { content: Buffer; map: MapLine[]; check: CheckReport } {
    const path = this.#at(name);
    const check = this.#check(path);
    const { content, map } = this.#ours.with(path, { readOnly: true }, (image: OpenImage) => ({
      content: image.content(),
      map: image.map(),
    }));
    const theirMap = qemuMap(path);
    const different = differenceOf(map, theirMap);
    if (different !== undefined) throw new Diverged('map', `of the same image '${name}': ${different}`);
    const raw = this.#at('raw');
    writeFileSync(raw, content);
    try {
      run('qemu-img', ['compare', '-q', '-f', 'qcow2', '-F', 'raw', path, raw]);
    } catch (error) {
      throw new Diverged('content', `we read '${name}' in another way than QEMU: ${String(error)}`);
    }
    return { content, map, check };
  }

  #check(path: string): CheckReport {
    try {
      const report: CheckReport = JSON.parse(
        run('qemu-img', ['check', '--output=json', '-f', 'qcow2', path]),
      );
      return report;
    } catch (error) {
      throw new Diverged('check', String(error));
    }
  }

  /** QEMU reads a snapshot as long as the drive is now; what was behind its end is nobody's. */
  #compareSnapshot(snapshot: string, length: number): void {
    const [ours, theirs] = ['ours', 'theirs'].map((name) => {
      const raw = this.#at('raw');
      run('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', '-l', snapshot, this.#at(name), raw]);
      return readFileSync(raw).subarray(0, length);
    });
    if (ours !== undefined && theirs !== undefined) {
      expectSameBytes(`the snapshot '${snapshot}'`, ours, theirs);
    }
  }
}

/**
 * Version 2 does not know of what size the drive was at a snapshot, and has no zeroes to put over a backing file that
 * is longer than the drive.
 */
function canResizeVersion2(
  trace: Trace,
  from: number,
  to: number,
  snapshots: ReadonlyMap<string, number>,
): boolean {
  return snapshots.size === 0 && (to < from || (trace.bases.at(-1)?.length ?? 0) <= from);
}

/** A request for zeroes as one for each cluster. */
function byClusters(operation: Operation, clusterSize: number): Operation[] {
  if (operation.kind !== 'zeroes') return [operation];
  const pieces: Operation[] = [];
  const end = operation.offset + operation.length;
  for (let offset = operation.offset; offset < end; ) {
    const stop = Math.min(end, offset - (offset % clusterSize) + clusterSize);
    pieces.push({ ...operation, offset, length: stop - offset });
    offset = stop;
  }
  return pieces;
}

function expectSameBytes(what: string, ours: Buffer, theirs: Buffer): void {
  const at = firstDifference(ours, theirs);
  if (at < 0) return;
  throw new Diverged('content', `${what} differ at byte ${at}: ${ours[at]} with us, ${theirs[at]} with QEMU`);
}
