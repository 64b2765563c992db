/** Every verb in every state of a job: answers and events as QEMU's. */
import { describe, it } from 'vitest';
import {
  action,
  backup,
  hasQemu,
  jobs,
  MiB,
  qcow2,
  raw,
  type Step,
  same,
  sh,
  transaction,
  until,
} from '../support/sessions.js';

/** Verbs that do not end a job. */
const verbs = (id: string): readonly Step[] => [
  ...(['job-pause', 'job-pause', 'job-resume', 'job-resume'] as const).map((verb): Step => [verb, { id }]),
  ...['block-job-pause', 'block-job-pause', 'block-job-resume', 'block-job-resume'].map(
    (verb): Step => [verb, { device: id }],
  ),
  ['job-complete', { id }],
  ['block-job-complete', { device: id }],
  ['job-dismiss', { id }],
  ['block-job-dismiss', { id }],
  ...[100, -1, 0].map((speed): Step => ['block-job-set-speed', { device: id, speed }]),
  ...jobs,
];
const finalize = (id: string): readonly Step[] => [
  ['job-finalize', { id }],
  ['block-job-finalize', { id }],
];
const cancel = (id: string): readonly Step[] => [
  ['job-cancel', { id }],
  ['block-job-cancel', { device: id }],
  ['block-job-cancel', { device: id, force: true }],
];
const dismiss: Step = ['job-dismiss', { id: 'j' }];
const over = until('j', 'null');
const waits = { 'auto-finalize': false, 'auto-dismiss': false };

const session = (...steps: readonly Step[]): Parameters<typeof same>[0] => ({
  prepare: `
    for i in d t t2; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
    qemu-img create -q -f raw r.raw 1M
    qemu-io -c 'write -P 1 0 1M' d.qcow2 >/dev/null`,
  steps: [...['d', 't', 't2'].map((name) => qcow2(name)), raw('r'), ...steps],
});

