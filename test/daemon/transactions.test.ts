/** Transactions: one member that fails at each place, groups, and what is taken back. */
import { describe, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  action,
  backup,
  bitmap,
  blkdebug,
  hasQemu,
  jobs,
  nodes,
  qcow2,
  raw,
  type Session,
  type Step,
  same,
  transaction,
  until,
} from '../support/sessions.js';

const job = (device: string, target: string, id: string, more: Message = {}): Message =>
  action(backup({ device, target, 'job-id': id, ...more }));
const edit = (verb: string, node: string, name: string, more: Message = {}): Message =>
  action(bitmap(verb, name, { node, ...more }));
const abort: Message = { type: 'abort', data: {} };
const a = job('d', 't', 'a');
const b = job('e', 't2', 'b');

const session = (...steps: readonly Step[]): Session => ({
  drains: true,
  prepare: `
    for i in d e t t2; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
    for i in d e; do qemu-io -c 'write -P 1 0 1M' $i.qcow2 >/dev/null; done
    qemu-img create -q -f raw r.raw 1M
    qemu-img create -q -f raw small.raw 512k`,
  steps: [...['d', 'e', 't', 't2'].map((name) => qcow2(name)), raw('r'), raw('small'), ...steps],
});

/** Each of them fails. */
const FAILING: readonly (readonly unknown[])[] = [
  [a, job('e', 'small', 'b')],
  [a, job('e', 'nope', 'b')],
  [a, job('nope', 't2', 'b')],
  [a, abort],
  [abort, a],
  [a, job('e', 't2', 'a')],
  [a, job('e', 't', 'b')],
  [a, job('t', 't2', 'b')],
  [a, edit('add', 'd', 'x'), abort],
  [edit('add', 'd', 'x'), job('d', 't', 'a', { sync: 'bitmap', bitmap: 'x', 'bitmap-mode': 'never' }), abort],
  [job('d', 't', 'a', { sync: 'incremental', bitmap: 'nope' }), job('nope', 't2', 'b')],
  [job('d', 't', 'a', { speed: -1 }), b],
  [job('d', 't', '1'), b],
  [b, job('d', 't', '1')],
  [b, job('d', 't', 'c', { speed: -1 })],
  [edit('add', 'd', 'x'), edit('add', 'd', 'x')],
  [edit('add', 'd', 'x'), edit('remove', 'd', 'x'), abort],
  [
    edit('add', 'd', 'x'),
    edit('add', 'd', 'y'),
    action(['block-dirty-bitmap-merge', { node: 'd', target: 'x', bitmaps: ['y'] }]),
    edit('clear', 'd', 'x'),
    abort,
  ],
  [edit('clear', 'd', 'old'), edit('disable', 'd', 'old'), edit('remove', 'd', 'old'), abort],
  [{ type: 'x' }],
  [{}],
  [5],
  [{ type: 'abort' }],
  [{ type: 'abort', data: { x: 1 } }],
  [{ type: 'blockdev-backup' }],
  [{ type: 'blockdev-backup', data: {} }],
  [{ type: 'blockdev-backup', data: { device: 'd' } }],
];

describe.skipIf(!hasQemu())('a transaction', () => {
  it('that fails leaves nothing, wherever it fails', async () => {
    await same(
      session(
        bitmap('add', 'old'),
        ...FAILING.flatMap((actions): Step[] => [
          transaction(actions),
          transaction(actions, 'grouped'),
          ...['a', 'b'].map((id) => until(id, 'null')),
        ]),
        nodes,
        ...jobs,
        ['transaction'],
        ['transaction', { actions: 5 }],
        ['transaction', { actions: [], properties: { 'completion-mode': 'x' } }],
        ['transaction', { actions: [], properties: { x: 1 } }],
        transaction([]),
        transaction([], 'grouped'),
      ),
    );
  });

  it('has its jobs end together, or each by itself', async () => {
    const waits = { 'auto-finalize': false };
    const stays = { 'auto-dismiss': false };
    const pending = ['a', 'b'].map((id) => until(id, 'pending'));
    const concluded = ['a', 'b'].map((id) => until(id, 'concluded'));
    const gone = ['a', 'b'].map((id) => until(id, 'null'));
    const dismiss = ['a', 'b'].map((id): Step => ['job-dismiss', { id }]);
    await same(
      session(
        blkdebug('bad', 'r', { iotype: 'write', errno: 5, once: false }),
        transaction([job('d', 't', 'a', waits), job('e', 't2', 'b', waits)], 'grouped'),
        ...pending,
        ...jobs,
        ['job-finalize', { id: 'a' }],
        ...gone,
        transaction([job('d', 't', 'a', waits), job('e', 't2', 'b', waits)], 'grouped'),
        ...pending,
        ['job-cancel', { id: 'b' }],
        ...gone,
        // The first of them has much to do yet when the second one fails.
        transaction([job('d', 't', 'a', { ...stays, sync: 'none' }), job('e', 'bad', 'b', stays)], 'grouped'),
        ...concluded,
        ...jobs,
        ...dismiss,
        transaction([job('d', 't', 'a', stays), job('e', 'bad', 'b', stays)]),
        ...concluded,
        ...jobs,
        ...dismiss,
        transaction([job('d', 't', 'a', { ...stays, sync: 'none' }), job('e', 't2', 'b', stays)], 'grouped'),
        until('b', 'waiting'),
        ...jobs,
        ['job-pause', { id: 'a' }],
        until('a', 'paused'),
        ['job-finalize', { id: 'b' }],
        ['job-cancel', { id: 'a' }],
        ...concluded,
        ...jobs,
        ...dismiss,
        transaction([
          job('d', 't', 'a', { ...stays, ...waits }),
          job('e', 't2', 'b', { ...stays, ...waits }),
        ]),
        ...pending,
        ['job-cancel', { id: 'a' }],
        until('a', 'concluded'),
        ['job-finalize', { id: 'b' }],
        ...concluded,
        ...jobs,
        ...dismiss,
      ),
    );
  });

  it('takes bitmaps and the instants of several drives at once', async () => {
    const mode = { bitmap: 'x', 'bitmap-mode': 'always' };
    await same(
      session(
        transaction([
          edit('add', 'd', 'x', { granularity: 65536 }),
          job('d', 't', 'a', { sync: 'bitmap', ...mode }),
          edit('add', 'e', 'x'),
          job('e', 't2', 'b', mode),
        ]),
        until('a', 'null'),
        until('b', 'null'),
        nodes,
        transaction([edit('add', 'd', 'y'), edit('disable', 'd', 'x'), edit('remove', 'e', 'x')]),
        nodes,
      ),
    );
  });
});
