/** Monitor command `qemu-io`, and the driver `blkdebug`: the same commands on the same images with QEMU's qemu-io and with our daemon. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { CLI } from '../support/cli.js';
import { hasPeer, run } from '../support/peers.js';
import { type Message, QmpClient } from '../support/qmp.js';

const folder = mkdtempSync(join(tmpdir(), 'stillframe-qemu-io-'));
const at = (name: string): string => join(folder, name);
const daemons: ChildProcess[] = [];
afterAll(() => {
  for (const daemon of daemons) daemon.kill('SIGKILL');
  rmSync(folder, { recursive: true, force: true });
});

/** Without what differs from run to run. */
function normalise(text: string): string[] {
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => line.replace(/; .*ops\/sec\)$/, '; …').replace(/^(\d+,1),\d+:.*$/, '$1,…'));
}

interface Said {
  readonly out: string[];
  readonly errors: string[];
}

/** With QEMU's tool. */
function playTheirs(node: Message, commands: readonly string[]): Said {
  const given = commands.flatMap((command) => ['-c', command]);
  const { stdout, stderr } = spawnSync('qemu-io', ['-d', 'unmap', ...given, `json:${JSON.stringify(node)}`], {
    cwd: folder,
    encoding: 'utf8',
  });
  return { out: normalise(stdout), errors: normalise(stderr.replaceAll(/^qemu-io: /gm, '')) };
}

class Ours {
  readonly client: QmpClient;
  readonly ended: Promise<number | null>;
  out = '';
  errors = '';
  /** What the monitor has answered. */
  readonly answers: string[] = [];
  readonly #process: ChildProcess;

  private constructor(daemon: ChildProcess, client: QmpClient) {
    this.#process = daemon;
    this.client = client;
    this.ended = new Promise((resolve) => daemon.once('exit', resolve));
    daemon.stdout?.on('data', (data) => {
      this.out += String(data);
    });
    daemon.stderr?.on('data', (data) => {
      this.errors += String(data);
    });
  }

  static async start(): Promise<Ours> {
    const place = mkdtempSync(join(folder, 'd'));
    const socket = join(place, 'q');
    const daemon = spawn(
      process.execPath,
      [CLI, 'daemon', '--chardev', `socket,id=c,path=${socket},server=on,wait=off`, '--monitor', 'c'],
      { cwd: folder, stdio: ['ignore', 'pipe', 'pipe'] },
    );
    daemons.push(daemon);
    const client = await QmpClient.connect(socket);
    const ours = new Ours(daemon, client);
    await client.execute('qmp_capabilities');
    return ours;
  }

