/** How backup jobs end where ours are stricter than QEMU's, and with `--x-qemu-compat`, where they are not. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  backup,
  blkdebug,
  copied,
  guest,
  hasQemu,
  play,
  raw,
  type Session,
  type Step,
  same,
  serve,
  until,
} from '../support/sessions.js';

const COMPAT = ['--x-qemu-compat'];
const over = until('j', 'null');
const prepare = `
  for i in d f; do truncate -s 1M $i.raw; done
  qemu-io -f raw -c 'write -P 1 0 1M' d.raw >/dev/null`;

/** How the job ended, and what the shell said last. */
async function played(session: Session): Promise<{ readonly end: unknown; readonly said: string }> {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-compat-'));
  try {
    const { answers, events } = await play('stillframe', join(folder, 'x'), session);
    const last = events['j']?.findLast((one) => String((one as Message)['event']).startsWith('BLOCK_JOB_'));
    const { event, data } = last as { event: string; data: Message };
    const said = answers.findLast((one) => 'said' in (one as object)) as { said: string };
    return { end: [event, data['error']], said: said.said };
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

describe.skipIf(!hasQemu())('a backup whose target cannot be flushed', () => {
  const session: Session = {
    prepare,
    steps: [
      ...[raw('d'), raw('f'), blkdebug('t', 'f', { iotype: 'flush', errno: 5, once: true })],
      backup(),
      over,
      ...serve('t'),
      guest('t', 'flush', 'read -P 1 0 1M', 'flush'),
    ],
  };

  it('completes where the job need not be durable, and leaves the error to others, as with QEMU', async () => {
    await same({ ...session, own: COMPAT });
  });

  it('fails', async () => {
    const { end, said } = await played(session);
    expect(end).toEqual(['BLOCK_JOB_COMPLETED', 'Input/output error']);
    expect(said).not.toContain('flush failed');
  });
});

describe.skipIf(!hasQemu())('a backup that loses old data to a write that is let through', () => {
  /** The target fails once, in the cluster at 512 KiB. @param then what is done once a guest has written there */
  const session = (given: Message, ...then: readonly Step[]): Session => ({
    prepare,
    steps: [
      ...[raw('d'), raw('f')],
      blkdebug('t', 'f', { iotype: 'write', errno: 28, sector: 1024, once: true }),
      ...serve('d'),
      backup({ 'on-cbw-error': 'break-snapshot', 'x-perf': { 'max-chunk': 65536 }, speed: 1, ...given }),
      ...(given['sync'] === 'none' ? [] : [copied('j', 65536)]),
      guest('d', 'write -P 2 512k 64k', 'write -P 2 768k 64k'),
      ...then,
      over,
    ],
    after: `qemu-io -f raw -c 'read -P 2 512k 64k' -c 'read -P 2 768k 64k' -c 'read -P 1 0 64k' f.raw | grep -c ops`,
  });
  const finish: Step = ['block-job-set-speed', { device: 'j', speed: 0 }];
  const cancel: Step = ['job-cancel', { id: 'j' }];
  const failed = [
    'BLOCK_JOB_COMPLETED',
    expect.stringMatching(/^the backup has failed: old data could not be saved/),
  ];
  const cancelled = ['BLOCK_JOB_CANCELLED', undefined];

  it('fails', async () => {
    expect((await played(session({}))).end).toEqual(failed);
    expect((await played(session({ sync: 'none' }))).end).toEqual(failed);
  });

  it('goes on where it need not be the instant, and has what is there then', async () => {
    const full = await played({ ...session({}, finish), own: COMPAT });
    expect(full).toEqual({ end: ['BLOCK_JOB_COMPLETED', undefined], said: '3\n' });
  });

  it('is cancelled then as others are', async () => {
    expect((await played({ ...session({}, cancel), own: COMPAT })).end).toEqual(cancelled);
    const none = await played({ ...session({ sync: 'none' }, cancel), own: COMPAT });
    expect(none.end).toEqual(cancelled);
  });
});
