import type { Runtime } from '../kernels/runtime.js';
import type { BlockNode, NodeDescriptor } from './node.js';
import { WriteMarks } from './write-marks.js';

/** What a node does whatever its driver is. Semantics: QEMU's node options `discard` and `detect-zeroes`. */
export interface NodeTraits {
  /** Arena pointer to what it keeps of writes: see `write-marks.ts`. */
  readonly marks: number;
  /** `ignore`: discards end here, and zeroes that come from a node above free no space. */
  readonly discard: 'unmap' | 'ignore';
  /** What a write of zeroes becomes: zeroes without data, with `unmap` without space. Default: data. */
  readonly detectZeroes?: 'on' | 'unmap' | undefined;
}

/**
 * Gives this thread's facade of a node the traits that its descriptor names.
 *
 * @param isRoot nobody comes to it through another node
 */
export function withTraits<N extends BlockNode>(
  runtime: Runtime,
  { traits }: NodeDescriptor,
  node: N,
  isRoot: boolean,
): N {
  if (traits === undefined) return node;
  const { kernels, arena } = runtime;
  const { detectZeroes } = traits;
  const unmaps = traits.discard === 'unmap';
  const zeroesUnmap = unmaps || isRoot;
  const marks = new WriteMarks(arena, traits.marks);
  const marked = <T>(end: number, body: () => T): T => {
    marks.begin(end);
    try {
      return body();
    } finally {
      marks.end(end);
    }
  };
  // The driver's own methods, called on the driver: the object itself has other ones from now on.
  const write = node.write.bind(node);
  const writeUnits = node.writeUnits.bind(node);
  const writeCompressed = node.writeCompressed?.bind(node);
  const writeZeroes = node.writeZeroes.bind(node);
  const writeZeroesFast = node.writeZeroesFast?.bind(node);
  const discard = node.discard.bind(node);
  const methods: Pick<BlockNode, 'write' | 'writeUnits' | 'writeZeroes' | 'discard'> = {
    write(offset, pointer, length) {
      if (length === 0) return write(offset, pointer, length);
      marked(offset + length, () => {
        if (detectZeroes === undefined || !kernels.isZero(pointer, length)) write(offset, pointer, length);
        else writeZeroes(offset, length, detectZeroes === 'unmap' && unmaps);
      });
    },
    writeUnits(offset, pointer, length, unit, skip) {
      let units = Math.ceil(length / unit);
      while (units > 0 && kernels.bitmapTest(skip, units - 1)) units--;
      if (units === 0) return;
      const end = offset + Math.min(length, units * unit);
      marked(end, () => writeUnits(offset, pointer, length, unit, skip));
    },
    writeZeroes(offset, length, mayUnmap) {
      if (length === 0) return writeZeroes(offset, length, mayUnmap);
      marked(offset + length, () => writeZeroes(offset, length, mayUnmap && zeroesUnmap));
    },
    discard(offset, length) {
      if (!unmaps) return;
      let ok = false;
      try {
        discard(offset, length);
        ok = true;
      } finally {
        marks.discarded(length, ok);
      }
    },
  };
  const optional: Pick<BlockNode, 'writeCompressed' | 'writeZeroesFast'> = {
    ...(writeCompressed && {
      writeCompressed: (offset, pointer, length) =>
        marked(offset + length, () => writeCompressed(offset, pointer, length)),
    }),
    ...(writeZeroesFast && {
      writeZeroesFast: (offset, length, mayUnmap) =>
        marked(offset + length, () => writeZeroesFast(offset, length, mayUnmap && zeroesUnmap)),
    }),
  };
  return Object.assign(node, methods, optional);
}
