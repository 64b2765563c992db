/** The five error policies, for errors of both sides, once and again and again: events, progress and io-status as QEMU's. */
import { describe, it } from 'vitest';
import {
  blkdebug,
  del,
  event,
  hasQemu,
  jobs,
  raw,
  type Session,
  type Step,
  same,
  until,
} from '../support/sessions.js';

const POLICIES = ['report', 'ignore', 'enospc', 'stop', 'auto'] as const;
const ERRORS = { EIO: 5, ENOSPC: 28 };

interface Case {
  readonly side: 'source' | 'target';
  readonly policy: (typeof POLICIES)[number];
  readonly errno: number;
}

const CASES = POLICIES.flatMap((policy) =>
  Object.values(ERRORS).flatMap((errno) =>
    (['source', 'target'] as const).map((side): Case => ({ side, policy, errno })),
  ),
);

const stops = ({ policy, errno }: Case): boolean =>
  policy === 'stop' || (errno === ERRORS.ENOSPC && (policy === 'enospc' || policy === 'auto'));

/** A backup whose fourth cluster cannot be read or written. @param then what is done while it is paused, if it is */
function steps(one: Case, once: boolean, then: (id: string) => readonly Step[]): readonly Step[] {
  const { side, policy, errno } = one;
  const id = `${side}-${policy}-${errno}`;
  const bad = `bad-${id}`;
  const below = side === 'source' ? 'r' : 't';
  return [
    blkdebug(bad, below, { iotype: side === 'source' ? 'read' : 'write', errno, once, sector: 384 }),
    [
      'blockdev-backup',
      {
        device: side === 'source' ? bad : 'r',
        target: side === 'target' ? bad : 't',
        sync: 'full',
        'job-id': id,
        'auto-dismiss': false,
        [`on-${side}-error`]: policy,
        // Nobody else has another try at what has failed.
        'x-perf': { 'max-workers': 1, 'max-chunk': 65536 },
      },
    ],
    until(id, stops(one) ? 'paused' : 'concluded'),
    ...jobs,
    ...(stops(one) ? then(id) : []),
    ['job-dismiss', { id }],
    del(bad),
  ];
}

const session = (...played: readonly Step[]): Session => ({
  prepare: `
    qemu-img create -q -f raw r.raw 320k
    qemu-img create -q -f raw t.raw 320k
    qemu-io -f raw -c 'write -P 1 0 320k' r.raw >/dev/null`,
  steps: [raw('r'), raw('t'), ...played],
  after: 'cmp r.raw t.raw',
});

describe.skipIf(!hasQemu())('an error of the background copy', () => {
  it('that does not come again', async () => {
    const resume = (id: string): readonly Step[] => [
      ['job-pause', { id }],
      ['block-job-pause', { device: id }],
      ['block-job-cancel', { device: id }],
      ['block-job-set-speed', { device: id, speed: 0 }],
      ['block-job-resume', { device: id }],
      until(id, 'concluded'),
      ...jobs,
    ];
    await same(session(...CASES.flatMap((one) => steps(one, true, resume))));
  });

  it('that comes again', async () => {
    const resumeAndCancel = (id: string): readonly Step[] => [
      ['job-resume', { id }],
      event('BLOCK_JOB_ERROR', { device: id }),
      until(id, 'paused'),
      ...jobs,
      ['job-cancel', { id }],
      until(id, 'concluded'),
      ...jobs,
    ];
    // What is ignored is tried for ever.
    const cases = CASES.filter(({ policy }) => policy !== 'ignore');
    await same({ ...session(...cases.flatMap((one) => steps(one, false, resumeAndCancel))), after: 'true' });
  });
});
