/** Snapshots within images, made and taken out while the images are in use. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  action,
  backup,
  bitmap,
  type Command,
  del,
  guest,
  hasQemu,
  nodes,
  play,
  qcow2,
  raw,
  type Step,
  same,
  serve,
  sh,
  transaction,
  until,
} from '../support/sessions.js';

const snapshot = (device: string, name: string): Command => [
  'blockdev-snapshot-internal-sync',
  { device, name },
];
const remove = (device: string, which: object): Step => [
  'blockdev-snapshot-delete-internal-sync',
  { device, ...which },
];
const together = (...steps: readonly Command[]): Step => transaction(steps.map(action));

const prepare = `
  for i in d e t; do qemu-img create -q -f qcow2 $i.qcow2 4M; qemu-io -c 'write -P 1 0 2M' $i.qcow2 >/dev/null; done
  truncate -s 4M a.raw
  qemu-img create -q -f qcow2 -o refcount_bits=2 r.qcow2 1M
  qemu-io -c 'write -P 1 0 128k' -c 'write -c -P 2 128k 64k' -c 'write -c -P 3 192k 64k' r.qcow2 >/dev/null
  qemu-img create -q -f qcow2 -o data_file=x.data x.qcow2 1M
`;

describe.skipIf(!hasQemu())('internal snapshots, beside QEMU', () => {
  it('are made, read and taken out while a guest writes in between', () =>
    same({
      prepare,
      steps: [
        qcow2('d', { discard: 'unmap' }),
        ...serve('d'),
        snapshot('d', 'one'),
        snapshot('d', 'one'),
        guest('d', 'write -P 2 0 1M', 'write -P 3 3M 64k'),
        snapshot('d', 'two'),
        snapshot('d', '2'),
        guest('d', 'write -P 4 0 64k', 'discard 1M 64k', 'write -z 1088k 64k'),
        nodes,
        ...[{}, { name: 'nope' }, { id: '7' }, { id: '1', name: 'two' }].map((which) => remove('d', which)),
        remove('d', { id: '2', name: 'two' }),
        remove('d', { name: '2' }),
        snapshot('d', 'again'),
        guest('d', 'write -P 6 2M 64k', 'read -P 4 0 64k', 'read -P 2 64k 960k', 'read -P 1 1152k 800k'),
        ['block-export-del', { id: 'e-d' }],
        del('d'),
        sh('qemu-img check d.qcow2'),
        ...['one', 'again'].map((name) =>
          sh(`qemu-img convert -l ${name} -O raw d.qcow2 s.raw; md5sum s.raw`),
        ),
      ],
      after: `
        for i in one again; do qemu-img snapshot -d $i d.qcow2; done
        qemu-img check d.qcow2; qemu-img convert -O raw d.qcow2 s.raw; md5sum s.raw`,
    }));

  it('are made with other things or not at all', () =>
    same({
      prepare,
      steps: [
        qcow2('d'),
        qcow2('e'),
        together(snapshot('d', 'a'), snapshot('e', 'a')),
        together(snapshot('d', 'b'), ['abort']),
        together(snapshot('d', 'b'), snapshot('d', 'b')),
        together(snapshot('d', 'c'), bitmap('add', 'm')),
        together(bitmap('add', 'm'), snapshot('d', 'd')),
        transaction([action(snapshot('d', 'g'))], 'grouped'),
        del('d'),
        del('e'),
      ],
      after: `
        for i in d e; do qemu-img snapshot -l $i.qcow2 | awk '{ print $1, $2 }'; qemu-img check $i.qcow2; done`,
    }));

  it('leave images of every kind sound', () => {
    const kinds = {
      extended: 'extended_l2=on,cluster_size=16k',
      small: 'cluster_size=512',
      wide: 'refcount_bits=64',
      narrow: 'refcount_bits=4',
      old: 'compat=0.10',
      lazy: 'lazy_refcounts=on',
    };
    const names = [...Object.keys(kinds), 'packed'];
    const made = Object.entries(kinds).map(
      ([name, options]) => `qemu-img create -q -f qcow2 -o ${options} ${name}.qcow2 4M
        qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2M 100k' -c 'write -z 3M 64k' ${name}.qcow2 >/dev/null`,
    );
    return same({
      prepare: `${made.join('\n')}
        qemu-img convert -c -O qcow2 -o cluster_size=4k wide.qcow2 packed.qcow2`,
      steps: [
        ...names.map((name) => qcow2(name, { discard: 'unmap' })),
        ...serve(...names),
        ...names.flatMap((name) => [
          snapshot(name, 'one'),
          guest(name, 'write -P 3 500k 70k', 'discard 0 128k', 'write -P 4 3000k 10k', 'write -z 2M 50k'),
          snapshot(name, 'two'),
          snapshot(name, 'three'),
          guest(name, 'write -P 5 510k 20k', 'write -P 6 64k 64k', 'write -P 7 3100k 300k', 'flush'),
          remove(name, { name: 'one' }),
          guest(name, 'write -P 8 520k 4k', 'write -P 9 900k 200k'),
          remove(name, { name: 'three' }),
        ]),
        ...names.map((name): Step => ['block-export-del', { id: `e-${name}` }]),
        ...names.map(del),
        ...names.map((name) =>
          sh(`qemu-img check -q ${name}.qcow2 && echo sound
            qemu-img convert -O raw ${name}.qcow2 now.raw; qemu-img convert -l two -O raw ${name}.qcow2 two.raw
            md5sum now.raw two.raw; qemu-img snapshot -d two ${name}.qcow2; qemu-img check -q ${name}.qcow2; echo $?`),
        ),
      ],
    });
  });

  it('are refused where they cannot be', () =>
    same({
      drains: true,
      prepare,
      steps: [
        ...[qcow2('d'), qcow2('t'), raw('a'), qcow2('r'), qcow2('x'), qcow2('e', { 'read-only': true })],
        ['blockdev-snapshot-internal-sync', { device: 'd' }],
        ...['nope', 'a', 'x', 'e'].map((name) => snapshot(name, 's')),
        ...['nope', 'a', 'x', 'e'].map((name) => remove(name, { id: '1' })),
        snapshot('d', ''),
        // Refcounts of two bits count to three.
        ...['1', '2', '3', '4'].map((name) => snapshot('r', name)),
        backup({ sync: 'none' }),
        ...['d', 't'].flatMap((name) => [snapshot(name, 's'), remove(name, { id: '1' })]),
        ['job-cancel', { id: 'j' }],
        until('j', 'null'),
        snapshot('t', 's'),
      ],
      after: 'for i in d t; do qemu-img check $i.qcow2; done',
    }));
});

describe.skipIf(!hasQemu())('an internal snapshot of a drive that is written to', () => {
  it('is one instant', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'stillframe-internal-'));
    // Each pattern comes to the first place before the second one.
    const rounds = Array.from({ length: 400 }, (_, index) => (index % 250) + 1);
    const writes = rounds.flatMap((n) => [`write -q -P ${n} 0 64k`, `write -q -P ${n} 3M 64k`]);
    const names = ['s1', 's2', 's3', 's4', 's5', 's6'];
    const byteAt = (offset: number): string => `$(od -An -tu1 -j ${offset} -N 1 s.raw)`;
    try {
      const { answers } = await play('stillframe', join(folder, 'x'), {
        prepare: `${prepare}\nprintf '${writes.join('\\n')}\\n' > writes`,
        steps: [
          qcow2('d'),
          ...serve('d'),
          sh(
            "(qemu-io -f raw 'nbd+unix:///d?socket=n.sock' <writes >log 2>&1; echo $? >done) >/dev/null 2>&1 &",
          ),
          ...names.map((name): Step => snapshot('d', name)),
          remove('d', { name: 's3' }),
          sh('while [ ! -e done ]; do sleep 0.05; done; cat done; grep -c failed log'),
          remove('d', { name: 's5' }),
        ],
        after: `qemu-img check -q d.qcow2 && qemu-img check -q r.qcow2 && echo sound
          for i in s1 s2 s4 s6; do qemu-img convert -l $i -O raw d.qcow2 s.raw
            echo $(((${byteAt(0)} - ${byteAt(3 * 1024 * 1024)} + 250) % 250)) $(cmp -n 65535 -i 0:1 s.raw s.raw && echo whole); done`,
      });
      const [ended, after] = answers.flatMap((one) => (one as { said?: string }).said ?? []).slice(-2);
      expect(ended).toBe('0\n0\n');
      const [sound, ...lines] = String(after).trim().split('\n');
      expect(sound).toBe('sound');
      for (const line of lines) expect(['0 whole', '1 whole', '2 whole']).toContain(line);
      expect(lines).toHaveLength(4);
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
