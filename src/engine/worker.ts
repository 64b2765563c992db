import { workerData } from 'node:worker_threads';
import { attachRuntime, type SharedRuntime } from '../kernels/runtime.js';
import { type Answer, answerTo, type Task, TaskRunner } from './tasks.js';

const shared: SharedRuntime = workerData;
const runner = new TaskRunner(attachRuntime(shared));

export default function runTask(task: Task): Answer {
  return answerTo(runner, task);
}
