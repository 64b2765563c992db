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
 * The small scope of a sync mode: with at most one I/O call that fails, and with each verb of the host. In sync mode
 * `top` a run is several times as long, so there only the exploration without failures has both guests.
 */
export function scopeTasks(sync: 'full' | 'top' | 'none'): ScopeTask[] {
  const guests = sync === 'top' ? 1 : 2;
  const who = `${guests} guest${guests === 1 ? '' : 's'}`;
  const tasks: ScopeTask[] = [
    { name: `${sync}, ${who}, any one I/O call may fail`, scenario: smallScope(sync, guests), fault: true },
    {
      name: `${sync}, ${who}, cancelled at any moment`,
      scenario: smallScope(sync, guests, 'cancel'),
      fault: false,
    },
    {
      name: `${sync}, ${who}, paused at any moment`,
      scenario: smallScope(sync, guests, 'pause'),
      fault: false,
    },
  ];
  if (guests === 1) tasks.push({ name: `${sync}, 2 guests`, scenario: smallScope(sync), fault: false });
  return tasks;
}

/** Runs that are not explored, by which the explorer knows the locks of a scenario. */
const WARM_UP = 50;

export function runScopeTask(simulator: Simulator, task: ScopeTask, maxRuns: number): Exploration {
  simulator.forget();
  for (let schedule = 1; schedule <= WARM_UP; schedule++) simulator.run(task.scenario, { schedule });
  return explore(simulator, task.scenario, { fault: task.fault, maxRuns });
}
