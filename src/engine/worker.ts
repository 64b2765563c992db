import { workerData } from 'node:worker_threads';
import { type PlainError, toStillframeError } from '../errors.js';
import { attachRuntime, type SharedRuntime } from '../kernels/runtime.js';
import { type Task, TaskRunner } from './tasks.js';

/** What a thread of the engine answers: errors travel as plain data. */
export type Answer = { readonly value: unknown } | { readonly error: PlainError };

const shared: SharedRuntime = workerData;
const runner = new TaskRunner(attachRuntime(shared));

export default function runTask(task: Task): Answer {
  try {
    return { value: runner.run(task) };
  } catch (error) {
    return { error: toStillframeError(error).toPlain() };
  }
}
