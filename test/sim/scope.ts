import { type Exploration, explore } from './explore.js';
import type { GuestOp, Scenario } from './scenario.js';
import type { Simulator } from './simulator.js';
import { UNIFORM } from './world.js';

/** Bytes that are copied at once, and of a cluster of the images. */
const CLUSTER = 65536;
const IMAGE_CLUSTER = 4096;

/** What the guests do. */
const REQUESTS: readonly (readonly GuestOp[])[] = [
  [{ id: 1, kind: 'write', offset: CLUSTER - 512, length: 1024 }],
  [{ id: 2, kind: 'zeroes', offset: CLUSTER + 1024, length: 512 }],
];

/**
 * The small scope: two guests, two copiers, three clusters, the last of them short. Guest 1 writes over the edge of
 * clusters 0 and 1, guest 2 zeroes a part of cluster 1, so that they and the copiers meet there.
 */
export function smallScope(
  sync: 'full' | 'top' | 'none',
  guests: 1 | 2 = 2,
  verb?: 'pause' | 'cancel',
): Scenario {
  const length = 2 * CLUSTER + 512;
  const qcow2 = sync !== 'full';
  return {
    source: {
      format: sync === 'top' ? 'qcow2' : 'raw',
      length,
      clusterSize: IMAGE_CLUSTER,
      version: 3,
      refcountBits: 16,
      backing: sync === 'top' ? [length] : [],
    },
    fill: [
      { layer: 0, offset: 0, length: 1024 },
      { layer: 0, offset: CLUSTER, length: 1024 },
      { layer: 0, offset: 2 * CLUSTER, length: 512 },
      ...(sync === 'top'
        ? [
            { layer: 1, offset: 512, length: 512 },
            { layer: 1, offset: 2 * CLUSTER, length: 512 },
          ]
        : []),
    ],
    writers: REQUESTS.slice(0, guests),
    job: {
      sync,
      format: qcow2 ? 'qcow2' : 'raw',
      targetClusterSize: IMAGE_CLUSTER,
      target: 'new',
      helpers: sync === 'none' ? 0 : 1,
      onCbwError: 'break-guest-write',
      onSourceError: 'report',
      onTargetError: 'report',
      autoFinalize: true,
      speed: 0,
    },
    verbs:
      verb === undefined
        ? []
        : verb === 'cancel'
          ? [{ verb, afterMs: 0, speed: 0 }]
          : [
              { verb, afterMs: 0, speed: 0 },
              { verb: 'resume', afterMs: 0, speed: 0 },
            ],
    host: verb === undefined ? 'none' : 'verbs',
    faults: [],
    end: undefined,
    strategy: UNIFORM,
  };
}

/** One exploration of the small scope. */
export interface ScopeTask {
  readonly name: string;
  readonly scenario: Scenario;
  /** One I/O call may fail, any one. */
  readonly fault: boolean;
}

/**
 * The small scope of a sync mode: with any one I/O call that fails or none, and with each verb of the host. With two
 * guests and two copiers that takes many hours (`wide`), so otherwise one of the four stays away where something goes
 * wrong; in sync mode `none` nobody copies ahead, and all of it is explored.
 */
export function scopeTasks(sync: 'full' | 'top' | 'none', wide: boolean): ScopeTask[] {
  const task = (guests: 1 | 2, copiers: 1 | 2, how: 'fault' | 'cancel' | 'pause' | undefined): ScopeTask => {
    const scenario = smallScope(sync, guests, how === 'fault' ? undefined : how);
    const helpers = Math.min(scenario.job.helpers, copiers - 1);
    const who = `${guests} guest${guests === 1 ? '' : 's'}${sync === 'none' ? '' : `, ${copiers} copier${copiers === 1 ? '' : 's'}`}`;
    return {
      name: `${sync}, ${who}${how === undefined ? '' : `, ${WHAT[how]}`}`,
      scenario: { ...scenario, job: { ...scenario.job, helpers } },
      fault: how === 'fault',
    };
  };
  if (wide || sync === 'none') return [task(2, 2, 'fault'), task(2, 2, 'cancel'), task(2, 2, 'pause')];
  return [
    task(1, 2, 'fault'),
    task(2, 1, 'fault'),
    task(1, 2, 'cancel'),
    task(1, 2, 'pause'),
    task(2, 2, undefined),
  ];
}

const WHAT = {
  fault: 'any one I/O call may fail',
  cancel: 'cancelled at any moment',
  pause: 'paused at any moment',
} as const;

/** Runs that are not explored, by which the explorer knows the locks of a scenario. */
const WARM_UP = 50;

export function runScopeTask(simulator: Simulator, task: ScopeTask, maxRuns: number): Exploration {
  simulator.forget();
  for (let schedule = 1; schedule <= WARM_UP; schedule++) simulator.run(task.scenario, { schedule });
  return explore(simulator, task.scenario, { fault: task.fault, maxRuns });
}
