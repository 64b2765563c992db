/** Arguments of `blockdev-backup`, good and bad ones: the same errors as QEMU, and of several the same one first. */
import { describe, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  backup,
  bitmap,
  copied,
  hasQemu,
  jobs,
  qcow2,
  raw,
  type Step,
  same,
  until,
} from '../support/sessions.js';

const over = until('j', 'null');
const cancel: Step = ['job-cancel', { id: 'j' }];

const VALUES = [null, 1, 1.5, true, 'x', [], {}, -1, ''];
/** Rate limits have a session of their own. */
const ARGUMENTS = [
  ...['job-id', 'device', 'target', 'sync', 'bitmap', 'bitmap-mode', 'compress', 'on-source-error'],
  ...['on-target-error', 'auto-finalize', 'auto-dismiss', 'filter-node-name', 'x-perf'],
];
const PERFORMANCE = ['use-copy-range', 'max-workers', 'max-chunk', 'unknown'];
const NUMBERS = [0, 4096, 65536, 2 ** 31 - 1, 2 ** 31];

/** Everything that can be wrong with a backup, each by itself. */
const MISTAKES: readonly Message[] = [
  { bitmap: 'nope' },
  { 'bitmap-mode': 'always' },
  { sync: 'none', bitmap: 'b', 'bitmap-mode': 'always' },
  { sync: 'incremental' },
  { bitmap: 'b', 'bitmap-mode': 'never' },
  { target: 'd' },
  { target: 'r', compress: true },
  { target: 'large' },
  { target: 'read-only' },
  { target: 'busy' },
  { target: 'nope' },
  { target: 'file' },
  { target: 'base' },
  { device: 'nope' },
  { 'x-perf': { 'max-workers': 0 } },
  { 'x-perf': { 'max-chunk': -1 } },
  { 'x-perf': { 'max-chunk': 512 } },
  { 'filter-node-name': 'd' },
  { 'filter-node-name': '1x' },
  { 'filter-node-name': 'x'.repeat(40) },
  { 'job-id': 'other' },
  { 'job-id': '1' },
  { 'job-id': '' },
  { speed: -1 },
];

const pairs = MISTAKES.flatMap((one, index) =>
  MISTAKES.slice(index + 1).map((other): Step => backup({ ...one, ...other })),
);

describe.skipIf(!hasQemu())('a backup', () => {
  it('takes arguments of the types that QEMU takes', async () => {
    const tried = (given: Message): Step[] => [backup(given), ...['j', 'x'].map((id) => until(id, 'null'))];
    await same({
      drains: true,
      prepare: 'for i in d t; do qemu-img create -q -f qcow2 $i.qcow2 1M; done',
      steps: [
        qcow2('d'),
        qcow2('t'),
        ['blockdev-backup'],
        ['blockdev-backup', { device: 'd' }],
        ['blockdev-backup', { target: 'd' }],
        ['blockdev-backup', { device: 'd', target: 't' }],
        ['blockdev-backup', { device: 'd', sync: 'full' }],
        ['blockdev-backup', { device: 'd', target: 't', sync: 'full' }],
        ['blockdev-backup', { device: 'd', target: 't', sync: 'full', unknown: 1 }],
        ...ARGUMENTS.flatMap((name) => VALUES.flatMap((value) => tried({ [name]: value }))),
        ...PERFORMANCE.flatMap((name) =>
          [...VALUES, ...NUMBERS].flatMap((value) => tried({ 'x-perf': { [name]: value } })),
        ),
        ...['x', 1.5, true, null, -1].flatMap((speed) => tried({ speed })),
        ...['mode', 'format', 'target', 'device', 'sync'].flatMap((name) =>
          VALUES.map((value): Step => {
            const given = { device: 'd', target: '/nonexistent/t', sync: 'full', [name]: value };
            return ['drive-backup', given];
          }),
        ),
      ],
    });
  });

  it('is refused for the mistake that QEMU refuses it for', async () => {
    await same({
      drains: true,
      prepare: `
        qemu-img create -q -f qcow2 base.qcow2 4M
        qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2
        for i in t busy read-only source; do qemu-img create -q -f qcow2 $i.qcow2 4M; done
        qemu-img create -q -f qcow2 large.qcow2 5M
        qemu-img create -q -f raw r.raw 4M`,
      steps: [
        qcow2('d', {
          backing: { driver: 'qcow2', 'node-name': 'base', file: { driver: 'file', filename: 'base.qcow2' } },
        }),
        qcow2('t', { file: { driver: 'file', filename: 't.qcow2', 'node-name': 'file' } }),
        ...['large', 'busy', 'source'].map((name) => qcow2(name)),
        qcow2('read-only', { 'read-only': true }),
        raw('r'),
        bitmap('add', 'b'),
        backup({ device: 'source', target: 'busy', sync: 'none', 'job-id': 'other' }),
        ...MISTAKES.map((given) => backup(given)),
        ...pairs,
        ...jobs,
        ['job-cancel', { id: 'other' }],
        until('other', 'null'),
      ],
    });
  });

  it('goes in chunks that its rate limit counts, zeroes as well', async () => {
    const limited = (given: Message): Step[] => [
      backup({ speed: 1, ...given }),
      copied('j', 65536),
      ['job-pause', { id: 'j' }],
      until('j', 'paused'),
      cancel,
      over,
    ];
    await same({
      prepare: `
        for i in d t z; do qemu-img create -q -f qcow2 $i.qcow2 4M; done
        qemu-io -c 'write -P 1 0 4M' d.qcow2 >/dev/null
        qemu-img create -q -f raw r.raw 4M`,
      steps: [
        ...['d', 't', 'z'].map((name) => qcow2(name)),
        raw('r'),
        ...limited({ 'x-perf': { 'max-chunk': 65536 } }),
        ...limited({ 'x-perf': { 'max-chunk': 100_000, 'max-workers': 1 } }),
        ...limited({ device: 'r' }),
        ...limited({ device: 'z', 'x-perf': { 'max-chunk': 131_072 } }),
        backup({ speed: 1 }),
        ['block-job-set-speed', { device: 'j', speed: 0 }],
        over,
      ],
    });
  });
});
