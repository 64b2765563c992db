/** A job of no type of ours, on this thread; the host answers as soon as it is told. */
import { MessageChannel } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { StillframeError } from '#src/errors.js';
import { JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import { type CommonJobOptions, Job, type JobMessage, type JobOutcome, jobError } from '#src/job/job.js';
import { Arena } from '#src/kernels/arena.js';

const noSpace = new StillframeError('ERR_STILLFRAME_NO_SPACE', 'full', { errno: 'ENOSPC' });
const broken = new StillframeError('ERR_STILLFRAME_IO', 'broken', { errno: 'EIO' });

/** It fails once, is ready, and has the host do its part. */
class Sample extends Job {
  readonly #error: StillframeError | undefined;
  ended: JobOutcome | undefined;

  constructor(
    control: JobControl,
    port: MessageChannel['port1'],
    options: CommonJobOptions,
    error?: StillframeError,
  ) {
    super(control, port, options);
    this.#error = error;
  }

  start(): void {
    this.run();
  }

  protected override work(): 'completed' | 'cancelled' {
    const { control } = this;
    let error = this.#error;
    for (;;) {
      if (control.cancelled) return 'cancelled';
      if (control.paused) this.pause();
      else if (control.completeRequested || control.cancelRequested) return 'completed';
      else if (control.status === 'ready')
        control.waitUntil(() => control.paused || control.completeRequested);
      else if (error === undefined) this.becomeReady(0);
      else control.fail(jobError('write', error));
      error = undefined;
      this.settleError();
    }
  }

  protected override prepare(): void {}

  protected override end(outcome: JobOutcome, failure?: StillframeError): StillframeError | undefined {
    this.ended = outcome;
    if (outcome !== 'completed') return failure;
    try {
      this.askHost();
      return undefined;
    } catch (error) {
      if (error instanceof StillframeError) return error;
      throw error;
    }
  }
}

/** @param host is told everything, and may give verbs */
function run(
  host: (message: JobMessage, control: JobControl) => void,
  options: Partial<CommonJobOptions> = {},
  error?: StillframeError,
): string[] {
  const arena = Arena.create(1 << 20);
  const control = new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job'));
  control.transition('created');
  const { port1, port2 } = new MessageChannel();
  const said: string[] = [];
  const port = Object.assign(port1, {
    postMessage(message: JobMessage) {
      const { type } = message;
      said.push(
        type === 'status'
          ? message.status
          : type === 'ended'
            ? `${type}: ${message.outcome} ${message.error?.message ?? ''}`.trim()
            : type === 'error'
              ? `${type}: ${message.action}`
              : type,
      );
      host(message, control);
    },
  });
  new Sample(
    control,
    port,
    { onSourceError: 'report', onTargetError: 'report', autoFinalize: true, ...options },
    error,
  ).start();
  port2.close();
  return said;
}

const is = (message: JobMessage, status: string): boolean =>
  message.type === 'status' && message.status === status;

describe('a job', () => {
  it('is ready until it is told to complete, stands by meanwhile, and has the host do its part', () => {
    const said = run((message, control) => {
      if (message.type === 'ready') control.paused = true;
      if (is(message, 'standby')) {
        control.complete();
        control.paused = false;
      }
      if (message.type === 'commit') control.answer();
    });
    expect(said).toEqual([
      ...['running', 'ready', 'ready', 'standby', 'ready', 'waiting', 'pending'],
      ...['commit', 'concluded', 'ended: completed'],
    ]);
  });

  it('fails where the host does', () => {
    const said = run((message, control) => {
      if (message.type === 'ready') control.complete();
      if (message.type === 'commit') control.answer(broken.toPlain());
    });
    expect(said.slice(-4)).toEqual(['commit', 'aborting', 'concluded', 'ended: failed broken']);
  });

  it('ends with its work as it is where it is cancelled softly, and without where not', () => {
    const soft = run((message, control) => {
      if (message.type === 'ready') control.cancelSoftly();
      if (message.type === 'commit') control.answer();
    });
    expect(soft.at(-1)).toBe('ended: completed');
    const both = run((message, control) => {
      if (message.type === 'ready') control.cancelSoftly();
      if (is(message, 'waiting')) control.cancel();
    });
    expect(both.slice(-4)).toEqual(['waiting', 'aborting', 'concluded', 'ended: cancelled']);
  });

  it.each([
    ['report', broken, 'report'],
    ['ignore', broken, 'ignore'],
    ['stop', broken, 'stop'],
    ['enospc', broken, 'report'],
    ['enospc', noSpace, 'stop'],
    ['auto', broken, 'report'],
    ['auto', noSpace, 'stop'],
  ] as const)('does under the policy %s what that says of "%s": %s', (onTargetError, error, action) => {
    const said = run(
      (message, control) => {
        if (is(message, 'paused')) control.paused = false;
        if (message.type === 'ready') control.complete();
        if (message.type === 'commit') control.answer();
      },
      { onTargetError },
      error,
    );
    expect(said[1]).toBe(`error: ${action}`);
    expect(said[2]).toBe({ report: 'aborting', ignore: 'ready', stop: 'paused' }[action]);
    expect(said.at(-1)).toBe(action === 'report' ? `ended: failed ${error.message}` : 'ended: completed');
  });

  it('waits for the command to finalize, and can be cancelled then', () => {
    const said = run(
      (message, control) => {
        if (message.type === 'ready') control.complete();
        if (message.type === 'pending') control.cancel();
      },
      { autoFinalize: false },
    );
    expect(said.slice(-5)).toEqual(['pending', 'pending', 'aborting', 'concluded', 'ended: cancelled']);
  });
});
