import { type Exploration, explore } from './explore.js';
import type { Scenario } from './scenario.js';
import type { Simulator } from './simulator.js';
import { UNIFORM } from './world.js';

const CLUSTER = 65536;

/**
 * The small scope: two guests, two copiers, three clusters, the last of them short. Guest 1 writes over the edge of
 * clusters 0 and 1, guest 2 over that of 1 and 2, so that they meet in the middle.
 */
export function smallScope(sync: 'full' | 'top' | 'none', verb?: 'pause' | 'cancel'): Scenario {
  const length = 2 * CLUSTER + 512;
  const qcow2 = sync !== 'full';
  return {
    source: {
      format: sync === 'top' ? 'qcow2' : 'raw',
      length,
      clusterSize: CLUSTER,
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
    writers: [
      [{ id: 1, kind: 'write', offset: CLUSTER - 512, length: 1024 }],
      [{ id: 2, kind: 'zeroes', offset: 2 * CLUSTER - 512, length: 1024 }],
    ],
    job: {
      sync,
      format: qcow2 ? 'qcow2' : 'raw',
      targetClusterSize: CLUSTER,
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
  /** The thread and number of its I/O call that fails. */
  readonly fault?: { readonly thread: number; readonly index: number };
}

const THREADS = ['job', 'guest 1', 'guest 2', 'copier 2'];

/** The small scope of a sync mode: without a fault, with each verb of the host, with each I/O call failing. */
export function scopeTasks(simulator: Simulator, sync: 'full' | 'top' | 'none'): ScopeTask[] {
  const scenario = smallScope(sync);
  const tasks: ScopeTask[] = [{ name: sync, scenario }];
  for (const verb of ['cancel', 'pause'] as const)
    tasks.push({ name: `${sync}, ${verb}`, scenario: smallScope(sync, verb) });
  // How much I/O a thread does depends on the order of things: the most that was seen, and two for good measure.
  const most = [0, 0, 0, 0];
  for (let schedule = 1; schedule <= 100; schedule++) {
    simulator.run(scenario, { schedule });
    for (let thread = 0; thread < most.length; thread++) {
      most[thread] = Math.max(most[thread] ?? 0, simulator.ioCount(thread));
    }
  }
  most.forEach((calls, thread) => {
    if (calls === 0) return;
    for (let index = 0; index < calls + 2; index++) {
      tasks.push({
        name: `${sync}, I/O call ${index} of ${THREADS[thread]} fails`,
        scenario,
        fault: { thread, index },
      });
    }
  });
  return tasks;
}

/** Runs that are not explored, by which the explorer knows the locks of a scenario. */
const WARM_UP = 20;

export function runScopeTask(simulator: Simulator, task: ScopeTask, maxRuns: number): Exploration {
  simulator.forget();
  for (let schedule = 1; schedule <= WARM_UP; schedule++) simulator.run(task.scenario, { schedule });
  return explore(simulator, task.scenario, { fault: task.fault, maxRuns });
}
