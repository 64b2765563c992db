/** What can be done to the source of a backup that runs: the target is the instant all the same, as with QEMU. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  action,
  backup,
  bitmap,
  type Command,
  copied,
  del,
  exported,
  guest,
  hasQemu,
  jobs,
  nodes,
  play,
  qcow2,
  raw,
  type Session,
  type Step,
  same,
  serve,
  sh,
  sha256,
  transaction,
  until,
} from '../support/sessions.js';

const over = until('j', 'null');
const goOn: readonly Step[] = [
  ['block-job-set-speed', { device: 'j', speed: 0 }],
  ['job-resume', { id: 'j' }],
];
/** A backup that has copied its first cluster, and stands still until it may {@link goOn}. */
const slow = (given: Message = {}): readonly Step[] => [
  backup({ speed: 1, 'x-perf': { 'max-chunk': 65536 }, 'filter-node-name': 'cbw', ...given }),
  copied('j', 65536),
  ['job-pause', { id: 'j' }],
  until('j', 'paused'),
];
const cover = (node: string, overlay: string): Command => ['blockdev-snapshot', { node, overlay }];
const overlay = (name: string): Command => qcow2(name, { backing: null });
const reopen = (...options: readonly Message[]): Step => ['blockdev-reopen', { options }];
const file = (name: string): Command => [
  'blockdev-add',
  { driver: 'file', 'node-name': `${name}-file`, filename: `${name}.qcow2` },
];
const on = (name: string, more: Message = {}): Message => ({
  ...{ driver: 'qcow2', 'node-name': name, file: `${name}-file` },
  ...more,
});

const session = (...steps: readonly Step[]): Session => ({
  drains: true,
  prepare: `
    for i in d t o p q; do qemu-img create -q -f qcow2 $i.qcow2 2M; done
    qemu-img create -q -f qcow2 longer.qcow2 4M; truncate -s 2M r.raw
    for i in d.qcow2 r.raw; do qemu-io -f \${i#*.} -c 'write -P 1 0 1M' -c 'write -P 2 1536k 64k' $i >/dev/null; done
    qemu-img bitmap --add d.qcow2 kept
    qemu-img convert -O raw d.qcow2 was.raw`,
  steps,
  after: `
    qemu-io -r -f qcow2 -c 'read -P 7 0 256k' t.qcow2 | grep -c bytes
    qemu-img compare -f qcow2 -F raw t.qcow2 was.raw
    for i in d o p t; do qemu-img check $i.qcow2 | head -1; qemu-img info $i.qcow2 | grep -A5 'name: kept'; done
    for i in d o p; do qemu-img map -U --output=json -f qcow2 $i.qcow2 | grep -c '"present": true, .*"data": true'; done`,
});

