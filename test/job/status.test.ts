import { describe, expect, it } from 'vitest';
import { checkJobId, JOB_CONTROL_BYTES, JobControl } from '#src/job/control.js';
import { canTransition, checkVerb, JOB_STATUSES, type JobStatus, type JobVerb } from '#src/job/status.js';
import { Arena } from '#src/kernels/arena.js';

/** The tables of QEMU's job state machine, one line a status. */
const allowed: Readonly<Record<JobStatus, { next: string; verbs: string }>> = {
  undefined: { next: 'created', verbs: '' },
  created: { next: 'running aborting null', verbs: 'cancel pause resume set-speed' },
  running: { next: 'paused ready waiting aborting', verbs: 'cancel pause resume set-speed' },
  paused: { next: 'running', verbs: 'cancel pause resume set-speed' },
  ready: { next: 'standby waiting aborting', verbs: 'cancel pause resume set-speed complete' },
  standby: { next: 'ready', verbs: 'cancel pause resume set-speed complete' },
  waiting: { next: 'pending aborting', verbs: 'cancel' },
  pending: { next: 'aborting concluded', verbs: 'cancel finalize' },
  aborting: { next: 'aborting concluded', verbs: '' },
  concluded: { next: 'null', verbs: 'dismiss' },
  null: { next: '', verbs: '' },
};

const verbs: readonly JobVerb[] = [
  'cancel',
  'pause',
  'resume',
  'set-speed',
  'complete',
  'finalize',
  'dismiss',
];

describe.each(JOB_STATUSES)('status %s', (status) => {
  it('goes on as in QEMU', () => {
    const next = JOB_STATUSES.filter((to) => canTransition(status, to));
    expect(new Set(next)).toEqual(new Set(allowed[status].next.split(' ').filter(Boolean)));
  });

  it.each(verbs)('takes the verb %s as in QEMU', (verb) => {
    const check = (): void => checkVerb('j', status, verb);
    if (allowed[status].verbs.split(' ').includes(verb)) {
      check();
    } else {
      expect(check).toThrowError(
        expect.objectContaining({
          code: 'ERR_STILLFRAME_JOB_VERB',
          message: `Job 'j' in state '${status}' cannot accept command verb '${verb}'`,
        }),
      );
    }
  });
});

describe('JobControl', () => {
  const make = (): JobControl => {
    const arena = Arena.create(1 << 20);
    return new JobControl(arena, arena.alloc(JOB_CONTROL_BYTES, 'job'));
  };

  it('makes no transition the table does not have', () => {
    const control = make();
    expect(control.status).toBe('undefined');
    control.transition('created');
    expect(() => control.transition('pending')).toThrowError(/no transition from 'created' to 'pending'/);
    expect(control.status).toBe('created');
  });

  it('keeps the first error and gives it back whole', () => {
    const control = make();
    const error = (message: string) => ({ code: 'ERR_STILLFRAME_IO' as const, message, errno: 'EIO' });
    control.fail({ operation: 'read', error: error('ä'.repeat(3000)) });
    control.fail({ operation: 'write', error: error('second') });
    expect(control.failed).toBe(true);
    const taken = control.takeError();
    expect(taken?.operation).toBe('read');
    expect(taken?.error.errno).toBe('EIO');
    expect(taken?.error.message).toMatch(/^ä+$/);
    expect(control.failed).toBe(false);
    expect(control.takeError()).toBeUndefined();
  });

  it('lets the first run of a rate limit pass and holds the second', () => {
    const control = make();
    control.pass = 1;
    control.speed = 1 << 20;
    const began = control.throttle();
    control.account(began ?? 0, 100 * 1024);
    const start = performance.now();
    control.throttle();
    expect(performance.now() - start).toBeGreaterThan(60);
  });
});

describe('job ids', () => {
  it.each(['j', 'Job-1._x'])('accepts %s', (id) => checkJobId(id));
  it.each(['', '1bad', '-x', 'bad!', 'ü'])("refuses '%s'", (id) => {
    expect(() => checkJobId(id)).toThrowError(`Invalid job ID '${id}'`);
  });
});
