/** Nodes that filter and fail requests, and small commands: the same sessions with our daemon and with QEMU's. */
import { describe, it } from 'vitest';
import type { Message } from '../support/qmp.js';
import { hasQemu, type Step, same } from '../support/sessions.js';

describe.skipIf(!hasQemu)('a session', () => {
  it('with blkdebug nodes that are told wrong things', async () => {
    const configs: Readonly<Record<string, string>> = {
      good: '# a comment\n[inject-error]\nevent = "write_aio"\nonce = "yes"\n[set-state "x"]\nevent = "read_aio"\n',
      event: '[inject-error]\nevent = "nope"\n',
      group: '[weird]\nevent = "write_aio"\n',
      nogroup: 'event = "write_aio"\n',
      key: '[inject-error]\nevent = "l2_update"\nbogus = "1"\n',
      number: '[inject-error]\nevent = "l2_update"\nstate = "x"\n',
      flag: '[inject-error]\nevent = "l2_update"\nonce = "maybe"\n',
      noevent: '[inject-error]\nstate = "1"\n',
      words: '[inject-error]\nhello world\n',
      spaces: '[set-state]\nevent="write_aio"\n',
      iotype: '[inject-error]\nevent = "write_aio"\niotype = "foo"\n',
    };
    const node = (given: Message): Step[] => [
      [
        'blockdev-add',
        { driver: 'blkdebug', 'node-name': 'b', image: { driver: 'null-co', size: 65536 }, ...given },
      ],
      ['blockdev-del', { 'node-name': 'b' }],
    ];
    const prepare = Object.entries(configs)
      .map(([name, text]) => `cat > ${name} <<'END'\n${text}END\n`)
      .join('');
    await same({
      prepare,
      steps: [
        ...Object.keys(configs).flatMap((config) => node({ config })),
        ...node({ config: 'nofile' }),
        ...node({ align: 3 }),
        ...node({ align: -5 }),
        ...node({ align: 2 ** 31 }),
        ...node({ align: 1024, 'max-transfer': 1000 }),
        ...node({ align: 1024, 'opt-write-zero': 1000 }),
        ...node({ align: 1024, 'opt-write-zero': 4096, 'max-write-zero': 6144 }),
        ...node({ align: 512, 'opt-discard': 1000 }),
        ...node({ 'opt-discard': 4096, 'max-discard': 1024 }),
        ...node({ align: 1, 'max-transfer': 1 }),
        ...node({ 'inject-error': [{ event: 'nope' }] }),
        ...node({ 'inject-error': [{}] }),
        ...node({ 'inject-error': [{ event: 'write_aio', iotype: 'x' }] }),
        ...node({ 'set-state': [{ event: 'write_aio' }] }),
        ...node({ 'take-child-perms': ['write'], 'unshare-child-perms': ['write'] }),
      ],
    });
  });
});
