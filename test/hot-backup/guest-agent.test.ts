/** The guest agent freezes the guest for the moment of the instant. */
import { createServer, type Server, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { backupRunning, createEngine, type Engine, type HotBackupOptions } from '#src/index.js';
import { startStillframe } from '../support/cli.js';
import { hasProgram, Machine } from './machine.js';

type Answer = (name: string, given: Readonly<Record<string, unknown>>) => unknown;

interface Command {
  readonly execute: string;
  readonly arguments?: Readonly<Record<string, unknown>>;
}

/** What an agent does with a command that it is not to answer. */
const SILENCE = Symbol('silence');
const HANG_UP = Symbol('hang up');

/** An agent that does as qemu-ga does, unless the test says otherwise. */
class FakeAgent {
  /** Commands that came in, without those that only synchronize. */
  readonly commands: string[] = [];
  frozen = false;
  /** What whoever connects is sent first. */
  greeting = Buffer.alloc(0);
  readonly path: string;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #answer: Answer;

  private constructor(path: string, answer: Answer) {
    this.path = path;
    this.#answer = answer;
    this.#server = createServer((socket) => {
      this.#sockets.add(socket);
      socket.on('error', () => undefined);
      socket.write(this.greeting);
      let text = '';
      socket.on('data', (data) => {
        // Whatever is before a byte of 0xff is no command.
        text = (text + data.toString('latin1')).replace(/^.*\xff/s, '');
        const lines = text.split('\n');
        text = lines.pop() ?? '';
        for (const line of lines) void this.#take(socket, JSON.parse(line));
      });
    });
  }

  static async listen(path: string, answer: Answer = () => undefined): Promise<FakeAgent> {
    const agent = new FakeAgent(path, answer);
    await new Promise<void>((resolve) => agent.#server.listen(path, resolve));
    return agent;
  }

  async #take(socket: Socket, { execute, arguments: given = {} }: Command): Promise<void> {
    if (execute !== 'guest-sync-delimited') this.commands.push(execute);
    const own = await this.#answer(execute, given);
    if (own === SILENCE) return;
    if (own === HANG_UP) {
      socket.destroy();
      return;
    }
    const answer = own ?? this.#usual(execute, given);
    const delimiter = execute === 'guest-sync-delimited' ? '\xff' : '';
    socket.write(Buffer.from(`${delimiter}${JSON.stringify(answer)}\n`, 'latin1'));
  }

  #usual(name: string, given: Readonly<Record<string, unknown>>): unknown {
    switch (name) {
      case 'guest-sync-delimited':
        return { return: given['id'] };
      case 'guest-fsfreeze-status':
        return { return: this.frozen ? 'frozen' : 'thawed' };
      case 'guest-fsfreeze-freeze':
        this.frozen = true;
        return { return: 2 };
      case 'guest-fsfreeze-thaw':
        this.frozen = false;
        return { return: 2 };
      default:
        return { error: { class: 'CommandNotFound', desc: `The command ${name} has not been found` } };
    }
  }

  close(): void {
    for (const socket of this.#sockets) socket.destroy();
    this.#server.close();
  }
}

const program = 'qemu-system-x86_64';
let engine: Engine;
let machine: Machine;
let agent: FakeAgent | undefined;

beforeEach(async () => {
  engine = await createEngine({ workers: 1 });
  machine = await Machine.start(program);
});
afterEach(async () => {
  agent?.close();
  agent = undefined;
  await engine.close();
  await machine.remove();
});

async function listen(answer?: Answer): Promise<FakeAgent> {
  agent = await FakeAgent.listen(machine.at('agent'), answer);
  return agent;
}

const backup = (more: Partial<HotBackupOptions> = {}) =>
  backupRunning(engine, {
    qmp: machine.qmp,
    disks: [{ device: 'disk0', target: machine.at('target') }],
    guestAgent: machine.at('agent'),
    ...more,
  });

const jobs = async (): Promise<number> => {
  const found = await machine.monitor.execute('query-jobs');
  return Array.isArray(found) ? found.length : -1;
};

const AROUND = ['guest-fsfreeze-freeze', 'guest-fsfreeze-status', 'guest-fsfreeze-thaw'];

