import type { OnError } from '../job/job.js';
import { QmpError } from '../qmp/errors.js';
import type { GraphNode } from './graph-node.js';
import type { JobOptions } from './jobs.js';

/** What the commands that start jobs have in common. */
export interface JobArguments {
  readonly 'job-id'?: string | undefined;
  readonly speed?: number | undefined;
  readonly 'on-error'?: OnError | undefined;
  readonly 'on-source-error'?: OnError | undefined;
  readonly 'on-target-error'?: OnError | undefined;
  readonly 'auto-finalize'?: boolean | undefined;
  readonly 'auto-dismiss'?: boolean | undefined;
}

/** How a job runs. */
export interface RunOptions {
  readonly jobId: string;
  /** Bytes per second; 0: unlimited. */
  readonly speed: number;
  readonly onSourceError: OnError;
  readonly onTargetError: OnError;
  readonly autoFinalize: boolean;
  /** It is forgotten when all monitors were told of its end. */
  readonly autoDismiss: false;
}

/** The name of a job: that of the device that its node is, where it is given none. */
export function jobIdOf(given: JobArguments, node: GraphNode): string {
  return given['job-id'] ?? node.device ?? '';
}

/** @throws QmpError */
export function checkSpeed(bytesPerSecond = 0): void {
  if (bytesPerSecond < 0) throw new QmpError("Parameter 'speed' expects a non-negative value");
}

export function runOptions(id: string, given: JobArguments): RunOptions {
  const onError = given['on-error'] ?? 'report';
  return {
    jobId: id,
    speed: Math.max(0, given.speed ?? 0),
    onSourceError: given['on-source-error'] ?? onError,
    onTargetError: given['on-target-error'] ?? onError,
    autoFinalize: given['auto-finalize'] ?? true,
    autoDismiss: false,
  };
}

/** What monitors are told of the job. @param onEnd called when it is over */
export function listOptions(given: JobArguments, onEnd: JobOptions['onEnd']): JobOptions {
  return {
    speed: given.speed ?? 0,
    autoFinalize: given['auto-finalize'] ?? true,
    autoDismiss: given['auto-dismiss'] ?? true,
    onEnd,
  };
}
