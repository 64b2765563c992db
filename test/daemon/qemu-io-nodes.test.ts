/** Commands of `qemu-io` that change nodes. */
import { describe, it } from 'vitest';
import { type Command, hasQemu, nodes, qcow2, raw, same, sh } from '../support/sessions.js';

const io = (node: string, line: string): Command => [
  'human-monitor-command',
  { 'command-line': `qemu-io ${node} "${line}"` },
];

const prepare = `
  truncate -s 1M a.raw c.raw
  for i in b p r; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
  qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 o.qcow2
`;

describe.skipIf(!hasQemu())('qemu-io on nodes, beside QEMU', () => {
  it('opens them anew', () =>
    same({
      prepare,
      peer: 'qemu-system-x86_64',
      steps: [
        raw('a'),
        qcow2('o'),
        qcow2('r'),
        ...['reopen -r', 'write 0 64k', 'reopen -w', 'write 0 64k', 'reopen'].map((line) => io('a', line)),
        ...['-r -w', '-x', 'foo', '-c nonsense', '-c none', '-c writethrough'].map((words) =>
          io('a', `reopen ${words}`),
        ),
        ...['foo=bar', 'read-only=on', 'read-only=off', 'discard=unmap'].map((words) =>
          io('a', `reopen -o ${words}`),
        ),
        io('a', 'reopen -r -o read-only=on'),
        ...['detect-zeroes=on', 'file.filename=x', 'driver=qcow2'].map((words) =>
          io('a', `reopen -o ${words}`),
        ),
        ...['-r', '-w', '-o lazy-refcounts=on', '-o backing=r', '-o backing.driver=raw'].map((words) =>
          io('o', `reopen ${words}`),
        ),
        io('nope', 'reopen -r'),
        nodes,
      ],
    }));

  it('takes space ahead', () =>
    same({
      prepare,
      peer: 'qemu-system-x86_64',
      steps: [
        raw('c'),
        qcow2('p'),
        ...['off 2M', 'metadata 3M', 'falloc 3M'].map((words) => io('c', `truncate -m ${words}`)),
        sh('stat -c "%s %b" c.raw'),
        ...['full 4M', 'full 1M', 'off 1M', 'nonsense 1M'].map((words) => io('c', `truncate -m ${words}`)),
        sh('stat -c "%s %b" c.raw'),
        ...['metadata 2M', 'falloc 3M', 'full 4M', 'full 1M'].map((words) => io('p', `truncate -m ${words}`)),
        ['blockdev-del', { 'node-name': 'p' }],
        sh('qemu-img check -q p.qcow2 && qemu-img info p.qcow2 | grep virtual'),
      ],
    }));
});
