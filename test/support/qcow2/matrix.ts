import { rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createImage } from '#src/block/create.js';
import { firstDifference, Random } from '../data.js';
import { run } from '../peers.js';
import { type Operation, Patterns, randomOperations } from './operation.js';
import { Ours } from './ours.js';
import { differenceOf, qemuApply, qemuCompare, qemuMap } from './qemu.js';
import { allShapes, creationOptions, imageOptions, type Shape } from './shape.js';

/** Images that one side makes and fills and the other side reads and changes. */

type Side = 'ours' | 'qemu';

interface Layer {
  readonly name: string;
  readonly format: 'raw' | 'qcow2';
  readonly shape: Shape;
  /** Bytes. */
  readonly length: number;
  readonly operations: readonly Operation[];
}

/** Bytes of a drive with enough clusters to need several tables where clusters are small. */
function lengthFor(random: Random, clusterSize: number): number {
  const clusters = clusterSize <= 4096 ? 300 : clusterSize <= 65536 ? 60 : 14;
  const tail = random.chance(0.5) ? 512 * random.between(1, 200) : 0;
  return clusters * clusterSize + tail;
}

export class Matrix {
  readonly #folder: string;
  readonly #patterns: Patterns;
  readonly #ours = new Ours();
  readonly #shapes: readonly Shape[] = allShapes();

  /** @param folder a place for the images */
  constructor(folder: string) {
    this.#folder = folder;
    this.#patterns = new Patterns(folder);
  }

  /** Throws at the first thing that is not as it should be. */
  run(shape: Shape, seed: number, by: Side): void {
    const random = new Random(seed);
    const layers = this.#layers(random, shape);
    const top = layers.at(-1);
    if (top === undefined) throw new Error('a chain has an image');
    const path = this.#at(top.name);
    try {
      for (const [index, layer] of layers.entries()) this.#make(layer, layers[index - 1], by);
      this.#expectAlike(path, shape);
      // The other one goes on where the first has stopped.
      const more = randomOperations(random, shape, top.length, 12);
      this.#change(path, 'qcow2', more, by === 'ours' ? 'qemu' : 'ours');
      this.#expectAlike(path, shape);
      for (const { name, format } of layers) {
        if (format === 'qcow2') run('qemu-img', ['check', '-q', this.#at(name)]);
      }
    } finally {
      for (const { name } of layers) {
        rmSync(this.#at(name), { force: true });
        rmSync(`${this.#at(name)}.data`, { force: true });
      }
    }
  }

  #at(name: string): string {
    return join(this.#folder, name);
  }

  /** The chain, lowest image first: the one in question on top of others of any kind and length. */
  #layers(random: Random, shape: Shape): Layer[] {
    const length = lengthFor(random, shape.clusterSize);
    return Array.from({ length: shape.depth + 1 }, (_, index) => {
      const onTop = index === shape.depth;
      const below = this.#shapes.filter(
        ({ depth, clusterSize }) => depth === index && clusterSize <= 2 * shape.clusterSize,
      );
      const own = onTop ? shape : (below[random.between(0, below.length - 1)] ?? shape);
      const bytes = onTop ? length : Math.ceil((length * random.pick([1, 1, 0.6, 1.4])) / 512) * 512;
      const format = index === 0 && !onTop && random.chance(0.3) ? 'raw' : 'qcow2';
      const filled = format === 'raw' ? { ...own, compression: 'none' as const } : own;
      return {
        name: `image-${index}`,
        format,
        shape: own,
        length: bytes,
        operations: randomOperations(random, filled, bytes, 30),
      };
    });
  }

  #make(layer: Layer, backing: Layer | undefined, by: Side): void {
    const { name, format, shape, length } = layer;
    const path = this.#at(name);
    if (format === 'raw' || by === 'qemu') {
      const options = format === 'raw' ? [] : ['-o', creationOptions(shape, `${path}.data`)];
      const over = backing === undefined ? [] : ['-b', backing.name, '-F', backing.format];
      run('qemu-img', ['create', '-q', '-f', format, ...options, ...over, path, String(length)]);
    } else {
      createImage(this.#ours.runtime, path, {
        ...imageOptions(shape, `${path}.data`),
        length,
        ...(backing === undefined ? {} : { backingFile: backing.name, backingFormat: backing.format }),
      });
    }
    this.#change(path, format, layer.operations, by);
  }

  #change(path: string, format: 'raw' | 'qcow2', operations: readonly Operation[], by: Side): void {
    const patterns = this.#patterns;
    if (by === 'qemu') {
      qemuApply(path, operations, patterns, format);
      return;
    }
    this.#ours.with(path, { readOnly: false, format }, (image) => {
      const model = image.content();
      for (const operation of operations) {
        image.apply([operation], patterns);
        follow(model, operation, patterns, (offset, length) => image.read(offset, length));
      }
      expectSame('what we wrote', image.content(), model);
    });
  }

  /** Both sides say the same of the image: its bytes, and where they are. */
  #expectAlike(path: string, shape: Shape): void {
    const copy = this.#at('copy');
    const lines = this.#ours.with(path, { readOnly: true }, (image) => {
      writeFileSync(copy, image.content());
      return image.map();
    });
    qemuCompare(path, copy);
    if (shape.dataFile === 'raw') qemuCompare(path, `${path}.data`);
    const different = differenceOf(lines, qemuMap(path));
    if (different !== undefined) throw new Error(`the map: ${different}`);
  }
}

/** Does to a copy in memory what was done to an image. A discard leaves old bytes or zeroes. */
export function follow(
  model: Buffer,
  operation: Operation,
  patterns: Patterns,
  read: (offset: number, length: number) => Buffer,
): void {
  if (operation.kind === 'flush') return;
  const { kind, offset, length } = operation;
  if (kind === 'zeroes') model.fill(0, offset, offset + length);
  else if (kind !== 'discard') model.set(patterns.bytes(operation.pattern, length), offset);
  else {
    const after = read(offset, length);
    for (const [at, byte] of after.entries()) {
      if (byte === 0 || byte === model[offset + at]) continue;
      throw new Error(`the discard of ${length} bytes at ${offset} made ${byte} of byte ${offset + at}`);
    }
    model.set(after, offset);
  }
}

export function expectSame(what: string, found: Buffer, model: Buffer): void {
  const at = firstDifference(found, model);
  if (at >= 0) throw new Error(`${what}: byte ${at} is ${found[at]}, not ${model[at]}`);
}
