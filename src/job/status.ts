import { StillframeError } from '../errors.js';

/**
 * QEMU's job state machine (QAPI `JobStatus`, `JobVerb`): which status may follow which, and which verb is
 * allowed when.
 */
export const JOB_STATUSES = [
  'undefined',
  'created',
  'running',
  'paused',
  'ready',
  'standby',
  'waiting',
  'pending',
  'aborting',
  'concluded',
  'null',
] as const;
export type JobStatus = (typeof JOB_STATUSES)[number];

export type JobVerb = 'cancel' | 'pause' | 'resume' | 'set-speed' | 'complete' | 'finalize' | 'dismiss';

const transitions: Readonly<Record<JobStatus, readonly JobStatus[]>> = {
  undefined: ['created'],
  created: ['running', 'aborting', 'null'],
  running: ['paused', 'ready', 'waiting', 'aborting'],
  paused: ['running'],
  ready: ['standby', 'waiting', 'aborting'],
  standby: ['ready'],
  waiting: ['pending', 'aborting'],
  pending: ['aborting', 'concluded'],
  aborting: ['aborting', 'concluded'],
  concluded: ['null'],
  null: [],
};

const active: readonly JobStatus[] = ['created', 'running', 'paused', 'ready', 'standby'];

const verbs: Readonly<Record<JobVerb, readonly JobStatus[]>> = {
  cancel: [...active, 'waiting', 'pending'],
  pause: active,
  resume: active,
  'set-speed': active,
  complete: ['ready', 'standby'],
  finalize: ['pending'],
  dismiss: ['concluded'],
};

/** Whether the state machine allows the step. */
export function canTransition(from: JobStatus, to: JobStatus): boolean {
  return transitions[from].includes(to);
}

/** @throws StillframeError ERR_STILLFRAME_JOB_VERB where the verb is not allowed in that status */
export function checkVerb(id: string, status: JobStatus, verb: JobVerb): void {
  if (!verbs[verb].includes(status)) {
    throw new StillframeError(
      'ERR_STILLFRAME_JOB_VERB',
      `Job '${id}' in state '${status}' cannot accept command verb '${verb}'`,
    );
  }
}
