/** What nodes tell of the writes that came to them, and who uses which node. */
import { describe, it } from 'vitest';
import {
  blkdebug,
  type Command,
  del,
  event,
  exported,
  guest,
  hasQemu,
  qcow2,
  raw,
  type Step,
  same,
  serve,
  until,
} from '../support/sessions.js';

const add = (driver: string, name: string, more: object): Command => [
  'blockdev-add',
  { driver, 'node-name': name, ...more },
];
const statistics: readonly Step[] = [
  ['query-blockstats'],
  ['query-blockstats', { 'query-nodes': false }],
  ['query-blockstats', { 'query-nodes': true }],
];
const graph: Step = ['x-debug-query-block-graph'];
const threshold = (name: string, bytes: number): Step => [
  'block-set-write-threshold',
  { 'node-name': name, 'write-threshold': bytes },
];
const thresholds: Step = ['query-named-block-nodes', { flat: true }];

const prepare = `
  truncate -s 1M a.raw k.raw
  for i in b t d v; do qemu-img create -q -f qcow2 $i.qcow2 1M; done
  qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 o.qcow2
  qemu-img create -q -f qcow2 -o data_file=e.data e.qcow2 1M
`;

describe.skipIf(!hasQemu())('what nodes tell of their use, beside QEMU', () => {
  it('says how far each node was written to, and what its files discarded', () =>
    same({
      prepare,
      steps: [
        raw('a', { discard: 'unmap' }),
        qcow2('o', { discard: 'unmap' }),
        qcow2('t'),
        add('copy-on-read', 'c', { file: 'o' }),
        ['object-add', { 'qom-type': 'throttle-group', id: 'g' }],
        add('throttle', 'th', { 'throttle-group': 'g', discard: 'unmap', file: 'a' }),
        ...statistics,
        ...serve('th', 'c', 't'),
        guest('th', 'write 64k 64k', 'write -z 512k 64k', 'discard 0 64k', 'discard 128k 64k'),
        guest('c', 'write 64k 64k', 'write 128k 64k', 'discard 64k 64k', 'flush'),
        guest('t', 'write -z 0 64k', 'write 960k 64k', 'flush'),
        ...statistics,
      ],
    }));

  it('counts what failed as written', () =>
    same({
      prepare,
      steps: [
        raw('a'),
        blkdebug('e', 'a', { iotype: 'write', errno: 5 }),
        ...serve('e'),
        guest('e', 'write 64k 64k'),
        ...statistics,
      ],
    }));

  it('has the chain of a device under it', () =>
    same({
      prepare,
      peer: 'qemu-system-x86_64',
      options: ['--drive', 'file=o.qcow2,format=qcow2,id=d0,if=none,node-name=o'],
      steps: [
        ...statistics,
        ['query-block'],
        ['human-monitor-command', { 'command-line': 'qemu-io o "write 64k 64k"' }],
        ...statistics,
        graph,
      ],
    }));

  it('tells once of a write beyond a threshold', () =>
    same({
      prepare,
      steps: [
        raw('a'),
        threshold('nope', 1),
        ['block-set-write-threshold', { 'node-name': 'a' }],
        ...serve('a'),
        threshold('a', 512 * 1024),
        thresholds,
        guest('a', 'write 448k 64k'),
        thresholds,
        guest('a', 'write 500k 16k', 'write 600k 4k'),
        event('BLOCK_WRITE_THRESHOLD', { 'node-name': 'a', 'amount-exceeded': 4096 }),
        thresholds,
        threshold('a', 4096),
        threshold('a', 0),
        guest('a', 'write 64k 64k'),
        threshold('a', 4096),
        guest('a', 'write -z 64k 64k'),
        event('BLOCK_WRITE_THRESHOLD', { 'node-name': 'a', 'amount-exceeded': 126_976 }),
        threshold('a', 1024 * 1024),
        ['block-export-del', { id: 'e-a' }],
        ['blockdev-del', { 'node-name': 'a' }],
        threshold('a', 1),
      ],
    }));

  it('says who uses which node, and for what', () =>
    same({
      prepare,
      steps: [
        raw('a', { offset: 65536, size: 65536 }),
        qcow2('o'),
        qcow2('b', { 'read-only': true }),
        qcow2('e'),
        add('blkdebug', 'bd', { image: { driver: 'file', filename: 'k.raw' } }),
        add('raw', 'k', { file: 'bd' }),
        qcow2('d'),
        qcow2('t'),
        add('copy-before-write', 'cbw', { file: 'd', target: 't' }),
        add('snapshot-access', 's', { file: 'cbw' }),
        add('preallocate', 'p', { file: { driver: 'file', filename: 'v.qcow2' } }),
        add('qcow2', 'v', { file: 'p' }),
        add('compress', 'z', { file: 'v' }),
        graph,
        ...serve('a', 'o', 'e', 'k', 'cbw', 'z'),
        ['block-export-add', exported('s')],
        ['block-export-add', exported('b')],
        graph,
      ],
    }));

  it('keeps others from what blkdebug takes or does not share', () => {
    const debug = (
      name: string,
      image: string,
      take: readonly string[],
      unshare: readonly string[],
    ): Step => [
      'blockdev-add',
      {
        ...{ driver: 'blkdebug', 'node-name': name, image },
        ...(take.length === 0 ? {} : { 'take-child-perms': take }),
        ...(unshare.length === 0 ? {} : { 'unshare-child-perms': unshare }),
      },
    ];
    const share = (node: string, writable: boolean): Step => [
      'block-export-add',
      { ...exported(node), writable },
    ];
    return same({
      prepare,
      steps: [
        raw('a'),
        add('qcow2', 'd', { file: { driver: 'file', 'node-name': 'f', filename: 'd.qcow2' } }),
        ...serve(),
        debug('x', 'a', ['write'], []),
        debug('y', 'a', [], ['write']),
        debug('y', 'a', [], ['consistent-read']),
        graph,
        share('a', false),
        share('a', true),
        del('y'),
        share('a', true),
        debug('y', 'a', [], ['write']),
        ['block-export-del', { id: 'e-a' }],
        del('x'),
        debug('y', 'a', [], ['write', 'resize']),
        share('a', true),
        share('y', true),
        ['block_resize', { 'node-name': 'a', size: 2 * 1024 * 1024 }],
        debug('z', 'f', ['write'], []),
        debug('z', 'f', ['consistent-read'], []),
        debug('w', 'd', ['resize', 'write-unchanged'], ['resize']),
        debug('v', 'd', ['nonsense'], []),
        graph,
      ],
    });
  });

  it('says what jobs use', () =>
    same({
      prepare,
      steps: [
        raw('a'),
        qcow2('t'),
        qcow2('o'),
        add('copy-on-read', 'c', { file: 'a' }),
        ['blockdev-backup', { device: 'a', target: 't', 'job-id': 'j', sync: 'none' }],
        ...serve('a'),
        graph,
        ['job-cancel', { id: 'j' }],
        until('j', 'null'),
        ['block-export-del', { id: 'e-a' }],
        ['blockdev-del', { 'node-name': 'c' }],
        ['blockdev-mirror', { device: 'a', target: 't', 'job-id': 'j', sync: 'full' }],
        until('j', 'ready'),
        graph,
        ['block-job-cancel', { device: 'j' }],
        until('j', 'null'),
        graph,
      ],
    }));
});
