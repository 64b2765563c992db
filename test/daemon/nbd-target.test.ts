/** The server of a backup's target dies or hangs in the middle of the job. */
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  backup,
  copied,
  event,
  hasQemu,
  jobs,
  type Played,
  play,
  raw,
  type Session,
  type Step,
  same,
  sh,
  until,
} from '../support/sessions.js';

let folder = '';
const at = (name: string): string => join(folder, name);

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'stillframe-far-'));
});

afterAll(async () => {
  // Servers end by themselves with their clients, but for those that hang.
  for (const line of pids()) {
    try {
      const pid = Number(line);
      if (readFileSync(`/proc/${pid}/comm`, 'utf8').startsWith('qemu-nbd')) process.kill(pid, 'SIGKILL');
    } catch {
      // It is gone.
    }
  }
  await rm(folder, { recursive: true, force: true });
});

function pids(): readonly string[] {
  try {
    return readFileSync(at('pids'), 'utf8').trim().split('\n');
  } catch {
    return [];
  }
}

/** Starts the server of the target; it ends with its last client. */
const serveFar = (): string =>
  `qemu-nbd -f raw -e 8 -k "$PWD/far.sock" --fork --pid-file far.pid t.raw && cat far.pid >> ${at('pids')}`;
const signal = (name: string): Step => sh(`kill -${name} $(cat far.pid)`);
const far = (more: Message = {}): Step => [
  'blockdev-add',
  { driver: 'nbd', 'node-name': 't', server: { type: 'unix', path: 'far.sock' }, ...more },
];
const speed = (bytes: number): Step => ['block-job-set-speed', { device: 'j', speed: bytes }];

/** A backup of which one cluster is on the server, and the rest waits for another speed. */
const begun = (given: Message = {}): readonly Step[] => [
  backup({ speed: 1, 'x-perf': { 'max-workers': 1, 'max-chunk': 65536 }, 'auto-dismiss': false, ...given }),
  copied('j', 65536),
];
const over: readonly Step[] = [until('j', 'concluded'), ...jobs, ['job-dismiss', { id: 'j' }]];
/** The same where progress or error of the job that has failed are not QEMU's. */
const cancelled: readonly Step[] = [
  ['job-cancel', { id: 'j' }],
  until('j', 'concluded'),
  ['job-dismiss', { id: 'j' }],
];

const session = (...steps: readonly Step[]): Session => ({
  prepare: `
    qemu-img create -q -f raw d.raw 320k
    qemu-img create -q -f raw t.raw 320k
    qemu-io -f raw -c 'write -P 1 0 320k' d.raw >/dev/null
    ${serveFar()}`,
  steps: [raw('d'), ...steps],
});
/** Plays it to QEMU and to ours, for what has to be compared with a difference. */
const both = (name: string, played: Session): Promise<[Played, Played]> =>
  Promise.all([
    play('qemu-storage-daemon', at(`${name}-qemu`), played),
    play('stillframe', at(name), played),
  ]);
/** QEMU counts what it has failed to write. */
const withoutProgress = (told: readonly unknown[] = []): unknown =>
  JSON.parse(JSON.stringify(told, (key, value) => (key === 'offset' ? 0 : value)));
const equal = 'cmp d.raw t.raw';

