import type { Shape } from '../../support/qcow2/shape.js';
import type { Trace } from './trace.js';

const plain: Shape = {
  version: 3,
  clusterSize: 2048,
  refcountBits: 16,
  subclusters: false,
  compression: 'none',
  dataFile: 'none',
  depth: 0,
};
const one: Trace = {
  shape: plain,
  length: 65536,
  lazyRefcounts: false,
  preallocated: false,
  bases: [],
  steps: [],
};

/** Traces on which the sides once differed, made as short as they get. */
export const regressions: readonly { readonly what: string; readonly trace: Trace }[] = [
  {
    what: 'zeroes where nothing was and nothing is below',
    trace: { ...one, steps: [{ kind: 'zeroes', offset: 16384, length: 8192, unmap: true }] },
  },
  {
    what: 'zeroes over a part of a cluster that has nothing',
    trace: { ...one, steps: [{ kind: 'zeroes', offset: 9635, length: 22990, unmap: false }] },
  },
  {
    what: 'zeroes over a part of a cluster, version 2',
    trace: {
      ...one,
      shape: { ...plain, version: 2 },
      bases: [{ format: 'raw', shape: plain, length: 32768, operations: [] }],
      steps: [{ kind: 'zeroes', offset: 9635, length: 50_000, unmap: true }],
    },
  },
  {
    what: 'zeroes without a place next to zeroes with one',
    trace: {
      ...one,
      steps: [
        { kind: 'write', offset: 4096, length: 4096, pattern: 0 },
        { kind: 'zeroes', offset: 4096, length: 2048, unmap: true },
        { kind: 'zeroes', offset: 6144, length: 2048, unmap: false },
      ],
    },
  },
  {
    what: 'a discard of a cluster that has some flagged subclusters and no place',
    trace: {
      ...one,
      shape: { ...plain, clusterSize: 32768, subclusters: true },
      length: 753664,
      steps: [
        { kind: 'zeroes', offset: 119714, length: 45998, unmap: true },
        { kind: 'discard', offset: 133280, length: 181693 },
      ],
    },
  },
  {
    what: 'zeroes up to an end inside of a subcluster, which moves',
    trace: {
      ...one,
      shape: { ...plain, clusterSize: 65536, subclusters: true },
      length: 2447872,
      steps: [
        { kind: 'zeroes', offset: 2384102, length: 63770, unmap: false },
        { kind: 'resize', length: 4895744 },
      ],
    },
  },
  {
    what: 'growth beyond the end of a longer backing file',
    trace: {
      ...one,
      bases: [{ format: 'qcow2', shape: plain, length: 98304, operations: [] }],
      steps: [{ kind: 'resize', length: 131072 }],
    },
  },
  {
    what: 'growth inside of the last cluster',
    trace: {
      ...one,
      shape: { ...plain, clusterSize: 2097152 },
      length: 10504704,
      steps: [{ kind: 'resize', length: 11555328, preallocation: 'metadata' }],
    },
  },
  {
    what: 'growth with a place for new subclusters',
    trace: {
      ...one,
      shape: { ...plain, clusterSize: 65536, subclusters: true },
      steps: [{ kind: 'resize', length: 131072, preallocation: 'metadata' }],
    },
  },
  {
    what: 'growth with a place for what is new, over a longer backing file',
    trace: {
      ...one,
      bases: [{ format: 'qcow2', shape: plain, length: 98304, operations: [] }],
      steps: [{ kind: 'resize', length: 131072, preallocation: 'metadata' }],
    },
  },
  {
    what: 'growth of a raw data file that ends inside of a cluster',
    trace: {
      ...one,
      shape: { ...plain, clusterSize: 16384, subclusters: true, dataFile: 'raw' },
      length: 524288,
      steps: [
        { kind: 'resize', length: 317952 },
        { kind: 'zeroes', offset: 297472, length: 20480, unmap: true },
        { kind: 'resize', length: 635904 },
      ],
    },
  },
  {
    what: 'growth of a raw data file with subclusters',
    trace: {
      ...one,
      shape: { ...plain, clusterSize: 16384, subclusters: true, dataFile: 'raw' },
      length: 507904,
      steps: [{ kind: 'resize', length: 559104 }],
    },
  },
];