/** The errors that ours had for commands of these names. */
async function errors(names: readonly string[], played: Session): Promise<unknown[]> {
  const folder = mkdtempSync(join(tmpdir(), 'stillframe-source-'));
  try {
    const { answers: all } = await play('stillframe', join(folder, 'x'), played);
    return all.flatMap((one) => {
      const { execute, answer } = one as { execute?: string; answer: { error?: { desc: string } } };
      return names.includes(execute ?? '') ? [answer.error?.desc] : [];
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

describe.skipIf(!hasQemu())('the source of a backup', () => {
  it('gets overlays, which guests write to', async () => {
    await same(
      session(
        ...[qcow2('d'), qcow2('t'), overlay('o'), overlay('p'), overlay('q')],
        ...serve('d'),
        ...slow({ sync: 'full' }),
        cover('cbw', 'o'),
        cover('t', 'o'),
        cover('d', 'o'),
        nodes,
        guest('d', 'write -P 5 0 128k', 'write -z 256k 64k', 'write -P 5 1M 64k'),
        cover('d', 'q'),
        [
          'blockdev-snapshot-sync',
          { 'node-name': 'o', 'snapshot-file': 's.qcow2', 'snapshot-node-name': 's' },
        ],
        cover('s', 'p'),
        guest('d', 'write -P 6 512k 64k', 'read -P 5 1M 64k', 'read -P 1 576k 64k'),
        ...jobs,
        del('d'),
        del('o'),
        ...goOn,
        over,
        nodes,
        guest('d', 'read -P 6 512k 64k', 'read -P 5 0 128k', 'read -P 2 1536k 64k'),
      ),
    );
  });

  it('gets one in the transaction that starts the backup', async () => {
    await same(
      session(
        ...[qcow2('d'), qcow2('t'), overlay('o'), overlay('p')],
        ...serve('d'),
        transaction([action(backup()), action(cover('d', 'o'))]),
        over,
        guest('d', 'write -P 5 0 128k'),
        ...[del('t'), qcow2('t', { backing: 'o' }), backup({ device: 'o', sync: 'none' })],
        cover('o', 'p'),
        ['job-cancel', { id: 'j' }],
        over,
      ),
    );
  });

  it.each([
    ['an image keeps', 'd', 'kept'],
    ['is in memory', 'd', 'own'],
    ['is that of a raw image', 'r', 'own'],
  ])('gets one while a bitmap that %s says what is copied', async (_, node, name) => {
    const given = { device: node, sync: 'incremental', bitmap: name, target: 't' };
    await same(
      session(
        ...[node === 'r' ? raw('r') : qcow2('d'), qcow2('t'), overlay('o')],
        ...(name === 'own' ? [bitmap('add', 'own', { node })] : []),
        ...serve(node),
        guest(node, 'write -P 7 0 256k'),
        ...slow(given),
        guest(node, 'write -P 8 128k 64k'),
        cover(node, 'o'),
        guest(node, 'write -P 9 64k 256k'),
        ...goOn,
        over,
        sha256(name, node),
        ['block-dirty-bitmap-clear', { node, name }],
        ['block-export-del', { id: `e-${node}`, mode: 'hard' }],
        ...[del('o'), del(node)],
      ),
    );
  });

  it('is opened anew while a bitmap that the image keeps says what is copied', async () => {
    await same(
      session(
        ...[file('d'), ['blockdev-add', on('d')] as const, qcow2('t')],
        ...serve('d'),
        guest('d', 'write -P 7 0 256k'),
        ...slow({ sync: 'incremental', bitmap: 'kept' }),
        reopen(on('d', { discard: 'unmap' })),
        bitmap('add', 'other'),
        guest('d', 'write -P 8 128k 256k'),
        ...goOn,
        over,
        ...[sha256('kept'), sha256('other')],
        nodes,
      ),
    );
  });

  it('gets none where the overlay would be taken for it, or is not as long', async () => {
    const busy = "Node 'd' is busy: block device is in use by block job: backup";
    const start = action(backup({ sync: 'top' }));
    const played = session(
      ...[qcow2('d'), qcow2('t'), overlay('o'), overlay('longer')],
      transaction([start, action(cover('d', 'o'))]),
      transaction([action(cover('d', 'o')), start]),
      ...slow({ sync: 'top' }),
      cover('d', 'o'),
      ...[['job-cancel', { id: 'j' }] as const, over],
      ...slow(),
      cover('d', 'longer'),
    );
    const length = "The overlay is not as long as 'd', which a job copies from";
    expect(await errors(['transaction', 'blockdev-snapshot'], played)).toEqual([busy, busy, busy, length]);
  });
});

describe.skipIf(!hasQemu())('a bitmap that is exported', () => {
  it('stays what it is when its image gets an overlay', async () => {
    await same({
      ...session(
        ...[qcow2('d'), overlay('o')],
        ...serve(),
        ['block-export-add', exported('d', { writable: true, bitmaps: ['kept'] })],
        guest('d', 'write -P 7 0 256k'),
        cover('d', 'o'),
        guest('d', 'write -P 8 512k 64k'),
        sh(
          `qemu-img map --output=json --image-opts driver=nbd,export=d,server.type=unix,server.path=n.sock,x-dirty-bitmap=qemu:dirty-bitmap:kept`,
        ),
        ['block-dirty-bitmap-remove', { node: 'd', name: 'kept' }],
      ),
    });
  });
});