describe.skipIf(!hasProgram(program))('the guest', { timeout: 180_000 }, () => {
  it('is frozen while the instant is taken, and no longer', async () => {
    const seen: [command: string, jobs: number][] = [];
    const fake = await listen(async (name) => {
      if (name.startsWith('guest-fsfreeze')) seen.push([name, await jobs()]);
    });
    machine.mark();
    await backup({ disks: [{ device: 'disk0', target: machine.at('target'), bitmap: 'daily' }] });
    expect(machine.momentOf([machine.at('target')])).toBe(0);
    expect(seen).toEqual([
      ['guest-fsfreeze-status', 0],
      ['guest-fsfreeze-freeze', 0],
      ['guest-fsfreeze-status', 1],
      ['guest-fsfreeze-thaw', 1],
    ]);
    expect(fake.frozen).toBe(false);
  });

  it('is not asked for anything where no agent answers, and nothing is made', async () => {
    const fake = await listen(() => SILENCE);
    await expect(backup({ guestAgentTimeoutMs: 200 })).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_GUEST_AGENT',
      message: expect.stringMatching(
        /no answer to 'guest-sync-delimited' within 0.2 s; is qemu-guest-agent running/,
      ),
    });
    expect(fake.commands).toEqual([]);
    expect(await machine.leftovers()).toEqual([]);
  });

  it('may have said something to somebody else before', async () => {
    const fake = await listen();
    // The rest of an answer, and answers to questions of others.
    const rest = Buffer.from('rn": 5}\n{"return": {}}\n{"return": 77}\n');
    fake.greeting = rest;
    await backup();
    expect(fake.commands.slice(1)).toEqual(AROUND);
  });

  it.each<[what: string, answer: Answer, text: string]>([
    [
      'cannot be frozen',
      (name) =>
        name === 'guest-fsfreeze-freeze'
          ? { error: { class: 'GenericError', desc: 'failed to open /mnt' } }
          : undefined,
      "guest agent command 'guest-fsfreeze-freeze': failed to open /mnt",
    ],
    [
      'takes too long to freeze',
      (name) => (name === 'guest-fsfreeze-freeze' ? SILENCE : undefined),
      "no answer to 'guest-fsfreeze-freeze'",
    ],
    [
      'does not stay frozen',
      // The first one is before it is frozen.
      (name) => (name === 'guest-fsfreeze-status' ? { return: 'thawed' } : undefined),
      'the guest thawed before the instant was taken',
    ],
    [
      'loses its agent once it is frozen',
      (() => {
        let hungUp = false;
        return (name: string) => {
          if (name !== 'guest-fsfreeze-status' || agent?.frozen !== true || hungUp) return undefined;
          hungUp = true;
          return HANG_UP;
        };
      })(),
      'the connection was closed',
    ],
  ])('that %s is thawed, and not backed up', async (_, answer, text) => {
    const fake = await listen(answer);
    await expect(backup({ guestAgentTimeoutMs: 500 })).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_GUEST_AGENT',
      message: expect.stringContaining(text),
    });
    expect(fake.commands.at(-1)).toBe('guest-fsfreeze-thaw');
    expect(fake.frozen).toBe(false);
    expect(await machine.leftovers()).toEqual([]);
  });

  it('that cannot be thawed is told of', async () => {
    await listen((name) =>
      name === 'guest-fsfreeze-thaw' ? { error: { class: 'GenericError', desc: 'no' } } : undefined,
    );
    await expect(backup()).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_GUEST_AGENT',
      message: expect.stringMatching(
        /^the guest may be frozen still.*guest-fsfreeze-thaw': no; thaw it with/,
      ),
    });
    expect(await machine.leftovers()).toEqual([]);
  });

  it('is thawed where the instant cannot be taken', async () => {
    const fake = await listen(async (name) => {
      // Somebody else has a job on the drive.
      if (name !== 'guest-fsfreeze-freeze') return;
      const { monitor } = machine;
      await monitor.execute('blockdev-add', { driver: 'null-co', 'node-name': 'null', size: 8 << 20 });
      await monitor.execute('blockdev-backup', {
        device: 'drv0',
        target: 'null',
        sync: 'none',
        'job-id': 'theirs',
      });
    });
    await expect(backup()).rejects.toMatchObject({ code: 'ERR_STILLFRAME_QMP', qmpClass: 'GenericError' });
    expect(fake.commands.slice(1)).toEqual(['guest-fsfreeze-freeze', 'guest-fsfreeze-thaw']);
    expect(fake.frozen).toBe(false);
    expect(await machine.leftovers()).toEqual([]);
  });

  it('is thawed where the backup is interrupted while it freezes', async () => {
    let freezing = (): void => undefined;
    const frozen = new Promise<void>((resolve) => {
      freezing = resolve;
    });
    const fake = await listen((name) => {
      if (name !== 'guest-fsfreeze-freeze') return undefined;
      freezing();
      return SILENCE;
    });
    const { child, finished } = startStillframe([
      ...[
        'backup',
        '--qmp',
        machine.qmp,
        '--device',
        'disk0',
        machine.at('target'),
        '--guest-agent',
        fake.path,
      ],
    ]);
    await frozen;
    child.kill('SIGINT');
    const { status, stderr } = await finished;
    expect(status, stderr).toBe(130);
    expect(fake.commands.at(-1)).toBe('guest-fsfreeze-thaw');
    expect(await machine.leftovers()).toEqual([]);
  });

  it('that somebody else has frozen is left so; one that a killed backup has frozen is thawed', async () => {
    const fake = await listen();
    fake.frozen = true;
    await expect(backup()).rejects.toMatchObject({
      code: 'ERR_STILLFRAME_GUEST_AGENT',
      message: expect.stringContaining('frozen already'),
    });
    expect(fake.frozen).toBe(true);

    await machine.killBackup({ disks: [{ device: 'disk0', target: machine.at('target'), speed: 1024 }] });
    const warnings: string[] = [];
    await backup({ onWarning: (message) => warnings.push(message) });
    expect(warnings).toEqual(['the guest was frozen still by a backup that was killed, and was thawed']);
    expect(fake.frozen).toBe(false);
  });
});
