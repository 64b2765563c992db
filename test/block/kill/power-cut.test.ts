import { closeSync, openSync, readSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { hasPeer } from '../../support/peers.js';
import { describeShape, type Shape } from '../../support/qcow2/shape.js';
import { randomTrace, type Step, type Trace } from '../differential/trace.js';
import { temporaryFolder } from '../qcow2-support.js';
import type { Change } from './power.js';
import { Story } from './story.js';

interface Seeded {
  readonly seed: number;
  readonly trace: Trace;
}

/** Traces of that kind, of the seeds from `first` on. */
function tracesOf(fits: (trace: Trace) => boolean, count: number, first: number): Seeded[] {
  const found: Seeded[] = [];
  for (let seed = first; found.length < count; seed++) {
    const trace = randomTrace(seed);
    const { shape, steps } = trace;
    if (shape.clusterSize <= 1 << 17 && steps.length > 15 && fits(trace)) found.push({ seed, trace });
  }
  return found;
}

const has = ({ steps }: Trace, kind: Step['kind']): boolean => steps.some((step) => step.kind === kind);
const kinds: readonly [string, (trace: Trace) => boolean][] = [
  ['subclusters', ({ shape }) => shape.subclusters],
  ['subclusters over a backing file', ({ shape, bases }) => shape.subclusters && bases.length > 0],
  ['compressed data and subclusters', ({ shape }) => shape.subclusters && shape.compression !== 'none'],
  ['a data file', ({ shape }) => shape.dataFile === 'yes'],
  ['a raw data file', ({ shape }) => shape.dataFile === 'raw'],
  ['a data file, subclusters', ({ shape }) => shape.dataFile !== 'none' && shape.subclusters],
  ['lazy refcounts', ({ lazyRefcounts }) => lazyRefcounts],
  ['preallocation', ({ preallocated }) => preallocated],
  ['snapshots', (trace) => has(trace, 'snapshot') && has(trace, 'revert')],
  ['other sizes', ({ steps }) => steps.filter(({ kind }) => kind === 'resize').length > 2],
];
const isOverData = ({ bases }: Trace): boolean => bases.some(({ operations }) => operations.length > 3);
const overBases = (trace: Trace): boolean => isOverData(trace) && trace.shape.dataFile === 'none';
const dataFileOverBases = (trace: Trace): boolean => isOverData(trace) && trace.shape.dataFile === 'yes';

const plain: Shape = {
  version: 3,
  clusterSize: 512,
  refcountBits: 64,
  subclusters: false,
  compression: 'none',
  dataFile: 'none',
  depth: 0,
};

/** Whether a change is one of the refcount table that the header names. */
function isOfRefcountTable(change: Change, path: string): boolean {
  if (change.path !== path || change.kind !== 'bytes') return false;
  const header = Buffer.alloc(12);
  const file = openSync(path, 'r');
  readSync(file, header, 0, 12, 48);
  closeSync(file);
  const start = Number(header.readBigUInt64BE(0));
  const end = start + header.readUInt32BE(8) * plain.clusterSize;
  return change.offset < end && change.offset + change.length > start;
}

describe.skipIf(!hasPeer('qemu-img'))('the power fails while an image is changed', () => {
  const story = new Story(temporaryFolder());

  describe.each(kinds)('with %s', (name, fits) => {
    it.each(tracesOf(fits, 1, 1000 * name.length))('seed $seed', ({ seed, trace }) => {
      expect(story.run(trace, seed, { chance: 0.12 })).toBeGreaterThan(0);
    });
  });

  describe.each(['commit', 'rebase'] as const)('and in a %s after it', (end) => {
    it.each([...tracesOf(overBases, 2, 1), ...tracesOf(dataFileOverBases, 2, 1)])(
      'seed $seed',
      ({ seed, trace }) => {
        // The steps make something to move.
        const steps = trace.steps.filter(({ kind }) => kind === 'write' || kind === 'zeroes');
        expect(story.run({ ...trace, steps }, seed, { chance: 0.02, end })).toBeGreaterThan(0);
      },
    );
  });

  it('when the refcount table is on the disk and nothing else is that was written before it', () => {
    const steps: Step[] = [];
    for (let offset = 0; offset < 3 << 20; offset += 40_000) {
      steps.push({ kind: 'write', offset, length: 40_000, pattern: 0 });
      if (steps.length % 4 === 0) steps.push({ kind: 'flush' });
    }
    const length = 3 << 20;
    const trace = { shape: plain, length, lazyRefcounts: false, preallocated: false, bases: [], steps };
    const cuts = story.run(trace, 1, { chance: 0, cutAlone: isOfRefcountTable });
    expect(cuts, describeShape(plain)).toBeGreaterThan(10);
  });
});