  async poke(command: string, node = 'n'): Promise<void> {
    const quoted = command.replaceAll(/["\\]/g, '\\$&');
    const given = { 'command-line': `qemu-io ${node} "${quoted}"` };
    const answer = String(await this.client.execute('human-monitor-command', given));
    if (answer !== '') this.answers.push(answer);
  }

  async end({ signal, status = 0 }: { signal?: 'SIGTERM'; status?: number } = {}): Promise<void> {
    if (signal === undefined) await this.client.execute('quit');
    else this.#process.kill(signal);
    expect(await this.ended, this.errors).toBe(status);
    this.client.close();
  }
}

async function playOurs(node: Message, commands: readonly string[], status = 0): Promise<Said> {
  const ours = await Ours.start();
  await ours.client.execute('blockdev-add', { ...node, 'node-name': 'n', discard: 'unmap' });
  for (const command of commands) await ours.poke(command);
  const { out, errors } = ours;
  await ours.end({ status });
  return { out: normalise(out), errors: normalise(errors) };
}

const image = (name: string, ...more: readonly string[]): void => {
  run('qemu-img', ['create', '-q', '-f', 'qcow2', ...more, at(name), '4M']);
  run('qemu-io', ['-c', 'write -q -P 3 0 1k', '-c', 'write -qz 1M 64k', '-c', 'write -q 2M 1', at(name)]);
};

const READS = [
  'read 0 512',
  'read 100 100',
  'read 0 0',
  'read -P 3 0 1k',
  'read -P 1 0 512',
  'read -P 0 -q 0 512',
  'read -P 0 -s 100 0 512',
  'read -P 0 -s 100 -l 10 0 512',
  'read -P 0 -s 600 0 512',
  'read -P 0 -l 600 0 512',
  'read -s 100 0 512',
  'read -v 3 40',
  'read -vq 0 16',
  'read -C 0 512',
  'read 0 512 -q',
  'read -P2 0 512',
  'read -- 0 512',
  'read 1.5k 0x200',
  'read 4M 512',
  'read 3M 2M',
  'read 0 2G',
  'read 0 4M',
  'r 0 2M',
  'readv 0 512',
  'readv -P 3 0 512 512',
  'readv -v 0 16 16',
  'readv 0 2G 2G',
  'readv -P 999 0 512',
  'aio_read -P 3 0 512',
  'aio_flush',
  'aio_read -P 4 0 512',
  'aio_flush',
  'aio_read -v 0 16',
  'aio_flush',
  'aio_read -i 0 512',
  'aio_read 4M 512',
  'aio_flush',
  'length',
  'alloc 0',
  'alloc 0 4M',
  'alloc 100 100M',
  'alloc 5M',
  'map',
];

const WRITES = [
  'write 0 512',
  'write -P 7 1k 3k',
  'write -P 0x21 100 100',
  'write -P 010 300 4',
  'write -z 3M 512',
  'write -zu 1M 64k',
  'write -zn 2M 512',
  'write -zn 3M 64k',
  'write -C 0 512',
  'write -q 0 512',
  'write -f 0 512',
  'write -s pattern 64k 1000',
  'write -z 0 0',
  'write 4M 512',
  'write -c 3136k 64k',
  'write -c 512 64k',
  'write -P 1 -P 2 0 512',
  'writev -P 3 0 512 100',
  'writev -f 0 512',
  'writev 0 3G',
  'aio_write -P 9 0 512 1k',
  'aio_flush',
  'aio_write -z 0 512',
  'aio_flush',
  'aio_write -i 0 512',
  'aio_write 4M 512',
  'aio_flush',
  'write -P 5 512k 3M',
  'read -P 5 512k 3M',
  'discard 2M 64k',
  'discard -q 0 64k',
  'discard -C 100 100',
  'discard 4M 1',
  'd 0 3G',
  'truncate 5M',
  'length',
  'read -P 0 4M 512',
  'flush',
  'map',
];

const WRONG = [
  'read',
  'read 0',
  'read 0 512 3',
  'read x 512',
  'read 0 1kk',
  'read -P 256 0 512',
  'read -P',
  'read -P -q',
  'read 0 512 -P',
  'read -z 0 512',
  'read -1 512',
  'read 8E 512',
  'read 1.5 512',
  'read .5k 1',
  'read 1KiB 1',
  'write',
  'write -x 0 512',
  'write -n 0 512',
  'write -u 0 512',
  'write -zP 1 0 512',
  'write -bz 0 512',
  'write -bf 0 512',
  'write -c 1 1',
  'write -s nofile 0 512',
  'write -s empty 0 512',
  'write -z 0 3G',
  'writev 0',
  'writev 0 x',
  'aio_read 0',
  'aio_write -z 0 512 512',
  'aio_write -u 0 512',
  'aio_write -x 0 1',
  'aio_flush 1',
  'discard 0',
  'discard -x 0 1',
  'truncate',
  'truncate x',
  'truncate -x 0',
  'alloc',
  'alloc 0 512 3',
  'alloc x',
  'map 1',
  'sleep',
  'sleep 1k',
  'sleep -5',
  'sleep 5',
  'length 1',
  'break write_aio',
  'break write_aio A',
  'resume A',
  'resume',
  'remove_break A',
  'wait_break',
  'bogus',
  'help bogus',
  'help alloc',
  'read "0" 512',
];

describe.skipIf(!hasPeer('qemu-io') || !hasPeer('qemu-img'))('the monitor command qemu-io', () => {
  const file = (name: string): Message => ({ driver: 'qcow2', file: { driver: 'file', filename: at(name) } });

  it.each([
    ['reads', READS],
    ['writes', WRITES],
    ['takes wrong commands', WRONG],
  ] as const)('%s as the tool does', async (_, commands) => {
    writeFileSync(at('pattern'), 'abc');
    writeFileSync(at('empty'), '');
    for (const name of ['theirs', 'ours']) image(name);
    const theirs = playTheirs(file('theirs'), commands);
    const ours = await playOurs(file('ours'), commands);
    expect(ours).toEqual(theirs);
    run('qemu-img', ['check', '-q', at('ours')]);
    run('qemu-img', ['compare', '-q', at('theirs'), at('ours')]);
  });

  it('answers what the monitor of QEMU answers', async () => {
    image('drive');
    const ours = await Ours.start();
    await ours.client.execute('blockdev-add', { ...file('drive'), 'node-name': 'n', 'read-only': true });
    const ask = (line: string): Promise<unknown> =>
      ours.client.execute('human-monitor-command', { 'command-line': line });
    const help = 'Try "help qemu-io" for more information\r\n';
    expect(await ask('qemu-io n "write 0 512"')).toBe('Block node is read-only\r\n');
    expect(await ask('qemu-io n "discard 0 512"')).toBe('Block node is read-only\r\n');
    expect(await ask('qemu-io n "info"')).toMatch(/^ {4}compat: 1.1\r\n {4}compression type: zlib\r\n/);
    expect(await ask('qemu-io   n   length ')).toBe('');
    expect(await ask('qemu-io n')).toBe(`qemu-io: string expected\r\n${help}`);
    expect(await ask('qemu-io n "length')).toBe(`qemu-io: string expected\r\n${help}`);
    expect(await ask('qemu-io')).toBe(`qemu-io: block device name expected\r\n${help}`);
    expect(await ask('qemu-io -x n length')).toBe(`qemu-io: unsupported option -x\r\n${help}`);
    expect(await ask('qemu-io n length more')).toBe(
      `qemu-io: extraneous characters at the end of line\r\n${help}`,
    );
    expect(await ask("qemu-io 'n' length")).toBe("Error: Cannot find device='' nor node-name=''n''\r\n");
    expect(await ask('qemu-io -d x length')).toBe("Error: Device 'x' not found\r\n");
    expect(await ask('')).toBe('');
    await ours.end();
    expect(normalise(ours.out)).toEqual([
      'format name: qcow2',
      'cluster size: 64 KiB',
      'vm state offset: 512 MiB',
      'Format specific information:',
      '4 MiB',
    ]);
  });
});

/** What blkdebug is told, and what is done then. */
interface Scenario {
  readonly options: Message;
  readonly commands: readonly string[];
  readonly create?: readonly string[];
  /** Format of the image that lies on blkdebug; default qcow2. */
  readonly format?: 'raw';
  /** The image cannot be closed well, which QEMU does not tell. */
  readonly endsBadly?: true;
  /** QEMU's image has an entry for what could not be written. */
  readonly theirsIsDamaged?: true;
}

const inject = (...rules: readonly Message[]): Message => ({ 'inject-error': rules });

const SCENARIOS: Readonly<Record<string, Scenario>> = {
  'an error of every write': {
    endsBadly: true,
    options: inject({ event: 'write_aio' }),
    commands: ['write 0 64k', 'read 0 64k', 'write 512k 64k'],
  },
  'an error once': {
    options: inject({ event: 'write_aio', once: true, errno: 28 }),
    commands: ['write 0 64k', 'write 0 64k', 'write 128k 64k'],
  },
  'errors of reads, by the event': {
    options: inject({ event: 'read_aio', once: true }),
    commands: ['read 0 512', 'read 0 512', 'read 2M 512'],
  },
  'an error that waits for a request of its type': {
    options: inject({ event: 'read_aio', iotype: 'write', once: true }),
    commands: ['read 0 512', 'read 0 512', 'write 0 512', 'write 0 512'],
  },
  'errors one after the other by states': {
    options: {
      ...inject(
        { event: 'read_aio', state: 1, once: true, errno: 5 },
        { event: 'read_aio', state: 2, once: true, errno: 28 },
      ),
      'set-state': [
        { event: 'read_aio', state: 1, new_state: 2 },
        { event: 'read_aio', state: 2, new_state: 3 },
      ],
    },
    commands: ['read 0 512', 'read 0 512', 'read 0 512'],
  },
  'states of which the first wins': {
    options: {
      ...inject({ event: 'write_aio', state: 7, once: true }, { event: 'write_aio', state: 8, errno: 1 }),
      'set-state': [
        { event: 'read_aio', new_state: 7 },
        { event: 'read_aio', new_state: 8 },
      ],
    },
    commands: ['write 0 512', 'read 0 512', 'write 0 512', 'write 0 512'],
  },
  'several errors of one event': {
    endsBadly: true,
    options: inject(
      { event: 'read_aio', once: true, errno: 5 },
      { event: 'read_aio', once: true, errno: 28 },
      { event: 'read_aio', errno: 1 },
    ),
    commands: ['read 0 512', 'read 0 512', 'read 0 512', 'read 0 512', 'write 0 512', 'read 0 512'],
  },
  'an event that takes the errors of another one away': {
    options: inject(
      { event: 'read_aio', iotype: 'write' },
      { event: 'write_aio', iotype: 'discard', errno: 1 },
    ),
    commands: ['read 0 512', 'write 0 512', 'read 0 512', 'write 0 512'],
  },
  'errors of sectors': {
    // The clusters of data come one after the other, behind the tables.
    options: inject({ event: 'none', sector: 2, iotype: 'write' }),
    format: 'raw',
    commands: ['write 0 1k', 'write 1k 512', 'write 1024 1', 'write 1535 1', 'write 1536 512', 'read 1k 512'],
  },
  'an error number of 0': {
    endsBadly: true,
    options: inject({ event: 'none', errno: 0, iotype: 'read' }, { event: 'none', errno: 5 }),
    commands: ['read 0 512', 'write 0 512'],
  },
  'errors of zeroes and discards': {
    options: inject(
      { event: 'none', iotype: 'write-zeroes', once: true },
      { event: 'none', iotype: 'discard', errno: 28, once: true },
    ),
    format: 'raw',
    commands: ['write 0 64k', 'write -z 0 64k', 'write -z 0 64k', 'discard 0 64k', 'discard 0 64k'],
  },
  'an error when the table of a new cluster is made': {
    options: inject({ event: 'l2_alloc_write', once: true }),
    create: ['-o', 'cluster_size=4k'],
    commands: ['write 3M 512', 'write 3M 512', 'read -P 205 3M 512'],
  },
  'an error when a table is loaded': {
    options: inject({ event: 'l2_load', once: true }),
    commands: ['read -P 3 0 512', 'read -P 3 0 512'],
  },
  'an error of copying what is around a write': {
    options: inject({ event: 'cow_read', once: true }, { event: 'cow_write', errno: 28, once: true }),
    create: ['-b', 'base', '-F', 'qcow2'],
    commands: ['write 3M 512', 'write 3M 512', 'write 3200k 512', 'read -P 205 3M 512'],
  },
  'errors of reading the backing file, and compressed data': {
    options: inject(
      { event: 'read_backing_aio', iotype: 'read', once: true },
      { event: 'read_compressed', errno: 28, once: true },
    ),
    create: ['-b', 'base', '-F', 'qcow2'],
    commands: ['read 3M 512', 'write -c -P 8 3M 64k', 'read 3M 512', 'read -P 8 3M 512'],
  },
  'errors of writing compressed data': {
    theirsIsDamaged: true,
    options: inject({ event: 'write_compressed', errno: 28, once: true }),
    commands: ['write -c -P 8 3M 64k', 'write -c -P 8 3136k 64k', 'read -P 8 3136k 512'],
  },
  'no more than a limit in one request': {
    options: { 'max-transfer': 1024, ...inject({ event: 'none', iotype: 'write', sector: 8, once: true }) },
    format: 'raw',
    commands: [
      'write -P 7 0 16k',
      'read -P 7 0 4k',
      'read -P 7 4k 4k',
      'write -P 8 0 16k',
      'read -P 8 0 16k',
    ],
  },
  'blocks of 4 KiB': {
    options: {
      align: 4096,
      ...inject(
        // QEMU does not look at errors of the reads around a write, and writes what it has not read.
        { event: 'pwritev_rmw_head', state: 1, iotype: 'write', once: true },
        { event: 'pwritev_rmw_after_head', state: 2, iotype: 'write', errno: 28, once: true },
        { event: 'pwritev_rmw_after_tail', state: 3, iotype: 'write', errno: 1, once: true },
      ),
      'set-state': [
        { event: 'pwritev_rmw_head', state: 1, new_state: 2 },
        { event: 'pwritev_done', state: 2, new_state: 3 },
      ],
    },
    format: 'raw',
    commands: [
      'write -P 7 0 64k',
      'write -P 8 100 100',
      'write -P 8 100 100',
      'write -P 8 100 10000',
      'write -P 9 100 10000',
      'read -P 7 0 100',
      'read -P 9 100 10000',
      'read -P 7 10100 1000',
      'write -z 5000 5000',
      'write -z 6000 50',
      'write -z 20000 9000',
      'read -P 0 20000 9000',
      'read -P 7 29000 5000',
      'discard 4k 8k',
    ],
  },
  'least sizes of zeroes and discards': {
    options: {
      align: 512,
      'opt-write-zero': 8192,
      'max-write-zero': 16384,
      'opt-discard': 8192,
      'max-discard': 16384,
      ...inject(
        { event: 'none', iotype: 'write-zeroes', sector: 40, errno: 28, once: true },
        { event: 'none', iotype: 'write', sector: 12, errno: 1, once: true },
        { event: 'none', iotype: 'discard', sector: 2, errno: 5 },
      ),
    },
    format: 'raw',
    commands: [
      'write -P 7 8k 120k',
      'write -z 6k 512',
      'write -z 6k 512',
      'write -z 1k 60k',
      'write -z 1k 60k',
      'read -P 0 1k 60k',
      'read -P 7 61k 3k',
      'discard 1k 512',
      'discard 1k 8k',
      'discard 0 8k',
      'discard 8k 60k',
    ],
  },
};

it('lets requests go on that a throttle group keeps, once it has no limits, and at the end', async () => {
  const ours = await Ours.start();
  const limits = (given: Message): Promise<unknown> =>
    ours.client.execute('qom-set', { path: 'g', property: 'limits', value: given });
  await ours.client.execute('object-add', { 'qom-type': 'throttle-group', id: 'g' });
  const file = { driver: 'null-co', size: 1 << 20, 'read-zeroes': true };
  await ours.client.execute('blockdev-add', {
    driver: 'throttle',
    'node-name': 'n',
    'throttle-group': 'g',
    file,
  });
  // Each of them is let through only hours after the one before.
  await limits({ 'bps-read': 1, 'iops-write': 1, 'iops-size': 1 });
  for (const command of ['aio_read', 'aio_read', 'aio_write', 'aio_write'])
    await ours.poke(`${command} 0 64k`);
  await limits({ 'bps-read': 0, 'iops-write': 0, 'iops-size': 0 });
  await ours.poke('aio_flush');
  expect(
    normalise(ours.out)
      .filter((line) => / at offset /.test(line))
      .sort(),
  ).toEqual([
    'read 65536/65536 bytes at offset 0',
    'read 65536/65536 bytes at offset 0',
    'wrote 65536/65536 bytes at offset 0',
    'wrote 65536/65536 bytes at offset 0',
  ]);
  // A burst goes through before the limit is felt.
  await limits({ 'bps-read': 1, 'bps-read-max': 65536, 'bps-read-max-length': 4 });
  for (const _ of [1, 2, 3, 4, 5, 6]) await ours.poke('aio_read 0 64k');
  await ours.end({ signal: 'SIGTERM' });
});

describe.skipIf(!hasPeer('qemu-io') || !hasPeer('qemu-img'))('blkdebug', () => {
  it.each(Object.entries(SCENARIOS))('has %s', async (_, scenario) => {
    const { options, commands, create = [], format, endsBadly, theirsIsDamaged } = scenario;
    image('base');
    run('qemu-io', ['-c', 'write -q -P 6 3M 256k', at('base')]);
    const node = (name: string): Message => {
      if (format === 'raw') run('qemu-img', ['create', '-q', '-f', 'raw', at(name), '4M']);
      else image(name, ...create);
      const file = { driver: 'blkdebug', image: { driver: 'file', filename: at(name) }, ...options };
      return { driver: format ?? 'qcow2', file };
    };
    const theirs = playTheirs(node('theirs'), commands);
    const ours = await playOurs(node('ours'), commands, endsBadly ? 1 : 0);
    expect(ours).toEqual(endsBadly ? { ...theirs, errors: ours.errors } : theirs);
    if (format === undefined) run('qemu-img', ['check', '-q', at('ours')]);
    if (theirsIsDamaged) return;
    const formats = ['-f', format ?? 'qcow2', '-F', format ?? 'qcow2'];
    run('qemu-img', ['compare', '-q', ...formats, at('theirs'), at('ours')]);
  });

  it('suspends requests at breakpoints, while others go on', async () => {
    image('drive');
    const ours = await Ours.start();
    const file = { driver: 'blkdebug', image: { driver: 'file', filename: at('drive') } };
    await ours.client.execute('blockdev-add', { driver: 'qcow2', 'node-name': 'n', file });
    const commands = [
      'break write_aio A',
      'break write_aio B',
      'aio_write -P 1 0 512',
      'wait_break A',
      'resume A',
      'wait_break B',
      'read -P 3 512 512',
      'write -P 2 128k 512',
      'resume C',
      'resume B',
      'aio_flush',
      'read -P 1 0 512',
      'break read_aio X',
      'break pwritev_done X',
      'remove_break X',
      'remove_break X',
      'break flush_to_os F',
      'break bogus X',
      'read 0 512',
    ];
    for (const command of commands) await ours.poke(command);
    // What nobody resumes does not keep the daemon from its end.
    await ours.poke('break write_aio C');
    await ours.poke('break l2_load D');
    await ours.poke('aio_write -P 4 64k 512');
    await ours.poke('wait_break C');
    await ours.end({ signal: 'SIGTERM' });
    const written = (offset: number): string[] => [
      `wrote 512/512 bytes at offset ${offset}`,
      '512 bytes, 1 ops; …',
    ];
    const read = (offset: number): string[] => [
      `read 512/512 bytes at offset ${offset}`,
      '512 bytes, 1 ops; …',
    ];
    expect(normalise(ours.out)).toEqual([
      "blkdebug: Suspended request 'B'",
      "blkdebug: Suspended request 'A'",
      "blkdebug: Resuming request 'A'",
      ...read(512),
      ...written(131072),
      'Could not resume request: No such file or directory',
      "blkdebug: Resuming request 'B'",
      ...written(0),
      ...read(0),
      'Could not remove breakpoint X: No such file or directory',
      'Could not set breakpoint: No such file or directory',
      ...read(0),
      "blkdebug: Suspended request 'C'",
      "blkdebug: Resuming request 'C'",
      ...written(65536),
    ]);
    run('qemu-img', ['check', '-q', at('drive')]);
  });
});