describe.skipIf(!hasQemu())('the verbs of a job', () => {
  it('that runs', async () => {
    await same(
      session(
        backup({ sync: 'none' }),
        ...verbs('j'),
        ...finalize('j'),
        ...cancel('j'),
        over,
        ...cancel('j'),
        ...finalize('j'),
        ...verbs('j'),
      ),
    );
  });

  it('that is paused', async () => {
    await same(
      session(
        backup({ sync: 'none' }),
        ['job-pause', { id: 'j' }],
        ...jobs,
        ['block-job-pause', { device: 'j' }],
        ['job-complete', { id: 'j' }],
        ['block-job-complete', { device: 'j' }],
        dismiss,
        ...finalize('j'),
        ['block-job-set-speed', { device: 'j', speed: 100 }],
        ...jobs,
        ['block-job-cancel', { device: 'j' }],
        ...jobs,
        ['block-job-cancel', { device: 'j', force: true }],
        over,
        backup({ sync: 'none' }),
        ['block-job-pause', { device: 'j' }],
        ['job-cancel', { id: 'j' }],
        over,
      ),
    );
  });

  it('that waits for its end, or has come to it', async () => {
    const pending = until('j', 'pending');
    const concluded = until('j', 'concluded');
    await same(
      session(
        backup({ 'auto-finalize': false }),
        pending,
        ...verbs('j'),
        ...cancel('j'),
        over,
        backup(waits),
        pending,
        ...jobs,
        ...finalize('j'),
        concluded,
        ...verbs('j'),
        ...cancel('j'),
        ...finalize('j'),
        backup(waits),
        pending,
        ['job-cancel', { id: 'j' }],
        concluded,
        ...jobs,
        ...cancel('j'),
        ...finalize('j'),
        ['block-job-dismiss', { id: 'j' }],
        dismiss,
        backup(waits),
        pending,
        ['block-job-cancel', { device: 'j' }],
        concluded,
        ...jobs,
        dismiss,
        backup({ 'auto-dismiss': false }),
        concluded,
        ...jobs,
        dismiss,
        ...jobs,
      ),
    );
  });

  it('that waits for another one, and is there when the daemon quits', async () => {
    const stays = { 'auto-dismiss': false };
    await same(
      session(
        transaction(
          [
            action(backup(stays)),
            action(backup({ device: 'r', target: 't2', sync: 'none', 'job-id': 'k', ...stays })),
          ],
          'grouped',
        ),
        until('j', 'waiting'),
        ...verbs('j'),
        ...finalize('j'),
        ['block-job-cancel', { device: 'j' }],
        until('j', 'concluded'),
        until('k', 'concluded'),
        ...jobs,
        ...verbs('k'),
      ),
    );
  });

  it('that makes an image', async () => {
    const create = (options: object): Step => ['blockdev-create', { 'job-id': 'c', options }];
    await same(
      session(
        create({ driver: 'file', filename: 'x', size: 1000 }),
        until('c', 'concluded'),
        ...jobs,
        ...finalize('c'),
        ...cancel('c'),
        ['block-job-dismiss', { id: 'c' }],
        ...['job-pause', 'job-resume', 'job-complete'].map((verb): Step => [verb, { id: 'c' }]),
        ['block-job-set-speed', { device: 'c', speed: 1 }],
        create({ driver: 'file', filename: 'x', size: 1000 }),
        ['job-dismiss', { id: 'c' }],
        create({ driver: 'file', filename: '/nonexistent/x', size: 1000 }),
        until('c', 'concluded'),
        ['query-jobs'],
        ['job-dismiss', { id: 'c' }],
        ['blockdev-create', { 'job-id': '1', options: { driver: 'file', filename: 'x', size: 1000 } }],
        create({ driver: 'nope' }),
        create({ driver: 'raw' }),
        create({ driver: 'qcow2' }),
        create({ driver: 'qcow2', file: 'nope' }),
      ),
    );
  });

  it('that makes an image is refused for the mistake that QEMU refuses it for', async () => {
    const create = (options: object): readonly Step[] => [
      ['blockdev-create', { 'job-id': 'c', options }],
      until('c', 'concluded', 'null'),
      ['query-jobs'],
      ['job-dismiss', { id: 'c' }],
    ];
    const image = (more: object) => create({ driver: 'qcow2', file: 'f', size: MiB, ...more });
    const file = (name: string): Step => [
      'blockdev-add',
      { driver: 'file', 'node-name': name, filename: `${name}.img` },
    ];
    const on = { 'data-file': 'g', 'data-file-raw': true };
    await same({
      ...session(
        ...create({ driver: 'file', filename: 'f.img', size: 1000 }),
        ...create({ driver: 'file', filename: 'g.img', size: 1000 }),
        ...create({ driver: 'file', filename: 'h.img', size: 1000, preallocation: 'metadata' }),
        file('f'),
        file('g'),
        ...[{ size: MiB + 1 }, { size: 2 ** 52 }, { file: 'nope' }].flatMap(image),
        ...[1234, 128, 4 * MiB, 0].flatMap((size) => image({ 'cluster-size': size })),
        ...[7, 128, 0].flatMap((bits) => image({ 'refcount-bits': bits })),
        ...[
          ...[{ 'lazy-refcounts': true }, { 'refcount-bits': 8 }, { 'extended-l2': true }],
          ...[{ 'compression-type': 'zstd' }, { 'data-file': 'g' }],
        ].flatMap((more) => image({ version: 'v2', ...more })),
        ...[
          ...[{ 'backing-file': 'x', preallocation: 'full' }, { 'backing-fmt': 'qcow2' }],
          ...[
            { 'backing-file': 'x', 'backing-fmt': 'nope' },
            { 'extended-l2': true, 'cluster-size': 512 },
          ],
          ...[{ 'data-file-raw': true }, { ...on, 'backing-file': 'x' }],
        ].flatMap(image),
        sh('touch i.img'),
        ...image({ file: { driver: 'file', filename: 'i.img' }, 'extended-l2': true }),
        sh("head -c 64k /dev/zero | tr '\\0' x > g.img; qemu-img info i.img | grep extended"),
        ...image(on),
        ['blockdev-add', { driver: 'qcow2', 'node-name': 'q', file: 'f', 'data-file': 'g' }],
        ...image({}),
        ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
        file('i'),
        ['block-export-add', { type: 'nbd', id: 'e', 'node-name': 'i' }],
        ...image({ file: 'i' }),
      ),
      after: `qemu-img info f.img | grep -v size; qemu-img check f.img; stat -c %s g.img
        qemu-io -f qcow2 -c 'read -P 120 0 64k' -c 'read -P 0 64k 960k' f.img`,
    });
  });
});
