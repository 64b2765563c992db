/** Nodes below an image that makes them longer: who else may use them, and what they are when it is gone. */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import {
  backup,
  bitmap,
  del,
  exported,
  hasQemu,
  play,
  type Session,
  type Step,
  same,
  serve,
  sh,
  until,
} from '../support/sessions.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-image-files-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const file = (name: string): Step => ['blockdev-add', { driver: 'file', 'node-name': name, filename: name }];
const filter = (name: string, below: string, driver: Message = { driver: 'throttle' }): Step => [
  'blockdev-add',
  { 'node-name': name, file: below, 'throttle-group': 'g', ...driver },
];
const image = (below: string, more: Message = {}): Step => [
  'blockdev-add',
  { driver: 'qcow2', 'node-name': 'd', file: below, ...more },
];
const group: Step = ['object-add', { 'qom-type': 'throttle-group', id: 'g' }];
/** An export, readable and writable, that may not be. */
const exports = (node: string): Step[] =>
  [false, true].flatMap((writable): Step[] => [
    ['block-export-add', { ...exported(node), writable }],
    ['block-export-del', { id: `e-${node}` }],
  ]);
const prepare =
  'qemu-img create -q -f qcow2 f 64M; head -c 3M /dev/urandom >> f; truncate -s 4M f; head -c 4M /dev/urandom > u';
const write = sh(
  "qemu-io -f raw -c 'write -P 5 0 1M' -c 'write -P 6 5M 4M' -c flush 'nbd+unix:///d?socket=n.sock' | grep -v ops",
);

