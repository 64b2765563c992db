/** The daemon is told to end while jobs are there: what monitors are told before, and what is left in files. */
import { existsSync, readdirSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { hasPeer } from '../support/peers.js';
import {
  backup,
  bitmap,
  copied,
  guest,
  hasQemu,
  play,
  qcow2,
  type Session,
  type Step,
  same,
  serve,
  until,
} from '../support/sessions.js';

/** By `quit`, or by a signal. */
const ENDS = [undefined, 'SIGTERM'] as const;

/** A chunk is copied, then the job waits for longer than anybody does. */
const slow = { speed: 1, 'x-perf': { 'max-workers': 1, 'max-chunk': 65536 } };

const prepare = `
  for i in d t e u f v; do qemu-img create -q -f qcow2 $i.qcow2 4M; done
  for i in d e f; do qemu-io -c 'write -P 1 0 4M' $i.qcow2 >/dev/null; done`;

/** What a bitmap in an image says. Each server has its own socket: it takes the name away when it ends. */
const dirty = (image: string, name: string): string => `
  qemu-nbd -f qcow2 -r -B ${name} -k "$PWD/${name}.sock" --fork ${image}.qcow2
  qemu-img map --output=json --image-opts \
    "driver=nbd,server.type=unix,server.path=$PWD/${name}.sock,x-dirty-bitmap=qemu:dirty-bitmap:${name}"`;

/** What an image says of its bitmaps, and whether it is sound. */
const bitmapsOf = (image: string): string =>
  `qemu-img info ${image}.qcow2 | sed -n '/bitmaps:/,/refcount/p'; qemu-img check -q ${image}.qcow2 || echo bad`;

describe.skipIf(!hasQemu())('the end of the daemon', () => {
  it.each(ENDS)('comes to every job, wherever it is (%s)', async (end) => {
    await same({
      end,
      drains: true,
      prepare,
      steps: [
        ...['d', 't', 'e', 'u', 'f', 'v'].map((name) => qcow2(name)),
        backup({ ...slow, 'auto-dismiss': false }),
        copied('j', 65536),
        ['blockdev-mirror', { device: 'e', target: 'u', sync: 'full', 'job-id': 'm' }],
        until('m', 'ready'),
        backup({ device: 'f', target: 'v', 'job-id': 'p', 'auto-finalize': false, 'auto-dismiss': false }),
        until('p', 'pending'),
      ],
      after: `
        qemu-img compare e.qcow2 u.qcow2
        qemu-img compare f.qcow2 v.qcow2
        for i in d t e u f v; do qemu-img check -q $i.qcow2 || echo $i; done`,
    });
  });

  it.each(ENDS)('leaves dirty what an incremental backup has not brought to its end (%s)', async (end) => {
    const keep = { persistent: true };
    await same({
      end,
      drains: true,
      prepare,
      steps: [
        qcow2('d'),
        qcow2('t'),
        ...serve('d'),
        bitmap('add', 'b', keep),
        bitmap('add', 'all', keep),
        guest('d', 'write -P 2 0 256k', 'write -P 3 1M 64k'),
        backup({ sync: 'incremental', bitmap: 'b', 'job-id': 'k' }),
        until('k', 'null'),
        // From here on the bitmap has something to lose.
        guest('d', 'write -P 4 512k 192k', 'write -P 5 2M 64k'),
        backup({ sync: 'incremental', bitmap: 'b', ...slow }),
        copied('j', 65536),
        guest('d', 'write -P 6 3M 64k'),
      ],
      after: `${dirty('d', 'b')}; ${dirty('d', 'all')}; ${bitmapsOf('d')}`,
    });
  });

  it.each(ENDS)('stores the bitmaps of a drive whose job waits to be finalized (%s)', async (end) => {
    await same({
      end,
      drains: true,
      prepare,
      steps: [
        qcow2('d'),
        qcow2('t'),
        ...serve('d'),
        bitmap('add', 'b', { persistent: true }),
        guest('d', 'write -P 2 0 256k'),
        backup({ sync: 'bitmap', bitmap: 'b', 'bitmap-mode': 'always', 'auto-finalize': false }),
        until('j', 'pending'),
        guest('d', 'write -P 3 1M 64k'),
      ],
      after: `${dirty('d', 'b')}; ${bitmapsOf('d')}`,
    });
  });
});

describe.skipIf(!hasPeer('qemu-img') || !hasPeer('qemu-io'))('an image that a job makes', () => {
  it.each(ENDS)('is not left behind (%s)', async (end) => {
    const folder = await mkdtemp(join(tmpdir(), 'stillframe-quit-'));
    try {
      const made = (id: string, target: string, more = {}): Step => [
        'drive-backup',
        { device: id, target, sync: 'full', 'job-id': target, ...more },
      ];
      const session: Session = {
        end,
        prepare,
        steps: [
          ...['d', 'e', 'f'].map((name) => qcow2(name)),
          made('d', 'slow', slow),
          copied('slow', 65536),
          made('e', 'waits', { 'auto-finalize': false }),
          until('waits', 'pending'),
          made('f', 'done', { 'auto-dismiss': false }),
          until('done', 'concluded'),
        ],
        after:
          'qemu-img compare f.qcow2 done; for i in d e f; do qemu-img check -q $i.qcow2 || echo $i; done',
      };
      const place = join(folder, 'ours');
      const { answers, events } = await play('stillframe', place, session);
      expect(answers.at(-2)).toEqual({ ended: 0 });
      expect(answers.at(-1)).toMatchObject({ status: 0, said: 'Images are identical.\n' });
      expect(existsSync(join(place, 'done'))).toBe(true);
      expect(readdirSync(place).filter((name) => /slow|waits|partial/.test(name))).toEqual([]);
      const told = (id: string): unknown[] => (events[id] ?? []).slice(-1);
      for (const id of ['slow', 'waits'])
        expect(told(id)).toEqual([{ event: 'JOB_STATUS_CHANGE', data: { status: 'null', id } }]);
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });
});
