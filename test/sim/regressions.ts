import type { Scenario } from './scenario.js';

/** A scenario that once failed, made small, with the schedules under which it did. */
export interface Regression {
  readonly what: string;
  readonly scenario: Scenario;
  readonly schedules: readonly number[];
}

export const regressions: readonly Regression[] = [
  {
    what: 'the target is left open when its last flush fails',
    scenario: {
      source: { format: 'raw', length: 52224, clusterSize: 512, version: 2, refcountBits: 16, backing: [] },
      fill: [],
      writers: [[]],
      job: {
        sync: 'none',
        format: 'qcow2',
        targetClusterSize: 16384,
        target: 'new',
        helpers: 0,
        onCbwError: 'break-guest-write',
        onSourceError: 'auto',
        onTargetError: 'auto',
        autoFinalize: true,
        speed: 0,
      },
      verbs: [],
      host: 'keeper',
      faults: [{ on: 'target-sync', nth: 1, count: 1, code: 'EIO' }],
      strategy: 1,
      end: undefined,
    },
    schedules: [31],
  },
  {
    what: 'the job throws, and leaves the target open, when a target that it gives up cannot be truncated',
    scenario: {
      source: { format: 'qcow2', length: 53760, clusterSize: 1024, version: 2, refcountBits: 8, backing: [] },
      fill: [{ layer: 0, offset: 52224, length: 1536 }],
      writers: [[]],
      job: {
        sync: 'full',
        format: 'qcow2',
        targetClusterSize: 131072,
        target: 'new',
        helpers: 0,
        onCbwError: 'break-snapshot',
        onSourceError: 'report',
        onTargetError: 'report',
        autoFinalize: true,
        speed: 0,
      },
      verbs: [],
      host: 'keeper',
      faults: [{ on: 'target-write', nth: 11, count: 1000, code: 'ENOSPC' }],
      strategy: 0,
      end: undefined,
    },
    schedules: [95],
  },
  {
    what: 'an empty partial file is left when it cannot be emptied at the start',
    scenario: {
      source: { format: 'raw', length: 44544, clusterSize: 65536, version: 3, refcountBits: 16, backing: [] },
      fill: [],
      writers: [[]],
      job: {
        sync: 'none',
        format: 'qcow2',
        targetClusterSize: 4096,
        target: 'new',
        helpers: 0,
        onCbwError: 'break-snapshot',
        onSourceError: 'auto',
        onTargetError: 'report',
        autoFinalize: true,
        speed: 0,
      },
      verbs: [],
      host: 'keeper',
      faults: [{ on: 'target-write', nth: 0, count: 1, code: 'EIO' }],
      strategy: 1,
      end: undefined,
    },
    schedules: [117],
  },
  {
    what: 'a file is made longer by one thread, to less than what another has just written',
    scenario: {
      source: {
        format: 'qcow2',
        length: 614400,
        clusterSize: 2048,
        version: 3,
        refcountBits: 16,
        backing: [13312, 614400],
      },
      fill: [],
      writers: [
        [],
        [{ id: 8, kind: 'write', offset: 51200, length: 512 }],
        [{ id: 10, kind: 'write', offset: 426496, length: 4096 }],
      ],
      job: {
        sync: 'top',
        format: 'qcow2',
        targetClusterSize: 8192,
        target: 'new',
        helpers: 0,
        onCbwError: 'break-snapshot',
        onSourceError: 'stop',
        onTargetError: 'ignore',
        autoFinalize: true,
        speed: 0,
      },
      verbs: [],
      host: 'keeper',
      faults: [],
      strategy: 1,
      end: undefined,
    },
    schedules: [740],
  },
];