describe.skipIf(!hasQemu())('the server of the target', () => {
  it('dies, and the job fails', async () => {
    await same(session(far(), ...begun(), signal('KILL'), speed(0), ...over));
  });

  it('dies, and the job stops, again and again, until it is cancelled', async () => {
    const [theirs, ours] = await both(
      'stops',
      session(
        far(),
        ...begun({ 'on-target-error': 'stop' }),
        signal('KILL'),
        speed(0),
        until('j', 'paused'),
        ...jobs,
        sh(serveFar()),
        ['job-resume', { id: 'j' }],
        event('BLOCK_JOB_ERROR', { device: 'j' }),
        until('j', 'paused'),
        ...jobs,
        ...cancelled,
        signal('KILL'),
      ),
    );
    expect(ours.answers).toEqual(theirs.answers);
    expect(withoutProgress(ours.events['j'])).toEqual(withoutProgress(theirs.events['j']));
  });

  // QEMU tries to connect at times that become rare, and the job stops again until then.
  it('is back after the job has stopped, and the job goes on', async () => {
    const { answers, events } = await play('stillframe', at('resumed'), {
      ...session(
        far({ 'reconnect-delay': 1 }),
        ...begun({ 'on-target-error': 'stop' }),
        signal('KILL'),
        speed(0),
        until('j', 'paused'),
        ['query-block-jobs'],
        sh(serveFar()),
        ['job-resume', { id: 'j' }],
        ...over,
      ),
      after: equal,
    });
    expect(answers).toContainEqual(
      expect.objectContaining({
        answer: { return: [expect.objectContaining({ paused: true, 'io-status': 'failed' })] },
      }),
    );
    expect(answers.at(-1)).toMatchObject({ status: 0 });
    const told = (events['j'] ?? []) as readonly Message[];
    expect(told.filter((one) => one['event'] === 'BLOCK_JOB_ERROR')).toHaveLength(1);
    expect(told.find((one) => one['event'] === 'BLOCK_JOB_COMPLETED')?.['data']).not.toHaveProperty('error');
  });

  it('is back before anybody has lost patience', async () => {
    await same({
      ...session(
        far({ 'reconnect-delay': 60 }),
        ...begun(),
        signal('KILL'),
        speed(0),
        sh(serveFar()),
        ...over,
      ),
      after: equal,
    });
  });

  // The same events as from QEMU, which may take its time to connect again.
  it('is back while errors are ignored', async () => {
    const { answers, events } = await play('stillframe', at('ignored'), {
      ...session(
        far({ 'reconnect-delay': 1 }),
        ...begun({ 'on-target-error': 'ignore' }),
        signal('KILL'),
        speed(0),
        event('BLOCK_JOB_ERROR', { device: 'j', action: 'ignore' }),
        sh(serveFar()),
        ...over,
      ),
      after: equal,
    });
    expect(answers.at(-1)).toMatchObject({ status: 0 });
    const told = ((events['j'] ?? []) as readonly Message[]).map((one) => {
      const data = one['data'] as Message;
      return String(data['action'] ?? data['error'] ?? data['status'] ?? one['event']);
    });
    // How often it is tried meanwhile is no matter.
    expect(told.filter((word, index) => word !== told[index - 1])).toEqual([
      ...['created', 'running', 'paused', 'running', 'ignore', 'waiting', 'pending'],
      ...['BLOCK_JOB_COMPLETED', 'concluded', 'null'],
    ]);
  });

  it('is away for long, and the job is cancelled', async () => {
    const [theirs, ours] = await both(
      'cancelled',
      session(far({ 'reconnect-delay': 3600 }), ...begun(), signal('KILL'), speed(0), ...cancelled),
    );
    expect(ours.answers).toEqual(theirs.answers);
    // QEMU tells of the write that is given up, or does not, as it happens.
    const withoutErrors = (told: readonly unknown[] = []): unknown =>
      withoutProgress(told.filter((one) => !JSON.stringify(one).includes('BLOCK_JOB_ERROR')));
    expect(withoutErrors(ours.events['j'])).toEqual(withoutErrors(theirs.events['j']));
  });

  it('hangs, and the job is cancelled all the same', async () => {
    const { answers, events } = await play(
      'stillframe',
      at('hangs'),
      session(far(), ...begun(), signal('STOP'), speed(0), ...cancelled, signal('KILL')),
    );
    expect(answers.at(-1)).toEqual({ ended: 0 });
    expect(events['j']?.map((told) => JSON.stringify(told)).join('\n')).toContain('BLOCK_JOB_CANCELLED');
  });

  // QEMU waits for it for ever.
  it.each([
    ['in the middle of a write', [speed(0)]],
    ['between two writes', []],
  ])('hangs %s, and the daemon ends all the same', async (_, more) => {
    const { answers } = await play('stillframe', at('quits'), {
      ...session(far(), ...begun(), signal('STOP'), ...more),
      after: 'kill -KILL $(cat far.pid)',
    });
    expect(answers.at(-2)).toEqual({ ended: 0 });
  });
});