describe.skipIf(!hasQemu())('a node below an image', () => {
  it.each(['f', 't'])("is nobody else's, with the image on '%s'", async (below) => {
    await same({
      prepare,
      steps: [
        group,
        ...['f', 'u'].map(file),
        filter('t', 'f'),
        filter('c', 'f'),
        image(below),
        ...serve('d'),
        ...exports('f'),
        ...exports('c'),
        ...(below === 't' ? exports('t') : []),
        ['block_resize', { 'node-name': 'f', size: 1 << 20 }],
        ...['f', below].map((target) => backup({ device: 'u', target, 'filter-node-name': 'F' })),
        ['blockdev-mirror', { device: 'f', target: 'u', sync: 'full', 'job-id': 'm' }],
        write,
        ['block-export-del', { id: 'e-d', mode: 'hard' }],
        del('d'),
        // As long as the image has made it.
        ['block-export-add', exported('f')],
        sh('nbdinfo --size nbd+unix:///f?socket=n.sock; stat -c %s f'),
      ],
      after: 'qemu-img check f',
    });
  });

  it('is shared by images that are only read, and is open for writing where one is to be written to', async () => {
    const other = (below: string, more: Message = {}): Step[] => [
      ['blockdev-add', { driver: 'qcow2', 'node-name': 'o', file: below, ...more }],
      del('o'),
    ];
    const both = (below: string): Step[] => [...other(below), ...other(below, { 'read-only': true })];
    await same({
      prepare,
      steps: [
        group,
        file('f'),
        filter('t', 'f'),
        image('f', { 'read-only': true }),
        ...['f', 't'].flatMap(both),
        del('d'),
        image('f'),
        ...['f', 't'].flatMap(both),
        del('d'),
        image('t', { 'read-only': true }),
        ...['f', 't'].flatMap(both),
        ['blockdev-add', { driver: 'file', 'node-name': 'r', filename: 'f', 'read-only': true }],
        del('d'),
        ...both('r'),
      ],
    });
  });

  it('keeps images away while it is exported, or what lies on it', async () => {
    const away = (node: string, writable: boolean): Step[] => [
      ['block-export-add', { ...exported(node), writable }],
      image('f'),
      image('t'),
      ['block-export-del', { id: `e-${node}` }],
    ];
    await same({
      prepare,
      steps: [
        group,
        file('f'),
        filter('t', 'f'),
        ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
        ...['f', 't'].flatMap((node) => [...away(node, false), ...away(node, true)]),
        image('t'),
      ],
    });
  });

  it.each<[string, Step[], string[]]>([
    [
      'the source of a backup',
      [backup({ device: 'f', target: 'u', speed: 1, 'filter-node-name': 'F' })],
      ['f'],
    ],
    [
      'the target of a backup',
      [backup({ device: 'u', target: 'f', speed: 1, 'filter-node-name': 'F' })],
      ['f', 't'],
    ],
    [
      'the source of a mirror through a filter',
      [['blockdev-mirror', { device: 't', target: 'u', sync: 'full', 'job-id': 'j', speed: 1 }]],
      ['f', 't'],
    ],
  ])('keeps an image away while it is %s', async (_, steps, below) => {
    const session: Session = {
      prepare,
      steps: [
        group,
        ...['f', 'u'].map(file),
        filter('t', 'f'),
        ['nbd-server-start', { addr: { type: 'unix', data: { path: 'n.sock' } } }],
        ...steps,
        ...below.map((node) => image(node)),
      ],
    };
    // How far the job has come is no matter.
    const theirs = await play('qemu-storage-daemon', join(folder, 'theirs'), session);
    const ours = await play('stillframe', join(folder, 'ours'), session);
    expect(ours.answers).toEqual(theirs.answers);
  });

  const alone = async (session: Session): Promise<unknown[]> => {
    const { answers } = await play('stillframe', join(folder, 'ours'), session);
    return answers.flatMap((answer) => (JSON.stringify(answer).match(/"desc":"([^"]*)"/) ?? [])[1] ?? []);
  };

  it('has no instants, backups and bitmaps of its own', async () => {
    const wrong = await alone({
      prepare,
      steps: [
        group,
        file('f'),
        file('u'),
        filter('t', 'f'),
        image('t'),
        ...['f', 't'].flatMap((node): Step[] => [
          bitmap('add', 'b', { node }),
          backup({ device: node, target: 'u' }),
          filter('c', node, { driver: 'copy-before-write', target: 'u', 'throttle-group': undefined }),
        ]),
        // Once nobody writes to the image it is a node like others.
        [
          'blockdev-reopen',
          { options: [{ driver: 'qcow2', 'node-name': 'd', file: 't', 'read-only': true }] },
        ],
        bitmap('add', 'b', { node: 'f' }),
        ['blockdev-reopen', { options: [{ driver: 'qcow2', 'node-name': 'd', file: 't' }] }],
        backup({ device: 'f', target: 'u' }),
        until('j', 'null'),
      ],
    });
    const refusal = (node: string, by: string): string =>
      `Node '${node}' belongs to an image on '${by}' that is written to: use the node of the image`;
    expect(wrong).toEqual([
      ...Array<string>(3).fill(refusal('f', 't')),
      ...Array<string>(3).fill(refusal('t', 'd')),
      "Node 'f' has dirty bitmaps, which do not see all that an image on it writes: remove them first",
    ]);
  });

  it('does not take an image past an instant that is held of it', async () => {
    const wrong = await alone({
      prepare,
      steps: [
        file('f'),
        file('u'),
        filter('c', 'f', { driver: 'copy-before-write', target: 'u', 'throttle-group': undefined }),
        image('f'),
        image('c'),
      ],
    });
    expect(wrong).toEqual(["Node 'c' holds an instant of 'f'"]);
  });

  it('can get another length while nobody takes space for an image', async () => {
    const taken: Step[] = [
      ...serve('d'),
      write,
      sh('stat -c %s f'),
      ['block-export-del', { id: 'e-d', mode: 'hard' }],
      del('d'),
      sh('stat -c %s f; qemu-img check -U f'),
    ];
    await same({
      prepare: 'qemu-img create -q -f qcow2 f 64M',
      steps: [
        file('f'),
        ['blockdev-add', { driver: 'preallocate', 'node-name': 'p', file: 'f', 'prealloc-size': 3 << 20 }],
        ['block_resize', { 'node-name': 'f', size: 5 << 20 }],
        image('p'),
        ...taken,
        // Space is in hand, and is gone again.
        ['block_resize', { 'node-name': 'f', size: 20 << 20 }],
        image('p'),
        ['block-export-add', { ...exported('d'), writable: true }],
        sh("qemu-io -f raw -c 'write -P 7 20M 16M' nbd+unix:///d?socket=n.sock | grep -v ops"),
      ],
      after:
        "stat -c %s f; qemu-img check f; qemu-io -c 'read -P 5 0 1M' -c 'read -P 7 20M 16M' f | grep -v ops",
    });
  });
});
