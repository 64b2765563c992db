import { describe, it } from 'vitest';
import { hasPeer } from '../support/peers.js';
import { Matrix } from '../support/qcow2/matrix.js';
import { describeShape, pairwiseShapes } from '../support/qcow2/shape.js';
import { temporaryFolder } from './qcow2-support.js';

const rows = pairwiseShapes().map((shape, index) => ({
  name: describeShape(shape),
  shape,
  seed: 1000 + index,
}));

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('every two features of a qcow2 image', () => {
  const matrix = new Matrix(temporaryFolder());

  it.each(rows)('$name: filled by QEMU', ({ shape, seed }) => {
    matrix.run(shape, seed, 'qemu');
  });

  it.each(rows)('$name: filled by us', ({ shape, seed }) => {
    matrix.run(shape, seed, 'ours');
  });
});
